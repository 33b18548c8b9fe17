"""A teacher whose tokenizer is not the student's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from limbeck.batch import Batch, sent
from limbeck.distributed import World, main_first
from limbeck.errors import ConfigError, DataError
from limbeck.losses import SignalNeeds, SignalPart, TeacherSignal
from limbeck.losses.distributions import DenseLogits, LazyLogits, MergedOutcomes, OutcomeMap
from limbeck.losses.head.likelihood import token_logprobs
from limbeck.losses.signal import ChunkLikelihoods
from limbeck.losses.terms.alm import chunk_sums
from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.registry import Component
from limbeck.teachers.base import (
    DISTRIBUTION,
    NOTHING,
    Teacher,
    TeacherInfo,
    TeacherRequest,
    TextWindows,
    WrappingTeacher,
    teachers,
)
from limbeck.teachers.conversations import ConversationAligner, ends_of_answers
from limbeck.teachers.local import LocalTeacher, require_local
from limbeck.teachers.rereading import Rereading, reread
from limbeck.teachers.stored import hashes, window_of
from limbeck.tokenizers import (
    MIN_COVERED,
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

CHECKED_WINDOWS = 16_384
"""Windows of a text, evenly spaced, that are aligned before the first step. A million tokens take
about ten seconds; a window that only the run finds has no teacher."""

COVERAGE_WINDOWS = 256
"""Windows of the training text, evenly spaced, on which coverage is counted."""

Choice = Literal["error", "skip"]


@dataclass(frozen=True)
class TokenizerPair:
    """The two tokenizers of a run.

    Attributes:
        aligner: Reads the student's tokens as the teacher's.
        outcomes: Of both vocabularies.
        outcome_map: The same as tensors, on the CPU.
        hashes: Of the teacher's tokenizer and its template.
    """

    tokenizer: PreTrainedTokenizerBase
    aligner: ConversationAligner
    outcomes: Outcomes
    outcome_map: OutcomeMap
    hashes: Mapping[str, str]


class CrossTokenizerTeacher(WrappingTeacher):
    """A local teacher that reads the text of the student's tokens with its own tokenizer.

    Its signal has one part, at the positions where both tokenizers stand at one byte of the text:
    the teacher's next-token distribution, compared on the outcomes that both vocabularies share.
    """

    gives_likelihoods = True
    _teacher: LocalTeacher

    def __init__(
        self,
        teacher: LocalTeacher,
        world: World,
        *,
        unaligned: Choice = "error",
        uncovered: Choice = "error",
    ) -> None:
        """
        Args:
            world: Its rank 0 tokenises conversations for the teacher while others wait; signals are
                on its device.
            unaligned: `error` refuses texts that its tokenizer cannot represent byte by byte, if
                one of the `CHECKED_WINDOWS` is; `skip` trains on them without a teacher.
            uncovered: `error` refuses a class of tokens that the teacher does not reach; `skip`
                trains it on the text alone.
        """
        super().__init__(teacher)
        self._world = world
        self._unaligned = unaligned
        self._uncovered = uncovered
        self._pair: TokenizerPair | None = None
        self._needs = DISTRIBUTION
        self._text_notes: tuple[str, ...] = ()

    @property
    def info(self) -> TeacherInfo:
        """Of the model; `vocabulary_rows` counts the student's ids, once those are known."""
        info = self._teacher.info
        if self._pair is None:
            return info
        return replace(
            info,
            vocabulary_rows=len(self._pair.aligner.student),
            tokenizer_sha256=self._pair.hashes["tokenizer"],
            template_sha256=self._pair.hashes["template"],
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's, whose ids it reads, once `require` has been given it; else its own."""
        return self._teacher.tokenizer if self._pair is None else self._pair.tokenizer

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the model; coverage of the training text, and texts without a teacher."""
        return (*self._teacher.notes, *self._text_notes)

    def require(self, request: TeacherRequest) -> None:
        """Align the two vocabularies, then every text of the run.

        Raises:
            ConfigError: A tokenizer is not byte-exact, a class of tokens is uncovered, or the run
                needs hidden states, chat templates or generated text.
            DataError: Texts cannot be aligned.
        """
        refuse_unsupported(request)
        if request.student_tokenizer is not None:
            self._pair = make_pair(
                request.student_tokenizer, self._teacher, uses_template=request.uses_template
            )
            self._outcome_map = self._pair.outcome_map.to(self._world.device)
        inner = TeacherRequest(needs=model_needs(request.needs))
        if self._pair is not None:
            inner = replace(inner, vocabulary_size=len(self._pair.aligner.teacher))
        self._teacher.require(inner)
        self._needs = request.needs
        if request.objective is not None and request.needs.distribution:
            student, teacher, _ = outcome_map = self._known.outcome_map
            position = MergedOutcomes(DenseLogits(torch.zeros(1, len(teacher))), outcome_map)
            request.objective.try_terms(len(student), position)
        if request.texts:
            self._require_texts(request.texts)

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """One part where both tokenizations align, and likelihoods if they are needed.

        A batch without a text that can be aligned gives a part without positions.
        """
        needs = self._needs
        if needs == NOTHING:
            return TeacherSignal()
        reading = self.reread(batch)
        device = batch.scored.device
        member = self._teacher.signal(reading.batch.to(device)).distribution
        assert isinstance(member, LazyLogits), "a local teacher gives hidden states and its head"
        likelihoods = None
        if needs.likelihoods:
            likelihoods = likelihoods_of(reading, member)
        if not needs.distribution:
            return TeacherSignal(likelihoods=likelihoods)
        merged = MergedOutcomes(member.rows(sent(reading.rows, device)), self._outcome_map)
        part = SignalPart(sent(reading.positions, device), merged)
        return TeacherSignal((part,), likelihoods=likelihoods)

    def with_needs(self, needs: SignalNeeds) -> Teacher:
        other = copy.copy(self)
        inner = self._teacher.with_needs(model_needs(needs))
        assert isinstance(inner, LocalTeacher)
        other._teacher, other._needs = inner, needs
        return other

    @property
    def model(self) -> CausalLM:
        """The model that answers."""
        return self._teacher.model

    def reread(self, batch: Batch) -> Rereading:
        """A batch's text in the model's own tokens."""
        return reread(batch, self._known.aligner, likelihoods=self._needs.likelihoods)

    @property
    def _known(self) -> TokenizerPair:
        assert self._pair is not None, "the student's tokenizer was not required first"
        return self._pair

    def _require_texts(self, texts: Sequence[TextWindows]) -> None:
        """Align the windows that are checked, and count the coverage of the first text."""
        aligner = self._known.aligner
        with main_first(self._world):
            aligner.read(texts)
        problems, num_windows = self._problems(texts)
        is_hopeless = len(problems) == num_windows
        if problems and self._unaligned == "skip":
            aligner.leave_out_answers()
            is_hopeless = is_hopeless and len(self._problems(texts)[0]) == num_windows
        if problems and (self._unaligned == "error" or is_hopeless):
            listed = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
            first = f", the first {SHOWN}" if len(problems) > SHOWN else ""
            remedy = "" if is_hopeless else (
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
                f"{len(problems):,} of {num_windows:,} windows cannot be aligned as a whole, and "
                f"learn from the text alone where they cannot; the first: {problems[0]}."
            )
        self._text_notes = tuple(notes)

    def _problems(self, texts: Sequence[TextWindows]) -> tuple[list[str], int]:
        """Which of the checked windows cannot be aligned, and why; how many were checked."""
        found, num_windows = [], 0
        for text in texts:
            data, checked = text.data, spaced(text.windows, CHECKED_WINDOWS)
            num_windows += len(checked)
            for start in range(0, len(checked), ALIGNED_AT_ONCE):
                windows = checked[start : start + ALIGNED_AT_ONCE]
                tokens = [window_of(data, window).tokens.tolist() for window in windows]
                aligned = self._known.aligner.align(tokens)
                found += [
                    f"{text.option}: {data.document_name(int(data.windows[window, 2]))}: {each}"
                    for window, each in zip(windows, aligned, strict=True)
                    if isinstance(each, str)
                ]
        return found, num_windows

    def _coverage(self, text: TextWindows) -> Coverage:
        """Coverage of a sample of a text.

        Raises:
            ConfigError: A class of tokens is uncovered.
        """
        pair, data, coverage = self._known, text.data, Coverage()
        classes = (classes_of(pair.aligner.student), classes_of(pair.aligner.teacher))
        for window in spaced(text.windows, COVERAGE_WINDOWS):
            start, length, _ = data.windows[window].tolist()
            place = slice(start, start + length + 1)
            ids = np.asarray(data.tokens[place], dtype=np.int64)
            (aligned,) = pair.aligner.align([ids.tolist()])
            if not isinstance(aligned, str):
                scored = np.asarray(data.scored[place])
                add_coverage(coverage, ids, scored, aligned, pair.outcomes, classes)
        if (uncovered := coverage.uncovered()) and self._uncovered == "error":
            raise ConfigError(
                "A teacher with another tokenizer must reach at least "
                f"{MIN_COVERED:.0%} of each class of tokens in {text.option}, and does not in "
                f"{'; '.join(uncovered)}. Those would be trained on the text alone. Use another "
                "tokenizer, or set teacher.uncovered: skip."
            )
        return coverage


def spaced(windows: Sequence[int], most: int) -> list[int]:
    """At most so many windows, evenly spaced; all where they are fewer."""
    places = np.linspace(0, len(windows) - 1, min(len(windows), most)).astype(int)
    return [windows[place] for place in places.tolist()]


def find_cross(teacher: Teacher) -> CrossTokenizerTeacher | None:
    """The teacher if its tokenizer is not the student's."""
    return teacher if isinstance(teacher, CrossTokenizerTeacher) else None


def model_needs(needs: SignalNeeds) -> SignalNeeds:
    """What the model itself is asked for."""
    return DISTRIBUTION if needs.distribution or needs.likelihoods else NOTHING


def likelihoods_of(reading: Rereading, member: LazyLogits) -> ChunkLikelihoods:
    """The teacher's log-likelihoods of the chunks of a batch.

    Args:
        member: The teacher at its scored positions.
    """
    device = member.hidden.device
    targets = sent(reading.batch.targets(), device)
    logprobs = token_logprobs(member.hidden, member.head, targets)
    sums = chunk_sums(logprobs, sent(reading.teacher_chunk_of, device), reading.num_chunks)
    return ChunkLikelihoods(sent(reading.chunk_of, device), sums)


def refuse_unsupported(request: TeacherRequest) -> None:
    """Refuse what no teacher with another tokenizer provides."""
    if request.generated:
        raise ConfigError(
            "rollout: text that is generated during the run needs a teacher with the student's "
            "tokenizer, and teacher.type is cross_tokenizer. Remove `rollout`."
        )
    if layers := sorted(request.needs.layers | request.needs.projections):
        raise ConfigError(
            f"The objective reads hidden states of the teacher's layers {layers}, and those of a "
            "teacher with another tokenizer belong to other tokens. Leave that term out."
        )


def make_pair(
    student: PreTrainedTokenizerBase, teacher: LocalTeacher, *, uses_template: bool
) -> TokenizerPair:
    """Both tokenizers byte by byte, and the outcomes they share.

    Args:
        uses_template: Whether texts are conversations, whose answers end as the templates say.

    Raises:
        ConfigError: One of them is not byte-exact, the teacher has too few rows, or it has no chat
            template and needs one.
    """
    ends = ends_of_answers(student, teacher.tokenizer) if uses_template else (None, None)
    sides = (
        TokenBytes(student, "student", ends[0]),
        TokenBytes(teacher.tokenizer, "teacher", ends[1]),
    )
    rows = teacher.info.vocabulary_rows
    if rows < len(sides[1]):
        raise ConfigError(
            f"The teacher must have a row for each of the {len(sides[1]):,} token ids of its "
            f"tokenizer, and its embedding has {rows:,}. Give the tokenizer that belongs to it."
        )
    outcomes = shared_outcomes(*sides)
    outcome_map = OutcomeMap(
        torch.from_numpy(outcomes.student),
        torch.from_numpy(outcomes.teacher),
        outcomes.num_outcomes,
    )
    limit = teacher.info.max_positions
    aligner = ConversationAligner(*sides, limit, teacher.tokenizer)
    return TokenizerPair(student, aligner, outcomes, outcome_map, hashes(teacher.tokenizer))


@teachers.register("cross_tokenizer")
def cross_tokenizer(
    world: World,
    *,
    teacher: Component,
    unaligned: Choice = "error",
    uncovered: Choice = "error",
) -> CrossTokenizerTeacher:
    """A model with another tokenizer, compared where both tokenizers have a token boundary.

    Args:
        teacher: The model, `{type: online, ...}`.
        unaligned: `error` refuses texts that a tokenizer cannot represent byte by byte; `skip`
            trains on them without the teacher.
        uncovered: `error` refuses a class of tokens that the teacher hardly reaches; `skip` trains
            that class on the text alone.
    """
    inner = teachers.bind(teacher, "teacher.teacher")(world)
    local = require_local(inner, "teacher.teacher: a teacher with another tokenizer")
    return CrossTokenizerTeacher(local, world, unaligned=unaligned, uncovered=uncovered)
