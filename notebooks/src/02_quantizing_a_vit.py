# %% [markdown]
# # 2. Quantizing a vision transformer
#
# **After this lesson you can** name what is quantized in a transformer block, and what is not;
# choose an observer and say what it trades; explain power-of-two factors and log2 attention; read
# from a figure what each bit-width costs.
#
# **Prerequisites:** lesson 1, and a rough idea of a transformer block: attention, MLP, residual
# sums.
#
# **Time:** 30 minutes to read, 1 minute to run.
#
# **Works offline:** yes. The network, the images and the results are in `data/`.
#
# **Read alongside:** `evolq_lite/quantizer.py`, `layers.py`, `observers.py`, `convert.py`.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import inspect
import textwrap

import torch
from IPython.display import Code, display
from matplotlib.ticker import MaxNLocator

from evolq_lite.experiments.report import load_claim
from evolq_lite.figures import PETROFF, new_figure
from evolq_lite.layers import QuantBlock, QuantProducts
from evolq_lite.panels import BlockPanel, Quiz, ViTPanel
from evolq_lite.quantizer import Quantizer

torch.set_num_threads(2)
demo = eq.load_demo("vit", calibration=100, seed=0)

# %% [markdown]
# ## The idea
#
# Almost all the work in a transformer is matrix products. A product is cheap when *both* operands
# are integers, because then
#
# $$\sum_c x'_{ic}\, w'_{co} = s_x\, s_{w,o} \sum_c (m_{ic} - z)\, n_{co}$$
#
# $x'$: quantized inputs with one scale $s_x$ and zero point $z$ for the whole tensor; $w'$:
# quantized weights with a scale $s_{w,o}$ for each output channel $o$ (symmetric, so no zero
# point); $m, n$: their integers; $i$: a token; $c$: an input channel. The sum contains only
# integers, and the scales multiply it once, at the end.
#
# So every operand of every product gets a *quantizer*, weights and activations alike. `quantize`
# makes a copy of a timm model that shares the float weights. `calibrate` shows it images, and
# *observers* choose the first scales. Here is one block of the shipped network with 3-bit weights
# and 8-bit activations (W3A8).

# %%
config = eq.QuantConfig(weight_bits=3, act_bits=8)
qmodel = eq.quantize(demo.model, config)
eq.calibrate(qmodel, demo.calibration)
lines = eq.describe(qmodel).splitlines()
print("\n".join([lines[0], *(line for line in lines if "blocks.0." in line), lines[-1]]))

# %% [markdown]
# Softmax, GELU and LayerNorm stay in float: they are a small part of the work and hard to do in
# integers. Residual sums are quantized too, because in an integer network they travel between
# layers.
#
# Each of these points is a `Quantizer`. Before calibration it only watches what passes through it;
# afterwards it rounds. `to_integers(x)` gives the integers $m - z$, and `step_size` is the scale
# $s$, what one integer is worth:

# %%
Code(inspect.getsource(Quantizer), language="python")

# %% [markdown]
# Attention contains two products, queries times keys and probabilities times values. Their four
# operands are quantized: `q`, `k`, the probabilities and `v`. So are the scores, which softmax
# reads. Each product is computed on integers, and the scales multiply it once, as in the formula
# above.

# %%
Code(textwrap.dedent(inspect.getsource(QuantProducts.forward)), language="python")

# %% [markdown]
# The block around it is timm's own, with two more points: one on each residual sum.

# %%
Code(textwrap.dedent(inspect.getsource(QuantBlock.forward)), language="python")

# %% [markdown]
# This code defines what is right. The searches of later lessons run an equivalent in
# `evolq_lite/fast.py`, which gives the same integers in a fraction of the time.
#
# ## Where the points are, and how far off each is
#
# The same block as a drawing, with a dot at each point. Its color and the number beside it tell the
# *relative error* that this point makes: the size of what rounding changes, as a share of the size
# of what passes (all earlier points are left out). Try the three buttons, then the six blocks.

# %%
BlockPanel()

