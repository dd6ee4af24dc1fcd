"""C3: from the same start, at equal cost, do gradients get stuck where evolution keeps improving?

All search the attention weight scales of the whole ViT at once, except the paper's own search,
which goes block by block. Cost is counted in forwards of the whole network: a candidate 1, a
gradient 3, a candidate of block i its share of the chain. Each method runs with four step sizes;
the one with the best calibration fitness (mean over seeds) stands for it.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.descent import COST_OF_GRADIENT, descend
from evolq_lite.evolve import Evaluated, evolve
from evolq_lite.experiments.cells import Claim, Tables, measure_gain
from evolq_lite.experiments.results import Cell, Result, by, where
from evolq_lite.experiments.setup import Setting, measure_top1, prepare
from evolq_lite.experiments.verdicts import UNDECIDED, Row, Verdict, count_seeds, decide
from evolq_lite.figures import MARKERS, PETROFF, Picture, new_figure
from evolq_lite.fitness import fisher
from evolq_lite.objective import BlockObjective
from evolq_lite.search import (
    SPSA,
    CoordinateSearch,
    EvolQ,
    LogSpace,
    Optimizer,
    RandomSearch,
    SepCMA,
    minimize,
)

Note = Callable[[float, float], None]  # cost, fitness
GRADIENT = ("sgd", "adam", "adamw", "fisher adam")
SEARCHES = ("evolq", "evolq relative", "evolq adaptive", "random", "spsa", "coordinate", "sepcma")
METHODS = ("start", "paper", *SEARCHES, *GRADIENT)
STEPS = (1e-3, 3e-3, 1e-2, 3e-2)  # relative
ABSOLUTE = (3e-4, 1e-3, 3e-3, 1e-2)


def cells(quick: bool) -> list[Cell]:
    """Every method, step and seed."""
    out = []
    for method in ("start", "random", "adam") if quick else METHODS:
        steps: tuple[float, ...] = ABSOLUTE if method in ("paper", "evolq", "random") else STEPS
        for step in (0.0,) if method == "start" else steps[1:2] if quick else steps:
            for seed in (0,) if quick else (0, 1, 2):
                out.append(
                    {
                        "method": method,
                        "step": step,
                        "seed": seed,
                        "weight_bits": 3,
                        "images": 60 if quick else 300,
                        "budget": 6 if quick else 120,
                        "every": 21 if quick else 1,
                    }
                )
    return out


def optimizer_of(
    method: str, start: torch.Tensor, value: float, step: float, seed: int
) -> Optimizer:
    """A search by name."""
    if method == "random":
        return RandomSearch(start, value, step, seed)
    if method.startswith("evolq"):
        relative, adapt = method != "evolq", method == "evolq adaptive"
        return EvolQ(start, value, step, seed=seed, relative=relative, adapt=adapt)
    kinds: dict[str, Callable[..., Optimizer]] = {
        "spsa": SPSA,
        "coordinate": CoordinateSearch,
        "sepcma": SepCMA,
    }
    kind = kinds[method]
    # A single coordinate may move ten times as far as all together.
    width = 10 * step if method == "coordinate" else step
    return LogSpace(start, lambda log: kind(log, value, width, seed))


def run(cell: Cell) -> Result:
    """Search from MinMax scales; the curve is the best fitness against the cost."""
    config = QuantConfig(weight_bits=cell["weight_bits"])
    setting = prepare("vit", cell["images"], cell["seed"], config)
    chain, demo, blocks = setting.chain, setting.demo, setting.chain.searchable
    batch = min(100, cell["images"])
    objective = BlockObjective(chain, blocks, demo.calibration, demo.targets, batch=batch)
    start = objective.start
    value = float(objective(start[None])[0])
    curve: list[tuple[float, float]] = [(0.0, value)]
    method, budget = cell["method"], cell["budget"]

    def note(cost: float, found: float) -> None:
        curve.append((curve[-1][0] + cost, min(found, curve[-1][1])))

    if method == "paper":
        search_blockwise(setting, cell, batch, note)
    elif method in GRADIENT:
        losses = objective
        if method == "fisher adam":
            losses = BlockObjective(chain, blocks, demo.calibration, demo.targets, fisher, batch)
        rule = "adam" if method == "fisher adam" else method
        on_step = partial(note_gradient, objective, note, method != "fisher adam")
        vector, _ = descend(losses, rule, cell["step"], budget, on_step)
        objective.commit(vector)
    elif method != "start":
        search = optimizer_of(method, start, value, cell["step"], cell["seed"])
        vector, _ = minimize(objective, search, budget, lambda v, f: note(1.0, f))
        objective.commit(vector)
    final = float(objective(objective.start[None])[0])
    return {
        "fitness": final,
        "fitness_before": value,
        "curve": [[round(cost, 2), round(f, 6)] for cost, f in curve],
        **measure_top1(setting.qmodel, cell["every"]),
    }


def note_gradient(
    objective: BlockObjective, note: Note, own: bool, vector: torch.Tensor, value: float
) -> None:
    """Note a step of descent; the fitness, where it is another loss, is looked at for free."""
    note(COST_OF_GRADIENT, value if own else float(objective(vector[None])[0]))


def search_blockwise(setting: Setting, cell: Cell, batch: int, note: Note) -> None:
    """The paper's loop until the budget is spent."""
    chain = setting.chain
    share = {block: 1 - chain.index(block) / len(chain.names) for block in chain.searchable}
    passes = max(1, round(cell["budget"] / (3 * sum(share.values()))))
    config = SearchConfig(passes=passes, seed=cell["seed"], batch=batch, step=cell["step"])
    for event in evolve(chain, setting.demo.calibration, setting.demo.targets, config):
        if isinstance(event, Evaluated):
            note(share[event.block], event.fitness)


