"""A student that shares its teacher's weights and trains adapters."""

from __future__ import annotations

from limbeck.layer_map import LayerMap
from limbeck.models import shape_facts, shared_model
from limbeck.students.base import InitialStudent, Origin, initialisers


@initialisers.register("shared")
def shared(origin: Origin) -> InitialStudent:
    """The teacher's own frozen weights, in memory once; needs `trainable.lora`, one process."""
    teacher = origin.require_teacher(
        "student.type: a shared student", "Use an online teacher, or a pretrained student."
    )
    model = shared_model(teacher)
    layer_map = LayerMap.surviving(range(model.num_layers))
    facts = {"origin": "shared", **shape_facts(model)}
    return InitialStudent(model, origin.tokenizer, layer_map, facts)
