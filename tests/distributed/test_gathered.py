"""Passes without gradients leave nothing behind that a later backward pass follows."""

import pytest
import torch

from limbeck.distributed import gathered, shard, unsharded, world
from limbeck.distributed.sharding import is_sharded
from tests.distributed.processes import live
from tests.train.toy import ToyBatches, toy_pair


def forgotten(name):
    """FSDP2's list of forward passes, along which the next backward pass gathers ahead."""
    with world(torch.device("cpu"), "always") as here:
        distiller, teacher = toy_pair()
        shard(distiller, distiller.student.blocks, here)
        teacher.shard(here)
        ids = ToyBatches().batch([0, 1]).input_ids
        model = teacher.model if name == "release" else distiller
        listed = model._get_fsdp_state()._comm_ctx.post_forward_order
        assert listed == [], "the pass that makes it a root"
        for _ in range(5):
            with torch.no_grad():
                if name == "release":
                    teacher.signal(ToyBatches().batch([0, 1]))
                    assert listed
                    teacher.release()
                else:
                    with {"gathered": gathered, "unsharded": unsharded}[name](distiller):
                        distiller.student.logits(ids)
                        assert listed
            assert listed == []
            assert all(is_sharded(p) for p in model.parameters())


@pytest.mark.parametrize("name", ["gathered", "unsharded", "release"])
def test_passes_without_gradients_are_forgotten(name):
    assert live(forgotten, name) == 0
