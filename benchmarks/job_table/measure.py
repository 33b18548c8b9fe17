"""Held-out KL of the students of a job, with the same code for every contender."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from student_table.record import Texts

from job_table.peer import TOKENS
from job_table.plan import ARMS, Cell, Job
from job_table.processes import Done
from limbeck.config import ObjectiveConfig
from limbeck.data.order import permutation
from limbeck.distributed import World, checkpoint_name, load_checkpoint
from limbeck.evaluate.fidelity import Fidelity
from limbeck.evaluate.suites import SuiteContext
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import CausalLM, Distiller, ModelSource, load_model
from limbeck.students import Origin
from limbeck.students.depth import depth
from limbeck.teachers import DISTRIBUTION, LocalTeacher, TeacherRequest

ALONE = World(0, 1, torch.device("cpu"))


class Evaluator:
    """Measures students against the teacher on the held-out test documents."""

    def __init__(self, teacher: Path, texts: Texts) -> None:
        self._texts = texts
        self._vocabulary = 1 + max(texts.tokenizer.get_vocab().values())
        self._teacher = LocalTeacher(opened(teacher))
        self._teacher.require(TeacherRequest(needs=DISTRIBUTION, vocabulary_size=self._vocabulary))
        self._initial: dict[tuple[int, ...], float] = {}
        self._fidelity = Fidelity(
            SuiteContext(self._teacher, texts.tokenizer, texts.held_out, ALONE)
        )

    @property
    def num_layers(self) -> int:
        """Layers of the teacher."""
        return self._teacher.model.num_layers

    def starts(self, job: Job, seed: int) -> list[int]:
        """First tokens of the rows that limbeck reads with a seed, in its order."""
        text, count = self._texts.train, job.steps(ARMS["even"]) * job.rows
        rows = permutation(seed, 0, text.num_rows)[:count]
        assert len(rows) == count, f"the text has {text.num_rows} rows"
        first_windows = np.concatenate([[0], text.row_ends[:-1]])[rows]
        firsts = np.asarray(text.windows)[text.row_windows[first_windows], 0]
        return [min(int(first), len(text.tokens) - job.row - 1) for first in firsts]

    def require_same_tokens(self, folder: Path) -> None:
        """Stop if a peer read other tokens than limbeck does."""
        expected = hashlib.sha256(self._texts.train.tokens.tobytes()).hexdigest()
        if (folder / TOKENS).read_text(encoding="utf-8") != expected:
            raise SystemExit(f"the job in {folder} has tokenised the text in another way")

    def forward_kl(self, job: Job, cell: Cell, done: Done) -> dict[int, float]:
        """KL(teacher || student) in nats a token, by the step of the student."""
        if ARMS[cell.arm].kind != "limbeck":
            self.require_same_tokens(done.folder)
        points = job.points(ARMS[cell.arm])
        found = {points[0]: self._initial_kl(tuple(done.layers))}
        for step, student in zip(points[1:], self._students(points[1:], done.folder), strict=True):
            found[step] = self._measure(student)
        return found

    def _measure(self, student: CausalLM) -> float:
        student.vocabulary_size = self._vocabulary
        return self._fidelity.test(student).mean("forward_kl")

    def _initial_kl(self, layers: tuple[int, ...]) -> float:
        """KL of an untrained student with some of the teacher's layers, measured once."""
        if layers not in self._initial:
            origin = Origin(self._teacher.model, self._texts.tokenizer, ALONE)
            self._initial[layers] = self._measure(depth(origin, layers=layers).model)
        return self._initial[layers]

    def _students(self, points: list[int], folder: Path) -> Iterator[CausalLM]:
        """The students of a job after some steps, the last of which is its last."""
        checkpoints = folder / "run" / "checkpoints"
        if not checkpoints.exists():
            yield from (opened(folder / f"student-{step}") for step in points[:-1])
            yield opened(folder / "student")
            return
        for step in points[:-1]:
            yield self._restored(folder, checkpoints / checkpoint_name(step))
        yield opened(folder / "run" / "student")

    def _restored(self, folder: Path, checkpoint: Path) -> CausalLM:
        """The student of one of limbeck's checkpoints."""
        student, teacher = opened(folder / "run" / "student"), self._teacher.model
        layers = student.num_layers, teacher.num_layers
        shapes = PairShapes(*layers, student.width, teacher.width, LayerMap.uniform(*layers))
        objective = build_objective(ObjectiveConfig(alpha=1.0), shapes, head_budget_mb="auto")
        load_checkpoint(checkpoint, Distiller(student, objective), (), ALONE)
        return student


def opened(folder: Path) -> CausalLM:
    """A model in float32 on the CPU."""
    return load_model(ModelSource(str(folder)), device=ALONE.device, dtype=torch.float32)
