"""Teachers, and students that write, in an inference server, asked over HTTP."""

from limbeck.teachers.served.base import ServedTeacher
from limbeck.teachers.served.requests import Connection, checked_url, key_of
from limbeck.teachers.served.student import ServedStudent, reached
from limbeck.teachers.served.teacher import REACHED_BY, say
from limbeck.teachers.served.vllm import Written

__all__ = [
    "REACHED_BY",
    "Connection",
    "ServedStudent",
    "ServedTeacher",
    "Written",
    "checked_url",
    "key_of",
    "reached",
    "say",
]
