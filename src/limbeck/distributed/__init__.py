"""Many processes as one: ranks, sharding, stop signals, locks and checkpoints."""

from limbeck.distributed.adamw_8bit import AdamW8bit, moment_bytes
from limbeck.distributed.casting import cast_bytes, cast_weights
from limbeck.distributed.checkpoints import (
    checkpoint_name,
    latest,
    load_checkpoint,
    prune,
    set_damaged_aside,
)
from limbeck.distributed.deciding import decided
from limbeck.distributed.filling import fill, model_for, require_same_files
from limbeck.distributed.footprint import (
    Collective,
    Footprint,
    StepFootprint,
    by_purpose,
    prolonged,
)
from limbeck.distributed.lock import locked
from limbeck.distributed.ranks import (
    World,
    all_sum,
    barrier,
    broadcast_object,
    from_main,
    gather_objects,
    is_main_process,
    main_first,
    together,
    world,
)
from limbeck.distributed.saving import Saving, begin_saving, started
from limbeck.distributed.sharding import (
    abandon_pass,
    full_weights,
    gather_root,
    gathered,
    is_sharded,
    local,
    plan_reduction,
    release,
    shard,
    unsharded,
    whole,
)
from limbeck.distributed.simulated import simulated_world
from limbeck.distributed.stopping import StopSignals

__all__ = [
    "AdamW8bit",
    "Collective",
    "Footprint",
    "Saving",
    "StepFootprint",
    "StopSignals",
    "World",
    "abandon_pass",
    "all_sum",
    "barrier",
    "begin_saving",
    "broadcast_object",
    "by_purpose",
    "cast_bytes",
    "cast_weights",
    "checkpoint_name",
    "decided",
    "fill",
    "from_main",
    "full_weights",
    "gather_objects",
    "gather_root",
    "gathered",
    "is_main_process",
    "is_sharded",
    "latest",
    "load_checkpoint",
    "local",
    "locked",
    "main_first",
    "model_for",
    "moment_bytes",
    "plan_reduction",
    "prolonged",
    "prune",
    "release",
    "require_same_files",
    "set_damaged_aside",
    "shard",
    "simulated_world",
    "started",
    "together",
    "unsharded",
    "whole",
    "world",
]
