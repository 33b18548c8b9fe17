"""A control teacher: the right distributions at the wrong rows."""

from dataclasses import replace

import pytest
import torch

from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig
from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller
from limbeck.teachers import TeacherRequest
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.shuffled import ShuffledTeacher
from limbeck.train.non_finite import narrow
from tests.models.tiny import random_batch, tiny_llama


def test_each_row_gets_the_distributions_of_the_row_before_it_in_the_step():
    teacher, whole = LocalTeacher(tiny_llama(2, 32)), random_batch(rows=3)
    control = ShuffledTeacher(teacher)
    step = [whole.part(slice(0, 2)), whole.part(slice(2, 3))]
    control.prefetch(step)
    for batch, rows in zip(step, ([2, 0], [1]), strict=True):
        before = replace(
            batch, input_ids=whole.input_ids[rows], document_ids=whole.document_ids[rows]
        )
        found, expected, right = (
            who.signal(each).distribution.logits()
            for who, each in ((control, batch), (teacher, before), (teacher, batch))
        )
        assert torch.equal(found, expected)
        assert not torch.allclose(found, right)


def test_a_row_before_it_of_another_length_is_cut_or_padded():
    teacher = LocalTeacher(tiny_llama(2, 32))
    long, short = random_batch(rows=1, length=12), random_batch(rows=1, length=7, seed=1)
    control = ShuffledTeacher(teacher)
    control.prefetch([long, short])
    at_long, at_short = (control.signal(batch).distribution for batch in (long, short))
    assert len(at_long.hidden) == int(long.scored.sum())
    cut = Batch.from_tokens(
        torch.cat([long.input_ids[:, :7], long.target_ids[:, 6:7]], 1), short.scored
    )
    torch.testing.assert_close(at_short.hidden, teacher.signal(cut).distribution.hidden)


def test_a_step_of_one_row_has_no_row_before_it():
    control = ShuffledTeacher(LocalTeacher(tiny_llama(2, 32)))
    batch = random_batch(rows=1)
    control.prefetch([batch])
    with pytest.raises(ConfigError, match="at least two rows"):
        control.signal(batch)


def test_padding_of_a_rank_with_fewer_rows_is_not_read_in_place_of_a_row():
    teacher, whole = LocalTeacher(tiny_llama(2, 32)), random_batch(rows=2)
    control, nothing = ShuffledTeacher(teacher), Batch.packed([])
    step = [whole.part(slice(0, 1)), whole.part(slice(1, 2)), nothing]
    control.prefetch(step)
    first = control.signal(step[0]).distribution.logits()
    before = replace(step[0], input_ids=whole.input_ids[1:], document_ids=whole.document_ids[1:])
    assert torch.equal(first, teacher.signal(before).distribution.logits())
    control.signal(step[1])
    assert control.signal(nothing).distribution.logits().shape[0] == 0


def test_rows_of_a_step_that_was_not_finite_are_found_one_by_one():
    whole = random_batch(rows=3)
    control = ShuffledTeacher(LocalTeacher(tiny_llama(2, 32)))
    shapes = PairShapes(2, 2, 32, 32, LayerMap.uniform(2, 2))
    objective = build_objective(ObjectiveConfig(alpha=0.5), shapes, head_budget_mb=1)
    distiller = Distiller(tiny_llama(2, 32, seed=1), objective)
    control.require(TeacherRequest(needs=objective.needs))
    step = [whole.part(slice(0, 2)), whole.part(slice(2, 3))]
    control.prefetch(step)
    for batch in step:
        control.signal(batch)
    rows, non_finite = narrow(distiller, control, step, World(0, 1, torch.device("cpu")))
    assert (len(rows), non_finite) == (3, [])
