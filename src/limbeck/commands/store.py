"""`limbeck store`: list, verify, repair, merge and import stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck import __version__
from limbeck.commands.arguments import argument, option
from limbeck.commands.record import in_words
from limbeck.errors import DataError
from limbeck.models import configured_shape
from limbeck.recording import put_tokenizer
from limbeck.store import (
    StoreHeader,
    absent_shards,
    finished_shards,
    read_header,
    shard_facts,
    written_out,
)
from limbeck.store import merge as join
from limbeck.store import repair as put_away
from limbeck.store import verify as damage_of
from limbeck.store.importing import import_store
from limbeck.tokenizers import load_tokenizer, template_hash, tokenizer_hash

StorePath = Annotated[Path, argument(help="A store's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def build() -> typer.Typer:
    """The verbs of a store."""
    app = typer.Typer(
        help="List, verify, repair and merge stores of recorded teacher signals.",
        no_args_is_help=True,
        add_completion=False,
    )
    app.command(name="ls")(show)
    app.command(name="verify")(verify)
    app.command(name="repair")(repair)
    app.command(name="merge")(merge)
    app.command(name="import")(take_in)
    return app


def show(store: StorePath, as_json: AsJson = False) -> None:
    """Show what a store was recorded from, its form, and how much of it is recorded."""
    header = read_header(store)
    every = (shard_facts(store, shard) for shard in range(header.num_shards))
    facts = [each for each in every if each is not None]
    counts = {
        "scored": sum(each.scored for each in facts),
        "record_bytes": sum(each.record_bytes for each in facts),
    }
    facts_json: dict[str, Any] = {**header.to_json(), "finished_shards": len(facts), **counts}
    if as_json:
        typer.echo(json.dumps(facts_json))
        return
    teacher = header.teacher
    per_token = counts["record_bytes"] / max(counts["scored"], 1)
    lines = {
        "form": in_words(header.form),
        "teacher": f"{teacher.get('name', '?')} ({teacher.get('dtype', '?')}), weights "
        f"{str(teacher.get('weights_sha256', '?'))[:12]}",
        "tokens": f"{counts['scored']:,}, {per_token:.1f} bytes each",
        "layers": ", ".join(map(str, header.layers)) or "none",
        "shards": f"{len(facts)} of {header.num_shards}",
        "tokenizer": header.tokenizer[:12],
        "template": header.template[:12],
        "data": header.data[:12],
        "sequence": f"{header.sequence_length} positions",
        "recorded": f"by limbeck {header.limbeck or '?'}, seed {header.seed}",
    }
    for name, text in lines.items():
        typer.echo(f"{name:<10} {text}")


def verify(store: StorePath, as_json: AsJson = False) -> None:
    """Check every file, record and token of a store; exit code 3 if something is damaged.

    Absent shards, as in the part of one machine, are listed and are not an error.
    """
    damages = damage_of(store)
    header = read_header(store)
    absent = absent_shards(store, header)
    if as_json:
        whole = not damages and not absent
        texts = [str(each) for each in damages]
        typer.echo(json.dumps({"whole": whole, "damage": texts, "absent_shards": absent}))
    else:
        for each in damages:
            typer.echo(str(each))
    if damages:
        parts = len({each.part for each in damages})
        raise DataError(
            f"The store {store} must be as it was recorded, and {parts} part(s) are not. Set them "
            f"aside with `limbeck store repair {store}`, and run the same `limbeck record` again, "
            "which records only those."
        )
    if as_json:
        return
    if absent:
        typer.echo(
            f"{store} is a part: {header.num_shards - len(absent)} of {header.num_shards} shards "
            f"are here, none damaged. Absent: {few(absent)}. Merge the other parts, or record them."
        )
    else:
        typer.echo(f"{store} is whole.")


def repair(store: StorePath) -> None:
    """Rename damaged shards; the same `limbeck record` command then records them again."""
    damages = put_away(store)
    for each in damages:
        typer.echo(str(each))
    if damages:
        typer.echo(
            "Damaged folders are renamed to damaged-...; run the same `limbeck record` again, "
            "which records what is missing."
        )
    else:
        typer.echo(f"{store} is whole; nothing to do.")


def merge(
    parts: Annotated[list[Path], argument(help="Folders of one recording.")],
    output: Annotated[Path, option("--output", "-o", help="New folder of the merged store.")],
) -> None:
    """Merge the parts that several machines recorded; exit code 3 if a shard is missing."""
    header = join(parts, output)
    missing = sorted(set(range(header.num_shards)) - set(finished_shards(output, header)))
    if missing:
        raise DataError(
            f"{output} must have {header.num_shards} shards, and the parts together lack "
            f"{len(missing)}: {few(missing)}. What they hold is there; merge the other parts into "
            "it with the same --output, or record them."
        )
    typer.echo(f"{output} has all {header.num_shards} shards.")


def few(numbers: list[int]) -> str:
    """The first numbers of a list that may be long."""
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def take_in(
    source: Annotated[
        Path,
        argument(
            help=".parquet (DistillKit's raw rows) or .jsonl (vLLM's prompt_logprobs), or a folder "
            "of them."
        ),
    ],
    output: Annotated[Path, option("--output", "-o", help="New folder of the store.")],
    tokenizer: Annotated[
        str, option(help="Folder or hub name of the teacher's tokenizer and config.")
    ],
    k: Annotated[int, typer.Option(min=1, help="Tokens kept at each position.")] = 32,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the recorded probabilities.")
    ] = 1.0,
    sequence_length: Annotated[int, typer.Option(min=1, help="Positions of the longest row.")] = (
        8192
    ),
) -> None:
    """Make a store from another tool's recording of the same rows of tokens.

    The teacher's weights are not read: only its configuration identifies it.
    """
    theirs = load_tokenizer(tokenizer)
    header = StoreHeader(
        form=written_out({"type": "top_k", "k": k, "temperatures": [temperature]}),
        vocabulary_size=1 + max(theirs.get_vocab().values()),
        teacher={"name": tokenizer, **configured_shape(tokenizer)},
        tokenizer=tokenizer_hash(theirs),
        template=template_hash(theirs),
        sequence_length=sequence_length,
        limbeck=__version__,
    )
    made = import_store(source, output, header, lambda folder: put_tokenizer(folder, theirs))
    typer.echo(f"{output} has {made.num_shards} shard(s).")
