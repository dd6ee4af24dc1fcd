"""C11: does evolution of bit-widths gain, where that of scales does not?

On integers by GPTQ, with the first and last layer at 8 bits, on the embedded ViT and the embedded
CNN. Every method gets the same table of integers and the same budget of bits: the even start, a
ranking that measures one layer at a time, random walks from the start at the cost of the evolution,
and the evolution. All choices are made on calibration images; `held_out_kl` is the divergence from
the float network on others, which no choice saw.
"""

from dataclasses import dataclass
from functools import lru_cache

import pandas as pd

from evolq_lite.bits import (
    BitsGenome,
    BitsObjective,
    BitsTable,
    bits_genome,
    bits_table,
    evolve_bits,
    mean_bits,
    rank_layers,
    start_bits,
    write_bits,
)
from evolq_lite.config import PRESETS, SearchConfig
from evolq_lite.evaluate import Gain
from evolq_lite.evolve import Evaluated
from evolq_lite.experiments.cells import Claim, Tables, measure_gain, measure_loss
from evolq_lite.experiments.plots import NAMES, plot_gains
from evolq_lite.experiments.results import Cell, Result, by
from evolq_lite.experiments.setup import (
    Setting,
    draw_fresh_images,
    measure_fitness,
    measure_test,
    prepare,
)
from evolq_lite.experiments.verdicts import Row, Verdict, count_seeds, decide
from evolq_lite.figures import Picture
from evolq_lite.fitness import fitness_of

QUANT = PRESETS["recommended"]
EVEN, RANKING, RANDOM, EVOLUTION = "even bits", "ranking", "random walks", "evolution"
HELD_OUT = 2000  # images


def cells(quick: bool) -> list[Cell]:
    """Every method at every budget; cells that share a table follow each other."""
    sizes = {
        "images": 24 if quick else 500,
        "widths": "2,3" if quick else "2,3,4,5,6,7,8",
        "evaluations": 6 if quick else 360,
        "every": 21 if quick else 1,
    }
    return [
        {"network": network, "mean_bits": mean, "method": method, "seed": seed, **sizes}
        for network in (("vit",) if quick else ("vit", "cnn"))
        for seed in ((0,) if quick else range(5))
        for mean in ((2.5,) if quick else (2.25, 2.5, 3.0, 4.0))
        for method in (EVEN, RANKING, RANDOM, EVOLUTION)
    ]


def stage_of(cell: Cell) -> int:
    """The ViT is shown before the CNN is there."""
    return ("vit", "cnn").index(cell["network"])


@dataclass(frozen=True, eq=False)
class Rounded:
    """A calibrated network, and the table of its layers at all widths."""

    setting: Setting
    table: BitsTable


def run(cell: Cell) -> Result:
    """Choose bits by the cell's method; measure on held-out calibration images, then test."""
    search = search_of(cell, cell["method"])
    shared = round_once(cell["network"], cell["images"], cell["seed"], cell["widths"])
    setting, table = shared.setting, shared.table
    genome = bits_genome(setting.qmodel, search.bit_widths, search.mean_bits)
    start_bits(setting.qmodel, genome, table)
    told = choose_bits(cell["method"], setting, genome, table, search)
    images, targets = draw_fresh_images(
        setting.demo, HELD_OUT if cell["every"] == 1 else 200, cell["seed"]
    )
    kl = measure_fitness(setting, SearchConfig(fitness="kl", batch=search.batch), images, targets)
    return {**told, "held_out_kl": kl, **measure_test(setting, cell["every"])}


def search_of(cell: Cell, method: str) -> SearchConfig:
    """What a method may spend; the even start and the ranking take loss and batch from it."""
    return SearchConfig(
        search="bits",
        mean_bits=cell["mean_bits"],
        widths=cell["widths"],
        evaluations=cell["evaluations"],
        algorithm="random" if method == RANDOM else "evolq",
        seed=cell["seed"],
        batch=min(100, cell["images"]),
    )


@lru_cache(maxsize=1)
def round_once(network: str, images: int, seed: int, widths: str) -> Rounded:
    """The table that the cells of a seed share: it does not depend on the budget."""
    setting = prepare(network, images, seed, QUANT, choose_integers=False)  # `bits_table` does
    known = SearchConfig(search="bits", mean_bits=2.5, widths=widths)
    genome = bits_genome(setting.qmodel, known.bit_widths, known.mean_bits)
    table = bits_table(setting.qmodel, setting.demo.calibration, genome)
    return Rounded(setting, table)


