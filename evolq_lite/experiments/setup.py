"""What the experiments share: a quantized embedded network with its data, and the test images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from evolq_lite.chain import Chain, chain_of
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, quantize
from evolq_lite.data import Demo, load_demo, test_faces
from evolq_lite.descent import descend
from evolq_lite.evaluate import LOSSES, pack_values, packed, predict, score_batch
from evolq_lite.evolve import Committed, Evaluated, evolve
from evolq_lite.experiments.results import Result
from evolq_lite.fitness import fitness_of
from evolq_lite.genome import Vector
from evolq_lite.objective import BlockObjective
from evolq_lite.rounding import round_weights


@dataclass(frozen=True)
class Setting:
    """A float network, its calibrated quantized form, and the calibration images."""

    demo: Demo
    qmodel: nn.Module
    chain: Chain


def prepare(
    network: str, images: int, seed: int, config: QuantConfig, choose_integers: bool = True
) -> Setting:
    """Quantize an embedded network, calibrated on `images` training images drawn by `seed`.

    `choose_integers` rounds it as the config says, too.
    """
    return prepare_demo(load_demo(network, images, seed), config, choose_integers)


def prepare_demo(demo: Demo, config: QuantConfig, choose_integers: bool = True) -> Setting:
    """The same for any network with its calibration images."""
    qmodel = quantize(demo.model, config)
    calibrate(qmodel, demo.calibration, config)
    chain = chain_of(qmodel)
    chain.fit_chunk(demo.calibration[:1])
    setting = Setting(demo, qmodel, chain)
    if choose_integers:
        round_setting(setting, config)
    return setting


def round_setting(setting: Setting, config: QuantConfig) -> None:
    """Choose the integers of its weights in the config's way, in place."""
    for _ in round_weights(setting.qmodel, setting.demo.calibration, config.rounding):
        pass


def search_scales(
    setting: Setting,
    config: SearchConfig,
    visits: int | None = None,
    see: Callable[[Committed], None] = lambda visit: None,
) -> Result:
    """Search the setting's scales in place, for so many visits or all of them.

    `see` is shown each visit when the network holds its best. Returns what the search says of
    itself.
    """
    history: list[Evaluated] = []
    for event in evolve(setting.chain, setting.demo.calibration, setting.demo.targets, config):
        if isinstance(event, Evaluated):
            history.append(event)
            continue
        see(event)
        if event.visits == visits:
            break
    return tell_search(history)


def tell_search(history: Sequence[Evaluated]) -> Result:
    """What a search says of itself."""
    return {
        "fitness_before": history[0].fitness,
        "fitness": min(event.fitness for event in history),
        "evaluations": len(history),
        "accepted": sum(event.accepted for event in history[1:]),
        "search_seconds": round(sum(event.seconds for event in history), 2),
    }


def search_at_once(
    setting: Setting,
    config: SearchConfig,
    search: Callable[[BlockObjective, float, int], Vector],
) -> Result:
    """Search all scales at once, in place, at the cost of the config's search by blocks.

    `search` gets an objective, the fitness of its start and a budget in forwards of the whole
    network; what it returns is kept if it is better.
    """
    chain, demo = setting.chain, setting.demo
    blocks = chain.searchable
    # A candidate of a block runs the network from there on.
    shares = [1 - chain.index(block) / len(chain.names) for block in blocks]
    budget = round(config.passes * config.cycles * sum(shares))
    objective = BlockObjective(
        chain,
        blocks,
        demo.calibration,
        demo.targets,
        fitness_of(config.fitness, config.temperature),
        config.batch,
        config.scales,
    )
    before = float(objective(objective.start[None])[0])
    vector = search(objective, before, budget)
    fitness = float(objective(vector[None])[0])  # as the network is executed
    if fitness < before:
        objective.commit(vector)
    return {"fitness_before": before, "fitness": min(before, fitness)}


def follow_gradient(setting: Setting, config: SearchConfig, optimizer: str, step: float) -> Result:
    """Descend on all scales at once, in place, for as many forwards as the search by blocks.

    `optimizer` and the relative `step` are those of `descend`.
    """
    return search_at_once(
        setting,
        config,
        lambda objective, _, budget: descend(objective, optimizer, step, budget)[0],
    )


@torch.no_grad()
def measure_fitness(
    setting: Setting, config: SearchConfig, images: Tensor, targets: Tensor
) -> float:
    """The mean loss of a search on any images (n, channels, height, width) with their targets."""
    loss = fitness_of(config.fitness, config.temperature)
    parts = zip(images.split(config.batch), targets.split(config.batch))
    return float(torch.stack([loss(setting.chain(x), t) for x, t in parts]).mean())


def search_and_generalize(
    setting: Setting, config: SearchConfig, fresh: tuple[Tensor, Tensor]
) -> Result:
    """`search_scales`, and the same loss on fresh images with their targets, before and after."""
    before = measure_fitness(setting, config, *fresh)
    found = search_scales(setting, config)
    after = measure_fitness(setting, config, *fresh)
    return {**found, "fresh_before": before, "fresh": after}


@cache
def load_test() -> tuple[Tensor, Tensor]:
    """The embedded test images and labels; experiments look at them after all choices are made."""
    return load_demo("cnn", 2).test


def measure_top1(model: nn.Module, every: int = 1) -> Result:
    """Top-1 on every n-th test image, with what is needed to pair it with other results."""
    images, labels = load_test()
    images, labels = images[::every], labels[::every]
    correct = predict({"it": model}, images.split(200))["it"] == labels
    return {
        "top1": float(correct.float().mean()),
        "images": len(labels),
        "correct": packed(correct),
    }


@cache
@torch.no_grad()
def float_logits(network: str, every: int = 1) -> Tensor:
    """What an embedded float network says of every n-th test image, (9920 / n, 62)."""
    images, _ = load_test()
    model = load_demo(network, 2).model
    return torch.cat([model(x) for x in images[::every].split(200)])


def measure_test(setting: Setting, every: int = 1) -> Result:
    """Top-1, KL and cross-entropy of the quantized network on every n-th test image.

    Losses are kept as the mean of each typeface, because it is typefaces that are drawn.
    """
    images, labels = (x[::every] for x in load_test())
    teacher, faces = float_logits(setting.demo.name, every), test_faces()[::every]
    with torch.no_grad():
        logits = torch.cat([setting.qmodel(x) for x in images.split(200)])
    found = score_batch(logits, teacher, labels)
    _, numbers, counts = faces.unique(return_inverse=True, return_counts=True)
    losses = {
        name: pack_values(
            torch.zeros(len(counts)).index_add_(0, numbers, getattr(found, name)) / counts
        )
        for name in LOSSES
    }
    return {
        "top1": float(found.right.float().mean()),
        "images": len(labels),
        "correct": packed(found.right),
        **losses,
    }


def draw_fresh_images(demo: Demo, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """More training images with float logits, none of them among the calibration images of `seed`.

    One seed draws one order of all training images, of which calibration takes the first.
    """
    used = len(demo.calibration)
    more = load_demo(demo.name, used + images, seed)
    return more.calibration[used:], more.targets[used:]
