"""A teacher for each source of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from limbeck.batch import Batch, sent
from limbeck.data.rows import stem
from limbeck.distributed import World
from limbeck.errors import ConfigError, DataError
from limbeck.losses import SignalPart, TeacherSignal
from limbeck.registry import Component
from limbeck.teachers.ahead import samples_of
from limbeck.teachers.base import Teacher, TeacherRequest, TextWindows
from limbeck.teachers.base import teachers as registry
from limbeck.teachers.several import SeveralTeachers
from limbeck.teachers.stored import window_of


class RoutedTeacher(SeveralTeachers):
    """Each window's signal is that of one member, chosen by the source of its document.

    Windows are recognised by content, as in a store, so packing, order and ranks may differ.
    """

    def __init__(self, members: Mapping[str, Teacher]) -> None:
        """
        Args:
            members: By source: as `data.columns.source` names it, or else a file of the data,
                without its suffix, or a folder it is in.
        """
        super().__init__(members)
        self._routes: dict[bytes, str] = {}
        self._simulated = False

    def require(self, request: TeacherRequest) -> None:
        """Find every window's teacher; the windows of each are required of it alone.

        Raises:
            ConfigError: As of any teacher, or text is generated during the run.
            DataError: A document has no teacher, or more than one.
        """
        if request.generated:
            raise ConfigError(
                "teacher.type: text that is generated during the run needs one teacher for all of "
                "it, and a routed teacher chooses by the source of a document. Use type: online or "
                "ensemble, or remove `rollout`."
            )
        super().require(request)

    def shard(self, world: World) -> None:
        self._simulated = world.simulated
        super().shard(world)

    def _requests(self, request: TeacherRequest) -> Mapping[str, TeacherRequest]:
        texts: dict[str, list[TextWindows]] = {name: [] for name in self._members}
        for text in request.texts:
            windows: dict[str, list[int]] = {name: [] for name in self._members}
            for window in text.windows:
                route = self._route(text, window)
                self._remember(text, window, route)
                windows[route].append(window)
            for name, own in windows.items():
                texts[name].append(replace(text, windows=own))
        return {name: replace(request, texts=tuple(own)) for name, own in texts.items()}

    def _remember(self, text: TextWindows, window: int, route: str) -> None:
        key = window_of(text.data, window).key
        if self._routes.setdefault(key, route) != route:
            raise DataError(
                f"{text.option}: a text must have one teacher, and that of "
                f"{document_of(text, window)} is also in a source of teacher "
                f"{self._routes[key]!r}. Remove it from one of them."
            )

    def _route(self, text: TextWindows, window: int) -> str:
        number = int(text.data.windows[window, 2])
        source, document = text.data.column_source(number), document_of(text, window)
        path = PurePosixPath(text.data.document_source(number))
        names = (*path.parts, stem(str(path))) if source is None else (source,)
        found = [name for name in self._members if name in names]
        if len(found) != 1:
            origin, after = f" of source {source!r}", "source"
            if source is None:
                origin, after = "", "file (without its suffix) or folder of the data"
            raise DataError(
                f"{text.option}: each document must have one teacher, and {document}{origin} has "
                f"{' and '.join(found) or 'none'}; teacher.teachers has {', '.join(self._members)}."
                f" Name each teacher after one {after}."
            )
        return found[0]

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Announce to every member the documents that it answers."""
        if not self._needs.distribution:
            return
        for batch in batches:
            routes = self._routes_at(batch)
            for name, member in self._members.items():
                mine = torch.from_numpy(routes == name)
                if len(mine.nonzero()):
                    member.prefetch([only(batch, mine)])

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """One part for each teacher that has a document in the batch.

        Raises:
            DataError: A text has no teacher, as text generated during the run.
        """
        if not self._needs.distribution:
            return TeacherSignal()
        if self._simulated:
            return self._simulated_signal(batch)
        routes = self._routes_at(batch)
        parts: list[SignalPart] = []
        for name, member in self._members.items():
            mine = torch.from_numpy(routes == name)
            # Every rank must enter every forward pass of sharded weights.
            if not len(mine.nonzero()) and not self._has_ranks and (parts or len(routes)):
                continue
            distribution = member.signal(only(batch, mine)).distribution
            assert distribution is not None
            positions = sent(mine.nonzero().squeeze(-1), batch.scored.device)
            parts.append(SignalPart(positions, distribution))
        if len(parts) == 1:
            return TeacherSignal.from_distribution(parts[0].distribution)
        return TeacherSignal(tuple(parts))

    def _simulated_signal(self, batch: Batch) -> TeacherSignal:
        """The largest member's signal, after all have read every row, at least as much as in a run.

        Simulated rows have no source. In a run every member reads the packed rows with one of its
        documents, and on several ranks at least one row.
        """
        *others, largest = sorted(
            self._members.values(), key=lambda member: member.info.parameters or 0
        )
        for member in others:
            member.signal(batch)
        return largest.signal(batch)

    def _routes_at(self, batch: Batch) -> np.ndarray:
        """The name of each scored position's teacher."""
        names, counts = [], []
        for sample in samples_of(batch):
            route = self._routes.get(sample.key)
            if route is None:
                raise DataError(
                    "A routed teacher knows the documents of `data` and of the held-out text only, "
                    f"and got another text, with {sample.num_scored:,} scored tokens. Use one "
                    "teacher for text that is generated during the run."
                )
            names.append(route)
            counts.append(sample.num_scored)
        return np.repeat(np.array(names, dtype=object), np.array(counts, dtype=np.int64))


def document_of(text: TextWindows, window: int) -> str:
    """Where a window's document comes from, as `file:line`."""
    return text.data.document_name(int(text.data.windows[window, 2]))


def only(batch: Batch, chosen_positions: Bool[Tensor, " N"]) -> Batch:
    """The rows with one of these scored positions, or the first; nothing else is scored."""
    host = batch.on_host
    scored = torch.zeros_like(host.scored)
    scored[host.scored] = chosen_positions
    chosen: Int[Tensor, " b"] = scored.any(-1).nonzero().squeeze(-1)
    rows = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64)
    kept = Batch(
        host.input_ids[rows],
        host.target_ids[rows],
        scored[rows],
        host.position_ids[rows],
        host.document_ids[rows],
    )
    return kept.to(batch.scored.device)


@registry.register("routed")
def routed(
    world: World,
    *,
    teachers: dict[str, Component],
) -> RoutedTeacher:
    """Each document learns from the teacher of its source: of a column, a file or a folder.

    Args:
        teachers: Teachers by name: a value of the column that `data.columns.source` names, or the
            name of a data file without its suffix, or of a folder.
    """
    if not teachers:
        raise ConfigError("teacher.teachers: must name at least one teacher, got none.")
    members = {
        name: registry.bind(spec, f"teacher.teachers.{name}")(world)
        for name, spec in teachers.items()
    }
    return RoutedTeacher(members)
