"""A recipe planned for ranks and devices that are not here, without weights and without text."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from limbeck.checks import (
    RESERVED_BYTES,
    Fix,
    Hardware,
    Plan,
    cluster_plan,
    fits,
    passes_of_a_rank,
)
from limbeck.config import MemoryConfig, RunConfig
from limbeck.data import length_problems
from limbeck.distributed import StepFootprint, World, local, simulated_world
from limbeck.errors import ConfigError, RunError
from limbeck.experiment.loading import load
from limbeck.experiment.parts import (
    origin_of,
    prove_pair,
    shapes_of,
    shard_student,
    shortest,
)
from limbeck.experiment.repeats import num_students
from limbeck.losses import build_objective
from limbeck.models import CausalLM, Distiller, make_trainable
from limbeck.registry import type_of
from limbeck.students import initialisers, reads_teacher
from limbeck.teachers import Teacher, TeacherRequest, require_all_local, teachers
from limbeck.train import dry_run
from limbeck.train.micro_batch import choose_micro_batch, reduces_once


def plan_elsewhere(recipe: Path, overrides: Sequence[str], ranks: int, hardware: Hardware) -> Plan:
    """The plan of a recipe on a cluster, made in a process of its own.

    Simulated devices and process groups stay in a process until it ends.

    Raises:
        ConfigError: The recipe, or what it names, cannot be planned without weights.
        RunError: The process was killed.
    """
    # The shape of the recipe is checked before a process has imported everything once more.
    require_plannable(load(recipe, overrides))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(plan_here, recipe, overrides, ranks, hardware).result()
        except BrokenProcessPool as error:
            raise RunError(
                "The process that simulates the step ended without an answer. It needs about 1 GB "
                "of memory; look at its messages above, and start again."
            ) from error


def plan_here(recipe: Path, overrides: Sequence[str], ranks: int, hardware: Hardware) -> Plan:
    """The plan of a recipe on a cluster; this process can simulate nothing else afterwards."""
    config = load(recipe, overrides)
    parallel = config.parallel
    with simulated_world(ranks, parallel.shard, replicate=parallel.replicate) as world:
        pair = sketch(config, world)
        config = with_reduction(config, pair, world, hardware)
        micro_batch = micro_batch_of(pair, config, world, hardware)
        step = step_of(pair, config, world, micro_batch)
        plan = cluster_plan(
            pair.distiller,
            pair.teacher_models,
            config,
            step,
            hardware,
            ranks=ranks,
            micro_batch=micro_batch,
            students=num_students(config),
        )
        assert plan.cluster is not None, "a plan of a cluster"
        fixes = () if fits(step.peak_bytes, hardware) else fixes_for(plan, pair, config, world)
        return replace(plan, cluster=replace(plan.cluster, fixes=fixes))


def require_plannable(config: RunConfig) -> None:
    """Refuse recipes that cannot be planned without text and weights.

    Raises:
        ConfigError: Naming the option.
    """
    if config.optim.steps is None:
        raise ConfigError(
            "optim.steps must be given to plan for a cluster, because the text, which epochs are "
            f"counted in, is not read; got optim.epochs={config.optim.epochs}. Add optim.steps=N "
            "optim.epochs=null."
        )
    if config.trainable.lora is not None and config.trainable.lora.quantize is not None:
        raise ConfigError(
            "trainable.lora.quantize: a plan for a cluster reads no weights and cannot quantise "
            f"them, got {config.trainable.lora.quantize}. Add trainable.lora.quantize=null to plan "
            "the student in float32."
        )
    if config.optim.type == "adamw_8bit":
        raise ConfigError(
            "optim.type: adamw_8bit reads its tensors, and a plan for a cluster has none to read. "
            "Add optim.type=adamw: its optimizer state is four times as large."
        )
    if config.rollout is not None:
        raise ConfigError(
            "rollout: text written during the run is not planned for a cluster: its time and "
            "memory depend on what is written. Add rollout=null to plan the steps alone, and "
            "remove a term that needs it (sampled_reverse_kl)."
        )
    if reads_teacher(config.student):
        raise ConfigError(
            f"student.type: a {type_of(config.student)} student is measured on the teacher's "
            "weights, and a plan for a cluster reads none. Name a folder with the student's "
            "config.json: {type: pretrained, path: ...}."
        )


@dataclass(frozen=True)
class Pair:
    """Sharded models without numbers."""

    distiller: Distiller
    teacher: Teacher

    @property
    def teacher_models(self) -> tuple[CausalLM, ...]:
        """The teacher's model, or those of several."""
        return tuple(each.model for each in require_all_local(self.teacher, "check --plan"))


