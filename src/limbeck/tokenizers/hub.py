"""Asking the Hugging Face hub once, so that its refusals become errors a user can act on."""

from __future__ import annotations

from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from limbeck.errors import ConfigError

TIMEOUT_S = 20

ANSWERED: set[tuple[str, str, str | None]] = set()
"""What the hub has answered for in this process. It counts requests, and every rank asks."""


def hub_answers(
    name: str, revision: str | None, *, kind: Literal["model", "dataset"] = "model"
) -> bool:
    """Whether the hub hands out a model or data set; False when it is out of reach or busy.

    Asked once before the libraries are, which retry an absent network for most of a minute. What is
    cached here may serve without the hub.

    Raises:
        ConfigError: The hub knows nothing of that name or revision, or may not hand it out.
    """
    asked = (kind, name, revision)
    if asked in ANSWERED:
        return True
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError as error:
        raise ConfigError(
            f"{name} is handed out only to those who accepted its terms: accept them on its page "
            "on the hub, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigError(
            f"{name!r}{at} must be a path here or a {kind} on the Hugging Face hub, and is "
            "neither. Check the spelling; for a private one log in with `hf auth login`."
        ) from error
    except Exception:  # offline, no name service, a proxy, too many requests
        return False
    ANSWERED.add(asked)
    return True
