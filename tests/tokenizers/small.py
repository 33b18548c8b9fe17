"""Small tokenizers, made and not downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "A still boils the wash and catches what rises.",
    "The spirit of a large thing fits into a small one.",
    "In 1994 there were 12 of them, and in 2026 there are 7.",
    "def distil(teacher, student): return student",
    "Grüße aus Köln, déjà vu, 日本語 and 🎉.",
)
END, BEGIN, TURN = "<|end|>", "<|begin|>", "<|turn|>"

CHATML = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def backend(vocabulary: int = 320) -> Tokenizer:
    """A byte-level BPE of three special tokens, 256 bytes and some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, BEGIN, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    return tokenizer


def wrap(
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    end: str | None = END,
    begin: str | None = None,
    pad: str | None = END,
    added: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers; padding is the end token unless said otherwise."""
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=begin, pad_token=pad
    )
    wrapped.add_special_tokens({"additional_special_tokens": [TURN]})
    wrapped.add_tokens(list(added))
    wrapped.chat_template = template
    return wrapped


def small(**options: Any) -> PreTrainedTokenizerFast:
    """A small tokenizer with the options of `wrap`."""
    return wrap(backend(), **options)


def edited(change: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A small tokenizer whose tokenizer.json was changed first."""
    tree = json.loads(backend().to_str())
    change(tree)
    return wrap(Tokenizer.from_str(json.dumps(tree)), **options)
