"""`kadapter combine`: combines separately trained adapters in one K-Adapter."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ._arguments import AsJson, check_name, check_new, existing, starting
from ._flags import fusion_values
from ._names import FUSIONS
from ._output import conclude, print_json, running, say


def checked_fusion(fusion: str) -> str:
    check_name(fusion, FUSIONS)
    return fusion


def combine(
    sources: Annotated[
        list[str],
        typer.Argument(
            callback=existing,
            help="Adapter repositories, folders or .safetensors files. NAME=SOURCE renames the adapter, or chooses one of "
            "several.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="The output folder for the K-Adapter and the tokenizer, which must be new or empty.")
    ],
    backbone: Annotated[
        str | None,
        typer.Option(
            callback=existing, help="The backbone: a repository or folder. Default: as recorded in the first adapter."
        ),
    ] = None,
    fusion: Annotated[
        str,
        typer.Option(
            callback=checked_fusion,
            autocompletion=starting(FUSIONS),
            help="How the outputs are fused: add, which has no weights; or concat, gate or attention, which are trained in "
            "fine-tuning.",
        ),
    ] = "concat",
    fusion_config: Annotated[
        str | None,
        typer.Option(
            "--fusion_config",
            "--fusion-config",
            metavar="JSON",
            show_default=False,
            help="""The configuration of the fusion as JSON, e.g. '{"top_k": 2}' for gate.""",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Combine separately trained knowledge adapters in one K-Adapter, ready for fine-tuning.

    Example: `kadapter combine factual-adapter linguistic-adapter --output both`

    Example: `kadapter combine wiki=wiki/factual-adapter news=news/factual-adapter --output both`
    """
    try:
        values = fusion_values(fusion, fusion_config)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--fusion-config") from None
    check_new(output)
    from kadapter_hf.combining import combine as run
    from kadapter_hf.summary import knowledge_summary

    with running():
        model, has_tokenizer = run(sources, output, backbone, fusion, values)
        if as_json:
            names = model.active_knowledge_adapters
            print_json({"output": str(output), "backbone": model.config.backbone_name_or_path, "adapters": names})
            return
        say(knowledge_summary(model))
        if next(model.backbone.parameters()).is_meta:
            say(
                "Here, the weights of the backbone are not available. When the K-Adapter is loaded, they are compared with the "
                "fingerprint that its adapters record."
            )
        if any(parameter.requires_grad for parameter in model.fusion.parameters()):
            say(
                "Until it is fine-tuned, its output is close to the backbone's, as a new fusion gives the adapters little "
                "weight."
            )
        if not has_tokenizer:
            say(f"The backbone '{model.config.backbone_name_or_path}' has no tokenizer that could be saved with it.")
        folder = shlex.quote(str(output))
        conclude(
            f"The K-Adapter is in {folder}. Fine-tune it: `kadapter finetune TASK --data DATA --adapters {folder} "
            "--output_dir MODEL`."
        )
