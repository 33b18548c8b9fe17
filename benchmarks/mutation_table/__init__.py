"""The bugs `mutations.py` seeds: one for each law, many of them once found in public code."""

from mutation_table.divergences import DIVERGENCES
from mutation_table.forms import FORMS
from mutation_table.objectives import OBJECTIVES
from mutation_table.own_terms import OWN_TERMS
from mutation_table.places import Mutation
from mutation_table.row_kernel import ROW_KERNEL
from mutation_table.runs import RUNS
from mutation_table.training import TRAINING

MUTATIONS = (*DIVERGENCES, *TRAINING, *OBJECTIVES, *FORMS, *OWN_TERMS, *ROW_KERNEL, *RUNS)

__all__ = ["MUTATIONS", "Mutation"]
