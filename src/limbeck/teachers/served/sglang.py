"""SGLang's `/generate` with `top_logprobs_num`: what is asked, and how an answer is read.

Source: SGLang, `srt/managers/io_struct.py` and `tokenizer_manager.py` at commit 001067f; the echo,
a prompt's limit and `/v1/tokenize` in the same folder at other commits. No such server was run.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from limbeck.errors import DataError
from limbeck.teachers.served.interface import (
    Interface,
    Rows,
    checked,
    described,
    require_echo,
    rows_after_null,
    wrong,
)

GENERATE = "/generate"
TOKENIZE = "/v1/tokenize"
OWN = "input_token_logprobs"
TOP = "input_top_logprobs"


class SglangInterface(Interface):
    """SGLang's native interface, flat arrays where the server knows them."""

    name = "sglang"
    reserved = 6  # it takes prompts of at most its context length less 7
    has_adapters = False  # they are named in a field of their own
    remedy = "Read the server's log"

    def tokenizing(self, text: str) -> tuple[str, dict[str, Any]]:
        return TOKENIZE, {"model": self.model, "prompt": text, "add_special_tokens": False}

    def token_ids(self, answer: Any) -> list[int]:
        ids = answer.get("tokens") if isinstance(answer, Mapping) else None
        if not isinstance(ids, list) or not all(type(each) is int for each in ids):
            raise wrong("give the ids of a text (tokens)", f"has {described(ids)}")
        return ids

    def scoring(self, tokens: Sequence[int], k: int) -> tuple[str, dict[str, Any]]:
        """Sampling settings are explicit: a server can have other defaults (preferred ones)."""
        return GENERATE, {
            "input_ids": [int(token) for token in tokens],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }

    def rows(self, answer: Any, tokens: Sequence[int], k: int) -> Rows:
        facts = answer.get("meta_info") if isinstance(answer, Mapping) else None
        if not isinstance(facts, Mapping):
            raise wrong("have meta_info for one text", f"has {described(facts or answer)}")
        targets = tokens[1:]
        actual = self._own(facts.get(OWN), tokens)
        read = flat if f"{TOP}_shape" in facts else nested
        ids, values = read(facts, len(tokens), k)
        ranks = np.broadcast_to(np.arange(1, k + 1), (len(targets), k))
        return checked(ids, ranks, values, actual, targets, k, self.vocabulary_rows)

    def _own(self, entries: Any, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of the text's own tokens but the first, which echo their ids.

        SGLang echoes 0 for the last id of its vocabulary.
        """
        try:
            echoed = [entry[1] for entry in entries]
            last = self.vocabulary_rows - 1
            require_echo(echoed, [0 if token >= last else int(token) for token in tokens])
            rows_after_null([entry[0] for entry in entries], OWN, len(tokens))
            return [float(entry[0]) for entry in entries[1:]]
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise wrong(
                f"give [logprob, id, ...] for every token of the text ({OWN})",
                f"has {described(entries)}: {type(error).__name__} {error}",
            ) from error


def flat(facts: Mapping[str, Any], num_tokens: int, k: int) -> tuple[Any, Any]:
    """Ids and log-probabilities [L, k] in arrays of base64."""
    shape, nulls = facts[f"{TOP}_shape"], facts.get(f"{TOP}_null_prefix")
    # Some versions count the null among the rows; the arrays have none for it.
    if nulls != 1 or shape not in ([num_tokens - 1, k], [num_tokens, k]):
        raise wrong(
            f"have {TOP} of shape [{num_tokens - 1}, {k}] after 1 null",
            f"has shape {str(shape)[:40]} after {str(nulls)[:40]}",
        )
    ids = array_of(facts, f"{TOP}_idx_flat_b64", "int32", num_tokens - 1, k)
    return ids, array_of(facts, f"{TOP}_val_flat_b64", "float32", num_tokens - 1, k)


def array_of(facts: Mapping[str, Any], name: str, dtype: str, rows: int, k: int) -> np.ndarray:
    """A little-endian array in base64, if it has the declared type and as many bytes as its shape.

    Raises:
        DataError: It does not.
    """
    if facts.get(f"{name}_dtype") != dtype:
        raise wrong(f"declare {name} as {dtype}", f"has {described(facts.get(f'{name}_dtype'))}")
    try:
        data = base64.b64decode(facts.get(name) or "", validate=True)
    except (TypeError, ValueError) as error:
        raise wrong(f"have {name} in base64", f"has something else: {error}") from error
    size = rows * k * 4
    if len(data) != size:
        raise wrong(f"have {size:,} bytes in {name}", f"has {len(data):,}")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))


def nested(facts: Mapping[str, Any], num_tokens: int, k: int) -> tuple[Any, Any]:
    """Ids and log-probabilities [L, k] in lists, from a server without flat arrays."""
    rows = rows_after_null(facts.get(TOP), TOP, num_tokens)
    for place, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != k:
            raise wrong(
                f"give the {k} most probable tokens at every position",
                f"gives {len(row) if isinstance(row, list) else row!r:.40} at position {place}",
            )
    try:
        ids = [[int(entry[1]) for entry in row] for row in rows]
        return ids, [[float(entry[0]) for entry in row] for row in rows]
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise wrong(
            f"give [logprob, id, ...] for every token of {TOP}",
            f"has something else: {type(error).__name__} {error}",
        ) from error
