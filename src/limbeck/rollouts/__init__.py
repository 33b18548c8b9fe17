"""Text written by a model during the run, as batches."""

from limbeck.rollouts.sampling import Rollout, Sampling, sample
from limbeck.rollouts.source import Rollouts, rollout_batch

__all__ = ["Rollout", "Rollouts", "Sampling", "rollout_batch", "sample"]
