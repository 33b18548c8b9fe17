"""Measurements of a student against its teacher, on held-out text.

Sums are kept per document, so that confidence intervals are drawn over documents: the tokens of one
text are not independent.
"""
