"""The suite `generation`: what students and teacher write after prompts of held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Interval
from jaxtyping import Float64

from limbeck.data import spread
from limbeck.distributed import gather_objects, unsharded
from limbeck.errors import ConfigError
from limbeck.evaluate.rollouts import FIGURES, rollout_sums
from limbeck.evaluate.scores import interval, ratio, resampled
from limbeck.evaluate.suites import Suite, SuiteContext, suites
from limbeck.models import CausalLM
from limbeck.rollouts import Prompts, Rollout, Sampling, sample, seed_of
from limbeck.rollouts.figures import NGRAM, figures_of
from limbeck.teachers import DISTRIBUTION, require_local

SAMPLED_AT_ONCE = 16
"""Prompts of one call of the sampler; a row's text does not depend on the rows beside it."""
DISTINCT = (1, 2, 3)
NO_NGRAM = 1e-9
"""Stands for the n-grams of a text that is too short for one, so that 0 of them is a share of 0."""
FIGURE_OF = {
    "teacher_nll": ("teacher_nll", "tokens"),
    "own_nll": ("own_nll", "tokens"),
    "repeated": ("repeated", "ngrams"),
    "ended": ("ended", "texts"),
    "length": ("tokens", "texts"),
    "forward_kl": ("forward_kl", "tokens"),
    "reverse_kl": ("reverse_kl", "tokens"),
}
"""Each figure as a ratio of two sums over texts."""

Sums = dict[str, Float64[np.ndarray, " texts"]]


