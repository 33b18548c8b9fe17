"""DistillKit's codec, written anew from its public description, to be compared with.

The k largest log-probabilities, sorted: the first few as they are, a least-squares fit through the
rest, and for some of them the fit's residuals in a few bits with one scale. Ids are packed to the
bits the vocabulary needs. As published the fit's abscissa runs over 0, 1, 2, ...; with `normalised`
it runs from 0 to 1, which keeps high powers solvable in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SINGULAR_VALUE = 1e-5


class Bin(NamedTuple):
    """Residuals that share a scale."""

    scale: torch.dtype
    bits: int
    elements: int


@dataclass(frozen=True)
class Codec:
    """One of its settings."""

    name: str
    k: int
    exact_k: int
    exact_dtype: torch.dtype
    terms: tuple[int | str, ...]
    bins: tuple[Bin, ...] = ()
    deltas: bool = False
    normalised: bool = False

    def basis(self) -> Tensor:
        """The fitted functions at each of the fitted places."""
        places = self.k - self.exact_k
        at = torch.linspace(0, 1, places) if self.normalised else torch.arange(places).float()
        return torch.stack([at.sqrt() if isinstance(t, str) else at**t for t in self.terms], dim=-1)

    def encode(self, ids: Tensor, logprobs: Tensor, vocabulary_size: int) -> list[Tensor]:
        """Bytes of each position, in parts [N, bytes].

        Args:
            ids: The k most probable tokens, the most probable first.
            logprobs: Their log-probabilities.
            vocabulary_size: How many tokens there are.
        """
        values = logprobs.float()
        if self.deltas:
            values = torch.cat([values[:, :1], values.diff(dim=-1)], dim=-1)
        parts = [as_bytes(values[:, : self.exact_k].to(self.exact_dtype))]
        rest = values[:, self.exact_k :]
        u, s, vh = torch.linalg.svd(self.basis(), full_matrices=False)
        inverse = torch.where(s > SMALLEST_SINGULAR_VALUE, 1 / s, 0)
        coefficients = ((rest @ u) * inverse) @ vh
        parts.append(as_bytes(coefficients))
        residual = rest - coefficients @ self.basis().T
        start = 0
        for each in self.bins:
            part = residual[:, start : start + each.elements]
            start += each.elements
            largest = part.abs().amax(-1, keepdim=True)
            scale = torch.where(largest == 0, 1, largest / 2 ** (each.bits - 1)).to(each.scale)
            half = 2 ** (each.bits - 1)
            steps = (part / scale.float()).round().clamp(-half, half - 1) + half
            parts += [as_bytes(scale), pack_bits(steps.long(), each.bits)]
        return [*parts, pack_bits(ids, (vocabulary_size - 1).bit_length())]

    def decode(self, parts: list[Tensor], vocabulary_size: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities; the latter as they were where they are exact."""
        exact = parts[0].contiguous().view(self.exact_dtype).float()
        rest = parts[1].contiguous().view(torch.float32) @ self.basis().T
        start = 0
        for place, each in enumerate(self.bins):
            scale = parts[2 + 2 * place].contiguous().view(each.scale).float()
            steps = unpack_bits(parts[3 + 2 * place], each.bits, each.elements)
            rest[:, start : start + each.elements] += (steps - 2 ** (each.bits - 1)) * scale
            start += each.elements
        values = torch.cat([exact, rest], dim=-1)
        ids = unpack_bits(parts[-1], (vocabulary_size - 1).bit_length(), self.k)
        return ids, values.cumsum(-1) if self.deltas else values


def as_bytes(numbers: Tensor) -> Tensor:
    """The bytes of each row."""
    return numbers.contiguous().view(torch.uint8)


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Numbers of each row on end, so many bits each, padded to whole bytes."""
    flat = (numbers[..., None] >> torch.arange(bits - 1, -1, -1) & 1).flatten(1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(len(flat), -1, 8)
    return (flat * (1 << torch.arange(7, -1, -1))).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack_bits` was given."""
    flat = (packed[..., None].long() >> torch.arange(7, -1, -1) & 1).flatten(1)
    flat = flat[:, : bits * count].view(len(flat), count, bits)
    return (flat << torch.arange(bits - 1, -1, -1)).sum(-1)


PUBLISHED = (
    Codec("budget", 50, 1, torch.bfloat16, (0, 1, "sqrt")),
    Codec("recommended", 128, 16, torch.bfloat16, (0, 1, 2, 3, 4, "sqrt")),
    Codec(
        "residual bins",
        128,
        16,
        torch.bfloat16,
        (0, 1, 2, "sqrt"),
        (Bin(torch.float16, 8, 16), Bin(torch.float32, 2, 64)),
    ),
    Codec("quickstart", 128, 32, torch.float32, (0, 1, 2), deltas=True),
)
"""The settings its documentation gives."""


def replace_all(codec: Codec) -> Codec:
    """The same setting with its basis normalised."""
    return replace(codec, normalised=True)


def round_trip_error(codec: Codec, vocabulary_size: int) -> float:
    """Mean error of the fitted log-probabilities of a smooth tail, nats; ids must come back."""
    source = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, vocabulary_size, generator=source)
    top = logits.log_softmax(-1).topk(codec.k, -1)
    ids, logprobs = codec.decode(
        codec.encode(top.indices, top.values, vocabulary_size), vocabulary_size
    )
    assert torch.equal(ids, top.indices)
    exact = top.values[:, : codec.exact_k]
    if not codec.deltas:
        assert torch.equal(logprobs[:, : codec.exact_k], exact.to(codec.exact_dtype).float()), (
            "what is exact must come back"
        )
    return float((logprobs - top.values)[:, codec.exact_k :].abs().mean())
