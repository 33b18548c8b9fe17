"""Width pruning, family by family."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.errors import ConfigError
from limbeck.models import prove_documents_apart, prove_head, save_student
from limbeck.prune import widths_of
from limbeck.prune.activations import largest, mean_activations
from limbeck.prune.narrow import narrow_config, num_parameters
from limbeck.prune.roles import ROLES
from limbeck.prune.targets import count_of, layers_for, widths_for
from limbeck.students import Origin, initialisers
from tests.models.tiny import (
    random_batch,
    tensors_hash,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)
from tests.students.test_importance import Text
from tests.train.toy import ALONE

FREE = sorted(family for family, roles in ROLES.items() if roles.free_heads)
BOUND = sorted(set(ROLES) - set(FREE))


def origin(teacher) -> Origin:
    return dataclasses.replace(Origin(teacher, tiny_tokenizer(), ALONE), text=Text)


def narrow(teacher, **options):
    spec = {"type": "width", "calibration_tokens": 24, **options}
    return initialisers.bind(spec, "student")(origin(teacher))


def sizes(family):
    """A shape of every family that cuts all there is to cut; the teacher has 4 heads, 32 wide."""
    if family in BOUND:
        return {"intermediate": 40, "heads": 3, "hidden": 24}
    return {"intermediate": 40, "heads": 2, "kv_heads": 1, "hidden": 24}


@pytest.mark.parametrize("family", sorted(ROLES))
def test_keeping_everything_gives_the_teacher_bit_for_bit(family):
    teacher, ids = tiny_model(family, layers=3), random_batch().input_ids
    old = widths_of(teacher.config)
    student = narrow(teacher, intermediate=old.inner, hidden=old.width).model
    assert tensors_hash(student) == tensors_hash(teacher)
    assert torch.equal(student.logits(ids), teacher.logits(ids))
    assert student.config.to_diff_dict() == teacher.config.to_diff_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(ROLES))
def test_saved_student_is_the_student_in_plain_transformers(family, tied, tmp_path):
    teacher = tiny_model(family, layers=4, tie_word_embeddings=tied)
    made = narrow(teacher, layers=3, by="block_influence", **sizes(family))
    student, ids = made.model, random_batch().input_ids
    assert widths_of(student.config).width == student.width == 24
    assert widths_of(student.config).inner == 40
    assert student.config.num_hidden_layers == student.num_layers == 3
    assert student.num_parameters == num_parameters(student.config)
    prove_head(student)
    prove_documents_apart(student)
    assert len(student.generate([1, 2], 4)) == 4
    save_student(student, made.tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=student.config._attn_implementation, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, student.hf_model(ids).logits)
    assert len(made.facts["layers_kept"]) == len(made.kept["inner"]) == 3


@pytest.mark.parametrize("family", sorted(ROLES))
def test_removing_units_that_are_never_read_changes_nothing(family):
    teacher, ids = tiny_model(family, layers=2), random_batch().input_ids
    silence_units(teacher, [3, 11, 40])
    inner = widths_of(teacher.config).inner
    student = narrow(teacher, intermediate=inner - 3).model
    torch.testing.assert_close(student.logits(ids), teacher.logits(ids))


def silence_units(model, units) -> None:
    """Make units 0 whatever comes in, where nothing they would do is lost."""
    axes = ROLES[model.family]
    with torch.no_grad():
        for block in model.blocks:
            for name, weight in block.named_parameters():
                ending = ".".join(name.split(".")[-2:])
                longer = ".".join(name.split(".")[-3:])
                found = axes.axes.get(ending) or axes.axes.get(longer) or ()
                if "inner" in found:
                    weight.index_fill_(found.index("inner"), torch.tensor(units), 0)


@pytest.mark.parametrize("family", FREE)
def test_removing_a_group_of_heads_without_output_changes_nothing(family):
    """In float64: how far float32 logits round depends on the CPU's matrix kernels."""
    teacher, ids = tiny_model(family, layers=2).double(), random_batch().input_ids
    size = widths_of(teacher.config).head_width
    with torch.no_grad():
        for block in teacher.blocks:  # the second key and value head, and its two query heads
            block.self_attn.v_proj.weight[size:].zero_()
            if block.self_attn.v_proj.bias is not None:
                block.self_attn.v_proj.bias[size:].zero_()
    made = narrow(teacher, kv_heads=1)
    assert made.kept["heads"] == ((0, 1), (0, 1))
    torch.testing.assert_close(made.model.double().logits(ids), teacher.logits(ids))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [False, True])
def test_removing_zero_channels_changes_nothing_with_rms_norms(family, tied):
    teacher, ids = tiny_model(family, layers=2, tie_word_embeddings=tied), random_batch().input_ids
    gone = torch.tensor([0, 5, 6, 9, 17, 21, 30, 31])
    with torch.no_grad():
        for name, weight in teacher.hf_model.named_parameters(remove_duplicate=False):
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                weight[:, gone] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[gone] = 0
    student = narrow(teacher, hidden=24).model
    kept = narrow(teacher, hidden=24).kept["width"]
    assert {*range(32)} - set(gone.tolist()) == set(kept)
    # eps of the norms stands beside a mean over fewer channels now: 1e-6 of it, not rounding only.
    torch.testing.assert_close(student.logits(ids), teacher.logits(ids), rtol=1e-4, atol=1e-4)


