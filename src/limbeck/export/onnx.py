"""ONNX files for ONNX Runtime and what reads that format."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor
from torch.export import Dim

from limbeck.errors import DataError
from limbeck.export.base import (
    ExportedFile,
    Exporter,
    Runtime,
    RuntimeTokenizer,
    exporters,
)
from limbeck.export.traced import (
    FolderTokenizer,
    plain_model,
    require_length,
    require_packages,
    traced,
    write_companions,
)
from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.models.source import first_line

MAX_KL = 1e-4
"""As of a GGUF file in float32; measured are 1e-8 and less (docs/export.md)."""

MAX_ROWS = 1024
"""Most sequences of a batch."""

AXES = ("batch", "sequence")
"""Names of the axes whose sizes a caller chooses."""

PROVIDER = "CPUExecutionProvider"
ERRORS_ONLY = 3
"""Severity from which ONNX Runtime logs."""


@exporters.register("onnx")
class Onnx(Exporter):
    """An ONNX graph in float32 for any batch and length, written by transformers' exporter."""

    def __init__(self, *, max_kl: Annotated[float, Gt(0)] | None = None) -> None:
        """
        Args:
            max_kl: Mean KL to the student above which the file is refused, nats a token.
        """
        self._max_kl = MAX_KL if max_kl is None else max_kl

    @property
    def suffix(self) -> str:
        return ".onnx"

    @property
    def max_kl(self) -> float:
        return self._max_kl

    def require(self) -> None:
        require_packages("ONNX", ("onnx", "onnxscript", "onnxruntime"), "onnx")

    def require_student(self, student: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        require_length(student)

    def export(
        self, student: CausalLM, tokenizer: PreTrainedTokenizerBase, path: Path
    ) -> ExportedFile:
        """Write the graph, its weights, and tokenizer, configuration and settings beside them."""
        library: Any = importlib.import_module("transformers.exporters")
        length = require_length(student)
        model = plain_model(student)
        example = torch.zeros((2, 8), dtype=torch.int64)
        sizes = {0: Dim.DYNAMIC(min=1, max=MAX_ROWS), 1: Dim.DYNAMIC(min=1, max=length)}
        config = library.OnnxConfig(
            dynamic=True, dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}
        )

        def trace() -> Any:
            inputs = {"input_ids": example, "attention_mask": example + 1, "use_cache": False}
            return library.OnnxExporter().export(model, inputs, config)

        exported = traced("ONNX", student, trace)
        cleaned(exported.program)
        (component,) = exported.components.values()
        named = library.ExportedModel({path.stem: component}, "onnx", model.config)
        named.save_pretrained(path.parent)
        write_companions(model, tokenizer, path.parent)
        version = importlib.import_module("onnxruntime").__version__
        return ExportedFile(
            path,
            length,
            weights=path.with_name(f"{path.name}.data"),
            facts={"quantize": "f32", "runtime": f"onnxruntime {version}"},
        )

    def run(self, file: ExportedFile) -> AbstractContextManager[OnnxRuntime]:
        return running(file.path)


@contextmanager
def running(path: Path) -> Iterator[OnnxRuntime]:
    """An ONNX file in ONNX Runtime, on the CPU."""
    library: Any = importlib.import_module("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    try:
        session = library.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # its errors have no common class
        raise DataError(
            f"ONNX Runtime must load {path.name}, and refuses it: {first_line(error)}"
        ) from error
    yield OnnxRuntime(session, path)


class OnnxRuntime(Runtime):
    """One session, and the tokenizer files beside its file; made by `running`."""

    def __init__(self, session: Any, path: Path) -> None:
        self._session, self._path = session, path
        self._tokenizer = FolderTokenizer(path.parent)

    @property
    def tokenizer(self) -> RuntimeTokenizer:
        return self._tokenizer

    def logits(self, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
        row = np.array([list(token_ids)], dtype=np.int64)
        feed = {"input_ids": row, "attention_mask": np.ones_like(row)}
        try:
            (logits,) = self._session.run(["logits"], feed)
        except Exception as error:
            raise DataError(
                f"ONNX Runtime must read {len(token_ids):,} positions with {self._path.name}, and "
                f"fails: {first_line(error)}"
            ) from error
        return torch.from_numpy(logits[0])


def cleaned(program: Any) -> None:
    """Name the free axes, and drop what the exporter noted on the origin of each node.

    Those notes hold paths of this machine, and were most of a small model's graph.

    Args:
        program: An `onnx_ir.Model`, changed in place.
    """
    ir: Any = importlib.import_module("onnx_ir")
    passes: Any = importlib.import_module("onnx_ir.passes.common")
    passes.ClearMetadataAndDocStringPass()(program)
    graph = program.graph
    ends = (*graph.inputs, *graph.outputs)
    shapes = [ir.Shape([*AXES, *value.shape[len(AXES) :]]) for value in ends]
    inner = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*ends, *inner, *graph.initializers.values()):
        value.metadata_props.clear()
    for value in inner:
        value.shape = None  # in the exporter's names of the axes; runtimes infer it
    for value, shape in zip(ends, shapes, strict=True):
        value.shape = shape
