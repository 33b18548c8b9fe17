"""The head and the terms taken together must equal the head, then the terms."""

from dataclasses import dataclass

import pytest
import torch

from limbeck.losses import Head, Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.distributions import DenseLogits, LazyLogits, TeacherDistribution
from limbeck.losses.divergences import divergences
from limbeck.losses.head.closed_form import ClosedForm, closed_form
from limbeck.losses.head.fused import (
    Gradients,
    Segment,
    even_chunk,
    head_and_terms,
    head_bytes,
    head_chunk,
    multiply,
)
from limbeck.losses.head.general_form import GeneralForm
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm
from tests.laws.cases import FORMS, SPECS, UNRANKED, label, over_specs, over_specs_and_forms

close = torch.testing.assert_close
TOKENS, VOCABULARY, WIDTH = 11, 17, 6


def soft_cap(product):
    return 5 * torch.tanh(product / 5)


def student(dtype=torch.float64, bias=False):
    """Hidden states, weight and bias of a head, and targets."""
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    added = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, added, torch.randint(VOCABULARY, (TOKENS,))


def terms(spec, temperature):
    return [
        WeightedTerm("cross_entropy", 0.3, CrossEntropyTerm()),
        WeightedTerm("divergence", 0.7, DivergenceTerm(divergence=spec, temperature=temperature)),
    ]


def plain(hidden, head, targets, spec, teacher, temperature):
    """The same sums from whole logits, spelt out."""
    logits = hidden @ head.weight.t() + (0 if head.bias is None else head.bias)
    logits = logits if head.transform is None else head.transform(logits)
    pair = teacher.compare(logits, temperature)
    soft = divergences.bind(spec, at="test")(pair.student, pair.teacher).sum() * temperature**2
    hard = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([hard, soft])


def fused(form, hidden, head, targets, spec, teacher, temperature, chunk):
    weighted = terms(spec, temperature)
    view = StudentView(hidden, head, {}, targets)
    arguments = [each.term for each in weighted], [each.weight for each in weighted]
    body = form(*arguments, view, teacher, Workspace())
    return one_segment(hidden, head, body, chunk)


def one_segment(hidden, head, body, chunk):
    return head_and_terms(hidden, head, [Segment(slice(0, len(hidden)), body, chunk)])


@over_specs_and_forms(SPECS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("chunk", "transform"), [(4, None), (64, soft_cap)])
def test_general_path_equals_plain_logits(spec, form, temperature, chunk, transform):
    hidden, weight, bias, targets = student(bias=True)
    head = Head(weight, bias, transform)
    teacher = form(3 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), temperature)
    sums = plain(hidden, head, targets, spec, teacher, temperature)
    wanted = torch.tensor([0.3, 0.7], dtype=torch.float64)
    expected = torch.autograd.grad(3 * sums @ wanted, [hidden, weight, bias])
    total, got = fused(GeneralForm, hidden, head, targets, spec, teacher, temperature, chunk)
    close(got, sums.detach())
    close(total, sums.detach() @ wanted)
    for a, b in zip(torch.autograd.grad(3 * total, [hidden, weight, bias]), expected, strict=True):
        close(a, b)


