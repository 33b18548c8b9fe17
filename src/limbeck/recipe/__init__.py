"""The one place where everything meets: a configuration becomes a run."""

from limbeck.recipe.loading import load, problems, schema
from limbeck.recipe.run import Run, RunResult, assemble

__all__ = ["Run", "RunResult", "assemble", "load", "problems", "schema"]
