"""The logit transform of each model family.

Read from the families' `forward` in transformers; `prove.prove_head` holds every loaded model to
it, so a family missing here is found when it is loaded, not in its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from limbeck.losses import Transform


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


TRANSFORMS: Mapping[str, tuple[Callable[[float], Transform], str]] = {
    "gemma2": (Softcap, "final_logit_softcapping"),
    "gemma3_text": (Softcap, "final_logit_softcapping"),
    "vaultgemma": (Softcap, "final_logit_softcapping"),
    "nanochat": (Softcap, "final_logit_softcapping"),
    "granite": (Divided, "logits_scaling"),
    "granite_swa": (Divided, "logits_scaling"),
    "hyperclovax": (Multiplied, "logits_scaling"),
    "cohere": (Multiplied, "logit_scale"),
    "cohere2": (Multiplied, "logit_scale"),
}
"""By `config.model_type`: the transform, and the setting with its number. Others have none."""


def transform_of(config: PreTrainedConfig) -> Transform | None:
    """The logit transform of a model's family; None for the product itself."""
    if config.model_type not in TRANSFORMS:
        return None
    transform, setting = TRANSFORMS[config.model_type]
    number = config.to_dict()[setting]
    return None if number is None else transform(float(number))
