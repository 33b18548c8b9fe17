"""Looking after a store: is it whole, putting parts together, and putting damage away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from limbeck.errors import DataError
from limbeck.files import MANIFEST, manifest, publish, sealed_manifest
from limbeck.store import states
from limbeck.store.forms.base import Form
from limbeck.store.head import FOLDER, read_head
from limbeck.store.header import StoreHeader, create, read_header
from limbeck.store.sample import Sample
from limbeck.store.shard import DATA, Shard, finished_shards, shard_name

TOKENIZER = "tokenizer"
"""Folder of the teacher's tokenizer in a store that was recorded by a recipe."""


@dataclass(frozen=True)
class Damage:
    """Something in a store that is not what was recorded.

    Attributes:
        part: Which shard must be recorded again, or `head`, or `tokenizer`.
        place: File, and record where one is to blame.
        text: What is wrong.
    """

    part: int | str
    place: str
    text: str

    def __str__(self) -> str:
        what = f"shard {self.part}" if isinstance(self.part, int) else f"the {self.part}"
        return f"{what}: {self.place}: {self.text}"

    @property
    def folder(self) -> str:
        """Name of the folder in the store that holds the part."""
        return shard_name(self.part) if isinstance(self.part, int) else self.part


def verify(path: Path) -> list[Damage]:
    """Everything in a store that is missing or not what was recorded; empty if it is whole.

    Every file is hashed, every record decoded, and every key computed from its tokens again.

    Raises:
        DataError: There is no store, or its header is damaged.
    """
    header = read_header(path)
    form, told = header.make_form(), []
    if (path / TOKENIZER).exists() and manifest(path / TOKENIZER) is None:
        text = "a file is not what its manifest says, is missing or is too many"
        told.append(Damage(TOKENIZER, str(path / TOKENIZER), text))
    if form.needs_head:
        try:
            form = form.with_head(read_head(path))
        except DataError as error:
            # Without it nothing can be decoded; mend it first.
            return [*told, Damage(FOLDER, str(path / FOLDER), str(error))]
    for shard in range(header.num_shards):
        told += verify_shard(path, shard, header, form)
    return told


def verify_shard(path: Path, shard: int, header: StoreHeader, form: Form) -> list[Damage]:
    """Everything in a shard that is not what was recorded."""
    folder = path / shard_name(shard)
    if not folder.exists():
        return [Damage(shard, str(folder), "it is missing")]
    try:
        opened = Shard.open(path, shard, header)
    except DataError as error:
        return [Damage(shard, str(folder), str(error))]
    told = [
        Damage(shard, str(opened.path / DATA), text) for text in bad_records(opened, header, form)
    ]
    if told:
        return told
    if manifest(folder) is None:
        return [Damage(shard, str(folder), "a file is not what its manifest says, or is too many")]
    # Only a file that is what was published is given to a Parquet reader.
    try:
        texts = list(bad_tokens(opened, header))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        texts = [f"Parquet cannot read it: {error}"]
    return [Damage(shard, str(opened.path / DATA), text) for text in texts]


def bad_records(shard: Shard, header: StoreHeader, form: Form) -> Iterator[str]:
    """What is wrong with each record that cannot be read."""
    for place in range(len(shard.index)):
        try:
            parts = shard.read(place, header.sequence_length)
            form.decode(parts.signal, parts.num_scored, shard.ranks)
            if len(parts.layers) != len(header.layers):
                yield f"sample {parts.key.hex()} has {len(parts.layers)} layers"
            for layer in parts.layers:
                states.decode(layer, parts.num_scored)
        except DataError as error:
            yield str(error)


