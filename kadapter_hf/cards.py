"""
The model card (README.md) of a K-Adapter repository: made from what its configuration knows, and kept where a user edits it.

A comment at the card's end holds a hash of each part that was made: of each key of the metadata and each section. A part
that is as it was made is made anew by the next save; one that a user has changed, removed or added stays the user's.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from transformers.utils import logging

from .messages import is_repo_id
from .modeling.configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .modeling.format_kadapter import CARD_FILE
from .modeling.modeling_kadapter import KAdapterPreTrainedModel


logger = logging.get_logger(__name__)

TRAINERS_SECTION = "## Training procedure"  # in the card that Trainer writes: its hyperparameters and results
# Start of the comment in Trainer's card. transformers has it as a constant, in a module that is slow to import.
TRAINERS_COMMENT = "<!-- This model card has been generated automatically according to the information the Trainer had"
# What `kadapter pretrain` calls its objectives, as the Hub's tasks.
TASKS = {
    "factual": ("text-classification", "relation classification"),
    "linguistic": ("token-classification", "dependency parsing"),
    "typing": ("text-classification", "entity typing"),
}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ ["No knowledge adapter yet", "A knowledge adapter", "Knowledge adapters"][[adapters | length, 2] | min] }} beside \
{{ "a fine-tuned" if backbone_stored else "the frozen" }} {{ backbone_link }}: a
[K-Adapter](https://arxiv.org/abs/2002.01808), in the format of the package kadapter-hf.

## Use

```python
{{ snippet }}
```

Without the package, from the code in this repository: \
`AutoModel.from_pretrained("{{ source }}", trust_remote_code=True)`.

## Knowledge adapters

| adapter | reads the backbone's states | transformer layers | width | attention heads |
|---|---|---|---|---|
{% for adapter, config in adapters.items() -%}
| {{ adapter }} | {{ config.backbone_layers | join(", ") }} | {{ config.num_hidden_layers }} in each of \
{{ config.backbone_layers | length }} | {{ config.hidden_size }} | {{ config.num_attention_heads }} |
{% endfor %}
## Training
{% for adapter, rows in facts.items() %}
### {{ adapter }}
{% if rows %}
| | |
|---|---|
{% for key, value in rows.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{%- else %}
Not recorded.
{% endif %}
{%- if epochs[adapter] %}
| {{ epochs[adapter][0] | join(" | ") }} |
|{{ "---|" * epochs[adapter][0] | length }}
{% for row in epochs[adapter] -%}
| {{ row.values() | join(" | ") }} |
{% endfor %}
{%- endif %}
{%- endfor %}
## Results on held-out rows
{% if results %}
| adapter | metric | value |
|---|---|---|
{% for result in results -%}
| {{ result.metric_args }} | {{ result.metric_name }} | {{ "%.4f" | format(result.metric_value) }} |
{% endfor %}
{%- else %}
Not recorded.
{% endif %}
## Backbone

| | |
|---|---|
| name | {{ backbone_link }} |
| revision | {{ revision }} |
| fingerprint of its weights | {{ fingerprint }} |
{% if fingerprint != "not known" %}
Loading refuses a backbone with other weights.
{% endif %}
## Citation

```bibtex
@inproceedings{wang-etal-2021-k,
    title = "{K}-{A}dapter: {I}nfusing {K}nowledge into {P}re-{T}rained {M}odels with {A}dapters",
    author = "Wang, Ruize and Tang, Duyu and Duan, Nan and Wei, Zhongyu and Huang, Xuanjing and Ji, Jianshu and \
Cao, Guihong and Jiang, Daxin and Zhou, Ming",
    booktitle = "Findings of the Association for Computational Linguistics: ACL-IJCNLP 2021",
    year = "2021",
    pages = "1405--1418",
}
```
"""


def card_text(
    config: KAdapterConfig,
    repo_id: str | None,
    *,
    backbone_stored: bool,
    earlier: Sequence[Path] = (),
    tags: Sequence[str] | None = None,
) -> str | None:
    """
    A repository's README.md; None if one of the earlier ones can't be read and should stay as it is.

    Args:
        repo_id: where it is on the Hub; None for a folder, whose card is the same wherever it is.
        backbone_stored: whether the repository has a backbone of its own.
        earlier: cards to keep a user's parts of, if they are there: first the local one, then the one on the Hub. If both
            have the same part changed, the later one's is kept.
        tags: to be added to those of the card.
    """
    made = make_card(config, repo_id, backbone_stored)
    text = _with_hashes(made)
    for path in earlier:
        if path.is_file():
            try:
                text = merge_card(path.read_text(encoding="utf-8"), text)
            except ValueError as error:  # not UTF-8, or metadata that are not YAML
                logger.warning(f"the model card '{path}' can't be read and stays as it is: {error}")
                return None
    return _with_tags(text, tags) if tags else text


