"""What an accelerator is for, measured on one: gradients, resuming, the head, whole steps, stores.

    PYTHONPATH=src:. python benchmarks/gpu.py [--parts NAME ...] [--out FILE]

`gradients`: the device's beside the CPU's. `resume`: a run killed and continued. `head`: the output
head with its loss beside its products and the peers; bfloat16 states and heads, widths 2,048 and
4,096, T = 2, KL and cross-entropy in equal parts; all forms take turns in one process; medians;
peak memory is what a form allocates beyond the tensors it starts from. `steps`: whole steps of a
teacher of 8 and a student of 1.5 billion parameters beside a plain loop and TRL, the plan of
limbeck's memory, and its profile. `store`: steps from a recorded teacher. Peers that are not
installed are left out. `--device cpu --small` runs every part at tiny sizes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from head import peers
from head.inputs import Inputs
from head.ours import closed, lazy, plain, weighted
from torch import Tensor
from whole import parts
from whole.parts import BIG, SMALL, noted

from limbeck.losses import Objective
from limbeck.losses.distributions import Samples, TeacherDistribution, TopK
from limbeck.models import compilation

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


def forms(inputs: Inputs, backend: str) -> dict[str, Form]:
    """Everything that is timed, by name."""
    objective = Objective(weighted("forward_kl", 0.5, 2.0))
    kept = recorded(inputs, lambda logits: TopK.from_logits(logits, KEPT, 2.0))
    drawn = recorded(inputs, lambda logits: Samples.from_logits(logits, KEPT, 2.0))
    compiled = torch.compile(plain, backend=backend)
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


def measured(inputs: Inputs, repeats: int, device: str, backend: str) -> list[str]:
    """Rows of the table."""
    everything = forms(inputs, backend)
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


def heads(options: argparse.Namespace) -> list[str]:
    """The head at each vocabulary."""
    lines: list[str] = []
    vocabularies, tokens, widths = [128_256, 151_665], 16_384, (2048, 4096)
    if options.small:
        vocabularies, tokens, widths = [1001], 64, (32, 48)
    backend = "aot_eager" if options.small else "inductor"
    for vocabulary in vocabularies:
        inputs = random_inputs(vocabulary, tokens, widths, options.device)
        lines += [f"{tokens:,} tokens, {vocabulary:,} of vocabulary", ""]
        lines += ["| | time | beside the products | peak memory |", "|---|---|---|---|"]
        lines += [*measured(inputs, options.repeats, options.device, backend), ""]
        del inputs
    return lines


def main() -> None:
    """Run the parts, and print and write what they say as soon as each is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7, help="of the head")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--out", type=Path, help="file to write the table to as well")
    options = parser.parse_args()
    if options.small:
        compilation.BACKEND = "aot_eager"  # a compiler takes longer than all else
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    lines = [f"# limbeck on {machine}", "", f"torch {torch.__version__}"]
    printed = 0
    for name in options.parts:
        title, part = PARTS[name]
        with tempfile.TemporaryDirectory() as folder, noted(lines, title):
            lines += part(options, Path(folder))
        print("\n".join(lines[printed:]), flush=True)
        printed = len(lines)
        if options.out is not None:
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


Part = Callable[[argparse.Namespace, Path], list[str]]


def sized(part: Callable[[parts.Size, torch.device, Path], list[str]]) -> Part:
    """A part that is run at a size, on a device."""
    return lambda options, folder: part(
        SMALL if options.small else BIG, torch.device(options.device), folder
    )


PARTS: dict[str, tuple[str, Part]] = {
    "gradients": (
        "Gradients beside the CPU's",
        lambda options, _: parts.same_gradients(torch.device(options.device)),
    ),
    "resume": (
        "Killed and resumed",
        lambda options, folder: parts.killed_and_resumed(torch.device(options.device), folder),
    ),
    "head": ("The head with its loss", lambda options, _: heads(options)),
    "steps": ("Whole steps", sized(parts.whole_steps)),
    "store": ("Steps from a store", sized(parts.stored_steps)),
}


if __name__ == "__main__":
    main()