# %% [markdown]
# Weights in 3 bits are off by a fifth of their size or more, activations in 8 bits by one to three
# percent. With activations in 4 bits it is the other way round. But a large error need not cost
# much: that depends on what the network does with it.
#
# ## Which kind of point costs what?
#
# `eq.sensitivity` leaves one kind of point in float at a time, in the whole network, and measures
# how much closer that brings the predictions to the float network's, as *KL divergence*: with $p$
# the float network's probabilities and $p'$ the quantized network's, $\sum_c p_c \ln(p_c / p'_c)$,
# averaged over images. It is 0 where both say the same; its unit, because of the natural logarithm,
# is called *nat*. It needs no labels, so calibration images will do.
#
# The kinds: *sums* are the residual sums; *gelu* is what GELU writes and fc2 reads; *inputs* are
# what all other layers read; *qkv* are the queries, keys and values before their products (not the
# weights of the layer of that name); *scores* are the products of queries and keys; *probabilities*
# are what softmax makes of them; *weights* are those of all layers; *edges* are all points of the
# first and the last layer.

# %%
settings = {"W8A8": (8, 8), "W3A8": (3, 8), "W8A4": (8, 4)}
savings = {}
for name, (weight_bits, act_bits) in settings.items():
    network = eq.quantize(demo.model, eq.QuantConfig(weight_bits=weight_bits, act_bits=act_bits))
    eq.calibrate(network, demo.calibration)
    whole, *kinds = eq.sensitivity(network, demo.calibration)
    savings[name] = {kind.name: whole.divergence - kind.divergence for kind in kinds}
    print(f"{name}: KL {whole.divergence:.4f}; saved if left float: ", end="")
    print(", ".join(f"{kind} {saved:+.4f}" for kind, saved in savings[name].items()))

# %% tags=["hide-input"]
worst = {name: max(saved, key=saved.get) for name, saved in savings.items()}
said = ", ".join(f"{name} {kind}" for name, kind in worst.items())
figure = new_figure(
    9.6, 2.9, f"KL that each kind of point would save if it stayed float. It saves most: {said}."
)
for i, (axes, (name, saved)) in enumerate(zip(figure.subplots(1, 3, sharey=True), savings.items())):
    axes.barh(list(saved), list(saved.values()), color=PETROFF[i])
    axes.axvline(0, color="0.3", lw=0.8)
    axes.set(title=name, xlabel="KL saved, nats (own scale)")
    axes.xaxis.set_major_locator(MaxNLocator(3))
figure.axes[0].invert_yaxis()
figure

# %% [markdown]
# Mind the axes: the three networks differ in how much there is to save. (The points of *edges*
# belong to another kind as well, so the bars do not add up.) A negative bar is no mistake: two
# errors can cancel, and then leaving out one of them makes things worse.
#
# ## Observers: where the first scale comes from
#
# An observer looks at values and chooses a range. MinMax takes the whole range, so a single outlier
# spoils the scale for all other values. Percentile ignores the outermost 0.01 % on each side. MSE
# shrinks both ends of the range together, step by step, and keeps the range with the smallest
# squared error; for weights it does so per channel. MovingAverage averages the ends over successive
# batches; with a single batch, as here, it is the same as MinMax.
#
# The input of the last `fc2`, after the GELU, has such outliers. Let every observer choose a range
# for it at 4 bits.

# %%
seen = []
hook = demo.model.blocks[5].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
with torch.no_grad():
    demo.model(demo.calibration)
hook.remove()
x = seen[0]  # (images, tokens, channels)
integers = eq.IntRange(4, signed=False)
losses = {}
for name, make in eq.OBSERVERS.items():
    if name == "ptf":  # needs channels; see below
        continue
    observer = make(integers, None, False)
    observer.update(x)
    scale, zero = observer.params()
    losses[name] = float(((eq.fake_quantize(x, scale, zero, integers) - x) ** 2).mean())
power = float((x**2).mean())
for name, loss in losses.items():
    print(f"{name:15} loses {100 * loss / power:6.2f} % of the power")