def write_model_card(model: KAdapterPreTrainedModel, staging: Path, folder: Path, *, backbone_stored: bool) -> None:
    """What `KAdapterPreTrainedModel.write_model_card` does in this package."""
    text = card_text(model.config, None, backbone_stored=backbone_stored, earlier=[folder / CARD_FILE])
    if text is not None:
        (staging / CARD_FILE).write_text(text, encoding="utf-8")


def make_card(config: KAdapterConfig, repo_id: str | None, backbone_stored: bool) -> str:
    """The card as it is without a user's edits."""
    adapters = config.knowledge_adapters or {}
    told = {adapter: _provenance(adapter_config) for adapter, adapter_config in adapters.items()}
    results = [result for adapter, provenance in told.items() for result in _results(adapter, provenance)]
    backbone = config.backbone_name_or_path or ""
    on_hub = is_repo_id(backbone)
    shown = backbone if on_hub else Path(backbone).name
    name = repo_id or f"K-Adapter: {', '.join(adapters) or 'no adapter yet'}"
    source = repo_id or "."
    data = ModelCardData(
        base_model=backbone if on_hub else None,
        base_model_relation=("finetune" if backbone_stored else "adapter") if on_hub else None,
        library_name="transformers",
        tags=["k-adapter", "knowledge-adapter", *(f"{adapter}-knowledge" for adapter in adapters)],
        language=_all_of(told, "language"),
        license=_only_of(told, "license"),
        datasets=_all_of(told, "dataset"),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    architecture = (config.architectures or ["KAdapterModel"])[0]
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        source=source,
        adapters=adapters,
        backbone_link=f"[{backbone}](https://huggingface.co/{backbone})" if on_hub else f"`{shown}`",
        backbone_stored=backbone_stored,
        snippet=_snippet(architecture, source, list(adapters), shown, backbone_stored),
        facts={adapter: _facts(provenance) for adapter, provenance in told.items()},
        epochs={adapter: _epochs(provenance) for adapter, provenance in told.items()},
        results=results,
        revision=f"`{config.backbone_revision}`" if config.backbone_revision else "not known",
        fingerprint=f"`{config.backbone_fingerprint}`" if config.backbone_fingerprint else "not known",
    )
    return str(card).rstrip() + "\n"


# ---- What the card says ---------------------------------------------------------------------------------------------


def _snippet(architecture: str, source: str, adapters: list[str], backbone: str, backbone_stored: bool) -> str:
    if backbone_stored or not adapters:
        return (
            f"from kadapter_hf import {architecture}\n\n"
            f'model = {architecture}.from_pretrained("{source}")\n'
            "print(model.knowledge_summary())"
        )
    sources = ", ".join(f'"{adapter}": "{source}"' for adapter in adapters)
    return (
        f"from kadapter_hf import {', '.join(sorted({architecture, 'KAdapterModel'}))}\n"
        "from transformers import AutoTokenizer\n\n"
        f"# As it was saved{'' if architecture == 'KAdapterModel' else ', with its head'}\n"
        f'model = {architecture}.from_pretrained("{source}")\n\n'
        "# Or what it knows beside a backbone, to combine with other adapters and to fine-tune\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{backbone}")\n'
        f'model = KAdapterModel.from_backbone("{backbone}", {{{sources}}})\n'
        'inputs = tokenizer("The Danube flows through Vienna.", return_tensors="pt")\n'
        "print(model(**inputs).last_hidden_state.shape)"
    )


def _provenance(config: KnowledgeAdapterConfig) -> dict[str, Any]:
    """As in config.json, where keys are strings."""
    return config.to_dict()["provenance"] or {}


def _facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The recorded facts as cells of a table, what has a place of its own left out."""
    return {
        _cell(key.replace("_", " ")): _cell(
            ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else value
        )
        for key, value in provenance.items()
        if key not in ("metrics", "training")
    }


def _epochs(provenance: Mapping[str, Any]) -> list[dict[str, str]]:
    """The recorded course of the training as rows of a table, each with the same columns."""
    rows = provenance.get("training")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return []
    first = ("epoch", "step", "loss", "eval_loss")
    keys = {key for row in rows for key in row}
    columns = [*(key for key in first if key in keys), *sorted(keys.difference(first))]
    return [
        {
            _cell(key.removeprefix("eval_").replace("_", " ") if key != "eval_loss" else "held-out loss"): _cell(
                f"{row[key]:.4g}" if isinstance(row.get(key), float) else row.get(key, "")
            )
            for key in columns
        }
        for row in rows
    ]


def _results(adapter: str, provenance: Mapping[str, Any]) -> list[EvalResult]:
    metrics = provenance.get("metrics")
    task_type, task_name = TASKS.get(str(provenance.get("objective")), ("other", adapter))
    dataset = provenance.get("dataset") or provenance.get("corpus") or "not recorded"
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=str(dataset),
            dataset_name=Path(str(dataset)).name or str(dataset),
            metric_type="f1" if key.endswith("f1") else key.removeprefix("eval_"),
            metric_name=key.removeprefix("eval_").replace("_", " "),
            metric_value=round(value, 4),
            metric_args=adapter,  # type: ignore[arg-type]
        )
        for key, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, (int, float)) and math.isfinite(value) and key != "eval_loss"
    ]


def _all_of(told: Mapping[str, dict[str, Any]], key: str) -> list[str] | None:
    """What the adapters say of themselves under this key, each once."""
    values = [value for provenance in told.values() for value in _listed(provenance.get(key))]
    return list(dict.fromkeys(values)) or None


def _only_of(told: Mapping[str, dict[str, Any]], key: str) -> str | None:
    """The same, if all say the same."""
    values = {str(provenance.get(key)) for provenance in told.values() if provenance.get(key)}
    return values.pop() if len(values) == 1 else None


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _cell(value: Any) -> str:
    """Text that can't end a cell of a table, or begin one of Markdown's or HTML's own."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\|`*\[\]<>])", r"\\\1", text)


