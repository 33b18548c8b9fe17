"""The run directory before a run: what it may hold, and clearing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.config import RunConfig, differences, read, refuse_differences
from limbeck.distributed import checkpoint_name
from limbeck.distributed.checkpoints import (
    REPLACED,
    is_checkpoint,
    latest,
    newest_first,
    require_whole,
    step_of,
)
from limbeck.errors import ConfigError
from limbeck.experiment.trials import FORECAST, Trial
from limbeck.files import MANIFEST, publish, set_aside


def require_directory(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that holds another run, unless `resume` or `overwrite` is set."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: must be a folder, and {folder} is a file. Choose another.")
    has_run = (folder / "recipe.yaml").exists()
    refuse_both(resume=resume, overwrite=overwrite)
    if has_run and not (resume or overwrite):
        raise ConfigError(
            f"output: {folder} already holds a run. Add --resume to continue it, --overwrite to "
            "delete it (in Python resume=True, overwrite=True), or choose another output."
        )
    others = {path.name for path in folder.iterdir()} - {FORECAST} if folder.exists() else ()
    if not has_run and any(not name.startswith(".") for name in others):
        raise ConfigError(
            f"output: {folder} holds files that are not a run's. Choose another output."
        )


def refuse_both(*, resume: bool, overwrite: bool) -> None:
    """Refuse to resume and to overwrite at once."""
    if resume and overwrite:
        raise ConfigError(
            "A run is resumed or overwritten, and both were asked for. Leave out --resume or "
            "--overwrite (in Python resume=True or overwrite=True)."
        )


def require_same_held_out(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose students were measured on other held-out text.

    Their figures would be compared with those of students that are measured from now on.

    Args:
        facts: Of the run as it is now, which provenance.json will hold.
    """
    saved = folder / "provenance.json"
    if not (saved.exists() and (folder / "initial.json").exists()):
        return  # nothing was measured
    before = json.loads(saved.read_text(encoding="utf-8"))
    refuse_differences(
        differences(measured_on(read(folder / "recipe.yaml"), before), measured_on(config, facts)),
        "A run is resumed with the held-out text that its students were measured on. Put it back, "
        "choose another output, or measure the finished student with `limbeck evaluate`:",
    )


def measured_on(config: RunConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What figures of students must share to be compared."""
    texts = facts.get("held_out_sets") or {"": facts.get("held_out")}
    evaluate = config.evaluate
    return {
        "held-out text": {
            name: {fact: text[fact] for fact in ("sha256", "documents_used", "scored")}
            for name, text in texts.items()
            if text is not None
        },
        "evaluate": {
            "choose_by": next(iter(texts)),
            "max_tokens": evaluate.max_tokens,
            "max_tokens_during": evaluate.max_tokens_during,
        },
    }


def clear(folder: Path) -> None:
    """Delete the files of a run, except its lock."""
    for name in (
        "stages",
        "checkpoints",
        "rollouts",
        "rollout-weights",
        "student",
        "initial",
        "exports",
        "tensorboard",
    ):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("*.json*", "report.html", "log.txt"):
        for path in folder.glob(pattern):
            path.unlink()


def forget_rollouts(trials: Sequence[Trial], refresh: int) -> None:
    """Delete rollouts that a server wrote after each student's newest checkpoint.

    They are of weights that the steps to come may not pass again. Those of the block that the
    checkpoint lies in were written before it and stay.
    """
    for trial in trials:
        newest = latest(trial.checkpoints)
        begun = 0 if newest is None else -(-step_of(newest) // refresh) * refresh
        for path in (trial.folder / "rollouts").glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) >= begun:
                path.unlink()


def roll_back(trials: Sequence[Trial], step: int) -> list[Path]:
    """Make one step's checkpoint the newest of every student that has begun; called on rank 0.

    Returns:
        New names of the later checkpoints.

    Raises:
        ConfigError: A student has no checkpoint of that step; nothing was changed.
        DataError: It is damaged; the same.
    """
    saved = {t.checkpoints: newest_first(t.checkpoints) for t in trials}
    begun = [t for t in trials if t.scores.exists() or saved[t.checkpoints]] or trials[:1]
    chosen = [trial.checkpoints / checkpoint_name(step) for trial in begun]
    if not all(path.exists() for path in chosen):
        folders = [trial.checkpoints for trial in begun]
        whole = {f: [str(step_of(p)) for p in saved[f][::-1] if is_checkpoint(p)] for f in folders}
        raise ConfigError(
            f"--resume-from: every student that has begun must have a checkpoint of step {step}. "
            "Choose one of the steps there are:"
            + "".join(f"\n  {f}: {', '.join(steps) or 'none'}" for f, steps in whole.items())
        )
    for path in chosen:
        require_whole(path)
    aside = []
    for trial in begun:
        trial.scores.unlink(missing_ok=True)
        newer = [path for path in saved[trial.checkpoints] if step_of(path) > step]
        aside += [set_aside(path, REPLACED) for path in newer]
    return aside


def publish_copy(folder: Path, final: Path) -> None:
    """Publish a copy of a published folder."""
    shutil.rmtree(final, ignore_errors=True)

    def copy(place: Path) -> None:
        ignored = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(folder, place, dirs_exist_ok=True, ignore=ignored)

    publish(final, copy, {"kind": "student"})
