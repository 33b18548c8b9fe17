"""The logit transform of each model family.

Read from the families' `forward` in transformers; `prove.prove_head` holds every loaded model to
it, so a family missing here is found when it is loaded, not in its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedConfig

from limbeck.losses import Divided, Multiplied, Softcap, Transform

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
