"""A student loaded from a folder or the hub."""

from __future__ import annotations

from typing import Any, Literal

from limbeck.distributed import model_for
from limbeck.models import CausalLM, ModelSource, model_facts
from limbeck.students.base import InitialStudent, Origin, initialisers, uniform_map
from limbeck.students.provenance import read_provenance, surviving
from limbeck.tokenizers import load_tokenizer, refuse_differing_ids, tokens_by_id


@initialisers.register("pretrained")
def pretrained(
    origin: Origin,
    *,
    path: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Literal["own", "teacher"] = "own",
) -> InitialStudent:
    """A published model, or one pruned by `limbeck shrink`.

    Args:
        path: Folder, GGUF file or Hub name of a causal language model.
        revision: Commit, tag or branch of a model on the Hub.
        trust_remote_code: Run Python code that comes with the model.
        tokenizer: `teacher` gives a base model the chat template and the end token of its teacher,
            whose tokens must be the same; `own` keeps the model's.
    """
    source = ModelSource(path, revision, trust_remote_code)
    model = model_for(source, origin.world, origin.dtype)
    own = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    facts = {
        "origin": "pretrained",
        "tokenizer": tokenizer,
        **model_facts(source, model, hashed=origin.world.reads_files),
    }
    if tokenizer == "teacher":
        refuse_differing_ids(tokens_by_id(own), tokens_by_id(origin.tokenizer))
        end_as(model, origin)
    provenance = read_provenance(path)
    if provenance:
        facts["shrunk"] = provenance
    layer_map = surviving(provenance, model, origin) or uniform_map(model, origin)
    used = origin.tokenizer if tokenizer == "teacher" else own
    return InitialStudent(model, used, layer_map, facts)


def end_as(model: CausalLM, origin: Origin) -> None:
    """Give a model the teacher's BOS, end and padding tokens.

    A chat model often ends a text with more tokens than its tokenizer's end token.
    """
    tokenizer = origin.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    own: Any = model.config
    settings: Any = model.hf_model.generation_config
    for place in (own, *([] if settings is None else [settings])):
        place.bos_token_id, place.eos_token_id = tokenizer.bos_token_id, end
        place.pad_token_id = end if pad is None else pad
    if settings is not None and origin.teacher is not None and len(origin.teacher.end_ids) > 1:
        settings.eos_token_id = sorted(origin.teacher.end_ids)
