"""The batches of a trial: rows of the recipe's text, rollouts, or both in every step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from limbeck.config import RolloutConfig, RunConfig
from limbeck.config.schedules import smallest
from limbeck.data import BatchSource, SourceContext, TextData, sources
from limbeck.data.detect import WEIGHT
from limbeck.errors import ConfigError, DataError
from limbeck.experiment.served_rollouts import served_writer
from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.registry import Problem, type_of
from limbeck.rollouts import Mixed, Prompts, Rollouts, Sampling, Scoring
from limbeck.teachers import Teacher, TeacherRequest, find_local, require_local


def rollout_problems(config: RunConfig) -> Iterator[Problem]:
    """Contradictions between `rollout` and the other sections."""
    yield from sampled_problems(config)
    rollout, length = config.rollout, config.data.sequence_length
    if rollout is None:
        return
    prompt = rollout.prompt_tokens if config.data.type == "text" else 1
    if prompt + rollout.tokens > length:
        yield Problem(
            "rollout.tokens",
            f"a prompt of {prompt} tokens and its rollout must fit into data.sequence_length = "
            f"{length}, got {rollout.tokens}. Lower rollout.tokens"
            + (" or rollout.prompt_tokens." if config.data.type == "text" else "."),
        )
    rows, written = config.optim.rows_per_step(length), rollout_rows(config, rollout)
    if rows and not (1 <= written < rows or (written == rows and rollout.share == 1)):
        yield Problem(
            "rollout.share",
            f"must be a part of the {rows} rows of a step (optim.tokens_per_step / "
            f"data.sequence_length) that is neither none nor all of them, got {rollout.share} = "
            f"{written} rows. Raise optim.tokens_per_step, or set it to 1.",
        )
    if written % rollout.per_prompt:
        yield Problem(
            "rollout.per_prompt",
            f"must divide the {written} rows of a step that are written, got "
            f"{rollout.per_prompt}. Change it, rollout.share or optim.tokens_per_step.",
        )
    if rollout.scored[0] >= rollout.scored[1]:
        yield Problem(
            "rollout.scored",
            f"must be two increasing shares, such as [0, 0.3], got {list(rollout.scored)}.",
        )
    if rollout.server is not None and rollout.writer == "teacher":
        yield Problem(
            "rollout.server",
            "must be left out with rollout.from=teacher, got both. It writes with the student's "
            "weights; a served teacher writes before a run (limbeck write).",
        )
    if rollout.refresh > 1 and rollout.writer == "teacher":
        yield Problem(
            "rollout.refresh",
            f"must be 1 with rollout.from=teacher, whose weights do not change, got "
            f"{rollout.refresh}. Remove it.",
        )
    yield from cross_entropy_problems(config, rollout)
    if config.data.mix:
        yield Problem(
            "data.mix",
            "weighs the rows of texts, and `rollout` draws its prompts from one text. Name one "
            "text as data.path, which may be a folder of files, or remove `rollout`.",
        )
    if WEIGHT in config.data.columns:
        yield Problem(
            "data.columns.weight",
            "weighs the rows of the text, and text written during the run has no weights. Remove "
            "it or `rollout`.",
        )


def cross_entropy_problems(config: RunConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    """Cross-entropy on text that the student wrote itself."""
    if rollout.writer == "teacher":
        return
    why = (
        "with rollout.from=student, cross-entropy would train the student on its own samples, "
        "which hold no information about the teacher"
    )
    lowest = smallest(config.objective.alpha)
    if lowest < 1:
        text = f"must be 1 in every step, got {lowest:g}: {why}. Set objective.alpha=1."
        yield Problem("objective.alpha", text)
    for index, spec in enumerate(config.objective.extra):
        if type_of(spec) == "cross_entropy":
            yield Problem(f"objective.extra[{index}]", f"must be another term: {why}. Remove it.")


def sampled_problems(config: RunConfig) -> Iterator[Problem]:
    """A sampled divergence on tokens that are not fresh samples of the student."""
    named = [type_of(spec) for spec in config.objective.extra]
    if "sampled_reverse_kl" not in named:
        return
    rollout = config.rollout
    if rollout is None:
        yield Problem(
            f"objective.extra[{named.index('sampled_reverse_kl')}]",
            "a term of type sampled_reverse_kl needs text that the student writes during the run, "
            "and there is no `rollout`. Add rollout={}, or remove the term.",
        )
        return
    for option, value, wanted in (
        ("share", rollout.share, 1.0),
        ("from", rollout.writer, "student"),
        ("sampling_temperature", rollout.sampling_temperature, 1.0),
        ("top_p", rollout.top_p, 1.0),
        ("refresh", rollout.refresh, 1),
    ):
        if value != wanted:
            yield Problem(
                f"rollout.{option}",
                f"must be {wanted} with a term of type sampled_reverse_kl, which is right for "
                f"tokens just drawn from the student's distribution only, got {value}.",
            )
    lora = config.trainable.lora
    if lora is not None and lora.dropout:
        yield Problem(
            "trainable.lora.dropout",
            "must be 0 with a term of type sampled_reverse_kl: text is drawn without dropout, so "
            f"the student that learns is another one, got {lora.dropout}.",
        )


def rollout_rows(config: RunConfig, rollout: RolloutConfig) -> int:
    """Rows of each optimizer step that are rollouts, over all ranks."""
    return round(rollout.share * config.optim.rows_per_step(config.data.sequence_length))


def batches(
    config: RunConfig,
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts | None,
) -> BatchSource:
    """The batches of a trial.

    Args:
        rollouts: Take the place of `rollout.share` of the rows of the text.
    """
    length = config.data.sequence_length
    rows = config.optim.rows_per_step(length)
    if rollouts is not None and config.rollout is not None:
        rows -= rollout_rows(config, config.rollout)
        if not rows:
            return rollouts
    context = SourceContext(data, tokenizer, config.seed, rows, length)
    fixed = sources.bind(config.data.source, "data.source")(context)
    return fixed if rollouts is None else Mixed(rollouts, fixed)


def make_rollouts(
    config: RunConfig,
    data: TextData,
    prompts: Prompts,
    model: CausalLM,
    root: nn.Module,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollouts:
    """The rollouts of a trial by a model, which is in the module `root` that may be sharded."""
    rollout = config.rollout
    assert rollout is not None, "prompts come with it"
    sampling = Sampling(
        tokens=rollout.tokens,
        sampling_temperature=rollout.sampling_temperature,
        top_p=rollout.top_p,
    )
    writer = None
    if rollout.server is not None:
        longest = config.data.sequence_length
        writer = served_writer(rollout.server, model, root, tokenizer, sampling, folder, longest)
    return Rollouts(
        model,
        prompts,
        sampling,
        seed=config.seed,
        rows_per_step=rollout_rows(config, rollout),
        per_prompt=rollout.per_prompt,
        refresh=rollout.refresh,
        num_steps=config.optim.num_steps,
        scoring=Scoring(*rollout.scored, rollout.position_decay),
        folder=folder / "rollouts",
        root=root,
        writer=writer,
        first_number=max(data.num_documents, data.num_rows),
    )


def prompts_of(config: RunConfig, data: TextData) -> Prompts | None:
    """The prompts of the run's rollouts; None without rollouts."""
    if config.rollout is None:
        return None
    longest = config.data.sequence_length - config.rollout.tokens
    prompts = Prompts(data, longest=longest, first_tokens=config.rollout.prompt_tokens)
    if not prompts:
        raise DataError(
            f"Rollouts need at least one document with a prompt. Of the {data.num_documents:,} of "
            f"{data.facts['path']}, {prompts.too_short:,} are too short or have no prompt, and "
            f"{prompts.too_long:,} have a prompt of over {longest:,} tokens (data.sequence_length "
            "less rollout.tokens). Change those options or the text."
        )
    return prompts


