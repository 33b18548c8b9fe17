"""Ordinary Hugging Face folders in 16 bits: half a student's size, for vLLM and other servers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from limbeck.export.base import ExportedFile, Exporter, exporters
from limbeck.export.traced import FolderRuntime, require_length
from limbeck.models import (
    CausalLM,
    ModelSource,
    PreTrainedTokenizerBase,
    load_models,
    save_student,
)

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MAX_KL = {"f32": 1e-4, "f16": 1e-3, "bf16": 0.02}
"""Mean KL to the student that a format may have, nats a token: all computed in that format, which
costs more than the weights alone."""


@exporters.register("safetensors")
class Safetensors(Exporter):
    """Weights, configuration, tokenizer and chat template as transformers saves them."""

    def __init__(
        self,
        *,
        quantize: Literal["f32", "f16", "bf16"] = "bf16",
        max_kl: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        """
        Args:
            quantize: Number format of weights and configuration.
            max_kl: Mean KL to the student above which the folder is refused, nats a token.
        """
        self._dtype = DTYPES[quantize]
        self._quantize = quantize
        self.suffix = f"-{quantize}.safetensors"
        self.max_kl = MAX_KL[quantize] if max_kl is None else max_kl

    def require(self) -> None:
        """Nothing that limbeck does not need itself."""

    def require_student(self, student: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        require_length(student)

    def export(
        self, student: CausalLM, tokenizer: PreTrainedTokenizerBase, path: Path
    ) -> ExportedFile:
        """Write the folder; its files have the names by which transformers finds them."""
        save_student(student, tokenizer, path.parent, dtype=self._dtype)
        files = sorted(path.parent.glob("*.safetensors"))
        index = path.parent / "model.safetensors.index.json"
        first, *others = [index, *files] if index.exists() else files
        facts = {"quantize": self._quantize, "runtime": f"transformers {version('transformers')}"}
        return ExportedFile(first, require_length(student), facts=facts, weights=tuple(others))

    def run(self, file: ExportedFile) -> AbstractContextManager[FolderRuntime]:
        load = partial(opened, file.path.parent, self._dtype)
        return nullcontext(FolderRuntime("transformers", file.path, load))


def opened(folder: Path, dtype: torch.dtype) -> Callable[[list[int]], Tensor]:
    """Logits of token ids by the model in a folder, computed in its format on the CPU."""
    source, place = ModelSource(str(folder)), torch.device("cpu")
    (model,), _ = load_models([source], device=place, dtype=dtype)

    def logits(token_ids: list[int]) -> Tensor:
        with torch.no_grad():
            return model.logits(torch.tensor([token_ids]))[0].float()

    return logits
