# %% [markdown]
# # 0. Start here
#
# **After this lesson you can** check whether this machine is ready; run, interrupt and restart a
# notebook; operate a panel with the mouse and with the keyboard; tell the paper's story in five
# sentences; find the lesson, module or run folder you need.
#
# **Prerequisites:** a little Python. Later lessons use PyTorch tensors. No knowledge of
# quantization is assumed.
#
# **Time:** 20 minutes to read, 1 minute to run.
#
# **Works offline:** yes. Once installed, nothing in this course needs the internet.
#
# **Read alongside:** `evolq_lite/__init__.py`, which lists the other modules in reading order.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import json

import torch
from IPython.display import Markdown

from evolq_lite.cli import check
from evolq_lite.data import CHARACTERS, DATA
from evolq_lite.figures import tiles
from evolq_lite.panels import Guess, QuantizerPanel, Quiz, ReadingPanel
from evolq_lite.panels.reading import readings
from evolq_lite.runs import folder

torch.set_num_threads(2)

# %% [markdown]
# ## Sixty characters
#
# A small vision transformer has learned to read characters. Of 9,920 test images, in typefaces that
# it never saw, it reads about nine in ten correctly. Each of its weights is a number of 32 bits.
# What happens if we keep fewer bits of each? Guess before you look.

# %% tags=["hide-input"]
known = readings()  # shipped with the course
Guess(
    "What share of the test images does the network still read correctly?",
    {f"{b} bits": known["top1"][str(b)] for b in (8, 4, 3, 2)},
    low=0,
    high=100,
    unit="%",
    explanation="Three bits, eight values, is the edge: below it hardly anything is left.",
)

# %% [markdown]
# Now see it happen: drag the slider from 8 bits down to 2. Under each character is what the network
# reads. A frame marks a wrong label, and says whether the float network was wrong there, too. Look
# at what is confused with what: are these the mistakes that you would make?

# %%
ReadingPanel()

# %% [markdown]
# Nothing was computed while you dragged: these readings ship with the course. From lesson 1 on, the
# panels compute.
#
# ## Is this machine ready?
#
# The next cell checks the packages, the data files and the processor, just as `python -m evolq_lite
# check` and `make check` do. The output you see now comes from the machine that built this page.
# Click into the cell and press Shift+Enter to check your own.

# %%
ready = check()

# %% [markdown]
# The last line should be *Ready.* A note about a different package version is not an error: results
# may differ in the last digits. If a data file is missing or damaged, its line tells you which
# command restores it. *Integer execution* is about speed: if the processor cannot multiply integers
# exactly, they are simulated in float, which is slower.
#
# ## How to work with a notebook
#
# | to | press, or choose |
# |---|---|
# | run the current cell and go to the next | Shift+Enter |
# | run everything from top to bottom | menu *Run*, *Run All Cells* |
# | stop a cell that takes too long | menu *Kernel*, *Interrupt Kernel*, or the toolbar's square |
# | start over with nothing defined | menu *Kernel*, *Restart Kernel* |
#
# Cells share one memory: later cells use what earlier ones define. So if a cell complains about an
# unknown name, a cell above it probably was not run. When in doubt, restart the kernel and run all
# cells. Every lesson runs in under three minutes on two processor cores. Results that take longer
# ship with the course, and the lesson says so.
#
# ## How to work with a panel
#
# A panel has controls, a picture, and a sentence that says what the picture shows. Try this one,
# which rounds the weights of a real layer to 3 bits. Lesson 1 explains the details.

# %%
QuantizerPanel(bits=3)

