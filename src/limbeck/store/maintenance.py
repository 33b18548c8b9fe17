"""Maintenance of a store: verification, repair, and merging the parts of one recording."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from limbeck.errors import DataError
from limbeck.files import manifest, publish, sealed_manifest, set_aside
from limbeck.store import hidden_states
from limbeck.store.forms.base import Form
from limbeck.store.head import FOLDER, read_head
from limbeck.store.header import StoreHeader, create, read_header
from limbeck.store.sample import Sample
from limbeck.store.shard import DATA, SCHEMA, Shard, absent_shards, finished_shards, shard_name

TOKENIZER = "tokenizer"
"""Folder of the teacher's tokenizer in a store that was recorded by a recipe."""


@dataclass(frozen=True)
class Damage:
    """Something in a store that differs from what was recorded.

    Attributes:
        part: Number of the shard to record again, or `head`, or `tokenizer`.
        location: The file, and the record where the damage is in one.
    """

    part: int | str
    location: str
    text: str

    def __str__(self) -> str:
        part = f"shard {self.part}" if isinstance(self.part, int) else f"the {self.part}"
        return f"{part}: {self.location}: {self.text}"

    @property
    def folder(self) -> str:
        """Name of the damaged folder in the store."""
        return shard_name(self.part) if isinstance(self.part, int) else self.part


def verify(path: Path) -> list[Damage]:
    """Everything in a store that differs from what was recorded; empty if nothing is damaged.

    Every file is hashed, every record is decoded, and every key is computed again from its tokens.
    A shard that is not there is no damage: another machine may have it (see `absent_shards`).

    Raises:
        DataError: There is no store, or its header is damaged.
    """
    header = read_header(path)
    form, damages = header.make_form(), []
    if (path / TOKENIZER).exists() and manifest(path / TOKENIZER) is None:
        text = "its files are not those of its manifest"
        damages.append(Damage(TOKENIZER, str(path / TOKENIZER), text))
    if form.needs_head:
        try:
            form = form.with_head(read_head(path))
        except DataError as error:
            # Nothing can be decoded without the head; repair it first.
            return [*damages, Damage(FOLDER, str(path / FOLDER), str(error))]
    absent = set(absent_shards(path, header))
    for shard in range(header.num_shards):
        if shard not in absent:
            damages += verify_shard(path, shard, header, form)
    return damages


def verify_shard(path: Path, shard: int, header: StoreHeader, form: Form) -> list[Damage]:
    """Everything in a shard that differs from what was recorded."""
    folder = path / shard_name(shard)
    try:
        opened = Shard.open(path, shard, header)
    except DataError as error:
        return [Damage(shard, str(folder), str(error))]
    data = str(folder / DATA)
    if damages := [Damage(shard, data, text) for text in bad_records(opened, header, form)]:
        return damages
    if manifest(folder) is None:
        return [Damage(shard, str(folder), "its files are not those of its manifest")]
    # The Parquet reader sees only files that are what was published.
    try:
        texts = list(bad_tokens(opened, header))
    except (pyarrow.ArrowException, MemoryError, OSError, ValueError) as error:
        texts = [f"Parquet cannot read it: {error}"]
    return [Damage(shard, data, text) for text in texts]


def bad_records(shard: Shard, header: StoreHeader, form: Form) -> Iterator[str]:
    """What is wrong with each record that cannot be decoded."""
    for entry in range(len(shard.index)):
        try:
            record = shard.read(entry, header.sequence_length)
            form.decode(record.signal, record.num_scored, shard.ranks)
            if len(record.layers) != len(header.layers):
                yield f"sample {record.key.hex()} has {len(record.layers)} layers"
            for layer in record.layers:
                hidden_states.decode(layer, record.num_scored)
        except DataError as error:
            yield str(error)


