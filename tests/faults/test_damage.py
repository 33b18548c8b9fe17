"""Flipped bits and full disks are found, and cost at most one checkpoint."""

import os
import random
import resource
import shutil
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.data import load_data
from limbeck.distributed import latest, load_checkpoint
from limbeck.errors import DataError, StorageError
from limbeck.train import make_optimizers, train, train_step
from tests.data.data_files import load, write
from tests.distributed.processes import live
from tests.distributed.saved_checkpoint import save_checkpoint
from tests.distributed.test_checkpoints import CONFIG
from tests.tokenizers.small import SENTENCES, small
from tests.train.toy import ALONE, ToyBatches, fingerprint, toy_pair, toy_setup

FLIPS = int(os.environ.get("BIT_FLIPS", "10"))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    distiller, teacher = toy_pair()
    optimizers = make_optimizers(distiller, CONFIG, 0.01, ALONE.device)
    for step in (1, 2):
        train_step(distiller, teacher, optimizers, [ToyBatches().batch([step])], ALONE)
        save_checkpoint(folder, step, distiller, optimizers, {}, ALONE)
    return folder


def changed(path, where, bit, cut):
    """Flip one bit of a file, or cut it there."""
    body = bytearray(path.read_bytes())
    place = int(where * (len(body) - 1))
    if cut:
        path.write_bytes(body[:place])
    else:
        body[place] ^= 1 << bit
        path.write_bytes(body)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(file=st.integers(0, 2), where=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    two_checkpoints, file, where, bit, cut
):
    first, second = two_checkpoints / "step-000001", two_checkpoints / "step-000002"
    assert latest(two_checkpoints) == second
    keep = two_checkpoints / "keep"
    shutil.copytree(second, keep)
    try:
        files = sorted(second.iterdir())
        assert len(files) == 3
        changed(files[file], where, bit, cut)
        assert latest(two_checkpoints) == first
        distiller, _ = toy_pair()
        before = {name: value.clone() for name, value in distiller.state_dict().items()}
        with pytest.raises(DataError, match="whole checkpoint"):
            load_checkpoint(second, distiller, [], ALONE)
        assert all((before[n] == value).all() for n, value in distiller.state_dict().items())
    finally:
        shutil.rmtree(second)
        keep.rename(second)


def flip(path, place):
    """Flip one bit of a file, by its number; a second flip undoes it."""
    body = bytearray(path.read_bytes())
    body[place // 8] ^= 1 << place % 8
    path.write_bytes(body)


def chosen_bits(folder, draw):
    """`FLIPS` bits of a folder: the same chance for each bit, or for each file, manifests too."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    sizes = [p.stat().st_size for p in files]
    for trial in range(FLIPS):
        (path,) = draw.choices(files, None if trial % 2 else sizes)
        yield path, draw.randrange(path.stat().st_size * 8)


def test_no_flipped_bit_of_a_checkpoint_is_silent(two_checkpoints):
    newest = two_checkpoints / "step-000002"
    for path, place in chosen_bits(newest, random.Random(1)):
        flip(path, place)
        assert latest(two_checkpoints) == two_checkpoints / "step-000001"
        flip(path, place)
    assert latest(two_checkpoints) == newest


def test_no_flipped_bit_of_the_data_cache_is_silent(tmp_path, monkeypatch):
    """Arrays that are not as their manifest says are made again, and are the same."""
    text, tokenizer = (
        write(tmp_path / "rows.jsonl", [{"text": each} for each in SENTENCES]),
        small(),
    )
    load(text, tokenizer)
    (folder,) = [each for each in (tmp_path / "cache").iterdir() if each.is_dir()]
    whole = {each.name: each.read_bytes() for each in folder.iterdir()}
    module = sys.modules[load_data.__module__]
    plain, built = module.build, []

    def build(*arguments):
        built.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(module, "build", build)
    for number, (path, place) in enumerate(chosen_bits(folder, random.Random(2))):
        flip(path, place)
        load(text, tokenizer)
        assert len(built) == number + 1
        assert {each.name: each.read_bytes() for each in folder.iterdir()} == whole
    load(text, tokenizer)
    assert len(built) == FLIPS


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_one_before(tmp_path):
    train(toy_setup(tmp_path / "whole"))
    folder = tmp_path / "damaged"
    train(toy_setup(folder))
    state = folder / "checkpoints" / "step-000024" / "state.json"
    changed(state, 0.5, 3, cut=False)
    train(toy_setup(folder, resume=True))
    assert fingerprint(folder) == fingerprint(tmp_path / "whole")
    assert '"resumed at 20"' in (folder / "metrics.jsonl").read_text()


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path):
    train(toy_setup(tmp_path))
    newest = tmp_path / "checkpoints" / "step-000024"
    changed(newest / "state.json", 0.5, 3, cut=False)
    body = (newest / "state.json").read_bytes()
    train(toy_setup(tmp_path, resume=True))
    log = (tmp_path / "metrics.jsonl").read_text()
    assert "step-000024: state.json was changed after it was written" in log
    assert newest.with_name("damaged-step-000024-0").joinpath("state.json").read_bytes() == body


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_run_with_no_whole_checkpoint_left_is_refused_not_started_over(tmp_path, name):
    train(toy_setup(tmp_path, checkpoint={"every": 100, "keep": 1}))
    newest = tmp_path / "checkpoints" / "step-000024"
    changed(newest / name, 0.5, 3, cut=False)
    with pytest.raises(DataError, match=rf"step-000024: {name}.*--overwrite"):
        train(toy_setup(tmp_path, checkpoint={"every": 100, "keep": 1}, resume=True))
    assert newest.exists()


def live_on_a_full_disk(folder, most_bytes):
    """Files may not grow beyond some bytes: what a full disk does, without being root."""
    distiller, teacher = toy_pair()
    optimizers = make_optimizers(distiller, CONFIG, 0.01, ALONE.device)
    for step in (1, 2):
        train_step(distiller, teacher, optimizers, [ToyBatches().batch([step])], ALONE)
        if step == 1:
            save_checkpoint(folder, 1, distiller, optimizers, {}, ALONE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    with pytest.raises(StorageError, match=r"step-000002 could not be written.*intact") as told:
        save_checkpoint(folder, 2, distiller, optimizers, {}, ALONE)
    assert told.value.exit_code == 6


@pytest.mark.parametrize("most_bytes", [0, 100, 20_000])
def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(most_bytes, tmp_path):
    assert live(live_on_a_full_disk, tmp_path, most_bytes) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert latest(tmp_path) == tmp_path / "step-000001"


def tokenise_on_a_full_disk(text, most_bytes):
    """Tokens are written while the text is read: the disk is full in the middle of it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    with pytest.raises(StorageError, match=r"cache/.* could not be written after .* intact"):
        load(text, small())


@pytest.mark.parametrize("most_bytes", [0, 10_000])
def test_a_full_disk_leaves_nothing_of_tokenised_data(most_bytes, tmp_path):
    text = write(tmp_path / "rows.jsonl", [{"text": each} for each in SENTENCES * 200])
    assert live(tokenise_on_a_full_disk, text, most_bytes) == 0
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]
    assert load(text, small()).num_documents == 200 * len(SENTENCES)


def test_a_checkpoint_that_cannot_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    distiller, teacher = toy_pair()
    optimizers = make_optimizers(distiller, CONFIG, 0.01, ALONE.device)
    train_step(distiller, teacher, optimizers, [ToyBatches().batch([1])], ALONE)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"needs [\d,]+ bytes, and 1,000 are free"):
        save_checkpoint(tmp_path, 1, distiller, optimizers, {}, ALONE)
