"""A store: a teacher's signals on disk, recorded once and read by any number of students.

A sample is looked up by a hash of its tokens. A store therefore works with any order, packing,
batch size and number of processes, and a changed text is a missing sample, never a wrong one.
"""

from limbeck.store.forms.base import Form, forms, written_out
from limbeck.store.head import publish_once, write_head
from limbeck.store.header import StoreHeader, create, read_header, require_store_or_new
from limbeck.store.maintenance import TOKENIZER, merge, repair, verify
from limbeck.store.sample import Sample, generator_of, sample_key
from limbeck.store.shard import absent_shards, finished_shards, shard_facts, shard_name
from limbeck.store.store import Record, Store
from limbeck.store.writer import ShardWriter

__all__ = [
    "TOKENIZER",
    "Form",
    "Record",
    "Sample",
    "ShardWriter",
    "Store",
    "StoreHeader",
    "absent_shards",
    "create",
    "finished_shards",
    "forms",
    "generator_of",
    "merge",
    "publish_once",
    "read_header",
    "repair",
    "require_store_or_new",
    "sample_key",
    "shard_facts",
    "shard_name",
    "verify",
    "write_head",
    "written_out",
]
