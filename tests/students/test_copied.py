"""Students that begin as their teacher: copied, or in the teacher's own weights."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.students import Origin, initialisers
from tests.models.tiny import tiny_model, tiny_tokenizer
from tests.train.toy import ALONE

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["copy", "shared"])
def test_copied_and_shared_students_have_the_logits_of_the_teacher(kind):
    teacher = tiny_model("gemma2", 3)
    made = initialisers.bind(kind, "student")(Origin(teacher, tiny_tokenizer(), ALONE))
    ids = torch.arange(12)[None]
    assert torch.equal(made.model.logits(ids), teacher.logits(ids))
    assert made.layer_map.pairs == ((0, 0), (1, 1), (2, 2))
    assert made.facts["origin"] == kind
    one, other = (next(model.parameters()).data_ptr() for model in (made.model, teacher))
    assert (one == other) == (kind == "shared")


@pytest.mark.parametrize("kind", ["copy", "shared"])
def test_a_recorded_teacher_has_no_weights_to_begin_with(kind):
    with pytest.raises(ConfigError, match=r"student\.type: .*a recorded teacher has none here"):
        initialisers.bind(kind, "student")(Origin(None, tiny_tokenizer(), ALONE))
