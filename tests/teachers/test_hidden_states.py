"""A teacher from a server's hidden states says what the local one says, or is refused by name."""

import json
import threading
import time

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.errors import ConfigError, DataError, TryLaterError
from limbeck.experiment import load
from limbeck.experiment.trials import lasting
from limbeck.losses import SignalNeeds
from limbeck.losses.distributions import LazyLogits, log_softmax
from limbeck.models import ModelSource, load_model
from limbeck.store import Store
from limbeck.teachers import DISTRIBUTION, LocalTeacher, TeacherRequest, teachers
from limbeck.teachers.served import requests, states_folder
from tests.experiment.recordings import record, recording_recipe
from tests.experiment.tiny_run import steps_of, write_model, write_recipe
from tests.models.tiny import random_batch
from tests.teachers.serving import LAST, NAME, TinyServer, write_states
from tests.tokenizers.small import small
from tests.train.toy import ALONE


def write_teacher(folder, seed=0):
    """The tiny run's model, with a final norm that differs in every column."""
    write_model(folder, rows=len(small()), seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.2, 2.0)
    model.save_pretrained(folder)
    return folder


def local_teacher(folder):
    model = load_model(ModelSource(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    return LocalTeacher(model, tokenizer=small())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("served") / "teacher")


@pytest.fixture(scope="module")
def local(folder):
    return local_teacher(folder)


@pytest.fixture
def server(local, tmp_path):
    serving = TinyServer(local, small())
    serving.states = tmp_path / "states"
    serving.states.mkdir()
    yield serving
    serving.kill()


@pytest.fixture(autouse=True)
def _hurried(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(states_folder, "ABSENT_S", 0.2)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def spec_of(server, folder, /, **options):
    where = {"url": server.url, "model": NAME, "path": str(folder), "states": str(server.states)}
    return {"type": "served", **where, **options}


def open_teacher(server, folder, /, **options):
    return teachers.bind(spec_of(server, folder, **options), "teacher")(ALONE)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_its_log_probabilities_are_the_local_teachers_at_any_temperature(
    server, folder, local, temperature
):
    batch = random_batch(rows=4, length=20, vocabulary=len(small()))
    teacher = open_teacher(server, folder)
    mine, theirs = (each.signal(batch).distribution for each in (teacher, local))
    assert isinstance(mine, LazyLogits)
    ours = log_softmax(mine.logits(), temperature)
    torch.testing.assert_close(ours, log_softmax(theirs.logits(), temperature), atol=1e-5, rtol=0)
    assert list(server.states.iterdir()) == []


def test_it_gives_likelihoods_and_a_smaller_vocabulary(server, folder):
    teacher, local = open_teacher(server, folder), local_teacher(folder)
    batch = random_batch(rows=2, vocabulary=40)
    request = TeacherRequest(needs=SignalNeeds(True, likelihoods=True), vocabulary_size=40)
    for each in (teacher, local):
        each.require(request)
    mine, theirs = teacher.signal(batch), local.signal(batch)
    assert mine.distribution.logits().shape[1] == len(teacher.head.weight) == 40
    torch.testing.assert_close(
        mine.likelihoods.logprobs, theirs.likelihoods.logprobs, atol=1e-5, rtol=0
    )
    teacher.require(TeacherRequest(needs=DISTRIBUTION, vocabulary_size=len(small())))
    assert len(teacher.head.weight) == len(small())


def test_it_serves_what_k_tokens_do_not_and_no_layers(server, folder):
    teacher = open_teacher(server, folder)
    teacher.require(TeacherRequest(needs=DISTRIBUTION, temperatures=(2.0,), whole_vocabulary=True))
    with pytest.raises(ConfigError, match=r"reads layers \[1\]"):
        teacher.require(TeacherRequest(needs=SignalNeeds(True, frozenset({1}))))
    with pytest.raises(ConfigError, match=r"teacher\.states: must be left out to write"):
        teacher.require_writer()


def test_a_server_in_16_bits_agrees_within_its_rounding(server, folder, local):
    def write(path, tensors):
        write_states(path, {**tensors, "hidden_states": tensors["hidden_states"].bfloat16()})

    server.write = write
    assert "differ from its own by up to 0.0" in open_teacher(server, folder).notes[0]


def test_windows_in_memory_are_bounded(server, folder, monkeypatch):
    monkeypatch.setattr("limbeck.teachers.served.hidden_states.BYTES_AHEAD", 4 * 32 * 20)
    teacher = open_teacher(server, folder)
    server.requests.clear()
    batches = [random_batch(rows=2, vocabulary=len(small()), seed=seed) for seed in range(3)]
    teacher.prefetch(batches)
    assert len(teacher._ahead._started) == 2
    for batch in batches:
        teacher.signal(batch)
    assert len(server.requests) == 6


def test_a_file_that_is_written_after_the_answer_is_waited_for(server, folder, local):
    teacher = open_teacher(server, folder)

    def late(path, tensors):
        held = threading.Event()

        def work():
            with FileLock(f"{path}.lock"):
                held.set()
                time.sleep(0.4)  # longer than a file that nobody writes is waited for
                save_file(tensors, path)

        threading.Thread(target=work, daemon=True).start()
        held.wait()

    server.write = late
    batch = random_batch(rows=2, vocabulary=len(small()))
    mine = teacher.signal(batch).distribution
    torch.testing.assert_close(
        mine.logits(), local.signal(batch).distribution.logits(), atol=1e-4, rtol=0
    )


def test_a_file_that_is_never_finished_ends_the_run_with_the_code_to_try_later(server, folder):
    teacher = open_teacher(server, folder, timeout_s=0.5)
    locks = []

    def stuck(path, _):
        locks.append(FileLock(f"{path}.lock"))
        locks[-1].acquire()

    server.write = stuck
    with pytest.raises(TryLaterError, match=r"was locked for 0 s.*--resume"):
        teacher.signal(random_batch(rows=1, vocabulary=len(small())))


def test_a_server_that_died_between_its_answer_and_the_file_is_asked_again(server, folder):
    teacher = open_teacher(server, folder)
    paths = []

    def write(path, honest):
        paths.append(path)
        if len(paths) > 1:
            write_states(path, honest)

    server.write = write
    batch = random_batch(rows=1, vocabulary=len(small()))
    assert teacher.signal(batch).distribution is not None
    assert len(paths) == 2
    paths.clear()
    server.write = lambda path, _: paths.append(path)
    with pytest.raises(ConfigError, match="did not appear there"):
        teacher.signal(batch)
    assert len(paths) == 2


def test_half_a_file_is_asked_for_again(server, folder):
    teacher = open_teacher(server, folder)
    paths = []

    def write(path, honest):
        paths.append(path)
        write_states(path, honest)
        if len(paths) == 1:
            path.write_bytes(path.read_bytes()[:-40])

    server.write = write
    batch = random_batch(rows=1, vocabulary=len(small()))
    assert teacher.signal(batch).distribution is not None
    assert [path.exists() for path in paths] == [True, False]


def test_a_server_that_comes_back_with_other_states_is_refused(server, folder):
    teacher = open_teacher(server, folder)
    server.write = tensors(hidden_states=lambda x: x * torch.linspace(0.1, 3, x.shape[-1]))
    teacher._server.outages += 1
    with pytest.raises(ConfigError, match="of another layer"):
        teacher.signal(random_batch(rows=1, vocabulary=len(small())))


def test_a_run_resumes_where_the_folder_is_mounted_elsewhere(server, folder, tmp_path):
    path = write_recipe(tmp_path)
    options = [f"student.path={folder}"]
    recipes = [
        load(path, [*options, f"teacher={json.dumps(spec_of(server, folder, **more))}"])
        for more in ({}, {"states": "/mnt/states"}, {"states": None})
    ]
    first, moved, without = map(lasting, recipes)
    assert first == moved
    assert first != without


def tensors(**change):
    """A lie about what is in a file."""

    def write(path, honest):
        write_states(path, {name: change.get(name, lambda x: x)(x) for name, x in honest.items()})

    return write


FILES = {
    "other ids": (tensors(token_ids=lambda x: x + 1), "be of the token ids that were sent"),
    "fewer ids": (tensors(token_ids=lambda x: x[:-1]), "different from position"),
    "fewer states": (
        tensors(hidden_states=lambda x: x[:-1].contiguous()),
        r"of shape \[\d+, 1, 32\], .* has \[\d+, 1, 32\] of float32",
    ),
    "two layers": (
        tensors(hidden_states=lambda x: torch.cat([x, x], 1)),
        r"has \[\d+, 2, 32\].* other eagle_aux_hidden_state_layer_ids than one",
    ),
    "another width": (tensors(hidden_states=lambda x: x[..., :16].contiguous()), r"\d+, 1, 16\]"),
    "whole numbers": (tensors(hidden_states=lambda x: x.int()), r"of int32: another"),
    "not a number": (tensors(hidden_states=lambda x: x / 0), "have finite hidden states"),
    "much more": (tensors(hidden_states=lambda x: x.expand(-1, 999, -1).clone()), "file of at mo"),
    "other names": (
        lambda path, honest: write_states(path, {"states": honest["hidden_states"]}),
        "a safetensors file of token_ids and hidden_states, and comes with another .KeyError",
    ),
    "not safetensors": (
        lambda path, _: path.write_bytes(b"{}" * 9),
        "must be whole, and cannot be",
    ),
    "8 bits": (tensors(hidden_states=lambda x: x.to(torch.float8_e4m3fn)), "of float8_e4m3fn: ano"),
    "ids with a point": (tensors(token_ids=lambda x: x.float()), "whole numbers as token_ids"),
    "another layer": (
        tensors(hidden_states=lambda x: x * torch.linspace(0.1, 3, x.shape[-1])),
        r"of another layer, or the server's weights .*_layer_ids to \[4\]",
    ),
    "no file": (lambda path, _: None, "must write its hidden states to .* did not appear there"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_refused_by_name(server, folder, name):
    server.write, match = FILES[name]
    with pytest.raises((ConfigError, DataError), match=match):
        open_teacher(server, folder)


def named(path):
    """A lie about where the file is."""

    def lie(answer, body):
        if "kv_transfer_params" in answer:
            answer["kv_transfer_params"] = path and {"hidden_states_path": path}
        return answer

    return lie


PATHS = {
    "no path": (None, r"names no file \(kv_transfer_params.hidden_states_path\). Start vLLM with"),
    "another kind": ("/etc/passwd", "must name a .safetensors file in its folder, and names"),
    "a parent": ("states/../../x.safetensors", "must name a .safetensors file in its folder"),
    "a number": (3, "must name a .safetensors file in its folder"),
    "a hidden one": ("/states/.x.safetensors", "must name a .safetensors file in its folder"),
    "outside": ("/elsewhere/model.safetensors", "model.safetensors did not appear there"),
}


@pytest.mark.parametrize("name", PATHS)
def test_nothing_outside_the_folder_is_read(server, folder, name):
    path, match = PATHS[name]
    server.lie = named(path)
    with pytest.raises((ConfigError, DataError), match=match):
        open_teacher(server, folder)


def test_a_link_out_of_the_folder_is_refused_and_its_target_kept(server, folder, tmp_path):
    target = tmp_path / "elsewhere.safetensors"

    def write(path, honest):
        write_states(target, honest)
        path.symlink_to(target)

    server.write = write
    with pytest.raises(DataError, match="names a link to another"):
        open_teacher(server, folder)
    assert target.exists()


def test_states_after_the_norm_are_recognised(server, folder, local):
    server.write = tensors(hidden_states=lambda x: local.model.decoder.norm(x).detach())
    with pytest.raises(ConfigError, match=r"before the final norm.*they are those after the final"):
        open_teacher(server, folder)


def test_states_of_an_earlier_layer_are_recognised(server, folder, local):
    def write(path, honest):
        with torch.no_grad():
            layers = local.model.hf_model(
                honest["token_ids"][None], output_hidden_states=True
            ).hidden_states
        write_states(path, {**honest, "hidden_states": layers[LAST][0][:, None].contiguous()})

    server.write = write
    with pytest.raises(ConfigError, match=r"differ .* by .* nats on average .* of another layer"):
        open_teacher(server, folder)


def test_a_head_of_other_weights_is_recognised(server, tmp_path):
    other = write_teacher(tmp_path / "other", seed=7)
    with pytest.raises(ConfigError, match=r"weights are not those of teacher\.path"):
        open_teacher(server, other)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"k": 8}, r"teacher\.states: .* got teacher\.k too"),
        ({"server": "sglang"}, r"teacher\.states: .* got teacher\.server: sglang too"),
        ({"states": "/no/such/folder"}, r"teacher\.states: must be the folder .* is no folder"),
    ],
    ids=["k", "sglang", "no folder"],
)
def test_options_that_contradict_it_are_refused(server, folder, options, match):
    with pytest.raises(ConfigError, match=match):
        open_teacher(server, folder, **options)


