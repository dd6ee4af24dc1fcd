"""Bits by layer: the budget is kept, candidates are what they say, runs resume and are saved."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import pandas as pd
import pytest
import torch
from commands import call, tree
from conftest import toy, toy_images
from torch import Tensor, nn

from evolq_lite import (
    QuantConfig,
    SearchConfig,
    calibrate,
    chain_of,
    cli,
    describe,
    info_nce,
    load_scales,
    quantize,
    save_scales,
    twin,
)
from evolq_lite.bits import (
    BitsGenome,
    BitsObjective,
    BitsTable,
    EvolveBits,
    WalkBits,
    bits_genome,
    bits_table,
    evolve_bits,
    evolve_both,
    layer_bits,
    mean_bits,
    mutate_bits,
    narrow,
    rank_layers,
    spread_bits,
    start_bits,
    tell_bits,
    tensors_of,
    write_bits,
)
from evolq_lite.data import test_faces as typefaces
from evolq_lite.evaluate import SeedComparison, pack_values, packed
from evolq_lite.evolve import Committed, Evaluated
from evolq_lite.experiments import c11_bits
from evolq_lite.experiments.verdicts import WORDS
from evolq_lite.figures import bits_figure
from evolq_lite.rounding import quant_layers, round_weights
from evolq_lite.runs.folder import RunFolder
from evolq_lite.runs.run import Run
from evolq_lite.runs.scales import extras_of, scales_of
from evolq_lite.runs.shipping import open_run, read_run
from evolq_lite.runs.source import Folders
from evolq_lite.runs.workers import Answer, Task, evaluate
from evolq_lite.search import minimize

CONFIG = QuantConfig(weight_bits=4, rounding="gptq", edge_bits=8, execution="simulate")
WIDTHS = (2, 3, 5)
Problem = tuple[nn.Module, Tensor, Tensor, BitsGenome, BitsTable]


def calibrated(config: QuantConfig = CONFIG) -> nn.Module:
    qmodel = quantize(toy("vit"), config)
    calibrate(qmodel, toy_images("vit"))
    return qmodel


@pytest.fixture(scope="module")
def prepared() -> Problem:
    """A network, images, targets, a genome of mean 2.5 bits, and its table."""
    qmodel, images = calibrated(), toy_images("vit")
    genome = bits_genome(qmodel, WIDTHS, mean=2.5)
    with torch.no_grad():
        targets = toy("vit")(images)
    return qmodel, images, targets, genome, bits_table(qmodel, images, genome)


@pytest.fixture
def problem(prepared: Problem) -> Problem:
    """The same with a network of the test's own, which holds the start."""
    qmodel, images, targets, genome, table = prepared
    own = twin(qmodel)
    start_bits(own, genome, table)
    return own, images, targets, genome, table


def full(genome: BitsGenome, vector: Tensor) -> bool:
    """Whether a vector is within the budget, and no step up would be."""
    left = genome.budget - genome.cost(vector)
    steps = [
        (up - int(b)) * size
        for b, size in zip(vector.tolist(), genome.sizes)
        if (up := genome.step(int(b), 1)) is not None
    ]
    return left >= 0 and all(step > left for step in steps)


# The budget


def test_a_layer_counts_by_its_weights() -> None:
    genome = BitsGenome(("small", "large"), (100, 300), (2, 4), 1200)
    assert mean_bits(genome, torch.tensor([4.0, 2.0])) == (100 * 4 + 300 * 2) / 400
    assert genome.unpack(torch.tensor([4.0, 2.0])) == {"small": 4, "large": 2}


def test_edges_with_bits_of_their_own_are_no_part_of_genome_and_mean(problem: Problem) -> None:
    qmodel, _, _, genome, _ = problem
    assert "head" not in genome.names and "patch_embed.proj" not in genome.names
    assert set(quant_layers(qmodel)) - set(genome.names) == {"head", "patch_embed.proj"}
    assert layer_bits(qmodel)["head"] == 8
    whole = bits_genome(calibrated(replace(CONFIG, edge_bits=None)), WIDTHS, mean=2.5)
    assert set(whole.names) == set(quant_layers(qmodel))


