"""A served teacher, and a student that writes, with a real vLLM server: `make test-served`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
import torch

import limbeck
from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.experiment import load
from limbeck.experiment.served_rollouts import gap_of
from limbeck.losses.distributions import TopK
from limbeck.models import ModelSource, load_model, save_student
from limbeck.rollouts.source import rollout_of
from limbeck.teachers import LocalTeacher, teachers
from limbeck.teachers.served.vllm import VllmInterface
from limbeck.tokenizers import load_tokenizer
from tests.experiment.recordings import record
from tests.experiment.tiny_run import steps_of, write_texts
from tests.train.toy import ALONE

VLLM, MODEL = os.environ.get("LIMBECK_VLLM", ""), os.environ.get("LIMBECK_VLLM_MODEL", "")
K = 64
START_S = 480.0
TEXT = Path(__file__).read_text()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (VLLM and MODEL), reason="make test-served MODEL=folder"),
]


class Vllm:
    """A server process on a port of its own."""

    def __init__(self, log: Path, *options: str, modules: str = "") -> None:
        """
        Args:
            options: More of the command line.
            modules: Folder of modules that the server imports.
        """
        self._options, self._modules = options, modules
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = log
        self.start()
        self.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        libraries = [str(path) for path in Path(VLLM).glob("lib/libiomp5.so")]
        options = "--dtype float32 --max-model-len 512 --max-logprobs 128 --enforce-eager"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    f"{VLLM}/bin/python", "-m", "vllm.entrypoints.openai.api_server",
                    "--model", MODEL, "--served-model-name", "teacher",
                    "--host", "127.0.0.1", "--port", str(self.port), *options.split(),
                    *self._options,
                ],
                env={
                    **os.environ,
                    "LD_PRELOAD": ":".join(libraries),
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_SERVER_DEV_MODE": "1",
                    "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": self._modules,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                if httpx2.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.5)
        raise AssertionError(self._log.read_text()[-3000:])

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Vllm(tmp_path_factory.mktemp("vllm") / "vllm.log")
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def say(*lines):
    """What was measured, for the person who runs this."""
    sys.stdout.write("".join(f"\n{line}" for line in lines))


@pytest.fixture
def states_server(tmp_path):
    """One that writes hidden states with the connector that the documentation prints."""
    page = (Path(limbeck.__file__).parents[2] / "docs" / "served-teachers.md").read_text()
    source = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "cpu_hidden_states.py").write_text(source)
    (tmp_path / "states").mkdir()
    layers = json.loads((Path(MODEL) / "config.json").read_text())["num_hidden_layers"]
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
    }
    transfer = {
        "kv_connector": "CpuHiddenStatesConnector",
        "kv_connector_module_path": "cpu_hidden_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "states")},
    }
    running = Vllm(
        tmp_path / "vllm.log",
        "--speculative-config",
        json.dumps(speculative),
        "--kv-transfer-config",
        json.dumps(transfer),
        modules=str(tmp_path),
    )
    yield running
    running.kill()


def spec(server, **options):
    served = {"type": "served", "url": server.url, "model": "teacher", "k": K, "path": MODEL}
    return {**served, **options}


def test_its_top_k_is_the_local_models(server, capsys):
    tokens = load_tokenizer(MODEL).encode(TEXT, add_special_tokens=False)
    rows = torch.tensor(tokens[: 8 * 257]).view(8, 257)
    batch = Batch.from_tokens(rows)
    teacher = teachers.bind(spec(server), "teacher")(ALONE)
    started = time.monotonic()
    mine = teacher.signal(batch).distribution
    seconds = time.monotonic() - started
    model = load_model(ModelSource(MODEL), device=torch.device("cpu"), dtype=torch.float32)
    local = LocalTeacher(model)
    theirs = TopK.from_logits(local.signal(batch).distribution.logits(), K)
    same = (mine.ids.sort(-1).values == theirs.ids.sort(-1).values).all(-1).float().mean()
    error = (mine.logprobs - theirs.logprobs).abs().max()
    tail = (mine.tail_logprob.exp() - theirs.tail_logprob.exp()).abs().max()
    with capsys.disabled():
        say(teacher.notes[0])
        say(
            f"{batch.scored.sum() / seconds:.0f} positions/s; largest difference {error:.2g} nats, "
            f"of the tail's probability {tail:.2g}; the same tokens at {same:.2%} of positions"
        )
    assert error < 1e-3
    assert tail < 1e-4
    assert same > 0.97  # ties at the last rank


def test_its_hidden_states_are_the_local_models(states_server, tmp_path, capsys):
    tokens = load_tokenizer(MODEL).encode(TEXT, add_special_tokens=False)
    batch = Batch.from_tokens(torch.tensor(tokens[: 8 * 257]).view(8, 257))
    where = {"url": states_server.url, "model": "teacher", "path": MODEL}
    started = time.monotonic()
    teacher = teachers.bind(
        {"type": "served", **where, "states": str(tmp_path / "states")}, "teacher"
    )(ALONE)
    ready = time.monotonic() - started
    started = time.monotonic()
    mine = teacher.signal(batch).distribution
    seconds = time.monotonic() - started
    model = load_model(ModelSource(MODEL), device=torch.device("cpu"), dtype=torch.float32)
    theirs = LocalTeacher(model).signal(batch).distribution
    gaps = {}
    for temperature in (1.0, 3.0):
        pairs = ((each.logits() / temperature).log_softmax(-1) for each in (mine, theirs))
        ours, wanted = pairs
        gaps[temperature] = float((ours - wanted).abs().max())
    with capsys.disabled():
        say(teacher.notes[0], f"ready after {ready:.1f} s")
        say(f"{batch.scored.sum() / seconds:.0f} positions/s; largest difference {gaps} nats")
    assert max(gaps.values()) < 1e-3
    assert list((tmp_path / "states").iterdir()) == []


def test_more_log_probabilities_than_it_gives_are_refused_in_its_own_words(server):
    with pytest.raises(ConfigError, match=r"teacher\.k: .* greater than max allowed: 128"):
        teachers.bind(spec(server, k=129), "teacher")(ALONE)


def test_the_temperature_of_a_request_changes_nothing(server):
    _, body = VllmInterface("teacher", 49_152).scoring(list(range(100, 140)), 8)
    rows = [
        httpx2.post(f"{server.url}/v1/completions", json={**body, "temperature": t}, timeout=60)
        for t in (1.0, 2.0)
    ]
    cold, hot = (each.json()["choices"][0]["prompt_logprobs"][1:] for each in rows)
    gaps = [
        abs(value["logprob"] - b[token]["logprob"])
        for a, b in zip(cold, hot, strict=True)
        for token, value in a.items()
        if token in b
    ]
    assert max(gaps) < 1e-3


def write_recipe(folder, server):
    write_texts(folder / "train.jsonl", 24, seed=1)
    recipe = {
        "teacher": spec(server),
        "student": {"type": "depth", "keep": 2, "path": MODEL},
        "data": {"type": "text", "path": str(folder / "train.jsonl"), "sequence_length": 64},
        "optim": {"learning_rate": 0.0003, "steps": 6, "tokens_per_step": 256},
        "memory": {"micro_batch": 2},
        "output": str(folder / "run"),
        "device": "cpu",
        "record": {"form": {"type": "top_k", "k": K}, "output": str(folder / "store")},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def losses(path, *overrides):
    with limbeck.assemble(load(path, list(overrides))) as whole:
        whole.train()
        return [each["loss"] for each in steps_of(whole.folder)]


def test_a_run_from_it_is_that_from_its_recording_also_if_it_is_killed_on_the_way(
    server, tmp_path, capfd
):
    path = write_recipe(tmp_path, server)
    direct = losses(path, f"output={tmp_path / 'direct'}")
    record(load(path))
    stored = losses(
        path, f"teacher={{type: stored, path: {tmp_path / 'store'}}}", f"output={tmp_path / 'b'}"
    )
    capfd.readouterr()

    def restart():
        time.sleep(2.0)
        server.start()

    def strike():
        metrics = tmp_path / "c" / "metrics.jsonl"
        while not metrics.exists() or len(steps_of(tmp_path / "c")) < 1:
            time.sleep(0.01)
        server.kill()
        restart()

    threading.Thread(target=strike, daemon=True).start()
    # More requests than one step's must be open when the server dies.
    struck = losses(path, f"output={tmp_path / 'c'}")
    told = capfd.readouterr().err
    with capfd.disabled():
        gap = max(abs(a - b) for a, b in zip(direct, stored, strict=True))
        say(f"losses {direct[0]:.4f} to {direct[-1]:.4f}; from the recording {gap:.2g} apart")
        say(*(line for line in told.splitlines() if "server" in line))
    assert stored == pytest.approx(direct, abs=5e-3)
    assert struck == pytest.approx(direct, abs=1e-3)
    assert "is away" in told
    assert "is back after" in told


@pytest.fixture
def changed_student(tmp_path):
    """The served model with noise on its weights, in a folder."""
    model = load_model(ModelSource(MODEL), device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1 * float(weight.std()))
    save_student(model, load_tokenizer(MODEL), tmp_path / "student")
    return tmp_path / "student"


# The last test: the server ends with the weights of a student.
def test_it_writes_with_the_weights_a_student_has_in_each_step(
    server, changed_student, tmp_path, capfd
):
    write_texts(tmp_path / "train.jsonl", 24, seed=1)
    recipe = {
        "teacher": {"type": "online", "path": MODEL},
        "student": {"type": "pretrained", "path": str(changed_student)},
        "data": {"type": "text", "path": str(tmp_path / "train.jsonl"), "sequence_length": 64},
        "objective": {"alpha": 1.0, "divergence": "reverse_kl"},
        "rollout": {
            "tokens": 24,
            "prompt_tokens": 12,
            "server": {"url": server.url, "model": "teacher"},
        },
        "optim": {"learning_rate": 0.0003, "steps": 3, "tokens_per_step": 256},
        "output": str(tmp_path / "run"),
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with limbeck.assemble(load(tmp_path / "recipe.yaml")) as whole:
        first = whole.parts.student.model
        weights = {name: value.clone() for name, value in first.state_dict().items()}
        whole.train()
    told = capfd.readouterr().err
    first.load_state_dict(weights)
    gaps = []
    for step in range(3):
        lines = (tmp_path / "run" / "rollouts" / f"step-{step}.jsonl").read_text().splitlines()
        gaps.append(gap_of(first, [rollout_of(json.loads(line)) for line in lines]))
    seconds = [each["rollout_seconds"] for each in steps_of(tmp_path / "run")]
    with capfd.disabled():
        say(*(line for line in told.splitlines() if "nats from the student" in line))
        say(f"from the first weights {gaps} nats; seconds to load and write {seconds}")
    assert gaps[0] < 1e-3
    assert min(gaps[1:]) > 0.02
