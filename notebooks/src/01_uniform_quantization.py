# %% [markdown]
# # 1. Uniform quantization
#
# **After this lesson you can** derive scale and zero point from a range of values; say what
# rounding and clipping each cost, and trade one against the other; choose between one scale per
# tensor and one per channel; predict what one more bit buys.
#
# **Prerequisites:** PyTorch tensors. No knowledge of quantization is assumed.
#
# **Time:** 25 minutes to read, 1 minute to run.
#
# **Works offline:** yes. The network and the images are in `data/`.
#
# **Read alongside:** `evolq_lite/numerics.py`.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import inspect

import numpy as np
import torch
from IPython.display import Code

from evolq_lite.figures import PETROFF, new_figure
from evolq_lite.panels import Guess, QuantizerPanel, Quiz
from evolq_lite.panels.quantizer import SHARES, TENSORS, errors_of

torch.set_num_threads(2)

# %% [markdown]
# ## The idea
#
# A network's weights are real numbers stored in 32 bits each. Hardware multiplies small integers
# faster, with less energy and memory. So each real number $x$ is replaced by one of $2^b$ integers,
# $q$, together with a rule that maps it back:
#
# $$q = \mathrm{clamp}\big(\mathrm{round}(x / s) + z,\; q_{lo},\; q_{hi}\big), \qquad
# x' = (q - z)\, s$$
#
# $x$: the real number; $s > 0$: the *scale*, the distance between neighboring levels; $z$: the
# *zero point*, the integer that stands for 0; $q_{lo}, q_{hi}$: the smallest and largest integer
# ($-2^{b-1}$ and $2^{b-1} - 1$ for $b$ signed bits, $0$ and $2^b - 1$ for unsigned); $x'$: the
# value that the network computes with from now on. *Uniform* means that all levels are equally
# spaced.
#
# Scale and zero point follow from the range that the integers should cover. For a range from $m \le
# 0$ to $M \ge 0$ (a range is always widened to include 0), with $2^b - 1$ steps between $2^b$
# levels:
#
# $$\text{symmetric: } s = \frac{2 \max(|m|, |M|)}{2^b - 1}, \; z = 0; \qquad
# \text{asymmetric: } s = \frac{M - m}{2^b - 1}, \; z = q_{lo} - \mathrm{round}(m / s)$$
#
# ($z = 0$ is for signed integers; unsigned integers have their zero point in the middle, at
# $2^{b-1}$.)
#
# You may know the symmetric scale as $\max(|m|, |M|) / (2^{b-1} - 1)$. That version ties the
# largest value to the largest integer, $2^{b-1} - 1$, and leaves the smallest integer, $-2^{b-1}$,
# unused. Ours spreads all $2^b$ levels, hence $2^b - 1$ steps, over the whole range, whose length
# is $2 \max(|m|, |M|)$. Its steps are smaller (at 3 bits, 6/7 as large); in exchange all levels lie
# half a step lower, and the largest positive value is half a step beyond the last integer. FQ-ViT,
# a quantized ViT on whose code Evol-Q's is built, defines it this way.
#
# Here are six numbers, quantized to signed 3-bit integers.

# %%
x = torch.tensor([-0.8, -0.4, -0.1, 0.0, 0.25, 1.0])
integers = eq.IntRange(bits=3, signed=True)
scale, zero = eq.affine_params(x.min(), x.max(), integers, symmetric=True)
back = eq.fake_quantize(x, scale, zero, integers)
print(f"integers {integers.lo} to {integers.hi}, scale {scale:.4f}, zero point {zero:g}")
for value, after in zip(x.tolist(), back.tolist()):
    print(f"{value:6.2f} -> integer {round(after / float(scale)):2d} -> {after + 0:7.4f}")

# %% [markdown]
# The largest value is clipped: 1.0 / s is 3.5, but the largest integer is 3. Signed 3-bit integers
# reach from -4 to 3, the values from -3.5 s to 3.5 s, so the upper half step is cut off.
#
# *Fake* quantization does both steps at once, in float: quantize, then map back. The result is
# exactly what an integer network would see, and it runs on any hardware. The code is short enough
# to read in full:

