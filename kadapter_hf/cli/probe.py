"""`kadapter probe`: compares what a K-Adapter and its backbone know, with the LAMA probe."""

from typing import TYPE_CHECKING, Any

import typer

from ._arguments import AsJson
from ._flags import check_flags
from ._names import one_line
from ._output import conclude, print_json, print_table, running, say


if TYPE_CHECKING:
    from rich.table import Table

NAMES = {"backbone": "backbone", "kadapter": "K-Adapter"}
METRICS = {"p_at_1": "P@1", "p_at_10": "P@10", "mrr": "MRR"}
GROUPS = {"in_corpus": "in the corpus", "not_in_corpus": "not in the corpus"}


def probe(context: typer.Context, as_json: AsJson = False) -> None:
    """
    Compare what a K-Adapter and its backbone know, with the LAMA probe.

    `kadapter probe --help` lists the flags.

    Example: `kadapter probe --model factual-adapter --data LAMA --output_dir probe`
    """
    check_flags("probe", "", context.args)
    from kadapter_hf.probing import parser, probe as run

    (arguments,) = parser(context.command_path).parse(context.args)
    with running():
        results = run(arguments)
        if as_json:
            print_json(results)
        else:
            show(results)


def show(results: dict[str, Any]) -> None:
    """Prints the metrics of each relation and of each part, and what was left out."""
    from rich.text import Text

    from kadapter_hf.messages import shortened

    names = [name for name in NAMES if name in results["relations"][0]]
    for part, means in results["parts"].items():
        rows = [row for row in results["relations"] if row["part"] == part]
        table = new_table(part, "relation", names)
        for row in rows:
            table.add_row(Text(shortened(one_line(row["relation"]), 20)), *numbers(row, names))
        if len(rows) > 1:
            table.add_section()
            table.add_row(f"mean of {means['relations']}", *numbers(means, names))
        print_table(table)
    for group, parts in (results["corpus"] or {}).items():
        table = new_table(f"facts {GROUPS[group]}", "mean of relations", names)
        for part, means in parts.items():
            table.add_row(Text(f"{one_line(part)}, {means['relations']}"), *numbers(means, names))
        if parts:
            print_table(table)
        else:
            say(f"No fact is {GROUPS[group]}.")
    *lines, last = map(one_line, notes(results))
    for line in lines:
        say(line)
    conclude(last)


def new_table(title: str, first: str, names: list[str]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    # Two lines, so that the table fits into 80 columns.
    words = {"backbone": "back-\nbone", "kadapter": "K-Ad-\napter"}
    table = Table(first, "facts", title=Text(one_line(title)), title_justify="left")
    table.columns[1].justify = "right"
    for metric in METRICS.values():
        for name in names:
            table.add_column(f"{metric}\n{words[name]}", justify="right")
    return table


def numbers(row: dict[str, Any], names: list[str]) -> list[str]:
    """The cells of a row: the number of facts, then the metrics in percent."""
    return [f"{row['facts']:,}", *(f"{100 * row[name][metric]:.1f}" for metric in METRICS for name in names)]


def notes(results: dict[str, Any]) -> list[str]:
    """The sentences below the tables."""
    lines = ["All numbers but those of facts are percentages; means are over relations."]
    if results["vocabulary"] is None:
        lines.append("Each object was ranked among the objects of its relation.")
    else:
        unused = results["vocabulary_lines_unused"]
        rest = f"; {unused:,} lines of the vocabulary are not one token of the model, or repeated" if unused else ""
        lines.append(f"Each object was ranked among {results['vocabulary']:,} words{rest}.")
    for name, done in (results["training"] or {}).items():
        lines.append(
            f"Trained for the {NAMES[name]}: {done['parameters']:,} parameters, {done['steps']:,} steps on {done['texts']:,} "
            f"texts; mean loss {done['loss']:.3f}."
        )
    left_out = results["left_out"]
    if left_out:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in left_out.items())
        lines.append(f"{results['facts']:,} facts were scored, {sum(left_out.values()):,} left out: {reasons}.")
    if results["relations_left_out"]:
        lines.append(f"No fact is left of: {'; '.join(results['relations_left_out'])}.")
    if results["settings"]["output_dir"]:
        lines.append(f"Written to {results['settings']['output_dir']}.")
    return lines
