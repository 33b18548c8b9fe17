"""How a student's first weights are made, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.initialisers.calibration import Text
from limbeck.layers import LayerMap
from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.registry import Registry


@dataclass(frozen=True)
class Origin:
    """What a student may be made from.

    Attributes:
        teacher: None where only its recorded signals are there.
        tokenizer: The teacher's.
        device: Where the student is to live.
        dtype: Its number format; float32 trains, narrower ones lose small updates.
        seed: Of whatever is random.
        text: Reads the text on which the teacher's parts are weighed; None where there is none.
    """

    teacher: CausalLM | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype = torch.float32
    seed: int = 0
    text: Callable[[], Text] | None = None


@dataclass(frozen=True)
class InitialStudent:
    """A student before its first step.

    Attributes:
        model: In eval mode; its parameters are its own.
        tokenizer: Its tokenizer.
        layer_map: Which of its layers answers to which of the teacher's; no pairs where the
            teacher is not there, or has fewer layers.
        facts: Where it comes from; JSON.
        kept: What it kept of its teacher's insides, too long to be told with the facts; JSON.
    """

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    layer_map: LayerMap
    facts: Mapping[str, Any]
    kept: Mapping[str, Any] = field(default_factory=dict)


initialisers: Registry[InitialStudent] = Registry("student", package="limbeck.initialisers")


def spread(student: CausalLM, teacher: CausalLM | None) -> LayerMap:
    """The uniform layer map of a student that shares no layers with its teacher, if any."""
    if teacher is None or teacher.num_layers < student.num_layers:
        return LayerMap(())
    return LayerMap.uniform(student.num_layers, teacher.num_layers)
