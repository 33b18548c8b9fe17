"""The only rooms that know Hugging Face models: decoder and head apart, load, prove, save."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from limbeck.models.causal_lm import CausalLM
from limbeck.models.device import choose_device, choose_dtype
from limbeck.models.distiller import Distiller
from limbeck.models.embedded import cache_folder, embedded_teacher
from limbeck.models.facts import model_facts, shape_facts, tensors_hash
from limbeck.models.freezing import make_trainable, trained_facts
from limbeck.models.layouts import Shape, cut_config, read_pattern, resized_config
from limbeck.models.load import copied_model, enable_activation_checkpointing, load_model, new_model
from limbeck.models.modes import evaluating
from limbeck.models.narrow import (
    Kept,
    Widths,
    narrow_config,
    narrowed,
    num_parameters,
    widths_of,
)
from limbeck.models.projections import captured_projections
from limbeck.models.prove import (
    HEAD_TOLERANCE,
    TOLERANCE,
    head_error,
    neighbours_seen,
    prove_documents_apart,
    prove_head,
)
from limbeck.models.roles import Roles, roles_of
from limbeck.models.rows import named_ids, prove_same_logits, with_tokens
from limbeck.models.save import plain_weights, save_student
from limbeck.models.shared import shared_model
from limbeck.models.source import ModelSource

__all__ = [
    "HEAD_TOLERANCE",
    "TOLERANCE",
    "CausalLM",
    "Distiller",
    "Kept",
    "ModelSource",
    "PreTrainedConfig",
    "PreTrainedTokenizerBase",
    "Roles",
    "Shape",
    "Widths",
    "cache_folder",
    "captured_projections",
    "choose_device",
    "choose_dtype",
    "copied_model",
    "cut_config",
    "embedded_teacher",
    "enable_activation_checkpointing",
    "evaluating",
    "head_error",
    "load_model",
    "make_trainable",
    "model_facts",
    "named_ids",
    "narrow_config",
    "narrowed",
    "neighbours_seen",
    "new_model",
    "num_parameters",
    "plain_weights",
    "prove_documents_apart",
    "prove_head",
    "prove_same_logits",
    "read_pattern",
    "resized_config",
    "roles_of",
    "save_student",
    "shape_facts",
    "shared_model",
    "tensors_hash",
    "trained_facts",
    "widths_of",
    "with_tokens",
]
