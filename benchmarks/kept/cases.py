"""What is compared: each form as it comes back from its bytes, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kept.distillkit import PUBLISHED, Codec
from limbeck.losses.distributions import FLOOR, DenseLogits, LazyLogits, TeacherDistribution, TopK
from limbeck.losses.distributions.samples import DrawnTokens
from limbeck.store import Sample, ShardWriter, Store, StoreHeader, generator_of, write_head

SAME_FIT = 0.01
"""Nats between two fits that count as one."""

Sampled = list[tuple[Sample, LazyLogits]]


@dataclass(frozen=True)
class Kept:
    """A form, ready to be scored: its distributions in the order of the samples."""

    family: str
    name: str
    bytes_per_token: float
    signals: Callable[[int], TeacherDistribution]


def stored(
    families: list[tuple[str, dict[str, Any]]], samples: Sampled, folder: Path
) -> list[Kept]:
    """Forms of limbeck's, each written to a real store and read from it."""
    head = samples[0][1].head
    longest = max(len(sample.scored) for sample, _ in samples)
    headers = [
        StoreHeader(form=form, vocabulary_size=len(head.weight), sequence_length=longest)
        for _, form in families
    ]
    forms = [header.make_form() for header in headers]
    folders = [folder / str(number) for number in range(len(families))]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(place, 0, header))
            for place, header in zip(folders, headers, strict=True)
        ]
        for number, (sample, teacher) in enumerate(samples):
            print(f"  recording sample {number + 1} of {len(samples)}", flush=True)
            dense = DenseLogits(teacher.logits())
            for form, writer in zip(forms, writers, strict=True):
                source = teacher if form.needs_head else dense
                writer.add(sample, form.read_teacher(source, generator_of(0, sample.key)))
    told = []
    for (family, _), form, place in zip(families, forms, folders, strict=True):
        if form.needs_head:
            write_head(place, head)
        told.append(reopened(family, Store.open(place), samples))
    return told


def reopened(family: str, store: Store, samples: Sampled) -> Kept:
    """A store, ready to be scored."""
    form = dict(store.header.form)
    kept_bytes = store.record_bytes + (store.path / "shard-00000" / "ranks.bin").stat().st_size
    options = ", ".join(f"{k} {v}" for k, v in form.items() if k not in ("type", "temperatures"))
    return Kept(
        family,
        f"{form['type']} {options}",
        kept_bytes / store.num_scored,
        lambda index: store.read(samples[index][0].key).signal,
    )


def renormalised(ids: Tensor, logits: Tensor, temperature: float) -> TopK:
    """The k tokens alone: their probabilities sum to one, and all other tokens are impossible."""
    nothing = torch.full_like(logits[:, 0], FLOOR)
    return TopK(ids, logits.log_softmax(-1), nothing, temperature)


def renormalised_top(tops: list[TopK], k: int, temperature: float) -> Kept:
    """The common form: k ids and half-precision log-probabilities, no tail; tempered as it is."""

    def signal(index: int) -> TeacherDistribution:
        ids, logprobs = tops[index].ids[:, :k], tops[index].logprobs[:, :k]
        return renormalised(ids, logprobs.half().float() / temperature, temperature)

    return Kept("top-k renormalised", f"top-{k} renormalised, raw", 4.0 * k, signal)


def distillkit(
    tops: list[TopK], codec: Codec, vocabulary_size: int, temperature: float
) -> list[Kept]:
    """DistillKit's codec, under its own loss (renormalised) and with the mass left as a tail.

    At another temperature the tail is tempered as one token, as its `symmetric_uniform` does.
    """
    coded = [
        codec.encode(top.ids[:, : codec.k], top.logprobs[:, : codec.k], vocabulary_size)
        for top in tops
    ]
    size = sum(part.shape[1] for part in coded[0])
    decoded = [codec.decode(each, vocabulary_size) for each in coded]
    basis = ", normalised basis" if codec.normalised else ""

    def own(index: int) -> TeacherDistribution:
        ids, logprobs = decoded[index]
        return renormalised(ids, logprobs.clamp_max(0) / temperature, temperature)

    def with_tail(index: int) -> TeacherDistribution:
        ids, logprobs = decoded[index][0], decoded[index][1].clamp_max(0)
        left = (1 - logprobs.exp().sum(-1)).clamp_min(1e-6).log()
        both = torch.log_softmax(torch.cat([logprobs, left[:, None]], -1) / temperature, -1)
        return TopK(ids, both[:, :-1], both[:, -1], temperature)

    return [
        Kept(f"DistillKit {loss}{basis}", f"DistillKit {codec.name}{basis}, {loss}", size, signal)
        for loss, signal in (("own loss", own), ("with tail", with_tail))
    ]


