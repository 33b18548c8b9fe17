"""What the processes of the plain loop and of TRL share; nothing of limbeck is imported."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from job_table.events import Events

TOKENS = "tokens.sha256"


@dataclass(frozen=True)
class PeerPlan:
    """A peer's job, which its process reads from a file.

    Attributes:
        teacher: A folder.
        text: JSON Lines with a column `text`, packed with gzip.
        starts: Of every row its first token among those of the whole text, in training order.
        layers: Layers of the teacher that the student keeps.
        row: Positions of a row.
        rows: Rows of a step.
        steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up; a cosine follows.
        learning_rate: At its peak.
        dtype: What it computes in, and the teacher's format.
        save_at: Steps after which the student is saved in between.
        folder: Where events and students go.
    """

    teacher: str
    text: str
    starts: list[int]
    layers: list[int]
    row: int
    rows: int
    steps: int
    warmup_steps: int
    learning_rate: float
    dtype: str
    save_at: list[int]
    folder: str


class Peer:
    """A peer's models and rows, and the record of its job.

    Attributes:
        student: With the kept layers, in float32.
        teacher: Frozen, in the plan's format.
        windows: Token ids of shape (steps * rows, T + 1).
    """

    def __init__(self, plan: PeerPlan) -> None:
        self.plan = plan
        self.tokenizer: Any = AutoTokenizer.from_pretrained(plan.teacher)
        self.windows = read_windows(plan, self.tokenizer)
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.teacher: Any = opened(plan.teacher, self.dtype).eval().requires_grad_(False)
        self.student: Any = with_layers(opened(plan.teacher, torch.float32), plan.layers).train()
        self._folder = Path(plan.folder)
        self._events = Events(self._folder / "events.jsonl")

    def begin(self) -> None:
        """The first step begins."""
        self._events.add("begin")

    def finish_step(self, step: int) -> None:
        """A step has ended, counted from 1; save its student if it is to be measured."""
        self._events.add("step", step)
        if step in self.plan.save_at:
            started = time.perf_counter()
            self.student.save_pretrained(self._folder / f"student-{step}")
            self._events.add("saved", step, time.perf_counter() - started)

    def finish(self) -> None:
        """Save the final student."""
        self.student.save_pretrained(self._folder / "student")
        self.tokenizer.save_pretrained(self._folder / "student")
        self._events.add("student")


def peer_of_command_line() -> Peer:
    """The peer whose plan is named on the command line."""
    return Peer(PeerPlan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


def opened(folder: str, dtype: torch.dtype) -> Any:
    """A model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def with_layers(model: Any, layers: list[int]) -> Any:
    """A model that keeps some of its layers."""
    kept = [model.model.layers[layer] for layer in layers]
    for index, block in enumerate(kept):
        block.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def read_windows(plan: PeerPlan, tokenizer: Any) -> Tensor:
    """The rows of a plan, cut from the text's documents end to end, each with an end token.

    A hash of all tokens is written, so that the parent can tell whether they are limbeck's.
    """
    with gzip.open(plan.text, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    documents = ([*document, tokenizer.eos_token_id] for document in ids)
    tokens = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    (Path(plan.folder) / TOKENS).write_text(digest, encoding="utf-8")
    places = np.array(plan.starts)[:, None] + np.arange(plan.row + 1)
    return torch.from_numpy(tokens[places].astype(np.int64))
