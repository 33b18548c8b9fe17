"""Run as a script: chats rendered by a GGUF file's own template, in llama.cpp's server.

The server shares llama.cpp's global state with whatever else runs it in the process, so it gets a
process of its own. Reads `{"path": ..., "chats": [...]}`, writes the list of prompts, both JSON.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

TIMEOUT_S = 60.0


def main() -> None:
    """Render the chats on stdin to stdout."""
    import xllamacpp  # noqa: PLC0415  (an extra, and this module is imported with its package)

    task = json.load(sys.stdin)
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port = task["path"], 256, 0
    params.n_parallel, params.warmup, params.verbosity = 1, False, -1
    server = xllamacpp.Server(params)
    prompts = [prompt(server.listening_address, chat) for chat in task["chats"]]
    sys.stdout.write(json.dumps(prompts))
    sys.stdout.flush()
    os._exit(0)  # the server's threads are not waited for


def prompt(address: str, chat: list[dict[str, str]]) -> str:
    """One chat as the server renders it."""
    body = json.dumps({"messages": chat}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/apply-template", body, headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return str(json.load(answer)["prompt"])


if __name__ == "__main__":
    main()
