"""Hugging Face causal LMs: decoder and head apart, loading, proofs, saving."""

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from limbeck.config.trainable import Bits
from limbeck.models.activation_checkpointing import checkpoint_activations, kept_values
from limbeck.models.causal_lm import CausalLM
from limbeck.models.compilation import compile_blocks, compiles
from limbeck.models.device import SIMULATED, choose_device, choose_dtype
from limbeck.models.distiller import Distiller
from limbeck.models.embedded import cache_folder, embedded_teacher
from limbeck.models.facts import (
    configured_shape,
    loading_notes,
    model_facts,
    num_bytes,
    shape_facts,
    weights_fingerprint,
)
from limbeck.models.final_layers import FinalLayers, load_final_layers
from limbeck.models.freezing import make_trainable, trained_facts
from limbeck.models.load import (
    copied_model,
    load_model,
    load_models,
    new_model,
    open_model,
    reopened,
    shared_model,
    sketched_model,
)
from limbeck.models.lora import save_adapters
from limbeck.models.modes import evaluating
from limbeck.models.projections import captured_projections
from limbeck.models.prove import (
    head_error,
    neighbours_seen,
    prove_documents_apart,
    prove_head,
)
from limbeck.models.quantization import pack, quantized, require_bitsandbytes
from limbeck.models.rounding import rounds_weights
from limbeck.models.save import plain_weights, round_weights, save_student
from limbeck.models.source import ModelSource

__all__ = [
    "SIMULATED",
    "Bits",
    "CausalLM",
    "Distiller",
    "FinalLayers",
    "ModelSource",
    "PreTrainedConfig",
    "PreTrainedTokenizerBase",
    "cache_folder",
    "captured_projections",
    "checkpoint_activations",
    "choose_device",
    "choose_dtype",
    "compile_blocks",
    "compiles",
    "configured_shape",
    "copied_model",
    "embedded_teacher",
    "evaluating",
    "head_error",
    "kept_values",
    "load_final_layers",
    "load_model",
    "load_models",
    "loading_notes",
    "make_trainable",
    "model_facts",
    "neighbours_seen",
    "new_model",
    "num_bytes",
    "open_model",
    "pack",
    "plain_weights",
    "prove_documents_apart",
    "prove_head",
    "quantized",
    "reopened",
    "require_bitsandbytes",
    "round_weights",
    "rounds_weights",
    "save_adapters",
    "save_student",
    "shape_facts",
    "shared_model",
    "sketched_model",
    "trained_facts",
    "weights_fingerprint",
]
