"""How fast models read, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from limbeck.batch import Batch
from limbeck.losses.head.fused import head_chunk
from limbeck.models import CausalLM, evaluating

TOKENS = 256
ROUNDS = 5


def speed(model: CausalLM) -> float:
    """Tokens a second of one forward pass with logits, one row, warm."""
    return speeds({"model": model})["model"]


def speeds(models: Mapping[str, CausalLM]) -> dict[str, float]:
    """Tokens a second of each model's forward pass with logits, one row, warm.

    The models take turns and the fastest turn counts: what else runs on a machine only ever slows
    a turn down. Ratios between them mean something where the figures themselves do not.
    """
    batches = {name: some_batch(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            taken = forward_seconds(model, batches[name])
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    return {name: batches[name].input_ids.numel() / min(taken) for name, taken in seconds.items()}


def some_batch(model: CausalLM) -> Batch:
    """One row of arbitrary tokens, as long as the model takes, at most 256."""
    length = min(TOKENS, model.max_positions or TOKENS)
    device = next(model.parameters()).device
    return Batch.from_tokens(torch.arange(length + 1, device=device)[None] % model.vocabulary_size)


def forward_seconds(model: CausalLM, batch: Batch) -> float:
    """Wall time of one forward pass, logits included."""
    with torch.no_grad(), evaluating(model):
        finish(batch.input_ids.device)
        start = time.perf_counter()
        hidden, _ = model(batch)
        head = model.head
        for window in hidden.split(head_chunk("auto", head.weight, copies=2)):
            head(window)
        finish(batch.input_ids.device)
        return time.perf_counter() - start


def finish(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
