"""Genome, objective, optimizers and the outer loop."""

import hashlib
import json
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from conftest import toy, toy_images
from torch.func import grad

from evolq_lite import (
    BlockObjective,
    EvolQ,
    QuantConfig,
    RandomSearch,
    SearchConfig,
    calibrate,
    chain_of,
    evolve,
    genome_of,
    info_nce,
    minimize,
    quantize,
)
from evolq_lite.evolve import Committed, Evaluated, evaluations_of, visits_of
from evolq_lite.objective import batches


@pytest.fixture(scope="module")
def problem():
    """A quantized toy ViT as a chain, images and float targets."""
    return make_problem()


def make_problem(name: str = "vit"):
    model, images = toy(name), toy_images(name, 9)
    qmodel = quantize(model, QuantConfig(weight_bits=3))
    calibrate(qmodel, images)
    with torch.no_grad():
        return chain_of(qmodel), images, model(images)


def state_hash(chain) -> str:
    digest = hashlib.sha256()
    for name, value in chain.model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


# genome


def test_writing_what_was_read_changes_nothing(problem):
    chain, *_ = problem
    before = state_hash(chain)
    for scales in ("attention", "weights", "all"):
        genome = genome_of(chain.model, chain.searchable, scales)
        genome.write(chain.model, genome.read(chain.model))
    assert state_hash(chain) == before


def test_genome_sizes_and_names(problem):
    chain, *_ = problem
    attention = genome_of(chain.model, ["blocks.1"])
    assert len(attention) == 24 * 3 + 24
    assert attention.describe(0) == "blocks.1.attn.qkv.weight_quant.scale[0]"
    assert attention.describe(72 + 5) == "blocks.1.attn.proj.weight_quant.scale[5]"
    weights = genome_of(chain.model, ["blocks.1"], "weights")
    assert len(weights) == len(attention) + 96 + 24
    assert len(genome_of(chain.model, ["blocks.1"], "all")) > len(weights)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_vector_of_the_wrong_length_raises(problem, extra):
    chain, *_ = problem
    genome = genome_of(chain.model, ["blocks.0"])
    with pytest.raises(ValueError, match=f"has {len(genome)} scales"):
        genome.write(chain.model, torch.ones(len(genome) + extra))


@pytest.mark.parametrize(("family", "block"), [("resnet", "layer2.0"), ("regnety", "s2.b1")])
def test_cnn_blocks_have_a_genome_too(family, block):
    chain, *_ = make_problem(family)
    assert block in chain.searchable
    genome = genome_of(chain.model, [block])
    assert all(".conv" in name or ".downsample" in name or ".se." in name for name in genome.names)
    assert any(".se.fc1." in name for name in genome.names) == (family == "regnety")


# objective


def whole_fitness(chain, images, targets, batch):
    with torch.no_grad():
        parts = [
            info_nce(chain(x), t)
            for x, t in zip(images.split(batch), targets.split(batch), strict=True)
        ]
        return torch.stack(parts).mean()


@pytest.mark.parametrize("block", ["blocks.0", "blocks.1"])
def test_objective_equals_the_whole_models_fitness_before_and_after_commit(block):
    chain, images, targets = make_problem()
    objective = BlockObjective(chain, block, images, targets, batch=3)
    assert torch.equal(
        objective(objective.start[None])[0], whole_fitness(chain, images, targets, 3)
    )
    vector = objective.start * 1.1
    value = objective(vector[None])[0]
    objective.commit(vector)
    assert torch.equal(value, whole_fitness(chain, images, targets, 3))
    assert torch.equal(objective.start, vector)


def test_evaluating_never_changes_the_model(problem):
    chain, images, targets = problem
    objective = BlockObjective(chain, "blocks.0", images, targets, batch=3, scales="all")
    before, start = state_hash(chain), objective.start
    values = objective(torch.stack([start * (1 + 0.1 * i) for i in range(4)]))
    assert len(values.unique()) > 1
    assert state_hash(chain) == before
    assert objective(start[None])[0] == values[0]


def test_gradient_through_the_straight_through_estimator(problem):
    chain, images, targets = problem
    objective = BlockObjective(chain, "blocks.1", images, targets, batch=9)
    gradient = grad(objective.loss)(objective.start)
    assert gradient.shape == objective.start.shape
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_a_last_batch_of_one_image_joins_its_neighbour(problem):
    chain, images, targets = problem
    objective = BlockObjective(chain, "blocks.1", images, targets, batch=4)
    assert [len(x) for x in objective.inputs] == [4, 5]


# optimizers


class Bowl:
    """A smooth function of two scales, least at (1, 2)."""

    start = torch.tensor([3.0, 3.0])

    def __call__(self, population: torch.Tensor) -> torch.Tensor:
        return (population - torch.tensor([1.0, 2.0])).square().sum(1)


