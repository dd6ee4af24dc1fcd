# %% [markdown]
# # 3. Non-smooth landscapes
#
# **After this lesson you can** plot the loss of a quantized network along a line of scales; tell
# its jaggedness from the noise floor of the computation; say why the gradient through `round` is
# zero, and what the straight-through estimator puts in its place; compare a ViT with a CNN,
# calibration with test images, and relative with absolute steps.
#
# **Prerequisites:** lessons 1 and 2: scales, and where they are in a network.
#
# **Time:** 35 minutes to read, 2 minutes to run.
#
# **Works offline:** yes. The networks, the images and the results are in `data/`.
#
# **Read alongside:** `evolq_lite/landscape.py`.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import inspect
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Code, display
from scipy.stats import spearmanr

from evolq_lite.experiments.c2_landscape import describe_layers
from evolq_lite.experiments.report import load_claim, load_results
from evolq_lite.figures import PETROFF, new_figure
from evolq_lite.landscape import (
    direction,
    inputs_by_another_kernel,
    layer_objective,
    line,
    local_minima,
    noise_floor,
    noise_of_lines,
    other_ways,
    random_lines,
)
from evolq_lite.panels import LandscapePanel, Quiz
from evolq_lite.panels.pictures import draw_lines

torch.set_num_threads(2)

# %% [markdown]
# ## The idea
#
# A search over scales minimizes a loss, and how it should search depends on what that loss looks
# like around the current scales. A layer has a hundred scales or more, too many to draw. So we look
# along a line:
#
# $$f(r) = L\big(s + r\, d\big), \qquad d_i = s_i\, g_i$$
#
# $L$: the loss of the whole network as a function of the scales of one layer, here infoNCE against
# the float network's logits (lesson 4 explains it; for now, lower is better); $s$: the first
# scales, from calibration; $r$: the *radius*; $d$: a direction; $g_i$: a normally distributed
# random number for each scale $i$. So $r = 0.01$ means that each scale moves by about one percent
# of its size, some up and some down.

# %%
demo = eq.load_demo("vit", calibration=100, seed=0)
qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=3, act_bits=8))
eq.calibrate(qmodel, demo.calibration)
chain = eq.chain_of(qmodel)
genome = eq.genome_of(qmodel, ["blocks.2.attn.qkv"], "weights")
objective = eq.BlockObjective(chain, "blocks.2", demo.calibration, demo.targets, genome=genome)
start = objective.start
here = float(objective(start[None])[0])
print(f"{len(start)} scales, from {start.min():.3f} to {start.max():.3f}; loss {here:.4f}")

# %% [markdown]
# A *genome* is the vector of scales that may change, here those of one layer's weights. A *chain*
# is the network as a list of its blocks, and the *objective* maps a genome to the loss on the
# calibration images; lesson 6 shows how both are built. `line` evaluates the objective at points on
# such a line, nothing more. It never sees a network: an objective is any function from vectors of
# scales to numbers.

# %%
Code(inspect.getsource(line), language="python")

# %% [markdown]
# ## Three looks at one line
#
# The same direction, within 10 %, 1 % and 0.1 % of the first scales. Each picture shows the middle
# tenth of the previous one. A smooth function would look more and more like a straight line.

# %% tags=["hide-input"]
along = direction(start, seed=0)
steps = (0.1, 0.01, 0.001)
looks = {r: line(objective, start, along, torch.linspace(-r, r, 21)) for r in steps}
said = "; ".join(f"within {r:.1%}: {float(v.max() - v.min()):.4f}" for r, v in looks.items())
figure = new_figure(7.8, 2.5, f"Loss along one line at three radii. Highest minus lowest, {said}.")
for axes, (r, values) in zip(figure.subplots(1, 3, sharey=True), looks.items()):
    draw_lines(axes, torch.linspace(-r, r, 21), {"loss": values}, here, 0.0)
    axes.set_title(f"within {r:.1%}")
figure.axes[0].set_ylabel("change of the loss")
print("highest minus lowest,", said)
figure

# %% [markdown]
# It does not straighten out, and the changes shrink far less than the radius: at a hundredth of the
# radius, more than a third of the range remains.
#
# ## Is that the landscape, or noise?
#
# The network is deterministic: the same scales give the same loss, bit for bit. But another
# computer, kernel (the routine that multiplies matrices) or batch size adds the same products in a
# different order, and the last digit of a sum changes. Usually that does not matter. Here the sum
# is then rounded to one of 256 levels, and a sum that lies almost exactly between two levels can
# land on the other side. Some of these flips cause others, and the loss moves.
#
# So we compute the same line in four ways: as before; in chunks of 10 images; with products in
# float instead of integers; and with the last bit of the block's inputs changed. On paper they are
# the same function.

