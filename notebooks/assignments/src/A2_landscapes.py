# %% [markdown]
# # Assignment 2. Landscapes
#
# **You build** steps in random directions, two measures of jaggedness, the noise floor below which
# no bump means anything, and a gradient through rounding. These are the pieces of
# `evolq_lite/landscape.py` and of `round_ste` in `numerics.py`, written by you.
#
# **You need** lesson 3 and PyTorch's autograd. **Time:** 2 to 4 hours. **Points:** 20.
# **Works offline:** yes.
#
# Each exercise has one cell to fill in: `# YOUR CODE HERE` marks each place. Write your code there and
# delete the line `raise NotImplementedError()` below it. The next cell holds public checks that say
# what is wrong; run it as often as you like. The cells after it are empty here and hold hidden tests
# when the assignment is graded: they try many random cases of what the text asks for, and nothing
# else. Test cells are restored before grading, so changing them changes nothing. The functions of
# `evolq_lite` that an exercise re-creates are not allowed in your answer.

# %% [markdown]
# ## About you and your work
#
# Assistants are allowed in this course if you name them here and say for what. You answer for every line that
# you hand in: your instructor may ask you to explain any of them, and what you cannot explain does not count.
# Write the answers to the questions in your own words. *(Release {release})*
#
# **Name:**
#
# **ID:**
#
# **Help received:** (people, books, sites, assistants; for which exercise; or "none")

# %% nbgrader={"grade": false, "grade_id": "A2-setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
import types
from contextlib import contextmanager
from itertools import pairwise

import torch
from scipy.signal import find_peaks, peak_prominences

import evolq_lite as eq
from evolq_lite.figures import PETROFF, new_figure


def same(yours, expected, what, tolerance=1e-5):
    """Fail with a sentence unless two numbers or tensors agree."""
    assert yours is not None, f"{what}: None came back; is a return missing?"
    kind = type(yours).__name__
    try:
        yours = torch.as_tensor(yours)
        assert type(yours) in (torch.Tensor, torch.nn.Parameter)
        yours = yours.detach().double()
    except (TypeError, ValueError, RuntimeError, AssertionError):
        raise AssertionError(f"{what}: expected a number or a tensor, not {kind}") from None
    expected = torch.as_tensor(expected).double()
    shapes = f"shape {tuple(yours.shape)} instead of {tuple(expected.shape)}"
    assert yours.shape == expected.shape, f"{what}: {shapes}"
    far = ~((yours - expected).abs() <= tolerance * (1 + expected.abs()))
    if far.any():
        at = tuple(far.nonzero()[0].tolist())
        where = f" at index {at}" if at else ""
        raise AssertionError(
            f"{what}{where}: {float(yours[at]):.6g} instead of {float(expected[at]):.6g}"
        )


def own_work(thing, *names):
    """Fail if a function or class leaves its work to one of these names."""
    home = str(getattr(thing, "__module__", ""))
    assert not home.startswith("evolq_lite"), "write it yourself, without evolq_lite's own"
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    codes, used = [part.__code__ for part in parts if hasattr(part, "__code__")], set()
    while codes:
        code = codes.pop()
        used |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    assert not used & set(names), f"write it yourself, without {min(used & set(names))}"


def quantized_vit(images=100, bits=3):
    """The embedded ViT with weights in few bits, and the images that calibrated it."""
    demo = eq.load_demo("vit", images)
    qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=bits))
    eq.calibrate(qmodel, demo.calibration)
    chain = eq.chain_of(qmodel)
    chain.fit_chunk(demo.calibration[:1])
    return chain, demo


@contextmanager
def trying(what):
    """Say which input it was if an answer raises an exception of its own."""
    try:
        yield
    except (AssertionError, NotImplementedError):
        raise
    except Exception as error:
        raise AssertionError(f"{what}: your code raised {type(error).__name__}") from error


