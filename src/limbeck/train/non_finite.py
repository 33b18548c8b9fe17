"""Finding and keeping what made a loss or a gradient stop being a number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.distributed import World, gather_objects
from limbeck.files import write_text
from limbeck.losses import TeacherSignal
from limbeck.models import Distiller
from limbeck.train.setup import Batches, SignalSource


def blame(
    micro_batches: Sequence[Sequence[int]],
    suspects: Sequence[int],
    batches: Batches,
    world: World,
) -> dict[str, list[Any]]:
    """Rows and documents of the micro-batches that failed, over all ranks.

    Args:
        micro_batches: Rows of each of this rank's micro-batches.
        suspects: Those whose loss was not finite. When no rank has any, the gradients alone were
            at fault, and every row of the step is named.
        batches: Knows the documents.
        world: The ranks.
    """
    rows = [row for i in suspects for row in micro_batches[i]]
    every = [row for part in micro_batches for row in part]
    told = gather_objects([rows, every], world)
    named = sorted({row for mine, _ in told for row in mine})
    named = named or sorted({row for _, mine in told for row in mine})
    ids = sorted(set(batches.batch(named).document_ids.flatten().tolist()))
    return {"rows": named, "documents": [batches.document_name(i) for i in ids if i >= 0]}


def narrow(
    distiller: Distiller,
    teacher: SignalSource | None,
    rows: Iterable[int],
    batches: Batches,
    world: World,
) -> list[int]:
    """The rows whose own loss is not finite; in a world of one only, where no rank waits."""
    guilty = []
    for row in rows:
        batch = batches.batch([row]).to(world.device)
        said = TeacherSignal() if teacher is None else teacher.signal(batch)
        loss, _ = distiller(batch, said, batch.num_scored())
        if not bool(torch.isfinite(loss.detach())):
            guilty.append(row)
    return guilty


def dump(folder: Path, step: int, blamed: dict[str, list[Any]], batches: Batches) -> None:
    """Write the rows that failed beside the metrics, tokens and all, to be looked at."""
    batch = batches.batch(blamed["rows"])
    path = folder / f"non_finite-{step:06d}.json"
    body = {
        "step": step,
        **blamed,
        "input_ids": batch.input_ids.tolist(),
        "target_ids": batch.target_ids.tolist(),
        "scored": batch.scored.tolist(),
    }
    write_text(path, json.dumps(body))
