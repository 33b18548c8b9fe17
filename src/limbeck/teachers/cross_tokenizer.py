"""A teacher whose tokenizer is not the student's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.errors import ConfigError, DataError
from limbeck.losses import Objective, SignalNeeds, SignalPart, TeacherSignal
from limbeck.losses.distributions import DenseLogits, MergedOutcomes, OutcomeMap
from limbeck.models import PreTrainedTokenizerBase
from limbeck.registry import Component
from limbeck.teachers.base import (
    DISTRIBUTION,
    Teacher,
    TeacherInfo,
    TeacherRequest,
    TextWindows,
    teachers,
)
from limbeck.teachers.local import LocalTeacher, require_local
from limbeck.teachers.rereading import reread
from limbeck.tokenizers import (
    MIN_COVERED,
    Aligner,
    Coverage,
    Outcomes,
    TokenBytes,
    add_coverage,
    classes_of,
    shared_outcomes,
)

SHOWN = 5
"""Texts that cannot be aligned which an error lists."""

ALIGNED_AT_ONCE = 256

COVERAGE_WINDOWS = 256
"""Windows of the training text, evenly spaced, on which coverage is counted."""

Choice = Literal["error", "skip"]


@dataclass(frozen=True)
class Pair:
    """The two tokenizers of a run.

    Attributes:
        tokenizer: The student's.
        aligner: Reads the student's tokens as the teacher's.
        outcomes: Of both vocabularies.
        outcome_map: The same on the teacher's device.
    """

    tokenizer: PreTrainedTokenizerBase
    aligner: Aligner
    outcomes: Outcomes
    outcome_map: OutcomeMap


class CrossTokenizerTeacher(Teacher):
    """A local teacher that reads the text of the student's tokens with its own tokenizer.

    Its signal has one part, at the positions where both tokenizers stand at one byte of the text:
    the teacher's next-token distribution, compared on the outcomes that both vocabularies share.
    """

    def __init__(
        self, teacher: LocalTeacher, *, unaligned: Choice = "error", uncovered: Choice = "error"
    ) -> None:
        """
        Args:
            teacher: The model that answers.
            unaligned: `error` refuses texts that its tokenizer cannot represent byte by byte;
                `skip` trains on them without a teacher.
            uncovered: `error` refuses a class of tokens that the teacher does not reach; `skip`
                trains it on the text alone.
        """
        self._teacher = teacher
        self._unaligned = unaligned
        self._uncovered = uncovered
        self._pair: Pair | None = None
        self._needs = DISTRIBUTION
        self._text_notes: tuple[str, ...] = ()

    @property
    def info(self) -> TeacherInfo:
        """Of the model; `vocabulary_rows` counts the student's ids, once those are known."""
        info = self._teacher.info
        if self._pair is None:
            return info
        return replace(info, vocabulary_rows=len(self._pair.aligner.student))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's, whose ids it reads, once `require` has been given it; else its own."""
        return self._teacher.tokenizer if self._pair is None else self._pair.tokenizer

    @property
    def notes(self) -> tuple[str, ...]:
        """Of the model."""
        return self._teacher.notes

    @property
    def text_notes(self) -> tuple[str, ...]:
        """Coverage of the training text in both directions, and texts without a teacher."""
        return self._text_notes

    def require(self, request: TeacherRequest) -> None:
        """Align the two vocabularies, then every text of the run.

        Raises:
            ConfigError: A tokenizer is not byte-exact, a class of tokens is uncovered, or the run
                needs hidden states, chat templates or generated text.
            DataError: Texts cannot be aligned.
        """
        refuse_unsupported(request)
        if request.student_tokenizer is not None:
            self._pair = make_pair(request.student_tokenizer, self._teacher)
        inner = TeacherRequest(needs=request.needs)
        if self._pair is not None:
            inner = replace(inner, vocabulary_size=len(self._pair.aligner.teacher))
        self._teacher.require(inner)
        self._needs = request.needs
        if request.objective is not None:
            self._require_terms(request.objective)
        if request.texts:
            self._require_texts(request.texts)

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """One part, at the positions where both tokenizers stand at one byte."""
        if not self._needs.distribution:
            return TeacherSignal()
        reading = reread(batch, self._known.aligner)
        device = batch.scored.device
        member = self._teacher.signal(reading.batch.to(device)).distribution
        assert member is not None, "a distribution was required"
        part = MergedOutcomes(member, self._known.outcome_map)
        return TeacherSignal((SignalPart(reading.positions.to(device), part),))

    def abandon_pass(self) -> None:
        """Release what the model holds of a failed pass."""
        self._teacher.abandon_pass()

    def shard(self, world: World) -> None:
        """Spread the model over the ranks."""
        self._teacher.shard(world)

    def with_needs(self, needs: SignalNeeds) -> Teacher:
        """The same teacher with needs of its own; weights are shared."""
        other = copy.copy(self)
        inner = self._teacher.with_needs(needs)
        assert isinstance(inner, LocalTeacher)
        other._teacher, other._needs = inner, needs
        return other

    @property
    def _known(self) -> Pair:
        assert self._pair is not None, "the student's tokenizer was not required first"
        return self._pair

    def _require_terms(self, objective: Objective) -> None:
        """Compute every logit term on one position, so that it can refuse this form."""
        student, teacher, _ = outcome_map = self._known.outcome_map
        logits, whole = (student.new_zeros(1, len(side)).float() for side in (student, teacher))
        position = MergedOutcomes(DenseLogits(whole), outcome_map)
        for term in objective.logit_terms.values():
            if self._needs.distribution:
                term(logits, student.new_zeros(1), position)

    def _require_texts(self, texts: Sequence[TextWindows]) -> None:
        """Align every window, and count the coverage of the first text."""
        problems, num_windows = [], 0
        for text in texts:
            problems += self._problems(text)
            num_windows += len(text.windows)
        if problems and (self._unaligned == "error" or len(problems) == num_windows):
            listed = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
            first = f", the first {SHOWN}" if len(problems) > SHOWN else ""
            remedy = "" if len(problems) == num_windows else (
                ", or set teacher.unaligned: skip to train on them without a teacher"
            )  # fmt: skip
            raise DataError(
                f"Every text must be bytes that both tokenizers read alike; {len(problems):,} of "
                f"{num_windows:,} windows are not{first}:\n{listed}\nNormalise the text once, "
                f"before both{remedy}."
            )
        notes = list(self._coverage(texts[0]).lines())
        if problems:
            notes.append(
                f"{len(problems):,} of {num_windows:,} windows have no teacher and are trained on "
                f"the text alone; the first: {problems[0]}."
            )
        self._text_notes = tuple(notes)

    def _problems(self, text: TextWindows) -> list[str]:
        """Windows of a text that cannot be aligned, and why."""
        data, found = text.data, []
        for start in range(0, len(text.windows), ALIGNED_AT_ONCE):
            windows = [data.windows[w] for w in text.windows[start : start + ALIGNED_AT_ONCE]]
            tokens = [data.tokens[at : at + length + 1].tolist() for at, length, _ in windows]
            found += [
                f"{text.option}: {data.document_name(int(window[2]))}: {aligned}"
                for window, aligned in zip(windows, self._known.aligner.align(tokens), strict=True)
                if isinstance(aligned, str)
            ]
        return found

    def _coverage(self, text: TextWindows) -> Coverage:
        """Coverage of a sample of a text.

        Raises:
            ConfigError: A class of tokens is uncovered.
        """
        pair, data, coverage = self._known, text.data, Coverage()
        classes = (classes_of(pair.aligner.student), classes_of(pair.aligner.teacher))
        count = min(len(text.windows), COVERAGE_WINDOWS)
        for index in np.linspace(0, len(text.windows) - 1, count).astype(int).tolist():
            start, length, _ = data.windows[text.windows[index]].tolist()
            ids = np.asarray(data.tokens[start : start + length + 1], dtype=np.int64)
            (aligned,) = pair.aligner.align([ids.tolist()])
            if not isinstance(aligned, str):
                add_coverage(coverage, ids, aligned, pair.outcomes, classes)
        if (uncovered := coverage.uncovered()) and self._uncovered == "error":
            raise ConfigError(
                "A teacher with another tokenizer must reach at least "
                f"{MIN_COVERED:.0%} of each class of tokens in {text.option}, and does not in "
                f"{'; '.join(uncovered)}. Those would be trained on the text alone. Use another "
                "tokenizer, or set teacher.uncovered: skip."
            )
        return coverage


