"""A local HTTP server that answers as vLLM or SGLang, from a real tiny model, and its lies."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from limbeck.batch import Batch
from limbeck.models import ModelSource, PreTrainedTokenizerBase, load_model
from limbeck.rollouts import Sampling, sample
from limbeck.teachers import LocalTeacher

Answer = dict[str, Any]
NAME, KEY = "tiny", "sk-of-the-tests"
LAST = 3
"""The last block of the tiny run's model."""


class TinyServer:
    """`/v1/models`, and vLLM's `/v1/completions` or SGLang's paths, over the model of a teacher.

    SGLang's requests are read as vLLM's, and vLLM's answers turned into SGLang's after the lie, so
    that both tell it.

    Attributes:
        kind: `vllm` or `sglang`.
        is_flat: Whether SGLang packs log-probabilities if asked to, as newer ones do.
        lie: Changes vLLM's answer to a request before it is sent.
        requests: Bodies of the completions that were asked for, as sent to vLLM.
        statuses: Sent in place of the next answers, first one first.
        loads: Folders that weights were read from; None refuses to, as without its development
            mode.
        states: Folder that the hidden states before the final norm of every prompt are written to.
        write: Writes the tensors of one prompt to a file, and makes its lock.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kind: str = "vllm",
        max_logprobs: int = 20,
        max_model_len: int = 64,
        key: str | None = None,
    ) -> None:
        self.teacher, self.tokenizer = teacher, tokenizer
        self.max_logprobs, self.max_model_len, self.key = max_logprobs, max_model_len, key
        self.kind, self.is_flat = kind, True
        self.lie: Callable[[Answer, Answer], Any] = lambda answer, _: answer
        self.requests: list[Answer] = []
        self.statuses: list[tuple[int, dict[str, str], str]] = []
        self.loads: list[str] | None = None
        self.states: Path | None = None
        self.write: Callable[[Path, dict[str, torch.Tensor]], None] = write_states
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the port of an earlier life."""
        whole = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                whole._open.add(self.connection)

            def finish(self) -> None:
                whole._open.discard(self.connection)

            def do_GET(self) -> None:
                self._send(*whole.answer(self.path, None, dict(self.headers)))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self._send(*whole.answer(self.path, body, dict(self.headers)))

            def _send(self, status: int, headers: dict[str, str], text: str) -> None:
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Quiet(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Stop listening and break every connection, in the middle of an answer too."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for each in list(self._open):
            each.shutdown(socket.SHUT_RDWR)

    def answer(
        self, path: str, body: Answer | None, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers and text."""
        sent = {name.lower(): value for name, value in headers.items()}
        with self._lock:
            if self.key is not None and sent.get("authorization") != f"Bearer {self.key}":
                return error(401, "Unauthorized")
            if self.statuses:
                return self.statuses.pop(0)
            if path == "/v1/models":
                data = [{"id": NAME, "max_model_len": self.max_model_len, "root": "tiny"}]
                made: Any = {"object": "list", "data": data}
            elif path in ("/collective_rpc", "/reset_prefix_cache") and self.loads is not None:
                made = self._reloaded(body or {})
            elif path in PATHS[self.kind] and body is not None:
                asked_flat = self.is_flat and body.get("return_flat_raw_top_logprobs_b64", False)
                body = as_vllm(body) if self.kind == "sglang" else body
                self.requests.append(body)
                asked = body.get("prompt_logprobs", 0)
                if asked > self.max_logprobs:
                    return error(
                        400,
                        f"Requested prompt logprobs of {asked}, which is greater than max allowed: "
                        f"{self.max_logprobs}",
                    )
                if body["model"] != NAME:
                    return error(404, f"The model `{body['model']}` does not exist.")
                made = self._completion(body)
            else:
                return error(404, "Not Found")
            made = self.lie(made, body or {})
        if isinstance(made, tuple):
            return made
        if self.kind == "sglang" and path == "/v1/tokenize":
            ids = [choice["prompt_token_ids"] for choice in made["choices"]]
            made = {"tokens": ids[0] if len(ids) == 1 else ids}
        elif self.kind == "sglang" and path == "/generate":
            made = self._as_sglang(made, body["prompt_logprobs"], asked_flat)
        return 200, {"content-type": "application/json"}, json.dumps(made)

    def _as_sglang(self, made: Answer, k: int, asked_flat: bool) -> Any:
        """SGLang's answer: the text's own tokens, and apart from them the k most probable ones."""
        if len(made["choices"]) != 1:
            return [{"meta_info": {}}] * len(made["choices"])
        [choice] = made["choices"]
        tokens, rows = choice["prompt_token_ids"], choice["prompt_logprobs"]
        last = self.teacher.info.vocabulary_rows - 1
        own = [
            [logprob_of(rows, place, token), token if token < last else 0, None]
            for place, token in enumerate(tokens or [])
        ]
        top = rows and [ranked(row, k) if isinstance(row, dict) else row for row in rows]
        facts = {"input_token_logprobs": own if tokens else None, "input_top_logprobs": top}
        return {"text": "", "meta_info": packed(facts) if asked_flat else facts}

    def _reloaded(self, body: Answer) -> Answer:
        if "method" not in body:
            return {"success": True}
        assert body["method"] == "reload_weights"
        assert self.loads is not None
        self.loads.append(body["kwargs"]["weights_path"])
        source = ModelSource(self.loads[-1])
        model = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
        self.teacher = LocalTeacher(model, tokenizer=self.tokenizer)
        return {"results": [None]}

    def _completion(self, body: Answer) -> Answer:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=body["add_special_tokens"])
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "length",
            "prompt_token_ids": prompt,
            "token_ids": [0],
            "prompt_logprobs": None,
        }
        if "seed" in body:
            choice |= self._written(prompt, body)
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = self._rows(prompt, body["prompt_logprobs"])
        made = {"id": "cmpl-1", "object": "text_completion", "model": NAME, "choices": [choice]}
        if self.states is not None:
            path = self.states / f"cmpl-{len(self.requests)}.safetensors"
            made["kv_transfer_params"] = {"hidden_states_path": str(path)}
            self.write(path, states_before_norm(self.teacher, prompt))
        return made

    def _written(self, prompt: list[int], body: Answer) -> Answer:
        """A continuation, drawn as the local writer draws it."""
        sampling = Sampling(
            tokens=body["max_tokens"],
            sampling_temperature=body["temperature"],
            top_p=body["top_p"],
        )
        [made] = sample(self.teacher.model, [prompt], sampling, [body["seed"]])
        return {
            "finish_reason": "stop" if made.finish == "end" else "length",
            "token_ids": list(made.token_ids),
            "logprobs": {"token_logprobs": list(made.logprobs)},
        }

    def _rows(self, tokens: list[int], k: int) -> list[Any]:
        """VLLM's rows: the text's own token first, then the k most probable, as a dict by id."""
        with torch.no_grad():
            logp = self.teacher.model.logits(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
        top = logp.topk(k)
        rows: list[Any] = [None]
        for place, own in enumerate(tokens[1:]):
            value = logp[place, own]
            ranked = [(own, float(value), int((logp[place] >= value).sum()))]
            pairs = zip(top.indices[place].tolist(), top.values[place].tolist(), strict=True)
            ranked += [(token, each, rank) for rank, (token, each) in enumerate(pairs, 1)]
            rows.append(
                {
                    str(token): {
                        "logprob": max(each, -9999.0),
                        "rank": rank,
                        "decoded_token": self.tokenizer.decode([token]),
                    }
                    for token, each, rank in ranked
                }
            )
        return rows


def states_before_norm(teacher: LocalTeacher, prompt: list[int]) -> dict[str, torch.Tensor]:
    """What vLLM's connector saves of a prompt, for the layer after the last block."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        _, outputs = teacher.model(Batch.from_tokens(torch.cat([tokens, tokens[:, :1]], 1)), [LAST])
    return {"token_ids": tokens[0], "hidden_states": outputs[LAST][:, None].contiguous()}


def write_states(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A file, and beside it the lock that its writer has released."""
    save_file(tensors, path)
    path.with_name(f"{path.name}.lock").touch()


PATHS = {"vllm": ("/v1/completions",), "sglang": ("/generate", "/v1/tokenize")}


def as_vllm(body: Answer) -> Answer:
    """A request of SGLang, as the one to vLLM for the same."""
    if "prompt" in body:
        return body
    assert body["return_logprob"]
    assert body["logprob_start_len"] == 0
    assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0}
    prompt, k = body["input_ids"], body["top_logprobs_num"]
    return {"model": NAME, "prompt": prompt, "prompt_logprobs": k}


def logprob_of(rows: list[Any] | None, place: int, token: int) -> Any:
    """That of a text's own token in vLLM's rows; a rowless text still has one."""
    if rows is None or place >= len(rows):
        return -1.0 if place else None
    return rows[place].get(str(token), {}).get("logprob") if isinstance(rows[place], dict) else None


def ranked(row: Answer, k: int) -> list[list[Any]]:
    """The k most probable tokens of a row of vLLM, which can also have the text's own."""
    pairs = sorted(row.items(), key=lambda pair: pair[1]["rank"])
    return [[each["logprob"], int(token), None] for token, each in pairs[:k]]


def packed(facts: Answer) -> Answer:
    """SGLang's facts with flat arrays, or with lists where the rows do not make an array."""
    rows = facts["input_top_logprobs"]
    try:
        nulls = next(place for place, row in enumerate(rows) if row is not None)
        table = np.array([[entry[:2] for entry in row] for row in rows[nulls:]], dtype=np.float64)
        shape = [table.shape[0], table.shape[1]]
        values, ids = table[:, :, 0].astype("<f4"), table[:, :, 1].astype("<i4")
    except (TypeError, ValueError, IndexError):
        return facts
    flat = {"input_top_logprobs_shape": shape, "input_top_logprobs_null_prefix": nulls}
    for name, array in (("val", values), ("idx", ids)):
        key = f"input_top_logprobs_{name}_flat_b64"
        flat |= {key: base64.b64encode(array.tobytes()).decode(), f"{key}_dtype": array.dtype.name}
    return {"input_token_logprobs": facts["input_token_logprobs"], **flat}


def error(status: int, message: str) -> tuple[int, dict[str, str], str]:
    """VLLM's error."""
    told = {"error": {"message": message, "type": "BadRequestError", "code": status}}
    return status, {"content-type": "application/json"}, json.dumps(told)
