"""limbeck.json: beside a shrunk model's weights, what they were cut out of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import DataError
from limbeck.layer_map import LayerMap
from limbeck.models import CausalLM
from limbeck.students.base import InitialStudent, Origin

FILE = "limbeck.json"


def write_provenance(
    folder: Path, student: InitialStudent, teacher: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    """Say in a student's folder which layers, heads, units and channels of whom it kept.

    Args:
        folder: The student's.
        student: As made by `depth` or `width`.
        teacher: Facts of the model it was cut out of, with the hash of its weight files.
        more: What else is known: version, calibration text.
    """
    told = {
        **more,
        "made": dict(student.facts),
        "teacher": dict(teacher),
        "kept": dict(student.kept),
    }
    (folder / FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")


def read_provenance(path: str) -> dict[str, Any]:
    """What a student's folder says of its origin, without the long lists; empty if nothing.

    Raises:
        DataError: The file is damaged.
    """
    file = Path(path).expanduser() / FILE
    if not file.is_file():
        return {}
    try:
        told = dict(json.loads(file.read_text(encoding="utf-8")))
        told.pop("kept", None)
        kept = told["made"]["layers_kept"]
        if not all(isinstance(layer, int) for layer in (*kept, told["teacher"]["layers"])):
            raise TypeError("layers must be whole numbers")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{file} must say what the student was cut out of, as limbeck shrink wrote it, and "
            f"cannot be read: {error!r}. Make the student again, or remove the file."
        ) from error
    return told


def surviving(told: Mapping[str, Any], student: CausalLM, origin: Origin) -> LayerMap | None:
    """The map to the layers a student was cut out of, if the teacher is built like the old one.

    The weights may be others by now: a teacher that was corrected first is still the right one.
    """
    if not told:
        return None
    kept, old = told["made"]["layers_kept"], told["teacher"]
    same = (old["layers"], old["family"]) == (origin.teacher_layers, origin.teacher_family)
    return LayerMap.surviving(kept) if same and len(kept) == student.num_layers else None
