"""What `import limbeck` gives, and what it does not drag in."""

import subprocess
import sys

import pytest

import limbeck

LOSS_ALONE = """
import sys
from limbeck import DistillationLoss
DistillationLoss(alpha=0.5)
assert "transformers" not in sys.modules, "the loss needs no model library"
"""


def test_the_loss_needs_no_model_library():
    subprocess.run([sys.executable, "-c", LOSS_ALONE], check=True)


def test_every_promised_name_is_there():
    for name in limbeck.__all__:
        assert vars(limbeck).get(name) is not None or limbeck.__getattr__(name) is not None


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        limbeck.distil  # noqa: B018
