"""An output head: product, bias and logit transform."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses import DistillationLoss, Head

close = torch.testing.assert_close


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, product):
        return product * self.factor


def call(transform):
    hidden = torch.randn(5, 4, requires_grad=True)
    head = Head(torch.randn(9, 4), None, transform)
    return DistillationLoss(alpha=0.0)(hidden, head, torch.randint(9, (5,)))


def test_a_transform_with_trained_parameters_is_refused():
    scale = Scale()
    for transform in (scale, lambda product: product * scale.factor):
        with pytest.raises(ConfigError, match=r"would not compute.* Freeze them"):
            call(transform)


def test_a_frozen_transform_and_one_in_an_evaluation_are_allowed():
    call(Scale().requires_grad_(False)).backward()
    with torch.no_grad():
        assert call(Scale()).isfinite()


def test_a_transform_is_applied_after_the_bias():
    head = Head(torch.randn(9, 4), torch.randn(9), torch.tanh)
    hidden = torch.randn(3, 4)
    close(head(hidden), torch.tanh(hidden @ head.weight.t() + head.bias))


@pytest.mark.parametrize("types", [(torch.float16, torch.bfloat16), (torch.float32, torch.float64)])
def test_a_copy_in_another_dtype_keeps_the_transform_and_drops_no_graph(types):
    weight = torch.randn(9, 4, dtype=types[0], requires_grad=True)
    head = Head(weight, torch.randn(9, dtype=types[0]), torch.tanh).to(types[1])
    assert head.weight.dtype == head.bias.dtype == types[1]
    assert head.transform is torch.tanh
    assert head.weight.requires_grad
    assert not head.detach().weight.requires_grad
