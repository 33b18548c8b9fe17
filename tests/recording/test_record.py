"""A recording is the same store however it is cut, stopped or killed."""

import itertools
import os
import random
import shutil
import signal
import time
from functools import partial
from typing import Any

import pytest

from limbeck.errors import ConfigError, DataError, NonFiniteError, StorageError, TryLaterError
from limbeck.experiment import assemble, load
from limbeck.models import CausalLM
from limbeck.recording import Recording, parse_part
from limbeck.recording.budget import require_room
from limbeck.recording.plan import own_shards, passes, plan_shards
from limbeck.store import Store, read_header, verify
from limbeck.store.maintenance import absent_shards
from limbeck.teachers import find_local
from limbeck.teachers.stored import window_of
from tests.commands.processes import Command
from tests.experiment.recordings import contents, record, recorded, recording_recipe
from tests.experiment.tiny_run import write_model
from tests.models.test_gguf import write_gguf
from tests.tokenizers.small import backend, small
from tests.tokenizers.test_load import add_small

TOP_K = {"type": "top_k", "k": 8, "temperatures": [2.0, 1.0]}
SAMPLES = {"type": "samples", "num_draws": 20, "temperature": 2.0}
FORMS: list[dict[str, Any]] = [TOP_K, SAMPLES, {"type": "hidden"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f["type"])
def test_parts_of_several_machines_make_the_store_of_one(tmp_path, form):
    path = recorded(tmp_path, form, layers=(1, 3))
    whole = contents(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    for number in (1, 2, 0):
        record(load(path), (number, 3))
    assert contents(tmp_path / "store") == whole


def test_a_stopped_recording_resumes_and_never_repeats_finished_shards(tmp_path):
    path = recorded(tmp_path, TOP_K)
    whole = contents(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    calls = 0

    def stop():
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt

    with Recording(load(path)) as recording, pytest.raises(KeyboardInterrupt):
        recording.record((0, 1), None, stop)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").glob("shard-*")}
    assert 0 < len(finished) < read_header(tmp_path / "store").num_shards
    told = record(load(path))
    assert told.recorded == told.shards - len(finished)
    assert all(p.stat().st_mtime_ns == at for p, at in finished.items())
    assert contents(tmp_path / "store") == whole
    assert record(load(path)).recorded == 0


def test_every_distinct_window_is_stored_once(tmp_path):
    path = recording_recipe(tmp_path, TOP_K)
    text = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(text + text)
    with Recording(load(path)) as recording:
        plan = recording.plan
        recording.record((0, 1), None, lambda: None)
    data = plan.texts[0].data
    keys = {window_of(data, each).key for each in range(len(data.windows))}
    keys |= {window_of(t.data, each).key for t in plan.texts for each in t.windows}
    assert plan.num_windows == len(keys) < len(data.windows) + len(plan.texts[1].windows)
    assert set(Store.open(tmp_path / "store").keys()) == keys


def test_the_plan_does_not_depend_on_anything_but_the_text(tmp_path):
    path = recording_recipe(tmp_path, TOP_K)
    with Recording(load(path)) as recording:
        plan = recording.plan
    again = plan_shards(plan.texts, 600)
    assert again == plan
    assert all(sum(p.positions for p in shard) <= 600 for shard in plan.shards)
    for row in passes(plan.shards[0], 32):
        assert sum(place.positions for place in row) <= 32


def test_another_teacher_does_not_resume_a_store(tmp_path):
    path = recorded(tmp_path, TOP_K)
    with pytest.raises(DataError, match=r"form.k: 8 in the store, 9 wanted"):
        record(load(path, ["record.form.k=9"]))
    with pytest.raises(DataError, match="seed: 0 in the store, 1 wanted"):
        record(load(path, ["seed=1"]))


@pytest.mark.parametrize("form", [TOP_K, SAMPLES], ids=lambda form: form["type"])
def test_logits_that_are_no_numbers_are_never_stored(tmp_path, monkeypatch, form):
    """A NaN is the largest value to a top-k, and its rounded level would be a probability."""
    plain, passes_made = CausalLM.forward, itertools.count()

    def forward(model, *arguments):
        last, layers = plain(model, *arguments)
        if next(passes_made) == 9:
            last[3, 0] = float("nan")
        return last, layers

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "forward", forward)
        with pytest.raises(NonFiniteError, match="those of 1 positions are not") as told:
            recorded(tmp_path, form)
    assert told.value.exit_code == 5
    assert next(passes_made) > 9
    store = tmp_path / "store"
    assert verify(store) == []  # what there is is whole
    assert absent_shards(store, read_header(store))


def test_a_teacher_in_a_gguf_file_is_recorded_and_learnt_from_without_it(tmp_path):
    file = tmp_path / "teacher.gguf"
    size = 1 + backend().get_vocab_size()  # transformers' reader adds a token to it
    write_gguf(file, vocabulary=size, add_tokens=partial(add_small, pre="smollm"))
    path = recorded(tmp_path, TOP_K, teacher={"path": str(file)}, student={"layers": [0, 1]})
    store = Store.open(tmp_path / "store")
    facts = store.header.teacher
    assert (facts["name"], facts["layers"], len(facts["weights_sha256"])) == (str(file), 2, 64)
    assert verify(tmp_path / "store") == []
    overrides = [f"teacher={{type: stored, path: {tmp_path / 'store'}}}", f"student.path={file}"]
    with assemble(load(path, overrides)) as run:
        assert find_local(run.parts.teacher) is None
        signal = run.parts.teacher.signal(run.parts.data.batch([0]))
        assert len(signal.distribution.ids) == int(run.parts.data.batch([0]).scored.sum())


def test_a_tokenizer_with_more_ids_than_the_teacher_has_rows_is_refused(tmp_path):
    path = recording_recipe(tmp_path, TOP_K)
    shutil.rmtree(tmp_path / "teacher")
    write_model(tmp_path / "teacher", rows=len(small()) - 1)
    with pytest.raises(ConfigError, match=r"must have a row for each of the 320 token ids"):
        Recording(load(path))
    assert not (tmp_path / "store").exists()


def test_a_store_names_every_option_of_its_form(tmp_path):
    """So that it reads the same when a default changes."""
    recorded(tmp_path, "samples")
    wanted = {"type": "samples", "num_draws": 50, "temperature": 1.0, "draw": "systematic"}
    assert read_header(tmp_path / "store").form == wanted


def test_a_shard_being_recorded_is_locked_by_one_process(tmp_path):
    path = recording_recipe(tmp_path, TOP_K)
    with Recording(load(path)) as first:

        def second():
            with pytest.raises(TryLaterError, match="Only one process may record shard 0"):
                record(load(path))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            first.record((0, 1), None, second)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path):
    path = recording_recipe(tmp_path, TOP_K, layers=(0,))
    with Recording(load(path)) as recording:
        budget = recording.budget()
    full = type(budget)(**{**vars(budget), "free_bytes": 1000})
    with pytest.raises(StorageError, match=r"1,000 are free\. Free some space"):
        require_room(full, tmp_path / "store", 1.0, 0)
    require_room(full, tmp_path / "store", 0.0001, 0)
    assert not (tmp_path / "store").exists()


def test_what_others_recorded_into_the_folder_makes_this_part_no_smaller(tmp_path):
    path = recording_recipe(tmp_path, TOP_K)
    record(load(path), (0, 2))
    with Recording(load(path)) as recording:
        budget = recording.budget()
        full = type(budget)(**{**vars(budget), "free_bytes": 100})
        with pytest.raises(StorageError, match="must have room for about"):
            recording.record((1, 2), full, lambda: None)
        assert recording.record((0, 2), full, lambda: None).recorded == 0


def test_the_budget_tells_exact_forms_from_approximate_ones(tmp_path):
    path = recording_recipe(tmp_path, TOP_K)
    with Recording(load(path)) as recording:
        budget = recording.budget()
        told = recording.record((0, 1), budget, lambda: None)
    by_form = {tuple(map(str, each.form.values())): each for each in budget.settings}
    exact = by_form["hidden", "exact"]
    assert exact.gradient_error < 1e-5
    head = recording.teacher.model.head.weight
    records = budget.scored * exact.bytes_per_token
    assert exact.total_bytes == pytest.approx(records + head.numel() * head.element_size(), abs=1)
    assert abs(exact.loss_bias) < 1e-5
    first = budget.settings[0]
    assert first.chosen
    assert first.loss_bias < 0  # merging outcomes can only shrink it
    few, many = (by_form["top_k", str(k), "(2.0,)"] for k in (16, 128))
    assert many.gradient_error < few.gradient_error
    assert many.bytes_per_token > few.bytes_per_token
    real = Store.open(tmp_path / "store")
    assert real.num_scored == told.scored == budget.scored
    # Records are longer by their seals, and windows here are short.
    assert first.total_bytes < real.record_bytes < 2 * first.total_bytes


def test_a_recording_needs_its_options_in_the_recipe(tmp_path):
    path = recording_recipe(tmp_path, TOP_K)
    with pytest.raises(ConfigError, match="record: the recipe must have this section"):
        Recording(load(path, ["record=null"]))
    with pytest.raises(ConfigError, match="a recording needs a model"):
        Recording(load(path, ["teacher={type: stored, path: x}"]))
    with pytest.raises(ConfigError, match=r"layers of the teacher, 0 to 3, got \[4\]"):
        Recording(load(path, ["record.layers=[4]"]))
    with pytest.raises(ConfigError) as error:
        load(path, ["record.form.q=1", "record.layers=[2,1]", "record.shard_tokens=0"])
    assert "record.shard_tokens" in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(path, ["record.form.q=1", "record.layers=[2,1]"])
    assert "record.form.q: 'top_k' takes no such option" in str(error.value)
    assert "record.layers: must name each layer once and in order, got [2, 1]" in str(error.value)


@pytest.mark.parametrize("told", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2"])
def test_an_invalid_shards_option_is_refused(told):
    with pytest.raises(ConfigError, match="--shards must say which part of how many"):
        parse_part(told)


def test_parts_share_all_shards_and_no_shard_twice():
    for parts in (1, 2, 3, 7):
        shares = [own_shards(5, (number, parts)) for number in range(parts)]
        assert sorted(itertools.chain(*shares)) == list(range(5))


def start(folder):
    return Command("record", "recipe.yaml", "--no-budget", cwd=folder)


def kill_and_go_on(folder, dice, kills):
    """Kill a recording some time after its store begins, several times; the moments."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    moments = []
    for _ in range(kills):
        process = start(folder)
        before = len(list((folder / "store").glob("shard-*")))
        deadline = time.monotonic() + 120
        grown = dice.randrange(1, 3)
        while process.is_running and time.monotonic() < deadline:
            if len(list((folder / "store").glob("shard-*"))) >= before + grown:
                break
            time.sleep(0.002)
        time.sleep(dice.random() * 0.1)
        process.kill()
        moments.append(len(list((folder / "store").glob("shard-*"))))
    start(folder).finish()
    return moments


@pytest.mark.slow
def test_a_recording_killed_three_times_ends_byte_identical(tmp_path):
    recorded(tmp_path, TOP_K, layers=(2,))
    whole = contents(tmp_path / "store")
    moments = kill_and_go_on(tmp_path, random.Random(os.getpid()), kills=3)
    assert contents(tmp_path / "store") == whole, moments


@pytest.mark.slow
def test_a_recording_asked_to_stop_leaves_nothing_unfinished(tmp_path):
    recorded(tmp_path, TOP_K)
    whole = contents(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    process = start(tmp_path)
    while not list((tmp_path / "store").glob("shard-*")) and process.is_running:
        time.sleep(0.002)
    process.send(signal.SIGTERM)
    assert "The recording was stopped by SIGTERM" in process.finish(143)
    assert not list((tmp_path / "store").glob(".tmp-*"))
    start(tmp_path).finish()
    assert contents(tmp_path / "store") == whole
