"""At most one divergence and at most one cross-entropy: the objectives with closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from limbeck.losses.distributions.base import TeacherDistribution, require_served
from limbeck.losses.distributions.full import DenseLogits, LazyLogits
from limbeck.losses.distributions.merged import MergedOutcomes
from limbeck.losses.distributions.samples import DrawnTokens
from limbeck.losses.distributions.top_k import KeptTokens
from limbeck.losses.terms.base import LogitTerm
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm

FORMS = (DenseLogits, LazyLogits, MergedOutcomes, KeptTokens, DrawnTokens)
"""Forms of a teacher that closed-form gradients know."""


class TermPair(NamedTuple):
    """A divergence, a cross-entropy or both.

    Attributes:
        soft: The divergence; None where there is none, or nothing to compare with.
        soft_weight: Its weight.
        hard_weight: The cross-entropy's.
        has_hard: Whether there is one.
        places: For each term as it was listed: 0 for the divergence, 1 for the cross-entropy.
    """

    soft: DivergenceTerm | None
    soft_weight: float
    hard_weight: float
    has_hard: bool
    places: tuple[int, ...]

    @property
    def temperature(self) -> float:
        """The divergence's; 1 without one."""
        return 1.0 if self.soft is None else self.soft.temperature


def pair_of(
    terms: Sequence[LogitTerm],
    weights: Sequence[float],
    distribution: TeacherDistribution | None,
) -> TermPair | None:
    """Terms as a pair; None where they are no pair or the teacher's form has no closed form.

    Raises:
        ConfigError: The divergence is not defined on the teacher's form.
    """
    divergences = [term for term in terms if isinstance(term, DivergenceTerm)]
    is_hard = [isinstance(term, CrossEntropyTerm) for term in terms]
    is_pair = 1 <= len(terms) == len(divergences) + sum(is_hard)
    if not is_pair or len(divergences) > 1 or sum(is_hard) > 1:
        return None
    soft = divergences[0] if divergences and distribution is not None else None
    if soft is not None and distribution is not None:
        require_served(distribution, soft.name)
        if soft.gradient is None or not isinstance(distribution, FORMS):
            return None
    by_place = dict(zip(is_hard, weights, strict=True))
    soft_weight = 0.0 if soft is None else by_place[False]
    places = tuple(int(each) for each in is_hard)
    return TermPair(soft, soft_weight, by_place.get(True, 0.0), any(is_hard), places)
