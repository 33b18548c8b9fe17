"""The training loop: steps, evaluation, checkpoints, stopping."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

import torch

from limbeck.batch import Batch
from limbeck.data.source import StepData
from limbeck.distributed import (
    abandon_pass,
    broadcast_object,
    checkpoint_name,
    gathered,
    latest,
    load_checkpoint,
    set_damaged_aside,
    together,
)
from limbeck.distributed.stopping import SIGNALS
from limbeck.errors import ConfigError, NonFiniteError, Stopped
from limbeck.files import sweep
from limbeck.models import checkpoint_activations, evaluating
from limbeck.train.checkpointer import Checkpointer
from limbeck.train.compilation import compile_models
from limbeck.train.metrics import JsonlSink, MetricSink
from limbeck.train.micro_batch import (
    choose_micro_batch,
    is_out_of_memory,
    out_of_memory,
    reduces_once,
    used_bytes,
)
from limbeck.train.non_finite import bad_rows, documents_of, dump, narrow
from limbeck.train.optimizers import make_optimizers, set_rate
from limbeck.train.resume import Totals, more_steps, require_same
from limbeck.train.schedule import make_schedule
from limbeck.train.setup import TrainResult, TrainSetup
from limbeck.train.step import Accumulated, StepOutcome, accumulate, apply, count_step


def train(setup: TrainSetup) -> TrainResult:
    """Train a student; every rank calls it.

    Killed at any moment, it continues from its newest whole checkpoint; on one machine, with one
    number of ranks, to the same bits.

    Raises:
        ConfigError: A checkpoint is there and resuming was not asked for, or it is of another run.
        Stopped: A signal came; the run was saved.
        NonFiniteError: Too many steps in a row were not finite.
        RunError: A micro-batch does not fit into memory.
        StorageError: The disk is full; the last checkpoint is intact.
    """
    loop = Loop(setup)
    loop.begin()
    try:
        while not loop.is_finished:
            loop.step()
        loop.finish_saving()
        loop.raise_failed_sink()
    finally:
        loop.close()
    return loop.result()


class Loop:
    """A run in progress."""

    def __init__(self, setup: TrainSetup) -> None:
        self.totals = Totals()
        self._setup = setup
        self._rate = make_schedule(setup.optim, setup.learning_rate)
        checkpoint_activations(setup.distiller.student, setup.memory.activation_checkpointing)
        compile_models(setup)
        self._optimizers = make_optimizers(
            setup.distiller, setup.optim, setup.learning_rate, setup.world.device
        )
        self._sinks: list[MetricSink] = []
        if setup.world.is_main:
            self._sinks = [JsonlSink(setup.folder / "metrics.jsonl"), *setup.sinks]
        self._reduce_once = reduces_once(setup.memory, setup.distiller, setup.world)
        self._failed_sink: Exception | None = None
        self._resumed_from: int | None = None
        self._checkpointer = Checkpointer(setup, self._optimizers)
        self._fingerprint = {**setup.fingerprint, "sample_order": setup.source.fingerprint}

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken, or training was stopped early."""
        return self.totals.step == self._setup.optim.num_steps or self._is_stopped_early

    @property
    def _is_stopped_early(self) -> bool:
        """Whether the last evaluations, as many as `patience`, were not better than the best."""
        patience = self._setup.patience
        return patience is not None and self.totals.since_best >= patience

    @property
    def _most_rows(self) -> int:
        """Rows of the rank that has most of a step."""
        return math.ceil(self._setup.rows_per_step / self._setup.world.size)

    def begin(self) -> None:
        """Load the checkpoint to resume from, and open the sinks."""
        setup = self._setup
        together(lambda: sweep(setup.checkpoints), setup.world, main_only=True)
        damaged = set_damaged_aside(setup.checkpoints, setup.world) if setup.resume else ()
        newest, more = latest(setup.checkpoints, setup.world), 0
        if newest is not None:
            if not setup.resume:
                raise ConfigError(
                    f"{setup.folder} already holds a run, saved at {newest.name}. Resume it, or "
                    "choose another output."
                )
            facts = load_checkpoint(newest, setup.distiller, self._optimizers, setup.world)
            require_same(facts["fingerprint"], self._fingerprint)
            more = more_steps(facts["fingerprint"], self._fingerprint)
            self.totals = Totals(**facts["totals"])
            self._forget_lost_best()
            self._resumed_from = self._checkpointer.saved_at = self.totals.step
        if self.totals.ranks != setup.world.size or setup.memory.micro_batch != "auto":
            self.totals.ranks = setup.world.size
            self.totals.micro_batch = choose_micro_batch(
                setup.memory,
                setup.distiller.student,
                setup.world,
                sequence_length=setup.sequence_length,
                most_rows=self._most_rows,
            )
        together(self._begin_sinks, setup.world, main_only=True)
        setup.distiller.train()
        for text in damaged:
            self._say(kind="note", step=self.totals.step, text=f"damaged checkpoint {text}")
        if self._resumed_from is not None:
            text = f"resumed at {self.totals.step}"
            if more:
                text += f", with {more} more steps; the learning rate follows the longer schedule"
            self._say(kind="note", step=self.totals.step, text=text)

    def _begin_sinks(self) -> None:
        for sink in self._sinks:
            sink.begin(self.totals.step, self._setup.optim.num_steps)

    def _forget_lost_best(self) -> None:
        """Choose the best anew if its checkpoint is gone, removed for a better one of a later step.

        Repeated, that step is the best again; with more steps it may not be.
        """
        setup, best = self._setup, self.totals.best_step
        if best is None or not setup.checkpoint.keep_best:
            return
        is_there = (setup.checkpoints / checkpoint_name(best)).exists()
        if not broadcast_object(is_there, setup.world):
            self.totals.best_step = self.totals.best_value = None

    def step(self) -> None:
        """One optimizer step, then evaluation and checkpoint if they are due."""
        setup, totals = self._setup, self.totals
        started = time.perf_counter()
        data = setup.source.step(totals.step, setup.world)
        if totals.step == 0 and setup.opening is not None:
            paused = time.perf_counter()
            with evaluating(setup.distiller), gathered(setup.distiller):
                self._say(kind="note", step=0, text=setup.opening())
            started += time.perf_counter() - paused
        rate = self._rate(totals.step)
        set_rate(self._optimizers, rate)
        setup.distiller.objective.set_step(totals.step)
        outcome, micro_batches, num_scored = self._learn(data)
        seconds = time.perf_counter() - started
        totals.step += 1
        totals.seconds += seconds
        if not outcome.is_finite:
            self._not_a_number(outcome, data, micro_batches)
        else:
            totals.bad_in_row = 0
            totals.tokens += num_scored
            setup.distiller.objective.update(outcome.shares)
            self._say(
                kind="step",
                step=totals.step,
                loss=outcome.loss,
                **outcome.shares,
                learning_rate=rate,
                **setup.in_force(totals.step - 1),
                grad_norm=outcome.grad_norm,
                **data.metrics,
                memory_bytes=used_bytes(setup.world.device),
                tokens=totals.tokens,
                seconds=totals.seconds,
                tokens_per_second=num_scored / seconds,
            )
        for text in data.warnings:
            self._say(kind="note", step=totals.step, text=text)
        improved = self._measure() if self._is_due(setup.evaluate_every) else False
        if self._is_stopped_early:
            lowest = f"lowest at step {totals.best_step}" if totals.best_step else "never finite"
            text = f"training ends: {setup.selected_by} was {lowest}"
            self._say(kind="note", step=totals.step, text=text)
        keep_now = improved and setup.checkpoint.keep_best
        if keep_now or self._is_stopped_early or self._is_due(setup.checkpoint.every):
            self._save()

    def _learn(self, data: StepData) -> tuple[StepOutcome, list[Batch], int]:
        """Take one step; returns its outcome, its micro-batches, and its scored tokens."""
        setup = self._setup
        micro_batches = data.cut(self.totals.micro_batch)
        asked = [0] * len(SIGNALS) if setup.stop is None else setup.stop.counts()
        failed = self._failed_sink is not None
        step_tokens, stop, failed, writing = count_step(
            micro_batches, asked, setup.world, failed=failed, writing=self._checkpointer.is_writing
        )
        if failed:
            self.finish_saving()
            self.raise_failed_sink()
        if stop is not None:
            self._stop(stop)
        if not writing:
            self._checkpointer.finish()
        self._prefetch(micro_batches)
        try:
            accumulated: Accumulated = accumulate(
                setup.distiller,
                setup.teacher,
                micro_batches,
                step_tokens,
                setup.world,
                reduce_once=self._reduce_once,
                seed=setup.dropout_seed,
                step=self.totals.step,
            )
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            if not self._may_halve():
                raise out_of_memory(
                    self.totals.micro_batch, setup.sequence_length, setup.world.size
                ) from error
        else:
            outcome = apply(
                setup.distiller,
                self._optimizers,
                accumulated,
                setup.world,
                max_grad_norm=setup.optim.max_grad_norm,
            )
            return outcome, micro_batches, int(step_tokens)
        # Outside the handler, whose traceback holds the memory that is to be freed.
        self._halve()
        return self._learn(data)

    def _prefetch(self, micro_batches: list[Batch]) -> None:
        """Announce the step to the teacher, and the next one if it works ahead."""
        setup, teacher, following = self._setup, self._setup.teacher, self.totals.step + 1
        if teacher is None:
            return
        teacher.prefetch(micro_batches)
        if teacher.works_ahead and following < setup.optim.num_steps:
            upcoming = setup.source.ahead(following, setup.world)
            if upcoming is not None:
                teacher.prefetch(upcoming.cut(self.totals.micro_batch))

    def _may_halve(self) -> bool:
        """Whether to try a smaller micro-batch.

        Several ranks cannot: those that have memory left wait in a collective of the failed pass.
        """
        setup = self._setup
        return (
            setup.world.size == 1
            and setup.memory.micro_batch == "auto"
            and self.totals.micro_batch > 1
        )

    def _halve(self) -> None:
        """Discard the failed pass, release its memory, and halve the micro-batch."""
        setup = self._setup
        abandon_pass(setup.distiller)
        if setup.teacher is not None:
            setup.teacher.abandon_pass()
        if setup.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self.totals.micro_batch //= 2
        text = f"out of memory: micro-batches have {self.totals.micro_batch} rows from here on"
        self._say(kind="note", step=self.totals.step, text=text)

    def _not_a_number(
        self, outcome: StepOutcome, data: StepData, micro_batches: list[Batch]
    ) -> None:
        """Name and dump the rows, and give up after too many such steps."""
        setup, totals = self._setup, self.totals
        totals.bad_in_row += 1
        failed_batches, numbers = outcome.failed, data.row_numbers(totals.micro_batch)
        if setup.world.mesh is None and failed_batches:
            chosen = [micro_batches[i] for i in failed_batches]
            single, non_finite = narrow(setup.distiller, setup.teacher, chosen, setup.world)
            if non_finite:
                micro_batches, failed_batches = single, tuple(non_finite)
                numbers = [[row] for i in outcome.failed for row in numbers[i]]
        rows = bad_rows(micro_batches, numbers, failed_batches, setup.source, setup.world)
        named, documents = [row.row for row in rows], documents_of(rows)
        self._say(kind="non_finite", step=totals.step, rows=named, documents=documents)
        together(
            lambda: dump(setup.folder, totals.step, rows),
            setup.world,
            main_only=True,
        )
        if totals.bad_in_row >= setup.optim.max_bad_steps:
            self.finish_saving()
            raise NonFiniteError(
                f"Losses and gradients must be numbers; {totals.bad_in_row} steps in a row up to "
                f"step {totals.step} had some that are not. Rows {named} of "
                f"{', '.join(documents)} are in {setup.folder}/non_finite-*.json. "
                "Look at them, lower optim.learning_rate, or continue with --resume-from."
            )

    def _is_due(self, every: int) -> bool:
        return self.totals.step % every == 0 or self.totals.step == self._setup.optim.num_steps

    def _measure(self) -> bool:
        """Evaluate; whether the student is the best so far."""
        setup, totals = self._setup, self.totals
        if setup.evaluate is None:
            return False
        with evaluating(setup.distiller), gathered(setup.distiller):
            measured = setup.evaluate()
        # A rank's own sums may differ in the last bit, and all must agree on what is best.
        shown = broadcast_object(
            {k: float(v) if math.isfinite(v) else None for k, v in measured.items()}, setup.world
        )
        self._say(kind="evaluation", step=totals.step, **shown)
        value = shown.get(setup.selected_by)
        if value is None or (totals.best_value is not None and value >= totals.best_value):
            totals.since_best += 1
            return False
        totals.best_step, totals.best_value, totals.since_best = totals.step, value, 0
        return True

    def _save(self) -> None:
        """Save this step; what is removed afterwards is chosen as of now."""
        totals = self.totals
        facts = {"totals": totals.facts(), "fingerprint": self._fingerprint}
        best = totals.best_step if self._setup.checkpoint.keep_best else None
        protected = {step for step in (best, self._resumed_from) if step is not None}
        self._checkpointer.save(totals.step, facts, protected)

    def _stop(self, number: signal.Signals) -> None:
        """Save this step if it is not saved yet, and stop."""
        step = self.totals.step
        if step > 0 and self._checkpointer.saved_at != step:
            self._save()
        self.finish_saving()
        saved = f"saved at step {step}" if step else "at step 0, with nothing to save"
        raise Stopped(
            f"The run was stopped by {number.name}; it is {saved} in {self._setup.folder}. "
            "Resume it to continue.",
            number,
        )

    def _say(self, **record: Any) -> None:
        """Write a record to every sink; an error of rank 0 waits until all ranks can raise it."""
        try:
            for sink in self._sinks:
                sink.write(record)
        except Exception as error:
            if self._setup.world.size == 1 or isinstance(error, Stopped):  # by a second Ctrl-C
                raise
            self._failed_sink = self._failed_sink or error

    def raise_failed_sink(self) -> None:
        """Raise, on every rank, the error of a sink of rank 0, if there was one."""

        def fail() -> None:
            if self._failed_sink is not None:
                raise self._failed_sink

        together(fail, self._setup.world, main_only=True)

    def finish_saving(self) -> None:
        """Publish the checkpoint that is being written; every rank calls it."""
        self._checkpointer.finish_all()

    def close(self) -> None:
        """Let threads end, and close the sinks."""
        self._checkpointer.close()
        for sink in self._sinks:
            sink.close()

    def result(self) -> TrainResult:
        """Where the run ended."""
        totals = self.totals
        best = totals.best_step if self._setup.checkpoint.keep_best else None
        return TrainResult(totals.step, totals.step if best is None else best)
