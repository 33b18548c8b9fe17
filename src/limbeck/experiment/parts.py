"""What a run is made of, loaded and proven before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.config import DataConfig, ObjectiveConfig, RunConfig
from limbeck.data import TextData, load_data, overlap
from limbeck.data.held_out import HeldOut
from limbeck.distributed import World, barrier, shard
from limbeck.errors import ConfigError, DataError
from limbeck.experiment.store_guards import (
    recorded_tokenizer,
    require_covered,
    require_recorded_for,
    require_served,
)
from limbeck.files import publish
from limbeck.losses import PairShapes, build_objective
from limbeck.models import (
    CausalLM,
    Distiller,
    ModelSource,
    PreTrainedTokenizerBase,
    cache_folder,
    choose_dtype,
    load_model,
    make_trainable,
    save_student,
    shared_model,
    trained_facts,
)
from limbeck.registry import type_of
from limbeck.students import InitialStudent, Origin, initialisers
from limbeck.teachers import Place, Teacher, teachers
from limbeck.teachers.stored import StoredTeacher
from limbeck.tokenizers import VocabularyProof, load_tokenizer, prove_same_vocabulary

STUDENT_DTYPE = torch.float32
"""Format of the weights being trained, wherever the computation may be less: sharded, FSDP2
computes in bfloat16 on a GPU and keeps these. A bfloat16 weight would swallow most steps of the
size that distillation takes."""


@dataclass
class Parts:
    """Models, tokenizer and data of a run.

    Attributes:
        config: The recipe.
        world: This process among all.
        tokenizer: Of teacher and student, proven to be one.
        vocabulary: The proof.
        teacher: Frozen, and sharded where the student is.
        student: As initialised; whoever trains it takes it away (`take_student`).
        shapes: What terms must know of the two models.
        data: Training text.
        held_out: Held-out text, if the recipe names any.
        notes: What a user should hear, though nothing is wrong.
    """

    config: RunConfig
    world: World
    tokenizer: PreTrainedTokenizerBase
    vocabulary: VocabularyProof
    teacher: Teacher
    student: InitialStudent | None
    shapes: PairShapes
    data: TextData
    held_out: HeldOut | None
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def is_shared(self) -> bool:
        """Whether the student's frozen weights are the teacher's, in memory once."""
        return is_shared(self.config)

    def take_student(self, saved: Path) -> CausalLM:
        """A student as initialised: the one in memory the first time, then the one saved."""
        if self.student is not None:
            model, self.student = self.student.model, None
            return model
        if self.is_shared:
            assert self.teacher.model is not None, "there was one to share the weights of"
            model = shared_model(self.teacher.model)
        else:
            source = ModelSource(str(saved))
            model = load_model(source, device=self.world.device, dtype=STUDENT_DTYPE)
        model.vocabulary_size = self.vocabulary.size
        make_trainable(model, self.config.trainable, self.config.seed)
        return model

    def publish_student(
        self, student: CausalLM, folder: Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """A student's folder, whole or not there; one of an earlier life is replaced."""
        shutil.rmtree(folder, ignore_errors=True)
        publish(
            folder,
            lambda place: save_student(student, self.tokenizer, place, weights=weights),
            {"kind": "student"},
        )

    def distiller(self, student: CausalLM, objective: ObjectiveConfig) -> Distiller:
        """A student under an objective, spread over the ranks."""
        budget = self.config.memory.head_budget_mb
        # What terms own is drawn at random; every rank and every run of a seed must draw the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            built = build_objective(objective, self.shapes, head_budget_mb=budget)
        distiller = Distiller(student, built)
        distiller.to(self.world.device)
        if not self.is_shared:  # FSDP2 would make each of the two its own copy
            compute = choose_dtype("auto", self.world.device)
            shard(distiller, student.blocks, self.world, compute_dtype=compute)
        return distiller


