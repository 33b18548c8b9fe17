"""The store: bytes a token against fidelity, and rates beside the teacher's.

    python benchmarks/store.py TEACHER [--tokens 20480] [--drop 20] [--temperatures 1 2]
    python benchmarks/store.py TEACHER --families "probable enough with tail"   # these alone
    python benchmarks/store.py TEACHER --rates                       # rates and access only

TEACHER is a folder or name of a model, such as what `limbeck.models.embedded_teacher` makes.
Real text (the embedded corpus' held-out part) is read by the teacher and by a student at a fixed
distance: the teacher without some of its layers. Each form is written to a real store and read
back; DistillKit's codec is written anew from its public description (`kept/distillkit.py`).

Of each: the bytes of its records; the loss' bias, in nats; and the error of the gradient of forward
KL relative to the exact gradient, at the logits (dz) and the hidden states (dh), over all tokens
together (root of summed squares), and of the head's gradient summed over all tokens (dW: a bias
stays, noise averages out).

Rates are of one process, one thread; only ratios to the teacher's mean something.

What was measured is kept in RESULTS/store.json; a temperature, a family of it, or the rates,
measured anew takes the place of what is there, and the page and the plot are made of all.
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
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from kept.cases import Kept, Sampled, all_kept, gradient_of, our_forms, stored
from kept.distillkit import PUBLISHED, replace_all, round_trip_error
from kept.plot import draw

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.losses.distributions import LazyLogits, TeacherDistribution
from limbeck.models import CausalLM, ModelSource, load_model
from limbeck.store import Sample, Store, StoreHeader, generator_of
from limbeck.store.token_ranks import TokenRanks
from limbeck.students import Origin
from limbeck.students.depth import depth
from limbeck.tokenizers import load_tokenizer

LENGTH, ROWS, BLOCK = 512, 256, 64
"""Positions of a window, of a matrix product, and of what is computed between two."""


RATED: tuple[dict[str, Any], ...] = (
    {"type": "top_k", "k": 32, "temperatures": [1.0]},
    {"type": "top_k", "k": 128, "temperatures": [1.0]},
    {"type": "samples", "num_draws": 50, "temperature": 1.0},
    {"type": "hidden", "precision": "int8"},
)
"""Forms whose speed is measured."""


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


def scores(
    kept: list[Kept], teacher: Sampled, student: list[LazyLogits], temperature: float
) -> tuple[list[dict[str, Any]], float]:
    """The loss and gradients of each form, beside the exact ones."""
    head = student[0].head.weight
    sums = {each.name: Sums(head) for each in kept}
    exact = Sums(head)
    for index, (sample, right) in enumerate(teacher):
        print(f"  scoring sample {index + 1} of {len(teacher)}", flush=True)
        signals = {each.name: each.signals(index) for each in kept}
        for start in range(0, sample.num_scored, ROWS):
            rows = slice(start, min(start + ROWS, sample.num_scored))
            hidden = student[index].hidden[rows]
            logits = student[index].head(hidden)
            loss, wanted = gradients(right, logits, rows, temperature)
            exact.add(loss, wanted, hidden)
            for name, signal in signals.items():
                loss, found = gradients(signal, logits, rows, temperature)
                sums[name].add(loss, found.sub_(wanted), hidden)
    return [
        {
            "family": each.family,
            "name": each.name,
            "bytes": each.bytes_per_token,
            "bias": (sums[each.name].loss - exact.loss) / exact.count,
            "dz": (sums[each.name].logits / exact.logits) ** 0.5,
            "dh": (sums[each.name].hidden / exact.hidden) ** 0.5,
            "dw": float(sums[each.name].head.norm() / exact.head.norm()),
        }
        for each in kept
    ], exact.loss / exact.count


def gradients(
    distribution: TeacherDistribution, logits: torch.Tensor, rows: slice, temperature: float
) -> tuple[float, torch.Tensor]:
    """Forward KL summed over rows, and its gradient at the student's logits."""
    loss, gradient = 0.0, torch.empty_like(logits)
    for start in range(0, len(logits), BLOCK):
        few = slice(start, min(start + BLOCK, len(logits)))
        taken = distribution.rows(slice(rows.start + few.start, rows.start + few.stop))
        each, gradient[few] = gradient_of(taken, logits[few], temperature)
        loss += float(each.double().sum())
    return loss, gradient


class Sums:
    """Losses and squares of gradients, added up over tokens; and the head's gradient itself."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.head = torch.zeros_like(weight)
        self.loss = self.logits = self.hidden = 0.0
        self.count = 0

    def add(self, loss: float, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Take more tokens in."""
        self.loss += loss
        self.count += len(hidden)
        self.logits += sum(float(row.norm()) ** 2 for row in gradient)
        self.hidden += float((gradient @ self.weight).double().square().sum())
        self.head.addmm_(gradient.T, hidden)


