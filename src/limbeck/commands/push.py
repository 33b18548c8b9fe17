"""`limbeck push`: a run's student as a model repository of the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from httpx2 import HTTPError
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from limbeck.commands.arguments import argument, option
from limbeck.commands.shrink import require_new
from limbeck.config.paths import is_hub_name
from limbeck.errors import ConfigError, TryLaterError
from limbeck.files import MANIFEST, expanded, manifest
from limbeck.report.model_card import CARD, model_card
from limbeck.report.run_files import RunFiles, read_run
from limbeck.report.run_report import mapping


def push(
    run: Annotated[Path, argument(help="A run's directory.")],
    repo: Annotated[str, argument(help="OWNER/NAME on the hub.")],
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the files to --output; upload nothing.")
    ] = False,
    output: Annotated[Path | None, option(help="New folder, for --dry-run.")] = None,
    license: Annotated[
        str | None, option(help="Licence of the student, as apache-2.0; the teacher's by default.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
) -> None:
    """Publish a run's student on the Hugging Face hub, with its model card and exported files.

    The card names teacher and licence, data, evaluation with intervals, exports with their parity,
    and the recipe. Read it first: limbeck push runs/x me/student --dry-run --output pushed

    Without --dry-run the files are uploaded with the token that `hf auth login` keeps.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"REPO must be OWNER/NAME, got {repo!r}.")
    if dry_run != (output is not None):
        raise ConfigError("--dry-run and --output go together: the folder that is written.")
    if manifest(run / "student") is None:
        raise ConfigError(f"{run} must be a finished run with a student, and has none.")
    files = read_run(run)
    name = license or teacher_license(files)
    card = model_card(files, repo, name)
    if output is not None:
        require_new(output, plan=False)
        fill(output, run, card)
        typer.echo(f"written  {output}\nlicence  {name or 'unknown: give --license'}")
        return
    if name is None:
        raise ConfigError(
            "--license: the teacher's licence was not found, and it may restrict students. Look it "
            "up and name the student's."
        )
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), run, card)
        upload(Path(folder), repo, private=private)
    typer.echo(f"pushed   https://huggingface.co/{repo}")


def fill(folder: Path, run: Path, card: ModelCard) -> None:
    """Write the repository: student, exported files, report, card."""
    ignored = shutil.ignore_patterns(MANIFEST)
    shutil.copytree(run / "student", folder, dirs_exist_ok=True, ignore=ignored)
    drop_local_adapter(folder / "adapter")
    for exported in sorted((run / "exports").glob("*")):
        if files := list(exported.glob("*.gguf")):
            shutil.copy2(files[0], folder)  # it is all, and the hub shows it at the top
        else:
            shutil.copytree(exported, folder / exported.name, ignore=ignored)
    shutil.copy2(run / "report.html", folder)
    (folder / CARD).write_text(str(card), encoding="utf-8")


def drop_local_adapter(folder: Path) -> None:
    """Remove adapters whose base model is a folder of this machine: they name its path."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not is_hub_name(base) or expanded(base).exists():
        shutil.rmtree(folder)


def upload(folder: Path, repo: str, *, private: bool) -> None:
    """Send a folder to the hub.

    Raises:
        ConfigError: The hub refuses, as without a token.
        TryLaterError: It is busy or out of reach.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo)
    except (HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status < 400 or status == 429 or status >= 500:
            raise TryLaterError(
                f"The Hugging Face hub must take the files of {repo}, and is out of reach or busy: "
                f"{error}. Run the same command again later."
            ) from error
        raise ConfigError(
            f"REPO: the Hugging Face hub must let you write {repo}, and refuses (status {status}). "
            "Log in with `hf auth login` and a token that may write there."
        ) from error


def teacher_license(run: RunFiles) -> str | None:
    """The licence in the model card of a teacher's folder; None if there is none here."""
    path = Path(str(mapping(run.provenance.get("teacher")).get("name", "")), CARD)
    if not path.is_file():
        return None
    found = ModelCard.load(path).data.to_dict().get("license")
    return str(found) if found else None
