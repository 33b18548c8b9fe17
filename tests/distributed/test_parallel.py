"""Ways to keep the teacher, and formats to send gradients in, change no step."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from limbeck.distributed import Footprint, shard, whole, world
from limbeck.train import accumulate
from tests.distributed.processes import live, on_ranks
from tests.distributed.test_step import UNEVEN, require_near
from tests.train.toy import ALONE, ToyBatches, toy_pair

WAYS = ("shard", "replicate", "offload")


def batches_of(rank):
    return [ToyBatches().batch(rows) for rows in UNEVEN[rank]]


def tokens_of(size):
    count = sum(int(batch.num_scored()) for rank in range(size) for batch in batches_of(rank))
    return torch.tensor(count)


def pair(here, way="shard", **options):
    distiller, teacher = toy_pair()
    shard(distiller, distiller.student.blocks, here, **options)
    teacher.shard(here.for_teacher(way))
    return distiller, teacher


def gradients(distiller):
    return {name: whole(p.grad) for name, p in distiller.named_parameters()}


def alone(size, ranks=None):
    """Gradients of one process over what some of the ranks read."""
    distiller, teacher = toy_pair()
    batches = [batch for rank in ranks or range(size) for batch in batches_of(rank)]
    accumulate(distiller, teacher, batches, tokens_of(size), ALONE)
    return gradients(distiller)


def sent(footprint, kind):
    return sum(each.count for each in footprint.collectives if each.kind == kind)


def kept_in_each_way(here):
    expected = alone(here.size)
    counts = {}
    for way in WAYS:
        distiller, teacher = pair(here, way)
        footprint = Footprint([distiller, teacher.model])
        with footprint:
            teacher.signal(batches_of(here.rank)[0])
            teacher.release()
            counts[way] = sent(footprint, "all-gather")
            footprint.reset()
            accumulate(distiller, teacher, batches_of(here.rank), tokens_of(here.size), here)
            counts[way, "summed"] = sent(footprint, "reduce-scatter")
        require_near(gradients(distiller), expected, 1e-4)
        assert all(p.grad is None for p in teacher.model.parameters())
        parts = [part for part in teacher.model.modules() if isinstance(part, FSDPModule)]
        held = sum(p.to_local().numel() for p in teacher.model.parameters()) if parts else None
        if way == "replicate":
            assert parts == []
        else:
            shards = here.size // (here.mesh.size(0) if here.mesh.ndim == 2 else 1)
            assert held == pytest.approx(teacher.model.num_parameters / shards, rel=0.05)
        offloaded = {
            param.offload_to_cpu
            for part in parts
            for group in part._get_fsdp_state()._fsdp_param_groups
            for param in group.fsdp_params
        }
        assert offloaded == ({way == "offload"} if parts else set())
    if here.size > 1:
        blocks, roots = 4, 2  # the embedding is a unit of its own
        assert counts["shard"] == counts["offload"] == blocks + roots
    assert counts["replicate"] == 0, "its forward pass sends nothing"
    assert len({counts[way, "summed"] for way in WAYS}) == 1, "no gradient of the teacher is summed"


def on_one():
    with world(torch.device("cpu"), "always") as here:
        kept_in_each_way(here)


@pytest.mark.parametrize(
    ("size", "replicate"), [(1, 1), (2, 1), pytest.param(4, 2, marks=pytest.mark.long)]
)
def test_a_step_is_that_of_one_process_wherever_the_teacher_is_kept(size, replicate):
    if size == 1:
        assert live(on_one) == 0
    else:
        on_ranks(size, kept_in_each_way, replicate=replicate)


def sent_in_bfloat16(here):
    """Within the bound of `NarrowReduceScatter`, in half the bytes, however often it is sent."""
    magnitudes = {name: torch.zeros_like(g) for name, g in alone(here.size).items()}
    for rank in range(here.size):
        for name, gradient in alone(here.size, [rank]).items():
            magnitudes[name] += gradient.abs()
    sizes, errors = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        distiller, teacher = pair(here, reduce_dtype=dtype)
        footprint = Footprint([distiller, teacher.model])
        with footprint:
            accumulate(distiller, teacher, batches_of(here.rank), tokens_of(here.size), here)
        sizes[dtype] = sum(
            each.whole_bytes for each in footprint.collectives if each.kind == "reduce-scatter"
        )
        assert {p.grad.dtype for p in distiller.parameters()} == {torch.float32}
        errors[dtype] = {
            name: (gradient - alone_gradient).abs()
            for (name, gradient), alone_gradient in zip(
                gradients(distiller).items(), alone(here.size).values(), strict=True
            )
        }
    assert sizes[torch.bfloat16] * 2 == sizes[torch.float32] > 0
    for name, error in errors[torch.bfloat16].items():
        slack = 1e-4 * magnitudes[name].max()
        assert (error <= here.size * 2**-8 * magnitudes[name] + slack).all(), name
    largest = [max(float(e.max()) for e in each.values()) for each in errors.values()]
    assert largest[1] > 10 * largest[0], "something was rounded"


@pytest.mark.parametrize(
    ("size", "replicate"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.long)]
)
def test_gradients_sent_in_bfloat16_are_within_their_bound(size, replicate):
    on_ranks(size, sent_in_bfloat16, replicate=replicate)
