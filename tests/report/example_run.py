"""A run directory as a run would leave it, its figures made up: `python example_run.py DIR`."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).with_name("example_texts.json")
RECIPE = """\
teacher: {type: online, path: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: auto}
student: {type: depth, keep: 20}
data: {type: chat, path: data/train.jsonl, sequence_length: 1024, pack: true}
objective: {alpha: 0.9, temperature: 2.0, divergence: forward_kl, extra: []}
optim: {learning_rate: 0.0005, steps: 400, tokens_per_step: 4096, warmup_steps: 20}
evaluate: {every: 50, data: data/heldout.jsonl, baseline: cross_entropy}
output: runs/smollm2-20
seed: 0
"""


def figure(value: float, spread: float) -> dict[str, float]:
    """A value with an interval around it."""
    return {"value": value, "low": value - spread, "high": value + spread}


def trial(kl: float, agreement: float, cross_entropy: float, sure: float) -> dict[str, Any]:
    """Figures of one student."""
    return {
        "forward_kl": figure(kl, 0.03 * kl + 0.004),
        "reverse_kl": figure(1.12 * kl, 0.04 * kl + 0.004),
        "total_variation": figure(0.42 * math.sqrt(kl), 0.008),
        "top1_agreement": figure(agreement, 0.009),
        "cross_entropy": figure(cross_entropy, 0.06),
        "perplexity": {
            "value": math.exp(cross_entropy),
            "low": math.exp(cross_entropy - 0.06),
            "high": math.exp(cross_entropy + 0.06),
        },
        "bits_per_byte": figure(cross_entropy / 3.05, 0.02),
        "over_confidence": figure(sure, 0.007),
        "ece": figure(abs(sure) + 0.011, 0.006),
    }


def size(parameters: int, layers: int, speed: float) -> dict[str, Any]:
    """How large and fast a model is."""
    return {
        "parameters": parameters,
        "bytes": 4 * parameters,
        "layers": layers,
        "width": 576,
        "tokens_per_second": speed,
    }


def evaluation() -> dict[str, Any]:
    """A whole evaluation.json."""
    told = ("cross_entropy", "perplexity", "bits_per_byte", "ece", "over_confidence")
    teacher = {metric: trial(0.0, 1.0, 2.011, 0.008)[metric] for metric in told}
    return {
        "metrics": ["forward_kl", "top1_agreement"],
        "trials": {
            "initial": trial(2.731, 0.352, 4.702, 0.109),
            "cross_entropy": trial(0.911, 0.602, 2.604, 0.071),
            "distilled": trial(0.774, 0.641, 2.571, 0.018),
            "teacher": teacher,
        },
        "gap_recovered_percent": {
            "distilled": figure(71.7, 1.9),
            "cross_entropy": figure(66.6, 2.2),
        },
        "difference": {"forward_kl": figure(0.137, 0.021)},
        "held_out": {"documents": 214, "tokens": 19847},
        "models": {
            "teacher": size(134515008, 30, 1480.0),
            "student": size(99115008, 20, 2012.0),
        },
        "teacher_advantage": {"initial": figure(2.691, 0.08), "distilled": figure(0.56, 0.05)},
        "groups": {
            name: groups(kl) for name, kl in (("distilled", 0.774), ("cross_entropy", 0.911))
        },
        "suites": {"generation": {"distilled": samples()}, "tasks": tasks(), "mine": {"x": 1}},
        "disagreements": texts()["disagreements"],
        "continuations": texts()["continuations"],
    }


def groups(kl: float) -> dict[str, Any]:
    """A student by position and by file."""
    rows = [
        {"group": name, "tokens": 4000, "forward_kl": figure(kl, 0.05)}
        for name in ("0-15", "16-63")
    ]
    return {"position": rows, "source": [{**rows[0], "group": "manual.txt"}]}


def samples() -> dict[str, Any]:
    """What a student and its teacher write."""
    teacher = {
        "teacher_nll": figure(2.01, 0.05),
        "repeated": figure(0.031, 0.01),
        "distinct_1": 0.41,
    }
    student = {
        "teacher_nll": figure(3.37, 0.05),
        "repeated": figure(0.122, 0.01),
        "distinct_1": 0.36,
    }
    return {"prompts": 64, "student": student, "teacher": teacher, "difference": {}}


def tasks() -> dict[str, Any]:
    """Two models on a task."""
    row = {
        "task": "held_out_choice",
        "metric": "acc",
        "items": 120,
        "floor": 0.25,
        "models": {"distilled": figure(0.613, 0.05), "teacher": figure(0.788, 0.05)},
        "retained": {"distilled": figure(0.675, 0.05)},
        "against": {"teacher": {"difference": figure(-0.175, 0.05), "p": 0.0004}},
    }
    return {"harness": "0.4.13", "rows": [row]}


def texts() -> dict[str, Any]:
    """Disagreements, continuations and a provenance.json."""
    found: dict[str, Any] = json.loads(TEXTS.read_text(encoding="utf-8"))
    return found


def metrics(seed: int, floor: float) -> str:
    """A whole metrics.jsonl: a loss that falls to a floor, and evaluations between."""
    noise, lines = random.Random(seed), []
    for step in range(1, 401):
        fall = math.exp(-step / 60)
        loss = floor + 1.9 * fall + noise.gauss(0, 0.06)
        lines.append(
            {
                "kind": "step",
                "step": step,
                "loss": loss,
                "divergence": loss - 0.2,
                "cross_entropy": 2.4 + 2 * fall,
                "learning_rate": 5e-4,
                "grad_norm": 1.0,
                "tokens": 4096 * step,
                "seconds": 3.1 * step,
                "tokens_per_second": 1320.0,
            }
        )
        if step % 50 == 0 or step == 1:
            held_out = {
                "forward_kl": floor + 1.95 * fall,
                "cross_entropy": floor + 1.8 + 2.1 * fall,
            }
            lines.append({"kind": "evaluation", "step": step, **held_out})
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_run(directory: Path) -> Path:
    """Write all of it, and return the directory."""
    baseline = directory / "stages" / "cross_entropy"
    baseline.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (directory / "provenance.json").write_text(json.dumps(texts()["provenance"]), encoding="utf-8")
    (directory / "evaluation.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    (directory / "metrics.jsonl").write_text(metrics(0, 0.77), encoding="utf-8")
    (baseline / "metrics.jsonl").write_text(metrics(1, 0.91), encoding="utf-8")
    return directory


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
