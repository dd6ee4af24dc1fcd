"""What the paper's grid costs, counted before anything is computed.

For a network of f operations an image, of which f_b from block b to its end, n calibration images,
t test images, P passes and C candidates a visit, a cell takes

    2 n f                      the float network's predictions; calibration
    P n f                      one forward a pass, whose block inputs are kept ...
    P n (f - f_b), each b      ... or, where they would not fit, a forward up to each block
    P C n f_b, each b          candidates: only from their block on
    n f_last                   the fitness of the start, from the last block on
    3 t f                      the test: float, first and evolved network

operations. f counts two for each multiplication with its addition, in matrix products and
convolutions only, as torch's FlopCounterMode finds them on the "meta" device, without weights.
Rounding and clamping come on top, and are bound by memory: time must be measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from timm.data import resolve_model_data_config
from torch.utils.flop_counter import FlopCounterMode

from evolq_lite.chain import chain_of
from evolq_lite.config import SearchConfig
from evolq_lite.evolve import TRACE_LIMIT
from evolq_lite.experiments.paper_grid import CALIBRATION, PASSES, VALIDATION, name_of
from evolq_lite.networks import build_skeleton, unfused


@dataclass(frozen=True)
class Cost:
    """One cell of a network: forwards of one image, whole or from a block on, and operations."""

    network: str
    operations: float  # of one whole forward
    blocks: int
    evaluations: int
    forwards: int
    search: float  # operations
    test: float


def count(network: str, passes: int = PASSES, tests: int = VALIDATION) -> Cost:
    """The cost of a cell; the same for all bit-widths, starts and seeds."""
    model = unfused(build_skeleton(network)).eval()
    x = torch.zeros(1, *resolve_model_data_config(model)["input_size"])
    x = x.to(next(model.parameters()).device)  # "meta", where timm could build it there
    chain, parts, kept = chain_of(model), [], 0
    with torch.no_grad():
        for _, segment, searchable in chain.segments:
            kept += x.numel() * x.element_size() * searchable
            try:
                with FlopCounterMode(display=False) as counter:
                    x = segment(x)
            except (AssertionError, RuntimeError) as error:
                why = str(error).splitlines()[0]
                raise ValueError(
                    f"the operations of {network} cannot be counted ({why}); name other --networks"
                ) from None
            parts.append(counter.get_total_flops())
    whole, n = sum(parts), CALIBRATION
    cycles, visits = SearchConfig().cycles, passes * len(chain.searchable)
    suffixes = [sum(parts[chain.index(name) :]) for name in chain.searchable]
    fits = kept * n <= TRACE_LIMIT
    # At most: what enters blocks before the first that changed is known from the pass before.
    inputs = passes * (whole if fits else sum(whole - suffix for suffix in suffixes))
    candidates = passes * cycles * sum(suffixes) + suffixes[-1]
    forwards = 2 + (passes if fits else visits) + cycles * visits + 1
    return Cost(
        network=network,
        operations=whole,
        blocks=len(suffixes),
        evaluations=cycles * visits + 1,
        forwards=n * forwards + 3 * tests,
        search=n * (2.0 * whole + inputs + candidates),
        test=3.0 * tests * whole,
    )


def tabulate(
    networks: Sequence[str], passes: int = PASSES, tests: int = VALIDATION
) -> pd.DataFrame:
    """One cell of each network, and their sum."""
    costs = [count(network, passes, tests) for network in networks]
    rows = [
        {
            "one cell of": f"{name_of(cost.network)} (`{cost.network}`)",
            "GFLOP an image": f"{cost.operations / 1e9:.1f}",
            "blocks": str(cost.blocks),
            "evaluations": f"{cost.evaluations:,}",
            "forwards of an image": f"{cost.forwards:,}",
            "PFLOP, search": f"{cost.search / 1e15:.1f}",
            "PFLOP, test": f"{cost.test / 1e15:.1f}",
        }
        for cost in costs
    ]
    total = {
        "one cell of": "each",
        "evaluations": f"{sum(cost.evaluations for cost in costs):,}",
        "forwards of an image": f"{sum(cost.forwards for cost in costs):,}",
        "PFLOP, search": f"{sum(cost.search for cost in costs) / 1e15:.1f}",
        "PFLOP, test": f"{sum(cost.test for cost in costs) / 1e15:.1f}",
    }
    return pd.DataFrame([*rows, {"GFLOP an image": "", "blocks": "", **total}], columns=[*rows[0]])
