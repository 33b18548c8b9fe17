"""Time of a training step of packed rows: attention inside each document, and with a mask.

    python benchmarks/attention.py [--tokens 512] [--documents 4]

Both run in one process, alternately, on the same random model of SmolLM2-135M's shape.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig

from limbeck.batch import Batch, Window
from limbeck.models import new_model
from limbeck.models.attention import SEGMENTS

ROUNDS = 7


def packed(tokens: int, documents: int) -> Batch:
    """One row of documents of equal length."""
    length = tokens // documents
    everywhere = np.ones(length, dtype=np.bool_)
    ids = np.random.default_rng(0).integers(0, 1000, (documents, length + 1))
    return Batch.packed([[Window(row, everywhere, number) for number, row in enumerate(ids)]])


def main() -> None:
    """Print the median time of each, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--documents", type=int, default=4)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = new_model(config, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    batch = packed(options.tokens, options.documents)
    times: dict[str, list[float]] = {SEGMENTS: [], "sdpa": []}
    for _ in range(ROUNDS):
        for name, seconds in times.items():
            model.hf_model.set_attn_implementation(name)
            start = time.perf_counter()
            model(batch)[0].sum().backward()
            seconds.append(time.perf_counter() - start)
    each, masked = (statistics.median(seconds[1:]) for seconds in times.values())
    print(f"{options.documents} documents in {options.tokens} tokens, 8 blocks, forward, backward")
    print(f"inside each document  {each:.3f} s")
    print(f"with a mask           {masked:.3f} s")
    print(f"ratio                 {each / masked:.2f}")


if __name__ == "__main__":
    main()
