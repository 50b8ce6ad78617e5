"""The content of a model card, from the configuration of a K-Adapter."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kadapter_cli._names import is_repo_id

from .modeling.configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .modeling.pipelines_kadapter import PIPELINES


# The Hub's tasks for the objectives of `kadapter pretrain`.
TASKS = {
    "factual": ("text-classification", "relation classification"),
    "linguistic": ("token-classification", "dependency parsing"),
    "typing": ("text-classification", "entity typing"),
}

# The Hub's tasks for the schemas of the tasks of `kadapter finetune`.
TASK_TYPES = {
    "relation": "text-classification",
    "typing": "text-classification",
    "classification": "text-classification",
    "multiple-choice": "multiple-choice",
    "extractive-qa": "question-answering",
    "tagging": "token-classification",
}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ ["No knowledge adapter yet", "A knowledge adapter", "Knowledge adapters"][[adapters | length, 2] | min] }} for \
{{ "a fine-tuned" if backbone_stored else "the frozen" }} {{ backbone_link }} ([K-Adapter](https://arxiv.org/abs/2002.01808)),
saved with the package kadapter-hf.

## Use

```python
{{ snippet }}
```

Without the package, using the code in this repository: \
`AutoModel.from_pretrained("{{ source }}", trust_remote_code=True)`.

{% if task_results -%}
## Results on {{ task }}

| split | metric | value |
|---|---|---|
{% for split, metric, value in task_results -%}
| {{ split }} | {{ metric }} | {{ "%.4f" | format(value) }} |
{% endfor %}
{% endif -%}
## Knowledge adapters

| adapter | backbone states | transformer layers | width | attention heads |
|---|---|---|---|---|
{% for adapter, config in adapters.items() -%}
| {{ adapter }} | {{ config.backbone_layers | join(", ") }} | {{ config.num_hidden_layers or "none" }} in each of \
{{ config.backbone_layers | length }} adapter layers | {{ config.hidden_size }} | \
{{ config.num_attention_heads if config.num_hidden_layers }} |
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
Loading refuses a backbone with different weights.
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


def make_card(config: KAdapterConfig, repo_id: str | None, backbone_stored: bool) -> str:
    """The generated card, without a user's edits."""
    adapters = config.knowledge_adapters or {}
    provenances = {adapter: _provenance(adapter_config) for adapter, adapter_config in adapters.items()}
    results = [result for adapter, provenance in provenances.items() for result in _results(adapter, provenance)]
    task, task_results = _task_results(config)
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
        language=_all_of(provenances, "language"),
        license=_only_of(provenances, "license"),
        datasets=_all_of(provenances, "dataset"),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results or task_results else None,
        eval_results=[*results, *_eval_results(task, config, task_results)] or None,
    )
    architecture = (config.architectures or ["KAdapterModel"])[0]
    snippet = _snippet(architecture, source, list(adapters), backbone if on_hub else None, backbone_stored)
    if config.task and architecture in PIPELINES:
        snippet = _pipeline_snippet(architecture, source)
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        source=source,
        adapters=adapters,
        backbone_link=f"[{backbone}](https://huggingface.co/{backbone})" if on_hub else f"`{shown}`",
        backbone_stored=backbone_stored,
        snippet=snippet,
        facts={adapter: _facts(provenance) for adapter, provenance in provenances.items()},
        epochs={adapter: _epochs(provenance) for adapter, provenance in provenances.items()},
        results=results,
        task=task,
        task_results=task_results,
        revision=f"`{config.backbone_revision}`" if config.backbone_revision else "not known",
        fingerprint=f"`{config.backbone_fingerprint}`" if config.backbone_fingerprint else "not known",
    )
    return str(card).rstrip() + "\n"