# %% [markdown]
# Percentile loses least here, even though MSE searches for the smallest error. MSE shrinks both
# ends of the range by the same factor, but many values lie at a GELU's short negative end, close to
# -0.17. An observer can only find what it tries.
#
# And the smallest squared error does not guarantee the best network. What counts is the loss of the
# *network*, which weighs some values more than others. That is why, from lesson 4 on, the network's
# own output judges the scales.
#
# ## Two remedies of FQ-ViT
#
# **Power-of-two factors.** The inputs of a LayerNorm, our residual sums, differ in size from
# channel to channel: by orders of magnitude in large transformers, by a factor of 2 to 3 in our
# small one. One scale for all channels is too coarse for the small ones. A scale per channel would
# end up inside a sum over channels, because the LayerNorm needs their mean and variance. FQ-ViT's
# remedy is a single scale, divided by 1, 2, 4 or 8 in each channel. Those factors are bit shifts,
# which integers handle well.

# %%
with torch.no_grad():
    sums = eq.chain_of(demo.model).trace(demo.calibration)[4]  # the input of blocks.3
reach, order = sums.abs().amax((0, 1)).sort()
byte = eq.IntRange(8, signed=False)
lost = {}
for name, axis in (("minmax", None), ("ptf", 2)):
    observer = eq.OBSERVERS[name](byte, axis, False)
    observer.update(sums)
    scale, zero = observer.params()
    error = ((eq.fake_quantize(sums, scale, zero, byte, axis) - sums) ** 2).mean((0, 1))
    lost[name] = error / (sums**2).mean((0, 1))

# %% tags=["hide-input"]
said = ", ".join(f"{name} {100 * float(v.median()):.3f} %" for name, v in lost.items())
figure = new_figure(
    9,
    3.2,
    f"Residual sums before blocks.3. Largest value of a channel: from {reach[0]:.1f} to "
    f"{reach[-1]:.1f}. Lost share of a channel's power at 8 bits, median: {said}.",
)
left, right = figure.subplots(1, 2)
left.plot(reach, "o-", ms=3, color=PETROFF[0])
left.set(xlabel="channel, by size", ylabel="largest |value|", title="Channels differ in size")
for i, (name, share) in enumerate(lost.items()):
    right.plot(100 * share[order], ("--", "-")[i], color=PETROFF[i], label=name)
right.set(xlabel="channel, by size", ylabel="lost power, %", yscale="log", title="8 bits")
right.legend()
print(said)
figure

# %% [markdown]
# **Log2 attention.** Softmax outputs are probabilities, most of them tiny. Uniform levels are
# wasted on large values that rarely occur. Levels at 1, 1/2, 1/4, ... follow the data. (This is an
# option here and off by default. With it, the product with the values becomes a series of bit
# shifts. As in FQ-ViT there are $2^b$ powers, and whatever is smaller becomes zero, a level that
# the bits do not count.)

# %%
tokens = eq.chain_of(demo.model).trace(demo.calibration[:50])[3]
attention = demo.model.blocks[2].attn
with torch.no_grad():
    qkv = attention.qkv(demo.model.blocks[2].norm1(tokens))
    q, k, _ = qkv.view(*tokens.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    probabilities = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)
small = float((probabilities < 1 / 16).float().mean())
print(f"{100 * small:.0f} % of the probabilities in blocks.2 are below 1/16")
for bits in (3, 4, 8):
    uniform = eq.fake_quantize(
        probabilities, torch.tensor(1 / (2**bits - 1)), torch.tensor(0), eq.IntRange(bits, False)
    )
    log2 = eq.log2_fake_quantize(probabilities, bits)
    errors = [float(((y - probabilities) ** 2).mean() ** 0.5) for y in (uniform, log2)]
    print(f"{bits} bits: root mean square error uniform {errors[0]:.5f}, log2 {errors[1]:.5f}")

