"""`kadapter convert`: the original release's checkpoints to K-Adapter repositories."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..conversion import Conversion, convert as run, verify as compare
from ..conversion.original import Source
from ..modeling.format_kadapter import file_of
from ._common import AsJson, plain_errors, print_json


NAMES_SHOWN = 20


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(show_default=False, help="A pre-trained adapter's pytorch_model.bin, or a fine-tuned model's."),
    ],
    output: Annotated[Path, typer.Option(show_default=False, help="The folder to write to; it must be new or empty.")],
    name: Annotated[
        str | None,
        typer.Option(show_default="factual or linguistic, as its head tells", help="What to call the adapter."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="The backbone states that the adapter layers read, the original's adapter_list. Its training scripts have "
            "0,11,22; the paper and the usage example 0,11,23. The file does not say."
        ),
    ] = "0,11,22",
    heads: Annotated[int, typer.Option(min=1, help="Attention heads in the adapters; the file does not say.")] = 12,
    backbone: Annotated[
        str, typer.Option(help="The backbone's repository or folder; its config.json is enough.")
    ] = "FacebookAI/roberta-large",
    with_head: Annotated[
        bool, typer.Option("--with-head", help="Keep the relation head that a factual adapter was pre-trained with.")
    ] = False,
    backbone_weights: Annotated[
        Path | None,
        typer.Option(show_default=False, help="A fine-tuned model's backbone, its pytorch_pretrained_model.bin."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything again afterwards, and compare all tensors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """
    Convert checkpoints of microsoft/K-Adapter. No code in them is run.

    Example: `kadapter convert fac-adapter/pytorch_model.bin --output factual-adapter --verify`

    Example: `kadapter convert pytorch_model.bin --backbone-weights pytorch_pretrained_model.bin --output tacred-model`
    """
    with plain_errors():
        made = run(
            checkpoint,
            output,
            name=name,
            layers=numbers(layers),
            heads=heads,
            backbone=backbone,
            with_head=with_head,
            backbone_weights=backbone_weights,
        )
        if not as_json:
            show(made)
        verified = compare(made) if verify else None
    if as_json:
        print_json(described(made, verified))
    elif verified is not None:
        Console().print(f"Verified: {verified:,} tensors are those of the checkpoint, bit for bit.")


def numbers(layers: str) -> list[int]:
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers takes numbers with commas between, such as 0,11,22, not '{layers}'") from None


def described(made: Conversion, verified: int | None) -> dict[str, Any]:
    """What --json prints."""
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


def show(made: Conversion) -> None:
    """Prints what became of each tensor, and what was written."""
    console = Console(soft_wrap=True)
    for source in made.sources:
        table = Table("tensors", "number", "MB", f"what became of them ({source.path.name})")
        for column in table.columns:
            column.overflow = "fold"
        table.columns[1].justify = table.columns[2].justify = "right"
        for fate, names in fates(source).items():
            # Of many tensors with one fate, such as an adapter's, the first and the last say enough.
            label = ", ".join(names) if len(names) <= NAMES_SHOWN else f"{names[0]} … {names[-1]}"
            size = sum(source.sizes[tensor] for tensor in names) / 1e6
            table.add_row(label, f"{len(names):,}", f"{size:,.2f}", fate)
        console.print(table)
    if not made.backbone_known:
        console.print(
            "The backbone's weights are not on this machine, so its fingerprint is left out: loading will say that the "
            "backbone could not be verified."
        )
    written = ", ".join(f"{file} ({size / 1e6:,.1f} MB)" for file, size in made.files.items())
    console.print(f"{made.model_class} written to {made.output}: {written}.", markup=False, highlight=False)


def fates(source: Source) -> dict[str, list[str]]:
    """The tensors of a file by what became of them."""
    found: dict[str, list[str]] = {}
    for tensor, ours in source.targets.items():
        found.setdefault(f"used: {file_of(ours[0])}", []).append(tensor)
    for tensor, reason in source.left_out.items():
        found.setdefault(f"left out: {reason}", []).append(tensor)
    return found
