"""Text written by a model during the run, as batches."""

from limbeck.rollouts.mixed import Mixed
from limbeck.rollouts.prompts import Prompts
from limbeck.rollouts.sampling import Rollout, Sampling, sample
from limbeck.rollouts.source import Rollouts, rollout_batch

__all__ = ["Mixed", "Prompts", "Rollout", "Rollouts", "Sampling", "rollout_batch", "sample"]
