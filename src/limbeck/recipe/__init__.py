"""The one place where everything meets: a configuration becomes a run or a recording."""

from limbeck.recipe.loading import load, problems, schema
from limbeck.recipe.recording import Recorded, Recording
from limbeck.recipe.run import Run, RunResult, assemble
from limbeck.recipe.stages import Stage, load_stages, run_stages

__all__ = [
    "Recorded",
    "Recording",
    "Run",
    "RunResult",
    "Stage",
    "assemble",
    "load",
    "load_stages",
    "problems",
    "run_stages",
    "schema",
]
