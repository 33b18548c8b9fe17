"""Recordings of the tiny run's teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.config import RunConfig
from limbeck.experiment import load
from limbeck.recording import Recording
from limbeck.recording.recording import Recorded
from tests.experiment.tiny_run import write_recipe


def recording_recipe(folder: Path, form: Any, layers: tuple[int, ...] = (), **changes: Any) -> Path:
    """The tiny run's recipe with a record section."""
    path = write_recipe(folder, **changes)
    recipe = json.loads(path.read_text())
    recipe["record"] = {
        "form": form,
        "output": str(folder / "store"),
        "shard_tokens": 600,
        "layers": list(layers),
    }
    path.write_text(json.dumps(recipe))
    return path


def record(config: RunConfig, part: tuple[int, int] = (0, 1)) -> Recorded:
    """Record a part without a budget."""
    with Recording(config) as recording:
        return recording.record(part, None, lambda: None)


def recorded(folder: Path, form: Any, layers: tuple[int, ...] = (), **changes: Any) -> Path:
    """A recipe whose store is recorded."""
    path = recording_recipe(folder, form, layers, **changes)
    record(load(path))
    return path


def from_store(folder: Path) -> list[str]:
    """Overrides that make the tiny run's recipe learn from its store."""
    store, teacher = folder / "store", folder / "teacher"
    return [f"teacher={{type: stored, path: {store}}}", f"student.path={teacher}"]


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store, but for locks."""
    return {
        p.relative_to(store).as_posix(): p.read_bytes()
        for p in sorted(store.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    }
