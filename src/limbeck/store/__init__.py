"""A teacher's signals on disk: recorded once, read by any number of students.

A sample is found by its content, so that a store fits any order, packing, batch and number of
processes, and a text that changed is missing instead of misaligned.
"""

from limbeck.store.care import Damage, merge, repair, verify
from limbeck.store.forms import Form, forms
from limbeck.store.head import read_head, write_head
from limbeck.store.header import StoreHeader, create, read_header
from limbeck.store.sample import Sample, generator_of, sample_key
from limbeck.store.shard import Shard, finished_shards
from limbeck.store.store import Record, Store
from limbeck.store.writer import ShardWriter

__all__ = [
    "Damage",
    "Form",
    "Record",
    "Sample",
    "Shard",
    "ShardWriter",
    "Store",
    "StoreHeader",
    "create",
    "finished_shards",
    "forms",
    "generator_of",
    "merge",
    "read_head",
    "read_header",
    "repair",
    "sample_key",
    "verify",
    "write_head",
]
