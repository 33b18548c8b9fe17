"""A store of any number of shards needs a bounded number of open files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck.errors import StorageError
from limbeck.store import Store
from tests.store.small_store import header, write

FORM = {"type": "top_k", "k": 6}

READ = """
import os, resource, sys
from pathlib import Path
from limbeck.store import Store, verify
limit = len(os.listdir("/dev/fd")) + 16
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
store = Store.open(Path(sys.argv[1]))
for key in store.keys():
    store.read(key)
assert len(list(store.keys())) == 60
assert verify(Path(sys.argv[1])) == []
"""


def test_a_store_of_more_shards_than_descriptors_is_read(tmp_path):
    write(tmp_path, header(FORM, num_shards=60), seeds=range(60))
    command = [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_too_many_open_files_are_not_damage(tmp_path, monkeypatch):
    samples = write(tmp_path, header(FORM))
    store = Store.open(tmp_path)

    def refuse(path, *args, **options):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for use in (lambda: store.read(samples[0].key), lambda: Store.open(tmp_path)):
        with pytest.raises(StorageError, match=r"not damaged: .*Raise the limit of open files"):
            use()
