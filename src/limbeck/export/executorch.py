"""ExecuTorch programs (`.pte`) for phones and other small devices, on XNNPACK's kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor
from torch.export import Dim

from limbeck.errors import ConfigError, DataError
from limbeck.export.base import ExportedFile, Exporter, Runtime, RuntimeTokenizer, exporters
from limbeck.export.traced import (
    FolderTokenizer,
    plain_model,
    require_length,
    require_packages,
    silenced,
    traced,
    write_companions,
)
from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.models.source import first_line

MAX_KL = 1e-4
"""As of a GGUF file in float32."""


@exporters.register("executorch")
class Executorch(Exporter):
    """An ExecuTorch program in float32 for one sequence, written by transformers' exporter."""

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
        self._max_kl = MAX_KL if max_kl is None else max_kl

    @property
    def suffix(self) -> str:
        return ".pte"

    @property
    def max_kl(self) -> float:
        return self._max_kl

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
        model = plain_model(student)
        example = torch.zeros((1, 8), dtype=torch.int64)
        sizes = {1: Dim.DYNAMIC(min=1, max=length)}
        config = library.ExecutorchConfig(dynamic=True, dynamic_shapes={"input_ids": sizes})

        def trace() -> Any:
            inputs = {"input_ids": example, "use_cache": False}
            return library.ExecutorchExporter().export(model, inputs, config)

        exported = traced("ExecuTorch", student, trace)
        (component,) = exported.components.values()
        named = library.ExportedModel({path.stem: component}, "executorch", model.config)
        named.save_pretrained(path.parent)
        write_companions(model, tokenizer, path.parent)
        runtime = f"executorch {version('executorch')} with xnnpack"
        return ExportedFile(path, length, facts={"quantize": "f32", "runtime": runtime})

    def run(self, file: ExportedFile) -> AbstractContextManager[ExecutorchRuntime]:
        return running(file.path)

    def _length(self, student: CausalLM) -> int:
        limit = require_length(student)
        if self._positions is not None and self._positions > limit:
            raise ConfigError(
                f"positions must be at most {limit:,}, the longest sequence of the student, got "
                f"{self._positions:,}. Choose a smaller number, or leave it out."
            )
        return self._positions or limit


@contextmanager
def running(path: Path) -> Iterator[ExecutorchRuntime]:
    """A program in the ExecuTorch runtime, on the CPU."""
    with silenced():
        library: Any = importlib.import_module("executorch.runtime")
    try:
        program = library.Runtime.get().load_program(path)
        method = program.load_method("forward")
    except Exception as error:  # its errors have no common class
        raise DataError(
            f"ExecuTorch must load {path.name}, and refuses it: {first_line(error)}"
        ) from error
    yield ExecutorchRuntime(method, path)


class ExecutorchRuntime(Runtime):
    """One loaded method, and the tokenizer files beside its file; made by `running`."""

    def __init__(self, method: Any, path: Path) -> None:
        self._method, self._path = method, path
        self._tokenizer = FolderTokenizer(path.parent)

    @property
    def tokenizer(self) -> RuntimeTokenizer:
        return self._tokenizer

    def logits(self, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
        try:
            (logits,) = self._method.execute([torch.tensor([list(token_ids)])])
        except Exception as error:
            raise DataError(
                f"ExecuTorch must read {len(token_ids):,} positions with {self._path.name}, and "
                f"fails: {first_line(error)}"
            ) from error
        rows: Tensor = logits[0].clone()  # the runtime writes its next answer into the same memory
        return rows
