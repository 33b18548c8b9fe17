"""Hidden states as bytes: exact, or in fewer bits with a bounded error."""

from __future__ import annotations

import struct
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.errors import DataError
from limbeck.store.byte_planes import Unpacker, pack

Precision = Literal["exact", "float16", "int8"]

GROUP = 64
"""Neighbouring values that share one scale in `int8`."""

MAX_WIDTH = 1 << 18

DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, 3: torch.float64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
START = struct.Struct("<IBB")
"""Width, code of the original dtype, and 1 for `int8` with scales."""


def encode(states: Float[Tensor, "N D"], precision: Precision) -> bytes:
    """Encoded hidden states.

    `exact` keeps every bit, `float16` rounds. `int8` keeps a signed byte for each value and a
    float16 scale for each 64 of a row: the error is at most half the scale, which is the largest
    magnitude of the 64 over 127, rounded up.
    """
    states = states.detach().cpu().contiguous()
    if not bool(states.isfinite().all()):
        raise DataError(
            "A teacher's hidden states must be finite to be stored, and some are not. "
            "Record with another teacher dtype."
        )
    start = START.pack(states.shape[1], CODES[states.dtype], precision == "int8")
    if precision == "int8":
        values, scales = to_bytes(states)
        return start + pack([values.reshape(-1).view(np.uint8), *byte_planes(scales)])
    if precision == "float16":
        kept = states.half()
        if not bool(kept.isfinite().all()):
            raise DataError(
                f"Hidden states up to {float(states.abs().max()):.4g} do not fit float16, whose "
                "largest number is 65,504. Set precision to exact."
            )
        states = kept
        start = START.pack(states.shape[1], CODES[torch.float16], 0)
    bits = states.view(torch.uint8).numpy().reshape(-1, states.element_size())
    return start + pack(list(bits.T))


def decode(coded: memoryview, num_rows: int) -> Float[Tensor, "N D"]:
    """Hidden states in their original dtype, or in float16 if they were rounded to it."""
    if len(coded) < START.size:
        raise DataError("Coded hidden states must begin with their width, and end before it.")
    width, code, in_bytes = START.unpack(coded[: START.size])
    if code not in DTYPES or in_bytes > 1 or not 1 <= width <= MAX_WIDTH:
        raise DataError(f"Coded hidden states cannot have width {width:,} and dtype {code}.")
    dtype = DTYPES[code]
    unpack = Unpacker(coded[START.size :])
    numbers = num_rows * width
    if in_bytes:
        groups = -(-width // GROUP)
        values = unpack.next(numbers).view(np.int8).reshape(num_rows, width)
        bits = [unpack.next(num_rows * groups) for _ in range(2)]
        unpack.finish()
        scales = np.stack(bits, -1).reshape(-1).view("<f2").reshape(num_rows, groups)
        whole = np.repeat(scales.astype(np.float32), GROUP, axis=-1)[:, :width]
        return torch.from_numpy(values.astype(np.float32) * whole).to(dtype)
    planes = [unpack.next(numbers) for _ in range(dtype.itemsize)]
    unpack.finish()
    together = torch.from_numpy(np.stack(planes, -1).reshape(-1))
    return together.view(dtype).reshape(num_rows, width)


def to_bytes(states: Float[Tensor, "N D"]) -> tuple[np.ndarray, np.ndarray]:
    """Values as signed bytes, and the float16 scale of each group of 64."""
    numbers = states.float().numpy()
    rows, width = numbers.shape
    groups = -(-width // GROUP)
    padded = np.zeros((rows, groups * GROUP), dtype=np.float32)
    padded[:, :width] = numbers
    grouped = padded.reshape(rows, groups, GROUP)
    wanted = np.abs(grouped).max(-1) / 127
    if wanted.size and float(wanted.max()) > float(np.finfo(np.float16).max):
        raise DataError(
            f"Hidden states up to {float(np.abs(numbers).max()):.4g} do not fit int8 with float16 "
            "scales. Set precision to exact."
        )
    scales = wanted.astype(np.float16)
    scales = np.where(scales < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
    safe = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    values = np.rint(grouped / safe[:, :, None]).astype(np.int8)
    return values.reshape(rows, -1)[:, :width], scales


def byte_planes(numbers: np.ndarray) -> list[np.ndarray]:
    """The lowest bytes of all values, then the next ones."""
    bits = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.itemsize)
    return list(bits.T)
