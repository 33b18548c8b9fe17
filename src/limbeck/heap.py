"""What happens to memory that tensors on a CPU have freed, where the C library is glibc."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


class Policy(NamedTuple):
    """glibc's settings, see mallopt(3).

    Attributes:
        mmap_blocks: Blocks that may have a mapping of their own, which freeing removes.
        mmap_bytes: Size from which a block gets one, at most 32 MiB.
        trim_bytes: Free memory at the heap's end that goes back to the system; -1 for none.
    """

    mmap_blocks: int
    mmap_bytes: int
    trim_bytes: int


USUAL = Policy(1 << 16, 1 << 25, 1 << 26)
"""What glibc's own, growing thresholds come to once a tensor of 32 MiB has been freed."""

RETURNED = Policy(1 << 16, 1 << 20, 1 << 20)
KEPT = Policy(0, 1 << 25, -1)

_in_force = [USUAL]
"""The policies of the contexts that are open: glibc has one per process, and cannot be asked."""


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """A context in which blocks of 1 MiB and more go back to the system when they are freed.

    Memory that `freed_memory_kept` holds around it is used first, and stays. By itself glibc keeps
    blocks of up to 32 MiB, and fills them later with blocks of any size: a rank then holds memory
    of layers that it only gathered.
    """
    with in_force(RETURNED):
        yield


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """A context in which freed memory stays with the process, for the steps of a run on a CPU.

    By itself glibc returns tensors of more than 32 MiB, and each step then waits for the system to
    clear their pages again: on a virtual machine a third of its time. Other devices have
    allocators of their own, and nothing changes.
    """
    if device.type != "cpu":
        yield
        return
    try:
        with in_force(KEPT):
            yield
    finally:
        return_freed()


def return_freed() -> None:
    """Return freed memory to the system now, under any policy, so that it counts as free."""
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def in_force(policy: Policy) -> Iterator[None]:
    """A context with a policy, inside others or not."""
    before = _in_force[-1]
    _in_force.append(policy)
    apply(policy)
    try:
        yield
    finally:
        _in_force.pop()
        apply(before)


def apply(policy: Policy) -> None:
    """Tell glibc; nothing elsewhere."""
    if has_glibc():
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, policy.mmap_blocks)
        mallopt(M_MMAP_THRESHOLD, policy.mmap_bytes)
        mallopt(M_TRIM_THRESHOLD, policy.trim_bytes)


def has_glibc() -> bool:
    """Whether the C library is glibc."""
    return platform.libc_ver()[0] == "glibc"
