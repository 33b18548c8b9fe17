"""No flipped bit, cut or planted file is ever used; what must be recorded again is named."""

import multiprocessing
import random
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch

from limbeck.errors import ConfigError, DataError, StorageError
from limbeck.files import MANIFEST, seal, sealed_manifest
from limbeck.store import (
    TOKENIZER,
    Store,
    absent_shards,
    merge,
    publish_once,
    repair,
    verify,
    writer,
)
from limbeck.store.header import HEADER
from limbeck.store.shard import DATA
from tests.store.small_store import header, write

FORMS = [{"type": "top_k", "k": 6}, {"type": "samples", "num_draws": 9}, {"type": "hidden"}]
FORMS.append({"type": "top_k_samples", "k": 3, "num_draws": 7})


def contents(path):
    """All that a reader sees of a store."""
    store = Store.open(path)
    told = [store.header.to_json()]
    for key in store.keys():  # noqa: SIM118
        record = store.read(key)
        student = torch.zeros(record.num_scored, 300)
        pair = record.signal.compare(student, 1.0)
        told.append((key, pair.teacher.tolist(), [v.tolist() for v in record.layers.values()]))
    return told


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["type"])
def test_none_of_200_damaged_records_is_used(form, tmp_path):
    whole = tmp_path / "whole"
    write(whole, header(form, num_shards=2, layers=(0,)), seeds=range(4))
    expected = contents(whole)
    files = [
        p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file() and p.stat().st_size
    ]
    draw = random.Random(5)
    found = 0
    for trial in range(200):
        broken = tmp_path / "broken"
        shutil.copytree(whole, broken)
        file = broken / draw.choice(files)
        body = bytearray(file.read_bytes())
        place = draw.randrange(len(body))
        if trial % 4 == 0:
            body = body[:place]
        else:
            body[place] ^= 1 << draw.randrange(8)
        file.write_bytes(body)
        told = refusal(lambda store: assert_equal(contents(store), expected), broken)
        found += told is not None
        assert told is None or str(broken) in told
        assert refusal(assert_damaged, broken) is None or file.name == HEADER
        shutil.rmtree(broken)
    assert found > 100


def refusal(use, store):
    """What a store says when it is used, if it refuses."""
    try:
        use(store)
    except DataError as error:
        return str(error)
    return None


def assert_equal(found, expected):
    assert found == expected  # the damage is in a part that no reader looks at


def assert_damaged(store):
    assert verify(store)


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path):
    write(tmp_path, header(FORMS[0], num_shards=2))
    store = Store.open(tmp_path)
    key = next(iter(store.keys()))
    damaged = flip_record(store, key)
    store = Store.open(tmp_path)
    told = rf"{damaged}.*byte [\d,]+, sample {key.hex()}: the record's checksum does not match"
    with pytest.raises(DataError, match=told):
        store.read(key)
    for other in list(store.keys())[1:]:
        store.read(other)
    (found,) = verify(tmp_path)
    assert str(damaged) in found.location
    assert key.hex() in found.text


def flip_record(store, key):
    """Damage one record; the file it is in."""
    at = store._find(key)
    shard, place = store._shards[store._shard_of[at]], store._entry_of[at]
    path = shard.path / DATA
    body = bytearray(path.read_bytes())
    body[int(shard.index.offsets[place]) + 40] ^= 4
    path.write_bytes(body)
    return path


