"""Models, data and tokenizer of a run, loaded and checked before the first step."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from limbeck.config import ObjectiveConfig, RunConfig
from limbeck.config.schedules import values_over
from limbeck.data import (
    BatchSource,
    HeldOut,
    TextData,
    held_out_configs,
    in_run_order,
    load_held_out,
    load_text,
    uses_template,
)
from limbeck.data.inputs import require_inputs
from limbeck.distributed import (
    World,
    broadcast_object,
    from_main,
    gather_objects,
    main_first,
    shard,
    together,
)
from limbeck.errors import ConfigError, DataError
from limbeck.experiment.batches import (
    batches,
    make_rollouts,
    prompt_notes,
    prompts_of,
    require_generation,
    require_same_ends,
)
from limbeck.experiment.opening import opening_worlds, whole_loads
from limbeck.experiment.text import data_notes, epochs_note, held_out_facts, with_steps
from limbeck.files import publish
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import (
    CausalLM,
    Distiller,
    ModelSource,
    PreTrainedTokenizerBase,
    choose_dtype,
    load_model,
    make_trainable,
    pack,
    reopened,
    rounds_weights,
    save_adapters,
    save_student,
    shared_model,
    trained_facts,
)
from limbeck.registry import type_of
from limbeck.rollouts import Prompts, Rollouts
from limbeck.students import InitialStudent, Origin, initialisers
from limbeck.teachers import (
    Teacher,
    TeacherRequest,
    TextWindows,
    find_local,
    require_likelihoods,
    require_local,
    teachers,
    windows_of,
)
from limbeck.tokenizers import VocabularyProof, prove_same_vocabulary

STUDENT_DTYPE = torch.float32
"""Format of the weights being trained, whatever format it computes in: they are cast for
computation only. In bfloat16 most updates would be smaller than the rounding of a weight."""


@dataclass
class Parts:
    """Models, tokenizer and data of a run.

    Attributes:
        config: The recipe, its epochs turned into steps.
        teacher: Frozen, and sharded where the student is.
        student: As initialised; None after `take_student`, unless it is quantised.
        held_out_sets: Held-out texts by name, the one that chooses first.
        prompts: Prompts of rollouts; None without `rollout`.
        facts: About models and texts, for provenance.json.
    """

    config: RunConfig
    world: World
    tokenizer: PreTrainedTokenizerBase
    vocabulary: VocabularyProof
    teacher: Teacher
    student: InitialStudent | None
    shapes: PairShapes
    data: TextData
    held_out_sets: Mapping[str, HeldOut]
    facts: dict[str, Any]
    prompts: Prompts | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def held_out(self) -> HeldOut | None:
        """The held-out text that chooses checkpoints; None without any."""
        return next(iter(self.held_out_sets.values()), None)

    @property
    def student_dtype(self) -> torch.dtype | None:
        """Format a finished student is rounded to; None where it stays as it was trained."""
        name = self.config.checkpoint.student_dtype
        return None if name == "float32" else choose_dtype(name, self.world.device)

    @property
    def is_shared(self) -> bool:
        """Whether the student's frozen weights are the teacher's, in memory once."""
        return is_shared(self.config)

    def take_student(self, saved: Path) -> CausalLM:
        """A student as initialised: from its files, or from memory once and then `saved`."""
        first = None if self.student is None else self.student.model
        if first is not None and first.weight_files is not None:
            return reopened(first, first.config, first.weight_files, STUDENT_DTYPE)
        if first is not None and rounds_weights(first):
            return copy.deepcopy(first)  # saved and read again, its weights would be rounded
        if first is not None:
            self.student = None
            return first
        if self.is_shared:
            model = shared_model(
                require_local(self.teacher, "student.type: a shared student").model
            )
        else:
            source = ModelSource(str(saved))
            model = load_model(source, device=self.world.device, dtype=STUDENT_DTYPE)
        model.vocabulary_size = self.vocabulary.size
        make_trainable(model, self.config.trainable, self.config.seed)
        return model

    def publish_student(
        self,
        student: CausalLM,
        folder: Path,
        weights: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Publish a student's folder, replacing an earlier one; adapters are in `adapter/` too."""
        lora, base = self.config.trainable.lora, base_of(self.config)

        def write(place: Path) -> None:
            save_student(student, self.tokenizer, place, weights=weights, dtype=dtype)
            if lora is not None and base is not None:
                save_adapters(student, lora, base, place / "adapter", weights)

        shutil.rmtree(folder, ignore_errors=True)
        publish(folder, write, {"kind": "student"})

    def rollouts(self, distiller: Distiller, folder: Path) -> Rollouts | None:
        """The rollouts of a trial; None without `rollout`."""
        rollout = self.config.rollout
        if self.prompts is None or rollout is None:
            return None
        model, root = distiller.student, cast(nn.Module, distiller)
        if rollout.writer == "teacher":
            model = root = require_local(self.teacher, "rollout.from: teacher").model
        return make_rollouts(
            self.config, self.data, self.prompts, model, root, folder, self.tokenizer
        )

    def source(self, rollouts: Rollouts | None) -> BatchSource:
        """The batches of each step of a trial; without rollouts, all of them are the text's."""
        return batches(self.config, self.data, self.tokenizer, rollouts)

    def distiller(self, student: CausalLM, objective: ObjectiveConfig) -> Distiller:
        """A student under an objective, spread over the ranks."""
        budget = self.config.memory.head_budget_mb
        # What terms own is drawn at random; every rank and every run of a seed must draw the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            built = build_objective(objective, self.shapes, head_budget_mb=budget)
        distiller = Distiller(student, built)
        built.to(self.world.device)
        if not self.is_shared:  # FSDP2 would make each of the two its own copy
            shard_student(distiller, self.config, self.world)
        return distiller


