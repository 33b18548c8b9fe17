"""Work that rank 0 does before the other ranks, such as a download into a shared cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.distributed.ranks import KINDS, World, broadcast_object, described
from limbeck.errors import RunError


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Run the body on rank 0 while the other ranks wait, then on them.

    Raises:
        LimbeckError: On every rank rank 0's error, so that none waits for a rank that failed.
    """
    failure: BaseException | None = None
    if world.is_main:
        try:
            yield
        except BaseException as error:
            failure = error
    words = broadcast_object(described(failure), world)
    if failure is not None:
        raise failure
    if words is not None:
        name, text = words
        kind = next((kind for kind in KINDS if kind.__name__ == name), RunError)
        raise kind(f"Rank 0 failed: {text}")
    if not world.is_main:
        yield
