"""
The states that the frozen parts of a model compute for a data set: computed once, and read in every epoch and run.

Without a graph and without dropout, the states of an example depend on its features and the frozen weights only. In a folder,
they are kept under a hash of these, so a different backbone, adapter, tokenizer or text never uses outdated states.
"""

import functools
import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from huggingface_hub.utils import WeakFileLock
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset as TorchDataset

from .modeling.format_kadapter import fingerprint
from .modeling.modeling_kadapter import KAdapterPreTrainedModel
from .progress import progress
from .stored_states import Block, States, by_row, is_complete, places_of, read_states, write_states


Collator = Callable[[list[dict[str, Any]]], Any]
# The kinds of states, as `forward` takes them.
KINDS = ("backbone_states", "fusion_states")


class CachedStates(TorchDataset):
    """
    A data set with the states that the frozen parts of a model compute for its rows; `CachedStatesCollator` makes batches.

    A row has the columns that the model takes, and tensors of shape `(positions, states, width)`: `fusion_states`, and if
    adapters train, `backbone_states`.
    """

    def __init__(self, rows: Dataset, states: Mapping[str, States]):
        self.rows, self.states = rows, dict(states)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        return [self._with_states(*of_row) for of_row in zip(rows, self.rows.__getitems__(rows), strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows in order, which is faster than by number; `group_by_length` reads their lengths this way."""
        return itertools.starmap(self._with_states, enumerate(self.rows))

    def _with_states(self, row: int, features: dict[str, Any]) -> dict[str, Any]:
        return features | {kind: states[row] for kind, states in self.states.items()}


class CachedStatesCollator:
    """Wraps a collator, and adds the states of rows of `CachedStates`, padded like the batch. Other rows stay as they are."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = self.collator([{name: f[name] for name in f if name not in KINDS} for f in features])
        for kind in KINDS:
            if kind in features[0]:
                batch[kind] = _padded([row[kind] for row in features], _rows_of(batch))
        return batch


def _rows_of(batch: Mapping[str, Any]) -> torch.Tensor:
    """Which tokens are real, `(rows, length)`; a choice counts as a row."""
    return batch["attention_mask"].flatten(0, -2).bool()


def _padded(states: list[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """
    Pads states to `(rows, states, positions, width)`. If a row has a state for every token, these are where `real`, of shape
    `(rows, length)`, is true; otherwise they come first.
    """
    counts = [len(of_row) for of_row in states]
    at_all_tokens = counts == real.view(len(states), -1).sum(1).tolist()
    if at_all_tokens and not (counts == real.sum(1).tolist() and max(counts) == real.shape[1] and real[:, 0].all()):
        padded = states[0].new_zeros(*real.shape, *states[0].shape[1:])
        padded[real] = torch.cat(states)
    else:  # also for rows that are padded on the right, where both are the same
        padded = pad_sequence(states, batch_first=True).view(len(real), -1, *states[0].shape[1:])
    return padded.transpose(1, 2)


def cached_states(
    model: KAdapterPreTrainedModel,
    dataset: Dataset,
    collator: Collator,
    folder: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 32,
) -> CachedStates:
    """
    The rows of `dataset` with the states that the frozen parts of `model` compute for them, so that these run only once:

        collator = CachedStatesCollator(DataCollatorWithPadding(tokenizer))
        train = cached_states(model, features, collator)
        arguments = TrainingArguments("out", remove_unused_columns=False)
        Trainer(model, arguments, train_dataset=train, data_collator=collator).train()

    If the active adapters are frozen, the states are the inputs of the fusion at the positions that the head reads, and a
    step runs the fusion and the head only. If adapters train, they are the hidden states that the adapters read, and the
    backbone's last hidden state at the positions that the head reads. Use them with models of the same class and the same
    frozen weights: only another number of positions is noticed.

    A head must call `self.fusion(state, knowledge)` once per forward pass, as `self.fused` does. The states of padding are
    zero, so the loss of `KAdapterForQuestionAnswering`, which includes padding, differs.

    Args:
        collator: makes batches, with an `attention_mask`, of rows with the columns that the model takes.
        folder: where to keep the states for other runs with the same frozen weights and rows. If the computation is
            interrupted, the next call continues it. By default, they are kept in memory.
        dtype: the dtype of the states; by default the one that they are computed in, so that training is the same as without
            a cache.
        batch_size: batch size for the computation.

    Raises:
        ValueError: the states depend on more than the row: the backbone trains, an adapter attends to padding, or the collator
            is random; or there are no rows, or `folder` is a file.
        OSError: not enough disk space; the message says how much is needed.
        MemoryError: without a folder, the states would take more than half of the free memory.
    """
    if _trains(model.backbone):
        raise ValueError("the states of a backbone that trains can't be cached: call freeze_backbone() first.")
    active: list[str] = model.config.active_knowledge_adapters  # type: ignore[assignment]
    configs: list[Any] = [model.adapters[name].config for name in active]
    if any(config.attend_to_padding for config in configs):
        raise ValueError("the states can't be cached for an adapter with attend_to_padding=True, which reads padding.")
    if list(active) != model.active_knowledge_adapters:
        raise ValueError(
            "the states can't be cached within using_knowledge_adapters: call set_active_knowledge_adapters."
        )
    if not len(dataset):
        raise ValueError("there are no rows to compute states for.")
    if folder is not None and Path(folder).is_file():
        raise ValueError(f"the states are kept in a folder, and '{folder}' is a file.")
    taken = inspect.signature(model.forward).parameters
    rows = dataset.select_columns([name for name in dataset.column_names if name in taken])
    few = list(range(min(len(rows), 8)))
    first, second = (collator(rows.__getitems__(few)) for _ in range(2))
    if any(not torch.equal(first[name], second[name]) for name in first):
        raise ValueError(
            "the states can't be cached with a collator that makes another batch of the same rows each time, e.g. masks tokens "
            "at random."
        )
    layers = model.backbone_states_read() if any(_trains(model.adapters[name]) for name in active) else None
    computed = Computation(model, rows, collator, layers, dtype, batch_size)
    if folder is None:
        return CachedStates(rows, _in_memory(computed))
    frozen: list[Any] = [
        type(model).__qualname__,
        model.backbone_fingerprint(),
        str(model.backbone.dtype),
        str(dtype),
        layers,
    ]
    if layers is None:
        for name, config in zip(active, configs, strict=True):
            ignored = ("provenance", "backbone_name_or_path", "backbone_fingerprint")
            settings = {key: value for key, value in config.to_dict().items() if key not in ignored}
            frozen += [settings, fingerprint(model.adapters[name].state_dict().values())]
    place = Path(folder) / _hash(frozen, rows)[:32]
    if not is_complete(place, len(rows)):
        place.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(place / "lock"):  # another run may be computing the same states
            if not is_complete(place, len(rows)):
                write_states(computed, place)
    return CachedStates(rows, read_states(place, computed.order))


def _trains(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _hash(frozen: list[Any], rows: Dataset) -> str:
    key = hashlib.sha256(json.dumps(frozen, sort_keys=True, default=str).encode())
    for table in rows.with_format("arrow").iter(10_000):
        for name in sorted(table.column_names):
            array = table[name].combine_chunks()
            while _is_list(array.type):
                key.update(_counts(array).tobytes())
                array = array.flatten()
            key.update(f"{name} {array.type}".encode())
            values = array.to_numpy(zero_copy_only=False)
            key.update(str(values.tolist()).encode() if values.dtype == object else values.tobytes())
    return key.hexdigest()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _counts(array: pa.Array) -> np.ndarray:
    return pc.list_value_length(array).to_numpy(zero_copy_only=False).astype(np.int64)


def _lengths(rows: Dataset) -> np.ndarray:
    """The number of tokens of each row, over all of its choices."""
    found = []
    for table in rows.select_columns("input_ids").with_format("arrow").iter(10_000):
        array = table["input_ids"].combine_chunks()
        counts = _counts(array)
        if _is_list(array.type.value_type):
            ends = np.cumsum(_counts(array.flatten()))
            counts = np.diff(ends[np.cumsum(counts) - 1], prepend=0)
        found.append(counts)
    return np.concatenate(found)


# ---- Computing ------------------------------------------------------------------------------------------------------


class _Recorded(Exception):
    """Ends a forward pass when its states are known, before the head runs."""


@dataclass
class Computation:
    """
    Computes the states of all rows, in batches of similar length, the longest first. `layers` are the hidden states that
    adapters read, or None if the adapters are frozen.
    """

    model: KAdapterPreTrainedModel
    rows: Dataset
    collator: Collator
    layers: list[int] | None
    dtype: torch.dtype | None
    batch_size: int

    def __post_init__(self):
        self.lengths = _lengths(self.rows)
        self.order = np.argsort(-self.lengths, kind="stable")

    def batches(self, done: int = 0) -> Iterator[dict[str, Block]]:
        """Yields the states by kind for each batch, without the first `done` rows in `order`."""
        starts = range(done, len(self.rows), self.batch_size)
        with self._recording() as found:
            for start in progress(starts, "Frozen states"):
                features = self.rows.__getitems__(self.order[start : start + self.batch_size].tolist())
                batch = self.collator(features)
                real = _rows_of(batch)
                batch = {name: value.to(self.model.backbone.device) for name, value in batch.items()}
                more = {} if self.layers is None else {"output_hidden_states": self.layers}
                try:
                    with torch.no_grad():
                        self.model(**batch, **more)
                except _Recorded:
                    pass
                yield {kind: self._block(found.pop(kind), real, len(features)) for kind in KINDS if kind in found}

    @contextmanager
    def _recording(self) -> Iterator[dict[str, list[torch.Tensor]]]:
        """The states of each forward pass by kind, `(rows, length, width)`, or `(rows, width)` at one position."""
        model, layers, found = self.model, self.layers, dict[str, list[torch.Tensor]]()

        def after_backbone(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if layers is not None:
                found["backbone_states"] = [output.hidden_states[layer] for layer in layers]

        def before_fusion(module: torch.nn.Module, inputs: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
            found["fusion_states"] = [inputs[0], *inputs[1].values()]
            raise _Recorded

        hooks = [
            model.backbone.register_forward_hook(after_backbone),
            model.fusion.register_forward_pre_hook(before_fusion),
        ]
        was_training, active = model.training, model.config.active_knowledge_adapters
        model.eval()
        if layers is not None:
            model.config.active_knowledge_adapters = []  # as they need not run
        try:
            yield found
        finally:
            model.config.active_knowledge_adapters = active
            for hook in hooks:
                hook.remove()
            model.train(was_training)

    def _block(self, states: list[torch.Tensor], real: torch.Tensor, rows: int) -> Block:
        dtype = self.dtype or functools.reduce(torch.promote_types, [state.dtype for state in states])
        stacked = torch.stack([state.to(dtype) for state in states], dim=-2)  # (rows, [positions,] states, width)
        if stacked.dim() == 4 and stacked.shape[1] == real.shape[1]:  # at all tokens
            return real.view(rows, -1).sum(1).numpy(), stacked[real.to(stacked.device)].cpu()
        block = stacked.reshape(-1, *stacked.shape[-2:]).cpu()
        return np.full(rows, len(block) // rows), block

    def size(self, batch: Mapping[str, Block], done: int) -> int:
        """The bytes of all states except for those of the first `done` rows, estimated from the batch computed next."""
        total = 0
        lengths = self.lengths[self.order[done:]]
        for counts, block in batch.values():
            at_all_tokens = np.array_equal(counts, lengths[: len(counts)])
            positions = lengths.sum() if at_all_tokens else counts.mean() * len(lengths)
            total += int(positions) * block[0].nbytes
        return total


def _in_memory(computed: Computation) -> dict[str, States]:
    blocks: dict[str, list[torch.Tensor]] = {}
    places: dict[str, list[np.ndarray]] = {}
    for number, batch in enumerate(computed.batches()):
        if number == 0:
            size, free = computed.size(batch, 0), psutil.virtual_memory().available
            if size > free / 2:
                raise MemoryError(
                    f"the states of the frozen parts need {size / 1e9:.2f} GB, more than half of the {free / 1e9:.2f} GB "
                    "of free memory: keep them in a folder."
                )
        for kind, (counts, block) in batch.items():
            blocks.setdefault(kind, []).append(block)
            places.setdefault(kind, []).append(places_of(counts, number))
    return {kind: States(blocks[kind], by_row(np.concatenate(places[kind]), computed.order)) for kind in blocks}
