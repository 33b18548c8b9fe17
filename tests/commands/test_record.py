"""`limbeck record` and `limbeck store` as a person or a scheduler calls them."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.recipe.recordings import contents, recording_recipe

TOP_K = {"type": "top_k", "k": 8}


def limbeck(folder, *arguments, code=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIMBECK_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def damage(folder):
    path = folder / "store" / "shard-00001" / "data.parquet"
    if not path.exists():
        path = max((folder / "store" / "shard-00001").iterdir(), key=lambda p: p.stat().st_size)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)


@pytest.mark.slow
def test_a_store_is_budgeted_recorded_in_parts_joined_checked_and_mended(tmp_path):
    recording_recipe(tmp_path, TOP_K)
    told, _ = limbeck(tmp_path, "record", "recipe.yaml", "--budget", "--json")
    budget = json.loads(told)
    assert budget["settings"][0]["form"] == TOP_K
    assert not (tmp_path / "store").exists()
    told, progress = limbeck(tmp_path, "record", "recipe.yaml", "--no-budget")
    assert "missing" not in told
    assert "bytes/token" in progress
    whole = contents(tmp_path / "store")
    told, _ = limbeck(tmp_path, "store", "ls", "store", "--json")
    shards = json.loads(told)["num_shards"]
    assert json.loads(told)["finished_shards"] == shards > 2
    told, _ = limbeck(tmp_path, "store", "ls", "store")
    assert "form       top_k, k: 8" in told
    told, _ = limbeck(tmp_path, "store", "verify", "store")
    assert "store is whole." in told
    damage(tmp_path)
    told, error = limbeck(tmp_path, "store", "verify", "store", code=3)
    assert "shard 1" in told
    assert "limbeck store repair store" in error
    told, _ = limbeck(tmp_path, "store", "repair", "store")
    assert "put aside" in told
    told, _ = limbeck(tmp_path, "record", "recipe.yaml", "--no-budget", "--json")
    assert json.loads(told)["recorded"] == 1
    for aside in (tmp_path / "store").glob("damaged-*"):
        shutil.rmtree(aside)
    assert contents(tmp_path / "store") == whole
    for part in ("1/2", "2/2"):
        output = f"record.output=part-{part[0]}"
        limbeck(tmp_path, "record", "recipe.yaml", output, "--shards", part, "--no-budget")
    limbeck(tmp_path, "store", "merge", "part-1", "part-2", "--output", "joined")
    assert contents(tmp_path / "joined") == whole


@pytest.mark.slow
def test_mistakes_leave_with_the_code_of_their_kind(tmp_path):
    recording_recipe(tmp_path, TOP_K)
    _, error = limbeck(tmp_path, "record", "recipe.yaml", "--shards", "3/2", code=2)
    assert "--shards must say which part of how many" in error
    _, error = limbeck(tmp_path, "record", "recipe.yaml", "record.form.k=400", code=2)
    assert "form.k must be less than the teacher's 320 tokens, got 400" in error
    _, error = limbeck(tmp_path, "store", "ls", "nowhere", code=3)
    assert "nowhere must be a store" in error
