"""The task heads: which class a repository's head belongs to, and which Auto class loads it."""

from collections.abc import Callable
from typing import Any, TypeVar

import transformers

from .compat_kadapter import SeveralClasses, is_remote_code
from .format_kadapter import is_own_class


# By name: the class, and the Auto class that loads it, if transformers has one for its task.
HEADS: dict[str, tuple[type, str | None]] = {}
# The module that a repository's auto_map names. It imports all others, so that they travel together.
ENTRY_MODULE = "heads_kadapter"
Head = TypeVar("Head", bound=type[Any])


def register_head(auto_class: str | None = None) -> Callable[[Head], Head]:
    """
    Class decorator for task heads (see `HeadModel`).

    Args:
        auto_class: the Auto class that loads the head, e.g. `"AutoModelForSequenceClassification"`; None if transformers
            has none for the task. If several heads share one, it loads the class that was saved, or the first registered.
    """

    def register(head: Head) -> Head:
        HEADS[head.__name__] = (head, auto_class)
        if auto_class is not None and not is_remote_code(__name__):
            heads = SeveralClasses(head for head, name in HEADS.values() if name == auto_class)
            getattr(transformers, auto_class).register(
                head.config_class, heads if len(heads) > 1 else head, exist_ok=True
            )
        return head

    return register


def auto_map(saved: type) -> dict[str, str]:
    """
    The `auto_map` of a repository that was saved from this class. Heads without an Auto class of their own are listed
    under their own names too.
    """
    classes = {"AutoConfig": "KAdapterConfig", "AutoModel": "KAdapterModel"}
    # The module of a user's own head is not the entry module; it travels by `register_for_auto_class`.
    ours = {name: found for name, found in HEADS.items() if is_own_class(found[0])}
    for name, (_, auto) in ours.items():
        if auto is not None:
            classes.setdefault(auto, name)
    autos = [auto for _, auto in ours.values()]
    for name, (_, auto) in ours.items():
        if auto is None or autos.count(auto) > 1:
            classes[name] = name
        if auto is not None and name == saved.__name__:
            classes[auto] = name
    return {auto: f"{ENTRY_MODULE}.{name}" for auto, name in classes.items()}