# %% [markdown]
# ## Exercise 1: a step in a random direction
#
# **Difficulty:** easy · **Minutes:** 30 · **Points:** 2 (public checks 1, hidden tests 1)
#
# We look at a landscape over $d$ scales along lines, $f(r) = L(c + r\, u)$, with a center $c$ and a
# direction $u$. Write two functions:
#
# - `random_direction(center, seed, relative)`: return a tensor of shape `(d,)`, $d$ independent standard
#   normal numbers from one call of `torch.randn` in float32, drawn by a `torch.Generator` of its own with
#   `seed`; the global random state must not change. If `relative`, multiply each by the magnitude of its
#   center coordinate, so that $r = 0.01$ means "by about one percent". Do not divide by the length: each
#   coordinate keeps mean square 1, whatever $d$ is.
# - `walk(center, direction, radii)`: return the points $|c + r\, u|$, one row for each $r$, shape
#   `(len(radii), d)`. Take the magnitude because a scale must not be negative.
#
# <details><summary>Hint</summary>
#
# `torch.Generator().manual_seed(seed)` is passed as `generator=`. For the rows, a column of radii
# times a row of the direction: `radii[:, None] * direction`.
#
# </details>
#
# **Expected** (200 relative steps of radius 0.1 from a center of three scales):
#
# ![200 relative steps of radius 0.1 scatter scales of 0.02 by 9 per cent, 0.05 by 9 per cent, 0.2 by 10 per cent.](figures/A2-1.png)


# %% nbgrader={"grade": false, "grade_id": "A2-1", "locked": false, "schema_version": 3, "solution": true, "task": false}
def random_direction(center, seed, relative):
    """A direction (d,) for a center (d,): standard normal, times |center| if relative."""
    ### BEGIN SOLUTION
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(center), generator=generator)
    return noise * center.abs() if relative else noise
    ### END SOLUTION


def walk(center, direction, radii):
    """The points |center + r * direction| for radii (n,), one a row: (n, d)."""
    ### BEGIN SOLUTION
    return (center + radii[:, None] * direction).abs()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A2-1-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(random_direction, "landscape", "direction")
