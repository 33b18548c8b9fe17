"""Tiny students to export, and what runs their files."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import torch

from limbeck.export import HeldOutText, Student
from limbeck.export.base import ExportedFile
from limbeck.export.gguf import Gguf
from limbeck.export.parity import measure
from limbeck.models import save_student
from tests.experiment.tiny_run import write_texts
from tests.models.tiny import tiny_model
from tests.tokenizers.small import BEGIN, CHATML, small


def made(family="llama", tokenizer=None, padding=3, **more):
    """A random student; its embedding has some rows more than tokens."""
    tokenizer = tokenizer or small()
    model = tiny_model(family, vocabulary=len(tokenizer) + padding, **more)
    model.vocabulary_size = len(tokenizer)
    return Student(model, tokenizer, "tiny", {"name": "tiny"})


def folder_with(path, **more):
    """A student's folder, with BOS and a chat template."""
    student = made(tokenizer=small(template=CHATML, begin=BEGIN), **more)
    save_student(student.model, student.tokenizer, path)
    return path


def ready(exporter, file, fault=lambda _path, _student: None):
    """An exporter that copies files which were exported before, with a fault."""

    class Ready(type(exporter)):
        def export(self, student, tokenizer, path):
            for each in file.path.parent.iterdir():
                shutil.copy2(each, path.parent)
            fault(path, student)
            weights = tuple(path.with_name(each.name) for each in file.weights)
            return ExportedFile(path, file.max_positions, weights=weights)

    return Ready()


def text_in(folder, tokens=200):
    """Held-out text."""
    return HeldOutText("text", str(write_texts(folder / "heldout.jsonl", 12, 3)), tokens)


@contextmanager
def exported(student, folder, exporter=None, **options):
    """The file, and it in its runtime; a GGUF file with these options without an exporter."""
    exporter = exporter or Gguf(**options)
    file = exporter.export(student.model, student.tokenizer, folder / f"tiny{exporter.suffix}")
    with exporter.run(file) as runtime:
        yield file, runtime


def parity_of(student, folder, exporter=None, **options):
    """Parity on random tokens, one window as long as the file allows."""
    exporter = exporter or Gguf(**options)
    with exported(student, folder, exporter) as (file, runtime):
        limit = file.max_positions
        generator = torch.Generator().manual_seed(0)
        windows = [
            torch.randint(student.model.vocabulary_size, (n,), generator=generator).tolist()
            for n in (min(20, limit), limit)
        ]
        return measure(student.model, student.tokenizer, runtime, file, windows, exporter.max_kl)
