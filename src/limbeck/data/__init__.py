"""Text and chats as batches: reading, tokenising, cutting, packing, order."""

from limbeck.data.corpus import corpus_path
from limbeck.data.formats import reader_of, readers
from limbeck.data.held_out import HeldOut, held_out_configs, load_held_out
from limbeck.data.load import data_problems, length_problems, load_data, load_text, uses_template
from limbeck.data.mixture import in_run_order, passes
from limbeck.data.order import one_order, spread, step_span
from limbeck.data.prompts import AskedPrompt, AskedPrompts, ask
from limbeck.data.source import BatchSource, RowsOfStep, SourceContext, StepData, sources
from limbeck.data.text_data import TextData, overlap

__all__ = [
    "AskedPrompt",
    "AskedPrompts",
    "BatchSource",
    "HeldOut",
    "RowsOfStep",
    "SourceContext",
    "StepData",
    "TextData",
    "ask",
    "corpus_path",
    "data_problems",
    "held_out_configs",
    "in_run_order",
    "length_problems",
    "load_data",
    "load_held_out",
    "load_text",
    "one_order",
    "overlap",
    "passes",
    "reader_of",
    "readers",
    "sources",
    "spread",
    "step_span",
    "uses_template",
]
