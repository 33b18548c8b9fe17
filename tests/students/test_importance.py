import dataclasses

import pytest
import torch

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.prune import importance
from limbeck.prune.calibration import Calibration, calibrate
from limbeck.prune.importance import (
    block_influence,
    cheapest_span,
    greedy,
    loss_without,
    states_kept,
    update_sizes,
    without,
)
from limbeck.students import Origin, initialisers
from limbeck.students.base import reads_teacher
from limbeck.students.depth import choose_layers, ways_problem
from tests.models.tiny import (
    FAMILIES,
    random_batch,
    tensors_hash,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)
from tests.train.toy import ALONE

CPU = torch.device("cpu")
OUT = ("o_proj", "down_proj", "dense", "c_proj", "fc2", "dense_4h_to_h")
"""Projections that end a block's branches."""


def calibration(teacher, rows=2) -> Calibration:
    batches = tuple(random_batch(rows=1, length=12, seed=i) for i in range(rows))
    with torch.no_grad():
        return Calibration(teacher, batches, tuple(teacher(b)[0] for b in batches))


def silence(model, layers) -> None:
    """Make blocks pass on what they are given, by zero weights."""
    with torch.no_grad():
        for layer in layers:
            for name, module in model.blocks[layer].named_modules():
                if name.rpartition(".")[2] in OUT:
                    module.weight.zero_()
                    if getattr(module, "bias", None) is not None:
                        module.bias.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_without_effect_has_zero_cost_and_is_removed_first(family):
    teacher = tiny_model(family, layers=4)
    silence(teacher, [2])
    text = calibration(teacher)
    influence, loss = block_influence(text), loss_without(text, [(i,) for i in range(4)])
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert loss[2] == pytest.approx(0, abs=1e-9)
    assert min(influence[i] for i in (0, 1, 3)) > 1e-4
    assert min(loss[i] for i in (0, 1, 3)) > 1e-4
    for by in ("block_influence", "loss", "span"):
        kept, _ = choose_layers(text, 3, by)
        assert kept == (0, 1, 3)
    cut = initialisers.bind({"type": "depth", "layers": [0, 1, 3]}, "student")
    student = cut(Origin(teacher, tiny_tokenizer(), ALONE)).model
    ids = random_batch().input_ids
    assert torch.equal(student.logits(ids), teacher.logits(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_without_a_block_is_that_of_the_model_cut_there(family):
    teacher = tiny_model(family, layers=4)
    text = calibration(teacher)
    groups = [(0,), (1, 2), (3,)]
    found = loss_without(text, groups, removed=())
    for group, kl in zip(groups, found, strict=True):
        make = initialisers.bind({"type": "depth", "drop": group}, "student")
        cost = text.cost(make(Origin(teacher, tiny_tokenizer(), ALONE)).model)
        assert kl == pytest.approx(cost.forward_kl, rel=1e-4, abs=1e-7)
    assert loss_without(text, [(3,)], removed=[1]) == pytest.approx(
        loss_without(text, [(1, 3)]), rel=1e-6
    )


def test_influence_is_one_minus_the_cosine_by_hand():
    teacher = tiny_llama(3, 32)
    text = calibration(teacher)
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in text.batches:
        seen = []
        handles = [
            block.register_forward_hook(
                lambda _m, args, out, seen=seen: seen.append((args[0], out))
            )
            for block in teacher.blocks
        ]
        with torch.no_grad():
            teacher(batch)
        for handle in handles:
            handle.remove()
        for i, (before, after) in enumerate(seen):
            x, y = before[batch.scored].double(), after[batch.scored].double()
            sums[i] += (1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).sum()
        count += int(batch.scored.sum())
    assert block_influence(text) == pytest.approx((sums / count).tolist(), rel=1e-9)


def test_greedy_removal_equals_a_slow_search():
    teacher = tiny_llama(5, 32)
    text = calibration(teacher)
    kept, removals = greedy(text, 2)
    left, gone = set(range(5)), []
    while len(left) > 2:
        costs = {i: loss_without(text, [(i, *gone)])[0] for i in left}
        best = min(costs, key=costs.get)
        left.remove(best)
        gone.append(best)
    assert kept == tuple(sorted(left))
    assert [r["layer"] for r in removals] == gone


def test_update_sizes_are_what_each_remaining_block_adds_relative_to_its_input():
    teacher, gone = tiny_llama(4, 32), [1]
    text = calibration(teacher)
    found = update_sizes(text, gone)
    batch, sizes = text.batches[0], {}  # a quarter of two rows is one
    with torch.no_grad(), without(teacher, gone), states_kept(teacher) as states:
        teacher(batch)
    for layer, (before, after) in states.items():
        x, y = before[batch.scored].double(), after[batch.scored].double()
        sizes[layer] = float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean())
    assert found == pytest.approx({i: sizes[i] for i in (0, 2, 3)})


def test_only_layers_that_add_little_are_measured_and_the_cheapest_of_them_goes(monkeypatch):
    monkeypatch.setattr(importance, "SHORTEST_LIST", 2)
    teacher = tiny_llama(6, 32)
    text = calibration(teacher)
    (kept, [removal]), sizes = greedy(text, 5), update_sizes(text)
    shortlist = sorted(sizes, key=sizes.get)[:2]
    costs = {i: loss_without(text, [(i,)])[0] for i in shortlist}
    assert removal["layer"] == min(costs, key=costs.get)
    assert removal["forward_kl"] == pytest.approx(min(costs.values()), abs=1e-5)
    assert kept == tuple(sorted({*range(6)} - {removal["layer"]}))


def test_the_cheapest_span_is_consecutive_and_removing_none_costs_nothing():
    teacher = tiny_llama(5, 32)
    text = calibration(teacher)
    kept, kl = cheapest_span(text, 3)
    gone = sorted(set(range(5)) - set(kept))
    assert gone[1] == gone[0] + 1
    every = [loss_without(text, [(i, i + 1)])[0] for i in range(4)]
    assert kl == pytest.approx(min(every))
    assert cheapest_span(text, 5) == ((0, 1, 2, 3, 4), 0.0)


def test_measuring_leaves_the_teacher_as_it_was():
    teacher = tiny_llama(3, 32)
    text, before = calibration(teacher), tensors_hash(teacher)
    ids = random_batch().input_ids
    logits = teacher.logits(ids)
    greedy(text, 1)
    block_influence(text)
    with without(teacher, [1]):
        assert not torch.equal(teacher.logits(ids), logits)
    assert tensors_hash(teacher) == before
    assert torch.equal(teacher.logits(ids), logits)


def test_cost_of_the_teacher_itself_is_no_divergence():
    teacher = tiny_llama(2, 32)
    cost = calibration(teacher).cost(teacher)
    assert cost.forward_kl == pytest.approx(0, abs=1e-12)
    assert cost.cross_entropy > 1


class Text:
    """As much of `TextData` as calibration reads."""

    num_rows, facts = 6, {"path": "some.jsonl"}

    def row_length(self, row):
        return 12

    def batch(self, rows):
        return random_batch(rows=1, length=12, seed=rows[0])


@pytest.mark.parametrize("by", ["block_influence", "loss", "span"])
def test_a_recipe_may_ask_for_the_choice(by):
    teacher = tiny_llama(4, 32)
    silence(teacher, [1])
    origin = dataclasses.replace(Origin(teacher, tiny_tokenizer(), ALONE), text=Text)
    spec = {"type": "depth", "fraction": 0.75, "by": by, "calibration_tokens": 30}
    student = initialisers.bind(spec, "student")(origin)
    assert student.facts["layers_kept"] == [0, 2, 3]
    assert student.facts["chosen"]["by"] == by
    assert student.layer_map.pairs == ((0, 0), (1, 2), (2, 3))


def test_a_choice_by_measurement_needs_text():
    make = initialisers.bind({"type": "depth", "keep": 1, "by": "loss"}, "student")
    with pytest.raises(ConfigError, match="measured on text, and there is none"):
        make(Origin(tiny_llama(2, 32), tiny_tokenizer(), ALONE))


def test_layers_are_chosen_by_block_influence_unless_the_recipe_says_otherwise():
    teacher = tiny_llama(4, 32)
    silence(teacher, [1])
    origin = dataclasses.replace(Origin(teacher, tiny_tokenizer(), ALONE), text=Text)
    student = initialisers.bind({"type": "depth", "keep": 3}, "student")(origin)
    assert student.facts["layers_kept"] == [0, 2, 3]
    assert student.facts["chosen"]["by"] == "block_influence"


@pytest.mark.parametrize(
    ("student", "reads"),
    [
        ({"keep": 3}, True),
        ({"params": "1K"}, True),
        ({"keep": 3, "by": "even"}, False),
        ({"layers": [0, 1]}, False),
        ({"drop": [0]}, False),
    ],
)
def test_only_a_choice_by_measurement_reads_the_teacher_weights(student, reads):
    assert reads_teacher({"type": "depth", **student}) is reads


def test_layers_named_and_chosen_at_once_are_refused():
    assert "layers names them already, got by: loss" in ways_problem(layers=(1,), by="loss")
    assert ways_problem(keep=3, by="loss") is None
    assert ways_problem(drop=(1,), by=None) is None


class Rows:
    """A text of rows of some lengths."""

    facts = {"path": "made"}  # noqa: RUF012

    def __init__(self, *lengths):
        self.lengths = lengths
        self.num_rows = len(lengths)

    def row_length(self, row):
        return self.lengths[row]

    def batch(self, rows):
        return Batch.from_tokens(torch.arange(self.lengths[rows[0]])[None] + rows[0])


def test_held_out_rows_follow_the_calibration_rows_however_long_they_are():
    teacher = tiny_llama(2, 32)
    text = Rows(20, 20, 20, 20)
    first = calibrate(teacher, text, 8)
    second = calibrate(teacher, text, 8, held_out=True)
    assert [int(c.batches[0].input_ids[0, 0]) for c in (first, second)] == [0, 1]
    third = calibrate(teacher, text, 30, held_out=True)
    assert [int(batch.input_ids[0, 0]) for batch in third.batches] == [2, 3]
    with pytest.raises(ConfigError, match=r"at least 122 tokens, one half .* has 80 in 4 rows"):
        calibrate(teacher, text, 61, held_out=True)
