"""What must hold before a run may learn from a store: the same tokenizer, template, text, form."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from limbeck.config import RunConfig
from limbeck.data import TextData
from limbeck.data.held_out import HeldOut
from limbeck.errors import ConfigError, DataError
from limbeck.files import manifest
from limbeck.losses import PairShapes, build_objective
from limbeck.models import PreTrainedTokenizerBase
from limbeck.recording import window_of
from limbeck.store import TOKENIZER, Store
from limbeck.store.store import moved
from limbeck.students import InitialStudent
from limbeck.teachers.stored import StoredTeacher
from limbeck.tokenizers import VocabularyProof, load_tokenizer, template_hash, tokenizer_hash


def recorded_tokenizer(store: Store) -> PreTrainedTokenizerBase:
    """The tokenizer that the store carries.

    Raises:
        DataError: It is not there, is damaged, or is not the one that the header names.
    """
    folder = store.path / TOKENIZER
    if manifest(folder) is None:
        raise DataError(
            f"The store {store.path} must have the teacher's tokenizer in {folder}, which is "
            "missing or damaged. Copy it from another part of the same recording, or record again."
        )
    tokenizer = load_tokenizer(str(folder))
    told = hashes(tokenizer)
    if differing := store.header.differences(told):
        raise DataError(
            f"{folder} is not what the store was recorded with ({'; '.join(differing)}). Copy the "
            "folder from another part of the same recording, or record again."
        )
    return tokenizer


def hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A tokenizer under the names of a store's header."""
    return {"tokenizer": tokenizer_hash(tokenizer), "template": template_hash(tokenizer)}


def require_recorded_for(
    store: Store, tokenizer: PreTrainedTokenizerBase, student: InitialStudent, config: RunConfig
) -> None:
    """Refuse a student whose tokenizer is another one, or whose chats read otherwise.

    Raises:
        ConfigError: With every field that differs.
    """
    wanted = hashes(student.tokenizer)
    if config.data.type != "chat":
        del wanted["template"]
    if differing := store.header.differences(wanted):
        raise ConfigError(
            f"The student must read text as the store {store.path} was recorded, and does not: "
            f"{'; '.join(differing)}. Take a student with the teacher's tokenizer and template, or "
            "record the store again with those of the student."
        )


def require_covered(
    store: Store, data: TextData, held_out: HeldOut | None, vocabulary: VocabularyProof
) -> None:
    """Refuse a run that would read a window the store does not hold.

    Raises:
        ConfigError: The vocabulary is another one.
        DataError: Windows are missing; how many, and the first of them.
    """
    recorded = store.header.vocabulary_size
    if recorded != vocabulary.size:
        raise ConfigError(
            f"vocabulary_size: {recorded:,} in the store {store.path}, and student and teacher "
            f"share {vocabulary.size:,} tokens. Record again with the tokenizer they share."
        )
    require_windows(store, data, range(len(data.windows)), "data")
    if held_out is not None:
        chosen = held_out_windows(held_out)
        require_windows(store, held_out.data, chosen, "evaluate.data")


def held_out_windows(held_out: HeldOut) -> list[int]:
    """The held-out windows that a run measures on."""
    rows = {*held_out.deciding_rows, *held_out.reporting_rows}
    return [int(held_out.data.row_windows[row]) for row in sorted(rows)]


def require_windows(store: Store, data: TextData, windows: Iterable[int], option: str) -> None:
    """Refuse windows that are not in the store.

    Raises:
        DataError: Some are not.
    """
    windows = list(windows)
    missing = [each for each in windows if window_of(data, each).key not in store]
    if not missing:
        return
    first = data.document_name(int(data.windows[missing[0], 2]))
    header = store.header
    longest = int(data.facts["sequence_length"])
    cut = ""
    if header.sequence_length != longest:
        cut = f" (sequence_length: {header.sequence_length} in the store, {longest} wanted)"
    raise DataError(
        f"{option}: every window must be in the store {store.path}, and {len(missing):,} of "
        f"{len(windows):,} are not; the first is of {first}{cut}. The text, the way it is cut, or "
        "what is scored of it is not what was recorded. Record this data with `limbeck record`, or "
        "use the data that was recorded."
    )


def require_served(
    teacher: StoredTeacher, config: RunConfig, shapes: PairShapes, data: TextData
) -> None:
    """Try the recipe's objective on one recorded position, in the first, middle and last step.

    Raises:
        ConfigError: The form does not serve a divergence, a temperature, a term or a layer of it,
            or not the temperature at which held-out text is measured.
    """
    if config.evaluate.data is not None:
        require_measurable(teacher.store)
    with torch.random.fork_rng(devices=[]):
        objective = build_objective(config.objective, shapes, head_budget_mb=1)
    teacher.ask(objective.needs)
    batch = data.batch([0])
    signal = teacher.signal(batch)
    if signal.distribution is None:
        return
    one = moved(signal.distribution.rows(slice(0, 1)), torch.device("cpu"))
    logits = torch.zeros(1, teacher.store.header.vocabulary_size)
    steps = config.optim.steps
    for step in (0, steps // 2, steps - 1):
        objective.set_step(step)
        for term in objective.logit_terms.values():
            term(logits, batch.targets()[:1], one)


def require_measurable(store: Store) -> None:
    """Refuse a store that a student cannot be measured against, before anything is trained.

    Raises:
        ConfigError: It does not serve temperature 1.
    """
    some = store.distribution([next(store.keys())]).rows(slice(0, 1))
    try:
        some.compare(torch.zeros(1, store.header.vocabulary_size), 1.0)
    except ConfigError as error:
        raise ConfigError(
            f"evaluate.data: students are measured at temperature 1, which the store {store.path} "
            "does not serve. Record with 1.0 among the temperatures, or set evaluate.data=null and "
            "measure afterwards: limbeck evaluate, with the online teacher."
        ) from error
