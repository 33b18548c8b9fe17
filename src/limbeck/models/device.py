"""Device and number format of a run."""

from __future__ import annotations

import torch

from limbeck.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Number formats by the names a recipe gives them."""


SIMULATED = "simulated"
"""Type of the device that stands for CUDA devices which are not here; see
`limbeck.distributed.simulated`."""


def choose_device(name: str) -> torch.device:
    """The device a recipe asks for.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the first of CUDA, MPS, CPU there is.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, usable in there.items() if usable), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or mps, got {name!r}.") from None
    missing = not there.get(device.type, device.type == "cpu")
    if not missing and device.type == "cuda" and device.index is not None:
        missing = device.index >= torch.cuda.device_count()
    if missing:
        raise ConfigError(
            f"device {name!r} must be usable by this machine's PyTorch ({torch.__version__}), "
            "but is not. Set device to auto or cpu, or install a PyTorch built for it."
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format a recipe asks for.

    Args:
        name: `float32`, `bfloat16`, `float16`, `float64`; `auto` takes bfloat16 on CUDA devices
            that have it, and float32 elsewhere.
    """
    if name == "auto":
        is_cuda = device.type == "cuda"
        fast = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast or device.type == SIMULATED else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}.")
    return DTYPES[name]
