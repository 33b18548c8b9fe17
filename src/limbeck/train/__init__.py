"""The training loop: steps, optimizers, schedules, metrics and resuming."""

from limbeck.train.dry_run import dry_run
from limbeck.train.loop import train
from limbeck.train.metrics import JsonlSink, MetricSink
from limbeck.train.optimizers import make_optimizers
from limbeck.train.schedule import make_schedule
from limbeck.train.setup import TrainSetup
from limbeck.train.step import accumulate, count_step, train_step
from limbeck.train.terminal import ProgressConsole, TerminalSink
from limbeck.train.trackers import make_sinks

__all__ = [
    "JsonlSink",
    "MetricSink",
    "ProgressConsole",
    "TerminalSink",
    "TrainSetup",
    "accumulate",
    "count_step",
    "dry_run",
    "make_optimizers",
    "make_schedule",
    "make_sinks",
    "train",
    "train_step",
]
