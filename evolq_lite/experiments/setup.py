"""What the experiments share: a quantized embedded network with its data, and the test images."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from evolq_lite.chain import Chain, chain_of
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import Demo, load_demo
from evolq_lite.evaluate import packed, predict
from evolq_lite.evolve import Evaluation, evolve
from evolq_lite.experiments.cells import Result
from evolq_lite.fitness import fitness_of


@dataclass(frozen=True)
class Setting:
    """A float network, its calibrated quantized form, and the calibration images."""

    demo: Demo
    qmodel: nn.Module
    chain: Chain
    config: QuantConfig


def setting(network: str, images: int, seed: int, config: QuantConfig) -> Setting:
    """Quantize an embedded network, calibrated on `images` training images drawn by `seed`."""
    demo = load_demo(network, images, seed)
    qmodel = quantize(demo.model, config)
    calibrate(qmodel, demo.calibration, config)
    chain = chain_of(qmodel)
    chain.fit_chunk(demo.calibration[:1])
    return Setting(demo, qmodel, chain, config)


class Enough(Exception):
    """Stops a search."""


def evolved(
    made: Setting,
    search: SearchConfig,
    on_visit: Callable[[int, float], None] = lambda visits, fitness: None,
    most_visits: float = float("inf"),
) -> Result:
    """Search the setting's scales in place; returns what the search says of itself."""
    history: list[Evaluation] = []

    def visited(visits: int, fitness: float) -> None:
        on_visit(visits, fitness)
        if visits >= most_visits:
            raise Enough

    with suppress(Enough):
        evolve(
            made.chain,
            made.demo.calibration,
            made.demo.targets,
            search,
            search.width(made.config.weight_bits),
            history.append,
            visited,
        )
    return {
        "fitness_before": history[0].fitness,
        "fitness": min(e.fitness for e in history),
        "evaluations": len(history),
        "accepted": sum(e.accepted for e in history[1:]),
        "search_seconds": round(sum(e.seconds for e in history), 2),
    }


@torch.no_grad()
def fitness_on(made: Setting, search: SearchConfig, images: Tensor, targets: Tensor) -> float:
    """The mean loss of a search on any images (n, channels, height, width) with their targets."""
    loss = fitness_of(search.fitness, search.temperature)
    parts = zip(images.split(search.batch), targets.split(search.batch))
    return float(torch.stack([loss(made.chain(x), t) for x, t in parts]).mean())


@cache
def test_part() -> tuple[Tensor, Tensor]:
    """The embedded test images and labels; experiments look at them after all choices are made."""
    return load_demo("cnn", 2).test


def tested(model: nn.Module, every: int = 1) -> Result:
    """Top-1 on every n-th test image, with what is needed to pair it with other results."""
    images, labels = test_part()
    images, labels = images[::every], labels[::every]
    correct = predict({"it": model}, images.split(200))["it"] == labels
    return {
        "top1": float(correct.float().mean()),
        "images": len(labels),
        "correct": packed(correct),
    }


def fresh_images(demo: Demo, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """More training images with float logits, none of them among the calibration images of `seed`.

    One seed draws one order of all training images, of which calibration takes the first.
    """
    used = len(demo.calibration)
    more = load_demo(demo.name, used + images, seed)
    return more.calibration[used:], more.targets[used:]
