"""Examples from held-out text for the report: disagreements and continuations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.batch import Batch
from limbeck.config import HeadBudget
from limbeck.data import spread
from limbeck.evaluate.measure import Chunk, Documents, chunks
from limbeck.evaluate.text import Tokenizer, left_context, text_of, token_text
from limbeck.losses.divergences.kl import forward_kl
from limbeck.models import CausalLM, evaluating
from limbeck.rollouts import Prompts
from limbeck.teachers import Teacher

ROWS_AT_ONCE = 2
SHOWN = 5
"""Tokens shown of each distribution."""

SHORTEST_TRUTH = 8
"""Tokens of the text itself after a prompt, at least."""


@dataclass(frozen=True)
class WorstToken:
    """One token where two models differ.

    Attributes:
        forward_kl: KL(teacher || student) there, nats.
        before: Ids of the text it follows.
        teacher: The teacher's most probable token ids and their probabilities.
    """

    document: int
    forward_kl: float
    before: list[int]
    target: int
    teacher: list[tuple[int, float]]
    student: list[tuple[int, float]]


def disagreements(
    student: CausalLM,
    teacher: Teacher,
    tokenizer: Tokenizer,
    data: Documents,
    rows: Sequence[int],
    *,
    count: int,
    head_budget_mb: HeadBudget = "auto",
) -> list[dict[str, Any]]:
    """The tokens with the largest forward KL, at most one a document, largest first.

    With sharded models every rank calls it, with the same rows.
    """
    device = next(student.parameters()).device
    worst: dict[int, WorstToken] = {}
    with torch.no_grad(), evaluating(student):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = data.batch(rows[start : start + ROWS_AT_ONCE])
            on_device = batch.to(device)
            signal = teacher.signal(on_device)
            for chunk in chunks(student, signal, on_device, head_budget_mb):
                for place in largest_disagreements(chunk, batch):
                    old = worst.get(place.document)
                    if old is None or place.forward_kl > old.forward_kl:
                        worst[place.document] = place
    first = sorted(worst.values(), key=lambda place: (-place.forward_kl, place.document))[:count]
    return [described(place, tokenizer, data) for place in first]


def largest_disagreements(chunk: Chunk, batch: Batch) -> Iterator[WorstToken]:
    """The token of largest forward KL of each document in a chunk; none without a teacher."""
    if chunk.pair is None:
        return
    divergence = forward_kl(chunk.pair.student, chunk.pair.teacher).cpu()
    documents = batch.documents()[chunk.window]
    place = batch.scored.nonzero()[chunk.window].tolist()
    for document in sorted(set(documents.tolist())):
        of_document = torch.where(documents == document, divergence, -torch.inf)
        i = int(of_document.argmax())
        row, position = place[i]
        begin = position - int(batch.position_ids[row, position])
        yield WorstToken(
            document=document,
            forward_kl=float(divergence[i]),
            before=batch.input_ids[row, max(begin, 0) : position + 1].tolist(),
            target=int(batch.target_ids[row, position]),
            teacher=likeliest(chunk.pair.teacher[i]),
            student=likeliest(chunk.pair.student[i]),
        )


def likeliest(logp: Float[Tensor, " V"]) -> list[tuple[int, float]]:
    """The most probable outcomes of one position, with their probabilities."""
    top = logp.topk(min(SHOWN, len(logp)))
    return list(zip(top.indices.tolist(), top.values.exp().tolist(), strict=True))


def described(place: WorstToken, tokenizer: Tokenizer, data: Documents) -> dict[str, Any]:
    """A disagreement with its tokens as text, as in evaluation.json."""

    def named(outcomes: list[tuple[int, float]]) -> list[list[Any]]:
        return [[token_text(tokenizer, place.before, i), p] for i, p in outcomes]

    return {
        "document": data.document_name(place.document),
        "context": left_context(tokenizer, place.before),
        "target": token_text(tokenizer, place.before, place.target),
        "forward_kl": place.forward_kl,
        "teacher": named(place.teacher),
        "student": named(place.student),
    }


def continuations(
    models: Mapping[str, CausalLM],
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    count: int,
    max_new_tokens: int = 48,
) -> list[dict[str, str]]:
    """Held-out prompts, continued greedily by every model.

    Args:
        count: Number of prompts; fewer if few texts have eight tokens after theirs.

    Returns:
        `{"prompt", "truth", name: text, ...}` each; truth is the text itself.
    """
    enough = [
        i
        for i in range(len(prompts))
        if len(prompts.following(i, SHORTEST_TRUTH)) == SHORTEST_TRUTH
    ]
    return [
        {
            "prompt": text_of(tokenizer, prompts[enough[at]]),
            "truth": text_of(tokenizer, prompts.following(enough[at], max_new_tokens)),
            **{
                name: text_of(tokenizer, model.generate(prompts[enough[at]], max_new_tokens))
                for name, model in models.items()
            },
        }
        for at in spread(len(enough), count)
    ]
