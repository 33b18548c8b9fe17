"""What rank 0 finds out for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from limbeck.distributed.ranks import World, broadcast_object, together

T = TypeVar("T")


def decided(find: Callable[[], T], world: World) -> T:
    """What a function returns on rank 0, on every rank; every rank calls it.

    Ranks that look at one file each by itself may see different things: a shared disk shows it to
    some first.

    Args:
        find: Called on rank 0 only; returns JSON.

    Raises:
        LimbeckError: Rank 0's, on every rank.
    """
    found: list[T] = []
    together(lambda: found.append(find()), world, main_only=True)
    values: list[T] = broadcast_object(found, world)
    return values[0]
