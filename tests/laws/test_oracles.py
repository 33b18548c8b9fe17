"""Reference values computed in float64 with the standard library alone."""

import json
from pathlib import Path

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import Head, PairShapes, StudentView, TeacherSignal, build_objective
from limbeck.losses.distributions import DenseLogits
from limbeck.losses.divergences import divergences
from limbeck.losses.divergences.adaptive_kl import head_share
from limbeck.losses.divergences.alpha_beta import alpha_beta
from tests.laws.cases import objective_of, over_paths

ORACLES = json.loads((Path(__file__).parent / "oracles.json").read_text())
NAMES = {
    "FKL": {"type": "forward_kl"},
    "RKL": {"type": "reverse_kl"},
    "JSD(0.1)": {"type": "jensen_shannon", "beta": 0.1},
    "JSD(0.5)": {"type": "jensen_shannon"},
    "JSD(0.9)": {"type": "jensen_shannon", "beta": 0.9},
    "SFKL(0.1)": {"type": "skew_forward_kl"},
    "SRKL(0.1)": {"type": "skew_reverse_kl"},
    "SFKL(0.5)": {"type": "skew_forward_kl", "skew": 0.5},
    "TVD": {"type": "total_variation"},
    "-log accept": {"type": "lk"},
    "AKL(0.5)": {"type": "adaptive_kl"},
    "ToDi": {"type": "todi"},
    "AB(0.5,0.5)": {"type": "alpha_beta"},
    "AB(0.2,0.7)": {"type": "alpha_beta", "alpha": 0.2, "beta": 0.7},
}
SHAPES = PairShapes(1, 1, 1, 1, LayerMap.uniform(1, 1))
over_columns = pytest.mark.parametrize("column", list(ORACLES["table"]))


def read(column: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Teacher logits, student logits, target and temperature of a column of the table."""
    case, temperature = column.split("|T=")
    numbers = ORACLES["cases"][case]
    logits = (torch.tensor([numbers[key]], dtype=torch.float64) for key in ("t", "s"))
    return *logits, torch.tensor([numbers["y"]]), float(temperature)


@over_columns
@pytest.mark.parametrize("name", list(NAMES))
def test_divergence_has_the_value_of_the_table(column, name):
    teacher, student, _, temperature = read(column)
    pair = DenseLogits(teacher).compare(student, temperature)
    value = divergences.bind(NAMES[name], at="test")(pair.student, pair.teacher)
    assert value.item() == pytest.approx(ORACLES["table"][column][name], abs=1e-12, rel=1e-9)


@over_columns
@over_paths
@pytest.mark.parametrize("name", ["FKL", "RKL"])
def test_training_multiplies_by_the_square_of_the_temperature(column, name, path):
    teacher, student, _, temperature = read(column)
    loss, _ = objective_of(student, DenseLogits(teacher), NAMES[name], temperature, path)
    expected = ORACLES["table"][column][f"T2*{name}"]
    assert loss.item() == pytest.approx(expected, abs=1e-12, rel=1e-9)


def mix(column: str, alpha: float) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Loss, shares and logit gradient of the objective a recipe with this alpha asks for."""
    teacher, student, target, temperature = read(column)
    config = ObjectiveConfig(alpha=alpha, temperature=temperature)
    objective = build_objective(config, SHAPES, head_budget_mb=1)
    hidden = student.clone().requires_grad_()
    view = StudentView(hidden, Head(torch.eye(student.shape[1]).double()), {}, target)
    loss, shares = objective(
        view, TeacherSignal.from_distribution(DenseLogits(teacher)), torch.tensor(1)
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), shares, gradient


@over_columns
@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
def test_a_recipe_mixes_soft_and_hard_as_the_table_says(column, alpha):
    loss, shares, _ = mix(column, alpha)
    row = ORACLES["table"][column]
    assert loss.item() == pytest.approx(row[f"MIX({alpha})"], abs=1e-12, rel=1e-9)
    assert shares["divergence"].item() == pytest.approx(row["T2*FKL"], abs=1e-12, rel=1e-9)
    assert shares["cross_entropy"].item() == pytest.approx(row["CE_hard"], rel=1e-9)


@pytest.mark.parametrize("case", ["A", "B"])
def test_at_temperature_one_the_mix_is_cross_entropy_against_a_mixed_target(case):
    teacher, student, target, _ = read(f"{case}|T=1")
    _, _, gradient = mix(f"{case}|T=1", 0.7)
    one_hot = torch.nn.functional.one_hot(target, student.shape[1])
    mixed = 0.7 * teacher.softmax(-1) + 0.3 * one_hot
    torch.testing.assert_close(gradient, student.softmax(-1) - mixed)


@over_columns
@over_paths
def test_kl_gradients_are_the_published_ones(column, path):
    teacher, student, _, temperature = read(column)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    row, dense = ORACLES["table"][column], DenseLogits(teacher)
    _, forward = objective_of(student, dense, NAMES["FKL"], temperature, path)
    torch.testing.assert_close(forward, temperature * (q - p))
    _, reverse = objective_of(student, dense, NAMES["RKL"], temperature, path)
    torch.testing.assert_close(reverse, temperature * q * ((q / p).log() - row["RKL"]))


@pytest.mark.parametrize("case", ["A", "B"])
@over_paths
@pytest.mark.parametrize(
    ("spec", "factor"),
    [(NAMES["FKL"], 1), (NAMES["RKL"], 1), ({"type": "jensen_shannon", "beta": 0.3}, 0.21)],
)
def test_high_temperature_limit_is_half_the_variance_of_the_logits_gap(case, spec, factor, path):
    teacher, student, _, _ = read(f"{case}|T=1")
    loss, gradient = objective_of(student, DenseLogits(teacher), spec, 3000.0, path)
    # The next order of the expansion is the gap over 3000.
    limit = factor * ORACLES["t2_limit"][case]
    assert loss.item() == pytest.approx(limit, rel=3e-3)
    gap = student - teacher
    expected = factor * (gap - gap.mean()) / gap.shape[1]
    torch.testing.assert_close(gradient, expected, rtol=3e-3, atol=1e-5)


def test_conventions_where_public_code_differs():
    teacher, student, _, _ = read("B|T=1")
    pair = DenseLogits(teacher).compare(student, 1.0)
    known = ORACLES["limits"]
    share = head_share(pair.student, pair.teacher, 0.5).item()
    assert share == pytest.approx(known["AKL(0.5) weight of forward KL"], rel=1e-9)
    for (alpha, beta), name in {(0.0, 0.5): "AB(0,0.5)", (0.5, 0.0): "AB(0.5,0)"}.items():
        value = alpha_beta(pair.student, pair.teacher, alpha=alpha, beta=beta)
        assert value.item() == pytest.approx(known[name], rel=1e-9)


def test_beta_weights_the_teacher():
    teacher, student, _, _ = read("B|T=1")
    row = ORACLES["table"]["B|T=1"]
    loss, _ = objective_of(student, DenseLogits(teacher), NAMES["JSD(0.1)"])
    assert loss.item() == pytest.approx(row["JSD(0.1)"], rel=1e-9)
    assert abs(loss.item() - row["JSD(0.9)"]) > 1e-3
