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
        return f"{'even' if document % 2 == 0 else 'odd'}.txt:{document}"

    def document_source(self, document: int) -> str:
        """Two sources."""
        return self.document_name(document).rpartition(":")[0]

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


def reference_tokens(student: CausalLM, teacher: CausalLM, data: Rows) -> list[dict[str, float]]:
    """Metrics of every scored token in float64, each from its piece of text alone."""
    found = []
    w = data.whole
    for row, t in w.scored.nonzero().tolist():
        begin = t - int(w.position_ids[row, t])
        piece = w.input_ids[row, begin : t + 1][None]
        with torch.no_grad():
            q = torch.softmax(student.logits(piece)[0, -1].double(), -1).numpy()
            p = torch.softmax(teacher.logits(piece)[0, -1].double(), -1).numpy()
        y = int(w.target_ids[row, t])
        m = (p + q) / 2
        values = {
            "forward_kl": sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)),
            "reverse_kl": sum(b * np.log(b / a) for a, b in zip(p, q, strict=True)),
            "jensen_shannon": (np.sum(p * np.log(p / m)) + np.sum(q * np.log(q / m))) / 2,
            "total_variation": 1 - np.minimum(p, q).sum(),
            "top1_agreement": float(p.argmax() == q.argmax()),
            "top5_agreement": len({*np.argsort(p)[-5:]} & {*np.argsort(q)[-5:]}) / 5,
            "cross_entropy": -np.log(q[y]),
            "teacher_cross_entropy": -np.log(p[y]),
            "teacher_entropy": -sum(a * np.log(a) for a in p),
            "student_confidence": q.max(),
            "student_hit": float(q.argmax() == y),
            "tokens": 1.0,
        }
        place = {"document": int(w.document_ids[row, t]), "position": t - begin}
        found.append({**values, **place})
    return found


def reference(student: CausalLM, teacher: CausalLM, data: Rows) -> dict[str, np.ndarray]:
    """Sums of `reference_tokens` by document."""
    sums: dict[str, np.ndarray] = {}
    for token in reference_tokens(student, teacher, data):
        document = token.pop("document")
        del token["position"]
        for name, value in token.items():
            sums.setdefault(name, np.zeros(data.num_documents))[int(document)] += value
    return sums
