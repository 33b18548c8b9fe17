"""On-policy distillation in miniature: whose text, which direction, is a teacher needed at all.

    python studies/on_policy.py --output runs/on_policy

SmolLM2-135M-Instruct teaches a cut of itself. A cold start is trained once on fixed text; every
trial starts from it (one does not) and takes as many steps with as many scored tokens. The table
compares samples after held-out prompts and held-out text, paired by prompt and by document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from trials import arguments_of, compared, optimizer, publish, recipe, span, trained

from limbeck.experiment.score_files import read_scores
from limbeck.models import cache_folder, embedded_teacher

PROMPT, WRITTEN = 16, 48
LENGTH = PROMPT + WRITTEN
ROLLOUTS = 8
FIXED_ROWS = ROLLOUTS * WRITTEN // LENGTH
"""Rows of fixed text, all scored, with about as many scored tokens as the rollouts of a step."""
BASE = "fixed text, forward KL"


def objective(divergence: str | None, **options: Any) -> dict[str, Any]:
    """An objective with a divergence alone."""
    return {"objective": {"alpha": 1.0, "divergence": divergence, **options}}


def rollouts(**options: Any) -> dict[str, Any]:
    """Every row of a step is written, by the student unless told."""
    return {"rollout": {"share": 1.0, "tokens": WRITTEN, "prompt_tokens": PROMPT, **options}}


CONTROL = {"extra": [{"type": "improbable_tokens", "weight": 0.1}]}
TRIALS: dict[str, dict[str, Any]] = {
    BASE: objective("forward_kl"),
    "student text, reverse KL": objective("reverse_kl") | rollouts(),
    "student text, forward KL": objective("forward_kl") | rollouts(),
    "fixed text, reverse KL": objective("reverse_kl"),
    "no teacher": objective(None, **CONTROL) | rollouts(),
    "teacher text, cross-entropy": {"objective": {"alpha": 0.0}} | rollouts(**{"from": "teacher"}),
    "no cold start": objective("reverse_kl") | rollouts(),
    "first 30 % of student text": objective("reverse_kl") | rollouts(scored=[0.0, 0.3]),
    "last 30 % of student text": objective("reverse_kl") | rollouts(scored=[0.7, 1.0]),
}


def cold_start(options: argparse.Namespace, teacher: Path) -> Path:
    """The student that trials start from, trained on fixed text."""
    tree = recipe(options, teacher, options.output / "cold-start", LENGTH)
    tree |= objective("forward_kl") | pruned(options, teacher)
    tree["optim"] = optimizer(options.cold_steps, FIXED_ROWS * LENGTH, 6e-4)
    return trained(tree) / "student"


def trial(name: str, seed: int, options: argparse.Namespace, teacher: Path, start: Path) -> Path:
    """The folder of a trial, which is trained unless it is done."""
    place = f"{name.replace(' ', '-').replace(',', '').replace('-%', '')}-{seed}"
    tree = recipe(options, teacher, options.output / place, LENGTH) | TRIALS[name]
    tree["plugins"] = [str(Path(__file__).with_name("on_policy_parts.py"))]
    tree["student"] = {"type": "pretrained", "path": str(start)}
    if name == "no cold start":
        tree |= pruned(options, teacher)
    rows = ROLLOUTS if "rollout" in tree else FIXED_ROWS
    tree["optim"] = optimizer(options.steps, rows * LENGTH, options.learning_rate)
    suite = {"type": "samples", "tokens": WRITTEN, "prompt_tokens": PROMPT}
    tree["evaluate"]["suites"] = [suite | {"prompts": options.prompts}]
    return trained(tree | {"seed": seed})


def pruned(options: argparse.Namespace, teacher: Path) -> dict[str, Any]:
    """The student before any training."""
    return {"student": {"type": "depth", "path": str(teacher), "layers": options.layers}}


def columns(folder: Path) -> dict[str, np.ndarray]:
    """Sums by prompt of the student's samples, and by document of the held-out text."""
    results = json.loads((folder / "evaluation.json").read_text())
    samples = results["suites"]["samples"]["distilled"]
    scores = read_scores(folder / "scores.json").test
    assert scores is not None, "the recipe names held-out text"
    found = {name: np.array(values) for name, values in samples.items()}
    text = {"text_kl": scores.metrics["forward_kl"], "text_tokens": scores.counts}
    return found | {name: np.asarray(values) for name, values in text.items()}


RATIOS = {
    "teacher_nll": ("teacher_cross_entropy", "tokens"),
    "entropy": ("own_nll", "tokens"),
    "repeated": ("repeated", "ngrams"),
    "ended": ("ended", "texts"),
    "own_reverse_kl": ("reverse_kl", "tokens"),
    "own_forward_kl": ("forward_kl", "tokens"),
    "fixed_forward_kl": ("fixed_forward_kl", "fixed_tokens"),
    "text_kl": ("text_kl", "text_tokens"),
}
"""Each figure as a ratio of two sums."""


def figures(folders: list[Path], base: list[Path]) -> dict[str, Any]:
    """Every figure with its difference from another trial's."""
    own, theirs = ([columns(each) for each in group] for group in (folders, base))
    found: dict[str, Any] = {
        name: compared(
            [(table[above], table[below]) for table in own],
            [(table[above], table[below]) for table in theirs],
        )
        for name, (above, below) in RATIOS.items()
    }
    ratio = found["own_forward_kl"]["value"] / found["fixed_forward_kl"]["value"]
    return found | {"excess_error_percent": 100 * (ratio - 1)}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| trial | reverse KL on its samples | less the first row's (95 %) | forward KL on "
        "held-out text | less the first row's (95 %) | teacher's NLL of samples | "
        "their entropy | repeated | excess error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = [name]
        for key in ("own_reverse_kl", "text_kl"):
            cells += [f"{row[key]['value']:.3f}", span(row[key]["difference"])]
        cells += [f"{row[key]['value']:.2f}" for key in ("teacher_nll", "entropy")]
        cells += [f"{row['repeated']['value']:.3f}", f"{row['excess_error_percent']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = arguments_of(__doc__, seeds=[1, 2], steps=24, held_out_tokens=4_096)
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--cold-steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


def main() -> None:
    """Train the trials that are missing, seed by seed, and write results.json and results.md."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    start = cold_start(options, teacher)
    trials = list(dict.fromkeys([BASE, *options.trials]))
    folders: dict[str, list[Path]] = {name: [] for name in trials}
    for seed in options.seeds:
        for name in trials:
            folders[name].append(trial(name, seed, options, teacher, start))
        results = {name: figures(done, folders[BASE]) for name, done in folders.items()}
        publish(options.output, results, table(results))


if __name__ == "__main__":
    main()
