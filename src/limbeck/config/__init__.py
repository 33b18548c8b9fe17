"""A recipe as checked data: sections, options, schedules, and the mistakes in them."""

from limbeck.config.reading import (
    differences,
    dump,
    leaves,
    override_in,
    parse,
    read,
    refusal,
    refuse_differences,
    to_plain,
    validated,
)
from limbeck.config.recipe import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    HeadBudget,
    MemoryConfig,
    ObjectiveConfig,
    OptimConfig,
    ReadConfig,
    RecordConfig,
    RunConfig,
    WriteConfig,
)
from limbeck.config.rollout import RolloutConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "HeadBudget",
    "MemoryConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ReadConfig",
    "RecordConfig",
    "RolloutConfig",
    "RunConfig",
    "WriteConfig",
    "differences",
    "dump",
    "leaves",
    "override_in",
    "parse",
    "read",
    "refusal",
    "refuse_differences",
    "to_plain",
    "validated",
]
