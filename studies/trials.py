"""What the studies share: a pruned student of SmolLM2, trials that are trained once, intervals."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

import limbeck
from limbeck.data import corpus_path
from limbeck.evaluate.scores import interval, resampled
from limbeck.experiment import load
from limbeck.experiment.score_files import read_scores

LAYERS = [0, 1, 2, 8, 9, 10, 11, 20, 21, 22, 23, 24, 27, 28, 29]
"""Of SmolLM2's 30 layers; docs/students.md says how they were chosen."""

Column = Float64[np.ndarray, " items"]


def arguments_of(
    description: str, *, seeds: Sequence[int], steps: int, held_out_tokens: int
) -> argparse.ArgumentParser:
    """A parser of what these studies are told, with the defaults of one of them."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--teacher", type=Path, help="a folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS, help="of the student")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--held-out-tokens", type=int, default=held_out_tokens)
    parser.add_argument("--dtype", default="float32", help="bfloat16 where a CPU is faster in it")
    return parser


def recipe(options: argparse.Namespace, teacher: Path, folder: Path, length: int) -> dict[str, Any]:
    """A recipe over the text that ships with limbeck, with what every study asks for."""
    return {
        "teacher": {"type": "online", "path": str(teacher)},
        "data": {"type": "text", "path": str(corpus_path("train")), "sequence_length": length},
        "evaluate": {
            "data": str(corpus_path("heldout")),
            "every": 1_000_000,
            "max_tokens": options.held_out_tokens,
            "max_tokens_during": length,
            "continuations": 0,
        },
        "parallel": {"compute_dtype": options.dtype},
        "checkpoint": {"every": 1_000_000, "keep": 1, "keep_best": False},
        "output": str(folder),
    }


def optimizer(steps: int, tokens: int, learning_rate: float) -> dict[str, Any]:
    """AdamW over some steps, with an eighth of them for the warm-up."""
    sizes = {"steps": steps, "tokens_per_step": tokens, "warmup_steps": steps // 8}
    return {"learning_rate": learning_rate, **sizes}


def trained(tree: Mapping[str, Any]) -> Path:
    """The folder of a recipe's run, which is made unless it is finished."""
    folder = Path(tree["output"])
    path, text = folder.with_name(f"{folder.name}.yaml"), json.dumps(tree, indent=1)
    if (folder / "report.html").exists():
        if path.read_text() != text:
            raise SystemExit(f"{folder} is a trial with other options. Choose another --output.")
    else:
        path.write_text(text)  # JSON is YAML
        with limbeck.assemble(load(path)) as run:
            run.train(overwrite=folder.exists())
        shutil.rmtree(folder / "checkpoints")  # three times the student's size
    return folder


def columns(path: Path, metric: str) -> tuple[Column, Column]:
    """A metric's sums over the tokens of each test document in a file of scores, and their number.

    over_confidence is the probability of the student's first choice, less whether it was right.
    """
    scores = read_scores(path).test
    assert scores is not None, "the recipe names held-out text"
    if metric == "over_confidence":
        return scores.metrics["student_confidence"] - scores.metrics["student_hit"], scores.counts
    return scores.metrics[metric], scores.counts


def compared(
    own: Sequence[tuple[Column, Column]], base: Sequence[tuple[Column, Column]]
) -> dict[str, Any]:
    """A ratio of sums, averaged over seeds, and its difference from another trial's.

    Args:
        own: For each seed what is summed and what it is divided by, one number an item.
        base: The same of the trial it is compared with, on the same items.

    Returns:
        value, low, high: The mean over seeds with its interval over items.
        seeds: The value of each.
        difference: From the other trial, with the same resampled items.
    """
    table = {
        f"{side}{seed}{part}": column
        for side, columns in (("own", own), ("base", base))
        for seed, pair in enumerate(columns)
        for part, column in zip(("above", "below"), pair, strict=True)
    }
    drawn = resampled(table)
    means = [
        np.mean([drawn[f"{side}{i}above"] / drawn[f"{side}{i}below"] for i in range(count)], axis=0)
        for side, count in (("own", len(own)), ("base", len(base)))
    ]
    return interval(means[0]) | {
        "seeds": [float(above.sum() / below.sum()) for above, below in own],
        "difference": interval(means[0] - means[1]),
    }


def publish(folder: Path, figures: Mapping[str, Any], text: str) -> None:
    """Write results.json and results.md, and print the table."""
    (folder / "results.json").write_text(json.dumps(figures, indent=1))
    (folder / "results.md").write_text(text + "\n")
    print(text, flush=True)


def span(figure: Mapping[str, float], digits: int = 3) -> str:
    """A difference with its interval, as text."""
    value, low, high = (f"{figure[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
