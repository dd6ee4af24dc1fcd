# %% [markdown]
# # 0. Start here
#
# **Afterwards you can** say whether this machine is ready; run, interrupt and restart a notebook;
# move a panel's controls by mouse and by keyboard; retell the paper's story in five sentences; find
# the lesson, the module and the run folder that you need.
#
# **You need** a little Python. The later lessons need PyTorch tensors; nothing about quantization.
#
# **Time:** 15 minutes to read, 1 minute to run.
#
# **Works offline:** yes. Nothing in this course uses the network once it is installed.
#
# **Module to read beside it:** `evolq_lite/__init__.py`, which names all the others in the order in
# which to read them.

# %%
import json

import torch
from IPython.display import Markdown

import evolq_lite as eq
from evolq_lite import record
from evolq_lite.cli import check
from evolq_lite.data import CHARACTERS, DATA
from evolq_lite.figures import tiles
from evolq_lite.panels import QuantizerPanel

torch.set_num_threads(2)

# %% [markdown]
# ## Is this machine ready?
#
# The next cell looks at the packages, the data files and the processor, as `python -m evolq_lite
# check` and `make check` do. What you see on this page is what it said where the page was made;
# click into the cell and press Shift+Enter to ask your own machine.

# %%
ready = check()

# %% [markdown]
# The last line should be *Ready.* A note about another version of a package is no error: results
# may differ in the last digits. If a data file is missing or damaged, the line about it says which
# command restores it. *Integer execution* is about speed: where the processor cannot do it
# exactly, integers are simulated in float, more slowly.
#
# ## How to work with a notebook
#
# | to | press, or choose |
# |---|---|
# | run the present cell and go to the next | Shift+Enter |
# | run everything from top to bottom | menu *Run*, *Run All Cells* |
# | stop a cell that takes too long | menu *Kernel*, *Interrupt Kernel*, or the toolbar's square |
# | start again with nothing defined | menu *Kernel*, *Restart Kernel* |
#
# Cells share one memory: what an early cell defines, later ones use. So a cell that complains of an
# unknown name usually means that a cell above it was not run. When in doubt, restart the kernel and
# run all cells. Every lesson runs in less than three minutes on two processor cores; what takes
# longer is shipped with the course, and the lesson says so.
#
# ## How to work with a panel
#
# A panel has controls, a picture, and a sentence that says what the picture shows. Try this one:
# how many levels of a real layer's weights survive in 3 bits? Lesson 1 explains the rest.

# %%
QuantizerPanel(bits=3)

# %% [markdown]
# - **Mouse:** drag a slider's handle; the picture follows when you let go.
# - **Keyboard:** press Tab until the handle is marked, then the arrow keys.
# - **Exact values:** click on the number beside a slider, type, press Enter. A value out of range
#   becomes the nearest possible one.
# - **Slow panels** have a progress bar and a *Cancel* button, which takes effect within half a
#   second, a few seconds while a network is loaded or calibrated. The last picture that was
#   finished stays.
# - Some panels open with a stored picture (the sentence says *Stored result*) and compute as soon
#   as you change something. On a web page without a kernel, you see that picture only.
# - Running the cell again closes the panel of before and opens a fresh one.
#
# **Predict, then try.**
#
# 1. From 3 bits to 2, and from 3 to 4: how does the share of the signal's power that is lost
#    change? Guess the factors, then read them in the sentence.
# 2. Type 20 into *Bits*. What happens?
#
# <details><summary>What you should have seen</summary>
#
# 1. From 3 bits to 4 it falls to about a quarter, from 34 % to 8 %: levels are half as far apart,
#    and power goes with the square. From 3 to 2 it rises to 86 %, not to four times as much: more
#    than all cannot be lost. Lesson 1 derives the factor 4 and shows where it fails.
# 2. The number becomes 8, the end of the slider.
#
# </details>
#
# ## The story on one page
#
# A vision transformer computes with real numbers. Store each weight as an integer of 3 or 4 bits
# instead, and the network becomes many times smaller; but the integers need *scales* that say how
# far apart they lie, and a network with few bits is only as good as its scales. *Post-training
# quantization* chooses them after training, from a small set of images without labels.
#
# The paper (Evol-Q, ICCV 2023) makes three observations. **The loss is jagged:** move the scales of
# a quantized vision transformer a little, and the test loss jumps up and down, because roundings
# flip; at 4 bits such small moves are worth 0.5 to 0.8 points of accuracy. **So gradients are a
# poor guide,** and the authors use evolution: mutate the scales of one block's attention, keep what
# is better, go to the next block. **And the measure must not overfit** the 1,000 calibration
# images, so they compare the quantized network's predictions with the float network's by a
# contrastive loss, infoNCE. They report, for ViT-Base, +10.30, +0.78 and +0.15 points over the best
# method before, for weights of 3, 4 and 8 bits. Not all of it holds on the small networks here:
# lesson 7 has a verdict on each claim. The search in one line:
#
# $$s^\ast = \arg\min_{s}\; L\big(f_s(X),\, f(X)\big)$$
#
# $f$: the network in float; $f_s$: the same network quantized with the scales $s$; $X$: the
# calibration images; $L$: the loss between two sets of predictions; $s^\ast$: the scales that the
# search looks for, a block at a time.
#
# In this course a small network stands for the large ones: a vision transformer that reads 62
# characters. Calibration images come from the typefaces that it was trained on, test images from
# others. Here are the first 12 calibration images. Above each: what the float network takes it for,
# then the network with weights of 3 bits, then of 2 bits, both with scales from the simplest rule
# (from the smallest to the largest value).

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
alt = f"12 characters with three predictions each, float → 3 bits → 2 bits: {', '.join(titles)}."
tiles(demo.calibration[:12], titles, 6, alt)

