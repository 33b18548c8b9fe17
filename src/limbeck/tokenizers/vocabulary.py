"""Proof, id by id, that two vocabularies hold the same tokens.

Sizes prove nothing: embedding matrices are padded, and equal sizes can hold other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from limbeck.errors import ConfigError
from limbeck.tokenizers.identity import serialisation, template_difference
from limbeck.tokenizers.load import backend_of

SHOWN = 5
"""Differing ids an error lists."""


@dataclass(frozen=True)
class VocabularyProof:
    """What two tokenizers share.

    Attributes:
        size: V*, one more than the largest id both know. Rows of either model's head from here on
            are padding, or tokens of one model alone, and are cut before the softmax.
        same_tokenizer: Whether text becomes the same ids too.
        notes: Warnings for the user.
    """

    size: int
    same_tokenizer: bool
    notes: tuple[str, ...]


def prove_same_vocabulary(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    student_rows: int,
    teacher_rows: int,
) -> VocabularyProof:
    """The shared vocabulary, if every shared id is the same token in both.

    Ids that only one tokenizer knows are allowed after the last shared one, not among them.

    Args:
        student: Added tokens included.
        teacher: Added tokens included.
        student_rows: Rows of the student's embedding; at least the shared ids, and often more.
        teacher_rows: Of the teacher's.

    Raises:
        ConfigError: With the first ids that differ, or the two end tokens, or the missing rows.
    """
    ours, theirs = tokens_by_id(student), tokens_by_id(teacher)
    refuse_differing_ids(ours, theirs)
    refuse_differing_ends(student, teacher)
    size = 1 + min(max(ours), max(theirs))
    for who, rows in (("student", student_rows), ("teacher", teacher_rows)):
        if rows < size:
            raise ConfigError(
                f"The {who} must have a row for each of the {size:,} token ids the tokenizers "
                f"share, and its embedding has {rows:,}. Give the tokenizer that belongs to it."
            )
    changed = differing_parts(student, teacher)
    notes = [
        *superset_notes(ours, theirs, size),
        *tokenisation_notes(changed),
        *special_token_notes(student, teacher),
    ]
    if (difference := template_difference(student, teacher)) is not None:
        notes.append(difference)
    return VocabularyProof(size=size, same_tokenizer=not changed, notes=tuple(notes))


def tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Every id's token, added ones included."""
    return {i: token for token, i in backend_of(tokenizer).get_vocab(True).items()}


def refuse_differing_ids(ours: dict[int, str], theirs: dict[int, str]) -> None:
    """Raise if an id below the shared end differs or is missing in one tokenizer."""
    if not ours or not theirs:
        raise ConfigError("A tokenizer without any token cannot be distilled. Check its files.")
    end = 1 + min(max(ours), max(theirs))
    wrong = [i for i in range(end) if ours.get(i) != theirs.get(i)]
    if not wrong:
        return
    listed = [
        f"  {i}: student {shown(ours.get(i))}, teacher {shown(theirs.get(i))}"
        for i in wrong[:SHOWN]
    ]
    raise ConfigError(
        "\n".join(
            [
                f"Every token id must mean the same to student and teacher; {len(wrong):,} of "
                f"{end:,} do not. The first:",
                *listed,
                "Take a student of the teacher's family, or start one from the teacher "
                "(`student: {type: depth}`) or from nothing with the teacher's tokenizer "
                "(`student: {type: random}`). To learn from a teacher with another tokenizer, set "
                "`teacher: {type: cross_tokenizer, teacher: {...}}`.",
            ]
        )
    )


def shown(token: str | None) -> str:
    """A token as an error shows it."""
    return "nothing" if token is None else repr(token)


def refuse_differing_ends(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Raise if the EOS tokens differ."""
    if student.eos_token_id != teacher.eos_token_id:
        raise ConfigError(
            "Student and teacher must end a text with the same token; the student's is "
            f"{student.eos_token!r} ({student.eos_token_id}), the teacher's {teacher.eos_token!r} "
            f"({teacher.eos_token_id}). One is often the base model and the other the chat model: "
            "take both of one kind, or give the student the teacher's template and end token: "
            "student: {type: pretrained, path: ..., tokenizer: teacher}."
        )


def superset_notes(ours: dict[int, str], theirs: dict[int, str], size: int) -> Iterator[str]:
    """A note for the tokens only one tokenizer has."""
    for who, tokens in (("student", ours), ("teacher", theirs)):
        more = sorted(i for i in tokens if i >= size)
        if more:
            first = ", ".join(repr(tokens[i]) for i in more[:SHOWN])
            yield (
                f"Only the {who} knows the {len(more)} ids from {size:,} on ({first}); both models "
                "are cut there, so these tokens are never trained or predicted."
            )


def differing_parts(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> list[str]:
    """Parts of tokenizer.json in which the two differ, as `model.merges`."""
    ours, theirs = serialisation(student), serialisation(teacher)
    parts = [f"model.{k}" for k in ours["model"] if ours["model"][k] != theirs["model"].get(k)]
    parts += [k for k in ours if k != "model" and ours[k] != theirs.get(k)]
    return parts


def tokenisation_notes(changed: list[str]) -> Iterator[str]:
    """A note if ids agree but tokenisation may differ."""
    if changed:
        yield (
            f"The ids mean the same, but the tokenizers differ in {', '.join(changed)}, so they "
            "may cut a text differently. The data is tokenised by one of them for both models."
        )


def special_token_notes(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> Iterator[str]:
    """A note if the BOS tokens differ."""
    if student.bos_token_id != teacher.bos_token_id:
        yield (
            f"Student and teacher begin a text differently: {student.bos_token!r} and "
            f"{teacher.bos_token!r}."
        )