def test_repair_names_the_shard_and_recording_it_again_makes_the_store_whole(tmp_path):
    told = header(FORMS[0], num_shards=2)
    write(tmp_path / "whole", told)
    shutil.copytree(tmp_path / "whole", tmp_path / "store")
    flip_record(Store.open(tmp_path / "store"), next(iter(Store.open(tmp_path / "store").keys())))
    assert len({damage.part for damage in repair(tmp_path / "store")}) == 1
    assert any(p.name.startswith("damaged-shard-") for p in (tmp_path / "store").iterdir())
    with pytest.raises(DataError, match="1 are missing or damaged"):
        Store.open(tmp_path / "store")
    merge([tmp_path / "whole"], tmp_path / "store")
    assert verify(tmp_path / "store") == []
    assert repair(tmp_path / "store") == []
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_parts_recorded_apart_merge_into_one_store(tmp_path):
    told = header(FORMS[2], num_shards=3)
    write(tmp_path / "whole", told)
    for part, shards in (("a", [0, 2]), ("b", [1, 2])):
        shutil.copytree(tmp_path / "whole", tmp_path / part)
        for shard in set(range(3)) - set(shards):
            shutil.rmtree(tmp_path / part / f"shard-0000{shard}")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_of_other_recordings_do_not_merge(tmp_path):
    write(tmp_path / "a", header(FORMS[0]))
    write(tmp_path / "b", header(FORMS[0], seed=3))
    with pytest.raises(DataError, match="differs: seed: 3 in the store, 0 wanted"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    write(tmp_path / "c", header(FORMS[0]), seeds=[9])
    with pytest.raises(DataError, match="must be the same, and differ"):
        merge([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    shard = tmp_path / "c" / "shard-00000" / DATA
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="must be whole to be merged, and is damaged"):
        merge([tmp_path / "c"], tmp_path / "out2")


def test_a_shard_of_another_store_is_refused(tmp_path):
    write(tmp_path / "a", header(FORMS[0]))
    write(tmp_path / "b", header(FORMS[0], seed=3))
    shutil.rmtree(tmp_path / "a" / "shard-00000")
    shutil.copytree(tmp_path / "b" / "shard-00000", tmp_path / "a" / "shard-00000")
    with pytest.raises(DataError, match="it belongs to another recording"):
        Store.open(tmp_path / "a")


def test_a_link_and_a_stray_file_are_found(tmp_path):
    write(tmp_path / "a", header(FORMS[0]))
    data = tmp_path / "a" / "shard-00000" / DATA
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="must be a file, and is a link"):
        Store.open(tmp_path / "a")
    data.unlink()
    (tmp_path / "elsewhere").rename(data)
    (data.parent / "stray").touch()
    assert "not those of its manifest" in str(verify(tmp_path / "a")[0])


def test_a_missing_head_is_named(tmp_path):
    write(tmp_path, header(FORMS[2]))
    shutil.rmtree(tmp_path / "head")
    with pytest.raises(DataError, match="must have the teacher's head"):
        Store.open(tmp_path)
    (found,) = verify(tmp_path)
    assert str(found).startswith("the head: ")


def test_a_damaged_tokenizer_is_detected_renamed_and_copied_from_another_part(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, header(FORMS[0]))
        publish_once(tmp_path / name / TOKENIZER, lambda f: (f / "t.json").write_text("{}"))
    (tmp_path / "a" / TOKENIZER / "t.json").write_text("[]")
    (found,) = verify(tmp_path / "a")
    assert str(found).startswith("the tokenizer: ")
    with pytest.raises(DataError, match="must be as it was published, and is damaged"):
        publish_once(tmp_path / "a" / TOKENIZER, lambda f: None)
    assert repair(tmp_path / "a") == [found]
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "a")
    assert verify(tmp_path / "a") == []
    assert (tmp_path / "a" / TOKENIZER / "t.json").read_text() == "{}"


def test_a_store_is_not_mixed_with_other_files(tmp_path):
    write(tmp_path / "a", header(FORMS[0]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights").touch()
    with pytest.raises(ConfigError, match=r"other holds weights and no store\.json"):
        merge([tmp_path / "a"], tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["weights"]
    for place in (tmp_path / "other" / "weights", tmp_path / "other" / "weights" / "x"):
        with pytest.raises(StorageError, match="needs a folder that can be written"):
            merge([tmp_path / "a"], place)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("vocabulary_size", 0, "vocabulary_size must be from 1"),
        ("vocabulary_size", 2**40, "vocabulary_size must be from 1"),
        ("num_shards", -3, "num_shards must be from 1"),
        ("num_shards", 2**40, "num_shards must be from 1"),
        ("sequence_length", 2**40, "sequence_length must be from 1"),
        ("seed", 0.5, "seed"),
        ("form", {"type": "top_k", "k": 0}, "form.k"),
        ("form", {"type": "pickle"}, "no store form is called 'pickle'"),
        ("format", 1, "this limbeck reads 2"),
    ],
)
def test_a_hostile_header_is_refused(field, value, told, tmp_path):
    import hashlib
    import json

    write(tmp_path, header(FORMS[0]))
    facts = header(FORMS[0]).to_json() | {field: value}
    body = json.dumps(facts, sort_keys=True)
    stamp = hashlib.sha256(body.encode()).hexdigest()
    (tmp_path / HEADER).write_text(f"{body}\n{stamp}\n")
    with pytest.raises(DataError, match=rf"(?s){HEADER} must be a store's header.*{told}"):
        Store.open(tmp_path)


def resealed(shard, change):
    """Change a shard as somebody would who can write manifests."""
    facts = sealed_manifest(shard)
    change(shard, facts)
    (shard / MANIFEST).unlink()
    seal(shard, {name: value for name, value in facts.items() if name != "files"})


def negative(shard, facts):
    facts["samples"] = -1


def too_many(shard, facts):
    facts["samples"] = 2**40


def beyond(shard, facts):
    index = np.fromfile(shard / "index.bin", np.uint8)
    index[16 * facts["samples"] :] = 255
    index.tofile(shard / "index.bin")


def many_ranks(shard, facts):
    (shard / "ranks.bin").write_bytes(b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (negative, "must have 32 bytes for each of -1 records"),
        (too_many, "must have 32 bytes for each of 1,099,511,627,776 records"),
        (beyond, "names a record that lies beyond"),
        (many_ranks, "ranks 4,294,967,295 tokens of 300"),
    ],
)
def test_a_shard_with_hostile_sizes_is_refused(change, told, tmp_path):
    write(tmp_path, header(FORMS[0]))
    resealed(tmp_path / "shard-00000", change)
    with pytest.raises(DataError, match=told):
        Store.open(tmp_path)


