"""`kadapter convert`: converts checkpoints of the original release to K-Adapter repositories."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._arguments import AsJson, check_new, checked_task, starting
from ._names import TASKS
from ._output import conclude, fail, print_json, print_table, running, say


if TYPE_CHECKING:
    from kadapter_hf.conversion import Conversion
    from kadapter_hf.conversion.original import Source


NAMES_SHOWN = 20


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            show_default=False, help="The pytorch_model.bin of a pre-trained adapter or a fine-tuned model."
        ),
    ],
    output: Annotated[Path, typer.Option(show_default=False, help="The output folder, which must be new or empty.")],
    name: Annotated[
        str | None,
        typer.Option(show_default="factual or linguistic, depending on its head", help="Name of the adapter."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="The backbone states that the adapter layers read (adapter_list in the original), which the file does not "
            "contain. The original training scripts use 0,11,22; the paper and the usage example use 0,11,23."
        ),
    ] = "0,11,22",
    heads: Annotated[
        int, typer.Option(min=1, help="Attention heads in the adapters, which the file does not contain.")
    ] = 12,
    backbone: Annotated[
        str, typer.Option(help="The backbone: a repository or folder. Its config.json is sufficient.")
    ] = "FacebookAI/roberta-large",
    with_head: Annotated[
        bool, typer.Option("--with-head", help="Keep the relation head of a pre-trained factual adapter.")
    ] = False,
    backbone_weights: Annotated[
        Path | None,
        typer.Option(show_default=False, help="The backbone of a fine-tuned model: its pytorch_pretrained_model.bin."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            callback=checked_task,
            autocompletion=starting(TASKS),
            show_default=False,
            help="The task of a fine-tuned model, e.g. open-entity or tacred: records its labels and markers, for predictions "
            "and pipelines.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read input and output again afterwards and compare all tensors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Convert checkpoints of microsoft/K-Adapter. No code from them is run.

    Example: `kadapter convert fac-adapter/pytorch_model.bin --output factual-adapter --verify`

    Example: `kadapter convert pytorch_model.bin --backbone-weights pytorch_pretrained_model.bin --task tacred
    --output tacred-model`
    """
    numbers = layer_numbers(layers)
    if not checkpoint.exists():
        fail(f"'{checkpoint}' is missing.")
    check_new(output)
    from kadapter_hf.conversion import convert as run, verify as compare

    with running():
        made = run(
            checkpoint,
            output,
            name=name,
            layers=numbers,
            heads=heads,
            backbone=backbone,
            with_head=with_head,
            backbone_weights=backbone_weights,
            **recorded(task),
        )
        if not as_json:
            show(made)
        verified = compare(made) if verify else None
        if as_json:
            print_json(described(made, verified))
            return
        if verified is not None:
            say(f"Verified: {verified:,} tensors are identical to those of the checkpoint, bit for bit.")
        written = ", ".join(f"{file} ({size / 1e6:,.1f} MB)" for file, size in made.files.items())
        folder = shlex.quote(str(made.output))
        conclude(f"{made.model_class} written to {folder}: {written}. `kadapter info {folder}` shows its contents.")


def recorded(name: str | None) -> dict[str, Any]:
    """The arguments of the conversion for a task: what is recorded of it, and its labels."""
    if name is None:
        return {}
    from kadapter_hf.tasks.task import find_task

    task = find_task(name)
    settings = {"name": name, "schema": task.schema.name, "max_length": task.paper["max_length"]}
    return {"task": settings | asdict(task.options()), "labels": task.labels}


def layer_numbers(layers: str) -> list[int]:
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"comma-separated numbers are expected, e.g. 0,11,22, not '{layers}'.", param_hint="--layers"
        ) from None


def described(made: "Conversion", verified: int | None) -> dict[str, Any]:
    """The output of --json."""
    return {
        "output": str(made.output),
        "class": made.model_class,
        "files": made.files,
        "backbone_known": made.backbone_known,
        "sources": [
            {"file": str(source.path), "used": source.targets, "left_out": source.left_out} for source in made.sources
        ],
        "verified": verified,
    }


def show(made: "Conversion") -> None:
    """Prints which tensors were used or dropped."""
    from rich.table import Table

    for source in made.sources:
        table = Table("tensors", "number", "MB", f"result ({source.path.name})")
        for column in table.columns:
            column.overflow = "fold"
        table.columns[1].justify = table.columns[2].justify = "right"
        for fate, names in fates(source).items():
            # Of many tensors with the same result, e.g. an adapter's, only the first and the last are shown.
            label = ", ".join(names) if len(names) <= NAMES_SHOWN else f"{names[0]} … {names[-1]}"
            size = sum(source.sizes[tensor] for tensor in names) / 1e6
            table.add_row(label, f"{len(names):,}", f"{size:,.2f}", fate)
        print_table(table)
    if not made.backbone_known:
        say(
            "The backbone's weights are not available locally, so its fingerprint is omitted: loading will warn that the "
            "backbone could not be verified."
        )


def fates(source: "Source") -> dict[str, list[str]]:
    """The tensors of a file, grouped by result."""
    from kadapter_hf.modeling.format_kadapter import file_of

    found: dict[str, list[str]] = {}
    for tensor, ours in source.targets.items():
        found.setdefault(f"used: {file_of(ours[0])}", []).append(tensor)
    for tensor, reason in source.left_out.items():
        found.setdefault(f"left out: {reason}", []).append(tensor)
    return found
