"""Requests for hidden states, and the proof that they are those before the final norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.losses.distributions import log_softmax
from limbeck.models import FinalLayers
from limbeck.teachers.served.interface import Interface, Rows, require_echo
from limbeck.teachers.served.probe import Probed
from limbeck.teachers.served.requests import Server
from limbeck.teachers.served.states_folder import StatesFolder
from limbeck.teachers.served.vllm import COMPLETIONS, VllmInterface, echoed_ids, tokens_body

LARGEST_GAP = 1e-3
"""Mean nats by which exact states may be off: four times what a float32 server was."""


class StatesInterface(Interface):
    """vLLM where every answer, of whatever request, comes with a file of hidden states."""

    name = VllmInterface.name
    reserved = VllmInterface.reserved
    has_adapters = False  # the head of an adapter may be another
    remedy = VllmInterface.remedy

    def __init__(self, model: str, vocabulary_rows: int, folder: StatesFolder) -> None:
        super().__init__(model, vocabulary_rows)
        self._vllm, self._folder = VllmInterface(model, vocabulary_rows), folder

    def tokenizing(self, text: str) -> tuple[str, dict[str, Any]]:
        return self._vllm.tokenizing(text)

    def token_ids(self, answer: Any) -> list[int]:
        ids = self._vllm.token_ids(answer)
        self._folder.take(answer, ids)
        return ids

    def scoring(self, tokens: Sequence[int], k: int) -> tuple[str, dict[str, Any]]:
        return self._vllm.scoring(tokens, k)

    def rows(self, answer: Any, tokens: Sequence[int], k: int) -> Rows:
        rows = self._vllm.rows(answer, tokens, k)
        self._folder.take(answer, tokens)
        return rows

    def reading(self, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Path and body of the request for the hidden states of a text."""
        return COMPLETIONS, tokens_body(self.model, tokens)

    def states(self, answer: Any, tokens: Sequence[int]) -> Float[Tensor, "n D"]:
        """The states in the answer to it, before the final norm, after every check there is.

        Raises:
            DataError: The answer or its file is not of these tokens.
        """
        require_echo(echoed_ids(answer), tokens)
        return self._folder.take(answer, tokens)


def require_final_states(
    server: Server,
    interface: StatesInterface,
    probed: Probed,
    layers: FinalLayers,
    num_layers: int,
) -> float:
    """Compare log-probabilities made of hidden states with the server's own.

    The bound on the mean difference is `LARGEST_GAP` and the rounding of logits to the coarser of
    the server's and the head's data type.

    Args:
        num_layers: Of the model; the states before the final norm have this index in vLLM.

    Returns:
        The largest difference, nats.

    Raises:
        ConfigError: They differ: the states are after the norm or of another layer, or the server
            has other weights than `path`.
    """
    states = interface.states(
        server.ask(*interface.reading(probed.tokens), patience_s=0.0), probed.tokens
    )
    dtypes = (states.dtype, layers.head.weight.dtype)
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
    gaps, largest_logit = gaps_of(states, layers.last_hidden, layers, probed)
    bound = LARGEST_GAP + rounding * largest_logit
    mean = float(gaps.mean())
    if mean <= bound:
        return float(gaps.max())
    unnormed, _ = gaps_of(states, lambda each: each.to(layers.head.weight), layers, probed)
    found = (
        "they are those after the final norm"
        if float(unnormed.mean()) <= bound
        else "they are of another layer, or the server's weights are not those of teacher.path"
    )
    raise ConfigError(
        "teacher.states: hidden states must be those before the final norm, and log-probabilities "
        f"made of them differ from the server's own by {mean:.2g} nats on average (allowed: "
        f"{bound:.2g}): {found}. Set eagle_aux_hidden_state_layer_ids to [{num_layers}]."
    )


def gaps_of(
    states: Float[Tensor, "n D"],
    norm: Callable[[Tensor], Tensor],
    layers: FinalLayers,
    probed: Probed,
) -> tuple[Float[Tensor, " m"], float]:
    """Differences from the server's log-probabilities, nats, and the largest logit.

    They are of the text's own tokens and of the most probable ones.
    """
    logits = layers.head(norm(states[:-1])).float()
    logprobs = log_softmax(logits, 1.0).cpu()
    own = torch.tensor(probed.tokens[1:])[:, None]
    ids = torch.cat([own, torch.from_numpy(probed.rows.ids)], -1)
    theirs = torch.cat(
        [torch.from_numpy(probed.rows.actual)[:, None], torch.from_numpy(probed.rows.logprobs)], -1
    )
    gaps = (logprobs.gather(-1, ids) - theirs).abs().flatten()
    return gaps.float(), float(logits.abs().max())
