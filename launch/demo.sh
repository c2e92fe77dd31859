#!/usr/bin/env bash
# Trains a DCGAN on 10,000 garments, on every GPU or on two CPU processes; nothing but Python ≥ 3.11 is needed.
# About 5 minutes on 2 cores, the set-up apart. Run again, it skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh ""

data=datasets/fashion-mnist run=runs/demo
gandist pack embedded:fashion-mnist "$data"
echo

gpus=$(python -c 'import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)')
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
options=(--num_machines 1 --dynamo_backend no --main_process_port 0)
if [ "$gpus" = 0 ]; then
    # --multi_gpu is Accelerate's switch for many processes; gandist makes them CPU processes where there is no GPU.
    options+=(--multi_gpu --num_processes 2)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
elif [ "$gpus" = 1 ]; then
    options+=(--num_processes 1)
else
    options+=(--multi_gpu --num_processes "$gpus")
fi

# The recipe's batch is 32; where the GPUs do not divide it, the next multiple.
[ $((32 % (gpus > 0 ? gpus : 1))) = 0 ] || set -- "run.batch=$(((32 / gpus + 1) * gpus))" "$@"

code=0
bash launch/node.sh "${options[@]}" -m gandist train configs/demo.yaml "data.path=$data" "run.folder=$run" "$@" || code=$?
[ "$code" = 0 ] || exit "$code"

last=$(ls -d "$run"/checkpoints/images_* | sort | tail -n 1)
cat <<END

samples      $(ls "$run"/samples/*.png | sort | tail -n 1)
log          $run/log.jsonl
checkpoint   $last

next:
  source .venv/bin/activate
  gandist sample $run --count 100 --seed 7                             # new garments
  bash launch/demo.sh run.images=400_000                              # train on from here
  gandist pack PHOTOS datasets/photos --size 64                       # your own folder of images
END