def refuse_unsupported(request: TeacherRequest) -> None:
    """Refuse what no teacher with another tokenizer provides.

    Raises:
        ConfigError: Hidden states, chat templates or generated text are required.
    """
    if request.generated:
        raise ConfigError(
            "rollout: text that is generated during the run needs a teacher with the student's "
            "tokenizer, and teacher.type is cross_tokenizer. Remove `rollout`."
        )
    if request.uses_template:
        raise ConfigError(
            "data.type: conversations are written with the student's chat template, which a "
            "teacher with another tokenizer was not trained on. Use data of type text or "
            "completion."
        )
    if layers := sorted(request.needs.layers | request.needs.projections):
        raise ConfigError(
            f"The objective reads hidden states of the teacher's layers {layers}, and those of a "
            "teacher with another tokenizer belong to other tokens. Leave that term out."
        )


def make_pair(student: PreTrainedTokenizerBase, teacher: LocalTeacher) -> Pair:
    """Both tokenizers byte by byte, and the outcomes they share.

    Raises:
        ConfigError: One of them is not byte-exact, or the teacher has too few rows.
    """
    sides = TokenBytes(student, "student"), TokenBytes(teacher.tokenizer, "teacher")
    rows = teacher.info.vocabulary_rows
    if rows < len(sides[1]):
        raise ConfigError(
            f"The teacher must have a row for each of the {len(sides[1]):,} token ids of its "
            f"tokenizer, and its embedding has {rows:,}. Give the tokenizer that belongs to it."
        )
    outcomes = shared_outcomes(*sides)
    device = next(teacher.model.parameters()).device
    student_of, teacher_of = (
        torch.from_numpy(each).to(device) for each in (outcomes.student, outcomes.teacher)
    )
    return Pair(
        student,
        Aligner(*sides, teacher.info.max_positions),
        outcomes,
        OutcomeMap(student_of, teacher_of, outcomes.num_outcomes),
    )


@teachers.register("cross_tokenizer")
def cross_tokenizer(
    world: World,
    *,
    teacher: Annotated[Component, teachers],
    unaligned: Choice = "error",
    uncovered: Choice = "error",
) -> CrossTokenizerTeacher:
    """A model with another tokenizer, compared where both tokenizers stand at one byte."""
    inner = teachers.bind(teacher, "teacher.teacher")(world)
    local = require_local(inner, "teacher.teacher: a teacher with another tokenizer")
    return CrossTokenizerTeacher(local, unaligned=unaligned, uncovered=uncovered)
