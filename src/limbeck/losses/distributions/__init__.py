"""The forms of a teacher's next-token distribution, one a file."""

from limbeck.losses.distributions.base import FLOOR, LogProbPair, TeacherDistribution, log_softmax
from limbeck.losses.distributions.full import DenseLogits, LazyLogits, Mixture
from limbeck.losses.distributions.merged import MergedOutcomes, OutcomeMap
from limbeck.losses.distributions.samples import DrawnTokens, Samples
from limbeck.losses.distributions.top_k import TopK
from limbeck.losses.distributions.top_k_samples import TopKSamples
from limbeck.losses.distributions.uneven import UnevenTopK

__all__ = [
    "FLOOR",
    "DenseLogits",
    "DrawnTokens",
    "LazyLogits",
    "LogProbPair",
    "MergedOutcomes",
    "Mixture",
    "OutcomeMap",
    "Samples",
    "TeacherDistribution",
    "TopK",
    "TopKSamples",
    "UnevenTopK",
    "log_softmax",
]
