"""From cells to a table of claims: figures, verdicts, `claims.json` and `README.md`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from evolq_lite.data import DATA
from evolq_lite.experiments import KNOWN
from evolq_lite.experiments.cells import (
    Cell,
    Claim,
    Result,
    computed,
    computed_elsewhere,
    path_of,
    read,
    write,
)
from evolq_lite.figures import Picture, save_figure
from evolq_lite.parallel import Pool
from evolq_lite.record import write_whole

Progress = Callable[[str], None]


def missing(claims: Sequence[Claim], folder: Path, quick: bool = False) -> list[tuple[Claim, Cell]]:
    """The cells of some claims that have no result yet, or a damaged one."""
    return [
        (claim, cell)
        for claim in claims
        for cell in claim.cells(quick)
        if read(path_of(folder, claim.name, cell), claim.name, cell) is None
    ]


def reproduce(
    tasks: Sequence[tuple[Claim, Cell]],
    folder: Path,
    progress: Progress = lambda cell: None,
    pool: Pool | None = None,
) -> None:
    """Compute cells into `folder`, on a pool's workers if there is one.

    `progress` hears of every cell when its result is there.
    """
    contents = (
        (computed(*task) for task in tasks)
        if pool is None
        else (content for _, content in pool.each(computed_elsewhere, tasks))
    )
    for content in contents:
        write(folder, content)
        progress(describe(content["claim"], content["cell"]))


def describe(name: str, cell: Cell) -> str:
    """A cell in a few words, for a progress bar."""
    return " ".join([name, *(str(value) for value in list(cell.values())[:4])])


def count(claims: Sequence[Claim], quick: bool = False) -> int:
    """How many cells some claims have."""
    return sum(len(claim.cells(quick)) for claim in claims)


def known(claim: Claim, folder: Path, quick: bool) -> list[Result]:
    """The results of a claim that are there."""
    found = (read(path_of(folder, claim.name, c), claim.name, c) for c in claim.cells(quick))
    return [result for result in found if result is not None]


def shipped(name: str) -> tuple[Picture, str]:
    """A claim's figure, and its verdict with the sentence, from the results in `data/results`.

    ValueError if they are not all there; it says how to compute them.
    """
    claim = KNOWN[name]
    results = known(claim, DATA / "results", False)
    if len(results) < len(claim.cells(False)):
        raise ValueError(
            f"{name} is not measured yet ({len(results)} of {len(claim.cells(False))} cells); "
            f"compute it with: python -m evolq_lite reproduce {name}"
        )
    word, sentence = claim.verdict(results)
    return claim.figure(results), f"{name}. {claim.question} {word.capitalize()}. {sentence}"


def write_report(folder: Path, quick: bool = False) -> list[dict[str, object]]:
    """Figures and verdicts of every claim that has all its results, from the JSON files alone."""
    rows: list[dict[str, object]] = []
    for name, claim in KNOWN.items():
        results = known(claim, folder, quick)
        cells = len(claim.cells(quick))
        if not cells or len(results) < cells:
            continue
        picture = claim.figure(results)
        save_figure(picture, folder / f"{name}.png")
        word, sentence = claim.verdict(results)
        rows.append(
            {
                "claim": name,
                "question": claim.question,
                "verdict": word,
                "sentence": sentence,
                "figure": f"{name}.png",
                "alt": str(picture.get_label()),
                "command": f"python -m evolq_lite reproduce {name}{' --quick' if quick else ''}",
                "cells": cells,
                "seconds": round(sum(r["seconds"] for r in results)),
            }
        )
    write_whole(folder / "claims.json", (json.dumps(rows, indent=1) + "\n").encode())
    write_whole(folder / "README.md", page(rows).encode())
    return rows


def page(rows: Sequence[dict[str, object]]) -> str:
    """The table of claims as Markdown."""
    lines = [
        "# The claims of the paper, measured here",
        "",
        "Made by `python -m evolq_lite reproduce` from the JSON files beside it; do not edit.",
        "",
        "| claim | verdict | command | seconds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['claim']} {row['question']} | **{row['verdict']}** | `{row['command']}` "
            f"| {row['seconds']:,} |"
        )
    for row in rows:
        title = f"## {row['claim']} {row['question']}"
        picture = f"![{row['alt']}]({row['figure']})"
        lines += ["", title, "", f"**{row['verdict']}.** {row['sentence']}", "", picture]
    return "\n".join(lines) + "\n"
