"""Students of many shapes before and after training: which shape and loss end closest.

    python benchmarks/students.py --teacher FOLDER [--tokens 10000] [--seeds 3] [--work DIR]
        [--shapes 24,15,20,10,width:24,width:15] [--arms ce,kl,kl_ce,kl_cosine,kl_relations]
        [--choices 24:even,24:block_influence,15:even,15:block_influence]
        [--arm "kl_cka=objective.alpha=1 objective.extra=[{type: cka, weight: 0.1}]"]

A shape is a number of layers chosen by loss (`24`), in another way (`24:even`), a student narrowed
to as many parameters as that many layers have (`width:24`), or one cut in both (`both:15`). Every
shape is made once and saved, and measured once before training. The teacher runs once, into a store
of exact hidden states, from which every cell learns and against which it is measured: the same rows
in the same order for one seed, other rows for another, the same number of tokens for all.

A finished cell is a line in WORK/cells.jsonl; started again, the command goes on with what is
missing. Cells come in the order in which they would be missed; the tables are written anew after
each (results/students.md, .json), the plot at the end (.svg; `--tables` writes all of them from the
cells that are there). Overnight: `--tokens 100000`.

Learning rates are those found best for 15 layers (LOG.md): 3e-4 for cross-entropy, 6e-4 for the
others; `--rates 3e-4,6e-4,1.2e-3` lets every cell choose on the documents that decide, at so many
times the cost.
"""

from __future__ import annotations

import argparse
import datetime
import gc
from collections.abc import Sequence

import torch
from student_table.heal import Bench, measure, steps_of
from student_table.plan import BEFORE, Cell, arms_of, cells, options, shapes_of
from student_table.record import open_store, open_texts
from student_table.results import Cells, draw, write_results
from student_table.shapes import make_shapes

from limbeck.distributed import world


def main() -> None:
    """Make the shapes, record the teacher, run the missing cells, write the tables."""
    told = options(__doc__ or "")
    told.work.mkdir(parents=True, exist_ok=True)
    arms = arms_of(told)
    done = Cells(told)
    missing = [cell for cell in cells(told, list(arms)) if not done.has(cell)]
    if missing and not told.tables:
        make_shapes(told, [shape for group in shapes_of(told) for shape in group])
        fill(told, done, arms, missing)
    draw(write_results(told, done, list(arms)), list(arms))


def fill(
    told: argparse.Namespace, done: Cells, arms: dict[str, str], missing: Sequence[Cell]
) -> None:
    """Measure the missing cells."""
    with world(torch.device("cpu"), "none") as here:
        texts = open_texts(told)
        layers = any("extra" in overrides for overrides in arms.values())
        print("recording the teacher, where it has not been recorded yet ...", flush=True)
        store = open_store(told, texts, steps_of(told), layers, here)
        gc.collect()  # the teacher is not needed any more
        bench = Bench(told, texts, store, here)
        mine: list[dict[str, object]] = []
        for number, cell in enumerate(missing):
            found = measure(bench, cell, arms.get(cell.arm, ""))
            done.add(found)
            mine.append(found)
            write_results(told, done, list(arms))
            scores = found["scores"]
            print(
                f"{number + 1}/{len(missing)}  {cell.shape} {cell.arm} seed {cell.seed}: forward "
                f"KL {scores.mean('forward_kl'):.4f}, {found['seconds']:.0f} s "
                f"({found['training_seconds']:.0f} s of it in steps); "
                f"{left(done, missing[number + 1 :])}",
                flush=True,
            )


def left(done: Cells, missing: Sequence[Cell]) -> str:
    """About how long the missing cells will take, by the ones that were measured like them."""
    sizes = {cell["shape"]: cell["parameters"] for cell in done.all}
    total = 0.0
    for cell in missing:
        like = [c for c in done.all if (c["arm"] == BEFORE) == (cell.arm == BEFORE)]
        if not like:
            return "too early to say how long the rest will take"
        like = [c for c in like if c["arm"] == cell.arm] or like
        per_parameter = sum(c["seconds"] / c["parameters"] for c in like) / len(like)
        total += per_parameter * sizes.get(cell.shape, like[-1]["parameters"])
    ends = datetime.datetime.now() + datetime.timedelta(seconds=total)
    return f"about {total / 60:.0f} min left, until {ends:%H:%M}"


if __name__ == "__main__":
    main()
