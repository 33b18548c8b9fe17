"""Laws of a divergence as training meets it: teacher forms, temperatures, logits, gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.errors import ConfigError
from limbeck.losses.distributions import (
    DenseLogits,
    LazyLogits,
    Samples,
    TopK,
    TopKSamples,
    UnevenTopK,
)
from limbeck.losses.divergences.base import divergences, ranking
from limbeck.losses.divergences.kl import forward_kl
from limbeck.losses.terms.divergence import DivergenceTerm
from tests.laws.cases import (
    DIFFERENTIABLE,
    F_DIVERGENCES,
    FORMS,
    KINKED,
    MERGING,
    SPECS,
    TEMPERATURES,
    UNRANKED,
    label,
    lazy,
    objective_of,
    over_paths,
    over_specs,
    over_specs_and_forms,
    over_temperatures,
    random_logits,
    random_logp,
    renormalised,
    top_k,
)

close = torch.testing.assert_close
FULL = {"dense": FORMS["dense"], "lazy": lazy}
over_full_forms = pytest.mark.parametrize("form", FULL.values(), ids=FULL.keys())


@over_specs_and_forms(SPECS)
@over_temperatures
@over_paths
def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(spec, form, temperature, path):
    """Up to a constant shift. Exposes most defects of sparse losses in public code."""
    logits = random_logits(6, 12)
    teacher = form(logits, temperature)
    # Where there is a kink at equality, rounding would decide the sign: no shift for those.
    shift = 0.0 if spec["type"] in KINKED else 2.5
    loss, gradient = objective_of(logits + shift, teacher, spec, temperature, path)
    close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    if spec["type"] not in KINKED or form is FORMS["dense"] or form is lazy:
        close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


@over_specs_and_forms(SPECS)
@over_paths
def test_a_gradient_is_never_zero_elsewhere_and_sums_to_zero(spec, form, path):
    student, teacher = random_logits(6, 12), form(random_logits(6, 12), 2.0)
    loss, gradient = objective_of(student, teacher, spec, 2.0, path)
    assert loss > 0
    assert (gradient.norm(dim=-1) > 1e-8).all()
    close(gradient.sum(-1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


@over_specs_and_forms(SPECS)
def test_a_constant_added_to_all_logits_changes_nothing(spec, form):
    student, teacher = random_logits(6, 12), random_logits(6, 12)
    shift = 10 * torch.randn(6, 1, dtype=torch.float64)
    expected = objective_of(student, form(teacher, 2.0), spec, 2.0)
    got = objective_of(student - shift, form(teacher + shift, 2.0), spec, 2.0)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@over_specs_and_forms(SPECS)
def test_renaming_all_tokens_changes_nothing(spec, form):
    student, teacher = random_logits(6, 12), random_logits(6, 12)
    order = torch.randperm(12)
    loss, gradient = objective_of(student, form(teacher, 2.0), spec, 2.0)
    renamed = form(teacher[:, order], 2.0)
    renamed_loss, renamed_gradient = objective_of(student[:, order], renamed, spec, 2.0)
    close(renamed_loss, loss)
    close(renamed_gradient, gradient[:, order])


@over_specs_and_forms(SPECS, ["dense", "top_k"])
@over_paths
def test_tokens_impossible_for_both_change_nothing(spec, form, path):
    student, teacher = random_logits(5, 8), random_logits(5, 8)
    expected, expected_gradient = objective_of(student, form(teacher, 2.0), spec, 2.0, path)
    # -inf itself cannot come out of a product with a head; this is as impossible.
    pad = torch.full((5, 2), -1e6, dtype=torch.float64)
    padded = form(torch.cat([teacher, pad], -1), 2.0)
    loss, gradient = objective_of(torch.cat([student, pad], -1), padded, spec, 2.0, path)
    close(loss, expected)
    close(gradient[:, :8], expected_gradient)
    assert (gradient[:, 8:] == 0).all()


@over_specs(SPECS)
def test_minus_infinity_on_both_sides_changes_nothing(spec):
    divergence = divergences.bind(spec, at="test")
    logits = random_logits(5, 6).requires_grad_()
    teacher, pad = random_logits(5, 6), torch.full((5, 2), -torch.inf, dtype=torch.float64)
    value = divergence(*DenseLogits(teacher).compare(logits, 1.0))
    padded = DenseLogits(torch.cat([teacher, pad], -1)).compare(torch.cat([logits, pad], -1), 1.0)
    close(divergence(*padded), value)
    (gradient,) = torch.autograd.grad(divergence(*padded).sum(), logits)
    (expected,) = torch.autograd.grad(value.sum(), logits)
    close(gradient, expected)


@over_specs(F_DIVERGENCES)
@over_paths
@over_temperatures
def test_top_k_is_at_most_dense_and_grows_with_k(spec, path, temperature):
    student, teacher = random_logits(1, 10), random_logits(1, 10)
    dense, dense_gradient = objective_of(student, DenseLogits(teacher), spec, temperature, path)
    values = []
    for k in range(1, 11):
        loss, gradient = objective_of(
            student, top_k(teacher, temperature, k), spec, temperature, path
        )
        values.append(loss)
    assert all(a <= b + 1e-12 for a, b in zip(values, [*values[1:], dense], strict=True))
    assert values[0] > 0
    close(values[-2], dense)  # one token in the tail: nothing was merged
    close(values[-1], dense)
    close(gradient, dense_gradient)


@over_specs(UNRANKED)
def test_probability_moved_out_of_the_top_k_raises_the_loss(spec):
    teacher = random_logits(6, 12)
    signal = top_k(teacher, 1.0)
    astray = teacher.scatter_add(
        -1, teacher.topk(5).indices, torch.full((6, 5), -4.0, dtype=torch.float64)
    )
    loss, gradient = objective_of(astray, signal, spec)
    assert loss > 1e-3
    inside = gradient.gather(-1, teacher.topk(5).indices).sum(-1)
    assert (inside < 0).all()  # descent raises their logits again


@over_specs_and_forms(DIFFERENTIABLE)
@over_paths
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_temperature_squared_is_in_the_gradient_too(spec, form, path, temperature):
    """Autograd against central differences of the reported loss, along a random direction."""
    student, teacher = random_logits(4, 9, 1.0), random_logits(4, 9, 1.0)
    signal, direction = form(teacher, temperature), torch.randn(4, 9, dtype=torch.float64)
    _, gradient = objective_of(student, signal, spec, temperature, path)
    step = 1e-6 * direction
    up, _ = objective_of(student + step, signal, spec, temperature, path)
    down, _ = objective_of(student - step, signal, spec, temperature, path)
    slope = (up - down) / 2e-6
    # Rounding of the loss over the step leaves 1e-9 or so.
    close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@over_specs(SPECS)
def test_every_temperature_changes_the_result(spec):
    student, teacher = random_logits(4, 9), DenseLogits(random_logits(4, 9))
    losses = [objective_of(student, teacher, spec, temperature)[0] for temperature in TEMPERATURES]
    assert len({round(loss.item(), 9) for loss in losses}) == len(TEMPERATURES)


@over_specs([spec for spec in F_DIVERGENCES if spec["type"] not in KINKED])
def test_the_loss_does_not_vanish_as_temperature_grows(spec):
    student, teacher = random_logits(4, 9), DenseLogits(random_logits(4, 9))
    (low, low_gradient), (high, high_gradient) = (
        objective_of(student, teacher, spec, temperature) for temperature in (300.0, 3000.0)
    )
    close(high, low, rtol=5e-2, atol=0)
    close(high_gradient, low_gradient, rtol=5e-2, atol=1e-2)


@over_specs_and_forms(SPECS)
@over_paths
@pytest.mark.parametrize("size", [30.0, 300.0, 3000.0])
def test_extreme_logits_stay_finite(spec, form, path, size):
    student, teacher = torch.zeros(2, 6), torch.zeros(2, 6)
    student[:, 0], teacher[:, 1] = size, size
    for temperature in (1.0, 2.0):
        loss, gradient = objective_of(student, form(teacher, temperature), spec, temperature, path)
        assert torch.isfinite(loss), label(spec)
        assert loss > 0
        assert torch.isfinite(gradient).all()


@over_specs(SPECS)
@over_full_forms
@over_paths
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bfloat16_is_within_a_hundredth_of_float64(spec, form, path, temperature):
    """Softmax and sums are float32; only logits and gradients are rounded."""
    student, teacher = random_logits(64, 50).bfloat16(), random_logits(64, 50).bfloat16()
    got, gradient = objective_of(student, form(teacher, temperature), spec, temperature, path)
    exact_teacher = form(teacher.double(), temperature)
    expected, expected_gradient = objective_of(
        student.double(), exact_teacher, spec, temperature, path
    )
    assert got.dtype == torch.float32
    close(got.double(), expected, rtol=1e-2, atol=0)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < 1e-2


def test_a_top_k_teacher_at_another_temperature_is_refused_in_training_too():
    teacher = TopK.from_logits(random_logits(2, 8), 3)
    with pytest.raises(ValueError, match=r"recorded at temperature 1\.0.*compared at 2\.0"):
        objective_of(random_logits(2, 8), teacher, {"type": "forward_kl"}, 2.0)


def test_exactly_the_divergences_that_sort_are_refused_where_outcomes_are_merged():
    """A merged tail is no token: it must not count as the teacher's most probable one."""
    logp, teacher = random_logp(3, 8), random_logits(3, 8)
    assert {"adaptive_kl"} <= set(ranking.names()) < set(divergences.names())
    for name in divergences.names():
        operations = Operations()
        with operations:
            divergences.bind(name, at="test")(logp, logp.flip(-1))
        assert bool(operations.names & {"sort", "topk", "argsort"}) == (name in ranking.names())
        for form in MERGING:
            term, signal = DivergenceTerm(divergence=name), FORMS[form](teacher, 1.0)
            if name in ranking.names():
                with pytest.raises(ConfigError, match=f"supports .*forward_kl.* uses '{name}'"):
                    term(teacher, torch.zeros(3, dtype=torch.long), signal)
                assert name not in signal.names_served()
            else:
                assert torch.isfinite(term(teacher, torch.zeros(3, dtype=torch.long), signal)).all()


