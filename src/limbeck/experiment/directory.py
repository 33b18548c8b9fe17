"""The run directory before a run: what it may hold, and clearing it."""

from __future__ import annotations

import shutil
from pathlib import Path

from limbeck.errors import ConfigError
from limbeck.experiment.trials import FORECAST


def require_directory(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that holds another run, unless `resume` or `overwrite` is set."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: must be a folder, and {folder} is a file. Choose another.")
    has_run = (folder / "recipe.yaml").exists()
    if resume and overwrite:
        raise ConfigError(
            "A run is resumed or overwritten, and both were asked for. Leave out --resume or "
            "--overwrite."
        )
    if has_run and not (resume or overwrite):
        raise ConfigError(
            f"output: {folder} already holds a run. Add --resume to continue it, --overwrite to "
            "delete it, or choose another output."
        )
    others = {path.name for path in folder.iterdir()} - {FORECAST} if folder.exists() else ()
    if not has_run and any(not name.startswith(".") for name in others):
        raise ConfigError(
            f"output: {folder} holds files that are not a run's. Choose another output."
        )


def clear(folder: Path) -> None:
    """Delete the files of a run, except its lock."""
    for name in (
        "stages",
        "checkpoints",
        "rollouts",
        "student",
        "initial",
        "exports",
        "tensorboard",
    ):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("*.json*", "report.html", "log.txt"):
        for path in folder.glob(pattern):
            path.unlink()
