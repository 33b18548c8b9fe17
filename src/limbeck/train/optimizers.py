"""The optimizers a recipe can name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from limbeck.config import OptimConfig
from limbeck.distributed import AdamW8bit
from limbeck.errors import ConfigError
from limbeck.models import Distiller

Optimizers = tuple[Optimizer, ...]
"""Usually one; Muon updates matrices only and needs a second one for the rest."""


def make_optimizers(
    distiller: Distiller, optim: OptimConfig, learning_rate: float, device: torch.device
) -> Optimizers:
    """The optimizers of everything that is trained: the student, and what its terms own.

    Weight decay is decoupled and on matrices only, except for SGD, whose decay is the classic L2
    term. Muon steps are scaled to the size of AdamW's (`match_rms_adamw`), so that one learning
    rate serves both.
    """
    trained = [p for p in distiller.parameters() if p.requires_grad]
    match optim.type:
        case "adamw":
            return (adamw(trained, optim, learning_rate, device),)
        case "adamw_8bit":
            groups = list(by_decay(trained, optim.weight_decay))
            return (AdamW8bit(groups, lr=learning_rate, betas=optim.betas, eps=optim.eps),)
        case "sgd":
            groups = list(by_decay(trained, optim.weight_decay))
            return (SGD(groups, lr=learning_rate, momentum=optim.momentum),)
        case "adafactor":
            if any(isinstance(p, DTensor) for p in trained):
                raise ConfigError(
                    "optim.type: torch's adafactor does not work on the sharded matrices of "
                    "several ranks. Use adamw or muon, or one process."
                )
            return (Adafactor(list(by_decay(trained, optim.weight_decay)), lr=learning_rate),)
        case "muon":
            matrices = {p for p in distiller.student.blocks.parameters() if p.ndim == 2}
            mine = [p for p in trained if p in matrices]
            rest = [p for p in trained if p not in matrices]
            if not mine:
                raise ConfigError(
                    "optim.type: muon serves the matrices of the student's blocks, and none of "
                    "them is trained. Use adamw, or leave them out of trainable.freeze."
                )
            muon = Muon(
                mine,
                lr=learning_rate,
                weight_decay=optim.weight_decay,
                momentum=optim.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            return (muon, adamw(rest, optim, learning_rate, device)) if rest else (muon,)


def adamw(
    parameters: Iterable[nn.Parameter],
    optim: OptimConfig,
    learning_rate: float,
    device: torch.device,
) -> AdamW:
    """AdamW, as one kernel where torch has one."""
    return AdamW(
        list(by_decay(parameters, optim.weight_decay)),
        lr=learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        fused=device.type in ("cpu", "cuda"),
    )


def by_decay(parameters: Iterable[nn.Parameter], weight_decay: float) -> Iterator[dict[str, Any]]:
    """Matrices, which decay, and everything else, which does not."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    rest = [p for p in parameters if p.ndim < 2]
    if matrices:
        yield {"params": matrices, "weight_decay": weight_decay}
    if rest:
        yield {"params": rest, "weight_decay": 0.0}


def set_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Set the learning rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