# %%
make = partial(
    layer_objective,
    block="blocks.2",
    layer="attn.qkv",
    images=demo.calibration,
    targets=demo.targets,
)
radii = torch.linspace(-0.01, 0.01, 21)
points = (start + radii[:, None] * along).abs()
floor, ways = noise_floor([objective, *other_ways(objective, make, chunks=(10,))], points)
names = ("as before", "chunks of 10", "float products", "last bits")
moved = (ways - ways[0]).abs().amax(1)
for name, difference in zip(names, moved.tolist()):
    print(f"{name:15} largest difference {difference:.1e}")
minima = [local_minima(ways[0], f) for f in (0.0, floor)]
print(f"noise floor {floor:.1e}; local minima: {minima[0]}, deeper than the floor: {minima[1]}")

# %% tags=["hide-input"]
figure = new_figure(
    6.0,
    2.8,
    f"The same line computed in two ways, which differ by up to {moved[2]:.1e}; the loss itself "
    f"ranges over {float(ways[0].max() - ways[0].min()):.1e}.",
)
axes = figure.add_subplot()
draw_lines(axes, radii, {names[0]: ways[0], names[2]: ways[2]}, here, floor)
axes.set(ylabel="change of the loss", title="blocks.2.attn.qkv, 3-bit weights")
axes.legend()
figure

# %% [markdown]
# The *noise floor* is the largest difference between any two of them. A bump below it says
# nothing about the network, and a search that gains less than the floor has gained nothing that
# would carry over to another machine. A *local minimum* counts as deeper than the floor if the line
# rises by more than the floor on both sides before it gets any lower. The gray band is as tall as
# the floor, half of it above 0 and half below. The bumps here are larger, so the landscape itself
# is jagged. (One of the four ways may change nothing at all: integer sums are exact in any order,
# and where no integer kernel is used, *float products* is what was computed in the first place.
# Floors differ between machines. And a floor is the largest of a few differences, so it grows with
# the number of points: 21 here, fewer below and in the panel.)
#
# ## Where the jumps come from
#
# When a scale moves, the integers of its channel stay the same until one of them flips. How many of
# the layer's weights have a different integer than at the first scales?

# %%
weight = qmodel.blocks[2].attn.qkv.weight.detach()
integers, zero = eq.IntRange(3, signed=True), torch.tensor(0.0)


def codes(scales):
    """The integers of the layer's weights."""
    return (eq.fake_quantize(weight, scales, zero, integers, axis=0) / scales[:, None]).round()


neighbor = start * (1 + 0.003 * torch.randn(len(start), generator=torch.Generator().manual_seed(5)))
print(f"weights whose integer differs, out of {weight.numel()}")
for r in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
    flips = [int((codes(c + r * direction(c)) != codes(c)).sum()) for c in (start, neighbor)]
    print(f"radius {r:.0e}: from the first scales {flips[0]:4}, from a neighbor {flips[1]:4}")
tied = ((weight / start[:, None]).abs().amax(1) - 3.5).abs() < 1e-5
print(f"channels whose largest weight is 3.5 scales: {int(tied.sum())} of {len(start)}")

# %% [markdown]
# From the first scales, even the smallest step flips dozens of integers. That is no accident:
# MinMax sets the scale to $2 \max|w| / 7$, so the largest weight of *every* channel is 3.5 scales,
# halfway between two integers. If that weight is positive, both directions lead to 3, the largest
# integer. If it is negative, the last bit of the scale decides between -3 and -4. A search that
# starts there starts on an edge. From a neighbor, flips become rare as the step shrinks.
#
# And still the loss moves. We average its change over eight random directions from such a neighbor,
# for the ViT and for the CNN. A smooth function would follow the dotted slope: a tenth of the step,
# a tenth of the change.

