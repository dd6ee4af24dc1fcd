"""From cells to a table of claims: figures, verdicts, `claims.json` and `README.md`."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from evolq_lite.experiments import CLAIMS, KNOWN
from evolq_lite.experiments.cells import Claim, Work, compute, compute_with_one_thread
from evolq_lite.experiments.results import Cell, ResultFile
from evolq_lite.experiments.verdicts import Verdict, tabulate, to_markdown
from evolq_lite.figures import Picture, save_figure
from evolq_lite.files import DATA, parse_json, write_whole
from evolq_lite.runs.folder import NO_LOCKS, Busy, read_object
from evolq_lite.runs.workers import Workers

RESULTS = DATA / "results"
HEADING = "# The paper's claims, measured here"
log = logging.getLogger("evolq_lite")

HOW_TO_READ = """\
Made by `python -m evolq_lite reproduce` from the files beside it; do not edit. A gain is in points
of top-1 unless its unit says otherwise, and *holds* says whether a row speaks for the claim. A
claim *holds here* if every part of it that is tested does, *partly* if at least one does.
Intervals (95 %) and p-values are about other test images, for these seeds and this machine: what
other seeds or another processor would change is not in them.

C1 to C12 are about the two networks embedded in this repository and their 9,920 test images
(Typefaces-62). REAL, and the claims that start with R, test trained ViT-Tiny and DeiT-Tiny on your
photographs; their commands need `--weights` and `--photographs` as well. In the results that come
with the repository these are 1,000 of 430 classes, not from the ImageNet validation set and easier:
compare their accuracies with each other only. Calibration images are drawn from 1,000 ImageNet
images, one of each class. The copy of DeiT-Tiny that was measured has LayerNorm weights rounded to
8-bit fixed point. The paper's own table is in `docs/paper-grid.md`.

What a verdict rests on is said below it (*Cells*): networks, bits, seeds, calibration images,
passes. The results of a long claim are shown stage by stage, as they are finished. Claims with the
same command share their cells, and *seconds* is the sum over these, on whatever computed them."""

INPUTS = "inputs.json"
MOST_VALUES = 8  # of a parameter, in a line
HOW_TO_OPEN = """\
## The files

`C1.jsonl` to `R12.jsonl` hold one line per cell: its parameters (`cell`), what was measured
(`result`), the seconds it took, and the number of the machine (`environment`), which a line of its
own describes. `correct` says which test images were right, as hexadecimal bits, so that any two
cells can be compared image by image (`evolq_lite.evaluate.unpacked`). Each line ends with a
checksum: what was cut or changed is computed again. `inputs.json` has the SHA-256 of the networks
and photographs that the results on real ones are about: results of others need a folder of their
own. `PAPER.jsonl`, where there is one, is the
paper's grid and no claim: `docs/paper-grid.md` shows what it holds.

```python
import pandas as pd

lines = pd.read_json("data/results/C5.jsonl", lines=True)
cells = pd.json_normalize(lines.dropna(subset="cell").to_dict("records"))
table = cells.pivot_table("result.top1", ["cell.network", "cell.weight_bits"], "cell.method")
print(table.round(4).to_string())
```"""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a folder of results and keep others from writing to it; Busy if somebody does.

    ValueError for a folder of version 0.1. A new folder goes again if nothing was written to it.
    """
    if old := [name for name in KNOWN if (folder / name).is_dir()]:
        raise ValueError(
            f"{folder / old[0]} holds results of evolq_lite 0.1, one file per cell, which this "
            "version does not read; move it, or give another --out"
        )
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = FileLock(folder / ".lock", 0)
    try:
        file.acquire()
    except Timeout:
        raise Busy(
            f"another reproduction writes to {folder}; wait for it, or give another --out"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s cannot be locked (%s); let no other reproduction write there", folder, error
        )
    try:
        yield
    finally:
        file.release()
        # nothing was computed
        if new and not {path.name for path in folder.iterdir()} - {".lock", INPUTS}:
            shutil.rmtree(folder)
            for parent in new[1:]:
                with suppress(OSError):
                    parent.rmdir()


def check_kind(folder: Path, quick: bool) -> None:
    """ValueError for a folder with a report of whole claims, if that would become a quick one."""
    path = folder / "claims.json"
    try:
        told = parse_json(path.read_bytes()) if path.is_file() else []
        whole = [row["claim"] for row in told if "--quick" not in row["command"]]
    except (ValueError, KeyError, TypeError):
        return  # it is no report
    if quick and whole:
        raise ValueError(
            f"{folder} holds a report of whole claims, which a quick one would replace; omit "
            "--quick, or give another --out"
        )


