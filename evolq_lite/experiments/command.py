"""`python -m evolq_lite reproduce`: compute what is missing of some claims, then the report."""

import argparse
from pathlib import Path

from tqdm import tqdm

from evolq_lite.data import DATA
from evolq_lite.experiments import CLAIMS, KNOWN, real, report
from evolq_lite.parallel import Pool


def reproduce(arguments: argparse.Namespace, pool: Pool | None) -> int:
    """Compute the cells of claims that are not there, then write figures and the table."""
    wanted = [name.upper() for name in arguments.claims]
    if unknown := [name for name in wanted if name not in (*KNOWN, "ALL")]:
        raise ValueError(f"unknown experiment {unknown[0]!r}; known: {', '.join(KNOWN)}, all")
    names = {*wanted, *(CLAIMS if "ALL" in wanted else ())}
    claims = [claim for name, claim in KNOWN.items() if name in names]
    default = Path("runs/quick") if arguments.quick else DATA / "results"
    folder = arguments.out or default
    if arguments.report:
        if arguments.claims != ["all"]:
            raise ValueError("--report is about all results that are there; give no experiment")
        claims = []
    if arguments.quick and real.CLAIM in claims:
        raise ValueError("nothing of REAL is quick; leave --quick away")
    if real.CLAIM in claims:
        if pool is not None:
            raise ValueError(
                "REAL has runs of its own to share out: leave --workers and --scheduler away, or "
                "give them to python -m evolq_lite run"
            )
        claims[-1] = real.on(arguments.weights, arguments.photographs)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = report.missing(claims, folder, arguments.quick)
    cells = report.count(claims, arguments.quick)
    with tqdm(total=cells, initial=cells - len(tasks), unit="cell", smoothing=0) as bar:

        def progress(cell: str) -> None:
            bar.set_description(cell[:40], refresh=False)
            bar.update()

        report.reproduce(tasks, folder, progress, pool)
    for row in report.write_report(folder, arguments.quick):
        print(f"{row['claim']} {row['question']} {row['verdict']}. {row['sentence']}")
    print(f"Written to {folder}: README.md, claims.json, figures, and a JSON file a cell.")
    return 0
