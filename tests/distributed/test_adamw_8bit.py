"""AdamW in 8 bits: near torch's, the same on any number of ranks, kept by checkpoints."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from limbeck.config import OptimConfig
from limbeck.distributed import AdamW8bit, adamw_8bit, full_weights, load_checkpoint, shard, whole
from limbeck.distributed.adamw_8bit import BLOCK, decoded, encode, levels
from limbeck.train import make_optimizers
from tests.distributed.processes import on_ranks
from tests.distributed.saved_checkpoint import save_checkpoint
from tests.teachers.waits import BlockingCopies
from tests.train.toy import ALONE, toy_pair

CPU = torch.device("cpu")
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs limbeck[quantized]"
)


@needs_library
@pytest.mark.filterwarnings("ignore")  # of libraries that it imports
@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_those_of_bitsandbytes(signed):
    from bitsandbytes.functional import create_dynamic_map

    expected = create_dynamic_map(signed)
    torch.testing.assert_close(levels(CPU, signed=signed), expected, atol=1e-7, rtol=1e-5)


def coded(numbers, *, signed):
    blocks = -(-numbers.shape[1] // BLOCK)
    codes = torch.zeros(numbers.shape, dtype=torch.uint8)
    scales = torch.zeros(len(numbers), blocks)
    encode(numbers, codes, scales, signed=signed)
    return decoded(codes, scales, signed=signed)


def test_a_step_copies_nothing_that_the_host_waits_for():
    weight = nn.Parameter(torch.zeros(16, 512, device="meta"))
    optimizer = AdamW8bit([weight], **OPTIONS)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with BlockingCopies() as copies:
        optimizer.step()
    assert copies.found == []


@pytest.mark.parametrize("width", [1, 255, 256, 300, 768])
def test_numbers_are_rounded_to_the_nearest_level_of_their_block(width):
    numbers = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    numbers[2] *= 1e-9
    numbers[3] = 0
    for signed, values in ((True, numbers), (False, numbers.square())):
        found, table = coded(values, signed=signed), levels(CPU, signed=signed)
        for row, wanted in zip(found, values, strict=True):
            for start in range(0, width, BLOCK):
                block = wanted[start : start + BLOCK]
                may = table if signed or not block.any() else table[1:]
                nearest = (block[:, None] - may * block.abs().max()).abs().min(1).values
                off = (row[start : start + BLOCK] - block).abs()
                torch.testing.assert_close(
                    off, nearest, atol=1e-6 * float(block.abs().max()), rtol=0
                )


def pair_of(shape):
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(shape))
    return first, nn.Parameter(first.detach().clone())


def steps(optimizer, parameter, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    start = parameter.detach().clone()
    sizes = torch.rand(parameter.shape, generator=generator) ** 2  # gradients differ in size
    drift = torch.randn(parameter.shape, generator=generator)
    for _ in range(count):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = sizes * (noise + 0.5 * drift)
        optimizer.step()
    return parameter.detach() - start


def test_twenty_steps_are_near_those_of_torch():
    ours, theirs = pair_of((64, 300))
    found = steps(AdamW8bit([ours], **OPTIONS, weight_decay=0.1), ours, 20)
    wanted = steps(AdamW([theirs], **OPTIONS, weight_decay=0.1), theirs, 20)
    assert (found - wanted).norm() < 0.07 * wanted.norm()
    assert not torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(300,), (63, 65)])
def test_vectors_and_small_matrices_take_the_steps_of_torch(shape):
    ours, theirs = pair_of(shape)
    found = steps(AdamW8bit([ours], **OPTIONS, weight_decay=0.1), ours, 5)
    torch.testing.assert_close(
        found, steps(AdamW([theirs], **OPTIONS, weight_decay=0.1), theirs, 5)
    )


@needs_library
@pytest.mark.filterwarnings("ignore")  # of libraries that it imports
@pytest.mark.parametrize("steps_taken", [5, 50])
def test_the_steps_are_nearer_to_torchs_than_those_of_bitsandbytes(steps_taken):
    from bitsandbytes.optim import AdamW8bit as Theirs

    options = {**OPTIONS, "weight_decay": 0.0}
    found = {}
    for kind in (AdamW8bit, Theirs, AdamW):
        parameter, _ = pair_of((64, 512))
        found[kind] = steps(kind([parameter], **options), parameter, steps_taken)
    ours, theirs = ((found[kind] - found[AdamW]).norm() for kind in (AdamW8bit, Theirs))
    assert ours < 0.5 * theirs


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-12])
def test_a_gradient_far_below_its_blocks_largest_makes_no_large_step(small):
    parameter = nn.Parameter(torch.zeros(16, 256))
    optimizer = AdamW8bit([parameter], **OPTIONS)
    sizes = torch.full((256,), small)
    sizes[0] = 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        before = parameter.detach().clone()
        parameter.grad = sizes * torch.randn(16, 256, generator=generator)
        optimizer.step()
        assert (parameter - before).abs().max() < 10 * OPTIONS["lr"]


def test_a_matrix_of_many_rows_is_updated_in_slices(monkeypatch):
    ours, theirs = pair_of((64, 300))
    found = steps(AdamW8bit([ours], **OPTIONS), ours, 3)
    monkeypatch.setattr(adamw_8bit, "AT_A_TIME", 301)
    assert torch.equal(found, steps(AdamW8bit([theirs], **OPTIONS), theirs, 3))


def test_the_state_of_a_matrix_takes_a_little_more_than_two_bytes_a_number():
    parameter = nn.Parameter(torch.zeros(64, 512))
    optimizer = AdamW8bit([parameter], **OPTIONS)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(v.nbytes for v in optimizer.state[parameter].values() if v.numel() > 1)
    assert held == adamw_8bit.moment_bytes(parameter) == 2 * 64 * 512 + 8 * 64 * 2


def sharded_run(world, count):
    """A toy student after some steps of the same gradients, its matrices' moments in 8 bits."""
    adamw_8bit.SMALLEST = 1
    distiller, _ = toy_pair()
    shard(distiller, distiller.student.blocks, world)
    config = OptimConfig(type="adamw_8bit", learning_rate=0.01, steps=1)
    optimizers = make_optimizers(distiller, config, 0.01, world.device)
    take_steps(distiller, optimizers, range(count))
    return distiller, optimizers


