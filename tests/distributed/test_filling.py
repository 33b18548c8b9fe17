"""Weights that go from their files straight into the shards of each rank."""

import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.distributed import fill, full_weights, gathered, shard, sharding
from limbeck.errors import DataError
from limbeck.heap import freed_memory_returned
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import (
    Distiller,
    ModelSource,
    load_model,
    loading_notes,
    open_model,
    save_student,
    weight_files,
)
from limbeck.models.build import hollow
from limbeck.teachers import LocalTeacher, TeacherRequest
from limbeck.teachers.local import online
from limbeck.train import train_step
from tests.distributed.processes import live, on_ranks
from tests.models.tiny import (
    FAMILIES,
    random_batch,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)
from tests.train.toy import ALONE, EVERYTHING, VOCABULARY, ToyBatches

CPU = torch.device("cpu")


def saved(folder, model):
    save_student(model, tiny_tokenizer(), folder)
    return folder


def opened(folder, dtype=torch.float32):
    return open_model(ModelSource(str(folder)), device=CPU, dtype=dtype)


def loaded(folder, dtype=torch.float32):
    return load_model(ModelSource(str(folder)), device=CPU, dtype=dtype)


def require_equal(mine, whole):
    """Weights, buffers and settings of two models, to the bit."""
    for of in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(mine.hf_model, of)()), dict(getattr(whole.hf_model, of)())
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
    assert mine.is_tied == whole.is_tied
    assert mine.config.to_dict() == whole.config.to_dict()
    settings = [model.hf_model.generation_config.to_dict() for model in (mine, whole)]
    assert settings[0] == settings[1]
    assert not any(module.training for module in mine.modules())


@pytest.mark.parametrize(
    ("family", "tied"), [*((f, False) for f in FAMILIES), ("llama", True), ("gemma2", True)]
)
def test_a_model_filled_from_its_files_is_the_one_transformers_loads(family, tied, tmp_path):
    folder = saved(tmp_path / "m", tiny_model(family, tie_word_embeddings=tied))
    for dtype in (torch.float32, torch.bfloat16):
        model = opened(folder, dtype)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        fill(model, ALONE)
        require_equal(model, loaded(folder, dtype))


