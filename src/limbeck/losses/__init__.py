"""The loss core: divergences, distributions, terms, the fused head and the objective."""

from limbeck.losses.build import build_objective, objective_problems
from limbeck.losses.distillation_loss import DistillationLoss
from limbeck.losses.logit_transforms import Divided, Multiplied, Softcap
from limbeck.losses.objective import Objective
from limbeck.losses.output_head import Head, Transform
from limbeck.losses.signal import Projections, SignalNeeds, SignalPart, TeacherSignal
from limbeck.losses.terms.base import LogitTerm, PairShapes, StudentView, WeightedTerm, terms

__all__ = [
    "DistillationLoss",
    "Divided",
    "Head",
    "LogitTerm",
    "Multiplied",
    "Objective",
    "PairShapes",
    "Projections",
    "SignalNeeds",
    "SignalPart",
    "Softcap",
    "StudentView",
    "TeacherSignal",
    "Transform",
    "WeightedTerm",
    "build_objective",
    "objective_problems",
    "terms",
]
