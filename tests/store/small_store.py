"""A small store, and what it was made from."""

import numpy as np
import torch

from limbeck.losses import Head
from limbeck.losses.distributions import LazyLogits
from limbeck.store import Sample, ShardWriter, StoreHeader, generator_of, write_head

VOCABULARY, WIDTH = 300, 16


def header(form, num_shards=1, **more):
    settings = {"vocabulary_size": VOCABULARY, "sequence_length": 64, "teacher": {"name": "t"}}
    return StoreHeader(form=form, num_shards=num_shards, **(settings | more))


def sample(seed, length=20, vocabulary=VOCABULARY):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(vocabulary, size=length + 1).astype(np.int32)
    scored = draw.random(length) < 0.7
    scored[-1] = True
    return Sample(tokens, scored)


def teacher_at(sample, vocabulary=VOCABULARY, width=WIDTH):
    """A teacher: hidden states that follow from the tokens, and a head that is always the same."""
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(7))
    weight *= torch.linspace(2, 0.2, vocabulary)[:, None]
    source = torch.Generator().manual_seed(int(sample.tokens.astype(np.int64).sum()))
    hidden = torch.randn(sample.num_scored, width, generator=source)
    return LazyLogits(hidden, Head(weight, torch.zeros(vocabulary)))


def write(folder, told, seeds=range(6), **sizes):
    """Write the samples of all seeds, in turn to each shard; the samples."""
    form = told.make_form()
    samples = [sample(seed, 12 + seed % 9, told.vocabulary_size) for seed in seeds]
    for shard in range(told.num_shards):
        with ShardWriter(folder, shard, told) as writer:
            for each in samples[shard :: told.num_shards]:
                teacher = teacher_at(each, told.vocabulary_size, **sizes)
                signal = form.read_teacher(teacher, generator_of(told.seed, each.key))
                layers = {layer: teacher.hidden * (layer + 1) for layer in told.layers}
                writer.add(each, signal, layers)
    if form.needs_head:
        write_head(folder, teacher_at(samples[0], told.vocabulary_size, **sizes).head)
    return samples