# %%
Code(
    inspect.getsource(eq.affine_params) + "\n\n" + inspect.getsource(eq.fake_quantize),
    language="python",
)

# %% [markdown]
# **Symmetric or not.** With $z = 0$ the range extends equally far below and above zero. That suits
# weights, which are centered around 0, and it makes products cheap, because no zero point has to be
# subtracted. Activations after a GELU (the nonlinearity of a ViT's MLP) are almost all positive, so
# a symmetric range would waste half of its integers there. An asymmetric range uses $z$ to move to
# where the values are.

# %%
positive = torch.linspace(-0.17, 3.0, 2001)  # the range of a GELU's output
for symmetric in (True, False):
    scale, zero = eq.affine_params(positive.min(), positive.max(), integers, symmetric)
    error = (eq.fake_quantize(positive, scale, zero, integers) - positive).abs().max()
    name = "symmetric" if symmetric else "asymmetric"
    print(f"{name:10} scale {scale:.3f}, zero point {zero:g}, largest error {error:.3f}")

# %% [markdown]
# ## Two errors
#
# Inside the range, $x'$ is off by at most $s/2$: this is the *rounding* error. Outside the range,
# $x'$ is the nearest end of the range, however far away $x$ is: this is the *clipping* error. A
# larger scale clips less and rounds more coarsely. A real layer has many small values and a few
# large ones, so the best range is not the whole range.
#
# The *power* of a tensor is the mean of its squares. The *lost share* is the mean of $(x' - x)^2$
# divided by the power: 1 % means that the error has a hundredth of the signal's power, or a tenth
# of its size. The signal-to-noise ratio in decibels is $-10 \log_{10}$ of that share.
#
# How much of the range should 3, 4 and 6 bits cover? Guess, then see the best shares for the
# weights of a real layer.

# %% tags=["hide-input"]
errors = {bits: errors_of(next(iter(TENSORS)), bits, True, False) for bits in (3, 4, 6)}
Guess(
    "How much of the range of the weights of `blocks.0.attn.qkv` would you keep?",
    {f"{bits} bits": 100 * float(SHARES[lost.sum(1).argmin()]) for bits, lost in errors.items()},
    low=0,
    high=100,
    unit="%",
    explanation="With few levels, the rest of the values gains more than the clipped ones lose.",
)

# %% [markdown]
# Move the sliders. The tensors are real: weights and inputs of the vision transformer in `data/`. A
# *channel* of a weight is one output of its layer, a row of the matrix; a channel of an input is
# one column, the same number for every token. *Per channel* gives each its own scale.

# %%
QuantizerPanel()

# %% [markdown]
# **Predict, then try.**
#
# 1. Take the weights of `blocks.0.attn.qkv` (attention's first layer) at 4 bits, and find the
#    smallest error with *Range kept*. Why does the best share grow with more bits?
# 2. Take the input of `blocks.5.mlp.fc2` (it comes from a GELU) at 4 bits with *Symmetric* checked.
#    Are all levels in use? And with it unchecked?
# 3. Check *Per channel* at 3 bits, with the whole range kept. Which benefits more, the weights of
#    `blocks.0.attn.qkv` or the input of `blocks.5.mlp.fc2`, and why?
#
# <details><summary>What you should have seen</summary>
#
# 1. Far less than the whole range at 3 or 4 bits (the error is smallest at 30 % for 3 bits and at
#    45 % for 4), and more with every bit: with many levels the rounding error is small anyway, so
#    clipping is what remains.
# 2. With a symmetric range, about half of the integers lie below zero, where a GELU's output hardly
#    goes, so they stay unused. With an asymmetric range, all of them are in use.
# 3. The weights of `qkv`: their lost share of the power falls from 34 % to 5 %; for the input of
#    `fc2` it falls from 21 % to 8 %. Per-channel scales help where channels differ in size, because
#    each channel gets the scale that suits it.
#
# </details>
#
# ## What one more bit buys
#
# One more bit halves the scale, so it halves the rounding error and quarters its power. In decibels
# of signal-to-noise ratio that is $20 \log_{10} 2 \approx 6.02$ dB per bit, for any tensor, as long
# as the error is mostly rounding.

