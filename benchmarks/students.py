"""Students of many shapes before and after healing: which start, and which loss, keeps most.

    python benchmarks/students.py --teacher FOLDER [--tokens 10000] [--seeds 3] [--work DIR]
        [--shapes 24,20,15,10,24:even,24:span,24:block_influence,width:24,width:15]
        [--arms ce,kl,kl_ce,kl_cosine,kl_relations]
        [--arm "kl_cka=objective.alpha=1 objective.extra=[{type: cka, weight: 0.1}]"]

A shape is a number of layers chosen by loss (`24`), in another way (`24:even`), a student narrowed
to as many parameters as that many layers have (`width:24`), or one cut in both (`both:15`). Every
shape is made once and saved. Every cell is a run of its own: the same rows in the same order for
one seed, the same number of tokens for all. Seeds beyond the first are run for `--seeded` shapes.

A finished cell is a line in WORK/cells.jsonl; started again, the command goes on with what is
missing. The table and the plot are written anew after each cell. Overnight: `--tokens 100000`.

Learning rates are those found best for 15 layers (LOG.md): 3e-4 for cross-entropy, 6e-4 for the
others; `--rates 3e-4,6e-4,1.2e-3` lets every cell choose on the documents that decide, at so many
times the cost.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from limbeck.data import corpus_path
from limbeck.files import write_text
from limbeck.initialisers.targets import halfway_layers
from limbeck.models import ModelSource, cut_config, num_parameters
from limbeck.recipe import assemble, load
from limbeck.recipe.shrinking import Bench, listed, open_bench, save_shrunk, shrink
from limbeck.report.run_files import lines

SHAPES = (
    "24,20,15,10,24:even,24:block_influence,24:span,15:even,15:block_influence,15:span,"
    "width:24,width:15,both:15"
)
ARMS = {
    "ce": "objective.alpha=0",
    "kl": "objective.alpha=1",
    "kl_ce": "objective.alpha=0.9",
    "kl_cosine": "objective.alpha=1 "
    "objective.extra=[{type: hidden_state, loss: cosine, weight: 0.5}]",
    "kl_relations": "objective.alpha=1 objective.extra=[{type: relations, weight: 0.1}]",
}
RATES = {"ce": 3e-4}
OTHER_RATE = 6e-4
ROW, STEP = 256, 512
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Make the shapes, run the missing cells, write the table."""
    told = options()
    told.work.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    arms = {name: ARMS[name] for name in told.arms.split(",")}
    arms |= dict(each.split("=", 1) for each in told.arm)
    shapes = told.shapes.split(",")
    for shape in shapes:
        make(told, shape)
    for key, overrides in cells(told, shapes, arms):
        if key in (cell["key"] for cell in done(told)):
            continue
        cell = run(told, key, overrides)
        with (told.work / "cells.jsonl").open("a") as file:
            file.write(json.dumps(cell) + "\n")
        write_results(told, shapes, list(arms))
    write_results(told, shapes, list(arms))


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--tokens", type=int, default=10_000, help="training positions of a cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seeded", default="24,15", help="shapes that get every seed")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--arm", action="append", default=[], help="NAME=OVERRIDES, a further arm")
    parser.add_argument("--rates", help="a grid for every arm")
    parser.add_argument("--calibration", type=int, default=2048, help="positions")
    parser.add_argument("--held-out", type=int, default=9000, help="positions measured at the end")
    parser.add_argument("--work", type=Path, default=Path("runs/students"))
    return parser.parse_args()


def cells(
    told: argparse.Namespace, shapes: list[str], arms: dict[str, str]
) -> Iterator[tuple[list[Any], str]]:
    """Every run of the table, the first seed of all before the second of any."""
    seeded = told.seeded.split(",")
    for seed in range(told.seeds):
        for shape in shapes:
            if seed == 0 or shape in seeded:
                for arm, overrides in arms.items():
                    yield [shape, arm, seed, told.tokens, told.rates], overrides


