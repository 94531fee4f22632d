"""Plain text, for what is printed: tables, and errors in one line."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

# Text is not shortened to less.
NARROWEST = 8


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right, text to the left."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(header, *cells, strict=True)) if cells else [(title,) for title in header]
    widths = [max(map(len, column)) for column in columns]
    rightward = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, rightward, strict=True)
        ).rstrip()
        for line in lines
    )


def fitted_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], columns: int | None
) -> str:
    """:func:`text_table` within so many columns; None stands for as many as it needs.

    Text is shortened in its middle, the longest first. Where that does not do, each row becomes
    lines of their own, one for each cell.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if columns is None or not cells:
        return text_table(header, cells)
    parts = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in parts]
    text = [i for i, part in enumerate(parts) if not all(map(_is_number, part[1:]))]
    while sum(widths) + 2 * (len(widths) - 1) > columns:
        widest = max(text, key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] <= NARROWEST:
            return _records(header, cells, columns)
        widths[widest] -= 1
    titles = [shortened(title, width) for title, width in zip(header, widths, strict=True)]
    return text_table(
        titles,
        [[shortened(c, width) for c, width in zip(row, widths, strict=True)] for row in cells],
    )


def terminal_columns() -> int | None:
    """Of the terminal that standard output is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(text: str, columns: int | None) -> str:
    """The text in lines of so many columns."""
    return text if columns is None else textwrap.fill(text, columns)


def shortened(text: str, width: int) -> str:
    """The text with its middle left out where it is longer than ``width``."""
    if len(text) <= width:
        return text
    if width < NARROWEST:
        return text[:width]
    head = (width - 2) // 2
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def _records(header: Sequence[str], rows: Iterable[Sequence[str]], columns: int) -> str:
    width = max(map(len, header))
    return "\n\n".join(
        "\n".join(
            f"{title.ljust(width)}  {shortened(cell, columns - width - 2)}"[:columns]
            for title, cell in zip(header, row, strict=True)
            if cell
        )
        for row in rows
    )


def first_line(error: BaseException) -> str:
    """Of the error's message; the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").rstrip("x%").replace("e-", "").replace(".", "").isdigit()
