"""`kadapter export`: writes a K-Adapter as an ONNX file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._arguments import AsJson, check_new, existing
from ._output import conclude, print_json, print_table, running, say


def export(
    model: Annotated[
        str,
        typer.Argument(
            callback=existing, show_default=False, help="A K-Adapter: a folder, or a repository on the Hub."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="The output folder for the ONNX file, the configuration and the tokenizer; new or empty."),
    ],
    quantize: Annotated[
        bool,
        typer.Option(
            "--quantize",
            help="Also write model_quantized.onnx, with 8-bit weights, and measure how much its outputs differ.",
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            show_default=False,
            help="Measure that on the rows of this file, of the task that the model was fine-tuned on. Default: random tokens.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Write a K-Adapter as one ONNX file, with its backbone, its active adapters, the fusion and the head.

    The file is run on ONNX Runtime and compared with the model; if they differ, nothing is kept. Needs the extra `export`.

    Example: `kadapter export relation-model --output relation-onnx`

    Example: `kadapter export relation-model --output relation-onnx --quantize --data test.csv`
    """
    if data is not None and not quantize:
        raise typer.BadParameter("only --quantize measures on it.", param_hint="--data")
    check_new(output)
    with running(model):
        from rich.console import Console

        from kadapter_hf.export import batches_of, export_onnx, require_onnx
        from kadapter_hf.predicting import load_finetuned

        require_onnx()
        with Console(stderr=True).status("Exporting, which takes a minute or more"):
            loaded, tokenizer = load_finetuned(model)
            batches = () if data is None else batches_of(loaded, tokenizer, data)
            found = export_onnx(loaded, tokenizer, output, quantize=quantize, batches=batches)
    if as_json:
        print_json(found)
    else:
        show(found)


def show(found: dict[str, Any]) -> None:
    from rich.table import Table

    shapes = list(found["files"]["torch"]["milliseconds"])
    # The heads are broken into lines here, so that the table fits into 80 columns without cutting them.
    times = (f"ms,\n{shape}\ntokens" for shape in shapes)
    table = Table("", "MB", *times, "largest\ndifference", "same\npredictions")
    table.columns[0].no_wrap = True
    for name, file in found["files"].items():
        difference, same = file.get("largest_difference"), file.get("same_predictions")
        table.add_row(
            name,
            f"{file['bytes'] / 1e6:.1f}",
            *(f"{file['milliseconds'][shape]:.1f}" for shape in shapes),
            "" if difference is None else f"{difference:.1e}",
            "" if same is None else f"{same:.2%}",
        )
    print_table(table)
    say(f"Inputs {', '.join(found['inputs'])}; outputs {', '.join(found['outputs'])}; opset {found['opset']}.")
    output = found["output"]
    conclude(f'Written to {output}. Run it with onnxruntime.InferenceSession("{output}/model.onnx").')
