"""Whole steps of distillation: limbeck's, a plain loop's, and TRL's, on the same windows."""
