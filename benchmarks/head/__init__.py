"""Time and memory of the output head with its loss: what `benchmarks/loss.py` is made of."""
