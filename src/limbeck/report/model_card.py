"""A student's model card in the format of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from limbeck.report.run_files import Evaluation, RunFiles
from limbeck.report.run_report import METRICS, figure_of, mapping, name_of
from limbeck.report.words import TRIALS, interval

CARD = "README.md"
REPORTED = ("forward_kl", "top1_agreement", "cross_entropy", "bits_per_byte")
"""Metrics of the student that the card's metadata names."""


def model_card(run: RunFiles, repo: str, license_name: str | None) -> ModelCard:
    """The card of a run's student.

    Args:
        repo: `owner/name` on the hub.
        license_name: Of the student; None if it is not known.
    """
    teacher = mapping(run.provenance.get("teacher"))
    held_out = mapping(run.provenance.get("held_out"))
    evaluation = run.evaluation or Evaluation()
    name = name_of(teacher, "the teacher")
    is_hub_name = str(teacher.get("name", "")).count("/") == 1
    data = ModelCardData(
        model_name=repo.rpartition("/")[2],
        base_model=str(teacher["name"]) if is_hub_name else None,
        license=license_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "limbeck"],
        eval_results=list(results(evaluation, str(held_out.get("path", "held-out text")))) or None,
    )
    sections = {
        "": opening(repo, name, teacher, license_name),
        "Training": training(run),
        "Evaluation": "\n".join(table(evaluation)),
        "Exports": "\n".join(exports(evaluation)),
        "Recipe": f"```yaml\n{run.recipe.strip()}\n```",
    }
    body = "\n\n".join(
        f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def opening(repo: str, name: str, teacher: Mapping[str, Any], license_name: str | None) -> str:
    """What the model is, and under which licence."""
    where = [f"revision {teacher['revision']}"] if teacher.get("revision") else []
    digest = teacher.get("weights_sha256")
    where += [f"weights sha256 {digest}"] if digest else []
    licence = (
        "The teacher's licence was not found. Look it up before you use or publish this model."
    )
    if license_name:
        licence = f"Licence: {license_name}. The teacher's own terms for models made with it apply."
    origin = f" ({', '.join(where)})" if where else ""
    return (
        f"# {repo.rpartition('/')[2]}\n\n"
        f"A student that limbeck distilled from **{name}**{origin}. {licence}"
    )


def training(run: RunFiles) -> str:
    """Data and versions."""
    data = mapping(run.provenance.get("data"))
    lines = [
        f"- Training text: {Path(str(data.get('path', 'unknown'))).name}, "
        f"{data.get('documents', 0):,} documents, {data.get('scored', 0):,} tokens to predict"
        if data
        else "",
        f"- limbeck {run.provenance.get('limbeck', '')}, seed {run.provenance.get('seed', '')}",
    ]
    return "\n".join(line for line in lines if line)


def results(evaluation: Evaluation, text: str) -> Iterator[EvalResult]:
    """The student's figures as metadata."""
    for metric in REPORTED:
        figure = figure_of(evaluation, "distilled", metric)
        if figure is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=Path(text).name,
                metric_type=metric,
                metric_name=METRICS[metric].label,
                metric_value=round(figure.value, 6),
            )


def table(evaluation: Evaluation) -> Iterator[str]:
    """Every trial's figures with 95 % intervals."""
    trials = [trial for trial in TRIALS if trial in evaluation.trials]
    if not trials:
        return
    tokens, documents = (evaluation.held_out.get(each, 0) for each in ("tokens", "documents"))
    yield (
        f"On {tokens:,} held-out tokens of {documents:,} documents; 95 % intervals, documents "
        "resampled. Divergences are measured against the teacher.\n"
    )
    yield f"| | {' | '.join(TRIALS[trial] for trial in trials)} |"
    yield "|---" * (len(trials) + 1) + "|"
    for name, metric in METRICS.items():
        figures = [figure_of(evaluation, trial, name) for trial in trials]
        if any(figures):
            cells = (interval(figure, metric.shown) for figure in figures)
            yield f"| {metric.label} | {' | '.join(cells)} |"


def exports(evaluation: Evaluation) -> Iterator[str]:
    """The exported files with their distance to the student."""
    found = [each for each in evaluation.exports.values() if each.parity is not None]
    if not found:
        return
    yield "Each file was run in its own runtime on held-out text and compared with this model.\n"
    yield "| file | mean KL to this model, nats | same first choice | perplexity (this model) |"
    yield "|---|---|---|---|"
    for each in found:
        assert each.parity is not None
        p = each.parity
        yield (
            f"| {each.file} | {p.mean_kl:.2g} | {p.same_top:.2%} | "
            f"{p.exported_perplexity:.3f} ({p.student_perplexity:.3f}) |"
        )
