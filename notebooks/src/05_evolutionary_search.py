# %% [markdown]
# # 5. Evolutionary search
#
# **Afterwards you can** drive a search by ask and tell; say what population, tournament and
# mutation width do; count how much of a population the paper's 15 members really are; race
# searches and gradients at equal cost, and say what such a race shows and what it does not.
#
# **You need** lesson 1 (scales, and why rounding makes steps). Lessons 3 and 4 help: they look at
# the landscape and at the loss that are searched here.
#
# **Time:** 30 minutes to read, 2 minutes to run.
#
# **Works offline:** yes. The network, the images and the results are in `data/`.
#
# **Module to read beside it:** `evolq_lite/search.py`, and `descent.py` for the gradients.

# %%
import inspect
import textwrap

import numpy as np
import torch
from IPython.display import Code

import evolq_lite as eq
from evolq_lite.descent import COST_OF_GRADIENT, descend
from evolq_lite.experiments.report import shipped
from evolq_lite.figures import MARKERS, PETROFF, new_figure
from evolq_lite.panels import EvolutionPanel
from evolq_lite.panels.evolution import JaggedBowl
from evolq_lite.search import (
    SPSA,
    CoordinateSearch,
    EvolQ,
    FromCmaes,
    LogSpace,
    Optimizer,
    RandomSearch,
)

torch.set_num_threads(2)

# %% [markdown]
# ## The idea
#
# A search wants scales with a low loss, and all that it may do is try: propose scales, hear their
# loss, propose others. It needs no gradient; the paper holds that a gradient is no reliable guide
# where a loss jumps, and the end of this lesson puts that to the test. *Evolution* keeps the best
# proposals so far, the *population*, and makes new ones from them. The paper's rule for a new one,
# the *child*, is
#
# $$\mathrm{child}_i = \big|\, \mathrm{parent}_i + u_i \,\big|, \qquad u_i \sim U(-\epsilon,
# \epsilon)$$
#
# $i$: number of a scale; $u_i$: a random number, drawn anew for each scale, uniform between
# $-\epsilon$ and $\epsilon$; $\epsilon$: the *mutation width*, 0.001 for weights of 3 and 4 bits;
# the bars: a scale is positive, so a negative one is mirrored. All scales of a block move at once.
#
# Who is the parent? Draw a *tournament* of 10 members with replacement; the best of them wins. The
# child joins the population of 15, and the worst member leaves. That is the whole algorithm, and
# its source is hardly longer:

