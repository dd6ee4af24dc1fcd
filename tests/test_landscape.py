"""Lines, planes, roughness and rivals, on functions whose shape is known."""

import math

import pytest
import torch
from conftest import toy, toy_images

import evolq_lite as eq
from evolq_lite.descent import descend
from evolq_lite.landscape import (
    direction,
    inputs_by_another_kernel,
    line,
    local_minima,
    noise_floor,
    noise_of_lines,
    plane,
    roughness,
    total_variation,
)
from evolq_lite.search import SPSA, CoordinateSearch, LayerFactors, LogSpace, SepCMA


class Function:
    """An objective made of a function of one vector; counts how often it was asked."""

    def __init__(self, function, start):
        self.function, self.start, self.calls = function, start, 0

    def __call__(self, population):
        self.calls += len(population)
        return torch.stack([self.function(x) for x in population])


BOWL = Function(lambda x: (x - 2).square().sum(), torch.full((6,), 1.0))


def test_directions_have_unit_mean_square_and_know_the_scale():
    center = torch.tensor([1.0, -10.0] * 500)
    plain, relative = (direction(center, 3, r) for r in (False, True))
    assert plain.square().mean() == pytest.approx(1, abs=0.1)
    assert torch.equal(relative, plain * center.abs())
    assert torch.equal(plain, direction(center, 3, False))
    assert not torch.equal(plain, direction(center, 4, False))


def test_line_and_plane_are_the_function():
    center, one, two = torch.ones(6), torch.eye(6)[0], torch.eye(6)[1]
    radii = torch.linspace(-0.5, 0.5, 5)
    values = line(BOWL, center, one, radii)
    assert torch.allclose(values, (1 + radii - 2) ** 2 + 5)
    grid = plane(BOWL, center, (one, two), radii)
    wanted = ((radii - 1) ** 2)[:, None] + ((radii - 1) ** 2)[None] + 4
    assert torch.allclose(grid, wanted)


def test_a_grid_tells_what_it_has_so_far_and_can_be_stopped():
    seen = []

    def stop(values):
        seen.append(values.clone())
        if len(seen) == 7:
            raise KeyboardInterrupt

    axes, radii = (torch.eye(6)[0], torch.eye(6)[1]), torch.tensor([0, 0.5, 1])
    with pytest.raises(KeyboardInterrupt):
        plane(BOWL, torch.ones(6), axes, radii, on_cell=stop)
    assert [int(values.isnan().sum()) for values in seen] == [8, 7, 6, 5, 4, 3, 2]


def test_roughness_tells_a_bowl_from_a_washboard():
    def washboard(x):
        return (x - 2).square().sum() + 0.1 * (60 * x).sin().sum()

    start = torch.full((6,), 1.0)
    smooth, _ = roughness(BOWL, start, 0.3)
    rough, values = roughness(Function(washboard, start), start, 0.3)
    assert values.shape == (4, 21)
    assert smooth.minima <= 1 and smooth.variation <= 2
    assert rough.minima > 3 and rough.variation > 2
    # Below the floor nothing counts.
    assert roughness(Function(washboard, start), start, 0.3, floor=10)[0].minima == 0


def test_minima_and_variation_by_hand():
    values = torch.tensor([3.0, 1.0, 2.0, 0.0, 4.0])
    assert local_minima(values) == 2 and local_minima(values, floor=1.5) == 1
    assert total_variation(values) == pytest.approx((2 + 1 + 2 + 4) / 4)
    assert total_variation(torch.ones(4)) == 0


def test_noise_floor_is_the_largest_difference():
    points = torch.tensor([0.2, 0.7, 0.4])[:, None].expand(3, 6)
    other = Function(lambda x: BOWL.function(x) + 1e-3 * (x[0] > 0.5), BOWL.start)
    floor, values = noise_floor([BOWL, BOWL, other], points)
    assert values.shape == (3, 3)
    assert floor == pytest.approx(1e-3, abs=1e-5)


RIVALS = {
    "spsa": lambda x, v: SPSA(x, v, 0.15, seed=1),
    "coordinate": lambda x, v: CoordinateSearch(x, v, 0.1, seed=1),
    "sepcma": lambda x, v: SepCMA(x, v, 0.1, seed=1),
    "log spsa": lambda x, v: LogSpace(x, lambda log: SPSA(log, v, 0.15, seed=1)),
    "layer factors": lambda x, v: LayerFactors(x, [1] * 6, lambda y: SepCMA(y, v, 0.1, seed=1)),
    "evolq adaptive": lambda x, v: eq.EvolQ(x, v, 0.05, seed=1, relative=True, adapt=True),
}


def test_lines_that_differ_by_an_offset_have_no_noise():
    one = torch.tensor([[0.0, 2.0, 1.0, 3.0, 0.0], [1.0, 0.0, 1.0, 0.0, 2.0]])
    floor, agreement = noise_of_lines(one, one + 7)
    assert floor == 0 and torch.allclose(agreement, torch.ones(2, dtype=torch.float64))
    floor, agreement = noise_of_lines(one, torch.stack([-one[0], one[1]]))
    assert floor == 6  # the first line is mirrored: apart by -6 to 0
    assert agreement.tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("parallel", [1, 4])
