"""ONNX files for ONNX Runtime and what reads that format."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor
from torch.export import Dim

from limbeck.export.base import ExportedFile, Exporter, exporters
from limbeck.export.traced import (
    FolderRuntime,
    require_length,
    require_packages,
    write_traced,
)
from limbeck.models import CausalLM, PreTrainedTokenizerBase

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

    suffix = ".onnx"

    def __init__(self, *, max_kl: Annotated[float, Gt(0)] | None = None) -> None:
        """
        Args:
            max_kl: Mean KL to the student above which the file is refused, nats a token.
        """
        self.max_kl = MAX_KL if max_kl is None else max_kl

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
        example = torch.zeros((2, 8), dtype=torch.int64)
        sizes = {0: Dim.DYNAMIC(min=1, max=MAX_ROWS), 1: Dim.DYNAMIC(min=1, max=length)}
        inputs = {"input_ids": example, "attention_mask": example + 1}
        config = library.OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, sizes))
        exported = partial(library.OnnxExporter().export, config=config)
        write_traced("ONNX", student, tokenizer, path, inputs, exported, cleaned)
        version = importlib.import_module("onnxruntime").__version__
        return ExportedFile(
            path,
            length,
            weights=(path.with_name(f"{path.name}.data"),),
            facts={"quantize": "f32", "runtime": f"onnxruntime {version}"},
        )

    def run(self, file: ExportedFile) -> AbstractContextManager[FolderRuntime]:
        return nullcontext(FolderRuntime("ONNX Runtime", file.path, partial(session, file.path)))


def session(path: Path) -> Callable[[list[int]], Tensor]:
    """Logits of token ids by an ONNX file in ONNX Runtime, on the CPU."""
    library: Any = importlib.import_module("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    opened = library.InferenceSession(str(path), options, providers=[PROVIDER])

    def logits(token_ids: list[int]) -> Tensor:
        row = np.array([token_ids], dtype=np.int64)
        feed = {"input_ids": row, "attention_mask": np.ones_like(row)}
        return torch.from_numpy(opened.run(["logits"], feed)[0][0])

    return logits


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