# %%
demos = {"ViT": (demo, qmodel, "blocks.2", "attn.qkv", 10)}
other = eq.load_demo("cnn", calibration=100, seed=0)
qcnn = eq.quantize(other.model, eq.QuantConfig(weight_bits=3, act_bits=8))
eq.calibrate(qcnn, other.calibration)
demos["CNN"] = (other, qcnn, "layer2.0", "conv1", 1)  # single images have another kernel
sizes = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
changes, floors = {}, {}
for name, (d, q, block, layer, chunk) in demos.items():
    make = partial(
        layer_objective, block=block, layer=layer, images=d.calibration, targets=d.targets
    )
    f = make(q)
    generator = torch.Generator().manual_seed(5)
    center = f.start * (1 + 0.003 * torch.randn(len(f.start), generator=generator))
    middle = f(center[None])
    away = [torch.stack([center + r * direction(center, seed=k) for k in range(8)]) for r in sizes]
    changes[name] = [float((f(points.abs()) - middle).abs().mean()) for points in away]
    floors[name], _ = noise_floor([f, *other_ways(f, make, [chunk])], away[1][:4].abs())
    listed = ", ".join(f"{r:.0e}: {c:.1e}" for r, c in zip(sizes, changes[name]))
    print(f"{name} mean change at radius {listed}; noise floor {floors[name]:.0e}")

# %%
said = ". ".join(
    f"{name}: from {values[0]:.1e} at 10 % to {values[-1]:.1e} at 0.001 %, noise floor "
    f"{floors[name]:.0e}"
    for name, values in changes.items()
)
figure = new_figure(5.8, 3.1, f"Mean change of the loss over the radius. {said}.")
axes = figure.add_subplot()
for i, (name, values) in enumerate(changes.items()):
    axes.loglog(sizes, values, "os"[i] + ("-", "--")[i], color=PETROFF[i], label=name)
    axes.axhline(floors[name], color=PETROFF[i], ls=("-", "--")[i], lw=0.8, alpha=0.6)
    axes.annotate(
        f"noise floor {name}", (sizes[0], floors[name]), fontsize=8, ha="right", va="bottom"
    )
smooth = changes["CNN"][0] * np.array(sizes[:4]) / sizes[0]
axes.loglog(sizes[:4], smooth, ":", color="0.4", label="a smooth function")
axes.set(xlabel="radius, share of every scale", ylabel="mean |change of the loss|")
axes.set_title("From a neighbor of the first scales")
figure.legend(loc="outside lower center", ncols=3)
figure

# %% [markdown]
# Neither follows the slope. But at small radii the two diverge: at 0.001 %, where hardly an integer
# of the layer flips, the ViT's loss still moves by about twice its noise floor, and the CNN's
# change has sunk below its own. The ViT's flips are in the activations. At a radius of 10 %, the
# CNN changed more. So how rough a landscape is depends on the radius at which you look, and any
# comparison must state it.
#
# ## Why not follow the gradient?
#
# `round` is flat except where it jumps: its derivative is 0 wherever it exists. Between two flips a
# quantized weight is a fixed integer times the scale, so it does move a little. But its product is
# rounded again as an activation, so the loss becomes a staircase. Here is a neuron with three
# weights, small enough to see this.

# %%
x, w = torch.tensor([0.9, -0.6, 0.4]), torch.tensor([0.55, -0.83, -0.31])
four, three = eq.IntRange(4, signed=True), eq.IntRange(3, signed=True)


def neuron(scale):
    """Squared error of a quantized neuron: weights in 3 bits, its output in 4 bits."""
    y = (x * eq.fake_quantize(w, scale, zero, three)).sum()
    return (eq.fake_quantize(y, torch.tensor(0.15), zero, four) - (x * w).sum()) ** 2


scales = torch.linspace(0.15, 0.45, 3001)
loss = torch.stack([neuron(s) for s in scales])
flat = float((loss.diff() == 0).float().mean())

# %% tags=["hide-input"]
figure = new_figure(
    5.6, 2.8, f"Loss of a neuron over its scale: a staircase, flat in {flat:.1%} of all steps."
)
axes = figure.add_subplot()
axes.plot(scales, loss, color=PETROFF[0], label="loss")
for i, s in enumerate((0.18, 0.23, 0.28, 0.33, 0.38, 0.43)):
    at = torch.tensor(s, requires_grad=True)
    value = neuron(at)
    slope = float(torch.autograd.grad(value, at)[0])
    reach = np.array([-0.012, 0.012])
    style = {"color": PETROFF[1], "lw": 3, "label": "straight-through slope" if i == 0 else None}
    axes.plot(s + reach, float(value.detach()) + slope * reach, **style)
axes.set(xlabel="scale", ylabel="squared error", title=f"flat in {flat:.1%} of the steps")
figure.legend(loc="outside lower center", ncols=2)
figure

