"""A served teacher says what the local one says, and nothing else is taken for it."""

import base64
import json
import threading
import time

import numpy as np
import pytest
import torch

import limbeck
from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.errors import ConfigError, DataError, TryLaterError
from limbeck.experiment import load
from limbeck.losses import SignalNeeds
from limbeck.losses.distributions import LazyLogits, TopK
from limbeck.models import ModelSource, load_model
from limbeck.store import Store
from limbeck.teachers import DISTRIBUTION, LocalTeacher, TeacherRequest, teachers
from limbeck.teachers.ahead import samples_of
from limbeck.teachers.routed import RoutedTeacher
from limbeck.teachers.served import requests
from limbeck.teachers.served.interface import Rows
from limbeck.teachers.served.probe import distance
from limbeck.teachers.served.requests import Connection, Server
from limbeck.teachers.served.sglang import SglangInterface
from limbeck.teachers.stored import StoredTeacher
from tests.experiment.recordings import record, recording_recipe
from tests.experiment.tiny_run import steps_of, write_model, write_recipe
from tests.models.tiny import random_batch
from tests.teachers.serving import KEY, NAME, TinyServer, error
from tests.teachers.waits import BlockingCopies
from tests.tokenizers.small import small
from tests.train.toy import ALONE

K = 16
SAMPLED = {"type": "sampled_reverse_kl", "weight": 1.0}
both = pytest.mark.parametrize("server", ["vllm", "sglang"], indirect=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served") / "teacher", rows=len(small()))


@pytest.fixture(scope="module")
def local(folder):
    model = load_model(ModelSource(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    return LocalTeacher(model, tokenizer=small())


@pytest.fixture
def server(local, request):
    serving = TinyServer(local, small(), kind=getattr(request, "param", "vllm"))
    yield serving
    serving.kill()


@pytest.fixture(autouse=True)
def _hurried(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_DELAY_S", 0.05)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def open_teacher(server, folder, /, **options):
    return teachers.bind({**spec_of(server, folder), **options}, "teacher")(ALONE)


def spec_of(server, folder):
    spec = {"type": "served", "url": server.url, "model": NAME, "k": K, "path": str(folder)}
    return spec if server.kind == "vllm" else {**spec, "server": server.kind}


@both
def test_its_signal_is_the_local_teachers_top_k(server, folder, local):
    batch = random_batch(rows=4, length=20, vocabulary=len(small()))
    mine = open_teacher(server, folder).signal(batch).distribution
    theirs = TopK.from_logits(local.signal(batch).distribution.logits(), K)
    assert torch.equal(mine.ids, theirs.ids)
    torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.tail_logprob, theirs.tail_logprob, atol=1e-4, rtol=0)
    whole = torch.cat([mine.logprobs, mine.tail_logprob[:, None]], -1)
    torch.testing.assert_close(whole.logsumexp(-1), torch.zeros(len(whole)), atol=1e-6, rtol=0)


def test_its_signal_is_copied_to_a_device_without_waiting(server, folder):
    meta = torch.device("meta")
    teacher = teachers.bind(spec_of(server, folder), "teacher")(World(0, 1, meta))
    teacher.require(TeacherRequest(needs=SignalNeeds(distribution=True, likelihoods=True)))
    batch = random_batch(rows=2, vocabulary=len(small())).to(meta)
    with BlockingCopies() as copies:
        signal = teacher.signal(batch)
    assert signal.distribution.logprobs.device == signal.likelihoods.logprobs.device == meta
    assert copies.found == []


def test_a_server_without_flat_arrays_says_the_same_in_lists(folder, local):
    server = TinyServer(local, small(), kind="sglang")
    batch = random_batch(rows=2, length=20, vocabulary=len(small()))
    flat = open_teacher(server, folder).signal(batch).distribution
    server.is_flat = False
    nested = open_teacher(server, folder).signal(batch).distribution
    server.kill()
    assert torch.equal(nested.ids, flat.ids)
    torch.testing.assert_close(nested.logprobs, flat.logprobs, atol=1e-6, rtol=0)


def test_a_packed_row_is_asked_for_window_by_window(server, folder, local):
    tokens = torch.randint(len(small()), (1, 13), generator=torch.Generator().manual_seed(1))
    first, second = Batch.from_tokens(tokens[:, :6]), Batch.from_tokens(tokens[:, 6:])

    def joined(name):
        return torch.cat([getattr(first, name), getattr(second, name)], 1)

    names = ("input_ids", "target_ids", "scored", "position_ids", "document_ids")
    row = Batch(**{name: joined(name) for name in names})
    teacher = open_teacher(server, folder)
    server.requests.clear()
    packed = teacher.signal(row).distribution
    assert sorted(len(each["prompt"]) for each in server.requests) == [6, 7]
    apart = TopK.cat([teacher.signal(each).distribution for each in (first, second)])
    assert torch.equal(packed.ids, apart.ids)
    assert torch.equal(packed.logprobs, apart.logprobs)


def test_announced_windows_are_fetched_once_and_in_the_background(server, folder):
    batches = [random_batch(rows=2, vocabulary=len(small()), seed=seed) for seed in range(3)]
    teacher = open_teacher(server, folder, concurrency=2)
    server.requests.clear()
    teacher.prefetch(batches)
    teacher.prefetch(batches[1:])
    until(lambda: len(server.requests) == 6)
    for batch in batches:
        assert teacher.signal(batch).distribution.ids.shape == (int(batch.num_scored()), K)
    assert len(server.requests) == 6
    teacher.signal(batches[0])
    assert len(server.requests) == 8
    silent = teacher.with_needs(SignalNeeds())
    silent.prefetch(batches)
    assert silent.signal(batches[0]).distribution is None
    assert len(server.requests) == 8


def test_a_routed_teacher_announces_only_the_documents_of_a_member(server, folder, local):
    batch = random_batch(rows=4, vocabulary=len(small()))
    members = {"code": open_teacher(server, folder), "chat": local}
    teacher = RoutedTeacher(members)
    keys = [sample.key for sample in samples_of(batch)]
    teacher._routes = dict(zip(keys, ("chat", "code", "chat", "code"), strict=True))
    assert teacher.works_ahead
    server.requests.clear()
    teacher.prefetch([batch])
    until(lambda: len(server.requests) == 2)
    signal = teacher.signal(batch)
    assert [len(each["prompt"]) for each in server.requests] == [13, 13]
    assert not members["code"]._ahead
    assert {type(part.distribution) for part in signal.parts} == {TopK, LazyLogits}


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_answers_without_a_common_token_differ_by_the_texts_own():
    one, other = (
        Rows(np.array([[i]]), np.array([[-0.5]]), np.array([1.0 * a]))
        for i, a in ((5, -1), (6, -2))
    )
    assert distance(one, other) == 1


def test_no_more_requests_are_in_flight_than_asked_for():
    most = flying = 0
    lock, gate = threading.Lock(), threading.Event()
    connection = Connection(
        url="http://127.0.0.1:1", key=None, concurrency=3, timeout_s=1.0, patience_s=0.0
    )
    server = Server(connection, lambda _: None)

    def job():
        nonlocal most, flying
        with lock:
            flying += 1
            most = max(most, flying)
        gate.wait(0.02)
        with lock:
            flying -= 1
        return threading.get_ident()

    futures = [server.submit(job) for _ in range(12)]
    assert len({each.result() for each in futures}) <= 3
    assert most == 3
    until(lambda: server._num_threads == 0)


def scored(change):
    """A lie about the rows of prompt_logprobs."""

    def lie(answer, body):
        if "prompt_logprobs" in body:
            rows = answer["choices"][0]["prompt_logprobs"]
            answer["choices"][0]["prompt_logprobs"] = change(rows)
        return answer

    return lie


def values(change):
    """A lie about every log-probability of every row."""

    def rows(old):
        return [
            row and {key: {**each, "logprob": change(each["logprob"])} for key, each in row.items()}
            for row in old
        ]

    return scored(rows)


def entries(change):
    """A lie about the entries of every row, in order of rank and without the text's own token."""

    def rows(old):
        new = [None]
        for row in old[1:]:
            ordered = sorted(row.items(), key=lambda pair: pair[1]["rank"])
            new.append(dict(change(ordered[:K]) + ordered[K:]))
        return new

    return scored(rows)


def choice(**change):
    def lie(answer, body):
        if "prompt_logprobs" in body:
            answer["choices"][0].update({k: v(answer["choices"][0][k]) for k, v in change.items()})
        return answer

    return lie


def of_models(**change):
    def lie(answer, body):
        if "data" in answer:
            answer["data"][0].update(change)
        return answer

    return lie


def with_ranks(ranks):
    return lambda pairs: [
        (key, {**each, "rank": rank}) for (key, each), rank in zip(pairs, ranks, strict=True)
    ]


def swapped(pairs):
    (a, first), (b, second), *others = pairs
    return [
        (a, {**first, "logprob": second["logprob"]}),
        (b, {**second, "logprob": first["logprob"]}),
        *others,
    ]


def without_own(answer, body):
    """Rows of the k most probable tokens only."""
    if "prompt_logprobs" in body:
        rows = answer["choices"][0]["prompt_logprobs"]
        for row, own in zip(rows[1:], body["prompt"][1:], strict=True):
            row.pop(str(own)) if len(row) > K else None
    return answer


def with_bos(answer, body):
    """A server that puts a token before every text."""
    if isinstance(body.get("prompt"), str):
        answer["choices"][0]["prompt_token_ids"].insert(0, 1)
    return answer


WRONG = {
    "other ids": (choice(prompt_token_ids=lambda ids: [*ids[:-1], 5]), "token ids"),
    "no ids": (choice(prompt_token_ids=lambda _: None), "does not know return_token_ids"),
    "a row short": (scored(lambda rows: rows[:-1]), "must have prompt_logprobs of 63 tokens"),
    "no rows": (scored(lambda _: None), "must have prompt_logprobs of 63 tokens, and has none"),
    "shifted rows": (scored(lambda rows: [*rows[1:], rows[1]]), "rows are shifted by one"),
    "a null inside": (scored(lambda rows: [*rows[:5], None, *rows[6:]]), "has one at 5"),
    "ranks from 0": (entries(with_ranks(range(K))), "must rank the tokens .* 1 to 16"),
    "a rank twice": (entries(with_ranks([1, 1, *range(3, K + 1)])), "1 to 16, and has other"),
    "too few tokens": (entries(lambda pairs: pairs[:-2]), "gives 1[45] at position"),
    "rising values": (entries(swapped), "fall with the rank, and has some that rise"),
    "without the text's own": (without_own, "text's own token .* does not give token"),
    "sums above 1": (values(lambda x: x / 2), "add up to at most 1, and has"),
    "logits": (values(lambda x: x + 9), r"answers logits \(vLLM does"),
    "not a number": (values(lambda _: float("nan")), "has some that are not finite"),
    "texts for numbers": (values(lambda _: "x"), "something else at position 1: ValueError"),
    "another form": (scored(lambda rows: [None] + [[1]] * (len(rows) - 1)), "AttributeError"),
    "two choices": (lambda a, b: a | {"choices": a.get("choices", []) * 2}, "a list of [02]"),
    "another model": (of_models(id="other"), r"teacher.model: .* serves \(other\), got 'tiny'"),
    "no length": (
        of_models(max_model_len=None),
        "max_model_len of at least . for tiny, and gives None",
    ),
    "no list of models": (lambda a, b: [1], "must list the models"),
    "another tokenizer": (with_bos, "tokenizer must be .* as 44 tokens where it gives 43"),
    "not JSON": (lambda a, b: (200, {}, "<html>hello</html>"), "answer in JSON, .*hello"),
    "a redirect": (
        lambda a, b: (307, {"location": "http://elsewhere/v1"}, ""),
        "redirects to 'http://elsewhere/v1', which is not followed",
    ),
    "no such path": (lambda a, b: error(404, "Not Found"), "must be there, and is not: Not Found"),
    "a forbidden key": (lambda a, b: error(403, "no"), "must accept the key, .* status 403: no"),
}


OF_SGLANG = {
    "no ids": r"must give \[logprob, id, ...\] .* and has none",
    "a row short": r"shape \[56, 16\] after 1 null, and has shape \[55, 16\] after 1",
    "no rows": "must have input_top_logprobs of 57 tokens, and has none",
    "shifted rows": r"one null in input_token_logprobs, and has one at \d",
    "without the text's own": r"one null in input_token_logprobs, and has one at \d",
    "texts for numbers": "could not convert string",
    "another form": r"one null in input_token_logprobs, and has one at 1",
}
"""How what is wrong is named where SGLang's answer says it differently."""
NOT_OF_SGLANG = {"ranks from 0", "a rank twice"}
"""SGLang gives an order and no ranks."""


@both
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_server_is_refused_by_name(server, folder, name):
    server.lie, match = WRONG[name]
    if server.kind == "sglang":
        if name in NOT_OF_SGLANG:
            open_teacher(server, folder)
            return
        match = OF_SGLANG.get(name, match)
    with pytest.raises((ConfigError, DataError), match=match):
        open_teacher(server, folder)


def flat_answer(k=3, vocabulary=10):
    """Tokens, and what SGLang says of them: the most probable ones rise by one a position."""
    tokens = [4, 0, 2, vocabulary - 1]
    ids = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 4]], "<i4")
    values = np.log(np.array([[0.5, 0.25, 0.125]] * 3)).astype("<f4")
    own = [[None, 4, None], [float(values[0, 0]), 0, None], [float(values[1, 1]), 2, None]]
    own.append([-3.0, 0, None])  # the last id of the vocabulary is echoed as 0
    facts = {"input_token_logprobs": own, "input_top_logprobs_shape": [3, k]}
    facts["input_top_logprobs_null_prefix"] = 1
    return tokens, facts | as_base64(val=values) | as_base64(idx=ids)


