"""Recording a teacher's signals for a data set into a store, in parts and resumable."""

from limbeck.recording.budget import Budget, Setting, make_budget, require_room
from limbeck.recording.plan import ShardPlan, own_shards, parse_part, plan_shards
from limbeck.recording.progress import RecordingProgress
from limbeck.recording.record import Recorder, put_tokenizer
from limbeck.recording.recording import Recorded, Recording

__all__ = [
    "Budget",
    "Recorded",
    "Recorder",
    "Recording",
    "RecordingProgress",
    "Setting",
    "ShardPlan",
    "make_budget",
    "own_shards",
    "parse_part",
    "plan_shards",
    "put_tokenizer",
    "require_room",
]