# %% [markdown]
# - **Mouse:** drag a slider's handle. Here the picture follows while you drag; slower panels answer
#   when you let go.
# - **Keyboard:** press Tab until the handle is highlighted, then use the arrow keys.
# - **Exact values:** click the number next to a slider, type a value, press Enter. A value outside
#   the range becomes the nearest allowed one.
# - **Slow panels** have a progress bar and a *Cancel* button, which usually takes effect within
#   half a second, or a few seconds while a network is being loaded or calibrated. The last finished
#   picture stays.
# - Some panels open with a stored picture (the sentence says *Stored result*) and start computing
#   as soon as you change something. On a web page without a kernel, you see only that picture.
# - Running the cell again replaces its panel with a fresh one. *Reset* brings back the settings
#   that a panel opened with; other small buttons set those of a question. *Pin* keeps the picture
#   below the next one, so that you can compare the two. *Save picture* writes it to a file (SVG).
#
# **Predict, then try.**
#
# 1. Go from 3 bits to 2, and from 3 to 4. By what factor does the lost share of the signal's power
#    change? Guess first, then read it in the sentence.
# 2. Type 20 into *Bits*. What happens?
#
# <details><summary>What you should have seen</summary>
#
# 1. From 3 bits to 4 it falls to about a quarter, from 34 % to 8 %: the levels are half as far
#    apart, and power goes with the square. From 3 bits to 2 it rises to 86 %, not to four times as
#    much. Lesson 1 derives the factor of 4 and shows where it fails.
# 2. The number becomes 8, the end of the slider, and the sentence says so.
#
# </details>
#
# ## The story on one page
#
# A vision transformer computes with real numbers. Store each weight as a 3-bit or 4-bit integer
# instead, and the network becomes many times smaller. But integers need *scales* that say how far
# apart their values lie, and a low-bit network is only as good as its scales. *Post-training
# quantization* chooses them after training, from a small set of unlabeled *calibration images*.
#
# The paper (Evol-Q, ICCV 2023) makes three observations. **The loss is jagged:** nudge the scales
# of a quantized vision transformer, and the test loss jumps up and down, because rounding decisions
# flip. At 4 bits, such small moves are worth 0.5 to 0.8 points of accuracy. **So gradients are a
# poor guide,** and the authors use evolution: mutate the scales of one block's attention, keep what
# is better, move on to the next block. **And the loss must not overfit** the 1,000 calibration
# images, so they compare the predictions of the quantized and the float network with a contrastive
# loss, infoNCE. For ViT-Base they report gains of +10.30, +0.78 and +0.15 points over the previous
# best method, with weights of 3, 4 and 8 bits. Not all of this holds on the small networks used
# here: lesson 7 gives a verdict on each claim. The search in one line:
#
# $$s^\ast = \arg\min_{s}\; L\big(f_s(X),\, f(X)\big)$$
#
# $f$: the network in float; $f_s$: the same network quantized with the scales $s$; $X$: the
# calibration images; $L$: the loss between two sets of predictions; $s^\ast$: the scales that the
# search is looking for, one block at a time.
#
# In this course a small network stands in for the large ones: a vision transformer that reads 62
# characters. Calibration images come from the typefaces it was trained on, test images from other
# typefaces. Here are the first 12 calibration images. Above each you see what the float network
# reads, then the network with 3-bit weights, then with 2-bit weights. Both use scales from the
# simplest rule, which covers the range from the smallest to the largest value.

# %%
demo = eq.load_demo("vit", calibration=500, seed=0)
teacher = demo.targets.argmax(1)  # the float network's predictions: no labels are used
found = {}
for bits in (8, 3, 2):
    qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=bits, act_bits=8))
    eq.calibrate(qmodel, demo.calibration)
    found[bits] = eq.predict({"it": qmodel}, demo.calibration.split(100))["it"]
    same = eq.accuracy(found[bits], teacher)
    print(f"{bits} bits: the same prediction as float for {same} of 500 images")

first = zip(teacher[:12], found[3], found[2])
titles = [" → ".join(CHARACTERS[int(i)] for i in predictions) for predictions in first]
changed = {bits: int((found[bits][:12] != teacher[:12]).sum()) for bits in (3, 2)}
alt = (
    "12 characters, each under the labels of the float, the 3-bit and the 2-bit network. "
    f"{changed[3]} of the labels change at 3 bits, {changed[2]} at 2 bits."
)
tiles(demo.calibration[:12], titles, 6, alt)

# %% [markdown]
# At 8 bits almost nothing changes; at 3 bits about one prediction in eleven changes, at 2 bits six
# in seven. The interesting case is the edge, 3 bits: the network still reads, and there is
# something to win back. The next cell shows what the paper's search wins back there, measured by
# *top-1*: the share of test images, none of them used in the search, whose likeliest label is
# right. (`make demo` repeats the measurement in about a minute.)

# %%
run = json.loads((DATA / "results" / "demo-summary.json").read_text())
for name, top1, interval in (
    ("float", run["float_top1"], run["intervals"]["float"]),
    ("W3A8 before", run["before_top1"], run["intervals"]["before"]),
    ("W3A8 evolved", run["after_top1"], run["intervals"]["evolved"]),
):
    print(f"{name:13} {top1:.2%} [{interval[0]:.2%}, {interval[1]:.2%}]")
gain, low, high = (100 * x for x in (run["gain"], *run["gain_interval"]))
print(f"gain {gain:+.2f} points [{low:+.2f}, {high:+.2f}], p = {run['p_value']:.2g}")
print(f"on {run['images']:,} test images, after {run['evaluations']} evaluations")

