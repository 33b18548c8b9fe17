"""llama.cpp in this process: its C API in the shared object of the xllamacpp wheel, by ctypes.

The wheel's Python API is a server without logits of a prompt; the C API gives all of them.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, quant_shape_to_byte_shape
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from limbeck.errors import ConfigError, DataError, extra_needed
from limbeck.export.base import Messages, Runtime, RuntimeTokenizer

PARAMS_BYTES = 1024
"""More than any version's parameter structs, which are passed by value as an opaque block."""
CONTEXT_DEFAULTS = (512, 2048, 512)
"""n_ctx, n_batch and n_ubatch begin the context parameters; other values mean another layout."""
MAX_BATCH = 512
"""Positions computed at once."""
ROWS_AT_ONCE = 1 << 24
"""Weights that are quantised in one call."""
NO_TOKEN = -1
TIMEOUT_S = 300.0


class Params(c.Structure):
    """A parameter struct of any kind; a context's begins with n_ctx, n_batch, n_ubatch."""

    _fields_ = [("words", c.c_uint32 * (PARAMS_BYTES // 4))]


class TokenBatch(c.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
LOG_ERROR = 4

SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LOG, c.c_void_p)),
    "llama_model_default_params": (Params, ()),
    "llama_context_default_params": (Params, ()),
    "llama_model_load_from_file": (c.c_void_p, (c.c_char_p, Params)),
    "llama_model_free": (None, (c.c_void_p,)),
    "llama_model_get_vocab": (c.c_void_p, (c.c_void_p,)),
    "llama_model_chat_template": (c.c_char_p, (c.c_void_p, c.c_char_p)),
    "llama_init_from_model": (c.c_void_p, (c.c_void_p, Params)),
    "llama_free": (None, (c.c_void_p,)),
    "llama_set_n_threads": (None, (c.c_void_p, c.c_int32, c.c_int32)),
    "llama_get_memory": (c.c_void_p, (c.c_void_p,)),
    "llama_memory_clear": (None, (c.c_void_p, c.c_bool)),
    "llama_batch_init": (TokenBatch, (c.c_int32, c.c_int32, c.c_int32)),
    "llama_batch_free": (None, (TokenBatch,)),
    "llama_decode": (c.c_int32, (c.c_void_p, TokenBatch)),
    "llama_get_logits": (c.POINTER(c.c_float), (c.c_void_p,)),
    "llama_vocab_n_tokens": (c.c_int32, (c.c_void_p,)),
    "llama_vocab_bos": (c.c_int32, (c.c_void_p,)),
    "llama_vocab_eos": (c.c_int32, (c.c_void_p,)),
    "llama_vocab_is_eog": (c.c_bool, (c.c_void_p, c.c_int32)),
    "llama_tokenize": (
        c.c_int32,
        (c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool),
    ),
    "ggml_quantize_chunk": (
        c.c_size_t,
        (c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p),
    ),
}
"""Result and arguments of the functions that are called."""


class Library(NamedTuple):
    """The loaded shared object.

    Attributes:
        call: Its functions, with their types.
        errors: Messages of llama.cpp's log at level error, newest last.
        log: The callback that fills it, kept alive.
    """

    wheel: ModuleType
    call: c.CDLL
    errors: list[str]
    log: Any


def require_llama_cpp() -> ModuleType:
    """The wheel that brings llama.cpp."""
    with extra_needed("A GGUF export, which is run in llama.cpp first,", "xllamacpp", "export"):
        return importlib.import_module("xllamacpp")


@functools.cache
def library() -> Library:
    """llama.cpp, loaded once in a process."""
    wheel = require_llama_cpp()
    call = c.CDLL(str(importlib.import_module("xllamacpp.xllamacpp").__file__))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(call, name)  # an attribute keeps its types, an item does not
        function.restype, function.argtypes = result, arguments
    errors: list[str] = []

    def keep(level: int, text: bytes | None, _data: object) -> None:
        if level == LOG_ERROR and text:
            errors.append(text.decode(errors="replace").strip())

    log = LOG(keep)
    call.llama_log_set(log, None)
    call.llama_backend_init()
    defaults = tuple(call.llama_context_default_params().words[:3])
    if defaults != CONTEXT_DEFAULTS:
        raise ConfigError(
            f"llama.cpp's context parameters must begin with {CONTEXT_DEFAULTS}, and those of "
            f"xllamacpp {wheel.__version__} begin with {defaults}: it is a version this limbeck "
            "does not know. Install the one that limbeck[export] pins."
        )
    return Library(wheel, call, errors, log)


def quantized(
    weights: Float[np.ndarray, "R D"],
    kind: GGMLQuantizationType,
    importance: Float32[np.ndarray, " D"] | None = None,
) -> UInt8[np.ndarray, "R bytes"]:
    """A matrix in one of llama.cpp's block formats, by llama.cpp itself.

    Args:
        weights: float32; D is divisible by the format's block.
        importance: Of each column's error; all the same without it.
    """
    call = library().call
    source = np.ascontiguousarray(weights, dtype=np.float32)
    rows, width = source.shape
    blocks = np.empty(quant_shape_to_byte_shape(source.shape, kind), dtype=np.uint8)
    weighed = None if importance is None else np.ascontiguousarray(importance)
    column = None if weighed is None else weighed.ctypes.data
    step = max(ROWS_AT_ONCE // width, 1)
    for first in range(0, rows, step):
        part = source[first : first + step]
        into = blocks[first : first + step]
        written = call.ggml_quantize_chunk(
            int(kind), part.ctypes.data, into.ctypes.data, 0, len(part), width, column
        )
        assert written == into.nbytes, f"{kind.name}: {written} bytes for {into.nbytes}"
    return blocks


@contextmanager
def running(path: Path, max_positions: int) -> Iterator[LlamaCpp]:
    """A GGUF file in llama.cpp, on the CPU."""
    lib = library()
    lib.errors.clear()
    model = lib.call.llama_model_load_from_file(
        str(path).encode(), lib.call.llama_model_default_params()
    )
    context = None
    try:
        if model:
            context = lib.call.llama_init_from_model(model, context_params(lib, max_positions))
        if not context:
            raise DataError(
                f"llama.cpp must load {path.name}, and refuses it: "
                f"{' '.join(lib.errors[-3:]) or 'it gives no reason.'}"
            )
        threads = torch.get_num_threads()
        lib.call.llama_set_n_threads(context, threads, threads)
        yield LlamaCpp(lib, path, (model, context), max_positions)
    finally:
        if context:
            lib.call.llama_free(context)
        if model:
            lib.call.llama_model_free(model)


def context_params(lib: Library, max_positions: int) -> Params:
    """Parameters of a context in which one sequence of so many positions fits one batch."""
    params: Params = lib.call.llama_context_default_params()
    params.words[0] = params.words[1] = max_positions
    params.words[2] = min(max_positions, MAX_BATCH)
    return params


class LlamaCpp(Runtime, RuntimeTokenizer):
    """One model and context, and its own tokenizer; made by `running`."""

    def __init__(
        self, lib: Library, path: Path, handles: tuple[int, int], max_positions: int
    ) -> None:
        self._lib, self._call, self._path = lib, lib.call, path
        self._model, self._context = handles
        self._max_positions = max_positions
        self._vocabulary: int = self._call.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(self._call.llama_vocab_n_tokens(self._vocabulary))
        self.bos_id = known(self._call.llama_vocab_bos(self._vocabulary))
        self.eos_id = known(self._call.llama_vocab_eos(self._vocabulary))
        self.tokenizer = self

    def logits(self, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
        assert 0 < len(token_ids) <= self._max_positions, "llama.cpp aborts the process otherwise"
        self._call.llama_memory_clear(self._call.llama_get_memory(self._context), True)
        batch = self._call.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for place, token in enumerate(token_ids):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            status = self._call.llama_decode(self._context, batch)
            if status != 0:
                raise DataError(
                    f"llama.cpp must read {len(token_ids):,} positions with {self._path.name}, and "
                    f"failed with status {status}: {' '.join(self._lib.errors[-3:])}"
                )
            shape = (len(token_ids), self.vocabulary_size)
            values = np.ctypeslib.as_array(self._call.llama_get_logits(self._context), shape)
            return torch.from_numpy(values.copy())
        finally:
            self._call.llama_batch_free(batch)

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        ids = (c.c_int32 * room)()
        count = self._call.llama_tokenize(
            self._vocabulary, data, len(data), ids, room, add_special, True
        )
        assert count >= 0, "a text has at most one token a byte, and a few around it"
        return list(ids[:count])

    def end_ids(self) -> frozenset[int]:
        """All tokens at which llama.cpp stops: the file's, and those it recognises by name."""
        is_end = self._call.llama_vocab_is_eog
        return frozenset(i for i in range(self.vocabulary_size) if is_end(self._vocabulary, i))

    def render(self, chats: Sequence[Messages]) -> list[str] | None:
        if self._call.llama_model_chat_template(self._model, None) is None:
            return None
        return rendered(self._path, chats)


def known(token: int) -> int | None:
    """A token as llama.cpp names it; None where there is none."""
    return None if token == NO_TOKEN else token


def rendered(path: Path, chats: Sequence[Messages]) -> list[str]:
    """Chats as llama.cpp's server renders them, in a process of its own."""
    task = {"path": str(path.absolute()), "chats": [[dict(m) for m in chat] for chat in chats]}
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("render_chat.py"))],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    try:
        prompts: list[str] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(
            f"llama.cpp must render the chat template of {path.name}, and cannot: {reason}"
        ) from error
    return prompts