def bad_tokens(shard: Shard, header: StoreHeader) -> Iterator[str]:
    """Rows of the Parquet file whose tokens are not those of their record."""
    file = pyarrow.parquet.ParquetFile(shard.path / DATA, page_checksum_verification=True)
    if file.metadata.num_rows != len(shard.index):
        yield f"it has {file.metadata.num_rows:,} rows for {len(shard.index):,} records"
        return
    if not file.schema_arrow.equals(SCHEMA):
        yield f"its columns must be {SCHEMA.names} of their own types"
        return
    entry_of_row = dict(zip(shard.index.rows.tolist(), range(len(shard.index)), strict=True))
    row = 0
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        max_bytes = 64 * 1024 + 16 * facts.num_rows * (header.sequence_length + 1)
        for number in range(facts.num_columns):
            column = facts.column(number)
            if column.path_in_schema != "record" and column.total_uncompressed_size > max_bytes:
                yield (
                    f"row group {group} claims that {column.path_in_schema} has "
                    f"{column.total_uncompressed_size:,} bytes, more than {max_bytes:,}"
                )
                return
        for sample in samples_of(file, group):
            if row not in entry_of_row or sample.key != shard.index.key(entry_of_row[row]):
                yield f"row group {group}, row {row}: its tokens are another sample's"
            row += 1


def samples_of(file: pyarrow.parquet.ParquetFile, group: int) -> Iterator[Sample]:
    """The samples of a row group."""
    table = file.read_row_group(group, columns=["tokens", "scored"])
    for tokens, scored in zip(table["tokens"], table["scored"], strict=True):
        if not (tokens.is_valid and scored.is_valid and len(tokens) == len(scored) + 1):
            raise ValueError("a row must have one token more than positions")
        flags = scored.values.to_numpy(zero_copy_only=False)
        yield Sample(tokens.values.to_numpy(), flags.astype(bool))


def repair(path: Path) -> list[Damage]:
    """Set every damaged shard aside, so that recording again makes only those.

    A damaged shard is renamed to `damaged-...` in the store; nothing is deleted. A damaged head or
    tokenizer is renamed likewise.

    Returns:
        The damage; the shards it names must be recorded again.

    Raises:
        DataError: There is no store, or its header is damaged.
    """
    damages = verify(path)
    for name in sorted({damage.folder for damage in damages}):
        if os.path.lexists(path / name):
            set_aside(path / name, "damaged")
    return damages


def merge(parts: Sequence[Path], out: Path) -> StoreHeader:
    """Merge the shards of several folders of one recording into one store.

    Files are hard links where the disk allows it, else copies. A shard that several parts have must
    be the same in all of them. A shard that no part has stays absent; `merge` may be called again
    with more parts. The parts may be recorded by different versions, and from different paths of
    the same weights.

    Raises:
        ConfigError: `out` holds files that are no store.
        DataError: A part is of another recording, a shard is damaged, or two differ.
        StorageError: The disk is full, or may not be written.
    """
    header = read_header(parts[0])
    for part in parts[1:]:
        if differing := read_header(part).conflicts(header):
            raise DataError(
                f"{part} must be of the same recording as {parts[0]}, but differs: "
                f"{'; '.join(differing)}. Merge parts that one recipe recorded."
            )
    create(out, header)
    for part in parts:
        names = [shard_name(shard) for shard in finished_shards(part, header)]
        names += [FOLDER] if (part / FOLDER).exists() else []
        for name in names:
            publish_copy(part / name, out / name)
    # The header names the tokenizer, so any intact copy will do.
    copies = (part / TOKENIZER for part in parts if manifest(part / TOKENIZER) is not None)
    if not (out / TOKENIZER).exists() and (copy := next(copies, None)) is not None:
        publish_copy(copy, out / TOKENIZER)
    return header


def publish_copy(folder: Path, final: Path) -> None:
    """Publish a copy of a published folder; nothing happens where the same one exists."""
    facts = manifest(folder)
    if facts is None:
        raise DataError(
            f"{folder} must be whole to be merged, and is damaged. Call "
            f"limbeck store repair on {folder.parent}, record what it names, and merge again."
        )
    files = facts.pop("files")
    if final.exists():
        present = sealed_manifest(final)
        if present is None or present["files"] != files:
            raise DataError(
                f"{folder} and {final} must be the same, and differ. Keep the one whose recording "
                "you trust."
            )
        return

    def write(temporary: Path) -> None:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(folder / name, temporary / name)

    publish(final, write, facts)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
