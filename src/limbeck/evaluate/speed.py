"""Throughput of models, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from limbeck.batch import Batch
from limbeck.losses.head.fused import head_chunk
from limbeck.models import CausalLM, evaluating

TOKENS = 256
ROUNDS = 5


def speeds(models: Mapping[str, CausalLM]) -> dict[str, float]:
    """Tokens a second of each model's forward pass with logits, one row, warm.

    The models take turns and the fastest turn of each counts, because other processes can only slow
    a turn down. Compare the ratios; absolute figures depend on the machine.
    """
    batches = {name: example_batch(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            elapsed = forward_seconds(model, batches[name])
            if turn:  # the first turn warms up
                seconds[name].append(elapsed)
    return {name: batches[name].input_ids.numel() / min(times) for name, times in seconds.items()}


def example_batch(model: CausalLM) -> Batch:
    """One row of arbitrary tokens, 256 or the longest the model accepts."""
    length = min(TOKENS, model.max_positions or TOKENS)
    device = next(model.parameters()).device
    return Batch.from_tokens(torch.arange(length + 1, device=device)[None] % model.vocabulary_size)


def forward_seconds(model: CausalLM, batch: Batch) -> float:
    """Wall time of one forward pass, logits included."""
    with torch.no_grad(), evaluating(model):
        synchronize(batch.input_ids.device)
        start = time.perf_counter()
        hidden, _ = model(batch)
        head = model.head
        for window in hidden.split(head_chunk("auto", head.weight, copies=2)):
            head(window)
        synchronize(batch.input_ids.device)
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator's queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
