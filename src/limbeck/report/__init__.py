"""Self-contained HTML pages of a run or a peek.

A page fetches nothing and runs nothing. Everything in it that came from outside (names of models,
text, recipes) is escaped.
"""
