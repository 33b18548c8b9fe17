"""Size and error of several store forms, measured on a few windows before recording.

The students do not exist yet, so errors are measured against a stand-in: the teacher with noise in
its last hidden states. The size of an error depends on how close a student is to the teacher; the
ranking of the forms hardly does.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.data import spread
from limbeck.errors import StorageError
from limbeck.files import nearest_existing
from limbeck.losses import Head
from limbeck.losses.distributions import DrawnTokens, LazyLogits, TeacherDistribution
from limbeck.losses.divergences.kl import forward_kl
from limbeck.models import CausalLM, evaluating
from limbeck.recording.plan import ShardPlan
from limbeck.recording.record import row_of
from limbeck.store import Form, forms, generator_of, written_out
from limbeck.store.token_ranks import TokenRanks

SAMPLED_WINDOWS = 8
SAMPLED_POSITIONS = 64
"""Scored positions measured in each window, the first ones."""

STAND_IN_NOISE = 0.5
"""Noise of the stand-in, as a fraction of the hidden states' root mean square."""

CHUNK = 32
"""Positions whose logits and gradients are in memory at once."""

SETTINGS: tuple[Mapping[str, Any], ...] = (
    *({"type": "top_k", "k": k} for k in (16, 32, 64, 128)),
    *({"type": "top_k", "k": 1024, "min_prob": p} for p in (0.002, 0.0005, 0.0002)),
    *({"type": "samples", "num_draws": n} for n in (25, 50, 100)),
    *({"type": "top_k_samples", "k": k, "num_draws": n} for k, n in ((16, 8), (32, 16))),
    *({"type": "hidden", "precision": p} for p in ("int8", "float16", "exact")),
)
"""Forms that are measured besides the recipe's own."""


@dataclass(frozen=True)
class Setting:
    """Size and error of one form.

    Attributes:
        chosen: Whether it is the recipe's.
        bytes_per_token: A scored token's share of its records.
        total_bytes: Of all records, and of the head where the form needs it.
        loss: Dense forward KL to the stand-in student, nats a token.
        loss_bias: Mean of the form's less the dense one, nats a token; of samples an estimate whose
            mean is zero.
        gradient_error: Norm of the difference of the gradients at the logits, as a share of the
            dense gradient's norm.
    """

    form: Mapping[str, Any]
    chosen: bool
    bytes_per_token: float
    total_bytes: int
    loss: float
    loss_bias: float
    gradient_error: float


@dataclass(frozen=True)
class Budget:
    """Size of a recording, and size and error of alternatives.

    Attributes:
        settings: The recipe's own first.
        positions: Positions the teacher reads.
        scored: Positions the store will hold.
        measured_tokens: Scored positions the errors were measured on.
        layers_bytes: Size of the recorded layers, the same for all settings.
    """

    settings: tuple[Setting, ...]
    windows: int
    positions: int
    scored: int
    measured_tokens: int
    temperature: float
    layers_bytes: int
    free_bytes: int


class Read(NamedTuple):
    """The teacher at the first scored positions of one window."""

    key: bytes
    hidden: Float[Tensor, "n D"]


def make_budget(
    teacher: CausalLM, plan: ShardPlan, form: Mapping[str, Any], layers: Sequence[int], folder: Path
) -> Budget:
    """Measure the recipe's form and several others on a few windows spread over the data."""
    temperature = temperature_of(form)
    reads = read_some(teacher, plan)
    settings = [form, *(with_temperature(each, temperature) for each in SETTINGS)]
    scored = plan.num_scored
    measured = [
        measure(teacher.head, reads, each, temperature, scored, chosen=index == 0)
        for index, each in enumerate(settings)
        if index == 0
        or (written_out(each) != written_out(form) and fits(each, teacher.vocabulary_size))
    ]
    size = torch.empty((), dtype=teacher.hf_model.dtype).element_size()
    return Budget(
        tuple(measured),
        plan.num_windows,
        plan.num_positions,
        scored,
        sum(len(read.hidden) for read in reads),
        temperature,
        scored * len(layers) * teacher.width * size,
        shutil.disk_usage(nearest_existing(folder)).free,
    )


