"""Plain text, for what is printed: tables, and errors in one line."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

# Text is not shortened to less, and while columns can be left out, not to less than a little.
NARROWEST, LITTLE = 8, 24


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
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    columns: int | None,
    optional: Sequence[str] = (),
) -> str:
    """:func:`text_table` within so many columns; None stands for as many as it needs.

    Text is shortened in its middle, the longest first, a little; then the columns ``optional`` are
    left out, in their order; then it is shortened more. Where that does not do, each row becomes
    lines, one for each cell.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if columns is None or not cells:
        return text_table(header, cells)
    shown = list(header)
    for left_out, least in [
        ("", LITTLE),
        *((title, LITTLE) for title in optional),
        ("", NARROWEST),
    ]:
        shown = [title for title in shown if title != left_out]
        places = [header.index(title) for title in shown]
        chosen = [[row[place] for place in places] for row in cells]
        if (widths := _fitted_widths(shown, chosen, columns, least)) is not None:
            lines = (
                [shortened(cell, width) for cell, width in zip(line, widths, strict=True)]
                for line in (shown, *chosen)
            )
            return text_table(next(lines), lines)
    return _records(header, cells, columns)


def _fitted_widths(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int, least: int
) -> list[int] | None:
    """Of each column, text narrowed to ``least`` until all fit; None if that does not do."""
    parts = list(zip(header, *rows, strict=True))
    widths = [max(map(len, part)) for part in parts]
    text = [i for i, part in enumerate(parts) if not all(map(_is_number, part[1:]))]
    while sum(widths) + 2 * (len(widths) - 1) > columns:
        widest = max(text, key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] <= least:
            return None
        widths[widest] -= 1
    return widths


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
