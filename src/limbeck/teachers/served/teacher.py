"""A teacher that runs in an inference server: its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from rich.console import Console

from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.models import (
    ModelSource,
    PreTrainedTokenizerBase,
    choose_dtype,
    configured_shape,
    load_final_layers,
)
from limbeck.teachers.base import TeacherInfo, teachers
from limbeck.teachers.served.hidden_states import HiddenStatesTeacher
from limbeck.teachers.served.interface import Interface
from limbeck.teachers.served.probe import probe
from limbeck.teachers.served.requests import Connection, Server, checked_url, key_of
from limbeck.teachers.served.sglang import SglangInterface
from limbeck.teachers.served.states_folder import StatesFolder
from limbeck.teachers.served.states_probe import StatesInterface, require_final_states
from limbeck.teachers.served.top_k import TopKTeacher
from limbeck.teachers.served.vllm import VllmInterface
from limbeck.tokenizers import load_tokenizer

REACHED_BY = ("url", "key_env", "concurrency", "timeout_s", "patience_s")
"""Options that do not change the numbers; a run may be resumed with others."""

INTERFACES: Mapping[str, type[Interface]] = {"vllm": VllmInterface, "sglang": SglangInterface}

TOKENS = 64
"""`teacher.k` where the recipe names none."""


def describe(
    facts: Mapping[str, Any], model: str, longest: int, served: Mapping[str, Any]
) -> TeacherInfo:
    """Name and shape of a served model, from the facts in its configuration.

    A window of n positions is a prompt of n + 1 tokens, and one more token is generated.

    Args:
        longest: Tokens of a prompt and one more.
        served: What the server is asked for.
    """
    limits = [each for each in (facts.get("max_positions"), longest - 2) if each is not None]
    return TeacherInfo.from_json(
        {
            **facts,
            "name": model,
            "max_positions": min(limits),
            "served": {"model": model, **served},
        }
    )


def say(text: str) -> None:
    """A line for the user; stdout is for results."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


@teachers.register("served")
def served(
    world: World,
    *,
    url: str,
    model: str,
    server: Literal["vllm", "sglang"] = "vllm",
    k: Annotated[int, Ge(1), Le(10_000)] | None = None,
    states: str | None = None,
    path: str | None = None,
    key_env: str | None = None,
    concurrency: Annotated[int, Ge(1), Le(512)] = 16,
    timeout_s: Annotated[float, Gt(0)] = 300.0,
    patience_s: Annotated[float, Ge(0)] = 600.0,
) -> TopKTeacher | HiddenStatesTeacher:
    """A model in an inference server: k tokens and a tail, or the whole vocabulary.

    Args:
        url: Address of the server, http or https.
        model: Name of the model in the server (`--served-model-name`).
        server: What the server runs: `vllm`, or `sglang`.
        k: Tokens requested at each position, 64 by default, at temperature 1; at most vLLM's
            `--max-logprobs`.
        states: Folder into which vLLM writes hidden states (`shared_storage_path`): distributions
            over the whole vocabulary at any temperature. Not together with k.
        path: Folder or Hub name with the model's tokenizer and config.json, by default `model`; of
            its weights none is read, with `states` final norm and head.
        key_env: Environment variable that holds the server's key.
        concurrency: Requests in flight at once, of each rank.
        timeout_s: Seconds to wait for one answer.
        patience_s: Seconds to wait during the run for a server that does not respond.
    """
    connection = Connection(
        url=checked_url(url),
        key=key_of(key_env),
        concurrency=concurrency,
        timeout_s=timeout_s,
        patience_s=patience_s,
    )
    path = path or model
    tokenizer, facts = load_tokenizer(path), configured_shape(path)
    client = Server(connection, say)
    if states is not None:
        if k is not None or server != "vllm":
            raise ConfigError(
                "teacher.states: hidden states hold the whole vocabulary and only vLLM writes "
                f"them, got {'teacher.k' if k is not None else f'teacher.server: {server}'} too. "
                "Leave one of the two out."
            )
        folder = StatesFolder(states, facts["width"], timeout_s)
        interface = StatesInterface(model, facts["vocabulary_rows"], folder)
        return from_states(client, interface, path, facts, tokenizer, world)
    num_tokens = TOKENS if k is None else k
    asked = INTERFACES[server](model, facts["vocabulary_rows"])
    probed = probe(client, asked, num_tokens, tokenizer)
    info = describe(facts, model, probed.max_model_len, {"k": num_tokens})
    return TopKTeacher(client, probed, info, tokenizer, world.device)


def from_states(
    server: Server,
    interface: StatesInterface,
    path: str,
    facts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> HiddenStatesTeacher:
    """A teacher from a server's hidden states, after the probe.

    Args:
        path: Of the model, for its final norm and head.
        facts: In its configuration.
    """
    device = world.device
    layers = load_final_layers(ModelSource(path), device=device, dtype=choose_dtype("auto", device))
    probed = probe(server, interface, 1, tokenizer)
    agreement = require_final_states(server, interface, probed, layers, facts["layers"])
    info = describe(facts, interface.model, probed.max_model_len, {"states": "hidden"})
    return HiddenStatesTeacher(server, interface, probed, agreement, layers, info, tokenizer)
