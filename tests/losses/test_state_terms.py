"""Every term on hidden states: its laws, slow references, gradients, and what it asks for."""

import copy
import itertools
import math
import re

import pytest
import torch

from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig
from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.losses import (
    Head,
    PairShapes,
    Projections,
    SignalNeeds,
    StudentView,
    TeacherSignal,
    build_objective,
)
from limbeck.losses.terms.attention_relations import AttentionRelationsTerm
from limbeck.losses.terms.cka import cka
from limbeck.losses.terms.hidden_state import HiddenStateTerm
from limbeck.losses.terms.relations import relations
from limbeck.models import Distiller
from limbeck.teachers.local import LocalTeacher
from tests.laws.test_oracles import ORACLES
from tests.models.tiny import tiny_model

close = torch.testing.assert_close
MAP = LayerMap(((0, 1), (1, 3)))
SIZES = (5, 1, 2, 7)
TOKENS = sum(SIZES)
SPECS = {
    "mse": {"type": "hidden_state"},
    "normalised_mse": {"type": "hidden_state", "loss": "normalised_mse"},
    "cosine": {"type": "hidden_state", "loss": "cosine"},
    "relations": {"type": "relations"},
    "cka": {"type": "cka"},
    "attention": {"type": "attention_relations", "heads": 2, "layer_map": "surviving"},
}
MAKERS = {
    "mse": HiddenStateTerm,
    "normalised_mse": lambda shapes: HiddenStateTerm(shapes, loss="normalised_mse"),
    "cosine": lambda shapes: HiddenStateTerm(shapes, loss="cosine"),
    "relations": relations,
    "cka": cka,
    "attention": lambda shapes: AttentionRelationsTerm(shapes, heads=2, layer_map="surviving"),
}
over_terms = pytest.mark.parametrize("name", MAKERS)


def segments() -> torch.Tensor:
    return torch.cat([torch.full((n,), i + 3) for i, n in enumerate(SIZES)])


def states(layers, width: int, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randn(TOKENS, width, generator=generator).double() for i in layers}


def projections(layer_states) -> dict[int, Projections]:
    """Queries as wide as the states, keys and values half as wide, as under grouped queries."""
    return {
        i: Projections(h, h[:, ::2].roll(1, 1), h[:, 1::2] * 0.7) for i, h in layer_states.items()
    }


def view(student, window=slice(None)) -> StudentView:
    cut = {i: h[window] for i, h in student.items()}
    hidden = cut[0]
    targets = torch.zeros(len(hidden), dtype=torch.long)
    head = Head(torch.zeros(5, hidden.shape[1]).double())
    return StudentView(
        hidden, head, cut, targets, segments=segments()[window], layer_projections=projections(cut)
    )


def said(teacher, window=slice(None)) -> TeacherSignal:
    cut = {i: h[window] for i, h in teacher.items()}
    return TeacherSignal((), cut, projections(cut))


def make(name: str, student_width: int = 8, teacher_width: int = 8):
    torch.manual_seed(1)
    return MAKERS[name](PairShapes(2, 4, student_width, teacher_width, MAP)).double()


@over_terms
def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(name):
    student = {i: h.requires_grad_() for i, h in states((0, 1), 8).items()}
    teacher = {1: student[0].detach().clone(), 3: student[1].detach().clone()}
    loss = make(name)(view(student), said(teacher))
    close(loss, torch.zeros(TOKENS).double(), atol=1e-15, rtol=0)
    for gradient in torch.autograd.grad(loss.sum(), list(student.values())):
        close(gradient, torch.zeros_like(gradient), atol=1e-14, rtol=0)


@over_terms
def test_elsewhere_it_is_positive_wherever_there_is_something_to_compare(name):
    loss = make(name, 8, 12)(view(states((0, 1), 8)), said(states((1, 3), 12, seed=7)))
    assert (loss >= 0).all()
    assert (loss[-7:] > 0).all()


