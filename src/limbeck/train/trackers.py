"""Experiment trackers, each behind the same three methods. None is used unless asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from limbeck.errors import ConfigError
from limbeck.train.metrics import MetricSink, Record

PROJECT = "limbeck"


def make_sinks(names: Iterable[str], folder: Path) -> list[MetricSink]:
    """The trackers `track` names.

    Args:
        names: `tensorboard`, `wandb`, `trackio`, `mlflow`.
        folder: Run directory; its name is the run's name.

    Raises:
        ConfigError: One is unknown or not installed.
    """
    makers: dict[str, Callable[[Path], MetricSink]] = {
        "tensorboard": TensorBoardSink,
        "wandb": WandbSink,
        "trackio": TrackioSink,
        "mlflow": MlflowSink,
    }
    sinks: list[MetricSink] = []
    for name in names:
        if name not in makers:
            raise ConfigError(f"track: must be of {', '.join(makers)}, got {name!r}.")
        sinks.append(makers[name](folder))
    return sinks


def load(module: str, tracker: str) -> Any:
    """A tracker's module, imported only now that it is asked for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "tensorboard" if tracker == "tensorboard" else "track"
        raise ConfigError(
            f"track: {tracker!r} must be installed, and it is not ({error}). "
            f"Run: pip install 'limbeck[{extra}]'"
        ) from error


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
        """Open the files, and hide what an earlier life said of later steps."""
        self._writer = self._writer_class(str(self._folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Take one record."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, global_step=record["step"])

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """Weights & Biases."""

    def __init__(self, folder: Path) -> None:
        self._wandb = load("wandb", "wandb")
        self._folder = folder
        self._run: Any = None

    def begin(self, step: int, steps: int) -> None:
        """Start a run; a resumed one is another run of the same name."""
        self._run = self._wandb.init(project=PROJECT, name=self._folder.name, dir=str(self._folder))

    def write(self, record: Record) -> None:
        """Take one record."""
        if found := numbers(record):
            self._run.log(found, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


class TrackioSink:
    """Trackio, on this machine."""

    def __init__(self, folder: Path) -> None:
        self._trackio = load("trackio", "trackio")
        self._name = folder.name
        self._is_open = False

    def begin(self, step: int, steps: int) -> None:
        """Start a run, or continue the one of that name."""
        self._trackio.init(project=PROJECT, name=self._name, resume="allow")
        self._is_open = True

    def write(self, record: Record) -> None:
        """Take one record."""
        if found := numbers(record):
            self._trackio.log(found, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        if self._is_open:
            self._trackio.finish()


class MlflowSink:
    """MLflow, wherever `MLFLOW_TRACKING_URI` says."""

    def __init__(self, folder: Path) -> None:
        self._mlflow = load("mlflow", "mlflow")
        self._name = folder.name
        self._is_open = False

    def begin(self, step: int, steps: int) -> None:
        """Start a run; a resumed one is another run of the same name."""
        self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=self._name)
        self._is_open = True

    def write(self, record: Record) -> None:
        """Take one record."""
        if found := numbers(record):
            self._mlflow.log_metrics(found, step=record["step"])

    def close(self) -> None:
        """End the run."""
        if self._is_open:
            self._mlflow.end_run()
