"""Measuring a student against its teacher on held-out text, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.batch import Batch
from limbeck.config import HeadBudget
from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.groups import TokenTable
from limbeck.evaluate.scores import CALIBRATION_BINS, Scores
from limbeck.losses import TeacherSignal
from limbeck.losses.distributions import (
    DenseLogits,
    DrawnTokens,
    LazyLogits,
    LogProbPair,
    Mixture,
    TeacherDistribution,
    log_softmax,
)
from limbeck.losses.distributions.base import Rows, entropy_of
from limbeck.losses.divergences.jensen_shannon import jensen_shannon
from limbeck.losses.divergences.kl import forward_kl, reverse_kl
from limbeck.losses.divergences.total_variation import total_variation
from limbeck.losses.head.fused import even_chunk, head_chunk
from limbeck.models import CausalLM, evaluating
from limbeck.teachers import Teacher

DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}
TOP = 5
"""Most probable tokens of each model whose overlap is `top5_agreement`."""
COPIES = 8
"""Approximate number of arrays of a chunk's logits that exist at once."""


@runtime_checkable
class Documents(Protocol):
    """The interface of a data set for evaluation; `TextData` implements it."""

    @property
    def num_documents(self) -> int:
        """Number of documents in the data set."""

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's scored text."""

    @property
    def document_scored(self) -> np.ndarray:
        """Scored tokens of each whole document."""

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers; none gives one row with nothing scored."""

    def document_name(self, document: int) -> str:
        """Where a document comes from, for messages."""

    def document_source(self, document: int) -> str:
        """The source of a document, by which figures are grouped."""


class Chunk(NamedTuple):
    """Some of a batch's scored positions, with both models' distributions.

    Attributes:
        window: Which of the N scored tokens; indices are on the CPU.
        teacher: The teacher's distribution; None where it has none.
        pair: Student and teacher at temperature 1, on the outcomes of the teacher's form.
        logp: The student's log-probabilities over the vocabulary.
        padded: The student's probability on rows beyond the vocabulary.
        dense: Whether the outcomes are the vocabulary.
    """

    window: Rows
    teacher: TeacherDistribution | None
    pair: LogProbPair | None
    logp: Float[Tensor, "n V"]
    targets: Int[Tensor, " n"]
    padded: Float[Tensor, " n"]
    dense: bool


def measure(
    student: CausalLM,
    teacher: Teacher,
    data: Documents,
    rows: Sequence[int],
    *,
    micro_batch: int,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] | None = None,
    head_budget_mb: HeadBudget = "auto",
) -> Scores:
    """Sums of every metric over the scored tokens of some rows, by document.

    Args:
        teacher: A teacher. One without whole distributions (a store's top-k) gives bounds of the
            divergences its form serves, but neither its own cross-entropy nor the agreement.
        rows: Rows to measure; with `reduce`, this rank's share of them.
        reduce: Sums a tensor over the ranks. Ranks with fewer rows run empty batches, because
            sharded models need every rank in every forward pass.
    """
    totals: dict[str, Tensor] = {}
    tokens = TokenTable()
    with torch.no_grad(), evaluating(student):
        for mine in in_step(rows, micro_batch, device, reduce):
            batch = data.batch(mine)
            documents, positions = batch.documents(), batch.scored_rows(batch.position_ids)
            batch = batch.to(device)
            for chunk in chunks(student, teacher.signal(batch), batch, head_budget_mb):
                values = {name: value.cpu() for name, value in token_values(chunk).items()}
                add(totals, values, documents[chunk.window], data.num_documents)
                tokens.add(values, documents[chunk.window], positions[chunk.window])
    over_ranks = None if reduce is None else lambda total: reduce(total.to(device)).cpu()
    if over_ranks is not None:
        totals = {name: over_ranks(total) for name, total in totals.items()}
    scores = as_scores({name: total.numpy() for name, total in totals.items()}, data)
    return replace(scores, groups=tokens.groups(scores.documents, over_ranks))


def chunks(
    student: CausalLM, signal: TeacherSignal, batch: Batch, head_budget_mb: HeadBudget
) -> Iterator[Chunk]:
    """The scored positions of a batch in chunks; one empty chunk if there are none."""
    hidden, _ = student(batch)
    targets, head = batch.targets(), student.whole_head
    most = head_chunk(head_budget_mb, head.weight, COPIES)
    for positions, distribution in parts_of(signal, batch):
        dense = isinstance(distribution, DenseLogits | LazyLogits | Mixture)
        count = len(targets) if positions is None else len(positions)
        size = max(even_chunk(count, most), 1)
        for start in range(0, max(count, 1), size):
            rows = slice(start, start + size)
            window = rows if positions is None else positions[rows]
            logits = head(hidden[window])
            padded = student.padded_mass(logits)
            logits = logits[:, : student.vocabulary_size]
            part_rows = None if distribution is None else distribution.rows(rows)
            pair = None if part_rows is None else part_rows.compare(logits, 1.0)
            logp = pair.student if dense and pair is not None else log_softmax(logits, 1.0)
            place = window if isinstance(window, slice) else window.cpu()
            yield Chunk(place, part_rows, pair, logp, targets[window], padded, dense)


def parts_of(
    signal: TeacherSignal, batch: Batch
) -> list[tuple[Int[Tensor, " n"] | None, TeacherDistribution | None]]:
    """Positions and distribution of each part of the teacher's signal, all in one form.

    Positions without a teacher come last, where the form has such positions.
    """
    if not signal.parts:
        raise ConfigError(
            "A student is measured against distributions, and this teacher was not asked for them. "
            "Give the objective an alpha above 0, or evaluate against a model."
        )
    forms = sorted({type(part.distribution).__name__ for part in signal.parts})
    if len(forms) > 1:
        raise ConfigError(
            "A teacher's distributions must have one form to be averaged, and this one's are held "
            f"as {' and '.join(forms)}. Use teachers of one type, or evaluate against a model."
        )
    num_scored = int(batch.num_scored())
    missing = signal.uncovered(num_scored, batch.scored.device)
    if len(missing) and signal.parts[0].distribution.covers_all_positions:
        raise DataError(
            f"A teacher must cover every scored token to be compared with, and gave nothing for "
            f"{len(missing):,} of {num_scored:,}. Evaluate against a model."
        )
    found: list[tuple[Int[Tensor, " n"] | None, TeacherDistribution | None]]
    found = [(part.positions, part.distribution) for part in signal.parts]
    return [*found, (missing, None)] if len(missing) else found


def token_values(chunk: Chunk) -> dict[str, Float[Tensor, " n"]]:
    """Every metric of every position of a chunk; where there is no teacher, only the student's."""
    targets = chunk.targets[:, None]
    confidence, first = chunk.logp.max(-1)
    values = {
        "cross_entropy": -chunk.logp.gather(-1, targets)[:, 0],
        "student_confidence": confidence.exp(),
        "student_hit": (first == chunk.targets).to(confidence.dtype),
        "padded_mass": chunk.padded,
        "tokens": torch.ones_like(confidence),
    }
    if chunk.teacher is None or chunk.pair is None:
        return values
    student, teacher = chunk.pair
    serves = chunk.teacher.serves
    values |= {
        name: divergence(student, teacher)
        for name, divergence in DIVERGENCES.items()
        if serves is None or name in serves
    }
    if isinstance(chunk.teacher, DrawnTokens):
        values["forward_kl"] = values["forward_kl"] + chunk.teacher.correction()
    if chunk.dense:
        best, theirs = (
            logp.topk(min(TOP, logp.shape[-1]), -1).indices for logp in (teacher, student)
        )
        shared = (best[:, :, None] == theirs[:, None, :]).any(-1)
        values["top1_agreement"] = (first == teacher.argmax(-1)).to(confidence.dtype)
        values["top5_agreement"] = shared.to(confidence.dtype).mean(-1)
        values["teacher_entropy"] = entropy_of(teacher)
        values["teacher_cross_entropy"] = -teacher.gather(-1, targets)[:, 0]
    return values


def add(
    totals: dict[str, Tensor],
    values: Mapping[str, Tensor],
    documents: Int[Tensor, " n"],
    num_documents: int,
) -> None:
    """Add the metrics of some tokens to the sums of their documents, in float64."""
    values = {name: value.double() for name, value in values.items()}
    for name, value in values.items():
        total = totals.setdefault(name, torch.zeros(num_documents, dtype=torch.float64))
        total.index_add_(0, documents, value)
    confidence = values["student_confidence"]
    # A student that diverged is not confident of anything; its sums are not finite either way.
    bins = (confidence.nan_to_num(0) * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    shape = (num_documents, CALIBRATION_BINS)
    total = totals.setdefault("calibration", torch.zeros(shape, dtype=torch.float64))
    gap = values["student_hit"] - confidence
    total.view(-1).index_add_(0, documents * CALIBRATION_BINS + bins, gap)


def as_scores(totals: dict[str, np.ndarray], data: Documents) -> Scores:
    """Scores of the documents with measured tokens."""
    nothing = np.zeros(data.num_documents)
    counts = totals.pop("tokens", nothing)
    padded = totals.pop("padded_mass", nothing)
    calibration = totals.pop("calibration", np.zeros((data.num_documents, CALIBRATION_BINS)))
    kept = np.flatnonzero(counts)
    share = counts[kept] / np.asarray(data.document_scored)[kept]
    return Scores(
        metrics={name: total[kept] for name, total in totals.items()},
        counts=counts[kept],
        bytes=np.asarray(data.document_bytes, dtype=np.float64)[kept] * share,
        calibration=calibration[kept],
        documents=kept,
        sources=tuple(data.document_source(d) for d in kept.tolist()),
        padded_mass=float(padded.sum() / max(counts.sum(), 1)),
    )


def in_step(
    rows: Sequence[int],
    micro_batch: int,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] | None,
) -> Iterator[Sequence[int]]:
    """Rows of each micro-batch; empty ones while other ranks still have rows."""
    start = 0
    while True:
        mine = rows[start : start + micro_batch]
        left = torch.tensor(float(len(mine)), device=device)
        if not (left if reduce is None else reduce(left)).item():
            return
        yield mine
        start += micro_batch