@over_terms
@pytest.mark.parametrize("widths", [(4, 4), (4, 8)])
def test_its_gradient_matches_finite_differences_and_skips_the_teacher(name, widths):
    term = make(name, *widths)
    teacher = {i: h.requires_grad_() for i, h in states((1, 3), widths[1], seed=7).items()}
    student = [h.requires_grad_() for h in states((0, 1), widths[0]).values()]

    def loss(*layers):
        return term(view(dict(enumerate(layers))), said(teacher))

    assert torch.autograd.gradcheck(loss, student)
    loss(*student).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in term.parameters())
    assert all(h.grad is None for h in teacher.values())


@over_terms
def test_segments_may_be_in_any_micro_batch_but_must_be_whole(name):
    term, student, teacher = make(name, 8, 12), states((0, 1), 8), states((1, 3), 12, seed=7)
    whole = term(view(student), said(teacher))
    ends = [0, *itertools.accumulate(SIZES)]
    for cuts in (ends, [0, ends[2], TOKENS]):
        windows = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        close(torch.cat([term(view(student, w), said(teacher, w)) for w in windows]), whole)


@over_terms
def test_nothing_scored_gives_nothing_with_a_graph(name):
    term, nothing = make(name, 8, 12), slice(0, 0)
    student = {i: h.requires_grad_() for i, h in states((0, 1), 8).items()}
    loss = term(view(student, nothing), said(states((1, 3), 12), nothing))
    assert loss.shape == (0,)
    for gradient in torch.autograd.grad(loss.sum(), [*student.values(), *term.parameters()]):
        assert (gradient == 0).all()


@over_terms
def test_zero_states_and_bfloat16_stay_finite_and_float32(name):
    student = {i: torch.zeros(TOKENS, 8, requires_grad=True) for i in (0, 1)}
    teacher = {i: h.bfloat16() for i, h in states((1, 3), 8).items()}
    low = {i: h.bfloat16() for i, h in student.items()}
    loss = make(name).float()(view(low), said(teacher))
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.sum(), list(student.values())):
        assert gradient.isfinite().all()


def rotated(layers, seed: int) -> dict[int, torch.Tensor]:
    torch.manual_seed(seed)
    width = next(iter(layers.values())).shape[1]
    turn = torch.linalg.qr(torch.randn(width, width).double())[0]
    return {i: h @ turn for i, h in layers.items()}


@pytest.mark.parametrize("name", ["relations", "cka"])
def test_rotation_and_scale_of_either_model_change_nothing(name):
    term, student, teacher = make(name, 8, 12), states((0, 1), 8), states((1, 3), 12, seed=7)
    expected = term(view(student), said(teacher))
    scaled = {i: 3 * h for i, h in rotated(student, 2).items()}
    close(term(view(scaled), said(rotated(teacher, 3))), expected)


def test_cosine_ignores_each_tokens_length_and_normalised_mse_the_teachers_scale():
    student, teacher = states((0, 1), 8), states((1, 3), 8, seed=7)
    lengths = torch.rand(TOKENS, 1).double() + 0.5
    longer = {i: h * lengths for i, h in student.items()}
    cosine, relative = make("cosine"), make("normalised_mse")
    close(cosine(view(longer), said(teacher)), cosine(view(student), said(teacher)))
    both = [{i: h * lengths for i, h in each.items()} for each in (student, teacher)]
    close(
        relative(view(both[0]), said(both[1])),
        relative(view(student), said(teacher)),
    )


def slow_cka(student, teacher) -> float:
    """B'A / (A'A B'B), features centred, Frobenius norms: the formula of the paper."""
    a, b = student - student.mean(0), teacher - teacher.mean(0)
    return float((b.t() @ a).norm() ** 2 / ((a.t() @ a).norm() * (b.t() @ b).norm()))


