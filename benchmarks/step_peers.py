"""A whole online step of SmolLM2-135M-Instruct, 30 layers into 24, beside a plain loop and TRL.

    make BENCH=.bench .bench/.peers
    PYTHONPATH=src:. .bench/bin/python -W ignore benchmarks/step_peers.py [--steps 12] [--rows 2]

Forward KL alone at T = 1, which all of them have; AdamW; windows of 256 positions of limbeck's
corpus, the same for all. Every contender has a student of its own in the one process, and they take
turns: step 1 of each, then step 2, every second round in reverse. The losses of every step must
agree. With `--dtype bfloat16` all compute in it, the peers with autocast, and all read a teacher
in it; the student's weights are in float32. Freed memory stays with the process, as in a run of
limbeck, for all of them. The floor is the matrix products of limbeck's step, each shape timed
alone. `--small` tries the script on tiny random models.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from tests.models.tiny import tiny_llama, tiny_tokenizer
from whole.contenders import CONTENDERS, Step, importable
from whole.floor import products_of, seconds_alone

from limbeck.batch import Batch
from limbeck.data import corpus_path
from limbeck.distributed import World
from limbeck.heap import freed_memory_kept
from limbeck.models import (
    CausalLM,
    ModelSource,
    cache_folder,
    compilation,
    copied_model,
    embedded_teacher,
    load_model,
)
from limbeck.students import Origin, initialisers
from limbeck.tokenizers import load_tokenizer

DROPPED = (13, 14, 15, 16, 17, 18)
"""Layers that `by: loss` removes first."""

LENGTH = 256
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def main() -> None:
    """Take turns, compare losses, print the table."""
    options = parser().parse_args()
    if options.small:
        compilation.BACKEND = "aot_eager"  # a compiler takes longer than all else
    with freed_memory_kept(CPU):
        text = measure(options)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


def measure(options: argparse.Namespace) -> str:
    """The table of all contenders."""
    dtype = getattr(torch, options.dtype)
    teacher, students, batches = small(options) if options.small else real(options)
    teachers = copies(teacher, options.contenders)  # limbeck's is sharded, and another compiled
    steps = {
        name: CONTENDERS[name](student, teachers[name].requires_grad_(False), ALONE, dtype)
        for name, student in students.items()
    }
    losses, seconds, cpu_seconds = turns(steps, batches)
    compare(losses, TOLERANCE[options.dtype])
    products = products_of(lambda: next(iter(steps.values()))(batches[-1]))
    floor = seconds_alone(products, CPU)
    flops = sum(product.flops * count for product, count in products.items())
    return table(options, seconds, cpu_seconds, batches[0].input_ids.numel(), (floor, flops))


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--rows", type=int, default=2, help="windows of a step")
    made.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    made.add_argument("--dtype", default="float32", choices=TOLERANCE, help="to compute in")
    made.add_argument("--small", action="store_true")
    made.add_argument("--out", type=Path, help="file to write the table to as well")
    return made


Models = tuple[CausalLM, dict[str, CausalLM], list[Batch]]


def real(options: argparse.Namespace) -> Models:
    """The embedded teacher, a student for each contender, and windows of the corpus."""
    folder = str(embedded_teacher(cache_folder(), print))
    tokenizer = load_tokenizer(folder)
    whole = load_model(ModelSource(folder), device=CPU, dtype=torch.float32)
    make = initialisers.bind({"type": "depth", "drop": DROPPED}, "student")
    first = make(Origin(whole, tokenizer, ALONE)).model
    teacher = load_model(ModelSource(folder), device=CPU, dtype=getattr(torch, options.dtype))
    teacher.requires_grad_(False)
    with gzip.open(corpus_path("train"), "rt", encoding="utf-8") as lines:
        text = "\n".join(json.loads(line)["text"] for line in itertools.islice(lines, 300))
    return (
        teacher,
        copies(first, options.contenders),
        windows(tokenizer.encode(text), LENGTH, options),
    )


def small(options: argparse.Namespace) -> Models:
    """Tiny models of random weights."""
    torch.manual_seed(0)
    teacher = tiny_llama(3, 32).requires_grad_(False)
    student = initialisers.bind({"type": "depth", "drop": (1,)}, "student")(
        Origin(teacher, tiny_tokenizer(), ALONE)
    ).model
    ids = torch.randint(teacher.vocabulary_size, (10_000,)).tolist()
    return teacher, copies(student, options.contenders), windows(ids, 12, options)


def copies(first: CausalLM, contenders: list[str]) -> dict[str, CausalLM]:
    """A model for each contender that is installed, all alike."""
    config, weights = first.config, first.hf_model.state_dict()
    return {
        name: copied_model(config, weights, device=CPU, dtype=first.hf_model.dtype)
        for name in importable(contenders)
    }


def windows(ids: list[int], length: int, options: argparse.Namespace) -> list[Batch]:
    """A batch for each step, and one to warm up."""
    count = (options.steps + 1) * options.rows
    # Rows from all over the text.
    stride = (len(ids) - length - 1) // count
    rows = torch.tensor([ids[i * stride : i * stride + length + 1] for i in range(count)])
    return [Batch.from_tokens(part) for part in rows.split(options.rows)]


Samples = dict[str, list[float]]


def turns(steps: dict[str, Step], batches: list[Batch]) -> tuple[Samples, Samples, Samples]:
    """Losses of all steps; seconds, and seconds of all threads together, of all but the first."""
    made: list[Samples] = [{name: [] for name in steps} for _ in range(3)]
    losses, seconds, cpu_seconds = made
    for turn, batch in enumerate(batches):
        for name in steps if turn % 2 == 0 else reversed(steps):
            started, used = time.perf_counter(), time.process_time()
            losses[name].append(steps[name](batch))
            if turn:
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - used)
    return losses, seconds, cpu_seconds


def compare(losses: dict[str, list[float]], tolerance: float) -> None:
    """Stop unless all contenders had the same loss at every step."""
    expected = torch.tensor(next(iter(losses.values())))
    for name, values in losses.items():
        gap = float(((torch.tensor(values) - expected).abs() / expected).max())
        print(f"{name}: losses {values[0]:.5f} to {values[-1]:.5f}, off the first's by {gap:.1e}")
        if gap > tolerance:
            raise SystemExit(f"{name} has other losses: {values} for {expected}")


def table(
    options: argparse.Namespace,
    seconds: Samples,
    cpu_seconds: Samples,
    tokens: int,
    products: tuple[float, int],
) -> str:
    """The results as Markdown."""
    floor, flops = products
    threads = torch.get_num_threads()
    count = len(next(iter(seconds.values())))
    lines = [
        f"# A whole step on a CPU: {tokens} tokens, {threads} threads, {options.dtype}",
        "",
        f"torch {torch.__version__}; medians of {count} steps in turn. CPU: "
        "seconds of all threads, which other jobs on the machine disturb less.",
        "",
        "| | s a step | tokens/s | first row's time / its | CPU | first row's CPU / its |",
        "|---|---|---|---|---|---|",
    ]
    ours, ours_cpu = (
        statistics.median(next(iter(each.values()))) for each in (seconds, cpu_seconds)
    )
    for name, values in seconds.items():
        wall, cpu = statistics.median(values), statistics.median(cpu_seconds[name])
        lines.append(
            f"| {name} | {wall:.2f} | {tokens / wall:.0f} | {ours / wall:.2f} | {cpu:.2f} | "
            f"{ours_cpu / cpu:.2f} |"
        )
    work = f"{flops / 1e9:.0f} GFLOP at {flops / floor / 1e9:.0f} GFLOP/s"
    lines.append(
        f"| the products of its step alone ({work}) | {floor:.2f} | {tokens / floor:.0f} | "
        f"{ours / floor:.2f} | | |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