def keep_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Write down what the results of a locked folder are about: digests of files, by what they are.

    ValueError if the folder holds results of other files.
    """
    path = folder / INPUTS
    advice = "give another --out, or delete it if the results beside it are about the same files"
    known = read_object(path, advice) if path.exists() else {}
    if known and not inputs.keys() & known.keys():
        raise ValueError(
            f"{path} is not one that this command has written; move it, or give another --out"
        )
    if others := [name for name, digest in inputs.items() if known.get(name, digest) != digest]:
        raise ValueError(
            f"{folder} holds results of other files than these (by {path}, other "
            f"{', other '.join(others)}); give another --out"
        )
    if not inputs.keys() <= known.keys():
        write_whole(path, (json.dumps(known | inputs, indent=1) + "\n").encode())


def check_folder(folder: Path, claims: Sequence[str], heading: str = HEADING) -> None:
    """ValueError unless a report and the results of these claims can be written to a folder.

    Before any cell is computed. A README.md that does not begin with `heading` is somebody else's.
    """
    page = folder / "README.md"
    if page.is_file() and not page.read_bytes().startswith(heading.encode()):
        raise ValueError(
            f"{page} is not one that this command has written; move it, or give another --out"
        )
    names = [f"{claim}.{ending}" for claim in claims for ending in ("jsonl", "png")]
    for path in (page, *(folder / name for name in ("claims.json", *names))):
        try:
            if path.exists():
                open(path, "ab").close()
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); move it, or give another --out"
            ) from None


def missing(claims: Sequence[Claim], folder: Path, quick: bool = False) -> list[tuple[Claim, Cell]]:
    """The cells of some claims whose result is not there."""
    tasks = []
    for claim in claims:
        cells = claim.cells(quick)
        there = ResultFile(folder, claim.name).find(cells)
        tasks += [(claim, cell) for cell, line in zip(cells, there) if line is None]
    return tasks


def reproduce(
    tasks: Sequence[tuple[Work, Cell]], folder: Path, workers: Workers | None = None
) -> Iterator[str]:
    """Compute cells into a folder that is locked, on workers if there are any.

    Yields a few words about each cell when its result is on the disk.
    """
    files = {claim.name: ResultFile(folder, claim.name) for claim, _ in tasks}
    for file in files.values():
        file.repair()
    if workers is None:
        contents: Iterator[dict[str, Any]] = (compute(*task) for task in tasks)
    else:
        contents = (content for _, content in workers.each(compute_with_one_thread, tasks))
    for content in contents:
        files[content["claim"]].append(content)
        yield " ".join([content["claim"], *map(str, list(content["cell"].values())[:4])])


def count(claims: Sequence[Claim], quick: bool = False) -> int:
    """How many cells some claims have."""
    return sum(len(claim.cells(quick)) for claim in claims)


def load_results(name: str, folder: Path = RESULTS, quick: bool = False) -> pd.DataFrame:
    """The results of a claim's complete stages, a row per cell.

    ValueError says how to compute what is not there.
    """
    claim = KNOWN[name]
    complete, finished = find_complete(claim, folder, quick)
    if not complete:
        raise ValueError(
            f"{name} has not been measured yet ({finished} of {len(claim.cells(quick))} cells "
            f"are in {folder}); compute it with: "
            f"python -m evolq_lite reproduce {claim.reads or name}"
        )
    return file_of(claim, folder).read(complete)


def file_of(claim: Claim, folder: Path) -> ResultFile:
    """The file of a claim's results, which are another claim's where it only reads."""
    return ResultFile(folder, claim.reads or claim.name)


def find_complete(claim: Claim, folder: Path, quick: bool = False) -> tuple[list[Cell], int]:
    """The cells of a claim's complete stages, and how many cells are finished in all."""
    cells = claim.cells(quick)
    there = file_of(claim, folder).find(cells)
    absent = [claim.stage(cell) for cell, line in zip(cells, there) if line is None]
    complete = [cell for cell in cells if not absent or claim.stage(cell) < min(absent)]
    return complete, len(cells) - len(absent)


def load_claim(name: str) -> tuple[Picture, Verdict]:
    """A claim's figure and verdict from the results in `data/results`; ValueError as above."""
    results = load_results(name)
    return KNOWN[name].figure(results), KNOWN[name].verdict(results)


