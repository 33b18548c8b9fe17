import torch

from limbeck.losses import Divided, Multiplied, Softcap
from limbeck.models.heads import transform_of
from tests.models.tiny import tiny_config


def test_each_family_gets_what_its_configuration_says():
    assert transform_of(tiny_config("llama")) is None
    assert transform_of(tiny_config("gemma2")) == Softcap(3.0)
    assert transform_of(tiny_config("gemma2", final_logit_softcapping=None)) is None
    assert transform_of(tiny_config("granite")) == Divided(4.0)
    assert transform_of(tiny_config("cohere")) == Multiplied(0.25)


def test_softcapped_logits_keep_their_order_within_the_cap():
    product = torch.linspace(-9, 9, 19)
    capped = Softcap(3.0)(product)
    assert capped.abs().max() < 3
    assert (capped.diff() > 0).all()
