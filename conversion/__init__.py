"""Conversion of checkpoints of the original release, microsoft/K-Adapter, to K-Adapter repositories."""

from .reading import read_checkpoint
from .writing import Conversion, convert, verify


__all__ = ["Conversion", "convert", "read_checkpoint", "verify"]