@over_specs([spec for spec in SPECS if DivergenceTerm(divergence=spec).gradient is not None])
@pytest.mark.parametrize("name", ["dense", "lazy", "top_k", "top_1"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_equals_plain_logits_in_float64(spec, name, temperature, chunk, dtype):
    hidden, weight, bias, targets = student(dtype, bias=True)
    logits = 3 * torch.randn(TOKENS, VOCABULARY, dtype=dtype)
    teacher, exact_teacher = (FORMS[name](x, temperature) for x in (logits, logits.double()))
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    head = Head(exact[1], exact[2])
    sums = plain(exact[0], head, targets, spec, exact_teacher, temperature)
    wanted = torch.tensor([0.3, 0.7], dtype=torch.float64)
    expected = torch.autograd.grad(3 * sums @ wanted, exact)
    inputs = [hidden, weight, bias]
    total, got = fused(
        closed_form, hidden, Head(weight, bias), targets, spec, teacher, temperature, chunk
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    pairs = [(got, sums), *zip(torch.autograd.grad(3 * total, inputs), expected, strict=True)]
    for a, b in pairs:
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("form", [closed_form, GeneralForm])
@pytest.mark.parametrize("rows", [3, 1000])
def test_no_form_depends_on_the_size_of_its_chunks(monkeypatch, rows, form):
    hidden, weight, _, targets = student()
    teacher = FORMS["lazy"](torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), 2.0)
    arguments = hidden, Head(weight), targets, {"type": "reverse_kl"}, teacher, 2.0
    monkeypatch.setattr("limbeck.losses.head.blocks.BLOCK_BYTES", 1)
    whole, sums = fused(form, *arguments, 64)
    expected = torch.autograd.grad(whole, [hidden, weight])
    monkeypatch.setattr("limbeck.losses.head.blocks.BLOCK_BYTES", rows * VOCABULARY * 8)
    cut, cut_sums = fused(form, *arguments, 7)
    close(cut_sums, sums)
    for a, b in zip(torch.autograd.grad(cut, [hidden, weight]), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("which", [["divergence"], ["cross_entropy"], ["divergence", "both"]])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_closed_form_of_one_term_or_in_either_order(which, temperature):
    hidden, weight, _, targets = student()
    teacher = FORMS["dense"](torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), 1.0)
    weighted = terms({"type": "forward_kl"}, temperature)
    weighted = [t for t in reversed(weighted) if t.name in which or "both" in which]
    arguments = [each.term for each in weighted], [each.weight for each in weighted]
    results = []
    for form in (closed_form, GeneralForm):
        view = StudentView(hidden, Head(weight), {}, targets)
        body = form(*arguments, view, teacher, Workspace())
        total, sums = one_segment(hidden, Head(weight), body, 4)
        results.append([total, sums, *torch.autograd.grad(total, [hidden, weight])])
    for a, b in zip(*results, strict=True):
        close(a, b)


FORBIDDEN = [(spec, GeneralForm) for spec in SPECS] + [
    (spec, closed_form) for spec in SPECS if DivergenceTerm(divergence=spec).gradient is not None
]


@pytest.mark.parametrize(
    ("spec", "form", "name"),
    [
        pytest.param(spec, form, name, id=f"{name}-{label(spec)}-{form.__name__}")
        for spec, form in FORBIDDEN
        for name in ("dense", "lazy", "top_k")
        if name != "top_k" or spec in UNRANKED
    ],
)
def test_tokens_with_a_bias_of_minus_infinity_are_excluded(spec, form, name):
    hidden, weight, _, _ = student()
    targets = torch.randint(VOCABULARY - 2, (TOKENS,))
    logits = torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    logits[:, -2:] = -1e30 if name == "lazy" else -torch.inf  # a product with zeros is no number
    bias = torch.zeros(VOCABULARY, dtype=torch.float64)
    bias[-2:] = -torch.inf
    arguments = spec, FORMS[name](logits, 2.0), 2.0, 4
    total, _ = fused(form, hidden, Head(weight, bias), targets, *arguments)
    got = torch.autograd.grad(total, [hidden, weight])
    arguments = spec, FORMS[name](logits[:, :-2], 2.0), 2.0, 4
    expected, _ = fused(GeneralForm, hidden, Head(weight[:-2]), targets, *arguments)
    close(total, expected)
    for a, b in zip(got, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        close(a, b)


@dataclass(frozen=True)
class NewForm(TeacherDistribution):
    """A user's own form."""

    logits: torch.Tensor

    def compare(self, student_logits, temperature):
        return DenseLogits(self.logits).compare(student_logits, temperature)

    def entropy(self):
        return DenseLogits(self.logits).entropy()


def chosen(head, distribution, *weighted):
    hidden, _, _, targets = student()
    view = StudentView(hidden, head, {}, targets)
    ones = [1.0] * len(weighted)
    return closed_form([each.term for each in weighted], ones, view, distribution, Workspace())


def test_closed_form_is_chosen_where_there_is_one_and_only_there():
    _, weight, _, _ = student()
    dense = FORMS["dense"](torch.randn(TOKENS, VOCABULARY).double(), 1.0)
    unknown = NewForm(torch.randn(TOKENS, VOCABULARY).double())
    hard, soft = terms({"type": "forward_kl"}, 1.0)
    _, other = terms({"type": "todi"}, 1.0)
    head = Head(weight)
    assert isinstance(chosen(head, dense, soft, hard), ClosedForm)
    assert isinstance(chosen(head, dense, soft), ClosedForm)
    assert chosen(Head(weight, None, torch.tanh_), dense, soft) is None
    assert isinstance(chosen(head, None, hard), ClosedForm)
    assert chosen(Head(weight, None, soft_cap), dense, soft, hard) is None
    assert chosen(head, unknown, soft, hard) is None
    assert chosen(head, dense, other, hard) is None
    assert chosen(head, dense, soft, soft) is None
    assert chosen(head, dense) is None


@pytest.mark.parametrize("form", [closed_form, GeneralForm])
def test_a_second_backward_pass_is_refused_not_wrong(form):
    hidden, weight, _, targets = student()
    teacher = FORMS["dense"](torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), 1.0)
    total, _ = fused(form, hidden, Head(weight), targets, {"type": "forward_kl"}, teacher, 1.0, 4)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Run the objective forward again"):
        total.backward()


@pytest.mark.parametrize("form", [closed_form, GeneralForm])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "everything", "no_grad"])
def test_nothing_is_computed_for_what_is_frozen(form, frozen, monkeypatch):
    made = []

    class Watched(Gradients):
        def __init__(self, *inputs, is_training):
            super().__init__(*inputs, is_training=is_training)
            made.append(self)

    monkeypatch.setattr("limbeck.losses.head.fused.Gradients", Watched)
    hidden, weight, _, targets = student()
    teacher = FORMS["dense"](torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), 1.0)
    hidden.requires_grad_(frozen not in {"hidden", "everything"})
    weight.requires_grad_(frozen not in {"weight", "everything"})
    arguments = hidden, Head(weight), targets, {"type": "forward_kl"}, teacher, 1.0, 4
    with torch.set_grad_enabled(frozen != "no_grad"):
        total, _ = fused(form, *arguments)
    expected = plain(hidden, Head(weight), targets, {"type": "forward_kl"}, teacher, 1.0)
    close(total.detach(), (expected[0] * 0.3 + expected[1] * 0.7).detach())
    assert total.requires_grad == (frozen in {"hidden", "weight"})
    (gradients,) = made
    assert (gradients.hidden is not None) == (hidden.requires_grad and frozen != "no_grad")
    assert (gradients.weight is not None) == (weight.requires_grad and frozen != "no_grad")


