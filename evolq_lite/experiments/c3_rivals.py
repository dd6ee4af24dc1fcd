"""C3: at equal cost and from the same start, do gradients get stuck where evolution goes on?

All search the attention weight scales of the whole ViT at once, except the paper's own search,
which goes block by block. Cost is counted in forwards of the whole network: a candidate 1, a
gradient 3, a candidate of block i its share of the chain. Each method runs with three step sizes;
the one with the best calibration fitness (mean over seeds) stands for it.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import mean

import numpy as np
import torch

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.descent import COST_OF_GRADIENT, descend
from evolq_lite.evolve import evolve
from evolq_lite.experiments.cells import UNDECIDED, Cell, Claim, Result, paired, verdict_of
from evolq_lite.experiments.setup import Setting, setting, tested
from evolq_lite.figures import MARKERS, PETROFF, Picture, new_figure
from evolq_lite.fitness import fisher
from evolq_lite.objective import BlockObjective
from evolq_lite.search import (
    SPSA,
    CoordinateSearch,
    EvolQ,
    FromCmaes,
    LogSpace,
    Optimizer,
    RandomSearch,
    minimize,
)

Note = Callable[[float, float], None]  # cost, fitness
GRADIENT = ("sgd", "adam", "adamw", "fisher adam")
SEARCHES = ("evolq", "evolq relative", "evolq adaptive", "random", "spsa", "coordinate", "sepcma")
METHODS = ("start", "paper", *SEARCHES, *GRADIENT)
STEPS = (1e-3, 3e-3, 1e-2)  # relative
ABSOLUTE = (3e-4, 1e-3, 3e-3)


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
        "sepcma": FromCmaes,
    }
    kind = kinds[method]
    # A single coordinate may move ten times as far as all together.
    width = 10 * step if method == "coordinate" else step
    return LogSpace(start, lambda log: kind(log, value, width, seed))


def run(cell: Cell) -> Result:
    """Search from MinMax scales; the curve is the best fitness against the cost."""
    made = setting(
        "vit", cell["images"], cell["seed"], QuantConfig(weight_bits=cell["weight_bits"])
    )
    chain, blocks = made.chain, made.chain.searchable
    batch = min(100, cell["images"])
    objective = BlockObjective(chain, blocks, made.demo.calibration, made.demo.targets, batch=batch)
    start = objective.start
    value = float(objective(start[None])[0])
    curve: list[tuple[float, float]] = [(0.0, value)]
    method, budget = cell["method"], cell["budget"]

    def note(cost: float, found: float) -> None:
        curve.append((curve[-1][0] + cost, min(found, curve[-1][1])))

    if method == "paper":
        blockwise(made, cell, batch, budget, note)
    elif method in GRADIENT:
        losses = objective
        if method == "fisher adam":
            losses = BlockObjective(
                chain, blocks, made.demo.calibration, made.demo.targets, fisher, batch
            )
        kind = "adam" if method == "fisher adam" else method
        heard = partial(hear_gradient, objective, note, method != "fisher adam")
        vector, _ = descend(losses, kind, cell["step"], budget, heard)
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
        **tested(made.qmodel, cell["every"]),
    }


def hear_gradient(
    objective: BlockObjective, note: Note, own: bool, vector: torch.Tensor, value: float
) -> None:
    """Note a step of descent; the fitness, where it is another loss, is looked at for free."""
    note(COST_OF_GRADIENT, value if own else float(objective(vector[None])[0]))


def blockwise(made: Setting, cell: Cell, batch: int, budget: float, note: Note) -> None:
    """The paper's loop until the budget is spent."""
    share = {
        block: 1 - made.chain.index(block) / len(made.chain.names)
        for block in made.chain.searchable
    }
    passes = max(1, round(budget / (3 * sum(share.values()))))
    config = SearchConfig(passes=passes, seed=cell["seed"], batch=batch)
    evolve(
        made.chain,
        made.demo.calibration,
        made.demo.targets,
        config,
        cell["step"],
        lambda e: note(share[e.block], e.fitness),
    )