def prompt_notes(prompts: Prompts | None) -> Iterator[str]:
    """Number of prompts, and how many documents give none."""
    if prompts is None:
        return
    yield f"Rollouts continue {len(prompts):,} prompts of {prompts.mean_length:.0f} tokens."
    left_out = {
        "too short or without a prompt": prompts.too_short,
        "with a prompt that is too long": prompts.too_long,
    }
    if any(left_out.values()):
        counts = ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count)
        yield f"Documents that no rollout continues: {counts}."


def require_generation(config: RunConfig, teacher: Teacher) -> None:
    """Refuse a teacher that cannot do what the recipe's `rollout` asks of it."""
    if config.rollout is None:
        return
    teacher.require(TeacherRequest(generated=True))
    if config.rollout.writer == "teacher":
        require_local(teacher, "rollout.from: teacher")


def require_same_ends(config: RunConfig, student: CausalLM, teacher: Teacher) -> None:
    """Refuse a student that ends its texts with other tokens than its teacher.

    The teacher would score an end as any other token, and the student never learns to stop.
    """
    if config.rollout is None:
        return
    local, own = find_local(teacher), student.end_ids
    if local is not None:
        expected, agree = local.model.end_ids, local.model.end_ids == own
    else:
        end = teacher.tokenizer.eos_token_id
        expected = frozenset() if end is None else frozenset([int(end)])
        agree = expected <= own
    if not agree:
        raise ConfigError(
            "rollout: student and teacher must end a text with the same tokens, or rollouts never "
            f"learn to stop; the student's are {sorted(own)} and the teacher's {sorted(expected)}. "
            "Make eos_token_id in both generation_config.json the same."
        )
