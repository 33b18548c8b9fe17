"""Initialisers of students."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import (
    CausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    copied_model,
    reopened,
)
from limbeck.prune.calibration import CalibrationText
from limbeck.registry import Component, Registry, type_of


@dataclass(frozen=True)
class Origin:
    """The inputs of an initialiser.

    Attributes:
        teacher: None for a recorded teacher, which has no weights here.
        world: Ranks the student will be sharded over. Without a mesh its weights are loaded; with
            one they may stay in their files until it is sharded.
        dtype: Of the weights. Use float32 for training: narrower types lose small updates.
        text: Reads the calibration text; None without one.
        recorded: `TeacherInfo` of a recorded teacher, as JSON.
    """

    teacher: CausalLM | None
    tokenizer: PreTrainedTokenizerBase
    world: World
    dtype: torch.dtype = torch.float32
    seed: int = 0
    text: Callable[[], CalibrationText] | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the student."""
        return self.world.device

    def require_teacher(self, student: str, remedy: str) -> CausalLM:
        """The teacher's model, from which a kind of student is made."""
        if self.teacher is None:
            raise ConfigError(
                f"{student} is made from the teacher's model, and a recorded teacher has none "
                f"here. {remedy}"
            )
        return self.teacher

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


def reads_teacher(student: Component) -> bool:
    """Whether a student is made from the teacher's weights, and not from its files or its shape."""
    if type_of(student) == "depth":
        named = student.get("layers") is not None or student.get("drop") is not None
        return not named and student.get("by") != "even"
    return type_of(student) not in ("pretrained", "random", "copy")


def made_of(
    teacher: CausalLM, config: PreTrainedConfig, names: Mapping[str, str], origin: Origin
) -> CausalLM:
    """A model of its own with some of a teacher's weights, copied or still in the teacher's files.

    Args:
        names: Each name in the model's state dict with the teacher's name for it.
    """
    if teacher.weight_files is not None:
        files = teacher.weight_files.renamed(names)
        # Copied weights have had the teacher's data type; these shall be the same.
        files = replace(files, rounded_to=teacher.hf_model.dtype)
        return reopened(teacher, config, files, origin.dtype)
    state = teacher.hf_model.state_dict()
    weights = {new: state[old] for new, old in names.items()}
    model = copied_model(config, weights, device=origin.device, dtype=origin.dtype)
    model.end_like(teacher)
    model.vocabulary_size = teacher.vocabulary_size
    return model


def uniform_map(student: CausalLM, origin: Origin) -> LayerMap:
    """The uniform layer map, for a student that was not pruned from its teacher."""
    layers = origin.teacher_layers
    if layers is None or layers < student.num_layers:
        return LayerMap(())
    return LayerMap.uniform(student.num_layers, layers)