@pytest.mark.parametrize("mean", [2.3, 3, 4.9])
@pytest.mark.parametrize("sizes", [(10,) * 8, (5, 70, 3, 200, 41, 41, 8, 1)])
def test_mutations_never_exceed_the_budget_and_spend_it(
    mean: float, sizes: tuple[int, ...]
) -> None:
    genome = BitsGenome(tuple("abcdefgh"), sizes, WIDTHS, int(mean * sum(sizes)))
    generator = torch.Generator().manual_seed(0)
    vector, met = spread_bits(genome), set()
    for _ in range(200):
        assert full(genome, vector)
        assert set(vector.tolist()) <= set(WIDTHS)
        met.add(tuple(vector.tolist()))
        vector = mutate_bits(genome, vector, generator)
    assert len(met) >= 4


def test_the_start_is_uniform_where_the_mean_is_a_width_and_else_even() -> None:
    genome = BitsGenome(tuple("abcdef"), (10,) * 6, (2, 3, 4), 180)
    assert spread_bits(genome).tolist() == [3] * 6
    half = replace(genome, budget=150)
    assert spread_bits(half).tolist() == [2, 3, 2, 3, 2, 3]


def test_a_budget_in_bytes_is_that_of_the_mean() -> None:
    qmodel = calibrated()
    genome = bits_genome(qmodel, WIDTHS, mean=3)
    assert bits_genome(qmodel, WIDTHS, size=genome.budget // 8).budget == genome.budget


@pytest.mark.parametrize("size", [1, 10**9])
def test_a_budget_that_leaves_no_choice_is_refused_with_the_possible_ones(size: int) -> None:
    with pytest.raises(
        ValueError, match=f"{size} bytes leaves no choice: the 8 layers .* bytes at 2"
    ):
        bits_genome(calibrated(), WIDTHS, size=size)


def test_a_mean_that_pays_for_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a mean of 2\.001 bits leaves no choice"):
        bits_genome(calibrated(), WIDTHS, mean=2.001)


def test_a_network_of_float_weights_has_no_bits_to_search() -> None:
    qmodel = calibrated(QuantConfig(float_points="weights"))
    with pytest.raises(ValueError, match="weights stay float"):
        bits_genome(qmodel, WIDTHS, mean=3)


# The table


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_uniform_row_of_the_table_is_the_uniform_network(rounding: str) -> None:
    images, config = toy_images("vit"), replace(CONFIG, rounding=rounding, bias_correction=True)
    qmodel = calibrated(config)
    genome = bits_genome(qmodel, (3, 6), mean=3.5)
    table = bits_table(qmodel, images, genome)
    start_bits(qmodel, genome, table)
    write_bits(qmodel, genome, table, torch.full((len(genome),), 3.0))
    uniform = quantize(toy("vit"), replace(config, weight_bits=3))
    calibrate(uniform, images)
    list(round_weights(uniform, images, rounding))
    with torch.no_grad():
        assert torch.equal(qmodel(images), uniform(images))


def test_making_the_table_leaves_the_network_as_it_was() -> None:
    qmodel, images = calibrated(), toy_images("vit")
    with torch.no_grad():
        before = qmodel(images)
        bits_table(qmodel, images, bits_genome(qmodel, (2, 3), mean=2.5))
        assert torch.equal(qmodel(images), before)


def test_describe_shows_each_layers_bits_and_the_mean(problem: Problem) -> None:
    qmodel, _, _, genome, table = problem
    vector = torch.full((len(genome),), 2.0)
    vector[1] = 5
    write_bits(qmodel, genome, table, vector)
    told = {line.split()[0]: line.split()[1] for line in describe(qmodel).splitlines()}
    assert told[f"{genome.names[1]}.weight_quant"] == "5"
    assert told[f"{genome.names[2]}.weight_quant"] == "2"
    assert told["head.weight_quant"] == "8"
    assert "bits on average" in describe(qmodel)
    assert genome.read(qmodel).tolist() == vector.tolist()


# The search


def test_the_objective_is_the_whole_networks_fitness_and_leaves_it_alone(problem: Problem) -> None:
    qmodel, images, targets, genome, table = problem
    objective = BitsObjective(chain_of(qmodel), genome, table, images, targets, batch=6)
    child = mutate_bits(genome, objective.start, torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = qmodel(images)
        values = objective(torch.stack([objective.start, child, objective.start]))
        assert torch.equal(qmodel(images), before)
        for vector, value in ((objective.start, values[0]), (child, values[1])):
            write_bits(qmodel, genome, table, vector)
            parts = [info_nce(qmodel(x), t) for x, t in zip(images.split(6), targets.split(6))]
            assert torch.equal(torch.stack(parts).mean(), value)
    assert values[0] == values[2] != values[1] and objective.evaluations == 2


def search(problem: Problem, **options: object) -> tuple[list[Evaluated], Tensor]:
    """A search's history, and the genome that the network then has."""
    qmodel, images, targets, genome, table = problem
    past = options.pop("past", ())
    config = SearchConfig(search="bits", mean_bits=2.5, batch=6, **options)
    events = list(evolve_bits(chain_of(qmodel), images, targets, config, genome, table, past))
    assert isinstance(events[-1], Committed)
    found = [event for event in events if isinstance(event, Evaluated)]
    assert events[-1].fitness == min(event.fitness for event in found)
    return found, genome.read(qmodel)


@pytest.mark.parametrize("algorithm", ["evolq", "random"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_a_search_is_replayed_from_its_history(
    problem: Problem, algorithm: str, parallel: int
) -> None:
    options = {"evaluations": 10, "algorithm": algorithm, "parallel": parallel, "seed": 3}
    qmodel, _, _, genome, table = problem
    whole, bits = search(problem, **options)
    assert len(whole) == 11 and full(genome, bits)
    assert len({event.fitness for event in whole}) > 8  # no genome was tried twice
    for known in (4, 11):
        start_bits(qmodel, genome, table)
        again, same = search(problem, **options, past=whole[:known])
        assert [replace(e, seconds=0) for e in again] == [replace(e, seconds=0) for e in whole]
        assert torch.equal(same, bits)
    start_bits(qmodel, genome, table)
    other, _ = search(problem, **{**options, "seed": 4})
    assert [e.fitness for e in other[1:]] != [e.fitness for e in whole[1:]]


class Needs:
    """A loss that is known: layers 0 and 1 gain most from bits."""

    start = torch.tensor([2.0, 3, 2, 3, 2, 3, 2, 3])
    need = torch.tensor([9.0, 9, 1, 1, 1, 1, 1, 1])

    def __call__(self, population: Tensor) -> Tensor:
        return (self.need * 2.0**-population).sum(1)


def test_evolution_finds_the_layers_that_need_bits() -> None:
    genome = BitsGenome(tuple("abcdefgh"), (10,) * 8, (2, 3, 4), 200)
    assert torch.equal(spread_bits(genome), Needs.start)
    value = float(Needs()(Needs.start[None])[0])
    best, found = minimize(Needs(), EvolveBits(genome, Needs.start, value), 200)
    assert best.tolist() == [4, 4, 2, 2, 2, 2, 2, 2]
    _, by_chance = minimize(Needs(), WalkBits(genome, Needs.start, value), 20)
    assert found <= by_chance < value


def test_the_ranking_measures_each_layer_once_and_keeps_the_budget(problem: Problem) -> None:
    qmodel, images, targets, genome, table = problem
    objective = BitsObjective(chain_of(qmodel), genome, table, images, targets, batch=6)
    assert full(genome, rank_layers(objective))
    assert objective.evaluations == len(genome) * (len(WIDTHS) - 1) + 1


def test_the_ranking_narrows_where_a_saved_bit_costs_least() -> None:
    genome = BitsGenome(("a", "b", "c"), (10, 10, 40), (2, 4), 200)
    lost = {(0, 2): 5.0, (1, 2): 1.0, (2, 2): 3.0} | {(i, 4): 0.0 for i in range(3)}
    # c saves 80 bits for 3, b 20 for 1, a 20 for 5; 40 must go
    assert narrow(genome, lost).tolist() == [4, 4, 2]
    assert narrow(replace(genome, budget=140), lost).tolist() == [4, 2, 2]


# Bits, then scales


def search_both(
    problem: Problem, past: Iterable[Evaluated] = (), **options: object
) -> tuple[list[Evaluated], list[Committed]]:
    """A search's evaluations and commits."""
    qmodel, images, targets, genome, table = problem
    config = SearchConfig(
        search="both", mean_bits=2.5, batch=6, evaluations=5, passes=2, cycles=2, **options
    )
    events = list(evolve_both(chain_of(qmodel), images, targets, config, genome, table, past))
    commits = [event for event in events if isinstance(event, Committed)]
    return [event for event in events if isinstance(event, Evaluated)], commits


def tensors(qmodel: nn.Module) -> dict[str, Tensor]:
    """Scales, zero points and integers."""
    return {**scales_of(qmodel), **extras_of(qmodel)}


@pytest.mark.parametrize("integers", ["free", "frozen"])
def test_both_searches_bits_and_then_the_scales_of_what_was_found(
    problem: Problem, integers: str
) -> None:
    qmodel, images, targets, genome, table = problem
    first, found = search(problem, evaluations=5)
    chosen = {name: layer.chosen[0] for name, layer in quant_layers(qmodel).items()}
    held = tensors(qmodel)
    start_bits(qmodel, genome, table)
    whole, commits = search_both(problem, integers=integers, scales="all")
    assert [replace(e, seconds=0) for e in whole[:6]] == [replace(e, seconds=0) for e in first]
    blocks = chain_of(qmodel).searchable
    assert [e.block for e in whole[6:]] == 2 * [b for block in blocks[::-1] for b in [block] * 2]
    assert [e.visit for e in whole[6::2]] == list(range(1, 1 + 2 * len(blocks)))
    assert [commit.visits for commit in commits] == list(range(1, 2 + 2 * len(blocks)))
    assert genome.read(qmodel).tolist() == found.tolist() and full(genome, found)
    assert any(e.accepted for e in whole[6:]), "no scale was better: this tested nothing"
    assert any(not torch.equal(now, held[name]) for name, now in tensors(qmodel).items())
    if integers == "frozen":
        for name, layer in quant_layers(qmodel).items():
            assert torch.equal(layer.weight_quant.fixed, chosen[name])
    with torch.no_grad():
        parts = [info_nce(qmodel(x), t) for x, t in zip(images.split(6), targets.split(6))]
    assert float(torch.stack(parts).mean()) == min(e.fitness for e in whole) == commits[-1].fitness


def test_a_search_of_scales_leaves_the_table_as_it_was(problem: Problem) -> None:
    """To nearest there are no integers: a layer's scale is all that it takes from the table."""
    _, images, targets, genome, _ = problem
    qmodel = calibrated(replace(CONFIG, rounding="nearest"))
    table = bits_table(qmodel, images, genome)
    start_bits(qmodel, genome, table)
    before = {name: tensor.clone() for name, tensor in tensors_of(table).items()}
    whole, _ = search_both((qmodel, images, targets, genome, table), scales="all")
    assert any(e.accepted for e in whole[6:]), "no scale was moved: this tested nothing"
    assert all(torch.equal(before[name], now) for name, now in tensors_of(table).items())


@pytest.mark.parametrize("known", [3, 6, 7, 99])
def test_a_search_of_both_is_replayed_from_its_history(problem: Problem, known: int) -> None:
    qmodel, _, _, genome, table = problem
    whole, commits = search_both(problem, seed=1)
    held = tensors(qmodel)
    start_bits(qmodel, genome, table)
    again, same = search_both(problem, whole[:known], seed=1)
    assert [replace(e, seconds=0) for e in again] == [replace(e, seconds=0) for e in whole]
    assert same == commits
    assert all(torch.equal(held[name], now) for name, now in tensors(qmodel).items())


# Saving and showing


def test_scales_are_saved_with_bits_and_put_into_an_equal_network(
    problem: Problem, tmp_path
) -> None:
    qmodel, _, _, genome, _ = problem
    save_scales(tmp_path / "it.safetensors", qmodel, visits=1)
    other = calibrated()
    assert layer_bits(other) != layer_bits(qmodel)
    assert load_scales(tmp_path / "it.safetensors", other)["visits"] == 1
    assert layer_bits(other) == layer_bits(qmodel)
    save_scales(tmp_path / "uniform.safetensors", calibrated())
    load_scales(tmp_path / "uniform.safetensors", other)
    assert set(genome.read(other).tolist()) == {4}


@pytest.mark.parametrize("bits", [{"nobody": 3}, {"head": 9}, {"head": "3"}, [3], {"head": True}])
def test_bits_of_another_network_are_refused(tmp_path, bits: object) -> None:
    qmodel, path = calibrated(), tmp_path / "it.safetensors"
    save_scales(path, qmodel, bits=bits)
    with pytest.raises(ValueError, match=r"the bits in .* belong to another network"):
        load_scales(path, qmodel)


def test_bits_are_shown_layer_by_layer() -> None:
    before, after = {"b.qkv": 2, "b.fc1": 3}, {"b.qkv": 4, "b.fc1": 2}
    alt = bits_figure(before, after).get_label()
    assert "4 in b.qkv" in alt and "2 in b.fc1" in alt and "1 went up, 1 down" in alt
    assert tell_bits(before, after).splitlines()[1].split() == ["b.qkv", "2", "4"]


# Runs

DEMO = ("demo", "--search", "bits", "--calibration-images", 20, "--batch", 10, "--threads", 1)
SMALL = ("--mean-bits", 2.5, "--widths", "2,3", "--evaluations", 4, "--rounding", "gptq")


def run_bits(folders: dict[str, object], out: str, *more: object) -> int:
    """The exit status of a small run into a folder."""
    pairs = [part for pair in {**folders, "--out": out}.items() for part in pair]
    return call("run", *pairs, "--search", "bits", *SMALL, "--edge-bits", 8, "--threads", 1, *more)


@pytest.mark.usefixtures("few_factors")
def test_a_run_of_bits_resumes_and_leaves_its_bits(
    folders: dict[str, object], tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_bits(folders, "whole") == 0
    said = capsys.readouterr().out
    assert re.search(r"W2\.\d+A8 evolved", said) and re.search(r"layer +before +evolved", said)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["evaluations"] == 5 and set(summary["bits"].values()) == {2, 3, 8}
    assert (tmp_path / "whole" / "bits.png").read_bytes().startswith(b"\x89PNG")
    append = RunFolder.append

    def stop(self: RunFolder, event: Evaluated) -> None:
        append(self, event)
        if event.cycle == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", stop)
        assert run_bits(folders, "part") == 130
    assert run_bits(folders, "part", "--resume") == 0
    histories = [RunFolder(tmp_path / name).history() for name in ("whole", "part")]
    assert len({tuple(replace(e, seconds=0) for e in history) for history in histories}) == 1
    files = [(tmp_path / name / "scales.safetensors").read_bytes() for name in ("whole", "part")]
    assert files[0] == files[1]


class Here:
    """Workers without processes of their own."""

    stamp = None

    def answer(self, tasks: list[Task], rounding: bytes) -> list[Answer]:
        return [evaluate(task, rounding) for task in tasks]


@pytest.mark.usefixtures("few_factors")
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("bits", {}), ("both", {"passes": 1}), ("both", {"passes": 1, "integers": "frozen"})],
)
def test_a_worker_computes_what_the_run_computes(
    folders: dict[str, object], tmp_path, rounding: str, kind: str, more: dict[str, object]
) -> None:
    """Weights with zero points, whose integers fit their own bits only, and shifted biases."""
    torch.set_num_threads(1)  # as a worker has
    photos = folders["--calibration"]
    source = Folders.at("resnet10t", folders["--checkpoint"], photos, photos, None, None, None, 0)
    quant = QuantConfig(rounding=rounding, weight_symmetric=False, bias_correction=True)
    search = SearchConfig(
        search=kind, mean_bits=2.7, widths="2,3,5", evaluations=4, batch=3, **more
    )
    histories = []
    for workers in (None, Here()):
        out = tmp_path / f"run {workers is None}"
        with Run(source, quant, search, out) as run:
            assert sum(isinstance(event, Evaluated) for event in run.evolve(workers)) == run.total
            histories.append([replace(event, seconds=0.0) for event in run.folder.history()])
        histories.append((out / "scales.safetensors").read_bytes())
    assert histories[:2] == histories[2:]
    assert len({event.fitness for event in histories[0]}) > 2


@pytest.mark.usefixtures("few_factors")
def test_a_run_of_both_resumes_between_the_two(
    folders: dict[str, object], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--search", "both", "--passes", 1, "--cycles", 1)
    assert run_bits(folders, "whole", *options) == 0
    append = RunFolder.append

    def stop(self: RunFolder, event: Evaluated) -> None:
        append(self, event)
        if event.visit == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", stop)
        assert run_bits(folders, "part", *options) == 130
    assert run_bits(folders, "part", *options, "--resume") == 0
    exported = layer_bits(open_run(read_run(tmp_path / "part")).qmodel)
    assert exported == json.loads((tmp_path / "whole" / "summary.json").read_text())["bits"]
    histories = [RunFolder(tmp_path / name).history() for name in ("whole", "part")]
    assert len({tuple(replace(e, seconds=0) for e in history) for history in histories}) == 1
    files = [(tmp_path / name / "scales.safetensors").read_bytes() for name in ("whole", "part")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mean-bits", 1.5), ("between 2 and 8",)),
        (("--mean-bits", 9), ("between 2 and 8", "9")),
        (("--mean-bits", "nan"), ("between 2 and 8",)),
        (("--mean-bits", 2), ("between 2 and 8", "nothing to choose")),
        (("--mean-bits", 5, "--widths", "2,3,4"), ("between 2 and 4",)),
        (("--mean-bits", 3, "--budget-bytes", 1000), ("one of them",)),
        ((), ("--search bits needs a budget", "mean_bits or budget_bytes")),
        (("--budget-bytes", 0), ("budget_bytes must be at least 1",)),
        (("--mean-bits", 3, "--widths", "2,9"), ("from 2 to 8", "2,9")),
        (("--mean-bits", 3, "--widths", "4"), ("at least two",)),
        (("--mean-bits", 3, "--widths", "two"), ("whole numbers",)),
        (("--mean-bits", 3, "--evaluations", 0), ("evaluations must be at least 1",)),
        (("--mean-bits", 3, "--weight-bits", 3), ("--weight-bits has no effect", "--mean-bits")),
        (("--mean-bits", 3, "--passes", 5), ("passes 5 has no effect with search bits",)),
        (("--mean-bits", 3, "--step", 0.1), ("step 0.1 has no effect with search bits",)),
        (("--search", "scales", "--mean-bits", 3), ("mean_bits 3.0 has no effect with",)),
        (("--search", "scales", "--evaluations", 9), ("evaluations 9 has no effect with",)),
        (("--search", "both", "--passes", 1), ("--search both needs a budget",)),
        (("--search", "both", "--mean-bits", 3, "--weight-bits", 3), ("with --search both",)),
        (("--search", "both", "--mean-bits", 3, "--passes", 0), ("passes must be at least 1",)),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(
    refused: Callable[..., str], tmp_path, monkeypatch, options: tuple, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "source_of", lambda _: pytest.fail("loaded"))
    refused((*DEMO, *options), *(word.removeprefix("--") for word in words))


def test_a_budget_that_no_genome_meets_is_refused_before_anything_is_written(
    folders: dict[str, object], tmp_path, capsys
) -> None:
    before = tree(tmp_path)
    pairs = [part for pair in folders.items() for part in pair]
    assert call("run", *pairs, "--search", "bits", "--budget-bytes", 100, "--threads", 1) == 2
    *_, said = capsys.readouterr().err.splitlines()  # behind progress bars, on a slow machine
    assert "100 bytes leaves no choice" in said and "give a budget between" in said
    assert tree(tmp_path) == before


# The claim


MEANS = (2.25, 2.5, 3.0, 4.0)


@pytest.mark.parametrize(
    ("vit", "cnn", "word"),
    [(MEANS, MEANS, WORDS[0]), ((2.25,), (2.5, 3.0), WORDS[1]), ((), (), WORDS[2])],
)
def test_the_claim_holds_in_as_many_budgets_as_the_evolution_gains_in(
    vit: tuple[float, ...], cnn: tuple[float, ...], word: str
) -> None:
    faces, gaining = typefaces(), {"vit": vit, "cnn": cnn}
    order = torch.rand(len(faces), generator=torch.Generator().manual_seed(0))
    rows = []
    for cell in c11_bits.cells(False):
        evolved = cell["method"] == c11_bits.EVOLUTION
        ahead = evolved and cell["mean_bits"] in gaining[cell["network"]]
        loss = torch.rand(len(faces.unique())) + (0 if ahead else 0.1)
        right = order < 0.8 + 0.05 * ahead
        more = {"top1": 0.8, "fitness": 1.0, "held_out_kl": 0.1, "evaluations": 361}
        measured = {"correct": packed(right), "test_images": len(faces), "kl": pack_values(loss)}
        rows.append({**cell, **measured, **more})
    results = pd.DataFrame(rows)
    found = c11_bits.CLAIM.verdict(results)
    assert found.word == word and len(found.decisive) == 24 and len(found.others) == 24
    assert sum(bool(row.holds) for row in found.decisive) == 3 * (len(vit) + len(cnn))
    assert (
        f"in {len(vit)}/4, {len(vit)}/4, {len(vit)}/4 of the budgets on the ViT" in found.sentence
    )
    assert f", {len(cnn)}/4, {len(cnn)}/4, {len(cnn)}/4 on the CNN" in found.sentence
    assert len(found.sentence.split()) <= 30
    (table,) = c11_bits.CLAIM.tables(results).values()
    assert len(table) == 32
    alt = str(c11_bits.CLAIM.figure(results).get_label())
    assert "Evolved bits" in alt and "in 8 panels" in alt


def test_results_of_one_network_are_told_without_the_other() -> None:
    gain = SeedComparison.of(torch.ones(2, 600, dtype=torch.bool), torch.ones(2, 600) > 0)
    gains = {f"CNN, mean {mean} bits": {"rival": gain} for mean in (2.5, 3)}
    assert c11_bits.tell_budgets(gains) == "0/2 of the budgets on the CNN"


def test_the_vit_s_cells_are_what_they_were_before_the_cnn_came() -> None:
    """Results are found by the cell's parameters: a new one would compute them all again."""
    first = c11_bits.cells(False)[0]
    assert first == {
        "network": "vit",
        "mean_bits": 2.25,
        "method": "even bits",
        "seed": 0,
        "images": 500,
        "widths": "2,3,4,5,6,7,8",
        "evaluations": 360,
        "every": 1,
    }
    assert [cell["network"] for cell in c11_bits.cells(False)] == ["vit"] * 80 + ["cnn"] * 80
