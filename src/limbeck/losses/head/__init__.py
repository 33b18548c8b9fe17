"""The output head and the logit terms fused, a chunk of tokens at a time."""
