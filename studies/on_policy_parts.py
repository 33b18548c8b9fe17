"""Parts of the on-policy study that limbeck does not have: a control without a teacher, a suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from annotated_types import Gt, Interval
from torch import Tensor

from limbeck.evaluate.generation import held_out_prompts, own_sums
from limbeck.evaluate.rollouts import FIGURES, rollout_sums
from limbeck.evaluate.suites import Suite, SuiteContext, suites
from limbeck.losses import LogitTerm, PairShapes, terms
from limbeck.losses.distributions import TeacherDistribution
from limbeck.models import CausalLM
from limbeck.rollouts import Rollout, Sampling, sample, seed_of
from limbeck.teachers import DISTRIBUTION, require_local

AT_ONCE = 16


@terms.register("improbable_tokens")
class ImprobableTokens(LogitTerm):
    """Lowers the log-probability of each written token that the student found improbable.

    A policy gradient with the advantage -1 where the token's probability is below a threshold and
    0 elsewhere: the control without a teacher of arXiv:2608.31046.
    """

    def __init__(
        self,
        shapes: PairShapes | None = None,
        *,
        threshold: Annotated[float, Interval(gt=0, lt=1)] = 0.05,
    ) -> None:
        self._threshold = threshold

    def __call__(
        self, logits: Tensor, targets: Tensor, teacher: TeacherDistribution | None
    ) -> Tensor:
        """The log-probability of an improbable target, 0 for the others."""
        logprobs = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return logprobs * (logprobs.detach().exp() < self._threshold)


@suites.register("samples")
class Samples(Suite):
    """Sums over each student sample, and divergences on the teacher's samples, by prompt."""

    def __init__(
        self,
        context: SuiteContext,
        *,
        prompts: Annotated[int, Gt(0)] = 64,
        tokens: Annotated[int, Gt(0)] = 48,
        prompt_tokens: Annotated[int, Gt(0)] = 16,
    ) -> None:
        self._context = context
        self._teacher = require_local(context.teacher, "the suite samples")
        self._sampling = Sampling(tokens=tokens)
        self._prompts = held_out_prompts(
            context, self._teacher.model, "samples", prompts, prompt_tokens, tokens
        )

    def measure(self, student: CausalLM) -> Mapping[str, Any]:
        """Columns with one number a prompt; those of the teacher's samples begin with `fixed_`."""
        rollouts = self._write(student)
        columns = {k: v.tolist() for k, v in own_sums([asdict(r) for r in rollouts]).items()}
        columns |= self._read(student, rollouts, "")
        return columns | self._read(student, self._write(self._teacher.model), "fixed_")

    def _write(self, model: CausalLM) -> list[Rollout]:
        """A model's continuation of each prompt."""
        written = []
        for start in range(0, len(self._prompts), AT_ONCE):
            prompts = self._prompts[start : start + AT_ONCE]
            seeds = [seed_of((0, start + row)) for row in range(len(prompts))]
            written += sample(model, prompts, self._sampling, seeds)
        return written

    def _read(self, student: CausalLM, rollouts: list[Rollout], prefix: str) -> dict[str, Any]:
        """Sums over the tokens of each text, by column."""
        reader, context = self._teacher.with_needs(DISTRIBUTION), self._context
        sums = rollout_sums(student, reader, rollouts, context.world, context.head_budget_mb)
        names = [prefix + name for name in (*FIGURES, "tokens")]
        return dict(zip(names, sums.T.tolist(), strict=True))
