"""The whole job: held-out KL against wall-clock time since the process started.

    make BENCH=.bench .bench/.peers
    .bench/bin/python -W ignore benchmarks/job.py --work runs/job

SmolLM2-135M-Instruct, 30 layers into 24, on 30,720 tokens of the text that ships with limbeck. Each
contender gets a fresh process, from imports to the saved student: TRL's DistillationTrainer and a
plain loop, which keep evenly spaced layers, and `limbeck distill recipe.yaml` with layers chosen
evenly, by block influence, and by block influence with a third of the tokens; `--arms loss` names
one more. They read the same rows in the same order, with the same rate, schedule and threads, and
with `--dtype bfloat16` compute in it, the peers with autocast.

One process runs at a time, and the second seed takes them in reverse order. A student is saved
after every quarter of the steps; the seconds of saving are logged and subtracted, but for the last.
Then this process measures the students, all with the same code. Finished cells are lines of
WORK/cells.jsonl and are not run again. Results: results/job.md and job.svg. `--small` tries it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from job_table.measure import ALONE, Evaluator
from job_table.plan import ARMS, Cell, cells, job_of, options
from job_table.processes import Runner
from job_table.results import Cells, write_results
from student_table.record import open_texts

from limbeck.heap import freed_memory_kept
from limbeck.models import cache_folder, embedded_teacher


def main() -> None:
    """Run the missing cells, and write the table."""
    chosen = options(__doc__ or "")
    chosen.teacher = chosen.teacher or str(embedded_teacher(cache_folder(), print))
    chosen.work.mkdir(parents=True, exist_ok=True)
    done = Cells(job_of(chosen), chosen.work)
    missing = [cell for cell in cells(chosen) if not done.has(cell)]
    if missing and not chosen.tables:
        fill(chosen, done, missing)
    write_results(done, chosen.arms, chosen.out)


def fill(chosen: argparse.Namespace, done: Cells, missing: Sequence[Cell]) -> None:
    """Run and measure the missing cells."""
    job, teacher = done.job, Path(chosen.teacher).absolute()
    evaluator = Evaluator(teacher, open_texts(chosen, job.row))
    runner = Runner(job, teacher, evaluator.num_layers, chosen.work)
    runner.warm_up([cell.arm for cell in missing])
    for number, cell in enumerate(missing, start=1):
        ran = runner.run(cell, evaluator.starts(job, cell.seed))
        with freed_memory_kept(ALONE.device):
            forward_kl = evaluator.forward_kl(job, cell, ran)
        done.add(cell, ran, forward_kl)
        write_results(done, chosen.arms, chosen.out)
        shutil.rmtree(ran.folder)  # gigabytes
        print(
            f"{number}/{len(missing)}  {ARMS[cell.arm].label}, seed {cell.seed}: "
            f"{ran.timeline.student:.0f} s, {ran.timeline.step_seconds:.2f} a step, KL "
            f"{', '.join(f'{value:.3f}' for value in forward_kl.values())}",
            flush=True,
        )


if __name__ == "__main__":
    main()