class Operations(TorchDispatchMode):
    """Records the operations torch runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*FORMS, "renormalised", "samples", "top_k_samples"])
def test_concatenated_rows_are_the_whole_distribution(name):
    logits = random_logits(7, 12)
    further = {
        "renormalised": lambda: renormalised(logits, 4),
        "samples": lambda: Samples.from_logits(logits, 20),
        "top_k_samples": lambda: TopKSamples.from_logits(logits, 3, 20),
    }
    whole = further[name]() if name in further else FORMS[name](logits, 1.0)
    parts = [whole.rows(slice(0, 3)), whole.rows(torch.tensor([3, 4])), whole.rows(slice(5, None))]
    again = type(whole).cat(parts).to(torch.device("cpu"))
    student = random_logits(7, 12)
    for a, b in zip(again.compare(student, 1.0), whole.compare(student, 1.0), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again.entropy(), whole.entropy())
    elsewhere = whole.to(torch.device("meta"))
    tensors = [v for v in vars(elsewhere).values() if isinstance(v, torch.Tensor)]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    if isinstance(elsewhere, LazyLogits):
        assert elsewhere.head.weight.device.type == "meta"


def test_concatenated_uneven_rows_of_different_widths_keep_their_values():
    """A filler must never take a token out of the tail."""
    sure, unsure = torch.zeros(2, 12).double(), random_logits(2, 12, 0.1)
    sure[:, 5] = 9.0
    parts = [UnevenTopK.from_logits(each, 7, 0.05) for each in (sure, unsure)]
    assert parts[0].ids.shape[1] < parts[1].ids.shape[1]
    student = random_logits(2, 12)
    for order in (parts, parts[::-1]):
        joined = UnevenTopK.cat(order)
        for index, part in enumerate(order):
            rows = joined.rows(slice(2 * index, 2 * index + 2))
            pair, expected = rows.compare(student, 1.0), part.compare(student, 1.0)
            close(forward_kl(*pair), forward_kl(*expected))
