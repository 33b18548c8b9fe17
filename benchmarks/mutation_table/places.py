"""What a seeded bug is, and short names for where bugs and laws live."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """A bug and the test that must turn red."""

    bug: str
    file: str
    """Under src/limbeck."""
    old: str
    new: str
    test: str
    """Under tests."""


KL, SKEW, JSD = "divergences/kl.py", "divergences/skew.py", "divergences/jensen_shannon.py"
AKL, AB = "divergences/adaptive_kl.py", "divergences/alpha_beta.py"
TV, LK, TODI = (
    "divergences/total_variation.py",
    "divergences/acceptance.py",
    "divergences/todi.py",
)
FUSED, CLOSED = "objective/fused.py", "objective/closed_form.py"
GENERAL, BLOCKS = "objective/general_form.py", "objective/blocks.py"
OBJECTIVE, BUILD, LOSS = "objective/objective.py", "objective/build.py", "objective/loss.py"
TERM, TAID = "objective/divergence.py", "objective/taid.py"
DECOUPLED, SCORE = "objective/decoupled.py", "objective/concrete_score.py"
POSITIONS, SCHEDULES = "objective/positions.py", "objective/schedules.py"
SAMPLES, MIXED = "signals/samples.py", "signals/top_k_samples.py"
SYSTEMATIC, UNEVEN = "signals/systematic.py", "signals/uneven.py"
TOP_K, FORM = "signals/top_k.py", "signals/distribution.py"

LAWS = "laws/test_divergences.py::test_"
DIST = "laws/test_distributions.py::test_"
SLOPES = "laws/test_slopes.py::test_"
ORACLES = "laws/test_oracles.py::test_"
DRAWN = "laws/test_samples.py::test_"
SPLIT = "laws/test_top_k_samples.py::test_"
KEPT = "laws/test_top_k.py::test_"
TERMS = "laws/test_terms.py::test_"
HEAD = "objective/test_fused.py::test_"
STEP = "objective/test_objective.py::test_"
CHOICE = "objective/test_positions.py::test_"
TIMED = "objective/test_schedules.py::test_"
BUILT = "objective/test_build.py::test_"
SAID = "objective/test_signals.py::test_"
STATES = "objective/test_hidden_state.py::test_"
LIBRARY = "library/test_loss_library.py::test_"
