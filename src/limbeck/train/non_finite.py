"""Finds and saves the rows whose loss or gradient is not finite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from limbeck.batch import Batch
from limbeck.data.source import BatchSource
from limbeck.distributed import World, cast_weights, gather_objects
from limbeck.files import write_text
from limbeck.losses import TeacherSignal
from limbeck.models import Distiller
from limbeck.teachers import Teacher


@dataclass(frozen=True)
class NonFiniteRow:
    """A row of a step that was not finite.

    Attributes:
        row: Its number; see `StepData.row_numbers`.
    """

    row: int
    documents: list[str]
    input_ids: list[int]
    target_ids: list[int]
    scored: list[bool]


def bad_rows(
    micro_batches: Sequence[Batch],
    row_numbers: Sequence[Sequence[int]],
    failed: Sequence[int],
    source: BatchSource,
    world: World,
) -> list[NonFiniteRow]:
    """Rows of the micro-batches that failed, over all ranks, by number.

    Args:
        failed: Indices of those whose loss was not finite. When no rank has any, the gradients
            alone were at fault, and every row of the step is returned.
    """
    if not any(gather_objects(len(failed), world)):
        failed = range(len(micro_batches))
    mine = [
        bad_row(micro_batches[i], at, row, source)
        for i in failed
        for at, row in enumerate(row_numbers[i])
    ]
    gathered = gather_objects([asdict(row) for row in mine], world)
    by_number = {row["row"]: NonFiniteRow(**row) for rows in gathered for row in rows}
    return [by_number[number] for number in sorted(by_number)]


def bad_row(batch: Batch, at: int, row: int, source: BatchSource) -> NonFiniteRow:
    """One row of a batch, for a file."""
    documents = sorted(set(batch.document_ids[at].tolist()) - {-1})
    return NonFiniteRow(
        row,
        [source.document_name(document) for document in documents],
        batch.input_ids[at].tolist(),
        batch.target_ids[at].tolist(),
        batch.scored[at].tolist(),
    )


def narrow(
    distiller: Distiller,
    teacher: Teacher | None,
    micro_batches: Sequence[Batch],
    world: World,
) -> tuple[list[Batch], list[int]]:
    """Every row as a batch of its own, and the indices of those whose own loss is not finite.

    For a world of one only, where no rank waits.
    """
    single = [batch.part(slice(i, i + 1)) for batch in micro_batches for i in range(len(batch))]
    if teacher is not None and not teacher.works_ahead:
        teacher.prefetch(single)  # a shuffled one takes each row's signal from the row before
    non_finite = []
    for index, row in enumerate(single):
        batch = row.to(world.device)
        signal = TeacherSignal() if teacher is None else teacher.signal(batch)
        with cast_weights(distiller):
            loss, _ = distiller(batch, signal, batch.num_scored())
        if not bool(torch.isfinite(loss.detach())):
            non_finite.append(index)
    return single, non_finite


def documents_of(rows: Sequence[NonFiniteRow]) -> list[str]:
    """Names of the documents in some rows, each once."""
    return list(dict.fromkeys(name for row in rows for name in row.documents))


def dump(folder: Path, step: int, rows: Sequence[NonFiniteRow]) -> None:
    """Write the rows that failed beside the metrics."""
    body = {
        "step": step,
        "rows": [row.row for row in rows],
        "documents": documents_of(rows),
        "input_ids": [row.input_ids for row in rows],
        "target_ids": [row.target_ids for row in rows],
        "scored": [row.scored for row in rows],
    }
    write_text(folder / f"non_finite-{step:06d}.json", json.dumps(body))
