"""A simulated step against a real one of gloo ranks; and Llama 70B into 8B on clusters.

    PYTHONPATH=src:. python benchmarks/dry_run.py --work DIR [--plan | --accumulation]

Eight settings, real and simulated. With `--plan` 70B into 8B on H100s, with `--accumulation` one
step on 2 ranks cut into 1, 4 and 16 micro-batches, as planned and timed.
Models are made in DIR: a random Llama pair of 28 M and 47 M parameters; configurations of Llama 3.1
8B and 70B, without weights, and a tokenizer with as many words.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tests.distributed.processes import live, on_ranks
from tests.distributed.test_footprint import figures, sharded_pair
from tests.models.tiny import tiny_config
from tests.tokenizers.small import small
from tokenizers import Tokenizer, models
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from limbeck.batch import Batch
from limbeck.checks import read_hardware
from limbeck.config import OptimConfig
from limbeck.distributed import World, simulated_world, world
from limbeck.experiment.cluster import plan_elsewhere
from limbeck.train import make_optimizers, train_step

BFLOAT: dict[str, Any] = {"dtype": torch.bfloat16}
SETTINGS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "1 rank, float32": (1, "auto", {}),
    "2 ranks, float32": (2, "auto", {}),
    "2 ranks, float32, 3 micro-batches": (2, "auto", {"passes": 3}),
    "2 ranks, whole copies (HSDP 2 x 1)": (2, "none", {}),
    "2 ranks, bfloat16": (2, "auto", BFLOAT),
    "2 ranks, bfloat16, checkpointed": (2, "auto", BFLOAT | {"checkpointing": "full"}),
    "4 ranks, float32": (4, "auto", {}),
    "4 ranks, bfloat16, checkpointed": (4, "auto", BFLOAT | {"checkpointing": "full"}),
}
ROWS_OF_A_STEP, SHORT = 16, 32
SIZE = {"rows": 2, "length": 512}
LLAMA: dict[str, dict[str, Any]] = {
    "8b": {"layers": 32, "width": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70b": {"layers": 80, "width": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}
PLANS = (
    (8, ()),
    (8, ("memory.activation_checkpointing=full",)),
    (64, ()),
    (64, ("memory.activation_checkpointing=full",)),
    (8, ("memory.activation_checkpointing=full", "memory.reduce_gradients=step")),
    (64, ("memory.activation_checkpointing=full", "parallel.replicate=8")),
)


def make_pair(folder: Path, vocabulary: int = 49152) -> None:
    """A random Llama pair, unless it is there."""
    for name, layers, width, inner, heads in (
        ("student", 4, 256, 768, 4),
        ("teacher", 6, 384, 1024, 6),
    ):
        if not (folder / name).exists():
            config = tiny_config(
                "llama", layers, width, vocabulary, intermediate_size=inner,
                num_attention_heads=heads, max_position_embeddings=1024,
            )  # fmt: skip
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            small().save_pretrained(folder / name)


class NoProducts(TorchDispatchMode):
    """Leaves matrix products out: their results are ones, of the same shapes and bytes."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute, unless it is a product."""
        if DTensor in types:
            return NotImplemented  # its local tensors come next
        match func:
            case torch.ops.aten.mm.default:
                return args[0].new_ones(args[0].shape[0], args[1].shape[1])
            case torch.ops.aten.addmm_.default:
                return args[0]
        return func(*args, **(kwargs or {}))


def real(here: World, folder: Path, name: str) -> None:
    """One rank of a setting; where computation is in bfloat16, which few CPUs can, no products."""
    setting = SETTINGS[name][2]
    with NoProducts() if "dtype" in setting else nullcontext():  # type: ignore[no-untyped-call]
        step = figures(here, folder, **setting, **SIZE)
    if here.is_main:
        (folder / "real.json").write_text(json.dumps(asdict(step)))


def real_alone(folder: Path, name: str) -> None:
    """A setting of one rank."""
    with world(torch.device("cpu"), "always") as here:
        real(here, folder, name)


def simulated(folder: Path, name: str) -> None:
    """The simulated rank of a setting."""
    size, spread, setting = SETTINGS[name]
    with simulated_world(size, spread, "cpu") as here:
        step = figures(here, folder, **setting, **SIZE)
    (folder / "simulated.json").write_text(json.dumps(asdict(step)))


