"""Results as files: `C5.jsonl` holds one line per cell of claim C5, and one line per machine.

    {"environment":0,"machine":{"python":"3.11.7", ...},"crc32":"..."}
    {"claim":"C5","cell":{...},"result":{...},"seconds":47.7,"environment":0,"version":1,"crc32":""}

A cell is a set of parameters, a result is what was measured for them, and `environment` says which
of the machines named above computed it. The checksum is that of everything before it in its line:
a line that was cut or changed is noticed and omitted, and its cell is computed again. Lines are
appended by one process only; workers hand their results to it.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evolq_lite.files import seal, unseal, write_whole

VERSION = 1  # of what a cell means; results of another version are kept, but not used
RESULT = {
    "claim": str,
    "cell": dict,
    "result": dict,
    "seconds": float,
    "environment": int,
    "version": int,
}
MACHINE = {"environment": int, "machine": dict}
DAMAGED = ".jsonl.damaged"
SHOWN = 3  # damaged lines that are named

Cell = dict[str, Any]
Result = dict[str, Any]
log = logging.getLogger("evolq_lite")


def read_line(line: bytes) -> dict[str, Any]:
    """What a line says, a result or a machine; ValueError if it is not as it was written."""
    content = unseal(line)
    kinds = {key: type(value) for key, value in content.items()}
    if kinds not in (RESULT, MACHINE):
        raise ValueError("it is neither a result nor a machine")
    return content


class ResultFile:
    """The results of one claim in a folder. Who repairs or appends must hold the folder's lock."""

    def __init__(self, folder: Path, claim: str) -> None:
        self.path, self.claim = folder / f"{claim}.jsonl", claim

    def find(self, cells: Sequence[Cell]) -> list[dict[str, Any] | None]:
        """The line of each cell, None where its result is not there."""
        whole, damaged = self.read_lines()
        if damaged:
            numbers = [number for number, _, _ in damaged]
            more = len(numbers) - SHOWN
            log.warning(
                "line %s of %s is damaged (%s); it is omitted until its cell is computed again",
                ", ".join(map(str, numbers[:SHOWN])) + f" and {more} more" * (more > 0),
                self.path,
                damaged[0][2],
            )
        lines = [content for _, content in whole if "cell" in content]
        if others := [line for line in lines if line["version"] != VERSION]:
            log.warning(
                "%s holds %d results of version %d, and this is version %d: they stay in the file, "
                "and are not used; their cells are to be computed again",
                self.path,
                len(others),
                others[0]["version"],
                VERSION,
            )
        known = {
            as_text(line["cell"]): line
            for line in lines
            if (line["version"], line["claim"]) == (VERSION, self.claim)
        }
        return [known.get(as_text(cell)) for cell in cells]

    def read(self, cells: Sequence[Cell]) -> pd.DataFrame:
        """One row for each of these cells whose result is there, in the order of the cells.

        Columns are the cell's parameters, what was measured, and `seconds`. The number of test
        images is called `test_images`, because `images` is the number of calibration images.
        """
        return pd.DataFrame([row_of(line) for line in self.find(cells) if line is not None])

    def repair(self) -> None:
        """Let all lines be JSON, and the next one begin a new line.

        Damaged lines go to a file beside this one: they may be somebody's work.
        """
        whole, damaged = self.read_lines()
        if damaged:
            beside = self.path.with_suffix(DAMAGED)
            with open(beside, "ab") as file:
                file.write(b"".join(line + b"\n" for _, line, _ in damaged))
                file.flush()
                os.fsync(file.fileno())
            log.warning("what is damaged in %s is now in %s", self.path, beside)
        content = b"".join(line for line, _ in whole)
        if self.path.is_file() and self.path.read_bytes() != content:
            write_whole(self.path, content)

    def append(self, content: dict[str, Any]) -> None:
        """Add a result, and its machine if that is new; they are on the disk afterwards.

        `content` is what `cells.compute` returns, its `environment` a description of the machine.
        """
        machine, new = content["environment"], b""
        numbers: dict[str, int] = {}  # of machines, by what is known of them
        last = -1
        for _, line in self.whole_lines():
            last = max(last, line["environment"])
            if "machine" in line:
                numbers[as_text(line["machine"])] = line["environment"]
        number = numbers.get(as_text(machine))
        if number is None:
            number = last + 1
            new = seal({"environment": number, "machine": machine})
        new += seal({**content, "environment": number})
        with open(self.path, "ab") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())

    def whole_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Each line that is as it was written, with what it says."""
        return self.read_lines()[0]

    def read_lines(
        self,
    ) -> tuple[list[tuple[bytes, dict[str, Any]]], list[tuple[int, bytes, str]]]:
        """The whole lines with what they say; the damaged ones: number, bytes, what is wrong.

        Lines may end as Windows or git make them end, and the last one not at all.
        """
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole, damaged = [], []
        for number, line in enumerate(data.splitlines(), 1):
            try:
                whole.append((line + b"\n", read_line(line + b"\n")))
            except ValueError as error:
                damaged.append((number, line, str(error)))
        return whole, damaged


def as_text(content: dict[str, Any]) -> str:
    """A text that two equal objects share, whatever the order of their keys."""
    return json.dumps(content, sort_keys=True)


def row_of(line: dict[str, Any]) -> dict[str, Any]:
    """A result as a row of a table."""
    measured = {
        "test_images" if key == "images" else key: value for key, value in line["result"].items()
    }
    return {**line["cell"], **measured, "seconds": line["seconds"]}


def where(results: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The results whose columns have these values."""
    for key, value in values.items():
        results = results[results[key] == value]
    return results


def by(results: pd.DataFrame, *keys: str) -> dict[Any, pd.DataFrame]:
    """Results in groups that agree in `keys`, the rows of each group in the order of seeds.

    Groups are named by the value of one key, or by a tuple of several, in the order of the cells.
    """
    ordered = results.sort_values("seed", kind="stable")
    groups = ordered.groupby(keys[0] if len(keys) == 1 else list(keys), sort=False)
    return dict(iter(groups))
