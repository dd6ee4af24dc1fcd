"""Verdicts are data: a word, one plain sentence, and rows that say what was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from evolq_lite.evaluate import Gain, LossChange, tell_p

WORDS = ("holds here", "holds partly", "does not hold here")
UNDECIDED = "not decided"  # too little was computed


def decide(parts: Iterable[bool | None]) -> str:
    """The word for a claim from whether each of its parts holds; None decides nothing."""
    holds = [part for part in parts if part is not None]
    return WORDS[0 if all(holds) else 1 if any(holds) else 2]


@dataclass(frozen=True)
class Row:
    """One measurement.

    `gain` is in points of top-1 unless `unit` says otherwise; `interval` has 95 %. `holds` says
    whether the part of the claim that the row decides holds, None for a row that decides nothing.
    """

    name: str
    gain: float
    interval: tuple[float, float] | None = None
    p: float | None = None
    holds: bool | None = None
    unit: str = "points"
    note: str = ""
    form: str = "+.2f"

    @classmethod
    def of(cls, name: str, gain: Gain, holds: bool | None = None) -> "Row":
        """A gain in top-1."""
        low, high = gain.interval
        differ = gain.p_value < 0.05 and not gain.significant
        return cls(
            name,
            100 * gain.gain,
            (100 * low, 100 * high),
            gain.p_value,
            holds,
            note="seeds differ in sign" if differ else "",
        )

    @classmethod
    def of_loss(cls, name: str, change: LossChange, holds: bool | None = None) -> "Row":
        """A change of a loss."""
        differ = change.p_value < 0.05 and not change.significant
        return cls(
            name,
            change.change,
            change.interval,
            change.p_value,
            holds,
            unit="nats",
            note="lower is better" + "; seeds differ in sign" * differ,
            form="+.4f",
        )

    def cells(self) -> dict[str, str]:
        """The row of a table for readers."""
        interval = (
            self.interval and f"[{self.interval[0]:{self.form}}, {self.interval[1]:{self.form}}]"
        )
        p = "" if self.p is None else tell_p(self.p).removeprefix("= ")
        return {
            "measured": self.name,
            "gain": f"{self.gain:{self.form}} {self.unit}".strip(),
            "95 % interval": interval or "",
            "p": f"{p} ({self.note})" if self.note and p else p or self.note,
            "holds": {True: "yes", False: "no", None: ""}[self.holds],
        }


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether a claim holds: a word of `WORDS`, a sentence of at most 30 words, and the rows."""

    word: str
    sentence: str
    rows: tuple[Row, ...] = ()

    def __str__(self) -> str:
        return f"{self.word.capitalize()}. {self.sentence}"

    __repr__ = __str__  # what a notebook keeps beside the table

    def _repr_markdown_(self) -> str:
        table = to_markdown(tabulate(self.decisive)) if self.decisive else ""
        return f"**{self.word.capitalize()}.** {self.sentence}\n\n{table}"

    @property
    def decisive(self) -> list[Row]:
        """The rows that decide the claim."""
        return [row for row in self.rows if row.holds is not None]

    @property
    def others(self) -> list[Row]:
        """The rows that were measured as well."""
        return [row for row in self.rows if row.holds is None]


def count_seeds(results: pd.DataFrame) -> str:
    """How many seeds were measured, in words for a sentence."""
    seeds = results["seed"].nunique()
    return f"{seeds} seeds" if seeds > 1 else "one seed"


def tabulate(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table of text, without the columns that all of them leave empty."""
    table = pd.DataFrame([row.cells() for row in rows])
    return table.loc[:, (table != "").any()]


def to_markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown, without its index."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
