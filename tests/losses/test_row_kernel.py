"""The row kernel against float64; on machines without a GPU in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from limbeck.losses import (
    Divided,
    Head,
    Multiplied,
    Objective,
    Softcap,
    StudentView,
    TeacherSignal,
    WeightedTerm,
)
from limbeck.losses.distributions import (
    DenseLogits,
    LazyLogits,
    Samples,
    TopK,
    TopKSamples,
    UnevenTopK,
)
from limbeck.losses.distributions.merged import MergedOutcomes, OutcomeMap
from limbeck.losses.divergences.base import gradients
from limbeck.losses.head.row_kernel import body
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm
from tests.laws.cases import RENORMALISED, SPECS, label, over_specs, renormalised
from tests.losses.row_cases import (
    DEVICE,
    Chunk,
    by_kernel,
    by_reference,
    floored_reference,
    kernel_body,
    require_equal,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.kernel,
    # NumPy's, of the interpreter: -inf minus -inf in masked places, exponentials of large numbers.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CLOSED = [spec for spec in SPECS if spec["type"] in gradients.names()]
NAMES = [{"type": name} for name in gradients.names()]
FORWARD = {"type": "forward_kl"}
BLOCK = 64
WEIGHTS = torch.tensor([1.0, 0.0, 0.37])
DTYPES = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative rounding of each; the interpreter truncates where a GPU rounds."""

FORMS = {
    "dense": lambda logits, t: DenseLogits(logits),
    "top_k": lambda logits, t: TopK.from_logits(logits, 9, t),
    "top_1": lambda logits, t: TopK.from_logits(logits, 1, t),
    "all_kept": lambda logits, t: TopK.from_logits(logits, logits.shape[1], t),
    "renormalised": lambda logits, t: renormalised(logits, 9, t),
    "uneven": lambda logits, t: UnevenTopK.from_logits(logits, 30, 0.01, t),
    "samples": lambda logits, t: Samples.from_logits(logits, 20, t),
    "independent": lambda logits, t: Samples.from_logits(logits, 20, t, systematic=False),
    "top_k_samples": lambda logits, t: TopKSamples.from_logits(logits, 5, 9, t),
}


@pytest.fixture(autouse=True)
def _small_blocks_on_this_device(monkeypatch):
    """Two whole blocks and a rest in a row of 150 logits."""
    monkeypatch.setattr(body, "DEVICES", frozenset({DEVICE.type}))
    launch = body.launcher()
    assert launch is not None
    monkeypatch.setattr(launch, "BLOCK", BLOCK)


def logits_of(vocabulary=150, rows=3, dtype=torch.float32):
    """The student's and the teacher's, related; exact in `dtype`."""
    student = 2 * torch.randn(rows, vocabulary)
    teacher = student + torch.randn(rows, vocabulary)
    return student.to(dtype).double(), teacher.to(dtype).double()


def chunk_of(form="dense", spec=FORWARD, temperature=1.0, dtype=torch.float32, **options):
    student, teacher = logits_of(dtype=dtype)
    options.setdefault("weights", WEIGHTS)
    return Chunk(student, FORMS[form](teacher, temperature), spec, temperature, **options)


def test_every_closed_form_divergence_has_a_kernel():
    launch = body.launcher()
    assert launch is not None
    assert sorted(launch.ROW_DIVERGENCES) == gradients.names()
    assert all(len(gradients.options(name)) <= 2 for name in gradients.names())


@pytest.mark.parametrize(
    ("spec", "temperature"),
    [
        pytest.param(spec, temperature, id=f"{label(spec)}-{temperature}")
        for spec in CLOSED
        for temperature in ([0.7, 1.0, 2.0] if spec in NAMES else [1.0])
    ],
)
def test_whole_logits(spec, temperature):
    chunk = chunk_of("dense", spec, temperature)
    require_equal(by_kernel(chunk), by_reference(chunk))


@pytest.mark.parametrize(
    ("spec", "form", "temperature"),
    [
        pytest.param(spec, form, temperature, id=f"{label(spec)}-{form}-{temperature}")
        for number, spec in enumerate(NAMES)
        for shift, form in enumerate(("top_k", "top_1", "uneven", "all_kept"))
        for temperature in [(0.7, 1.0, 2.0)[(number + shift) % 3]]
    ],
)
def test_kept_tokens_and_the_tail(spec, form, temperature):
    chunk = chunk_of(form, spec, temperature)
    require_equal(by_kernel(chunk), by_reference(chunk))


@over_specs([spec for spec in CLOSED if spec["type"] in RENORMALISED])
def test_kept_tokens_without_a_tail(spec):
    chunk = chunk_of("renormalised", spec, 2.0)
    require_equal(by_kernel(chunk), by_reference(chunk))


