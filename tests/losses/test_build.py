"""What a recipe says becomes terms and weights, or a list of its mistakes."""

import re

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, SignalNeeds, build_objective, objective_problems, terms
from limbeck.losses.divergences.jensen_shannon import jensen_shannon

MAP = LayerMap(((0, 1), (1, 3)))
SHAPES = PairShapes(2, 4, 8, 12, MAP)


def build(**options):
    return build_objective(ObjectiveConfig(**options), SHAPES, head_budget_mb=256)


def texts(**options) -> list[str]:
    return [str(problem) for problem in objective_problems(ObjectiveConfig(**options))]


def test_alpha_is_the_weight_of_the_soft_term():
    objective = build(alpha=0.9, temperature=2.0)
    assert objective.weights == pytest.approx({"divergence": 0.9, "cross_entropy": 0.1})
    assert objective.logit_terms["divergence"].temperature == 2.0
    assert objective.needs == SignalNeeds(distribution=True)


def test_without_a_divergence_the_teacher_is_not_run():
    objective = build(alpha=0.0)
    assert objective.weights == {"cross_entropy": 1.0}
    assert objective.needs == SignalNeeds()
    assert objective.student_layers == frozenset()


def test_without_weight_cross_entropy_is_still_reported():
    assert build(alpha=1.0).weights == {"divergence": 1.0, "cross_entropy": 0.0}


def test_extra_terms_are_named_and_weighed_absolutely():
    extra = (
        {"type": "hidden_state", "weight": 0.05},
        {"type": "hidden_state", "weight": 0.1, "name": "spread", "layer_map": "uniform"},
        {"type": "divergence", "weight": 2, "name": "tv", "divergence": "total_variation"},
    )
    objective = build(alpha=0.5, extra=extra)
    assert objective.weights == {
        "divergence": 0.5,
        "cross_entropy": 0.5,
        "hidden_state": 0.05,
        "spread": 0.1,
        "tv": 2.0,
    }
    assert objective.needs == SignalNeeds(True, frozenset({0, 1, 3}))
    assert objective.student_layers == frozenset({0, 1})
    assert objective.state_terms["hidden_state"].layer_map == MAP
    assert objective.state_terms["spread"].layer_map == LayerMap.uniform(2, 4)


def test_options_of_a_divergence_arrive():
    objective = build(divergence={"type": "jensen_shannon", "beta": 0.1})
    logp = torch.randn(3, 5).log_softmax(-1)
    other = torch.randn(3, 5).log_softmax(-1)
    term = objective.logit_terms["divergence"]
    torch.testing.assert_close(term.divergence(logp, other), jensen_shannon(logp, other, beta=0.1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"divergence": "foward_kl"}, r"objective\.divergence\.type: .*'forward_kl'"),
        (
            {"divergence": {"type": "jensen_shannon", "beta": 1.0}},
            r"objective\.divergence\.beta: .*less than 1, got 1\.0",
        ),
        ({"extra": ({"weight": 1},)}, r"objective\.extra\[0\]\.type: which objective term"),
        (
            {"extra": ({"type": "hidden_state"},)},
            r"objective\.extra\[0\]\.weight: is missing",
        ),
        (
            {"extra": ({"type": "hidden_state", "weight": -1},)},
            r"objective\.extra\[0\]\.weight: must be a number, at least 0, got -1",
        ),
        (
            {"extra": ({"type": "hidden_state", "weight": float("nan")},)},
            r"objective\.extra\[0\]\.weight: must be a number, at least 0, got nan",
        ),
        (
            {"extra": ({"type": "hiden_state", "weight": 1},)},
            r"objective\.extra\[0\]\.type: .*did you mean 'hidden_state'",
        ),
        (
            {"extra": ({"type": "hidden_state", "weight": 1, "layermap": "uniform"},)},
            r"objective\.extra\[0\]\.layermap: .*did you mean 'layer_map'",
        ),
        (
            {"extra": ({"type": "divergence", "weight": 1},)},
            r"objective\.extra\[0\]\.name: another term is already logged as 'divergence'",
        ),
        (
            {"extra": ({"type": "hidden_state", "weight": 1},) * 2},
            r"objective\.extra\[1\]\.name: another term",
        ),
        (
            {"extra": ({"type": "hidden_state", "weight": 1, "name": "a b.c"},)},
            r"objective\.extra\[0\]\.name: must be a word",
        ),
        (
            {"extra": ({"type": "divergence", "weight": 1, "name": "tv", "divergence": "totl"},)},
            r"objective\.extra\[0\]\.divergence\.type: no divergence is called 'totl'",
        ),
    ],
)
def test_errors_name_the_option_the_value_and_the_remedy(options, expected):
    found = texts(**options)
    assert any(re.search(expected, text) for text in found), found
    with pytest.raises(ConfigError):
        build(**options)


def test_all_mistakes_are_listed_at_once():
    extra = ({"type": "hidden_state"}, {"type": "nothing", "weight": "much"})
    assert len(texts(divergence="none", extra=extra)) == 4


def test_a_right_objective_has_no_problems():
    assert texts(extra=({"type": "hidden_state", "weight": 0.1, "layer_map": "uniform"},)) == []


@pytest.mark.parametrize("name", terms.names())
def test_every_term_is_built_from_shapes_and_options_alone(name):
    needed = {"taid": {"steps": 10}, "attention_relations": {"heads": 2}}
    term = terms.bind({"type": name, **needed.get(name, {})}, at="test")(SHAPES)
    assert isinstance(term.needs, SignalNeeds)
    assert terms.explain(name).summary
