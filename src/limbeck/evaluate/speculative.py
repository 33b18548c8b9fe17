"""The suite `speculative`: how many of a student's drafts its teacher accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt

from limbeck.distributed import gather_objects, unsharded
from limbeck.errors import ConfigError
from limbeck.evaluate.generation import held_out_prompts, interleaved
from limbeck.evaluate.scores import interval, ratio, resampled
from limbeck.evaluate.suites import Suite, SuiteContext, suites
from limbeck.models import CausalLM
from limbeck.rollouts import seed_of, write_assisted
from limbeck.teachers import require_local

FIGURE_OF = {
    "acceptance": ("accepted", "tested"),
    "shared": ("shared", "tokens"),
    "accepted_of_proposed": ("accepted", "proposed"),
    "tokens_per_pass": ("tokens", "passes"),
}
"""Each figure as a ratio of two sums over texts."""
NONE_TESTED = 1e-9
"""Stands for the drafts of a text that is too short for one."""


@suites.register("speculative")
class Speculative(Suite):
    """Speculative decoding by transformers' assisted generation: teacher as target, student as
    assistant, sampled at temperature 1 (Leviathan et al., 2023, arXiv:2211.17192).
    """

    def __init__(
        self,
        context: SuiteContext,
        *,
        prompts: Annotated[int, Gt(0)] = 32,
        tokens: Annotated[int, Gt(1)] = 64,
        prompt_tokens: Annotated[int, Gt(0)] = 32,
        draft_tokens: Annotated[int, Gt(0)] = 4,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        """
        Args:
            prompts: Held-out prompts, one of a test document, at most.
            tokens: Length of a text, at most; an end token ends it earlier.
            prompt_tokens: Of `text` data, this many first tokens of a document. Other types have
                prompts of their own.
            draft_tokens: Tokens the student drafts before each pass of the teacher.
            seed: Of the draws.
        """
        self._context, self._tokens, self._drafts = context, tokens, draft_tokens
        self._seed = seed
        self._teacher = require_local(context.teacher, "evaluate.suites: the suite speculative")
        self._prompts = held_out_prompts(
            context, self._teacher.model, "speculative", prompts, prompt_tokens, tokens
        )

    def measure(self, student: CausalLM) -> Mapping[str, Any]:
        """Acceptance and tokens a pass with their intervals over texts, and what is expected."""
        target = self._teacher.model
        if student.vocabulary_rows != target.vocabulary_rows:
            raise ConfigError(
                "evaluate.suites: speculative needs a student with as many rows of vocabulary as "
                f"its teacher ({target.vocabulary_rows:,}), and it has "
                f"{student.vocabulary_rows:,}. Leave the suite out."
            )
        world, own = self._context.world, []
        with unsharded(target):
            for place, prompt in enumerate(self._prompts):
                number = world.rank + place * world.size
                text = write_assisted(
                    target,
                    student,
                    prompt,
                    tokens=self._tokens,
                    draft_tokens=self._drafts,
                    seed=seed_of((self._seed, number)),
                )
                own.append({**asdict(text), "tokens": len(text.token_ids)})
        every = interleaved(gather_objects(own, world))
        names = {name for pair in FIGURE_OF.values() for name in pair}
        sums = {name: np.array([float(each[name]) for each in every]) for name in names}
        for name in ("tested", "proposed"):
            sums[name] = np.maximum(sums[name], NONE_TESTED)
        drawn = resampled(sums)
        figures = {
            name: interval(ratio(above, below)(drawn)) for name, (above, below) in FIGURE_OF.items()
        }
        return {"prompts": len(every), "draft_tokens": self._drafts, **figures}
