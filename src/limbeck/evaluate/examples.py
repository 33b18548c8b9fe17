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
from limbeck.evaluate.measure import Chunk, Documents, chunks
from limbeck.evaluate.text import Tokenizer, left_context, text_of, token_text
from limbeck.losses.divergences.kl import forward_kl
from limbeck.models import CausalLM, evaluating
from limbeck.teachers import Teacher

ROWS_AT_ONCE = 2
SHOWN = 5
"""Tokens shown of each distribution."""

PROMPT_TOKENS = 24
LONGEST_PROMPT = 512
SHORTEST_TRUTH = 8


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
            for chunk in chunks(student, teacher, batch.to(device), head_budget_mb):
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
    data: Documents,
    rows: Sequence[int],
    *,
    count: int,
    max_new_tokens: int = 48,
) -> list[dict[str, Any]]:
    """Held-out prompts, continued greedily by every model.

    Args:
        count: Number of prompts; fewer if the rows have fewer texts that are long enough.

    Returns:
        `{"prompt", "truth", name: text, ...}` each; truth is the text itself.
    """
    found = []
    for prompt, truth in prompts(tokenizer, data, rows, count):
        written = {}
        for name, model in models.items():
            with torch.no_grad(), evaluating(model):
                written[name] = text_of(tokenizer, model.generate(prompt, max_new_tokens))
        found.append(
            {
                "prompt": text_of(tokenizer, prompt),
                "truth": text_of(tokenizer, truth[:max_new_tokens]),
                **written,
            }
        )
    return found


def prompts(
    tokenizer: Tokenizer, data: Documents, rows: Sequence[int], count: int
) -> list[tuple[list[int], list[int]]]:
    """Prompts from different documents, each with the tokens that follow it.

    A prompt is the first 24 tokens of a text, or all unscored ones if these are more (a chat's
    question). In a window from the middle of a text it starts at the first new line.
    """
    found: dict[int, tuple[list[int], list[int]]] = {}
    stride = max(len(rows) // max(count, 1), 1)
    spread = [*rows[::stride], *rows]  # evenly spaced rows first, then all
    for row in spread:
        if len(found) >= count:
            break
        for document, prompt, truth in split_prompts(tokenizer, data.batch([row])):
            if document not in found:
                found[document] = (prompt, truth)
                break
    return list(found.values())[:count]


def split_prompts(tokenizer: Tokenizer, batch: Batch) -> Iterator[tuple[int, list[int], list[int]]]:
    """Each text in a row that is long enough, split into a prompt and its continuation."""
    tokens, targets = batch.input_ids[0].tolist(), batch.target_ids[0].tolist()
    documents, positions = batch.document_ids[0].tolist(), batch.position_ids[0].tolist()
    starts = [t for t, position in enumerate(positions) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        scored = batch.scored[0, start:end].nonzero()
        if documents[start] < 0 or not len(scored):
            continue
        text = [*tokens[start:end], targets[end - 1]]
        question = int(scored[0]) + 1
        if question == 1:
            text = from_a_line(tokenizer, text)
        cut = max(PROMPT_TOKENS, question)
        if cut <= LONGEST_PROMPT and len(text) - cut >= SHORTEST_TRUTH:
            yield documents[start], text[:cut], text[cut:]


def from_a_line(tokenizer: Tokenizer, text: list[int]) -> list[int]:
    """The text from its first new line, if it seems to start inside a sentence."""
    if not starts_inside(text_of(tokenizer, text[:PROMPT_TOKENS])):
        return text
    for at, token in enumerate(text[: 2 * PROMPT_TOKENS], start=1):
        if "\n" in text_of(tokenizer, [token]):
            return text[at:]
    return text


def starts_inside(text: str) -> bool:
    """Whether the first character does not start a sentence."""
    first = text[:1]
    return first.isspace() or first.islower() or first in ".,;:!?)]}"