def require_room(budget: Budget, folder: Path, share: float, there_bytes: int) -> None:
    """Refuse a recording for which the disk has too little space.

    Args:
        budget: Its first setting is the one that is recorded.
        share: Fraction of the recording that this process does.
        there_bytes: Size of what is recorded already.
    """
    whole = budget.settings[0].total_bytes + budget.layers_bytes
    wanted = max(0, int(whole * share) - there_bytes)
    if wanted > budget.free_bytes:
        raise StorageError(
            f"record.output: {folder} must have room for about {wanted:,} bytes more, and "
            f"{budget.free_bytes:,} are free. Free some space, choose another place, or a form of "
            "fewer bytes a token."
        )


def temperature_of(form: Mapping[str, Any]) -> float:
    """The first temperature of a form; 1 for a form that serves all."""
    several = form.get("temperatures")
    return float(several[0]) if several else float(form.get("temperature", 1.0))


def with_temperature(form: Mapping[str, Any], temperature: float) -> Mapping[str, Any]:
    """The form at another temperature."""
    if form["type"] in ("samples", "top_k_samples"):
        return {**form, "temperature": temperature}
    return {**form, "temperatures": (temperature,)} if form["type"] == "top_k" else form


def fits(form: Mapping[str, Any], vocabulary_size: int) -> bool:
    """Whether the form is possible for a vocabulary of this size."""
    return int(form.get("k", 0)) < vocabulary_size


@torch.no_grad()
def read_some(teacher: CausalLM, plan: ShardPlan) -> list[Read]:
    """The teacher at some positions of a few windows, spread over all that is recorded."""
    places = [place for shard in plan.shards for place in shard]
    found = []
    for at in spread(len(places), SAMPLED_WINDOWS):
        sample = plan.sample(places[at])
        with evaluating(teacher):
            hidden, _ = teacher(row_of([sample]).to(teacher.device))
        found.append(Read(sample.key, hidden[:SAMPLED_POSITIONS]))
    return found


def measure(
    head: Head,
    reads: Sequence[Read],
    form: Mapping[str, Any],
    temperature: float,
    scored: int,
    *,
    chosen: bool,
) -> Setting:
    """Encode, decode, and compare with the dense teacher."""
    codec: Form = forms.bind(form, "record.form")(len(head.weight))
    still = head.detach()
    signals = [
        codec.read_teacher(LazyLogits(read.hidden, still), generator_of(0, read.key))
        for read in reads
    ]
    ranks = TokenRanks.from_ids([codec.ids_of(signal) for signal in signals], len(head.weight))
    decoder = codec.with_head(still) if codec.needs_head else codec
    size, dense_sum, bias, apart, norm, tokens = 0, 0.0, 0.0, 0.0, 0.0, 0
    for read, signal in zip(reads, signals, strict=True):
        coded = codec.encode(signal, ranks)
        size += len(coded)
        decoded = decoder.decode(memoryview(coded), len(read.hidden), ranks)
        student = stand_in(read)
        for start in range(0, len(read.hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = still(student[rows]).float()
            exact, exact_gradient = value(LazyLogits(read.hidden[rows], still), logits, temperature)
            near, gradient = value(decoded.rows(rows), logits, temperature)
            dense_sum += float(exact.sum())
            bias += float((near - exact).sum())
            apart += float((gradient - exact_gradient).square().sum())
            norm += float(exact_gradient.square().sum())
            tokens += len(exact)
    return Setting(
        dict(form),
        chosen,
        size / tokens,
        round(size / tokens * scored) + (size_of(head) if codec.needs_head else 0),
        dense_sum / tokens,
        bias / tokens,
        (apart / max(norm, 1e-30)) ** 0.5,
    )


def size_of(head: Head) -> int:
    """Bytes of a head."""
    parts = [head.weight, *([] if head.bias is None else [head.bias])]
    return sum(part.nbytes for part in parts)


def stand_in(read: Read) -> Float[Tensor, "n D"]:
    """A student's last hidden states: the teacher's with noise, always the same."""
    hidden = read.hidden.float()
    noise = torch.randn(hidden.shape, generator=generator_of(1, read.key)).to(hidden.device)
    return hidden + STAND_IN_NOISE * hidden.square().mean(-1, keepdim=True).sqrt() * noise


def value(
    distribution: TeacherDistribution, logits: Float[Tensor, "n V"], temperature: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """Forward KL of each position, and its gradient at the student's logits."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        pair = distribution.compare(leaf, temperature)
        divergence = forward_kl(pair.student, pair.teacher)
        (gradient,) = torch.autograd.grad(divergence.sum(), leaf)
    if isinstance(distribution, DrawnTokens):
        divergence = divergence + distribution.correction()
    return divergence.detach(), gradient
