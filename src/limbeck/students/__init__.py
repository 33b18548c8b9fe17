"""How a student's first weights are made, one file each."""

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
