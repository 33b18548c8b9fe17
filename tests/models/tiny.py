"""Tiny random models of every family the tests meet, and a batch to give them."""

import hashlib

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from limbeck.batch import Batch
from limbeck.models import CausalLM
from limbeck.models.build import from_config

VOCABULARY = 96


def tiny_config(
    family: str, layers: int = 2, width: int = 32, vocabulary: int = VOCABULARY, **more: object
) -> PreTrainedConfig:
    """A small configuration of a family, under transformers' common names."""
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # large, so that every part of the model matters
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family not in ("gpt2",):
        settings["intermediate_size"] = 2 * width
    if family not in ("gpt2", "gpt_neox"):
        settings["num_key_value_heads"] = 2
    if family in ("qwen3", "gemma2", "gemma3_text"):
        settings["head_dim"] = width // 4
    return AutoConfig.for_model(family, **(settings | SPECIAL.get(family, {}) | more))


SPECIAL: dict[str, dict[str, object]] = {
    "gemma2": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
    },
    "mistral": {"sliding_window": 4},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 4},
    "gpt2": {"embd_pdrop": 0.1},
}
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "smollm3",
    "gpt2",
    "gpt_neox",
    "phi",
    "granite",
    "cohere",
    "cohere2",
)


def tiny_model(family: str, layers: int = 2, seed: int = 0, **more: object) -> CausalLM:
    """A small random model of a family, in eval mode; its generator state is its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(family, layers, **more)
        hf_model = from_config(config, torch.float32)
        randomise(hf_model)
    return CausalLM(hf_model).eval()


def randomise(hf_model: torch.nn.Module) -> None:
    """Give norms and biases, which start at 0 or 1, values that matter."""
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def tiny_llama(
    layers: int, width: int, vocabulary: int = VOCABULARY, seed: int = 0, tied: bool = False
) -> CausalLM:
    """A small random Llama, as it is before training."""
    return tiny_model(
        "llama", layers, seed, width=width, vocabulary=vocabulary, tie_word_embeddings=tied
    )


def random_batch(
    rows: int = 3, length: int = 12, vocabulary: int = VOCABULARY, seed: int = 0
) -> Batch:
    """Rows of one document each, about half of whose positions are scored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    scored = torch.rand(rows, length, generator=generator) < 0.5
    return Batch.from_tokens(tokens, scored)


def tiny_tokenizer(size: int = 90) -> PreTrainedTokenizerFast:
    """Words `w3 w4 ...` after `<unk> <s> </s>`, with a chat template."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
    return tokenizer


def tensors_hash(model: CausalLM) -> str:
    """sha256 over a model's weights in memory: names, shapes, formats and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.hf_model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
