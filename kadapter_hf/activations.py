"""
A disk cache of the frozen backbone's states for a data set, so that the backbone runs once instead of in every epoch.

The states of an example depend only on its token ids and the backbone's weights. A cache is a folder named by a hash of
these, so a different backbone, layer, tokenizer or text never uses an outdated cache.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.utils import WeakFileLock
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.utils import logging

from .corpora.schema import write_json
from .modeling.modeling_kadapter import KAdapterPreTrainedModel


logger = logging.get_logger(__name__)

STATES = "states.bin"
BATCHES_PER_NOTE = 100  # how often the progress is saved, in case the process is killed
ROW = "row"  # the column with the index of a row in the cache


class ActivationCache:
    """
    Memory-mapped states of shape `(tokens, states, width)` for each row of a data set.

    They are in the order of `model.backbone_states_read()`, followed by the backbone's last state.
    """

    def __init__(
        self, file: Path, lengths: list[int], states: int, width: int, dtype: torch.dtype, writable: bool = False
    ):
        self.offsets = [0, *itertools.accumulate(lengths)]
        size = self.offsets[-1] * states * width
        self.tokens = torch.from_file(str(file), shared=writable, size=size, dtype=dtype).view(-1, states, width)

    def __getitem__(self, row: int) -> torch.Tensor:
        """`(tokens, states, width)`"""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]


def cached_activations(
    model: KAdapterPreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
) -> ActivationCache:
    """
    The states of the rows of `dataset` (with `input_ids`); computed if `folder` has no cache of them yet.

    If the computation is interrupted, the next call continues it.

    Args:
        dtype: dtype of the cache. float32 gives the same training as without a cache; bfloat16 needs half the disk space.
        batch_size: batch size for the backbone.

    Raises:
        ValueError: the backbone trains, or an adapter attends to padding, so the states depend on more than the example.
        OSError: not enough disk space; the message says how much is needed.
    """
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ValueError("the states of a backbone that trains can't be cached: call freeze_backbone() first.")
    if any(adapter.attend_to_padding for adapter in (model.config.knowledge_adapters or {}).values()):
        raise ValueError("the states can't be cached for an adapter with attend_to_padding=True, which reads padding.")
    layers = model.backbone_states_read()
    states, width = len(layers) + 1, model.backbone.config.hidden_size
    ids = dataset["input_ids"][:]
    lengths = [len(row) for row in ids]
    content = [model.backbone_fingerprint(), str(model.backbone.dtype), str(dtype), layers]
    key = hashlib.sha256(json.dumps(content).encode())
    for row in ids:
        key.update(json.dumps(row).encode())
    place = Path(folder) / key.hexdigest()[:32]
    if not (place / STATES).is_file():
        place.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(place / "lock"):  # another run may be computing the same states
            if not (place / STATES).is_file():
                _compute(model, ids, tokenizer, place, lengths, layers, dtype, batch_size)
    return ActivationCache(place / STATES, lengths, states, width, dtype)


def _compute(
    model: KAdapterPreTrainedModel,
    ids: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    lengths: list[int],
    layers: list[int],
    dtype: torch.dtype,
    batch_size: int,
) -> None:
    """Writes the states to a temporary file, which is renamed when it is complete. Continues one from an interrupted run."""
    states, width = len(layers) + 1, model.backbone.config.hidden_size
    token_size = states * width * dtype.itemsize
    part, progress = place / f"{STATES}.part", place / "progress.json"
    # Batches of equal length avoid the cost of padding and rounding differences caused by it.
    order = sorted(range(len(ids)), key=lengths.__getitem__, reverse=True)
    done = json.loads(progress.read_text()) if part.exists() and progress.exists() else 0
    size = token_size * sum(lengths[row] for row in order[done:])
    free = shutil.disk_usage(place).free
    earlier = f", in addition to {done} from an earlier run" if done else ""
    logger.warning(
        f"The backbone's states of {len(ids) - done} examples need {size / 1e9:.2f} GB in '{place}'{earlier}."
    )
    if size > free:
        if not done:
            shutil.rmtree(place, ignore_errors=True)
        raise OSError(
            f"'{place.parent}' has {free / 1e9:.2f} GB left, and the backbone's states need {size / 1e9:.2f} GB. "
            "Choose a larger disk, cache them in bfloat16, or train without a cache."
        )
    with open(part, "r+b" if done else "wb") as file:
        file.truncate(token_size * sum(lengths))
        cache = ActivationCache(part, lengths, states, width, dtype, writable=True)

        def note_progress() -> None:
            os.fsync(file.fileno())  # first, so that the states that are counted are on the disk
            write_json(progress, done)

        collate = DataCollatorWithPadding(tokenizer)
        model.eval()
        starts = range(done, len(order), batch_size)
        try:
            for number, start in enumerate(
                tqdm(starts, desc="Backbone's states", disable=not logging.is_progress_bar_enabled()), start=1
            ):
                rows = order[start : start + batch_size]
                batch = collate([{"input_ids": ids[row]} for row in rows])
                batch = {name: tensor.to(model.backbone.device) for name, tensor in batch.items()}
                with torch.no_grad():
                    output = model.backbone(**batch, output_hidden_states=True, return_dict=True)
                found = [*(output.hidden_states[layer] for layer in layers), output.last_hidden_state]
                stacked = torch.stack(found, dim=2).to("cpu", dtype)
                for position, row in enumerate(rows):
                    # Padding may be on either side.
                    real = batch["attention_mask"][position].bool().cpu()
                    cache[row].copy_(stacked[position, real])
                done = start + len(rows)
                if number % BATCHES_PER_NOTE == 0:
                    note_progress()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped with the backbone's states of {done} of {len(ids)} examples in '{place}'. The same command "
                "continues from there."
            ) from None
        finally:
            note_progress()
    os.replace(part, place / STATES)
    progress.unlink()


class CachedActivationsCollator:
    """Wraps a collator and adds the cached states of the rows as `backbone_states`, padded like the batch."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]], cache: ActivationCache):
        self.collator = collator
        self.cache = cache

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [feature[ROW] for feature in features]
        batch = self.collator([{k: v for k, v in feature.items() if k != ROW} for feature in features])
        mask = batch["attention_mask"].bool()
        _, states, width = self.cache.tokens.shape
        padded = torch.zeros(*mask.shape, states, width, dtype=self.cache.tokens.dtype)
        padded[mask] = torch.cat([self.cache[row] for row in rows])
        batch["backbone_states"] = padded.transpose(1, 2)
        return batch