def write_report(folder: Path, quick: bool = False) -> list[dict[str, Any]]:
    """Figures and verdicts of every claim with a complete stage, from the files alone.

    ValueError, and nothing is written, if there is none.
    """
    told: list[dict[str, Any]] = []
    sections = []
    for name, claim in KNOWN.items():
        shown, finished = find_complete(claim, folder, quick)
        if not shown:
            if finished:
                log.warning(
                    "%s is left out of the report: %d of its %d cells are there; compute the "
                    "others with: python -m evolq_lite reproduce %s%s",
                    *(name, finished, len(claim.cells(quick)), claim.reads or name),
                    " --quick" * quick,
                )
            continue
        results = file_of(claim, folder).read(shown)
        picture, verdict = claim.figure(results), claim.verdict(results)
        save_figure(picture, folder / f"{name}.png")
        told.append(
            {
                "claim": name,
                "question": claim.question,
                "verdict": verdict.word,
                "sentence": verdict.sentence,
                "rows": [asdict(row) for row in verdict.rows],
                "figure": f"{name}.png",
                "alt": str(picture.get_label()),
                "command": f"python -m evolq_lite reproduce {claim.reads or name}"
                + " --quick" * quick,
                "cells": len(results),
                "finished": finished,
                "planned": len(claim.cells(quick)),
                "parameters": list_parameters(shown),
                "seconds": round(results["seconds"].sum()),
                "devices": count_devices(results),
            }
        )
        sections.append(write_section(told[-1], claim.note, verdict, claim.tables(results)))
    if not told:
        more = "" if quick else ", or add --quick if they are those of --quick"
        raise ValueError(
            f"the results in {folder} are of no complete claim; compute the others{more}"
        )
    page = "\n\n".join(
        [
            HEADING,
            HOW_TO_READ,
            write_summary(told),
            HOW_TO_OPEN,
            *sections,
        ]
    )
    write_whole(folder / "claims.json", (json.dumps(told, indent=1) + "\n").encode())
    write_whole(folder / "README.md", (page + "\n").encode())
    return told


def list_parameters(cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """The values of each parameter in some cells, in their order."""
    found: dict[str, list[Any]] = {}
    for cell in cells:
        for name, value in cell.items():
            values = found.setdefault(name, [])
            values += [value] * (value not in values)
    return found


def count_devices(results: pd.DataFrame) -> dict[str, int]:
    """How many cells each device has computed; the CPU, where a result names none."""
    if "device" not in results:
        return {"cpu": len(results)}
    return {str(name): int(n) for name, n in results["device"].fillna("cpu").value_counts().items()}


def write_section(
    told: dict[str, Any], note: str, verdict: Verdict, tables: dict[str, pd.DataFrame]
) -> str:
    """One claim as Markdown: sentence, scope, deciding rows, figure, and all other numbers."""
    parts = [f"## {told['claim']} {told['question']}", f"**{verdict.word}.** {verdict.sentence}"]
    parts += [note] * bool(note)
    parts.append(f"Cells: {tell_parameters(told['parameters'])}.")
    if told["cells"] < told["planned"]:
        waiting = told["finished"] - told["cells"]
        waits = f" Finished, and shown when their stage is complete: {waiting}." * bool(waiting)
        parts.append(f"So far from {told['cells']} of {told['planned']} cells.{waits}")
    if gpus := {name: n for name, n in told["devices"].items() if name != "cpu"}:
        named = ", ".join(f"{n} of {told['cells']} cells on {name}" for name, n in gpus.items())
        parts.append(f"Computed with several processes at a time: {named}.")
    parts += [to_markdown(tabulate(verdict.decisive))] if verdict.decisive else []
    parts.append(f"![{told['alt']}]({told['figure']})")
    for title, table in tables.items():
        parts += [f"{title}:", to_markdown(table)]
    if verdict.others:
        more = to_markdown(tabulate(verdict.others))
        parts.append(f"<details><summary>Other measurements</summary>\n\n{more}\n\n</details>")
    return "\n\n".join(parts)


def tell_parameters(parameters: dict[str, list[Any]]) -> str:
    """Parameters and their values in words, where they are few enough to be read."""
    names = {"images": "calibration images", "fresh": "fresh images"}
    told = {
        names.get(name, name.replace("_", " ")): ", ".join(f"`{v}`" for v in values)
        if len(values) <= MOST_VALUES
        else f"{len(values)} kinds"
        for name, values in parameters.items()
    }
    return "; ".join(f"{name} {values}" for name, values in told.items())


def write_summary(told: Sequence[dict[str, Any]]) -> str:
    """All claims as a Markdown table, with what computes them and how long that took."""
    rows = [
        {
            "claim": f"{row['claim']} {row['question']}",
            "verdict": f"**{row['verdict']}**",
            "command": f"`{row['command']}`",
            "seconds": f"{row['seconds']:,}",
        }
        for row in told
    ]
    return to_markdown(pd.DataFrame(rows))


def claims_table(folder: Path = RESULTS) -> str:
    """The claims as a Markdown table, a verdict for each kind of network, from `claims.json`."""
    told = {row["claim"]: row for row in json.loads((folder / "claims.json").read_text())}
    rows = [
        {
            "claim": f"{name} {told[name]['question']}",
            "on the embedded networks": f"**{told[name]['verdict']}**",
            "on real networks": (
                f"**{told[claim.real]['verdict']}** ({claim.real})"
                if claim.real in told
                else "not measured"
            ),
        }
        for name, claim in CLAIMS.items()
        if name in told
    ]
    return to_markdown(pd.DataFrame(rows))