def test_golden_trace_by_hand():
    """Two members, tournament of one, seed 7: every number is worked out from torch's generator."""
    start = torch.tensor([1.0, 0.05])
    search = EvolQ(start, 10.0, step=0.1, population=2, tournament=1, seed=7)
    g = torch.Generator().manual_seed(7)
    members = [(10.0, start), (10.0, start)]
    for value in (4.0, 7.0, 5.0, 1.0):
        drawn = int(torch.randint(2, (1,), generator=g))
        noise = (2 * torch.rand(2, generator=g) - 1) * 0.1
        expected = (members[drawn][1] + noise).abs()
        child = search.ask(1)
        assert torch.equal(child[0], expected)
        search.tell(child, torch.tensor([value]))
        members = sorted([*members, (value, expected)], key=lambda m: m[0])[:2]
    assert [m[0] for m in search.members] == [1.0, 4.0]
    assert search.best[1] == 1.0


def test_children_are_positive_and_within_the_step():
    start = torch.full((1000,), 1e-4)
    child = EvolQ(start, 1.0, step=1e-3).ask(1)[0]
    assert (child >= 0).all() and child.max() <= 1.1e-3 and child.min() < 1e-4
    relative = EvolQ(start, 1.0, step=0.01, relative=True).ask(1)[0]
    assert ((relative / start - 1).abs() <= 0.0101).all()


@pytest.mark.parametrize("algorithm", [EvolQ, RandomSearch])
def test_same_seed_same_run(algorithm):
    runs = [minimize(Bowl(), algorithm(Bowl.start, 5.0, 0.3, seed=s), 40) for s in (1, 1, 2)]
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])


def test_evolq_descends_and_beats_random_search_in_a_bowl():
    evolved = minimize(Bowl(), EvolQ(Bowl.start, 5.0, 0.3), 100)[1]
    assert evolved < 0.1 < minimize(Bowl(), RandomSearch(Bowl.start, 5.0, 0.3), 100)[1]


@pytest.mark.parametrize("algorithm", [EvolQ, RandomSearch])
@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [math.nan, 0.5, math.nan], [math.inf, 1.0, 2]])
def test_ties_and_nan_do_not_crash_and_best_never_gets_worse(algorithm, values):
    search = algorithm(torch.ones(3), 1.0, 0.1)
    best = search.best[1]
    for _ in range(5):
        search.tell(search.ask(3), torch.tensor(values))
        assert search.best[1] <= best
        best = search.best[1]
    assert best == min(1.0, *[v for v in values if v == v])


def test_a_failed_start_is_left_behind():
    search = EvolQ(torch.ones(2), math.nan, 0.1, population=3)
    search.tell(search.ask(1), torch.tensor([5.0]))
    assert search.best[1] == 5.0


# the outer loop


def run(config, step=0.02, **options):
    chain, images, targets = make_problem()
    events = list(evolve(chain, images, targets, config, step, **options))
    history = [event for event in events if isinstance(event, Evaluated)]
    return chain, history, events[-1].fitness, events, (images, targets)


SMALL = SearchConfig(passes=2, cycles=3, batch=3)


def test_order_count_and_fitness_of_a_run():
    chain, history, fitness, _, (images, targets) = run(SMALL)
    assert [e.block for e in history[:7]] == ["blocks.1"] * 4 + ["blocks.0"] * 3
    assert len(history) == evaluations_of(chain, SMALL) == 13
    assert [e.pass_ for e in history] == [0] * 7 + [1] * 6
    best = min(e.fitness for e in history)
    assert fitness == best == whole_fitness(chain, images, targets, 3)
    assert best < history[0].fitness, "a run that never gains tests nothing"
    assert json.loads(json.dumps(history[0].as_dict()))["pass"] == 0


def test_only_attention_scales_change_by_default():
    chain, *_ = run(SMALL)
    fresh, *_ = make_problem()
    changed = {
        name
        for name, value in chain.model.state_dict().items()
        if not torch.equal(value, fresh.model.state_dict()[name])
    }
    assert changed and all(".attn." in n and n.endswith("weight_quant.scale") for n in changed)


def test_commits_tell_what_the_model_holds():
    chain, images, targets = make_problem()
    seen = []
    for event in evolve(chain, images, targets, SMALL, 0.02):
        if isinstance(event, Committed):
            assert event.fitness == whole_fitness(chain, images, targets, 3)
            seen.append(event.visits)
    assert seen == [1, 2, 3, 4]


