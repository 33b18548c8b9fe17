"""Terms of the objective, one a file: one number per scored token."""
