"""Rollouts written by a server with the student's weights, and servers that do it wrong."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from limbeck.errors import ConfigError, DataError
from limbeck.experiment.parts import gather_parts
from limbeck.experiment.served_rollouts import save_tied
from limbeck.models import ModelSource, load_model
from limbeck.teachers import LocalTeacher
from limbeck.teachers.served import requests
from tests.distributed.processes import on_ranks
from tests.experiment.test_rollouts import ON_POLICY, ROLLOUT, written
from tests.experiment.test_trainable import stopping_after
from tests.experiment.tiny_run import steps_of, write_model, write_recipe
from tests.models.tiny import tiny_llama
from tests.teachers.serving import NAME, TinyServer
from tests.tokenizers.small import small

FAST = {"learning_rate": 0.05, "steps": 4}
"""Weights that move in every step by more than a server's noise."""


@pytest.fixture(autouse=True)
def _hurried(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "FIRST_DELAY_S", 0.05)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server(tmp_path):
    """A server with other weights than any student's until it is given some."""
    folder = write_model(tmp_path / "served", rows=len(small()), layers=2, seed=7)
    model = load_model(ModelSource(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    serving = TinyServer(LocalTeacher(model, tokenizer=small()), small())
    serving.loads = []
    yield serving
    serving.kill()


def recipe(folder, server, rollout=(), **more):
    changes = {"evaluate": {"data": None}, "optim": FAST}
    path = write_recipe(folder, objective=ON_POLICY, **changes)
    served = {"url": server.url, "model": NAME, "patience_s": 5.0, **more}
    whole = {**ROLLOUT, "server": served, **dict(rollout)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rollout": whole}))
    return path


def run(path, *overrides, **options):
    with limbeck.assemble(limbeck.load(path, overrides)) as whole:
        return whole.train(**options)


def ids(folder):
    return [[row["token_ids"] for row in rows] for rows in written(folder)]


@pytest.mark.slow
def test_its_texts_are_those_of_the_student_here_and_a_resumed_run_reads_them(
    server, tmp_path, monkeypatch
):
    path = recipe(tmp_path, server)
    local = [f"output={tmp_path / 'local'}", "rollout.server=null"]
    run(path, *local)
    wanted = run(path, f"output={tmp_path / 'whole'}").student / "model.safetensors"
    assert ids(tmp_path / "whole") == ids(tmp_path / "local")
    for one, other in zip(steps_of(tmp_path / "whole"), steps_of(tmp_path / "local"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert server.loads == [str(tmp_path / "whole" / "rollout-weights")] * 4
    sent = server.requests[0]
    assert sent["ignore_eos"]
    assert sent["stop_token_ids"] == [small().eos_token_id]
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.experiment.trials.train", stopping_after(3))
        with pytest.raises(KeyboardInterrupt):
            run(path)
    server.requests.clear()
    found = run(path, resume=True).student / "model.safetensors"
    assert found.read_bytes() == wanted.read_bytes()
    assert len(server.requests) == 4  # of step 3; step 2 is read
    server.requests.clear()
    run(path, resume_from=2)
    assert len(server.requests) == 8  # texts of weights that may not be reached again are dropped


def test_a_server_that_comes_back_gets_the_weights_again(server, tmp_path):
    path, ready = recipe(tmp_path, server), []

    def away(answer, body):
        if "seed" in body and len(server.loads) == 2 and not ready:
            ready.append(True)
            server.statuses += [(503, {}, "starting")] * 8
        return answer

    server.lie = away
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "mine.txt").write_text("stays")
    run(path, "optim.steps=2", f"rollout.server.folder={tmp_path / 'shared'}")
    assert server.loads == [str(tmp_path / "shared" / "rollout-weights")] * 3
    assert (tmp_path / "shared" / "mine.txt").exists()


def shifted(answer, body):
    if "seed" in body:
        values = answer["choices"][0]["logprobs"]["token_logprobs"]
        values[:] = [value - 1.0 for value in values]
    return answer


def changed(changes, answer, body):
    if "seed" in body:
        answer["choices"][0] |= changes
    return answer


def shortened(answer, body):
    if "seed" in body:
        choice = answer["choices"][0]
        choice["token_ids"], choice["finish_reason"] = choice["token_ids"][:3], "length"
        choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:3]
    return answer


def kept_in_cache(answer, body):
    return {"success": False} if "success" in answer else answer


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (shifted, r"are 1 nats a token from the student's, above 0\.2"),
        (shortened, "have 12 tokens, or fewer and an end, and has 3"),
        (partial(changed, {"finish_reason": "stop"}), "end with its first token"),
        (partial(changed, {"prompt_token_ids": [1]}), "be to the token ids that were sent"),
        (partial(changed, {"logprobs": None}), "have a log-probability of every token"),
        (partial(changed, {"finish_reason": "abort"}), "ended with 'abort'"),
        (kept_in_cache, "must forget what it cached with earlier weights"),
    ],
)
def test_a_lie_is_refused_and_nothing_is_kept(server, tmp_path, lie, expected):
    server.lie = lie
    with pytest.raises(DataError, match=expected):
        run(recipe(tmp_path, server))
    assert not (tmp_path / "run" / "rollouts").exists()


def test_a_server_that_stays_at_the_first_weights_is_refused(server, tmp_path):
    class Once(list):
        def append(self, folder):
            super().append(self[0] if self else str(tmp_path / "first"))

    path = recipe(tmp_path, server)
    parts = limbeck.load(path)
    server.loads = Once()
    with limbeck.assemble(parts) as whole:
        student = whole.parts.student.model
        whole.parts.publish_student(student, tmp_path / "first")
    with pytest.raises(DataError, match=r"nats a token from the student's, above 0\.02"):
        run(path)
    assert len(ids(tmp_path / "run")) >= 1


def test_a_tied_head_has_a_name_of_its_own_in_the_files(tmp_path):
    """A reload of vLLM leaves a head that is not named as it was."""
    student = tiny_llama(2, 16, 37, seed=1, tied=True)
    save_tied(student, student.hf_model.state_dict(), tmp_path)
    saved = load_file(tmp_path / "tied.safetensors")
    assert list(saved) == ["lm_head.weight"]
    assert torch.equal(saved["lm_head.weight"], student.hf_model.get_input_embeddings().weight)


def test_a_server_that_cannot_load_weights_or_has_another_model_is_refused(server, tmp_path):
    path = recipe(tmp_path, server)
    with pytest.raises(ConfigError, match=r"rollout\.server\.model: must be a model that"):
        run(path, "rollout.server.model=other")
    server.loads = None
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        run(path, f"output={tmp_path / 'second'}")
    server.max_model_len = 16
    with pytest.raises(ConfigError, match=r"server's 16 positions, got 32\. .*--max-model-len"):
        run(path, f"output={tmp_path / 'third'}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.server={url: x}", r"rollout\.server\.model"),
        ("rollout.from=teacher", r"rollout\.server: must be left out with rollout\.from=teacher"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_asked(server, tmp_path, override, expected):
    with pytest.raises(ConfigError, match=expected):
        limbeck.load(recipe(tmp_path, server), [override])
    assert not server.requests


def of_rank(world, path, folder):
    torch.set_num_threads(1)
    parts = gather_parts(limbeck.load(path), world)
    distiller = parts.distiller(parts.take_student(folder), parts.config.objective)
    rollouts = parts.rollouts(distiller, folder)
    rollouts.step(0, world)


def test_two_ranks_write_what_one_process_writes(server, tmp_path):
    path = recipe(tmp_path, server)
    run(path, "optim.steps=2")
    on_ranks(2, of_rank, path, tmp_path / "ranks")
    assert ids(tmp_path / "ranks") == ids(tmp_path / "run")[:1]
    assert len(server.loads) == 3
