#!/usr/bin/env bash
# Runs `accelerate launch` on this node, hands a request to stop to the processes it started, and exits as they do.
#
#   bash launch/node.sh --multi_gpu --num_processes 8 -m gandist train RECIPE
#
# Why not `accelerate launch` alone: whatever its processes return it exits with 1, and it dies of SIGUSR1. Here SIGTERM,
# SIGUSR1 and Ctrl-C let the processes write one checkpoint, and 75 says that they did; 0, 1 and 2 come through as well.
set -u

if ! command -v accelerate >/dev/null; then
    PATH="$(dirname "$0")/../.venv/bin:$PATH"
    command -v accelerate >/dev/null || { echo "node.sh: no \`accelerate\`; activate the environment that has gandist" >&2; exit 2; }
fi

GANDIST_EXIT_FILE=$(mktemp)
export GANDIST_EXIT_FILE
trap 'rm -f "$GANDIST_EXIT_FILE"' EXIT

descendants() {
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child"
        descendants "$child"
    done
}

stop() {
    local process
    for process in $(descendants "$launcher"); do
        # The first process that is a gandist of its own is enough: the ranks agree among themselves.
        if ps -o args= -p "$process" | grep -q 'gandist'; then
            kill -TERM "$process" && return
        fi
    done
    kill -TERM "$launcher" 2>/dev/null
}

set -m # a process group of its own, so that Ctrl-C reaches the processes through stop() alone
accelerate launch "$@" &
launcher=$!
code=1
trap stop TERM USR1 INT

while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" # a signal ends the wait, not the launcher
    code=$?
done

noted=$(cat "$GANDIST_EXIT_FILE")
exit "${noted:-$code}"
