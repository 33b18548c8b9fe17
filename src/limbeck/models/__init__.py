"""The only rooms that know Hugging Face models: decoder and head apart, load, prove, save."""

from limbeck.models.causal_lm import CausalLM
from limbeck.models.device import choose_device, choose_dtype
from limbeck.models.distiller import Distiller
from limbeck.models.facts import model_facts, shape_facts, tensors_hash
from limbeck.models.load import enable_activation_checkpointing, load_model, new_model
from limbeck.models.prove import prove_documents_apart, prove_head
from limbeck.models.save import save_student
from limbeck.models.source import ModelSource

__all__ = [
    "CausalLM",
    "Distiller",
    "ModelSource",
    "choose_device",
    "choose_dtype",
    "enable_activation_checkpointing",
    "load_model",
    "model_facts",
    "new_model",
    "prove_documents_apart",
    "prove_head",
    "save_student",
    "shape_facts",
    "tensors_hash",
]