def test_rivals_descend_and_repeat(name, parallel):
    """All get down a bowl; same seed, same run."""
    value = float(BOWL(BOWL.start[None])[0])
    runs = []
    for _ in range(2):
        search = RIVALS[name](BOWL.start, value)
        assert search.best[1] == value and torch.equal(search.best[0], BOWL.start)
        runs.append(eq.minimize(BOWL, search, 120, parallel=parallel))
    assert runs[0][1] < 0.5 * value and runs[0][1] == runs[1][1]
    assert BOWL(runs[0][0][None])[0] == pytest.approx(runs[0][1], rel=1e-5)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_survive_failures(name):
    """NaN is the worst value, never the best, and stops nothing."""
    flaky = Function(lambda x: torch.tensor(math.nan) if x[0] > 1.05 else BOWL.function(x), None)
    vector, value = eq.minimize(flaky, RIVALS[name](BOWL.start, 6.0), 60)
    assert math.isfinite(value) and torch.isfinite(vector).all()


def test_the_scales_of_a_layer_share_their_factor():
    """Three numbers for six scales; a layer's scales keep their proportions."""
    search = LayerFactors(BOWL.start, [2, 1, 3], lambda y: SepCMA(y, 6.0, 0.1, seed=1))
    factors = search.ask(4) / BOWL.start  # (4, 6)
    for layer in factors.split([2, 1, 3], dim=1):
        assert layer.amax(1).tolist() == pytest.approx(layer.amin(1).tolist())
    assert len(factors[0].unique()) >= 3
    found, value = eq.minimize(BOWL, search, 200)
    first = found / BOWL.start
    assert value < 6.0 and first[0] == pytest.approx(float(first[1]))
    assert BOWL(found[None])[0] == pytest.approx(value, rel=1e-5)


def test_the_fifth_rule_moves_the_step():
    """Success widens, failure narrows; one success in five leaves it as it was."""
    search = eq.EvolQ(torch.ones(3), 1.0, 0.1, adapt=True)
    for i, value in enumerate([0.5, 2.0, 2.0, 2.0, 2.0]):
        before = search.step
        search.tell(search.ask(1), torch.tensor([value]))
        assert (search.step > before) == (i == 0)
    assert search.step == pytest.approx(0.1)


@pytest.fixture(scope="module")
def block():
    """The objective of a toy block, and what it was made from."""
    model, x = toy("vit"), toy_images("vit", 24)
    qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=3))
    eq.calibrate(qmodel, x)
    with torch.no_grad():
        targets = model(x)
    chain = eq.chain_of(qmodel)
    return model, x, eq.BlockObjective(chain, "blocks.1", x, targets, fitness=eq.kl, batch=12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_descent_lowers_the_loss_within_its_budget(block, optimizer):
    _, _, objective = block
    start, heard = float(objective(objective.start[None])[0]), []
    vector, value = descend(objective, optimizer, 0.01, 60, lambda v, f: heard.append(f))
    assert len(heard) == 20 and heard[0] == pytest.approx(start, rel=0.05)
    assert value == min(heard) < start
    assert float(objective(vector[None])[0]) == pytest.approx(value, rel=0.05)
    with pytest.raises(ValueError, match="known: sgd, adam, adamw"):
        descend(objective, "newton", 0.01, 60)


def test_other_last_bits_reach_the_block_by_every_segment(block):
    _, images, objective = block
    other, third = (inputs_by_another_kernel(objective, images, seed=seed) for seed in (0, 1))
    assert [x.shape for x in other] == [x.shape for x in objective.inputs]
    for x, y, z in zip(other, third, objective.inputs, strict=True):
        assert 0 < float(((x - z) / z).abs().nanmedian()) < 1e-6  # last bits, where nothing flipped
        assert not torch.equal(x, y)


def test_gradient_by_batches_is_the_gradient(block):
    _, _, objective = block
    gradient, value = objective.gradient(objective.start)
    assert torch.allclose(gradient, torch.func.grad(objective.loss)(objective.start), rtol=1e-4)
    assert value == pytest.approx(float(objective.loss(objective.start).detach()), rel=1e-5)


@pytest.mark.parametrize("loss", [eq.kl, eq.info_nce])
def test_a_gradient_keeps_the_graph_of_one_chunk_of_images_only(block, loss):
    """Twelve images at once or three at a time: one gradient, less than half of the memory."""
    model, x, _ = block
    qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=3))
    eq.calibrate(qmodel, x)
    chain = eq.chain_of(qmodel)
    objective = eq.BlockObjective(chain, "blocks.0", x, model(x).detach(), fitness=loss, batch=12)
    kept: dict[int, int] = {}  # bytes of each saved tensor that is alive
    largest = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal largest
            self.tensor = tensor.detach()  # else an operation's own output would keep its graph
            kept[id(self)] = tensor.numel() * tensor.element_size()
            largest = max(largest, sum(kept.values()))

        def __del__(self):
            del kept[id(self)]

    found = {}
    for chunk in (None, 3):
        chain.chunk, largest = chunk, 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            gradient, value = objective.gradient(objective.start)
        found[chunk] = gradient, value, largest
        assert not kept
    (gradient, value, memory), (again, same, less) = found.values()
    assert torch.allclose(gradient, again, rtol=1e-4, atol=1e-7) and gradient.abs().max() > 0
    assert value == pytest.approx(same, rel=1e-6) and less < 0.5 * memory
