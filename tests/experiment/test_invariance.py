"""A step's gradients do not depend on how its text was laid out in rows, batches and chunks."""

import itertools

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.distributed import World
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller
from limbeck.teachers.local import LocalTeacher
from limbeck.train import accumulate, count_step
from limbeck.train.step import SIGNALS
from tests.data.data_files import load
from tests.experiment.tiny_run import write_texts
from tests.models.tiny import tiny_llama
from tests.tokenizers.small import small

ALONE = World(0, 1, torch.device("cpu"))
OBJECTIVE = ObjectiveConfig(
    alpha=0.7, temperature=2.0, extra=({"type": "hidden_state", "weight": 0.5},)
)
LAYOUTS = list(itertools.product([True, False], [1, 2, 4, 100], [1, 8]))


def gradients(data, micro_batch, head_budget_mb):
    vocabulary = len(small())
    student, model = tiny_llama(2, 16, vocabulary, seed=1), tiny_llama(4, 24, vocabulary, seed=2)
    shapes = PairShapes(2, 4, 16, 24, LayerMap.uniform(2, 4))
    torch.manual_seed(3)
    objective = build_objective(OBJECTIVE, shapes, head_budget_mb=head_budget_mb)
    distiller, teacher = Distiller(student, objective), LocalTeacher(model, objective.needs)
    rows = list(range(data.num_rows))
    parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    batches = [data.batch(part) for part in parts]
    step_tokens, *_ = count_step(batches, [0] * len(SIGNALS), ALONE)
    told = accumulate(distiller, teacher, batches, step_tokens, ALONE)
    return told.sums, {name: p.grad for name, p in distiller.named_parameters()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    path = write_texts(folder / "texts.jsonl", 9, seed=4)
    return {pack: load(path, small(), sequence_length=48, pack=pack) for pack in (True, False)}


@pytest.fixture(scope="module")
def expected(texts):
    return gradients(texts[False], 1, 8)


def test_packing_puts_several_texts_into_a_row(texts):
    assert texts[True].num_rows < texts[False].num_rows
    assert texts[True].num_scored == texts[False].num_scored


@pytest.mark.parametrize(("pack", "micro_batch", "head_budget_mb"), LAYOUTS)
def test_the_layout_of_a_step_does_not_change_its_gradients(
    texts, expected, pack, micro_batch, head_budget_mb
):
    sums, found = gradients(texts[pack], micro_batch, head_budget_mb)
    torch.testing.assert_close(sums, expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        # Sums over tokens in another order: float32 keeps about six digits of the largest.
        bound = 2e-5 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound, msg=lambda m: m)