def take_steps(distiller, optimizers, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in distiller.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(
                    gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()


def as_a_rank(world, folder):
    distiller, optimizers = sharded_run(world, 3)
    moments = [s for o in optimizers for s in o.state.values()]
    assert any(isinstance(s["mean_scale"], DTensor) for s in moments if "mean_scale" in s)
    weights = full_weights(distiller, world)
    alone, others = sharded_run(ALONE, 3)
    if world.is_main:
        for name, value in alone.state_dict().items():
            assert torch.equal(weights[name], value), name
    wanted = [s for o in others for s in o.state.values()]
    for ours, theirs in zip(moments, wanted, strict=True):
        for name, value in theirs.items():
            assert torch.equal(whole(ours[name]), value), name
    save_checkpoint(folder, 3, distiller, optimizers, {}, world)


def test_two_ranks_have_the_state_of_one_and_one_resumes_theirs(tmp_path, monkeypatch):
    on_ranks(2, as_a_rank, tmp_path)
    monkeypatch.setattr(adamw_8bit, "SMALLEST", 1)
    wanted, _ = sharded_run(ALONE, 5)
    distiller, optimizers = sharded_run(ALONE, 1)
    load_checkpoint(tmp_path / "step-000003", distiller, optimizers, ALONE)
    take_steps(distiller, optimizers, (3, 4))
    for name, value in wanted.state_dict().items():
        assert torch.equal(distiller.state_dict()[name], value), name