def test_a_tied_head_gets_both_its_gradients():
    _, weight, _, targets = student()
    ids = torch.randint(VOCABULARY, (TOKENS,))
    teacher = FORMS["dense"](torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), 1.0)
    spec = {"type": "forward_kl"}
    sums = plain(weight[ids], Head(weight), targets, spec, teacher, 1.0)
    (expected,) = torch.autograd.grad(sums @ torch.tensor([0.3, 0.7]).double(), weight)
    total, _ = fused(closed_form, weight[ids], Head(weight), targets, spec, teacher, 1.0, 4)
    (got,) = torch.autograd.grad(total, weight)
    close(got, expected)


@pytest.mark.parametrize("form", [closed_form, GeneralForm])
@pytest.mark.parametrize(
    "types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_mixed_dtypes_compute_in_the_wider_one(form, types):
    hidden, weight, bias, targets = student(torch.float32, bias=True)
    hidden = hidden.detach().to(types[0]).requires_grad_()
    weight = weight.detach().to(types[1]).requires_grad_()
    teacher = FORMS["lazy"](torch.randn(TOKENS, VOCABULARY), 1.0)
    spec, exact = {"type": "forward_kl"}, (hidden.float(), Head(weight.float(), bias))
    expected = plain(*exact, targets, spec, teacher, 1.0)
    total, sums = fused(form, hidden, Head(weight, bias), targets, spec, teacher, 1.0, 4)
    close(sums, expected.detach())
    gradients = torch.autograd.grad(total, [hidden, weight, bias])
    assert [each.dtype for each in gradients] == [*types, torch.float32]


@pytest.mark.parametrize("form", [closed_form, GeneralForm])
def test_weight_gradients_of_bfloat16_heads_are_summed_in_float32(form):
    """64 chunks summed in bfloat16 would be wrong in the second digit."""
    hidden = torch.randn(256, WIDTH).bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).bfloat16().requires_grad_()
    targets = torch.randint(VOCABULARY, (256,))
    teacher = FORMS["dense"](torch.randn(256, VOCABULARY), 1.0)
    spec, exact = {"type": "forward_kl"}, weight.detach().double().requires_grad_()
    sums = plain(hidden.detach().double(), Head(exact), targets, spec, teacher, 1.0)
    (expected,) = torch.autograd.grad(sums @ torch.tensor([0.3, 0.7]).double(), exact)
    total, _ = fused(form, hidden, Head(weight), targets, spec, teacher, 1.0, 4)
    (got,) = torch.autograd.grad(total, weight)
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() < 5e-3 * expected.norm()


