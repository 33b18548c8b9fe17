"""A student with a tokenizer of its own, cut from a teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from limbeck.tokenizers import TokenBytes, load_tokenizer

END = "<|endoftext|>"
UNKNOWN = "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_bpe(corpus: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE trained on a corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def unigram(corpus: Sequence[str], size: int) -> Tokenizer:
    """A Unigram with byte fallback trained on a corpus, as SentencePiece makes it.

    The trainer makes added tokens of the bytes, and does not switch byte fallback on.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=[UNKNOWN, END, *BYTES],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tree = json.loads(tokenizer.to_str())
    model = tree["model"]
    lowest = min(score for _, score in model["vocab"]) - 10
    model["vocab"] = [[piece, lowest if piece in BYTES else s] for piece, s in model["vocab"]]
    model["byte_fallback"] = True
    tree["added_tokens"] = [each for each in tree["added_tokens"] if each["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(tree))


TOKENIZERS: Mapping[str, Callable[[Sequence[str], int], Tokenizer]] = {
    "byte_bpe": byte_bpe,
    "unigram": unigram,
}


def new_embeddings(
    old: torch.Tensor, teacher: TokenBytes, student: TokenBytes, end: int
) -> torch.Tensor:
    """For each student token the mean of the teacher's embeddings of its pieces."""
    single = {raw: i for i, raw in enumerate(teacher.bytes_of) if raw and len(raw) == 1}
    rows = []
    for token, raw in enumerate(student.bytes_of):
        ids = [single[bytes([b])] for b in raw or b"" if bytes([b]) in single]
        decoded = (raw or b"").decode(errors="ignore")
        (spans,) = teacher.spans([decoded])
        if raw is not None and decoded.encode() == raw and not isinstance(spans, str):
            ids = spans.ids
        if token == end and teacher.end is not None:
            ids = [teacher.end]
        rows.append(old[ids].mean(0) if ids else old.mean(0))
    return torch.stack(rows)


def write_student(
    teacher: Path, folder: Path, layers: Sequence[int], kind: str, size: int, corpus: Sequence[str]
) -> None:
    """A cut of the teacher with a tokenizer trained on a corpus, and embeddings for it.

    Args:
        layers: Of the teacher, which are kept.
        kind: Of the tokenizer.
        size: Of its vocabulary.
    """
    backend = TOKENIZERS[kind](corpus, size)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(layers)
    model.config.layer_types = None
    sides = TokenBytes(load_tokenizer(str(teacher)), "teacher"), TokenBytes(tokenizer, "student")
    end = int(tokenizer.eos_token_id)
    rows = new_embeddings(model.get_input_embeddings().weight.detach(), *sides, end)
    head_rows = new_embeddings(model.get_output_embeddings().weight.detach(), *sides, end)
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(rows)
        model.get_output_embeddings().weight.copy_(head_rows)  # the same matrix where it is tied
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, end, end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
