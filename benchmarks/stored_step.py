"""Speed and memory of a distil step from a store, beside cross-entropy of the same student.

    python benchmarks/stored_step.py --teacher FOLDER [--rounds 8]

The demo's teacher and student. The teacher is recorded once in three forms; then, in one process,
steps alternate: cross-entropy only (fused head), and the same batch from each store. A step is
look-up, student forward, fused head, backward; what is printed is the median of the ratios of the
cross-entropy step's time to the store's, round by round. Peak memory is that of a process of its
own for each way to train, the online teacher among them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from head.measure import resident_mb

from limbeck.batch import Batch
from limbeck.config import RunConfig
from limbeck.data import corpus_path
from limbeck.experiment import assemble, load
from limbeck.losses import SignalNeeds, StudentView
from limbeck.models import Distiller
from limbeck.recording import Recording
from limbeck.teachers import Teacher, TeacherRequest

FORMS = {
    "top_k": {"type": "top_k", "k": 64, "temperatures": [1.0]},
    "samples": {"type": "samples", "num_draws": 50},
    "hidden": {"type": "hidden"},
}
STUDENT = "student"
LAYERS = [0, 1, 2, 8, 9, 10, 11, 20, 21, 22, 23, 24, 27, 28, 29]


def main() -> None:
    """Record, then measure."""
    arguments = parser().parse_args()
    if arguments.one:
        one_process(arguments.one, Path(arguments.folder), arguments.teacher)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form in FORMS:
            with Recording(config(folder, arguments.teacher, form)) as recording:
                began = time.perf_counter()
                done = recording.record((0, 1), None, lambda: None)
                per_second = done.scored / (time.perf_counter() - began)
            print(f"recorded {form}: {done.scored:,} tokens, {per_second:,.0f} a second")
        # Cut once, so that no measured process ever opens the teacher's weights.
        with assemble(config(folder, arguments.teacher, "top_k", stored=True)) as run:
            assert run.parts.student is not None
            run.parts.publish_student(run.parts.student.model, folder / STUDENT)
        ratios = alternate(folder, arguments.teacher, arguments.rounds)
        for form, found in ratios.items():
            spread = f"{min(found):.3f} to {max(found):.3f}"
            print(f"{form:8} {statistics.median(found):.3f} of cross-entropy's speed ({spread})")
        for way in ("cross_entropy", *FORMS, "online"):
            command = [sys.executable, __file__, "--teacher", arguments.teacher]
            command += ["--one", way, "--folder", name]
            done_ = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{way:14} peak {float(done_.stdout.splitlines()[-1]):,.0f} MB")


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--teacher", required=True)
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument("--one", help=argparse.SUPPRESS)
    made.add_argument("--folder", help=argparse.SUPPRESS)
    return made


def config(folder: Path, teacher: str, form: str, *, stored: bool = False) -> RunConfig:
    """The recipe of a recording, or of a run that learns from it."""
    cut = folder / STUDENT
    student = {"type": "depth", "path": teacher, "layers": LAYERS}
    if cut.exists():
        student = {"type": "pretrained", "path": str(cut)}
    recipe = {
        "teacher": {"type": "online", "path": teacher},
        "student": student,
        "data": {
            "type": "text",
            "path": str(corpus_path("train")),
            "sequence_length": 256,
            "max_documents": 6,
        },
        "record": {"form": FORMS[form], "output": str(folder / form)},
        "objective": {"alpha": 0.9},
        "optim": {"learning_rate": 1e-4, "steps": 4, "tokens_per_step": 512},
        "memory": {"micro_batch": 2},
        "output": str(folder / "run"),
    }
    if stored:
        recipe["teacher"] = {"type": "stored", "path": str(folder / form)}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return load(path)


def step(distiller: Distiller, teacher: Teacher, batch: Batch) -> float:
    """Seconds of look-up, forward and backward."""
    began = time.perf_counter()
    distiller.zero_grad(set_to_none=False)
    signal = teacher.signal(batch)
    hidden, _ = distiller.student(batch, ())
    view = StudentView(hidden, distiller.student.head, {}, batch.targets())
    loss, _ = distiller.objective(view, signal, batch.num_scored())
    loss.backward()
    return time.perf_counter() - began


def alternate(folder: Path, teacher: str, rounds: int) -> dict[str, list[float]]:
    """Of each form, its speed as a share of cross-entropy's, round by round."""
    runs = {form: assemble(config(folder, teacher, form, stored=True)) for form in FORMS}
    first = runs["top_k"].parts
    assert first.student is not None
    student = first.student.model
    hard = replace(first.config.objective, alpha=0.0)
    cross_entropy = first.distiller(student, hard)
    soft = {form: run.parts.distiller(student, run.config.objective) for form, run in runs.items()}
    silent = SignalNeeds()
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(rounds + 1):
        rows = [(2 * turn) % first.data.num_rows, (2 * turn + 1) % first.data.num_rows]
        batch = first.data.batch(rows)
        for form, run in runs.items():
            run.parts.teacher.require(TeacherRequest(needs=silent))
            plain = step(cross_entropy, run.parts.teacher, batch)
            run.parts.teacher.require(TeacherRequest(needs=soft[form].objective.needs))
            took = step(soft[form], run.parts.teacher, batch)
            if turn:  # the first round warms up
                found[form].append(plain / took)
    return found


def one_process(way: str, folder: Path, teacher: str) -> None:
    """A few steps of one way to train, and the peak memory of the process."""
    form = way if way in FORMS else "top_k"
    recipe = config(folder, teacher, form, stored=way != "online")
    if way == "cross_entropy":
        recipe = replace(recipe, objective=replace(recipe.objective, alpha=0.0))
    with assemble(recipe) as run:
        parts = run.parts
        assert parts.student is not None
        distiller = parts.distiller(parts.student.model, recipe.objective)
        parts.teacher.require(TeacherRequest(needs=distiller.objective.needs))
        for turn in range(3):
            step(distiller, parts.teacher, parts.data.batch([2 * turn, 2 * turn + 1]))
    print(resident_mb("VmHWM"))


if __name__ == "__main__":
    main()
