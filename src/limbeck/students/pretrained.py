"""A student loaded from a folder or the hub."""

from __future__ import annotations

from limbeck.distributed import model_for
from limbeck.models import ModelSource, model_facts
from limbeck.students.base import InitialStudent, Origin, initialisers, spread
from limbeck.students.provenance import read_provenance, surviving
from limbeck.tokenizers import load_tokenizer


@initialisers.register("pretrained")
def pretrained(
    origin: Origin, *, path: str, revision: str | None = None, trust_remote_code: bool = False
) -> InitialStudent:
    """A published model, or one pruned by `limbeck shrink`."""
    source = ModelSource(path, revision, trust_remote_code)
    model = model_for(source, origin.world, origin.dtype)
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    facts = {"origin": "pretrained", **model_facts(source, model, hashed=origin.world.is_main)}
    provenance = read_provenance(path)
    if provenance:
        facts["shrunk"] = provenance
    layer_map = surviving(provenance, model, origin) or spread(model, origin)
    return InitialStudent(model, tokenizer, layer_map, facts)
