"""What a recipe names outside itself, looked at before any weights are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

from limbeck.config import DataConfig, RunConfig
from limbeck.config.paths import may_be_on_hub, models_of
from limbeck.data.build import Draft, checked, refuse, rows_of
from limbeck.data.detect import data_type
from limbeck.data.formats import reader_of
from limbeck.data.held_out import held_out_configs, option_of
from limbeck.data.rows import open_source
from limbeck.errors import ConfigError, DataError, LimbeckError
from limbeck.files import expanded
from limbeck.models import ModelSource, cache_folder
from limbeck.models.source import find
from limbeck.registry import Component

FIRST_ROWS = 8
"""Rows of each text that are read."""
SKIPPED_ROWS = 1000
"""First rows that are read where bad rows are skipped; if all are bad, the text is refused."""


def require_inputs(config: RunConfig) -> None:
    """Check that models, texts, columns and first rows are there; all mistakes are raised at once.

    Data sets of the hub are checked when they are downloaded.
    """
    checks: list[tuple[str, Callable[[], None]]] = [
        (at, partial(require_model, spec)) for at, spec in models_of(vars(config), student=True)
    ]
    for index, text in enumerate(config.data.texts):
        option = f"data.mix[{index}].path" if config.data.mix else "data.path"
        checks.append((option, partial(require_first_rows, text)))
    checks += [
        (option_of(name), partial(require_first_rows, text))
        for name, text in held_out_configs(config).items()
    ]
    errors: list[tuple[str, LimbeckError]] = []
    for option, check in checks:
        try:
            check()
        except (ConfigError, DataError) as error:
            errors.append((option, error))
    if len(errors) == 1 and errors[0][0] in ("data.path", "teacher.path", "student.path"):
        raise errors[0][1]
    if errors:
        texts = [f"{option}: {text_of(error)}" for option, error in errors]
        is_config = any(isinstance(error, ConfigError) for _, error in errors)
        raise (ConfigError if is_config else DataError)("\n  ".join(texts))


def text_of(error: LimbeckError) -> str:
    """A message without the option it may begin with."""
    return str(error).removeprefix("data.path: ")


def require_model(spec: Component) -> None:
    """Refuse a model that is not there; only its configuration is fetched from the hub."""
    code = bool(spec.get("trust_remote_code", False))
    find(ModelSource(str(spec["path"]), spec.get("revision"), code))


def require_first_rows(config: DataConfig) -> None:
    """Refuse a text whose file is missing or whose first rows its type cannot read."""
    if not expanded(config.path).exists() and may_be_on_hub(config.path):
        return
    source = open_source(config, cache_folder() / "data")
    reader = reader_of(data_type(config, source))
    draft = Draft()
    most = FIRST_ROWS if config.bad_rows == "error" else SKIPPED_ROWS
    is_empty = True
    for row in islice(rows_of(config, source, reader), most):
        is_empty = False
        is_good = checked(draft, row, config, reader) is not None
        if is_good and config.bad_rows == "skip":
            return
    if draft.num_bad or is_empty:
        refuse(draft, config, source)
