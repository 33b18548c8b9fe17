"""Continuations sampled from a model, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from limbeck.models import CausalLM
from limbeck.models.modes import evaluating

OPEN = (2.0**-25, 1 - 2.0**-24)
"""Bounds of uniform numbers, multiples of 2^-24: 0 would draw its token, and 1 never."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a continuation is drawn.

    Attributes:
        tokens: At most so many; an end token ends it earlier and belongs to it.
        sampling_temperature: Divides the logits.
        top_p: Keep the most probable tokens that together reach this probability.
    """

    tokens: Annotated[int, Gt(0)] = 128
    sampling_temperature: Annotated[float, Gt(0)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0


@dataclass(frozen=True)
class Rollout:
    """A prompt and what a model wrote after it.

    Attributes:
        prompt_ids: At least one token.
        token_ids: At least one token.
        logprobs: Of each written token under the model, at temperature 1 and over all tokens.
        finish: `end` after an end token, `length` where the text was cut.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["end", "length"]


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    on_tokens: Callable[[list[int]], None] | None = None,
) -> list[Rollout]:
    """One continuation of each prompt, with the model's current weights and a key-value cache.

    Args:
        prompts: Token ids, at least one each; the lengths may differ.
        seeds: Of each row's draws (`seed_of`). A row's text does not depend on the rows
            beside it, rounding of the model's logits aside.
        on_tokens: Called after each token with all tokens so far; one prompt only.
    """
    if not prompts:
        return []
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    draw = GumbelDraw(model.vocabulary_size, sampling, seeds, device)
    with evaluating(model):
        made: Tensor = cast(Any, model.hf_model).generate(  # transformers types `self` away
            ids,
            attention_mask=real,
            max_new_tokens=sampling.tokens,
            do_sample=False,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([draw]),
            eos_token_id=sorted(model.end_ids) or None,
            pad_token_id=0,
            streamer=None if on_tokens is None else TokenStream(on_tokens),
        )
    logprobs = torch.stack(draw.logprobs, dim=1).tolist()
    written = made[:, width:].tolist()
    return [
        cut_at_end(tuple(prompt), row, numbers, model.end_ids)
        for prompt, row, numbers in zip(prompts, written, logprobs, strict=True)
    ]


def cut_at_end(
    prompt: tuple[int, ...], written: list[int], logprobs: list[float], ends: frozenset[int]
) -> Rollout:
    """The rollout up to its first end token; what `generate` padded it with is dropped."""
    for place, token in enumerate(written):
        if token in ends:
            size = place + 1
            return Rollout(prompt, tuple(written[:size]), tuple(logprobs[:size]), "end")
    return Rollout(prompt, tuple(written), tuple(logprobs), "length")


class TokenStream(BaseStreamer):
    """Passes on the tokens that `generate` has written so far."""

    def __init__(self, on_tokens: Callable[[list[int]], None]) -> None:
        self._on_tokens = on_tokens
        self._written: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        if self._written is None:
            self._written = []
            return
        self._written += value.flatten().tolist()
        self._on_tokens(list(self._written))

    def end(self) -> None:
        """End of the stream; nothing is buffered."""


class GumbelDraw(LogitsProcessor):
    """Scores whose largest entry is an exact draw (Gumbel-max), from one stream a row.

    `generate` draws all rows from one global stream, so a row would depend on its neighbours.

    Attributes:
        logprobs: Of the drawn tokens, one tensor [B] a call.
    """

    def __init__(
        self,
        vocabulary_size: int,
        sampling: Sampling,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ):
        """
        Args:
            vocabulary_size: Later ids are padding of the head, and never drawn.
            device: Where scores will be; random numbers are drawn there.
        """
        self.logprobs: list[Tensor] = []
        self._size, self._sampling = vocabulary_size, sampling
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._noise = torch.empty(len(seeds), vocabulary_size, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """0 for the token that is drawn and -inf for the others."""
        logits = scores[:, : self._size].float()
        kept = nucleus(logits / self._sampling.sampling_temperature, self._sampling.top_p)
        for row, stream in zip(self._noise, self._streams, strict=True):
            row.uniform_(*OPEN, generator=stream)
        waiting = self._noise.neg_().log1p_().neg_()
        drawn = torch.sub(kept, waiting.log_()).argmax(-1, keepdim=True)
        logprobs = logits.gather(-1, drawn) - logits.logsumexp(-1, keepdim=True)
        self.logprobs.append(logprobs[:, 0])
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(-1, drawn, 0.0)


def seed_of(key: Sequence[int]) -> int:
    """One seed from several numbers, below 2^63."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> 1)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The logits, -inf outside the smallest most probable set that reaches `top_p`."""
    if top_p >= 1:
        return logits
    sorted_logits, places = logits.sort(-1, descending=True)
    probabilities = sorted_logits.double().softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, places, outside), -torch.inf)
