"""Grade 200 generated submissions twice and compare the tables: python benchmarks/grading.py

Right, wrong, untouched, damaged, slow, greedy and cheating notebooks of the small assignment of
tests/toy_assignments.py, as a zip file in the manner of Canvas; with `--real N`, N submissions of
A1 as well, made of the right and wrong answers that the tests know. Prints seconds for each.
"""

import argparse
import io
import random
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import toy_assignments as toys
from wrong_answers import RIGHT, WRONG

KINDS = {
    "right": lambda t, n: toys.answered(t, answers=toys.right(**{"T1-3": f"Answer {n}."})),
    "wrong": lambda t, n: toys.answered(t, answers=toys.code(f"return x + {n}")),
    "half": lambda t, n: toys.answered(t, answers={"T1-2": toys.TOTAL}),
    "stub": lambda t, n: toys.answered(t),
    "error": lambda t, n: toys.answered(t, answers=toys.code(f"raise ValueError({n})")),
    "colab": lambda t, n: changed(t, toys.stripped),
    "deepnote": lambda t, n: changed(t, lambda cells: toys.stripped(cells, deepnote=True)),
    "doubled": lambda t, n: changed(t, lambda cells: [*cells, *cells]),
    "reversed": lambda t, n: changed(t, lambda cells: cells[::-1]),
    "new cells": lambda t, n: changed(
        t, lambda cells: toys.insert(cells, "T1-3", f"text:Answer {n}.", "print(1)")
    ),
    "endless": lambda t, n: toys.answered(t, answers=toys.code("while True: pass")),
    "greedy": lambda t, n: toys.answered(t, answers=toys.code("return bytearray(10**10)")),
    "dead": lambda t, n: toys.answered(t, answers=toys.code("import os; os._exit(1)")),
    "cheat": lambda t, n: changed(
        t, lambda cells: toys.insert(cells, "T1-1", "def sum(values): return 0")
    ),
    "random": lambda t, n: toys.answered(
        t, answers=toys.code("import random; return 2 * x if random.random() < 0.9 else 0")
    ),
}


def changed(sources, change):
    """A right notebook whose cells were changed."""
    notebook = toys.answered(sources, answers=toys.right())
    notebook.cells = change(notebook.cells)
    return notebook


def real_one(n):
    """A submission of A1: a right or wrong answer to each exercise, by chance."""
    chance = random.Random(n)
    notebook = toys.read_source(toys.ASSIGNMENTS / "src" / "A1_uniform_quantization.py")
    student = toys.student_version(notebook)
    for cell, solution in zip(student.cells, notebook.cells):
        exercise = toys.grader_data(cell).get("grade_id", "")
        if exercise in WRONG:
            _, right, wrong = chance.choice(WRONG[exercise])
            _, answer = chance.choice(RIGHT[exercise])
            choices = (solution.source, answer, solution.source.replace(right, wrong), cell.source)
            cell.source = chance.choice(choices)
    return student


def archive(count, make, name, into):
    """A zip file in the manner of Canvas."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for n in range(count):
            entry = f"student{'abcdefghij'[n % 10]}_{1000 + n}_{5000 + n}_{name}.ipynb"
            info = zipfile.ZipInfo(entry, (2026, 1, 1, 12, 0, 0))
            out.writestr(info, toys.data_of(make(n)))
    into.write_bytes(file.getvalue())
    return into


def twice(what, submissions, count, top, *options):
    """Grade twice; says how long it took and whether the tables are the same."""
    seconds, texts = [], []
    for turn in ("one", "two"):
        began = time.perf_counter()
        toys.run_grader(submissions, top / what / turn, *options)
        seconds.append((time.perf_counter() - began) / count)
        texts.append((top / what / turn / "grades.csv").read_bytes())
    same = "identical" if texts[0] == texts[1] else "DIFFERENT"
    each = " and ".join(f"{second:.2f}" for second in seconds)
    print(f"{what}: {count} submissions, {each} s each, tables {same}", flush=True)
    return texts[0] == texts[1]


def main():
    """Command line; exits with 1 if two tables differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toys", type=int, default=200)
    parser.add_argument("--real", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        (top / "sources").mkdir()
        sources = toys.write_toys(top / "sources")
        kinds = list(KINDS.values())
        made = archive(
            options.toys, lambda n: kinds[n % len(kinds)](sources, n), "T1", top / "toys.zip"
        )
        limits = ("--sources", sources, "--seconds", 3, "--megabytes", 1000)
        fine = twice("toys", made, options.toys, top, *limits)
        if options.real:
            made = archive(options.real, real_one, "A1_uniform_quantization", top / "real.zip")
            fine &= twice("A1", made, options.real, top)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
