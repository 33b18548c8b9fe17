"""Compares an exported file with its student: logits, tokens, special tokens, chat template."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from jinja2 import TemplateError
from torch import Tensor

from limbeck.errors import DataError
from limbeck.export.base import ExportedFile, Runtime, RuntimeTokenizer
from limbeck.losses.distributions import log_softmax
from limbeck.losses.divergences.kl import forward_kl
from limbeck.models import CausalLM, PreTrainedTokenizerBase, evaluating
from limbeck.tokenizers import backend_of

HARD_STRINGS = (
    "",
    "a  b   c    d\t\te\n\n\n  f\r\n",
    "   leading and trailing   ",
    "0123456789 3.14 1,000,000 1e-9 ४५६ ½ ²",
    "naïve café ÀÉÎ é ñ ﬁ Å ſﬀΩ",
    "a\u0301e\u0308 e\u0301",
    "🏳️‍🌈 👩‍👩‍👧‍👦 😶‍🌫️",
    "日本語のテキスト 한국어 العربية עברית",
    "I'm you're WE'LL it's 'tis don'T",
    "foo_bar(baz)[1:2]{x=>y}; // == != <a href='#'>",
    "\u200b\u00a0\u3000\ufeff x",
    "def f(x):\n    return x\n\n\nclass A:\n\tpass\n",
)
"""Texts on which tokenizers that look alike differ."""

CHAT = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "  And\n3 + 3? "},
)
SYSTEM = {"role": "system", "content": "Be brief."}


@dataclass(frozen=True)
class Difference:
    """A position at which file and student differ.

    Attributes:
        window: Index of the text's window; the last one is the long one.
        position: In the window, from 0.
        context: The text's last tokens up to there.
    """

    window: int
    position: int
    context: str
    kl: float
    student_top: str
    exported_top: str


@dataclass(frozen=True)
class TeacherDistance:
    """KL(teacher || model) on the same text, nats a token."""

    student: float
    exported: float


@dataclass(frozen=True)
class Parity:
    """How far a file is from the student.

    KL is KL(student || file) in nats a token, over all positions of held-out text.

    Attributes:
        max_kl: What the mean may be.
        kl_99: KL that 99 % of positions do not exceed.
        same_top: Share of positions with the same most probable token.
        long_window: Positions of the longest sequence.
        long_kl: Mean KL there.
        first_difference: The first position whose KL exceeds `max_kl`; None where none does.
        problems: What else differs; empty if the file tokenises, ends and renders as the student.
        teacher_kl: Distance to the teacher; None where no teacher was given.
    """

    max_kl: float
    positions: int
    mean_kl: float
    kl_99: float
    largest_kl: float
    same_top: float
    student_perplexity: float
    exported_perplexity: float
    long_window: int
    long_kl: float
    first_difference: Difference | None
    problems: tuple[str, ...]
    teacher_kl: TeacherDistance | None = None

    @property
    def passed(self) -> bool:
        """Whether the file matches the student within the bounds of its number format."""
        return not self.problems and max(self.mean_kl, self.long_kl) <= self.max_kl

    def to_plain(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {"passed": self.passed, **asdict(self)}

    def require(self, name: str) -> None:
        """Refuse a file that is not the student."""
        if self.passed:
            return
        lines = [f"{name} must compute what the student computes, and does not. It was removed."]
        lines += self.problems
        if max(self.mean_kl, self.long_kl) > self.max_kl:
            assert self.first_difference is not None, "a mean above a bound has a value above it"
            at = self.first_difference
            lines.append(
                f"Mean KL to the student is {self.mean_kl:.3g} nats ({self.long_kl:.3g} in the "
                f"window of {self.long_window:,}), at most {self.max_kl:g} is allowed; same top "
                f"token at {self.same_top:.1%} of {self.positions:,} positions. First difference: "
                f"window {at.window}, position {at.position}, after {at.context!r}: student "
                f"{at.student_top!r}, file {at.exported_top!r}, KL {at.kl:.3g}."
            )
        raise DataError("\n".join(lines))


def measure(
    student: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    file: ExportedFile,
    windows: Sequence[Sequence[int]],
    max_kl: float,
    teacher: CausalLM | None = None,
) -> Parity:
    """Compare a file with its student.

    Args:
        windows: Token ids of held-out text, at least two a window; the last is the longest.
    """
    problems = list(text_problems(student, tokenizer, runtime.tokenizer, file, windows))
    columns: list[Tensor] = []
    distances: list[Tensor] = []
    first = None
    with torch.no_grad(), evaluating(student):
        for number, window in enumerate(windows):
            ours = log_softmax(student.logits(torch.tensor([list(window)]))[0].double(), 1.0)
            theirs = runtime.logits(window)[:, : ours.shape[1]].double()
            theirs = log_softmax(theirs, 1.0)
            columns.append(compared(ours, theirs, window))
            if teacher is not None:
                distances.append(from_teacher(teacher, ours, theirs, window))
            above = (columns[-1][0] > max_kl).nonzero()
            if first is None and len(above):
                place = int(above[0])
                tops = (int(ours[place].argmax()), int(theirs[place].argmax()))
                kl = float(columns[-1][0, place])
                first = difference(tokenizer, number, place, window, tops, kl)
    kl, same, own, other = torch.cat(columns, 1)
    return Parity(
        max_kl=max_kl,
        positions=len(kl),
        mean_kl=float(kl.mean()),
        kl_99=float(kl.quantile(0.99)),
        largest_kl=float(kl.max()),
        same_top=float(same.mean()),
        student_perplexity=math.exp(float(own.nanmean())),
        exported_perplexity=math.exp(float(other.nanmean())),
        long_window=len(windows[-1]),
        long_kl=float(columns[-1][0].mean()),
        first_difference=first,
        problems=tuple(problems),
        teacher_kl=TeacherDistance(*torch.cat(distances, 1).mean(1).tolist()) if teacher else None,
    )


def compared(
    ours: Float[Tensor, "T V"], theirs: Float[Tensor, "T V"], window: Sequence[int]
) -> Float[Tensor, "4 T"]:
    """KL, same top token, and both cross-entropies; those are NaN at the last position."""
    targets = torch.tensor([*window[1:], 0])
    entropies = [-logp.gather(1, targets[:, None])[:, 0] for logp in (ours, theirs)]
    for column in entropies:
        column[-1] = math.nan
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    kl = forward_kl(theirs, ours)
    return torch.stack([kl.nan_to_num(math.inf), same, *entropies])


def from_teacher(
    teacher: CausalLM,
    ours: Float[Tensor, "T V"],
    theirs: Float[Tensor, "T V"],
    window: Sequence[int],
) -> Float[Tensor, "2 T"]:
    """KL from the teacher to the student, and to the file, over the tokens they share."""
    logits = teacher.logits(torch.tensor([list(window)]))[0].double()
    size = min(logits.shape[1], ours.shape[1])
    reference = log_softmax(logits[:, :size], 1.0)
    models = (log_softmax(logp[:, :size], 1.0) for logp in (ours, theirs))
    return torch.stack([forward_kl(logp, reference) for logp in models])


def difference(
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    place: int,
    window: Sequence[int],
    tops: tuple[int, int],
    kl: float,
) -> Difference:
    """A position with its tokens as text."""
    before = str(tokenizer.decode(list(window[max(place - 8, 0) : place + 1])))
    student_top, exported_top = (str(tokenizer.decode([token])) for token in tops)
    return Difference(number, place, before, kl, student_top, exported_top)


def text_problems(
    student: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    exported: RuntimeTokenizer,
    file: ExportedFile,
    windows: Sequence[Sequence[int]],
) -> Iterator[str]:
    """What differs before the first logit: tokens, special tokens, chat template."""
    yield from tokenisation_problems(tokenizer, exported, file, windows)
    for name, ours, theirs in (
        ("BOS", tokenizer.bos_token_id, exported.bos_id),
        ("EOS", tokenizer.eos_token_id, exported.eos_id),
    ):
        if ours is not None and ours != theirs:
            yield f"{name} is token {ours} in the student and {theirs} in the file."
    if missing := sorted(student.end_ids - exported.end_ids()):
        listed = ", ".join(f"{i} ({tokenizer.decode([i])!r})" for i in missing)
        yield f"The student ends a text at {listed}, and the file does not."
    yield from template_problems(tokenizer, exported)


def tokenisation_problems(
    tokenizer: PreTrainedTokenizerBase,
    exported: RuntimeTokenizer,
    file: ExportedFile,
    windows: Sequence[Sequence[int]],
) -> Iterator[str]:
    """The first text that the file tokenises in another way, and how it begins a text."""
    special = [str(token) for token in tokenizer.all_special_tokens]
    texts = [*HARD_STRINGS, *(str(tokenizer.decode(list(window))) for window in windows)]
    texts += [f"one{token}two {token} three" for token in special]
    if file.normalisation == "NFC":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    for text in texts:
        ours = backend_of(tokenizer).encode(text, add_special_tokens=False).ids
        theirs = exported.tokenize(text, add_special=False)
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            yield (
                f"Tokenisation differs from token {place} on: student {ours[place : place + 5]}, "
                f"file {theirs[place : place + 5]}, after "
                f"{str(tokenizer.decode(ours[max(place - 8, 0) : place]))!r}."
            )
            break
    ours, theirs = list(tokenizer("a").input_ids), exported.tokenize("a", add_special=True)
    if ours != theirs:
        yield f"A text begins or ends in another way: 'a' is {ours} in the student, {theirs} there."


def template_problems(
    tokenizer: PreTrainedTokenizerBase, exported: RuntimeTokenizer
) -> Iterator[str]:
    """The first chat that the file renders in another way."""
    chats = [chat for chat in (CHAT, (SYSTEM, *CHAT)) if rendered(tokenizer, chat) is not None]
    theirs = exported.render(chats)
    if (theirs is None) != (tokenizer.chat_template is None):
        bare, other = ("file", "student") if theirs is None else ("student", "file")
        yield f"The {bare} has no chat template, and the {other} has one."
        return
    for chat, prompt in zip(chats, theirs or (), strict=True):
        ours = rendered(tokenizer, chat)
        # llama.cpp leaves out a BOS that it adds when it tokenises.
        if ours not in (prompt, f"{tokenizer.bos_token}{prompt}"):
            yield f"The chat template renders {prompt!r} in the file, and {ours!r} in the student."
            return


def rendered(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, str]]) -> str | None:
    """A chat by the student's template, ready for an answer; None if the template refuses it."""
    if tokenizer.chat_template is None:
        return None
    messages = [dict(message) for message in chat]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, ValueError, TypeError):  # as for a role that it does not know
        return None
