"""A control: a teacher whose distributions belong to another row's text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.losses import TeacherSignal
from limbeck.teachers.base import Teacher, TeacherRequest, WrappingTeacher


class ShuffledTeacher(WrappingTeacher):
    """Reads, in place of each row of a step, the row before it; the first row's is the last.

    Its signals are as sharp and as varied as its teacher's, and say nothing about the text beside
    them. A student must not learn the text from it. Of several ranks each rolls its own rows.
    """

    def __init__(self, teacher: Teacher) -> None:
        """
        Args:
            teacher: Must be able to read any text.
        """
        super().__init__(teacher)
        self._step: Sequence[Batch] = ()
        self._place = 0

    def require(self, request: TeacherRequest) -> None:
        self._teacher.require(request)

    @property
    def works_ahead(self) -> bool:
        """Never: rows are exchanged within the step that was announced last."""
        return False

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Keep the micro-batches of the next step, whose rows are exchanged."""
        self._step, self._place = [batch.on_host for batch in batches], 0

    def signal(self, batch: Batch) -> TeacherSignal:
        """The teacher's signal on the rows before, at this batch's scored positions.

        Called once for each micro-batch of `prefetch`, in their order.

        Raises:
            ConfigError: The step has a single row of text on this rank.
        """
        place, self._place = self._place, self._place + 1
        assert self._step[place].input_ids.shape == batch.input_ids.shape, "another micro-batch"
        if sum(len(text_rows(each)) for each in self._step) == 1:
            raise ConfigError(
                "evaluate.controls: the shuffled teacher needs at least two rows in each step of a "
                "rank, and there is one. Raise optim.tokens_per_step."
            )
        return self._teacher.signal(rolled(self._step, place).to(batch.input_ids.device))


def rolled(step: Sequence[Batch], place: int) -> Batch:
    """A micro-batch with the tokens of the rows before its own, and its own scored positions.

    Args:
        step: All micro-batches of a step, in host memory.
        place: The micro-batch.
    """
    own = step[place]
    first = sum(len(text_rows(batch)) for batch in step[:place])
    rows = [(batch, row) for batch in step for row in text_rows(batch)]
    earlier = {row: rows[first + i - 1] for i, row in enumerate(text_rows(own))}
    before = [earlier.get(row, (own, row)) for row in range(len(own))]
    width = own.input_ids.shape[1]

    def taken(name: str, filler: int) -> Tensor:
        return torch.stack([fitted(vars(b)[name][row], width, filler) for b, row in before])

    positions = taken("position_ids", 0)
    for (batch, _), line in zip(before, positions, strict=True):
        missing = width - batch.input_ids.shape[1]
        if missing > 0:
            line[-missing:] = torch.arange(missing)  # padding is a segment of its own
    return Batch(
        input_ids=taken("input_ids", 0),
        target_ids=taken("target_ids", 0),
        scored=own.scored,
        position_ids=positions,
        document_ids=taken("document_ids", -1),
        weights=own.weights,
    )


def text_rows(batch: Batch) -> list[int]:
    """The rows that are not padding only, which a rank with fewer rows than another has."""
    has_text = (batch.document_ids >= 0).any(dim=1)
    return [row for row, has in enumerate(has_text.tolist()) if has]


def fitted(line: Tensor, width: int, filler: int) -> Tensor:
    """A row cut to a width, or padded to it."""
    return torch.nn.functional.pad(line[:width], (0, max(width - len(line), 0)), value=filler)