def choose_steps(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The results of each method at its best step by calibration fitness, the best method first."""
    best: dict[str, pd.DataFrame] = {}
    for (method, _), found in by(results, "method", "step").items():
        if method not in best or found["fitness"].mean() < best[method]["fitness"].mean():
            best[method] = found
    return dict(sorted(best.items(), key=lambda item: item[1]["fitness"].mean()))


def figure(results: pd.DataFrame) -> Picture:
    """Convergence with bands over seeds, and the gain of each method with its interval."""
    best = choose_steps(results)
    start = best.pop("start")
    gains = {method: measure_gain(start, found) for method, found in best.items()}
    names = sorted(gains, key=lambda method: gains[method].gain)
    alt = (
        f"Left, fitness over cost of {len(best)} methods: {next(iter(best))} ends lowest. Right, "
        f"gains in top-1: most {names[-1]} {100 * gains[names[-1]].gain:+.2f} points, least "
        f"{names[0]} {100 * gains[names[0]].gain:+.2f}."
    )
    picture = new_figure(11, 4.8, alt)
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    for i, (method, found) in enumerate(best.items()):
        color, dashes = PETROFF[i % len(PETROFF)], "-" if i < len(PETROFF) else "--"
        marker = MARKERS[(i + i // len(PETROFF)) % len(MARKERS)]
        costs = np.linspace(0, min(curve[-1][0] for curve in found["curve"]), 60)
        fitness = np.array(
            [[min(f for c, f in curve if c <= cost) for cost in costs] for curve in found["curve"]]
        )
        fitness -= found["fitness_before"].to_numpy()[:, None]
        look = {"color": color, "marker": marker, "markevery": (3 * i % 15, 15), "ms": 5}
        left.plot(costs, fitness.mean(0), dashes, label=method, **look)
        left.fill_between(costs, fitness.min(0), fitness.max(0), color=color, alpha=0.15)
        low, high = (100 * x for x in gains[method].interval)
        point = 100 * gains[method].gain
        error = [[point - low], [high - point]]
        right.errorbar(point, i, xerr=error, fmt=marker, color=color, capsize=3)
    left.set(xlabel="cost in forwards", ylabel="fitness against the start (lower is better)")
    left.set_title("Best so far; bands are seeds, markers as on the right", fontsize="medium")
    right.axvline(0, color="0.5", lw=1)
    right.set_yticks(range(len(best)), list(best))
    right.invert_yaxis()
    right.set_title("Best fitness first", fontsize="medium")
    right.set_xlabel("gain in top-1, points (mean over seeds)")
    right.grid(axis="x", alpha=0.3)
    return picture


def verdict(results: pd.DataFrame) -> Verdict:
    """Is the paper's evolution ahead of every gradient method, in fitness and on test images?"""
    best = choose_steps(results)
    if not {"start", "paper", *GRADIENT} <= best.keys():
        return Verdict(UNDECIDED, "Only some of the cells were computed.")
    paper, start = best["paper"], best["start"]
    rival = next(method for method in best if method in GRADIENT)  # the best comes first
    ahead = paper["fitness"].mean() - best[rival]["fitness"].mean()
    gap = measure_gain(best[rival], paper)
    better = gap.gain > 0 and gap.significant
    rows = [
        Row(
            f"Fitness of the paper's search, minus {rival}'s",
            ahead,
            None,
            None,
            bool(ahead < 0),
            "(lower is better)",
            form="+.5f",
        ),
        Row.of(f"Top-1 of the paper's search, over {rival}", gap, better),
    ]
    for method, step in (("paper", step) for step in ABSOLUTE):
        gain = measure_gain(start, where(results, method=method, step=step).sort_values("seed"))
        rows.append(Row.of(f"The paper's search with width {step:g}, over the start", gain))
    spent = results["curve"].map(lambda curve: curve[-1][0]) + COST_OF_GRADIENT
    early = results[results["method"].isin(GRADIENT) & (spent <= results["budget"])]
    told = "; ".join(
        f"{r['method']} at {r['step']:g}, seed {r['seed']}" for _, r in early.iterrows()
    )
    rows.append(
        Row(
            f"Runs that ended early, gradient not finite: {told or 'none'}",
            len(early),
            unit="runs",
            form="d",
        )
    )
    gains = {name: 100 * measure_gain(start, best[name]).gain for name in ("paper", rival)}
    return Verdict(
        decide((bool(ahead < 0), better)),
        f"On the embedded ViT (Typefaces-62, W3A8, {count_seeds(paper)}), the paper's search gains "
        f"{gains['paper']:+.2f} points, the best gradient method at the same cost ({rival}) "
        f"{gains[rival]:+.2f}.",
        tuple(rows),
    )


def tables(results: pd.DataFrame) -> Tables:
    """Every method at the best of its steps."""
    best = choose_steps(results)
    start = best.pop("start")
    rows = [
        {
            "method": method,
            "step": f"{found['step'].iloc[0]:g}",
            "fitness": f"{found['fitness'].mean():.5f}",
            "gain in top-1 over the start": str(measure_gain(start, found)),
        }
        for method, found in best.items()
    ]
    return {"Every method at the best of its steps, by fitness": pd.DataFrame(rows)}


CLAIM = Claim(
    "C3",
    "Do gradients fail where evolution keeps improving?",
    cells,
    run,
    figure,
    verdict,
    tables,
    real="R3",
    note="The widest step of each method was added after the others had been measured. It is the "
    "best for most methods, Adam and the paper's search among them, so a wider grid could change "
    "the numbers again.",
)