def done(told: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells that are there."""
    path = told.work / "cells.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


_benches: list[Bench] = []


def bench_of(told: argparse.Namespace) -> Bench:
    """The teacher and calibration text, opened once; greedy removals are kept on disk."""
    if not _benches:
        bench = open_bench(
            ModelSource(told.teacher),
            kind="text",
            data=str(corpus_path("train")),
            tokens=told.calibration,
            device=torch.device("cpu"),
        )
        known = told.work / f"removals-{told.calibration}.json"
        if known.exists():
            bench.removals.extend(json.loads(known.read_text()))
        _benches.append(bench)
    return _benches[0]


def make(told: argparse.Namespace, shape: str) -> None:
    """A shape as a folder, unless it is there."""
    folder = told.work / "shapes" / shape.replace(":", "-")
    if folder.exists():
        return
    bench = bench_of(told)
    config, common = bench.teacher.config, {"calibration_tokens": told.calibration}
    first, _, second = shape.partition(":")
    if first in ("width", "both"):
        target = num_parameters(cut_config(config, range(int(second))))
        spec: dict[str, Any] = {"type": "width", "params": target, "by": "loss", **common}
        if first == "both":
            spec["layers"] = halfway_layers(config, target)
    else:
        spec = {"type": "depth", "keep": int(first), "by": second or "loss", **common}
    print(f"making {shape} ...", flush=True)
    spec = listed(bench, spec)
    write_text(told.work / f"removals-{told.calibration}.json", json.dumps(bench.removals))
    save_shrunk(bench, shrink(bench, spec), folder)


def run(told: argparse.Namespace, key: list[Any], overrides: str) -> dict[str, Any]:
    """One student, healed and measured."""
    shape, arm, seed, tokens, rates = key
    print(f"{shape} {arm} seed {seed} ...", flush=True)
    _benches.clear()  # two teachers in memory are one too many
    output = told.work / "run"
    shutil.rmtree(output, ignore_errors=True)
    steps = max(tokens // STEP, 2)
    student = {"type": "pretrained", "path": str(told.work / "shapes" / shape.replace(":", "-"))}
    recipe = {
        "teacher": {"type": "online", "path": str(told.teacher)},
        "student": student,
        "data": {"type": "text", "path": str(corpus_path("train")), "sequence_length": ROW},
        "objective": {"temperature": 1.0, "divergence": "forward_kl"},
        "optim": {
            "learning_rate": [float(r) for r in rates.split(",")]
            if rates
            else RATES.get(arm, OTHER_RATE),
            "steps": steps,
            "tokens_per_step": STEP,
            "warmup_steps": min(5, steps - 1),
        },
        "evaluate": {
            "data": str(corpus_path("heldout")),
            "every": 10**6,
            "max_tokens": told.held_out,
            "max_tokens_during": min(told.held_out, 1600),
            "continuations": 0,
        },
        "memory": {"micro_batch": 2},
        "checkpoint": {"every": 10**6, "keep": 1, "keep_best": False},
        "output": str(output),
        "seed": seed,
    }
    (told.work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    with assemble(load(told.work / "recipe.yaml", split(overrides))) as started:
        found = started.train().evaluation
        facts = started.parts.facts["student"]
    told_scored = [r for r in lines(output / "metrics.jsonl") if r.get("kind") == "step"]
    wanted = ("forward_kl", "cross_entropy", "top1_agreement")
    return {
        "key": key,
        "parameters": facts["parameters"],
        "layers": facts["layers"],
        "steps": steps,
        "seconds": max((r["seconds"] for r in told_scored), default=0.0),
        "learning_rate": found["learning_rate"]["distilled"],
        "before": {name: found["arms"]["initial"][name] for name in wanted},
        "after": {name: found["arms"]["distilled"][name] for name in wanted},
        "teacher": {"cross_entropy": found["arms"]["teacher"]["cross_entropy"]},
    }


def split(overrides: str) -> list[str]:
    """`a=1 b=[{x: 1, y: 2}]` into its parts, at spaces before a name and an equals sign."""
    parts: list[str] = []
    for word in overrides.split(" "):
        if "=" in word or not parts:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    return parts


def write_results(told: argparse.Namespace, shapes: list[str], arms: list[str]) -> None:
    """results/students.md and its plot, from the cells that are there."""
    mine = [c for c in done(told) if c["key"][3:] == [told.tokens, told.rates]]
    rows = [
        f"# Students of SmolLM2-135M-Instruct, {told.tokens:,} tokens of healing",
        "",
        "Held-out forward KL to the teacher, nats a token: [95 % interval over documents] of one "
        "seed; mean, and least to most of the seeds, where there are several.",
        "",
        f"| shape | parameters | before | {' | '.join(arms)} |",
        f"|---|---|---|{'---|' * len(arms)}",
    ]
    drawn: list[tuple[str, float, dict[str, float]]] = []
    for shape in shapes:
        of_shape = [c for c in mine if c["key"][0] == shape]
        if not of_shape:
            continue
        before = of_shape[0]["before"]["forward_kl"]
        by_arm = {arm: [c for c in of_shape if c["key"][1] == arm] for arm in arms}
        shown = " | ".join(figure(group) for group in by_arm.values())
        size = of_shape[0]["parameters"] / 1e6
        rows.append(f"| {shape} | {size:.1f} M | {before['value']:.3f} | {shown} |")
        means = {a: mean(group) for a, group in by_arm.items() if group}
        drawn.append((shape, before["value"], means))
    (RESULTS / "students.md").write_text("\n".join(rows) + "\n")
    draw(drawn, arms)


def mean(group: list[dict[str, Any]]) -> float:
    """Forward KL, a mean over seeds."""
    return statistics.fmean(cell["after"]["forward_kl"]["value"] for cell in group)


def figure(group: list[dict[str, Any]]) -> str:
    """A cell of the table."""
    if not group:
        return "-"
    values = [cell["after"]["forward_kl"] for cell in group]
    if len(values) == 1:
        return f"{values[0]['value']:.3f} [{values[0]['low']:.3f}, {values[0]['high']:.3f}]"
    numbers = [value["value"] for value in values]
    return f"{mean(group):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


def draw(drawn: list[tuple[str, float, dict[str, float]]], arms: list[str]) -> None:
    """Before and after, one group of marks a shape."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "students"}):
        shown = Figure(figsize=(7.5, 0.5 * len(drawn) + 1.6), layout="constrained")
        axes = shown.subplots()
        places = range(len(drawn))
        axes.scatter([b for _, b, _ in drawn], places, marker="|", s=160, c="#888", label="before")
        for arm in arms:
            points = [(m[arm], i) for i, (_, _, m) in enumerate(drawn) if arm in m]
            axes.scatter(*zip(*points, strict=True), label=arm) if points else None
        axes.set_yticks(list(places), [shape for shape, _, _ in drawn])
        axes.invert_yaxis()
        axes.set_xlabel("held-out forward KL to the teacher, nats")
        axes.legend(frameon=False)
        shown.savefig(RESULTS / "students.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