# %%
demo = eq.load_demo("vit", calibration=2)
weight = demo.model.blocks[0].attn.qkv.weight.detach()  # (144, 48): output channels, inputs
bits = list(range(2, 9))
rows = {"per tensor": None, "per channel": 0}
ratios = {}
for name, axis in rows.items():
    lo, hi = (weight.min(), weight.max()) if axis is None else (weight.amin(1), weight.amax(1))
    ratios[name] = []
    for b in bits:
        integers = eq.IntRange(b, signed=True)
        scale, zero = eq.affine_params(lo, hi, integers, symmetric=True)
        noise = eq.fake_quantize(weight, scale, zero, integers, axis) - weight
        ratios[name].append(float(10 * torch.log10((weight**2).mean() / (noise**2).mean())))

# %% tags=["hide-input"]
said = "; ".join(
    f"{name} {values[0]:.1f} to {values[-1]:.1f} dB" for name, values in ratios.items()
)
figure = new_figure(6.4, 3.4, f"Signal to noise of qkv weights from 2 to 8 bits: {said}.")
axes = figure.add_subplot()
for i, (name, values) in enumerate(ratios.items()):
    axes.plot(bits, values, "os"[i] + "-", color=PETROFF[i], label=name)
axes.plot(
    bits,
    ratios["per tensor"][-1] + 6.02 * (np.array(bits) - 8),
    "--",
    color="0.5",
    label="6.02 dB a bit",
)
axes.set(xlabel="bits", ylabel="signal to noise, dB", title="Weights of blocks.0.attn.qkv")
axes.legend()
for name, values in ratios.items():
    print(f"{name:12} {values[-1] - values[-2]:.2f} dB from 7 to 8 bits")
figure

# %% [markdown]
# The 6 dB rule holds from about 4 bits up. Below that, most weights round to 0, and a bit buys less
# or more than the rule says. That is where the choice of the scale matters most, and that is where
# this course goes.
#
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. Values range from -2 to 2; you use two bits and a symmetric range. How large can the "
    "rounding error be?",
    {
        "1/6": (
            "No: that would take 12 steps between -2 and 2. Two bits give 4 levels and therefore "
            "3 steps."
        ),
        "2/3": (
            "Right: the scale is (2 - (-2)) / 3 = 4/3, and rounding is off by at most half a "
            "scale. (The value 2 itself is clipped: it would need the level 2 s, which signed "
            "2-bit integers do not have.)"
        ),
        "4/3": "That is the scale. The nearest level is at most half a scale away.",
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "2. You halve the scale and keep the number of bits. What happens?",
    {
        "Rounding and clipping errors both shrink": (
            "No: the covered range is half as wide, so more values are clipped."
        ),
        "Rounding shrinks, clipping grows": (
            "Right. Choosing the scale means trading one for the other."
        ),
        "Nothing, if the zero point moves along": (
            "No: the zero point shifts the range but cannot widen it."
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "3. A layer sums over its input channels. Why may weights have a scale per output channel, but "
    "inputs no scale per input channel?",
    {
        "Weights need more precision": (
            "Not as such. The reason lies in how the two are multiplied."
        ),
        "Only scales on the output side factor out of the sum": (
            "Right. A weight scale per output channel and a single scale for the input multiply "
            "the finished integer sum once (lesson 2 has the formula). A scale per input channel "
            "would have to be applied inside the sum, term by term, and the terms would no longer "
            "be integers."
        ),
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# B. Jacob et al., *Quantization and Training of Neural Networks for Efficient
# Integer-Arithmetic-Only Inference*, CVPR 2018, arXiv 1712.05877: scale, zero point, and why
# integers are enough. Y. Lin et al., *FQ-ViT*, IJCAI 2022, arXiv 2111.13824: the symmetric scale as
# defined here.
