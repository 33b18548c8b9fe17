"""Evaluation suites: what is measured of a trained student, one suite a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.config import HeadBudget
from limbeck.data.held_out import HeldOut
from limbeck.distributed import World
from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.registry import Registry
from limbeck.teachers import Teacher


@dataclass(frozen=True)
class SuiteContext:
    """What a suite measures with."""

    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    held_out: HeldOut
    world: World
    head_budget_mb: HeadBudget = "auto"


class Suite(ABC):
    """One kind of measurement. It is made before training, so that it can refuse a recipe then."""

    @abstractmethod
    def measure(self, student: CausalLM) -> Mapping[str, Any]:
        """Figures of a student on the test documents, as JSON. Every rank calls it."""

    def measure_all(self, students: Mapping[str, CausalLM]) -> dict[str, Any]:
        """Figures of several students by name, or a comparison of them. Every rank calls it."""
        return {name: dict(self.measure(student)) for name, student in students.items()}


suites: Registry[Suite] = Registry("evaluation suite", package="limbeck.evaluate")
"""Factories `(context: SuiteContext, *, options) -> Suite`."""
