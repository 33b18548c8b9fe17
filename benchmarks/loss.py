"""Time and memory of the output head with its loss, beside the peers and the products alone.

    python benchmarks/loss.py [--shapes small large] [--tokens 512 2048] [--repeats 5]
        [--formulas kl_ce ...] [--forms "plain full logits" ...]    # some of them only

Each form gives the gradients of the student's hidden states and head, from the same tensors,
float32. Gradients are compared with ours first, and a form that gives others stops the run. Then
all forms take turns in one process; medians. Memory: each form in a process of its own. Results of
other sizes that stand in `--out` are kept. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from head.forms import FORMULAS, Form
from head.inputs import SHAPES, make_inputs
from head.measure import Key, differences, medians, memory_of, timings
from head.table import picture, table


def peak_mb(formula: str, form: str, shape: str, tokens: int) -> float:
    """Extra memory of a form, measured in a process of its own."""
    sizes = ["--shapes", shape, "--tokens", str(tokens)]
    command = [sys.executable, __file__, *sizes, "--memory-of", formula, form]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measured(
    shape: str, tokens: int, formulas: list[str], chosen: list[str], repeats: int
) -> dict[str, Any]:
    """Everything about one size, or about the forms that were chosen."""
    inputs = make_inputs(SHAPES[shape], tokens)
    forms: dict[Key, Form] = {}
    rows: dict[str, dict[str, dict[str, Any]]] = {formula: {} for formula in formulas}
    for formula in formulas:
        runs, distances, absent = differences(inputs, formula, chosen)
        forms |= {(formula, name): form for name, form in runs.items()}
        for name in [*runs, *absent]:
            row = {"absent": absent[name]} if name in absent else {}
            rows[formula][name] = row | ({"distance": distances[name]} if name in distances else {})
        print(f"{shape}, {tokens} tokens, {formula}: gradients agree, {distances}", flush=True)
    load = os.getloadavg()[0]
    samples = timings(forms, repeats)
    for (formula, name), seconds in medians(samples).items():
        rows[formula][name] |= {"seconds": seconds, "samples": samples[formula, name]}
    keys: list[Key] = [key for key in forms if key[0] != "products"]
    del forms, inputs
    for formula, name in keys:
        extra = peak_mb(formula, name, shape, tokens)
        rows[formula][name]["extra_mb"] = extra
        print(f"  memory of {formula}, {name}: {extra:.0f} MB", flush=True)
    return SHAPES[shape]._asdict() | {
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "load": load,
        "repeats": repeats,
        "date": datetime.date.today().isoformat(),
        "formulas": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "large"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--formulas", nargs="+", choices=FORMULAS, default=list(FORMULAS))
    names = sorted({form for formula in FORMULAS.values() for form in formula.forms})
    parser.add_argument("--forms", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        formula, form = options.memory_of
        print(memory_of(formula, form, options.shapes[0], options.tokens[0]))
        return
    options.out.mkdir(exist_ok=True, parents=True)
    kept = options.out / "loss.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for shape in options.shapes:
        for tokens in options.tokens:
            found = measured(shape, tokens, options.formulas, options.forms, options.repeats)
            results[f"{shape} {tokens}"] = found
            kept.write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "loss.md").write_text(table(results))
            picture(results, options.out / "loss.svg")
    print(table(results))


if __name__ == "__main__":
    main()
