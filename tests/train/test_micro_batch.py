"""Choice of the number of rows of a micro-batch."""

import platform

import psutil
import pytest
import torch

from limbeck.config import MemoryConfig
from limbeck.distributed import shard, world
from limbeck.heap import freed_memory_kept
from limbeck.train.micro_batch import (
    choose_micro_batch,
    free_bytes,
    is_out_of_memory,
    out_of_memory,
    row_bytes,
)
from tests.train.toy import ALONE, toy_pair

STUDENT = toy_pair()[0].student


def chosen(micro_batch, sequence_length=12, most_rows=8, **more) -> int:
    memory = MemoryConfig(micro_batch=micro_batch, **more)
    return choose_micro_batch(
        memory, STUDENT, ALONE, sequence_length=sequence_length, most_rows=most_rows
    )


def test_a_given_number_is_used_but_at_most_all_rows():
    assert chosen(3) == 3
    assert chosen(100) == 8


def test_auto_takes_no_more_rows_than_useful_and_at_least_one():
    assert chosen("auto") == 8
    assert chosen("auto", sequence_length=2048, most_rows=64) == 2
    assert chosen("auto", sequence_length=1 << 40) == 1
    assert chosen("auto", head_budget_mb=1 << 40) == 1


def test_the_estimate_is_close_to_the_memory_autograd_keeps():
    """Tensors saved for backward, each storage once, weights left out."""
    from tests.train.toy import LENGTH, ToyBatches

    batch = ToyBatches().batch([0, 1, 2, 3])
    weights = {p.untyped_storage().data_ptr() for p in STUDENT.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = STUDENT(batch)
    estimate = 4 * row_bytes(STUDENT, LENGTH, "none")
    assert hidden.requires_grad
    assert 0.5 < estimate / sum(kept.values()) < 2


def test_checkpointing_keeps_less():
    none, selective, full = (row_bytes(STUDENT, 12, how) for how in ("none", "selective", "full"))
    assert full < selective < none


@pytest.mark.parametrize(("dtype", "shares"), [(torch.bfloat16, 2), (torch.float32, 1), (None, 1)])
def test_the_estimate_is_of_the_format_a_sharded_student_computes_in(dtype, shares):
    """Its weights are float32 in any case."""
    student = toy_pair()[0].student
    with world(torch.device("cpu"), "always") as here:
        shard(student, student.blocks, here, compute_dtype=dtype)
        assert shares * row_bytes(student, 12, "none") == row_bytes(STUDENT, 12, "none")


def test_memory_that_torch_holds_for_tensors_to_come_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 800)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    assert free_bytes(torch.device("cuda")) == 400


def test_free_memory_is_a_plausible_number():
    assert 1 << 20 < free_bytes(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_memory_errors_are_memory_errors(error, is_memory):
    assert is_out_of_memory(error) is is_memory


def test_the_error_names_every_option_that_saves_memory():
    said = str(out_of_memory(4, 2048))
    for knob in (
        "memory.micro_batch",
        "memory.head_budget_mb",
        "memory.activation_checkpointing",
        "data.sequence_length",
    ):
        assert knob in said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory")
def test_memory_that_is_kept_for_the_next_step_counts_as_free():
    cpu = torch.device("cpu")
    with freed_memory_kept(cpu):
        tensors = [torch.ones(12 << 20) for _ in range(8)]  # 48 MiB each
        used = psutil.Process().memory_info().rss
        del tensors
        free_bytes(cpu)
        assert used - psutil.Process().memory_info().rss > 300 << 20
