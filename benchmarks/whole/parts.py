"""Parts of `benchmarks/gpu.py` beyond the head; each returns lines of Markdown.

Shapes are those of Llama 3.1 8B as the teacher and of a student of 1.5 billion parameters; weights
are random. `small` takes tiny ones, to try the script on a CPU.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.distributed.processes import context
from tests.experiment.tiny_run import write_recipe
from tests.models.tiny import tiny_config, tiny_tokenizer
from tests.train.toy import ToyBatches, toy_pair
from torch.profiler import ProfilerActivity, profile

from limbeck.batch import Batch
from limbeck.checks import HARDWARE, read_hardware
from limbeck.config import RunConfig
from limbeck.distributed import World, world
from limbeck.distributed.stopping import SIGNALS
from limbeck.experiment import assemble, load
from limbeck.experiment.cluster import plan_elsewhere
from limbeck.files import sha256
from limbeck.models import CausalLM
from limbeck.models.build import from_config
from limbeck.recording import Recording
from limbeck.teachers import TeacherRequest
from limbeck.train import accumulate, count_step, train_step
from limbeck.train.optimizers import make_optimizers
from whole.contenders import CONTENDERS, importable
from whole.floor import products_of

PEAK = read_hardware("h200")
"""Its bfloat16 peak is that of the H100, and what shares are given of; other devices say theirs."""


class Size(NamedTuple):
    """Models and rows of a measurement."""

    vocabulary: int
    teacher: dict[str, Any]
    student: dict[str, Any]
    rows: int
    length: int
    steps: int


BIG = Size(
    128_256,
    {"layers": 32, "width": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    {"layers": 20, "width": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
    rows=2, length=4096, steps=6,
)  # fmt: skip
SMALL = Size(1001, {"layers": 3, "width": 32}, {"layers": 2, "width": 32}, 2, 16, 2)


def config_of(size: Size, shape: dict[str, Any], *, tied: bool) -> Any:
    """The configuration of a Llama."""
    heads = {} if size is SMALL else {"num_key_value_heads": 8}
    return tiny_config(
        "llama", vocabulary=size.vocabulary, max_position_embeddings=size.length,
        tie_word_embeddings=tied, initializer_range=0.02, **heads, **shape,
    )  # fmt: skip


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """A model of random weights, drawn where it will be."""
    torch.manual_seed(0)
    with torch.device(device):
        return CausalLM(from_config(config, dtype)).to(device).eval()


def random_batch(size: Size) -> Batch:
    """Rows of random tokens, all scored; in host memory, as a run has them."""
    generator = torch.Generator().manual_seed(0)
    shape = size.rows, size.length + 1
    return Batch.from_tokens(torch.randint(size.vocabulary, shape, generator=generator))


class Measured(NamedTuple):
    """A contender's steps: a row of the table, its peak memory, and its operations by time."""

    row: str
    peak_bytes: int
    operations: str