own_work(walk, "landscape")
center = torch.linspace(0.01, 0.1, 2000)
state = torch.get_rng_state()
absolute = random_direction(center, 3, False)
assert absolute.shape == (2000,), f"a direction has the shape of the center, {tuple(center.shape)}"
assert torch.equal(state, torch.get_rng_state()), (
    "the global random state has changed: draw from a torch.Generator of your own"
)
expected = torch.randn(2000, generator=torch.Generator().manual_seed(3))
same(absolute, expected, "the numbers of one torch.randn in float32 with seed 3")
same(absolute.square().mean(), 1.0, "mean square of a direction with 2,000 coordinates", 0.05)
same(absolute.mean(), 0.0, "mean of a direction with 2,000 coordinates", 0.08)
same(random_direction(center, 3, False), absolute, "the same seed, a second time")
other = random_direction(center, 4, False)
assert not torch.allclose(other, absolute), "another seed must give another direction"
relative = random_direction(center, 3, True)
same(relative, absolute * center, "relative direction: the absolute one times the center")
same(random_direction(-center, 3, True), relative, "relative direction of a negative center")
points = walk(torch.tensor([1.0, 0.1]), torch.tensor([1.0, -1.0]), torch.tensor([0.0, 0.5, 2.0]))
same(points, [[1.0, 0.1], [1.5, 0.4], [3.0, 1.9]], "three points on a line, negatives mirrored")
print("Exercise 1: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A2-1-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
center = torch.tensor([0.02, 0.05, 0.2])
steps = torch.stack(
    [walk(center, random_direction(center, s, True), torch.tensor([0.1]))[0] for s in range(200)]
)
shares = (steps / center - 1).std(0)
said = ", ".join(f"{c:g} by {100 * s:.0f} per cent" for c, s in zip(center.tolist(), shares))
figure = new_figure(6.4, 2.4, f"200 relative steps of radius 0.1 scatter scales of {said}.")
axes = figure.add_subplot()
for i in range(3):
    axes.plot(steps[:, i], [i] * 200, "|", color=PETROFF[i], markersize=12)
axes.set(yticks=range(3), yticklabels=["scale 1", "scale 2", "scale 3"], ylim=(-0.6, 2.6))
axes.set(xscale="log", xlabel="value of the scale")
axes.set_xticks([0.02, 0.05, 0.1, 0.2], ["0.02", "0.05", "0.1", "0.2"])
axes.minorticks_off()
figure


# %% nbgrader={"grade": true, "grade_id": "A2-1-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_steps(cases=100, seed=21):
    from evolq_lite.landscape import direction

    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        d, n = torch.randint(1, 40, (2,), generator=generator).tolist()
        center = torch.randn(d, generator=generator)
        relative = bool(case % 2)
        said = f"d = {d}, seed {case}, relative {relative}"
        expected = direction(center, case, relative)
        state = torch.get_rng_state()
        with trying(said):
            found = random_direction(center.clone(), case, relative)
        same(found, expected, f"direction, {said}")
        untouched = torch.equal(state, torch.get_rng_state())
        assert untouched, "the global random state has changed"
        radii = 4 * torch.rand(n, generator=generator) - 2
        rows = torch.stack([(center + r * expected).abs() for r in radii])
        with trying(f"{n} radii, {said}"):
            points = walk(center.clone(), expected.clone(), radii.clone())
        same(points, rows, f"{n} points on a line, {said}")


check_steps()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 2: how jagged is a line?
#
# **Difficulty:** medium · **Minutes:** 40 · **Points:** 3 (public checks 1, hidden tests 2)
#
# Write two functions of the values along a line, a tensor of shape `(n,)`:
#
# - `total_variation(values)`: return the sum of the absolute differences of neighbors, divided by the
#   range of the values (largest minus smallest), as a number. It is 1 for a slope, at most 2 for one valley,
#   and grows with every zigzag. Return 0 for a constant line.
# - `local_minima(values, floor)`: return, as an integer, how many local minima are deeper than `floor`. A
#   local minimum is lower than both of its neighbors; so the two ends of the line are none, and neither
#   is a flat valley. Its depth: walk to the left until the line ends or falls below the
#   minimum, and note the highest value on the way; do the same to the right; the depth is the *lower* of
#   the two highest values, minus the minimum. "Deeper" means more than `floor`, not equal to it.
#
# <details><summary>Hint</summary>
#
# `scipy.signal.find_peaks` finds maxima, and `peak_prominences` measures their depth as above; both are
# imported and take NumPy arrays (`values.numpy()`). What turns minima into maxima? With
# `plateau_size=(None, 1)`, `find_peaks` ignores flat ones.
#
# </details>
#
# **Expected** (one valley, and the same with a jag of 0.3 on every second point; minima deeper than
# 0.1):
#
# ![A valley: variation 2.0, minima 1. The same with jags: variation 9.9, minima 19.](figures/A2-2.png)


# %% nbgrader={"grade": false, "grade_id": "A2-2", "locked": false, "schema_version": 3, "solution": true, "task": false}
def total_variation(values):
    """Sum of |differences| over the range of values (n,), a number; 0 for a constant."""
    ### BEGIN SOLUTION
    span = float(values.max() - values.min())
    return float(values.diff().abs().sum()) / span if span > 0 else 0.0
    ### END SOLUTION


def local_minima(values, floor):
    """How many minima inside the line (n,) are deeper than floor."""
    ### BEGIN SOLUTION
    hills = -values.numpy()
    tops, _ = find_peaks(hills, plateau_size=(None, 1))
    return int((peak_prominences(hills, tops)[0] > floor).sum())
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A2-2-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def same_integer(found, what):
    """Fail unless it is an integer of Python, NumPy or torch; returns it as Python's."""
    whole = type(found).__name__.startswith(("int", "uint")) and not isinstance(found, bool)
    if type(found) is torch.Tensor and found.ndim == 0 and not found.is_floating_point():
        found, whole = found.item(), True
    assert whole, f"{what}: expected an integer, not {type(found).__name__}"
    return int(found)


own_work(total_variation, "landscape")
own_work(local_minima, "landscape")

slope, valley = torch.linspace(0, 3, 7), torch.linspace(-3, 3, 7).abs()
zigzag = torch.tensor([2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0])
uneven = torch.tensor([5.0, 1.0, 1.5, 0.0, 3.0, 2.9, 4.0])
for name, values, variation in (
    ("a slope", slope, 1.0),
    ("a falling slope", -slope, 1.0),
    ("a valley", valley, 2.0),
    ("a zigzag with 6 steps", zigzag, 6.0),
    ("a constant", torch.ones(5), 0.0),
):
    same(total_variation(values), variation, f"total variation of {name}")
for name, values, floor, minima in (
    ("a slope", slope, 0.0, 0),
    ("a valley", valley, 0.0, 1),
    ("a hill, whose ends are lowest", -valley, 0.0, 0),
    ("a zigzag", zigzag, 0.0, 3),
    ("a zigzag of depth 2 with floor 2.5", zigzag, 2.5, 0),
    ("a zigzag of depth 2 with floor 2: not more than the floor", zigzag, 2.0, 0),
    ("a flat valley, 2, 1, 1, 2", torch.tensor([2.0, 1.0, 1.0, 2.0]), 0.0, 0),
    ("a constant", torch.ones(5), 0.0, 0),
    ("the line 5, 1, 1.5, 0, 3, 2.9, 4", uneven, 0.0, 3),
    ("the line 5, 1, 1.5, 0, 3, 2.9, 4 with floor 0.2", uneven, 0.2, 2),
    ("the line 5, 1, 1.5, 0, 3, 2.9, 4 with floor 0.6", uneven, 0.6, 1),
    ("the line 5, 1, 1.5, 0, 3, 2.9, 4 with floor 4.5", uneven, 4.5, 0),
):
    found = same_integer(local_minima(values, floor), f"minima of {name}")
    assert found == minima, f"minima of {name}: {found} instead of {minima}"
print("Exercise 2: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A2-2-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
r = torch.linspace(-1, 1, 41)
smooth, jagged = r**2, r**2 + 0.3 * (torch.arange(41) % 2)
numbers = [
    f"variation {total_variation(v):.1f}, minima {local_minima(v, 0.1)}" for v in (smooth, jagged)
]
figure = new_figure(6.4, 2.8, f"A valley: {numbers[0]}. The same with jags: {numbers[1]}.")
axes = figure.add_subplot()
axes.plot(r, smooth, "--", color=PETROFF[0], label=f"valley: {numbers[0]}")
axes.plot(r, jagged, color=PETROFF[1], label=f"with jags: {numbers[1]}")
axes.set(xlabel="radius", ylabel="value", ylim=(-0.1, 2.2))
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A2-2-hidden", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def depth_by_hand(values, i):
    """The depth of values[i], as the text of the exercise says; 0 if it is no minimum inside."""
    if i in (0, len(values) - 1) or not (values[i - 1] > values[i] < values[i + 1]):
        return 0.0
    walls = []
    for part in (values[:i][::-1], values[i + 1 :]):
        highest = values[i]
        for value in part:
            if value < values[i]:
                break
            highest = max(highest, value)
        walls.append(highest)
    return min(walls) - values[i]


def check_jagged(cases=200, seed=22):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        n = int(torch.randint(3, 30, (), generator=generator))
        values = torch.randn(n, generator=generator, dtype=torch.float64)
        if torch.rand((), generator=generator) < 0.5:
            values = values.cumsum(0)
        coarse = case % 4 == 0
        if coarse:  # many equal values, and depths equal to the floor
            values = values.round()
        plain = values.tolist()
        span = max(plain) - min(plain)
        variation = sum(abs(b - a) for a, b in pairwise(plain)) / span if span else 0.0
        said = f"the line {[round(v, 3) for v in plain]}"
        with trying(said):
            total = total_variation(values.clone())
        same(total, variation, f"total variation of {said}")
        depths = [depth_by_hand(plain, i) for i in range(n)]
        floor = float(torch.rand((), generator=generator)) * span / 2
        if coarse:
            floor = float(round(floor))
        elif min(abs(depth - floor) for depth in depths) < 1e-6:
            continue
        expected = sum(depth > floor for depth in depths)
        with trying(f"floor {floor:.3f}, {said}"):
            found = local_minima(values.clone(), floor)
        found = same_integer(found, f"minima of {said}")
        assert found == expected, f"minima, floor {floor:.3f}: {found}, not {expected}, in {said}"


check_jagged()
same(total_variation(torch.full((4,), 7.0)), 0.0, "total variation of a constant")
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 3: the noise floor
#
# **Difficulty:** easy · **Minutes:** 30 · **Points:** 2 (public checks 1, hidden tests 1)
#
# The same loss can be computed in several ways that differ in the order of their sums, and in a
# quantized network one flipped rounding flips others. `kernels` is a list of functions that all compute the
# same objective: from points `(p, d)` to values `(p,)`. Return the noise floor, a number: the largest
# disagreement at any one point. At each point take the largest minus the smallest value over *all*
# kernels, and of these differences the largest.
#
# <details><summary>Hint</summary>
#
# Stack the values into a tensor of shape `(kernels, points)`. Which axis must `amax` and `amin`
# run over, so that values of the *same* point are compared?
#
# </details>
#
# **Expected** (the embedded ViT at five points, its products computed with integers, and with
# integers simulated in float):
#
# ![Fitness at five points near the start, computed in two ways: the points differ by up to 0.0037, the two ways at one point by up to 0.0002.](figures/A2-3.png)


# %% nbgrader={"grade": false, "grade_id": "A2-3", "locked": false, "schema_version": 3, "solution": true, "task": false}
def disagreement(kernels, points):
    """The noise floor, a number, of kernels (functions from points (p, d) to values (p,))."""
    ### BEGIN SOLUTION
    values = torch.stack([kernel(points) for kernel in kernels])
    return float((values.amax(0) - values.amin(0)).max())
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A2-3-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(disagreement, "noise_floor", "landscape")
points = torch.tensor([[0.0], [10.0], [20.0]])
exact, shifted = (lambda p: p.sum(1)), (lambda p: p.sum(1) + 0.25)
at_one = lambda p: p.sum(1) - 0.5 * (p.sum(1) == 10)  # noqa: E731
same(disagreement([exact, exact], points), 0.0, "two kernels that agree, at points far apart")
same(disagreement([exact, shifted], points), 0.25, "two kernels, the second 0.25 higher")
same(disagreement([shifted, exact], points), 0.25, "two kernels, the first 0.25 higher")
same(disagreement([exact, at_one], points), 0.5, "kernels that differ by 0.5 at one point only")
same(disagreement([at_one, exact, shifted], points), 0.75, "three kernels, 0.75 at one point")
print("Exercise 3: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A2-3-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
chain, demo = quantized_vit()


def executed(how):
    """The objective, its matrix products computed in one of two ways."""
    eq.set_execution(chain.model, how)
    objective = eq.BlockObjective(chain, "blocks.5", demo.calibration, demo.targets)

    def kernel(points):
        eq.set_execution(chain.model, how)
        return objective(points)

    return kernel


center = eq.genome_of(chain.model, ["blocks.5"]).read(chain.model)
generator = torch.Generator().manual_seed(0)
points = center * (1 + 0.01 * torch.randn(5, len(center), generator=generator))
kernels = {"integers": executed("auto"), "simulated in float": executed("simulate")}
floor = disagreement(list(kernels.values()), points)
values = {name: kernel(points) for name, kernel in kernels.items()}
spread = float(values["integers"].max() - values["integers"].min())
figure = new_figure(
    6.4,
    2.8,
    f"Fitness at five points near the start, computed in two ways: the points differ by up to "
    f"{spread:.4f}, the two ways at one point by up to {floor:.4f}.",
)
axes = figure.add_subplot()
for i, (name, row) in enumerate(values.items()):
    axes.plot(row, "oD"[i], color=PETROFF[i], markersize=9 - 3 * i, label=name)
axes.set(xlabel="point", ylabel="fitness", xticks=range(5))
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A2-3-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def rippled(a):
    """A kernel: a bowl with ripples of its own, at each point alone or at many together."""
    return lambda x: x.square().sum(1) + torch.sin((x * a).sum(1))


def check_floor(cases=100, seed=23):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        k, p, d = (1 + torch.randint(6, (3,), generator=generator)).tolist()
        points = 3 * torch.randn(p, d, generator=generator)
        kernels = [rippled(a) for a in torch.randn(k, d, generator=generator)]
        rows = [[float(kernel(point[None])[0]) for kernel in kernels] for point in points]
        expected = max(max(row) - min(row) for row in rows)
        said = f"{k} kernels at {p} points of {d} scales"
        with trying(said):
            found = disagreement(kernels, points.clone())
        same(found, expected, said, 1e-4)


check_floor()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 4: a gradient through rounding
#
# **Difficulty:** hard · **Minutes:** 50 · **Points:** 4 (public checks 1, hidden tests 3)
#
# `torch.round` has derivative 0. The straight-through estimator keeps the value and pretends that the
# derivative is 1. Write two functions:
#
# - `round_straight(x)`: return a tensor with *exactly* the value of `torch.round(x)` (to the last digit: the
#   clamp notices) and the gradient of `x`.
# - `scale_gradient(x, scale, smallest, largest)`: return a tensor of shape `()`, the derivative, by
#   autograd, of the *mean* of $(x' - x)^2$ with respect to `scale` (a tensor of shape `()`), where
#   $x' = s\, \mathrm{clamp}(\mathrm{round}(x / s), q_{lo}, q_{hi})$ with your rounding. Round
#   first, then clamp, with `torch.clamp`, which lets the gradient pass at the ends of the range as well.
#
# <details><summary>Hint</summary>
#
# You need a value equal to `round(x)` of which autograd sees only `x`: what does `.detach()` do to a
# difference? For the second, the scale must be a leaf that asks for a gradient.
#
# </details>
#
# **Expected** (weights of `blocks.0.attn.qkv`, one scale, 3 bits: the error, and where the
# estimator says that it falls):
#
# ![Error of 3-bit weights against their scale: least at 0.040; the gradient by the straight-through estimator is nearest to zero at 0.040.](figures/A2-4.png)


# %% nbgrader={"grade": false, "grade_id": "A2-4", "locked": false, "schema_version": 3, "solution": true, "task": false}
def round_straight(x):
    """Round half to even; the gradient passes as if nothing had been done."""
    ### BEGIN SOLUTION
    return x + (torch.round(x) - x).detach()
    ### END SOLUTION


def scale_gradient(x, scale, smallest, largest):
    """The gradient of mean((x' - x)^2) in the scale, a tensor of shape ()."""
    ### BEGIN SOLUTION
    s = scale.detach().clone().requires_grad_()
    back = s * torch.clamp(round_straight(x / s), smallest, largest)
    return torch.autograd.grad(((back - x) ** 2).mean(), s)[0]
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A2-4-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(round_straight, "round_ste")
own_work(scale_gradient, "round_ste", "fake_quantize")
x = torch.tensor([-1.5, -0.5, 0.4, 0.5, 1.5, 2.7], requires_grad=True)
same(round_straight(x), [-2.0, 0.0, 0.0, 0.0, 2.0, 3.0], "values of round_straight, half to even")
line = torch.linspace(-3, 3, 601)
assert torch.equal(round_straight(line), line.round()), (
    "the values must be exactly those of torch.round: subtract before you add"
)
(slope,) = torch.autograd.grad((torch.arange(6.0) * round_straight(x)).sum(), x)
same(slope, torch.arange(6.0), "the gradient behind round_straight must arrive unchanged")
one = torch.tensor(1.0)
# Inside, dx'/ds = round(x / s) - x / s; outside it is the end of the range.
for values, expected, what in (
    ([0.75], 2 * 0.25 * 0.25, "one value inside: x = 0.75"),
    ([0.25], 2 * -0.25 * -0.25, "one value inside: x = 0.25"),
    ([3.25], 2 * -0.25 * -0.25, "one value that rounds to the largest integer: x = 3.25"),
    ([5.0], 2 * -2.0 * 3.0, "one value above the range: x = 5"),
    ([-9.0], 2 * 5.0 * -4.0, "one value below the range: x = -9"),
    ([0.75, 5.0, 1.0, 2.0], (0.125 - 12.0) / 4, "the mean over 0.75, 5, 1, 2"),
):
    found = scale_gradient(torch.tensor(values), one, -4, 3)
    same(found, expected, f"gradient at scale 1, integers -4 to 3, {what}")
same(
    scale_gradient(torch.tensor([1.5]), torch.tensor(2.0), -4, 3),
    2 * 0.5 * 0.25,
    "gradient at scale 2, integers -4 to 3, x = 1.5",
)
print("Exercise 4: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A2-4-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
weight = eq.load_demo("vit", calibration=2).model.blocks[0].attn.qkv.weight.detach().flatten()
scales = torch.linspace(0.02, 0.14, 61)
three = eq.IntRange(3, True)
errors = torch.stack(
    [
        (eq.fake_quantize(weight, s, torch.tensor(0.0), three) - weight).square().mean()
        for s in scales
    ]
)
slopes = torch.stack([scale_gradient(weight, s, -4, 3) for s in scales])
least, crossing = scales[errors.argmin()], scales[slopes.abs().argmin()]
figure = new_figure(
    6.4,
    3.0,
    f"Error of 3-bit weights against their scale: least at {least:.3f}; the gradient by the "
    f"straight-through estimator is nearest to zero at {crossing:.3f}.",
)
axes = figure.add_subplot()
axes.plot(scales, 1e3 * errors, color=PETROFF[0], label="error, thousandths")
axes.plot(scales, 50 * slopes, "--", color=PETROFF[1], label="gradient, times 50")
axes.axhline(0, color="0.5", lw=0.8)
axes.set(xlabel="scale")
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A2-4-hidden", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_gradient(cases=150, seed=24):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        bits = int(torch.randint(2, 7, (), generator=generator))
        integers = eq.IntRange(bits, bool(torch.randint(2, (), generator=generator)))
        scale = 0.05 + torch.rand((), generator=generator, dtype=torch.float64)
        n = int(torch.randint(1, 50, (), generator=generator))
        x = scale * 2**bits * torch.randn(n, generator=generator, dtype=torch.float64)
        steps = x / scale
        edge = (steps - steps.floor() - 0.5).abs() < 1e-3
        x = x[~edge]
        if len(x) == 0:
            continue
        q = (x / scale).round()
        outside = (q < integers.lo) | (q > integers.hi)
        q = q.clamp(integers.lo, integers.hi)
        slope = torch.where(outside, q, q - x / scale)
        expected = (2 * (scale * q - x) * slope).mean()
        said = f"x = {[round(v, 3) for v in x[:8].tolist()]} ({len(x)} values), scale {scale:.4f}, {integers}"
        with trying(said):
            found = scale_gradient(x.clone(), scale.clone(), integers.lo, integers.hi)
        same(found, expected, said)


check_gradient()
x = torch.linspace(-3, 3, 25, requires_grad=True)
same(round_straight(x), torch.round(x.detach()), "values of round_straight from -3 to 3")
(slope,) = torch.autograd.grad((round_straight(x) ** 2).sum(), x)
same(slope, 2 * torch.round(x.detach()), "gradient of the squares of round_straight")
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 5: does the gradient point downhill?
#
# **Difficulty:** medium · **Minutes:** 30 · **Points:** 3 (public checks 1, hidden tests 2)
#
# A gradient through a pretended derivative may point anywhere. Take it at its word: go against it,
# and look. From `center`, go to $|c - r\, \|c\|\, g / \|g\||$ for each radius $r$: a step
# of $r = 0.01$ is as long as one percent of the center. Return a tensor or a list with one number for each
# radius:
#
# - `1` if the objective is lower than at the center by more than `floor`,
# - `-1` if it is higher than at the center by more than `floor`,
# - `0` otherwise, also for a difference of exactly `floor`: no difference that means anything.
#
# `objective` takes points `(p, d)` and returns values `(p,)`. Compare with the center, not with the
# point before.
#
# <details><summary>Hint</summary>
#
# First build a vector as long as the center. One call gives all points, one the center. Which test
# comes first: sign or floor?
#
# </details>
#
# **Expected** (the loss of the embedded ViT over the scales of block 5, along its gradient and
# along a random direction; gray: a noise floor of 0.0004):
#
# ![The loss at radii from 0.001 to 0.1 against the gradient: higher, higher, higher, same, lower, lower, lower; against the random direction: same, lower, same, same, higher, same, higher.](figures/A2-5.png)


# %% nbgrader={"grade": false, "grade_id": "A2-5", "locked": false, "schema_version": 3, "solution": true, "task": false}
def downhill(objective, center, gradient, radii, floor):
    """1, 0 or -1 for each of the radii (n,): lower than the center (d,), the same, higher."""
    ### BEGIN SOLUTION
    direction = gradient / gradient.norm() * center.norm()
    values = objective((center - radii[:, None] * direction).abs())
    change = values - objective(center[None])
    return torch.where(change.abs() > floor, -change.sign(), torch.zeros_like(change))
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A2-5-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(downhill, "landscape", "descend")
bowl = lambda points: (points - 3.0).square().sum(1)  # noqa: E731
center, radii = torch.tensor([4.0, 3.0]), torch.tensor([0.1, 0.2, 0.3, 0.5])
gradient = torch.tensor([2.0, 0.0])
for g, floor, expected, what in (
    (gradient, 0.0, [1, 1, 1, -1], "against the gradient"),
    (100 * gradient, 0.0, [1, 1, 1, -1], "against a gradient 100 times as long"),
    (-gradient, 0.0, [-1, -1, -1, -1], "against the wrong gradient"),
    (gradient, 0.9, [0, 1, 0, -1], "with a floor of 0.9"),
):
    found = downhill(bowl, center, g, radii, floor)
    same(found, expected, f"downhill {what}, radii 0.1, 0.2, 0.3, 0.5 in the bowl around (3, 3)")
steep = lambda points: points.sum(1)  # noqa: E731
found = downhill(
    steep, torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), torch.tensor([2.5]), 0.0
)
same(found, [-1], "a step beyond zero is mirrored to positive scales")
slope = lambda points: points[:, 0]  # noqa: E731
for g, what in (([2.0, 0.0], "lower"), ([-2.0, 0.0], "higher")):
    found = downhill(slope, torch.tensor([4.0, 3.0]), torch.tensor(g), torch.tensor([0.5]), 2.5)
    same(found, [0], f"{what} by exactly the floor")
print("Exercise 5: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A2-5-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
chain, demo = quantized_vit()
objective = eq.BlockObjective(chain, "blocks.5", demo.calibration, demo.targets)
center = objective.start
gradient, value = objective.gradient(center)
noise = torch.randn(len(center), generator=torch.Generator().manual_seed(0))
radii = torch.tensor([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1])
figure = new_figure(6.4, 3.0, "")
axes, said = figure.add_subplot(), []
for i, (name, vector) in enumerate({"gradient": gradient, "random direction": noise}.items()):
    words = {1: "lower", 0: "same", -1: "higher"}
    signs = [words[int(s)] for s in downhill(objective, center, vector, radii, 4e-4)]
    said.append(f"against the {name}: {', '.join(signs)}")
    points = center - radii[:, None] * vector / vector.norm() * center.norm()
    axes.plot(
        radii, 1e3 * (objective(points.abs()) - value), "os"[i] + "-", color=PETROFF[i], label=name
    )
axes.axhspan(-0.4, 0.4, color="0.9", label="noise floor")
axes.set(xscale="log", xlabel="radius", ylabel="change of the loss, thousandths")
axes.legend()
figure.set_label(f"The loss at radii from 0.001 to 0.1 {'; '.join(said)}.")
figure


# %% nbgrader={"grade": true, "grade_id": "A2-5-hidden", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_downhill(cases=80, seed=25):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        d, n = (1 + torch.randint(12, (2,), generator=generator)).tolist()
        a = torch.randn(d, generator=generator)
        objective = lambda points, a=a: torch.sin(3 * points + a).sum(1)  # noqa: E731
        center = 0.1 + torch.rand(d, generator=generator)
        gradient = 50 * torch.randn(d, generator=generator)
        radii = 2 * torch.rand(n, generator=generator)
        floor = float(torch.rand((), generator=generator)) * (d**0.5) / 2
        unit = (
            gradient / math.sqrt(float((gradient**2).sum())) * math.sqrt(float((center**2).sum()))
        )
        start = float(objective(center[None])[0])
        changes = [float(objective((center - r * unit).abs()[None])[0]) - start for r in radii]
        if min(abs(abs(change) - floor) for change in changes) < 1e-4:
            continue
        expected = [0 if abs(c) <= floor else 1 if c < 0 else -1 for c in changes]
        said = f"radii {[round(r, 3) for r in radii.tolist()]} in {d} dimensions, floor {floor:.3f}"
        with trying(said):
            found = downhill(objective, center.clone(), gradient.clone(), radii.clone(), floor)
        same(found, expected, said)


check_downhill()
### END HIDDEN TESTS

# %% [markdown]
# ## Question 1
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. Somebody shows a line through the loss of a quantized network with 40 local minima
# and concludes that the landscape is rugged. Which measurement do you ask for before you believe it, and how
# could a landscape that is not rugged show 40 minima?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A2-6", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: asks for the noise floor: the same loss computed in several ways (kernels, chunks, threads) at
#   the same points.
# - 1 point: without it, the minima may be flipped roundings that follow the order of sums, or may be smaller
#   than what another computation changes.
#
# Accept: "Evaluate the same points with another kernel; if they differ as much as the bumps are deep, the
# bumps are noise." (2)
#
# Reject: "Repeat it with another seed." (0: the same computation gives the same bumps)
#
# Reject: "Zoom in further." (0; 1 if the depth of the minima is then compared with a floor)

# %% [markdown]
# ## Question 2
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. The landscape is drawn once with calibration images and once with test images. For
# which purpose may each be used, and what must not be chosen with the second?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A2-7", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: the calibration landscape is what a search sees, so it is used to understand and to improve
#   searches.
# - 1 point: the test landscape only describes the result; no setting, step, seed, layer or snapshot may be
#   chosen with it.
#
# Accept: "Calibration for tuning, test only to report at the end." (2)
#
# Reject: "The test landscape shows the true minimum, so we take the scales from there." (0)
#
# Reject: "Test images may be used if they are not too many." (0)

# %% [markdown]
# ## Question 3
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. In the picture of exercise 5 a step of 0.002 against the gradient makes the loss
# *higher*, and steps of 0.02 and 0.05 make it lower. What does the straight-through estimator ignore, and why can it
# still be useful for longer steps?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A2-8", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: it ignores the jumps: between two flips of a rounding the true loss does not change with the
#   rounding, and at a flip it jumps; so for short steps the pretended slope says little.
# - 1 point: over longer steps many roundings flip, and their sum follows a smooth trend, which the estimator
#   approximates.
#
# Accept: "Locally it is a staircase; the gradient is that of the ramp through the stairs." (2)
#
# Reject: "The learning rate was too small." (0: why would a small step go uphill?)
#
# Reject: "The gradient is noisy." (0: it is deterministic; 1 if flipped roundings are named)
