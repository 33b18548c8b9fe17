import json

import pytest
import torch
import torch._inductor.config
from safetensors import safe_open

from limbeck.config import MemoryConfig
from limbeck.distributed import shard, world
from limbeck.errors import ConfigError
from limbeck.models import compilation
from limbeck.train import train
from tests.distributed.processes import live
from tests.experiment.test_run import run
from tests.experiment.tiny_run import steps_of, write_recipe
from tests.train.toy import ALONE, toy_pair, toy_setup

FULL = ["memory.compile=true", "memory.activation_checkpointing=full"]


@pytest.fixture(autouse=True)
def _fresh():
    """No code, and no answer about the compiler, of another test."""
    compilation.compiler_problem.cache_clear()
    torch.compiler.reset()
    yield
    compilation.compiler_problem.cache_clear()


def losses(folder, here, dtype=None, **memory):
    pair = toy_pair()
    shard(pair[0], pair[0].student.blocks, here, compute_dtype=dtype)
    pair[1].shard(here)
    optim = {"steps": 2}
    memory = MemoryConfig(micro_batch=2, **memory)
    train(toy_setup(folder, pair=pair, optim=optim, memory=memory, world=here))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


def compare(folder, here, dtype=None):
    compilation.BACKEND = "aot_eager"
    plain = losses(folder / "plain", here, dtype)
    compiled = losses(folder / "compiled", here, dtype, compile=True)
    assert compiled == pytest.approx(plain, rel=1e-5 if dtype is None else 1e-2)
    names = [stored_names(folder / each / "checkpoints") for each in ("plain", "compiled")]
    assert names[0] == names[1] != []


def compare_on_a_mesh(folder):
    with world(torch.device("cpu"), "always") as here:
        compare(folder, here)


def stored_names(folder):
    names = []
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names += sorted(file.keys())
    return names


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_run_has_the_losses_and_the_checkpoints_of_a_plain_one(
    dtype, tmp_path, monkeypatch
):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    compare(tmp_path, ALONE, dtype)


@pytest.mark.long
def test_a_mesh_of_one_compiles_too(tmp_path):
    assert live(compare_on_a_mesh, tmp_path) == 0


@pytest.mark.long
@pytest.mark.parametrize("parallel", [{}, {"shard": "always"}])
def test_a_recipe_compiled_by_the_real_compiler_ends_where_the_plain_one_does(parallel, tmp_path):
    path = write_recipe(tmp_path, parallel=parallel)
    students = run(path).student, run(path, *FULL, f"output={tmp_path / 'compiled'}").student
    found = [[step["loss"] for step in steps_of(each.parent)] for each in students]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert stored_names(students[0]) == stored_names(students[1])


def test_without_a_compiler_the_run_ends_before_its_first_step(tmp_path):
    settings = {"cpp.cxx": (None, str(tmp_path / "no-g++")), "force_disable_caches": True}
    memory = MemoryConfig(micro_batch=2, compile=True)
    with (
        torch._inductor.config.patch(settings),
        pytest.raises(ConfigError, match=r"memory\.compile.*no code can be compiled for cpu"),
    ):
        train(toy_setup(tmp_path, memory=memory))
    assert not (tmp_path / "metrics.jsonl").exists()
