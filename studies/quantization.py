"""A student for 4 bits: rounded after training, or trained rounded, with and without a teacher.

    python studies/quantization.py --output runs/quantization

A pruned SmolLM2 is distilled once, and then trained further in three ways, with as many tokens: by
its teacher's distributions in float32, and rounded to q4_0 at the end (post-training quantisation,
PTQ); with rounded weights by cross-entropy (quantisation-aware training, QAT); with rounded weights
by its teacher's distributions (quantisation-aware distillation, QAD). Each is exported to GGUF,
compared with what was trained, and timed in llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from trials import arguments_of, columns, compared, optimizer, publish, recipe, span, trained

import limbeck
from limbeck.experiment import load
from limbeck.experiment.score_files import TrialScores, write_scores
from limbeck.experiment.trials import fidelities
from limbeck.models import ModelSource, cache_folder, embedded_teacher, load_model
from limbeck.models.rounding import round_in_forward

LENGTH = 256
TOKENS = 2 * LENGTH
FORMAT: Final = "q4_0"
ROUNDED = {"trainable": {"quantize": FORMAT}}
TRIALS: dict[str, dict[str, Any]] = {
    "PTQ": {"objective": {"alpha": 1.0}},
    "QAT": {"objective": {"alpha": 0.0}} | ROUNDED,
    "QAD": {"objective": {"alpha": 1.0}} | ROUNDED,
}
BASE = "PTQ"
METRICS = ("forward_kl", "cross_entropy")


def float_student(options: argparse.Namespace, teacher: Path) -> Path:
    """The run of the student that is quantised: distilled in float32."""
    tree = recipe(options, teacher, options.output / "float32", LENGTH)
    tree |= {
        "student": {"type": "depth", "path": str(teacher), "layers": options.layers},
        "objective": {"alpha": 1.0},
        "optim": optimizer(options.float_steps, TOKENS, 6e-4),
        "export": [{"type": "gguf", "quantize": "f16"}],
    }
    return trained(tree)


def trial(name: str, seed: int, options: argparse.Namespace, start: Path, teacher: Path) -> Path:
    """The folder of a trial."""
    place = options.output / f"{name}-{seed}"
    tree = recipe(options, teacher, place, LENGTH) | TRIALS[name]
    tree |= {
        "student": {"type": "pretrained", "path": str(start)},
        "optim": optimizer(options.steps, TOKENS, options.learning_rate),
        "seed": seed,
        "export": [{"type": "gguf", "quantize": FORMAT, "max_kl": 5.0}],
    }
    return trained(tree)


def score_rounded(run_folder: Path) -> None:
    """Measure a run's student with rounded weights, into scores-rounded.json, unless it is done."""
    path = run_folder / "scores-rounded.json"
    if path.exists():
        return
    with limbeck.assemble(load(run_folder.with_suffix(".yaml"))) as run:
        fidelity, _ = fidelities(run.parts)
        assert fidelity is not None, "the recipe names held-out text"
        model = load_model(
            ModelSource(str(run_folder / "student")),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        model.vocabulary_size = run.parts.vocabulary.size
        round_in_forward(model, FORMAT)
        write_scores(path, TrialScores(test=fidelity.test(model)))


def figures(groups: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Every metric of each group of scores, less that of rounding after as much training."""
    return {
        name: {
            metric: compared(
                [columns(path, metric) for path in paths],
                [columns(path, metric) for path in groups[BASE][: len(paths)]],
            )
            for metric in METRICS
        }
        for name, paths in groups.items()
    }


def speeds(files: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Megabytes, and tokens read and written a second in llama.cpp's server, by file."""
    found = {}
    for name, path in files.items():
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("llama_speed.py")), str(path)],
            capture_output=True,
            check=True,
        )
        found[name] = {"megabytes": path.stat().st_size / 1e6} | json.loads(done.stdout)
    return found


def exported(folder: Path, kind: str) -> Path:
    """The GGUF file of a run."""
    (file,) = (folder / "exports" / f"gguf-{kind}").glob("*.gguf")
    return file


def parity(folder: Path) -> float:
    """KL from what was trained to the exported file in llama.cpp, nats a token.

    PTQ's is that of rounding too, because it was trained in float32.
    """
    verdict = json.loads((folder / "exports" / f"gguf-{FORMAT}" / "parity.json").read_text())
    return float(verdict["parity"]["mean_kl"])


def table(found: Mapping[str, Any], speed: Mapping[str, Mapping[str, float]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| student | KL to the teacher, nats | less that of PTQ (95 %) | cross-entropy | "
        "less that of PTQ (95 %) | KL of the GGUF file to it |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        cells = [name]
        for metric in METRICS:
            cells += [f"{row[metric]['value']:.3f}", span(row[metric]["difference"])]
        cells.append(", ".join(f"{each:.4f}" for each in row["parity"]))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| file | MB | tokens read a second | written |", "|---|---|---|---|"]
    for name, row in speed.items():
        sizes = f"{row['megabytes']:.0f} | {row['read']:.0f} | {row['written']:.1f}"
        lines.append(f"| {name} | {sizes} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = arguments_of(__doc__, seeds=[1, 2, 3], steps=40, held_out_tokens=8_192)
    parser.add_argument("--float-steps", type=int, default=76)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    return parser.parse_args()


def main() -> None:
    """Train the trials that are missing, seed by seed, and write results.json and results.md."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    before = float_student(options, teacher)
    runs: dict[str, list[Path]] = {name: [] for name in TRIALS}
    for seed in options.seeds:
        for name in TRIALS:
            runs[name].append(trial(name, seed, options, before / "student", teacher))
        score_rounded(runs["PTQ"][-1])
        groups = {
            "float32, before": [before / "scores.json"],
            "rounded, before": [runs["QAD"][0] / "initial.json"],
            "PTQ, before rounding": [run / "scores.json" for run in runs["PTQ"]],
            "PTQ": [run / "scores-rounded.json" for run in runs["PTQ"]],
        }
        groups |= {name: [run / "scores.json" for run in runs[name]] for name in ("QAT", "QAD")}
        found = figures(groups)
        for name, row in found.items():
            row["parity"] = [parity(run) for run in runs.get(name, [])]
    files = {"f16": exported(before, "f16"), FORMAT: exported(runs["QAD"][0], FORMAT)}
    speed = speeds(files)
    text = table(found, speed)
    (options.output / "speeds.json").write_text(json.dumps(speed, indent=1))
    publish(options.output, found, text)


if __name__ == "__main__":
    main()
