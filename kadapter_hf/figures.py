"""Figures, which need matplotlib. Without it they are left out, as no result depends on them."""

from importlib.util import find_spec
from typing import Any

from transformers.utils import logging

from .messages import needs


logger = logging.get_logger(__name__)


def warn_without_matplotlib(name: str) -> None:
    """Warns if the figure of this name will be missing. Call it before the work that the figure shows."""
    if find_spec("matplotlib") is None:
        logger.warning(f"{name} is left out, as {needs('a figure', 'matplotlib', 'knowledge')}")


def new_figure(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure`; None if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
