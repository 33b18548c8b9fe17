"""Time and memory of the output head with its loss on a GPU, beside its products and the peers.

    python benchmarks/gpu.py [--vocabulary 128256 151665] [--tokens 16384] [--repeats 7]

bfloat16 states and heads, widths 2,048 and 4,096, T = 2, KL and cross-entropy in equal parts; peers
that are not installed are left out. All forms take turns in one process; medians. Peak memory is
what a form allocates beyond the tensors it starts from. `--device cpu --small` tries the script.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from head import peers
from head.inputs import Inputs
from head.ours import closed, lazy, plain, weighted
from torch import Tensor

from limbeck.losses import Objective
from limbeck.losses.distributions import Samples, TeacherDistribution, TopK

KEPT, CHUNK = 64, 2048
Form = Callable[[], object]


def random_inputs(vocabulary: int, tokens: int, widths: tuple[int, int], device: str) -> Inputs:
    """States and heads whose logits spread like a language model's (about 3)."""
    torch.manual_seed(0)

    def normal(rows: int, width: int, spread: float = 1.0) -> Tensor:
        return torch.randn(rows, width, device=device).mul_(spread).bfloat16()

    own, other = widths
    hidden, weight = normal(tokens, own), normal(vocabulary, own, 3 / own**0.5)
    teacher = normal(tokens, other), normal(vocabulary, other, 3 / other**0.5)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), *teacher, targets)


def products(inputs: Inputs, with_teacher: bool) -> Form:
    """The products alone, in training's chunks; the logits stand in for their gradient."""
    hidden, weight, teacher_hidden, teacher_weight, _ = (each.detach() for each in inputs)
    total = torch.zeros_like(weight, dtype=torch.float32)

    def run() -> None:
        for rows, other in zip(hidden.split(CHUNK), teacher_hidden.split(CHUNK), strict=True):
            logits = rows @ weight.t()
            if with_teacher:
                other @ teacher_weight.t()
            logits @ weight
            if total.is_cuda:
                torch.addmm(total, logits.t(), rows, out_dtype=total.dtype, out=total)
            else:
                total.add_(logits.t() @ rows)

    return run


def recorded(inputs: Inputs, make: Callable[[Tensor], TeacherDistribution]) -> TeacherDistribution:
    """A recorded form of the teacher, made a few rows at a time."""
    parts = [
        make((rows @ inputs.teacher_weight.t()).float())
        for rows in inputs.teacher_hidden.split(256)
    ]
    return type(parts[0]).cat(parts)


def forms(inputs: Inputs) -> dict[str, Form]:
    """Everything that is timed, by name."""
    objective = Objective(weighted("forward_kl", 0.5, 2.0))
    kept = recorded(inputs, lambda logits: TopK.from_logits(logits, KEPT, 2.0))
    drawn = recorded(inputs, lambda logits: Samples.from_logits(logits, KEPT, 2.0))
    compiled = torch.compile(plain)
    return {
        "products, with the teacher's": products(inputs, with_teacher=True),
        "products, recorded teacher": products(inputs, with_teacher=False),
        "limbeck, online teacher": lambda: closed(inputs, lazy(inputs), objective),
        f"limbeck, top-{KEPT} and tail": lambda: closed(inputs, kept, objective),
        f"limbeck, {KEPT} samples": lambda: closed(inputs, drawn, objective),
        "plain, compiled": lambda: compiled(inputs, "forward_kl", 0.5, 2.0),
        "Liger, fused JSD": lambda: peers.liger(inputs, 0.0, 0.5, 2.0, True),
        "TRL, DistillationTrainer (no CE)": lambda: peers.trl_kernel(inputs, 0.0, 2.0),
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def first_run(form: Form, device: str) -> str:
    """Peak memory beyond what is there, as text; or why the form does not run."""
    try:
        form()  # compiles
        synchronize(device)
        if device != "cuda":
            return "-"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        torch.cuda.synchronize()
        return f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB"
    except (ImportError, RuntimeError) as error:  # a peer, or out of memory: the row says so
        return f"did not run: {' '.join(str(error).split())[:80]}"


def measured(inputs: Inputs, repeats: int, device: str) -> list[str]:
    """Rows of the table."""
    everything = forms(inputs)
    memory = {name: first_run(form, device) for name, form in everything.items()}
    seconds: dict[str, list[float]] = {
        name: [] for name, text in memory.items() if not text.startswith("did not")
    }
    for turn in range(repeats):
        for name in seconds if turn % 2 == 0 else reversed(seconds):
            started = time.perf_counter()
            everything[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["products, with the teacher's"]
    return [
        f"| {name} | {1000 * medians[name]:.1f} ms | {medians[name] / base:.2f} | {text} |"
        if name in medians
        else f"| {name} | | | {text} |"
        for name, text in memory.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[128_256, 151_665])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--out", type=Path, help="file to write the table to as well")
    options = parser.parse_args()
    widths = (32, 48) if options.small else (2048, 4096)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    lines = [f"# The head with its loss on {machine}", "", f"torch {torch.__version__}"]
    for vocabulary in options.vocabulary:
        inputs = random_inputs(vocabulary, options.tokens, widths, options.device)
        lines += ["", f"## {options.tokens:,} tokens, {vocabulary:,} of vocabulary", ""]
        lines += ["| | time | beside the products | peak memory |", "|---|---|---|---|"]
        lines += measured(inputs, options.repeats, options.device)
        del inputs
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
