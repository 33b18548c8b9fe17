"""How much each input channel of a matrix matters to its quantisation: an importance matrix.

llama.cpp's quantisers weigh the error of a weight by the mean square of the activation it is
multiplied with (Gerganov, "Importance matrix calculation", llama.cpp#4861, 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from limbeck.models import CausalLM, evaluating
from limbeck.models.modes import hooked

Importance = Mapping[str, Float32[np.ndarray, " D"]]
"""Mean square of each input channel, by the name of a matrix in the model."""


def importance_of(student: CausalLM, windows: Sequence[Sequence[int]]) -> Importance:
    """Mean square of every input channel of the blocks' linear layers.

    Embedding and head have none, as in llama.cpp.

    Args:
        windows: Token ids of calibration text, which must not be the held-out text.
    """
    matrices = [
        name
        for name, module in student.hf_model.named_modules()
        if name.startswith(f"{student.blocks_name}.") and has_matrix(module)
    ]
    sums: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, inputs: Any, _output: Any) -> None:
            total = inputs[0].detach().flatten(0, -2).double().square().sum(0)
            sums[name] = sums.get(name, 0) + total

        return hook

    hooks = ((student.hf_model.get_submodule(name), adding(name)) for name in matrices)
    with torch.no_grad(), evaluating(student), hooked(hooks):
        for window in windows:
            student.decoder(input_ids=torch.tensor([list(window)]), use_cache=False)
    positions = sum(map(len, windows))
    return {f"{n}.weight": (total / positions).float().numpy() for n, total in sums.items()}


def has_matrix(module: torch.nn.Module) -> bool:
    """Whether a module multiplies with a matrix of its own."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].ndim == 2
