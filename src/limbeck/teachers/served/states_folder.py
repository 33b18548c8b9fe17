"""Hidden states that a vLLM server writes to a folder, a file for each answer.

Source: vLLM 0.32, `distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from limbeck.errors import ConfigError, DataError, StorageError, TryLaterError
from limbeck.files import expanded
from limbeck.teachers.served.interface import described, require_echo, wrong

ABSENT_S = 20.0
"""Longest wait for a file without a writer; a shared folder may show it late."""
POLL_S = 0.005

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""Of hidden states."""

HEADER_BYTES = 1 << 16
"""Room for the header of a file, in the largest size that is read."""


class UnwrittenError(ConfigError):
    """A file that an answer names is absent from the folder and has no writer."""


class UnfinishedError(DataError):
    """A file has no writer any more and is incomplete."""


class StatesFolder:
    """The shared folder, as this machine sees it."""

    def __init__(self, folder: str, width: int, timeout_s: float) -> None:
        """
        Args:
            folder: vLLM's `shared_storage_path`; the server may have it under another path.
            width: Size of a hidden state.
            timeout_s: Longest wait for a file that is being written.

        Raises:
            ConfigError: There is no such folder.
        """
        self._folder, self._width, self._timeout_s = expanded(folder), width, timeout_s
        if not self._folder.is_dir():
            raise ConfigError(
                "teacher.states: must be the folder that the server writes hidden states to, and "
                f"{self._folder} is no folder. Give vLLM's shared_storage_path as this machine "
                "sees it."
            )

    def take(self, answer: Any, tokens: Sequence[int]) -> Float[Tensor, "n D"]:
        """Read the states of an answer, check them and delete their file.

        Args:
            tokens: That were sent, n of them.

        Returns:
            The states at all tokens, in the server's data type.

        Raises:
            UnwrittenError: The server writes elsewhere, or died after it answered.
            ConfigError: It writes none.
            UnfinishedError: It was not written to its end; it is kept.
            DataError: The file is not what was asked for; it is kept.
            StorageError: It may not be read or deleted.
            TryLaterError: It was not complete in time.
        """
        file = self._file_of(answer)
        lock = file.with_name(f"{file.name}.lock")
        try:
            data = self._read(file, lock, most_bytes=self._most_bytes(len(tokens)))
            states = checked_states(data, tokens, self._width)
            file.unlink()
            lock.unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            remedy = "Look at the folder and its disk."
            if isinstance(error, PermissionError):
                remedy = "Run server and training as one user, or let this one write there."
            raise StorageError(
                f"teacher.states: limbeck must be able to read and delete the files in "
                f"{self._folder}, and is not ({error}). {remedy}"
            ) from error
        return states

    def _file_of(self, answer: Any) -> Path:
        """The file that an answer names. Only its name is used, so none outside is ever read."""
        facts = answer.get("kv_transfer_params") if isinstance(answer, Mapping) else None
        path = facts.get("hidden_states_path") if isinstance(facts, Mapping) else None
        if path is None:
            raise ConfigError(
                "teacher.states: the server must write hidden states, and its answer names no file "
                "(kv_transfer_params.hidden_states_path). Start vLLM with --speculative-config and "
                "--kv-transfer-config as in docs/served-teachers.md, or leave teacher.states out."
            )
        parts = re.split(r"[/\\]", path) if isinstance(path, str) else [".."]
        if ".." in parts or not re.fullmatch(r"\w[\w.-]{0,250}\.safetensors", parts[-1]):
            raise wrong("name a .safetensors file in its folder", f"names {described(path)}")
        file = self._folder / parts[-1]
        if file.is_symlink():
            raise wrong("name a file in its folder", f"names a link to another ({parts[-1]})")
        return file

    def _read(self, file: Path, lock: Path, most_bytes: int) -> bytes:
        """The bytes of a file, when its writer has released the lock that it held from the start.

        vLLM makes the lock before it answers, and the file at the engine's next step.
        """
        end = time.monotonic() + min(ABSENT_S, self._timeout_s)
        while not file.exists():
            if lock.exists():
                self._wait_for(lock)
            if file.exists():
                break
            if time.monotonic() >= end:
                lock.unlink(missing_ok=True)
                raise UnwrittenError(
                    f"teacher.states: the server must write its hidden states to {self._folder}, "
                    f"and {file.name} did not appear there. Give the folder that is vLLM's "
                    "shared_storage_path, on a disk that both machines share; if it is, read the "
                    "server's log."
                )
            time.sleep(POLL_S)
        self._wait_for(lock)
        if (size := file.stat().st_size) > most_bytes:
            raise wrong(f"have a file of at most {most_bytes:,} bytes", f"has one of {size:,}")
        return file.read_bytes()

    def _wait_for(self, lock: Path) -> None:
        """Wait until a lock is released; without one there is no writer."""
        if not lock.exists():
            return
        try:
            with FileLock(lock, timeout=self._timeout_s, poll_interval=POLL_S):
                pass
        except Timeout:
            raise TryLaterError(
                f"The server must write hidden states in teacher.timeout_s, and {lock.name} was "
                f"locked for {self._timeout_s:,.0f} s. Read its log, start it again, and continue "
                "with --resume."
            ) from None

    def _most_bytes(self, num_tokens: int) -> int:
        """Of a file with this many states in float32 and two layers; one layer is accepted."""
        return HEADER_BYTES + num_tokens * (8 + 8 * self._width)


def checked_states(data: bytes, tokens: Sequence[int], width: int) -> Float[Tensor, "n D"]:
    """The states in a file, if they are of these tokens.

    Raises:
        DataError: They are not, or cannot be a model's.
    """
    try:
        tensors = load(data)
        ids, states = tensors["token_ids"], tensors["hidden_states"]
    except SafetensorError as error:
        raise UnfinishedError(
            "teacher.states: a file of hidden states must be whole, and cannot be read "
            f"({str(error)[:80]}). The server died while it wrote it, or its disk is full."
        ) from error
    except (KeyError, ValueError) as error:
        raise wrong(
            "come with a safetensors file of token_ids and hidden_states",
            f"comes with another ({type(error).__name__}: {str(error)[:80]})",
        ) from error
    if ids.is_floating_point() or ids.is_complex():
        raise wrong("have whole numbers as token_ids", f"has {ids.dtype}")
    require_echo(ids.flatten().tolist(), tokens)
    shape = [len(tokens), 1, width]
    if list(states.shape) != shape or states.dtype not in FORMATS:
        raise wrong(
            f"have hidden states of shape {shape}, one layer for each token",
            f"has {list(states.shape)} of {str(states.dtype).removeprefix('torch.')}: another "
            "model, or other eagle_aux_hidden_state_layer_ids than one",
        )
    if not bool(states.isfinite().all()):
        raise wrong("have finite hidden states", "has some that are not")
    return states[:, 0]
