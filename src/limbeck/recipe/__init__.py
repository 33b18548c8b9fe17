"""The one place where everything meets: a configuration becomes a run or a recording."""

from limbeck.recipe.loading import load, problems, schema
from limbeck.recipe.recording import Recorded, Recording
from limbeck.recipe.run import Run, RunResult, assemble

__all__ = ["Recorded", "Recording", "Run", "RunResult", "assemble", "load", "problems", "schema"]