# %% [markdown]
# (W3A8: 3-bit weights, 8-bit activations. In brackets: 95 % confidence intervals. The *p-value* is
# the probability of a difference at least this large if both networks were equally good.) The gain
# is small, but chance does not explain it. Lesson 7 asks which of the paper's claims hold on these
# small networks, which do not, and why test images call for care.
#
# ## The way through the course
#
# | lesson | you learn | read alongside |
# |---|---|---|
# | [1] Uniform quantization | scale, zero point, rounding versus clipping | `numerics.py` |
# | [2] Quantizing a ViT | what is quantized in a block, what each bit costs | `layers.py` |
# | [3] Non-smooth landscapes | probe the loss, tell jagged from noise | `landscape.py` |
# | [4] The infoNCE loss | positives, negatives, temperature, overfitting | `fitness.py` |
# | [5] Evolutionary search | ask and tell, population, tournament, rivals | `search.py` |
# | [6] Block-wise Evol-Q | the whole search, live | `evolve.py` |
# | [7] Reproducing the paper | the paper's numbers and ours, test-set selection | `experiments/` |
# | [8] Rounding | which integer a weight becomes, and what that is worth | `gptq.py` |
# | [9] Ship it | the network as a file that other programs run | `export.py` |
#
# [1]: 01_uniform_quantization.ipynb
# [2]: 02_quantizing_a_vit.ipynb
# [3]: 03_non_smooth_landscapes.ipynb
# [4]: 04_infonce_loss.ipynb
# [5]: 05_evolutionary_search.ipynb
# [6]: 06_blockwise_evolq.ipynb
# [7]: 07_reproducing_the_paper.ipynb
# [8]: 08_rounding.ipynb
# [9]: 09_ship_it.ipynb
#
# Take them in order. Each says how long it takes, pauses for predictions, and ends with a quiz
# whose answers explain themselves. Four assignments are in `notebooks/assignments`: A1 uniform
# quantization (after lesson 2), A2 landscapes (after lesson 3), A3 infoNCE (after lesson 4), and A4
# evolutionary search (after lesson 6).
#
# ## Where results go
#
# A long search writes a *run folder*: `make demo` writes `runs/demo`, and the panel of lesson 6
# writes `runs/panel` next to the notebook. A search that was stopped can resume where it left off.
# Here is what the folder contains, as described by the module that writes it:

# %%
Markdown(folder.__doc__)

# %% [markdown]
# The library's own docstring suggests an order for reading its modules:

# %%
print(eq.__doc__)

# %% [markdown]
# ## Glossary
#
# Each term is explained where it first appears. This list is for looking up.
#
# | term | meaning | lesson |
# |---|---|---|
# | scale, zero point | the distance between two levels, and the integer that stands for 0 | 1 |
# | rounding, clipping | the error inside the range, and the error beyond its ends | 1 |
# | lost power | the mean squared error as a share of the mean square of the signal | 1 |
# | W3A8 | 3-bit weights, 8-bit activations | 0 |
# | calibration images | unlabeled images from which scales are chosen | 0 |
# | observer | a rule that chooses the first scales | 2 |
# | quantizer | a point of the network where numbers become integers | 2 |
# | top-1 | the share of images whose likeliest label is right | 0 |
# | p-value | how probable a difference at least this large is if there is none | 0, 7 |
# | objective | a function from a vector of scales to a number, lower is better | 3 |
# | fitness | the distance between the outputs of the quantized and the float network | 4 |
# | noise floor | how much a loss differs between two ways of computing it | 3 |
# | candidate, child | a vector of scales that a search proposes | 5 |
# | accepted | better than all candidates before it | 5 |
# | population, tournament | the vectors that a search keeps, and how it picks a parent | 5 |
# | genome | the scales of one block as a vector | 6 |
# | chain | the network as segments that run one after another | 6 |
# | pass, visit, cycle | all blocks once, one block once, one candidate of a visit | 6 |
# | commit | to write the best scales of a visit into the network | 6 |
# | rounding to nearest, GPTQ | two rules for which integer a weight becomes | 8 |
# | ONNX, Q and DQ | a file format for networks, and its two operators for quantization | 9 |
#
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. A cell fails with `NameError: name 'demo' is not defined`. What do you try first?",
    {
        "Reinstall the package": "No: the package is installed; a variable is missing.",
        "Run the cells above, from the top": (
            "Right: an earlier cell defines it, and a freshly started kernel knows nothing."
        ),
        "Interrupt the kernel": "That stops a running cell. It does not define anything.",
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "2. Why does Evol-Q need no labels?",
    {
        "It reads them from the test images": (
            "No: the search never sees a label. (Here the test images are read once, at the end, "
            "to measure the result. What the authors' program does with its test images is a "
            "story for lesson 7.)"
        ),
        "It compares with the float network's predictions": (
            "Right: the float network is the teacher, and it can label any image."
        ),
        "Because scales do not depend on images": (
            "They do here: the search minimizes a loss that is measured on calibration images."
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "3. With 8-bit or with 3-bit weights: where can better scales help more?",
    {
        "With 8 bits": (
            "There the quantized network already agrees with the float network on nearly every "
            "image, so little is left to gain."
        ),
        "With 3 bits": (
            "Right: only what has been lost can be won back, and with 3 bits more has been lost."
        ),
        "It makes no difference": (
            "It does: the printed lines above show how much the losses differ."
        ),
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima: Quantization in the Loss
# Landscape of Vision Transformers*, ICCV 2023, arXiv 2308.10814: the three observations and the
# numbers. The characters and the networks: `data/README.md`.