def compare(folder: Path, name: str) -> None:
    """Print a setting's row of the table."""
    size, spread, _ = SETTINGS[name]
    if size == 1:
        assert live(real_alone, folder, name) == 0
    else:
        on_ranks(size, real, folder, name, spread=spread)
    assert live(simulated, folder, name) == 0
    theirs, mine = (
        json.loads((folder / f"{kind}.json").read_text()) for kind in ("real", "simulated")
    )
    held = [step["memory_bytes"] for step in (mine, theirs)]
    peaks = [sum(step.values()) for step in held]
    lasting = ("student weights", "teacher weights", "optimizer state")
    same = all(held[0][each] == held[1][each] for each in lasting)
    sent = mine["collectives"] == theirs["collectives"]
    counts = ", ".join(f"{c['count']} {c['kind']}" for c in mine["collectives"])
    print(
        f"| {name} | {'equal' if same else held} | {counts}: {'equal' if sent else 'DIFFER'} | "
        f"{'equal' if mine['flops'] == theirs['flops'] else 'DIFFER'} | "
        f"{peaks[0]:,} | {peaks[1]:,} | {peaks[0] / peaks[1] - 1:+.2%} |",
        flush=True,
    )


def timed(here: World, folder: Path, passes: int, once: bool) -> None:
    """One rank of a step of 16 rows, cut into micro-batches: the second of two."""
    distiller, teacher = sharded_pair(here, folder)
    optim = OptimConfig(learning_rate=1e-4, steps=9)
    optimizers = make_optimizers(distiller, optim, 1e-4, here.device)
    batch = Batch.from_tokens(torch.zeros(ROWS_OF_A_STEP // passes, SHORT + 1, dtype=torch.int64))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        train_step(distiller, teacher, optimizers, [batch] * passes, here, reduce_once=once)
        seconds.append(time.perf_counter() - start)
    if here.is_main:
        (folder / "seconds").write_text(str(seconds[1]))


def planned(folder: Path, passes: int, once: bool) -> None:
    """The simulated step of the same."""
    with simulated_world(2, "auto", "cpu") as here:
        shape = {"passes": passes, "rows": ROWS_OF_A_STEP // passes, "length": SHORT}
        step = figures(here, folder, reduce="step" if once else "micro_batch", **shape)
    (folder / "planned.json").write_text(json.dumps(asdict(step)))


def print_accumulation(folder: Path) -> None:
    """Print what more micro-batches of the same rows cost."""
    folder = folder / "accumulation"
    make_pair(folder, vocabulary=4096)
    for once in (True, False):
        for passes in (1, 4, 16):
            assert live(planned, folder, passes, once) == 0
            on_ranks(2, timed, folder, passes, once)
            step = json.loads((folder / "planned.json").read_text())
            sent = {c["kind"]: (c["count"], c["whole_bytes"] >> 20) for c in step["collectives"]}
            counts = ", ".join(f"{n} {kind} of {mib:,} MiB" for kind, (n, mib) in sent.items())
            peak = sum(step["memory_bytes"].values()) >> 20
            seconds = float((folder / "seconds").read_text())
            when = "step" if once else "micro_batch"
            print(f"| {passes} | {when} | {counts} | {peak:,} | {seconds:.2f} |", flush=True)


def make_configurations(folder: Path) -> None:
    """Llama 3.1's shapes and a tokenizer with as many words, unless they are there."""
    words = {f"w{i}": i for i in range(128256)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1"
    )
    for name, shape in LLAMA.items():
        if not (folder / name / "config.json").exists():
            config = tiny_config(
                "llama", vocabulary=128256, num_key_value_heads=8, max_position_embeddings=131072,
                tie_word_embeddings=False, eos_token_id=1, **shape,
            )  # fmt: skip
            config.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)


def write_recipe(folder: Path) -> Path:
    """70B into 8B: 64 rows of 4,096 a step, a row a micro-batch, one document a row."""
    recipe = {
        "teacher": {"type": "online", "path": str(folder / "70b")},
        "student": {"type": "pretrained", "path": str(folder / "8b")},
        "data": {"type": "text", "path": "train.jsonl", "sequence_length": 4096, "pack": False},
        "optim": {"learning_rate": 1e-5, "steps": 1000, "tokens_per_step": 64 * 4096},
        "memory": {"micro_batch": 1},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def print_plans(folder: Path) -> None:
    """Print the plan of each cluster as JSON."""
    make_configurations(folder)
    recipe = write_recipe(folder)
    for ranks, overrides in PLANS:
        start = time.perf_counter()
        plan = plan_elsewhere(recipe, overrides, ranks, read_hardware("h100"))
        took = time.perf_counter() - start
        print(json.dumps({"overrides": overrides, "took": took, **asdict(plan)}), flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--accumulation", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.plan:
        print_plans(arguments.work)
        return
    if arguments.accumulation:
        print_accumulation(arguments.work)
        return
    make_pair(arguments.work)
    for name in SETTINGS:
        compare(arguments.work, name)


if __name__ == "__main__":
    main()
