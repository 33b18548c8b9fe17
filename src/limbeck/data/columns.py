"""Arrays on disk that grow while a text is read, so that memory does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped


class Column:
    """A .npy file that grows at its end; its bytes are those of `numpy.save`."""

    def __init__(self, file: BinaryIO, dtype: type[np.generic], width: int = 0) -> None:
        """
        Args:
            width: Numbers in each item; 0 for items that are numbers.
        """
        self._file, self._dtype, self._width = file, np.dtype(dtype), width
        self._length = 0
        self.finish()

    def extend(self, values: Shaped[np.ndarray, " ..."] | list[object]) -> None:
        """Add items at the end."""
        items = np.ascontiguousarray(values, dtype=self._dtype)
        if len(items):
            assert items.shape[1:] == ((self._width,) if self._width else ())
            self._file.write(items.data)
            self._length += len(items)

    def finish(self) -> None:
        """Write the header, which has room for any length."""
        shape = (self._length, self._width) if self._width else (self._length,)
        self._file.seek(0)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        facts = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, facts)


Kinds = Mapping[str, tuple[type[np.generic], int]]
"""Of each array by name its type and the width of an item."""


@contextmanager
def columns(folder: Path, kinds: Kinds) -> Iterator[dict[str, Column]]:
    """Arrays in a folder, complete when the context ends."""
    with ExitStack() as files:
        opened = {
            name: Column(files.enter_context((folder / f"{name}.npy").open("wb")), *kind)
            for name, kind in kinds.items()
        }
        yield opened
        for column in opened.values():
            column.finish()
