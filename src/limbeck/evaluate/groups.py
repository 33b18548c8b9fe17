"""Metrics broken down by position, by the teacher's entropy and by source of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

GROUPED = ("forward_kl", "top1_agreement", "cross_entropy", "teacher_entropy")
"""Metrics that are broken down, where they are measured."""
POSITION_EDGES = (16, 64, 256, 1024, 4096)
POSITIONS = ("0-15", "16-63", "64-255", "256-1023", "1024-4095", "4096-")
"""Tokens that stand before the predicted one in its window, less one."""
DECILES = 10
ENTROPY_BINS = 1 << 16
MAX_ENTROPY = 16.0
"""Nats; above the entropy of a uniform distribution over 8 million tokens."""
MOST_SOURCES = 20
OTHERS = "others"

Group = Mapping[str, Float64[np.ndarray, "documents groups"]]
"""By metric, and `tokens`: the sum over the tokens of a document in each group."""


class TokenTable:
    """The broken-down metrics of this rank's tokens: 25 bytes a token, about 100 at the end."""

    def __init__(self) -> None:
        self._parts: list[dict[str, np.ndarray]] = []

    def add(
        self,
        values: Mapping[str, Float[Tensor, " n"]],
        documents: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
    ) -> None:
        """Add the tokens of a chunk; what has no teacher counts 0 in its divergences."""
        buckets = np.searchsorted(POSITION_EDGES, positions.numpy(), side="right")
        metrics = {m: values[m].float().numpy() for m in GROUPED if m in values}
        self._parts.append(
            {"document": documents.numpy(), "position": buckets.astype(np.int8), **metrics}
        )

    def groups(
        self, documents: np.ndarray, reduce: Callable[[Tensor], Tensor] | None
    ) -> dict[str, Group]:
        """Sums by document and group, of all ranks.

        Args:
            documents: Indices of the measured documents, in order.
            reduce: Sums a tensor over the ranks.
        """
        if not self._parts:
            return {}
        table = {
            name: np.concatenate([p.get(name, 0 * p["document"]) for p in self._parts])
            for name in ("document", "position", *GROUPED)
            if any(name in part for part in self._parts)
        }
        rows = np.searchsorted(documents, table["document"])
        metrics = {name: table[name] for name in GROUPED if name in table}
        by = {"position": (table["position"].astype(np.int64), len(POSITIONS))}
        if "teacher_entropy" in table:
            by["teacher_entropy"] = (deciles(table["teacher_entropy"], reduce), DECILES)
        columns = {"tokens": np.ones(len(rows)), **metrics}
        return {
            kind: {
                name: summed(rows * size + group, value, (len(documents), size), reduce)
                for name, value in columns.items()
            }
            for kind, (group, size) in by.items()
        }


def deciles(
    entropy: Float[np.ndarray, " n"], reduce: Callable[[Tensor], Tensor] | None
) -> np.ndarray:
    """Of each token, which tenth of the tokens of all ranks its teacher's entropy lies in.

    Found from a histogram, so that no rank needs the tokens of another; its bins are narrow where
    entropies are small. Tokens of one bin stay together: tenths may be unequal.
    """
    scaled = np.sqrt(np.clip(entropy.astype(np.float64), 0, MAX_ENTROPY) / MAX_ENTROPY)
    bins = np.minimum((scaled * ENTROPY_BINS).astype(np.int64), ENTROPY_BINS - 1)
    counts = summed(bins, np.ones(len(bins)), (ENTROPY_BINS,), reduce)
    before = np.cumsum(counts) - counts
    tenth = np.minimum(DECILES * before / max(counts.sum(), 1), DECILES - 1).astype(np.int64)
    found: np.ndarray = tenth[bins]
    return found


def summed(
    places: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, ...],
    reduce: Callable[[Tensor], Tensor] | None,
) -> np.ndarray:
    """Values added up in float64 by place in an array of a shape, over all ranks."""
    total = np.bincount(places, values.astype(np.float64), minlength=int(np.prod(shape)))
    if reduce is not None:
        total = reduce(torch.from_numpy(total)).numpy()
    return total.reshape(shape)


def by_source(
    sources: Sequence[str], columns: Mapping[str, Float64[np.ndarray, " documents"]]
) -> tuple[list[str], Group]:
    """Names of the sources, and the sums of each document in the column of its source.

    Args:
        sources: Of each document. More than 20 are grouped by folder, if they have folders; of more
            than 20 that are left, all but the 20 with the most tokens are `others`.
        columns: Sums over each whole document; `tokens` is one of them.
    """
    if len(set(sources)) > MOST_SOURCES:
        sources = [str(PurePosixPath(s).parent) if "/" in s else s for s in sources]
    tokens: Counter[str] = Counter()
    for source, count in zip(sources, columns["tokens"].tolist(), strict=True):
        tokens[source] += count
    kept = [source for source, _ in tokens.most_common(MOST_SOURCES)]
    sources = [source if source in kept else OTHERS for source in sources]
    names = sorted(set(sources))
    own = np.array([names.index(source) for source in sources], dtype=np.int64)
    placed = {name: np.zeros((len(own), len(names))) for name in columns}
    for name, column in columns.items():
        placed[name][np.arange(len(own)), own] = column
    return names, placed
