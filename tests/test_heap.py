"""Memory that a step frees stays with the process inside a context, and goes back after it."""

import platform
import resource

import pytest
import torch

from limbeck.heap import freed_memory_kept, freed_memory_returned
from tests.distributed.processes import live

CPU = torch.device("cpu")
MIB = 1 << 20
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory"
)


def steps(count):
    """Pages the system clears while tensors of 48 MiB are made and freed, after a few times."""
    for number in range(10 + count):
        if number == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first = torch.ones(12 * MIB)
        second = first + 1
        del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // MIB


def kept_then_returned():
    cleared_by_itself = steps(4)
    with freed_memory_kept(CPU):
        kept = steps(4)
        with freed_memory_returned():
            steps(4)
        kept_again = steps(4)
        held = resident_mib()
    after = resident_mib()
    with freed_memory_kept(torch.device("meta")):
        elsewhere = steps(4)
    pages = 4 * 48 * MIB // resource.getpagesize()
    assert cleared_by_itself > pages
    assert max(kept, kept_again) < pages, (kept, kept_again, pages)
    assert held - after > 80, (held, after, "what a context kept goes back")
    assert elsewhere > pages


def test_freed_memory_stays_for_the_next_step_and_goes_back_at_the_end():
    assert live(kept_then_returned) == 0
