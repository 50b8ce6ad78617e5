"""The metadata is in setup.cfg. Only the README as PyPI shows it is made here: without the picture and the links into docs/."""

import re
from pathlib import Path

from setuptools import setup


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"^!\[.*\n+", "", readme, flags=re.MULTILINE)
setup(long_description=re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", readme))
