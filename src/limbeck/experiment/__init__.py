"""Runs: everything a recipe describes, trained, measured and reported."""

from limbeck.experiment.loading import load, schema
from limbeck.experiment.run import Run, RunResult, assemble
from limbeck.experiment.stages import Stage, load_stages, run_stages

__all__ = [
    "Run",
    "RunResult",
    "Stage",
    "assemble",
    "load",
    "load_stages",
    "run_stages",
    "schema",
]
