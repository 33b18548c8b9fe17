"""Several finished runs side by side, compared document by document where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.config import read
from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.scores import Interval, Scores, paired_difference, summarise
from limbeck.experiment.score_files import read_scores
from limbeck.experiment.trials import best, lasting, trials_of
from limbeck.report.run_files import RunFiles, last_step, read_run
from limbeck.report.run_report import flat

METRICS = ("forward_kl", "top1_agreement", "cross_entropy", "bits_per_byte")


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        name: The shortest end of its path that no other run has.
        figures: Metrics of its student on the test documents, with intervals.
        tasks: Scores of its student by task and metric, with intervals over items.
        parameters: Of its student; None if unknown.
        tokens_per_second: Reading speed of its student on its own machine; None if unknown.
        behind: Forward KL above that of the best run, paired by document; None for the best run,
            and for runs with another teacher, its probabilities in another form, or other test
            documents.
        is_efficient: Whether no comparable run has at most as many parameters and a lower forward
            KL.
        options: Options of its recipe that differ between the runs, as JSON; None where absent.
    """

    name: str
    figures: Mapping[str, Interval]
    tasks: Mapping[str, Interval]
    parameters: int | None
    tokens_per_second: float | None
    tokens: int
    seconds: float
    behind: Interval | None
    is_efficient: bool
    options: Mapping[str, str | None]

    @property
    def forward_kl(self) -> float:
        """Its student's forward KL."""
        return self.figures["forward_kl"]["value"]


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, read.

    Attributes:
        scores: Of its distilled student on the test documents.
        options: All options of its recipe that can change a student.
    """

    folder: Path
    files: RunFiles
    scores: Scores
    options: Mapping[str, str]

    @property
    def parameters(self) -> int | None:
        """Of its student."""
        known = self.files.provenance.get("student", {}).get("parameters")
        return known if isinstance(known, int) else None

    @property
    def reference(self) -> tuple[Any, ...]:
        """What two runs must share for their distances to the teacher to be comparable."""
        facts = self.files.provenance
        text = {k: v for k, v in (facts.get("held_out") or {}).items() if k != "path"}
        teacher = facts.get("teacher", {})
        # A served teacher's weights are not known.
        identity = teacher.get("weights_sha256") or teacher.get("name")
        form = (teacher.get("recorded") or {}).get("form", {})
        if form.get("type") == "hidden":  # as whole as the model's own
            form = {}
        measured_as = (form, teacher.get("quantized"), teacher.get("served"))
        return (identity, *measured_as, text, self.scores.counts.tolist())


def compare_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs, lowest forward KL first.

    Raises:
        ConfigError: A run is named twice.
        DataError: A folder holds no finished run, or its student was not measured.
    """
    places = [folder.resolve() for folder in folders]
    if twice := [
        str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1
    ]:
        raise ConfigError(f"Runs are compared with each other; {twice[0]} is named twice.")
    names = short_names(places)
    found = [finished(folder) for folder in folders]
    order = sorted(range(len(found)), key=lambda i: found[i].scores.mean("forward_kl"))
    first = found[order[0]]
    differing = differing_options([each.options for each in found])
    return [
        ComparedRun(
            name=names[i],
            figures={m: v for m, v in summarise(found[i].scores).items() if m in METRICS},
            tasks=task_scores(found[i].files),
            parameters=found[i].parameters,
            tokens_per_second=reading_speed(found[i].files),
            tokens=last_step(found[i].files.metrics)["tokens"],
            seconds=last_step(found[i].files.metrics)["seconds"],
            behind=behind(found[i], first),
            is_efficient=is_efficient(found[i], found),
            options={option: found[i].options.get(option) for option in differing},
        )
        for i in order
    ]


def finished(folder: Path) -> FinishedRun:
    """A run directory.

    Raises:
        DataError: It holds no finished run, or its student was not measured.
    """
    files = read_run(folder)
    recipe = replace(read(folder / "recipe.yaml"), output=folder)  # it may have been moved
    trials = trials_of(recipe)
    if missing := [trial.scores for trial in trials if not trial.scores.exists()]:
        raise DataError(
            f"Finished runs are compared, and {missing[0]} is missing. Finish the run with "
            "`limbeck distill --resume`."
        )
    scores = read_scores(best(trials)["distilled"].scores).test
    if scores is None or "forward_kl" not in scores.metrics:
        raise DataError(
            f"Runs are compared on held-out text, and {folder} has no forward KL on any. Set "
            "evaluate.data, and a teacher with whole distributions, and run it again."
        )
    return FinishedRun(folder, files, scores, dict(flat(lasting(recipe))))


def short_names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as make them different.

    Example:
        >>> short_names([Path("/runs/a/kl"), Path("/runs/b/kl")])
        ['a/kl', 'b/kl']
    """
    for length in range(1, 1 + max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len({*names}) == len(names):
            break
    return names


def differing_options(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """The options that do not have one value in all recipes."""
    every = sorted({option for options in recipes for option in options})
    return [o for o in every if any(r.get(o) != recipes[0].get(o) for r in recipes)]


def task_scores(files: RunFiles) -> dict[str, Interval]:
    """The student's score on every task that its run measured."""
    rows = files.evaluation.suites.tasks.rows if files.evaluation else ()
    return {
        f"{row.task}, {row.metric}": dict(vars(row.models["distilled"]))
        for row in rows
        if "distilled" in row.models
    }


def reading_speed(files: RunFiles) -> float | None:
    """The student's, as its run measured it."""
    student = files.evaluation.models.get("student") if files.evaluation else None
    return student.tokens_per_second if student else None


def behind(run: FinishedRun, first: FinishedRun) -> Interval | None:
    """Forward KL above that of the first run; None for itself and for runs not comparable."""
    if run is first or run.reference != first.reference:
        return None
    return paired_difference(run.scores, first.scores, "forward_kl")


def is_efficient(run: FinishedRun, runs: Sequence[FinishedRun]) -> bool:
    """Whether no comparable run has at most as many parameters and a lower forward KL."""
    size, kl = run.parameters, run.scores.mean("forward_kl")
    return size is not None and not any(
        other.reference == run.reference
        and other.parameters is not None
        and other.parameters <= size
        and other.scores.mean("forward_kl") < kl
        for other in runs
    )
