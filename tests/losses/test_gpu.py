"""What only a GPU can show about the fused head."""

import pytest
import torch

from limbeck.losses import Head, Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.distributions import LazyLogits
from limbeck.losses.head.fused import Gradients
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_heads_gradient_is_summed_in_float32_inside_the_product(dtype):
    """64 chunks; each rounded to bfloat16 first would be wrong in the third digit."""
    hidden = torch.randn(4096, 64, device="cuda").to(dtype)
    padded = torch.randn(4096, 112, device="cuda").to(dtype)[:, :101]
    total = torch.zeros(101, 64, device="cuda")
    gradients = Gradients(None, total, None)
    for start in range(0, 4096, 64):
        window = slice(start, start + 64)
        gradients.add(padded[window], hidden[window], torch.empty(0), window)
    expected = padded.double().t() @ hidden.double()
    assert (total.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("vocabulary", [1000, 1001])
def test_a_step_on_the_gpu_equals_the_one_in_float64_on_the_cpu(dtype, error, vocabulary):
    """With the odd vocabulary's padded rows, and several chunks."""
    states = [torch.randn(300, 32), torch.randn(vocabulary, 32) / 2]
    states += [torch.randn(300, 48), torch.randn(vocabulary, 48) / 3]
    states = [each.to(dtype) for each in states]
    targets, weights = torch.randint(vocabulary, (300,)), torch.rand(300)
    term = DivergenceTerm(divergence="reverse_kl", temperature=2.0)
    weighted = [
        WeightedTerm("divergence", 0.7, term),
        WeightedTerm("cross_entropy", 0.3, CrossEntropyTerm()),
    ]
    results = []
    for device, exact in (("cuda", dtype), ("cpu", torch.float64)):
        hidden, weight, inside, teacher = (each.to(device, exact) for each in states)
        hidden.requires_grad_()
        weight.requires_grad_()
        view = StudentView(hidden, Head(weight), {}, targets.to(device), weights.to(device))
        signal = TeacherSignal.from_distribution(LazyLogits(inside, Head(teacher)))
        loss, _ = Objective(weighted, 1)(view, signal, torch.tensor(300, device=device))
        gradients = torch.autograd.grad(loss, [hidden, weight])
        results.append([each.double().cpu() for each in (loss.detach(), *gradients)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() < error * expected.norm()
