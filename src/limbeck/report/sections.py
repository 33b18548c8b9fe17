"""Tables of an evaluation: groups of tokens, samples, tasks; for the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from limbeck.report.run_files import (
    Evaluation,
    Figure,
    GenerationFigures,
    SpeculativeFigures,
    TaskRow,
)
from limbeck.report.words import MISSING, TRIALS, ends, number, percent

STUDENTS = ("distilled", "cross_entropy")
KINDS = {
    "teacher_entropy": "Teacher's entropy, by tenths of the tokens (1: the most certain)",
    "position": "Position in the window",
    "source": "Source of the text",
}
SET_METRICS = {
    "forward_kl": ("Forward KL", number),
    "top1_agreement": ("Same first choice", percent),
    "perplexity": ("Perplexity", number),
}
"""Label, and how a value is written."""
SEED_METRICS = {
    "forward_kl": ("Forward KL", number),
    "top1_agreement": ("Same first choice", percent),
    "cross_entropy": ("Cross-entropy", number),
}
"""Label, and how a value is written."""
SAMPLES = {
    "teacher_nll": ("Teacher's surprise", "nats a token of the samples", number),
    "own_nll": ("Writer's surprise", "nats a token; its entropy", number),
    "forward_kl": ("Forward KL there", "nats a token, on the samples", number),
    "repeated": ("Repeated 4-grams", "that stood earlier in the sample", percent),
    "distinct_1": ("Distinct tokens", "of all sampled tokens", percent),
    "distinct_2": ("Distinct pairs", "of all sampled pairs", percent),
    "distinct_3": ("Distinct triples", "of all sampled triples", percent),
    "ended": ("Ended", "with an end token", percent),
    "length": ("Length", "tokens", number),
}
"""Label, meaning, and how a value is written."""


@dataclass(frozen=True)
class Cell:
    """A figure, and the ends of its interval in small print."""

    value: str
    ends: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def group_tables(evaluation: Evaluation) -> Iterator[Table]:
    """The students by group of tokens, one table for each kind of group."""
    known = [trial for trial in STUDENTS if trial in evaluation.groups]
    for kind, title in KINDS.items():
        trials = {t: evaluation.groups[t][kind] for t in known if kind in evaluation.groups[t]}
        if not trials:
            continue
        heads = ["", "Tokens"]
        heads += [f"{metric}: {TRIALS[t]}" for metric in ("KL", "Same choice") for t in trials]
        rows = []
        for index, first in enumerate(next(iter(trials.values()))):
            beside = [t[index] for t in trials.values() if index < len(t)]
            cells = [Cell(first.group), Cell(f"{first.tokens:,}")]
            cells += [figure_cell(each.forward_kl) for each in beside]
            cells += [figure_cell(each.top1_agreement, percent) for each in beside]
            rows.append(tuple(cells))
        yield Table(title, "", tuple(heads), tuple(rows))


def seed_tables(evaluation: Evaluation) -> Iterator[Table]:
    """Both students with every seed, if there are several."""
    found = evaluation.seeds
    rows = []
    for metric, (label, shown) in SEED_METRICS.items():
        figures = {TRIALS[name]: each.get(metric) for name, each in found.trials.items()}
        figures["Difference"] = found.difference.get(metric)
        for name, figure in figures.items():
            if figure is not None:
                cells = [Cell(shown(value)) for value in figure.each]
                rows.append((Cell(label), Cell(name), *cells, figure_cell(figure, shown)))
    if rows:
        note = (
            "The same start, and the text in another order. The interval of the mean covers seeds "
            "and documents. Difference: cross-entropy only, less distilled."
        )
        heads = ("Metric", "Student", *(f"Seed {seed}" for seed in found.seeds), "Mean")
        yield Table("Other seeds", note, heads, tuple(rows))


def set_tables(evaluation: Evaluation) -> Iterator[Table]:
    """A few figures on each of several held-out texts, if there are several."""
    if not evaluation.sets:
        return
    trials = [trial for trial in TRIALS if trial in evaluation.trials]
    rows = []
    for name, measured in evaluation.sets.items():
        heading = Cell(name)
        for metric, (label, shown) in SET_METRICS.items():
            figures = [measured.trials.get(trial, {}).get(metric) for trial in trials]
            if any(figures):
                cells = [figure_cell(figure, shown) for figure in figures]
                rows.append((heading, Cell(label), *cells))
                heading = Cell("")
    note = (
        "Test documents of every text; figures elsewhere on this page are of "
        f"{evaluation.chosen_by_set}, which chose the checkpoint."
    )
    heads = ("Text", "Metric", *(TRIALS[trial] for trial in trials))
    yield Table("Each held-out text", note, heads, tuple(rows))


def suite_tables(evaluation: Evaluation) -> Iterator[Table]:
    """The suites `generation`, `speculative` and `tasks`, where they were measured."""
    if evaluation.suites.generation:
        yield generation_table(evaluation.suites.generation)
    if evaluation.suites.speculative:
        yield speculative_table(evaluation.suites.speculative)
    if evaluation.suites.tasks.rows:
        yield tasks_table(evaluation.suites.tasks.rows, evaluation.suites.tasks.harness)


def generation_table(found: Mapping[str, GenerationFigures]) -> Table:
    """What teacher and students write after the same prompts."""
    names = [trial for trial in STUDENTS if trial in found]
    writers = {"teacher": found[names[0]].teacher} if names else {}
    writers |= {trial: found[trial].student for trial in names}
    rows = []
    for figure, (label, meaning, shown) in SAMPLES.items():
        cells = [figure_cell(of.get(figure), shown) for of in writers.values()]
        if any(cell.value != MISSING for cell in cells):
            rows.append((Cell(label, meaning), *cells))
    prompts = found[names[0]].prompts if names else 0
    note = f"Samples after {prompts:,} held-out prompts, drawn with the same seeds."
    return Table("What they write", note, ("", *(TRIALS[w] for w in writers)), tuple(rows))


def speculative_table(found: Mapping[str, SpeculativeFigures]) -> Table:
    """How well each student drafts for its teacher."""
    rows = tuple(
        (
            Cell(TRIALS.get(trial, trial)),
            figure_cell(each.acceptance, percent),
            figure_cell(each.shared, percent),
            figure_cell(each.tokens_per_pass),
        )
        for trial, each in found.items()
    )
    first = next(iter(found.values()))
    note = (
        f"transformers' assisted generation after {first.prompts:,} held-out prompts, "
        f"{first.draft_tokens} drafted tokens a pass of the teacher. Expected: the sum of "
        "min(p, q) on the same text."
    )
    heads = ("Student as draft model", "Drafts accepted", "Expected", "Tokens a teacher's pass")
    return Table("Speculative decoding", note, heads, rows)


def tasks_table(found: tuple[TaskRow, ...], harness: str) -> Table:
    """Scores on tasks, and how much of the teacher's was retained."""
    names = [t for t in TRIALS if any(t in row.models for row in found)]
    rows = []
    for row in found:
        cells = [Cell(f"{row.task}", f"{row.metric}, {row.items:,} items")]
        cells.append(Cell(percent(row.floor)))
        cells += [figure_cell(row.models.get(name), percent) for name in names]
        cells.append(figure_cell(row.retained.get("distilled"), percent))
        for other in ("teacher", "cross_entropy"):
            versus = row.against.get(other)
            counts = "" if versus is None or versus.p is None else p_value(versus.p)
            cells.append(
                Cell(MISSING)
                if versus is None
                else Cell(figure_cell(versus.difference, percent).value, counts)
            )
        rows.append(tuple(cells))
    heads = ("", "Guess", *(TRIALS[name] for name in names), "Retained")
    note = (
        f"lm-evaluation-harness {harness}, the same items for every model. Retained: (student - "
        "guess) / (teacher - guess). The last columns: distilled less the other, and McNemar's p."
    )
    return Table("Tasks", note, (*heads, "Less teacher", "Less cross-entropy"), tuple(rows))


def p_value(p: float) -> str:
    """A p as people write it."""
    return "p < 0.001" if p < 0.001 else f"p = {number(p)}"


def figure_cell(
    figure: Figure | float | None, shown: Callable[[float | None], str] = number
) -> Cell:
    """A figure with its interval."""
    if not isinstance(figure, Figure):
        return Cell(shown(figure))
    return Cell(shown(figure.value), ends(figure, shown))
