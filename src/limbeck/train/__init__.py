"""The training loop: steps, optimizers, schedules, metrics and resuming."""

from limbeck.train.dry_run import dry_run
from limbeck.train.loop import train
from limbeck.train.metrics import JsonlSink, MetricSink, Record
from limbeck.train.optimizers import make_optimizers
from limbeck.train.schedule import make_schedule
from limbeck.train.setup import TrainResult, TrainSetup
from limbeck.train.step import StepOutcome, accumulate, apply, count_step, train_step
from limbeck.train.terminal import ProgressConsole, TerminalSink
from limbeck.train.trackers import make_sinks

__all__ = [
    "JsonlSink",
    "MetricSink",
    "ProgressConsole",
    "Record",
    "StepOutcome",
    "TerminalSink",
    "TrainResult",
    "TrainSetup",
    "accumulate",
    "apply",
    "count_step",
    "dry_run",
    "make_optimizers",
    "make_schedule",
    "make_sinks",
    "train",
    "train_step",
]