def several_files(folder, model):
    model.hf_model.save_pretrained(folder, max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_checkpoint_of_several_files_is_read_in_steps_smaller_than_a_weight(
    tmp_path, monkeypatch
):
    folder = several_files(tmp_path / "m", tiny_llama(3, 32))
    monkeypatch.setattr(weight_files, "STEP_BYTES", 1000)
    model = opened(folder)
    fill(model, ALONE)
    require_equal(model, loaded(folder))


def as_a_rank(world, folder, dtype):
    whole = loaded(folder, dtype)
    model = opened(folder, dtype)
    shard(model, model.blocks, world)
    assert model.weight_files is None
    for name, value in model.state_dict().items():
        assert isinstance(value, DTensor)
        share = -(-value.shape[0] // world.mesh.shape[-1]) * value[:1].numel()
        assert value.to_local().numel() <= share, name
        assert torch.equal(value.full_tensor(), whole.state_dict()[name]), name
    batch = random_batch()
    with gathered(model), torch.no_grad():
        assert torch.equal(model(batch)[0], whole(batch)[0])
        assert torch.equal(model.head.weight, whole.head.weight)


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_each_rank_holds_its_rows_of_the_weights_that_a_whole_load_gives(tied, dtype, tmp_path):
    """97 and 40 rows do not divide by three: the last rank has fewer."""
    model = tiny_llama(3, 40, vocabulary=97, tied=tied)
    on_ranks(3, as_a_rank, several_files(tmp_path / "m", model), dtype)


@pytest.mark.long
def test_each_of_two_copies_is_read_by_rows(tmp_path):
    model = tiny_llama(3, 40, vocabulary=97)
    on_ranks(4, as_a_rank, several_files(tmp_path / "m", model), torch.bfloat16, replicate=2)


def test_a_rank_may_have_no_row_of_a_weight(tmp_path):
    """Of four rows three ranks get two, two and none."""
    on_ranks(3, as_a_rank, saved(tmp_path / "m", tiny_llama(1, 8)), torch.float32)


def test_whole_copies_on_each_rank_are_filled_too(tmp_path):
    folder = saved(tmp_path / "m", tiny_llama(2, 32))
    on_ranks(2, as_whole_copies, folder, spread="none")


def as_whole_copies(world, folder):
    model, whole = opened(folder), loaded(folder)
    shard(model, model.blocks, world)
    for name, value in model.state_dict().items():
        assert torch.equal(value.to_local(), whole.state_dict()[name]), name


class Allocations(TorchDispatchMode):
    """The largest memory an operation took, in bytes; views, as of a mapped file, take none."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        is_view = any(each.alias_info is not None for each in function._schema.returns)
        if type(made) is torch.Tensor and not made.is_meta and not is_view:
            self.largest = max(self.largest, made.untyped_storage().nbytes())
        return made


def counted(world, folder):
    model = opened(folder)
    largest = max(p.nbytes for p in model.parameters())
    assert largest == 512 * 32 * 4
    made = Allocations()

    def counting(model, world):
        with made:
            fill(model, world)

    sharding.fill = counting  # of this process, which ends with the test
    shard(model, model.blocks, world)
    assert made.largest == largest // world.size


def test_filling_allocates_no_more_than_a_rank_s_rows_of_any_weight(tmp_path):
    on_ranks(4, counted, saved(tmp_path / "m", tiny_llama(2, 32, vocabulary=512)))


def units_of(module):
    return [name for name, each in module.named_modules() if isinstance(each, FSDPModule)]


def wrapped_alike(world, folder):
    """One unit a block, the embedding and the rest, for teacher and student, filled or whole."""
    names = ["embed_tokens", *(f"layers.{i}" for i in range(3))]
    for make in (opened, loaded):
        teacher = LocalTeacher(make(folder))
        teacher.shard(world)
        assert units_of(teacher.model) == ["", *(f"hf_model.model.{name}" for name in names)]
        student = make(folder)
        torch.manual_seed(3)
        shapes = PairShapes(3, 3, 32, 32, LayerMap.uniform(3, 3))
        distiller = Distiller(student, build_objective(EVERYTHING, shapes, head_budget_mb=1))
        shard(distiller, student.blocks, world)
        assert units_of(distiller) == ["", *(f"student.hf_model.model.{name}" for name in names)]


def test_filled_and_whole_models_have_the_same_fsdp_units(tmp_path):
    on_ranks(2, wrapped_alike, saved(tmp_path / "m", tiny_llama(3, 32)))


def steps_alike(world, student_folder, teacher_folder):
    outcomes, weights = [], []
    for make, way in ((opened, "offload"), (loaded, "shard")):
        teacher = LocalTeacher(make(teacher_folder))
        student = make(student_folder)
        shapes = PairShapes(2, 4, 16, 24, LayerMap.uniform(2, 4))
        torch.manual_seed(3)
        distiller = Distiller(student, build_objective(EVERYTHING, shapes, head_budget_mb=1))
        teacher.require(TeacherRequest(needs=distiller.objective.needs))
        teacher.shard(world.for_teacher(way))
        shard(distiller, student.blocks, world)
        optimizers = [torch.optim.AdamW(distiller.parameters(), lr=0.01)]
        for rows in ([0, 1], [2]):
            batches = [ToyBatches().batch(rows)]
            outcome = train_step(distiller, teacher, optimizers, batches, world)
            outcomes.append((outcome.loss, outcome.grad_norm))
        weights.append(full_weights(distiller, world))
    assert outcomes[:2] == outcomes[2:]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_steps_from_filled_models_are_those_from_whole_ones_to_the_bit(tmp_path):
    student = saved(tmp_path / "s", tiny_llama(2, 16, VOCABULARY, seed=1, tied=True))
    teacher = saved(tmp_path / "t", tiny_llama(4, 24, VOCABULARY, seed=2))
    on_ranks(2, steps_alike, student, teacher)


def refused(world, folder, pattern):
    model = opened(folder / str(world.rank) if (folder / "0").exists() else folder)
    with pytest.raises(DataError, match=pattern):
        shard(model, model.blocks, world)


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_numbers_that_are_not_finite_are_refused_on_every_rank(tmp_path):
    folder = saved(tmp_path / "m", tiny_llama(2, 32))
    changed(folder, lambda tensors: tensors["model.norm.weight"].view(-1)[-1:].fill_(torch.nan))
    on_ranks(2, refused, folder, r"model\.norm\.weight of this llama model holds 1")


def test_other_weights_on_another_machine_are_refused(tmp_path):
    for rank in range(2):
        saved(tmp_path / str(rank), tiny_llama(2, 32, seed=rank))
    on_ranks(2, refused, tmp_path, "the files of rank 1 are not those of rank 0")


def whole_teachers(world, folder):
    """As with `parallel.teacher: replicate`."""
    here = world.unsharded
    online(here, path=str(folder / "0")).shard(here)
    teacher = online(here, path=str(folder / str(here.rank)))
    with pytest.raises(DataError, match="the files of rank 1 are not those of rank 0"):
        teacher.shard(here)


def test_other_weights_of_a_teacher_that_each_rank_loads_whole_are_refused(tmp_path):
    for rank in range(2):
        saved(tmp_path / str(rank), tiny_llama(2, 32, seed=rank))
    on_ranks(2, whole_teachers, tmp_path)


def test_weights_that_are_absent_damaged_or_of_another_shape_are_refused(tmp_path):
    folder = saved(tmp_path / "m", tiny_llama(2, 32))
    changed(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(DataError, match=r"1 are absent or of another shape: model\.norm\.weight"):
        opened(folder)
    changed(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(DataError, match=r"1 are absent or of another shape: model\.norm\.weight"):
        opened(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="are damaged"):
        opened(folder)


def test_names_of_older_checkpoints_are_those_transformers_maps_them_to(tmp_path):
    """GPT-2 was published without the prefix of its decoder."""
    folder = saved(tmp_path / "m", tiny_model("gpt2"))

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    changed(folder, rename)
    model = opened(folder)
    fill(model, ALONE)
    require_equal(model, loaded(folder))


def test_what_cannot_be_read_by_rows_is_loaded_whole_and_says_why(tmp_path):
    folder = saved(tmp_path / "m", tiny_llama(2, 32, tied=True))
    changed(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = opened(folder)
    assert not next(model.parameters()).is_meta
    (note,) = loading_notes("teacher", model)
    assert note.startswith("teacher: every rank loads all 86.7 kB of the model before it is shard")
    assert "its files hold tied weights twice" in note
    assert loading_notes("teacher", loaded(folder)) == ()


def private_mib():
    """Memory of this process that no file backs."""
    return status_mib("RssAnon")


def status_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


def between_kept_blocks():
    """Take and free ever larger blocks between those that stay, as weights between shards."""
    torch.ones(31 << 18)  # from here on glibc keeps what is smaller
    kept = []
    for size_mib in range(4, 20):
        block = torch.ones(size_mib << 18)
        kept.append(torch.ones(1 << 18))
        del block
    return kept


def freed_and_returned():
    before = private_mib()
    with freed_memory_returned():
        kept = between_kept_blocks()
    held = sum(each.nbytes for each in kept) >> 20
    assert private_mib() - before < held + 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory")
def test_memory_freed_while_models_load_goes_back_to_the_system():
    assert live(freed_and_returned) == 0


def outlined():
    """A model of 190 MiB without memory for its weights, and the address space it took."""
    config = tiny_config("llama", width=512, layers=12, intermediate_size=2048)
    hollow(tiny_config("llama"), torch.float32)  # what a first model imports and allocates
    torch.ones(31 << 18)  # from here on glibc keeps what is smaller
    before = status_mib("VmData")
    model = hollow(config, torch.float32)
    assert sum(each.nbytes for each in model.parameters()) > 180 << 20
    assert status_mib("VmData") - before < 16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory")
def test_an_outlined_model_leaves_no_holes_where_later_weights_would_stay():
    assert live(outlined) == 0
