"""Where the time of a whole training step of the demo goes.

    python benchmarks/step.py [--steps 5] [--teacher FOLDER]

Trains as `limbeck demo` does, with torch's profiler on, and names the share of the teacher, of the
student's forward and backward pass, of the head's matrix products, of the rest of the loss, of the
optimizer, and of all that is none of these.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from limbeck.commands.demo_store import shipped_recipe
from limbeck.data import one_order
from limbeck.distributed.stopping import SIGNALS
from limbeck.experiment import assemble
from limbeck.models import cache_folder, embedded_teacher
from limbeck.teachers import TeacherRequest
from limbeck.train.optimizers import make_optimizers
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--teacher", type=Path)
    options = parser.parse_args()
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    with tempfile.TemporaryDirectory() as folder:
        config = shipped_recipe("demo.yaml", teacher, Path(folder) / "run", None)
        with assemble(config) as run:
            parts, world = run.parts, run.world
            distiller = parts.distiller(parts.take_student(Path(folder)), config.objective)
            distiller.train()
            parts.teacher.require(TeacherRequest(needs=distiller.objective.needs))
            rate = config.optim.learning_rate
            assert isinstance(rate, float)
            optimizers = make_optimizers(distiller, config.optim, rate, world.device)
            for owner, method, part in (
                (parts.teacher, "signal", "teacher"),
                (distiller.student, "forward", "student forward"),
                (distiller.objective, "forward", "loss"),
                (torch.Tensor, "backward", "backward"),
            ):
                setattr(owner, method, named(part, getattr(owner, method)))

            def step(number: int) -> None:
                size, count = int(config.memory.micro_batch), parts.data.num_rows
                rows = one_order(0, count).rows(number * size, (number + 1) * size)
                batches = [parts.data.batch(rows)]
                tokens, *_ = count_step(batches, [0] * len(SIGNALS), world)
                done = accumulate(distiller, parts.teacher, batches, tokens, world)
                with record_function("optimizer"):
                    apply(distiller, optimizers, done, world, max_grad_norm=1.0)

            step(0)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for number in range(1, options.steps + 1):
                    named("step", step)(number)
    found = shares(profiled.events())
    seconds = found.pop("seconds") / options.steps
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{seconds:.2f} s a step, {threads} thread(s), load {load:.1f}")
    for name, share in found.items():
        print(f"{share:7.1%}  {name}")
    print(
        f"{found['rest of the loss'] + found['everything else']:7.1%}  neither models, "
        "products nor optimizer"
    )


if __name__ == "__main__":
    main()