def gather_parts(config: RunConfig, world: World) -> Parts:
    """Load everything, and prove that it belongs together.

    Raises:
        ConfigError: Teacher, student and data do not go together; each reason says which.
        DataError: The text cannot be used.
    """
    require_alone_if_shared(config, world)
    with main_first(world):
        teacher = teachers.bind(config.teacher, "teacher")(Place(world.device))
        tokenizer = teacher_tokenizer(config, teacher)
    cache = cache_folder() / "data"
    origin = Origin(
        teacher.model,
        tokenizer,
        world.device,
        STUDENT_DTYPE,
        config.seed,
        lambda: load_data(
            config.data, tokenizer, cache=cache, max_positions=shortest(teacher.model)
        ),
        teacher.facts,
    )
    with main_first(world):
        student = initialisers.bind(config.student, "student")(origin)
        make_trainable(student.model, config.trainable, config.seed)
    if isinstance(teacher, StoredTeacher):
        require_recorded_for(teacher.store, tokenizer, student, config)
    vocabulary = prove_pair(student, teacher, tokenizer)
    limit = shortest(teacher.model, student.model)
    with main_first(world):
        data = load_data(config.data, tokenizer, cache=cache, max_positions=limit)
        held_out = None
        if config.evaluate.data is not None:
            held = held_out_config(config, config.evaluate.data)
            held_out = HeldOut(
                load_data(held, tokenizer, cache=cache, max_positions=limit), config.evaluate
            )
    notes = [*vocabulary.notes, *data_notes(data, held_out)]
    for text in [data, *([held_out.data] if held_out else [])]:
        require_known_tokens(text, vocabulary)
    if isinstance(teacher, StoredTeacher):
        require_covered(teacher.store, data, held_out, vocabulary)
    shapes = shapes_of(student, teacher)
    if isinstance(teacher, StoredTeacher):
        require_served(teacher, config, shapes, data)
    if teacher.model is not None and not is_shared(config):
        # No other format than its own, which the recipe may have named.
        shard(teacher.model, teacher.model.blocks, world)
    facts = {
        "teacher": teacher.facts,
        "student": student.facts,
        "trained": trained_facts(student.model, config.trainable),
        "data": data.facts,
        "held_out": held_out.data.facts if held_out else None,
    }
    return Parts(
        config, world, tokenizer, vocabulary, teacher, student, shapes, data, held_out, facts, notes
    )


def is_shared(config: RunConfig) -> bool:
    """Whether a recipe's student shares the teacher's weights."""
    return type_of(config.student) == "shared"


def require_alone_if_shared(config: RunConfig, world: World) -> None:
    """Refuse to spread a student that has its teacher's weights.

    Raises:
        ConfigError: There are several processes.
    """
    if is_shared(config) and world.size > 1:
        raise ConfigError(
            f"student.type: a shared student needs one process, and there are {world.size}: models "
            "are spread over ranks each by itself. Start limbeck without torchrun, or use type: "
            "copy."
        )


def teacher_tokenizer(config: RunConfig, teacher: Teacher) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer; a store has its own copy of it."""
    if isinstance(teacher, StoredTeacher):
        return recorded_tokenizer(teacher.store)
    return load_tokenizer(
        str(config.teacher["path"]),
        revision=config.teacher.get("revision"),
        trust_remote_code=bool(config.teacher.get("trust_remote_code", False)),
    )


def prove_pair(
    student: InitialStudent, teacher: Teacher, tokenizer: PreTrainedTokenizerBase
) -> VocabularyProof:
    """Prove that ids mean the same to both, and cut both heads to the ids that mean something."""
    proof = prove_same_vocabulary(
        student.tokenizer,
        tokenizer,
        student_rows=student.model.vocabulary_rows,
        teacher_rows=int(teacher.facts["vocabulary_rows"]),
    )
    student.model.vocabulary_size = proof.size
    if teacher.model:
        teacher.model.vocabulary_size = proof.size
    return proof


def data_notes(data: TextData, held_out: HeldOut | None) -> Iterator[str]:
    """What a user should hear of the text."""
    facts = data.facts
    if fell := [f"{count:,} {reason}" for reason, count in facts["dropped"].items() if count]:
        yield f"Of {facts['documents']:,} training documents fell out: {', '.join(fell)}."
    if facts["duplicates"]:
        yield f"{facts['duplicates']:,} training documents stand there more than once."
    if held_out is not None and (shared := overlap(data, held_out.data)):
        yield f"{shared} held-out documents also stand in the training text."


def require_known_tokens(data: TextData, vocabulary: VocabularyProof) -> None:
    """Refuse text with a token that only one of the two models has.

    Raises:
        DataError: There is one.
    """
    largest = int(data.facts["largest_token_id"])
    if largest >= vocabulary.size:
        raise DataError(
            f"The text must use only tokens both models have, ids 0 to {vocabulary.size - 1}, but "
            f"{data.facts['path']} has token {largest}: a special token of one of them. Remove it "
            "from the text."
        )


def held_out_config(config: RunConfig, path: str) -> DataConfig:
    """Held-out text read as the training text is, one window a row so that documents stay apart."""
    return replace(
        config.data,
        path=path,
        split=config.evaluate.split,
        max_documents=config.evaluate.max_documents,
        pack=False,
    )


def shortest(*models: CausalLM | None) -> int | None:
    """The longest sequence that every one of the models was made for."""
    limits = [m.max_positions for m in models if m is not None and m.max_positions is not None]
    return min(limits, default=None)


def shapes_of(student: InitialStudent, teacher: Teacher) -> PairShapes:
    """What terms must know of the two models."""
    return PairShapes(
        student_layers=student.model.num_layers,
        teacher_layers=int(teacher.facts["layers"]),
        student_width=student.model.width,
        teacher_width=int(teacher.facts["width"]),
        layer_map=student.layer_map,
    )


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Rank 0 does it while the others wait, then they do: one download, one conversion."""
    if not world.is_main:
        barrier()
    yield
    if world.is_main:
        barrier()