def test_chunk_follows_the_budget_between_its_bounds():
    weight = torch.empty(49_152, 0)
    assert head_chunk(256, weight, copies=2) == 682
    assert head_chunk(1, weight, copies=2) == 64
    assert head_chunk(10_000, weight, copies=2) == 1024
    assert head_chunk(256, weight, copies=16) == 85
    assert head_chunk(192, weight, copies=2, scratch_bytes=15 << 19) == 492
    assert head_chunk(1, weight, copies=2, scratch_bytes=1 << 30) == 64


def test_an_accelerator_uses_the_whole_budget_it_is_given():
    weight = torch.empty(128_256, 0, device="meta")
    assert head_chunk(8_000, weight, copies=1) == 16_351
    assert head_chunk(8_000, weight, copies=2) == 8_175
    assert head_chunk("auto", weight, copies=1) == 2048
    assert head_chunk("auto", weight, copies=2) == 1920


@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 128_256, 151_936])
def test_auto_fits_the_same_number_of_tokens_for_any_vocabulary(vocabulary):
    weight = torch.empty(vocabulary, 0)
    assert head_chunk("auto", weight, copies=2) == 480
    assert head_chunk("auto", weight, copies=8) == 120
    assert head_chunk("auto", weight.to("meta"), copies=7) == 548
    assert head_bytes("auto", vocabulary, weight.device) == 480 * 2 * 4 * vocabulary
    assert head_bytes(3, vocabulary, weight.device) == 3 << 20


