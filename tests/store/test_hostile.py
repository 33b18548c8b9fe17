"""A store from a stranger is read, or refused with a DataError; it never crashes or hangs."""

import copy
import hashlib
import json
import os
import shutil
from contextlib import suppress

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.errors import DataError
from limbeck.files import MANIFEST, manifest, seal, sealed_manifest
from limbeck.store import Store, read_header, shard_facts, verify
from limbeck.store.header import HEADER
from limbeck.store.shard import DATA, INDEX, SCHEMA
from tests.store.small_store import header, write

FORM = {"type": "top_k", "k": 6}
SHARD = "shard-00000"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=6,
)


def sealed(body):
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def reseal(shard, change):
    """Change a shard's files, and write a manifest that fits them."""
    facts = sealed_manifest(shard)
    change(shard)
    (shard / MANIFEST).unlink()
    seal(shard, {name: value for name, value in facts.items() if name != "files"})


def use(path):
    """Open a store, read all of it, and verify it."""
    store = Store.open(path)
    for key in store.keys():  # noqa: SIM118
        store.read(key)
    verify(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write(folder, header(FORM), seeds=range(3))
    return folder


def paths_of(value, path=()):
    """The path of every value inside a JSON value."""
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    return [path, *(p for name, child in children for p in paths_of(child, (*path, name)))]


def replaced(value, path, new):
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), file=st.sampled_from([HEADER, f"{SHARD}/{MANIFEST}"]))
def test_json_of_other_types_raises_nothing_but_a_data_error(data, file, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "store"
    shutil.copytree(whole, folder)
    facts = json.loads((whole / file).read_text().split("\n")[0])
    path = data.draw(st.sampled_from(paths_of(facts)))
    (folder / file).write_text(sealed(json.dumps(replaced(facts, path, data.draw(JSON)))))
    for function in (use, verify, lambda path: shard_facts(path, 0)):
        with suppress(DataError):
            function(folder)
    shutil.rmtree(folder.parent)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_index_raises_nothing_but_a_data_error(data, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "store"
    shutil.copytree(whole, folder)

    def change(shard):
        index = bytearray((shard / INDEX).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
        (shard / INDEX).write_bytes(index)

    reseal(folder / SHARD, change)
    for function in (use, verify):
        with suppress(DataError):
            function(folder)
    shutil.rmtree(folder.parent)


def test_an_index_that_names_a_row_twice_is_refused(tmp_path):
    write(tmp_path, header(FORM))

    def repeat(shard):
        index = np.fromfile(shard / INDEX, "<u4")
        index[-2:] = 0
        index.tofile(shard / INDEX)

    reseal(tmp_path / SHARD, repeat)
    with pytest.raises(DataError, match="must name each of 6 rows once"):
        Store.open(tmp_path)
    assert "must name each of 6 rows once" in str(verify(tmp_path)[0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1]", "it is not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"form":' + "[" * 200 + "]" * 200 + "}", "nested more than 32 levels deep"),
    ],
)
def test_a_header_that_is_no_plain_object_is_refused(body, message, tmp_path):
    text = sealed(body)
    (tmp_path / HEADER).write_text(text)
    with pytest.raises(DataError, match=message):
        read_header(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    assert manifest(tmp_path) is None


@pytest.mark.timeout(60)
def test_a_fifo_is_refused_and_does_not_hang(tmp_path):
    write(tmp_path / "store", header(FORM))
    shard = tmp_path / "store" / SHARD
    os.mkfifo(shard / "pipe")
    assert "not those of its manifest" in str(verify(tmp_path / "store")[0])
    (shard / "pipe").unlink()
    for file in (DATA, INDEX, MANIFEST):
        (shard / file).rename(tmp_path / "kept")
        os.mkfifo(shard / file)
        assert manifest(shard) is None
        with pytest.raises(DataError):
            Store.open(tmp_path / "store")
        (shard / file).unlink()
        (tmp_path / "kept").rename(shard / file)
    (tmp_path / "store" / HEADER).unlink()
    os.mkfifo(tmp_path / "store" / HEADER)
    with pytest.raises(DataError, match="it is not a regular file"):
        read_header(tmp_path / "store")


@pytest.mark.parametrize("name", [DATA, INDEX, MANIFEST])
def test_a_link_to_nowhere_is_refused(name, tmp_path):
    write(tmp_path, header(FORM))
    (tmp_path / SHARD / name).unlink()
    (tmp_path / SHARD / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError):
        Store.open(tmp_path)
    assert verify(tmp_path)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tokens", pyarrow.array([None] * 6, SCHEMA.field("tokens").type)),
        ("scored", pyarrow.array([[True]] * 6, SCHEMA.field("scored").type)),
        ("tokens", pyarrow.array(["a"] * 6)),
        ("key", pyarrow.array([b"0" * 16] * 6, pyarrow.binary(16))),
    ],
)
def test_parquet_rows_of_other_shapes_are_damage(column, values, tmp_path):
    from limbeck.store.maintenance import bad_tokens
    from limbeck.store.shard import Shard

    told = header(FORM)
    write(tmp_path, told)
    shard = Shard.open(tmp_path, 0, told)
    table = pyarrow.parquet.read_table(shard.path / DATA)
    table = table.set_column(table.column_names.index(column), column, values)
    pyarrow.parquet.write_table(table, shard.path / DATA)
    try:
        texts = list(bad_tokens(shard, told))
    except (ValueError, pyarrow.ArrowException) as error:
        texts = [str(error)]
    assert bool(texts) == (column != "key"), texts