# %% [markdown]
# The true gradient is 0 almost everywhere, so it carries no information. The *straight-through
# estimator* pretends that `round(x)` has derivative 1, as if there were no rounding:

# %%
print(inspect.getsource(eq.round_ste))

# %% [markdown]
# The forward pass keeps the rounded value; only the slope is made up. It is the slope of a
# different, smooth network. Does it predict what the real one does? Over 20 random directions from
# the first scales, we compare what the estimated slope predicts with what actually happens. The
# *rank correlation* measures how well two lists agree in their order: 1 means the same order, 0 no
# relation, -1 the reverse order.

# %%
gradient, _ = objective.gradient(start)
ways20 = torch.stack([direction(start, seed=100 + k) for k in range(20)])
for r in (0.001, 0.01, 0.1):
    predicted = r * ways20 @ gradient
    actual = objective((start + r * ways20).abs()) - here
    rho = spearmanr(predicted, actual).statistic
    print(
        f"radius {r:5}: predicted changes {float(predicted.std()):.1e}, "
        f"actual {float(actual.std()):.1e}, rank correlation {rho:+.2f}"
    )
downhill = -gradient * start**2  # against the slope in the logarithms of the scales
downhill = downhill / (downhill / start).square().mean().sqrt()
for r in (1e-4, 1e-3, 1e-2, 1e-1):
    actual = float(objective((start + r * downhill).abs()[None])[0]) - here
    predicted = r * float(downhill @ gradient)
    print(f"downhill by {r:.0e}: predicted {predicted:+.1e}, actual {actual:+.1e}")

# %% [markdown]
# In a random direction, the estimator predicts almost nothing: within 0.1 % the jumps are some 300
# times as large as the changes it predicts. If we follow its own downhill direction, the loss is
# higher after the smallest step and lower after 1 % and 10 %, though not by the predicted amounts.
# So the estimator does not see the individual stairs, but it may see which way they lead. In lesson
# 5, gradients race against searches at equal cost.
#
# ## Steps: relative or absolute?
#
# The paper's mutation moves every scale by up to 0.001, regardless of its size. But the sizes
# differ:

# %%
rows = []
for name, q in (("ViT", qmodel), ("CNN", qcnn)):
    for point, module in q.named_modules():
        if point.endswith("weight_quant") and any(part in point for part in ("s.2.", "r2.0.c")):
            s = module.scale
            rows.append((name, point.removesuffix(".weight_quant"), s.min(), s.median(), s.max()))
print("                            smallest  median  largest   0.001 is, of the median")
for name, layer, low, median, high in rows:
    print(f"{name} {layer:20}  {low:9.4f} {median:8.4f} {high:8.4f}   {0.1 / median:5.1f} %")

# %% [markdown]
# The same absolute step is a larger share of a small scale, so it asks each layer a different
# question. Relative steps ask all layers and networks the same question. (The difference matters
# within a layer, too: compare the smallest scale of `mlp.fc1` with its largest.)
#
# ## ViT against CNN, layer by layer
#
# The paper says that the landscape over the scales is very jagged. A summary of the paper, which we
# could not check against its text, adds that attention is worse than the MLP and that CNNs are
# smooth. We measured this with eight lines per layer, 500 calibration images and six layers. Here
# is the shipped result of `python -m evolq_lite reproduce C2`, which takes about 50 minutes on one
# core.

# %%
figure, verdict = load_claim("C2")
display(verdict)
figure

# %%
describe_layers(load_results("C2")).set_index("layer")

# %% [markdown]
# So the claim *holds partly* here. Every ViT layer that we look at is jagged above the noise floor.
# But both CNN layers are jagged as well, and attention does not have significantly more minima than
# the MLP. Moving attention scales does change the loss more: about four times as much from the
# first scales to the ends of a line (the column *mean change*). On test images, which the paper
# uses, that difference could be chance, and it is the CNN whose loss changes more. (All tests
# behind these sentences are in the [results](../data/results/README.md) of C2.)
#
# Is the ViT at least worse than the CNN? That depends on what counts as noise. A lower floor finds
# more minima, and the CNN's own floors are at most a tenth of the ViT's. With one floor for all six
# layers, the ViT has more minima; with each layer's own floor, the difference could be chance.
# Another measure, the total variation (all ups and downs added together, in units of the range), is
# lower in both CNN layers than in any ViT layer, and highest in the MLP. When a paper says "rugged"
# or "smooth", look for its definition. And remember that these are two small networks, a single
# block of each, and eight lines per layer, all through the first scales with their edge.
#
# ## Weights or activations?
#
# When a scale moves, two kinds of integers can flip: those of the weights and those of activations.
# We can tell them apart. Hold the integers of the weights (a weight is then integer times scale and
# moves evenly), or leave all activations in float, or both. This is our own question, and the
# shipped result of `python -m evolq_lite reproduce C9` (80 minutes on one core):

