"""How a student's first weights are made."""

from limbeck.students.base import (
    InitialStudent,
    Origin,
    initialisers,
    reads_teacher,
)

__all__ = [
    "InitialStudent",
    "Origin",
    "initialisers",
    "reads_teacher",
]
