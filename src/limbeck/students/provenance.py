"""limbeck.json in the folder of a pruned model: what it was pruned from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import DataError
from limbeck.files import expanded
from limbeck.layer_map import LayerMap
from limbeck.models import CausalLM
from limbeck.students.base import InitialStudent, Origin

FILE = "limbeck.json"


def write_provenance(
    folder: Path, student: InitialStudent, teacher: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    """Write limbeck.json: teacher, and the layers, heads, units and channels that were kept."""
    provenance = {
        **more,
        "made": dict(student.facts),
        "teacher": dict(teacher),
        "kept": dict(student.kept),
    }
    (folder / FILE).write_text(json.dumps(provenance) + "\n", encoding="utf-8")


def read_provenance(path: str) -> dict[str, Any]:
    """The contents of limbeck.json without its long lists; empty without such a file."""
    file = expanded(path) / FILE
    if not file.is_file():
        return {}
    try:
        provenance = dict(json.loads(file.read_text(encoding="utf-8")))
        provenance.pop("kept", None)
        kept = provenance["made"]["layers_kept"]
        if not all(isinstance(layer, int) for layer in (*kept, provenance["teacher"]["layers"])):
            raise TypeError("layers must be whole numbers")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{file} must be as limbeck shrink wrote it, and cannot be read: {error!r}. Make the "
            "student again, or remove the file."
        ) from error
    return provenance


def surviving(provenance: Mapping[str, Any], student: CausalLM, origin: Origin) -> LayerMap | None:
    """The map to the teacher's layers that were kept; None if the teacher's shape is another.

    The teacher's weights may differ from those the student was pruned from: a teacher that was
    fine-tuned first has the same layers.
    """
    if not provenance:
        return None
    kept, old = provenance["made"]["layers_kept"], provenance["teacher"]
    same = (old["layers"], old["family"]) == (origin.teacher_layers, origin.teacher_family)
    return LayerMap.surviving(kept) if same and len(kept) == student.num_layers else None
