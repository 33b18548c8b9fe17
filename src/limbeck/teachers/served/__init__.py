"""Teachers that run in an inference server, asked over HTTP."""

from limbeck.teachers.served.teacher import REACHED_BY, ServedTeacher
from limbeck.teachers.served.vllm import Written

__all__ = ["REACHED_BY", "ServedTeacher", "Written"]
