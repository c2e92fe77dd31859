"""The loop, which knows no game."""

from __future__ import annotations

from pathlib import Path

import torch

from gandist.game import Phase, draws
from gandist.launcher import Stop, World
from gandist.recipe import Recipe
from gandist.run import Run, running
from gandist.seeding import derive

DONE, STOPPED = 0, 75


def reseed(seed: int, device: torch.device) -> None:
    """What `torch.manual_seed` does, for the CPU and one device alone: it also writes down a traceback for every kind of device
    that is not there, 0.3 ms each."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def step(run: Run, phases: tuple[Phase, ...]) -> None:
    """One step of the clock: every phase whose turn it is, each repeat with its own draw."""
    clock, players, turns = run.clock, run.players, []
    accumulate = run.recipe.run.accumulate
    for place, (phase, numbers) in enumerate(zip(phases, draws(phases, clock.step), strict=True)):
        if not phase.when(clock):
            continue
        player = players[phase.player]
        for draw in numbers:
            reseed(derive(run.recipe.run.seed, f"hidden/{place}", draw, run.world.rank), run.world.device)
            with player.turn(clock.images, clock.batch / phase.repeat, accumulate, phase.hold) as turn:
                for batch in turn.accumulate(run.stream.read(draw)):
                    loss, values = phase.loss(players, batch, clock)
                    turn.backward(loss)
                    run.meter.add(values)
            turns.append(turn)
    for turn in turns:
        turn.finish()
        run.meter.add({f"grad_norm/{turn.player.name}": turn.norm})


def train(recipe: Recipe, world: World, init_from: Path | None = None, allow_pipe: bool = False) -> int:
    """Trains or goes on; 0 when all images were counted, 75 when it was asked to stop and has saved."""
    stop = Stop(world)
    with running(recipe, world, init_from, allow_pipe) as run:
        while True:
            faults = run.data_faults()
            stopping, troubled = stop.agreed(bool(faults))
            stopping |= troubled and run.cannot_go_on(faults)
            run.upkeep(last=run.clock.done or stopping)
            if run.clock.done or stopping:
                break
            step(run, run.phases)
            run.clock.advance()
        run.refuse_lost_data()
        if not run.clock.done:
            run.bar.say(
                f"stopped at {run.clock.images:,} images on request; a checkpoint is saved, and the same command goes on"
            )
        elif run.clock.step != run.resumed_step:
            run.bar.say(f"done: {run.clock.images:,} images in {run.seconds / 60:.1f} min")
    stop.close()
    return DONE if run.clock.done else STOPPED
