"""What a GPU runs, on a CPU: one process sharded over itself, float32 weights, bfloat16 compute.

And bfloat16 without a mesh, where weights are cast by limbeck.
"""

import json
from functools import partial

import pytest

import limbeck
from limbeck.commands.check import check
from limbeck.errors import ConfigError
from tests.commands import test_check
from tests.distributed.processes import live
from tests.experiment import test_run, test_stages, test_stored, test_trainable, tiny_run
from tests.experiment.tiny_run import write_recipe

SHARDED = ["parallel.shard=always"]
REDUCED = ["parallel={shard: always, compute_dtype: bfloat16}"]
CAST = ["parallel.compute_dtype=bfloat16"]
SWITCHES = pytest.mark.parametrize(
    "switches", [SHARDED, REDUCED, CAST], ids=["mesh", "bfloat16", "cast"]
)


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
    return json.loads((folder / "result.json").read_text())["trials"]


def test_a_run_on_a_mesh_of_one_has_the_figures_of_a_plain_run(tmp_path):
    plain = evaluation(tmp_path / "plain", [])
    for switches, allowed in ((SHARDED, 1e-5), (REDUCED, 2e-2), (CAST, 2e-2)):
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


AGAIN = {
    "run": test_run.test_a_recipe_becomes_a_student_a_table_and_a_report,
    "grid": test_run.test_a_grid_keeps_the_rate_with_the_lowest_kl,
    "resume a finished run": test_run.test_resuming_a_finished_run_trains_nothing_and_says_the_same,
    "check": test_check.test_a_valid_recipe_is_checked_and_planned_and_nothing_is_written,
    "stages": test_stages.test_the_first_teacher_may_teach_throughout,
    "store": partial(
        test_stored.test_a_run_from_a_part_of_the_distribution_measures_what_that_part_holds,
        form=test_stored.TOP_K,
        metrics={"forward_kl", "reverse_kl", "total_variation"},
    ),
    "adapters": partial(
        test_trainable.test_both_trials_begin_with_the_same_weights, trainable=test_trainable.DORA
    ),
}
RESUMES = {
    "all weights": "trainable={freeze: []}",
    "adapters": "trainable={lora: {rank: 2, dropout: 0.1}}",
    "rounded weights": "trainable={quantize: q8_0}",
}


@pytest.fixture
def _sharded(switch, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny_run, "PARALLEL", switch)


MESH = {"shard": "always"}
CAST_ALONE = {"compute_dtype": "bfloat16"}
BFLOAT16 = {**MESH, **CAST_ALONE}
SWITCH = pytest.mark.parametrize(
    "switch",
    # bfloat16 takes the mesh's path as well
    [
        pytest.param(MESH, marks=pytest.mark.long, id="mesh"),
        pytest.param(BFLOAT16, id="bfloat16"),
        pytest.param(CAST_ALONE, id="cast"),
    ],
)


@SWITCH
@pytest.mark.usefixtures("_sharded")
@pytest.mark.parametrize("again", AGAIN)
def test_what_holds_of_a_plain_run_holds_on_a_mesh_and_in_bfloat16(again, tmp_path):
    AGAIN[again](tmp_path)


@SWITCH
@pytest.mark.usefixtures("_sharded")
@pytest.mark.parametrize("trainable", RESUMES)
def test_a_stopped_run_resumes_to_the_same_bits_on_a_mesh_and_in_bfloat16(
    trainable, tmp_path, monkeypatch
):
    test_trainable.test_a_stopped_run_resumes_to_the_same_bits(
        RESUMES[trainable], tmp_path, monkeypatch
    )


@pytest.mark.usefixtures("_sharded")
@pytest.mark.parametrize(
    ("switch", "allowed"), [(MESH, 1e-4), (BFLOAT16, 5e-3), (CAST_ALONE, 5e-3)]
)
def test_a_finished_student_is_measured_in_float32_and_keeps_its_figures(allowed, tmp_path):
    """`evaluate` loads float32 weights; the run measured its student in the type it computes in."""
    test_run.evaluate_again(tmp_path, allowed)