def _snippet(architecture: str, source: str, adapters: list[str], backbone: str | None, backbone_stored: bool) -> str:
    """The code under "Use"; `backbone` is None for one in a folder, whose path is taken from the configuration."""
    if backbone_stored or not adapters:
        return (
            f"from kadapter_hf import {architecture}\n\n"
            f'model = {architecture}.from_pretrained("{source}")\n'
            "print(model.knowledge_summary())"
        )
    sources = ", ".join(f'"{adapter}": "{source}"' for adapter in adapters)
    name = f'"{backbone}"' if backbone else "model.config.backbone_name_or_path  # a folder; set it to yours"
    return (
        f"from kadapter_hf import {', '.join(sorted({architecture, 'KAdapterModel'}))}\n"
        "from transformers import AutoTokenizer\n\n"
        f"# The saved model{'' if architecture == 'KAdapterModel' else ', including its head'}\n"
        f'model = {architecture}.from_pretrained("{source}")\n\n'
        "# Or only the adapters, to combine with others and fine-tune\n"
        f"backbone = {name}\n"
        "tokenizer = AutoTokenizer.from_pretrained(backbone)\n"
        f"model = KAdapterModel.from_backbone(backbone, {{{sources}}})\n"
        'inputs = tokenizer("The Danube flows through Vienna.", return_tensors="pt")\n'
        "print(model(**inputs).last_hidden_state.shape)"
    )


def _pipeline_snippet(architecture: str, source: str) -> str:
    """The code under "Use" of a model that was fine-tuned on marked entities."""
    task, _ = PIPELINES[architecture]
    spans = '"entity": [13, 17]' if task == "entity-typing" else '"subject": [0, 3], "object": [13, 17]'
    return (
        "import kadapter_hf\n"
        "from transformers import pipeline\n\n"
        f'predict = pipeline("{task}", model="{source}")\n'
        f'print(predict({{"text": "She moved to Rome in May.", {spans}}}))'
    )


def _provenance(config: KnowledgeAdapterConfig) -> dict[str, Any]:
    """The provenance as in config.json, where keys are strings."""
    return config.to_dict()["provenance"] or {}


def _facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The provenance as table cells, except for the parts shown elsewhere."""
    return {
        _cell(key.replace("_", " ")): _cell(
            ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else value
        )
        for key, value in provenance.items()
        if key not in ("metrics", "training", "sources")
    }


def _epochs(provenance: Mapping[str, Any]) -> list[dict[str, str]]:
    """The training history as table rows with the same columns."""
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
    dataset = ", ".join(_listed(provenance.get("dataset")) or _listed(provenance.get("corpus"))) or "not recorded"
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=dataset,
            dataset_name=Path(dataset).name or dataset,
            metric_type="f1" if key.endswith("f1") else key.removeprefix("eval_"),
            metric_name=key.removeprefix("eval_").replace("_", " "),
            metric_value=round(value, 4),
            metric_args=adapter,  # type: ignore[arg-type]
        )
        for key, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, (int, float)) and math.isfinite(value) and key != "eval_loss"
    ]


def _task_results(config: KAdapterConfig) -> tuple[str, list[tuple[str, str, float]]]:
    """The task that the model was fine-tuned on, and its results as (split, metric, value)."""
    task = config.task or {}
    splits = task.get("results")
    return _cell(task.get("name", "")), [
        (_cell(split), _cell(str(metric).replace("_", " ")), float(value))
        for split, metrics in (splits.items() if isinstance(splits, dict) else ())
        for metric, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _eval_results(task: str, config: KAdapterConfig, results: list[tuple[str, str, float]]) -> list[EvalResult]:
    task_type = TASK_TYPES.get(str((config.task or {}).get("schema")), "other")
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=task,
            dataset_name=task,
            dataset_split=split,
            metric_type="f1" if metric.endswith("f1") else metric,
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for split, metric, value in results
        if metric != "loss"
    ]


def _all_of(provenances: Mapping[str, dict[str, Any]], key: str) -> list[str] | None:
    """The distinct values of all adapters for this key of their provenance."""
    values = [value for provenance in provenances.values() for value in _listed(provenance.get(key))]
    return list(dict.fromkeys(values)) or None


def _only_of(provenances: Mapping[str, dict[str, Any]], key: str) -> str | None:
    """The value for this key, if all adapters agree."""
    values = {str(provenance.get(key)) for provenance in provenances.values() if provenance.get(key)}
    return values.pop() if len(values) == 1 else None


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _cell(value: Any) -> str:
    """Escapes text so that it can't end a table cell or be interpreted as Markdown or HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\|`*\[\]<>])", r"\\\1", text)
