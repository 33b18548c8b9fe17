"""Private memory of each rank while teacher and student load, sampled from outside.

    PYTHONPATH=src:. python benchmarks/load_memory.py --work DIR [--ranks 2 4] [--label L] [--trim]

Makes a random Llama of 373 M float32 parameters (1.49 GB, four files) in DIR once; it is teacher
and student. Each rank runs what `limbeck distill` runs before its first step: parts, teacher and
student sharded. The parent reads every rank's /proc/PID/smaps_rollup as often as it can.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import socket
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from tests.experiment.tiny_run import write_texts
from tests.models.tiny import tiny_config
from tests.tokenizers.small import small
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.distributed import barrier, sharding, world
from limbeck.experiment.parts import gather_parts

LOADING, GATHERED = 1, 2
DIMENSIONS = {
    "layers": 24,
    "width": 1024,
    "vocabulary": 32000,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}


def make_model(folder: Path) -> None:
    """A random Llama with a small tokenizer, unless it is there."""
    if (folder / "model.safetensors.index.json").exists():
        return
    torch.manual_seed(0)
    config = tiny_config("llama", initializer_range=0.02, **DIMENSIONS)
    config.eos_token_id = small().eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="400MB")
    small().save_pretrained(folder)


def rank_main(
    rank: int, size: int, port: int, work: str, trim: bool, phase: Synchronized[int]
) -> None:
    """One rank: load everything, then wait to be measured once more."""
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size)
    )
    torch.set_num_threads(1)
    config = limbeck.load(Path(work) / "recipe.yaml")
    root = sharding.become_root

    def gather(module: torch.nn.Module) -> None:
        """The first pass through a sharded module gathers embedding and head, as training does."""
        phase.value = GATHERED
        root(module)

    sharding.become_root = gather
    with world(torch.device("cpu")) as here:
        barrier()
        time.sleep(0.3)  # the parent measures what a rank is without models
        phase.value = LOADING
        parts = gather_parts(config, here)
        give_back(trim)
        phase.value = LOADING
        distiller = parts.distiller(parts.take_student(Path("none")), config.objective)
        give_back(trim)
        phase.value = 0
        time.sleep(0.3)
        barrier()
        del distiller


def give_back(trim: bool) -> None:
    """Return memory that is free to the system, which glibc does not do by itself."""
    if trim:
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def private_mib(pid: int) -> tuple[float, float]:
    """Anonymous memory of a process, and all that is its alone, mapped files included, in MiB."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) / 1024
    return fields["Anonymous"], fields["Private_Clean"] + fields["Private_Dirty"]


def measure(size: int, work: Path, *, trim: bool) -> dict[str, float]:
    """Load on some ranks; the largest figures of any rank, in MiB over a rank without models."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    phases = [context.Value("i", 0) for _ in range(size)]
    ranks = [
        context.Process(target=rank_main, args=(rank, size, port, str(work), trim, phases[rank]))
        for rank in range(size)
    ]
    start = last = time.perf_counter()
    spent = {LOADING: 0.0, GATHERED: 0.0, 0: 0.0}
    for each in ranks:
        each.start()
    before: dict[int, tuple[float, float]] = {}
    peaks: dict[str, float] = {}
    while any(each.is_alive() for each in ranks):
        now_s = time.perf_counter()
        spent[phases[0].value] += now_s - last
        last = now_s
        for rank, each in enumerate(ranks):
            now = phases[rank].value
            try:
                found = private_mib(each.pid or 0)
            except (OSError, KeyError, IndexError):
                continue
            seen_loading = f"{rank}" in peaks
            if now == 0 and not seen_loading:
                before[rank] = found
                continue
            peaks[f"{rank}"] = 1
            kind = {LOADING: "load", GATHERED: "gathered", 0: "loaded"}[now]
            for name, value, base in zip(
                ("anonymous", "private"), found, before[rank], strict=True
            ):
                key = f"{kind} {name}"
                peaks[key] = max(peaks.get(key, 0), value - base)
        time.sleep(0.03)
    assert [each.exitcode for each in ranks] == [0] * size
    figures = {key: round(value) for key, value in peaks.items() if " " in key}
    seconds = {"loading": spent[LOADING], "proving": spent[GATHERED], "all": last - start}
    return figures | {f"seconds, {name}": round(value, 1) for name, value in seconds.items()}


def recipe(work: Path) -> None:
    """Teacher and student are the same large model."""
    write_texts(work / "train.jsonl", 40, seed=1)
    settings = {
        "teacher": {"type": "online", "path": str(work / "model"), "dtype": "float32"},
        "student": {"type": "pretrained", "path": str(work / "model")},
        "data": {"type": "text", "path": str(work / "train.jsonl"), "sequence_length": 32},
        "objective": {"alpha": 0.9},
        "optim": {"learning_rate": 0.001, "steps": 2, "tokens_per_step": 128},
        "output": str(work / "run"),
        "device": "cpu",
    }
    (work / "recipe.yaml").write_text(json.dumps(settings))


def main() -> None:
    """Measure, and print one JSON line for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--label", default="")
    parser.add_argument("--trim", action="store_true", help="malloc_trim after each model")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ["LIMBECK_CACHE"] = str(arguments.work / "cache")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    make_model(arguments.work / "model")
    recipe(arguments.work)
    for size in arguments.ranks:
        figures = measure(size, arguments.work, trim=arguments.trim)
        print(json.dumps({"label": arguments.label, "ranks": size, **figures}), flush=True)


if __name__ == "__main__":
    main()
