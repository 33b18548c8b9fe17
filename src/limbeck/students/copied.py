"""A student that starts as a copy of its teacher."""

from __future__ import annotations

from limbeck.layer_map import LayerMap
from limbeck.models import shape_facts
from limbeck.students.base import InitialStudent, Origin, initialisers, made_of


@initialisers.register("copy")
def copied(origin: Origin) -> InitialStudent:
    """A copy of the teacher. With `objective.alpha: 0` this fine-tunes the teacher."""
    teacher = origin.require_teacher(
        "student.type: a copy", "Use an online teacher, or a pretrained student."
    )
    names = {name: name for name in teacher.hf_model.state_dict()}
    model = made_of(teacher, teacher.config, names, origin)
    layer_map = LayerMap.surviving(range(model.num_layers))
    facts = {"origin": "copy", **shape_facts(model)}
    return InitialStudent(model, origin.tokenizer, layer_map, facts)
