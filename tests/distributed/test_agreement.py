"""All ranks train the student of rank 0."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.experiment.parts import agreed
from limbeck.layer_map import LayerMap
from limbeck.students import InitialStudent
from tests.distributed.processes import on_ranks
from tests.models.tiny import tiny_llama


def student(layers, seed, pairs):
    torch.manual_seed(seed)
    return InitialStudent(tiny_llama(layers, 32, seed=seed), None, LayerMap(pairs), {})


def measure_differently(world):
    pairs = ((0, 0), (1, 1 + world.rank))
    ours, first = student(2, world.rank, pairs), student(2, 0, ((0, 0), (1, 1)))
    ours = agreed(ours, world)
    assert ours.layer_map == first.layer_map
    for name, value in first.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value)


def make_other_shapes(world):
    with pytest.raises(ConfigError, match="every rank must make the same student"):
        agreed(student(2 + world.rank, 0, ()), world)


def test_ranks_that_measured_differently_train_the_student_of_rank_0():
    on_ranks(2, measure_differently)


def test_ranks_with_students_of_other_shapes_are_refused():
    on_ranks(2, make_other_shapes)