# %%
figure, verdict = load_claim("C9")
display(verdict)
figure

# %% [markdown]
# *Roughness* is the mean absolute second difference along a line: 0 for a straight line, large
# where neighbors know nothing of each other. In the ViT, activations make most of it with 50
# images; in the CNN the integers of the weights do, whatever the number of images. But the loss is
# a mean over images. An activation flips on one image and not on another, so these jumps average
# out as independent errors do: with one over the square root of the number of images, the power
# -0.5. The integer of a weight flips *for all images at once*, and its jumps hardly average out. At
# 1,000 images they are the larger part in the ViT's qkv, too, not yet in its other layers. Where
# neither can flip, next to nothing is left.
#
# What does that mean for the paper's explanation? The landscape over scales is jagged, as it says.
# But its jumps are of two kinds. More calibration images remove the one, and the other goes away if
# the integers are held (lesson 8); then, with equal and short steps, Adam gains far more than
# evolution at the same cost. (C3 compares them with steps that were chosen. These are 3-bit
# weights, lines within 1 %, one block of each network; the other numbers are in the
# [results](../data/results/README.md).)
#
# ## And on real networks?
#
# Another processor changes last bits in every block. That can be imitated on any machine: move the
# last bit of each number that travels from one block to the next, up or down, and compute the lines
# again. On the embedded ViT that changes little:

# %%
inputs = inputs_by_another_kernel(objective, demo.calibration)
other = layer_objective(
    qmodel, "blocks.2", "attn.qkv", demo.calibration, demo.targets, inputs=inputs
)
lines, again = (random_lines(f, start, 0.01, lines=3, points=21) for f in (objective, other))
floor, agreement = noise_of_lines(lines, again)
print("correlation of the bumps, line by line:", ", ".join(f"{a:.2f}" for a in agreement.tolist()))
print("minima deeper than the noise:", [local_minima(values, floor) for values in lines])

# %% [markdown]
# (1 means that both lines have the same bumps, 0 that they have nothing in common.) Now the same
# for trained ViT-Tiny and DeiT-Tiny: lines through the four layers of their tenth block (of
# twelve), on 100 photographs. Networks and photographs are not in this repository; this is the
# shipped result of `python -m evolq_lite reproduce R9`.

# %%
figure, verdict = load_claim("R9")
display(verdict)
figure

# %% [markdown]
# Activations make most of the bumps here, too. But now the lines with other last bits are other
# lines: as rough as the first, with few bumps in common.

# %%
for row in verdict.others:
    if "last bits" in row.name:
        print(f"{row.gain:5.2f}  {row.name}")

# %% [markdown]
# One last bit can flip a rounding. That changes every sum in which the rounded number takes part,
# and some of these flip in their turn, block after block. If the activations stay in float, there
# is nothing to flip: both computations agree, and the bumps that remain are those of the weights'
# integers, a twentieth (ViT-Tiny) to a fifth (DeiT-Tiny) as rough.
#
# Now choose the lowest point of a line, and let the other computation judge it (*left of the
# gain*). Of what the point gained over the line's mean, about two fifths are left. The rest was
# luck with the roundings of one computation. Claim R2 counts minima on the same lines: every layer
# has several per line, as pure noise would, and no layer has any that is deeper than the difference
# between the two computations. So whoever searches here should look for gains that are larger than
# such bumps, try more images (they average the bumps of the embedded networks away; here that is
# not measured), and test what was found on other images, or on another machine. (This is one block
# of each network, one seed and 3-bit weights, within 1 %.)
#
# ## Calibration against test
#
# A search sees calibration images. What we want is a low loss on *other* images. Are the low places
# of the two landscapes the same? We move all attention scales of the ViT to 30 random neighbors and
# only look: the test images do not choose anything.

# %%
images, labels = (part[::20] for part in demo.test)
seen = eq.BlockObjective(chain, chain.searchable, demo.calibration, demo.targets)
probe = eq.BlockObjective(chain, chain.searchable, images, labels, fitness=F.cross_entropy)
s = seen.start
near = torch.stack([s + 0.01 * direction(s, seed=k) for k in range(30)]).abs()
calibration, test = seen(near), probe(near)
rho = spearmanr(calibration, test).statistic

