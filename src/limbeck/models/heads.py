"""What each family does to the product of hidden states and head weight.

Read from the families' `forward` in transformers; `prove.prove_head` holds every loaded model to
it, so a family missing here is found when it is loaded, not in its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Finish = Callable[[Tensor], Tensor]
"""Product of hidden states and head weight, to logits; element by element."""


@dataclass(frozen=True)
class Plain:
    """The product itself."""

    def __call__(self, product: Tensor) -> Tensor:
        """The logits."""
        return product


@dataclass(frozen=True)
class Softcap:
    """`cap * tanh(product / cap)`: logits stay between -cap and cap (Gemma 2)."""

    cap: float

    def __call__(self, product: Tensor) -> Tensor:
        """The logits."""
        return torch.tanh(product / self.cap) * self.cap


@dataclass(frozen=True)
class Multiplied:
    """`product * factor` (Cohere)."""

    factor: float

    def __call__(self, product: Tensor) -> Tensor:
        """The logits."""
        return product * self.factor


@dataclass(frozen=True)
class Divided:
    """`product / divisor` (Granite); a division, as the family does it, for equal rounding."""

    divisor: float

    def __call__(self, product: Tensor) -> Tensor:
        """The logits."""
        return product / self.divisor


def _softcap(config: PreTrainedConfig) -> Finish:
    cap = config.final_logit_softcapping
    return Plain() if cap is None else Softcap(float(cap))


def _logit_scale(config: PreTrainedConfig) -> Finish:
    return Multiplied(float(config.logit_scale))


def _times_logits_scaling(config: PreTrainedConfig) -> Finish:
    return Multiplied(float(config.logits_scaling))


def _over_logits_scaling(config: PreTrainedConfig) -> Finish:
    return Divided(float(config.logits_scaling))


FINISHES: Mapping[str, Callable[[PreTrainedConfig], Finish]] = {
    "gemma2": _softcap,
    "gemma3_text": _softcap,
    "vaultgemma": _softcap,
    "nanochat": _softcap,
    "granite": _over_logits_scaling,
    "granite_swa": _over_logits_scaling,
    "hyperclovax": _times_logits_scaling,
    "cohere": _logit_scale,
    "cohere2": _logit_scale,
}
"""By `config.model_type`; a family that is not here takes the product as it is."""


def finish_of(config: PreTrainedConfig) -> Finish:
    """What a model's family does to the product of hidden states and head weight."""
    make = FINISHES.get(config.model_type)
    return Plain() if make is None else make(config)
