"""The answers of a recipe's teacher to the prompts of its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from limbeck.config import RunConfig, WriteConfig, to_plain
from limbeck.data import AskedPrompts, ask
from limbeck.data.detect import SOURCE, WEIGHT
from limbeck.data.formats import Encoder
from limbeck.distributed import world
from limbeck.errors import ConfigError, DataError
from limbeck.files import sha256
from limbeck.models import choose_device
from limbeck.progress import ProgressBar
from limbeck.registry import Problem
from limbeck.rollouts import Rollout, Sampling, seed_of
from limbeck.teachers import TeacherInfo, TeacherRequest, teachers
from limbeck.tokenizers import prove_same_vocabulary, template_hash, tokenizer_hash
from limbeck.writing.answers import Answer, text_of
from limbeck.writing.filters import AnswerFilters
from limbeck.writing.journal import FileProgress, Journal, opened
from limbeck.writing.writers import Job, writer_of

SORTED_BATCHES = 32
"""Batches whose prompts are sorted by length together: a batch is padded to its longest prompt."""


@dataclass(frozen=True)
class Summary:
    """What a file of answers holds, and what was left out.

    Attributes:
        kind: Data type of its rows.
        prompts: That were answered.
        left_out: Rows of the data without a usable prompt, by reason.
    """

    output: Path
    kind: str
    prompts: int
    answers: int
    left_out: Mapping[str, int]
    progress: FileProgress

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "output": str(self.output), "progress": asdict(self.progress)}


class Writing:
    """A recipe's teacher and prompts; use it as a context manager."""

    def __init__(self, config: RunConfig) -> None:
        """
        Args:
            config: With a `write` section and a teacher that is online or served.

        Raises:
            ConfigError: One of them is missing, or they do not fit together.
            DataError: The data has no usable prompt.
        """
        self._config, self._settings = config, settings_of(config)
        self._sampling = Sampling(
            tokens=self._settings.tokens,
            sampling_temperature=self._settings.sampling_temperature,
            top_p=self._settings.top_p,
        )
        with ExitStack() as stack:
            place = stack.enter_context(world(choose_device(config.device), "none"))
            if place.size > 1:
                raise ConfigError(
                    f"limbeck write needs one process, and there are {place.size}. Start it "
                    "without torchrun; a teacher too large for one device writes from a server."
                )
            self._teacher = teachers.bind(config.teacher, "teacher")(place)
            self._gather()
            self._stack = stack.pop_all()

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _gather(self) -> None:
        teacher, settings = self._teacher, self._settings
        self._writer = writer_of(teacher, self._sampling)
        tokenizer, rows = teacher.tokenizer, teacher.info.vocabulary_rows
        proof = prove_same_vocabulary(tokenizer, tokenizer, student_rows=rows, teacher_rows=rows)
        teacher.require(TeacherRequest(vocabulary_size=proof.size))
        limit = min(self._config.data.sequence_length, teacher.info.max_positions or 1 << 62)
        longest = limit - settings.tokens
        self._asked = ask(
            self._config.data, tokenizer, longest=longest, first_tokens=settings.prompt_tokens
        )
        if not self._asked.prompts:
            raise DataError(
                f"{self._config.data.path} must have a prompt of at most {longest:,} tokens "
                "(data.sequence_length, or the teacher's longest sequence, less write.tokens), and "
                f"has none: {counted(self._asked.left_out)}. Change those options or the text."
            )
        encoder = Encoder(tokenizer, append_eos=False)
        keep = settings.truncated == "keep"
        self._filters = AnswerFilters(self._asked.kind, encoder, settings.filters, truncated=keep)
        self._batches = plan(self._asked, settings, self._config.seed)

    @property
    def notes(self) -> Iterator[str]:
        """The teacher's notes, and how many prompts there are."""
        yield from self._teacher.notes
        left = self._asked.left_out
        rest = f" Left out: rows {counted(left)}." if left else ""
        yield f"The teacher answers {len(self._asked.prompts):,} prompts.{rest}"

    def write(self, check: Callable[[], None]) -> Summary:
        """Write the answers that are not in the file yet.

        Args:
            check: Called between batches; raises to stop.

        Raises:
            ConfigError: The file was begun with other settings, or a filter fails.
            DataError: The file was changed.
        """
        settings = self._settings
        with opened(settings.output, self._fixed(), {"limbeck": version("limbeck")}) as journal:
            batches = self._batches[journal.progress.batches :]
            bar = ProgressBar(Console(stderr=True), "writing", sum(map(len, batches)))
            seen = {digest(row) for row in journal.rows()}
            tokens = 0
            try:
                check()
                for batch, rollouts in zip(batches, self._writer.write(batches), strict=True):
                    rows = self._kept(batch, rollouts, seen, journal.progress)
                    journal.append(rows)
                    tokens += sum(len(rollout.token_ids) for rollout in rollouts)
                    bar.advance(len(batch), f"{tokens / bar.seconds:,.0f} tokens/s")
                    check()
            finally:
                bar.close()
            return self._summary(journal)

    def _summary(self, journal: Journal) -> Summary:
        return Summary(
            self._settings.output,
            self._asked.kind,
            len(self._asked.prompts),
            sum(map(len, self._batches)),
            dict(self._asked.left_out),
            journal.progress,
        )

    def _kept(
        self,
        batch: Sequence[Job],
        rollouts: Sequence[Rollout],
        seen: set[bytes],
        progress: FileProgress,
    ) -> list[dict[str, Any]]:
        """Rows of the answers that are kept; the others are counted."""
        rows = []
        for job, rollout in zip(batch, rollouts, strict=True):
            is_chat = self._asked.kind == "chat"
            text = text_of(rollout, self._teacher.tokenizer, is_chat=is_chat)
            answer = Answer(job.prompt, text or "", rollout, job.number)
            reason = "unreadable" if text is None else self._filters.reason(answer)
            row = answer.row({**self._origin(), "seed": job.seed})
            row = {self._config.data.columns.get(name, name): value for name, value in row.items()}
            if reason is None and digest(row) in seen:
                reason = "duplicate"
            if reason is not None:
                progress.dropped[reason] = progress.dropped.get(reason, 0) + 1
                continue
            seen.add(digest(row))
            progress.kept += 1
            progress.tokens += answer.tokens
            progress.ended += rollout.finish == "end"
            rows.append(row)
        return rows

    def _origin(self) -> dict[str, Any]:
        """Teacher and sampling, as every row names them."""
        info, sampling = self._teacher.info, asdict(self._sampling)
        return {
            "teacher": info.name,
            "revision": info.revision,
            "weights_sha256": info.weights_sha256,
            "sampling": {k: v for k, v in sampling.items() if k != "tokens"},
            "max_tokens": sampling["tokens"],
        }

    def _fixed(self) -> dict[str, Any]:
        """Everything the answers depend on, but for the device."""
        plain = to_plain(self._config)
        own = {k: v for k, v in plain["write"].items() if k != "output"}
        tokenizer = self._teacher.tokenizer
        return {
            "teacher": identity(self._teacher.info),
            "tokenizer": tokenizer_hash(tokenizer),
            "template": template_hash(tokenizer),
            "data": self._asked.identity,
            "write": own,
            "seed": self._config.seed,
            "plugins": [sha256(path) for path in self._config.plugins if own["filters"]],
        }


