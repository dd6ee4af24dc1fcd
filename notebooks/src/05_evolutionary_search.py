# %% [markdown]
# # 5. Evolutionary search
#
# **After this lesson you can** drive a search by ask and tell; say what population, tournament and
# mutation width do; count how many of the paper's 15 members really differ; race searches and
# gradients at equal cost, and say what such a race shows and what it does not.
#
# **Prerequisites:** lesson 1 (scales, and why rounding makes steps). Lessons 3 and 4 help: they
# cover the landscape and the loss that are searched here.
#
# **Time:** 30 minutes to read, 2 minutes to run.
#
# **Works offline:** yes. The network, the images and the results are in `data/`.
#
# **Read alongside:** `evolq_lite/search.py`, and `descent.py` for the gradients.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import inspect
import textwrap

import numpy as np
import torch
from IPython.display import Code, display

from evolq_lite.descent import COST_OF_GRADIENT, descend
from evolq_lite.experiments.report import load_claim
from evolq_lite.figures import MARKERS, PETROFF, new_figure
from evolq_lite.landscape import JaggedBowl
from evolq_lite.panels import EvolutionPanel, Quiz, RacePanel
from evolq_lite.search import (
    SPSA,
    CoordinateSearch,
    EvolQ,
    LogSpace,
    Optimizer,
    RandomSearch,
    SepCMA,
)

torch.set_num_threads(2)

# %% [markdown]
# ## The idea
#
# A search looks for scales with a low loss, and all it can do is try: propose scales, observe their
# loss, propose others. It needs no gradient. The paper argues that a gradient is not a reliable
# guide where a loss jumps; the end of this lesson puts that to the test. *Evolution* keeps the best
# proposals so far, the *population*, and makes new ones from them. The paper's rule for making a
# new one, the *child*, is
#
# $$\mathrm{child}_i = \big|\, \mathrm{parent}_i + u_i \,\big|, \qquad u_i \sim U(-\epsilon,
# \epsilon)$$
#
# $i$: the index of a scale; $u_i$: a random number, drawn separately for each scale, uniform
# between $-\epsilon$ and $\epsilon$; $\epsilon$: the *mutation width*, 0.001 for 3-bit and 4-bit
# weights; the bars: scales are positive, so a negative value is mirrored. All scales of a block
# move at once.
#
# Which member is the parent? Draw a *tournament* of 10 members with replacement; the best of them
# wins. The child joins the population of 15, and the worst member leaves. That is the whole
# algorithm, and its source is hardly longer:

# %%
Code(
    textwrap.dedent(
        inspect.getsource(RandomSearch.mutate)
        + "\n"
        + inspect.getsource(EvolQ.parent)
        + "\n"
        + inspect.getsource(EvolQ.tell)
    ),
    language="python",
)

# %% [markdown]
# ## Ask and tell, by hand
#
# An optimizer here knows nothing about networks. `ask` returns *candidates*, one per row; someone
# evaluates them; `tell` receives their values. The *objective*, the function to minimize, maps the
# 192 attention scales of the last block of a ViT with 3-bit weights to their infoNCE loss on 100
# calibration images. Lesson 6 shows how it is built.

# %%
demo = eq.load_demo("vit", calibration=500, seed=0)
images, targets = demo.calibration[:100], demo.targets[:100]
qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=3, act_bits=8))
eq.calibrate(qmodel, images)
chain = eq.chain_of(qmodel)
objective = eq.BlockObjective(chain, "blocks.5", images, targets)
start = objective.start  # (192,)
value = float(objective(start[None])[0])
print(f"{len(start)} scales from {start.min():.3f} to {start.max():.3f}, fitness {value:.5f}")

search = EvolQ(start, value, step=1e-3, population=15, tournament=10, seed=0)
for number in range(1, 9):
    candidates = search.ask(1)  # (1, 192)
    values = objective(candidates)  # (1,)
    before = search.best[1]
    search.tell(candidates, values)
    fate = "the best so far" if search.best[1] < before else ""
    print(f"candidate {number}: {1e3 * (float(values[0]) - value):+.2f} e-3 {fate}")

# %% [markdown]
# Even the best of these children gains less than one part in 10,000 of the loss, which is about 26.
# The search lives on differences this small. (On 100 images many of them are below lesson 3's noise
# floor, a few 1e-4 of loss: they are real on this machine, and need not be on another. Your numbers
# may differ: another processor computes with other kernels, and its last digits decide which child
# is better.)
# `eq.minimize(objective, search, evaluations=8)` runs this loop.
#
# ## What is a population of 15?
#
# The paper visits a block, starts with 15 copies of its current scales, makes 3 children, keeps the
# best member, and moves on to the next block, which again starts with 15 copies. So when the third
# child is drawn, at most 2 of the 15 members differ from the start: **at least 13 are copies**. The
# probability that the best of $K$ members takes part in a tournament of $S$ draws is $1 - (1 -
# 1/K)^S$.

