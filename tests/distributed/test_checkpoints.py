"""A checkpoint is all of a run or nothing, on any number of ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from limbeck.config import OptimConfig
from limbeck.distributed import latest, load_checkpoint, prune, shard, together
from limbeck.errors import DataError, RunError, StorageError
from limbeck.files import manifest
from limbeck.train import make_optimizers, train_step
from tests.distributed.processes import on_ranks
from tests.distributed.saved_checkpoint import save_checkpoint
from tests.train.toy import ALONE, ToyBatches, tensors, toy_pair

CONFIG = OptimConfig(learning_rate=0.01, steps=10, weight_decay=0.1)
ROWS = [[[0, 1], [2]], [[3], [4, 5]], [[6, 7], [8]], [[9], [0, 1]]]


def start(world=ALONE, tied=False):
    distiller, teacher = toy_pair(tied=tied)
    shard(distiller, distiller.student.blocks, world)
    shard(teacher.model, teacher.model.blocks, world)
    return distiller, teacher, make_optimizers(distiller, CONFIG, 0.01, world.device)


def steps(world, parts, which):
    distiller, teacher, optimizers = parts
    losses = []
    for step in which:
        mine = ROWS[step][world.rank : world.rank + 1] if world.size > 1 else ROWS[step]
        rows = [row for part in mine for row in part]
        batch = ToyBatches().batch(rows)
        losses.append(train_step(distiller, teacher, optimizers, [batch], world).loss)
    return losses


def save(folder, step, parts, world=ALONE):
    return save_checkpoint(folder, step, parts[0], parts[2], {"tokens": 12}, world)


def save_and_go_on(world, folder):
    parts = start(world)
    steps(world, parts, [0, 1])
    saved = save(folder, 2, parts, world)
    assert latest(folder, world) == saved
    losses = steps(world, parts, [2, 3])
    again = start(world)
    steps(world, again, [3])
    assert load_checkpoint(saved, again[0], again[2], world) == {"tokens": 12}
    assert steps(world, again, [2, 3]) == losses, "on as many ranks again, to the bit"
    held = [load_file(path) for path in saved.glob("*.safetensors")]
    values = sum(p.numel() for p in parts[0].parameters())
    saved_values = sum(tensor.numel() for file in held for tensor in file.values())
    counters = len(list(parts[0].parameters()))
    assert saved_values == 3 * values + counters, "weights and two moments, of copies one"
    if world.is_main:
        (folder / "losses.json").write_text(json.dumps(losses))


@pytest.mark.parametrize(("size", "replicate"), [(2, 1), (4, 2)])
def test_a_checkpoint_of_several_ranks_continues_on_one(size, replicate, tmp_path):
    """Of four, two have nothing to do in a step."""
    on_ranks(size, save_and_go_on, tmp_path, replicate=replicate)
    parts = start()
    load_checkpoint(tmp_path / "step-000002", parts[0], parts[2], ALONE)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert steps(ALONE, parts, [2, 3]) == pytest.approx(losses, rel=1e-5)


def load_from_one(world, folder):
    parts = start(world)
    load_checkpoint(folder / "step-000002", parts[0], parts[2], world)
    losses = steps(world, parts, [2, 3])
    assert losses == pytest.approx(json.loads((folder / "losses.json").read_text()), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "replicate"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.long)]
)
def test_a_checkpoint_of_one_continues_on_several_ranks(size, replicate, tmp_path):
    parts = start()
    steps(ALONE, parts, [0, 1])
    save(tmp_path, 2, parts)
    (tmp_path / "losses.json").write_text(json.dumps(steps(ALONE, parts, [2, 3])))
    on_ranks(size, load_from_one, tmp_path, replicate=replicate)


@pytest.mark.long
@pytest.mark.parametrize(("size", "replicate"), [(4, 1), (4, 4), (2, 1), (2, 2)])
def test_a_checkpoint_of_two_copies_continues_under_any_other_division(size, replicate, tmp_path):
    on_ranks(4, save_and_go_on, tmp_path, replicate=2)
    on_ranks(size, load_from_one, tmp_path, replicate=replicate)


def test_the_weights_of_a_checkpoint_can_be_loaded_without_the_rest(tmp_path):
    parts = start(tied=True)
    steps(ALONE, parts, [0])
    saved = save(tmp_path, 1, parts)
    before = torch.get_rng_state()
    other, _, _ = start(tied=True)
    assert load_checkpoint(saved, other, [], ALONE) == {"tokens": 12}
    for name, value in parts[0].state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert (
        other.student.head.weight.data_ptr() == other.student.decoder.embed_tokens.weight.data_ptr()
    )
    assert torch.equal(before, torch.get_rng_state())


def test_the_random_state_comes_back(tmp_path):
    parts = start()
    steps(ALONE, parts, [0])
    saved = save(tmp_path, 1, parts)
    expected = torch.rand(3)
    torch.manual_seed(99)
    load_checkpoint(saved, parts[0], parts[2], ALONE)
    assert torch.equal(torch.rand(3), expected)


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    parts = start()
    steps(ALONE, parts, [0])
    saved = save(tmp_path, 1, parts)
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}
    assert manifest(saved)["step"] == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_a_missing_shard_and_a_stray_file_are_refused(tmp_path):
    parts = start()
    steps(ALONE, parts, [0])
    saved = save(tmp_path, 1, parts)
    stray = saved / "zzz.safetensors"
    shutil.copy(next(saved.glob("*.safetensors")), stray)
    with pytest.raises(DataError, match="whole checkpoint"):
        load_checkpoint(saved, parts[0], parts[2], ALONE)
    stray.unlink()
    load_checkpoint(saved, parts[0], parts[2], ALONE)
    next(saved.glob("*.safetensors")).unlink()
    with pytest.raises(DataError, match="whole checkpoint"):
        load_checkpoint(saved, parts[0], parts[2], ALONE)


def test_a_checkpoint_of_another_objective_is_refused_and_nothing_is_loaded(tmp_path):
    from limbeck.config import ObjectiveConfig

    parts = start()
    steps(ALONE, parts, [0])
    saved = save(tmp_path, 1, parts)
    other, _ = toy_pair(ObjectiveConfig(alpha=1.0))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(DataError, match=r"objective\..* are in one of the two only"):
        load_checkpoint(saved, other, make_optimizers(other, CONFIG, 0.01, ALONE.device), ALONE)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_incomplete_and_damaged_checkpoints_are_skipped(tmp_path):
    parts = start()
    steps(ALONE, parts, [0])
    assert latest(tmp_path) is None
    good = save(tmp_path, 3, parts)
    (tmp_path / "step-000009").mkdir()
    (tmp_path / "step-000008").mkdir()
    (tmp_path / "step-000008" / ".incomplete").touch()
    shutil.copytree(good, tmp_path / "step-000007")  # whole, but it is not what its name says
    shutil.copytree(good, tmp_path / "step-000006")
    (tmp_path / "step-000006" / "manifest.json").unlink()
    (tmp_path / "step-000005").write_text("a file")
    assert latest(tmp_path) == good


def test_a_damaged_checkpoint_gives_its_name_to_a_new_one(tmp_path):
    parts = start()
    steps(ALONE, parts, [0])
    save(tmp_path, 1, parts)
    (tmp_path / "step-000001" / "state.json").write_text("{}")
    save(tmp_path, 1, parts)
    assert latest(tmp_path) == tmp_path / "step-000001"


def test_old_checkpoints_go_only_after_the_new_one_verifies(tmp_path):
    parts = start()
    steps(ALONE, parts, [0])
    for step in (1, 2, 3, 4):
        newest = save(tmp_path, step, parts)
    (newest / "state.json").write_text("{}")
    prune(tmp_path, newest, keep=1, protected=())
    assert len(list(tmp_path.iterdir())) == 4
    newest = save(tmp_path, 4, parts)
    prune(tmp_path, newest, keep=2, protected={1})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000001",
        "step-000003",
        "step-000004",
    ]


def fail_on_one(world, folder):
    def fail():
        if world.rank == 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        together(fail, world)

    def crash():
        raise ValueError("odd")

    with pytest.raises(RunError, match="ValueError: odd"):
        together(crash, world, main_only=True)

    def refuse():
        raise DataError("the file is damaged")

    with pytest.raises(DataError, match="the file is damaged"):
        together(refuse, world, main_only=True)
    (folder / str(world.rank)).touch()


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    on_ranks(2, fail_on_one, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"0", "1"}


def test_tensors_are_named_as_in_the_model(tmp_path):
    parts = start(tied=True)
    steps(ALONE, parts, [0])
    names = set(tensors(save(tmp_path, 1, parts)))
    embedding = "student.hf_model.model.embed_tokens.weight"
    assert {embedding, f"state.{embedding}.exp_avg"} <= names
    assert "student.hf_model.lm_head.weight" not in names
