"""A tiny teacher that writes lower-case letters, and recipes in which it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from limbeck.experiment import load
from limbeck.writing import Summary, Writing
from tests.experiment.tiny_run import write_model, write_recipe, write_texts
from tests.tokenizers.small import CHATML, small

ASKED = ["What rises?", "Which still boils, and what does it catch?", "Is it?", "One drop of water"]


def write_speaker(folder: Path) -> Path:
    """A random Llama whose head prefers letters, and now and then the end token.

    The first channel of every token's embedding is large, so that the head's weights on it are
    biases.
    """
    tokenizer = small(template=CHATML)
    write_model(folder, rows=len(tokenizer))
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    speakable = [w.isascii() and w.replace(" ", "").isalpha() for w in words]
    bias = torch.where(torch.tensor(speakable), 0.0, -5.0)
    bias[tokenizer.eos_token_id] = 0.55
    weights["model.embed_tokens.weight"][:, 0] = 30.0
    weights["lm_head.weight"][:, 0] = bias
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def writing_recipe(folder: Path, rows: list[dict[str, Any]] | None = None, **write: Any) -> Path:
    """The tiny run's recipe with a write section; `rows` are its data, chats by default."""
    if not (folder / "teacher").exists():
        write_speaker(folder / "teacher")
        write_texts(folder / "held.jsonl", 12, seed=2)
    if rows is None:
        rows = [
            {"messages": [{"role": "user", "content": f"{text} {number}"}]}
            for number in range(2)
            for text in ASKED
        ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines)
    settings = {"output": str(folder / "written.jsonl"), "tokens": 12, "batch": 4, **write}
    data = {"type": "auto", "path": str(folder / "prompts.jsonl"), "sequence_length": 64}
    path = write_recipe(folder, data=data)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"write": settings}))
    return path


def written(path: Path, *overrides: str) -> Summary:
    """Write everything that is missing."""
    with Writing(load(path, list(overrides))) as writing:
        return writing.write(lambda: None)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
