"""A data set held in memory, and slow obvious versions of what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from limbeck.batch import Batch
from limbeck.models import CausalLM


@dataclass(frozen=True)
class Rows:
    """Rows of a batch as a data set."""

    whole: Batch
    document_bytes: np.ndarray

    @property
    def document_scored(self) -> np.ndarray:
        """Scored tokens of each document."""
        return np.bincount(self.whole.documents().numpy(), minlength=self.num_documents)

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.whole.input_ids)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_bytes)

    def document_name(self, document: int) -> str:
        """A name."""
        return f"made-up:{document}"

    def batch(self, rows: Sequence[int]) -> Batch:
        """Those rows, or one with nothing scored."""
        w, i = self.whole, list(rows) or [0]
        scored = w.scored[i] if len(rows) else torch.zeros_like(w.scored[i])
        return Batch(w.input_ids[i], w.target_ids[i], scored, w.position_ids[i], w.document_ids[i])


def packed_rows(rows: int = 6, length: int = 16, vocabulary: int = 96, seed: int = 0) -> Rows:
    """Rows of two documents each, the second of one going on in the first place of the next."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    scored = torch.rand(rows, length, generator=generator) < 0.7
    cut = length // 2
    scored[:, cut - 1] = False  # its target lies in another document
    places = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(rows, length)
    documents = torch.arange(rows)[:, None] + (torch.arange(length) >= cut)
    whole = Batch(tokens[:, :-1], tokens[:, 1:], scored, places, documents)
    return Rows(whole, np.arange(10, 10 + rows + 1))


def reference(student: CausalLM, teacher: CausalLM, data: Rows) -> dict[str, np.ndarray]:
    """Sums per document in float64, one token at a time, from each piece alone."""
    sums: dict[str, np.ndarray] = {}
    w = data.whole
    for row, t in w.scored.nonzero().tolist():
        begin = t - int(w.position_ids[row, t])
        piece = w.input_ids[row, begin : t + 1][None]
        with torch.no_grad():
            q = torch.softmax(student.logits(piece)[0, -1].double(), -1).numpy()
            p = torch.softmax(teacher.logits(piece)[0, -1].double(), -1).numpy()
        y = int(w.target_ids[row, t])
        values = {
            "forward_kl": sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)),
            "reverse_kl": sum(b * np.log(b / a) for a, b in zip(p, q, strict=True)),
            "total_variation": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
            "top1_agreement": float(p.argmax() == q.argmax()),
            "cross_entropy": -np.log(q[y]),
            "teacher_cross_entropy": -np.log(p[y]),
            "student_confidence": q.max(),
            "student_hit": float(q.argmax() == y),
            "tokens": 1.0,
        }
        for name, value in values.items():
            total = sums.setdefault(name, np.zeros(data.num_documents))
            total[int(w.document_ids[row, t])] += value
    return sums