@pytest.mark.parametrize("form", ["samples", "independent", "top_k_samples"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_sampled_tokens(form, temperature):
    chunk = chunk_of(form, FORWARD, temperature)
    require_equal(by_kernel(chunk), by_reference(chunk))


@pytest.mark.parametrize("form", ["dense", "top_k", "samples"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(form, dtype):
    chunk = chunk_of(form, FORWARD, 2.0, dtype)
    got = by_kernel(chunk, dtype)
    assert got[1].dtype == dtype
    require_equal(got, by_reference(chunk), DTYPES[dtype])


@pytest.mark.parametrize("transform", [Softcap(4.0), Multiplied(0.3), Divided(1.7)], ids=repr)
@pytest.mark.parametrize(("form", "spec"), [("dense", "reverse_kl"), ("top_k", "jensen_shannon")])
def test_logit_transforms(transform, form, spec):
    chunk = chunk_of(form, {"type": spec}, 2.0, transform=transform)
    require_equal(by_kernel(chunk), by_reference(chunk))


@pytest.mark.parametrize(
    "transform", [Softcap(4.0), Divided(1.7), torch.sinh], ids=["softcap", "divided", "sinh"]
)
def test_a_lazy_teachers_transform(transform):
    """Known ones are part of the kernel, others are applied before it."""
    student, _ = logits_of()
    hidden, head = torch.randn(3, 4), Head(torch.randn(150, 4) / 2, None, transform)
    chunk = Chunk(student, LazyLogits(hidden, head), {"type": "skew_forward_kl"}, 2.0)
    exact = LazyLogits(hidden.double(), Head(head.weight.double(), None, transform))
    require_equal(by_kernel(chunk), by_reference(replace(chunk, teacher=exact)))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("form", ["dense", "uneven"])
def test_a_divergence_alone(form, temperature):
    chunk = chunk_of(form, {"type": "lk_kl"}, temperature, has_hard=False)
    require_equal(by_kernel(chunk), by_reference(chunk))


@pytest.mark.parametrize("has_soft", [True, False])
def test_a_cross_entropy_alone(has_soft):
    """With a divergence that has nothing to compare with, or without one."""
    student, _ = logits_of()
    chunk = Chunk(student, None, FORWARD, 2.0, WEIGHTS, Softcap(9.0), has_soft=has_soft)
    require_equal(by_kernel(chunk), by_reference(chunk))


def test_without_any_term_the_sums_and_gradient_are_zero():
    chunk = replace(chunk_of(), teacher=None, has_hard=False)
    sums, gradient = by_kernel(chunk)
    assert sums.tolist() == [0]
    assert not gradient.any()


@pytest.mark.parametrize("form", ["dense", "top_k"])
def test_values_without_a_gradient(form):
    chunk = chunk_of(form, {"type": "lk"}, 2.0)
    sums, _ = by_kernel(chunk, wants_gradient=False)
    torch.testing.assert_close(sums.double(), by_reference(chunk)[0], rtol=3e-6, atol=3e-6)


def test_no_rows():
    chunk = chunk_of()
    empty = replace(chunk, products=chunk.products[:0], teacher=chunk.teacher.rows(slice(0, 0)))
    sums, gradient = by_kernel(replace(empty, weights=None))
    assert sums.tolist() == [0, 0]
    assert gradient.shape == (0, 150)


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 65, 128])
def test_any_vocabulary(vocabulary):
    student, teacher = logits_of(vocabulary)
    for each, t in ((DenseLogits(teacher), 2.0), (TopK.from_logits(teacher, 1), 1.0)):
        chunk = Chunk(student, each, {"type": "reverse_kl"}, t)
        require_equal(by_kernel(chunk), by_reference(chunk))


@pytest.mark.parametrize("form", ["dense", "top_k"])
def test_a_large_odd_vocabulary(form, monkeypatch):
    monkeypatch.setattr(body.launcher(), "BLOCK", 1 << 14)
    student, teacher = logits_of(151_665, rows=1, dtype=torch.bfloat16)
    chunk = Chunk(student, FORMS[form](teacher, 2.0), FORWARD, 2.0)
    require_equal(by_kernel(chunk, torch.bfloat16), by_reference(chunk), 2**-7)


@pytest.mark.parametrize("form", ["dense", "top_k"])
def test_the_padding_of_a_row_becomes_zero_and_nothing_beyond_it_changes(form):
    chunk = chunk_of(form)
    rows = kernel_body(chunk)
    whole = torch.full((3, 176), 7.0, device=DEVICE)
    whole[:, :150] = chunk.products
    _, gradient = rows(whole[:, :150], slice(0, 3), True)
    assert not whole[:, 150:160].any()
    assert (whole[:, 160:] == 7).all()
    require_equal((by_kernel(chunk)[0], gradient.cpu()), by_reference(chunk))


def test_a_row_beyond_two_to_the_31_elements():
    """The place of a row passes what 32 bits hold; memory in between is not touched."""
    pitch, length = 2**30 + 16, 96
    student, teacher = logits_of(length)
    chunk = Chunk(student, DenseLogits(teacher), FORWARD)
    far = torch.empty(2 * pitch + length, dtype=torch.bfloat16, device=DEVICE)
    far = far.as_strided((3, length), (pitch, 1)).copy_(chunk.products)
    sums, gradient = kernel_body(chunk, torch.bfloat16)(far, slice(0, 3), True)
    near_sums, near = by_kernel(chunk, torch.bfloat16)
    assert torch.equal(gradient.cpu(), near)
    assert torch.equal(sums.cpu(), near_sums)


@over_specs(NAMES)
def test_extreme_logits(spec):
    """Large ones, impossible tokens and log-probabilities below the floor, in whole blocks too."""
    student, teacher = logits_of(140, rows=5)
    student[0, 5:40] = teacher[1, 5:40] = -torch.inf
    student[2, :BLOCK] = teacher[2, BLOCK : BLOCK + 9] = -torch.inf
    student[3, 9], student[3, 11], teacher[3, 12], teacher[3, 3:9] = 1e4, -1e4, 1e4, -1e4
    student[4] = teacher[4]
    chunk = Chunk(student, DenseLogits(teacher), spec, 0.7, has_hard=False)
    # At 1e4 the logs of `lk`'s minima have four digits behind the point in float32.
    size = 2e-3 if spec["type"] == "lk" else 2e-5
    require_equal(by_kernel(chunk), floored_reference(chunk), size=size)


@pytest.mark.parametrize("form", ["dense", "top_k", "samples"])
def test_a_row_of_weight_zero_is_not_read(form):
    chunk = chunk_of(form)
    expected = by_kernel(chunk)
    student = chunk.products.clone()
    student[1] = torch.nan
    sums, gradient = by_kernel(replace(chunk, products=student))
    assert torch.equal(sums, expected[0])
    assert torch.equal(gradient, expected[1])
    assert not gradient[1].any()


@over_specs(NAMES)
@pytest.mark.parametrize("form", ["dense", "top_k"])
def test_a_nan_logit_gives_a_nan_loss(spec, form):
    student, teacher = logits_of(rows=1)
    student[0, 100] = torch.nan
    sums, _ = by_kernel(Chunk(student, FORMS[form](teacher, 1.0), spec, has_hard=False))
    assert sums.isnan().all()


def whole_step(spec, temperature, transform):
    """Loss and gradients through the objective, with a head and chunks of two rows."""
    torch.manual_seed(3)
    hidden = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    weight = torch.randn(83, 6, device=DEVICE, requires_grad=True)
    inside, teacher_weight = torch.randn(5, 4, device=DEVICE), torch.randn(83, 4, device=DEVICE)
    view = StudentView(
        hidden,
        Head(weight, None, transform),
        {},
        torch.randint(83, (5,), device=DEVICE),
        torch.rand(5, device=DEVICE),
    )
    term = DivergenceTerm(divergence=spec, temperature=temperature)
    weighted = [
        WeightedTerm("divergence", 0.7, term),
        WeightedTerm("cross_entropy", 0.3, CrossEntropyTerm()),
    ]
    teacher = LazyLogits(inside, Head(teacher_weight, None, transform))
    loss, shares = Objective(weighted)(
        view, TeacherSignal.from_distribution(teacher), torch.tensor(5, device=DEVICE)
    )
    return loss, *shares.values(), *torch.autograd.grad(loss, [hidden, weight])


@pytest.mark.parametrize("transform", [None, Softcap(5.0)], ids=repr)
def test_a_whole_step_equals_the_one_without_the_kernel(transform, monkeypatch):
    monkeypatch.setattr("limbeck.losses.objective.head_chunk", lambda *_: 2)
    arguments = {"type": "reverse_kl"}, 2.0, transform
    got = whole_step(*arguments)
    used = []
    monkeypatch.setattr(body, "DEVICES", frozenset())
    monkeypatch.setattr(body, "launcher", lambda: used.append(True))
    for a, b in zip(got, whole_step(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert not used


def test_it_is_used_where_it_can_be_and_only_there(monkeypatch):
    dense = chunk_of()
    assert isinstance(kernel_body(dense), body.RowKernel)
    assert kernel_body(dense, torch.float64) is None
    assert kernel_body(replace(dense, transform=torch.tanh)) is None
    assert kernel_body(replace(dense, spec={"type": "todi"})) is None
    assert kernel_body(replace(dense, has_hard=False, has_soft=False)) is None
    outcomes = OutcomeMap(torch.arange(150), torch.arange(150), 150)
    assert kernel_body(replace(dense, teacher=MergedOutcomes(dense.teacher, outcomes))) is None
    monkeypatch.setattr(body, "launcher", lambda: None)
    assert kernel_body(dense) is None
    monkeypatch.undo()
    assert frozenset({"cuda"}) == body.DEVICES
    if DEVICE.type == "cpu":
        assert kernel_body(dense) is None


def test_a_row_is_read_beyond_its_end_only_where_that_is_its_own_padding():
    readable = body.launcher().readable
    rows = torch.empty(4, 64)
    assert readable(rows[:, :50]) == 64
    assert readable(rows[:, 16:50]) == 48
    assert readable(rows[:, 8:58]) == 50  # 8 + 64 columns would reach into the next row
    assert readable(rows[:, 1:50]) == 49
    assert readable(torch.empty(4, 50)) == 50
    assert readable(torch.empty(1, 50)) == 50
