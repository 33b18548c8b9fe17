"""The logit transform of each model family.

Read from the families' `forward` in transformers; `prove.prove_head` holds every loaded model to
it, so a family missing here is found when it is loaded, not in its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedConfig

from limbeck.losses import Divided, Multiplied, Softcap, Transform


def _softcap(config: PreTrainedConfig) -> Transform | None:
    cap = config.final_logit_softcapping
    return None if cap is None else Softcap(float(cap))


def _logit_scale(config: PreTrainedConfig) -> Transform:
    return Multiplied(float(config.logit_scale))


def _times_logits_scaling(config: PreTrainedConfig) -> Transform:
    return Multiplied(float(config.logits_scaling))


def _over_logits_scaling(config: PreTrainedConfig) -> Transform:
    return Divided(float(config.logits_scaling))


TRANSFORMS: Mapping[str, Callable[[PreTrainedConfig], Transform | None]] = {
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
"""By `config.model_type`; families that are not here have no transform."""


def transform_of(config: PreTrainedConfig) -> Transform | None:
    """The logit transform of a model's family; None for the product itself."""
    make = TRANSFORMS.get(config.model_type)
    return None if make is None else make(config)
