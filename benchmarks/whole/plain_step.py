"""A plain loop's step of forward KL at T = 1.

Neither this file nor `trl_step.py` imports limbeck, so that a process of the peers starts without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.nn.utils import clip_grad_norm_

BETAS, CLIP = (0.9, 0.95), 1.0


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Fused AdamW without weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=0.0, fused=True)


def plain_step(
    student: Any, teacher: Any, optimizer: torch.optim.Optimizer, ids: Tensor, dtype: torch.dtype
) -> float:
    """One step of transformers' models with torch's own loss on whole logits; returns the loss.

    Args:
        ids: Token ids of shape (B, T); all of them are scored.
        dtype: What autocast computes in; float32 for no autocast.
    """
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        logits = student(ids, use_cache=False).logits.flatten(0, 1)
        with torch.no_grad():
            other = teacher(ids, use_cache=False).logits.flatten(0, 1)
    student_logprobs, teacher_logprobs = (each.float().log_softmax(-1) for each in (logits, other))
    loss = kl_div(student_logprobs, teacher_logprobs, log_target=True, reduction="batchmean")
    loss.backward()
    clip_grad_norm_(student.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