def sketch(config: RunConfig, world: World) -> Pair:
    """Student under its objective and teacher, as `gather_parts` puts them together.

    Raises:
        ConfigError: They do not go together.
    """
    place = world.for_teacher(config.parallel.teacher)
    teacher = teachers.bind(config.teacher, "teacher")(place)
    require_all_local(teacher, "check --plan")
    student = initialisers.bind(config.student, "student")(origin_of(config, teacher, world))
    make_trainable(student.model, config.trainable, config.seed)
    vocabulary = prove_pair(student, teacher)
    limit = shortest(teacher.info.max_positions, student.model.max_positions)
    for problem in length_problems(config.data, limit):
        raise ConfigError(problem)
    shapes = shapes_of(student, teacher)
    budget = config.memory.head_budget_mb
    distiller = Distiller(
        student.model, build_objective(config.objective, shapes, head_budget_mb=budget)
    )
    needs = distiller.objective.needs
    teacher.require(TeacherRequest(needs=needs, vocabulary_size=vocabulary.size))
    teacher.shard(place)
    shard_student(distiller, config, world)
    return Pair(distiller, teacher)


def micro_batch_of(pair: Pair, config: RunConfig, world: World, hardware: Hardware) -> int:
    """Rows of a micro-batch: the recipe's, or what `auto` takes where the models lie."""
    length = config.data.sequence_length
    models = (pair.distiller, *pair.teacher_models)
    tensors = (local(p) for model in models for p in model.parameters())
    held = sum(t.nbytes for t in tensors if t.device.type == world.device.type)
    return choose_micro_batch(
        config.memory,
        pair.distiller.student,
        world,
        sequence_length=length,
        most_rows=-(-config.optim.rows_per_step(length) // world.size),
        free_memory_bytes=hardware.memory_bytes - RESERVED_BYTES - held,
    )


def with_reduction(config: RunConfig, pair: Pair, world: World, hardware: Hardware) -> RunConfig:
    """The recipe with `memory.reduce_gradients` as `auto` decides it on these devices."""
    once = reduces_once(config.memory, pair.distiller, world, memory_bytes=hardware.memory_bytes)
    memory = replace(config.memory, reduce_gradients="step" if once else "micro_batch")
    return replace(config, memory=memory)


def step_of(pair: Pair, config: RunConfig, world: World, micro_batch: int) -> StepFootprint:
    """One simulated step."""
    rows = config.optim.rows_per_step(config.data.sequence_length)
    passes = passes_of_a_rank(rows, world.size, micro_batch)
    return dry_run(
        pair.distiller, pair.teacher, config, world, micro_batch=micro_batch, passes=passes
    )


def fixes_for(plan: Plan, pair: Pair, config: RunConfig, world: World) -> tuple[Fix, ...]:
    """Changes of the recipe, tried in turn until the step fits."""
    cluster = plan.cluster
    assert cluster is not None, "a plan of a cluster"
    tried: list[Fix] = []
    for overrides, memory in smaller(config.memory, plan.micro_batch):
        changed = replace(config, memory=memory)
        assert memory.micro_batch != "auto", "each way names its rows"
        step = step_of(pair, changed, world, memory.micro_batch)
        fix = Fix(overrides, step.peak_bytes, fits(step.peak_bytes, cluster.hardware))
        tried.append(fix)
        if fix.fits:
            return (fix,)
    if config.parallel.teacher == "offload":
        return tuple(tried[-1:])
    changed = replace(changed, parallel=replace(config.parallel, teacher="offload"))
    assert changed.memory.micro_batch != "auto", "as above"
    step = step_of(sketch(changed, world), changed, world, changed.memory.micro_batch)
    overrides = f"{tried[-1].overrides} parallel.teacher=offload"
    return (Fix(overrides, step.peak_bytes, fits(step.peak_bytes, cluster.hardware)),)


def smaller(memory: MemoryConfig, micro_batch: int) -> list[tuple[str, MemoryConfig]]:
    """Ways to need less memory, by rising cost, each with its overrides."""
    ways: list[tuple[str, MemoryConfig]] = []
    more = ""
    if memory.reduce_gradients == "step":
        more = " memory.reduce_gradients=micro_batch"
        memory = replace(memory, micro_batch=micro_batch, reduce_gradients="micro_batch")
        ways.append((f"memory.micro_batch={micro_batch}{more}", memory))
    checkpointed = replace(memory, micro_batch=micro_batch, activation_checkpointing="full")
    text = f"memory.micro_batch={micro_batch} memory.activation_checkpointing=full{more}"
    if memory.activation_checkpointing == "none":
        selective = replace(checkpointed, activation_checkpointing="selective")
        ways.append((text.replace("=full", "=selective"), selective))
    if memory.activation_checkpointing != "full":
        ways.append((text, checkpointed))
    single = f"memory.micro_batch=1 memory.activation_checkpointing=full{more}"
    if micro_batch > 1:
        ways.append((single, replace(checkpointed, micro_batch=1)))
    text = f"{single} memory.head_budget_mb=256"
    ways.append((text, replace(checkpointed, micro_batch=1, head_budget_mb=256)))
    return ways
