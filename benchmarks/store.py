"""The store: bytes a token against fidelity, and rates beside the teacher's.

    python benchmarks/store.py TEACHER [--tokens 20480] [--drop 20] [--results FOLDER]

TEACHER is a folder or name of a model, such as what `limbeck.models.embedded_teacher` makes.
Real text (the embedded corpus' held-out part) is read by the teacher and by a student at a fixed
distance: the teacher without some of its layers. Each form is written to a real store and read
back; DistillKit's codec is written anew from its public description (`kept/distillkit.py`).

Of each: the bytes of its records; the loss' bias, in nats; and the error of the gradient of forward
KL relative to the exact gradient, at the logits (dz) and the hidden states (dh), over all tokens
together (root of summed squares), and of the head's gradient summed over all tokens (dW: a bias
stays, noise averages out).

Rates are of one process, one thread; only ratios to the teacher's mean something.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from kept.cases import Kept, Sampled, all_kept, gradient_of, rows_of
from kept.distillkit import PUBLISHED, replace_all, round_trip_error
from kept.plot import draw

from limbeck.batch import Batch
from limbeck.initialisers import Origin
from limbeck.initialisers.depth import depth
from limbeck.models import CausalLM, ModelSource, load_model
from limbeck.signals import LazyLogits
from limbeck.store import Sample, Store, StoreHeader, generator_of
from limbeck.store.ranks import Ranks
from limbeck.tokenizers import load_tokenizer

LENGTH, ROWS = 512, 64


def windows(teacher: str, tokens: int) -> list[Sample]:
    """Windows of the held-out corpus that hold so many scored tokens together, or a few more."""
    tokenizer = load_tokenizer(teacher)
    corpus = resources.files("limbeck.data.corpus") / "heldout.jsonl.gz"
    told, count = [], 0
    with resources.as_file(corpus) as path, gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            ids = tokenizer(json.loads(line)["text"])["input_ids"]
            for start in range(0, len(ids) - 1, LENGTH):
                window = np.array(ids[start : start + LENGTH + 1], dtype=np.int32)
                told.append(Sample(window, np.ones(len(window) - 1, dtype=np.bool_)))
                count += len(window) - 1
                if count >= tokens:
                    return told
    return told


@torch.no_grad()
def read_all(model: CausalLM, samples: list[Sample]) -> tuple[list[LazyLogits], float]:
    """Last hidden states of each window, and how many tokens a second were read."""
    began, told = time.perf_counter(), []
    for sample in samples:
        batch = Batch.from_tokens(torch.from_numpy(sample.tokens.astype(np.int64))[None])
        hidden, _ = model(batch)
        told.append(LazyLogits(hidden, model.head._replace(weight=model.head.weight.detach())))
    return told, sum(s.num_scored for s in samples) / (time.perf_counter() - began)


def scores(kept: list[Kept], teacher: Sampled, student: list[LazyLogits], temperature: float):
    """The loss and gradients of each form, beside the exact ones."""
    head = student[0].head.weight
    names = [each.name for each in kept]
    sums = {name: {"loss": 0.0, "dz": 0.0, "dh": 0.0} for name in [*names, "exact"]}
    at_head = {name: torch.zeros_like(head) for name in [*names, "exact"]}
    count = 0
    for index, (sample, exact) in enumerate(teacher):
        print(f"  scoring sample {index + 1} of {len(teacher)}", flush=True)
        signals = {each.name: each.signals(index) for each in kept}
        for start in range(0, sample.num_scored, ROWS):
            stop = min(start + ROWS, sample.num_scored)
            hidden = student[index].hidden[start:stop]
            logits = student[index].head(hidden)
            loss, right = gradient_of(rows_of(exact, start, stop), logits, temperature)
            add(sums["exact"], loss, right, head)
            at_head["exact"].addmm_(right.T, hidden)
            count += stop - start
            for name, signal in signals.items():
                each, wrong = gradient_of(rows_of(signal, start, stop), logits, temperature)
                wrong -= right
                add(sums[name], each, wrong, head)
                at_head[name].addmm_(wrong.T, hidden)
    whole = sums["exact"]
    rows = [
        {
            "family": each.family,
            "name": each.name,
            "bytes": each.bytes_per_token,
            "bias": (sums[each.name]["loss"] - whole["loss"]) / count,
            "dz": (sums[each.name]["dz"] / whole["dz"]) ** 0.5,
            "dh": (sums[each.name]["dh"] / whole["dh"]) ** 0.5,
            "dw": float(at_head[each.name].norm() / at_head["exact"].norm()),
        }
        for each in kept
    ]
    return rows, whole["loss"] / count


def add(sums: dict[str, float], loss: torch.Tensor, gradient: torch.Tensor, head: torch.Tensor):
    """Add up losses, and squares of gradients."""
    sums["loss"] += float(loss.double().sum())
    sums["dz"] += float(gradient.double().square().sum())
    sums["dh"] += float((gradient @ head).double().square().sum())


def rates(teacher: Sampled, folder: Path) -> list[str]:
    """Tokens a second of reading what is kept of logits, of encoding, decoding and looking up."""
    lines = ["| form | read of logits | encode | decode | look up and decode, shuffled |",
             "|---|---|---|---|---|"]  # fmt: skip
    count = sum(sample.num_scored for sample, _ in teacher)
    for number, form in enumerate(
        (
            {"type": "top_k", "k": 32, "temperatures": [1.0]},
            {"type": "top_k", "k": 128, "temperatures": [1.0]},
            {"type": "samples", "num_draws": 50, "temperature": 1.0},
            {"type": "hidden", "precision": "int8"},
        )
    ):
        told = StoreHeader(form=form, vocabulary_size=len(teacher[0][1].head.weight),
                           sequence_length=LENGTH).make_form()  # fmt: skip
        told = told.with_head(teacher[0][1].head)
        marks = [time.perf_counter()]
        signals = [told.read_teacher(t, generator_of(0, s.key)) for s, t in teacher]
        marks.append(time.perf_counter())
        ranks = Ranks.learn(
            [told.ids_of(each) for each in signals[:8]], len(teacher[0][1].head.weight)
        )
        _ = ranks.of_ids, ranks.ids
        marks[-1] = marks[-1], time.perf_counter()
        coded = [told.encode(each, ranks) for each in signals]
        marks.append(time.perf_counter())
        for (sample, _), each in zip(teacher, coded, strict=True):
            told.decode(memoryview(each), sample.num_scored, ranks)
        marks.append(time.perf_counter())
        spans = [marks[1][0] - marks[0], marks[2] - marks[1][1], marks[3] - marks[2]]
        path = next(p for p in sorted(folder.glob("1.0-*")) if recorded(p, form))
        store, keys = Store.open(path), [sample.key for sample, _ in teacher]
        random.Random(number).shuffle(keys)
        began = time.perf_counter()
        for key in keys:
            store.read(key)
        spans.append(time.perf_counter() - began)
        shown = " | ".join(f"{count / span:,.0f}" for span in spans)
        lines.append(f"| {form['type']} {list(form.values())[1]} | {shown} |")
    return lines


def recorded(path: Path, form: dict) -> bool:
    """Whether a store holds this form."""
    return dict(Store.open(path).header.form) == form


def access(path: Path, folder: Path) -> list[str]:
    """One record at random: out of the mapped file, and by row groups of a few sizes."""
    store = Store.open(path)
    keys = list(store.keys())
    random.Random(0).shuffle(keys)
    table = pyarrow.parquet.read_table(path / "shard-00000" / "data.parquet")
    lines = ["| one record at random | ms, without decoding |", "|---|---|"]
    shard = store._shards[0]
    began = time.perf_counter()
    for place in np.random.default_rng(0).permutation(len(keys)):
        shard.read(int(place), LENGTH)
    lines.append(
        f"| mapped file and index | {1e3 * (time.perf_counter() - began) / len(keys):.3f} |"
    )
    for rows in (1, 8, 64):
        pyarrow.parquet.write_table(
            table, folder / "groups.parquet", row_group_size=rows, compression="NONE",
            use_dictionary=False, write_page_checksum=True,
        )  # fmt: skip
        file = pyarrow.parquet.ParquetFile(
            folder / "groups.parquet", memory_map=True, page_checksum_verification=True
        )
        began = time.perf_counter()
        for row in np.random.default_rng(0).permutation(table.num_rows):
            file.read_row_group(row // rows, columns=["record"])["record"][row % rows].as_buffer()
        each = 1e3 * (time.perf_counter() - began) / table.num_rows
        lines.append(f"| row groups of {rows} | {each:.3f} |")
    return lines


def table_of(rows: list[dict]) -> list[str]:
    """A table of what was measured."""
    lines = ["| form | bytes/token | loss bias, nats | dz | dh | dW |", "|---|---|---|---|---|---|"]
    return lines + [
        f"| {r['name']} | {r['bytes']:,.1f} | {r['bias']:+.4f} | {r['dz']:.4f} | {r['dh']:.4f} "
        f"| {r['dw']:.4f} |"
        for r in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--drop", type=int, nargs="+", default=[20])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = load_model(ModelSource(chosen.teacher), device=device, dtype=torch.float32)
    origin = Origin(model, load_tokenizer(chosen.teacher), device)
    shorter = depth(origin, drop=tuple(chosen.drop)).model
    samples = windows(chosen.teacher, chosen.tokens)
    states, teacher_rate = read_all(model, samples)
    student, _ = read_all(shorter, samples)
    teacher = list(zip(samples, states, strict=True))
    lines = ["# What a store keeps", ""]
    results: dict[float, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for temperature in chosen.temperatures:
            print(f"temperature {temperature}", flush=True)
            kept = all_kept(teacher, temperature, folder)
            results[temperature], distance = scores(kept, teacher, student, temperature)
            count = sum(sample.num_scored for sample in samples)
            lines += [f"## Temperature {temperature:g}", "",
                      f"{count:,} tokens, student at forward KL {distance:.3f} nats "
                      f"(the teacher without layers {chosen.drop}).", "",
                      *table_of(results[temperature]), ""]  # fmt: skip
        lines += ["## DistillKit's codec by itself", "",
                  "Mean error of its fitted log-probabilities on random logits, nats.", "",
                  "| setting | as published | normalised basis |", "|---|---|---|"]  # fmt: skip
        for codec in PUBLISHED:
            errors = [round_trip_error(each, 49152) for each in (codec, replace_all(codec))]
            lines.append(f"| {codec.name} | {errors[0]:.4f} | {errors[1]:.4f} |")
        lines += [
            "",
            "## Rates, tokens a second, one thread",
            "",
            f"Teacher's backbone: {teacher_rate:,.0f}. Reading logits includes its head.",
            "",
        ]
        lines += [*rates(teacher, folder), "", *access(folder / "1.0-1", folder), ""]
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / "store.md").write_text("\n".join(lines), encoding="utf-8")
    draw(results, chosen.results / "store.svg")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
