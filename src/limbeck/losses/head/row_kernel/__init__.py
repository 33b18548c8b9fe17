"""The head's loss and gradient on an accelerator: one Triton program a row of logits."""
