"""Initialisers of students, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from limbeck.layer_map import LayerMap
from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.prune.calibration import Text
from limbeck.registry import Registry


@dataclass(frozen=True)
class Origin:
    """The inputs of an initialiser.

    Attributes:
        teacher: None for a recorded teacher, which has no weights here.
        tokenizer: The teacher's.
        device: Device of the student.
        dtype: Of the weights. Use float32 for training: narrower types lose small updates.
        seed: Of random weights.
        text: Reads the calibration text; None without one.
        recorded: `TeacherInfo` of a recorded teacher, as JSON.
    """

    teacher: CausalLM | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype = torch.float32
    seed: int = 0
    text: Callable[[], Text] | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def teacher_layers(self) -> int | None:
        """Number of the teacher's layers; None if unknown."""
        return self.recorded.get("layers") if self.teacher is None else self.teacher.num_layers

    @property
    def teacher_family(self) -> str | None:
        """The teacher's model family; None if unknown."""
        return self.recorded.get("family") if self.teacher is None else self.teacher.family


@dataclass(frozen=True)
class InitialStudent:
    """A student before its first step.

    Attributes:
        model: In eval mode.
        tokenizer: Its tokenizer.
        layer_map: Pairs of student and teacher layers; no pairs if the teacher has fewer layers or
            their number is unknown.
        facts: Its origin and size, as JSON.
        kept: The teacher's channels, heads and units it kept, as JSON.
    """

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    layer_map: LayerMap
    facts: Mapping[str, Any]
    kept: Mapping[str, Any] = field(default_factory=dict)


initialisers: Registry[InitialStudent] = Registry("student", package="limbeck.students")


def spread(student: CausalLM, origin: Origin) -> LayerMap:
    """The uniform layer map, for a student that was not pruned from its teacher."""
    layers = origin.teacher_layers
    if layers is None or layers < student.num_layers:
        return LayerMap(())
    return LayerMap.uniform(student.num_layers, layers)
