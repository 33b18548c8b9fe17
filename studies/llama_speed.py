"""Run as a script: how fast llama.cpp's server reads and writes with a GGUF file, on one thread.

    python studies/llama_speed.py FILE.gguf

The best of three requests of 256 random tokens and 64 written ones, as JSON: tokens a second.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import xllamacpp

READ, WRITTEN, REQUESTS = 256, 64, 3
VOCABULARY = 256
"""Any token will do; every model has these."""


def speed(path: Path) -> dict[str, float]:
    """Tokens read and written a second."""
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port = str(path), 2 * READ, 0
    params.n_parallel, params.verbosity, params.cpuparams.n_threads = 1, -1, 1
    server = xllamacpp.Server(params)
    drawn = random.Random(0)
    best = {"read": 0.0, "written": 0.0}
    for _ in range(REQUESTS):
        tokens = [drawn.randrange(VOCABULARY) for _ in range(READ)]
        request = {"prompt": tokens, "n_predict": WRITTEN, "ignore_eos": True}
        times = server.handle_completions(request)["timings"]
        best["read"] = max(best["read"], times["prompt_per_second"])
        best["written"] = max(best["written"], times["predicted_per_second"])
    return best


if __name__ == "__main__":
    sys.stdout.write(json.dumps(speed(Path(sys.argv[1]))))
    sys.stdout.flush()
    os._exit(0)  # the server's threads are not waited for
