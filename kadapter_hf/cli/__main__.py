"""`python -m kadapter_cli` is the command `kadapter`."""

from . import app


app(prog_name="kadapter")