def choose_bits(
    method: str, setting: Setting, genome: BitsGenome, table: BitsTable, search: SearchConfig
) -> Result:
    """Put the method's choice into the network; returns what is to be known of it."""
    demo = setting.demo
    if method in (EVEN, RANKING):
        objective = BitsObjective(
            setting.chain,
            genome,
            table,
            demo.calibration,
            demo.targets,
            fitness_of(search.fitness, search.temperature),
            search.batch,
        )
        vector = objective.start if method == EVEN else rank_layers(objective)
        evaluations = objective.evaluations
        write_bits(setting.qmodel, genome, table, vector)
        told: Result = {"fitness": float(objective(vector[None])[0]), "evaluations": evaluations}
    else:
        events = evolve_bits(setting.chain, demo.calibration, demo.targets, search, genome, table)
        history = [event for event in events if isinstance(event, Evaluated)]
        told = {
            "fitness": min(event.fitness for event in history),
            "evaluations": len(history),
            "search_seconds": round(sum(event.seconds for event in history), 2),
        }
    found = genome.read(setting.qmodel)
    return {**told, "bits": genome.unpack(found), "mean": mean_bits(genome, found)}


def measure_gains(results: pd.DataFrame) -> dict[str, dict[str, Gain]]:
    """The evolution against each rival, by network and budget."""
    gains: dict[str, dict[str, Gain]] = {}
    for (network, mean), group in by(results, "network", "mean_bits").items():
        found = by(group, "method")
        gains[f"{NAMES[network]}, mean {mean:g} bits"] = {
            f"evolution, over {rival}": measure_gain(found[rival], found[EVOLUTION])
            for rival in (EVEN, RANKING, RANDOM)
        }
    return gains


def figure(results: pd.DataFrame) -> Picture:
    """The evolution against its rivals, one panel for each network and budget."""
    return plot_gains(
        measure_gains(results), "Evolved bits against rivals, equal budget", same_scale=True
    )


def verdict(results: pd.DataFrame) -> Verdict:
    """Is the evolution significantly ahead of every rival, on both networks, at every budget?"""
    rows, others, gains = [], [], measure_gains(results)
    for setting, found in gains.items():
        for name, gain in found.items():
            rows.append(Row.of(f"{setting}: {name}", gain, gain.gain > 0 and gain.significant))
    for (network, mean), group in by(results, "network", "mean_bits").items():
        found = by(group, "method")
        for rival in (EVEN, RANKING, RANDOM):
            name = f"{NAMES[network]}, mean {mean:g} bits: evolution, over {rival}, KL"
            others.append(Row.of_loss(name, measure_loss(found[rival], found[EVOLUTION], "kl")))
    return Verdict(
        decide(row.holds for row in rows),
        f"Evolved bits beat even ones, a ranking and random walks in {tell_budgets(gains)} "
        f"(Typefaces-62, {count_seeds(results)}).",
        (*rows, *others),
    )


def tell_budgets(gains: dict[str, dict[str, Gain]]) -> str:
    """The share of each network's budgets in which the evolution is clearly ahead, by rival."""
    told: list[str] = []
    for network in NAMES.values():
        mine = [found for setting, found in gains.items() if setting.startswith(network)]
        if not mine:
            continue
        shares = []
        for against in zip(*(found.values() for found in mine)):  # one rival, all budgets
            ahead = sum(gain.gain > 0 and gain.significant for gain in against)
            shares.append(f"{ahead}/{len(mine)}")
        told.append(f"{', '.join(shares)} {'of the budgets ' * (not told)}on the {network}")
    return ", ".join(told)


def tables(results: pd.DataFrame) -> Tables:
    """Top-1, loss and held-out divergence of each method, in the mean over seeds."""
    rows = []
    for (network, mean, method), found in by(results, "network", "mean_bits", "method").items():
        rows.append(
            {
                "network": NAMES[network],
                "mean bits": f"{mean:g}",
                "bits by": method,
                "top-1": f"{100 * found['top1'].mean():.2f} %",
                "loss": f"{found['fitness'].mean():.4f}",
                "KL, held out": f"{found['held_out_kl'].mean():.4f}",
                "evaluations": f"{found['evaluations'].mean():.0f}",
            }
        )
    return {"Means over seeds": pd.DataFrame(rows)}


CLAIM = Claim(
    "C11",
    "Does evolving the bits of each layer gain over even bits, a ranking and random search?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R11",
    stage=stage_of,
    note="P-values are not corrected for the number of comparisons. In KL the evolution can lose: "
    "see the CNN among the other measurements.",
)
