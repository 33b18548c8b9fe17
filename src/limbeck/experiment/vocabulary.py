"""Pruning a teacher's vocabulary to the tokens of a data set, verified on that data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from limbeck import __version__
from limbeck.config import DataConfig
from limbeck.data import TextData, load_data
from limbeck.errors import ConfigError, DataError
from limbeck.files import expanded, publish, sha256, write_text
from limbeck.layer_map import LayerMap
from limbeck.losses.distributions import log_softmax
from limbeck.losses.head.fused import chunks
from limbeck.models import (
    CausalLM,
    ModelSource,
    PreTrainedTokenizerBase,
    cache_folder,
    evaluating,
    load_models,
    model_facts,
    save_student,
    shape_facts,
)
from limbeck.prune import kept_tokens, named_ids, prove_same_logits, pruned_tokenizer, with_tokens
from limbeck.prune.calibration import CHUNK, rows_of
from limbeck.students import InitialStudent
from limbeck.students.provenance import write_provenance
from limbeck.tokenizers import tokenizer_hash, tokens_by_id

LENGTH = 256
"""Positions of a calibration row, where the model reads so many."""

TABLE = "vocabulary.json"
"""File of a pruned model: the original id of each of its tokens."""


VERIFIED_TOKENS = 64
"""Tokens on which a pruned model is compared with the original."""


class LoadedTeacher(NamedTuple):
    """A loaded teacher.

    Attributes:
        model: In eval mode, in float32, cut to its tokenizer's tokens.
    """

    source: ModelSource
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase

    @property
    def facts(self) -> dict[str, Any]:
        """Name, hash and shape, for a published folder."""
        facts = model_facts(self.source, self.model)
        # Published folders must not reveal paths of this machine.
        if expanded(self.source.path).exists():
            facts["name"] = Path(self.source.path).name
        return facts


class KeptProbability(NamedTuple):
    """Probability of the original teacher on the kept tokens.

    Attributes:
        nats: Mean of its -log: the forward KL that pruning alone costs.
    """

    tokens: int
    mean: float
    min: float
    nats: float


@dataclass(frozen=True)
class PrunedVocabulary:
    """A teacher with a pruned vocabulary.

    Attributes:
        model: The same blocks, with the embedding and head rows of the kept tokens.
        tokenizer: Its tokenizer, which tokenizes the data as the original does.
        kept: The original id of each of its tokens, increasing.
        facts: Sizes, hashes and data, as JSON.
    """

    teacher: LoadedTeacher
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    kept: tuple[int, ...]
    facts: Mapping[str, Any]


def open_teacher(source: ModelSource, device: torch.device) -> LoadedTeacher:
    """Load a teacher to prune."""
    (model,), tokenizer = load_models([source], device=device, dtype=torch.float32)
    return LoadedTeacher(source, model, tokenizer)


def read(
    path: str, kind: str, tokenizer: PreTrainedTokenizerBase, max_positions: int | None
) -> TextData:
    """Calibration text."""
    length = min(LENGTH, max_positions or LENGTH)
    config = DataConfig(type=kind, path=path, sequence_length=length)
    return load_data(
        config, tokenizer, cache=cache_folder() / "data", max_positions=max_positions
    )  # fmt: skip


def prune_vocabulary(teacher: LoadedTeacher, paths: Sequence[str], kind: str) -> PrunedVocabulary:
    """Keep the tokens that a data set uses, and verify that it is tokenized as before.

    Args:
        paths: One or more data files; or the vocabulary.json of a pruned model.
        kind: How a row of the data reads, as `data.type` of a recipe.
    """
    if any(is_table(path) for path in paths):
        return prune_like(teacher, paths)
    limit = teacher.model.max_positions
    before = [read(path, kind, teacher.tokenizer, limit) for path in paths]
    used = {int(i) for text in before for i in np.unique(text.tokens)}
    named = named_ids(teacher.model) & tokens_by_id(teacher.tokenizer).keys()
    kept = kept_tokens(teacher.tokenizer, used | named)
    tokenizer = pruned_tokenizer(teacher.tokenizer, kept)
    for old in before:
        prove_same_reading(old, read(old.facts["path"], kind, tokenizer, limit), kept)
    data = [{"name": Path(t.facts["path"]).name, "sha256": t.facts["sha256"]} for t in before]
    return cut(teacher, tokenizer, kept, {"used": len(used), "data": data})


def is_table(path: str) -> bool:
    """Whether a path is the vocabulary.json of a pruned model."""
    return Path(path).name == TABLE


def prune_like(teacher: LoadedTeacher, paths: Sequence[str]) -> PrunedVocabulary:
    """Keep the tokens that another model with the same tokenizer kept."""
    if len(paths) > 1:
        raise ConfigError(
            f"A vocabulary is pruned to data or by one {TABLE}, got "
            f"{', '.join(paths)}. Leave out the others."
        )
    path = expanded(paths[0])
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        kept = tuple(int(i) for i in table["kept"])
        whole, expected = str(table["whole_tokenizer_sha256"]), str(table["tokenizer_sha256"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} must be a list of kept tokens written by limbeck shrink, and cannot be read: "
            f"{error!r}. Name the data instead."
        ) from error
    own = tokenizer_hash(teacher.tokenizer)
    if own != whole:
        raise ConfigError(
            f"Models pruned by one {TABLE} must have the same tokenizer, but that of "
            f"{teacher.source.path} has the hash {own[:12]} and {path} is for {whole[:12]}. Use a "
            "model of the same family, or prune each to the data."
        )
    known = tokens_by_id(teacher.tokenizer)
    tokenizer = pruned_tokenizer(teacher.tokenizer, kept) if known.keys() >= {*kept} else None
    if tokenizer is None or tokenizer_hash(tokenizer) != expected:
        raise DataError(
            f"{path} must give the tokenizer with the hash {expected[:12]}, and its list of "
            f"{len(kept):,} tokens gives another. Fetch it again, or name the data instead."
        )
    return cut(teacher, tokenizer, kept, {})


def cut(
    teacher: LoadedTeacher,
    tokenizer: PreTrainedTokenizerBase,
    kept: tuple[int, ...],
    more: Mapping[str, Any],
) -> PrunedVocabulary:
    """The pruned model, verified to give the original's logits on kept tokens."""
    whole = teacher.model
    model = with_tokens(whole, kept)
    length = min(VERIFIED_TOKENS, model.max_positions or VERIFIED_TOKENS, len(kept))
    ids = torch.linspace(0, len(kept) - 1, length, device=whole.hf_model.device).long()
    prove_same_logits(whole, model, kept, ids[None])
    facts = {
        "kept": len(kept),
        "of": whole.vocabulary_size,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "whole_tokenizer_sha256": tokenizer_hash(teacher.tokenizer),
        "parameters_saved": whole.num_parameters - model.num_parameters,
        **more,
    }
    return PrunedVocabulary(teacher, model, tokenizer, kept, facts)


