"""What a student wrote at the start of a run, beside what it wrote at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.models import PreTrainedTokenizerBase
from limbeck.report.run_files import lines
from limbeck.tokenizers import load_tokenizer

SHOWN = 3
"""Pairs of texts."""
STEPS = 64
"""First and last steps that are read."""
LONGEST = 600
"""Characters of a text."""

SavedRollout = Mapping[str, Any]


@dataclass(frozen=True)
class RolloutText:
    """A text, and the step that wrote it."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class BeforeAfter:
    """A text of the first steps and one of the last.

    Attributes:
        is_same: Whether both continue the same prompt.
    """

    before: RolloutText
    after: RolloutText
    is_same: bool


def before_after(directory: Path) -> list[BeforeAfter]:
    """Texts of a run's first and last steps, of the same prompts where some came back.

    Empty without rollouts, or without a student whose tokenizer reads them.
    """
    files = sorted((directory / "rollouts").glob("step-*.jsonl"), key=step_of)
    student = directory / "student"
    if len(files) < 2 or not student.is_dir():
        return []
    half = len(files) // 2
    first = list(rollouts(files[: min(STEPS, half)]))
    last = list(rollouts(reversed(files[max(half, len(files) - STEPS) :])))
    tokenizer = load_tokenizer(str(student))
    earliest, latest = by_prompt(reversed(first)), by_prompt(reversed(last))
    again = [(earliest[prompt], latest[prompt]) for prompt in earliest if prompt in latest]
    again.sort(key=lambda pair: pair[0][0])
    pairs = again or list(zip(first, last, strict=False))
    return [
        BeforeAfter(rollout_text(tokenizer, *early), rollout_text(tokenizer, *late), bool(again))
        for early, late in pairs[:SHOWN]
    ]


def by_prompt(
    found: Iterable[tuple[int, SavedRollout]],
) -> dict[tuple[int, ...], tuple[int, SavedRollout]]:
    """The last rollout of each prompt."""
    return {tuple(rollout["prompt_ids"]): (step, rollout) for step, rollout in found}


def step_of(path: Path) -> int:
    """The number in `step-N.jsonl`."""
    return int(path.stem.removeprefix("step-"))


def rollouts(files: Iterable[Path]) -> Iterator[tuple[int, SavedRollout]]:
    """Rollouts with their steps."""
    for path in files:
        for each in lines(path):
            yield step_of(path), each


def rollout_text(
    tokenizer: PreTrainedTokenizerBase, step: int, rollout: SavedRollout
) -> RolloutText:
    """A rollout as text; of a long prompt the end, of a long text the beginning."""
    prompt = str(tokenizer.decode(rollout["prompt_ids"], skip_special_tokens=True))
    text = str(tokenizer.decode(rollout["token_ids"], skip_special_tokens=True))
    return RolloutText(step, prompt[-LONGEST:], text[:LONGEST])
