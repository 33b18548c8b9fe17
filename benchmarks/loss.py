"""Time and memory of the output head with its loss, beside what nobody can do without.

    python benchmarks/loss.py [--tokens 2048] [--vocabulary 49152] [--width 576] [--repeats 5]

Each form gives the gradients of the student's hidden states and head for
`alpha T^2 KL(teacher || student) + (1 - alpha) CE`, alpha 0.5, from the same tensors, float32:

- products: the four matrix products alone (teacher's logits, student's, and the two gradients), a
  chunk of 512 tokens at a time into buffers made beforehand. The floor.
- closed form: what training uses.
- general: the same objective with autograd inside a chunk, as other divergences run.
- plain: whole logits of both models and autograd. The ceiling.
- top-32 products, top-32 closed form: a stored teacher, hence three products.

Time: all forms in one process, taking turns; medians. Only ratios mean something, and on a machine
with other work to do only those of processor time. Memory: each form in a process of its own; the
peak resident set while it runs, less the resident set before, once everything it starts from is
there and the libraries are warm. It holds the gradient of the head, which every form must make, so
that is also taken off.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.objective import LogitTerm, Objective, StudentView, WeightedTerm
from limbeck.objective.cross_entropy import CrossEntropyTerm
from limbeck.objective.divergence import DivergenceTerm
from limbeck.objective.fused import head_and_terms, head_chunk
from limbeck.objective.objective import general_form
from limbeck.signals import Head, LazyLogits, TeacherDistribution, TeacherSignal, TopK

ALPHA = 0.5
CHUNK = 512


class Inputs(NamedTuple):
    """What every form starts from."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    top_k: TopK
    temperature: float


def make_inputs(tokens: int, vocabulary: int, width: int, temperature: float) -> Inputs:
    """Random hidden states and heads whose logits spread like a language model's (about 3)."""
    torch.manual_seed(0)
    spread = 3 / width**0.5
    hidden, teacher_hidden = torch.randn(tokens, width), torch.randn(tokens, width)
    weight, teacher_weight = (spread * torch.randn(vocabulary, width) for _ in range(2))
    parts = []
    for start in range(0, tokens, 64):
        logits = teacher_hidden[start : start + 64] @ teacher_weight.t()
        parts.append(TopK.from_logits(logits, 32, temperature))
    top_k = TopK(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.tail_logprob for part in parts]),
        temperature,
    )
    targets = torch.randint(vocabulary, (tokens,))
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        teacher_hidden,
        teacher_weight,
        targets,
        top_k,
        temperature,
    )


def lazy(inputs: Inputs) -> TeacherDistribution:
    return LazyLogits(inputs.teacher_hidden, Head(inputs.teacher_weight))


def terms(inputs: Inputs) -> list[LogitTerm]:
    soft = DivergenceTerm(divergence="forward_kl", temperature=inputs.temperature)
    return [soft, CrossEntropyTerm()]


def view(inputs: Inputs) -> StudentView:
    return StudentView(inputs.hidden, Head(inputs.weight), {}, inputs.targets)


def closed(inputs: Inputs, distribution: TeacherDistribution) -> list[Tensor]:
    soft, hard = terms(inputs)
    objective = Objective(
        [WeightedTerm("divergence", ALPHA, soft), WeightedTerm("cross_entropy", 1 - ALPHA, hard)]
    )
    tokens = torch.tensor(len(inputs.hidden))
    loss, _ = objective(view(inputs), TeacherSignal(distribution), tokens)
    return list(torch.autograd.grad(loss, [inputs.hidden, inputs.weight]))


def general(inputs: Inputs) -> list[Tensor]:
    student, signal = view(inputs), TeacherSignal(lazy(inputs))
    body = general_form(terms(inputs), [ALPHA, 1 - ALPHA], student, signal)
    chunk = head_chunk(256, len(inputs.weight), body.copies)
    total, _ = head_and_terms(inputs.hidden, student.head, body, chunk)
    return list(torch.autograd.grad(total / len(inputs.hidden), [inputs.hidden, inputs.weight]))


