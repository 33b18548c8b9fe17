"""Formulas, and who computes each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from head import peers
from head.inputs import KEPT, Inputs, recorded
from head.ours import Products, closed, general, lazy, plain, weighted
from limbeck.losses import Objective

Form = Callable[[], list[Tensor]]
"""Gradients of hidden states and head, from tensors it already holds."""

Maker = Callable[[Inputs], Form]

OURS, PLAIN = "limbeck", "plain full logits"


class Formula(NamedTuple):
    """A loss, and those who compute it."""

    words: str
    forms: Mapping[str, Maker]


def stored(inputs: Inputs) -> Form:
    teacher, objective = recorded(inputs, 2.0), Objective(weighted("forward_kl", 0.5, 2.0))
    return lambda: closed(inputs, teacher, objective)


def autograd(inputs: Inputs) -> Form:
    objective = Objective(weighted("forward_kl", 0.5, 2.0))
    return lambda: general(inputs, objective)


def own(divergence: str, alpha: float, temperature: float) -> dict[str, Maker]:
    """Ours and the plain form of a loss."""

    def ours(inputs: Inputs) -> Form:
        objective = Objective(weighted(divergence, alpha, temperature))
        return lambda: closed(inputs, lazy(inputs), objective)

    return {
        OURS: ours,
        PLAIN: lambda inputs: lambda: plain(inputs, divergence, alpha, temperature),
    }


FORMULAS = {
    "products": Formula(
        "the matrix products alone",
        {
            "products": lambda inputs: Products(inputs, with_teacher=True),
            "products, chunk 512": lambda inputs: Products(inputs, with_teacher=True, most=512),
            "products, stored teacher": lambda inputs: Products(inputs, with_teacher=False),
        },
    ),
    "kl_ce": Formula(
        "0.5 T^2 KL + 0.5 CE, T = 2",
        own("forward_kl", 0.5, 2.0)
        | {
            "limbeck, autograd in a chunk": autograd,
            "Liger, compiled": lambda inputs: lambda: peers.liger(inputs, 0.0, 0.5, 2.0, True),
            "Liger, eager": lambda inputs: lambda: peers.liger(inputs, 0.0, 0.5, 2.0, False),
        },
    ),
    "kl_ce_1": Formula(
        "0.5 KL + 0.5 CE, T = 1",
        own("forward_kl", 0.5, 1.0)
        | {"torchtune": lambda inputs: lambda: peers.torchtune(inputs, 0.5)},
    ),
    "kl": Formula(
        "T^2 KL, T = 2",
        own("forward_kl", 1.0, 2.0)
        | {
            "TRL, DistillationTrainer": lambda inputs: lambda: peers.trl_kernel(inputs, 0.0, 2.0),
            "TRL, GKD": lambda inputs: lambda: peers.trl_gkd(inputs, 0.0, 2.0),
        },
    ),
    "jsd": Formula(
        "T^2 JSD(0.5), T = 2",
        own("jensen_shannon", 1.0, 2.0)
        | {
            "Liger, compiled": lambda inputs: lambda: peers.liger(inputs, 0.5, 1.0, 2.0, True),
            "TRL, DistillationTrainer": lambda inputs: lambda: peers.trl_kernel(inputs, 0.5, 2.0),
            "TRL, GKD": lambda inputs: lambda: peers.trl_gkd(inputs, 0.5, 2.0),
        },
    ),
    "stored": Formula(f"0.5 T^2 KL of a stored top-{KEPT} + 0.5 CE, T = 2", {OURS: stored}),
}
