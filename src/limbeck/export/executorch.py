"""ExecuTorch programs (`.pte`) for phones and other small devices, on XNNPACK's kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from limbeck.errors import ConfigError
from limbeck.export.base import ExportedFile, Exporter, exporters, fallback_note
from limbeck.export.few_bits import quantise
from limbeck.export.traced import (
    FolderRuntime,
    require_length,
    require_packages,
    silenced,
    write_traced,
)
from limbeck.models import CausalLM, PreTrainedTokenizerBase

MAX_KL = {"f32": 1e-4, "8da8w": 0.1, "8da4w": 0.7}
"""Mean KL to the student that a format may have, nats a token.

Quantised: four times what SmolLM2-135M has as 8da8w (0.025), and twice what it has as 8da4w (0.34;
docs/export.md).
"""


@exporters.register("executorch")
class Executorch(Exporter):
    """An ExecuTorch program for one sequence, written by transformers' exporter."""

    def __init__(
        self,
        *,
        quantize: Literal["f32", "8da8w", "8da4w"] = "f32",
        group_size: Literal[32, 64, 128, 256] | None = None,
        positions: Annotated[int, Ge(2)] | None = None,
        max_kl: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        """
        Args:
            quantize: Number format: float32, or weights in 8 or 4 bits and the inputs of a layer
                in 8; the embedding stays in float32.
            group_size: Weights that share a scale, with 8da4w; 32 by default.
            positions: Longest sequence, for which a program reserves memory when it is loaded; the
                student's own limit by default.
            max_kl: Mean KL to the student above which the file is refused, nats a token.
        """
        if group_size is not None and quantize != "8da4w":
            raise ConfigError(
                f"export: group_size belongs to quantize: 8da4w, got {quantize}. Leave it out."
            )
        self._quantize = quantize
        self._group_size = group_size or 32
        self._positions = positions
        self.suffix = ".pte" if quantize == "f32" else f"-{quantize}.pte"
        self.max_kl = MAX_KL[quantize] if max_kl is None else max_kl

    def require(self) -> None:
        packages = ("executorch.exir", "executorch.runtime", "torchao.quantization")
        require_packages("ExecuTorch", packages, "executorch")

    def require_student(self, student: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self._length(student)

    def export(
        self, student: CausalLM, tokenizer: PreTrainedTokenizerBase, path: Path
    ) -> ExportedFile:
        """Write the program, and tokenizer, configuration and settings beside it."""
        library: Any = importlib.import_module("transformers.exporters")
        length = self._length(student)
        inputs = {"input_ids": torch.zeros((1, 8), dtype=torch.int64)}
        sizes = {1: Dim.DYNAMIC(min=1, max=length)}
        config = library.ExecutorchConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, sizes))
        fallbacks: dict[str, str] = {}

        def exported(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
            if self._quantize != "f32":
                fallbacks.update(quantise(model, self._quantize, self._group_size))
            return library.ExecutorchExporter().export(model, inputs, config=config)

        write_traced("ExecuTorch", student, tokenizer, path, inputs, exported)
        runtime = f"executorch {version('executorch')} with xnnpack"
        facts: dict[str, Any] = {
            "quantize": self._quantize,
            "runtime": runtime,
            "fallbacks": fallbacks,
        }
        if self._quantize == "8da4w":
            facts["group_size"] = self._group_size
        notes = fallback_note(fallbacks, self._group_size)
        return ExportedFile(path, length, facts=facts, notes=notes)

    def run(self, file: ExportedFile) -> AbstractContextManager[FolderRuntime]:
        return nullcontext(FolderRuntime("ExecuTorch", file.path, partial(method, file.path)))

    def _length(self, student: CausalLM) -> int:
        limit = require_length(student)
        if self._positions is not None and self._positions > limit:
            raise ConfigError(
                f"positions must be at most {limit:,}, the longest sequence of the student, got "
                f"{self._positions:,}. Choose a smaller number, or leave it out."
            )
        return self._positions or limit


def method(path: Path) -> Callable[[list[int]], Tensor]:
    """Logits of token ids by a program in the ExecuTorch runtime, on the CPU."""
    with silenced():
        library: Any = importlib.import_module("executorch.runtime")
    program = library.Runtime.get().load_program(path)
    loaded = program.load_method("forward")

    def logits(token_ids: list[int]) -> Tensor:
        (found,) = loaded.execute([torch.tensor([token_ids])])
        rows: Tensor = found[0].clone()  # the runtime writes its next answer into the same memory
        return rows

    return logits
