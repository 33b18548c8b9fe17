"""Rollouts that a vLLM server writes with the student's weights, which it reads from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.config.rollout import RolloutServerConfig
from limbeck.distributed import World, full_weights, gather_objects, together, unsharded
from limbeck.errors import DataError
from limbeck.files import raise_if_storage, staging
from limbeck.models import CausalLM, PreTrainedTokenizerBase, evaluating, save_student
from limbeck.rollouts import Rollout, Sampling, rollout_batch
from limbeck.teachers.served import Connection, ServedStudent, checked_url, key_of, reached, say

SECTION = "rollout.server"
WEIGHTS = "rollout-weights"
"""Folder of the student's weights; each batch of rollouts replaces it."""
TIED = "tied.safetensors"
COMPARED = 4
"""Rollouts of each rank that are read with the student's own weights."""
LARGEST_GAP = 0.2
"""Mean difference of log-probabilities, nats a token, above which the first weights are others."""
NOISY_GAP = 0.02
"""One that no run is ended for, however close the first weights were."""
TIMES_FIRST = 4.0
"""Times the first gap that a later one may reach."""


class ServedRolloutWriter:
    """Writes rollouts in a server; each call gives it the weights of that moment."""

    def __init__(
        self,
        served: ServedStudent,
        student: CausalLM,
        root: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        folder: Path,
    ) -> None:
        """
        Args:
            root: The module with the student in it that was sharded, if one was.
            folder: Gets the weights; the server must be able to read it.
        """
        self._served, self._student, self._root = served, student, root
        self._tokenizer, self._sampling, self._folder = tokenizer, sampling, folder
        self._first_gap: float | None = None

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], world: World
    ) -> list[Rollout]:
        """Rollouts of this rank; every rank calls it, and asks for its own.

        Raises:
            DataError: The server has other weights than the student.
        """
        self._publish(world)
        rollouts: list[Rollout] = []
        outages = -1

        def write() -> None:
            nonlocal rollouts
            rollouts = self._written(prompts, seeds)

        # A server that was started again has the weights it was started with.
        while any(gather_objects(outages != self._served.outages, world)):
            outages = self._served.outages
            together(lambda: self._served.load(self._folder), world, main_only=True)
            together(write, world)
        self._require_same_weights(rollouts, world)
        return rollouts

    def _publish(self, world: World) -> None:
        """Put the student's weights in the folder; all of a folder appears at once."""
        weights = full_weights(self._student.hf_model, world)

        def publish() -> None:
            temporary = staging(self._folder)
            try:
                temporary.mkdir(parents=True)
                save_student(self._student, self._tokenizer, temporary, weights=weights)
                save_tied(self._student, weights, temporary)
                shutil.rmtree(self._folder, ignore_errors=True)
                temporary.rename(self._folder)
            except Exception as error:
                raise_if_storage(error, self._folder, temporary)
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

        together(publish, world, main_only=True)

    def _written(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Rollout]:
        sampling = self._sampling
        answers = self._served.write(
            prompts,
            seeds,
            tokens=sampling.tokens,
            temperature=sampling.sampling_temperature,
            top_p=sampling.top_p,
        )
        return [
            Rollout(tuple(p), a.token_ids, a.logprobs, "end" if a.is_ended else "length")
            for p, a in zip(prompts, answers, strict=True)
        ]

    def _require_same_weights(self, rollouts: Sequence[Rollout], world: World) -> None:
        """Refuse a server whose log-probabilities are not the student's."""
        with unsharded(self._root):
            mine = gap_of(self._student, rollouts[:COMPARED])
        gap = max(each for each in gather_objects(mine, world) if each is not None)
        limit = LARGEST_GAP
        if self._first_gap is not None:
            limit = max(NOISY_GAP, TIMES_FIRST * self._first_gap)
        if not gap <= limit:
            raise DataError(
                f"{SECTION}: the server must write with the student's weights, and its "
                f"log-probabilities are {gap:.3g} nats a token from the student's, above "
                f"{limit:.3g}. Start it with a model of the student's architecture, for this run "
                "alone, and resume."
            )
        if self._first_gap is None:
            self._first_gap = gap
            if world.is_main:
                say(f"{SECTION}: its log-probabilities are {gap:.2g} nats from the student's.")


def save_tied(student: CausalLM, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights that share memory under their other names too, in a file of their own.

    vLLM 0.32 keeps the head it was started with unless the files name it.
    """
    model = student.hf_model
    owned = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - owned
    if tied:
        copies = {name: weights[name].clone() for name in sorted(tied)}
        save_file(copies, folder / TIED, metadata={"format": "pt"})


@torch.no_grad()
def gap_of(student: CausalLM, rollouts: Sequence[Rollout]) -> float | None:
    """Mean difference of the rollouts' log-probabilities from the student's, nats a token."""
    if not rollouts:
        return None
    batch = rollout_batch(rollouts).to(student.device)
    with evaluating(student):
        hidden, _ = student(batch)
        logits = student.head(hidden)
    own = logits.float().log_softmax(-1).gather(-1, batch.targets()[:, None])[:, 0]
    theirs = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    return float((own.cpu() - theirs).abs().mean())


def served_writer(
    config: RolloutServerConfig,
    student: CausalLM,
    root: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    folder: Path,
    longest: int,
) -> ServedRolloutWriter:
    """The writer of a recipe's `rollout.server`, which has answered once.

    Args:
        folder: Of the trial; the weights are in it unless the recipe names another.
        longest: Tokens of the longest prompt and its rollout.
    """
    connection = Connection(
        url=checked_url(config.url, SECTION),
        key=key_of(config.key_env, SECTION),
        concurrency=config.concurrency,
        timeout_s=config.timeout_s,
        patience_s=config.patience_s,
        section=SECTION,
    )
    server = reached(connection, config.model, say, longest)
    served = ServedStudent(
        server,
        config.model,
        ends=student.end_ids,
        vocabulary_size=student.vocabulary_size,
    )
    place = (config.folder or folder) / WEIGHTS
    return ServedRolloutWriter(served, student, root, tokenizer, sampling, place.absolute())