# %% tags=["hide-input"]
figure = new_figure(
    5.4,
    3.2,
    f"Test loss of {len(images)} images over the fitness on 100 calibration images, 30 neighbors "
    f"of the first scales. Rank correlation {rho:.2f}.",
)
axes = figure.add_subplot()
axes.plot(calibration, test, "o", color=PETROFF[0], label="neighbors, radius 1 %")
axes.plot(seen(s[None]), probe(s[None]), "P", color=PETROFF[1], ms=11, label="first scales")
axes.ticklabel_format(useOffset=False)
axes.set(xlabel="calibration fitness", ylabel="test loss (a probe)")
axes.set_title(f"rank correlation {rho:.2f}")
axes.legend()
print(f"rank correlation {rho:.2f} over {len(near)} neighbors")
figure

# %% [markdown]
# Neighbors that are better on calibration images tend to be better on test images, but it is only a
# tendency (with 30 neighbors the correlation is uncertain by about 0.3 either way). So part of what
# a search gains on calibration images is lost on others. This is *overfitting*, which lesson 4
# measures, and it is the reason why a gain counts only on images that the search has not seen.
#
# Now look for yourself: lines and planes through all layers of both networks, with the noise floor
# in the picture. Two switches ask where the jumps come from: hold the weights' integers (*Frozen
# integers*), leave the activations in float, or both. *Zoom* shows one line from 10 % down to
# 0.001 % of every scale, beside a smooth function.

# %%
LandscapePanel()

# %% [markdown]
# **Predict, then try.**
#
# 1. Go from 3 to 8 weight bits at radius 0.01. By what factor do the changes shrink? Does the line
#    become smooth?
# 2. Set the radius to 1e-5, for the ViT and for the CNN. What do you expect at the middle of the
#    line, and what next to it?
# 3. Press *Reset*, then switch to the test loss. Is the lowest point where it was?
#
# <details><summary>What you should have seen</summary>
#
# 1. By a factor of more than ten. The line stays jagged, with as many minima, and most of them are
#    still deeper than the noise floor, which has dropped as well: smaller stairs are still stairs.
# 2. Both have a spike in the middle: the first scales lie on the edge where the largest weights
#    flip, so even the smallest step changes the loss. Next to it the CNN is nearly flat, and the
#    ViT is not: its activations keep flipping.
# 3. No: the calibration fitness is lowest at the left end, the test loss about halfway to it. The
#    low places of the two landscapes need not coincide.
#
# </details>
#
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. Two computations of the same loss differ by 3e-4. A search has lowered the loss by "
    "1e-4. What do you know?",
    {
        "The network has improved by 1e-4": (
            "Not on another machine: there the order of the two could be reversed."
        ),
        "Nothing yet: the gain is below the noise floor": (
            "Right. The gain is a property of these scales *on this kernel*, not of the network."
        ),
        "The code has a bug, since the same loss cannot differ": (
            "No: sums in a different order differ in the last digit, and rounding makes that "
            "visible."
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "2. What is the derivative of a quantized network's loss with respect to a scale in an "
    "early layer?",
    {
        "Zero almost everywhere": (
            "Right: activations are rounded after that layer, so the loss is a staircase in that "
            "scale."
        ),
        "What the straight-through estimator says": (
            "No: that slope is made up, as if there were no rounding."
        ),
        "It does not exist anywhere": (
            "It fails to exist only at the jumps; on each step of the staircase it exists and is "
            "zero."
        ),
    },
    answer=1,
)

# %% tags=["hide-input"]
Quiz(
    "3. Layer A has scales near 0.1, layer B near 0.01. With absolute steps of 0.001, B looks "
    "more rugged. Is it?",
    {
        "Yes, its loss changes more": (
            "The change is real, but A moved by 1 % and B by 10 %: those are two different "
            "questions."
        ),
        "Unknown until both move by the same share": (
            "Right: a relative step asks both the same question."
        ),
        "No, small scales make smooth layers": (
            "Nothing like that follows from the size of a scale."
        ),
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima*, ICCV 2023, arXiv 2308.10814:
# the claim that the scale landscapes of ViTs are jagged. It concerns the *test* loss, and the
# official code has no program for landscapes, so the directions and radii here are our own choice.
# Y. Bengio et al., arXiv 1308.3432: the straight-through estimator.