@pytest.mark.parametrize("most", [1, 7, 64, 492])
def test_chunks_are_as_few_and_as_equal_as_possible(most):
    for tokens in range(1, 1200, 7):
        size = even_chunk(tokens, most)
        assert 1 <= size <= most
        assert -(-tokens // size) == -(-tokens // most)
        assert size - (tokens - 1) % size - 1 < -(-tokens // size)
    assert even_chunk(0, most) == 0


def body_of(form, head, weighted, teacher):
    hidden, _, _, targets = student()
    view = StudentView(hidden, head, {}, targets)
    arguments = [each.term for each in weighted], [each.weight for each in weighted]
    return hidden, form(*arguments, view, teacher, Workspace())


@pytest.mark.parametrize("form", [closed_form, GeneralForm])
def test_a_lazy_teachers_head_is_multiplied_once_a_chunk_into_one_buffer(form, monkeypatch):
    made = []

    def watch(rows, weight, bias, out):
        made.append((len(rows), out.data_ptr()))
        return multiply(rows, weight, bias, out)

    monkeypatch.setattr("limbeck.losses.head.blocks.multiply", watch)
    monkeypatch.setattr("limbeck.losses.head.blocks.BLOCK_BYTES", 1)
    teacher = FORMS["lazy"](torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), 1.0)
    head = Head(student()[1])
    hidden, body = body_of(form, head, terms({"type": "forward_kl"}, 1.0), teacher)
    one_segment(hidden, head, body, 4)
    assert [rows for rows, _ in made] == [4, 4, 3]
    assert len({place for _, place in made}) == 1


def test_a_teacher_no_term_reads_is_not_multiplied(monkeypatch):
    monkeypatch.setattr("limbeck.losses.head.blocks.multiply", None)
    teacher = FORMS["lazy"](torch.randn(TOKENS, VOCABULARY, dtype=torch.float64), 1.0)
    hard = WeightedTerm("cross_entropy", 1.0, CrossEntropyTerm())
    head = Head(student()[1])
    for form in (closed_form, GeneralForm):
        hidden, body = body_of(form, head, [hard], teacher)
        total, _ = one_segment(hidden, head, body, 4)
        assert total.isfinite()


@pytest.mark.parametrize("form", [closed_form, GeneralForm])
def test_a_teachers_soft_cap_and_bias_count_however_rows_are_cut(form, monkeypatch):
    hidden, weight, _, targets = student()
    inside, bias = torch.randn(TOKENS, 5).double(), torch.randn(VOCABULARY).double()
    head = Head(torch.randn(VOCABULARY, 5).double(), bias, soft_cap)
    whole = FORMS["dense"](soft_cap(inside @ head.weight.t() + bias), 2.0)
    spec, rest = {"type": "reverse_kl"}, (2.0, 64)
    expected, _ = fused(GeneralForm, hidden, Head(weight), targets, spec, whole, *rest)
    monkeypatch.setattr("limbeck.losses.head.blocks.BLOCK_BYTES", 3 * VOCABULARY * 8)
    got, _ = fused(form, hidden, Head(weight), targets, spec, LazyLogits(inside, head), 2.0, 4)
    close(got, expected)
    pairs = (torch.autograd.grad(each, [hidden, weight]) for each in (got, expected))
    for a, b in zip(*pairs, strict=True):
        close(a, b)


def test_the_default_budget_holds_what_it_says():
    """Both models' logits and the working arrays; at 49,152 tokens and any number of rows."""
    weight = torch.zeros(49_152, 1)
    for tokens, chunk in ((2048, 410), (480, 240)):
        hidden, targets = torch.zeros(tokens, 1), torch.zeros(tokens).long()
        view = StudentView(hidden, Head(weight), {}, targets)
        teacher = LazyLogits(hidden, Head(weight))
        both = terms({"type": "forward_kl"}, 2.0)
        arguments = [each.term for each in both], [0.5, 0.5], view, teacher
        for form in (closed_form, GeneralForm):
            body = form(*arguments, Workspace())
            most = head_chunk("auto", weight, body.copies, body.scratch_bytes)
            held = body.copies * most * 49_152 * 4 + body.scratch_bytes
            assert 179 < held / 2**20 <= 180
            assert even_chunk(tokens, most) == chunk
    body = closed_form(*arguments, Workspace())
    one_segment(hidden, Head(weight), body, head_chunk("auto", weight, 2, body.scratch_bytes))
    assert body.workspace._kept["work"].nbytes == body.scratch_bytes > 0


def test_micro_batches_share_buffers_and_do_not_affect_each_other():
    """Gradients of one are right however many, larger or smaller, of any dtype, came before."""
    shared = Workspace()
    for count, dtype in ((9, torch.float64), (4, torch.float64), (11, torch.float64),
                         (5, torch.float32), (11, torch.float32)):  # fmt: skip
        hidden, weight, _, targets = student()
        hidden = hidden.detach()[:count].to(dtype).requires_grad_()
        weight = weight.detach().to(dtype).requires_grad_()
        inside = torch.randn(count, 5).to(dtype)
        teacher = LazyLogits(inside, Head(torch.randn(VOCABULARY, 5).to(dtype)))
        weighted = terms({"type": "reverse_kl"}, 2.0)
        view = StudentView(hidden, Head(weight), {}, targets[:count])
        arguments = [each.term for each in weighted], [each.weight for each in weighted], view
        for form in (closed_form, GeneralForm):
            got, expected = (
                torch.autograd.grad(
                    one_segment(hidden, Head(weight), form(*arguments, teacher, room), 4)[0],
                    [hidden, weight],
                )
                for room in (shared, Workspace())
            )
            assert all(map(torch.equal, got, expected))


def test_arrays_are_taken_once_for_all_steps_and_trained_after_inference():
    hidden, weight, _, targets = student()
    objective = Objective(terms({"type": "forward_kl"}, 2.0))
    view = StudentView(hidden, Head(weight), {}, targets)
    signal = TeacherSignal.from_distribution(
        FORMS["lazy"](torch.randn(TOKENS, VOCABULARY).double(), 1.0)
    )
    places = []
    with torch.inference_mode():
        objective(view, signal, torch.tensor(TOKENS))
    for _ in range(2):
        loss, _ = objective(view, signal, torch.tensor(TOKENS))
        loss.backward()
        places.append({name: kept.data_ptr() for name, kept in objective.workspace._kept.items()})
    assert places[0] == places[1]
    assert set(places[0]) == {"student", "teacher", "work"}


def test_a_head_in_another_dtype_than_the_teachers_states_is_copied_once(monkeypatch):
    copies, take = [], Head.to

    def watch(self, dtype):
        copies.append(self.weight.dtype != dtype)
        return take(self, dtype)

    monkeypatch.setattr(Head, "to", watch)
    hidden, weight, _, targets = student(torch.float32)
    inside, head = torch.randn(TOKENS, 5).half(), torch.randn(VOCABULARY, 5).bfloat16()
    spec, teacher = {"type": "forward_kl"}, LazyLogits(inside, Head(head))
    for form in (closed_form, GeneralForm):
        copies.clear()
        _, sums = fused(form, hidden, Head(weight), targets, spec, teacher, 1.0, 2)
        assert sum(copies) == 1
        exact = LazyLogits(inside.float(), Head(head.float()))
        close(sums, fused(form, hidden, Head(weight), targets, spec, exact, 1.0, 2)[1])