def chosen(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each method at its best step, by seed."""
    by: dict[tuple[str, float], list[Result]] = defaultdict(list)
    for r in results:
        by[r["method"], r["step"]].append(r)
    best: dict[str, list[Result]] = {}
    for (method, _), found in by.items():
        found.sort(key=lambda r: r["seed"])
        if method not in best or mean(r["fitness"] for r in found) < mean(
            r["fitness"] for r in best[method]
        ):
            best[method] = found
    return best


def figure(results: list[Result]) -> Picture:
    """Convergence with bands over seeds, and the gain of each method with its interval."""
    best = chosen(results)
    start = best.pop("start")
    order = sorted(best, key=lambda m: mean(r["fitness"] for r in best[m]))
    gains = {m: paired(start, best[m]) for m in order}
    said = "; ".join(f"{m} {gains[m]}" for m in order)
    picture = new_figure(
        11, 4.6, f"Rivals at equal cost, best fitness first. Gain in top-1: {said}."
    )
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    for i, method in enumerate(order):
        color, style = PETROFF[i % len(PETROFF)], "-" if i < len(PETROFF) else "--"
        end = min(r["curve"][-1][0] for r in best[method])
        costs = np.linspace(0, end, 60)
        rows = [
            np.array([min(f for c, f in r["curve"] if c <= cost) for cost in costs])
            for r in best[method]
        ]
        values = np.stack(rows) - np.array([[r["fitness_before"]] for r in best[method]])
        marker = {
            "marker": MARKERS[(i + i // len(PETROFF)) % len(MARKERS)],
            "markevery": (3 * i % 15, 15),
            "ms": 5,
        }
        left.plot(costs, values.mean(0), style, color=color, label=method, **marker)
        left.fill_between(costs, values.min(0), values.max(0), color=color, alpha=0.15)
        gain = gains[method]
        low, high = (100 * x for x in gain.interval)
        point = 100 * gain.gain
        right.errorbar(
            point,
            i,
            xerr=[[point - low], [high - point]],
            fmt=MARKERS[(i + i // len(PETROFF)) % len(MARKERS)],
            color=color,
            capsize=3,
        )
    left.set(xlabel="cost in forwards", ylabel="fitness against the start (lower is better)")
    left.set_title("Best so far; markers are named on the right", fontsize="medium")
    right.axvline(0, color="0.5", lw=1)
    right.set_yticks(range(len(order)), order)
    right.invert_yaxis()
    right.set_xlabel("gain in top-1, points (mean over seeds)")
    right.grid(axis="x", alpha=0.3)
    return picture


def verdict(results: list[Result]) -> tuple[str, str]:
    """Is the paper's evolution ahead of every gradient method, in fitness and on test images?"""
    best = chosen(results)
    if not {"start", "paper", *GRADIENT} <= best.keys():
        return UNDECIDED, "Only a part of the cells was computed."
    paper = best["paper"]
    rival = min(GRADIENT, key=lambda m: mean(r["fitness"] for r in best[m]))
    fitter = mean(r["fitness"] for r in paper) < mean(r["fitness"] for r in best[rival])
    gap = paired(best[rival], paper)
    better = gap.gain > 0 and gap.significant
    worse = gap.gain < 0 and gap.significant
    narrow = "; ".join(
        f"at {step:g} {paired(best['start'], found)}"
        for step in ABSOLUTE
        if step != paper[0]["step"]
        and (found := [r for r in results if (r["method"], r["step"]) == ("paper", step)])
    )
    stopped = [
        f"{r['method']} at {r['step']:g}, seed {r['seed']}"
        for r in results
        if r["method"] in GRADIENT and r["curve"][-1][0] + COST_OF_GRADIENT <= r["cell"]["budget"]
    ]
    sentence = (
        f"The paper's search gains {paired(best['start'], paper)} at the best of its widths "
        f"({paper[0]['step']:g}; {narrow}), the best gradient method "
        f"({rival}) {paired(best['start'], best[rival])}; between them {gap}"
        f"{', the gradient method is ahead' if worse else ''}. Fitness "
        f"{mean(r['fitness'] for r in paper):.5f} against "
        f"{mean(r['fitness'] for r in best[rival]):.5f}; best of all: "
        f"{min(best, key=lambda m: mean(r['fitness'] for r in best[m]))}. Runs that ended early, "
        f"with a gradient that is not finite: {', '.join(stopped) or 'none'}."
    )
    return verdict_of((fitter, better)), sentence


CLAIM = Claim("C3", "Do gradients fail where evolution goes on?", cells, run, figure, verdict)