def rates(teacher: Sampled, folder: Path) -> list[str]:
    """Tokens a second of reading what is kept of logits, of encoding, decoding and looking up."""
    lines = ["| form | read of logits | encode | decode | look up and decode, shuffled |",
             "|---|---|---|---|---|"]  # fmt: skip
    count = sum(sample.num_scored for sample, _ in teacher)
    for number, form in enumerate(RATED):
        told = StoreHeader(form=form, vocabulary_size=len(teacher[0][1].head.weight),
                           sequence_length=LENGTH).make_form()  # fmt: skip
        told = told.with_head(teacher[0][1].head)
        began = time.perf_counter()
        signals = [told.read_teacher(t, generator_of(0, s.key)) for s, t in teacher]
        spans = [time.perf_counter() - began]
        ranks = TokenRanks.from_ids(
            [told.ids_of(each) for each in signals[:8]], len(teacher[0][1].head.weight)
        )
        _ = ranks.of_ids, ranks.ids
        began = time.perf_counter()
        coded = [told.encode(each, ranks) for each in signals]
        spans.append(time.perf_counter() - began)
        began = time.perf_counter()
        for (sample, _), each in zip(teacher, coded, strict=True):
            told.decode(memoryview(each), sample.num_scored, ranks)
        spans.append(time.perf_counter() - began)
        store, keys = Store.open(folder / str(number)), [sample.key for sample, _ in teacher]
        random.Random(number).shuffle(keys)
        began = time.perf_counter()
        for key in keys:
            store.read(key)
        spans.append(time.perf_counter() - began)
        shown = " | ".join(f"{count / span:,.0f}" for span in spans)
        lines.append(f"| {form['type']} {list(form.values())[1]} | {shown} |")
    return lines


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


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """A table of what was measured."""
    lines = ["| form | bytes/token | loss bias, nats | dz | dh | dW |", "|---|---|---|---|---|---|"]
    return lines + [
        f"| {r['name']} | {r['bytes']:,.1f} | {r['bias']:+.4f} | {r['dz']:.4f} | {r['dh']:.4f} "
        f"| {r['dw']:.4f} |"
        for r in rows
    ]


def page(found: dict[str, Any]) -> list[str]:
    """What was measured, as Markdown."""
    lines = ["# What a store keeps", ""]
    for temperature, told in sorted(found["fidelity"].items()):
        lines += [
            f"## Temperature {float(temperature):g}",
            "",
            f"{told['tokens']:,} tokens, student at forward KL {told['distance']:.3f} nats (the "
            f"teacher without layers {told['drop']}).",
            "",
            *table_of(told["rows"]),
            "",
        ]
    lines += ["## DistillKit's codec by itself", "",
              "Mean error of its fitted log-probabilities on random logits, nats.", "",
              "| setting | as published | normalised basis |", "|---|---|---|"]  # fmt: skip
    for codec in PUBLISHED:
        errors = [round_trip_error(each, 49152) for each in (codec, replace_all(codec))]
        lines.append(f"| {codec.name} | {errors[0]:.4f} | {errors[1]:.4f} |")
    return [*lines, "", *found.get("rates", [])]


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--drop", type=int, nargs="+", default=[20])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME",
                        choices=sorted({name for name, _ in our_forms(1.0)}))  # fmt: skip
    parser.add_argument("--rates", action="store_true", help="rates and access only")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    """Measure, keep it, write the page and the plot."""
    chosen = options()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = load_model(ModelSource(chosen.teacher), device=device, dtype=torch.float32)
    samples = windows(chosen.teacher, 2048 if chosen.rates else chosen.tokens)
    states, teacher_rate = read_all(model, samples)
    teacher = list(zip(samples, states, strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        if chosen.rates:
            lines = rates_and_access(teacher, teacher_rate, Path(temporary))
            keep(chosen.results, {"rates": lines})
            return
        origin = Origin(model, load_tokenizer(chosen.teacher), World(0, 1, device))
        student, _ = read_all(depth(origin, drop=tuple(chosen.drop)).model, samples)
        for temperature in chosen.temperatures:
            print(f"temperature {temperature}", flush=True)
            place = Path(temporary) / str(temperature)
            kept = all_kept(teacher, temperature, place, chosen.families)
            rows, distance = scores(kept, teacher, student, temperature)
            count = sum(sample.num_scored for sample in samples)
            told = {"tokens": count, "distance": distance, "drop": chosen.drop, "rows": rows}
            if chosen.families:
                told = beside(chosen.results, temperature, told)
            keep(chosen.results, {"fidelity": {str(temperature): told}})


def rates_and_access(teacher: Sampled, teacher_rate: float, folder: Path) -> list[str]:
    """The part of the page about speed."""
    stored([("", form) for form in RATED], teacher, folder)
    return [
        "## Rates, tokens a second, one thread",
        "",
        f"Teacher's backbone: {teacher_rate:,.0f}. Reading logits includes its head.",
        "",
        *rates(teacher, folder),
        "",
        *access(folder / "0", folder),
    ]


def beside(results: Path, temperature: float, told: dict[str, Any]) -> dict[str, Any]:
    """A few families measured anew, among the rows of the others at the same temperature."""
    path = results / "store.json"
    before = json.loads(path.read_text())["fidelity"][str(temperature)]
    for name in ("tokens", "drop"):
        assert before[name] == told[name], f"measured with {name} {before[name]}: measure all anew"
    anew = {row["family"] for row in told["rows"]}
    old = [row for row in before["rows"] if row["family"] not in anew]
    place = next(n for n, row in enumerate(before["rows"]) if row["family"] in anew)
    return told | {"rows": [*old[:place], *told["rows"], *old[place:]]}


def keep(results: Path, found: dict[str, Any]) -> None:
    """Add to what was measured, and write it all out."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / "store.json"
    whole = json.loads(path.read_text()) if path.exists() else {"fidelity": {}}
    whole["fidelity"] |= found.pop("fidelity", {})
    whole |= found
    path.write_text(json.dumps(whole, indent=1) + "\n")
    (results / "store.md").write_text("\n".join(page(whole)) + "\n", encoding="utf-8")
    if whole["fidelity"]:
        rows = {float(t): told["rows"] for t, told in sorted(whole["fidelity"].items())}
        draw(rows, results / "store.svg")


if __name__ == "__main__":
    main()
