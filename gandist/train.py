"""The loop, which knows no game."""

from __future__ import annotations

from pathlib import Path

from gandist.launcher import Stop, World
from gandist.recipe import Recipe
from gandist.run import running
from gandist.steps import Stepper

DONE, STOPPED = 0, 75


def train(recipe: Recipe, world: World, init_from: Path | None = None, allow_pipe: bool = False) -> int:
    """Trains or goes on; 0 when all images were counted, 75 when it was asked to stop and has saved."""
    stop = Stop(world)
    with running(recipe, world, init_from, allow_pipe) as run, Stepper(run) as step:
        while True:
            faults = run.data_faults()
            stopping, troubled = stop.agreed(bool(faults))
            stopping |= troubled and run.cannot_go_on(faults)
            run.upkeep(last=run.clock.done or stopping)
            if run.clock.done or stopping:
                break
            step()
            run.clock.advance()
        run.refuse_lost_data()
        if not run.clock.done:
            run.bar.say(
                f"stopped at {run.clock.images:,} images on request; a checkpoint is saved, and the same command goes on"
            )
        elif run.clock.step != run.resumed_step:
            took = f"{run.seconds / 60:.1f} min" if run.seconds >= 60 else f"{run.seconds:.0f} s"
            run.bar.say(
                f"done: {run.clock.images:,} images in {took}; {run.folder} has the checkpoint, samples and log"
            )
    stop.close()
    return DONE if run.clock.done else STOPPED
