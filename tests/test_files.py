"""What is published is whole; what is not whole is not there."""

import json
import os
import resource
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.errors import StorageError
from limbeck.files import MANIFEST, manifest, publish, sweep, write_text


def fill(folder):
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("words")


def test_a_published_directory_carries_its_facts(tmp_path):
    publish(tmp_path / "x", fill, {"step": 7})
    found = manifest(tmp_path / "x")
    assert found is not None
    assert found["step"] == 7
    assert found["files"].keys() == {"a.bin", "sub/b.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_every_flipped_bit_and_truncation_is_detected(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip") / "x"
    publish(folder, fill, {"step": 7})
    name = data.draw(st.sampled_from(["a.bin", "sub/b.txt", MANIFEST]))
    raw = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw) * 8 - 1))
        raw[at // 8] ^= 1 << at % 8
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    (folder / name).write_bytes(raw)
    assert manifest(folder) is None


def test_extra_missing_and_linked_files_are_refused(tmp_path):
    for name, harm in {
        "extra": lambda f: (f / "stray").write_text(""),
        "missing": lambda f: (f / "a.bin").unlink(),
        "link": lambda f: ((f / "a.bin").rename(tmp_path / "b"), (f / "a.bin").symlink_to("../b")),
    }.items():
        publish(tmp_path / name, fill, {})
        harm(tmp_path / name)
        assert manifest(tmp_path / name) is None


def test_a_second_publication_under_one_name_fails_and_the_first_stays(tmp_path):
    publish(tmp_path / "x", fill, {"step": 1})
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "x", fill, {"step": 2})
    found = manifest(tmp_path / "x")
    assert found is not None
    assert found["step"] == 1


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        fill(folder)
        raise KeyError("half way")

    with pytest.raises(KeyError):
        publish(tmp_path / "x", fail, {})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".tmp-x-1").mkdir()
    (tmp_path / "y").mkdir()
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from limbeck.errors import StorageError
from limbeck.files import publish
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    publish(Path(sys.argv[1]), lambda f: (f / "big").write_bytes(bytes(5000)), {})
except StorageError as error:
    print(error)
"""


def test_a_full_disk_is_reported_with_path_and_bytes(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] != 0
    target = tmp_path / "x"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, target], capture_output=True, text=True, check=True
    )
    assert f"{target} could not be written" in done.stdout
    assert "bytes free" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_text_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, json.dumps({"a": 1}))
    write_text(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir(tmp_path) == ["x.json"]


def test_text_that_cannot_be_written_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="could not be written"):
        write_text(tmp_path / "no" / "x.json", "")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file must be a folder that can be written"):
        publish(tmp_path / "file" / "x", lambda folder: None, {})