def gather_parts(config: RunConfig, world: World) -> Parts:
    """Load everything, and check that it fits together."""
    require_alone_if_shared(config, world)
    together(lambda: require_inputs(config), world, main_only=True)
    by_rows = opening_worlds(config, world)
    with main_first(world):
        teacher = teachers.bind(config.teacher, "teacher")(by_rows.teacher)
    require_generation(config, teacher)
    student = new_student(config, teacher, by_rows.student, world)
    with main_first(world):
        is_chat = any(map(uses_template, (config.data, *held_out_configs(config).values())))
    teacher.require(TeacherRequest(student_tokenizer=student.tokenizer, uses_template=is_chat))
    tokenizer = teacher.tokenizer
    vocabulary = prove_pair(student, teacher)
    require_same_ends(config, student.model, teacher)
    limit = shortest(teacher.info.max_positions, student.model.max_positions)
    with main_first(world):
        data = load_text(config.data, tokenizer, limit)
        held_out_sets = load_held_out(config, tokenizer, limit)
    epochs, config = config.optim.epochs, with_steps(config, data)
    for text in (data, *(each.data for each in held_out_sets.values())):
        require_known_tokens(text, vocabulary)
    shapes = shapes_of(student, teacher)
    request = request_of(config, shapes, vocabulary, data, held_out_sets)
    require_likelihoods(request.needs, teacher)
    teacher.require(request)
    if not is_shared(config):
        teacher.shard(world.for_teacher(config.parallel.teacher))
    prompts = prompts_of(config, data)
    return Parts(
        config=config,
        world=world,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        teacher=teacher,
        student=student,
        shapes=shapes,
        data=data,
        held_out_sets=held_out_sets,
        prompts=prompts,
        facts={
            "teacher": teacher.info.to_json(),
            "student": student.facts,
            "trained": trained_facts(student.model, config.trainable),
            "data": data.facts,
            **held_out_facts(held_out_sets),
        },
        notes=[
            *vocabulary.notes,
            *teacher.notes,
            *data_notes(config, data, held_out_sets),
            *([] if epochs is None else [epochs_note(epochs, config, data)]),
            *whole_loads(student, by_rows, world),
            *prompt_notes(prompts),
        ],
    )


def new_student(config: RunConfig, teacher: Teacher, opened: World, world: World) -> InitialStudent:
    """The student before its first step, the same on every rank; see `OpeningWorlds`."""
    with main_first(world):
        origin = origin_of(config, teacher, opened)
        student = initialisers.bind(config.student, "student")(origin)
        make_trainable(student.model, config.trainable, config.seed)
    student, lora = agreed(student, world), config.trainable.lora
    if lora is not None and lora.quantize is not None:
        dtype = choose_dtype(config.parallel.compute_dtype, world.device)
        pack(student.model, lora.quantize, world.device, dtype)
    return student


def origin_of(config: RunConfig, teacher: Teacher, world: World) -> Origin:
    """The inputs of the student's initialiser."""
    local = find_local(teacher)
    return Origin(
        local.model if local else None,
        teacher.tokenizer,
        world,
        STUDENT_DTYPE,
        config.seed,
        lambda: in_run_order(
            load_text(config.data, teacher.tokenizer, teacher.info.max_positions), config.seed
        ),
        teacher.info.to_json(),
    )