def test_a_parquet_bomb_is_not_opened(tmp_path):
    write(tmp_path, header(FORMS[0]))

    def bomb(shard, facts):
        table = pyarrow.parquet.read_table(shard / DATA)
        zeros = pyarrow.array([np.zeros(20_000_000, np.int32)] * len(table), table.schema[1].type)
        table = table.set_column(1, table.schema[1], zeros)
        pyarrow.parquet.write_table(table, shard / DATA, compression="ZSTD", use_dictionary=False)

    resealed(tmp_path / "shard-00000", bomb)
    assert (tmp_path / "shard-00000" / DATA).stat().st_size < 1_000_000
    texts = [damage.text for damage in verify(tmp_path)]
    assert texts
    assert not any("Parquet cannot" in text for text in texts)


def test_processes_read_a_store_that_was_opened_before_them(tmp_path):
    samples = write(tmp_path, header(FORMS[0], num_shards=2), seeds=range(12))
    store = Store.open(tmp_path)
    keys = [each.key for each in samples]

    def read(part):
        for key in keys[part::2]:
            assert len(store.read(key).signal.ids) > 0

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=read, args=(part,)) for part in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


def test_a_folder_that_is_no_store_says_so(tmp_path):
    with pytest.raises(DataError, match=r"must be a store, but has no store\.json"):
        Store.open(tmp_path)
    (tmp_path / HEADER).write_bytes(b"x" * 2_000_000)
    with pytest.raises(DataError, match="2,000,000 bytes, at most"):
        Store.open(tmp_path)


def test_parquet_readers_see_the_keys_tokens_and_records(tmp_path):
    samples = write(tmp_path, header(FORMS[0]))
    table = pyarrow.parquet.read_table(tmp_path / "shard-00000" / DATA)
    assert table["key"].to_pylist() == [each.key for each in samples]
    assert table["tokens"].to_pylist() == [each.tokens.tolist() for each in samples]
    assert table["scored"].to_pylist() == [each.scored.tolist() for each in samples]
    facts = sealed_manifest(tmp_path / "shard-00000")
    assert sum(map(len, table["record"].to_pylist())) == facts["record_bytes"]
    assert facts["scored"] == sum(each.num_scored for each in samples)
    assert np.int32 == table["tokens"].type.value_type.to_pandas_dtype()


def test_hugging_face_datasets_opens_a_store(tmp_path, monkeypatch):
    import datasets

    samples = write(tmp_path / "store", header(FORMS[0], num_shards=2))
    files = str(tmp_path / "store" / "shard-*" / DATA)
    opened = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(opened["key"]) == sorted(each.key for each in samples)


def test_verify_tells_absent_shards_from_damaged_ones(tmp_path):
    told = header(FORMS[0], num_shards=3)
    write(tmp_path, told)
    shutil.rmtree(tmp_path / "shard-00001")
    assert verify(tmp_path) == []
    assert absent_shards(tmp_path, told) == [1]
    (tmp_path / "shard-00002" / MANIFEST).unlink()
    assert [damage.part for damage in verify(tmp_path)] == [2]
    assert absent_shards(tmp_path, told) == [1]


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (writer.COMPRESSION, "record", "ZSTD"),
        (writer.ONE_PAGE, "max_rows_per_page", 2),
    ],
    ids=["compressed", "several pages"],
)
def test_records_that_parquet_did_not_write_as_they_are_are_not_published(
    settings, name, value, tmp_path, monkeypatch
):
    monkeypatch.setitem(settings, name, value)
    with pytest.raises(StorageError, match="must hold each record in one piece"):
        write(tmp_path, header(FORMS[0]))
    assert [path.name for path in tmp_path.iterdir()] == [HEADER]


@pytest.mark.parametrize("group_bytes", [1, 3 << 20, writer.GROUP_BYTES])
def test_records_of_several_mebibytes_are_found_in_any_number_of_row_groups(
    group_bytes, tmp_path, monkeypatch
):
    """Parquet's own limit of a page is 1 MiB."""
    monkeypatch.setattr(writer, "GROUP_BYTES", group_bytes)
    write(tmp_path, header(FORMS[0], layers=(1, 4)), width=16_384)
    assert verify(tmp_path) == []