def worth_normalising(codec: Codec, top: TopK, vocabulary_size: int) -> bool:
    """Whether a normalised basis fits another curve: where it does not, one row says both."""
    ids, logprobs = top.ids[:, : codec.k], top.logprobs[:, : codec.k]
    fitted = [
        each.decode(each.encode(ids, logprobs, vocabulary_size), vocabulary_size)[1]
        for each in (codec, replace(codec, normalised=True))
    ]
    return float((fitted[0] - fitted[1]).abs().max()) > SAME_FIT


def top_of(teacher: LazyLogits, k: int) -> TopK:
    """The teacher's top-k at temperature 1, a part of the rows at a time."""
    parts = [
        TopK.from_logits(teacher.rows(slice(start, start + 128)).logits(), k)
        for start in range(0, len(teacher.hidden), 128)
    ]
    return TopK(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.tail_logprob for part in parts]),
    )


def our_forms(temperature: float) -> list[tuple[str, dict[str, Any]]]:
    """Families and settings of limbeck's forms."""
    further = [1.0] if temperature == 1 else [1.0, temperature]
    draws = (25, 50, 100, 200) if temperature == 1 else (50, 100, 200, 400)
    told: list[tuple[str, dict[str, Any]]] = [
        ("top-k with tail", {"type": "top_k", "k": k, "temperatures": further})
        for k in (16, 32, 64, 128, 256)
    ]
    told += [
        (
            "probable enough with tail",
            {"type": "top_k", "k": 4096, "min_prob": least, "temperatures": further},
        )
        for least in (2e-3, 1e-3, 5e-4, 2e-4, 1.25e-4, 5e-5)
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
        for n in draws[1:2]
    ]
    told += [
        (
            "top-k and sampled tail",
            {"type": "top_k_samples", "k": k, "num_draws": 8, "temperature": temperature},
        )
        for k in (16,)
    ]
    told += [("hidden states", {"type": "hidden", "precision": p}) for p in ("int8", "float16")]
    return told


def all_kept(
    samples: Sampled, temperature: float, folder: Path, families: Collection[str] = ()
) -> list[Kept]:
    """Everything that is compared at a temperature, or some of limbeck's families only."""
    if families:
        chosen = [each for each in our_forms(temperature) if each[0] in families]
        return stored(chosen, samples, folder)
    told = stored(our_forms(temperature), samples, folder)
    tops = [top_of(teacher, max(codec.k for codec in PUBLISHED)) for _, teacher in samples]
    vocabulary_size = len(samples[0][1].head.weight)
    told.append(renormalised_top(tops, 32, temperature))
    for codec in PUBLISHED:
        told += distillkit(tops, codec, vocabulary_size, temperature)
        if worth_normalising(codec, tops[0], vocabulary_size):
            repaired = replace(codec, normalised=True)
            told += distillkit(tops, repaired, vocabulary_size, temperature)
    return told


def gradient_of(
    distribution: TeacherDistribution, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Forward KL of each token, and its gradient at the student's logits."""
    leaf = logits.detach().requires_grad_()
    pair = distribution.compare(leaf, temperature)
    each = (pair.teacher.exp() * (pair.teacher - pair.student)).sum(-1)
    (gradient,) = torch.autograd.grad(each.sum(), leaf)
    each = each.detach()
    if isinstance(distribution, DrawnTokens):
        each = each + distribution.correction()
    return each, gradient
