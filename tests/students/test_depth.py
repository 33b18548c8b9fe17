import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import prove_documents_apart, prove_head, save_student
from limbeck.prune import cut_config
from limbeck.students import Origin, initialisers
from limbeck.students.depth import even_layers, kept_layers
from tests.models.tiny import (
    FAMILIES,
    random_batch,
    tensors_hash,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)
from tests.train.toy import ALONE

CPU = torch.device("cpu")


def origin(teacher) -> Origin:
    return Origin(teacher, tiny_tokenizer(), ALONE)


def cut(teacher, **options):
    even = {"by": "even"} if "keep" in options and len(options) == 1 else {}
    return initialisers.bind({"type": "depth", **even, **options}, "student")(origin(teacher))


def by_hand(teacher, batch, kept):
    """The teacher run with some of its blocks only, where they stand."""
    blocks = teacher.decoder.get_submodule(teacher._blocks_name)
    whole, skipped = list(blocks), torch.nn.ModuleList(blocks[i] for i in kept)
    config = teacher.config
    types = config.to_dict().get("layer_types")
    parent, _, name = teacher._blocks_name.rpartition(".")
    try:
        setattr(teacher.decoder.get_submodule(parent), name, skipped)
        if types:
            config.layer_types = [types[i] for i in kept]
        config.num_hidden_layers = len(kept)
        with torch.no_grad():
            return teacher.hf_model(batch.input_ids, use_cache=False).logits
    finally:
        setattr(teacher.decoder.get_submodule(parent), name, torch.nn.ModuleList(whole))
        config.num_hidden_layers = len(whole)
        if types:
            config.layer_types = types


@pytest.mark.parametrize("family", FAMILIES)
def test_student_computes_the_kept_blocks_in_order(family):
    teacher, batch, kept = tiny_model(family, layers=7), random_batch(), (0, 2, 5, 6)
    student = cut(teacher, layers=kept)
    with torch.no_grad():
        logits = student.model.hf_model(batch.input_ids).logits
    torch.testing.assert_close(logits, by_hand(teacher, batch, kept))
    assert student.layer_map == LayerMap(((0, 0), (1, 2), (2, 5), (3, 6)))
    assert student.model.num_layers == student.model.config.num_hidden_layers == 4
    prove_head(student.model)
    prove_documents_apart(student.model)
    assert len(student.model.generate([1, 2], 5)) == 5, "the cache needs the blocks' new numbers"


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_nothing_gives_the_teacher_bit_for_bit(family):
    teacher, batch = tiny_model(family, layers=3), random_batch()
    student = cut(teacher, keep=3).model
    assert tensors_hash(student) == tensors_hash(teacher)
    assert torch.equal(student.logits(batch.input_ids), teacher.logits(batch.input_ids))


@pytest.mark.parametrize("tied", [False, True])
def test_students_weights_are_its_own(tied):
    teacher = tiny_llama(3, 32, tied=tied).requires_grad_(False)
    before = tensors_hash(teacher)
    student = cut(teacher, keep=2).model
    with torch.no_grad():
        for parameter in student.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert tensors_hash(teacher) == before
    weights = student.hf_model.lm_head.weight, student.hf_model.model.embed_tokens.weight
    assert (weights[0] is weights[1]) == tied


def test_lists_over_layers_are_cut_with_the_layers():
    teacher = tiny_model("gemma3_text", layers=6)
    config = cut(teacher, layers=[4, 5]).model.config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert len(teacher.config.layer_types) == 6
    smollm3 = cut_config(tiny_config("smollm3", layers=8), [2, 3])
    assert smollm3.no_rope_layers == [1, 0]


def test_narrow_teacher_gives_a_float32_student_of_equal_weights():
    teacher = tiny_llama(2, 32).to(torch.bfloat16)
    student = cut(teacher, keep=2).model
    assert student.hf_model.dtype == torch.float32
    assert torch.equal(student.head.weight, teacher.head.weight.float())


def test_generation_settings_and_vocabulary_come_along():
    teacher = tiny_llama(2, 32)
    teacher.vocabulary_size = 90
    teacher.hf_model.generation_config.eos_token_id = [2, 7]
    student = cut(teacher, keep=1).model
    assert student.end_ids == {2, 7}
    assert student.vocabulary_size == 90


