"""A conversation with a student, each answer scored by its teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from limbeck.errors import ConfigError, StorageError
from limbeck.evaluate.text import token_text
from limbeck.files import expanded
from limbeck.models import CausalLM, PreTrainedTokenizerBase, evaluating
from limbeck.rollouts import Rollout, Sampling, sample, seed_of

GREEDY = 1e-9
"""A top-p that leaves the most probable token only."""

RANGES = {
    "temperature": "a number from 0",
    "top-p": "a number from 0 to 1",
    "tokens": "a whole number from 1",
}
"""Values of the settings that commands change."""

Stream = Callable[[str, str], None]
"""Receives who answers, and the answer so far."""


@dataclass(frozen=True)
class Settings:
    """How answers are sampled; see the options of `limbeck chat`."""

    temperature: float = 0.7
    top_p: float = 0.95
    tokens: int = 256
    seed: int = 0

    @property
    def sampling(self) -> Sampling:
        """For `sample`."""
        if self.temperature == 0:
            return Sampling(tokens=self.tokens, top_p=GREEDY)
        return Sampling(
            tokens=self.tokens,
            sampling_temperature=self.temperature,
            top_p=max(self.top_p, GREEDY),
        )

    def changed(self, name: str, value: str) -> Settings:
        """With another temperature, top-p or number of tokens.

        Raises:
            ConfigError: The value is no such number.
        """
        with suppress(ValueError):
            if name == "tokens" and int(value) >= 1:
                return replace(self, tokens=int(value))
            if name == "top-p" and 0 <= float(value) <= 1:
                return replace(self, top_p=float(value))
            if name == "temperature" and 0 <= float(value) < math.inf:
                return replace(self, temperature=float(value))
        raise ConfigError(f"/{name} must be {RANGES[name]}, got {value!r}.")

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}, top-p {self.top_p:g}, {self.tokens} tokens"


@dataclass(frozen=True)
class ScoredAnswer:
    """What one model wrote.

    Attributes:
        text: Without special tokens.
        tokens: Each token as text, with the teacher's -log p of it in nats, None without a teacher.
        is_cut: Whether it ended at the longest answer, and not by an end token.
        tokens_per_second: Of writing it.
    """

    text: str
    tokens: tuple[tuple[str, float | None], ...]
    is_cut: bool
    tokens_per_second: float


class ChatSession:
    """The messages so far, and the models that answer."""

    def __init__(
        self,
        models: Mapping[str, CausalLM],
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        system: str | None = None,
    ) -> None:
        """
        Args:
            models: `student`, and `teacher` where there is one.
        """
        self._models, self._tokenizer = models, tokenizer
        self.settings = settings
        self._answers = 0
        self.begin(system)

    @property
    def has_template(self) -> bool:
        """Whether messages are rendered as a chat; else each is continued as plain text."""
        return self._tokenizer.chat_template is not None

    def begin(self, system: str | None) -> None:
        """Start a new conversation."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, stream: Stream) -> dict[str, ScoredAnswer]:
        """The answers to a message, by model; the student's becomes part of the conversation.

        Raises:
            ConfigError: The conversation is longer than the models can read.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(asked)
        written = {}
        for name, model in self._models.items():
            written[name] = self._write(name, model, prompt, stream)
        self._answers += 1
        self.messages = [*asked, {"role": "assistant", "content": written["student"].text}]
        return written

    def retry(self, stream: Stream) -> dict[str, ScoredAnswer]:
        """New answers to the last message.

        Raises:
            ConfigError: There is none.
        """
        if len(self.messages) < 2:
            raise ConfigError("/retry answers the last message again, and there is none yet.")
        *self.messages, question, _ = self.messages
        return self.answer(question["content"], stream)

    def save(self, path: str) -> None:
        """Append the conversation as one row of chat data.

        Raises:
            ConfigError: There is no conversation yet, or no file was named.
            StorageError: The file cannot be written.
        """
        if not path or len(self.messages) < 2:
            raise ConfigError("/save FILE appends a conversation that has an answer to a file.")
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        try:
            with expanded(path).open("a", encoding="utf-8") as file:
                file.write(f"{row}\n")
        except OSError as error:
            raise StorageError(f"{path} must be a file that can be written: {error}.") from error

    def _prompt(self, asked: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to the next answer.

        Raises:
            ConfigError: There are more than the models can read.
        """
        tokenizer: Any = self._tokenizer
        if self.has_template:
            ids: list[int] = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer.encode(asked[-1]["content"])
        limits = [m.max_positions for m in self._models.values() if m.max_positions]
        if limits and len(ids) >= min(limits):
            raise ConfigError(
                f"The conversation must be shorter than the {min(limits):,} tokens that the models "
                f"read, and has {len(ids):,}. /clear starts a new one."
            )
        return ids

    def _write(self, name: str, model: CausalLM, prompt: list[int], stream: Stream) -> ScoredAnswer:
        """One model's answer."""
        settings, started = self.settings, perf_counter()
        room = settings.tokens
        if model.max_positions:
            room = min(room, model.max_positions - len(prompt))
        sampling = replace(settings.sampling, tokens=room)

        def show(ids: list[int]) -> None:
            stream(name, self._text(ids))

        seeds = [seed_of((settings.seed, self._answers))]
        (rollout,) = sample(model, [prompt], sampling, seeds, on_tokens=show)
        seconds = perf_counter() - started
        return ScoredAnswer(
            text=self._text(rollout.token_ids),
            tokens=tuple(self._scored(name, rollout)),
            is_cut=rollout.finish == "length",
            tokens_per_second=len(rollout.token_ids) / seconds,
        )

    def _text(self, ids: list[int] | tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _scored(self, name: str, rollout: Rollout) -> list[tuple[str, float | None]]:
        """The tokens of a student's answer with the teacher's -log p, in nats."""
        ids, prompt = list(rollout.token_ids), list(rollout.prompt_ids)
        nats: list[float] | list[None] = [None] * len(ids)
        if name == "student" and "teacher" in self._models:
            nats = surprise(self._models["teacher"], rollout)
        ends = self._models[name].end_ids
        return [
            (token_text(self._tokenizer, [*prompt, *ids[:i]], token), value)
            for i, (token, value) in enumerate(zip(ids, nats, strict=True))
            if token not in ends
        ]


def surprise(model: CausalLM, rollout: Rollout) -> list[float]:
    """-log p of each written token under a model, nats."""
    ids = [*rollout.prompt_ids, *rollout.token_ids]
    tokens = torch.tensor([ids[:-1]], device=model.hf_model.device)
    with torch.no_grad(), evaluating(model):
        logits = model.logits(tokens)[0, len(rollout.prompt_ids) - 1 :].float()
    written = torch.tensor(rollout.token_ids, device=logits.device)
    values: list[float] = (-logits.log_softmax(-1).gather(-1, written[:, None])[:, 0]).tolist()
    return values
