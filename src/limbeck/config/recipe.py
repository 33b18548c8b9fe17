"""A run's configuration: what YAML may say, and every mistake in it at once.

Closed parts are dataclasses. Open parts (`teacher`, `divergence`, ...) are mappings with a `type`,
checked against the signature of the component they name. All before any model loads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Interval, MinLen
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, TypeAdapter, ValidationError

from limbeck.config.schedules import STRICT, Schedule, Scheduled
from limbeck.config.trainable import TrainableConfig
from limbeck.errors import ConfigError
from limbeck.registry import Component, Problem, suggest

MAX_RECIPE_BYTES = 1 << 20

Positive = Annotated[int, Gt(0)]
HeadBudget = Positive | Literal["auto"]
Rate = Annotated[float, Gt(0)]

COUNTED = {"memory.micro_batch": "rows", "memory.head_budget_mb": "megabytes"}
"""What is counted where a number may be `auto`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training text: where it is, how it reads, how it is cut."""

    __pydantic_config__ = STRICT
    type: str
    """How a row reads: `text`, `completion` (prompt and completion) or `chat` (messages)."""
    path: str
    """A .jsonl(.gz), .json or .parquet file, a folder of them, or a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Other names for the columns a type reads, e.g. `{text: body}`; and `{weight: column}`, for a
    number that multiplies the objective on every token of its row."""
    sequence_length: Annotated[int, Gt(1)] = 1024
    """Positions of a row; longer texts are cut into windows, none of their tokens dropped."""
    pack: bool = True
    """Put several short texts into one row; attention and positions keep them apart."""
    append_eos: bool = True
    """End each `text` and `completion` with the tokenizer's end token."""
    max_documents: Positive | None = None
    """Use only the first so many rows of the file."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """alpha T^2 D(teacher, student) + (1 - alpha) CE + the extra terms."""

    __pydantic_config__ = STRICT
    alpha: Annotated[float | Schedule, Scheduled(Interval(ge=0, le=1))] = 0.9
    """Weight of the teacher's distribution; the data's own next token has 1 - alpha."""
    temperature: Annotated[float | Schedule, Scheduled(Gt(0))] = 1.0
    """Softens both distributions in the divergence, never in the cross-entropy."""
    divergence: Component | str = "forward_kl"
    """How far apart two distributions are."""
    extra: tuple[Component, ...] = ()
    """Further terms, `{type, weight, ...}`, weights absolute."""
    positions: Component | str | None = None
    """Where logits are compared, e.g. `{type: teacher_entropy, share: 0.2}`; else everywhere."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and the size of a step."""

    __pydantic_config__ = STRICT
    type: Literal["adamw", "sgd", "muon", "adafactor"] = "adamw"
    """`muon` serves the matrices of the blocks and AdamW the rest."""
    learning_rate: Rate | Annotated[tuple[Rate, ...], MinLen(1)]
    """Peak. A list is a grid: every arm is trained once with each, and its best kept."""
    steps: Positive
    """Optimizer steps of the run."""
    tokens_per_step: Positive = 65_536
    """Positions of one optimizer step, over all micro-batches and ranks."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps from 0 to the peak."""
    schedule: str = "cosine"
    """Any schedule of `transformers.get_scheduler`."""
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    """Its own options, e.g. `{num_decay_steps: 200}` for `warmup_stable_decay`."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """On matrices only; decoupled, but for SGD's, which is torch's own."""
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """Of AdamW."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Of SGD and Muon."""
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this norm over all parameters."""
    max_bad_steps: Positive = 3
    """Steps in a row whose loss or gradient is not finite before the run stops; none is taken."""

    def rows_per_step(self, sequence_length: int) -> int:
        """Rows of one optimizer step, over all micro-batches and ranks."""
        return self.tokens_per_step // sequence_length


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the student is held against, and when."""

    __pydantic_config__ = STRICT
    data: str | None = None
    """Held-out text, read as `data` is. Without it nothing is measured."""
    split: str = "test"
    """Split of a Hugging Face data set."""
    every: Positive = 250
    """Steps between measurements during the run."""
    max_documents: Positive | None = None
    """Use only the first so many rows of the file."""
    max_tokens: Positive = 20_000
    """Held-out positions measured at the end, spread over the documents."""
    max_tokens_during: Positive = 4_000
    """Held-out positions measured during the run."""
    baseline: Literal["cross_entropy"] | None = None
    """Also train a student with alpha 0 on the same data, order and steps; costs a second run."""
    baseline_learning_rate: Rate | Annotated[tuple[Rate, ...], MinLen(1)] | None = None
    """Its peak, or a grid; that of `optim.learning_rate` by default."""
    continuations: Annotated[int, Ge(0)] = 3
    """Held-out beginnings that teacher and student continue in the report."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How a step is cut up; changes memory and speed, not results."""

    __pydantic_config__ = STRICT
    micro_batch: Positive | Literal["auto"] = "auto"
    """Rows of one forward and backward; `auto` finds what fits."""
    head_budget_mb: HeadBudget = "auto"
    """Memory for the logits that exist at once, those of both models and what is done with them;
    `auto` holds 480 tokens' of any vocabulary: 180 MB for 49,152 on a CPU, 470 for 128,256; four
    times that on an accelerator."""
    activation_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and how much of it is kept."""

    __pydantic_config__ = STRICT
    every: Positive = 250
    """Steps between checkpoints; the last step has one too."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the one with the least held-out divergence as well, and make it the student."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How models are spread over the ranks torchrun starts."""

    __pydantic_config__ = STRICT
    shard: Literal["auto", "none"] = "auto"
    """`auto` shards student, optimizer and teacher over all ranks (FSDP2)."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What `limbeck record` keeps of the teacher, and where; `distill` does not read it."""

    __pydantic_config__ = STRICT
    output: Annotated[Path, AfterValidator(Path.expanduser)]
    """The store's folder."""
    form: Component | str = "top_k"
    """What is kept of each distribution: `{type: top_k, k: 32, temperatures: [1.0]}`, ..."""
    layers: tuple[Annotated[int, Ge(0)], ...] = ()
    """0-based teacher layers whose outputs are kept too, for terms that read hidden states."""
    shard_tokens: Positive = 1 << 20
    """Positions of a shard, the unit that is written whole and never recorded twice."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    __pydantic_config__ = STRICT
    teacher: Component
    """`{type: online, path: ...}`."""
    student: Component
    """`{type: pretrained | random | depth, ...}`."""
    data: DataConfig
    optim: OptimConfig
    output: Annotated[Path, AfterValidator(Path.expanduser)]
    """Run directory: resolved recipe, provenance, metrics, checkpoints, student, report."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    record: RecordConfig | None = None
    """Of `limbeck record` only."""
    track: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where metrics go besides metrics.jsonl."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `mps`."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the sample order and of random weights."""


Check = Callable[[RunConfig], Iterable[Problem]]


def read(path: Path, overrides: Iterable[str] = (), check: Check = lambda _: ()) -> RunConfig:
    """Read YAML, apply `a.b=value` overrides, check everything.

    Args:
        path: The recipe.
        overrides: Each `a.b=value`, the value in YAML.
        check: Further mistakes of a configuration whose closed parts are right.

    Raises:
        ConfigError: With one line a mistake, each beginning with the path of the field.
    """
    tree = parse(path, overrides)
    if "stages" in tree:
        raise ConfigError(
            f"{path} has stages, and one run is asked for. `limbeck distill` runs them all, and "
            "with --print-config prints the recipe of each."
        )
    config, problems = validated(tree, check)
    if config is None or problems:
        raise ConfigError("\n  ".join([f"{path} cannot be run:", *one_line_each(problems)]))
    return config


def validated(
    tree: Mapping[str, Any], check: Check = lambda _: ()
) -> tuple[RunConfig | None, list[Problem]]:
    """The configuration a tree stands for, if its closed parts are right, and every mistake."""
    problems = list(not_finite(tree))
    try:
        config = TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        return None, problems + [explain(dict(e)) for e in error.errors()]
    return config, [*problems, *check(config)]


def one_line_each(problems: Iterable[Problem]) -> list[str]:
    """Problems as lines, a place's first only; a list's own is left out when an item has one."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.at, problem)
    return [str(p) for at, p in first.items() if not any(o.startswith(f"{at}[") for o in first)]