CONFIGS = [SMALL, replace(SMALL, mutation="adaptive"), replace(SMALL, parallel=2)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stop", range(14))
def test_a_replayed_run_ends_like_one_that_was_not_stopped(stop, config):
    """Stopped after any evaluation, in the middle of a visit or of a population too."""
    whole, history, fitness, *_ = run(config)
    part, images, targets = make_problem()
    events = list(evolve(part, images, targets, config, 0.02, past=history[:stop]))
    assert events[-1].fitness == fitness
    assert state_hash(part) == state_hash(whole)
    again = [event for event in events if isinstance(event, Evaluated)]
    assert again[:stop] == history[:stop]
    assert [replace(e, seconds=0.0) for e in again] == [replace(e, seconds=0.0) for e in history]


def test_a_replay_needs_no_forward_pass(monkeypatch):
    config = replace(SMALL, mutation="adaptive")
    whole, history, *_ = run(config)
    chain, images, targets = make_problem()

    def forward(*_):
        raise AssertionError("a replay computes nothing")

    monkeypatch.setattr(type(chain), "forward", forward)
    monkeypatch.setattr(type(chain), "trace", forward)
    list(evolve(chain, images, targets, config, 0.02, past=history))
    assert state_hash(chain) == state_hash(whole)


def test_a_break_leaves_the_last_commit_in_the_model():
    chain, images, targets = make_problem()
    for event in evolve(chain, images, targets, SMALL, 0.02):
        if isinstance(event, Committed) and event.visits == 2:
            break
    assert event.fitness == whole_fitness(chain, images, targets, 3)


def test_the_history_of_another_run_is_refused():
    _, history, *_ = run(SMALL)
    wrong = [replace(history[0], block="blocks.0"), *history[1:5]]
    with pytest.raises(ValueError, match="belongs to another run"):
        run(SMALL, past=wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "layer"},
        {"granularity": "global"},
        {"order": "first_last"},
        {"scales": "weights"},
        {"scales": "all", "mutation": "relative", "step": 0.01},
        {"algorithm": "random"},
        {"mutation": "adaptive", "scales": "weights"},
        *({"fitness": name} for name in ("mse", "cosine", "kl", "fisher")),
    ],
)
def test_every_deviation_runs_and_never_gets_worse(options):
    config = SearchConfig(**{"passes": 1, "cycles": 2, "batch": 3, **options})
    chain, history, fitness, _, _ = run(config, step=config.step or 0.01)
    assert len(history) == evaluations_of(chain, config)
    assert fitness <= history[0].fitness
    labels = {visit.label for visit in visits_of(chain, config)}
    assert {e.block for e in history} == labels


evolving = import_module("evolq_lite.evolve")  # the package's attribute is the function


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step": 1e-6},  # hardly anything is accepted
        {"granularity": "layer", "scales": "all", "mutation": "relative"},
        {"granularity": "global", "mutation": "relative"},
    ],
)
def test_kept_inputs_and_recomputed_ones_agree(monkeypatch, options):
    """Over several passes, from which inputs are kept as far as nothing has changed before them."""
    config = replace(SMALL, passes=4, **options)
    step = config.step or 0.01
    kept = run(config, step=step)
    half = run(config, step=step, past=kept[1][: len(kept[1]) // 2])
    monkeypatch.setattr(evolving, "TRACE_LIMIT", 0)
    anew = run(config, step=step)
    assert state_hash(kept[0]) == state_hash(half[0]) == state_hash(anew[0])
    values = [e.fitness for e in anew[1]]
    assert [e.fitness for e in kept[1]] == [e.fitness for e in half[1]] == values


def test_inputs_are_computed_from_the_first_change_on(monkeypatch):
    """What enters the blocks before it is known from the pass before; without a change, all is."""
    chain, _, _, _, (images, _) = run(SMALL)
    calls = []
    trace = type(chain).trace

    def watch(self, x, last=None, start=0):
        calls.append(start)
        return trace(self, x, last, start)

    monkeypatch.setattr(type(chain), "trace", watch)
    inputs = evolving.Inputs(chain, images, SMALL.batch, keep=True)
    first, last = (chain.index(chain.searchable[i]) for i in (0, -1))
    parts = batches(images, SMALL.batch)
    for changed, begins in ((None, 0), (last, None), (first, first), (None, None)):
        if changed is not None:
            genome = genome_of(chain.model, [chain.names[changed]])
            genome.write(chain.model, genome.read(chain.model) * 1.5)
            inputs.change(changed)
        calls.clear()
        found = inputs.of(last)
        assert calls == ([] if begins is None else [begins] * len(parts))
        assert all(torch.equal(x, chain(part, stop=last)) for x, part in zip(found, parts))


def test_width_is_the_papers_unless_given():
    assert SearchConfig().width(3) == SearchConfig().width(4) == 1e-3
    assert SearchConfig().width(8) == 1e-4
    assert SearchConfig(step=0.5).width(4) == 0.5
    assert SearchConfig(mutation="relative").width(4) == 1e-2
