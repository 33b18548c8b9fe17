"""Rank 0 goes first, and its failure reaches the ranks that wait."""

import pytest
import torch

from limbeck.distributed import World, main_first, ranks
from limbeck.errors import DataError

CPU = torch.device("cpu")


def test_main_first_runs_the_other_ranks_after_rank_0(monkeypatch):
    order = []
    monkeypatch.setattr(ranks, "broadcast_object", lambda value, world: order.append("sync"))
    for rank in (0, 1):
        with main_first(World(rank, 2, CPU)):
            order.append(rank)
    assert order == [0, "sync", "sync", 1]


def test_a_failure_of_rank_0_is_sent_before_it_is_raised(monkeypatch):
    sent = []
    monkeypatch.setattr(ranks, "broadcast_object", lambda value, world: sent.append(value))
    with pytest.raises(DataError, match="no rows"), main_first(World(0, 2, CPU)):
        raise DataError("no rows")
    assert [(name, "no rows" in text) for name, text in sent] == [("DataError", True)]


def test_waiting_ranks_raise_the_error_of_rank_0_instead_of_waiting(monkeypatch):
    monkeypatch.setattr(ranks, "broadcast_object", lambda value, world: ("DataError", "no rows"))
    ran = []
    with pytest.raises(DataError, match="Rank 0 failed: no rows"), main_first(World(1, 2, CPU)):
        ran.append(1)
    assert ran == []
