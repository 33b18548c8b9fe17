"""The recipe's options for text that is written during the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval
from pydantic import AfterValidator, Field

from limbeck.config.schedules import STRICT
from limbeck.files import expanded

Part = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class RolloutServerConfig:
    """A vLLM server that writes rollouts with the student's weights."""

    __pydantic_config__ = STRICT
    url: str
    """Address of the server, http or https."""
    model: str
    """Name of the model in the server (`--served-model-name`)."""
    folder: Annotated[Path, AfterValidator(expanded)] | None = None
    """The folder `rollout-weights` in it gets the student's weights, and the server must be able to
    read it under the same path; by default the run's directory."""
    key_env: str | None = None
    """Environment variable that holds the server's key."""
    concurrency: Annotated[int, Interval(ge=1, le=1024)] = 64
    """Requests in flight at once, of each rank."""
    timeout_s: Annotated[float, Gt(0)] = 600.0
    """Seconds to wait for one answer."""
    patience_s: Annotated[float, Ge(0)] = 600.0
    """Seconds to wait during the run for a server that does not respond."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Training text written during the run, as continuations of prompts from `data`."""

    __pydantic_config__ = STRICT
    share: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Share of the rows of each step that are written, lambda in Agarwal et al. (2024,
    arXiv:2306.13649); the other rows are text of `data`. Rounded to whole rows."""
    writer: Annotated[Literal["student", "teacher"], Field(alias="from")] = "student"
    """Model that generates: `student`, with its current weights, or an online `teacher`."""
    tokens: Annotated[int, Gt(0)] = 128
    """Length of a continuation, at most; an end token ends it earlier."""
    sampling_temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the writer's logits when it samples; `objective.temperature` is another."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens that together reach this probability."""
    per_prompt: Annotated[int, Gt(0)] = 1
    """Rollouts of each prompt, all in one step."""
    server: RolloutServerConfig | None = None
    """A vLLM server that writes; without one transformers' `generate` does, in this process."""
    refresh: Annotated[int, Gt(0)] = 1
    """The student writes the rollouts of this many steps at once, with its weights at the first of
    them, in batches as much larger."""
    scored: tuple[Part, Part] = (0.0, 1.0)
    """Part of each rollout that the student learns from, as shares of its length: `[0, 0.3]` is its
    first 30 %, `[0.7, 1]` its last. Rounded to whole tokens, at least one."""
    position_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Each scored token of a rollout weighs this times as much as the one before it; the first
    weighs 1."""
    prompt_tokens: Annotated[int, Gt(0)] = 32
    """Prompts of `text` data: this many first tokens of each document. Data of other types have
    prompts of their own: everything before the last answer or completion."""
