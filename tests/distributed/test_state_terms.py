"""Terms on hidden states under two FSDP2 ranks: the same steps as one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.processes import on_ranks
from tests.distributed.test_step import as_a_rank, everything_at_once, run
from tests.train.test_state_terms import STATES
from tests.train.toy import ALONE


def test_two_ranks_take_the_same_steps_as_one_process(tmp_path):
    on_ranks(2, as_a_rank, tmp_path, "sgd", STATES, False)
    distiller, _, expected = run(ALONE, "sgd", STATES, False, everything_at_once)
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    for found, wanted in zip(outcomes, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    weights = load_file(tmp_path / "weights.safetensors")
    assert sum("projectors" in name for name in weights) == 2
    for name, value in distiller.state_dict().items():
        torch.testing.assert_close(weights[name], value)
