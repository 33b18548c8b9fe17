"""Where the time of a whole training step of the demo goes.

    python benchmarks/step.py [--steps 5] [--teacher FOLDER] [KEY=VALUE ...]

Trains as `limbeck demo` does, and then with torch's profiler on, and names the share of the
teacher, of the student's forward and backward pass, of the head's matrix products, of the rest of
the loss, of the optimizer, and of all that is none of these. With options of a recipe, steps with
and without them take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from limbeck.commands.demo_store import shipped_recipe
from limbeck.data import one_order
from limbeck.distributed.stopping import SIGNALS
from limbeck.experiment import Run, assemble
from limbeck.heap import freed_memory_kept
from limbeck.models import Distiller, cache_folder, embedded_teacher
from limbeck.teachers import TeacherRequest
from limbeck.train.optimizers import Optimizers, make_optimizers
from limbeck.train.step import accumulate, apply, count_step

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
PARTS = ("teacher", "student forward", "loss", "backward", "optimizer")


def named(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work, under a name the profiler shows."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return work(*args, **kwargs)

    return wrapped


def ancestors(event: Any) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def shares(events: Any) -> dict[str, float]:
    """Share of each part of the whole steps' time."""
    whole = sum(event.cpu_time_total for event in events if event.name == "step")
    spent = {
        name: sum(event.cpu_time_total for event in events if event.name == name) for name in PARTS
    }
    products = sum(
        event.cpu_time_total
        for event in events
        if event.name in PRODUCTS and "loss" in ancestors(event)
    )
    spent = {
        "teacher": spent["teacher"],
        "student forward": spent["student forward"],
        "student backward": spent["backward"],
        "head's products": products,
        "optimizer": spent["optimizer"],
        "rest of the loss": spent["loss"] - products,
    }
    spent["everything else"] = whole - sum(spent.values())
    return {name: each / whole for name, each in spent.items()} | {"seconds": whole / 1e6}


@dataclass
class Stepper:
    """Takes steps of one run."""

    run: Run
    distiller: Distiller
    optimizers: Optimizers
    seconds: list[float] = field(default_factory=list)

    def step(self, number: int) -> None:
        """One optimizer step, as the loop takes it."""
        parts, world, config = self.run.parts, self.run.world, self.run.config
        started = time.perf_counter()
        size = config.optim.tokens_per_step // config.data.sequence_length
        rows = one_order(0, parts.data.num_rows).rows(number * size, (number + 1) * size)
        batches = [parts.data.batch(rows)]
        tokens, *_ = count_step(batches, [0] * len(SIGNALS), world)
        done = accumulate(self.distiller, parts.teacher, batches, tokens, world)
        with record_function("optimizer"):
            apply(self.distiller, self.optimizers, done, world, max_grad_norm=1.0)
        self.seconds.append(time.perf_counter() - started)


def stepper(run: Run, folder: Path) -> Stepper:
    """A run ready to train, with the names of its parts in the profile."""
    config, parts, world = run.config, run.parts, run.world
    distiller = parts.distiller(parts.take_student(folder), config.objective)
    distiller.train()
    parts.teacher.require(TeacherRequest(needs=distiller.objective.needs))
    rate = config.optim.learning_rate
    assert isinstance(rate, float)
    for owner, method, part in (
        (parts.teacher, "signal", "teacher"),
        (distiller.student, "forward", "student forward"),
        (distiller.objective, "forward", "loss"),
    ):
        setattr(owner, method, named(part, getattr(owner, method)))
    return Stepper(run, distiller, make_optimizers(distiller, config.optim, rate, world.device))


def profiled(one: Stepper, steps: range) -> dict[str, float]:
    """Shares of the parts of some steps."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        for number in steps:
            named("step", one.step)(number)
    return shares(events.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the other setting")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--teacher", type=Path)
    options = parser.parse_args()
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    settings: dict[str, list[str]] = {"the demo's recipe": []}
    if options.overrides:
        settings[" ".join(options.overrides)] = options.overrides
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        backward = named("backward", torch.Tensor.backward)
        opened.enter_context(patch.object(torch.Tensor, "backward", backward))
        all_of_them: dict[str, Stepper] = {}
        for name, more in settings.items():
            output = folder / str(len(all_of_them))
            config = shipped_recipe("demo.yaml", teacher, output, None, more)
            all_of_them[name] = stepper(opened.enter_context(assemble(config)), output)
        opened.enter_context(freed_memory_kept(torch.device("cpu")))
        for number in range(options.steps + 1):
            for one in list(all_of_them.values())[:: 1 if number % 2 else -1]:
                one.step(number)
        medians = {name: statistics.median(one.seconds[1:]) for name, one in all_of_them.items()}
        for name, one in all_of_them.items():
            found = profiled(one, range(options.steps + 1, 2 * options.steps + 1))
            show(name, medians, found)


def show(name: str, medians: dict[str, float], found: dict[str, float]) -> None:
    """Print the time of a setting, and the shares of its parts."""
    first = next(iter(medians.values()))
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(
        f"{name}: {medians[name]:.3f} s a step, {medians[name] / first:.2f} of the first; "
        f"{threads} thread(s), load {load:.1f}; {found.pop('seconds'):.2f} s profiled"
    )
    for part, share in found.items():
        print(f"{share:7.1%}  {part}")
    rest = found["rest of the loss"] + found["everything else"]
    print(f"{rest:7.1%}  neither models, products nor optimizer")


if __name__ == "__main__":
    main()