def slow(name, student, teacher, i: int) -> float:
    """A piece's i-th token's value, one pair of numbers at a time."""
    n = len(student)
    if name == "cosine":
        return 1 - float(torch.nn.functional.cosine_similarity(student[i], teacher[i], dim=0))
    if name == "normalised_mse":
        return float(((student[i] - teacher[i]) ** 2).sum() / (teacher[i] ** 2).sum())
    if name == "cka":
        return 1 - slow_cka(student, teacher) if n > 2 else 0.0
    if name == "relations":

        def cos(h, j):
            return float(h[i] @ h[j] / (h[i].norm() * h[j].norm()))

        return sum((cos(student, j) - cos(teacher, j)) ** 2 for j in range(n)) / n
    total = 0.0
    for own, target in zip(projections({0: student})[0], projections({0: teacher})[0], strict=True):
        for a, b in zip(own.chunk(2, -1), target.chunk(2, -1), strict=True):
            q = torch.stack([a[i] @ a[j] for j in range(n)]) / math.sqrt(a.shape[1])
            p = torch.stack([b[i] @ b[j] for j in range(n)]) / math.sqrt(b.shape[1])
            total += float((p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum())
    return total / 6


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "mse"])
def test_value_is_that_of_a_slow_reference_within_each_piece(name):
    student, teacher = states((0, 1), 8), states((1, 3), 8, seed=7)
    loss, start = make(name)(view(student), said(teacher)), 0
    for size in SIZES:
        window = slice(start, start + size)
        for i in range(size):
            values = [slow(name, student[a][window], teacher[b][window], i) for a, b in MAP.pairs]
            assert float(loss[start + i]) == pytest.approx(sum(values) / 2, abs=1e-12, rel=1e-9)
        start += size


def test_the_reference_matrices_have_the_reference_values():
    teacher, student = (torch.tensor(ORACLES["hidden"][key]).double() for key in ("Ht", "Hs"))
    shapes = PairShapes(1, 1, 3, 3, LayerMap(((0, 0),)))
    one = torch.zeros(4, dtype=torch.long)
    mine, theirs = ({0: Projections(h, h, h)} for h in (student, teacher))
    head = Head(torch.zeros(5, 3).double())
    seen = StudentView(student, head, {0: student}, one, segments=one, layer_projections=mine)
    signal = TeacherSignal((), {0: teacher}, theirs)
    terms = {
        0.011611: HiddenStateTerm(shapes, loss="cosine"),
        1 - 0.994758: cka(shapes),
        0.019796: AttentionRelationsTerm(shapes, heads=1),
    }
    for value, term in terms.items():
        assert float(term(seen, signal).mean()) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("choice", "pairs"),
    [
        ("surviving", ((0, 1), (1, 3))),
        ("uniform", ((0, 0), (1, 3))),
        ("last", ((1, 3),)),
        ([[0, 2], [1, 3]], ((0, 2), (1, 3))),
    ],
)
@pytest.mark.parametrize("kind", ["hidden_state", "relations", "cka", "attention_relations"])
def test_every_term_takes_every_layer_map_and_asks_for_no_other_layers(kind, choice, pairs):
    spec = {"type": kind, "weight": 1.0, "layer_map": choice}
    if kind == "attention_relations":
        spec["heads"] = 2
    config = ObjectiveConfig(alpha=0.0, extra=(spec,))
    objective = build_objective(config, PairShapes(2, 4, 8, 8, MAP), head_budget_mb=1)
    mine, theirs = frozenset(s for s, _ in pairs), frozenset(t for _, t in pairs)
    if kind == "attention_relations":
        assert objective.needs == SignalNeeds(projections=theirs)
        assert (objective.student_layers, objective.student_projections) == (frozenset(), mine)
    else:
        assert objective.needs == SignalNeeds(layers=theirs)
        assert (objective.student_layers, objective.student_projections) == (mine, frozenset())


def test_maps_that_pair_nothing_or_layers_that_are_not_there_are_refused():
    shapes = PairShapes(5, 4, 8, 8, LayerMap(()))
    with pytest.raises(ConfigError, match=r"no layer of the student \(5 layers\).*`last`"):
        relations(shapes)
    with pytest.raises(ConfigError, match=re.escape("go up to [4, 3], the last layers, got")):
        relations(shapes, layer_map=((0, 1), (4, 4)))
    with pytest.raises(ConfigError, match="must go up in both models"):
        relations(shapes, layer_map=((1, 1), (0, 2)))


