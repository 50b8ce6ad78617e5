"""Which knowledge adapters run: the active ones, or others for a while."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

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
    # The number of open `using_knowledge_adapters` of all threads. Without any, `_CHOSEN` is not read: torch.compile can't.
    _choices = 0

    @property
    def active_knowledge_adapters(self) -> list[str]:
        """The names of the adapters in use, in the order of their fusion."""
        return self._checked_names(self._chosen()) if self._choices else list(self.config.active_knowledge_adapters)

    def set_active_knowledge_adapters(self, names: str | Iterable[str] | None) -> None:
        """
        Activates exactly these adapters. Without any, the model's output is the backbone's. To activate others for a while,
        or in one of several threads, use `using_knowledge_adapters`.
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
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in names:
            if name not in self.adapters:
                raise KAdapterConfigError(f"there is no knowledge adapter '{name}'; there are {list(self.adapters)}.")
        return names
