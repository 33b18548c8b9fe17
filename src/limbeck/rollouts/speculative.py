"""Speculative decoding with transformers' assisted generation, and how many drafts it accepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from limbeck.models import CausalLM
from limbeck.models.modes import evaluating
from limbeck.models.quiet import quiet


@dataclass(frozen=True)
class Assisted:
    """A text that a target wrote with an assistant's drafts.

    Attributes:
        token_ids: The text, without its prompt.
        passes: Forward passes of the target.
        proposed: Drafted tokens.
        tested: Drafted tokens up to the first that was rejected, in each pass.
        accepted: Drafted tokens that are in the text.
        shared: Sum of min(p, q) over the text's positions, p the target's and q the assistant's
            distribution: how many of as many drafts are accepted in expectation.
    """

    token_ids: tuple[int, ...]
    passes: int
    proposed: int
    tested: int
    accepted: int
    shared: float


@torch.no_grad()
def write_assisted(
    target: CausalLM,
    assistant: CausalLM,
    prompt: Sequence[int],
    *,
    tokens: int,
    draft_tokens: int,
    seed: int,
) -> Assisted:
    """A sample of the target at temperature 1, drafted by the assistant.

    Args:
        prompt: Token ids, at least one.
        tokens: Length of the text, at most; an end token ends it earlier.
        draft_tokens: Drafted before each pass of the target.
        seed: Of the draws.
    """
    model = target.hf_model
    assert assistant.hf_model is not model, "passes of both would be counted"
    ids = torch.tensor([list(prompt)], device=model.device)
    watch = PassWatch(target.end_ids)
    with (
        evaluating(target),
        evaluating(assistant),
        constant_drafts(assistant, draft_tokens),
        watch.counting(model),
        quiet(),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(seed)
        made: Tensor = cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=assistant.hf_model,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=sorted(target.end_ids) or None,
            pad_token_id=0,
            streamer=watch,
        )
    written = made[0, len(prompt) :].tolist()
    p, q = (m.logits(made)[0, len(prompt) - 1 : -1].softmax(-1) for m in (target, assistant))
    return Assisted(
        token_ids=tuple(written),
        passes=watch.passes,
        proposed=watch.proposed,
        tested=watch.tested,
        accepted=watch.accepted,
        shared=float(torch.minimum(p, q).sum()),
    )


@contextmanager
def constant_drafts(assistant: CausalLM, draft_tokens: int) -> Iterator[None]:
    """Let the assistant draft as many tokens before each pass; its settings are restored."""
    model = cast(Any, assistant.hf_model)
    before, model.generation_config = model.generation_config, deepcopy(model.generation_config)
    model.generation_config.num_assistant_tokens = draft_tokens
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    try:
        yield
    finally:
        model.generation_config = before


class PassWatch(BaseStreamer):
    """Counts what each pass of the target reads, and what `generate` keeps of it.

    A pass reads the drafts and the token before them, the first one the prompt and the drafts. It
    keeps the drafts up to the first that is rejected, and one token of its own.
    """

    def __init__(self, end_ids: frozenset[int]) -> None:
        self.passes = self.proposed = self.tested = self.accepted = 0
        self._end_ids = end_ids
        self._prompt_length: int | None = None
        self._drafted = 0

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Watch the forward passes of the target."""
        hook = model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _before_pass(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert self._prompt_length is not None, "the prompt is put before the first pass"
        read = self._prompt_length if self.passes == 0 else 1
        self._drafted = kwargs["input_ids"].shape[1] - read
        self.passes += 1

    def put(self, value: Tensor) -> None:
        """The prompt first, then the tokens that are kept of each pass."""
        if self._prompt_length is None:
            self._prompt_length = value.shape[-1]
            return
        kept = value.flatten().tolist()
        accepted = len(kept) - 1
        ended = kept[-1] in self._end_ids  # drafts after it were not tested
        self.proposed += self._drafted
        self.accepted += accepted
        self.tested += accepted + int(accepted < self._drafted and not ended)

    def end(self) -> None:
        """Nothing is held back."""