# ---- What a user has changed ----------------------------------------------------------------------------------------

_HASHES = re.compile(r"<!-- kadapter-hf: [^{]*(\{.*\}) -->\s*$")
_NOTE = "what was made for this card from the model; a part that you change stays as you leave it"


def merge_card(old: str, new: str) -> str:
    """
    `old` with those parts replaced by `new`'s that are as an earlier save made them.

    A card without a save's hashes is the user's own: only what its metadata lack is added. One that Trainer wrote is
    replaced, but for its section on the training.

    Raises:
        ValueError: the metadata of `old` can't be read.
    """
    old, old_hashes = _without_hashes(old)
    new, new_hashes = _without_hashes(new)
    old_data, old_sections = _split(old)
    new_data, new_sections = _split(new)
    data = _merge(old_data, new_data, old_hashes or {})
    if old_hashes is not None:
        sections = _merge(old_sections, new_sections, old_hashes)
    elif TRAINERS_COMMENT in old:
        sections = new_sections | {key: old_sections[key] for key in (TRAINERS_SECTION,) if key in old_sections}
    else:
        sections = old_sections
    if old_hashes is None and isinstance(data.get("tags"), list):
        data["tags"] = list(dict.fromkeys([*data["tags"], *new_data["tags"]]))
    header = REGEX_YAML_BLOCK.search(old)
    # Untouched metadata keep a user's comments and line breaks.
    metadata = header[2].strip() if header and data == old_data else yaml_dump(data).strip()
    text = "\n\n".join(section.strip() for section in sections.values())
    return _append_hashes(f"---\n{metadata}\n---\n\n{text}\n", new_hashes or {})


def _merge(old: dict[str, Any], new: dict[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    merged = {}
    for key, value in old.items():
        if hashes.get(key) != _hash(value):
            merged[key] = value
        elif key in new:
            merged[key] = new[key]
    return merged | {key: value for key, value in new.items() if key not in old and key not in hashes}


def _split(card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of a card, and its text by section: each heading of the second level begins one."""
    header = REGEX_YAML_BLOCK.search(card)
    try:
        data = yaml.safe_load(header[2]) or {} if header else {}
    except yaml.YAMLError as error:
        raise ValueError(f"its metadata are not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("its metadata are not a YAML mapping")
    sections: dict[str, str] = {}
    key, fenced = "", False
    for line in (card[header.end() :] if header else card).splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            key = line.strip()
            while key in sections:  # a heading may be there twice
                key += "'"
        sections[key] = sections.get(key, "") + line
    return data, sections


def _with_tags(card: str, tags: Sequence[str]) -> str:
    """With more tags, as if a user had written them into the card."""
    data, _ = _split(card)
    there = data["tags"] if isinstance(data.get("tags"), list) else []
    text = REGEX_YAML_BLOCK.sub("", card, count=1)
    return f"---\n{yaml_dump(data | {'tags': list(dict.fromkeys([*there, *tags]))}).strip()}\n---\n{text}"


def _with_hashes(made: str) -> str:
    data, sections = _split(made)
    return _append_hashes(made, {key: _hash(value) for key, value in (data | sections).items()})


def _append_hashes(card: str, hashes: Mapping[str, str]) -> str:
    return f"{card.rstrip()}\n\n<!-- kadapter-hf: {_NOTE}. {json.dumps(hashes)} -->\n"


def _without_hashes(card: str) -> tuple[str, dict[str, str] | None]:
    found = _HASHES.search(card)
    try:
        return (card[: found.start()], dict(json.loads(found[1]))) if found else (card, None)
    except (ValueError, TypeError):
        return card, None


def _hash(value: Any) -> str:
    # Blank lines at a section's end are where the next one begins.
    text = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
