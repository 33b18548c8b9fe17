"""Recording a teacher's signals for a data set into a store, in parts and resumable."""

from limbeck.recording.budget import Budget
from limbeck.recording.plan import parse_part
from limbeck.recording.record import put_tokenizer
from limbeck.recording.recording import Recording

__all__ = [
    "Budget",
    "Recording",
    "parse_part",
    "put_tokenizer",
]
