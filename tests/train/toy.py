"""A run small enough to repeat many times: two Llamas, ten rows, seconds."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from limbeck.batch import Batch
from limbeck.config import CheckpointConfig, MemoryConfig, ObjectiveConfig, OptimConfig
from limbeck.data.source import ShuffledRows
from limbeck.distributed import World, latest
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, TeacherSignal, build_objective
from limbeck.models import Distiller
from limbeck.teachers import LocalTeacher, Teacher, TeacherInfo, TeacherRequest
from limbeck.train import TrainSetup
from tests.models.tiny import tiny_llama

VOCABULARY, LENGTH = 37, 12
ALONE = World(0, 1, torch.device("cpu"))
EVERYTHING = ObjectiveConfig(
    alpha=0.7,
    temperature=2.0,
    extra=({"type": "hidden_state", "weight": 0.5, "layer_map": "uniform"},),
)


def toy_pair(
    config: ObjectiveConfig = EVERYTHING, tied: bool = False
) -> tuple[Distiller, LocalTeacher]:
    """A student of 2 layers and width 16, a teacher of 4 and 24, and what they are to agree on."""
    student = tiny_llama(2, 16, VOCABULARY, seed=1, tied=tied)
    teacher = tiny_llama(4, 24, VOCABULARY, seed=2)
    shapes = PairShapes(2, 4, 16, 24, LayerMap.uniform(2, 4))
    torch.manual_seed(3)
    objective = build_objective(config, shapes, head_budget_mb=1)
    return Distiller(student, objective), LocalTeacher(teacher, objective.needs)


class ToyBatches:
    """Ten rows of random tokens, each of another number of scored ones."""

    def __init__(self, num_rows: int = 10) -> None:
        generator = torch.Generator().manual_seed(5)
        self.num_rows = num_rows
        self._tokens = torch.randint(VOCABULARY, (num_rows, LENGTH + 1), generator=generator)
        self._scored = torch.rand(num_rows, LENGTH, generator=generator) < 0.6
        self._scored[:, 0] = True

    def batch(self, rows) -> Batch:
        ids = torch.tensor(list(rows) or [0])
        scored = self._scored[ids] & bool(rows)
        made = Batch.from_tokens(self._tokens[ids], scored)
        return replace(made, document_ids=ids[:, None].expand(len(ids), LENGTH))

    def document_name(self, document: int) -> str:
        return f"toy.jsonl:{document + 1}"


def toy_setup(folder: Path, **changes) -> TrainSetup:
    """24 steps of 3 rows, saved every 4; epochs end inside steps."""
    optim = {"steps": 24, "tokens_per_step": 3 * LENGTH, "weight_decay": 0.01, "warmup_steps": 2}
    optim |= {"learning_rate": 0.01, **changes.pop("optim", {})}
    checkpoint = {"every": 4, "keep": 2, **changes.pop("checkpoint", {})}
    distiller, teacher = changes.pop("pair", None) or toy_pair()
    rows = changes.pop("batches", ToyBatches())
    per_step = optim["tokens_per_step"] // LENGTH
    source = ShuffledRows(rows, seed=changes.pop("seed", 11), rows_per_step=per_step)
    given = {
        "distiller": distiller,
        "teacher": teacher,
        "source": source,
        "optim": OptimConfig(**optim),
        "learning_rate": 0.01,
        "checkpoint": CheckpointConfig(**checkpoint),
        "memory": MemoryConfig(micro_batch=2),
        "world": ALONE,
        "folder": folder,
        "sequence_length": LENGTH,
        "fingerprint": {"optim": {"steps": 24}},
    }
    return TrainSetup(**{**given, **changes})


class FakeTeacher(Teacher):
    """A teacher for tests that override `signal`, in front of a real one."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    @property
    def info(self) -> TeacherInfo:
        return self._teacher.info

    @property
    def tokenizer(self):
        return self._teacher.tokenizer

    def require(self, request: TeacherRequest) -> None:
        self._teacher.require(request)

    def signal(self, batch: Batch) -> TeacherSignal:
        return self._teacher.signal(batch)


class Listener:
    """A sink that calls a function with every record."""

    def __init__(self, hear) -> None:
        self._hear = hear

    def begin(self, step: int, steps: int) -> None:
        self._hear({"kind": "begin", "step": step})

    def write(self, record) -> None:
        self._hear(record)

    def close(self) -> None:
        pass


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint that one rank wrote."""
    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


def fingerprint(folder: Path) -> str:
    """One hash of all weights and all optimizer state at a run's end."""
    checkpoint = latest(folder / "checkpoints")
    assert checkpoint is not None
    seal = hashlib.sha256(checkpoint.name.encode())
    for name, value in sorted(tensors(checkpoint).items()):
        seal.update(name.encode())
        seal.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()
