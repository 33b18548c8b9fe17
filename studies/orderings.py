"""Published orderings re-run in miniature: which of two students should be better, and which is.

    python studies/orderings.py --output runs/orderings --study signals

Every trial trains a student cut from SmolLM2-135M-Instruct on as many tokens of the same text.
Each study says what was published, and tests it on the held-out text with paired intervals.
Trials that several studies need are trained once. The differences are drawn in orderings.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from trials import LAYERS, arguments_of, columns, compared, optimizer, recipe, span, trained

from limbeck.models import cache_folder, embedded_teacher

LENGTH = 256
TOKENS = 2 * LENGTH
LEARNING_RATE = 6e-4
EVEN = list(range(0, 30, 2))
SHORT = [0, 1, 2, 9, 21, 27, 28, 29]
"""Eight of the layers that are kept."""


def objective(divergence: str = "forward_kl", alpha: float = 1.0, **options: Any) -> dict[str, Any]:
    """A part of a recipe."""
    return {"objective": {"alpha": alpha, "divergence": divergence, **options}}


def reduced(form: Mapping[str, Any], *, renormalised: bool = False) -> dict[str, Any]:
    """A teacher of which a training step sees a part."""
    return {"teacher": {"type": "reduced", "form": form, "renormalised": renormalised}}


def layers(kept: Sequence[int] | int) -> dict[str, Any]:
    """A student cut in depth."""
    return {"student": {"type": "depth", "layers" if isinstance(kept, list) else "keep": kept}}


CE = objective(alpha=0.0)
COSINE: dict[str, Any] = {"extra": [{"type": "hidden_state", "loss": "cosine", "weight": 0.5}]}
NEW = {"student": {"type": "random", "layers": len(LAYERS), "width": 576}}
TOP_12 = {"type": "top_k", "k": 12}
FAST = {"learning_rate": 4 * LEARNING_RATE}

TRIALS: dict[str, dict[str, Any]] = {
    "KL": objective(),
    "CE": CE,
    "KL + CE": objective(alpha=0.5),
    "KL, cosine of states": objective(**COSINE),
    "50 samples": reduced({"type": "samples", "num_draws": 50}),
    "12 tokens and the tail": reduced(TOP_12),
    "12 tokens alone": reduced(TOP_12, renormalised=True),
    "reverse KL": objective("reverse_kl"),
    **{f"KL, T = {t}": objective(temperature=float(t)) for t in (2, 4)},
    **{f"reverse KL, T = {t}": objective("reverse_kl", temperature=float(t)) for t in (2, 4)},
    "24 layers, KL": layers(24),
    "24 layers, CE": layers(24) | CE,
    "24 layers, KL + CE": layers(24) | objective(alpha=0.5),
    "24 layers, KL, cosine of states": layers(24) | objective(**COSINE),
    "8 layers, KL": layers(SHORT),
    "8 layers, reverse KL": layers(SHORT) | objective("reverse_kl"),
    "8 layers, skew KL": layers(SHORT) | objective("skew_forward_kl"),
    "8 layers, skew reverse KL": layers(SHORT) | objective("skew_reverse_kl"),
    "8 layers, KL, 4 x rate": layers(SHORT) | FAST,
    "8 layers, reverse KL, 4 x rate": layers(SHORT) | objective("reverse_kl") | FAST,
    "8 layers, skew KL, 4 x rate": layers(SHORT) | objective("skew_forward_kl") | FAST,
    "8 layers, skew reverse KL, 4 x rate": layers(SHORT) | objective("skew_reverse_kl") | FAST,
    "every second layer, KL": layers(EVEN),
    "every second layer, CE": layers(EVEN) | CE,
    "random weights, KL": NEW,
    "random weights, CE": NEW | CE,
}


class Claim(NamedTuple):
    """A metric that is smaller for one trial than for another, as published."""

    metric: str
    smaller: str
    larger: str


class Study(NamedTuple):
    """Claims with one source; the trials are those that they name."""

    source: str
    claims: Sequence[Claim]

    @property
    def trials(self) -> list[str]:
        """Names of its trials, in the order of all."""
        named = {name for claim in self.claims for name in claim[1:]}
        return [name for name in TRIALS if name in named]


def chain(metric: str, *names: str) -> list[Claim]:
    """Each smaller than the next."""
    return [Claim(metric, *pair) for pair in pairwise(names)]


STUDIES = {
    "signals": Study(
        "Anshumann et al., 2025, arXiv:2503.16870",
        [
            *chain("forward_kl", "KL", "50 samples", "12 tokens and the tail", "12 tokens alone"),
            *chain("over_confidence", "KL", "12 tokens alone"),
            *chain("over_confidence", "50 samples", "12 tokens alone"),
            *chain("forward_kl", "50 samples", "CE"),
        ],
    ),
    "depth": Study(
        "Muralidharan et al., 2024, arXiv:2407.14679",
        [
            *chain("forward_kl", "24 layers, KL", "24 layers, KL + CE", "24 layers, CE"),
            *chain("forward_kl", "KL", "KL + CE", "CE"),
            *chain("forward_kl", "KL, cosine of states", "KL"),
            *chain("forward_kl", "24 layers, KL", "24 layers, KL, cosine of states"),
        ],
    ),
    "skew": Study(
        "Ko et al., 2024, arXiv:2402.03898",
        [
            *chain("gradient_spread", "8 layers, skew KL", "8 layers, KL"),
            *chain("gradient_spread", "8 layers, skew reverse KL", "8 layers, reverse KL"),
            *chain(
                "gradient_spread",
                "8 layers, skew reverse KL, 4 x rate",
                "8 layers, reverse KL, 4 x rate",
            ),
            *chain("gradient_spread", "8 layers, skew KL, 4 x rate", "8 layers, KL, 4 x rate"),
            *chain("reverse_kl", "8 layers, skew reverse KL", "8 layers, reverse KL"),
        ],
    ),
    "temperature": Study(
        "Hinton et al., 2015, arXiv:1503.02531 (2 and more); arXiv:2606.00306 (direction)",
        [
            *chain("forward_kl", "KL, T = 2", "KL"),
            *chain("cross_entropy", "KL", "KL, T = 2", "KL, T = 4"),
            *chain("reverse_kl", "reverse KL", "KL"),
            *chain("reverse_kl", "KL, T = 2", "reverse KL, T = 2"),
            *chain("reverse_kl", "KL, T = 4", "reverse KL, T = 4"),
        ],
    ),
    "start": Study(
        "arXiv:2606.14150 (start); marin-community/marin issue 7671 (objective)",
        [
            *chain("forward_kl", "KL", "every second layer, KL", "random weights, KL"),
            *chain("forward_kl", "KL", "CE"),
            *chain("forward_kl", "every second layer, KL", "every second layer, CE"),
            *chain("forward_kl", "random weights, KL", "random weights, CE"),
            *chain("cross_entropy", "every second layer, CE", "random weights, KL"),
        ],
    ),
}
METRICS = ("forward_kl", "reverse_kl", "cross_entropy", "over_confidence")
SEEDS = 6
"""Seeds, all on one side, that decide about the spread of gradients: by chance 1 time in 32."""


def trial(name: str, seed: int, options: argparse.Namespace, teacher: Path) -> Path:
    """The folder of a trial, which is trained unless it is done."""
    place = "".join(c if c.isalnum() else "-" for c in name)
    tree = recipe(options, teacher, options.output / f"{place}-{seed}", LENGTH)
    model = tree["teacher"]
    tree |= objective() | layers(options.layers) | TRIALS[name]
    if tree["teacher"]["type"] == "reduced":
        tree["teacher"] |= {"teacher": model, "seed": seed}
        tree["plugins"] = [str(Path(__file__).with_name("reduced_teacher.py"))]
    if tree["student"]["type"] == "depth":
        tree["student"]["path"] = str(teacher)
    rate = tree.pop("learning_rate", LEARNING_RATE)
    tree["optim"] = optimizer(options.steps, TOKENS, rate)
    return trained(tree | {"seed": seed})


def gradient_spread(folder: Path) -> float:
    """Largest norm of a step's gradient after the first eighth of the run, over the median."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if line["kind"] == "step"]
    return float(max(norms[len(norms) // 8 :]) / np.median(norms))


def tested(claim: Claim, runs: Mapping[str, list[Path]]) -> dict[str, Any]:
    """The difference that a claim says is below 0, and whether it is."""
    smaller, larger = runs[claim.smaller], runs[claim.larger]
    if claim.metric == "gradient_spread":
        each = [
            gradient_spread(a) - gradient_spread(b) for a, b in zip(smaller, larger, strict=True)
        ]
        # No interval: the smallest and the largest of the seeds.
        difference = {"value": float(np.mean(each)), "low": min(each), "high": max(each)}
    else:
        own, theirs = (
            [columns(run / "scores.json", claim.metric) for run in group]
            for group in (smaller, larger)
        )
        difference = compared(own, theirs)["difference"]
        each = [compared([a], [b])["difference"]["value"] for a, b in zip(own, theirs, strict=True)]
    verdict = "open"
    if claim.metric == "gradient_spread" and len(smaller) < SEEDS:
        verdict = f"smaller in {sum(d < 0 for d in each)} of {len(each)} seeds"
    elif difference["high"] < 0:
        verdict = "holds"
    elif difference["low"] > 0:
        verdict = "the reverse holds"
    return {**claim._asdict(), "difference": difference, "seeds": each, "verdict": verdict}


def figures(run: list[Path]) -> dict[str, Any]:
    """Every metric of a trial."""
    pairs = {
        metric: [columns(folder / "scores.json", metric) for folder in run] for metric in METRICS
    }
    found = {metric: compared(pair, pair)["value"] for metric, pair in pairs.items()}
    return found | {"gradient_spread": float(np.mean([gradient_spread(f) for f in run]))}


def table(
    study: Study, rows: Mapping[str, Mapping[str, float]], tests: list[dict[str, Any]]
) -> str:
    """Trials, and claims beside what was found, in Markdown."""
    names = [*METRICS, "gradient_spread"]
    lines = [f"| trial | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for trial_name, row in rows.items():
        lines.append(f"| {trial_name} | {' | '.join(f'{row[name]:.3f}' for name in names)} |")
    lines += ["", f"Source: {study.source}", ""]
    heads = ("metric", "smaller, as published", "larger", "difference (95 %, or seeds)")
    lines += [f"| {' | '.join(heads)} | each seed | found |", "|---|---|---|---|---|---|"]
    for test in tests:
        cells = [test["metric"].replace("_", " "), test["smaller"], test["larger"]]
        cells += [span(test["difference"]), ", ".join(f"{d:+.3f}" for d in test["seeds"])]
        lines.append(f"| {' | '.join(cells)} | {test['verdict']} |")
    return "\n".join(lines)


COLOURS = {"holds": "tab:green", "the reverse holds": "tab:red"}
"""Of decided claims; the others are grey."""


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """The difference of each claim with its interval, a panel a study, as SVG."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "orderings"}):
        sizes = [len(claims) for claims in found.values()]
        figure, panels = plt.subplots(
            len(found),
            figsize=(9, 0.32 * sum(sizes) + 0.9 * len(found)),
            squeeze=False,
            gridspec_kw={"height_ratios": sizes},
            layout="constrained",
        )
        for axis, (name, claims) in zip(panels[:, 0], found.items(), strict=True):
            labels = [
                f"{c['metric'].replace('_', ' ')}: {c['smaller']} < {c['larger']}" for c in claims
            ]
            for at, claim in enumerate(claims):
                ends, colour = claim["difference"], COLOURS.get(claim["verdict"], "tab:grey")
                axis.plot([ends["low"], ends["high"]], [at, at], color=colour)
                axis.plot(ends["value"], at, "o", color=colour, markersize=4)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_yticks(range(len(labels)), labels, fontsize=8)
            axis.set(ylim=(len(labels) - 0.4, -0.6), title=name)
            axis.tick_params(axis="x", labelsize=8)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = arguments_of(__doc__, seeds=[1, 2], steps=40, held_out_tokens=8_192)
    parser.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    return parser.parse_args()


def main() -> None:
    """Train the trials that are missing, and write each study's table and the figure."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    for name in options.study:
        study = STUDIES[name]
        runs: dict[str, list[Path]] = {each: [] for each in study.trials}
        for seed in options.seeds:
            for each in study.trials:
                runs[each].append(trial(each, seed, options, teacher))
        rows = {each: figures(run) for each, run in runs.items()}
        tests = [tested(claim, runs) for claim in study.claims]
        text = table(study, rows, tests)
        found = {"trials": rows, "claims": tests}
        (options.output / f"{name}.json").write_text(json.dumps(found, indent=1))
        (options.output / f"{name}.md").write_text(text + "\n")
        print(text, flush=True)
    files = {name: options.output / f"{name}.json" for name in STUDIES}
    every = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    draw({name: each["claims"] for name, each in every.items()}, options.output / "orderings.svg")


if __name__ == "__main__":
    main()
