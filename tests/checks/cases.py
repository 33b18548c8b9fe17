"""A tiny pair and its text, to prove things about."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from limbeck.batch import Batch
from limbeck.checks import Case
from limbeck.config import ObjectiveConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import CausalLM, Distiller
from limbeck.teachers.local import LocalTeacher
from limbeck.tokenizers import VocabularyProof
from tests.models.tiny import VOCABULARY, random_batch, tiny_model


class RandomRows:
    """Six rows of random tokens, about half of them scored."""

    num_rows = 6

    def __init__(self, vocabulary: int = VOCABULARY, *, weighted: bool = False) -> None:
        whole = random_batch(self.num_rows, 40, vocabulary)
        weights = torch.linspace(0, 2, 40).expand(whole.scored.shape) if weighted else None
        self._whole = replace(whole, weights=weights)

    def document_name(self, document: int) -> str:
        return f"document {document}"

    def batch(self, rows: Sequence[int]) -> Batch:
        some, whole = list(rows), self._whole
        return Batch(
            whole.input_ids[some],
            whole.target_ids[some],
            whole.scored[some],
            whole.position_ids[some],
            whole.document_ids[some],
            None if whole.weights is None else whole.weights[some],
        )


def tiny_case(
    *,
    family: str = "llama",
    student: CausalLM | None = None,
    teacher: CausalLM | None = None,
    vocabulary: int = VOCABULARY,
    **objective: object,
) -> Case:
    """A teacher of three layers, a student of two, and any objective."""
    teacher = tiny_model(family, 3, seed=1) if teacher is None else teacher
    student = tiny_model(family, 2, seed=2) if student is None else student
    shapes = PairShapes(
        student.num_layers,
        teacher.num_layers,
        student.width,
        teacher.width,
        LayerMap.uniform(student.num_layers, teacher.num_layers),
    )
    student.vocabulary_size = teacher.vocabulary_size = vocabulary
    recipe = ObjectiveConfig(**{"alpha": 0.7, "temperature": 2.0, **objective})
    distiller = Distiller(student, build_objective(recipe, shapes, head_budget_mb=64))
    proof = VocabularyProof(size=vocabulary, same_tokenizer=True, notes=())
    local, rows = LocalTeacher(teacher), RandomRows(vocabulary)
    # Of two random models on random text either may be the better one.
    return Case(distiller, recipe, local, teacher, rows, vocabulary - 1, proof, True)


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of a model's weights."""
    return [p.detach().clone() for p in model.parameters()]
