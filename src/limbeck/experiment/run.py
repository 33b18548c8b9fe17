"""A run: its parts, its students, its directory."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from limbeck import __version__
from limbeck.config import RunConfig, dump, read
from limbeck.distributed import (
    StopSignals,
    World,
    decided,
    gathered,
    locked,
    model_for,
    shard,
    together,
    unsharded,
    world,
)
from limbeck.errors import ConfigError
from limbeck.evaluate.suites import Suite
from limbeck.experiment.controls import require_controls
from limbeck.experiment.directory import (
    clear,
    forget_rollouts,
    publish_copy,
    require_directory,
    require_same_held_out,
    roll_back,
)
from limbeck.experiment.exports import require_exports, require_parity, write_exports
from limbeck.experiment.held_out_sets import by_set
from limbeck.experiment.parts import STUDENT_DTYPE, Parts, gather_parts
from limbeck.experiment.provenance import command_line, host_facts, now
from limbeck.experiment.repeats import forget_repeats, run_repeats, seed_figures
from limbeck.experiment.results import compare, make_suites, places
from limbeck.experiment.score_files import TrialScores, read_scores
from limbeck.experiment.trials import (
    Trial,
    TrialRunner,
    best,
    fidelities,
    lasting,
    suite_context,
    trials_of,
)
from limbeck.files import manifest, write_text
from limbeck.heap import freed_memory_kept
from limbeck.models import CausalLM, ModelSource, choose_device, rounds_weights
from limbeck.report.run_files import last_step, lines
from limbeck.report.run_report import write_report
from limbeck.teachers import find_local
from limbeck.tokenizers import load_tokenizer, prove_same_vocabulary, template_hash, tokenizer_hash
from limbeck.train import MetricSink, ProgressConsole, TerminalSink, make_sinks
from limbeck.train.resume import more_steps, require_same


@dataclass(frozen=True)
class RunResult:
    """Results of a run.

    Attributes:
        student: Folder that `AutoModelForCausalLM.from_pretrained` opens.
        report: report.html; None on ranks other than 0.
    """

    student: Path
    evaluation: dict[str, Any]
    report: Path | None


class Run:
    """A recipe with everything it names loaded; use it as a context manager."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._started = now()
        with ExitStack() as stack:
            self.world: World = stack.enter_context(
                world(
                    choose_device(config.device),
                    config.parallel.shard,
                    config.parallel.timeout_s,
                    config.parallel.replicate,
                )
            )
            self.parts: Parts = gather_parts(config, self.world)
            require_exports(config, self.parts)
            require_controls(self.parts)
            self._stack = stack.pop_all()
        self.config = self.parts.config

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.world.is_main

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.config.output

    def train(
        self, *, resume: bool = False, overwrite: bool = False, resume_from: int | None = None
    ) -> RunResult:
        """Train every student the recipe asks for, measure them, write the report.

        Args:
            resume: Resume from the last checkpoint; finished trials are skipped.
            overwrite: Delete the contents of the run directory first.
            resume_from: Resume every student from its checkpoint of this step; later ones are
                renamed to `replaced-...`.

        Raises:
            ConfigError: The run directory holds another run, or no checkpoint of that step.
            Stopped: A signal came; everything is saved.
        """
        resume = resume or resume_from is not None
        together(
            lambda: require_directory(self.folder, resume=resume, overwrite=overwrite),
            self.world,
            main_only=True,
        )
        with StopSignals() as stop, locked(self.folder, self.world, resumes=resume):
            together(
                lambda: self._prepare(resume=resume, overwrite=overwrite, resume_from=resume_from),
                self.world,
                main_only=True,
            )
            self._say_notes()
            suites = self.make_suites()
            trials = trials_of(self.config)
            initial = self.folder / "initial"
            if len(trials) * self.config.evaluate.seeds > 1 and not self.parts.is_shared:
                self.save_initial(initial)
            runner = TrialRunner(self.parts, initial, stop)
            done = decided(lambda: [trial.is_done for trial in trials], self.world)
            for trial, is_done in zip(trials, done, strict=True):
                if not is_done:
                    self.run_trial(runner, trial, resume=resume)
                    gc.collect()  # models are in reference cycles, and the next trial needs memory
            self.release_student()
            run_repeats(self.parts, runner, trials, partial(self.run_trial, resume=resume))
            measured = self._measure_suites(suites, trials)
            evaluation: dict[str, Any] = {}

            def conclude() -> None:
                evaluation.update(self._conclude(trials, measured))
                write_report(self.folder)
                require_parity(evaluation)

            together(conclude, self.world, main_only=True)
            report = self.folder / "report.html" if self.is_main else None
            return RunResult(self.folder / "student", evaluation, report)

    def evaluate(self, student: Path | None = None) -> dict[str, Any]:
        """Metrics of a student's folder against the teacher, on the test documents.

        Args:
            student: Any student with the recipe's tokenizer; the run's own by default.

        Raises:
            ConfigError: The recipe names no held-out text, or the student's tokens are others.
        """
        fidelity, others = fidelities(self.parts)
        if fidelity is None:
            raise ConfigError(
                "evaluate.data must name held-out text to measure on, and names none. Add it to "
                "the recipe."
            )
        suites = self.make_suites()
        model = self._open(student or self.folder / "student", self.world)
        if student is not None:
            self._require_same_vocabulary(student, model)
        shard(model, model.blocks, self.world)
        with gathered(model), freed_memory_kept(self.world.device):
            found = {name: other.test(model) for name, other in others.items()}
            scores = fidelity.test(model)
        evaluation = compare({"distilled": scores})
        both = {"distilled": TrialScores(test=scores, others=found)}
        evaluation |= by_set(self.parts.held_out_sets, both)
        if suites:  # ranks write different numbers of tokens
            with unsharded(model):
                evaluation |= suite_figures(suites, {"distilled": model})
        return evaluation

    def _prepare(self, *, resume: bool, overwrite: bool, resume_from: int | None) -> None:
        """Prepare the run directory, on rank 0 while the others wait."""
        if overwrite:
            clear(self.folder)
        trials = trials_of(self.config)
        if resume:
            require_same_held_out(self.folder, self.config, self.parts.facts)
        is_longer = resume and extends_recipe(self.folder, self.config)
        if resume_from is not None:
            for path in roll_back(trials, resume_from):
                self._note(
                    f"a later checkpoint is kept as {path} until the run has come as far again"
                )
        if is_longer:
            for trial in trials:
                trial.scores.unlink(missing_ok=True)  # its training continues
        rollout = self.config.rollout
        replaces_steps = resume_from is not None or is_longer
        if replaces_steps:
            forget_repeats(self.config)
        if replaces_steps and rollout is not None and rollout.server is not None:
            forget_rollouts(trials, rollout.refresh)
        write_text(self.folder / "recipe.yaml", dump(self.config))
        self._write_provenance({})

    def run_trial(self, runner: TrialRunner, trial: Trial, *, resume: bool) -> None:
        """Train a trial; progress lines are also written to its log.txt."""
        sinks: list[MetricSink] = []
        with ExitStack() as opened:

            def open_sinks() -> None:
                trial.folder.mkdir(parents=True, exist_ok=True)
                log = opened.enter_context((trial.folder / "log.txt").open("a", encoding="utf-8"))
                consoles = (progress_console(), Console(file=log, width=200))
                title = trial.name if trial.folder == self.folder else trial.folder.name
                sinks.extend(TerminalSink(each, title) for each in consoles)
                sinks.extend(make_sinks(self.config.track, trial.folder))

            together(open_sinks, self.world, main_only=True)
            distiller = runner.open(trial)
            opened.enter_context(freed_memory_kept(self.world.device))  # not while models load
            runner.run(trial, distiller, sinks, resume=resume)

    def save_initial(self, folder: Path) -> None:
        """Publish the student as initialised, unless trials have it from memory or its files."""
        student = self.parts.student
        if student is not None and rounds_weights(student.model):
            return  # every trial copies it
        if student is not None and student.model.weight_files is not None:
            return  # every trial opens it again

        def save() -> None:
            if student is not None and manifest(folder) is None:
                self.parts.publish_student(student.model, folder)

        together(save, self.world, main_only=True)

    def release_student(self) -> None:
        """Leave the saved student to its files: variants of the parts would each train this one."""
        student = self.parts.student
        reopens = student is not None and student.model.weight_files is not None
        if student is not None and not reopens and not rounds_weights(student.model):
            self.parts.student = None

    def _require_same_vocabulary(self, folder: Path, model: CausalLM) -> None:
        """Refuse a student whose tokenizer gives the recipe's ids another meaning."""
        prove_same_vocabulary(
            load_tokenizer(str(folder)),
            self.parts.tokenizer,
            student_rows=model.vocabulary_rows,
            teacher_rows=self.parts.teacher.info.vocabulary_rows,
        )

    def _open(self, folder: Path, here: World) -> CausalLM:
        """A finished student; without a mesh it is loaded whole."""
        model = model_for(ModelSource(str(folder)), here, STUDENT_DTYPE)
        model.vocabulary_size = self.parts.vocabulary.size
        return model

    def make_suites(self) -> dict[str, Suite]:
        """The recipe's further suites; none without held-out text."""
        context = suite_context(self.parts)
        return {} if context is None else make_suites(self.config, context)

    def _measure_suites(
        self, suites: Mapping[str, Suite], trials: Sequence[Trial]
    ) -> dict[str, Any]:
        """Figures of the best student of each kind; every rank calls it."""
        if not suites:
            return {}
        chosen = decided(lambda: {n: str(t.folder) for n, t in best(trials).items()}, self.world)
        students = {
            n: self._open(Path(f) / "student", self.world.unsharded) for n, f in chosen.items()
        }
        return suite_figures(suites, students)

    def _conclude(self, trials: Sequence[Trial], measured: Mapping[str, Any]) -> dict[str, Any]:
        """Write student, curves, metrics and examples of the best trials, on rank 0."""
        chosen = best(trials)
        main = chosen["distilled"]
        if main.folder != self.folder:
            publish_copy(main.folder / "student", self.folder / "student")
            metrics = (main.folder / "metrics.jsonl").read_text(encoding="utf-8")
            write_text(self.folder / "metrics.jsonl", metrics)
        files = {"initial": self.folder / "initial.json"}
        files |= {name: trial.scores for name, trial in chosen.items()}
        by_kl = best(trials, "forward_kl").get("cross_entropy")
        if by_kl is not None and by_kl != chosen["cross_entropy"]:
            files["cross_entropy_by_kl"] = by_kl.scores
        found = {name: read_scores(path) for name, path in files.items()}
        evaluation = compare({name: scores.test for name, scores in found.items() if scores.test})
        evaluation |= by_set(self.parts.held_out_sets, found)
        evaluation |= {**measured, **seed_figures(self.config, chosen)}
        evaluation["learning_rate"] = {name: trial.learning_rate for name, trial in chosen.items()}
        evaluation["selected_by"] = {name: trial.selected_by for name, trial in chosen.items()}
        held_out = self.parts.held_out
        teacher = find_local(self.parts.teacher)
        # Examples need a teacher that can continue a text.
        if held_out is not None and teacher is not None and self.world.size == 1:
            students = {
                name: self._open(trial.folder / "student", self.world.unsharded)
                for name, trial in chosen.items()
            }
            count = self.config.evaluate.continuations
            with gathered(teacher.model):
                evaluation |= places(self.parts, teacher, held_out, students, count)
        path = self.folder / "evaluation.json"
        write_text(path, json.dumps(evaluation, indent=1))
        if self.config.export:
            evaluation["exports"] = write_exports(self.config)
            write_text(path, json.dumps(evaluation, indent=1))
        metrics_of = {name: lines(trial.folder / "metrics.jsonl") for name, trial in chosen.items()}
        seconds = {f"training_{name}": last_step(m)["seconds"] for name, m in metrics_of.items()}
        self._write_provenance({"finished": now(), "timing": seconds})
        return evaluation

    def _say_notes(self) -> None:
        if self.is_main:
            for note in self.parts.notes:
                self._note(note)

    def _note(self, text: str) -> None:
        progress_console().print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def _write_provenance(self, ending: Mapping[str, Any]) -> None:
        """Write provenance.json: versions, hashes, host, and at the end times."""
        tokenizer = self.parts.tokenizer
        provenance = {
            "limbeck": __version__,
            "command": command_line(),
            "started": self._started,
            "host": host_facts(str(self.world.device), self.world.size),
            "seed": self.config.seed,
            "tokenizer": {"hash": tokenizer_hash(tokenizer), "template": template_hash(tokenizer)},
            "vocabulary": {
                "size": self.parts.vocabulary.size,
                "same_tokenizer": self.parts.vocabulary.same_tokenizer,
                "notes": self.parts.notes,
            },
            **self.parts.facts,
            **ending,
        }
        write_text(self.folder / "provenance.json", json.dumps(provenance, indent=1))


def assemble(config: RunConfig) -> Run:
    """Load and verify everything that a recipe names.

    Raises:
        ConfigError: Teacher, student, data or objective do not fit together.
        DataError: The text cannot be used.
    """
    return Run(config)


def suite_figures(suites: Mapping[str, Suite], students: Mapping[str, CausalLM]) -> dict[str, Any]:
    """Figures of several students by suite; every rank calls it."""
    measured = {name: suite.measure_all(students) for name, suite in suites.items()}
    return {"suites": measured} if measured else {}


def progress_console() -> Console:
    """The console for progress: stderr, since programs read the result from stdout."""
    return ProgressConsole(stderr=True)


def extends_recipe(folder: Path, config: RunConfig) -> bool:
    """Whether a resumed run has more steps than it began with.

    Raises:
        ConfigError: The recipe differs in something else.
    """
    saved = folder / "recipe.yaml"
    if not saved.exists():
        return False
    before, now = {"recipe": lasting(read(saved))}, {"recipe": lasting(config)}
    require_same(before, now)
    return more_steps(before, now) > 0
