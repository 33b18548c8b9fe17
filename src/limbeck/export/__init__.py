"""Students in the formats they run in, each verified in its own runtime."""

from limbeck.export.base import exporters
from limbeck.export.held_out import HeldOutText
from limbeck.export.publishing import Student, export_student, open_student

__all__ = [
    "HeldOutText",
    "Student",
    "export_student",
    "exporters",
    "open_student",
]
