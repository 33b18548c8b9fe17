"""Alpha and temperature as functions of the optimizer step."""

import copy
import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from limbeck.config import ObjectiveConfig
from limbeck.config.schedules import Schedule, largest, value_at, values_over
from limbeck.layer_map import LayerMap
from limbeck.losses import Head, PairShapes, StudentView, TeacherSignal, build_objective
from limbeck.losses.distributions import DenseLogits

READ = TypeAdapter(ObjectiveConfig)
SHAPES = PairShapes(1, 1, 1, 1, LayerMap.uniform(1, 1))
RAMP = {"type": "linear", "from": 0.2, "to": 1.0, "steps": 4}


def build(**options):
    return build_objective(READ.validate_python(options), SHAPES, head_budget_mb=1)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (RAMP, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        (
            {**RAMP, "type": "cosine"},
            [0.2, 0.6 - 0.4 * math.sqrt(0.5), 0.6, 0.6 + 0.4 * math.sqrt(0.5), 1, 1],
        ),
        ({"type": "table", "values": {0: 0.9, 3: 0.5, 5: 0.1}}, [0.9, 0.9, 0.9, 0.5, 0.5, 0.1]),
        ({"type": "linear", "values": {1: 0.0, 3: 1.0, 5: 0.5}}, [0, 0, 0.5, 1, 0.75, 0.5]),
        (0.7, [0.7] * 6),
    ],
)
def test_a_schedule_is_a_function_of_the_step(spec, expected):
    alpha = READ.validate_python({"alpha": spec}).alpha
    assert [value_at(alpha, step) for step in range(6)] == pytest.approx(expected)
    assert largest(alpha) == pytest.approx(max(expected))


@pytest.mark.parametrize("spec", [RAMP, {"type": "table", "values": {0: 0.9, 3: 0.5}}, 0.7])
def test_a_schedule_survives_saving_and_copying(spec):
    config = READ.validate_python({"alpha": spec})
    saved = READ.dump_python(config, mode="json")
    for again in (READ.validate_python(saved), copy.deepcopy(config)):
        assert [value_at(again.alpha, step) for step in range(9)] == [
            value_at(config.alpha, step) for step in range(9)
        ]


@pytest.mark.parametrize(
    "wrong",
    [
        {**RAMP, "to": 1.1},
        {**RAMP, "steps": 0},
        {**RAMP, "steps": -3},
        {**RAMP, "type": "square"},
        {**RAMP, "stepz": 3},
        {"type": "linear", "from": 0.1},
        {"type": "linear", "values": {0: 0.5}},
        {"type": "table", "values": {}},
        {"type": "table", "values": {0: float("nan")}},
        "much",
    ],
)
def test_invalid_schedules_are_refused(wrong):
    with pytest.raises(ValidationError, match="alpha"):
        READ.validate_python({"alpha": wrong})
    with pytest.raises(ValidationError, match="temperature"):
        READ.validate_python({"temperature": {**RAMP, "from": 0.0}})


def test_weights_and_temperature_are_those_of_the_step():
    objective = build(alpha=RAMP, temperature={"type": "table", "values": {0: 4.0, 2: 1.0}})
    assert objective.weights == pytest.approx({"divergence": 0.2, "cross_entropy": 0.8})
    for step, alpha, temperature in [(3, 0.8, 1.0), (1, 0.4, 4.0), (0, 0.2, 4.0), (9, 1.0, 1.0)]:
        objective.set_step(step)
        expected = {"divergence": alpha, "cross_entropy": 1 - alpha}
        assert objective.weights == pytest.approx(expected)
        assert objective.logit_terms["divergence"].temperature == temperature


@pytest.mark.parametrize("transform", [None, torch.clone])
@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_scheduled_step_equals_an_objective_with_those_numbers(transform, step):
    """Loss and gradient, on the closed form and on the general path."""
    temperature = {"type": "cosine", "from": 4.0, "to": 1.0, "steps": 5}
    alpha = {"type": "linear", "from": 0.0, "to": 0.9, "steps": 6}
    scheduled = build(alpha=alpha, temperature=temperature)
    scheduled.set_step(step)
    numbers = {
        "alpha": value_at(READ.validate_python({"alpha": alpha}).alpha, step),
        "temperature": value_at(
            READ.validate_python({"temperature": temperature}).temperature, step
        ),
    }
    weight = torch.randn(9, 4, dtype=torch.float64)
    head = Head(weight) if transform is None else Head(weight, None, transform)
    targets, teacher = torch.randint(9, (5,)), DenseLogits(torch.randn(5, 9).double())
    start, results = torch.randn(5, 4, dtype=torch.float64), []
    plain = build_objective(ObjectiveConfig(**numbers), SHAPES, head_budget_mb=1)
    for objective in (scheduled, plain):
        hidden = start.clone().requires_grad_()
        view = StudentView(hidden, head, {}, targets)
        loss, shares = objective(view, TeacherSignal.from_distribution(teacher), torch.tensor(5))
        results.append([loss, *torch.autograd.grad(loss, hidden), shares["cross_entropy"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_teacher_is_run_if_alpha_is_above_zero_in_any_step():
    late = {"type": "table", "values": {0: 0.0, 100: 0.5}}
    assert build(alpha=late).needs.distribution
    assert not build(alpha={"type": "table", "values": {0: 0.0, 100: 0.0}}).needs.distribution


def test_the_values_over_a_run_are_those_of_each_of_its_steps_once():
    table = Schedule(type="table", values={0: 1.0, 100: 2.0, 200: 1.0, 300: 4.0})
    assert values_over(table, 250) == (1.0, 2.0)
    assert values_over(table, 301) == (1.0, 2.0, 4.0)
    assert values_over(Schedule(type="linear", values={0: 1.0, 2: 2.0}), 9) == (1.0, 1.5, 2.0)
    assert values_over(0.5, 9) == (0.5,)


def test_a_schedule_cannot_be_used_as_a_number():
    alpha = READ.validate_python({"alpha": RAMP}).alpha
    assert isinstance(alpha, Schedule)
    with pytest.raises(TypeError):
        1 - alpha


def test_a_further_divergence_may_follow_a_schedule_of_its_own():
    kl = {"type": "divergence", "weight": 1.0, "name": "soft"}
    objective = build(extra=[{**kl, "temperature": {"type": "table", "values": {0: 1.0, 5: 2.0}}}])
    objective.set_step(5)
    assert objective.logit_terms["soft"].temperature == 2.0
