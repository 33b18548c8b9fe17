"""What a GPU runs, on a CPU: one process sharded over itself, float32 weights, bfloat16 compute."""

import json

import pytest

import limbeck
from limbeck.commands.check import check
from limbeck.errors import ConfigError
from tests.distributed.processes import live
from tests.experiment.house import write_recipe

SHARDED = ["parallel.shard=always"]
REDUCED = ["parallel={shard: always, compute_dtype: bfloat16}"]
SWITCHES = pytest.mark.parametrize("switches", [SHARDED, REDUCED], ids=["mesh", "bfloat16"])


def trained(path, overrides, result):
    with limbeck.assemble(limbeck.load(path, overrides)) as run:
        evaluation = run.train().evaluation
    result.write_text(json.dumps(evaluation))


def checked(path, overrides):
    check(path, overrides, as_json=True, schema=False)


def evaluation(folder, overrides):
    folder.mkdir()
    path = write_recipe(folder, evaluate={"baseline": "cross_entropy"})
    assert live(trained, path, overrides, folder / "result.json") == 0
    return json.loads((folder / "result.json").read_text())["arms"]


def test_a_run_on_a_mesh_of_one_has_the_figures_of_a_plain_run(tmp_path):
    plain = evaluation(tmp_path / "plain", [])
    for switches, allowed in ((SHARDED, 1e-5), (REDUCED, 2e-2)):
        figures = evaluation(tmp_path / switches[0][9:14], switches)
        for trial in ("initial", "distilled", "cross_entropy"):
            wanted = plain[trial]["forward_kl"]["value"]
            assert figures[trial]["forward_kl"]["value"] == pytest.approx(wanted, rel=allowed)


@SWITCHES
def test_everything_check_tries_holds_on_sharded_models(switches, tmp_path):
    assert live(checked, write_recipe(tmp_path), switches) == 0


def test_a_shared_student_has_no_compute_data_type_of_its_own(tmp_path):
    overrides = ["student={type: shared}", "trainable={lora: {}}", *REDUCED]
    path = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"parallel\.compute_dtype: must be auto for a shared"):
        limbeck.load(path, overrides)
