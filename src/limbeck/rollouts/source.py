"""Batches of text that a model generates during the run."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from limbeck.batch import Batch, Window
from limbeck.data import BatchSource, StepData, one_order, step_span
from limbeck.distributed import World, gather_objects, together, unsharded
from limbeck.errors import ConfigError, DataError
from limbeck.files import write_text
from limbeck.models import CausalLM
from limbeck.rollouts.figures import Watch, figures_of
from limbeck.rollouts.sampling import Rollout, Sampling, sample, seed_of


class Rollouts(BatchSource):
    """Continuations of prompts by a model, sampled once a step; only their tokens are scored.

    A step is a pure function of the model's weights, the seed and the step, so that a run resumed
    from a checkpoint reads the text it would have read.

    Attributes:
        first_number: Number of a step's first rollout in messages.
        latest: This rank's rollouts of the last step.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        rows_per_step: int,
        per_prompt: int = 1,
        folder: Path,
        root: nn.Module | None = None,
        first_number: int = 0,
    ) -> None:
        """
        Args:
            model: Generates the text: the student in training, or a teacher.
            seed: Of the prompts' order and of the draws.
            rows_per_step: Rollouts of one optimizer step, over all ranks.
            per_prompt: Rollouts of each prompt, in one step; divides `rows_per_step`.
            folder: Gets `step-N.jsonl` for each step; a repeated step replaces its file.
            root: The module with the model in it that was sharded over the ranks, if one was. Each
                rank holds its whole weights while it writes.
            first_number: Number of a step's first rollout in messages, above those of the documents
                and rows it stands beside.
        """
        if not prompts or not all(prompts):
            raise DataError(
                f"Rollouts need prompts of at least one token, got {len(prompts)} prompts, "
                f"{sum(not p for p in prompts)} of them empty. Remove the empty ones."
            )
        longest, limit = max(map(len, prompts)) + sampling.tokens, model.max_positions
        if limit is not None and longest > limit:
            raise ConfigError(
                f"rollout.tokens: the longest prompt and its rollout must fit into the model's "
                f"{limit} positions, got {longest}. Lower rollout.tokens or shorten the prompts."
            )
        self._model, self._prompts, self._sampling = model, prompts, sampling
        self._seed, self._rows_per_step, self._folder = seed, rows_per_step, folder
        self._per_prompt = per_prompt
        self._order = one_order(seed, len(prompts))
        self._root, self.first_number = root or model, first_number
        self.latest: Sequence[Rollout] = ()
        self._watch = Watch(folder)

    @property
    def fingerprint(self) -> str:
        """Hash of prompts, their order, and how rollouts are drawn."""
        facts = [self._order.digest, asdict(self._sampling)]
        digest = hashlib.sha256(
            json.dumps([*facts, self._rows_per_step, self._per_prompt]).encode()
        )
        for prompt in self._prompts:
            digest.update(np.array([len(prompt), *prompt], dtype="<i8").tobytes())
        return digest.hexdigest()

    def step(self, step: int, world: World) -> StepData:
        """The rank's rollouts of the step, sampled now and kept in the folder."""
        started = time.perf_counter()
        own = self.latest = self.write(step, world)
        facts = [asdict(rollout) for rollout in own]
        everyone = [each for part in gather_objects(facts, world) for each in part]
        together(lambda: self._keep(step, everyone), world, main_only=True)
        figures = figures_of(everyone)
        return RolloutsOfStep(
            own,
            self.first_number + world.rank * self._rows_per_step // world.size,
            math.ceil(self._rows_per_step / world.size),
            figures | {"rollout_seconds": time.perf_counter() - started},
            self._watch.warnings(step, figures) if world.is_main else [],
        )

    def write(self, step: int, world: World) -> list[Rollout]:
        """The rank's rollouts; those of all ranks, in rank order, do not depend on their number."""
        begin, end = step_span(step, world.rank, world.size, self._rows_per_step)
        each = self._per_prompt
        rows = self._order.rows(begin // each, -(-end // each))
        places = range(begin, end)
        prompts = [self._prompts[rows[place // each - begin // each]] for place in places]
        first = step * self._rows_per_step
        seeds = [seed_of((self._seed, step, place - first)) for place in places]
        with unsharded(self._root):
            return sample(self._model, prompts, self._sampling, seeds)

    def document_name(self, document: int) -> str:
        return f"rollout {document - self.first_number}"

    def _keep(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(rollout) + "\n" for rollout in rollouts)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / f"step-{step}.jsonl", lines)


@dataclass(frozen=True)
class RolloutsOfStep(StepData):
    """One rank's rollouts.

    Attributes:
        first: Number of the rank's first, in messages.
        most_rows: Rows of the rank that has most.
        figures: Of all ranks' rollouts (`figures_of`), and the seconds this rank took for them.
        warning_texts: Degradation since the first steps.
    """

    rollouts: Sequence[Rollout]
    first: int
    most_rows: int
    figures: Mapping[str, float] = field(default_factory=dict)
    warning_texts: Sequence[str] = ()

    def cut(self, micro_batch: int) -> list[Batch]:
        starts = range(0, max(1, self.most_rows), micro_batch)
        return [
            rollout_batch(self.rollouts[at : at + micro_batch], self.first + at) for at in starts
        ]

    def row_numbers(self, micro_batch: int) -> list[list[int]]:
        starts = range(0, max(1, self.most_rows), micro_batch)
        last = len(self.rollouts)
        return [[self.first + i for i in range(at, min(at + micro_batch, last))] for at in starts]

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.figures

    @property
    def warnings(self) -> Sequence[str]:
        return self.warning_texts


def rollout_batch(rollouts: Sequence[Rollout], first_document: int = 0) -> Batch:
    """Prompts and continuations, a row each; only the continuations are scored."""
    rows = []
    for document, rollout in enumerate(rollouts, first_document):
        tokens = np.array([*rollout.prompt_ids, *rollout.token_ids])
        scored = np.arange(1, len(tokens)) >= len(rollout.prompt_ids)
        rows.append([Window(tokens, scored, document)])
    return Batch.packed(rows)
