"""Matching hidden states: its value, its projectors, and what it asks of teacher and student."""

import json
from pathlib import Path

import pytest
import torch

from limbeck.layer_map import LayerMap
from limbeck.losses import Head, PairShapes, StudentView, TeacherSignal
from limbeck.losses.terms.hidden_state import HiddenStateTerm

ORACLES = json.loads((Path(__file__).parents[1] / "laws" / "oracles.json").read_text())
MAP = LayerMap(((0, 1), (1, 3)))


def view(states: dict) -> StudentView:
    hidden = next(iter(states.values()))
    targets = torch.zeros(len(hidden), dtype=torch.long)
    return StudentView(hidden, Head(torch.zeros(5, hidden.shape[1])), states, targets)


def test_the_value_equals_a_slow_reference():
    teacher, student = (torch.tensor(ORACLES["hidden"][key]).double() for key in ("Ht", "Hs"))
    term = HiddenStateTerm(PairShapes(1, 1, 3, 3, LayerMap(((0, 0),))))
    loss = term(view({0: student}), TeacherSignal(layer_hidden={0: teacher}))
    assert loss.mean().item() == pytest.approx(ORACLES["hidden"]["mse"], rel=1e-6)


def test_equal_widths_need_no_projector_and_unequal_ones_get_one_a_layer():
    assert not list(HiddenStateTerm(PairShapes(2, 4, 8, 8, MAP)).parameters())
    shapes = [p.shape for p in HiddenStateTerm(PairShapes(2, 4, 8, 12, MAP)).parameters()]
    assert shapes == [(12, 8), (12, 8)]


def test_is_zero_where_projected_states_are_the_teachers_and_averages_over_pairs():
    term = HiddenStateTerm(PairShapes(2, 4, 8, 12, MAP))
    states = {0: torch.randn(6, 8), 1: torch.randn(6, 8)}
    projected = {
        teacher: term.projectors[str(student)](states[student]).detach()
        for student, teacher in MAP.pairs
    }
    zero = term(view(states), TeacherSignal(layer_hidden=projected))
    torch.testing.assert_close(zero, torch.zeros(6))
    projected[3] = projected[3] + 2.0
    off = term(view(states), TeacherSignal(layer_hidden=projected))
    torch.testing.assert_close(off, torch.full((6,), 2.0))  # 2 squared, one pair of two


def test_gradient_reaches_states_and_projectors_but_not_the_teacher():
    term = HiddenStateTerm(PairShapes(2, 4, 8, 12, MAP)).double()
    states = {i: torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for i in (0, 1)}
    teacher = {i: torch.randn(3, 12, dtype=torch.float64, requires_grad=True) for i in (1, 3)}

    def loss(first, second):
        signal = TeacherSignal(layer_hidden=teacher)
        return term(view({0: first, 1: second}), signal)

    assert torch.autograd.gradcheck(loss, tuple(states.values()))
    loss(*states.values()).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in term.parameters())
    assert all(each.grad is None for each in teacher.values())


def test_bfloat16_states_are_compared_in_float32():
    term = HiddenStateTerm(PairShapes(1, 1, 8, 12, LayerMap(((0, 0),))))
    states = {0: torch.randn(3, 8).bfloat16()}
    loss = term(view(states), TeacherSignal(layer_hidden={0: torch.randn(3, 12).bfloat16()}))
    assert loss.dtype == torch.float32
