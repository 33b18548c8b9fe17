"""Numbers of a recipe that may follow a schedule over the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import ConfigDict, PlainSerializer, TypeAdapter, WrapValidator
from pydantic import WithJsonSchema as Described

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""What every part of a recipe holds to: no unknown option, no number that is none."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number as a function of the optimizer step, through `{step: value}`; flat at both ends."""

    __pydantic_config__ = STRICT
    type: Literal["linear", "cosine", "table"]
    """`linear` and `cosine` (half a wave) move between two steps, `table` jumps at each."""
    values: Annotated[Mapping[Annotated[int, Ge(0)], float], MinLen(1)]
    """`{from: a, to: b, steps: n}` is short for `values: {0: a, n: b}`."""


class Varying(float):
    """A number that has a schedule; to all who do not ask for it, the number of step 0."""

    schedule: Schedule

    def __new__(cls, schedule: Schedule) -> Varying:
        number = super().__new__(cls, schedule.values[min(schedule.values)])
        number.schedule = schedule
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        return Varying, (self.schedule,)


def number_or_schedule(given: Any, check: Callable[[Any], float]) -> float:
    """The number; or, of a mapping, a schedule, all of whose values pass the number's check."""
    if not isinstance(given, Mapping):
        return given if isinstance(given, Varying) else check(given)
    given = dict(given)
    if given.keys() >= {"from", "to"} and isinstance(given.get("steps"), int):
        values = {0: given.pop("from"), given.pop("steps"): given.pop("to")}
        given = {"values": values, **given}
    read: Schedule = TypeAdapter(Schedule).validate_python(given)
    if read.type != "table" and len(read.values) < 2:
        raise ValueError(f"a {read.type} schedule moves between two steps or more")
    return Varying(replace(read, values={step: check(v) for step, v in read.values.items()}))


def plain_number(number: float) -> Any:
    """What a recipe says of a number, or of its schedule."""
    return asdict(number.schedule) if isinstance(number, Varying) else number


Or = WrapValidator(number_or_schedule)
Told = PlainSerializer(plain_number)
Shown = Described({"anyOf": [{"type": "number"}, {"type": "object", "required": ["type"]}]})
