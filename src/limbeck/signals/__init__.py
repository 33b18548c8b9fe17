"""What a teacher says about a batch, and how a student is compared with it.

A teacher's opinion may be held in full (logits), in part (its top-k, samples) or lazily (hidden
states and a head). Each form knows how to put teacher and student on the same finite set of
outcomes; a divergence then never needs to know which form it was.
"""

from limbeck.signals.distribution import (
    FLOOR,
    LogProbPair,
    Rows,
    TeacherDistribution,
    log_softmax,
    merge_rest,
    require_served,
)
from limbeck.signals.full import DenseLogits, LazyLogits, whole_logits
from limbeck.signals.head import Head, identity
from limbeck.signals.samples import DrawnTokens, Samples
from limbeck.signals.shared import SharedVocabulary
from limbeck.signals.signal import Projections, SignalNeeds, TeacherSignal
from limbeck.signals.top_k import KeptTokens, TopK, TopKRenormalised
from limbeck.signals.top_k_samples import TopKSamples
from limbeck.signals.uneven import UnevenTopK

__all__ = [
    "FLOOR",
    "DenseLogits",
    "DrawnTokens",
    "Head",
    "KeptTokens",
    "LazyLogits",
    "LogProbPair",
    "Projections",
    "Rows",
    "Samples",
    "SharedVocabulary",
    "SignalNeeds",
    "TeacherDistribution",
    "TeacherSignal",
    "TopK",
    "TopKRenormalised",
    "TopKSamples",
    "UnevenTopK",
    "identity",
    "log_softmax",
    "merge_rest",
    "require_served",
    "whole_logits",
]
