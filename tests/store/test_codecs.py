"""Codes come back: ids exactly, for any vocabulary; numbers within the error that is stated."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import ConfigError, DataError
from limbeck.losses.distributions import FLOOR, DenseLogits, Samples, TopK, TopKSamples, UnevenTopK
from limbeck.losses.divergences import divergences
from limbeck.store import forms, hidden_states, quantization
from limbeck.store.byte_planes import Unpacker, num_bytes, pack
from limbeck.store.token_ranks import TokenRanks

VOCABULARIES = [40, 256, 257, 49152, 65536, 65537, 151936, 262144]


def logits_over(vocabulary, rows=9, scale=3.0):
    return scale * torch.randn(rows, vocabulary) + torch.linspace(3, -3, vocabulary)


def there_and_back(spec, logits):
    """What a form read, and what its bytes say of it."""
    vocabulary = logits.shape[-1]
    form = forms.bind(spec, "form")(vocabulary)
    read = form.read_teacher(DenseLogits(logits), torch.Generator().manual_seed(1))
    ranks = TokenRanks.from_ids([form.ids_of(read.rows(slice(0, 3)))], vocabulary)
    ranks = TokenRanks.from_bytes(ranks.to_bytes(), vocabulary)
    return read, form.decode(memoryview(form.encode(read, ranks)), len(logits), ranks)


def sorted_by_id(ids, values):
    order = ids.argsort(-1)
    return ids.gather(-1, order), values.gather(-1, order)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_top_k_ids_are_exact_and_log_probabilities_within_their_bound(vocabulary):
    spec = {"type": "top_k", "k": 16, "temperatures": [1.0, 2.0, 0.5]}
    read, back = there_and_back(spec, logits_over(vocabulary))
    ids, logprobs = sorted_by_id(read.ids, read.logprobs)
    same_ids, decoded = sorted_by_id(back.ids, back.logprobs)
    assert torch.equal(ids, same_ids)
    known = logprobs > quantization.LOWEST
    assert (decoded - logprobs)[known].abs().max() <= 2 * quantization.LOG_ERROR
    for temperature, tail in [(1.0, read.tail_logprob), *read.further_tails.items()]:
        stored = back.tail_logprob if temperature == 1.0 else back.further_tails[temperature]
        assert ((tail / 2).exp() - (stored / 2).exp()).abs().max() < 1e-5
        torch.testing.assert_close(back.at(temperature).exp().sum(-1), torch.ones(len(tail)))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("least", [1e-9, 0.01, 0.9])
def test_tokens_that_are_probable_enough_come_back(vocabulary, least):
    spec = {"type": "top_k", "k": 30, "min_prob": least, "temperatures": [1.0, 2.0]}
    read, back = there_and_back(spec, logits_over(vocabulary))
    assert isinstance(back, UnevenTopK)
    assert torch.equal(kept_ids(read, vocabulary), kept_ids(back, vocabulary))
    assert bool(((read.logprobs >= math.log(least)) | ~read.kept)[:, 1:].all())
    for temperature in (1.0, 2.0):
        both = back.at(temperature)
        torch.testing.assert_close(both.exp().sum(-1), torch.ones(9))
    halves = [back.rows(slice(0, 4)), back.rows(slice(4, 9))]
    narrow = dataclasses.replace(
        halves[0],
        ids=halves[0].ids[:, :1],
        kept=halves[0].kept[:, :1],
        logprobs=halves[0].logprobs[:, :1],
    )
    joined = type(narrow).cat([narrow, halves[1]])
    assert torch.equal(kept_ids(joined, vocabulary)[4:], kept_ids(back, vocabulary)[4:])
    assert torch.equal(joined.at(1.0)[4:].exp().sum(-1), both_sum(halves[1]))


def both_sum(signal):
    return signal.at(1.0).exp().sum(-1)


def kept_ids(signal, vocabulary):
    return torch.zeros(len(signal.ids), vocabulary).bool().scatter(-1, signal.ids, True)


@pytest.mark.parametrize("spec", [{"k": 32}, {"k": 256}, {"k": 1000, "min_prob": 0.0005}])
@pytest.mark.parametrize("apart", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])
def test_stored_top_k_bounds_the_dense_divergence_up_to_its_rounding(spec, apart, scale):
    """1e-5 nats for each token kept, where the student is the teacher and the dense one is 0."""
    draw = torch.Generator().manual_seed(2)
    logits = scale * torch.randn(100, 2000, generator=draw)
    student = logits + apart * torch.randn(logits.shape, generator=draw)
    read, back = there_and_back({"type": "top_k", **spec}, logits)
    stored, dense = back.compare(student, 1.0), DenseLogits(logits).compare(student, 1.0)
    kept = float((read.compare(student, 1.0).teacher > FLOOR).sum(-1).float().mean())
    rounding = {"total_variation": kept**0.5 / 448}
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation"):
        divergence = divergences.bind(name, "divergence")
        low, high = (divergence(pair.student, pair.teacher).mean() for pair in (stored, dense))
        assert low <= high + rounding.get(name, 1e-5 * kept), name


def test_a_certain_teacher_keeps_finite_numbers():
    logits = torch.zeros(3, 50)
    logits[:, 7] = 1e5
    _, back = there_and_back({"type": "top_k", "k": 4, "temperatures": [1.0, 2.0]}, logits)
    for temperature in (1.0, 2.0):
        both = back.at(temperature)
        assert bool(both.isfinite().all())
        torch.testing.assert_close(both.exp().sum(-1), torch.ones(3))
        torch.testing.assert_close(both.exp().amax(-1), torch.ones(3), atol=1e-4, rtol=0)
    flat = torch.zeros(2, 50)
    _, back = there_and_back({"type": "top_k", "k": 49}, flat)
    torch.testing.assert_close(back.tail_logprob.exp(), torch.full((2,), 1 / 50), atol=1e-5, rtol=0)


@given(st.floats(-25.5, 0))
def test_a_level_is_within_both_stated_errors(logprob):
    exact = np.array([logprob], np.float32)
    (level,) = quantization.from_levels(quantization.to_levels(exact))
    assert abs(level - exact[0]) <= quantization.LOG_ERROR + 1e-5
    assert abs(np.exp(level / 2) - np.exp(exact[0] / 2)) <= quantization.SQRT_ERROR + 1e-6


@given(st.lists(st.floats(math.log(1e-4), 0), max_size=9), st.floats(1e-9, 1))
def test_a_part_of_a_level_is_within_its_stated_error(logprobs, least):
    exact = np.array(logprobs, np.float32)
    told = quantization.to_levels(exact)
    fine = told >= quantization.first_fine_level(least)
    assert (
        quantization.LEVELS[told[fine]] >= math.log(quantization.FINE_RATIO * least) - 1e-5
    ).all()
    assert fine[exact > math.log(quantization.FINE_RATIO * least) + 0.5].all() or least < 1e-5
    packed = quantization.to_sixteenths(exact[fine], told[fine])
    assert len(packed) == -(-int(fine.sum()) // 2)
    roots = np.exp(quantization.from_sixteenths(told[fine], packed).astype(np.float64) / 2)
    assert np.abs(roots - np.exp(exact[fine].astype(np.float64) / 2)).max(initial=0) <= (
        quantization.SIXTEENTH_ERROR + 1e-6
    )
    assert roots.max(initial=0) <= 1


def test_with_min_prob_large_probabilities_have_more_bits():
    logits = logits_over(2000)
    errors = {}
    for least in (1e-4, 0.0):
        read, back = there_and_back({"type": "top_k", "k": 200, "min_prob": least}, logits)
        ids = read.ids[:, :1]
        assert torch.equal(read.ids[:, 0], logits.argmax(-1))
        stored = torch.where(back.ids == ids, back.logprobs, -math.inf).amax(-1)
        errors[least] = ((stored / 2).exp() - (read.logprobs[:, 0] / 2).exp()).abs().mean()
    assert errors[1e-4] < errors[0.0] / 3


def test_levels_are_ascending_and_their_own_nearest():
    assert (np.diff(quantization.LEVELS) > 0).all()
    assert np.array_equal(quantization.to_levels(quantization.LEVELS), np.arange(256))
    assert quantization.LEVELS[-1] == 0
    assert (
        quantization.from_levels(
            quantization.to_levels(np.array([-1e4, -40.0], np.float32))
        ).tolist()
        == [np.float32(quantization.LOWEST)] * 2
    )


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("draw", ["systematic", "multinomial"])
@pytest.mark.parametrize("num_draws", [1, 50, 300])
def test_samples_come_back_exactly(vocabulary, draw, num_draws):
    spec = {"type": "samples", "num_draws": num_draws, "draw": draw, "temperature": 2.0}
    read, back = there_and_back(spec, logits_over(vocabulary, rows=4))
    assert isinstance(back, Samples)
    for before, after in zip(counted(read, vocabulary), counted(back, vocabulary), strict=True):
        assert torch.equal(before, after)
    assert (back.entropy_nats - read.entropy_nats).abs().max() <= 1 / 8192 + 1e-5
    assert back.temperature == 2.0


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_top_tokens_and_draws_come_back(vocabulary):
    spec = {"type": "top_k_samples", "k": 6, "num_draws": 20, "temperature": 2.0}
    read, back = there_and_back(spec, logits_over(vocabulary, rows=4))
    assert isinstance(back, TopKSamples)
    dense = [
        torch.zeros(4, vocabulary).scatter_add(-1, s.tokens(), s.estimates()) for s in (read, back)
    ]
    # What the tail's rounding takes from a small rest is shared by the tokens kept.
    torch.testing.assert_close(dense[1].sqrt(), dense[0].sqrt(), atol=1e-4, rtol=0)
    torch.testing.assert_close(back.estimates().sum(-1), torch.ones(4))
    assert (back.entropy_nats - read.entropy_nats).abs().max() <= 1 / 8192 + 1e-5


def counted(samples, vocabulary):
    return (
        torch.zeros(len(samples.ids), vocabulary)
        .long()
        .scatter_add(-1, samples.ids, samples.counts)
    )


@pytest.mark.parametrize("large", [131071, 131072, 151645, 262143])
def test_token_ids_above_17_bits_are_exact(large):
    logits = torch.zeros(2, 262144)
    logits[:, large] = 30
    _, back = there_and_back({"type": "top_k", "k": 3}, logits)
    assert bool((back.ids == large).any(-1).all())
    assert num_bytes(65536) == 2
    assert num_bytes(65537) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 64, 100])
def test_exact_states_come_back_bit_by_bit(dtype, width):
    hidden = torch.randn(7, width).to(dtype) * 40
    back = hidden_states.decode(memoryview(hidden_states.encode(hidden, "exact")), 7)
    assert back.dtype == dtype
    assert torch.equal(back, hidden)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("width", [1, 64, 100])
def test_int8_states_are_within_half_a_step_of_their_group(scale, width):
    hidden = torch.randn(7, width) * scale
    hidden[0] = 0
    back = hidden_states.decode(memoryview(hidden_states.encode(hidden, "int8")), 7)
    for start in range(0, width, hidden_states.GROUP):
        group, decoded = (each[:, start : start + hidden_states.GROUP] for each in (hidden, back))
        step = group.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-10) + 2**-24
        assert ((group - decoded).abs() <= step / 2 * 1.001).all()


def test_states_in_float16_are_rounded_to_it():
    hidden = torch.randn(5, 8)
    back = hidden_states.decode(memoryview(hidden_states.encode(hidden, "float16")), 5)
    assert torch.equal(back, hidden.half())


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="must be finite to be stored"):
        hidden_states.encode(torch.tensor([[float("nan")]]), "exact")
    with pytest.raises(DataError, match=r"up to 1e\+05 do not fit float16.*Set precision to exact"):
        hidden_states.encode(torch.tensor([[1e5]]), "float16")
    with pytest.raises(DataError, match=r"do not fit int8.*Set precision to exact"):
        hidden_states.encode(torch.tensor([[1e9]]), "int8")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 40))
def test_any_bytes_are_decoded_or_refused(told, num_scored):
    """A crafted record may carry a right checksum; its bytes must still do no harm."""
    ranks = TokenRanks(np.empty(0, np.int32), 300)
    specs = [{"type": "top_k", "k": 3}, {"type": "samples", "num_draws": 5}]
    specs.append({"type": "top_k", "k": 3, "min_prob": 0.1})
    for spec in [*specs, {"type": "top_k_samples", "k": 3}]:
        with pytest.raises(DataError):
            forms.bind(spec, "form")(300).decode(memoryview(b"\1" + told), num_scored, ranks)
    with pytest.raises(DataError):
        hidden_states.decode(memoryview(b"\0\0\0\0" + told), num_scored)


def bomb(size):
    return pack([np.zeros(size, np.uint8)])


def test_a_plane_that_grows_beyond_its_size_is_refused():
    with pytest.raises(DataError, match="cannot be decompressed"):
        Unpacker(bomb(50_000_000)).next(100)
    with pytest.raises(DataError, match="cannot be decompressed"):
        Unpacker(bomb(10)).next(20)
    with pytest.raises(DataError, match="more than 268,435,456"):
        Unpacker(bomb(10)).next(1 << 40)


def test_ids_beyond_the_vocabulary_and_wrong_counts_are_refused():
    one = np.array([255], np.uint8)
    ranks = TokenRanks(np.empty(0, np.int32), 300)
    top = forms.bind({"type": "top_k", "k": 1}, "form")(300)
    zero = np.array([0], np.uint8)
    with pytest.raises(DataError, match="beyond the 300 of its vocabulary"):
        top.decode(memoryview(pack([one, one, one, zero.repeat(2)])), 1, ranks)
    drawn = forms.bind({"type": "samples", "num_draws": 5}, "form")(300)
    with pytest.raises(DataError, match="do not add up to its 5 draws"):
        drawn.decode(memoryview(pack([zero, zero, zero, zero, zero, zero])), 1, ranks)
    with pytest.raises(DataError, match="has 256 different tokens, more than 5"):
        drawn.decode(memoryview(pack([one, zero, zero, zero, zero, zero])), 1, ranks)


def test_a_table_of_ranks_must_be_a_bijection():
    for wrong in ([300], [5, 5]):
        told = TokenRanks(np.array(wrong, np.int32), 512).to_bytes()
        with pytest.raises(DataError, match="different ids of the vocabulary"):
            TokenRanks.from_bytes(told, 300)
    with pytest.raises(DataError, match="cannot have 3 bytes"):
        TokenRanks.from_bytes(b"abc", 300)
    with pytest.raises(DataError, match="ranks 16,909,060 tokens of 300"):
        TokenRanks.from_bytes(b"\4\3\2\1", 300)


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="less than the teacher's 300 tokens, got 300"):
        forms.bind({"type": "top_k", "k": 300}, "form")(300)
    with pytest.raises(ConfigError, match=r"must be different, got \[1.0, 1.0\]"):
        forms.bind({"type": "top_k", "temperatures": [1.0, 1.0]}, "form")(300)
    hidden = forms.bind({"type": "hidden"}, "form")(300)
    with pytest.raises(ConfigError, match="this teacher does not give them"):
        hidden.read_teacher(DenseLogits(torch.zeros(1, 300)), torch.Generator())


def test_rows_sum_to_one_after_decoding():
    _, back = there_and_back({"type": "top_k", "k": 128}, logits_over(49152))
    assert isinstance(back, TopK)
    torch.testing.assert_close(back.at(1.0).exp().sum(-1), torch.ones(9))
    assert bool((back.logprobs >= FLOOR).all())
