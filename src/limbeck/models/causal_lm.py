"""A Hugging Face causal LM as a decoder, its blocks, and a head that is called apart from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.losses import Head
from limbeck.losses.distributions import log_softmax
from limbeck.models.adapters import INSIDE, Adapter
from limbeck.models.attention import SEGMENTS
from limbeck.models.heads import transform_of
from limbeck.models.modes import evaluating, hooked, tensor_of
from limbeck.models.packed import QuantizedLinear
from limbeck.models.weight_files import WeightFiles


class CausalLM(nn.Module):
    """A causal LM whose decoder and head are called apart.

    Attributes:
        adapters: Low-rank changes of linear layers, by the layer's name in `hf_model`.
        head_name: Of the layer that makes logits, in `hf_model`.
        weight_files: Where the weights are while `hf_model` is on the meta device; sharding reads
            them. None for a model with weights.
        whole_because: Why it was loaded whole, where reading it by rows was asked for.
        compute_dtype: Format that its weights are cast to while it computes; None for their own.
    """

    def __init__(self, hf_model: PreTrainedModel) -> None:
        super().__init__()
        self.hf_model = hf_model
        self._transform = transform_of(hf_model.config)
        self._blocks_name = find_blocks(hf_model)
        self.adapters: Mapping[str, Adapter] = {}
        self.weight_files: WeightFiles | None = None
        self.whole_because: str | None = None
        self.compute_dtype: torch.dtype | None = None
        self._device: torch.device | None = None
        head = output_layer(hf_model)
        self.head_name = next(n for n, module in hf_model.named_modules() if module is head)
        self._vocabulary_size = self.vocabulary_rows

    @property
    def config(self) -> PreTrainedConfig:
        """The model's own configuration."""
        config: PreTrainedConfig = self.hf_model.config
        return config

    @property
    def family(self) -> str:
        """The kind of model, as its configuration names it (`llama`, `qwen2`, ...)."""
        return str(self.config.model_type)

    @property
    def device(self) -> torch.device:
        """Where it computes, and batches must be; shards of its weights may be in host memory."""
        return self.hf_model.device if self._device is None else self._device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._device = device

    @property
    def computed_in(self) -> torch.dtype:
        """Format of the blocks' activations."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: token ids to hidden states after the final norm."""
        return decoder_of(self.hf_model)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, first to last."""
        blocks = self.decoder.get_submodule(self._blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def put(self, name: str, layer: nn.Module) -> None:
        """Replace a layer of the blocks.

        Args:
            name: Of the layer in `blocks`.
        """
        parent, _, last = name.rpartition(".")
        setattr(self.blocks.get_submodule(parent), last, layer)

    @property
    def blocks_name(self) -> str:
        """Where the blocks are in `hf_model`, as parameter names begin."""
        return f"{self.hf_model.base_model_prefix}.{self._blocks_name}"

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Size of a hidden state at the head."""
        return int(output_layer(self.hf_model).weight.shape[1])

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the head, padding included."""
        return int(output_layer(self.hf_model).weight.shape[0])

    @property
    def vocabulary_size(self) -> int:
        """V: the head's rows that stand for tokens; those beyond are padding and never seen."""
        return self._vocabulary_size

    @vocabulary_size.setter
    def vocabulary_size(self, size: int) -> None:
        if not 1 <= size <= self.vocabulary_rows:
            raise ConfigError(
                f"A vocabulary must have between 1 and {self.vocabulary_rows} tokens, the rows of "
                f"the {self.family} model's head, got {size}. Choose a model with more rows."
            )
        self._vocabulary_size = size

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model was made for; None if its configuration does not say."""
        limit = option(self.config, "max_position_embeddings")
        return None if limit is None else int(limit)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        packed = sum(layer.numel for layer in self.packed.values())
        return packed + sum(parameter.numel() for parameter in self.parameters())

    @property
    def packed(self) -> dict[str, QuantizedLinear]:
        """Layers that keep their weights in 8 or 4 bits under adapters, by names in `hf_model`."""
        modules = self.hf_model.named_modules()
        return {name: module for name, module in modules if isinstance(module, QuantizedLinear)}

    @property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        weight = output_layer(self.hf_model).weight
        return any(m.weight is weight for m in self.modules() if isinstance(m, nn.Embedding))

    @property
    def own_embeddings(self) -> tuple[nn.Embedding, ...]:
        """The table of token embeddings; nothing where it is tied to the head."""
        typed: Any = self.decoder  # its methods carry no types
        table = typed.get_input_embeddings()
        return (table,) if isinstance(table, nn.Embedding) and not self.is_tied else ()

    @property
    def head(self) -> Head:
        """The output head over the V real tokens; views of the model's own weights.

        Inside a sharded module, read it while the root's parameters are gathered.
        """
        return self._head(self._vocabulary_size)

    @property
    def whole_head(self) -> Head:
        """The output head with its padding, to measure what falls on it."""
        return self._head(self.vocabulary_rows)

    def padded_mass(self, whole_logits: Float[Tensor, "n R"]) -> Float[Tensor, " n"]:
        """Probability on the rows that stand for no token, of logits of the whole head."""
        size = self._vocabulary_size
        if whole_logits.shape[-1] == size:
            return whole_logits.new_zeros(len(whole_logits))
        return log_softmax(whole_logits, 1.0)[:, size:].exp().sum(-1)

    def _head(self, size: int) -> Head:
        layer = output_layer(self.hf_model)
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        if self.head_name in self.adapters:
            tensors = dict(self.hf_model.named_parameters())
            weight = self.adapters[self.head_name].weight(self.head_name, tensors)
        if len(weight) > size:  # the backward pass of a slice would copy a whole gradient
            weight, bias = weight[:size], None if bias is None else bias[:size]
        return Head(weight=weight, bias=bias, transform=self._transform)

    def forward(
        self, batch: Batch, layers: Iterable[int] = ()
    ) -> tuple[Float[Tensor, "N D"], dict[int, Float[Tensor, "N D"]]]:
        """Run the decoder without its head.

        Args:
            batch: Its pieces do not see each other; see `Batch.position_ids`.
            layers: 0-based blocks whose outputs are wanted.

        Returns:
            Last hidden states, after the final norm; and the outputs of the chosen blocks, before
            it. Both at the scored positions only, in row-major order.
        """
        with self._captured(layers) as outputs:
            last: Tensor = self.decoder(
                input_ids=batch.input_ids, use_cache=False, **self._apart(batch)
            ).last_hidden_state
        return batch.scored_rows(last), {i: batch.scored_rows(h) for i, h in outputs.items()}

    def _apart(self, batch: Batch) -> dict[str, Tensor]:
        """What keeps the segments of a row apart; `prove_documents_apart` checks every model."""
        places = {"position_ids": batch.position_ids}
        if self.config._attn_implementation == SEGMENTS:
            return places | {"attention_mask": batch.segment_borders[None, None, None]}
        return places  # without a mask and a cache transformers derives one from them

    def logits(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of every position over the real tokens; each row is one document."""
        last: Tensor = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.head(last.flatten(0, 1)).view(*input_ids.shape, -1)

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The most probable tokens after a prompt, one by one; padding is never among them.

        Args:
            max_new_tokens: At most so many; an end token (the last one then), or the model's
                longest sequence, ends it earlier.
        """
        if not prompt_ids:
            raise ConfigError("A prompt must have at least one token, got none. Give some text.")
        room = max_new_tokens
        if self.max_positions is not None:
            room = min(room, self.max_positions - len(prompt_ids))
        if room < 1:
            return []
        ids = torch.tensor([prompt_ids], device=self.device)
        with evaluating(self):
            made: Tensor = cast(Any, self.hf_model).generate(  # transformers types `self` away
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                temperature=1.0,
                top_k=50,  # the default; greedy search warns of others
                top_p=1.0,
                repetition_penalty=1.0,
                suppress_tokens=list(range(self.vocabulary_size, self.vocabulary_rows)) or None,
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=0,  # one row has no padding
            )
        continuation: list[int] = made[0, len(prompt_ids) :].tolist()
        return continuation

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a generated text, from the model's generation configuration."""
        settings = self.hf_model.generation_config
        ends = None if settings is None else settings.eos_token_id
        if ends is None:
            return frozenset()
        return frozenset([ends] if isinstance(ends, int) else ends)

    def end_like(self, other: CausalLM) -> None:
        """Generate with another model's settings: what ends a text, and how it is sampled."""
        self.hf_model.generation_config = copy.deepcopy(other.hf_model.generation_config)

    @contextmanager
    def _captured(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        # Hooks, because `output_hidden_states=True` keeps every layer and norms the last one.
        outputs: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _args, output: outputs.update({layer: tensor_of(output)})

        with hooked((self.blocks[layer], keep(layer)) for layer in layers):
            yield outputs


def option(config: PreTrainedConfig, name: str) -> Any:
    """A setting under transformers' common name; None where the family has no such setting."""
    return config.to_dict().get(config.attribute_map.get(name, name))


def decoder_of(hf_model: PreTrainedModel) -> nn.Module:
    """A model without its head."""
    decoder: nn.Module = hf_model.base_model
    if decoder is hf_model:
        raise ConfigError(
            f"A model must keep its decoder apart from its head, but {type(hf_model).__name__} "
            f"({hf_model.config.model_type}) is both in one. Choose another model."
        )
    return decoder


def output_layer(hf_model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes logits."""
    typed: Any = hf_model  # its methods carry no types
    layer = typed.get_output_embeddings()
    inside = INSIDE.removeprefix(".")
    layer = dict(layer.named_children()).get(inside, layer) if layer is not None else layer
    if not isinstance(layer, nn.Linear):
        raise ConfigError(
            f"A model's head must be one linear layer, but that of {type(hf_model).__name__} "
            f"({hf_model.config.model_type}) is {type(layer).__name__}. Choose a causal LM."
        )
    return layer


def find_blocks(hf_model: PreTrainedModel) -> str:
    """Where in the decoder its blocks are: the outermost list with one module a layer."""
    wanted = int(hf_model.config.num_hidden_layers)
    lists: list[str] = [
        name
        for name, module in decoder_of(hf_model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    outermost = min((name.count(".") for name in lists), default=0)
    found = [name for name in lists if name.count(".") == outermost]
    if len(found) != 1:
        raise ConfigError(
            f"The decoder of {type(hf_model).__name__} ({hf_model.config.model_type}) must have "
            f"one list of {wanted} blocks, but has {len(found)} ({', '.join(found) or 'none'}). "
            "limbeck has no entry for this layout; choose another model."
        )
    return found[0]
