"""A student with a tokenizer of its own learns from SmolLM2-135M-Instruct, by several objectives.

    python studies/cross_tokenizer.py --output runs/cross_tokenizer

The student is a cut of the teacher with a byte-level BPE made on the training text; a new token's
embedding is the mean of those of its pieces. Every trial sees the same rows in the same order. The
table compares bits per byte on held-out text, paired by document with cross-entropy alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trials import compared, optimizer, recipe, span, trained

from limbeck.data import corpus_path
from limbeck.evaluate.scores import Scores
from limbeck.experiment.score_files import read_scores
from limbeck.models import cache_folder, embedded_teacher
from limbeck.tokenizers import TokenBytes, load_tokenizer

END = "<|endoftext|>"
REMOVALS = Path(__file__).parents[1] / "docs" / "smollm2-135m-removals.json"
"""Layers of the teacher in the order in which each costs least; see docs/students.md."""

TRIALS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"alpha": 0.0},
    "root_kl_0.3": {"alpha": 0.3},
    "root_kl_0.5": {"alpha": 0.5},
    "root_kl_0.9": {"alpha": 0.9},
    "alm_0.5": {"alpha": 0.0, "extra": [{"type": "alm", "weight": 0.5}]},
    "alm_0.5_root_kl_0.5": {"alpha": 0.5, "extra": [{"type": "alm", "weight": 0.5}]},
}


def texts(name: str) -> list[str]:
    """The documents of a part of the corpus that ships with limbeck."""
    with gzip.open(corpus_path(name), "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def byte_bpe(corpus: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def kept_layers(num_layers: int, keep: int) -> list[int]:
    """The layers of a cut: by the measured order for a teacher of 30 layers, else spread evenly."""
    removed = [step["layer"] for step in json.loads(REMOVALS.read_text())["removals"]]
    if len(removed) >= num_layers - keep and max(removed) < num_layers == 30:
        return sorted(set(range(num_layers)) - set(removed[: num_layers - keep]))
    return [round(i * (num_layers - 1) / max(keep - 1, 1)) for i in range(keep)]


def new_embeddings(
    old: torch.Tensor, teacher: TokenBytes, student: TokenBytes, end: int
) -> torch.Tensor:
    """For each student token the mean of the teacher's embeddings of its pieces."""
    single = {raw: i for i, raw in enumerate(teacher.bytes_of) if raw and len(raw) == 1}
    rows = []
    for token, raw in enumerate(student.bytes_of):
        ids = [single[bytes([b])] for b in raw or b"" if bytes([b]) in single]
        decoded = (raw or b"").decode(errors="ignore")
        (spans,) = teacher.spans([decoded])
        if raw is not None and decoded.encode() == raw and not isinstance(spans, str):
            ids = spans.ids
        if token == end and teacher.end is not None:
            ids = [teacher.end]
        rows.append(old[ids].mean(0) if ids else old.mean(0))
    return torch.stack(rows)


def write_student(teacher: Path, folder: Path, size: int, keep: int) -> None:
    """A cut of the teacher with a tokenizer and embeddings of its own."""
    tokenizer = byte_bpe(texts("train"), size)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = kept_layers(model.config.num_hidden_layers, keep)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = keep
    model.config.layer_types = None
    sides = TokenBytes(load_tokenizer(str(teacher)), "teacher"), TokenBytes(tokenizer, "student")
    end = int(tokenizer.eos_token_id)
    rows = new_embeddings(model.get_input_embeddings().weight.detach(), *sides, end)
    head_rows = new_embeddings(model.get_output_embeddings().weight.detach(), *sides, end)
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
        model.get_output_embeddings().weight.copy_(head_rows)  # the same matrix where it is tied
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, end, end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def scores_of(
    trial: str, seed: int, options: argparse.Namespace, teacher: Path, student: Path
) -> Scores:
    """Test scores of a trial, which is trained unless it is done."""
    tree = recipe(
        teacher, options.output / f"{trial}-{seed}", options.length, options.held_out_tokens
    )
    tokens = options.length * options.rows
    tree["teacher"] = {
        "type": "cross_tokenizer",
        "teacher": tree["teacher"],
        "unaligned": "skip",
    }
    tree["data"]["max_documents"] = options.documents
    tree |= {
        "student": {"type": "pretrained", "path": str(student)},
        "objective": TRIALS[trial],
        "optim": optimizer(options.steps, tokens, options.learning_rate),
        "seed": seed,
        "device": options.device,
    }
    scores = read_scores(trained(tree) / "scores.json").test
    assert scores is not None, "the recipe names held-out text"
    return scores


def rows_of(scores: dict[str, list[Scores]]) -> list[dict[str, Any]]:
    """Bits per byte of each trial, and its difference from cross-entropy, with intervals."""

    def figure(name: str, metric: str) -> dict[str, Any]:
        own, base = (
            [(each.metrics[metric], math.log(2) * each.bytes) for each in scores[which]]
            for which in (name, "cross_entropy")
        )
        return compared(own, base)

    return [
        {
            "trial": name,
            "bits_per_byte": figure(name, "cross_entropy"),
            "root_kl_bits_per_byte": figure(name, "forward_kl"),
        }
        for name in scores
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| trial | bits per byte | less cross-entropy's (95 %) | root KL, bits per byte |",
        "|---|---|---|---|",
    ]
    for row in rows:
        bits, kl = row["bits_per_byte"], row["root_kl_bits_per_byte"]["value"]
        gap = span(bits["difference"], 4)
        lines.append(f"| {row['trial']} | {bits['value']:.4f} | {gap} | {kl:.4f} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trials", nargs="+", choices=list(TRIALS), default=["root_kl_0.5"])
    parser.add_argument("--teacher", type=Path, help="a folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--held-out-tokens", type=int, default=8_192)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--documents", type=int, help="use only the first documents of the text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    """Train the trials that are missing, and write results.json and results.md."""
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or embedded_teacher(cache_folder(), print)
    student = options.output / "student"
    if not (student / "tokenizer.json").exists():
        write_student(teacher, student, options.vocabulary, options.layers)
    trials = list(dict.fromkeys(["cross_entropy", *options.trials]))
    scores: dict[str, list[Scores]] = {name: [] for name in trials}
    for seed in options.seeds:
        for name in trials:
            scores[name].append(scores_of(name, seed, options, teacher, student))
        rows = rows_of(scores)
        (options.output / "results.json").write_text(json.dumps(rows, indent=1))
        (options.output / "results.md").write_text(table(rows) + "\n")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
