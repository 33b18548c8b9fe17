"""A tiny teacher on disk, tiny texts, and a recipe that puts them together in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import limbeck
from tests.models.tiny import tiny_config
from tests.tokenizers.small import small

WORDS = [
    "a",
    "still",
    "boils",
    "the",
    "wash",
    "and",
    "catches",
    "what",
    "rises",
    "spirit",
    "large",
    "thing",
    "fits",
    "small",
    "one",
    "there",
    "were",
    "student",
    "teacher",
    "knows",
    "more",
    "than",
    "it",
    "says",
    "vapour",
    "copper",
    "neck",
    "worm",
    "cold",
    "water",
    "drop",
    "by",
    "drop",
]


PARALLEL: dict[str, str] = {}
"""What `parallel` is in every recipe; tests of the accelerator's code put something in."""


def write_model(
    folder: Path, *, rows: int, layers: int = 4, seed: int = 0, like: Any = None
) -> Path:
    """A random Llama with the small tokenizer; `like` gives the weights of the real tokens."""
    tokenizer = small()
    torch.manual_seed(seed)
    config = tiny_config("llama", layers, vocabulary=rows, tie_word_embeddings=False)
    config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    if like is not None:
        mine, real = model.state_dict(), len(tokenizer)
        for name, value in like.state_dict().items():
            if mine[name].shape == value.shape:
                mine[name].copy_(value)
            else:
                mine[name][:real].copy_(value[:real])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(path: Path, documents: int, seed: int) -> Path:
    """Documents of words in random order."""
    dice = random.Random(seed)
    rows = [
        {"text": " ".join(dice.choices(WORDS, k=dice.randrange(12, 60)))} for _ in range(documents)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe over the teacher and the texts of a folder; makes both where they are missing."""
    teacher = folder / "teacher"
    if not teacher.exists():
        write_model(teacher, rows=len(small()))
        write_texts(folder / "train.jsonl", 40, seed=1)
        write_texts(folder / "held.jsonl", 12, seed=2)
    recipe: dict[str, Any] = {
        "teacher": {"type": "online", "path": str(teacher)},
        "student": {"type": "depth", "layers": [0, 3]},
        "data": {"type": "text", "path": str(folder / "train.jsonl"), "sequence_length": 32},
        "objective": {"alpha": 0.9, "temperature": 2.0},
        "optim": {"learning_rate": 0.003, "steps": 6, "tokens_per_step": 128, "warmup_steps": 1},
        "evaluate": {
            "data": str(folder / "held.jsonl"),
            "every": 3,
            "continuations": 1,
            "allow_worse_teacher": True,
        },
        "memory": {"micro_batch": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "output": str(folder / "run"),
        "device": "cpu",
        "parallel": {**PARALLEL},
    }
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The step records of a run directory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "step"]


def run(path, *overrides, **options):
    """Train a recipe; its results."""
    with limbeck.assemble(limbeck.load(path, overrides)) as whole:
        return whole.train(**options)
