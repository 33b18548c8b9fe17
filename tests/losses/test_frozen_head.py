"""A frozen head costs a product less: its gradient is not computed to be thrown away."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.config import ObjectiveConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import Head, PairShapes, StudentView, TeacherSignal, build_objective
from limbeck.losses.distributions import LazyLogits

TOKENS, WIDTH, VOCABULARY = 96, 16, 512


class Products(TorchDispatchMode):
    """Counts matrix products, those in place included, which PyTorch's own counter leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


def soft_cap(product):
    return 5 * torch.tanh(product / 5)


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["closed form", "autograd"])
def test_a_frozen_head_costs_one_product_less_and_changes_no_other_gradient(transform):
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    teacher = LazyLogits(torch.randn(TOKENS, WIDTH), Head(torch.randn(VOCABULARY, WIDTH)))
    shapes = PairShapes(1, 1, WIDTH, WIDTH, LayerMap(((0, 0),)))
    objective = build_objective(ObjectiveConfig(alpha=0.5), shapes, head_budget_mb=256)
    costs, gradients = [], []
    for is_frozen in (False, True):
        own = weight.clone().requires_grad_(not is_frozen)
        states = hidden.clone().requires_grad_()
        head = Head(own) if transform is None else Head(own, None, transform)
        targets = torch.zeros(TOKENS, dtype=torch.long)
        with Products() as counter:
            view = StudentView(states, head, {}, targets)
            loss, _ = objective(
                view, TeacherSignal.from_distribution(teacher), torch.tensor(TOKENS)
            )
            loss.backward()
        costs.append(counter.count)
        gradients.append(states.grad)
        assert (own.grad is None) == is_frozen
    assert costs == [4, 3]  # the teacher's, the student's, hidden states' gradient; the head's
    assert torch.equal(*gradients)
