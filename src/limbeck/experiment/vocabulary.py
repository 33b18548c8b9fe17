"""A teacher's vocabulary trimmed to the tokens some data use, proven on those data."""

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
from limbeck.files import publish, sha256, write_text
from limbeck.layer_map import LayerMap
from limbeck.losses.distributions import log_softmax
from limbeck.losses.head.fused import chunks
from limbeck.models import (
    CausalLM,
    ModelSource,
    PreTrainedTokenizerBase,
    cache_folder,
    evaluating,
    load_model,
    model_facts,
    save_student,
    shape_facts,
)
from limbeck.prune import kept_tokens, named_ids, prove_same_logits, pruned_tokenizer, with_tokens
from limbeck.prune.calibration import CHUNK, rows_of
from limbeck.students import InitialStudent
from limbeck.students.provenance import write_provenance
from limbeck.tokenizers import load_tokenizer, prove_same_vocabulary, tokenizer_hash, tokens_by_id

LENGTH = 256
"""Positions of a calibration row, where the model reads so many."""

TABLE = "vocabulary.json"
"""Beside a trimmed model: the old id of each of its tokens."""


PROVEN = 64
"""Tokens on which a trimmed model is compared with the whole one."""


class Teacher(NamedTuple):
    """A teacher as it is found.

    Attributes:
        source: Where.
        model: In eval mode, in float32, cut to its tokenizer's tokens.
        tokenizer: Its tokenizer.
    """

    source: ModelSource
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase

    @property
    def facts(self) -> dict[str, Any]:
        """Name, hash and shape, for a folder that is handed on."""
        told = model_facts(self.source, self.model)
        # Students are handed on, and the folders of this machine are nobody's business.
        if Path(self.source.path).expanduser().exists():
            told["name"] = Path(self.source.path).name
        return told


class Mass(NamedTuple):
    """What a teacher's restriction to the kept tokens leaves out.

    Attributes:
        tokens: Scored positions it was measured at.
        kept: Mean probability of the whole teacher on kept tokens.
        least: The smallest at any position.
        nats: Mean of -log of it: forward KL from the restricted distribution to the whole one.
    """

    tokens: int
    kept: float
    least: float
    nats: float


@dataclass(frozen=True)
class Trimming:
    """A teacher without the tokens that its data do not use.

    Attributes:
        teacher: The whole one.
        model: The trimmed one: the same body, and the rows of the kept tokens.
        tokenizer: Its tokenizer, which reads the data as the whole one does.
        kept: Of each of its tokens the old id, increasing.
        facts: What was kept, for whom; JSON.
    """

    teacher: Teacher
    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    kept: tuple[int, ...]
    facts: Mapping[str, Any]


def open_teacher(source: ModelSource, device: torch.device) -> Teacher:
    """Load a teacher that is to be made smaller.

    Raises:
        ConfigError: It cannot be used.
    """
    model = load_model(source, device=device, dtype=torch.float32)
    tokenizer = load_tokenizer(
        source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    rows = model.vocabulary_rows
    proof = prove_same_vocabulary(tokenizer, tokenizer, student_rows=rows, teacher_rows=rows)
    model.vocabulary_size = proof.size
    return Teacher(source, model, tokenizer)


def read(
    path: str, kind: str, tokenizer: PreTrainedTokenizerBase, max_positions: int | None
) -> TextData:
    """Calibration text."""
    length = min(LENGTH, max_positions or LENGTH)
    config = DataConfig(type=kind, path=path, sequence_length=length)
    return load_data(
        config, tokenizer, cache=cache_folder() / "data", max_positions=max_positions
    )  # fmt: skip


def trim(teacher: Teacher, paths: Sequence[str], kind: str) -> Trimming:
    """Keep the tokens that some data use, and prove that these are read as before.

    Args:
        teacher: Not changed.
        paths: The data, at least one; or the vocabulary.json of a model that was trimmed before.
        kind: How a row of the data reads, as `data.type` of a recipe.

    Raises:
        ConfigError: The tokenizer or the model cannot be trimmed, or would read the data otherwise.
        DataError: A vocabulary.json is damaged.
    """
    if any(is_table(path) for path in paths):
        return trim_alike(teacher, paths)
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
    """Whether a path is another model's table and no data."""
    return Path(path).name == TABLE


def trim_alike(teacher: Teacher, paths: Sequence[str]) -> Trimming:
    """Keep the tokens that another model with the same tokenizer kept.

    Raises:
        ConfigError: The tokenizer is another one, or there is more than the one table.
        DataError: The table is damaged.
    """
    if len(paths) > 1:
        raise ConfigError(
            f"A vocabulary is trimmed to some data, or as one {TABLE} says, got "
            f"{', '.join(paths)}. Leave out the others."
        )
    path = Path(paths[0]).expanduser()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        kept = tuple(int(i) for i in table["kept"])
        whole, trimmed = str(table["whole_tokenizer_sha256"]), str(table["tokenizer_sha256"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} must say which tokens were kept, as limbeck shrink wrote it, and cannot be "
            f"read: {error!r}. Name the data instead."
        ) from error
    own = tokenizer_hash(teacher.tokenizer)
    if own != whole:
        raise ConfigError(
            f"Two models are trimmed alike where they have the same tokenizer, but that of "
            f"{teacher.source.path} has the hash {own[:12]} and {path} is for {whole[:12]}. Take a "
            "model of the same family, or trim each to the data."
        )
    known = tokens_by_id(teacher.tokenizer)
    tokenizer = pruned_tokenizer(teacher.tokenizer, kept) if known.keys() >= {*kept} else None
    if tokenizer is None or tokenizer_hash(tokenizer) != trimmed:
        raise DataError(
            f"{path} must lead to the tokenizer with the hash {trimmed[:12]}, and its list of "
            f"{len(kept):,} tokens leads to another. Fetch it again, or name the data instead."
        )
    return cut(teacher, tokenizer, kept, {})


def cut(
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    kept: tuple[int, ...],
    more: Mapping[str, Any],
) -> Trimming:
    """The trimmed model beside its tokenizer, proven to say what the whole one says."""
    whole = teacher.model
    model = with_tokens(whole, kept)
    length = min(PROVEN, model.max_positions or PROVEN, len(kept))
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
    return Trimming(teacher, model, tokenizer, kept, facts)


def prove_same_reading(before: TextData, after: TextData, kept: Sequence[int]) -> None:
    """Check that a trimmed tokenizer reads data as the whole one does, token by token.

    Raises:
        ConfigError: With the first text that it reads otherwise.
    """
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
        "A trimmed tokenizer must read the data it was trimmed to as the whole one does, but "
        f"{before.document_name(int(before.windows[window, 2]))} of {before.facts['path']} becomes "
        f"other tokens ({len(kept):,} of the tokens are kept). Leave the vocabulary whole, or "
        "leave that row out."
    )


