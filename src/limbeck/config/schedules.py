"""Recipe numbers that may follow a schedule: pure functions of the optimizer step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import BaseMetadata, Ge, GroupedMetadata, MinLen
from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Pydantic settings of every recipe section: no unknown options, finite numbers only."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number as a function of the optimizer step, through `{step: value}`; constant outside."""

    __pydantic_config__ = STRICT
    type: Literal["linear", "cosine", "table"]
    """`linear` and `cosine` (half a period) interpolate; `table` holds each value until the next
    step listed."""
    values: Annotated[Mapping[Annotated[int, Ge(0)], float], MinLen(1)]
    """`{from: a, to: b, steps: n}` is short for `values: {0: a, n: b}`."""

    def value(self, step: int) -> float:
        """The value at an optimizer step, counted from 0."""
        points = sorted(self.values.items())
        if step < points[0][0]:
            return points[0][1]
        for (start, before), (end, after) in itertools.pairwise(points):
            if start <= step < end:
                fraction = (step - start) / (end - start)
                return before + (after - before) * self._eased(fraction)
        return points[-1][1]

    def _eased(self, fraction: float) -> float:
        match self.type:
            case "linear":
                return fraction
            case "cosine":
                return 0.5 - 0.5 * math.cos(math.pi * fraction)
            case "table":
                return 0.0


def value_at(number: float | Schedule, step: int) -> float:
    """The number at an optimizer step, counted from 0.

    Example:
        >>> alpha = Schedule(type="linear", values={0: 0.0, 100: 0.8})
        >>> value_at(alpha, 50), value_at(alpha, 1000), value_at(0.3, 50)
        (0.4, 0.8, 0.3)
    """
    return number.value(step) if isinstance(number, Schedule) else number


def largest(number: float | Schedule) -> float:
    """The maximum over all steps."""
    return max(number.values.values()) if isinstance(number, Schedule) else number


def smallest(number: float | Schedule) -> float:
    """The minimum over all steps."""
    return min(number.values.values()) if isinstance(number, Schedule) else number


def values_over(number: float | Schedule, steps: int) -> tuple[float, ...]:
    """Every distinct value within the first optimizer steps, in order of first use.

    Example:
        >>> values_over(Schedule(type="table", values={0: 1.0, 100: 2.0, 200: 1.0}), 1000)
        (1.0, 2.0)
    """
    return tuple(dict.fromkeys(value_at(number, step) for step in range(steps)))


@dataclass(frozen=True)
class Scheduled:
    """Type annotation: a number within bounds, or a schedule whose values all are.

    Example:
        >>> temperature: Annotated[float | Schedule, Scheduled(Gt(0))]
    """

    bounds: BaseMetadata | GroupedMetadata

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            number_or_schedule,
            handler.generate_schema(Annotated[float, self.bounds]),
            serialization=core_schema.plain_serializer_function_ser_schema(to_plain),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [handler(schema), {"type": "object", "required": ["type"]}]}


def number_or_schedule(value: Any, check: Callable[[Any], float]) -> float | Schedule:
    """A number, or the schedule that a mapping describes, every value of it checked."""
    if isinstance(value, Mapping):
        options = dict(value)
        if options.keys() >= {"from", "to"} and isinstance(options.get("steps"), int):
            ends = {0: options.pop("from"), options.pop("steps"): options.pop("to")}
            options = {"values": ends, **options}
        value = TypeAdapter(Schedule).validate_python(options)
        if value.type != "table" and len(value.values) < 2:
            raise ValueError(f"a {value.type} schedule needs values at two steps or more")
    if isinstance(value, Schedule):
        return replace(value, values={step: check(each) for step, each in value.values.items()})
    return check(value)


def to_plain(number: float | Schedule) -> float | dict[str, Any]:
    """The form a saved recipe holds: the number, or the fields of its schedule."""
    return asdict(number) if isinstance(number, Schedule) else number
