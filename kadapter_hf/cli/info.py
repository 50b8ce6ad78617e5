"""`kadapter info`: shows the contents of an adapter file, a K-Adapter folder or a repository on the Hub."""

from typing import Annotated, Any

import typer

from ._arguments import AsJson, Revision, Token, existing
from ._output import print_json, print_rows, running


LABELS_SHOWN = 20


def info(
    source: Annotated[
        str,
        typer.Argument(
            callback=existing, show_default=False, help="An adapter's .safetensors file, a folder, or a repository."
        ),
    ],
    revision: Revision = None,
    token: Token = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Check whether the adapters fit this backbone (a repository or folder). The exit code is 1 if they don't fit, "
            "else 0. The weights are compared only if they are available locally.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    Show the contents of a K-Adapter: its adapters, their provenance, and the backbone they were trained on.

    Weights on the Hub are not downloaded. If the Hub can't be reached, the cached version is shown.

    Example: `kadapter info factual-adapter`

    Example: `kadapter info factual-adapter --backbone FacebookAI/roberta-large --json`
    """
    from kadapter_hf.contents import describe, fit

    with running(source):
        found = describe(source, revision, token)
        if backbone is not None:
            found |= fit(found["adapters"], backbone, token)
    if as_json:
        print_json(found)
    else:
        show(found)
    if found.get("fits") is False:
        raise typer.Exit(1)


def show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True)
    if found["from"] == "cache":
        console.print("The Hub can't be reached; showing the cached version.")
    if "class" in found:
        rows = {
            "class": found["class"],
            "commit": found["commit"],
            "adapters": ", ".join(adapter["name"] for adapter in found["adapters"]) or "none",
            "active": ", ".join(found["active_adapters"]) or "none",
            "frozen": ", ".join(found["frozen_adapters"]) or "none",
            "fusion": found["fusion"],
            "weights of the adapters": weights_words(found["fusion_weights"]),
            "task head": f"for {found['task']}" if found["task"] else "yes" if found["has_head"] else "no",
            "labels": labels_words(found["labels"], found["label_names"]),
            "backbone": backbone_words(found["backbone"]),
            "backbone's weights": "included" if found["has_backbone"] else "not included",
            "other files": files_words(found["other_files"]),
        }
        print_rows(console, found["source"], rows)
    for adapter in found["adapters"]:
        rows = {
            "file": adapter["file"],
            "backbone states": ", ".join(map(str, adapter["backbone_layers"] or ())),
            **size_words(adapter),
            "parameters": f"{adapter['parameters']:,} ({adapter['dtype']})",
            "bytes": f"{adapter['bytes'] or 0:,}",
            "SHA-256": adapter["sha256"],
            "trained on": backbone_words(adapter["backbone"]),
            **provenance_words(adapter["provenance"]),
        }
        if "fits" in adapter:
            verdict = {True: "yes", False: "no", None: "unknown"}[adapter["fits"]]
            rows[f"fits {found['compared_with']}"] = f"{verdict}: {adapter['reason']}"
        print_rows(console, f"adapter {adapter['name']}", rows)


def labels_words(labels: list[str], names: dict[str, str]) -> str:
    """The labels of the head, with the names of those that are ids; of many, the first ones."""
    words = [f"{label} ({names[label]})" if label in names else label for label in labels[:LABELS_SHOWN]]
    return ", ".join(words) + (f", … ({len(labels)} in total)" if len(labels) > LABELS_SHOWN else "")


def weights_words(weights: Any) -> str | None:
    """A bar of up to 20 blocks for the mean weight of each adapter, which fine-tuning has recorded."""
    if not isinstance(weights, dict) or not all(isinstance(weight, (int, float)) for weight in weights.values()):
        return None
    bars = {name: "█" * min(max(round(20 * weight), 0), 20) for name, weight in weights.items()}
    return ", ".join(f"{name} {bars[name]} {weight:.2f}".replace("  ", " ") for name, weight in weights.items())


def size_words(adapter: dict[str, Any]) -> dict[str, str]:
    if not adapter["num_hidden_layers"]:
        return {"bottleneck": "of width {hidden_size}, without transformer layers".format_map(adapter)}
    layers = "{num_hidden_layers} in each, of width {hidden_size}".format_map(adapter)
    return {"transformer layers": layers, "attention heads": str(adapter["num_attention_heads"])}


def files_words(sizes: dict[str, int | None]) -> str:
    """The files with their sizes, except for those of the code, which are many."""
    words = [f"{file} ({size or 0:,} bytes)" for file, size in sizes.items() if not file.endswith(".py")]
    code = [size or 0 for file, size in sizes.items() if file.endswith(".py")]
    return ", ".join([*words, *([f"{len(code)} files of code ({sum(code):,} bytes)"] if code else [])])


def backbone_words(backbone: dict[str, Any]) -> str:
    words = [str(backbone["name"] or "not named")]
    words += [f"{key} {backbone[key]}" for key in ("revision", "fingerprint") if backbone[key]]
    return ", ".join(words)


def provenance_words(provenance: dict[str, Any] | None) -> dict[str, str]:
    """The provenance, without the training history and the provenance of the parts of an average, which are long."""
    words = {}
    for key, value in (provenance or {}).items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        if key not in ("training", "sources"):
            words[f"provenance: {key}"] = str(value)
    return words
