"""Memory and rates while a text is tokenised and read: the shipped corpus, repeated with numbers.

    PYTHONPATH=src:. python benchmarks/data_scale.py --work DIR [--millions 10 100] [--processes 1]

The tokenizer is byte-level BPE with 8,192 tokens, trained on the corpus. Memory is what belongs to
the process alone (RssAnon), and what its tokenising processes have of their own; pages of mapped
files, which the system takes back, are not in it. Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import multiprocessing
import resource
import threading
import time
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from limbeck.config import DataConfig
from limbeck.data import TextData, corpus_path, load_data, workers
from limbeck.data.order import one_order

LENGTH = 1024
ROWS = 8
"""Of a batch."""


class Memory:
    """The largest private memory of this process while the context lasts, in MiB."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Private memory of this process and its children, in MiB."""
    total = field("/proc/self/status", "RssAnon")
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, StopIteration):  # it has just ended
            total += field(f"/proc/{child.pid}/smaps_rollup", "Private_Dirty")
    return total // 1024


def field(path: str, name: str) -> int:
    """A number of a file in /proc, in KiB."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def corpus() -> list[str]:
    """Texts of the shipped corpus."""
    with gzip.open(corpus_path("train"), "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def write_text(path: Path, texts: list[str], characters: int) -> None:
    """Documents of about so many characters in all, no two of them alike."""
    written = 0
    with path.open("w") as file:
        while written < characters:
            for text in texts:
                body = json.dumps({"text": f"{written}. {text}"})
                file.write(f"{body}\n")
                written += len(body)
                if written >= characters:
                    break


def read_all(data: TextData) -> int:
    """Read every row once, in the order of a run; the tokens read."""
    places = one_order(0, data.num_rows).rows(0, data.num_rows)
    return sum(
        int(data.batch(places[at : at + ROWS]).scored.sum()) for at in range(0, data.num_rows, ROWS)
    )


def measure(folder: Path, text: Path, tokenizer: Path, processes: int) -> None:
    """Print a row of the table."""
    workers.MOST_PROCESSES = processes
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token="</s>")
    config = DataConfig(type="text", path=str(text), sequence_length=LENGTH)
    start, start_cpu = time.perf_counter(), time.process_time()
    with Memory() as preparing:
        data = load_data(config, loaded, cache=folder / "cache", max_positions=None)
    prepared, own_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    others = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = time.perf_counter()
    with Memory() as reading:
        num_read = read_all(data)
    took = time.perf_counter() - start
    print(
        f"| {len(data.tokens) / 1e6:.1f} M | {data.num_documents:,} | "
        f"{len(data.tokens) / prepared:,.0f} | {own_cpu:.1f} + {others:.1f} | "
        f"{preparing.peak - preparing.before} | "
        f"{num_read / took:,.0f} | {reading.peak - preparing.before} |",
        flush=True,
    )


def main() -> None:
    """Write a text of each size, prepare it, read it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--millions", type=float, nargs="+", default=[10.0, 100.0])
    parser.add_argument("--processes", type=int, default=workers.MOST_PROCESSES, help="at most")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts, tokenizer = corpus(), ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, 8192, special_tokens=["</s>"])
    tokenizer.save(str(arguments.work / "tokenizer.json"))
    each = sum(map(len, texts)) / sum(len(tokenizer.encode(text).ids) for text in texts)
    titles = ("tokens", "documents", "prepared, tokens/s", "CPU s: here + others", "MiB more")
    print("| " + " | ".join((*titles, "read, tokens/s", "MiB more")) + " |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for millions in arguments.millions:
        path = arguments.work / f"{millions:g}.jsonl"
        write_text(path, texts, int(millions * 1e6 * each))
        process = multiprocessing.get_context("spawn").Process(
            target=measure,
            args=(arguments.work, path, arguments.work / "tokenizer.json", arguments.processes),
        )
        process.start()
        process.join()
        assert process.exitcode == 0
        path.unlink()


if __name__ == "__main__":
    main()