def agreed(student: InitialStudent, world: World) -> InitialStudent:
    """The student of rank 0 on every rank: measured choices and random weights may differ."""
    if world.size == 1:
        return student
    tensors = student.model.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for rank, others in enumerate(gather_objects(shapes, world)):
        if others != shapes:
            name = next(n for n in {**shapes, **others} if shapes.get(n) != others.get(n))
            raise ConfigError(
                f"student: every rank must make the same student, but {name} has shape "
                f"{others.get(name)} on rank {rank} and {shapes.get(name)} on rank {world.rank}. "
                "Make it once with `limbeck shrink`, and name its folder."
            )
    if student.model.weight_files is None:  # of those in files, `fill` compares the files
        from_main(tensors.values())
    pairs = broadcast_object(student.layer_map.pairs, world)
    return replace(student, layer_map=LayerMap(tuple((s, t) for s, t in pairs)))


def request_of(
    config: RunConfig,
    shapes: PairShapes,
    vocabulary: VocabularyProof,
    data: TextData,
    held_out_sets: Mapping[str, HeldOut],
) -> TeacherRequest:
    """Everything the teacher must provide in any step of the run."""
    with torch.random.fork_rng(devices=[]):
        objective = build_objective(config.objective, shapes, head_budget_mb=1)
    temperatures: tuple[float, ...] = ()
    if objective.needs.distribution:
        temperatures = values_over(config.objective.temperature, config.optim.num_steps)
    texts = [TextWindows("data", data, range(len(data.windows)))]
    texts += windows_of(held_out_sets)
    return TeacherRequest(
        needs=objective.needs,
        temperatures=temperatures,
        objective=objective,
        texts=tuple(texts),
        vocabulary_size=vocabulary.size,
        measured=bool(held_out_sets),
    )


def shard_student(distiller: Distiller, config: RunConfig, world: World) -> None:
    """Shard a student and its objective as the recipe's `parallel` says."""
    shard(
        distiller,
        distiller.student.blocks,
        world,
        compute_dtype=choose_dtype(config.parallel.compute_dtype, world.device),
        reduce_dtype=choose_dtype(config.parallel.reduce_dtype, world.device),
    )


def base_of(config: RunConfig) -> str | None:
    """The model whose weights a student with adapters keeps; None where peft could not open it."""
    kind = type_of(config.student)
    origin = {"pretrained": config.student, "shared": config.teacher, "copy": config.teacher}
    path: str | None = origin.get(kind, {}).get("path")
    return None if path is None or path.endswith(".gguf") else path


def is_shared(config: RunConfig) -> bool:
    """Whether a recipe's student shares the teacher's weights."""
    return type_of(config.student) == "shared"


def require_alone_if_shared(config: RunConfig, world: World) -> None:
    """Refuse several ranks for a student that shares its teacher's weights."""
    if is_shared(config) and world.size > 1:
        raise ConfigError(
            f"student.type: a shared student needs one process, and there are {world.size}: models "
            "are spread over ranks each by itself. Start limbeck without torchrun, or use type: "
            "copy."
        )


def prove_pair(student: InitialStudent, teacher: Teacher) -> VocabularyProof:
    """Prove that ids mean the same to both, and cut the student's head to the shared ids."""
    proof = prove_same_vocabulary(
        student.tokenizer,
        teacher.tokenizer,
        student_rows=student.model.vocabulary_rows,
        teacher_rows=teacher.info.vocabulary_rows,
    )
    student.model.vocabulary_size = proof.size
    return proof


def require_known_tokens(data: TextData, vocabulary: VocabularyProof) -> None:
    """Refuse text with a token that only one of the two models has."""
    largest = int(data.facts["largest_token_id"])
    if largest >= vocabulary.size:
        raise DataError(
            f"The text must use only tokens both models have, ids 0 to {vocabulary.size - 1}, but "
            f"{data.facts['path']} has token {largest}: a special token of one of them. Remove it "
            "from the text."
        )


def shortest(*limits: int | None) -> int | None:
    """The longest sequence within all of the limits; None when there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def shapes_of(student: InitialStudent, teacher: Teacher) -> PairShapes:
    """Layers and widths of the two models."""
    return PairShapes(
        student_layers=student.model.num_layers,
        teacher_layers=teacher.info.layers,
        student_width=student.model.width,
        teacher_width=teacher.info.width,
        layer_map=student.layer_map,
    )
