"""What is written comes back, by its content, from any shard."""

import numpy as np
import pytest
import torch

from limbeck.errors import DataError
from limbeck.store import Sample, ShardWriter, Store, forms, generator_of
from limbeck.store.token_ranks import TokenRanks
from tests.store.small_store import header, sample, teacher_at, write

FORMS = [
    {"type": "top_k", "k": 8, "temperatures": [1.0, 2.0]},
    {"type": "top_k", "k": 20, "min_prob": 0.02},
    {"type": "samples", "num_draws": 20},
    {"type": "top_k_samples", "k": 4, "num_draws": 9},
    {"type": "hidden"},
]


def by_name(form):
    return "-".join(str(value) for value in form.values())


@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_every_sample_comes_back_from_any_shard(form, tmp_path):
    told = header(form, num_shards=3, layers=(1, 4))
    samples = write(tmp_path, told)
    store = Store.open(tmp_path)
    assert len(list(store.keys())) == len(samples)
    for each in reversed(samples):
        record = store.read(each.key)
        teacher = teacher_at(each)
        assert record.num_scored == each.num_scored
        assert torch.equal(record.layers[4], teacher.hidden * 5)
        assert store.read(each.key, {4, 7}).layers.keys() == {4}, "no others are decoded"
        signal = told.make_form().read_teacher(teacher, generator_of(0, each.key))
        student = torch.randn(each.num_scored, 300)
        ours, theirs = record.signal.compare(student, 1.0), signal.compare(student, 1.0)
        kl = [(p.teacher.exp() * (p.teacher - p.student)).sum(-1) for p in (ours, theirs)]
        torch.testing.assert_close(kl[0], kl[1], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_equal_recordings_are_equal_bytes(form, tmp_path):
    told = header(form, num_shards=2)
    write(tmp_path / "a", told)
    write(tmp_path / "b", told)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) >= 9
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_changed_sample_is_missing(tmp_path):
    (first, *_) = write(tmp_path, header(FORMS[0]))
    store = Store.open(tmp_path)
    tokens, scored = first.tokens.copy(), first.scored.copy()
    tokens[3] ^= 1
    scored[0] ^= True
    for other in (Sample(tokens, first.scored), Sample(first.tokens, scored)):
        assert other.key not in store
        with pytest.raises(DataError, match=f"has no sample {other.key.hex()}: the text, its tok"):
            store.read(other.key)


def test_several_samples_join_into_one_distribution(tmp_path):
    samples = write(tmp_path, header(FORMS[2]))
    store = Store.open(tmp_path)
    joined = store.distribution([each.key for each in samples])
    assert len(joined.entropy()) == sum(each.num_scored for each in samples)


def test_duplicate_samples_are_stored_once(tmp_path):
    told = header(FORMS[0])
    form, each = told.make_form(), sample(0)
    signal = form.read_teacher(teacher_at(each), generator_of(0, each.key))
    with ShardWriter(tmp_path, 0, told) as writer:
        assert writer.add(each, signal)
        assert not writer.add(each, signal)
    assert len(list(Store.open(tmp_path).keys())) == 1


def test_a_store_without_samples_opens(tmp_path):
    write(tmp_path, header(FORMS[0], num_shards=2), seeds=[0])
    assert len(list(Store.open(tmp_path).keys())) == 1


def test_a_missing_shard_is_named(tmp_path):
    with ShardWriter(tmp_path, 1, header(FORMS[0], num_shards=3)):
        pass
    with pytest.raises(DataError, match=r"3 shards, and 2 are missing or damaged: 0, 2\. Finish"):
        Store.open(tmp_path)


def test_another_recipe_does_not_resume_a_store(tmp_path):
    write(tmp_path, header(FORMS[0]))
    with pytest.raises(DataError, match=r"form\.k: 8 in the store, 9 wanted"):
        ShardWriter(tmp_path, 0, header(FORMS[0] | {"k": 9}))
    begun = header(FORMS[0], num_shards=2, teacher={"width": 1})
    with ShardWriter(tmp_path / "begun", 0, begun):
        pass
    # Equal in Python, but the shards' seals would differ.
    with pytest.raises(DataError, match=r"teacher\.width: 1 in the store, 1\.0 wanted"):
        ShardWriter(tmp_path / "begun", 1, header(FORMS[0], num_shards=2, teacher={"width": 1.0}))
    with pytest.raises(DataError, match="must not be there yet, and is"):
        ShardWriter(tmp_path, 0, header(FORMS[0]))


def test_a_failed_recording_leaves_no_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0, header(FORMS[0])):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["store.json"]


def test_samples_that_do_not_fit_are_refused(tmp_path):
    told = header(FORMS[0])
    signal = told.make_form().read_teacher(teacher_at(sample(0)), generator_of(0, b""))
    with ShardWriter(tmp_path, 0, told) as writer:
        with pytest.raises(DataError, match=r"at most 64 positions.*got 65"):
            writer.add(sample(0, 65), signal)
        alien = Sample(np.array([1, 300], np.int32), np.array([True]))
        with pytest.raises(DataError, match=r"from 0 to 299.*got 300"):
            writer.add(alien, signal)


def test_the_store_forms_are_registered():
    assert set(forms.names()) >= {"top_k", "samples", "hidden"}


@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_no_rows_are_read_encoded_and_decoded(form):
    told = header(form)
    each = Sample(np.arange(4, dtype=np.int32), np.zeros(3, bool))
    signal = told.make_form().read_teacher(teacher_at(each), generator_of(0, each.key))
    ranks = TokenRanks.from_ids([told.make_form().ids_of(signal)], 300)
    coded = told.make_form()
    if coded.needs_head:
        coded = coded.with_head(teacher_at(each).head)
    back = coded.decode(memoryview(coded.encode(signal, ranks)), 0, ranks)
    assert back.compare(torch.zeros(0, 300), 1.0).teacher.shape[0] == 0
