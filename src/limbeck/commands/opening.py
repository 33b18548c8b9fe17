"""Opens the teacher and the optional student that a command names."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.models import (
    CausalLM,
    ModelSource,
    PreTrainedTokenizerBase,
    choose_device,
    choose_dtype,
    load_model,
)
from limbeck.models.source import find
from limbeck.tokenizers import load_tokenizer, prove_same_vocabulary


def open_models(
    paths: Sequence[str], revisions: Sequence[str | None], trust_remote_code: bool, device: str
) -> tuple[list[CausalLM], PreTrainedTokenizerBase]:
    """The models, cut to the vocabulary they share, and the teacher's tokenizer."""
    place = choose_device(device)
    commits: list[str | None] = [*revisions, *[None] * len(paths)]
    sources = [ModelSource(p, r, trust_remote_code) for p, r in zip(paths, commits, strict=False)]
    for source in sources:
        find(source)  # refuses code of an unpinned commit before a tokenizer could run it
    tokenizers = [
        load_tokenizer(s.path, revision=s.revision, trust_remote_code=trust_remote_code)
        for s in sources
    ]
    models = [load_model(s, device=place, dtype=choose_dtype("auto", place)) for s in sources]
    teacher, student = models[0], models[-1]
    proof = prove_same_vocabulary(
        tokenizers[-1],
        tokenizers[0],
        student_rows=student.vocabulary_rows,
        teacher_rows=teacher.vocabulary_rows,
    )
    for model in models:
        model.vocabulary_size = proof.size
    return models, tokenizers[0]
