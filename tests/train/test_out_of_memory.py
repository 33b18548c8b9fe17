"""Memory that runs out in the middle of a step: a smaller micro-batch takes the same step."""

import json

import pytest
import torch

from limbeck.config import MemoryConfig
from limbeck.distributed import abandon_pass, shard, whole, world
from limbeck.distributed.stopping import SIGNALS
from limbeck.errors import RunError
from limbeck.train import accumulate, count_step, train
from limbeck.train.micro_batch import out_of_memory
from tests.train.toy import ToyBatches, fingerprint, toy_pair, toy_setup

CPU = torch.device("cpu")
STEPS = {"optim": {"steps": 6}, "checkpoint": {"every": 6}}


def break_once(pair, where):
    """Raise the first time that several rows come to a place in the student or the teacher."""
    distiller, teacher = pair
    failures = []

    def fail(_gradient=None):
        failures.append(where)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def hook(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if failures or len(hidden) == 1:
            return
        if where.startswith("backward"):
            hidden.register_hook(fail)
        else:
            fail()

    block = distiller.student.blocks[0]
    places = {
        "backward of the first block": block,
        "backward half-way through a block": block.post_attention_layernorm,
        "forward": distiller.student.blocks[1].mlp,
        "forward of the teacher": teacher.model.blocks[2].mlp,
    }
    places[where].register_forward_hook(hook)
    return failures


def finished(folder, shard_option, micro_batch, where=None):
    """Hash of the weights and optimizer state a run ends with, and its notes."""
    folder.mkdir()
    pair = toy_pair()
    with world(CPU, shard_option) as here:
        failures = [] if where is None else break_once(pair, where)
        shard(pair[0], pair[0].student.blocks, here)
        pair[1].shard(here)
        memory = MemoryConfig(micro_batch=micro_batch)
        setup = toy_setup(folder, pair=pair, memory=memory, world=here, **STEPS)
        train(setup)
    assert len(failures) == (0 if where is None else 1)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    notes = [r["text"] for r in map(json.loads, lines) if r["kind"] == "note"]
    return fingerprint(folder), notes


WHERE = [
    "backward of the first block",
    "backward half-way through a block",
    "forward",
    "forward of the teacher",
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("shard_option", ["auto", "always"])
def test_a_retried_step_ends_in_the_weights_of_a_run_that_never_failed(
    shard_option, where, tmp_path
):
    expected, _ = finished(tmp_path / "expected", shard_option, 1)
    retried, notes = finished(tmp_path / "retried", shard_option, "auto", where)
    assert retried == expected
    assert notes == ["out of memory: micro-batches have 1 rows from here on"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_of_an_abandoned_step_are_gone_though_none_was_reduced(dtype):
    """Those of its first micro-batch wait, whole, for the last one."""
    batches = [ToyBatches().batch([row]) for row in range(3)]
    with world(CPU, "always") as here:
        distiller, teacher = toy_pair()
        shard(distiller, distiller.student.blocks, here, compute_dtype=dtype)
        teacher.shard(here)
        tokens, *_ = count_step(batches, [0] * len(SIGNALS), here)

        def gradients():
            accumulate(distiller, teacher, batches, tokens, here)
            return {name: whole(p.grad) for name, p in distiller.named_parameters()}

        expected = gradients()
        distiller.zero_grad()
        passes = []

        def fail(_gradient):
            raise torch.OutOfMemoryError("CUDA out of memory")

        def hook(_module, _args, output):
            passes.append(1)
            if len(passes) == 2:
                (output[0] if isinstance(output, tuple) else output).register_hook(fail)

        handle = distiller.student.blocks[0].register_forward_hook(hook)
        with pytest.raises(torch.OutOfMemoryError):
            gradients()
        handle.remove()
        abandon_pass(distiller)
        teacher.abandon_pass()
        for name, gradient in gradients().items():
            assert torch.equal(gradient, expected[name]), name


def test_a_micro_batch_the_recipe_sets_is_not_halved(tmp_path):
    with pytest.raises(RunError, match="one of 2 rows of 12 positions does not"):
        finished(tmp_path / "run", "always", 2, WHERE[0])


def test_several_ranks_get_the_reason_why_nothing_is_retried():
    assert "several ranks" in str(out_of_memory(4, 2048, num_ranks=2))
    assert "ranks" not in str(out_of_memory(4, 2048))
