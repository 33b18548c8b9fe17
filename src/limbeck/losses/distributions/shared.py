"""Teacher and student with different vocabularies, on the tokens both spell alike."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from limbeck.losses.distributions.base import (
    LogProbPair,
    Rows,
    TeacherDistribution,
    entropy_of,
    log_softmax,
    merge_rest,
)


@dataclass(frozen=True)
class SharedVocabulary(TeacherDistribution):
    """A teacher with another vocabulary, on the S tokens both spell alike (K = S + 1).

    All tokens only one of the two knows are one outcome. Positions must already be aligned: row i
    follows the same bytes in both models.

    Attributes:
        logits: The teacher's logits over its own vocabulary.
        student_ids: The shared tokens' ids in the student's vocabulary.
        teacher_ids: Their ids in the teacher's, in the same order.
    """

    logits: Float[Tensor, "N W"]
    student_ids: Int[Tensor, " S"]
    teacher_ids: Int[Tensor, " S"]

    def rows(self, window: Rows) -> SharedVocabulary:
        return SharedVocabulary(self.logits[window], self.student_ids, self.teacher_ids)

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        return LogProbPair(
            student=merge_rest(log_softmax(student_logits, temperature), self.student_ids),
            teacher=merge_rest(log_softmax(self.logits, temperature), self.teacher_ids).detach(),
        )

    def entropy(self) -> Float[Tensor, " N"]:
        return entropy_of(merge_rest(log_softmax(self.logits.detach(), 1.0), self.teacher_ids))
