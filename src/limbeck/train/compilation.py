"""The models of a run, compiled where its recipe says so."""

from __future__ import annotations

from limbeck.models import compile_blocks, compiles, rounds_weights
from limbeck.teachers import find_local
from limbeck.train.setup import TrainSetup


def compile_models(setup: TrainSetup) -> None:
    """Compile the blocks of the student, and of a teacher that is here and not quantised.

    Raises:
        ConfigError: `memory.compile` is `true` and nothing can be compiled here.
    """
    distiller, memory = setup.distiller, setup.memory
    if not compiles(
        memory.compile,
        setup.world.device,
        memory.activation_checkpointing,
        reads_projections=bool(distiller.objective.student_projections),
        rounds_weights=rounds_weights(distiller.student),
    ):
        return
    compile_blocks(distiller.student)
    teacher = None if setup.teacher is None else find_local(setup.teacher)
    if teacher is not None and teacher.whole is None:
        compile_blocks(teacher.model)