# %%
print(f"best member in the tournament: {1 - (1 - 1 / 15) ** 10:.1%}")
left = []
for seed in range(10):
    search = EvolQ(start, value, step=1e-3, population=15, tournament=10, seed=seed)
    eq.minimize(objective, search, evaluations=3)
    left.append(sum(torch.equal(vector, start) for _, vector in search.members))
print("copies of the start after 3 candidates, ten visits:", *left)

# %% [markdown]
# So the second and third child often come from the start again, even after a better member was
# found. In a visit this short, evolution is close to trying three random neighbors and keeping the
# best. What makes the paper's search evolve is that each visit starts from what the previous one
# kept.
#
# Does a real population help, given enough time? We can run a toy problem often enough to tell: two
# scales, a bowl, and roundings that make it jagged. Each row averages 30 searches:

# %%
toy = JaggedBowl()
first = float(toy(toy.start[None])[0])
print(f"start {first:.2f}; mean best value, with its standard error:")
for evaluations in (3, 30, 100):
    row = []
    for members in (1, 15, 60):
        searches = [EvolQ(toy.start, first, 1e-3, members, seed=seed) for seed in range(30)]
        found = torch.tensor([eq.minimize(toy, search, evaluations)[1] for search in searches])
        row.append(f"population {members:2} {found.mean():.3f} ({found.std() / 30**0.5:.3f})")
    print(f"{evaluations:3} candidates: {', '.join(row)}")

# %% [markdown]
# With 3 candidates, these numbers show no effect of the population size. With 30, sixty members are
# a burden: tournaments of 10 rarely include the few good ones. With 100, a single member falls
# behind a population of 15 because it can only go down: when it sits in a pit, it has no second
# place to start from. (We cannot tell whether a single member also loses to sixty: their difference
# is about one standard error.)
#
# Watch it happen. *Step* makes one candidate, *Play* a hundred, *Restart* begins again from the
# start. White circles are members; where several are identical, their number is shown. A candidate
# is *accepted* if it is better than all before it; others may still join the population. The panel
# opens after 12 candidates. Its second landscape is the real block from above.

# %%
EvolutionPanel(made=12)

# %% [markdown]
# **Predict, then try.**
#
# 1. On the toy, play with mutation widths of 0.0001, 0.001 and 0.03. Which gets stuck, which gets
#    far, and what goes wrong with the third?
# 2. Set *Tournament* to 1, so that any member may be the parent, and play with seeds 0, 1 and 2. Is
#    the search faster or slower than with 10? Do the copies of the start survive longer?
# 3. Choose the real block with seed 0 and press *Step* three times, as in one visit of the paper.
#    How many copies of the start are left? How many candidates does it take until none are left?
#
# <details><summary>What you should have seen</summary>
#
# 1. 0.0001 stays in the pit where it starts, near 0.89. 0.001 jumps over the walls between pits and
#    gets below 0.3. 0.03 is wider than the bowl: with seed 0, one child in a hundred joins the
#    population.
# 2. Slower with each of the three seeds: good members have to wait to be drawn. Copies of the start
#    survive longer: with seed 0, until candidate 34 instead of 23.
# 3. Between 12 and 15: a child takes the place of a copy only if it is better than the worst
#    member. (Exactly how many depends on your processor, as above. On two machines we saw 15 and 13
#    after three candidates, 12 and 7 after twelve, and none after 27.)
#
# </details>
#
# ## Rivals at equal cost
#
# Is evolution a good way to spend evaluations? Give other methods the same budget. A candidate
# costs one *forward pass*; a gradient costs about three, because the backward pass costs about two.
#
# - **Random search** mutates the start, again and again: evolution without learning.
# - **EvolQ, relative** changes each scale by up to 1 % of its size. The paper's width is the same
#   for all scales, so small scales move by a larger share.
# - **SPSA** estimates a slope from two candidates, $x + cd$ and $x - cd$ with random signs $d$, and
#   steps downhill.
# - **Coordinate search** moves one scale at a time.
# - **Separable CMA-ES** learns a width for each scale from generations of candidates. (It needs the
#   package `cmaes`; without it, the race runs with the other methods.)
# - **EvolQ, adaptive** (ours) mutates relative to each scale, and its width grows after a success
#   and shrinks after failures.
# - **Adam** follows a gradient that pretends that rounding has slope 1, the straight-through
#   estimator, `round_ste` from lesson 3. It moves once per three forward passes, 20 times while the
#   others make 60 candidates. Integers have no gradient, so on the real block its passes simulate
#   them in float; the values are the same up to the noise floor of lesson 3.
#
# Steps are the paper's 0.001, or 1 % of each scale, which is about the same. (Coordinate search
# moves ten times as far, because it moves one scale at a time.)
#
# **Bet first.** Here are eight optimizers, live: choose whom you believe in, press *Race*, and see
# who is ahead when the budget is spent. Race a few times with other seeds, first on the toy, then
# on the real block. Does the same one always win? Would you bet on the same one on both landscapes?
# And what does Adam see of the toy? (With that estimator, $t - \mathrm{round}(t)$ has slope 0: the
# bowl without its pits.)

