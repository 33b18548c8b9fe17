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


KL, SKEW = "losses/divergences/kl.py", "losses/divergences/skew.py"
JSD = "losses/divergences/jensen_shannon.py"
AKL, AB = "losses/divergences/adaptive_kl.py", "losses/divergences/alpha_beta.py"
TV, LK, TODI = (
    "losses/divergences/total_variation.py",
    "losses/divergences/acceptance.py",
    "losses/divergences/todi.py",
)
FUSED, CLOSED = "losses/head/fused.py", "losses/head/closed_form.py"
DENSE_ROWS, SPARSE_ROWS, ROW_MEMORY = (
    f"losses/head/row_kernel/{name}.py" for name in ("dense", "sparse", "memory")
)
PAIR = "losses/head/term_pair.py"
GENERAL, BLOCKS = "losses/head/general_form.py", "losses/head/blocks.py"
OBJECTIVE, BUILD, LOSS = "losses/objective.py", "losses/build.py", "losses/distillation_loss.py"
TERM, TAID = "losses/terms/divergence.py", "losses/terms/taid.py"
DECOUPLED, SCORE = "losses/terms/decoupled.py", "losses/terms/concrete_score.py"
POSITIONS, SCHEDULES = "losses/positions.py", "config/schedules.py"
SAMPLES, MIXED = "losses/distributions/samples.py", "losses/distributions/top_k_samples.py"
SYSTEMATIC, UNEVEN = "losses/distributions/systematic.py", "losses/distributions/uneven.py"
TOP_K, FORM = "losses/distributions/top_k.py", "losses/distributions/base.py"
SIGNAL, HEADER = "losses/signal.py", "store/header.py"
SHARDING, CHECKPOINTS = "distributed/sharding.py", "distributed/checkpoints.py"
LOOP, PARTS, TRIALS = "train/loop.py", "experiment/parts.py", "experiment/trials.py"

LAWS = "laws/test_divergences.py::test_"
DIST = "laws/test_distributions.py::test_"
GRADIENTS = "laws/test_gradients.py::test_"
ORACLES = "laws/test_oracles.py::test_"
DRAWN = "laws/test_samples.py::test_"
SPLIT = "laws/test_top_k_samples.py::test_"
KEPT = "laws/test_top_k.py::test_"
TERMS = "laws/test_terms.py::test_"
HEAD = "losses/test_fused.py::test_"
ROWS = "losses/test_row_kernel.py::test_"
STEP = "losses/test_objective.py::test_"
CHOICE = "losses/test_positions.py::test_"
TIMED = "config/test_schedules.py::test_"
BUILT = "losses/test_build.py::test_"
SAID = "losses/test_signals.py::test_"
STATES = "losses/test_hidden_state.py::test_"
LIBRARY = "library/test_loss_library.py::test_"
PARTED = "losses/test_parts.py::test_"
CUT = "distributed/test_step.py::test_"
RETRIED = "train/test_out_of_memory.py::test_"
KILLED = "faults/test_kill.py::test_"
DAMAGED = "faults/test_damage.py::test_"
RECORDED = "store/test_identity.py::test_"
