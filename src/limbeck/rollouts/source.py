"""Batches of text that a model generates during the run."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from limbeck.batch import Batch, Window
from limbeck.data import BatchSource, StepData, one_order, step_span
from limbeck.distributed import World, broadcast_object, gather_objects, together, unsharded
from limbeck.errors import ConfigError, DataError
from limbeck.files import write_text
from limbeck.models import CausalLM
from limbeck.rollouts.figures import Watch, figures_of
from limbeck.rollouts.sampling import Rollout, Sampling, sample, seed_of

WEIGHTS_STEP = "weights_step"
"""Key of a kept rollout: the step whose weights wrote it, if that is an earlier one."""
BLOCK_END = "block_end"
"""Key of a kept rollout, with `refresh`: the step at which the block it was written in ends."""

Writer = Callable[[Sequence[Sequence[int]], Sequence[int], World], list[Rollout]]
"""This rank's continuations of prompts, each from its seed; every rank calls it."""


@dataclass(frozen=True)
class Scoring:
    """Which tokens of a rollout are learned from, and how much.

    Attributes:
        first: Where the scored part begins, as a share of the rollout's length.
        last: Where it ends; both are rounded to whole tokens, and at least one is scored.
        decay: Each scored token weighs this times as much as the one before it; the first weighs 1.
    """

    first: float = 0.0
    last: float = 1.0
    decay: float = 1.0

    def part(self, size: int) -> tuple[int, int]:
        """The scored tokens of a rollout of some size: the first, and the one after the last."""
        start = min(round(self.first * size), size - 1)
        return start, max(round(self.last * size), start + 1)


WHOLE = Scoring()
"""Every token of a rollout counts alike."""


