"""A student with a tokenizer of its own learns from SmolLM2-135M-Instruct, by several objectives.

    python studies/cross_tokenizer.py --output runs/cross_tokenizer [--tokenizer unigram]

The student is a cut of the teacher with a tokenizer made on the training text; a new token's
embedding is the mean of those of its pieces. Every trial but one sees the same rows in the same
order; `sequence_level` trains on texts that the teacher wrote. The table compares bits per byte on
held-out text, paired by document with cross-entropy alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

from own_tokenizer import TOKENIZERS, write_student
from trials import arguments_of, compared, optimizer, publish, recipe, span, trained

from limbeck.data import corpus_path
from limbeck.evaluate.scores import Scores
from limbeck.experiment import load
from limbeck.experiment.score_files import read_scores
from limbeck.models import cache_folder, embedded_teacher
from limbeck.writing import Writing

PROMPT, WRITTEN = 32, 128
"""Tokens of a document's beginning, and of the teacher's continuation of it."""
BASE = "cross_entropy"
ALM = {"extra": [{"type": "alm", "weight": 0.5}]}

TRIALS: dict[str, dict[str, Any]] = {
    BASE: {"alpha": 0.0},
    "root_kl_0.5": {"alpha": 0.5},
    "alm_0.5": {"alpha": 0.0, **ALM},
    "sequence_level": {"alpha": 0.0},
    "shared_kl_0.5": {"alpha": 0.5},
    "root_kl_0.9": {"alpha": 0.9},
    "root_kl_0.3": {"alpha": 0.3},
    "alm_0.5_root_kl_0.5": {"alpha": 0.5, **ALM},
}


def texts(name: str) -> list[str]:
    """The documents of a part of the corpus that ships with limbeck."""
    with gzip.open(corpus_path(name), "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def written(options: argparse.Namespace, teacher: Path) -> Path:
    """Texts that the teacher wrote after the beginnings of training documents, made once."""
    folder = options.output / "written"
    path: Path = folder / "texts.jsonl"
    if not path.exists():
        tree = recipe(options, teacher, folder / "run", PROMPT + WRITTEN)
        tree["data"]["max_documents"] = options.prompts
        answers = folder / "answers.jsonl"
        sizes = {"tokens": WRITTEN, "prompt_tokens": PROMPT, "truncated": "keep"}
        tree |= {
            "student": {"type": "depth", "path": str(teacher), "keep": 1},
            "optim": optimizer(1, PROMPT + WRITTEN, options.learning_rate),
            "write": {"output": str(answers), **sizes},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(json.dumps(tree, indent=1))
        with Writing(load(folder / "recipe.yaml")) as writing:
            writing.write(lambda: None)
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        lines = [json.dumps({"text": row["prompt"] + row["completion"]}) + "\n" for row in rows]
        path.write_text("".join(lines))
    return path


def scores_of(
    trial: str, seed: int, options: argparse.Namespace, teacher: Path, student: Path
) -> Scores:
    """Test scores of a trial, which is trained unless it is done."""
    tree = recipe(options, teacher, options.output / f"{trial}-{seed}", options.length)
    kind = "cross_tokenizer"
    if trial.startswith("shared_kl"):
        kind = "shared_tokens"
        tree["plugins"] = [str(Path(__file__).with_name("shared_tokens.py"))]
    tree["teacher"] = {"type": kind, "teacher": tree["teacher"], "unaligned": "skip"}
    tree["data"]["max_documents"] = options.documents
    if trial == "sequence_level":
        tree["data"]["path"] = str(written(options, teacher))
    tree |= {
        "student": {"type": "pretrained", "path": str(student)},
        "objective": TRIALS[trial],
        "optim": optimizer(options.steps, options.length, options.learning_rate),
        "seed": seed,
    }
    scores = read_scores(trained(tree) / "scores.json").test
    assert scores is not None, "the recipe names held-out text"
    return scores


def rows_of(scores: dict[str, list[Scores]]) -> dict[str, dict[str, Any]]:
    """Bits per byte of each trial, and its difference from cross-entropy, with intervals."""

    def figure(name: str, metric: str) -> dict[str, Any]:
        own, base = (
            [(each.metrics[metric], math.log(2) * each.bytes) for each in scores[which]]
            for which in (name, BASE)
        )
        return compared(own, base)

    return {
        name: {
            "bits_per_byte": figure(name, "cross_entropy"),
            "root_kl_bits_per_byte": figure(name, "forward_kl"),
        }
        for name in scores
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| trial | bits per byte | less cross-entropy's (95 %) | root KL, bits per byte "
        "| less cross-entropy's (95 %) |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [name]
        for figure in row.values():
            cells += [f"{figure['value']:.4f}", span(figure["difference"], 4)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = arguments_of(__doc__, seeds=[1, 2], steps=50, held_out_tokens=8_192)
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--tokenizer", choices=list(TOKENIZERS), default="byte_bpe")
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--documents", type=int, help="use only the first documents of the text")
    parser.add_argument("--prompts", type=int, default=240, help="texts that the teacher writes")
    return parser.parse_args()


def main() -> None:
    """Train the trials that are missing, and write results.json and results.md."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    student = options.output / "student"
    if not (student / "tokenizer.json").exists():
        kind, size = options.tokenizer, options.vocabulary
        write_student(teacher, student, options.layers, kind, size, texts("train"))
    trials = list(dict.fromkeys([BASE, *options.trials]))
    scores: dict[str, list[Scores]] = {name: [] for name in trials}
    for seed in options.seeds:
        for name in trials:
            scores[name].append(scores_of(name, seed, options, teacher, student))
        rows = rows_of(scores)
        publish(options.output, rows, table(rows))


if __name__ == "__main__":
    main()
