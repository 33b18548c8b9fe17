"""What a run or a peek looks like to a reader: one self-contained HTML page each.

A page fetches nothing and runs nothing. Everything in it that came from outside (names of models,
text, recipes) is escaped.
"""