class Rollouts(BatchSource):
    """Continuations of prompts by a model, written during the run; only their tokens are scored.

    A written step is a pure function of the model's weights, the seed and the step, and later steps
    of a block are read from the folder, so that a run resumed from a checkpoint reads the text it
    would have read.

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
        refresh: int = 1,
        num_steps: int | None = None,
        scoring: Scoring = WHOLE,
        folder: Path,
        root: nn.Module | None = None,
        writer: Writer | None = None,
        first_number: int = 0,
    ) -> None:
        """
        Args:
            model: Generates the text: the student in training, or a teacher.
            seed: Of the prompts' order and of the draws.
            rows_per_step: Rollouts of one optimizer step, over all ranks.
            per_prompt: Rollouts of each prompt, in one step; divides `rows_per_step`.
            refresh: Steps of a block, whose rollouts are written together in its first step.
            num_steps: Of the run; a block that reaches beyond it is cut there.
            scoring: Which tokens of each rollout are learned from.
            folder: Gets `step-N.jsonl` for each step; a block written again replaces its files.
            root: The module with the model in it that was sharded over the ranks, if one was. Each
                rank holds its whole weights while it writes.
            writer: Writes in place of the model, with its weights; texts that are in the folder
                are then read, because it need not write them again.
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
        self._per_prompt, self._refresh, self._num_steps = per_prompt, refresh, num_steps
        self._scoring = scoring
        self._order = one_order(seed, len(prompts))
        self._root, self.first_number = root or model, first_number
        self._writer = writer
        self.latest: Sequence[Rollout] = ()
        self._watch = Watch(folder)

    @property
    def fingerprint(self) -> str:
        """Hash of prompts, their order, and how and when rollouts are drawn."""
        facts = [self._order.digest, asdict(self._sampling)]
        scoring = self._scoring
        numbers = [
            self._rows_per_step,
            self._per_prompt,
            self._refresh,
            scoring.first,
            scoring.last,
        ]
        if scoring.decay != 1:  # absent from the checkpoints of earlier versions
            numbers.append(scoring.decay)
        digest = hashlib.sha256(json.dumps([*facts, *numbers]).encode())
        for prompt in self._prompts:
            digest.update(np.array([len(prompt), *prompt], dtype="<i8").tobytes())
        return digest.hexdigest()

    def step(self, step: int, world: World) -> StepData:
        """The rank's rollouts of the step.

        The first step of a block writes and keeps those of the whole block. Later ones read them;
        if the block ended before, because the run first ended there, they write the rest.

        Raises:
            DataError: The rollouts of a block are damaged, or missing although they were written.
        """
        started, seconds = time.perf_counter(), 0.0
        everyone = self._read(step, world) if self._is_kept(step, world) else []
        if not everyone:
            everyone = self._write_block(step, world)
            seconds = time.perf_counter() - started
        begin, end = step_span(0, world.rank, world.size, self._rows_per_step)
        self.latest = [rollout_of(facts) for facts in everyone[begin:end]]
        figures = figures_of(everyone)
        staleness = float(step - everyone[0].get(WEIGHTS_STEP, step))
        return RolloutsOfStep(
            self.latest,
            self.first_number + begin,
            math.ceil(self._rows_per_step / world.size),
            self._scoring,
            figures | {"rollout_staleness": staleness, "rollout_seconds": seconds},
            self._watch.warnings(step, figures) if world.is_main else [],
        )

    def write(self, step: int, world: World, num_steps: int = 1) -> list[Rollout]:
        """The rank's rollouts of some steps, as many of each, in one batch.

        Those of all ranks, in rank order, do not depend on the number of ranks, nor on the other
        steps.
        """
        each, prompts, seeds = self._per_prompt, [], []
        for later in range(step, step + num_steps):
            begin, end = step_span(later, world.rank, world.size, self._rows_per_step)
            rows = self._order.rows(begin // each, -(-end // each))
            places, first = range(begin, end), later * self._rows_per_step
            prompts += [self._prompts[rows[place // each - begin // each]] for place in places]
            seeds += [seed_of((self._seed, later, place - first)) for place in places]
        if self._writer is not None:
            return self._writer(prompts, seeds, world)
        with unsharded(self._root):
            return sample(self._model, prompts, self._sampling, seeds)

    def document_name(self, document: int) -> str:
        return f"rollout {document - self.first_number}"

    def _write_block(self, step: int, world: World) -> list[dict[str, Any]]:
        """Write and keep the rollouts of this step and the rest of its block; returns this step's.

        All are kept before the first is trained on, so that a run resumed within the block reads
        what these weights wrote.
        """
        end = self._block_end(step)
        size = end - step
        own = [asdict(rollout) for rollout in self.write(step, world, size)]
        rows = len(own) // size
        parts = gather_objects([own[i * rows : (i + 1) * rows] for i in range(size)], world)
        block = [[facts for part in parts for facts in part[i]] for i in range(size)]
        if self._refresh > 1:
            for later, rollouts in enumerate(block, step):
                own_step = {} if later == step else {WEIGHTS_STEP: step}
                for facts in rollouts:
                    facts |= {**own_step, BLOCK_END: end}
        together(lambda: self._keep(step, block), world, main_only=True)
        return block[0]

    def _keep(self, step: int, block: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for later, rollouts in enumerate(block, step):
            lines = "".join(json.dumps(rollout) + "\n" for rollout in rollouts)
            write_text(self._path(later), lines)

    def _block_end(self, step: int) -> int:
        """The step after the last one whose rollouts are written with those of a step."""
        end = step - step % self._refresh + self._refresh
        return end if self._num_steps is None else min(end, self._num_steps)

    def _is_kept(self, step: int, world: World) -> bool:
        """Whether the step's rollouts were written with those of the step before it.

        Or, where a writer need not write the same text again, in an earlier attempt.
        """
        if step % self._refresh == 0:
            if self._writer is None:
                return False
            block = range(step, self._block_end(step))
            is_kept: bool = broadcast_object(all(self._path(s).exists() for s in block), world)
            return is_kept
        before = self._read(step - 1, world)
        return bool(before) and before[0][BLOCK_END] > step

    def _read(self, step: int, world: World) -> list[dict[str, Any]]:
        """The step's kept rollouts, of all ranks; rank 0 reads the file, which must be there."""
        path, start = self._path(step), step - step % self._refresh
        rollouts: list[dict[str, Any]] = []

        def read() -> None:
            if not path.exists():
                raise DataError(
                    f"{path} must hold the rollouts that were written ahead of step {step}, and is "
                    "missing: written now, they would be those of other weights. Restore it, "
                    f"continue with --resume-from a checkpoint of step {start} or before, or start "
                    "again with --overwrite."
                )
            lines = path.read_text(encoding="utf-8").splitlines()
            try:
                rollouts.extend(json.loads(line) for line in lines)
            except ValueError as error:
                raise DataError(
                    f"{path} must hold a rollout in each line, and is damaged "
                    f"({error}). Restore it, or start again with --overwrite."
                ) from None

        together(read, world, main_only=True)
        kept: list[dict[str, Any]] = broadcast_object(rollouts, world)
        return kept

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step}.jsonl"


def rollout_of(facts: Mapping[str, Any]) -> Rollout:
    """The rollout of a line in its file."""
    prompt, text, logprobs = (tuple(facts[n]) for n in ("prompt_ids", "token_ids", "logprobs"))
    return Rollout(prompt, text, logprobs, facts["finish"])


@dataclass(frozen=True)
class RolloutsOfStep(StepData):
    """One rank's rollouts.

    Attributes:
        first: Number of the rank's first, in messages.
        most_rows: Rows of the rank that has most.
        scoring: Which tokens of each rollout are learned from.
        figures: Of all ranks' rollouts (`figures_of`), steps since the weights that wrote them, and
            the seconds this rank took to write.
        warning_texts: Degradation since the first steps.
    """

    rollouts: Sequence[Rollout]
    first: int
    most_rows: int
    scoring: Scoring = WHOLE
    figures: Mapping[str, float] = field(default_factory=dict)
    warning_texts: Sequence[str] = ()

    def cut(self, micro_batch: int) -> list[Batch]:
        starts = range(0, max(1, self.most_rows), micro_batch)
        return [
            rollout_batch(self.rollouts[at : at + micro_batch], self.first + at, self.scoring)
            for at in starts
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


def rollout_batch(
    rollouts: Sequence[Rollout], first_document: int = 0, scoring: Scoring = WHOLE
) -> Batch:
    """Prompts and continuations, a row each; only tokens of the continuations are scored."""
    rows = []
    for document, rollout in enumerate(rollouts, first_document):
        tokens = np.array([*rollout.prompt_ids, *rollout.token_ids])
        start, stop = scoring.part(len(rollout.token_ids))
        place = np.arange(1, len(tokens)) - len(rollout.prompt_ids)
        weights = scoring.decay ** np.maximum(place - start, 0)
        rows.append([Window(tokens, (start <= place) & (place < stop), document, weights)])
    return Batch.packed(rows, weighted=scoring.decay != 1)
