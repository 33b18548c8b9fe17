"""Where a teacher's signal comes from, one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.batch import Batch
from limbeck.losses import SignalNeeds, TeacherSignal
from limbeck.models import CausalLM
from limbeck.registry import Registry


@dataclass(frozen=True)
class Place:
    """Where a teacher is to live.

    Attributes:
        device: Computes there, and its signals lie there.
    """

    device: torch.device


class Teacher(ABC):
    """A source of signals. It is asked once per micro-batch, before the student's forward pass."""

    @property
    @abstractmethod
    def model(self) -> CausalLM | None:
        """The model behind it; None where it only repeats what a model once said."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What a report says of it; JSON."""

    @abstractmethod
    def ask(self, needs: SignalNeeds) -> None:
        """Agree, before the first step, on what every signal must hold.

        Raises:
            ConfigError: This teacher cannot give it.
        """

    @abstractmethod
    def signal(self, batch: Batch) -> TeacherSignal:
        """What the teacher says about a batch; it holds all that was asked for."""


teachers: Registry[Teacher] = Registry("teacher", package="limbeck.teachers")
