"""A teacher with another tokenizer that is compared on exactly shared tokens only."""

from __future__ import annotations

from dataclasses import replace

import torch

from limbeck.distributed import World
from limbeck.losses import SignalNeeds
from limbeck.losses.distributions.merged import OutcomeMap
from limbeck.registry import Component
from limbeck.teachers import Teacher, TeacherRequest, require_local, teachers
from limbeck.teachers.cross_tokenizer import Choice, CrossTokenizerTeacher
from limbeck.tokenizers import Outcomes


class SharedTokensTeacher(CrossTokenizerTeacher):
    """Leaves the tokens that only one vocabulary has out of both distributions in training."""

    def require(self, request: TeacherRequest) -> None:
        super().require(request)
        if request.student_tokenizer is not None:  # the pair was made anew
            self._whole = self._known
            self._pair = replace(self._whole, outcome_map=only_shared(self._whole.outcomes))

    def with_needs(self, needs: SignalNeeds) -> Teacher:
        """All outcomes, for measuring."""
        other = super().with_needs(needs)
        assert isinstance(other, SharedTokensTeacher)
        other._pair = self._whole
        return other


def only_shared(outcomes: Outcomes) -> OutcomeMap:
    """The outcomes of the tokens that both vocabularies have; all other tokens are in none."""
    sides = []
    for each, is_shared in (
        (outcomes.student, outcomes.student_exact),
        (outcomes.teacher, outcomes.teacher_exact),
    ):
        sides.append(torch.where(torch.from_numpy(is_shared), torch.from_numpy(each), -1))
    used = torch.unique(torch.cat([side[side >= 0] for side in sides]))
    place = torch.full((outcomes.num_outcomes + 1,), len(used))
    place[used] = torch.arange(len(used))  # ids of no outcome read the last entry
    return OutcomeMap(place[sides[0]], place[sides[1]], len(used))


@teachers.register("shared_tokens")
def shared_tokens(
    world: World, *, teacher: Component, unaligned: Choice = "skip"
) -> SharedTokensTeacher:
    """A model with another tokenizer, compared on the tokens that both vocabularies have.

    Args:
        teacher: The model, `{type: online, ...}`.
        unaligned: As of `cross_tokenizer`.
    """
    local = require_local(teachers.bind(teacher, "teacher.teacher")(world), "teacher.teacher")
    return SharedTokensTeacher(local, world, unaligned=unaligned)