# %%
RacePanel()

# %% [markdown]
# One race is one draw of random numbers, so now the same on the real block with three seeds each,
# without the adaptive EvolQ, and with a second gradient method, **SGD** (with momentum). (The two
# gradient methods use no random numbers, so they run once.) You have seen the toy: would you keep
# your bet?

# %%
budget, seeds = 60, (0, 1, 2)
methods = {
    "random search": lambda seed: RandomSearch(start, value, 1e-3, seed),
    "EvolQ (paper)": lambda seed: EvolQ(start, value, 1e-3, seed=seed),
    "EvolQ, relative": lambda seed: EvolQ(start, value, 0.01, seed=seed, relative=True),
    "SPSA": lambda seed: LogSpace(start, lambda x: SPSA(x, value, 0.01, seed)),
    "coordinates": lambda seed: LogSpace(start, lambda x: CoordinateSearch(x, value, 0.1, seed)),
    "separable CMA-ES": lambda seed: LogSpace(start, lambda x: SepCMA(x, value, 0.01, seed)),
}


def race(search: Optimizer) -> list[float]:
    """The fitness of the start and of every candidate."""
    told = [value]
    eq.minimize(objective, search, budget, lambda vector, found: told.append(found))
    return told


curves, ends = {}, {}
for name, make in methods.items():
    try:
        searches = [make(seed) for seed in seeds]
    except ValueError as error:
        print(f"{name} is skipped: {error}")
        continue
    curves[name] = np.array([race(search) for search in searches])
    ends[name] = [search.best[0] for search in searches]

for name in ("SGD", "Adam"):
    told = [value]
    best, _ = descend(
        objective, name.lower(), 0.01, budget, lambda vector, found, told=told: told.append(found)
    )
    print(f"{name:5}", *(f"{1e3 * (found - value):.2f}" for found in told[1:]))
    # the value of a step counts once its forward passes are paid for
    curves[name] = np.repeat(told, [COST_OF_GRADIENT] * (len(told) - 1) + [1])[None]
    ends[name] = [best]

# %% [markdown]
# The two printed lines show the fitness along the gradient paths relative to the start, in units of
# 1e-3: they go down, and they jump. (The first number is the start itself, computed with the
# kernels that gradients need; that it is not 0 is the noise of lesson 3.) For every method, the
# best vector found along the way counts.
#
# A search can overfit even 192 numbers to 100 images, so the last column evaluates the scales that
# each method found on 400 *other* calibration images, which no method has seen.

# %%
fresh = eq.BlockObjective(chain, "blocks.5", demo.calibration[100:], demo.targets[100:])
fresh_start = float(fresh(start[None])[0])
gains = {name: 1e3 * (np.minimum.accumulate(rows, 1) - value) for name, rows in curves.items()}
print(f"{'fitness minus start, 1e-3':35}{'searched':>8}  (lowest, highest)   other images")
for name in sorted(gains, key=lambda name: gains[name][:, -1].mean()):
    end = gains[name][:, -1]
    other = 1e3 * (fresh(torch.stack(ends[name])).mean() - fresh_start)
    print(f"{name:35}{end.mean():8.2f}  ({end.min():5.2f}, {end.max():5.2f}){other:15.2f}")

# %% tags=["hide-input"]
said = ", ".join(f"{name} {rows[:, -1].mean():.1f}" for name, rows in gains.items())
figure = new_figure(
    8.5, 4.2, f"Best fitness relative to the start after {budget} forward passes, in 1e-3: {said}."
)
axes = figure.add_subplot()
for i, (name, rows) in enumerate(gains.items()):
    style = {"color": PETROFF[i], "ls": ("-", "--", ":")[i % 3], "marker": MARKERS[i]}
    costs = np.arange(rows.shape[1])
    axes.plot(costs, rows.mean(0), markevery=(3 * i % 20, 20), label=name, **style)
    axes.fill_between(costs, rows.min(0), rows.max(0), color=PETROFF[i], alpha=0.15, lw=0)
