"""A student for 4 bits: rounded after training, or trained rounded, with and without a teacher.

    python studies/quantization.py --output runs/quantization

A pruned SmolLM2 is distilled once. It is then rounded to q4_0 as it is (post-training
quantisation), and trained further with rounded weights, by cross-entropy (quantisation-aware
training) or by its teacher's distributions (quantisation-aware distillation). Every trained trial
is exported to GGUF and compared with what was trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trials import LAYERS, compared, optimizer, recipe, span, trained

from limbeck.experiment.score_files import read_scores
from limbeck.models import cache_folder, embedded_teacher

LENGTH = 256
TOKENS = 2 * LENGTH
TRIALS = {"cross-entropy (QAT)": {"alpha": 0.0}, "forward KL (QAD)": {"alpha": 1.0}}
BASE = "cross-entropy (QAT)"


def float_student(options: argparse.Namespace, teacher: Path) -> Path:
    """The run of the student that is quantised: distilled in float32."""
    tree = recipe(teacher, options.output / "float32", LENGTH, options.held_out_tokens)
    tree |= {
        "student": {"type": "depth", "path": str(teacher), "layers": options.layers},
        "objective": {"alpha": 1.0},
        "optim": optimizer(options.float_steps, TOKENS, 6e-4),
    }
    return trained(tree)


def trial(name: str, seed: int, options: argparse.Namespace, start: Path, teacher: Path) -> Path:
    """The folder of a trial."""
    place = f"{name.split(maxsplit=1)[0]}-{seed}"
    tree = recipe(teacher, options.output / place, LENGTH, options.held_out_tokens)
    tree |= {
        "student": {"type": "pretrained", "path": str(start)},
        "trainable": {"quantize": "q4_0"},
        "objective": TRIALS[name],
        "optim": optimizer(options.steps, TOKENS, options.learning_rate),
        "seed": seed,
        "export": [{"type": "gguf", "quantize": "q4_0"}],
    }
    return trained(tree)


def columns(folder: Path, metric: str) -> tuple[Any, Any]:
    """A metric's sums and the tokens of each test document."""
    scores = read_scores(folder / "scores.json").test
    assert scores is not None, "the recipe names held-out text"
    return scores.metrics[metric], scores.counts


def table(folders: dict[str, list[Path]], before: Path) -> tuple[dict[str, Any], str]:
    """Figures of all trials, and the same in Markdown."""
    lines = [
        "| student | KL to the teacher, nats | less that of QAT (95 %) | cross-entropy | "
        "KL of the GGUF file to it |",
        "|---|---|---|---|---|",
    ]
    whole = json.loads((before / "evaluation.json").read_text())["trials"]["distilled"]
    first = json.loads((folders[BASE][0] / "evaluation.json").read_text())["trials"]["initial"]
    for name, figures in (("float32", whole), ("q4_0, not trained further", first)):
        kl, loss = figures["forward_kl"]["value"], figures["cross_entropy"]["value"]
        lines.append(f"| {name} | {kl:.3f} | | {loss:.3f} | |")
    found: dict[str, Any] = {"float32": whole, "post-training": first}
    for name, places in folders.items():
        found[name] = {
            metric: compared(
                [columns(place, metric) for place in places],
                [columns(place, metric) for place in folders[BASE]],
            )
            for metric in ("forward_kl", "cross_entropy")
        }
        kl, loss = found[name]["forward_kl"], found[name]["cross_entropy"]["value"]
        parity = [
            json.loads((place / "exports" / "gguf-q4_0" / "parity.json").read_text())
            for place in places
        ]
        files = ", ".join(f"{each['parity']['mean_kl']:.4f}" for each in parity)
        cells = [f"q4_0, {name}", f"{kl['value']:.3f}", span(kl["difference"]), f"{loss:.3f}"]
        lines.append(f"| {' | '.join([*cells, files])} |")
    return found, "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--teacher", type=Path, help="a folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--float-steps", type=int, default=76)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out-tokens", type=int, default=8_192)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    return parser.parse_args()


def main() -> None:
    """Train the trials that are missing, seed by seed, and write results.json and results.md."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    before = float_student(options, teacher)
    folders: dict[str, list[Path]] = {name: [] for name in TRIALS}
    for seed in options.seeds:
        for name in TRIALS:
            folders[name].append(trial(name, seed, options, before / "student", teacher))
        results, text = table(folders, before)
        (options.output / "results.json").write_text(json.dumps(results, indent=1))
        (options.output / "results.md").write_text(text + "\n")
        print(text, flush=True)


if __name__ == "__main__":
    main()