@suites.register("generation")
class Generation(Suite):
    """The teacher's likelihood of the student's samples, their repetition, length and variety.

    Both models write after the same prompts, with the same seeds.
    """

    def __init__(
        self,
        context: SuiteContext,
        *,
        prompts: Annotated[int, Gt(0)] = 64,
        tokens: Annotated[int, Gt(0)] = 64,
        prompt_tokens: Annotated[int, Gt(0)] = 32,
        sampling_temperature: Annotated[float, Gt(0)] = 1.0,
        top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        """
        Args:
            prompts: Held-out prompts, one of a test document, at most.
            tokens: Length of a sample, at most; an end token ends it earlier.
            prompt_tokens: Of `text` data, this many first tokens of a document. Other types have
                prompts of their own.
            sampling_temperature: Divides the logits of the model that samples.
            top_p: Sample from the most probable tokens that together reach this probability.
            seed: Of the draws, the same for every model.
        """
        self._context, self._seed = context, seed
        self._sampling = Sampling(
            tokens=tokens, sampling_temperature=sampling_temperature, top_p=top_p
        )
        self._teacher = require_local(context.teacher, "evaluate.suites: the suite generation")
        self._prompts = held_out_prompts(
            context, self._teacher.model, "generation", prompts, prompt_tokens, tokens
        )
        self._theirs: list[dict[str, Any]] | None = None

    def measure(self, student: CausalLM) -> Mapping[str, Any]:
        """Figures of the student's samples, of the teacher's, and their paired difference."""
        theirs = self._by_teacher()
        rollouts = self._write(student)
        reader = self._teacher.with_needs(DISTRIBUTION)
        budget, world = self._context.head_budget_mb, self._context.world
        read = rollout_sums(student, reader, rollouts, world, budget).cpu()
        own = [asdict(each) for each in rollouts]
        every = interleaved(gather_objects(own, world))
        table = np.array(interleaved(gather_objects(read.tolist(), world)))
        columns = dict(zip(FIGURES, table.T[:-1], strict=True))
        sums = {"teacher_nll": columns.pop("teacher_cross_entropy"), **columns, **own_sums(every)}
        teacher_sums = own_sums(theirs)
        teacher_sums["teacher_nll"] = teacher_sums["own_nll"]
        return {
            "prompts": len(every),
            "student": figures(sums, every),
            "teacher": figures(teacher_sums, theirs),
            "difference": differences(sums, teacher_sums),
        }

    def _by_teacher(self) -> list[dict[str, Any]]:
        """The teacher's samples after the prompts of all ranks, written once."""
        if self._theirs is None:
            with unsharded(self._teacher.model):
                rollouts = self._write(self._teacher.model)
            own = [asdict(each) for each in rollouts]
            self._theirs = interleaved(gather_objects(own, self._context.world))
        return self._theirs

    def _write(self, model: CausalLM) -> list[Rollout]:
        """A model's continuation of each of this rank's prompts."""
        world, written = self._context.world, []
        for start in range(0, len(self._prompts), SAMPLED_AT_ONCE):
            prompts = self._prompts[start : start + SAMPLED_AT_ONCE]
            places = range(start, start + len(prompts))
            numbers = (world.rank + place * world.size for place in places)
            seeds = [seed_of((self._seed, number)) for number in numbers]
            written += sample(model, prompts, self._sampling, seeds)
        return written


def held_out_prompts(
    context: SuiteContext, model: CausalLM, suite: str, count: int, first_tokens: int, tokens: int
) -> list[list[int]]:
    """Prompts of evenly spaced test documents, this rank's share of them.

    Args:
        model: Must be able to read a prompt and the text after it.
        suite: That asks, for the message.
        count: Of all ranks, at most.
        first_tokens: Of a document of `text` data.
        tokens: Of the text after a prompt.

    Raises:
        ConfigError: No test document is long enough.
    """
    held_out, world = context.held_out, context.world
    data = held_out.data
    longest = (model.max_positions or data.facts["sequence_length"]) - tokens
    documents = held_out.test_documents
    found = Prompts(data, longest=longest, first_tokens=first_tokens, documents=documents)
    if not found:
        raise ConfigError(
            f"evaluate.suites: {suite} needs a test document that is longer than its prompt, and "
            f"there is none: {found.too_short:,} are too short, {found.too_long:,} have a prompt "
            f"of over {longest:,} tokens. Lower prompt_tokens or tokens, or give evaluate.data "
            "longer text."
        )
    return [found[place] for place in spread(len(found), count)][world.rank :: world.size]


def interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """What the ranks have of a list, each every so many-th of it, in the list's order."""
    whole: list[Any] = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def own_sums(rollouts: Sequence[Mapping[str, Any]]) -> Sums:
    """Of each text: tokens, n-grams, repeated ones, whether it ended, minus its log-likelihood."""
    rows = []
    for rollout in rollouts:
        found = figures_of([rollout])
        tokens = found["rollout_length"]
        ngrams = max(tokens - NGRAM + 1, NO_NGRAM)
        entropy, repeated = found["rollout_entropy"], found["rollout_repeated"]
        rows.append(
            (tokens, ngrams, ngrams * repeated, found["rollout_ended"], tokens * entropy, 1.0)
        )
    names = ("tokens", "ngrams", "repeated", "ended", "own_nll", "texts")
    return dict(zip(names, np.array(rows).T, strict=True))


def figures(sums: Sums, rollouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every figure with its interval over texts, and the share of distinct n-grams."""
    drawn = resampled(sums)
    found = {
        name: interval(ratio(above, below)(drawn))
        for name, (above, below) in FIGURE_OF.items()
        if above in sums
    }
    shares = {f"distinct_{n}": distinct([r["token_ids"] for r in rollouts], n) for n in DISTINCT}
    return found | shares


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all of the texts (Li et al., 2016, arXiv:1510.03055).

    It falls as texts get longer or more: compare it at equal numbers of both.
    """
    ngrams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def differences(student: Sums, teacher: Sums) -> dict[str, Any]:
    """Figures of the student less those of the teacher, with the same resampled prompts."""
    both = {f"s_{name}": value for name, value in student.items()}
    both |= {f"t_{name}": value for name, value in teacher.items()}
    drawn = resampled(both)
    return {
        name: interval(
            ratio(f"s_{above}", f"s_{below}")(drawn) - ratio(f"t_{above}", f"t_{below}")(drawn)
        )
        for name, (above, below) in FIGURE_OF.items()
        if above in student and above in teacher
    }