# %%
Code(
    textwrap.dedent(
        inspect.getsource(RandomSearch.mutated)
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
# An optimizer here knows nothing of networks. `ask` returns candidates, one a row; somebody
# evaluates them; `tell` takes their values. The *objective* is of the kind that lesson 6
# explains: from the 192 attention scales of the last block of a ViT with 3-bit weights to their
# infoNCE loss on 100 calibration images.

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
# Seven of these eight children are worse than the start, and the one that is better gains two parts
# in 100,000. These are the differences that the search lives on. (Lesson 3 measures from which size
# on they are more than noise.) `eq.minimize(objective, search, evaluations=8)` is this loop.
#
# ## What is a population of 15?
#
# The paper visits a block, starts with 15 copies of its present scales, makes 3 children, keeps the
# best member, and goes on to the next block, where 15 copies begin again. So when the third child
# is drawn, at most 2 of 15 members differ from the start: **at least 13 are copies**. And the best
# member takes part in a tournament of $S$ draws from $K$ members with probability
# $1 - (1 - 1/K)^S$.

# %%
print(f"best member in the tournament: {1 - (1 - 1 / 15) ** 10:.1%}")
left = []
for seed in range(10):
    search = EvolQ(start, value, step=1e-3, population=15, tournament=10, seed=seed)
    eq.minimize(objective, search, evaluations=3)
    left.append(sum(torch.equal(vector, start) for _, vector in search.members))
print("copies of the start after 3 candidates, ten visits:", *left)

# %% [markdown]
# So the second and the third child often come from the start again, even after a better one was
# found. In a visit this short, evolution is close to trying three random neighbours and keeping the
# best. What makes the paper's search evolve is that the next visit starts from what the last one
# kept.
#
# Does a real population help, given time? A toy can be run often enough to tell: two scales, a
# bowl, and roundings that make it jagged. 30 searches each:

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
# With 3 candidates the size of the population makes no difference that these numbers could show.
# With 30, sixty members are a burden: tournaments of 10 rarely meet the few good ones. With 100, a
# single member is behind a population of 15, because it can only go down: it has no second place to
# start from when it sits in a pit. (Whether a single member also loses to sixty cannot be told:
# their difference is about one standard error.)
#
# See it happen. *Step* makes one candidate, *Play* a hundred, *Reset* begins anew. White circles
# are members; where several are one and the same, their number stands beside. The panel opens after
# 12 candidates. Its second landscape is the real block of above.

# %%
EvolutionPanel(made=12)

# %% [markdown]
# **Predict, then try.**
#
# 1. On the toy, play with a mutation width of 0.0001, of 0.001 and of 0.03. Which gets stuck, which
#    gets far, and what goes wrong with the third?
# 2. Set *Tournament* to 1, so that any member may be the parent, and play with seeds 0, 1 and 2. Is
#    the search faster or slower than with 10? Do the copies of the start live longer?
# 3. Choose the real block with seed 0 and press *Step* three times, as in one visit of the paper.
#    How many copies of the start are left? How many candidates does it take until none is?
#
# <details><summary>What you should have seen</summary>
#
# 1. 0.0001 stays in the pit in which it starts, near 0.89. 0.001 jumps over the walls between pits
#    and gets below 0.3. 0.03 is wider than the bowl: with seed 0, one child of a hundred is
#    accepted.
# 2. Slower with each of the three seeds: good members wait to be drawn. Copies of the start live
#    longer, with seed 0 until candidate 34 instead of 23.
# 3. All 15: the first three children were no better than the start, so they were dropped. After 12
#    candidates 12 copies are left, and the last one goes with candidate 27.
#
# </details>
#
# ## Rivals at equal cost
#
# Is evolution a good way to spend evaluations? Give other methods the same number. A candidate
# costs one *forward*; a gradient costs about three, because the way back costs about two.
#
# - **Random search** mutates the start, again and again: evolution without learning.
# - **EvolQ, relative** multiplies each scale by up to 1 % more or less. The paper's width is the
#   same for all scales, so small scales are moved by a larger share.
# - **SPSA** estimates a slope from two candidates, $x + cd$ and $x - cd$ with random signs $d$, and
#   steps down it.
# - **Coordinate search** moves one scale at a time.
# - **Separable CMA-ES** learns a width for each scale from generations of candidates. (It needs the
#   package `cmaes`; without it the race goes on with the others.)
# - **SGD** (with momentum) and **Adam** follow a gradient that pretends that rounding has slope 1:
#   the straight-through estimator, `round_ste` of lesson 3.
#
# Steps are the paper's 0.001, or 1 % of each scale, which is about as much. (A coordinate moves ten
# times as far, being alone.) Three seeds each; gradients draw nothing, so one run.

# %%
budget, seeds = 60, (0, 1, 2)
methods = {
    "random search": lambda seed: RandomSearch(start, value, 1e-3, seed),
    "EvolQ (paper)": lambda seed: EvolQ(start, value, 1e-3, seed=seed),
    "EvolQ, relative": lambda seed: EvolQ(start, value, 0.01, seed=seed, relative=True),
    "SPSA": lambda seed: LogSpace(start, lambda x: SPSA(x, value, 0.01, seed)),
    "coordinates": lambda seed: LogSpace(start, lambda x: CoordinateSearch(x, value, 0.1, seed)),
    "separable CMA-ES": lambda seed: LogSpace(start, lambda x: FromCmaes(x, value, 0.01, seed)),
}


def raced(search: Optimizer) -> list[float]:
    """The values of the start and of all candidates."""
    told = [value]
    eq.minimize(objective, search, budget, lambda vector, found: told.append(found))
    return told


curves, ends = {}, {}
for name, make in methods.items():
    try:
        searches = [make(seed) for seed in seeds]
    except ValueError as error:
        print(f"{name} is left out: {error}")
        continue
    curves[name] = np.array([raced(search) for search in searches])
    ends[name] = [search.best[0] for search in searches]

for name in ("SGD", "Adam"):
    told = [value]
    best, _ = descend(
        objective, name.lower(), 0.01, budget, lambda vector, found, told=told: told.append(found)
    )
    print(f"{name:5}", *(f"{1e3 * (found - value):.2f}" for found in told[1:]))
    curves[name] = np.repeat(told, [1] + [COST_OF_GRADIENT] * (len(told) - 1))[None]
    ends[name] = [best]

# %% [markdown]
# The two printed lines are the fitness along the gradients' ways, against the start, in 1e-3: they
# go down, and they jump. (The first number is the start itself, computed by the kernels that
# gradients need; that it is not 0 is the noise of lesson 3.) As for all methods, the best vector
# that was met counts.
#
# A search can overfit even 192 numbers to 100 images, so the second column looks at the scales that
# each method found on 400 *other* calibration images, which no method has seen.

# %%
fresh = eq.BlockObjective(chain, "blocks.5", demo.calibration[100:], demo.targets[100:])
fresh_start = float(fresh(start[None])[0])
gains = {name: 1e3 * (np.minimum.accumulate(rows, 1) - value) for name, rows in curves.items()}
print(f"{'fitness against the start, 1e-3':32}{'searched':>8}  (lowest, highest)   other images")
for name in sorted(gains, key=lambda name: gains[name][:, -1].mean()):
    end = gains[name][:, -1]
    other = 1e3 * (fresh(torch.stack(ends[name])).mean() - fresh_start)
    print(f"{name:32}{end.mean():8.2f}  ({end.min():5.2f}, {end.max():5.2f}){other:15.2f}")

said = ", ".join(f"{name} {rows[:, -1].mean():.1f}" for name, rows in gains.items())
figure = new_figure(
    8.5, 4.2, f"Best fitness against the start after {budget} forwards, in 1e-3: {said}."
)
axes = figure.add_subplot()
for i, (name, rows) in enumerate(gains.items()):
    style = {"color": PETROFF[i], "ls": ("-", "--", ":")[i % 3], "marker": MARKERS[i]}
    costs = np.arange(rows.shape[1])
    axes.plot(costs, rows.mean(0), markevery=(3 * i % 20, 20), label=name, **style)
    axes.fill_between(costs, rows.min(0), rows.max(0), color=PETROFF[i], alpha=0.15, lw=0)
axes.set(xlabel="cost in forwards", ylabel="best fitness against the start, 1e-3")
axes.set_title("One block, 100 images; lines: means, bands: all of 3 seeds", fontsize="medium")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
figure

# %% [markdown]
# ## What this race shows, and what it does not
#
# On this block, at this cost, every method finds something better than the start, and the gradient
# is not stuck: the best that SGD meets on its way is far below all searches, on other images too;
# then it climbs again, so it matters that the best vector counts. Adam, whose first step is equally
# long (1 % of each scale), ends where the paper's search ends. Among the searches, SPSA and
# evolution with relative steps end lowest. Coordinates are last: 60 forwards move at most 60 of 192
# scales. Separable CMA-ES draws 19 candidates a generation, so it has learned three times only. On
# other images about half of each gain is left, at most two thirds, and there the paper's search is
# no better than random search.
#
# It does not show which method is best. This is one block of a small network, one set of 100
# images, one step for each method that nobody has tuned, and three seeds; some bands overlap. Try
# it: give EvolQ (paper) a step of 3e-3, and it comes up beside SPSA; give Adam 0.03, and it passes
# both. Nor is a fitness an accuracy: no test image was read here.
#
# The claim itself, that gradients fail where evolution goes on, is measured on the whole network:
# all blocks, three step sizes for each method, three seeds with images of their own, and the test
# images at the end. *paper* goes block by block, where a candidate of a late block costs less than
# one forward; *evolq* is the same rule on all blocks at once, *evolq adaptive* lets its width
# follow success; *sepcma* is separable CMA-ES; *fisher adam* is Adam on a loss weighted by Fisher
# information. Each method shows the best of its three steps; for all but SGD that is the widest, so
# a wider grid could change their order. In the right picture the methods are ordered by fitness,
# best first, not by gain. Where two have one colour, the marker tells them apart.

# %%
try:
    figure, verdict = shipped("C3")
except ValueError as error:
    figure, verdict = None, str(error)
print(textwrap.fill(verdict, 100))
figure

# %% [markdown]
# ## Check yourself
#
# Open an answer to see whether, and why, it is right.
#
# **1. Population 15, 3 candidates. How many *different* members can take part in the tournament for
# the third candidate?**
#
# <details><summary>15</summary>No: all 15 begin as copies of one vector, and each candidate adds at
# most one that differs.</details>
# <details><summary>3</summary>Right: the start and two children. The other members are copies of
# the start, 13 of 15 or more.</details>
# <details><summary>10</summary>No: ten are drawn, with replacement; most of them are the same
# vector.</details>
#
# **2. You ask for 15 candidates at once, `search.ask(15)`, to evaluate them on 15 machines. What is
# different from asking 15 times for one?**
#
# <details><summary>Nothing: 15 candidates are 15 candidates</summary>No: asked one by one, each can
# have an earlier one as its parent.</details>
# <details><summary>All 15 have parents from the same population</summary>Right: they cannot learn
# from each other. The paper asks for one at a time; more at once is an extension here.</details>
# <details><summary>The population must be 15</summary>No: how many are asked for and how many are
# kept are two choices.</details>
#
# **3. A gradient method makes 60 steps, evolution tries 60 candidates, and the gradient method ends
# lower. Is it the better method?**
#
# <details><summary>Yes, at the same number of steps it is ahead</summary>Steps are not what one
# pays for: a gradient costs about three forwards, so it had three times the budget.</details>
# <details><summary>Not known from this</summary>Right: compare at equal cost, with step sizes
# chosen equally well for both, over several seeds, and on images that neither has searched
# on.</details>
# <details><summary>No, gradients do not exist here</summary>Between two jumps of the loss there is
# one, but it knows nothing of the jumps. The straight-through estimator is a substitute that can
# point down well, as SGD shows above. </details>
#
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima*, ICCV 2023, arXiv 2308.10814:
# the search. J. C. Spall, *Multivariate Stochastic Approximation Using a Simultaneous Perturbation
# Gradient Approximation*, IEEE Transactions on Automatic Control 37(3), 1992: SPSA; QZO, arXiv
# 2505.13430, applies it to quantization scales. COMQ, arXiv 2403.07134: coordinate descent for
# quantization. N. Hansen, *The CMA Evolution Strategy: A Tutorial*, arXiv 1604.00772. Y. Bengio et
# al., arXiv 1308.3432: the straight-through estimator.