# %% [markdown]
# Log2 levels are dense near 0 and far apart near 1 (1, then 1/2). More bits add levels only at the
# small end, so beyond 4 bits nothing is gained, and at 8 bits uniform levels are better.
#
# ## What each bit-width costs
#
# We measured every combination of bits on all 9,920 test images by *top-1*, the share of images
# whose likeliest label is right. That takes half an hour, so this figure comes from the shipped
# results (`python -m evolq_lite reproduce C1` computes them).

# %%
figure, verdict = load_claim("C1")
display(verdict)
figure

# %% [markdown]
# Notice two things. First, with 8-bit activations little is lost between 8-bit and 4-bit weights;
# below that, networks fall off a cliff. Second, no observer is best everywhere. With 3-bit weights
# and 8-bit activations, MSE is ahead on the ViT and far behind on the CNN, where shrinking the
# range shifts the means that its layers expect. With 4-bit activations, the range of the
# activations decides: on the CNN with 8-bit weights, MinMax loses half of the accuracy and MSE
# loses nothing. (With MinMax and 4-bit activations, both networks do even worse with 8-bit weights
# than with 4-bit weights. That is not a typo; we have not looked into the reason.)
#
# Now try one setting at a time: the panel quantizes the network and tests it on 473 of the test
# images while you wait. Upper right: how far the output of each part of the network is from float,
# relative to its size. Below: characters whose label changed, float → quantized; the mark says
# whether the quantized network is right.

# %%
ViTPanel()

# %% [markdown]
# **Predict, then try.**
#
# 1. Compare W8A8 with float: how many of the 473 labels will change, and will the changes be for
#    the worse?
# 2. At W3A8, change the observer from `minmax` to `mse`. By how much does top-1 change? Why does a
#    better range help most at few bits?
# 3. Set *Residual sums* from `ptf` to `tensor`, first at W8A4 and then at W8A8. What happens to
#    top-1 each time?
#
# <details><summary>What you should have seen</summary>
#
# 1. About five, some for better and some for worse: the interval of the difference includes zero.
# 2. By two to three points. With 8 levels, a range that accommodates one outlier leaves few levels
#    for the rest; with 256 levels there are enough for both.
# 3. With 4-bit activations it falls from about 38 % to about 12 %; with 8-bit activations the
#    difference is within the noise. Residual sums carry everything from block to block, and a
#    single scale for all channels costs most when there are few levels. (The figure above shows 22
#    % for W8A4 and MinMax because it calibrates on 500 images instead of 100, and their outliers
#    reach further.)
#
# </details>
#
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. Which of these stays in float in this scheme?",
    {
        "The attention probabilities": (
            "No: they are an operand of the product with the values, so they are quantized."
        ),
        "The softmax": (
            "Right: its input and output are quantized, but the function itself is computed in "
            "float."
        ),
        "The residual sums": "No: they are quantized, with power-of-two factors by default.",
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "2. In an activation tensor, one value in a million is ten times as large as all the "
    "others. Which observer suffers most?",
    {
        "MinMax": (
            "Right: the scale follows that one value, and all the others share a tenth of the "
            "levels."
        ),
        "MSE": "Less: it clips the outlier if that lowers the overall squared error.",
        "Percentile": (
            "No: it ignores the outermost 0.01 % at either end. (A weight channel has only 48 "
            "values here, so that is none of them: there it does the same as MinMax.)"
        ),
    },
    answer=1,
)

# %% tags=["hide-input"]
Quiz(
    "3. Calibration images have no labels here. What do they determine?",
    {
        "The weights": "No: weights stay as trained.",
        "The ranges of activations": (
            "Right: activations exist only when images pass through the network. (Weights exist "
            "without images, so their *first* scales need none. In lessons 5 and 6 images then "
            "improve them.)"
        ),
        "The bit-widths": "No: we choose those.",
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# Y. Lin et al., *FQ-ViT*, IJCAI 2022, arXiv 2111.13824: sections 3.2 (power-of-two factor) and 3.3
# (log2 attention). N. Frumkin et al., *Jumping through Local Minima*, ICCV 2023, arXiv 2308.10814,
# starts its search from such a network.
