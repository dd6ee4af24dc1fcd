# %% [markdown]
# # Assignment 4. Evolutionary search
#
# **You build** mutation, tournament selection, a search by ask and tell, the loop over blocks that
# makes it Evol-Q, and then a search of your own that is to beat it at the same cost. These are the
# pieces of `evolq_lite/search.py` and `evolve.py`, written by you.
#
# **You need** lessons 5 and 6, and a quick look at `objective.py`. **Time:** 3 to 5 hours, and as
# much as you like for the open part. **Points:** 20. **Works offline:** yes.
#
# Each exercise has one cell to fill in: `# YOUR CODE HERE` marks each place. Write your code there and
# delete the line `raise NotImplementedError()` below it. The next cell holds public checks that say
# what is wrong; run it as often as you like. The cells after it are empty here and hold hidden tests
# when the assignment is graded: they try many random cases of what the text asks for, and nothing
# else. Test cells are restored before grading, so changing them changes nothing. The functions of
# `evolq_lite` that an exercise re-creates are not allowed in your answer
# in exercises 1 to 4; in exercise 5 everything is.

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

# %% nbgrader={"grade": false, "grade_id": "A4-setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
import types
from contextlib import contextmanager
from functools import cache

import torch

import evolq_lite as eq
from evolq_lite import data
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


@contextmanager
def only_given_images():
    """Whatever runs inside may not read images or labels from the disk: not test data, no others."""
    read = data.read_typefaces

    def refuse(part):
        raise AssertionError(
            f"the {part} images were opened: a search sees the images it is given, and no others"
        )

    data.read_typefaces = refuse
    try:
        yield
    finally:
        data.read_typefaces = read


@cache
def setting(images, seed, more=0):
    """Calibration images and targets, more images with labels, and the quantized ViT at its start."""
    demo = eq.load_demo("vit", images, seed)
    demo.model.requires_grad_(False)
    start = eq.quantize(demo.model, eq.QuantConfig(weight_bits=3))
    eq.calibrate(start, demo.calibration)
    pool = data.read_typefaces("train")
    drawn = data.subset(len(pool.images), images + max(more, 2), seed)[images:]
    others = data.normalised(pool.images[drawn].float() / 255), pool.labels[drawn]
    return demo.calibration, demo.targets, others, start


def chain_at_start(images, seed, more=0):
    """A chain of its own that begins with the first scales."""
    chain = eq.chain_of(eq.twin(setting(images, seed, more)[3]))
    chain.fit_chunk(setting(images, seed, more)[0][:1])
    return chain


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
# ## Exercise 1: mutation
#
# **Difficulty:** easy · **Minutes:** 20 · **Points:** 2 (public checks 1, hidden tests 1)
#
# Return a child, a new tensor of the shape of `parent`: the parent plus independent uniform noise from
# $-\mathit{step}$ to $\mathit{step}$ in every coordinate. Scales are positive, so take the magnitude:
# $|\mathrm{parent} + U(-\mathit{step}, \mathit{step})|$. Draw all random numbers from the `generator`
# that is passed in; `parent` must not change.
#
# <details><summary>Hint</summary>
#
# `torch.rand(n, generator=generator)` is uniform from 0 to 1. Stretch and shift it.
#
# </details>
#
# **Expected** (children of 0.002 with step 0.003; what would be negative is mirrored):
#
# ![100,000 children of 0.002 with step 0.003: 0.0000 to 0.0050, 33 per cent of them below 0.001, where the mirrored ones lie.](figures/A4-1.png)


# %% nbgrader={"grade": false, "grade_id": "A4-1", "locked": false, "schema_version": 3, "solution": true, "task": false}
def mutate(parent, step, generator):
    """A child (d,) of a parent (d,)."""
    ### BEGIN SOLUTION
    noise = (2 * torch.rand(len(parent), generator=generator) - 1) * step
    return (parent + noise).abs()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A4-1-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(mutate, "mutated", "RandomSearch", "EvolQ")


def seeded(seed):
    """A random generator."""
    return torch.Generator().manual_seed(seed)


parent = torch.full((20_000,), 0.5)
state = torch.get_rng_state()
child = mutate(parent, 0.1, seeded(0))
assert torch.equal(state, torch.get_rng_state()), "draw from the generator that is passed in"
same(parent, torch.full((20_000,), 0.5), "the parent, which must not change")
assert child.shape == parent.shape, f"shape {tuple(child.shape)} instead of {tuple(parent.shape)}"
noise = child - parent
low, high = float(noise.min()), float(noise.max())
said = f"20,000 coordinates, step 0.1: noise from {low:.3f} to {high:.3f}"
assert -0.1001 < low < -0.0995 and 0.0995 < high < 0.1001, f"{said}; from -0.1 to 0.1 is expected"
same(noise.mean(), 0.0, "mean of the noise, step 0.1", 0.002)
same(noise.std(), 0.1 / math.sqrt(3), "standard deviation of uniform noise, step 0.1", 0.001)
same(mutate(parent, 0.1, seeded(0)), child, "the same generator state, a second time")
for other, what in ((noise.roll(1), "its neighbor"), (noise.flip(0), "its mirror image")):
    pair = torch.stack([noise, other])
    for part, which in ((pair, "noise"), (pair.abs(), "size of the noise")):
        alike = float(torch.corrcoef(part)[0, 1])
        said = f"the {which} of a coordinate must not depend on {what}: correlation {alike:.2f}"
        assert abs(alike) < 0.05, said
