"""Laws of terms that need the target token, the logits themselves, or a memory."""

import math

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses import Head, Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.distributions import DenseLogits, Samples
from limbeck.losses.divergences.kl import forward_kl
from limbeck.losses.terms.concrete_score import ConcreteScoreTerm
from limbeck.losses.terms.decoupled import DecoupledTerm, split
from limbeck.losses.terms.taid import TaidTerm
from tests.laws.cases import FORMS, objective_of, over_temperatures, random_logits, random_logp
from tests.laws.test_oracles import ORACLES, over_columns, read

close = torch.testing.assert_close
MAKERS = {
    "decoupled": lambda temperature: DecoupledTerm(temperature=temperature),
    "target": lambda temperature: DecoupledTerm(rest_weight=0.0, temperature=temperature),
    "rest": lambda temperature: DecoupledTerm(target_weight=0.0, temperature=temperature),
    "concrete_score": lambda temperature: ConcreteScoreTerm(),
    "taid": lambda temperature: TaidTerm(steps=10, temperature=temperature),
}
over_makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
over_full_forms = pytest.mark.parametrize("form", [FORMS["dense"], FORMS["lazy"]])


def taken(logits, distribution, term, targets=None):
    """Mean of the term over rows, and its gradient, as training computes them."""
    hidden = logits.detach().clone().requires_grad_()
    head = Head(torch.eye(logits.shape[-1], dtype=logits.dtype))
    targets = torch.arange(len(logits)) % logits.shape[-1] if targets is None else targets
    objective = Objective([WeightedTerm("term", 1.0, term)])
    view = StudentView(hidden, head, {}, targets)
    loss, _ = objective(
        view, TeacherSignal.from_distribution(distribution), torch.tensor(len(logits))
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


@over_makers
@over_full_forms
@over_temperatures
def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(make, form, temperature):
    logits = random_logits(6, 12)
    loss, gradient = taken(logits + 2.5, form(logits, temperature), make(temperature))
    close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@over_makers
@over_full_forms
@over_temperatures
def test_elsewhere_the_loss_is_positive_and_its_gradient_sums_to_zero(make, form, temperature):
    student, teacher = random_logits(6, 12), random_logits(6, 12)
    loss, gradient = taken(student, form(teacher, temperature), make(temperature))
    assert loss > 0
    assert (gradient.norm(dim=-1) > 1e-8).all()
    close(gradient.sum(-1), torch.zeros(6).double(), atol=1e-12, rtol=0)


@over_makers
def test_a_constant_added_to_all_logits_changes_nothing(make):
    student, teacher = random_logits(6, 12), random_logits(6, 12)
    shift = 10 * torch.randn(6, 1, dtype=torch.float64)
    expected = taken(student, DenseLogits(teacher), make(2.0))
    got = taken(student - shift, DenseLogits(teacher + shift), make(2.0))
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@over_makers
def test_renaming_all_tokens_changes_nothing(make):
    student, teacher, order = random_logits(6, 12), random_logits(6, 12), torch.randperm(12)
    targets = torch.arange(6)
    loss, gradient = taken(student, DenseLogits(teacher), make(2.0), targets)
    new_targets = order.argsort()[targets]
    renamed = taken(student[:, order], DenseLogits(teacher[:, order]), make(2.0), new_targets)
    close(renamed[0], loss)
    close(renamed[1], gradient[:, order])


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "taid"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_the_derivative_of_the_reported_loss(name, temperature):
    student, teacher = random_logits(4, 9, 1.0), DenseLogits(random_logits(4, 9, 1.0))
    direction, term = torch.randn(4, 9, dtype=torch.float64), MAKERS[name](temperature)
    _, gradient = taken(student, teacher, term)
    up, _ = taken(student + 1e-6 * direction, teacher, term)
    down, _ = taken(student - 1e-6 * direction, teacher, term)
    close((gradient * direction).sum(), (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@over_makers
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_extreme_logits_stay_finite(make, size):
    student, teacher = torch.zeros(2, 6), torch.zeros(2, 6)
    student[:, 0], teacher[:, 1] = size, size
    for targets in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        loss, gradient = taken(student, DenseLogits(teacher), make(1.0), targets)
        assert torch.isfinite(loss)
        assert loss >= 0
        assert torch.isfinite(gradient).all()


@over_makers
def test_bfloat16_is_within_a_hundredth_of_float64(make):
    student, teacher = random_logits(64, 50).bfloat16(), random_logits(64, 50).bfloat16()
    loss, gradient = taken(student, DenseLogits(teacher), make(2.0))
    expected, slope = taken(student.double(), DenseLogits(teacher.double()), make(2.0))
    close(loss.double(), expected, rtol=1e-2, atol=0)
    assert (gradient.double() - slope).norm() < 1e-2 * slope.norm()


@over_makers
def test_values_are_float32_where_logits_are_not(make):
    logits, teacher = random_logits(4, 9).bfloat16(), random_logits(4, 9).bfloat16()
    values = make(2.0)(logits, torch.zeros(4, dtype=torch.long), DenseLogits(teacher))
    assert values.dtype == torch.float32


@pytest.mark.parametrize("name", ["decoupled", "concrete_score"])
@pytest.mark.parametrize("form", [FORMS["top_k"], FORMS["uneven"]])
def test_forms_without_all_logits_are_refused_by_name(name, form):
    teacher = form(random_logits(3, 6), 1.0)
    found = f"{name!r} reads the teacher's whole logits.*{type(teacher).__name__}"
    with pytest.raises(ConfigError, match=found):
        taken(random_logits(3, 6), teacher, MAKERS[name](1.0))


@over_columns
def test_decoupled_parts_have_the_values_of_the_table(column):
    teacher, student, target, temperature = read(column)
    row, dense = ORACLES["table"][column], DenseLogits(teacher)
    for name, weight in (("TCKD", (1.0, 0.0)), ("NCKD", (0.0, 1.0))):
        term = DecoupledTerm(
            target_weight=weight[0], rest_weight=weight[1], temperature=temperature
        )
        loss, _ = taken(student, dense, term, target)
        expected = temperature**2 * row[name]
        assert loss.item() == pytest.approx(expected, abs=1e-12, rel=1e-9)


def test_forward_kl_is_the_target_part_plus_one_minus_p_times_the_rest():
    student, teacher, targets = random_logp(32, 9), random_logp(32, 9), torch.arange(32) % 9
    (hit, rest), (teacher_hit, teacher_rest) = split(student, targets), split(teacher, targets)
    doubt = 1 - teacher.gather(-1, targets[:, None])[:, 0].exp()
    parts = forward_kl(hit, teacher_hit) + doubt * forward_kl(rest, teacher_rest)
    close(parts, forward_kl(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_decoupled_gradients_are_the_published_ones(temperature):
    student, teacher, targets = random_logits(5, 7), random_logits(5, 7), torch.arange(5)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    place = torch.nn.functional.one_hot(targets, 7).bool()
    q_y, p_y = q[place][:, None], p[place][:, None]
    dense = DenseLogits(teacher)
    _, hit = taken(student, dense, MAKERS["target"](temperature), targets)
    expected = torch.where(place, q_y - p_y, -(q_y - p_y) * q / (1 - q_y))
    close(hit, temperature * expected / 5)
    _, rest = taken(student, dense, MAKERS["rest"](temperature), targets)
    expected = torch.where(place, 0, q / (1 - q_y) - p / (1 - p_y))
    close(rest, temperature * expected / 5)


def test_concrete_score_is_half_the_mean_squared_gap_over_all_pairs():
    student, teacher = random_logits(4, 6), random_logits(4, 6)
    loss, gradient = taken(student, DenseLogits(teacher), ConcreteScoreTerm())
    gap = student - teacher
    pairs = [(gap[:, i] - gap[:, j]) ** 2 / 2 for i in range(6) for j in range(6) if i != j]
    close(loss, torch.stack(pairs).mean())
    close(gradient, 2 * (gap - gap.mean(-1, keepdim=True)) / 5 / 4)


def test_concrete_score_is_what_kl_tends_to_at_high_temperature():
    student, teacher = random_logits(4, 6, 1.0), DenseLogits(random_logits(4, 6, 1.0))
    _, gradient = taken(student, teacher, ConcreteScoreTerm())
    _, limit = objective_of(student, teacher, {"type": "forward_kl"}, 3000.0)
    close(gradient, limit * 2 * 6 / 5, rtol=1e-2, atol=1e-4)


def test_concrete_score_ignores_tokens_the_teacher_excludes():
    student, teacher = random_logits(4, 6), random_logits(4, 6)
    expected, slope = taken(student, DenseLogits(teacher), ConcreteScoreTerm())
    never = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    padded = torch.cat([teacher, never], -1)
    wide = torch.cat([student, torch.full((4, 2), -9.0).double()], -1)
    loss, gradient = taken(wide, DenseLogits(padded), ConcreteScoreTerm())
    close(loss, expected)
    close(gradient[:, :6], slope)
    assert (gradient[:, 6:] == 0).all()


@over_columns
def test_taid_has_the_value_of_the_table(column):
    teacher, student, _, temperature = read(column)
    term = TaidTerm(steps=10, start=0.4, temperature=temperature)
    loss, gradient = taken(student, DenseLogits(teacher), term)
    expected = temperature**2 * ORACLES["table"][column]["TAID(t=0.4)"]
    # t is kept in float32.
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    target = ((0.6 * student + 0.4 * teacher) / temperature).softmax(-1)
    close(
        gradient, temperature * ((student / temperature).softmax(-1) - target), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", list(FORMS))
def test_taid_is_zero_at_t_0_and_forward_kl_at_t_1(name):
    student, teacher = random_logits(6, 12), FORMS[name](random_logits(6, 12), 2.0)
    nothing = taken(student, teacher, TaidTerm(steps=5, start=0.0, end=0.0, temperature=2.0))
    for each in nothing:
        close(each, torch.zeros_like(each), atol=1e-12, rtol=0)
    expected = objective_of(student, teacher, {"type": "forward_kl"}, 2.0)
    whole = taken(student, teacher, TaidTerm(steps=5, start=1.0, temperature=2.0))
    for a, b in zip(whole, expected, strict=True):
        close(a, b)


def test_taid_with_rate_0_follows_the_linear_schedule():
    term = TaidTerm(steps=4, start=0.2, end=0.6, rate=0.0)
    seen = []
    for step in (0, 1, 2, 4, 9):
        term.set_step(step)
        seen.append(float(term.share()))
        term.update(1.0 / (step + 1))
    assert seen == pytest.approx([0.2, 0.3, 0.4, 0.6, 0.6])


def test_taid_moves_as_the_published_rule_says():
    term = TaidTerm(steps=50, start=0.4, rate=0.05, momentum=0.9)
    t, momentum, previous, losses = 0.4, 0.0, None, [2.0, 1.5, 1.4, 1.45, 0.9, 0.9, 0.2]
    for step, loss in enumerate(losses):
        term.set_step(step)
        line = 0.4 + 0.6 * step / 50
        t = min(1.0, max(line, t))
        assert float(term.share()) == pytest.approx(t, rel=1e-6)
        if previous is not None:
            momentum = 0.9 * momentum + 0.1 * (previous - loss) / previous
            t = t + 0.05 / (1 + math.exp(-momentum)) * (1 - t)
        previous = loss
        term.update(loss)
    assert t > line + 0.02


def test_taids_t_never_decreases_and_never_exceeds_its_end():
    """They fall first, so that t is ahead of its line when they rise."""
    term, seen = TaidTerm(steps=30, start=0.4, end=0.9, rate=0.2, momentum=0.5), []
    losses = [10.0**-step for step in range(3)]
    losses += [float(torch.rand(()) * 10.0 ** int(torch.randint(-6, 6, ()))) for _ in range(37)]
    for step, loss in enumerate(losses):
        term.set_step(step)
        seen.append(float(term.share()))
        term.update(loss)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.9)


def test_taid_refuses_teachers_that_cannot_be_interpolated():
    with pytest.raises(ConfigError, match=r"Samples supports .*'taid'"):
        taken(random_logits(3, 6), Samples.from_logits(random_logits(3, 6), 2), TaidTerm(steps=3))


def test_taid_with_an_end_below_its_start_is_refused():
    with pytest.raises(ConfigError, match=r"start 0\.9 and end 0\.5"):
        TaidTerm(steps=3, start=0.9, end=0.5)


def test_the_state_of_a_term_is_saved_and_restored_with_the_objective():
    first, second = (
        Objective([WeightedTerm("taid", 1.0, TaidTerm(steps=100, rate=0.1))]) for _ in range(2)
    )
    for step in range(5):
        first.set_step(step)
        first.update({"taid": 1.0 / (step + 1)})
    state = first.state_dict()
    assert set(state) == {f"memories.taid.{name}" for name in ("t", "momentum", "previous")}
    assert not list(first.parameters())
    second.load_state_dict(state)
    for each in (first, second):
        each.set_step(5)
    shares = [each.logit_terms["taid"].share() for each in (first, second)]
    assert shares[0] > 0.45
    assert torch.equal(*shares)
    for each in (first, second):
        each.update({"taid": 0.1})
    assert torch.equal(*(each.logit_terms["taid"].share() for each in (first, second)))
