"""A Modelfile: Ollama's description of a GGUF file."""

from __future__ import annotations

import json

from limbeck.export.base import ExportedFile
from limbeck.models import CausalLM, PreTrainedTokenizerBase

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NAMES = {"repetition_penalty": "repeat_penalty"}


def modelfile(student: CausalLM, tokenizer: PreTrainedTokenizerBase, file: ExportedFile) -> str:
    """A Modelfile beside the GGUF file: context, end tokens, and the student's sampling.

    The chat template is in the GGUF file; Ollama reads it from there.
    """
    lines = [f"FROM ./{file.path.name}", f"PARAMETER num_ctx {file.max_positions}"]
    ends = sorted(student.end_ids | {int(tokenizer.eos_token_id)})
    lines += [f"PARAMETER stop {json.dumps(tokenizer.decode([end]))}" for end in ends]
    settings = student.hf_model.generation_config
    plain = {} if settings is None else settings.to_dict()
    if plain.get("do_sample"):
        lines += [
            f"PARAMETER {NAMES.get(name, name)} {plain[name]:g}"
            for name in SAMPLING
            if plain.get(name) is not None
        ]
    return "\n".join(lines) + "\n"
