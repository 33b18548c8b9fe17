"""A student that begins as its teacher."""

from __future__ import annotations

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import copied_model, shape_facts
from limbeck.students.base import InitialStudent, Origin, initialisers


@initialisers.register("copy")
def copied(origin: Origin) -> InitialStudent:
    """The teacher's weights, copied: with `objective.alpha: 0`, a teacher that is corrected."""
    teacher = origin.teacher
    if teacher is None:
        raise ConfigError(
            "student.type: a copy is made of the teacher's model, and there is only a record of "
            "it. Use an online teacher, or a pretrained student."
        )
    model = copied_model(
        teacher.config, teacher.hf_model.state_dict(), device=origin.device, dtype=origin.dtype
    )
    model.end_like(teacher)
    model.vocabulary_size = teacher.vocabulary_size
    layer_map = LayerMap.surviving(range(model.num_layers))
    facts = {"origin": "copy", **shape_facts(model)}
    return InitialStudent(model, origin.tokenizer, layer_map, facts)
