"""Students that start with their teacher's weights, as a copy or in memory once."""

from __future__ import annotations

from limbeck.layer_map import LayerMap
from limbeck.models import CausalLM, shape_facts, shared_model
from limbeck.students.base import InitialStudent, Origin, initialisers, made_of

INSTEAD = "Use an online teacher, or a pretrained student."


@initialisers.register("copy")
def copied(origin: Origin) -> InitialStudent:
    """A copy of the teacher. With `objective.alpha: 0` this fine-tunes the teacher."""
    teacher = origin.require_teacher("student.type: a copy", INSTEAD)
    names = {name: name for name in teacher.hf_model.state_dict()}
    return whole(made_of(teacher, teacher.config, names, origin), origin, "copy")


@initialisers.register("shared")
def shared(origin: Origin) -> InitialStudent:
    """The teacher's own frozen weights, in memory once; needs `trainable.lora`, one process."""
    teacher = origin.require_teacher("student.type: a shared student", INSTEAD)
    return whole(shared_model(teacher), origin, "shared")


def whole(model: CausalLM, origin: Origin, kind: str) -> InitialStudent:
    """A student with every layer of its teacher."""
    layer_map = LayerMap.surviving(range(model.num_layers))
    return InitialStudent(
        model, origin.tokenizer, layer_map, {"origin": kind, **shape_facts(model)}
    )
