"""Opens the teacher and the optional student that a command names."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.models import (
    CausalLM,
    ModelSource,
    PreTrainedTokenizerBase,
    choose_device,
    choose_dtype,
    load_models,
)


def open_models(
    paths: Sequence[str], revisions: Sequence[str | None], trust_remote_code: bool, device: str
) -> tuple[list[CausalLM], PreTrainedTokenizerBase]:
    """The models, cut to the vocabulary they share, and the teacher's tokenizer."""
    place = choose_device(device)
    commits: list[str | None] = [*revisions, *[None] * len(paths)]
    sources = [ModelSource(p, r, trust_remote_code) for p, r in zip(paths, commits, strict=False)]
    return load_models(sources, device=place, dtype=choose_dtype("auto", place))
