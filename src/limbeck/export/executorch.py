"""ExecuTorch programs (`.pte`) for phones and other small devices, on XNNPACK's kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.export import Dim

from limbeck.errors import ConfigError
from limbeck.export.base import ExportedFile, Exporter, exporters
from limbeck.export.traced import (
    TracedRuntime,
    require_length,
    require_packages,
    silenced,
    write_traced,
)
from limbeck.models import CausalLM, PreTrainedTokenizerBase

MAX_KL = 1e-4
"""As of a GGUF file in float32."""


@exporters.register("executorch")
class Executorch(Exporter):
    """An ExecuTorch program in float32 for one sequence, written by transformers' exporter."""

    suffix = ".pte"

    def __init__(
        self,
        *,
        positions: Annotated[int, Ge(2)] | None = None,
        max_kl: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        """
        Args:
            positions: Longest sequence, for which a program reserves memory when it is loaded; the
                student's own limit by default.
            max_kl: Mean KL to the student above which the file is refused, nats a token.
        """
        self._positions = positions
        self.max_kl = MAX_KL if max_kl is None else max_kl

    def require(self) -> None:
        require_packages("ExecuTorch", ("executorch.exir", "executorch.runtime"), "executorch")

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
        exported = partial(library.ExecutorchExporter().export, config=config)
        write_traced("ExecuTorch", student, tokenizer, path, inputs, exported)
        runtime = f"executorch {version('executorch')} with xnnpack"
        return ExportedFile(path, length, facts={"quantize": "f32", "runtime": runtime})

    def run(self, file: ExportedFile) -> AbstractContextManager[TracedRuntime]:
        return nullcontext(TracedRuntime("ExecuTorch", file.path, partial(method, file.path)))

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
