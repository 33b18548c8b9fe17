"""What is compared: each form as it comes back from its bytes, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kept.distillkit import PUBLISHED, Codec
from limbeck.signals import LazyLogits, TeacherDistribution, TopK, TopKRenormalised
from limbeck.signals.samples import DrawnTokens
from limbeck.store import Sample, ShardWriter, Store, StoreHeader, generator_of, write_head

Sampled = list[tuple[Sample, LazyLogits]]


@dataclass(frozen=True)
class Kept:
    """A form, ready to be scored: its distributions in the order of the samples."""

    family: str
    name: str
    bytes_per_token: float
    signals: Callable[[int], TeacherDistribution]


def stored(family: str, form: dict, samples: Sampled, folder: Path) -> Kept:
    """A form of limbeck's, written to a real store and read from it."""
    head = samples[0][1].head
    header = StoreHeader(
        form=form,
        vocabulary_size=len(head.weight),
        sequence_length=max(len(sample.scored) for sample, _ in samples),
    )
    told = header.make_form()
    with ShardWriter(folder, 0, header) as writer:
        for sample, teacher in samples:
            writer.add(sample, told.read_teacher(teacher, generator_of(0, sample.key)))
    if told.needs_head:
        write_head(folder, head)
    store = Store.open(folder)
    kept_bytes = store.record_bytes + (folder / "shard-00000" / "ranks.bin").stat().st_size
    options = ", ".join(f"{k} {v}" for k, v in form.items() if k not in ("type", "temperatures"))
    return Kept(
        family,
        f"{form['type']} {options}",
        kept_bytes / store.num_scored,
        lambda index: store.read(samples[index][0].key).signal,
    )


def renormalised_top(samples: Sampled, k: int, temperature: float) -> Kept:
    """The common form: k ids and half-precision log-probabilities, no tail; tempered as it is."""

    def signal(index: int) -> TeacherDistribution:
        top = top_of(samples[index][1], k)
        return TopKRenormalised(top.ids, top.logprobs.half().float() / temperature, temperature)

    return Kept("top-k renormalised", f"top-{k} renormalised, raw", 4.0 * k, signal)


def distillkit(samples: Sampled, codec: Codec, with_tail: bool, temperature: float) -> Kept:
    """DistillKit's codec, under its own loss (renormalised) or with the mass left as a tail.

    At another temperature the tail is tempered as one token, as its `symmetric_uniform` does.
    """
    vocabulary_size = len(samples[0][1].head.weight)
    coded = [
        codec.encode(*(getattr(top_of(teacher, codec.k), f) for f in ("ids", "logprobs")),
                     vocabulary_size)
        for _, teacher in samples
    ]  # fmt: skip
    size = sum(part.shape[1] for part in coded[0])

    def signal(index: int) -> TeacherDistribution:
        ids, logprobs = codec.decode(coded[index], vocabulary_size)
        logprobs = logprobs.clamp_max(0)
        if not with_tail:
            return TopKRenormalised(ids, logprobs / temperature, temperature)
        left = (1 - logprobs.exp().sum(-1)).clamp_min(1e-6).log()
        both = torch.cat([logprobs, left[:, None]], -1)
        both = torch.log_softmax(both / temperature, -1)
        return TopK(ids, both[:, :-1], both[:, -1], temperature)

    loss = "with tail" if with_tail else "own loss"
    basis = ", normalised basis" if codec.normalised else ""
    return Kept(
        f"DistillKit {loss}{basis}", f"DistillKit {codec.name}{basis}, {loss}", size, signal
    )


def top_of(teacher: LazyLogits, k: int) -> TopK:
    """The teacher's top-k at temperature 1, a part of the rows at a time."""
    parts = [
        TopK.from_logits(teacher.rows(slice(start, start + 128)).logits(), k)
        for start in range(0, len(teacher.hidden), 128)
    ]
    return TopK(*(torch.cat([getattr(p, f) for p in parts]) for f in ("ids", "logprobs")),
                torch.cat([p.tail_logprob for p in parts]))  # fmt: skip


def our_forms(temperature: float) -> list[tuple[str, dict]]:
    """Families and settings of limbeck's forms."""
    further = [1.0] if temperature == 1 else [1.0, temperature]
    draws = (25, 50, 100, 200) if temperature == 1 else (50, 100, 200, 400)
    told: list[tuple[str, dict]] = [
        ("top-k with tail", {"type": "top_k", "k": k, "temperatures": further})
        for k in (16, 32, 64, 128, 256)
    ]
    told += [
        (
            "probable enough with tail",
            {"type": "top_k", "k": 4096, "least": least, "temperatures": further},
        )
        for least in (5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 5e-5)
    ]
    told += [
        ("systematic samples", {"type": "samples", "num_draws": n, "temperature": temperature})
        for n in draws
    ]
    told += [
        (
            "multinomial samples",
            {"type": "samples", "num_draws": n, "temperature": temperature, "draw": "multinomial"},
        )
        for n in draws[1:3]
    ]
    told += [
        (
            "top-k and sampled tail",
            {"type": "top_k_samples", "k": k, "num_draws": 8, "temperature": temperature},
        )
        for k in (16, 32)
    ]
    told += [("hidden states", {"type": "hidden", "precision": p}) for p in ("int8", "float16")]
    return told


def all_kept(samples: Sampled, temperature: float, folder: Path) -> list[Kept]:
    """Everything that is compared at a temperature."""
    told = []
    for number, (family, form) in enumerate(our_forms(temperature)):
        print(f"  recording {form}", flush=True)
        told.append(stored(family, form, samples, folder / f"{temperature}-{number}"))
    told.append(renormalised_top(samples, 32, temperature))
    for codec in PUBLISHED:
        for basis in (codec, replace(codec, normalised=True)):
            told += [distillkit(samples, basis, tail, temperature) for tail in (False, True)]
    return told


def rows_of(distribution: TeacherDistribution, start: int, stop: int) -> TeacherDistribution:
    """Some of the positions."""
    return distribution.rows(slice(start, stop))


def gradient_of(distribution: TeacherDistribution, logits: Tensor, temperature: float):
    """Forward KL of each token, and its gradient at the student's logits."""
    leaf = logits.detach().requires_grad_()
    pair = distribution.compare(leaf, temperature)
    each = (pair.teacher.exp() * (pair.teacher - pair.student)).sum(-1)
    (gradient,) = torch.autograd.grad(each.sum(), leaf)
    each = each.detach()
    if isinstance(distribution, DrawnTokens):
        each = each + distribution.correction()
    return each, gradient
