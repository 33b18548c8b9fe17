"""One process casts its weights itself; FSDP2 on a mesh of one is the reference."""

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.distributed import cast_weights, gathered, shard, unsharded, whole
from limbeck.models import checkpoint_activations
from limbeck.train import accumulate
from tests.distributed.processes import on_ranks
from tests.train.toy import ALONE, EVERYTHING, ToyBatches, toy_pair

ROWS = [[0, 1], [2]]
PLAIN = ObjectiveConfig(alpha=1.0)


def step(here, objective, tied, checkpointing):
    """Loss and gradients of a step in bfloat16, and the distiller."""
    distiller, teacher = toy_pair(objective, tied)
    checkpoint_activations(distiller.student, checkpointing)
    shard(distiller, distiller.student.blocks, here, compute_dtype=torch.bfloat16)
    batches = [ToyBatches().batch(rows) for rows in ROWS]
    tokens = sum(batch.num_scored() for batch in batches)
    accumulated = accumulate(distiller, teacher, batches, tokens, here)
    gradients = {name: whole(p.grad) for name, p in distiller.named_parameters()}
    return accumulated.sums, gradients, distiller


def require_equal(here, objective, tied, checkpointing, allowed):
    sums, gradients, sharded = step(here, objective, tied, checkpointing)
    own_sums, own, distiller = step(ALONE, objective, tied, checkpointing)
    assert sharded.student.computed_in == distiller.student.computed_in == torch.bfloat16
    assert own_sums.tolist() == sums.tolist()
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        assert gradient.dtype == torch.float32, name
        difference = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert float(difference) <= allowed, name


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    ("objective", "allowed"),
    [(PLAIN, 0), (EVERYTHING, 0.03)],  # gradients of hidden states are added in another order
    ids=["kl", "everything"],
)
def test_gradients_are_those_of_fsdp2_on_one_rank(objective, allowed, checkpointing):
    for tied in (False, True):
        on_ranks(1, require_equal, objective, tied, checkpointing, allowed)


def dtypes(module):
    return {weight.dtype for weight in module.parameters()}


@pytest.fixture
def distiller():
    made, _ = toy_pair(PLAIN, tied=True)
    shard(made, made.student.blocks, ALONE, compute_dtype=torch.bfloat16)
    return made


def test_weights_are_their_own_again_after_the_context_and_after_an_error(distiller):
    before = dict(distiller.named_parameters(remove_duplicate=False))
    with cast_weights(distiller):
        assert dtypes(distiller) == {torch.bfloat16}
        assert distiller.student.is_tied
        with gathered(distiller), unsharded(distiller), cast_weights(distiller):
            assert dtypes(distiller) == {torch.bfloat16}
        assert dtypes(distiller) == {torch.bfloat16}
    with pytest.raises(KeyError), cast_weights(distiller):
        raise KeyError
    after = dict(distiller.named_parameters(remove_duplicate=False))
    assert all(after[name] is weight for name, weight in before.items())
    assert distiller.student.is_tied


@pytest.mark.parametrize("context", [gathered, unsharded])
def test_an_evaluation_computes_as_training_does(context, distiller):
    batch = ToyBatches().batch([0])
    with torch.no_grad(), context(distiller):
        hidden, _ = distiller.student(batch)
    assert hidden.dtype == torch.bfloat16
    with torch.no_grad():
        assert distiller.student(batch)[0].dtype == torch.float32


def test_a_student_in_float32_is_left_alone():
    made, _ = toy_pair(PLAIN)
    shard(made, made.student.blocks, ALONE, compute_dtype=torch.float32)
    with cast_weights(made):
        assert dtypes(made) == {torch.float32}
