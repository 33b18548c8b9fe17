"""Several teachers take the step of one process wherever their weights are kept."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from limbeck.config import ObjectiveConfig
from limbeck.distributed import shard, world
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller
from limbeck.teachers import DISTRIBUTION, LocalTeacher, TeacherRequest, TextWindows
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.routed import RoutedTeacher
from limbeck.train import accumulate
from tests.data.data_files import load, write
from tests.distributed.processes import live, on_ranks
from tests.distributed.test_parallel import WAYS, gradients
from tests.distributed.test_step import require_near
from tests.models.tiny import tiny_llama
from tests.tokenizers.small import SENTENCES, small
from tests.train.toy import ALONE

KINDS = ("routed", "ensemble")


def write_sources(folder):
    """Rows 0 and 1 are of `code`, 2 and 3 of `chat`, one document a row."""
    rows = [
        {"text": f"{sentence} {sentence}"[: 40 + 20 * i], "domain": "code" if i < 2 else "chat"}
        for i, sentence in enumerate([*SENTENCES, *SENTENCES][:4])
    ]
    write(folder / "rows.jsonl", rows)
    return text_of(folder)


def text_of(folder):
    return load(folder / "rows.jsonl", pack=False, sequence_length=64, columns={"source": "domain"})


def batches_of(text, rank):
    """As many on each rank; some with documents of both teachers, of one, and of none."""
    rows = {0: [[0, 1], [2], [0, 3]], 1: [[2, 1], [3, 0], []]}[rank]
    return [text.batch(each) for each in rows]


def several(kind, text):
    """A student, and two teachers of unlike shapes."""
    vocabulary = len(small())
    models = {
        "code": tiny_llama(4, 24, vocabulary, seed=2),
        "chat": tiny_llama(3, 16, vocabulary, seed=3),
    }
    members = {name: LocalTeacher(model, tokenizer=small()) for name, model in models.items()}
    if kind == "routed":
        teacher = RoutedTeacher(members)
    else:
        teacher = Ensemble(list(members.values()), [1.0, 3.0])
    windows = TextWindows("data", text, range(len(text.windows)))
    teacher.require(
        TeacherRequest(needs=DISTRIBUTION, vocabulary_size=vocabulary, texts=(windows,))
    )
    student = tiny_llama(2, 16, vocabulary, seed=1)
    shapes = PairShapes(2, 4, 16, 24, LayerMap.uniform(2, 4))
    objective = build_objective(
        ObjectiveConfig(alpha=0.7, temperature=2.0), shapes, head_budget_mb=1
    )
    return Distiller(student, objective), teacher


def units_of(teacher):
    modules = [module for each in teacher.inner for module in each.model.modules()]
    return [module for module in modules if isinstance(module, FSDPModule)]


def kept_in_each_way(here, folder):
    text = text_of(folder)
    ranks = [batches_of(text, rank) for rank in range(here.size)]
    tokens = torch.tensor(sum(int(b.num_scored()) for batches in ranks for b in batches))
    for kind in KINDS:
        distiller, teacher = several(kind, text)
        accumulate(distiller, teacher, [b for batches in ranks for b in batches], tokens, ALONE)
        expected = gradients(distiller)
        for way in WAYS:
            distiller, teacher = several(kind, text)
            shard(distiller, distiller.student.blocks, here)
            teacher.shard(here.for_teacher(way))
            accumulate(distiller, teacher, ranks[here.rank], tokens, here)
            require_near(gradients(distiller), expected, 1e-4)
            units = units_of(teacher)
            assert len(units) == (0 if way == "replicate" else 4 + 2 + 3 + 2)
            offloaded = {
                param.offload_to_cpu
                for unit in units
                for group in unit._get_fsdp_state()._fsdp_param_groups
                for param in group.fsdp_params
            }
            assert offloaded == ({way == "offload"} if units else set())


def on_one(folder):
    with world(torch.device("cpu"), "always") as here:
        kept_in_each_way(here, folder)


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_of_several_teachers_is_that_of_one_process_wherever_they_are_kept(size, tmp_path):
    text = write_sources(tmp_path)
    assert [text.document_source(d) for d in range(4)] == ["code", "code", "chat", "chat"]
    assert text.num_rows == 4
    if size == 1:
        assert live(on_one, tmp_path) == 0
    else:
        on_ranks(size, kept_in_each_way, tmp_path)
