"""How tables look: names and values in, a table out."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

NAME_COLUMNS = 16
"""Width of the names before values."""


def pairs(facts: Sequence[tuple[str, str]]) -> Table:
    """Names and values in two columns; long values go on below themselves."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=NAME_COLUMNS, style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def columns() -> Table:
    """A table with a line below its headings."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
