"""Recording the teacher and text of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from limbeck.config import RecordConfig, RunConfig
from limbeck.data import load_held_out, load_text
from limbeck.distributed import World, gather_objects, main_first, together, world
from limbeck.errors import ConfigError
from limbeck.files import files_under
from limbeck.heap import freed_memory_kept
from limbeck.losses import SignalNeeds
from limbeck.models import choose_device
from limbeck.recording.budget import Budget, make_budget, require_room
from limbeck.recording.plan import ShardPlan, own_shards, plan_shards
from limbeck.recording.progress import RecordingProgress
from limbeck.recording.record import Recorder, row_of
from limbeck.registry import type_of
from limbeck.store import (
    StoreHeader,
    generator_of,
    require_store_or_new,
    shard_name,
    written_out,
)
from limbeck.teachers import (
    Teacher,
    TeacherRequest,
    TextWindows,
    find_local,
    require_local,
    teachers,
    windows_of,
)
from limbeck.teachers.served import ServedTeacher
from limbeck.tokenizers import prove_same_vocabulary, template_hash, tokenizer_hash


@dataclass(frozen=True)
class Recorded:
    """The result of a recording process.

    Attributes:
        shards: Shards of the complete store.
        recorded: Shards that its ranks recorded now.
        left: Shards of the complete store that are not there.
        scored: Scored positions of the complete store.
    """

    store: Path
    shards: int
    recorded: int
    left: int
    scored: int


class Recording:
    """A recipe's recording; use it as a context manager."""

    def __init__(self, config: RunConfig) -> None:
        """
        Args:
            config: With a `record` section and a teacher that is online or served.

        Raises:
            ConfigError: One of them is missing, teacher and text do not fit together, or the
                output folder has other contents.
            DataError: The text cannot be used.
        """
        self.config = config
        self.settings = settings_of(config)
        require_store_or_new(self.settings.output)
        with ExitStack() as stack:
            parallel = config.parallel
            self.world = stack.enter_context(
                world(
                    choose_device(config.device),
                    parallel.shard,
                    timeout_s=parallel.timeout_s,
                    replicate=parallel.replicate,
                )
            )
            self._gather()
            self._stack = stack.pop_all()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _gather(self) -> None:
        config = self.config
        place = place_of_teacher(config, self.world)
        with main_first(self.world):
            teacher = teachers.bind(config.teacher, "teacher")(place)
        teacher.shard(place)
        is_one = isinstance(teacher, ServedTeacher)  # here or in a server, but one model
        self.teacher: Teacher = teacher if is_one else require_local(teacher, "record")
        tokenizer = self.tokenizer = teacher.tokenizer
        rows = teacher.info.vocabulary_rows
        proof = prove_same_vocabulary(tokenizer, tokenizer, student_rows=rows, teacher_rows=rows)
        require_layers(self.settings.layers, teacher.info.layers)
        needs = SignalNeeds(distribution=True, layers=frozenset(self.settings.layers))
        teacher.require(TeacherRequest(needs=needs, vocabulary_size=proof.size))
        self.plan: ShardPlan = self._plan(teacher.info.max_positions)
        self.header = StoreHeader(
            form=written_out(self.settings.form),
            vocabulary_size=proof.size,
            num_shards=len(self.plan.shards),
            teacher=teacher.info.to_json(),
            tokenizer=tokenizer_hash(tokenizer),
            template=template_hash(tokenizer),
            data=self.plan.data_hash,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
            layers=self.settings.layers,
            limbeck=version("limbeck"),
        )
        self._require_form()

    def _require_form(self) -> None:
        """Refuse, before anything is written, a form that the teacher gives too little for."""
        form, nothing = self.header.make_form(), slice(0, 0)
        if find_local(self.teacher) is None:
            place = self.plan.shards[0][0]
            batch = row_of([self.plan.sample(place)]).to(self.world.device)
            distribution = self.teacher.signal(batch).distribution
            assert distribution is not None, "the recording requires distributions"
            form.read_teacher(distribution.rows(nothing), generator_of(0, b""))

    def _plan(self, limit: int | None) -> ShardPlan:
        """Every training window, and the held-out windows that a run evaluates."""
        config = self.config
        with main_first(self.world):
            data = load_text(config.data, self.tokenizer, limit)
            texts = [TextWindows("data", data, range(len(data.windows)))]
            texts += windows_of(load_held_out(config, self.tokenizer, limit))
        return plan_shards(texts, self.settings.shard_tokens)

    def budget(self) -> Budget:
        """Size and error of this form and of others, measured on a few windows; on every rank.

        Raises:
            ConfigError: The teacher's model is not in this process.
        """
        model = require_local(self.teacher, "record: a budget").model
        return make_budget(
            model, self.plan, self.header.form, self.settings.layers, self.settings.output
        )

    @property
    def has_budget(self) -> bool:
        """Whether forms can be compared: that takes the teacher's whole distributions."""
        return find_local(self.teacher) is not None

    def record(
        self, part: tuple[int, int], budget: Budget | None, check: Callable[[], None]
    ) -> Recorded:
        """Record the missing shards of a part; every rank calls it, and takes a share of them.

        Args:
            part: 0-based number of the part, and number of parts.
            budget: For the check of free disk space; no check without it.
            check: Called by every rank between the teacher's passes; raises on all to stop.

        Raises:
            DataError: The folder holds another store.
            StorageError: The disk has too little space.
        """
        recorder = Recorder(self.teacher, self.plan, self.header, self.settings.output, self.world)
        number, parts = part
        rank, size = self.world.rank, self.world.size
        mine = own_shards(len(self.plan.shards), (number * size + rank, parts * size))

        def begin() -> None:
            if budget is not None:
                share = len(mine) / len(self.plan.shards)
                require_room(budget, self.settings.output, share, self._bytes_of(mine))
            recorder.begin(self.tokenizer)

        self.teacher.restore()  # the head of a sharded teacher is gathered once, for all passes
        together(begin, self.world)
        left = recorder.left(mine)
        to_read = sum(place.positions for shard in left for place in self.plan.shards[shard])
        console = Console(stderr=True, quiet=not self.world.is_main)
        progress = RecordingProgress(console, sum(gather_objects(to_read, self.world)))
        try:
            with freed_memory_kept(self.world.device):
                recorder.record(left, progress, check)
        finally:
            progress.close()
        self.teacher.release()
        everything = recorder.left(range(len(self.plan.shards)))
        return Recorded(
            self.settings.output,
            len(self.plan.shards),
            sum(gather_objects(len(left), self.world)),
            len(everything),
            self.plan.num_scored,
        )

    def _bytes_of(self, shards: Sequence[int]) -> int:
        """Bytes of the existing ones among the shards."""
        folders = [self.settings.output / shard_name(shard) for shard in shards]
        return sum(p.lstat().st_size for f in folders if f.exists() for p in files_under(f))


def settings_of(config: RunConfig) -> RecordConfig:
    """The `record` section of a recipe."""
    if config.record is None:
        raise ConfigError(
            "record: the recipe must have this section, with the folder and the form of the store. "
            "Add record: {form: {type: top_k, k: 32}, output: stores/x}."
        )
    if type_of(config.teacher) == "stored":
        raise ConfigError(
            "teacher: a recording needs a model, got {type: stored}. Name the model: "
            "teacher='{type: online, path: ...}'."
        )
    return config.record


def place_of_teacher(config: RunConfig, world: World) -> World:
    """The ranks over which the teacher is sharded; without a mesh each has all of it."""
    parallel = config.parallel
    alone = world.size == 1 and parallel.shard != "always" and parallel.teacher != "offload"
    whole = alone or parallel.shard == "none"
    return world.unsharded if whole else world.for_teacher(parallel.teacher)


def require_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Refuse layers the teacher does not have."""
    if absent := [layer for layer in layers if layer >= num_layers]:
        raise ConfigError(
            f"record.layers must be layers of the teacher, 0 to {num_layers - 1}, got {absent}. "
            "Leave them out."
        )
