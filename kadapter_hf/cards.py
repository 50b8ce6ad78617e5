"""
The model card (README.md) of a K-Adapter repository: generated from its configuration, preserving the user's edits.

A comment at the end of the card holds a hash of each generated part, i.e. each metadata key and each section. The next
save regenerates unchanged parts. Parts that a user has changed, removed or added are kept as they are.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from transformers.utils import logging

from .card_content import make_card
from .modeling.configuration_kadapter import KAdapterConfig
from .modeling.format_kadapter import CARD_FILE
from .modeling.modeling_kadapter import KAdapterPreTrainedModel


logger = logging.get_logger(__name__)

TRAINERS_SECTION = "## Training procedure"  # section of Trainer's card with hyperparameters and results
# Start of the comment in Trainer's card. The constant in transformers is in a module that is slow to import.
TRAINERS_COMMENT = "<!-- This model card has been generated automatically according to the information the Trainer had"

_HASHES = re.compile(r"<!-- kadapter-hf: [^{]*(\{.*\}) -->\s*$")
_NOTE = "hashes of the generated parts; parts that you edit are kept"


def card_text(
    config: KAdapterConfig,
    repo_id: str | None,
    *,
    backbone_stored: bool,
    earlier: Sequence[Path] = (),
    tags: Sequence[str] | None = None,
) -> str | None:
    """
    The README.md of a repository; None if an earlier card can't be read and must not be overwritten.

    Args:
        repo_id: the repository on the Hub; None for a folder, whose card does not depend on its location.
        backbone_stored: whether the repository stores a backbone.
        earlier: existing cards whose edits are kept, if the files exist: first the local one, then the one on the Hub. If
            both have changed the same part, the later one wins.
        tags: tags to add to those of the card.
    """
    made = make_card(config, repo_id, backbone_stored)
    text = _with_hashes(made)
    for path in earlier:
        if path.is_file():
            try:
                text = merge_card(path.read_text(encoding="utf-8"), text)
            except ValueError as error:  # not UTF-8, or metadata that is not YAML
                logger.warning(f"the model card '{path}' can't be read and is not updated: {error}")
                return None
    return _with_tags(text, tags) if tags else text


def write_model_card(model: KAdapterPreTrainedModel, staging: Path, folder: Path, *, backbone_stored: bool) -> None:
    """Implements `KAdapterPreTrainedModel.write_model_card` in this package."""
    text = card_text(model.config, None, backbone_stored=backbone_stored, earlier=[folder / CARD_FILE])
    if text is not None:
        (staging / CARD_FILE).write_text(text, encoding="utf-8")


def merge_card(old: str, new: str) -> str:
    """
    Updates those parts of `old` that are unchanged since they were generated to those of `new`.

    A card without hashes was written by the user: only missing metadata is added. A card written by Trainer is replaced,
    except for its section on the training.

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
    # Unchanged metadata keeps the user's comments and line breaks.
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
    """The metadata of a card, and its text by section; sections start at second-level headings."""
    header = REGEX_YAML_BLOCK.search(card)
    try:
        data = yaml.safe_load(header[2]) or {} if header else {}
    except yaml.YAMLError as error:
        raise ValueError(f"its metadata is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("its metadata is not a YAML mapping")
    sections: dict[str, str] = {}
    key, fenced = "", False
    for line in (card[header.end() :] if header else card).splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            key = line.strip()
            while key in sections:  # headings may repeat
                key += "'"
        sections[key] = sections.get(key, "") + line
    return data, sections


def _with_tags(card: str, tags: Sequence[str]) -> str:
    """Adds tags, as if a user had written them into the card."""
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
    # Blank lines at the end of a section only separate it from the next.
    text = value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