def test_query_heads_may_leave_their_groups():
    made = narrow(tiny_model("qwen3", layers=2), heads=2)
    assert widths_of(made.model.config).kv_heads == 2
    for layer in made.kept["heads"]:
        assert [head // 2 for head in layer] == [0, 1]


def test_measured_activations_equal_a_direct_computation():
    teacher = tiny_llama(2, 32)
    batch = random_batch(rows=2)
    found = mean_activations(teacher, [batch])
    seen = {}
    block = teacher.blocks[1]
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _m, a: seen.update(inner=a[0])),
        block.self_attn.o_proj.register_forward_pre_hook(lambda _m, a: seen.update(heads=a[0])),
    ]
    with torch.no_grad():
        teacher(batch)
    for handle in handles:
        handle.remove()
    inner = seen["inner"][batch.scored].abs().double().mean(0)
    torch.testing.assert_close(found.inner[1], inner, rtol=1e-6, atol=0)
    heads = seen["heads"][batch.scored].view(-1, 4, 8).norm(dim=-1).double().mean(0)
    torch.testing.assert_close(found.heads[1], heads, rtol=1e-6, atol=0)
    old = widths_of(teacher.config)
    kept = largest(found, old, dataclasses.replace(old, inner=5))
    assert set(kept.inner[1]) == set(inner.topk(5).indices.tolist())


@pytest.mark.parametrize("family", sorted(ROLES))
def test_the_pruned_size_is_at_most_the_target_and_close_to_it(family):
    teacher = tiny_model(family, layers=4, width=64)
    whole = teacher.num_parameters
    for share in (1.0, 0.9, 0.75):
        target = round(share * whole)
        found = narrow(teacher, params=target).model.num_parameters
        assert 0.9 * target < found <= target
    layers = layers_for(teacher.config, round(0.7 * whole))
    assert 1 <= layers < 4
    assert narrow(teacher, keep=1.0).model.num_parameters == whole


@pytest.mark.parametrize("family", BOUND)
def test_fewer_heads_at_equal_width_are_refused_if_the_config_cannot_represent_them(family):
    with pytest.raises(ConfigError, match="hidden must be heads times the size of a head, 8"):
        narrow(tiny_model(family), heads=3)
    with pytest.raises(ConfigError, match="Set heads: 2 and hidden: 16, or cut intermediate"):
        narrow(tiny_model(family), hidden=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of the three, got none"),
        ({"keep": 0.5, "params": "1M"}, "got keep, params"),
        ({"hidden": 16, "keep": 0.5}, "got sizes, keep"),
        ({"intermediate": 65}, r"intermediate 65 \(teacher: 64\)"),
        ({"kv_heads": 3}, r"kv_heads 3 \(teacher: 2\)"),
        ({"heads": 3}, "Set heads to a multiple of kv_heads"),
        ({"heads": 3, "kv_heads": 1}, "at most 2 in one, got heads 3 and kv_heads 1"),
        ({"hidden": 30}, "llama has no model of this shape"),
        ({"params": "many"}, "reads as 60M"),
        ({"params": 3000}, "An eighth|With an eighth"),
        ({"hidden": 16, "layers": 9}, "between 1 and the teacher's 2 layers, got 9"),
    ],
)
def test_impossible_widths_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        narrow(tiny_llama(2, 32), **options)


def test_a_family_without_an_entry_is_refused():
    with pytest.raises(ConfigError, match="pruned in width, got granite"):
        narrow(tiny_model("granite"), intermediate=8)


def test_too_few_parameters_for_one_layer_are_refused():
    with pytest.raises(ConfigError, match="the embeddings are too large"):
        layers_for(tiny_llama(2, 32).config, 100)
    with pytest.raises(ConfigError, match="as 60M"):
        count_of("0")


def test_the_widest_shape_is_found():
    config = tiny_llama(2, 64).config
    whole = num_parameters(config)
    assert widths_for(config, whole) == widths_of(config)
    assert widths_for(config, whole - 1).inner < widths_of(config).inner


@pytest.mark.parametrize(
    ("inner", "multiple"), [(4096, 256), (2048, 256), (2040, 32), (256, 32), (64, 8), (24, 1)]
)
def test_units_of_a_target_fit_the_blocks_of_quantised_formats(inner, multiple):
    config = tiny_config("llama", 2, width=64, intermediate_size=inner)
    fewer = dataclasses.replace(widths_of(config), inner=inner * 3 // 4)
    target = num_parameters(narrow_config(config, fewer))
    found = widths_for(config, target).inner
    assert found % multiple == 0
    assert inner // 2 < found < inner
