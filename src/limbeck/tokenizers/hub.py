"""Asking the Hugging Face hub once, so that its refusals become errors a user can act on."""

from __future__ import annotations

from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from limbeck.errors import ConfigError, TryLaterError

TIMEOUT_S = 20


def hub_answers(
    name: str, revision: str | None, *, kind: Literal["model", "dataset"] = "model"
) -> bool:
    """Whether the hub can be asked for a model or data set; False when it is out of reach.

    Asked once before the libraries are, which retry an absent network for most of a minute.

    Raises:
        ConfigError: The hub knows nothing of that name or revision, or may not hand it out.
        TryLaterError: The hub is busy.
    """
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
    except HfHubHTTPError as error:
        if error.response.status_code == 429 or error.response.status_code >= 500:
            raise TryLaterError(
                f"The Hugging Face hub refuses for now to hand out {name} "
                f"(status {error.response.status_code}). Start again later."
            ) from error
        return False
    except Exception:  # offline, no name service, a proxy: what is cached here may still serve
        return False
    return True
