"""How near a student is to its teacher, on text neither was trained on.

Everything is summed per document, so that intervals can be drawn over documents: tokens of one
text are not independent of each other.
"""