# %% [markdown]
# At 8 bits nearly nothing changes, at 3 bits about one prediction in eleven, at 2 bits six in
# seven. The interesting place is the edge, 3 bits: the network still reads, and there is something
# to win back. What the paper's search wins back there, on test images that took no part in it, was
# measured when this repository was made (`make demo` repeats it in about a minute):

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
# (W3A8: weights in 3 bits, activations in 8. In brackets: 95 % intervals.) That is a small gain,
# and one that chance does not explain. Which of the paper's claims hold on these small networks,
# which do not, and why one has to be careful with test images, is what the last lessons are about.
#
# ## The way through the course
#
# | lesson | you learn | read beside it |
# |---|---|---|
# | [1] Uniform quantization | scale, zero point, rounding against clipping | `numerics.py` |
# | [2] Quantizing a ViT | what is quantized in a block, what each bit costs | `layers.py` |
# | [3] Non-smooth landscapes | look around the scales, tell jagged from noise | `landscape.py` |
# | [4] The infoNCE loss | positives, negatives, temperature, overfitting | `fitness.py` |
# | [5] Evolutionary search | ask and tell, population, tournament, rivals | `search.py` |
# | [6] Block-wise Evol-Q | the whole search, live | `evolve.py` |
# | [7] Reproducing the paper | the paper's numbers and ours, test-set selection | `experiments/` |
#
# [1]: 01_uniform_quantization.ipynb
# [2]: 02_quantizing_a_vit.ipynb
# [3]: 03_non_smooth_landscapes.ipynb
# [4]: 04_infonce_loss.ipynb
# [5]: 05_evolutionary_search.ipynb
# [6]: 06_blockwise_evolq.ipynb
# [7]: 07_reproducing_the_paper.ipynb
#
# Take them in order. Each says how long it takes, stops for predictions, and ends with questions
# whose answers explain themselves. Four assignments lie in `notebooks/assignments`: A1 uniform
# quantization (after lesson 2), A2 landscapes (after 3), A3 infoNCE (after 4), A4 evolutionary
# search (after 6).
#
# ## Where results go
#
# A search that runs for a while writes a *run folder*: `make demo` writes `runs/demo`, the panel of
# lesson 6 `runs/panel` beside the notebook. A search that was stopped goes on where it was. This is
# what the folder holds, in the words of the module that writes it:

# %%
Markdown(record.__doc__)

# %% [markdown]
# The library says in its first lines in which order its modules are best read:

# %%
print(eq.__doc__)

# %% [markdown]
# ## Check yourself
#
# Open an answer to see whether, and why, it is right.
#
# **1. A cell says `NameError: name 'demo' is not defined`. What is the first thing to try?**
#
# <details><summary>Install the package again</summary>No: the package is there, a variable is
# missing.</details>
# <details><summary>Run the cells above, from the top</summary>Right: an earlier cell defines it,
# and a kernel that was just started knows nothing.</details>
# <details><summary>Interrupt the kernel</summary>That stops a cell that is running. It defines
# nothing.</details>
#
# **2. Why does Evol-Q need no labels?**
#
# <details><summary>It reads them from the test images</summary>No: the search never sees a label.
# (Here test images are read once, at the end, to measure. What the authors' program does with its
# test images is a story for lesson 7.)</details>
# <details><summary>It compares with the float network's predictions</summary>Right: the float
# network is the teacher, and any image can be a question to it.</details>
# <details><summary>Because scales do not depend on images</summary>They do here: the loss that is
# minimised is measured on calibration images.</details>
#
# **3. At which bit-width is a better choice of scales worth most here?**
#
# <details><summary>8 bits</summary>There the quantized network already agrees with the float one on
# nearly every image: little is left to gain.</details>
# <details><summary>3 bits</summary>Right: enough is lost to be won back, and enough of the network
# is left to build on.</details>
# <details><summary>It makes no difference</summary>It does: the printed lines above show how
# different the losses are.</details>
#
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima: Quantization in the Loss
# Landscape of Vision Transformers*, ICCV 2023, arXiv 2308.10814: the three observations and the
# numbers. The characters and the networks: `data/README.md`.