def prove_same_reading(before: TextData, after: TextData, kept: Sequence[int]) -> None:
    """Check that a pruned tokenizer tokenizes data as the original does."""
    new_id = np.full(1 + max(*kept, int(before.tokens.max())), -1, dtype=np.int64)
    new_id[list(kept)] = np.arange(len(kept))
    wanted, found = new_id[before.tokens], np.asarray(after.tokens)
    if np.array_equal(wanted, found) and np.array_equal(before.scored, after.scored):
        return
    length = min(len(wanted), len(found))
    differs = (wanted[:length] != found[:length]) | (
        np.asarray(before.scored[:length]) != np.asarray(after.scored[:length])
    )
    at = int(differs.argmax()) if differs.any() else length - 1
    window = int(np.searchsorted(before.windows[:, 0], at, side="right")) - 1
    raise ConfigError(
        "A pruned tokenizer must tokenize its data as the original does, but "
        f"{before.document_name(int(before.windows[window, 2]))} of {before.facts['path']} becomes "
        f"other tokens ({len(kept):,} tokens are kept). Keep the whole vocabulary, or leave that "
        "row out."
    )


def measured(pruned: PrunedVocabulary, text: TextData, tokens: int) -> PrunedVocabulary:
    """The same with the original teacher's probability of the kept tokens among its facts.

    Args:
        text: Tokenized by the pruned tokenizer.
    """
    name, kept = Path(text.facts["path"]).name, probability_kept(pruned, text, tokens)
    facts = {**pruned.facts, "kept_probability": {"text": name, **kept._asdict()}}
    return replace(pruned, facts=facts)


def probability_kept(pruned: PrunedVocabulary, text: TextData, tokens: int) -> KeptProbability:
    """The original teacher's probability of the kept tokens, on the first rows of a text.

    Args:
        pruned: Original and pruned model have the same hidden states, so one pass is enough.
    """
    whole, model = pruned.teacher.model, pruned.model
    device = model.hf_model.device
    chosen = torch.tensor(pruned.kept, device=device)
    found: list[torch.Tensor] = []
    with torch.no_grad(), evaluating(model):
        for row in rows_of(text, tokens):
            states = model(text.batch([row]).to(device))[0]
            for window in chunks(len(states), CHUNK):
                logp = log_softmax(whole.head(states[window]), 1.0)
                found.append(logp[:, chosen].double().logsumexp(-1).cpu())
    logprobs = torch.cat(found).clamp(max=0.0)
    probs = logprobs.exp()
    return KeptProbability(
        len(probs), float(probs.mean()), float(probs.min()), float(-logprobs.mean())
    )


def write_table(folder: Path, pruned: PrunedVocabulary) -> dict[str, Any]:
    """Write vocabulary.json into a student's folder; returns its entry of limbeck.json."""
    table = {
        "kept": list(pruned.kept),
        "tokenizer_sha256": pruned.facts["tokenizer_sha256"],
        "whole_tokenizer_sha256": pruned.facts["whole_tokenizer_sha256"],
    }
    write_text(folder / TABLE, json.dumps(table) + "\n")
    return {**pruned.facts, "table": TABLE, "sha256": sha256(folder / TABLE)}


def save_pruned(pruned: PrunedVocabulary, folder: Path) -> None:
    """Publish the pruned teacher, with limbeck.json and vocabulary.json."""
    layers = tuple(range(pruned.model.num_layers))
    facts = {"origin": "vocabulary", "layers_kept": [*layers], **shape_facts(pruned.model)}
    student = InitialStudent(
        pruned.model, pruned.tokenizer, LayerMap.surviving(layers), facts
    )  # fmt: skip

    def write(place: Path) -> None:
        save_student(pruned.model, pruned.tokenizer, place)
        more = {"limbeck": __version__, "vocabulary": write_table(place, pruned)}
        write_provenance(place, student, pruned.teacher.facts, more)

    publish(folder, write, {"kind": "student"})