def test_relation_heads_that_do_not_divide_a_width_are_refused():
    term = AttentionRelationsTerm(PairShapes(2, 4, 8, 8, MAP), heads=8, layer_map="surviving")
    with pytest.raises(ConfigError, match=r"8 does not divide the 4 of the student's key.*as 4\."):
        term(view(states((0, 1), 8)), said(states((1, 3), 8)))


def test_projectors_are_as_wide_as_needed_and_keep_lengths():
    (first, _) = make("cosine", 8, 12).projectors.values()
    close(
        first.weight.t() @ first.weight, torch.eye(8).double(), atol=1e-6, rtol=0
    )  # made in float32
    assert not list(make("cosine", 8, 8).parameters())


def padded(batch: Batch, more: int) -> Batch:
    """The same rows with padding behind them: a piece of its own, nothing of it scored."""

    def pad(values, fill):
        return torch.nn.functional.pad(values, (0, more), value=fill)

    positions = torch.cat(
        [batch.position_ids, torch.arange(more).expand(len(batch.input_ids), more)], 1
    )
    return Batch(
        pad(batch.input_ids, 0),
        pad(batch.target_ids, 0),
        pad(batch.scored, False),
        positions,
        pad(batch.document_ids, -1),
    )


def documents() -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for length in (6, 9, 5, 4):
        tokens = torch.randint(90, (1, length + 1), generator=generator)
        scored = torch.rand(1, length, generator=generator) < 0.7
        made.append(Batch.from_tokens(tokens, scored))
    return made


def packed(parts: list[Batch]) -> Batch:
    def joined(field):
        return torch.cat([getattr(part, field) for part in parts], 1)

    return Batch(
        *map(joined, ("input_ids", "target_ids", "scored", "position_ids", "document_ids"))
    )


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", layers=2, width=32), tiny_model("qwen3", layers=4, width=48)


@over_terms
def test_packing_padding_and_cutting_a_batch_change_neither_loss_nor_gradient(name, models):
    student, teacher = copy.deepcopy(models[0]), models[1]
    extra = ({**SPECS[name], "weight": 0.7, "name": "states"},)
    config = ObjectiveConfig(alpha=0.5, extra=extra)
    torch.manual_seed(3)
    objective = build_objective(config, PairShapes(2, 4, 32, 48, MAP), head_budget_mb=1)
    distiller = Distiller(student, objective)
    online = LocalTeacher(teacher, objective.needs)
    alone = documents()
    step = torch.tensor(sum(int(b.num_scored()) for b in alone))
    ways = [alone, [packed(alone)], [packed(alone[:2]), padded(packed(alone[2:]), 3)]]
    found = []
    for way in ways:
        distiller.zero_grad()
        total = 0.0
        for batch in way:
            loss, shares = distiller(batch, online.signal(batch), step)
            loss.backward()
            total += float(shares["states"])
        found.append((total, [p.grad.clone() for p in distiller.parameters()]))
    assert found[0][0] > 0
    for total, gradients in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-5)
        for got, expected in zip(gradients, found[0][1], strict=True):
            close(got, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max() + 1))


@over_terms
def test_a_real_student_equal_to_its_teacher_has_zero_loss(name, models):
    teacher = models[0]
    shapes = PairShapes(2, 2, 32, 32, LayerMap(((0, 0), (1, 1))))
    extra = ({**SPECS[name], "weight": 1.0, "name": "states"},)
    objective = build_objective(ObjectiveConfig(alpha=0.0, extra=extra), shapes, head_budget_mb=1)
    distiller = Distiller(copy.deepcopy(teacher), objective)
    batch = packed(documents())
    online = LocalTeacher(copy.deepcopy(teacher), objective.needs)
    _, shares = distiller(batch, online.signal(batch), batch.num_scored())
    assert float(shares["states"]) == pytest.approx(0, abs=1e-7)