def test_teacher_may_be_a_folder(tmp_path):
    teacher = tiny_llama(4, 32)
    save_student(teacher, tiny_tokenizer(), tmp_path / "t")
    make = initialisers.bind({"type": "depth", "drop": [1, 2], "path": str(tmp_path / "t")}, "s")
    student = make(origin(None))
    assert tensors_hash(student.model) == tensors_hash(cut(teacher, layers=[0, 3]).model)
    assert student.facts["cut_from"]["layers"] == 4
    assert student.facts["layers_kept"] == [0, 3]


def test_cut_student_saves_its_true_shape(tmp_path):
    student = cut(tiny_model("gemma2", layers=5), layers=[0, 3, 4])
    save_student(student.model, student.tokenizer, tmp_path / "s")
    make = initialisers.bind({"type": "pretrained", "path": str(tmp_path / "s")}, "student")
    again = make(origin(None)).model
    assert tensors_hash(again) == tensors_hash(student.model)
    assert again.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize("num_layers", range(1, 30))
def test_even_layers_are_increasing_with_both_ends(num_layers):
    for keep in range(1, num_layers + 1):
        layers = even_layers(keep, num_layers)
        assert len(layers) == keep
        assert list(layers) == sorted(set(layers))
        assert layers[0] == 0
        assert keep == 1 or layers[-1] == num_layers - 1
    assert even_layers(num_layers, num_layers) == tuple(range(num_layers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 9}, "between 1 and the teacher's 4 layers, got 9"),
        ({"layers": (0, 4)}, r"has no \[4\]"),
        ({"layers": (0, 2, 2)}, r"2 is listed twice"),
        ({"layers": (2, 0)}, r"Sort them: \[0, 2\]"),
        ({"layers": ()}, "at least one layer, but layers leaves none"),
        ({"drop": (0, 1, 2, 3)}, "at least one layer, but drop leaves none"),
        ({"drop": (7,)}, r"has no \[7\]"),
    ],
)
def test_impossible_layers_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        kept_layers(4, **({"layers": None, "keep": None, "drop": None} | options))


@pytest.mark.parametrize("options", [{}, {"keep": 1, "layers": [0]}, {"keep": 1, "drop": [0]}])
def test_exactly_one_way_to_choose_layers(options):
    with pytest.raises(ConfigError, match="exactly one of layers"):
        cut(tiny_llama(2, 32), **options)


def test_a_number_of_parameters_is_the_most_layers_that_fit():
    teacher = tiny_llama(6, 32)
    wanted = cut(teacher, keep=4).model.num_parameters
    for params in (wanted, wanted + 1, f"{wanted / 1e3}K"):
        assert cut(teacher, params=params, by="even").model.num_layers == 4
    assert cut(teacher, params=wanted - 1, by="even").model.num_layers == 3
    with pytest.raises(ConfigError, match="With one layer the student still has"):
        cut(teacher, params=10, by="even")
    with pytest.raises(ConfigError, match="reads as 60M"):
        cut(teacher, params="many", by="even")


def test_bad_options_are_found_before_anything_loads():
    problems = initialisers.problems({"type": "depth", "keep": 0, "layers": [-1]}, "student")
    assert [p.at for p in problems] == ["student.keep", "student.layers"]


def test_recorded_teacher_cannot_be_cut():
    with pytest.raises(ConfigError, match=r"recorded teacher has none here\. Set student\.path"):
        cut(None, keep=1)


def test_layout_without_an_entry_is_refused():
    with pytest.raises(ConfigError, match="pruned or resized, got olmo2"):
        cut(tiny_model("olmo2", layers=2), keep=1)


def test_unknown_list_over_layers_is_refused():
    config = tiny_config("llama", layers=3)
    config.layer_scales = [1, 2, 3]
    with pytest.raises(ConfigError, match=r"llama has layer_scales = \[1, 2, 3\]"):
        cut_config(config, [0, 1])


def test_blocks_that_depend_on_their_place_are_refused():
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx = True"):
        cut(tiny_model("gpt2", layers=3, scale_attn_by_inverse_layer_idx=True), keep=2)