def as_base64(**arrays):
    """Fields of a flat array."""
    [(name, array)] = arrays.items()
    key = f"input_top_logprobs_{name}_flat_b64"
    return {key: base64.b64encode(array.tobytes()).decode(), f"{key}_dtype": array.dtype.name}


@pytest.mark.parametrize("shape", [[3, 3], [4, 3]])  # the second counts the null
def test_flat_arrays_are_rows_and_the_last_id_is_echoed_as_0(shape):
    tokens, facts = flat_answer()
    facts["input_top_logprobs_shape"] = shape
    rows = SglangInterface("tiny", 10).rows({"meta_info": facts}, tokens, 3)
    assert rows.ids.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert np.exp(rows.logprobs[2]).tolist() == pytest.approx([0.5, 0.25, 0.125], abs=1e-6)
    assert rows.actual.tolist() == pytest.approx([np.log(0.5), np.log(0.25), -3.0], abs=1e-6)


VAL, IDX = (f"input_top_logprobs_{name}_flat_b64" for name in ("val", "idx"))
LEFT = np.array([[1, 2, 3], [2, 3, 4], [0, 1, 2]], "<i4")
FLAT = {
    "other type": ({f"{VAL}_dtype": "float16"}, f"declare {VAL} as float32, and has 'float16'"),
    "other integers": ({f"{IDX}_dtype": "int64"}, f"declare {IDX} as int32"),
    "no type": ({f"{VAL}_dtype": None}, f"declare {VAL} as float32, and has none"),
    "fewer bytes": (as_base64(val=np.zeros((3, 2), "<f4")), f"36 bytes in {VAL}, and has 24"),
    "more bytes": (as_base64(idx=np.zeros((4, 3), "<i4")), f"36 bytes in {IDX}, and has 48"),
    "no array": ({VAL: None}, f"36 bytes in {VAL}, and has 0"),
    "a number": ({VAL: 3}, f"{VAL} in base64"),
    "not base64": ({IDX: "*" * 48}, f"{IDX} in base64"),
    "another shape": ({"input_top_logprobs_shape": [3, 2]}, r"shape \[3, 3\].* has shape \[3, 2\]"),
    "no shape": ({"input_top_logprobs_shape": None}, "has shape None"),
    "no null": ({"input_top_logprobs_null_prefix": 0}, "after 1 null, and has .* after 0"),
    "not a number": (as_base64(val=np.full((3, 3), np.nan, "<f4")), "not finite"),
    "a negative id": (as_base64(idx=LEFT - 1), "0 to 9, and has -1 to 3"),
    "an id too large": (as_base64(idx=LEFT + 6), "0 to 9, and has 6 to 10"),
    "an id twice": (as_base64(idx=LEFT // 2), "every token of a position once"),
    "rows of other positions": (as_base64(idx=LEFT), "contradicts itself by"),
    "neither form": (
        {"input_top_logprobs_shape": ...},
        "input_top_logprobs of 4 tokens, and has none",
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_arrays_that_contradict_their_description_are_never_used(name):
    change, match = FLAT[name]
    tokens, facts = flat_answer()
    facts = {key: value for key, value in (facts | change).items() if value is not ...}
    with pytest.raises(DataError, match=match):
        SglangInterface("tiny", 10).rows({"meta_info": facts}, tokens, 3)


@both
@pytest.mark.parametrize("name", ["other ids", "logits", "sums above 1", "shifted rows"])
def test_wrong_answers_of_a_server_during_the_run_are_never_used(server, folder, name):
    teacher = open_teacher(server, folder)
    server.lie = WRONG[name][0]
    with pytest.raises(DataError, match="The answer of the server must"):
        teacher.signal(random_batch(vocabulary=len(small())))


@both
def test_more_tokens_than_the_server_gives_are_refused_with_its_message(server, folder):
    remedy = {"vllm": "--max-logprobs", "sglang": "Read the server's log"}[server.kind]
    match = rf"teacher\.k.* 21, which is greater than max allowed: 20.*{remedy}.* lower teacher.k"
    with pytest.raises(ConfigError, match=match):
        open_teacher(server, folder, k=21)


@both
def test_longer_text_than_the_server_reads_is_refused(server, folder, tmp_path):
    server.max_model_len = 33
    path = recording_recipe(tmp_path, {"type": "top_k", "k": K})
    longest = {"vllm": 31, "sglang": 25}[server.kind]
    with pytest.raises(ConfigError, match=f"sequence_length: must be at most {longest}"):
        record(load(path, [teacher_of(server, folder)]))


@both
def test_a_served_adapter_has_the_length_limit_of_its_base_model(server, folder):
    def lie(answer, body):
        if "data" in answer:
            adapter = {"id": NAME, "max_model_len": None, "parent": "base"}
            answer["data"] = [{"id": "base", "max_model_len": 64, "parent": None}, adapter]
        return answer

    server.lie = lie
    if server.kind == "sglang":
        with pytest.raises(ConfigError, match="no adapter with server: sglang, got 'tiny', an ad"):
            open_teacher(server, folder)
    else:
        assert open_teacher(server, folder).info.max_positions == 62


def test_a_server_of_the_other_kind_is_refused(server, folder):
    with pytest.raises(ConfigError, match=r"teacher\.server: sglang"):
        open_teacher(server, folder, server="sglang")


def test_what_k_tokens_at_temperature_1_do_not_hold_is_refused(server, folder):
    teacher = open_teacher(server, folder)
    for request, match in (
        (TeacherRequest(needs=DISTRIBUTION, temperatures=(1.0, 2.0)), "must be 1 .*got 2"),
        (TeacherRequest(needs=SignalNeeds(True, frozenset({1}))), r"reads layers \[1\]"),
        (TeacherRequest(needs=DISTRIBUTION, whole_vocabulary=True), "16 tokens and a tail"),
        (TeacherRequest(needs=DISTRIBUTION, vocabulary_size=16), "less than the 16 tokens"),
    ):
        with pytest.raises(ConfigError, match=match):
            teacher.require(request)
    teacher = open_teacher(server, folder)
    teacher.require(TeacherRequest(needs=DISTRIBUTION, vocabulary_size=40))
    with pytest.raises(DataError, match="ids 0 to 39, and gave"):
        teacher.signal(random_batch(vocabulary=40))


def test_a_key_is_taken_from_the_environment_and_stays_out_of_every_message(
    server, folder, monkeypatch
):
    server.key = KEY
    with pytest.raises(ConfigError, match=r"must accept the key, .* 401: Unauthorized"):
        open_teacher(server, folder)
    for key, match in (("sk-1", "must accept the key"), ("a\nb", "characters that no key has")):
        monkeypatch.setenv("TINY_KEY", key)
        with pytest.raises(ConfigError, match=match) as found:
            open_teacher(server, folder, key_env="TINY_KEY")
        assert key not in str(found.value)
    monkeypatch.setenv("TINY_KEY", KEY)
    teacher = open_teacher(server, folder, key_env="TINY_KEY")
    assert KEY not in f"{teacher.info}{teacher.notes}{teacher._server.connection}"
    with pytest.raises(ConfigError, match="NO_SUCH_KEY must hold the server's key"):
        open_teacher(server, folder, key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="must be the name of an environment") as found:
        open_teacher(server, folder, key_env=KEY)
    assert KEY not in str(found.value)


@pytest.mark.parametrize(
    "url", ["ftp://x/", "file:///etc/passwd", "localhost:8000", "http://", "http://[", ""]
)
def test_only_http_addresses_are_accepted(folder, server, url):
    with pytest.raises(ConfigError, match="must be the http:// or https:// address"):
        open_teacher(server, folder, url=url)


def test_a_password_in_the_address_is_refused_and_not_repeated(folder, server):
    for url in ("http://me:secret@localhost", "http://localhost?key=secret"):
        with pytest.raises(ConfigError, match="must have no user, password") as found:
            open_teacher(server, folder, url=url)
        assert "secret" not in str(found.value)
    assert open_teacher(server, folder, url=f"{server.url}/v1/").info.name == NAME


def test_a_busy_server_is_asked_again(server, folder, capfd):
    teacher = open_teacher(server, folder, concurrency=1)
    batch = random_batch(rows=1, vocabulary=len(small()))
    server.statuses = [(503, {"retry-after": "0"}, "loading"), (429, {}, "slow down")]
    assert teacher.signal(batch).distribution is not None
    server.statuses = [(500, {}, "oops")]
    assert teacher.signal(batch).distribution is not None
    told = capfd.readouterr().err
    assert told.count("is away (status 429: slow down)") == 1
    assert told.count("is back after") == 1


def test_a_server_that_is_not_there_ends_the_command_at_once(server, folder):
    server.kill()
    started = time.monotonic()
    with pytest.raises(TryLaterError, match=r"must answer, and did not for 0 s: ConnectError"):
        open_teacher(server, folder)
    assert time.monotonic() - started < 5
    server.start()


def test_a_server_that_stays_away_ends_the_run_with_the_code_to_try_later(server, folder, capfd):
    teacher = open_teacher(server, folder, patience_s=0.4)
    server.kill()
    with pytest.raises(TryLaterError, match="--resume") as found:
        teacher.signal(random_batch(vocabulary=len(small())))
    assert found.value.exit_code == 75
    assert "waiting for it, up to 0 s" in capfd.readouterr().err
    server.start()


def test_an_answer_that_does_not_come_is_given_up(server):
    connection = Connection(url=server.url, key=None, concurrency=1, timeout_s=0.3, patience_s=0.2)
    server.lie = lambda answer, _: time.sleep(1) or answer
    with pytest.raises(TryLaterError, match="ReadTimeout"):
        Server(connection, lambda _: None).ask("/v1/models")


def test_another_model_behind_the_same_address_is_noticed(server, folder, tmp_path):
    teacher = open_teacher(server, folder, concurrency=1)
    other = write_model(tmp_path / "other", rows=len(small()), seed=7)
    model = load_model(ModelSource(str(other)), device=torch.device("cpu"), dtype=torch.float32)
    server.statuses = [(503, {}, "restarting")] * 2
    server.teacher = LocalTeacher(model)
    with pytest.raises(DataError, match=r"come back with the same model, .* nats a token apart"):
        teacher.signal(random_batch(rows=1, vocabulary=len(small())))


def teacher_of(server, folder, **options):
    return f"teacher={json.dumps({**spec_of(server, folder), **options})}"


def run(path, server, folder, *overrides, **options):
    fixed = [teacher_of(server, folder), "objective.temperature=1.0", f"student.path={folder}"]
    with limbeck.assemble(load(path, [*fixed, *overrides])) as whole:
        return whole.train(**options)


def losses(folder):
    return [each["loss"] for each in steps_of(folder)]


@pytest.mark.long
def test_its_recording_is_the_models_and_a_run_from_it_that_from_the_server(
    server, folder, tmp_path
):
    """Within what a store rounds: tokens to 0.0023 of the square root of a probability."""
    form = {"type": "top_k", "k": K}
    path = recording_recipe(
        tmp_path,
        form,
        data={"max_documents": 10},
        evaluate={"continuations": 0, "every": 3},
        optim={"steps": 3},
    )
    common = ["objective.temperature=1.0", f"student.path={folder}"]
    here = f"teacher.path={folder}"
    record(load(path, [here, f"record.output={tmp_path / 'of-model'}"]))
    record(load(path, [teacher_of(server, folder), f"record.output={tmp_path / 'of-server'}"]))
    ours, theirs = (Store.open(tmp_path / f"of-{who}") for who in ("model", "server"))
    assert list(ours.keys()) == list(theirs.keys())
    for key in list(ours.keys()):
        a, b = ours.distribution([key]), theirs.distribution([key])
        assert torch.equal(a.ids.sort(-1).values, b.ids.sort(-1).values)
        torch.testing.assert_close(a.tail_logprob, b.tail_logprob, atol=2e-3, rtol=0)
    outcome = run(path, server, folder, f"output={tmp_path / 'served'}")
    stored = f"teacher={{type: stored, path: {tmp_path / 'of-server'}}}"
    output = f"output={tmp_path / 'stored'}"
    with limbeck.assemble(load(path, [stored, *common, output, "evaluate.data=null"])) as whole:
        whole.train()
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "stored"), abs=2e-3)
    figures = outcome.evaluation["trials"]
    assert figures["distilled"]["forward_kl"]["value"] < figures["initial"]["forward_kl"]["value"]
    provenance = json.loads((tmp_path / "served" / "provenance.json").read_text())
    assert provenance["teacher"]["served"] == {"model": NAME, "k": K}
    notes = provenance["vocabulary"]["notes"]
    assert any("16 tokens hold" in each and "nats" in each for each in notes)


def test_a_run_waits_for_a_restarted_server_and_ends_with_the_same_losses(
    server, folder, tmp_path, capfd
):
    path = write_recipe(tmp_path, evaluate={"data": None}, optim={"steps": 4})
    run(path, server, folder, f"output={tmp_path / 'calm'}")
    capfd.readouterr()
    calm = server.lie
    asked = 0

    def fatal(answer, body):
        nonlocal asked
        asked += "prompt_logprobs" in body
        if asked == 20:
            threading.Thread(target=server.kill, daemon=True).start()
            threading.Timer(0.6, server.start).start()
            time.sleep(0.3)
        return answer

    server.lie = fatal
    run(path, server, folder, f"output={tmp_path / 'stormy'}")
    server.lie = calm
    told = capfd.readouterr().err
    assert "is away (" in told
    assert "waiting for it, up to 600 s" in told
    assert "is back after" in told
    assert losses(tmp_path / "stormy") == losses(tmp_path / "calm")


def test_the_server_works_on_the_next_step_while_the_student_computes(server, folder, tmp_path):
    path = write_recipe(tmp_path, evaluate={"data": None})
    with limbeck.assemble(
        load(
            path,
            [teacher_of(server, folder), "objective.temperature=1.0", f"student.path={folder}"],
        )
    ) as whole:
        teacher, announced = whole.parts.teacher, []
        before = type(teacher).signal

        def signal(self, batch):
            announced.append(len(self._ahead))
            return before(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(teacher), "signal", signal)
            server.requests.clear()
            whole.train()
    per_step = len(announced) // 6
    last_of_step = announced[per_step - 1 :: per_step]
    assert all(waiting > per_step for waiting in last_of_step[:-1])
    assert not teacher._ahead


def test_a_run_resumes_at_another_address_and_writes_its_key_to_no_file(
    server, folder, local, tmp_path, monkeypatch
):
    path = write_recipe(tmp_path, evaluate={"data": None})
    options = ("optim.steps=2", f"output={tmp_path / 'run'}", "teacher.key_env=TINY_KEY")
    monkeypatch.setenv("TINY_KEY", KEY)
    server.key = KEY
    run(path, server, folder, *options)
    moved = TinyServer(local, small())
    moved.key = KEY
    try:
        run(path, moved, folder, *options, resume=True)
    finally:
        moved.kill()
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert any(b"TINY_KEY" in each.read_bytes() for each in files)
    assert [each for each in files if KEY.encode() in each.read_bytes()] == []


def test_what_the_student_writes_is_read_by_the_server(server, folder, tmp_path):
    path = write_recipe(tmp_path, optim={"steps": 2})
    run(
        path,
        server,
        folder,
        "objective.alpha=1",
        "rollout={share: 0.5, tokens: 12, prompt_tokens: 6}",
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = [each for each in map(json.loads, lines) if each["kind"] == "evaluation"]
    assert measured[-1]["rollout_teacher_logprob"] < 0 < measured[-1]["rollout_forward_kl"]
    assert "the student's first texts have" in (tmp_path / "run" / "log.txt").read_text()
    read = {tuple(each["prompt"]) for each in server.requests}
    files = sorted((tmp_path / "run" / "rollouts").glob("step-*.jsonl"))
    written = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(written) == 4
    assert all((*each["prompt_ids"], *each["token_ids"]) in read for each in written)


def test_one_token_a_position_is_enough_for_an_estimate_on_drawn_tokens(server, folder, tmp_path):
    objective = {"alpha": 1.0, "divergence": None, "extra": [SAMPLED]}
    path = write_recipe(tmp_path, objective=objective, optim={"steps": 2}, evaluate={"data": None})
    losses_of = {}
    for k in (1, K):
        out = tmp_path / f"k{k}"
        options = [f"output={out}", f"teacher.k={k}", "rollout={tokens: 8, prompt_tokens: 6}"]
        run(path, server, folder, *options)
        losses_of[k] = losses(out)
    assert losses_of[1] == pytest.approx(losses_of[K], abs=1e-4)


@both
def test_the_likelihood_of_the_text_is_that_of_the_model(server, folder, local):
    """Also of a token that is not among the k."""
    needs = SignalNeeds(likelihoods=True)
    batch = random_batch(rows=2, length=20, vocabulary=len(small()))
    chunk_of, logprobs = open_teacher(server, folder).with_needs(needs).signal(batch).likelihoods
    signal = local.with_needs(needs).signal(batch)
    assert signal.parts == ()
    assert chunk_of.tolist() == list(range(len(logprobs)))
    torch.testing.assert_close(logprobs, signal.likelihoods.logprobs, atol=1e-5, rtol=0)
    whole = local.signal(batch).distribution.logits().log_softmax(-1)
    wanted = whole.gather(-1, batch.targets()[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted, atol=1e-5, rtol=0)
    assert bool((wanted < whole.topk(K).values[:, -1]).any())


def test_a_recording_needs_a_form_that_k_tokens_serve(server, folder, tmp_path):
    spec = teacher_of(server, folder)
    for form, match in (
        ({"type": "hidden"}, "records hidden states, and this teacher does not give them"),
        ({"type": "samples", "num_draws": 8}, "must be top_k for a teacher that gives the most"),
        ({"type": "top_k", "k": K + 1}, "at most the 16 tokens that the teacher gives, got 17"),
        ({"type": "top_k", "k": 8, "temperatures": [1.0, 2.0]}, r"must be \[1\], .*got \[1.0, 2"),
    ):
        path = recording_recipe(tmp_path, form, data={"max_documents": 4})
        with pytest.raises(ConfigError, match=match):
            record(load(path, [spec]))
        assert not (tmp_path / "store").exists()


@both
@pytest.mark.parametrize("form", [{"k": 5}, {"k": K, "min_prob": 0.02}], ids=["fewer", "uneven"])
def test_a_smaller_form_of_the_servers_tokens_is_that_of_the_model(server, folder, tmp_path, form):
    path = recording_recipe(tmp_path, {"type": "top_k", **form}, data={"max_documents": 8})
    options = ["evaluate.data=null"]
    record(load(path, [*options, f"teacher.path={folder}", f"record.output={tmp_path / 'a'}"]))
    record(load(path, [*options, teacher_of(server, folder), f"record.output={tmp_path / 'b'}"]))
    cpu = torch.device("cpu")
    with limbeck.assemble(load(path, [*options, f"student.path={folder}"])) as whole:
        batch = whole.parts.data.batch([0, 1])
    a, b = (StoredTeacher(Store.open(tmp_path / each), cpu).signal(batch) for each in "ab")
    logits = torch.zeros(int(batch.num_scored()), len(small()))
    mine, theirs = (each.distribution.compare(logits, 1.0) for each in (a, b))
    assert mine.teacher.shape == theirs.teacher.shape
    kl = (mine.teacher.exp() * (mine.teacher - mine.student)).sum(-1)
    same = (theirs.teacher.exp() * (theirs.teacher - theirs.student)).sum(-1)
    torch.testing.assert_close(kl, same, atol=2e-3, rtol=0)