def bad_tokens(shard: Shard, header: StoreHeader) -> Iterator[str]:
    """Rows of the Parquet file whose tokens are not those of their record."""
    file = pyarrow.parquet.ParquetFile(shard.path / DATA, page_checksum_verification=True)
    if file.metadata.num_rows != len(shard.index):
        yield f"it has {file.metadata.num_rows:,} rows for {len(shard.index):,} records"
        return
    key_of_row = dict(zip(shard.index.rows.tolist(), range(len(shard.index)), strict=True))
    row = 0
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        most = 64 * 1024 + 16 * facts.num_rows * (header.sequence_length + 1)
        for place in range(facts.num_columns):
            column = facts.column(place)
            if column.path_in_schema != "record" and column.total_uncompressed_size > most:
                yield (
                    f"row group {group} says that {column.path_in_schema} has "
                    f"{column.total_uncompressed_size:,} bytes, more than {most:,}"
                )
                return
        for each in samples_of(file, group):
            if each.key != shard.index.key(key_of_row[row]):
                yield f"row group {group}, row {row}: its tokens are another sample's"
            row += 1


def samples_of(file: pyarrow.parquet.ParquetFile, group: int) -> Iterator[Sample]:
    """The samples of a row group."""
    table = file.read_row_group(group, columns=["tokens", "scored"])
    for tokens, scored in zip(table["tokens"], table["scored"], strict=True):
        flags = scored.values.to_numpy(zero_copy_only=False)
        yield Sample(tokens.values.to_numpy(), flags.astype(bool))


def repair(path: Path) -> list[Damage]:
    """Put every damaged shard away, so that recording fills just those in again.

    A damaged shard becomes `damaged-...` beside its place; nothing is deleted. A damaged head or
    tokenizer is put away likewise.

    Returns:
        What was found; the shards it names must be recorded again.

    Raises:
        DataError: There is no store, or its header is damaged.
    """
    told = verify(path)
    for name in sorted({damage.folder for damage in told}):
        folder = path / name
        if folder.exists():
            folder.rename(free_name(path, folder.name))
    return told


def free_name(path: Path, name: str) -> Path:
    """A name for something damaged that nothing has yet."""
    number = 0
    while (aside := path / f"damaged-{name}-{number}").exists():
        number += 1
    return aside


def merge(parts: Sequence[Path], out: Path) -> StoreHeader:
    """Put the shards of several folders of one recording into one store.

    Files are linked where the disk allows, else copied. A shard that several parts hold must be the
    same in all. What no part holds stays missing, and `merge` may be called again with more parts.

    Raises:
        ConfigError: `out` holds files that are no store.
        DataError: A part is not of the same recording, a shard is damaged, or two differ.
        StorageError: The disk is full, or may not be written.
    """
    header = read_header(parts[0])
    for part in parts[1:]:
        if told := read_header(part).differences(header.to_json()):
            raise DataError(
                f"{part} must be of the same recording as {parts[0]}, but differs: "
                f"{'; '.join(told)}. Merge parts that one recipe recorded."
            )
    create(out, header)
    for part in parts:
        names = [shard_name(shard) for shard in finished_shards(part, header)]
        names += [FOLDER] if (part / FOLDER).exists() else []
        for name in names:
            take(part / name, out / name)
    # The header names the tokenizer, so any whole copy will do.
    copies = (part / TOKENIZER for part in parts if manifest(part / TOKENIZER) is not None)
    if not (out / TOKENIZER).exists() and (copy := next(copies, None)) is not None:
        take(copy, out / TOKENIZER)
    return header


def take(folder: Path, final: Path) -> None:
    """Publish a copy of a published folder.

    Raises:
        DataError: It is damaged, or another one is there already.
    """
    facts = manifest(folder)
    if facts is None:
        raise DataError(
            f"{folder} must be whole to be merged, and is damaged. Call "
            f"limbeck store repair on {folder.parent}, record what it names, and merge again."
        )
    if final.exists():
        if sealed_manifest(final) != facts:
            raise DataError(
                f"{folder} and {final} must be the same, and differ. Keep the one whose recording "
                "you trust."
            )
        return
    files = facts.pop("files")

    def write(temporary: Path) -> None:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(folder / name, temporary / name)

    assert MANIFEST not in files
    publish(final, write, facts)


def link_or_copy(source: Path, target: Path) -> None:
    """The same bytes under another name."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
