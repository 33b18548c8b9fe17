"""How long a step waits for a checkpoint, written at once and in the background.

    python benchmarks/checkpoint_blocking.py [--layers 12] [--width 768] [--rounds 5]

One process on the CPU, AdamW; both ways in turn, medians. Steps go on while the second is written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.models.tiny import tiny_llama
from tests.train.toy import ALONE, VOCABULARY, ToyBatches, toy_setup
from torch.optim import Optimizer

from limbeck.config import ObjectiveConfig, OptimConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller
from limbeck.teachers import LocalTeacher
from limbeck.train import TrainSetup, make_optimizers, train_step
from limbeck.train.checkpointer import Checkpointer


class Round(NamedTuple):
    """Seconds of one checkpoint.

    Attributes:
        waited: Of the steps, in all.
        published: From its beginning to its publication.
        steps: Of each step that was taken meanwhile.
    """

    waited: float
    published: float
    steps: list[float]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    student = tiny_llama(arguments.layers, arguments.width, VOCABULARY)
    shapes = PairShapes(arguments.layers, 1, arguments.width, 24, LayerMap(()))
    distiller = Distiller(student, build_objective(ObjectiveConfig(), shapes, head_budget_mb=1))
    teacher = LocalTeacher(tiny_llama(1, 24, VOCABULARY))
    config = OptimConfig(learning_rate=1e-4, steps=1)
    optimizers = make_optimizers(distiller, config, 1e-4, ALONE.device)
    batches = [ToyBatches().batch([0, 1, 2])]

    def step() -> None:
        train_step(distiller, teacher, optimizers, batches, ALONE)

    alone = statistics.median(timed(step) for _ in range(arguments.rounds))
    rounds: dict[bool, list[Round]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        for number in range(1, arguments.rounds + 1):
            for later, found in rounds.items():
                setup = toy_setup(
                    Path(name) / str(later),
                    pair=(distiller, teacher),
                    checkpoint={"asynchronous": later},
                )
                found.append(measured(setup, optimizers, number, step))
    count = sum(p.numel() for p in distiller.parameters())
    print(f"{count:,} parameters; a step alone {alone:.2f} s")
    for later, found in rounds.items():
        waited = statistics.median(each.waited for each in found)
        published = statistics.median(each.published for each in found)
        print(f"asynchronous {later}: waits {waited:.2f} s, published after {published:.2f} s")
    at_once, later_s = (statistics.median(r.waited for r in each) for each in rounds.values())
    meanwhile = [seconds for each in rounds[True] for seconds in each.steps]
    print(f"waits of the second in the first: {later_s / at_once:.1%}")
    if meanwhile:
        print(f"{len(meanwhile)} steps meanwhile, {statistics.median(meanwhile):.2f} s each")


def measured(
    setup: TrainSetup, optimizers: Sequence[Optimizer], number: int, step: Callable[[], None]
) -> Round:
    """One checkpoint, and steps until it is written."""
    checkpointer = Checkpointer(setup, optimizers)
    began = time.perf_counter()
    waited = timed(lambda: checkpointer.save(number, {}, ()))
    steps = []
    while checkpointer.is_writing:
        steps.append(timed(step))
    waited += timed(checkpointer.finish)
    published = time.perf_counter() - began
    checkpointer.finish_all()
    return Round(waited, published, steps)


def timed(action: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
