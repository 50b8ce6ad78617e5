"""Which knowledge adapters run: the active ones, or others within a `with` statement, for a call or for a row."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .configuration_kadapter import KAdapterConfig
from .format_kadapter import KAdapterConfigError


# The adapters that `using_knowledge_adapters` has chosen in this thread or asyncio task, by the id of the model.
_CHOSEN: ContextVar[Mapping[int, list[str]]] = ContextVar("chosen knowledge adapters", default={})  # noqa: B039
_COUNTING = threading.Lock()


class ChoosingMixin(nn.Module):
    """The methods of `KAdapterPreTrainedModel` that say which adapters run."""

    config: KAdapterConfig
    adapters: nn.ModuleDict
    # The number of open `using_knowledge_adapters` in all threads. At 0, `_CHOSEN` is not read, as torch.compile can't.
    _choices = 0

    @property
    def active_knowledge_adapters(self) -> list[str]:
        """The names of the adapters in use, in the order of their fusion."""
        return self._checked_names(self._chosen()) if self._choices else list(self.config.active_knowledge_adapters)

    def set_active_knowledge_adapters(self, names: str | Iterable[str] | None) -> None:
        """
        Activates exactly these adapters. Without any, the model's output is the backbone's. To activate others for a while,
        or in one of several threads, use `using_knowledge_adapters`; within it, this takes effect afterwards.

        Raises:
            KAdapterConfigError: there is no adapter of this name.
        """
        names = self._checked_names(names or [])
        thaw = not self._is_frozen_from_outside()
        self.config.active_knowledge_adapters = names
        self._update_trainable(thaw)

    @contextmanager
    def using_knowledge_adapters(self, names: str | Iterable[str]) -> Iterator[None]:
        """
        Uses exactly these adapters within a `with` statement. Other threads and asyncio tasks keep theirs, and what is saved
        and what trains does not change.

            with model.using_knowledge_adapters("factual"):
                output = model(**inputs)

        Raises:
            KAdapterConfigError: there is no adapter of this name.
        """
        token = _CHOSEN.set({**_CHOSEN.get(), id(self): self._checked_names(names)})
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            _CHOSEN.reset(token)

    def without_knowledge_adapters(self):
        """Uses no adapter within a `with` statement, as `using_knowledge_adapters([])`: the output is the backbone's."""
        return self.using_knowledge_adapters([])

    def _names_by_row(self, given: Any) -> tuple[list[str], dict[tuple[str, ...], list[int]] | None]:
        """
        The adapters that run in a call with `knowledge_adapters=given`; and if `given` is a list of names for each row, the
        rows by their names.
        """
        if given is None:
            return self.active_knowledge_adapters, None
        if isinstance(given, str) or (isinstance(given, Sequence) and all(isinstance(name, str) for name in given)):
            return self._checked_names(given), None
        if not isinstance(given, Sequence):
            raise KAdapterConfigError(
                f"knowledge_adapters must be a list of names for all rows, or a list of such lists, not {given!r}."
            )
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, names in enumerate(given):
            if not isinstance(names, (list, tuple)):
                raise KAdapterConfigError(f"row {row} of knowledge_adapters must be a list of names, not {names!r}.")
            try:
                groups.setdefault(tuple(self._checked_names(names)), []).append(row)
            except KAdapterConfigError as error:
                raise KAdapterConfigError(f"row {row} of knowledge_adapters: {error}") from None
        return list(dict.fromkeys(name for names in groups for name in names)), groups

    def _count(self, change: int) -> None:
        with _COUNTING:
            self._choices += change

    @torch.compiler.disable
    def _chosen(self) -> list[str]:
        if hasattr(self, "_former_parameters"):
            raise RuntimeError(
                "using_knowledge_adapters doesn't reach the threads of torch.nn.DataParallel. Pass knowledge_adapters=[…] to "
                "the model's call instead, or activate the adapters."
            )
        return _CHOSEN.get().get(id(self), self.config.active_knowledge_adapters)

    def _checked_names(self, names: str | Iterable[str]) -> list[str]:
        listed = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
        if not all(isinstance(name, str) for name in listed):
            raise KAdapterConfigError(f"knowledge adapters are chosen by a name or a list of names, not {names!r}.")
        names = list(dict.fromkeys(listed))
        for name in names:
            if name not in self.adapters:
                raise KAdapterConfigError(f"there is no knowledge adapter '{name}'; there are {list(self.adapters)}.")
        return names
