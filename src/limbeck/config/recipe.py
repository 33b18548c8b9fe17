"""The sections of a recipe: every option with its type, range and default.

Closed sections are dataclasses. Open ones (`teacher`, `divergence`, ...) are mappings with a
`type`, checked against the signature of the component they name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen
from pydantic import AfterValidator

from limbeck.config.rollout import RolloutConfig
from limbeck.config.schedules import STRICT, Schedule, Scheduled
from limbeck.config.trainable import TrainableConfig
from limbeck.files import expanded
from limbeck.registry import Component

ROUNDING = 1e-9
"""Part of a step by which a product of floats may miss a whole number."""

Positive = Annotated[int, Gt(0)]
HeadBudget = Positive | Literal["auto"]
Rate = Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """Where a text is, and how its rows read."""

    __pydantic_config__ = STRICT
    type: str = "auto"
    """How a row reads: `text`, `completion` (prompt and completion), `chat` (messages), `sharegpt`
    (conversations) or `alpaca` (instruction, input, output); `auto` looks at the first row."""
    path: str = ""
    """A .jsonl(.gz), .json, .parquet or .txt file, a folder of them, or a Hugging Face data set."""
    bad_rows: Literal["error", "skip"] = "error"
    """`error` refuses a text with rows that cannot be read; `skip` leaves them out and counts
    them."""
    split: str = "train"
    """Split of a Hugging Face data set, or a part of one: `train[:1%]`."""
    subset: str | None = None
    """Subset (configuration) of a Hugging Face data set."""
    revision: str | None = None
    """Commit, tag or branch of a data set on the Hub; its newest commit by default."""
    streaming: bool = False
    """Read a Hugging Face data set from the Hub row by row, up to `max_documents`, without
    downloading all of it."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Other names for the columns a type reads, e.g. `{text: body}`; and `{weight: column}`, for a
    number that multiplies the objective on every token of its row, and `{source: column}`, for the
    name by which a routed teacher chooses and held-out figures are grouped."""
    max_documents: Positive | None = None
    """Use only the first rows of the text, at most this many."""


@dataclass(frozen=True, kw_only=True)
class MixedConfig(ReadConfig):
    """One of the texts of a mixture."""

    __pydantic_config__ = STRICT
    name: str = ""
    """Of this source, in messages and reports; by default its file or folder without suffix."""
    weight: Rate = 1.0
    """Its share of the trained tokens, relative to the weights of the others."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadConfig):
    """Training text: path, format, and how it is cut into rows."""

    __pydantic_config__ = STRICT
    mix: tuple[MixedConfig, ...] = ()
    """Several texts in place of `path`, `[{path: ..., weight: 2}, ...]`, each with its own `type`,
    `columns`, `split` and so on."""
    sequence_length: Annotated[int, Gt(1)] = 1024
    """Positions of a row; longer texts are cut into windows, none of their tokens dropped."""
    pack: bool = True
    """Put several short texts into one row; attention and positions keep them apart."""
    append_eos: bool = True
    """End each `text` and `completion` with the tokenizer's end token."""
    source: Component | str = "shuffled"
    """Batches of each step: the rows of the text, shuffled, or a batch source of your own."""

    @property
    def texts(self) -> tuple[DataConfig, ...]:
        """Each text of the mixture as if it were the only one; without a mixture, this one."""
        if not self.mix:
            return (self,)
        names = [each.name for each in fields(ReadConfig)]
        return tuple(
            replace(self, mix=(), **{name: vars(text)[name] for name in names}) for text in self.mix
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """alpha T^2 D(teacher, student) + (1 - alpha) CE + the extra terms."""

    __pydantic_config__ = STRICT
    alpha: Annotated[float | Schedule, Scheduled(Interval(ge=0, le=1))] = 0.9
    """Weight of the teacher's distribution; the data's own next token has 1 - alpha."""
    temperature: Annotated[float | Schedule, Scheduled(Gt(0))] = 1.0
    """Softens both distributions in the divergence, never in the cross-entropy."""
    divergence: Component | str | None = "forward_kl"
    """How far apart two distributions are; null leaves this term out."""
    extra: tuple[Component, ...] = ()
    """Further terms, `{type, weight, ...}`, weights absolute."""
    positions: Component | str | None = None
    """Where logits are compared, e.g. `{type: teacher_entropy, share: 0.2}`; else everywhere."""

    @property
    def divergence_weight(self) -> float | Schedule:
        """Weight of the divergence: alpha, or 0 where there is none."""
        return 0.0 if self.divergence is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and the size of a step."""

    __pydantic_config__ = STRICT
    type: Literal["adamw", "adamw_8bit", "sgd", "muon", "adafactor"] = "adamw"
    """`adamw_8bit` keeps AdamW's moments in 8 bits. `muon` updates the matrices of the blocks,
    AdamW the rest."""
    learning_rate: Rate | Annotated[tuple[Rate, ...], MinLen(1)]
    """Its peak. A list is a grid: a student is trained with each rate, and the best is kept."""
    steps: Positive | None = None
    """Optimizer steps of the run. Give this or `epochs`."""
    epochs: Rate | None = None
    """Passes over the training text, in place of `steps`; need not be whole."""
    tokens_per_step: Positive = 65_536
    """Positions of one optimizer step, over all micro-batches and ranks."""
    warmup_steps: Annotated[int, Ge(0)] | Annotated[float, Interval(gt=0, lt=1)] = 0
    """Steps from 0 to the peak; a number below 1 is a share of all steps."""
    schedule: str = "cosine"
    """Any schedule of `transformers.get_scheduler`."""
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the schedule, e.g. `{num_decay_steps: 200}` for `warmup_stable_decay`."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """On matrices only. Decoupled; SGD adds it to the gradient."""
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    """Decay rates of AdamW's means of the gradient and of its square."""
    eps: Rate = 1e-8
    """AdamW adds it to the root of the second moment."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Momentum of SGD and Muon."""
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this norm over all parameters."""
    max_bad_steps: Positive = 3
    """The run ends after this many steps in a row with a loss or gradient that is not finite. No
    such step changes the weights."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps, once `epochs` has been turned into `steps`."""
        assert self.steps is not None, "the text gives the steps of an epoch"
        return self.steps

    @property
    def num_warmup_steps(self) -> int:
        """Steps from 0 to the peak."""
        if isinstance(self.warmup_steps, int):
            return self.warmup_steps
        return math.floor(self.warmup_steps * self.num_steps + ROUNDING)

    def rescaled(self, steps: int) -> OptimConfig:
        """The same for another number of steps; warm-up and the schedule's own steps scale."""
        whole = self.num_steps
        options = {
            name: max(1, round(value * steps / whole)) if name.endswith("_steps") else value
            for name, value in self.schedule_options.items()
        }
        warmup = self.num_warmup_steps * steps // whole
        return replace(self, steps=steps, warmup_steps=warmup, schedule_options=options)

    def rows_per_step(self, sequence_length: int) -> int:
        """Rows of one optimizer step, over all micro-batches and ranks."""
        return self.tokens_per_step // sequence_length


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What students are measured on, and when."""

    __pydantic_config__ = STRICT
    data: str | Mapping[str, str] | None = None
    """Held-out text, read as `data` is; or several, `{name: path, ...}`, each measured by itself.
    Without it nothing is measured."""
    choose_by: str | None = None
    """Of several held-out texts, the one that checkpoints and learning rates are chosen on; the
    first by default."""
    split: str = "test"
    """Split of a Hugging Face data set."""
    subset: str | None = None
    """Its subset; by default that of `data`, where that is the same data set."""
    every: Positive = 250
    """Steps between measurements during the run."""
    patience: Positive | None = None
    """End training after this many measurements in a row without a better value of the metric that
    also selects the checkpoint: forward KL, and cross-entropy for the baseline."""
    max_documents: Positive | None = None
    """Use only the first rows of the file, at most this many."""
    max_tokens: Positive = 20_000
    """Held-out positions measured at the end, spread over the documents."""
    max_tokens_during: Positive = 4_000
    """Held-out positions measured during the run."""
    baseline: Literal["cross_entropy"] | None = None
    """Also train a student with alpha 0 on the same data, order and steps; costs a second run."""
    baseline_learning_rate: Rate | Annotated[tuple[Rate, ...], MinLen(1)] | None = None
    """Peak learning rate of the baseline, or a grid; by default that of `optim.learning_rate`."""
    controls: tuple[Literal["shuffled", "equal_time", "without_extra"], ...] = ()
    """Further students to compare with; each costs a run. `shuffled` learns from the teacher's
    distributions on another row's text and must not do well. `equal_time` is the baseline again,
    with as many steps as fit into the time of the distilled student's steps. `without_extra` is
    the distilled student without the terms of `objective.extra`."""
    seeds: Positive = 1
    """Train the distilled student and the baseline with this many seeds, `seed` and those after it,
    to see how much figures vary by chance; each costs a run."""
    continuations: Annotated[int, Ge(0)] = 3
    """Held-out prompts that teacher and student continue in the report."""
    suites: tuple[Component | str, ...] = ()
    """Further measurements of the final students: `generation`, `speculative` and `tasks`.
    Divergences from the teacher are always measured."""
    allow_worse_teacher: bool = False
    """Let `limbeck check` pass a teacher that predicts the text clearly worse than the student."""

    @property
    def paths(self) -> dict[str, str]:
        """Path of each held-out text by name, the one that chooses first; a single one has none."""
        if self.data is None or isinstance(self.data, str):
            return {} if self.data is None else {"": self.data}
        return dict(sorted(self.data.items(), key=lambda item: item[0] != self.choose_by))


ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory of a step; changes memory and speed, not results."""

    __pydantic_config__ = STRICT
    micro_batch: Positive | Literal["auto"] = "auto"
    """Rows of one forward and backward pass; `auto` finds what fits. Results are the same for any
    number, except where the model has dropout: its masks are drawn for each micro-batch."""
    head_budget_mb: HeadBudget = "auto"
    """Memory for the logits that exist at once, those of both models and what is done with them;
    `auto` holds 480 tokens' of any vocabulary: 180 MB for 49,152 on a CPU, 470 for 128,256; four
    times that on an accelerator."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations that a block computes again in the backward pass instead of keeping them. `full`:
    all of them, for a third more operations in the student. `selective`: all but the results of
    matrix products and attention, for hardly any more."""
    compile: Literal["auto"] | bool = False
    """Compile the blocks of student and online teacher with `torch.compile`. `true` needs g++ on a
    CPU, Triton on CUDA; `auto` compiles on CUDA where that works, and never on a CPU."""
    reduce_gradients: Literal["auto", "step", "micro_batch"] = "auto"
    """When ranks add up their gradients. `step`: once, after the last micro-batch; until then each
    rank keeps the gradients of all weights in float32, not its shard's only. `micro_batch`: after
    each. `auto` takes `step` where that needs at most an eighth of the device's memory more."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and how much of it is kept."""

    __pydantic_config__ = STRICT
    every: Positive = 250
    """Steps between checkpoints; the last step has one too."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out forward KL, and make it the student."""
    asynchronous: bool = False
    """Write checkpoints while training continues. Steps then wait for a copy in host memory only:
    of each trained parameter 12 bytes with AdamW, divided by the ranks. A checkpoint is published
    in the first step after all ranks have written it; the next one waits for it."""
    student_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Format of the finished student's weights. They are trained in float32, and rounded to it
    before the student is measured and saved."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How models are sharded over the ranks torchrun starts, and in which format they compute."""

    __pydantic_config__ = STRICT
    shard: Literal["auto", "always", "none"] = "auto"
    """`auto` shards student, optimizer and teacher over all ranks (FSDP2). `always` does so for a
    single process too, which CUDA always does: the same code then runs on a CPU. `none` keeps a
    whole copy of the models on each rank, as `replicate` with the number of ranks does."""
    replicate: Positive = 1
    """Copies of the models: ranks are divided into so many groups of neighbours, models are sharded
    inside a group, and gradients are summed over the groups once a step (HSDP). With one group a
    node, weights are gathered inside a node only. Must divide the number of ranks."""
    timeout_s: Positive = 1800
    """Seconds after which a rank that waits for the others gives up. Must exceed the longest work
    that one rank does alone: downloading, tokenising, saving."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Format the student computes in; its weights, gradients and optimizer state are float32.
    `auto` takes bfloat16 on CUDA devices that have it, and float32 elsewhere."""
    teacher: Literal["shard", "replicate", "offload"] = "shard"
    """`shard` spreads the teacher as the student. `replicate` keeps all of it on each rank, so that
    its forward pass sends nothing. `offload` keeps each rank's shards in host memory, and copies
    them to the device block by block in every forward pass."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Format in which gradients are sent to be added up over the ranks. `bfloat16` sends half the
    bytes and rounds each gradient once; micro-batches, and copies, are added up in float32."""


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What `limbeck record` keeps of the teacher, and where; `distill` does not read it."""

    __pydantic_config__ = STRICT
    output: Annotated[Path, AfterValidator(expanded)]
    """The store's folder."""
    form: Component | str = "top_k"
    """What is kept of each distribution: `{type: top_k, k: 32, temperatures: [1.0]}`, ..."""
    layers: tuple[Annotated[int, Ge(0)], ...] = ()
    """0-based teacher layers whose outputs are kept too, for terms that read hidden states."""
    shard_tokens: Positive = 1 << 20
    """Positions of a shard, the unit that is written whole and never recorded twice."""


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """The answers that `limbeck write` lets the teacher give to the prompts of `data`."""

    __pydantic_config__ = STRICT
    output: Annotated[Path, AfterValidator(expanded)]
    """The file to write, .jsonl; `data.path` of a run."""
    tokens: Positive = 512
    """Length of an answer, at most; an end token ends it earlier."""
    per_prompt: Positive = 1
    """Answers to each prompt."""
    sampling_temperature: Rate = 1.0
    """Divides the teacher's logits when it samples."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens that together reach this probability."""
    prompt_tokens: Positive = 32
    """Prompts of `text` data: this many first tokens of each document."""
    truncated: Literal["drop", "keep"] = "drop"
    """Answers that reached `tokens` without an end token."""
    filters: tuple[Component | str, ...] = ()
    """Conditions for an answer to be kept, e.g. `{type: length, at_least: 5}`; or your own."""
    batch: Positive = 16
    """Answers written at once, and the unit that is saved."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    __pydantic_config__ = STRICT
    teacher: Component
    """The large model: `{type: online, path: ...}` loads one beside the student."""
    student: Component
    """The small model, and how its first weights are made: `{type: pretrained, path: ...}`."""
    data: DataConfig
    optim: OptimConfig
    output: Annotated[Path, AfterValidator(expanded)]
    """Run directory: resolved recipe, provenance, metrics, checkpoints, student, report."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig | None = None
    """Train on text that the student or the teacher writes during the run."""
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    record: RecordConfig | None = None
    """Read by `limbeck record` only."""
    write: WriteConfig | None = None
    """Read by `limbeck write` only."""
    export: tuple[Component | str, ...] = ()
    """Formats of the finished student, each verified there: `[{type: gguf, quantize: q4_k_m}]`."""
    plugins: tuple[Path, ...] = ()
    """Python files that register components of your own; relative to the recipe's folder."""
    track: tuple[Component | str, ...] = ()
    """Where metrics go besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`, `mlflow`, with
    `{type: wandb, project: ..., name: ...}`, or a tracker of your own."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` or `mps`; `auto` takes the first of CUDA, MPS and CPU that exists."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the sample order, of random weights and of dropout."""