@pytest.mark.parametrize(
    "form",
    [{"type": "hidden"}, {"type": "top_k", "k": 8, "temperatures": [1.0, 3.0]}],
    ids=["hidden", "top_k"],
)
def test_its_recording_is_the_local_teachers(server, folder, tmp_path, form):
    path = recording_recipe(tmp_path, form, data={"max_documents": 6})
    options = ["evaluate.data=null", f"student.path={folder}"]
    served = f"teacher={json.dumps(spec_of(server, folder))}"
    record(load(path, [*options, f"teacher.path={folder}", f"record.output={tmp_path / 'a'}"]))
    record(load(path, [*options, served, f"record.output={tmp_path / 'b'}"]))
    ours, theirs = (Store.open(tmp_path / each) for each in "ab")
    assert list(ours.keys()) == list(theirs.keys())
    for key in list(ours.keys()):
        a, b = ours.distribution([key]), theirs.distribution([key])
        if form["type"] == "hidden":
            torch.testing.assert_close(a.hidden, b.hidden, atol=1e-5, rtol=1e-5)
            assert torch.equal(a.head.weight, b.head.weight)
        rows = a.hidden if form["type"] == "hidden" else a.ids
        logits = torch.zeros(len(rows), len(small()))
        for temperature in (1.0, 3.0):
            mine, other = (each.compare(logits, temperature) for each in (a, b))
            torch.testing.assert_close(mine.teacher, other.teacher, atol=5e-3, rtol=0)


def losses(path, *overrides):
    with limbeck.assemble(load(path, list(overrides))) as whole:
        whole.train()
    return [each["loss"] for each in steps_of(whole.folder)]


def test_a_run_at_another_temperature_and_divergence_is_that_of_the_local_teacher(
    server, folder, tmp_path
):
    path = write_recipe(
        tmp_path,
        evaluate={"data": None},
        optim={"steps": 3},
        objective={"temperature": 2.0, "divergence": "reverse_kl"},
    )
    common = [f"student.path={folder}"]
    here = losses(path, *common, f"teacher.path={folder}", f"output={tmp_path / 'a'}")
    served = f"teacher={json.dumps(spec_of(server, folder))}"
    assert losses(path, *common, served, f"output={tmp_path / 'b'}") == pytest.approx(
        here, abs=1e-4
    )
    facts = json.loads((tmp_path / "b" / "provenance.json").read_text())
    assert facts["teacher"]["served"] == {"model": NAME, "states": "hidden"}
    assert list(server.states.iterdir()) == []