def plain(inputs: Inputs) -> list[Tensor]:
    logits = inputs.hidden @ inputs.weight.t()
    teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
    temperature = inputs.temperature
    soft = torch.nn.functional.kl_div(
        (logits / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    hard = torch.nn.functional.cross_entropy(logits, inputs.targets)
    loss = ALPHA * temperature**2 * soft + (1 - ALPHA) * hard
    return list(torch.autograd.grad(loss, [inputs.hidden, inputs.weight]))


@torch.no_grad()
def products(inputs: Inputs, with_teacher: bool, buffers: list[Tensor]) -> list[Tensor]:
    """The products alone; the logits stand in for their gradient."""
    student, teacher, hidden_grad, weight_grad = buffers
    for start in range(0, len(inputs.hidden), CHUNK):
        window = slice(start, start + CHUNK)
        rows = inputs.hidden[window]
        if with_teacher:
            out = teacher[: len(rows)]
            torch.mm(inputs.teacher_hidden[window], inputs.teacher_weight.t(), out=out)
        logits = torch.mm(rows, inputs.weight.t(), out=student[: len(rows)])
        torch.mm(logits, inputs.weight, out=hidden_grad[window])
        weight_grad.addmm_(logits.t(), rows)
    return [hidden_grad, weight_grad]


def make_buffers(inputs: Inputs) -> list[Tensor]:
    chunks = [torch.zeros(CHUNK, len(inputs.weight)) for _ in range(2)]
    return [*chunks, torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)]


def forms(inputs: Inputs) -> dict[str, Callable[[], list[Tensor]]]:
    buffers: list[Tensor] = []

    def alone(with_teacher: bool) -> list[Tensor]:
        buffers.extend([] if buffers else make_buffers(inputs))
        return products(inputs, with_teacher, buffers)

    return {
        "products": lambda: alone(True),
        "closed form": lambda: closed(inputs, lazy(inputs)),
        "general": lambda: general(inputs),
        "plain": lambda: plain(inputs),
        "top-32 products": lambda: alone(False),
        "top-32 closed form": lambda: closed(inputs, inputs.top_k),
    }


def resident_mb(field: str) -> float:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its peak.

    Not `getrusage`, whose peak a process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_mb(form: str, sizes: list[str]) -> float:
    """Peak of a form beyond its inputs, measured in a process of its own."""
    command = [sys.executable, __file__, *sizes, "--memory-of", form]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def memory_of(form: str, inputs: Inputs) -> float:
    warm = make_inputs(8, 64, 16, inputs.temperature)
    forms(warm)[form]()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as there before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_mb("VmRSS")
    forms(inputs)[form]()
    return resident_mb("VmHWM") - before


def timings(
    measured: dict[str, Callable[[], list[Tensor]]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median wall and processor seconds of each form, the forms taking turns."""
    walls: dict[str, list[float]] = {name: [] for name in measured}
    works: dict[str, list[float]] = {name: [] for name in measured}
    for form in measured.values():
        form()
    for _ in range(repeats):
        for name, form in measured.items():
            wall, work = time.perf_counter(), time.process_time()
            form()
            walls[name].append(time.perf_counter() - wall)
            works[name].append(time.process_time() - work)
    medians = (
        {name: statistics.median(each[name]) for name in measured} for each in (walls, works)
    )
    first, second = medians
    return first, second


def check(inputs: Inputs) -> float:
    """Largest relative difference between our gradients and the plain ones."""
    reference = plain(inputs)
    got = [*closed(inputs, lazy(inputs)), *general(inputs)]
    pairs = zip(got, reference * 2, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def table(result: dict[str, object], rows: dict[str, dict[str, float]]) -> str:
    lines = [
        f"V = {result['vocabulary']:,}, d = {result['width']}, N = {result['tokens']:,}, "
        f"T = {result['temperature']}, {result['threads']} thread(s), torch {result['torch']}. "
        f"Load of the machine {result['load']:.1f} on {result['cpus']} processors. "
        f"Gradients differ from the plain ones by at most {result['gradient_error']:.1e}.",
        "",
        "| form | seconds | x its products | the same, processor time | x plain, processor time "
        "| extra MB | beyond the head's gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        memory = [f"{row[key]:,.0f}" if key in row else "-" for key in ("extra_mb", "beyond_mb")]
        times = [f"{value:.2f}" for key, value in row.items() if not key.endswith("mb")]
        lines.append(f"| {name} | {' | '.join([*times, *memory])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = ("tokens", "vocabulary", "width", "temperature")
    inputs = make_inputs(*(getattr(options, name) for name in names))
    if options.memory_of:
        print(memory_of(options.memory_of, inputs))
        return
    sizes = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    error = check(inputs)
    walls, works = timings(forms(inputs), options.repeats)
    gradient_mb = options.vocabulary * options.width * 4 / 2**20
    rows: dict[str, dict[str, float]] = {}
    for name in walls:
        floor = "top-32 products" if name.startswith("top-32") else "products"
        rows[name] = {
            "seconds": walls[name],
            "to_products": walls[name] / walls[floor],
            "processor_to_products": works[name] / works[floor],
            "processor_to_plain": works[name] / works["plain"],
        }
        if "products" not in name:
            rows[name]["extra_mb"] = peak_mb(name, sizes)
            rows[name]["beyond_mb"] = rows[name]["extra_mb"] - gradient_mb
    result: dict[str, object] = {name: getattr(options, name) for name in names}
    result |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "repeats": options.repeats,
        "gradient_error": error,
    }
    options.out.mkdir(exist_ok=True, parents=True)
    (options.out / "loss.json").write_text(json.dumps(result | {"forms": rows}, indent=1) + "\n")
    text = table(result, rows)
    (options.out / "loss.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
