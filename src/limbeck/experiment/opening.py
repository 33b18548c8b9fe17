"""Decides which models stay in their files until they are sharded, and which are loaded whole."""

from __future__ import annotations

from typing import NamedTuple

from limbeck.config import RunConfig
from limbeck.distributed import World
from limbeck.models import loading_notes
from limbeck.registry import type_of
from limbeck.students import InitialStudent, reads_teacher


class OpeningWorlds(NamedTuple):
    """The ranks for which teacher and student are opened: without a mesh, they are loaded whole."""

    teacher: World
    student: World
    notes: tuple[str, ...]
    """What is loaded whole because of the recipe, and what in the recipe avoids it."""


def opening_worlds(config: RunConfig, world: World) -> OpeningWorlds:
    """Whether teacher and student may stay in their files until they are sharded."""
    whole = world.unsharded
    teacher, student = world.for_teacher(config.parallel.teacher), world
    notes: list[str] = []
    trained = config.trainable
    if trained.lora is not None or trained.freeze or trained.quantize is not None:
        student = whole
        notes.append("student: every rank loads all of it, because trainable changes or hashes it.")
    kind = type_of(config.student)
    cut = kind in ("depth", "copy") and student is whole
    if (reads_teacher(config.student) or cut) and teacher.mesh is not None:
        teacher = whole
        notes.append(
            f"teacher: every rank loads all of it before it is sharded, because a {kind} student "
            "is made from its weights. Make the student once with limbeck shrink, and name its "
            "folder: {type: pretrained, path: ...}."
        )
    return OpeningWorlds(teacher, student, tuple(notes))


def whole_loads(student: InitialStudent, opened: OpeningWorlds, world: World) -> tuple[str, ...]:
    """Why several ranks have loaded the student whole, and how to avoid loading a model whole."""
    if world.size == 1:
        return ()
    return (*loading_notes("student", student.model), *opened.notes)