def measured(trimming: Trimming, text: TextData, tokens: int) -> Trimming:
    """The same, knowing how much of the whole teacher's probability is on what it kept.

    Args:
        trimming: As `trim` makes it.
        text: As the trimmed tokenizer reads it.
        tokens: Positions to measure at.
    """
    name, mass = Path(text.facts["path"]).name, mass_kept(trimming, text, tokens)
    return replace(trimming, facts={**trimming.facts, "mass": {"text": name, **mass._asdict()}})


def mass_kept(trimming: Trimming, text: TextData, tokens: int) -> Mass:
    """How much of the whole teacher's probability is on kept tokens, on the first rows of a text.

    Args:
        trimming: The hidden states of whole and trimmed model are the same, so one pass does.
        text: As the trimmed tokenizer reads it.
        tokens: Positions, at least; whole rows are taken.
    """
    whole, model = trimming.teacher.model, trimming.model
    device = model.hf_model.device
    chosen = torch.tensor(trimming.kept, device=device)
    found: list[torch.Tensor] = []
    with torch.no_grad(), evaluating(model):
        for row in rows_of(text, tokens):
            states = model(text.batch([row]).to(device))[0]
            for window in chunks(len(states), CHUNK):
                logp = log_softmax(whole.head(states[window]), 1.0)
                found.append(logp[:, chosen].double().logsumexp(-1).cpu())
    log_mass = torch.cat(found).clamp(max=0.0)
    mass = log_mass.exp()
    return Mass(len(mass), float(mass.mean()), float(mass.min()), float(-log_mass.mean()))


def write_table(folder: Path, trimming: Trimming) -> dict[str, Any]:
    """Write vocabulary.json into a student's folder; what limbeck.json says of it."""
    table = {
        "kept": list(trimming.kept),
        "tokenizer_sha256": trimming.facts["tokenizer_sha256"],
        "whole_tokenizer_sha256": trimming.facts["whole_tokenizer_sha256"],
    }
    write_text(folder / TABLE, json.dumps(table) + "\n")
    return {**trimming.facts, "table": TABLE, "sha256": sha256(folder / TABLE)}


def save_trimmed(trimming: Trimming, folder: Path) -> None:
    """A Hugging Face folder of the trimmed teacher, with limbeck.json and vocabulary.json."""
    layers = tuple(range(trimming.model.num_layers))
    facts = {"origin": "vocabulary", "layers_kept": [*layers], **shape_facts(trimming.model)}
    student = InitialStudent(
        trimming.model, trimming.tokenizer, LayerMap.surviving(layers), facts
    )  # fmt: skip

    def write(place: Path) -> None:
        save_student(trimming.model, trimming.tokenizer, place)
        more = {"limbeck": __version__, "vocabulary": write_table(place, trimming)}
        write_provenance(place, student, trimming.teacher.facts, more)

    publish(folder, write, {"kind": "student"})