def parse(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """The plain tree a recipe and its overrides stand for.

    Raises:
        ConfigError: It cannot be read, is not a mapping, or wants to look outside itself.
    """
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes; a recipe has at most a million.")
        overrides = list(overrides)  # read twice, and an iterator can be read once
        wrong = [o for o in overrides if "=" not in o]
        if wrong:
            raise ConfigError(f"An override reads key.sub=value, got {wrong[0]!r}.")
        base = OmegaConf.create(path.read_text(encoding="utf-8"))
        if not OmegaConf.is_dict(base):
            raise ConfigError(f"{path} must hold a mapping of sections.")
        for override in overrides:
            key = override.partition("=")[0]
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(base, key, value, merge=False)
        tree = OmegaConf.to_container(base, resolve=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except (OmegaConfBaseException, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a recipe: {error}") from None
    except Exception as error:  # the YAML parser's own errors share no base with OmegaConf's
        if type(error).__module__.split(".")[0] not in {"yaml", "omegaconf"}:
            raise
        raise ConfigError(f"{path} is not YAML: {error}") from None
    assert isinstance(tree, dict), "OmegaConf keeps a mapping a mapping"
    for at, value in leaves(tree):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{path}: {at} refers to something outside ({value!r}); recipes are plain values, "
                "so that the saved recipe is the whole truth and holds no secret."
            )
    return {str(key): value for key, value in tree.items()}


def leaves(tree: Any, at: tuple[int | str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every value in nested mappings and lists, with its path."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    else:
        yield dotted(at), tree
    for key, child in children:
        yield from leaves(child, (*at, key))


def not_finite(tree: Any) -> Iterator[Problem]:
    """A problem for every NaN and infinity."""
    for at, value in leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(at, f"must be a finite number, got {value}.")


def explain(error: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors, in our words."""
    where = tuple(part for part in error["loc"] if not is_branch(part))
    at, got = dotted(where), error["input"]
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            at = dotted(error["loc"])
            known = fields_at(error["loc"][:-1])
            return Problem(at, f"no such option{suggest(str(error['loc'][-1]), known)}.")
        case "missing" | "missing_keyword_only_argument" | "missing_argument":
            return Problem(at, "is missing, and a run needs it.")
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return Problem(at, f"must be {bounds(where, error)}, got {got}.")
        case "literal_error":
            return Problem(at, f"must be {error['ctx']['expected']}, got {got!r}.")
        case "int_parsing" if at in COUNTED:
            return Problem(at, f"must be a whole number of {COUNTED[at]} or 'auto', got {got!r}.")
    return Problem(at, f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {got!r}.")


def is_branch(part: int | str) -> bool:
    """Whether a part of pydantic's location names a branch of a union, not a field."""
    return isinstance(part, str) and (part in {"float", "int", "str"} or not part.isidentifier())


def bounds(where: tuple[int | str, ...], error: Mapping[str, Any]) -> str:
    """The whole range an option must lie in, as words."""
    if where == ("objective", "alpha"):
        return "between 0 and 1"
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    return " and ".join(f"{words[k]} {v:g}" for k, v in error["ctx"].items() if k in words)


def fields_at(where: Iterable[int | str]) -> list[str]:
    """Names of the options a section of `RunConfig` takes; none for an open part."""
    section: Any = RunConfig
    for part in where:
        if not dataclasses.is_dataclass(section):
            return []
        section = get_type_hints(section).get(str(part))
    known = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
    return [f.name for f in known]


def dotted(location: Iterable[int | str]) -> str:
    """Write a path into nested data as it is written in Python.

    Example:
        >>> dotted(("objective", "extra", 1, "weight"))
        'objective.extra[1].weight'
    """
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).lstrip(".")


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading it back gives the same configuration."""
    return str(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as what JSON can hold."""
    plain: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return plain