def whole_steps(size: Size, device: torch.device, folder: Path) -> list[str]:
    """Speed and memory of a step of each contender; limbeck's plan; and its profile."""
    found = {}
    for name in importable(CONTENDERS):
        found[name] = one_contender(name, size, device)
        tidy(device)
    lines = [
        "| | s a step | tokens/s | share of bf16 peak | peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [each.row for each in found.values()]
    peak, planned = found["limbeck"].peak_bytes, sum(plan_of(size, folder).values())
    lines += ["", f"Plan of limbeck's step: {gb(planned)}; measured {gb(peak)}."]
    if peak:
        lines[-1] += f" The plan is {planned / peak - 1:+.1%} off."
    operations = found["limbeck"].operations
    return [*lines, "", "Limbeck's step by operation:", "", "```", operations, "```"]


def one_contender(name: str, size: Size, device: torch.device) -> Measured:
    """Steps of one contender on models of its own."""
    batch = random_batch(size)
    tokens = batch.input_ids.numel()
    with world(device) as here:
        take = CONTENDERS[name](*pair(size, device), here, compute_type(device))

        def step() -> float:
            return take(batch)

        step()
        flops = sum(each.flops * count for each, count in products_of(step).items())
        reset_peak(device)
        median = statistics.median(timed(step, size.steps, device))
        peak = peak_bytes(device)
        operations = profiled(step, device) if name == "limbeck" else ""
    share = flops / median / (PEAK.tflops * 1e12)
    row = f"| {name} | {median:.3f} | {tokens / median:,.0f} | {share:.1%} | {gb(peak)} |"
    return Measured(row, peak, operations)


def pair(size: Size, device: torch.device) -> tuple[CausalLM, CausalLM]:
    """A student with float32 weights, and a frozen teacher in the type it computes in."""
    student = random_model(config_of(size, size.student, tied=True), device, torch.float32)
    teacher = random_model(config_of(size, size.teacher, tied=False), device, compute_type(device))
    return student, teacher.requires_grad_(False)


def compute_type(device: torch.device) -> torch.dtype:
    """Format of the computation."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def timed(step: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of some calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def profiled(step: Callable[[], object], device: torch.device) -> str:
    """The fifteen operations or kernels that take most time."""
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    with profile(activities=kinds if device.type == "cuda" else kinds[:1]) as found:
        step()
        synchronize(device)
    return str(found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60))


def plan_of(size: Size, folder: Path) -> dict[str, int]:
    """Memory of the same step as `limbeck check` plans it, by purpose."""
    for name, tied in (("teacher", False), ("student", True)):
        shape = size.teacher if name == "teacher" else size.student
        config_of(size, shape, tied=tied).save_pretrained(folder / name)
        tiny_tokenizer(size.vocabulary).save_pretrained(folder / name)
    recipe = {
        "teacher": {"type": "online", "path": str(folder / "teacher")},
        "student": {"type": "pretrained", "path": str(folder / "student")},
        "data": {"type": "text", "path": "none", "sequence_length": size.length, "pack": False},
        "objective": {"alpha": 1.0},
        "optim": {"learning_rate": 1e-4, "steps": 9, "tokens_per_step": size.rows * size.length},
        "memory": {"micro_batch": size.rows},
        "output": str(folder / "run"),
    }
    path = folder / "plan.yaml"
    path.write_text(json.dumps(recipe))
    return dict(plan_elsewhere(path, (), 1, HARDWARE["h200"]).memory_bytes)


def stored_steps(size: Size, device: torch.device, folder: Path) -> list[str]:
    """Speed of a step from a store, beside cross-entropy alone; the teacher is tiny."""
    lines = ["| | s a step | tokens/s |", "|---|---|---|"]
    recipe = stored_recipe(size, device, folder)
    with Recording(load(recipe)) as recording:
        recording.record((0, 1), None, lambda: None)
    stored = json.dumps({"type": "stored", "path": str(folder / "store")})
    for name, more in (("cross-entropy", ["objective.alpha=0"]), ("top-64 and tail", [])):
        config = load(recipe, [f"teacher={stored}", *more])
        median = statistics.median(recipe_steps(config, size, device, folder)[1:])
        lines.append(f"| {name} | {median:.3f} | {size.rows * size.length / median:,.0f} |")
        tidy(device)
    return lines


def recipe_steps(config: RunConfig, size: Size, device: torch.device, folder: Path) -> list[float]:
    """Seconds of steps of a recipe on its first rows."""
    with assemble(config) as run:
        parts, world_ = run.parts, run.world
        distiller = parts.distiller(parts.take_student(folder), config.objective).train()
        parts.teacher.require(TeacherRequest(needs=distiller.objective.needs))
        optimizers = make_optimizers(distiller, parts.config.optim, 1e-4, device)
        batches = [parts.data.batch(list(range(size.rows)))]

        def step() -> object:
            return train_step(distiller, parts.teacher, optimizers, batches, world_)

        return timed(step, size.steps + 1, device)


def stored_recipe(size: Size, device: torch.device, folder: Path) -> Path:
    """A recipe of a tiny teacher with the whole vocabulary, and as much text as a step takes."""
    teacher, tokenizer = folder / "small-teacher", tiny_tokenizer(size.vocabulary)
    config = config_of(size, {"layers": 1, "width": 32, "num_attention_heads": 8}, tied=True)
    config.eos_token_id = tokenizer.eos_token_id
    from_config(config, torch.float32).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    ids = torch.randint(3, size.vocabulary, (size.rows + 2, size.length)).tolist()
    text = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids]
    (folder / "text.jsonl").write_text("\n".join(text))
    shape = config_of(size, size.student, tied=True)
    shape.save_pretrained(folder / "shape")
    recipe = {
        "teacher": {"type": "online", "path": str(teacher)},
        "student": {"type": "random", "config": str(folder / "shape" / "config.json")},
        "data": {"path": str(folder / "text.jsonl"), "sequence_length": size.length},
        "record": {"form": {"type": "top_k", "k": 64, "temperatures": [1.0]},
                   "output": str(folder / "store")},
        "optim": {"learning_rate": 1e-4, "steps": 9, "tokens_per_step": size.rows * size.length},
        "memory": {"micro_batch": size.rows},
        "output": str(folder / "stored-run"),
        "device": device.type,
    }  # fmt: skip
    path = folder / "stored.yaml"
    path.write_text(json.dumps(recipe))
    return path


def same_gradients(device: torch.device) -> list[str]:
    """Gradients of a toy step on the device and on the CPU, float32, every kind of term."""
    found = [gradients_on(each) for each in (torch.device("cpu"), device)]
    gaps = [
        float((found[1][name] - expected).norm() / expected.norm().clamp_min(1e-30))
        for name, expected in found[0].items()
    ]
    return [f"{len(gaps)} gradients in float32; the largest relative difference is {max(gaps):.1e}"]


def gradients_on(device: torch.device) -> dict[str, torch.Tensor]:
    """All gradients of a step of two micro-batches."""
    here = World(0, 1, device)
    distiller, teacher = toy_pair()
    distiller.to(device)
    distiller.student.device = device
    teacher.model.to(device)
    teacher.model.device = device
    batches = [ToyBatches().batch(rows) for rows in ([0, 1], [2])]
    tokens, *_ = count_step(batches, [0] * len(SIGNALS), here)
    accumulate(distiller, teacher, batches, tokens, here)
    named = distiller.named_parameters()
    return {name: p.grad.double().cpu() for name, p in named if p.grad is not None}


def killed_and_resumed(device: torch.device, folder: Path) -> list[str]:
    """A run killed with SIGKILL half-way, continued, beside one that was left alone."""
    path = write_recipe(folder, device=device.type, evaluate={"baseline": None})
    whole, cut = folder / "whole", folder / "cut"
    finish = in_a_process(train, path, whole, False)
    finish.join()
    killed = in_a_process(train, path, cut, False)
    metrics = cut / "metrics.jsonl"
    while killed.is_alive() and (not metrics.exists() or steps_in(metrics) < 3):
        time.sleep(0.01)
    steps = steps_in(metrics)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    in_a_process(train, path, cut, True).join()
    hashes = [sha256(each / "student" / "model.safetensors") for each in (whole, cut)]
    same = "the same bytes" if hashes[0] == hashes[1] else "OTHER WEIGHTS"
    return [
        f"killed after step {steps} of {steps_in(metrics)}, resumed: {same} as a run left alone"
    ]


def steps_in(metrics: Path) -> int:
    """The last step that a run has logged."""
    kinds = [json.loads(line) for line in metrics.read_text().splitlines()]
    return max((each["step"] for each in kinds if each["kind"] == "step"), default=0)


def in_a_process(function: Callable[..., None], *arguments: object) -> Any:
    """Start a function in a process of its own."""
    process = context().Process(target=function, args=arguments)
    process.start()
    return process


def train(path: Path, output: Path, resume: bool) -> None:
    """A whole run."""
    with assemble(load(path, [f"output={output}"])) as assembled:
        assembled.train(resume=resume)


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    """Measure the peak of memory from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    """Peak of memory since then; 0 where it is not counted."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def tidy(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gb(num_bytes: int) -> str:
    """Bytes as text."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes else "-"


@contextmanager
def noted(lines: list[str], title: str) -> Iterator[None]:
    """A section; what fails in it is said there, and the others still run."""
    lines += ["", f"## {title}", ""]
    started = time.perf_counter()
    try:
        yield
    except Exception as error:  # a peer's, or out of memory: the others are still worth having
        lines.append(f"did not run: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    lines += ["", f"({time.perf_counter() - started:.0f} s)"]
