"""What a training run depends on, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.config import CheckpointConfig, MemoryConfig, OptimConfig
from limbeck.data.source import BatchSource
from limbeck.distributed import StopSignals, World
from limbeck.models import Distiller
from limbeck.teachers import Teacher
from limbeck.train.metrics import MetricSink


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """Everything a training run depends on.

    Attributes:
        distiller: Student and objective, on their device and already sharded.
        teacher: Called once a micro-batch; None when the objective reads nothing of a teacher.
        source: The batches of each step.
        learning_rate: Peak, one number of `optim.learning_rate`.
        folder: Run directory, which the caller has locked: metrics.jsonl and checkpoints/ go there.
        dropout_seed: See `accumulate`.
        fingerprint: Everything the numbers depend on, JSON. A checkpoint of another is refused.
        evaluate: Measures the student; every rank calls it. None measures nothing.
        selected_by: The metric of `evaluate` whose lowest value marks the best checkpoint.
        evaluate_every: Steps between calls of `evaluate`; the last step has one too.
        patience: Evaluations in a row without a better value after which training ends.
        sinks: Where records go besides metrics.jsonl; used on rank 0 only.
        resume: Continue from the newest whole checkpoint, if there is one.
        stop: Signals to heed. None never stops early.
        in_force: What changes with the step, counted from 0, for its record: alpha, temperature.
        opening: Called once the first step's batch is there, before it is learned from; every rank
            calls it. What it returns is said.
    """

    distiller: Distiller
    teacher: Teacher | None
    source: BatchSource
    optim: OptimConfig
    learning_rate: float
    checkpoint: CheckpointConfig
    memory: MemoryConfig
    world: World
    folder: Path
    sequence_length: int
    dropout_seed: int = 0
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Callable[[], Mapping[str, float]] | None = None
    selected_by: str = "forward_kl"
    evaluate_every: int = 250
    patience: int | None = None
    sinks: Sequence[MetricSink] = ()
    resume: bool = False
    stop: StopSignals | None = None
    in_force: Callable[[int], Mapping[str, float]] = lambda _: {}
    opening: Callable[[], str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Directory of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all micro-batches and ranks."""
        return self.optim.rows_per_step(self.sequence_length)


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    Attributes:
        step: The last one.
        best_step: Step of the checkpoint to use: the best measured one, or the last.
    """

    step: int
    best_step: int
