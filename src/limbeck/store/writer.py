"""Writing one shard, which is published complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from torch import Tensor

from limbeck.errors import DataError, StorageError
from limbeck.files import publish, raise_if_storage
from limbeck.losses.distributions import TeacherDistribution
from limbeck.store import hidden_states, records
from limbeck.store.header import StoreHeader, create
from limbeck.store.index import Index
from limbeck.store.sample import Sample
from limbeck.store.shard import DATA, INDEX, RANKS, SCHEMA, shard_name
from limbeck.store.token_ranks import COUNTED_TOKENS, TokenRanks

GROUP_BYTES = 16 << 20
"""Size of the records in one Parquet row group."""

ONE_PAGE = {"data_page_size": 1 << 30, "max_rows_per_page": 1 << 30}
"""Limits that no row group reaches, so that each of its columns is one page."""

COMPRESSION = {"key": "NONE", "record": "NONE"} | {
    f"{name}.list.element": "ZSTD" for name in ("tokens", "scored")
}

Waiting = tuple[Sample, TeacherDistribution, Mapping[int, Tensor]]


class ShardWriter:
    """Writes a shard. Use it as a context manager: leaving it without an exception publishes.

    The caller holds the shard's lock; files of an earlier, killed writer are removed. The same
    samples in the same order give the same bytes.
    """

    def __init__(self, folder: Path, shard: int, header: StoreHeader) -> None:
        """

        Raises:
            DataError: The folder holds a store of something else, or already has the shard.
        """
        assert 0 <= shard < header.num_shards
        create(folder, header)
        self._final = folder / shard_name(shard)
        if self._final.exists():
            raise DataError(
                f"{self._final} must not be there yet, and is. To record it again, run "
                "`limbeck store repair` first, or remove it."
            )
        for stale in folder.glob(f".tmp-*{shard_name(shard)}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        self._work = folder / f".tmp-writing-{shard_name(shard)}-{os.getpid()}"
        self._header, self._form, self._shard = header, header.make_form(), shard
        self._ranks: TokenRanks | None = None
        self._waiting: list[Waiting] = []
        self._waiting_scored = 0
        self._group: list[tuple[bytes, Sample, bytes]] = []
        self._group_bytes = 0
        self._keys: dict[bytes, int] = {}
        self._lengths: list[int] = []
        self._counts = {"positions": 0, "scored": 0, "record_bytes": 0}
        with self._storing():
            self._work.mkdir()
            self._file = pyarrow.parquet.ParquetWriter(
                self._work / DATA,
                SCHEMA,
                compression=COMPRESSION,
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                store_schema=False,
                **ONE_PAGE,
            )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @property
    def record_bytes(self) -> int:
        """Size of the records so far."""
        return self._counts["record_bytes"]

    def add(
        self,
        sample: Sample,
        signal: TeacherDistribution,
        layers: Mapping[int, Tensor] | None = None,
    ) -> bool:
        """Add a sample; False if the shard has it already.

        Args:
            signal: Result of `Form.read_teacher` at those.
            layers: Hidden states [N, D] of each recorded layer.

        Raises:
            DataError: A token is outside the vocabulary, or the sample is too long.
            StorageError: The disk is full.
        """
        check(sample, self._header)
        layers = {} if layers is None else layers
        assert tuple(sorted(layers)) == self._header.layers
        if sample.key in self._keys:
            return False
        self._keys[sample.key] = len(self._keys)
        if self._ranks is not None:
            self._encode((sample, signal, layers), self._ranks)
            return True
        self._waiting.append((sample, signal, layers))
        self._waiting_scored += sample.num_scored
        if self._waiting_scored >= COUNTED_TOKENS:
            self._make_ranks()
        return True

    def close(self) -> None:
        """Publish the shard.

        Raises:
            StorageError: The disk is full; nothing of the shard is left.
        """
        try:
            if self._ranks is None:
                self._make_ranks()
            with self._storing():
                self._flush()
                self._file.close()
                index = Index.make(list(self._keys), self._offsets(), self._lengths)
                (self._work / INDEX).write_bytes(index.to_bytes())
                assert self._ranks is not None
                (self._work / RANKS).write_bytes(self._ranks.to_bytes())
            publish(self._final, self._hand_over, self._facts())
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything written so far."""
        try:
            self._file.close()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _make_ranks(self) -> None:
        ids = [self._form.ids_of(signal) for _, signal, _ in self._waiting]
        self._ranks = TokenRanks.from_ids(ids, self._header.vocabulary_size)
        for each in self._waiting:
            self._encode(each, self._ranks)
        self._waiting = []

    def _encode(self, waiting: Waiting, ranks: TokenRanks) -> None:
        sample, signal, layers = waiting
        coded = self._form.encode(signal, ranks)
        precision = self._header.layer_precision
        further = [hidden_states.encode(layers[layer], precision) for layer in self._header.layers]
        key = sample.key
        record = records.seal(key, sample.num_scored, [coded, *further])
        self._group.append((key, sample, record))
        self._lengths.append(len(record))
        self._counts["positions"] += len(sample.scored)
        self._counts["scored"] += sample.num_scored
        self._counts["record_bytes"] += len(record)
        self._group_bytes += len(record)
        if self._group_bytes >= GROUP_BYTES:
            with self._storing():
                self._flush()

    def _flush(self) -> None:
        if not self._group:
            return
        columns = [
            pyarrow.array([key for key, _, _ in self._group], SCHEMA.field("key").type),
            pyarrow.array([sample.tokens for _, sample, _ in self._group], SCHEMA.field(1).type),
            pyarrow.array([sample.scored for _, sample, _ in self._group], SCHEMA.field(2).type),
            pyarrow.array([record for _, _, record in self._group], pyarrow.binary()),
        ]
        self._file.write_table(pyarrow.Table.from_arrays(columns, schema=SCHEMA))
        self._group, self._group_bytes = [], 0

    def _offsets(self) -> list[int]:
        """Where each record begins: a plain page ends with its values, 4 bytes of length each."""
        offsets: list[int] = []
        metadata = pyarrow.parquet.read_metadata(self._work / DATA)
        with (self._work / DATA).open("rb") as file:
            for number in range(metadata.num_row_groups):
                column = metadata.row_group(number).column(SCHEMA.get_field_index("record"))
                lengths = self._lengths[len(offsets) :][: column.num_values]
                end = column.data_page_offset + column.total_compressed_size
                begin = end - sum(4 + length for length in lengths)
                file.seek(max(0, begin))
                if file.read(4) != lengths[0].to_bytes(4, "little"):
                    raise StorageError(
                        f"{self._final} must hold each record in one piece, and the file that "
                        f"pyarrow {pyarrow.__version__} wrote does not; nothing of the shard is "
                        "kept. Install the pyarrow of constraints.txt, or check the disk."
                    )
                for length in lengths:
                    offsets.append(begin + 4)
                    begin += 4 + length
        return offsets

    def _hand_over(self, folder: Path) -> None:
        for name in (DATA, INDEX, RANKS):
            (self._work / name).rename(folder / name)

    def _facts(self) -> dict[str, Any]:
        return {
            "header": self._header.sha256,
            "shard": self._shard,
            "samples": len(self._keys),
            **self._counts,
        }

    def _storing(self) -> AbstractContextManager[None]:
        return storing(self._final, self._work)


@contextmanager
def storing(final: Path, work: Path) -> Iterator[None]:
    """Turn failed writes inside the context into `StorageError` where the disk is the cause."""
    try:
        yield
    except BaseException as error:
        raise_if_storage(error, final, work)
        raise


def check(sample: Sample, header: StoreHeader) -> None:
    """Require that a sample fits its store."""
    if len(sample.scored) > header.sequence_length:
        raise DataError(
            f"A sample may have at most {header.sequence_length:,} positions, the store's "
            f"sequence_length, got {len(sample.scored):,}. Cut the data shorter."
        )
    lowest, highest = int(sample.tokens.min()), int(sample.tokens.max())
    if lowest < 0 or highest >= header.vocabulary_size:
        raise DataError(
            f"A sample's tokens must be from 0 to {header.vocabulary_size - 1:,}, the store's "
            f"vocabulary, got {lowest if lowest < 0 else highest:,}. Use the teacher's tokenizer."
        )
