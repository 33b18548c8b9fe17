"""Match self-attention relations: scaled dot products of queries, keys and values."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Gt, MinLen
from jaxtyping import Float
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.losses.signal import Projections, SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import PairShapes, StateTerm, StudentView, terms
from limbeck.losses.terms.layer_maps import LayerChoice, chosen_map
from limbeck.losses.terms.projectors import upcast
from limbeck.losses.terms.segments import per_segment

Part = Literal["query", "key", "value"]


@terms.register("attention_relations")
class AttentionRelationsTerm(StateTerm):
    """KL(teacher || student) of each token's self-attention relations, nats, from 0 up.

    A relation is softmax(V V' / sqrt d) over the scored tokens of a segment, for queries, keys and
    values alike; each is cut into as many relation heads in both models, so that widths and head
    counts may differ. Mean over heads, parts and pairs of layers (the paper sums over the parts).
    Queries and keys are taken as projected, before their norms and rotation. A token is
    related to its whole segment, later tokens included. Memory: heads times n^2 for a segment of n
    tokens.

    Source: Wang et al., "MiniLMv2", 2020, arXiv:2012.15828; evidence is from encoders.
    """

    def __init__(
        self,
        shapes: PairShapes,
        *,
        heads: Annotated[int, Gt(0)],
        parts: Annotated[tuple[Part, ...], MinLen(1)] = ("query", "key", "value"),
        layer_map: LayerChoice = "last",
    ) -> None:
        """
        Args:
            heads: Relation heads; must divide the widths of all compared parts of both models.
            parts: What is related: `query`, `key`, `value`.
            layer_map: `surviving`, `uniform`, `last`, or 0-based pairs [student, teacher]; see
                docs/hidden-states.md.
        """
        super().__init__()
        self.heads, self.parts = heads, parts
        self.layer_map = chosen_map(layer_map, shapes)
        self.needs = SignalNeeds(projections=frozenset(t for _, t in self.layer_map.pairs))
        self.student_projections = frozenset(s for s, _ in self.layer_map.pairs)

    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        """Mean over pairs and parts of each token's divergence."""
        each = []
        for mine, theirs in self.layer_map.pairs:
            for part in self.parts:
                own = part_of(student.layer_projections[mine], part)
                target = part_of(signal.layer_projections[theirs], part)
                self._require_heads("student", part, own.shape[-1])
                self._require_heads("teacher", part, target.shape[-1])
                each.append(per_segment(self._divergence, student, upcast(own), target))
        return torch.stack(each).mean(0)

    def _divergence(
        self, student: Float[Tensor, "n D"], teacher: Float[Tensor, "n E"]
    ) -> Float[Tensor, " n"]:
        own, target = relation(student, self.heads), relation(teacher, self.heads)
        return (target.exp() * (target - own)).sum(-1).mean(0)

    def _require_heads(self, whose: str, part: str, width: int) -> None:
        if width % self.heads:
            raise ConfigError(
                f"attention_relations: heads must divide the width of every compared part, and "
                f"{self.heads} does not divide the {width} of the {whose}'s {part}. Choose a "
                f"divisor of {width}, as {math.gcd(width, self.heads)}."
            )


def part_of(projections: Projections, part: Part) -> Float[Tensor, "N D"]:
    """Queries, keys or values."""
    return {"query": projections.query, "key": projections.key, "value": projections.value}[part]


def relation(state: Float[Tensor, "n D"], heads: int) -> Float[Tensor, "heads n n"]:
    """Log-probabilities of each token's relation to all of the segment."""
    cut = state.reshape(len(state), heads, state.shape[1] // heads).transpose(0, 1)
    products = torch.matmul(cut, cut.transpose(1, 2))
    return torch.log_softmax(products / math.sqrt(cut.shape[-1]), dim=-1)