axes.set(xlabel="cost in forward passes", ylabel="best fitness relative to the start, 1e-3")
axes.set_title("One block, 100 images; lines: means, bands: range of 3 seeds", fontsize="medium")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure

# %% [markdown]
# ## What this race shows, and what it does not
#
# On this block and at this cost, every method finds something better than the start, and the
# gradient does not get stuck: the best point along SGD's path is far below all searches, on other
# images too. Then SGD climbs again, so it matters that the best vector counts. Adam, whose first
# step is equally long (1 % of each scale), ends among the searches. Many of these end close
# together: some bands overlap, and their order changes from one machine to another with the last
# digits of its kernels. Some are handicapped by the budget: in 60 forward passes coordinate search
# moves at most 60 of 192 scales, and separable CMA-ES, which draws 19 candidates per generation,
# learns only three times. On other images roughly half of each gain remains.
#
# The race does not show which method is best. This is one block of a small network, one set of 100
# images, one untuned step size per method, and three seeds; some bands overlap. Try it: give EvolQ
# (paper) a step of 3e-3 or Adam one of 0.03, and the order changes. Nor is fitness the same as
# accuracy: no test image was used here.
#
# The claim itself, that gradients fail where evolution keeps improving, is measured on the whole
# network: all blocks, four step sizes per method, three seeds with their own images, and the test
# images at the end. *paper* goes block by block, where a candidate in a late block costs less than
# one forward pass; *evolq* applies the same rule to all blocks at once; *evolq adaptive* adjusts
# its width to its success; *sepcma* is separable CMA-ES; *fisher adam* is Adam on a loss weighted
# by Fisher information. Each method shows the best of its four steps. For SGD, *evolq* and *fisher
# adam* that lies within the grid; for all others it is the widest step, so a wider grid could
# change the order. (With three steps, SGD was first and Adam second.) In the right picture the
# methods are ordered by fitness, best first, not by gain. Where two share a color, the marker tells
# them apart. (R3 in lesson 7 asks the same of trained networks; gradients are ahead there, too.)

# %%
figure, verdict = load_claim("C3")
display(verdict)
figure

# %% [markdown]
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. The population has 15 members and a visit makes 3 candidates. How many *different* "
    "members can take part in the tournament for the third candidate?",
    {
        "15": (
            "No: all 15 start as copies of one vector, and each candidate adds at most one that "
            "differs."
        ),
        "3": (
            "Right: the start and two children. The other members, 13 of 15 or more, are copies "
            "of the start."
        ),
        "10": "No: ten are drawn, with replacement; most of them are the same vector.",
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "2. You ask for 15 candidates at once, `search.ask(15)`, to evaluate them on 15 machines. "
    "How does that differ from asking for one candidate 15 times?",
    {
        "Not at all: 15 candidates are 15 candidates": (
            "No: asked for one by one, each can have an earlier one as its parent."
        ),
        "All 15 have parents from the same population": (
            "Right: they cannot learn from each other. The paper asks for one at a time; asking "
            "for several at once is an extension here."
        ),
        "The population must be 15": (
            "No: how many you ask for and how many you keep are separate choices."
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "3. A gradient method takes 60 steps, evolution tries 60 candidates, and the gradient "
    "method ends lower. Is it the better method?",
    {
        "Yes, at the same number of steps it is ahead": (
            "Steps are not the cost: a gradient costs about three forward passes, so it had three "
            "times the budget."
        ),
        "This does not tell us": (
            "Right: compare at equal cost, with step sizes tuned equally well for both, over "
            "several seeds, and on images that neither has seen."
        ),
        "No, gradients do not exist here": (
            "Between two jumps of the loss there is one, but it does not see the jumps. The "
            "straight-through estimator is a substitute that can point downhill well, as SGD "
            "shows above."
        ),
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima*, ICCV 2023, arXiv 2308.10814:
# the search. J. C. Spall, *Multivariate Stochastic Approximation Using a Simultaneous Perturbation
# Gradient Approximation*, IEEE Transactions on Automatic Control 37(3), 1992: SPSA; QZO, arXiv
# 2505.13430, applies it to quantization scales. COMQ, arXiv 2403.07134: coordinate descent for
# quantization. N. Hansen, *The CMA Evolution Strategy: A Tutorial*, arXiv 1604.00772. Y. Bengio et
# al., arXiv 1308.3432: the straight-through estimator.