def plan(asked: AskedPrompts, settings: WriteConfig, seed: int) -> list[list[Job]]:
    """The batches of a file: a function of prompts and settings only."""
    jobs = [
        Job(prompt, number, seed_of((seed, prompt.number, number)))
        for prompt in asked.prompts
        for number in range(settings.per_prompt)
    ]
    size, batches = settings.batch, []
    for start in range(0, len(jobs), size * SORTED_BATCHES):
        part = jobs[start : start + size * SORTED_BATCHES]
        part.sort(key=lambda job: -len(job.prompt.ids))
        batches += [part[at : at + size] for at in range(0, len(part), size)]
    return batches


def identity(info: TeacherInfo) -> dict[str, Any]:
    """A teacher as its answers depend on it: not where it was loaded from, if that is known."""
    if info.weights_sha256 is not None:
        return {"weights_sha256": info.weights_sha256, "dtype": info.dtype}
    return {"name": info.name, "revision": info.revision, "dtype": info.dtype}


def digest(row: Mapping[str, Any]) -> bytes:
    """Hash of a row without its provenance."""
    columns = {name: value for name, value in row.items() if name != "provenance"}
    return hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).digest()


def counted(left_out: Mapping[str, int]) -> str:
    """Counts by reason, in words."""
    return ", ".join(f"{count:,} {why}" for why, count in left_out.items()) or "no rows"


def settings_of(config: RunConfig) -> WriteConfig:
    """The `write` section of a recipe."""
    if config.write is None:
        raise ConfigError(
            "write: the recipe must have this section, with the file to write. Add "
            "write: {output: data/written.jsonl}."
        )
    return config.write


def write_problems(config: RunConfig) -> Iterator[Problem]:
    """Contradictions between `write` and the other sections."""
    settings, length = config.write, config.data.sequence_length
    if settings is None:
        return
    if settings.output.suffix != ".jsonl":
        yield Problem("write.output", f"must end in .jsonl, got {str(settings.output)!r}.")
    prompt = settings.prompt_tokens if config.data.type == "text" else 1
    if prompt + settings.tokens > length:
        yield Problem(
            "write.tokens",
            f"a prompt of {prompt} tokens and its answer must fit into data.sequence_length = "
            f"{length}, got {settings.tokens}. Lower it, or raise data.sequence_length.",
        )
    if config.data.mix:
        yield Problem(
            "data.mix", "prompts are of one text, got several. Write from each by itself."
        )
    for name in (WEIGHT, SOURCE):
        if name in config.data.columns:
            yield Problem(
                f"data.columns.{name}",
                f"reads the {name} of a row, and written rows have none. Remove it or `write`.",
            )
