"""Experiment trackers as metric sinks; the libraries of those in `track` alone are imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.errors import extra_needed
from limbeck.registry import Component, Registry
from limbeck.train.metrics import MetricSink, Record

PROJECT = "limbeck"


def load(module: str, tracker: str) -> Any:
    """A tracker's module."""
    extra = "tensorboard" if tracker == "tensorboard" else "track"
    with extra_needed("track", tracker, extra):
        return importlib.import_module(module)


def numbers(record: Record) -> dict[str, float]:
    """A record's numbers, each under `kind/name`, as trackers group them."""
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name != "step"
    }


class TensorBoardSink:
    """Event files under the run directory."""

    def __init__(self, folder: Path) -> None:
        self._writer_class = load("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def begin(self, step: int, steps: int) -> None:
        """Open the files, and hide earlier records of later steps."""
        self._writer = self._writer_class(str(self._folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, global_step=record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Tracker:
    """A tracking library that is started, given numbers and finished by functions."""

    def __init__(
        self, start: Callable[[], Any], log: Callable[..., Any], finish: Callable[[], Any]
    ) -> None:
        self._start, self._log, self._finish = start, log, finish
        self._is_open = False

    def begin(self, step: int, steps: int) -> None:
        self._start()
        self._is_open = True

    def write(self, record: Record) -> None:
        if found := numbers(record):
            self._log(found, step=record["step"])

    def close(self) -> None:
        if self._is_open:
            self._finish()


trackers: Registry[MetricSink] = Registry("tracker", package="limbeck.train")
"""Factories `(folder: Path, *, options) -> MetricSink`; the folder is the trial's."""

trackers.register("tensorboard")(TensorBoardSink)


def run_name(folder: Path, name: str | None) -> str:
    """What a tracker calls a trial: its folder's name, or a name and, beside the run, both.

    Example:
        >>> run_name(Path("runs/q/stages/cross_entropy"), "small")
        'small-cross_entropy'
    """
    if name is None:
        return folder.name
    return f"{name}-{folder.name}" if folder.parent.name == "stages" else name


@trackers.register("wandb")
def wandb_sink(folder: Path, *, project: str = PROJECT, name: str | None = None) -> Tracker:
    """Weights & Biases; a resumed run is another run of the same name.

    Args:
        project: Project the run belongs to.
        name: Of the run; by default its folder's. Trials beside the run add their own.
    """
    wandb = load("wandb", "wandb")
    start = partial(wandb.init, project=project, name=run_name(folder, name), dir=str(folder))
    return Tracker(start, wandb.log, wandb.finish)


@trackers.register("trackio")
def trackio_sink(folder: Path, *, project: str = PROJECT, name: str | None = None) -> Tracker:
    """Trackio, on this machine; a resumed run continues the one of its name.

    Args:
        project: Project the run belongs to.
        name: Of the run; by default its folder's. Trials beside the run add their own.
    """
    trackio = load("trackio", "trackio")
    start = partial(trackio.init, project=project, name=run_name(folder, name), resume="allow")
    return Tracker(start, trackio.log, trackio.finish)


@trackers.register("mlflow")
def mlflow_sink(folder: Path, *, project: str = PROJECT, name: str | None = None) -> Tracker:
    """MLflow at `MLFLOW_TRACKING_URI`; a resumed run is another run of the same name.

    Args:
        project: Experiment the run belongs to.
        name: Of the run; by default its folder's. Trials beside the run add their own.
    """
    mlflow = load("mlflow", "mlflow")

    def start() -> None:
        mlflow.set_experiment(project)
        mlflow.start_run(run_name=run_name(folder, name))

    return Tracker(start, mlflow.log_metrics, mlflow.end_run)


def make_sinks(specs: Iterable[Component | str], folder: Path) -> list[MetricSink]:
    """The trackers of `track`, for a trial in a folder."""
    return [trackers.bind(spec, f"track[{i}]")(folder) for i, spec in enumerate(specs)]
