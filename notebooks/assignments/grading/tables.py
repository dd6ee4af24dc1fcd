"""CSV files that survive a spreadsheet on their way out and back.

A spreadsheet turns 0012 into 12, 1e5 into 100000, and runs what starts with = + - @. So ids and
digests are written with a prefix that makes them text, and no cell starts with one of those signs.
On the way back a table may have semicolons, decimal commas, a byte order mark, or be UTF-16.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grading.assignment import Refused

ID, DIGEST = "id:", "sha:"  # prefixes: text to every spreadsheet
FORMULA = ("=", "+", "-", "@", "\t", "\r")
ROUNDED = re.compile(r"[0-9]([.,][0-9]+)?E\+[0-9]+", re.IGNORECASE)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    os.replace(part, path)


def cell(value: Any) -> str:
    """A value as a cell that no spreadsheet takes for a formula."""
    text = str(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def plain(text: str, prefix: str = "") -> str:
    """What was written, from the cell that came back."""
    text = text.strip()
    if text.startswith("'") and text[1:].startswith(FORMULA):
        text = text[1:]
    return text.removeprefix(prefix)


def table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """Rows as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, whatever a spreadsheet has made of its separators and encoding.

    Refused if it cannot be read as a table.
    """
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise Refused(f"{path} is not UTF-8; save it as CSV in UTF-8 and grade again") from None
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):  # an instruction to spreadsheets, no row
        text, first = rest, rest.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise Refused(f"{path}, line {reader.line_num}: {error}") from None
    # Of a line with more cells than the header, the rest has the key None.
    return [
        {name.strip(): value or "" for name, value in row.items() if name is not None}
        for row in rows
    ]


def number_of(text: str) -> float:
    """A number, its decimals after a point or a comma; ValueError if it is none."""
    return float(text.strip().replace(",", "."))


def points_text(value: float) -> str:
    """Points without needless digits."""
    return f"{round(value, 2):g}"
