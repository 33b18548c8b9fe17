"""Two teachers, each fine-tuned on one source of text: routed by source, or one of them for all.

    python studies/routed.py --output runs/routed

SmolLM2-135M-Instruct is fine-tuned twice, once on each source. Students cut from the original model
learn the text of both sources: each source from its own teacher (routed), both from one of the two,
from the mixture of the two, or from the original model. The table compares cross-entropy on
held-out text of both sources, paired by document.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trials import Column, arguments_of, compared, optimizer, publish, recipe, span, trained

from limbeck.data import corpus_path
from limbeck.experiment.score_files import read_scores
from limbeck.models import cache_folder, embedded_teacher

SOURCES = ("bible-kjv-text", "dict-wn")
BASE = "routed"


def write_texts(folder: Path) -> None:
    """A file of each source of the corpus that ships with limbeck, for training and held out."""
    for part in ("train", "heldout"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with gzip.open(corpus_path(part), "rt", encoding="utf-8") as lines:
            rows = list(map(json.loads, lines))
        for source in SOURCES:
            own = [json.dumps({"text": row["text"]}) for row in rows if row["source"] == source]
            (folder / part / f"{source}.jsonl").write_text("\n".join(own) + "\n")


def teachers_of(tuned: Mapping[str, Path], original: Path) -> dict[str, Any]:
    """The teacher of each trial."""
    models = {name: {"type": "online", "path": str(path)} for name, path in tuned.items()}
    return {
        BASE: {"type": "routed", "teachers": models},
        **{f"only {source}": model for source, model in models.items()},
        "mixture": {"type": "ensemble", "teachers": list(models.values())},
        "not fine-tuned": {"type": "online", "path": str(original)},
    }


def based_on(original: Path, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A recipe over the texts of both sources."""
    tree = recipe(options, original, place, options.length)
    tree["data"]["path"] = str(options.output / "texts" / "train")
    tree["evaluate"]["data"] = str(options.output / "texts" / "heldout")
    tree["optim"] = optimizer(options.steps, 2 * options.length, options.learning_rate)
    return tree


def tuned_on(source: str, original: Path, options: argparse.Namespace) -> Path:
    """The model after training on the text of a source."""
    tree = based_on(original, options.output / f"tuned-{source}", options)
    tree["data"]["path"] += f"/{source}.jsonl"
    tree |= {"student": {"type": "copy"}, "objective": {"alpha": 0.0}}
    tree["optim"]["learning_rate"] = options.tuning_rate
    return trained(tree) / "student"


def trial(name: str, teacher: Any, seed: int, original: Path, options: argparse.Namespace) -> Path:
    """The folder of a trial, which is trained unless it is done."""
    place = options.output / f"{name.replace(' ', '-')}-{seed}"
    student = {"type": "depth", "path": str(original), "layers": options.layers}
    tree = based_on(original, place, options) | {"teacher": teacher, "student": student}
    return trained(tree | {"objective": {"alpha": 1.0}, "seed": seed})


def column(folder: Path, source: str | None) -> tuple[Column, Column]:
    """Cross-entropy of the held-out documents of a source, or of all, and their tokens."""
    scores = read_scores(folder / "scores.json").test
    assert scores is not None, "the recipe names held-out text"
    chosen = [source is None or Path(each).name.startswith(source) for each in scores.sources]
    return scores.metrics["cross_entropy"][chosen], scores.counts[chosen]


def figures(runs: Mapping[str, list[Path]]) -> dict[str, dict[str, Any]]:
    """Cross-entropy of each trial on all held-out text and on each source's."""
    found: dict[str, dict[str, Any]] = {}
    for name, folders in runs.items():
        found[name] = {}
        for source in (None, *SOURCES):
            own, base = (
                [column(each, source) for each in group] for group in (folders, runs[BASE])
            )
            found[name][source or "both"] = compared(own, base)
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures in Markdown."""
    names = ("both", *SOURCES)
    lines = [f"| teacher | {' | '.join(f'{each} | less routed (95 %)' for each in names)} |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for name, row in found.items():
        cells = [name]
        for each in names:
            cells += [f"{row[each]['value']:.3f}", span(row[each]["difference"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = arguments_of(__doc__, seeds=[1, 2], steps=40, held_out_tokens=8_192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--tuning-rate", type=float, default=1e-4)
    return parser.parse_args()


def main() -> None:
    """Train what is missing, seed by seed, and write results.json and results.md."""
    options = arguments()
    write_texts(options.output / "texts")
    original = options.teacher or embedded_teacher(cache_folder(), print)
    tuned = {source: tuned_on(source, original, options) for source in SOURCES}
    teachers = teachers_of(tuned, original)
    runs: dict[str, list[Path]] = {name: [] for name in teachers}
    for seed in options.seeds:
        for name, teacher in teachers.items():
            runs[name].append(trial(name, teacher, seed, original, options))
        found = figures(runs)
        publish(options.output, found, table(found))


if __name__ == "__main__":
    main()