child = mutate(torch.full((2000,), 0.01), 0.1, seeded(1))
assert float(child.min()) >= 0, f"a scale of {float(child.min()):.3f}: scales are positive"
assert 0.1095 < float(child.max()) < 0.1101, "0.01 with step 0.1 can reach 0.11, and no more"
assert float((child == 0).float().mean()) < 0.01, "negative scales are mirrored, not set to 0"
print("Exercise 1: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A4-1-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
children = mutate(torch.full((100_000,), 0.002), 0.003, seeded(0))
below = float((children < 0.001).float().mean())
figure = new_figure(
    6.4,
    2.4,
    f"100,000 children of 0.002 with step 0.003: {children.min():.4f} to {children.max():.4f}, "
    f"{100 * below:.0f} per cent of them below 0.001, where the mirrored ones lie.",
)
axes = figure.add_subplot()
axes.hist(children, bins=50, color=PETROFF[0])
axes.axvline(0.002, color="0.2", ls="--", label="parent")
axes.set(xlabel="scale of the child", ylabel="children")
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A4-1-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_mutation(cases=12, seed=41):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        d = int(torch.randint(1, 8, (), generator=generator))
        parent = torch.rand(d, generator=generator)
        step = float(2 * torch.rand((), generator=generator))
        kept, own = parent.clone(), torch.Generator().manual_seed(case)
        state = torch.get_rng_state()
        said = f"parent of {d} scales, step {step:.3f}"
        with trying(said):
            children = torch.stack([mutate(parent, step, own) for _ in range(2000)])
        untouched = torch.equal(state, torch.get_rng_state())
        assert untouched, "the global random state has changed"
        same(parent, kept, f"{said}: the parent, which must not change")
        draws = (2 * torch.rand(2000, d, generator=generator) - 1) * step
        expected = (parent + draws).abs()
        assert float(children.min()) >= 0, f"{said}: a negative scale"
        within = ((children - parent).abs() <= step + 1e-6).all()
        assert within, f"{said}: a child further than a step away"
        spread = float(step / 2000**0.5)
        for what in ("mean", "std"):
            yours, theirs = getattr(children, what)(0), getattr(expected, what)(0)
            far = float((yours - theirs).abs().max())
            assert far < 5 * spread, f"{said}: the {what} is off by {far:.3f}"
        far_from_zero = torch.full((d + 1,), 5.0)
        with trying(said):
            more = [mutate(far_from_zero, step + 0.1, own) for _ in range(1000)]
        shifts = torch.stack(more) - 5
        # Coordinates of one child, and the first one of neighboring children.
        pairs = [(shifts[:, i], shifts[:, j]) for i in range(d + 1) for j in range(i)]
        pairs.append((shifts[1:, 0], shifts[:-1, 0]))
        for a, b in pairs:
            for pair in (torch.stack([a, b]), torch.stack([a, b]).abs()):
                alike = float(torch.corrcoef(pair)[0, 1])
                assert abs(alike) < 0.18, f"{said}: the noise is not independent"


check_mutation()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 2: tournament
#
# **Difficulty:** easy · **Minutes:** 30 · **Points:** 2 (public checks 1, hidden tests 1)
#
# Return the index of the winner, a Python integer: draw `size` members *with replacement*, each member
# equally likely in each draw, and take the one with the smallest value. `values` is a tensor of shape
# `(members,)`; among equal values any of the members drawn may win. A value of NaN is a failed evaluation:
# it loses against every number, however large. Draw all random numbers from `generator`.
#
# <details><summary>Hint</summary>
#
# `torch.randint(n, (size,), generator=generator)` draws numbers from 0 to n - 1. NaN is neither
# smaller nor larger than anything, so replace it by infinity before you compare:
# `values.nan_to_num(nan=math.inf)`.
#
# </details>
#
# **Expected** (how often each of 15 members wins tournaments of 10; the best wins only half):
#
# ![Share of 4,000 tournaments of 10 among 15 members: the best wins 50 per cent, the second 26, the third 13, the last ten together 2.](figures/A4-2.png)


# %% nbgrader={"grade": false, "grade_id": "A4-2", "locked": false, "schema_version": 3, "solution": true, "task": false}
def select(values, size, generator):
    """The index of the winner among size members, drawn with replacement; values (members,)."""
    ### BEGIN SOLUTION
    ranked = torch.as_tensor(values).nan_to_num(nan=math.inf)
    drawn = torch.randint(len(ranked), (size,), generator=generator)
    return int(drawn[ranked[drawn].argmin()])
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A4-2-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(select, "parent", "EvolQ")


def wins(values, size, times=4000, seed=0):
    """How often each member wins, as shares."""
    generator = torch.Generator().manual_seed(seed)
    winners = [select(torch.tensor(values), size, generator) for _ in range(times)]
    assert all(type(w) is int for w in winners), "return a Python integer: int(...)"
    outside = [w for w in winners if not 0 <= w < len(values)]
    assert not outside, f"index {outside[:1]} of {len(values)} members"
    return torch.bincount(torch.tensor(winners), minlength=len(values)) / times


state = torch.get_rng_state()
same(wins([0.3, 0.1, 0.2], 1), [1 / 3] * 3, "shares of three members in tournaments of 1", 0.04)
same(
    wins([0.3, 0.1, 0.2], 2),
    [1 / 9, 5 / 9, 3 / 9],
    "shares of three members in tournaments of 2, with replacement",
    0.04,
)
found = wins([float(15 - i) for i in range(15)], 10)
same(found[14], 1 - (14 / 15) ** 10, "share of the best of 15 in tournaments of 10", 0.03)
same(wins([math.nan, 0.5], 4), [1 / 16, 15 / 16], "shares of a failed member and another", 0.03)
same(wins([0.5, math.nan], 4), [15 / 16, 1 / 16], "shares of a member and a failed one", 0.03)
same(
    wins([math.nan, 3e38], 4), [1 / 16, 15 / 16], "shares of a failed member and one of 3e38", 0.03
)
untouched = torch.equal(state, torch.get_rng_state())
assert untouched, "draw from the generator that is passed in, not from the global one"
print("Exercise 2: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A4-2-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
shares = 100 * wins([float(i) for i in range(15)], 10)
figure = new_figure(
    6.4,
    2.4,
    f"Share of 4,000 tournaments of 10 among 15 members: the best wins {shares[0]:.0f} per cent, "
    f"the second {shares[1]:.0f}, the third {shares[2]:.0f}, the last ten together "
    f"{shares[5:].sum():.0f}.",
)
axes = figure.add_subplot()
axes.bar(range(1, 16), shares, color=PETROFF[0])
axes.set(xlabel="rank of the member", ylabel="tournaments won, %", xticks=range(1, 16))
figure


# %% nbgrader={"grade": true, "grade_id": "A4-2-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_tournament(cases=12, times=2500, seed=42):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        n, size = (1 + torch.randint(9, (2,), generator=generator)).tolist()
        values = torch.randn(n, generator=generator)
        failed = torch.rand(n, generator=generator) < 0.2
        values[failed] = math.nan
        if case % 3 == 0:
            values = values * 1e37  # failed members lose against these, too
        own = torch.Generator().manual_seed(case)
        said = f"{n} members ({int(failed.sum())} failed), tournaments of {size}"
        with trying(said):
            winners = torch.tensor([select(values.clone(), size, own) for _ in range(times)])
        order = values.nan_to_num(nan=math.inf).argsort(stable=True)
        good = [int(i) for i in order if not failed[i]]
        for rank, member in enumerate(good):
            expected = ((n - rank) / n) ** size - ((n - rank - 1) / n) ** size
            found = float((winners == member).float().mean())
            tolerance = 5 * math.sqrt(expected * (1 - expected) / times) + 2 / times
            assert abs(found - expected) <= tolerance, (
                f"{said}: rank {rank + 1} wins {found:.3f} of them, {expected:.3f} is expected"
            )


check_tournament()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 3: ask and tell
#
# **Difficulty:** hard · **Minutes:** 60 · **Points:** 4 (public checks 1, hidden tests 3: order 1, questions 1, failures and the best 1)
#
# Complete the class: it keeps a population and knows nothing of networks. So that mistakes above do
# not cost points again, `mutate` and `select` are passed in; the tests pass their own.
#
# - At the start, `members` is a list of `population` equal pairs `(value, vector)`, those of the
#   start. `best` is the pair `(vector, value)` of the best so far, at first the start. Mind the
#   order: *value first* in `members`, *vector first* in `best`.
# - `ask()` calls `select(values, tournament, generator)` to choose a member, where `values` is a tensor of
#   the members' values in their order, and returns `mutate(vector, step, generator)`. Call each once,
#   in this order, with the search's own generator, made from `seed`.
# - `tell(child, value)` inserts the child and then drops the *worst* member, which may be the child
#   itself: the population keeps its size. Keep `members` sorted by value, best first; among
#   equals the older stands before the younger, and the younger is dropped first. Store a value of NaN
#   as infinity. `best` changes only for a strictly smaller value.
#
# <details><summary>Hint</summary>
#
# What does "stable" mean for Python's `sorted`, and where must the child stand before sorting? Which
# value is not equal to itself?
#
# </details>
#
# **Expected** (60 candidates on a rippled bowl of 8 scales):
#
# ![Values of 60 candidates and the best so far, which falls from 4.3 to 0.7.](figures/A4-3.png)


# %% nbgrader={"grade": false, "grade_id": "A4-3", "locked": false, "schema_version": 3, "solution": true, "task": false}
class Evolution:
    """Evolutionary search by ask and tell; the values are to be made small."""

    def __init__(self, start, value, step, population, tournament, seed, mutate, select):
        """Begin with copies of start (d,), whose value is known."""
        self.step, self.tournament = step, tournament
        self.mutate, self.select = mutate, select
        self.generator = torch.Generator().manual_seed(seed)
        ### BEGIN SOLUTION
        self.members = [(value, start)] * population
        self.best = (start, value)
        ### END SOLUTION

    def ask(self):
        """The next candidate (d,)."""
        ### BEGIN SOLUTION
        values = torch.tensor([value for value, _ in self.members])
        winner = self.select(values, self.tournament, self.generator)
        return self.mutate(self.members[winner][1], self.step, self.generator)
        ### END SOLUTION

    def tell(self, child, value):
        """Learn what a candidate is worth, a number."""
        ### BEGIN SOLUTION
        value = math.inf if value != value else value
        self.members.append((value, child))
        self.members = sorted(self.members, key=lambda member: member[0])[:-1]
        if value < self.best[1]:
            self.best = (child, value)
        ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A4-3-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
calls = []


def choose_last(values, size, generator):
    """A stand-in for select: the last member; notes its arguments."""
    calls.append(("select", [round(float(v), 3) for v in values], size))
    return len(values) - 1


def add_one(parent, step, generator):
    """A stand-in for mutate: the parent plus one; notes its arguments."""
    calls.append(("mutate", parent.tolist(), step))
    return parent + 1


def values_of(search):
    """The members' values."""
    return [float(value) for value, _ in search.members]


own_work(Evolution, "EvolQ", "RandomSearch", "minimize")
search = Evolution(torch.tensor([1.0]), 5.0, 0.1, 3, 7, 0, add_one, choose_last)
assert values_of(search) == [5, 5, 5], f"a population of 3 at the start: {values_of(search)}"
same(search.ask(), [2.0], "the first child")
expected = [("select", [5.0, 5.0, 5.0], 7), ("mutate", [1.0], 0.1)]
assert calls == expected, f"calls of ask: {calls} instead of {expected}"
for child, value, expected, what in (
    (2.0, 4.0, [4, 5, 5], "a better child"),
    (3.0, 9.0, [4, 5, 5], "a child that is worse than all: it is dropped again"),
    (4.0, 4.5, [4, 4.5, 5], "a child between others"),
    (5.0, math.nan, [4, 4.5, 5], "a failed child (NaN): it is dropped"),
    (6.0, 3.0, [3, 4, 4.5], "the best child yet"),
):
    search.tell(torch.tensor([child]), value)
    found = values_of(search)
    assert found == expected, f"members after {what}, value {value}: {found}, not {expected}"
same(search.best[0], [6.0], "the best vector")
same(search.best[1], 3.0, "the best value")
search.tell(torch.tensor([7.0]), 3.0)
same(search.best[0], [6.0], "the best vector after an equal one: the first stays")
vectors = [float(vector) for _, vector in search.members]
assert vectors == [6, 7, 2], f"members 6, 7, 2 by age among equals, not {vectors}"
same(search.ask(), [3.0], "the next child: select chose the last member, 2")
single = Evolution(torch.ones(2), 1.0, 0.1, 1, 2, 0, add_one, choose_last)
single.tell(torch.zeros(2), 1.0)
assert single.members[0][1].tolist() == [1, 1], "of two equals, the younger is dropped first"
print("Exercise 3: the public checks pass.")


# %% nbgrader={"grade": false, "grade_id": "A4-3-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
def jagged_bowl(x):
    """A bowl around 0.05 with ripples."""
    return float(((x - 0.05) * 40).square().mean() + 0.3 * (200 * x).sin().mean())


start = torch.full((8,), 0.1)
search = Evolution(start, jagged_bowl(start), 0.01, 15, 10, 0, mutate, select)
told, bests = [], [search.best[1]]
for _ in range(60):
    child = search.ask()
    search.tell(child, jagged_bowl(child))
    told.append(jagged_bowl(child))
    bests.append(search.best[1])
figure = new_figure(
    6.4,
    2.8,
    f"Values of 60 candidates and the best so far, which falls from {jagged_bowl(start):.1f} to "
    f"{bests[-1]:.1f}.",
)
axes = figure.add_subplot()
axes.plot(range(1, 61), told, "o", color=PETROFF[0], fillstyle="none", label="candidate")
axes.step(range(61), bests, where="post", color="0.25", label="best so far")
axes.set(xlabel="candidate", ylabel="value")
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A4-3-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded: which members stay, in which order.
### BEGIN HIDDEN TESTS
def check_members(cases=60, seed=43):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        population = int(torch.randint(1, 8, (), generator=generator))
        told = torch.randint(9, (20,), generator=generator).tolist()  # many equal values
        said = f"population {population}, start 5, then {told}"
        with trying(said):
            search = Evolution(torch.zeros(1), 5.0, 0.1, population, 2, case, add_one, choose_last)
        expected = [(5.0, 0.0)] * population
        for number, value in enumerate(told, 1):
            with trying(said):
                search.tell(torch.tensor([float(number)]), float(value))
            expected = sorted([*expected, (float(value), float(number))], key=lambda pair: pair[0])[
                :-1
            ]
            found = [(float(v), float(vector[0])) for v, vector in search.members]
            assert found == expected, (
                f"{said}: (value, child) {found} after child {number}, not {expected}"
            )


check_members()
### END HIDDEN TESTS


# %% nbgrader={"grade": true, "grade_id": "A4-3-hidden-2", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests: what ask does.
### BEGIN HIDDEN TESTS
def reference_mutate(parent, step, generator):
    return (parent + (2 * torch.rand(len(parent), generator=generator) - 1) * step).abs()


def reference_select(values, size, generator):
    drawn = torch.randint(len(values), (size,), generator=generator).tolist()
    return min(drawn, key=lambda i: float(values[i]))


def check_asking(cases=30, seed=44):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        d, population, size = (1 + torch.randint(9, (3,), generator=generator)).tolist()
        start, offset = torch.rand(2, d, generator=generator)
        said = f"{d} scales, population {population}, tournament {size}"
        with trying(said):
            yours = Evolution(
                start.clone(), 9.0, 0.3, population, size, case, reference_mutate, reference_select
            )
        theirs = eq.EvolQ(start, 9.0, 0.3, population, size, case)
        for turn in range(25):
            expected = theirs.ask()[0]
            with trying(said):
                child = yours.ask()
            same(child, expected, f"{said}, candidate {turn + 1}")
            value = float((expected - offset).square().sum())
            with trying(said):
                yours.tell(child, value)
            theirs.tell(expected[None], torch.tensor([value]))


check_asking()
### END HIDDEN TESTS


# %% nbgrader={"grade": true, "grade_id": "A4-3-hidden-3", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests: failures, and the best.
### BEGIN HIDDEN TESTS
def check_best(cases=60, seed=45):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        population = int(torch.randint(1, 8, (), generator=generator))
        told = torch.randint(9, (20,), generator=generator).double()
        told[torch.rand(20, generator=generator) < 0.3] = math.nan
        said = f"population {population}, start 6, then {told.tolist()}"
        with trying(said):
            search = Evolution(torch.zeros(1), 6.0, 0.1, population, 2, case, add_one, choose_last)
        best = (0.0, 6.0)
        for number, value in enumerate(told.tolist(), 1):
            with trying(said):
                search.tell(torch.tensor([float(number)]), value)
                vector, found = float(search.best[0][0]), float(search.best[1])
                values = [float(v) for v, _ in search.members]
            best = (float(number), value) if value < best[1] else best
            assert (vector, found) == best, (
                f"{said}: after child {number} the best is child {vector:g} with {found}, "
                f"instead of child {best[0]:g} with {best[1]}"
            )
            assert not any(map(math.isnan, values)), f"{said}: NaN is stored as infinity"


check_best()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 4: block by block
#
# **Difficulty:** medium · **Minutes:** 50 · **Points:** 2 (public checks 1, hidden tests 1)
#
# Evol-Q visits one block at a time, last to first, several times over. Write that loop, and return the final
# value, a number:
#
# - In each of `passes` passes visit every block of `chain.searchable`, in reverse order.
# - At a visit, `objective = eq.BlockObjective(chain, block, images, targets)` is the loss of the
#   whole network as a function of this block's scales. Call `search(objective, value, visit)`:
#   `value` is the loss of the present scales, `visit` the number of the visit, 0, 1, 2, ... over all
#   passes. It returns a tuple `(vector, value)`, the scales to go on with and their loss.
# - `objective.commit(vector)` writes the vector into the model. Always commit what the search returns, also
#   if its value is no better: whether to accept is the search's decision. The next visit goes on from there.
# - Compute the loss of the present scales once, at the first visit, by `objective` at
#   `objective.start`; from then on it is the value that the last search returned. Return the last one.
#
# Only `images` and `targets` take part, and no test data. (The library's `eq.evolve` is the same loop, written as
# a generator: it *yields* an event after each evaluation and each commit, so that whoever iterates can print,
# draw, or stop with `break`. With `*_, last = eq.evolve(...)` it runs to its end, and `last.fitness` is the final value.)
#
# <details><summary>Hint</summary>
#
# An objective takes candidates as rows: `objective(objective.start[None])` has shape `(1,)`.
# `reversed(...)` or `[::-1]` turns a list around.
#
# </details>
#
# **Expected** (3 passes with 3 candidates a visit on 50 images; on the same machine yours is the same
# line, on another a flipped rounding may change a step):
#
# ![The loss after each of 18 visits: from 21.7298 to 21.7078.](figures/A4-4.png)


# %% nbgrader={"grade": false, "grade_id": "A4-4", "locked": false, "schema_version": 3, "solution": true, "task": false}
def evolve_blocks(chain, images, targets, passes, search):
    """Search block by block, in place; returns the final value, a number."""
    ### BEGIN SOLUTION
    value, visit = None, 0
    for _ in range(passes):
        for block in reversed(chain.searchable):
            objective = eq.BlockObjective(chain, block, images, targets)
            if value is None:
                value = float(objective(objective.start[None])[0])
            vector, value = search(objective, value, visit)
            objective.commit(vector)
            visit += 1
    return value
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A4-4-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(evolve_blocks, "evolve", "Inputs", "visits_of")
images, targets = (part[:4] for part in setting(20, 0)[:2])
seen = []


CHANGES = (-3.0, 1.0, 2.5)  # of the value, at one visit after another


def pretend(objective, value, visit):
    """A stand-in for a search: every scale grows by a tenth; the value goes up and down."""
    block = ".".join(objective.genome.names[0].split(".")[:2])
    seen.append((block, visit, round(value, 3), float(objective.start[0])))
    shapes = [tuple(part.shape) for part in objective.targets]
    assert shapes == [(4, 62)], f"targets of the 4 given images are expected, not {shapes}"
    return 1.1 * objective.start, value + CHANGES[visit % 3]


chain = chain_at_start(20, 0)
first = {b: eq.genome_of(chain.model, [b]).read(chain.model) for b in chain.searchable}
whole = eq.BlockObjective(chain, "blocks.5", images, targets)
value = float(whole(whole.start[None])[0])
with only_given_images():
    last = evolve_blocks(chain, images, targets, 2, pretend)
order = [block for block, *_ in seen]
expected = chain.searchable[::-1] * 2
assert order == expected, f"visits to {', '.join(order)} instead of {', '.join(expected)}"
visits = [visit for _, visit, *_ in seen]
assert visits == list(range(12)), f"visits are numbered {visits} instead of 0 to 11"
expected_values = [value]
for visit in range(12):
    expected_values.append(expected_values[-1] + CHANGES[visit % 3])
same([v for *_, v, _ in seen], expected_values[:-1], "values that the searches get", 1e-3)
same(last, expected_values[-1], "the value that is returned: the last, not the lowest", 1e-3)
again = [scale for _, _, _, scale in seen[6:]]
same(
    again,
    [1.1 * float(first[block][0]) for block in expected[:6]],
    "first scale of each block at its second visit: what was committed at the first, 1.1 times",
)
for block, vector in first.items():
    now = eq.genome_of(chain.model, [block]).read(chain.model)
    same(now, 1.21 * vector, f"scales of {block} after two passes: 1.1 times 1.1")
print("Exercise 4: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A4-4-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
images, targets = setting(50, 0)[:2]
line = []


def three_candidates(objective, value, visit):
    """The paper's visit: three candidates by EvolQ."""
    if not line:
        line.append(value)
    evolution = eq.EvolQ(objective.start, value, step=1e-3, seed=visit)
    vector, value = eq.minimize(objective, evolution, 3)
    line.append(value)
    return vector, value


last = evolve_blocks(chain_at_start(50, 0), images, targets, 3, three_candidates)
figure = new_figure(
    6.4,
    2.8,
    f"The loss after each of {len(line) - 1} visits: from {line[0]:.4f} to {line[-1]:.4f}.",
)
axes = figure.add_subplot()
axes.step(range(len(line)), line, where="post", color=PETROFF[0])
for i in (6, 12):
    axes.axvline(i, color="0.7", ls=":")
axes.set(xlabel="visits (dotted: a pass is over)", ylabel="loss", xticks=range(0, 19, 3))
figure


# %% nbgrader={"grade": true, "grade_id": "A4-4-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_blocks(cases=3, seed=44):
    for case in range(cases):
        n, passes, candidates = ((12, 1, 2), (20, 2, 1), (16, 3, 1))[case]
        images, targets = setting(n, seed + case)[:2]

        def search(objective, value, visit, candidates=candidates, case=case):
            evolution = eq.EvolQ(objective.start, value, 1e-3, 15, 10, 1_000_003 * case + visit)
            return eq.minimize(objective, evolution, candidates)

        yours, theirs = chain_at_start(n, seed + case), chain_at_start(n, seed + case)
        said = f"{n} images, {passes} passes, {candidates} candidates a visit"
        with trying(said), only_given_images():
            found = evolve_blocks(yours, images, targets, passes, search)
        config = eq.SearchConfig(passes=passes, cycles=candidates, seed=case)
        *_, last = eq.evolve(theirs, images, targets, config, 1e-3)
        same(found, last.fitness, f"{said}: the value")
        for block in yours.searchable:
            genome = eq.genome_of(yours.model, [block])
            same(genome.read(yours.model), genome.read(theirs.model), f"{said}: scales of {block}")


check_blocks()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 5, open: beat the paper's search
#
# **Difficulty:** open · **Minutes:** 60, or as long as it is fun · **Points:** 4 (public checks 1,
# measured gain 3)
#
# The paper's search, shortened here to 3 passes with 3 candidates a visit on 100 images, starts from
# MinMax scales of the ViT with 3-bit weights. Write a search that leaves a better network *at the same cost*.
# You may change any scale of the network, in any way, and use all of `evolq_lite` except what changes weights:
# rounding methods such as GPTQ or AdaRound choose other integers for the weights, so they are **not allowed** here.
#
# **Rules.** `my_search(chain, images, targets, budget, seed)` gets the network with its first scales,
# calibration images, the float network's logits for them, and a budget. Change the scales of `chain.model`
# in place and return nothing. Weights, zero points and bits must not change, and scales must stay positive and
# finite. Cost is counted in *block passes*: one image through one block is one, and three if a gradient
# is computed, on copies of the network as well. `budget.left` says what is left; a search that spends more
# fails. The marks use 100 images and what 3 passes of the paper's search cost; the public check uses 20 images
# and one pass. So take both from what you are given: `len(images)` and `budget.left`. Work that does not
# run the network costs nothing of the budget, but time is limited: the cell for marks runs your search and the
# paper's on 8 seeds within 10 minutes, of which the model solution takes 2 to 4. No other images, no labels,
# no test data. The same seed must give the same scales.
#
# **Marks.** Your network is compared image by image with others, on 8 × 3,000 images that no search has seen, for
# seeds that you do not know. What counts is not the gain itself, which is noisy, but the lower end of its
# one-sided 95 % interval, `lower_end` in the next cell. The four points are:
#
# - 1 for the public checks;
# - 1 if the lower end of your gain over the paper's network is above 0;
# - 1 more if it is above 1 point;
# - 1 more if the lower end of your gain over a network with scales of least squared error, *not searched at
#   all*, is above 0 as well: then your search itself has added something. (A search that adds nothing gets
#   this point in at most 5 of 100 cases; one that adds 0.57 points misses it in fewer than 5.)
#
# Both gains go on the leaderboard of the course. The images come from the training part, on which the float
# network was trained, so levels of accuracy are too high and only differences count. They are not test images,
# because a leaderboard *chooses*, and test data must choose nothing.
#
# `compete(my_search, seeds, held_out)` in the next cell makes the same comparison for seeds of your choice. Do
# not try many variants on one seed and keep the best: you know what comes of that.
#
# <details><summary>Hint</summary>
#
# Ask of the start what assignment 1 asks. Then separate: how far do you come without any search, and
# what does the search add? Steps can be relative to each scale, or adapt to success
# (`SearchConfig(mutation="adaptive")`); there are more kinds of scales (`scales="all"`), and other
# losses. One pass of `eq.evolve` with 3 cycles costs `69 * len(images)`, and the start once
# `len(images)`; how many passes fit into `budget.left`?
#
# </details>
#
# **Expected** (from a solution that is not tuned; can you do better?):
#
# ![Top-1 on 1,000 held-out images with 95 % intervals: start 88.00 % (85.84, 89.87); paper 88.40 % (86.27, 90.24); yours 91.30 % (89.39, 92.89). Gain: +2.90 points (+1.20, +4.59), p = 0.0011.](figures/A4-5.png)


# %% nbgrader={"grade": false, "grade_id": "A4-given", "locked": true, "schema_version": 3, "solution": false, "task": false}
class Budget:
    """Counts block passes of a chain while it is open, and stops whoever spends too many."""

    def __init__(self, chain, limit=math.inf):
        self.blocks, self.limit, self.used = chain.model.blocks, limit, 0

    @property
    def left(self):
        """Block passes that may still be spent."""
        return self.limit - self.used

    def count(self, block, inputs, output):
        """One block has run."""
        self.used += len(inputs[0]) * (3 if output.requires_grad else 1)
        assert self.used <= self.limit, f"the budget of {self.limit} block passes is spent"

    def __deepcopy__(self, memo):
        """A copy of the network is charged to the same budget."""
        return self

    def __enter__(self):
        self.hooks = [block.register_forward_hook(self.count) for block in self.blocks]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def paper_search(chain, images, targets, budget, seed, passes=3):
    """The paper's search, as evolq_lite has it."""
    for _ in eq.evolve(chain, images, targets, eq.SearchConfig(passes=passes, seed=seed), 1e-3):
        pass  # each event could be printed or drawn; here only the scales count


def all_scales(chain):
    """Every scale of the network, in one vector."""
    named = chain.model.named_buffers()
    return torch.cat([value.flatten() for name, value in named if name.endswith(".scale")])


def rest(model):
    """Everything but scales: weights, zero points, and what the quantizers are."""
    state = {n: v.clone() for n, v in model.state_dict().items() if not n.endswith(".scale")}
    points = [m for m in model.modules() if hasattr(m, "integers")]
    return state, [(point.integers, point.symmetric, point.axis) for point in points]


def lower_end(was, now):
    """The lower end of the one-sided 95 % interval of a gain, from right or wrong (images,) twice."""
    gains = now.double() - was.double()
    return float(gains.mean() - 1.645 * gains.std() / len(gains) ** 0.5)


def no_search(chain, images, targets, budget, seed):
    """Leave the scales as they are."""


def compete(search, seeds, held_out=1000, images=100, passes=3, others=(("start", no_search),)):
    """Your networks and others: right or wrong on each held-out image, pooled over seeds.

    Returns {"paper", "yours", ...} -> right (images,), and the largest share of a budget you used.
    `others` are pairs of a name and a search whose cost is not counted.
    """
    right, spent = {name: [] for name in (*dict(others), "paper", "yours")}, 0.0
    for seed in seeds:
        calibration, targets, unseen, _ = setting(images, seed, held_out)
        chains = {name: chain_at_start(images, seed, held_out) for name in right}
        paper, yours = chains["paper"], chains["yours"]
        for name, other in others:
            other(chains[name], calibration, targets, None, seed)
        with Budget(paper) as cost:
            paper_search(paper, calibration, targets, None, seed, passes)
        setting.cache_clear()  # nothing else is left within reach
        was = rest(yours.model)
        with Budget(yours, cost.used) as budget, only_given_images():
            search(yours, calibration.clone(), targets.clone(), budget, seed)
        assert budget.used <= budget.limit, "more was spent than the budget"
        now = rest(yours.model)
        kept = was[1] == now[1] and was[0].keys() == now[0].keys()
        kept = kept and all(torch.equal(was[0][name], value) for name, value in now[0].items())
        assert kept, "only scales may change: weights, zero points and bits stay as they are"
        spent = max(spent, budget.used / budget.limit)
        scales = all_scales(yours)
        assert torch.isfinite(scales).all() and (scales > 0).all(), "scales must be positive"
        models = {name: chain.model for name, chain in chains.items()}
        found = eq.predict(models, unseen[0].split(100))
        for name, classes in found.items():
            right[name].append(classes == unseen[1])
    return {name: torch.cat(parts) for name, parts in right.items()}, spent


# %% nbgrader={"grade": false, "grade_id": "A4-5", "locked": false, "schema_version": 3, "solution": true, "task": false}
def my_search(chain, images, targets, budget, seed):
    """Improve the scales of chain.model, in place, for no more than budget.left block passes."""
    ### BEGIN SOLUTION
    for module in chain.model.modules():
        if hasattr(module, "weight_quant"):  # the clip of least squared error: free of charge
            point = module.weight_quant
            observer = eq.OBSERVERS["mse"](point.integers, 0, point.symmetric)
            observer.update(module.weight)
            point.scale.copy_(observer.params()[0])
    # A gradient from few images is rough but cheap: more steps fit into the budget.
    objective = eq.BlockObjective(chain, chain.searchable, images[:2], targets[:2], scales="all")
    log = objective.start.log().requires_grad_()  # equal steps in it are relative steps of scales
    adam = torch.optim.Adam([log])
    batch = min(20, len(images))
    steps = budget.left // (3 * len(chain.searchable) * batch)  # a gradient costs three
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        at = torch.randperm(len(images), generator=generator)[:batch]
        part = (chain, chain.searchable, images[at], targets[at], eq.mse)
        vector = log.detach().exp()
        gradient, _ = eq.BlockObjective(*part, scales="all").gradient(vector)
        log.grad = gradient * vector  # the chain rule of exp
        adam.param_groups[0]["lr"] = 0.03 * (1 + math.cos(math.pi * step / steps)) / 2
        adam.step()
    objective.commit(log.detach().exp())
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A4-5-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false} seconds=120
right, spent = compete(my_search, [0], held_out=50, images=20, passes=1)
changed = [chain_at_start(20, 0, 50) for _ in range(2)]
calibration, targets = setting(20, 0, 50)[:2]
for chain in changed:
    with Budget(chain, 70 * 20) as budget, only_given_images():
        my_search(chain, calibration.clone(), targets.clone(), budget, 0)
same(all_scales(changed[1]), all_scales(changed[0]), "the same seed, a second time: the scales")
before = all_scales(chain_at_start(20, 0, 50))
assert not torch.equal(all_scales(changed[0]), before), "the scales are those of the start"
print(f"Exercise 5: the public checks pass; your search used {100 * spent:.0f} % of its budget.")

# %% nbgrader={"grade": false, "grade_id": "A4-5-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
right, spent = compete(my_search, [0], held_out=1000)
results = {name: eq.Accuracy(int(r.sum()), len(r)) for name, r in right.items()}
gain = eq.Comparison.of(right["paper"], right["yours"])
said = "; ".join(f"{name} {accuracy}" for name, accuracy in results.items())
said = f"Top-1 on 1,000 held-out images with 95 % intervals: {said}. Gain: {gain}."
figure = new_figure(6.4, 2.2, said.replace("[", "(").replace("]", ")"))
axes = figure.add_subplot()
for i, accuracy in enumerate(results.values()):
    low, high = accuracy.interval
    middle = accuracy.top1
    error = [[100 * (middle - low)], [100 * (high - middle)]]
    axes.errorbar(100 * middle, i, xerr=error, fmt="osD"[i], color=PETROFF[i], capsize=4)
axes.set(yticks=range(3), yticklabels=list(results), ylim=(2.6, -0.6))
axes.set_xlabel("top-1 on 1,000 held-out images of the training part, %")
axes.set_title(f"yours against the paper's: {gain}", fontsize="medium", loc="left")
figure


# %% nbgrader={"grade": true, "grade_id": "A4-5-hidden", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false} seconds=600
# Your search is compared with the paper's here when the assignment is graded.
### BEGIN HIDDEN TESTS
def clip_alone(chain, images, targets, budget, seed):
    """Scales of least squared error and no search: what a search should be compared with."""
    for module in chain.model.modules():
        if hasattr(module, "weight_quant"):
            point = module.weight_quant
            observer = eq.OBSERVERS["mse"](point.integers, 0, point.symmetric)
            observer.update(module.weight)
            point.scale.copy_(observer.params()[0])


with trying("your search, on one of the seeds of the marks"):
    seeds, others = range(4501, 4509), (("clipped", clip_alone),)
    right, spent = compete(my_search, seeds, held_out=3000, others=others)
gain = eq.Comparison.of(right["paper"], right["yours"])
searched = eq.Comparison.of(right["clipped"], right["yours"])
over_paper = lower_end(right["paper"], right["yours"])
points = int(over_paper > 0) + int(over_paper > 0.01)
points += points == 2 and lower_end(right["clipped"], right["yours"]) > 0
print(f"leaderboard: {gain}; against scales of least squared error, unsearched, {searched}")
int(points)
### END HIDDEN TESTS

# %% [markdown]
# ## Question 1
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. The official code computes the test accuracy after every visit, 120 times, and reports the
# best. The networks of these visits hardly differ. Why is the reported number too good, and what would you report
# instead?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A4-6", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: the measured accuracies scatter by chance, and the best of 120 lies above their mean even if all networks
#   are equally good; the test set has chosen.
# - 1 point: report the accuracy of the last scales (or of those chosen by calibration or held-out images), once.
#
# Accept: "Maximum of 120 noisy numbers; evaluate on test once, at the end." (2)
#
# Reject: "The test set is too small." (0; 1 if the maximum of noisy numbers is explained)
#
# Reject: "Report the mean of the 120." (1 at most: better, but still 120 looks at test data)

# %% [markdown]
# ## Question 2
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. What did you change in your search of exercise 5, and how do you know which part of the gain
# comes from which change? If you do not know: which comparison would tell?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A4-7", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: a clear description of what was changed.
# - 1 point: an ablation: start and search changed one at a time at equal cost, paired, on several seeds. (Most of the
#   model solution's gain is its start: the start alone gains 2.4 points, and the search adds 0.6.)
#
# Accept: "MSE start only, search only, both, each on seeds 1 to 5, same images." (1 for the second part)
#
# Reject: "It got better, so the change helped." (0 for the second part)
#
# Reject: "I tried ten settings and this was the best." (0 for the second part)

# %% [markdown]
# ## Question 3
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. A search with 3 candidates a visit accepts a candidate whenever its loss on 100
# calibration images is lower. Two networks differ by 0.0003 in that loss, and the noise floor, measured as in exercise 3 of
# assignment 2, is 0.0004. What has the search learned, and what would you change?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A4-8", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: nothing that another kernel, machine or batch order would confirm: the difference is below what the same
#   network differs from itself when it is computed in another way.
# - 1 point: wider steps or more images, so that differences stand out; or accept only gains above the floor; or judge
#   at the end on other images.
#
# Accept: "It is a coin flip; use a larger step." (2)
#
# Reject: "It has found a better network, if only a little." (0)
#
# Reject: "Use more candidates." (0 for the second part: more looks at noise)
