"""GGUF files for llama.cpp, Ollama and what is built on them."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize as plain_format
from jaxtyping import Float32
from torch import Tensor

from limbeck.export.base import ExportedFile, Exporter, exporters, fallback_note
from limbeck.export.families import context_length, family_of, tensors, write_settings
from limbeck.export.held_out import WINDOW, HeldOutText, windows_of
from limbeck.export.importance import Importance, importance_of
from limbeck.export.llama_cpp import LlamaCpp, quantized, require_llama_cpp, running
from limbeck.export.quantization import MIXTURES, PLAIN, Quantize, choose
from limbeck.export.vocabulary import vocabulary_of, write_vocabulary
from limbeck.files import write_text
from limbeck.models import CausalLM, PreTrainedTokenizerBase

MAX_KL = {
    "f32": 1e-4,
    "f16": 1e-4,
    "bf16": 1e-2,
    "q8_0": 0.03,
    "q6_k": 0.05,
    "q5_k_m": 0.15,
    "q4_k_m": 0.3,
    "q4_0": 0.5,
}
"""Mean KL to the student that a format may have, nats a token.

Quantised: several times what SmolLM2-135M has as q8_0 (0.0047) and q4_k_m (0.056), and nearly twice
what it has as q4_0 (0.28), for which it was not trained (docs/export.md).
"""

UNWEIGHTED = (*PLAIN, Kind.Q8_0, Kind.Q4_0)
"""Formats without an importance matrix: a student trained for Q4_0 is held exactly without one."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}


@exporters.register("gguf")
class Gguf(Exporter):
    """One GGUF file, written without llama.cpp's converter and quantised by llama.cpp's code."""

    def __init__(
        self,
        *,
        quantize: Quantize = "f16",
        max_kl: Annotated[float, Gt(0)] | None = None,
        calibration: str | None = None,
        calibration_type: str = "text",
        calibration_tokens: Annotated[int, Ge(2)] = 4096,
    ) -> None:
        """
        Args:
            quantize: Number format of the matrices; norms and biases stay in float32.
            max_kl: Mean KL to the student above which the file is refused, nats a token.
            calibration: Text for an importance matrix, by which K-quants weigh
                their errors; without it all channels count the same.
            calibration_type: How its rows read, as `data.type` in a recipe.
            calibration_tokens: Positions of that text.
        """
        self._quantize: Quantize = quantize
        self.suffix = f"-{quantize}.gguf"
        self.max_kl = MAX_KL[quantize] if max_kl is None else max_kl
        self._calibration = None
        if calibration is not None:
            self._calibration = HeldOutText(calibration_type, calibration, calibration_tokens)

    def require(self) -> None:
        require_llama_cpp()

    def require_student(self, student: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        context_length(student.config, family_of(student))
        vocabulary_of(tokenizer, student.vocabulary_size)

    def export(
        self, student: CausalLM, tokenizer: PreTrainedTokenizerBase, path: Path
    ) -> ExportedFile:
        """Write a student, and a Modelfile for Ollama beside it."""
        family = family_of(student)
        vocabulary = vocabulary_of(tokenizer, student.vocabulary_size)
        positions, notes = context_length(student.config, family)
        writer = GGUFWriter(path, MODEL_ARCH_NAMES[family.arch])
        writer.add_name(path.stem)
        writer.add_file_type(MIXTURES[self._quantize].file_type)
        writer.add_quantization_version(2)
        write_settings(writer, student, family)
        write_vocabulary(writer, tokenizer, vocabulary, student.end_ids)
        kinds: Counter[str] = Counter()
        fallbacks: dict[str, str] = {}
        head = "token_embd.weight" if student.is_tied else "output.weight"
        importance = self._importance(student, tokenizer)
        for own, name, tensor in tensors(student, family):
            choice = choose(
                name,
                tuple(tensor.shape),
                self._quantize,
                student.num_layers,
                is_head=name == head,
            )
            kinds[choice.kind.name] += 1
            if choice.instead_of is not None:
                fallbacks[name] = f"{choice.kind.name} instead of {choice.instead_of.name}"
            add(writer, name, tensor, choice.kind, importance.get(own))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = ExportedFile(
            path,
            positions,
            vocabulary.normalisation,
            {
                "quantize": self._quantize,
                "runtime": f"llama.cpp of xllamacpp {require_llama_cpp().__version__}",
                "architecture": MODEL_ARCH_NAMES[family.arch],
                "importance_matrix": bool(importance),
                "pre_tokenizer": vocabulary.pre_tokenizer,
                "tensors": dict(kinds),
                "fallbacks": fallbacks,
            },
            (*notes, *fallback_note(fallbacks, 256)),
        )
        write_text(path.with_name("Modelfile"), modelfile(student, tokenizer, file))
        return file

    def _importance(self, student: CausalLM, tokenizer: PreTrainedTokenizerBase) -> Importance:
        if self._calibration is None or MIXTURES[self._quantize].base in UNWEIGHTED:
            return {}
        limit = student.max_positions or WINDOW
        return importance_of(student, windows_of(tokenizer, limit, self._calibration))

    def run(self, file: ExportedFile) -> AbstractContextManager[LlamaCpp]:
        return running(file.path, file.max_positions)


def add(
    writer: GGUFWriter,
    name: str,
    tensor: Tensor,
    kind: Kind,
    importance: Float32[np.ndarray, " D"] | None,
) -> None:
    """Put a tensor into a file, in a format."""
    values = np.ascontiguousarray(tensor.numpy())
    data = plain_format(values, kind) if kind in PLAIN else quantized(values, kind, importance)
    writer.add_tensor(name, data, raw_dtype=kind)


def modelfile(student: CausalLM, tokenizer: PreTrainedTokenizerBase, file: ExportedFile) -> str:
    """Ollama's description of a GGUF file beside it: context, end tokens, the student's sampling.

    The chat template is in the GGUF file; Ollama reads it from there.
    """
    lines = [f"FROM ./{file.path.name}", f"PARAMETER num_ctx {file.max_positions}"]
    ends = sorted(student.end_ids | {int(tokenizer.eos_token_id)})
    lines += [f"PARAMETER stop {json.dumps(tokenizer.decode([end]))}" for end in ends]
    settings = student.hf_model.generation_config
    plain = {} if settings is None else settings.to_dict()
    if plain.get("do_sample"):
        lines += [
            f"PARAMETER {OLLAMA_NAMES.get(name, name)} {plain[name]:g}"
            for name in SAMPLING
            if plain.get(name) is not None
        ]
    return "\n".join(lines) + "\n"
