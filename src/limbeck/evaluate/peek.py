"""The teacher's probabilities for the next token, position by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.evaluate.text import Tokenizer, token_text
from limbeck.losses.distributions import log_softmax
from limbeck.losses.divergences import expectation
from limbeck.losses.divergences.kl import forward_kl
from limbeck.models import CausalLM, evaluating


@dataclass(frozen=True)
class Candidate:
    """One candidate for the next token.

    Attributes:
        teacher: Its probability under the teacher, at each temperature.
        student: Under the student, at each temperature; empty without a student.
        rank: Its rank by the teacher's probability, from 1.
    """

    text: str
    id: int
    logit: float
    teacher: tuple[float, ...]
    student: tuple[float, ...]
    followed: bool
    rank: int


@dataclass(frozen=True)
class Position:
    """The candidates after one token of the text.

    Attributes:
        entropy: The teacher's entropy at each temperature, nats.
        student_first: The student's most probable token; None without a student.
        forward_kl: KL(teacher || student) at each temperature, nats; empty without a student.
        longest: The largest probability of a candidate at each temperature, either model's.
        rest_teacher: Probability of all tokens that are no candidates, at each temperature.
        rest_student: The same under the student; empty without one.
    """

    text: str
    candidates: tuple[Candidate, ...]
    entropy: tuple[float, ...]
    student_first: str | None
    student_probability: float | None
    forward_kl: tuple[float, ...]
    longest: tuple[float, ...]
    rest_teacher: tuple[float, ...]
    rest_student: tuple[float, ...]


@dataclass(frozen=True)
class Peek:
    """A text and the candidates after each of its tokens.

    Attributes:
        temperatures: Temperatures of the probabilities; the first is always 1.
    """

    text: str
    temperatures: tuple[float, ...]
    positions: tuple[Position, ...]

    def to_plain(self) -> dict[str, Any]:
        """The same as JSON."""
        return dataclasses.asdict(self)


def peek(
    tokenizer: Tokenizer,
    teacher: CausalLM,
    student: CausalLM | None,
    text: str,
    temperatures: Sequence[float],
    *,
    top: int = 5,
) -> Peek:
    """The teacher's and the student's probabilities for the next token, along a text.

    Args:
        tokenizer: Of both models; their vocabularies must be cut to the same size.
        temperatures: Further temperatures; 1 is always the first.

    Raises:
        ConfigError: The text is empty or too long, or a temperature is not positive.
    """
    warm = tuple(dict.fromkeys([1.0, *map(float, temperatures)]))
    if min(warm) <= 0:
        raise ConfigError(f"A temperature must be above 0, got {min(warm)}. Try 1, 2 and 4.")
    ids = tokenizer.encode(text)
    models = [teacher] if student is None else [teacher, student]
    longest = min((m.max_positions for m in models if m.max_positions), default=len(ids))
    if not 0 < len(ids) <= longest:
        raise ConfigError(
            f"A text must have from 1 to {longest:,} tokens to be peeked at, got {len(ids):,}. "
            "Give a sentence or two."
        )
    tokens = torch.tensor([ids], device=next(teacher.parameters()).device)
    logits = [read(model, tokens) for model in models]
    positions = [
        look(tokenizer, [row[t] for row in logits], ids, t, warm, top) for t in range(len(ids))
    ]
    return Peek(text, warm, tuple(positions))


def read(model: CausalLM, tokens: Int[Tensor, "1 T"]) -> Float[Tensor, "T V"]:
    """Logits of the one row, on the CPU."""
    with torch.no_grad(), evaluating(model):
        return model.logits(tokens)[0].float().cpu()


def look(
    tokenizer: Tokenizer,
    logits: list[Float[Tensor, " V"]],
    ids: list[int],
    at: int,
    temperatures: tuple[float, ...],
    top: int,
) -> Position:
    """One position: the teacher's most probable tokens, and the student's probabilities."""
    before, followed = ids[: at + 1], ids[at + 1] if at + 1 < len(ids) else None
    tables = [torch.stack([log_softmax(row[None], t)[0] for t in temperatures]) for row in logits]
    teacher, student = tables[0], tables[1] if len(tables) > 1 else None
    shown = logits[0].topk(min(top, len(logits[0]))).indices.tolist()
    if followed is not None and followed not in shown:
        shown.append(followed)
    # One row for each model and temperature: probabilities of the candidates.
    probs = [table[:, shown].exp() for table in tables]
    candidates = [
        Candidate(
            text=token_text(tokenizer, before, i),
            id=i,
            logit=float(logits[0][i]),
            teacher=tuple(probs[0][:, column].tolist()),
            student=() if student is None else tuple(probs[1][:, column].tolist()),
            followed=i == followed,
            rank=1 + int((logits[0] > logits[0][i]).sum()),
        )
        for column, i in enumerate(shown)
    ]
    rests = [tuple((1 - each.double().sum(-1)).clamp_min(0).tolist()) for each in probs]
    first = None if student is None else int(student[0].argmax())
    return Position(
        text=token_text(tokenizer, ids[:at], ids[at]),
        candidates=tuple(candidates),
        entropy=tuple((-expectation(teacher, teacher)).tolist()),
        student_first=None if first is None else token_text(tokenizer, before, first),
        student_probability=None if student is None else float(student[0].max().exp()),
        forward_kl=() if student is None else tuple(forward_kl(student, teacher).tolist()),
        longest=tuple(torch.stack(probs).amax((0, 2)).tolist()),
        rest_teacher=rests[0],
        rest_student=() if student is None else rests[1],
    )
