"""A recording is resumed and merged whatever does not change its numbers."""

import shutil

import pytest

from limbeck.errors import DataError
from limbeck.store import ShardWriter, Store, create, merge, verify
from tests.store.small_store import header, write

FORM = {"type": "top_k", "k": 6}
TEACHER = {"name": "a", "revision": "r", "weights_sha256": "w", "dtype": "bfloat16"}
SAME = [{"limbeck": "9.9"}, {"teacher": TEACHER | {"name": "/b"}}]
SAME.append({"teacher": TEACHER | {"revision": None}})
OTHER = [
    ("teacher.weights_sha256", {"teacher": TEACHER | {"weights_sha256": "x"}}),
    ("teacher.dtype", {"teacher": TEACHER | {"dtype": "float32"}}),
    ("teacher.dtype", {"teacher": {k: v for k, v in TEACHER.items() if k != "dtype"}}),
    ("tokenizer", {"tokenizer": "x"}),
    ("template", {"template": "x"}),
    ("data", {"data": "x"}),
    ("form.k", {"form": FORM | {"k": 7}}),
    ("seed", {"seed": 1}),
    ("sequence_length", {"sequence_length": 65}),
    ("layers", {"layers": (1,)}),
]


def recorded_by(**changes):
    settings = {"limbeck": "1.0", "teacher": TEACHER, "num_shards": 2}
    return header(**({"form": FORM} | settings | changes))


@pytest.mark.parametrize("change", SAME, ids=str)
def test_a_store_of_another_version_or_path_resumes_and_merges(change, tmp_path):
    write(tmp_path / "whole", recorded_by())
    write(tmp_path / "other", recorded_by(**change))
    shutil.copytree(tmp_path / "whole", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "shard-00001")
    create(tmp_path / "store", recorded_by(**change))
    with ShardWriter(tmp_path / "resumed", 1, recorded_by(**change)):
        pass
    shutil.copytree(tmp_path / "other" / "shard-00001", tmp_path / "store" / "shard-00001")
    assert len(list(Store.open(tmp_path / "store").keys())) == 6
    assert verify(tmp_path / "store") == []
    shutil.rmtree(tmp_path / "whole" / "shard-00000")
    merge([tmp_path / "whole", tmp_path / "other"], tmp_path / "merged")
    assert verify(tmp_path / "merged") == []
    assert len(list(Store.open(tmp_path / "merged").keys())) == 6


@pytest.mark.parametrize(("field", "change"), OTHER, ids=str)
def test_other_weights_or_options_neither_resume_nor_merge(field, change, tmp_path):
    create(tmp_path / "a", recorded_by())
    create(tmp_path / "b", recorded_by(**change))
    for first, second in ((recorded_by(), "b"), (recorded_by(**change), "a")):
        with pytest.raises(DataError, match=rf"recorded from something else.*{field}: "):
            create(tmp_path / second, first)
    with pytest.raises(DataError, match=rf"differs: .*{field}: "):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_shards_of_earlier_releases_are_read(tmp_path):
    """They name a hash of the whole header."""
    import hashlib
    import json

    from limbeck.files import MANIFEST, seal, sealed_manifest

    told = recorded_by(num_shards=1)
    write(tmp_path, told)
    shard = tmp_path / "shard-00000"
    facts = sealed_manifest(shard)
    body = json.dumps(told.to_json(), sort_keys=True)
    facts["header"] = hashlib.sha256(body.encode()).hexdigest()
    (shard / MANIFEST).unlink()
    seal(shard, {name: value for name, value in facts.items() if name != "files"})
    assert verify(tmp_path) == []
