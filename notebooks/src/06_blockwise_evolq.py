# %% [markdown]
# # 6. Block-wise Evol-Q
#
# **After this lesson you can** name the scales that Evol-Q searches; run the whole block-wise
# search; read its history; say with an interval and a test whether it helped; stop a search and
# resume it.
#
# **Prerequisites:** lessons 1 to 5: quantizers, the blocks of a ViT, landscapes and their noise
# floor, infoNCE, ask and tell.
#
# **Time:** 30 minutes to read, 2 minutes to run.
#
# **Works offline:** yes. The network and the images are in `data/`.
#
# **Read alongside:** `evolq_lite/evolve.py`, with `objective.py`, `genome.py`, `chain.py`.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import inspect

import torch
from IPython.display import Code
from tqdm.auto import tqdm

from evolq_lite.evolve import evaluations_of
from evolq_lite.figures import (
    changed_figure,
    characters_figure,
    confusion_figure,
    history_figure,
    top1_figure,
)
from evolq_lite.panels import Quiz, SearchPanel

torch.set_num_threads(2)
demo = eq.load_demo("vit", calibration=500, seed=0)
weights = sum(p.numel() for p in demo.model.parameters())
print(f"{weights:,} weights; calibration images {tuple(demo.calibration.shape)}")

# %% [markdown]
# ## The task
#
# The network reads 62 characters, A-Z, a-z and 0-9, in free typefaces. The test typefaces were
# never used in training or calibration. Some characters (O 0 o, l I 1) are hard for people, too.
# Here are 30 calibration images and what the *float network* reads in them; these predictions are
# the only labels that the search will see.

# %%
characters_figure(demo.calibration[:30], demo.targets[:30].argmax(1))

# %% [markdown]
# ## The idea
#
# Lesson 5 searched one block. A network has many, and their scales depend on each other. Evol-Q
# goes from block to block, last to first, improves each a little, and starts over. The loss is
# always that of the whole network, but only the scales of one block change at a time.
#
# ## Quantize and calibrate
#
# `quantize` makes a copy that shares the weights, with a quantizer at every operand of every matrix
# product. Weights get one scale per output channel, activations one per tensor (the sums before a
# LayerNorm also get a power of two per channel). `calibrate` shows it the calibration images once,
# and the observers choose the first scales, which cover the range from the smallest to the largest
# value seen (MinMax). Three bits allow only eight values, so rounding loses a lot.

# %%
config = eq.QuantConfig(weight_bits=3, act_bits=8)
qmodel = eq.quantize(demo.model, config)
eq.calibrate(qmodel, demo.calibration)
before = eq.twin(qmodel)  # keeps the first scales, for the comparison at the end
print(
    "\n".join(
        line for line in eq.describe(qmodel).splitlines() if "blocks.5" in line or "float" in line
    )
)

# %% [markdown]
# ## A chain, a genome, an objective
#
# The network becomes a *chain* of segments that run one after another. The *genome* of a block is
# the vector of its attention weight scales. The *objective* maps such a vector to one number: the
# infoNCE distance between the logits of the quantized network with these scales and the float
# network's logits. The inputs of the block are stored, so only this block and the ones after it run
# again.
#
# $$L = -\frac{2T}{N} \sum_{i=1}^{N}
# \log \frac{\exp(q_i \cdot k_i / T)}{\sum_j \exp(q_i \cdot k_j / T)}$$
#
# $q_i$: normalized logits of the quantized network for image $i$; $k_j$: those of the float network
# for image $j$; $N$: the number of images in a batch, 100; $T$: the temperature, 3.

# %%
chain = eq.chain_of(qmodel)
chain.fit_chunk(demo.calibration[:1])  # so many images at a time as stay in the processor's cache
objective = eq.BlockObjective(chain, "blocks.5", demo.calibration, demo.targets)
print("segments:", *chain.names)
print(f"genome of blocks.5: {len(objective.genome)} scales, first {objective.genome.describe(0)}")
start = objective.start
start_fitness = objective(start[None])[0]
print(f"fitness of the first scales: {start_fitness:.6f}")

# %% [markdown]
# **Predict, then run:** walk in a straight line from the first scales to a random neighbor, moving
# every scale by at most 0.001. Does the fitness change smoothly?

# %%
generator = torch.Generator().manual_seed(0)
direction = 1e-3 * (2 * torch.rand(len(start), generator=generator) - 1)
line = torch.linspace(0, 1, 9)
values = objective(torch.stack([start + t * direction for t in line]))
for t, value in zip(line, values, strict=True):
    print(f"{t:5.3f} of the way: {1e4 * (value - start_fitness):+8.3f} e-4")

# %% [markdown]
# It does not: it goes up and down, and all changes along the way together are much larger than the
# difference between its ends. These are the steps of lesson 3: integers that flip. (Whatever is
# below that lesson's noise floor, about 2e-4 with 500 images, is a step of this machine only.)

# %% [markdown]
# ## One block by hand
#
# Evolution as ask and tell: draw parents by tournament, add uniform noise, keep what is better.
# Evaluating never writes to the model, so this cell leaves it unchanged.

# %%
search = eq.EvolQ(start, float(start_fitness), step=1e-3, population=15, tournament=10, seed=0)
best, fitness = eq.minimize(objective, search, evaluations=12)
print(f"after 12 candidates: {fitness:.6f} (start {start_fitness:.6f})")

# %% [markdown]
# ## The whole search
#
# The paper's loop passes over all blocks, last to first. Each visit to a block tries three
# candidates and then *commits*: it writes the best scales into the model. The paper makes 10 passes
# on 1,000 images; here we use 500 images, so that the cell takes about a minute. This is the loop:

# %%
Code(inspect.getsource(eq.evolve), language="python")

# %%
options = eq.SearchConfig(passes=10, cycles=3, population=15, tournament=10)
history = []
with tqdm(total=evaluations_of(chain, options), unit="evaluation") as bar:
    for event in eq.evolve(chain, demo.calibration, demo.targets, options):
        if isinstance(event, eq.Evaluated):
            history.append(event)
            bar.update()
accepted = sum(event.accepted for event in history[1:])
print(f"{len(history)} evaluations, {accepted} better than all before")
history_figure(history)

# %% [markdown]
# Most candidates are rejected. Must each of them see all images first? With `racing=True` a
# candidate is dropped as soon as its first batches leave it no chance (`evolq_lite/racing.py`). The
# paper does not do that; claim C10 measures what it saves and what it gains.
#
# ## Did it help? The test images, once
#
# So far no test image was used. Now all three networks see each of them once. The gain is *paired*:
# only images on which exactly one of the two networks is right say anything about the difference.

# %%
images, labels = demo.test
models = {"float": demo.model, "before": before, "evolved": qmodel}
with tqdm(total=len(labels), unit="image") as bar:
    found = eq.predict(models, images.split(100), bar.update)
results = {name: eq.accuracy(predictions, labels) for name, predictions in found.items()}
gain = eq.compare(found["before"], found["evolved"], labels)
for name, result in results.items():
    print(f"{name:8} {result}")
print(f"gain     {gain}: {gain.verdict}")
top1_figure(results, gain)

# %% [markdown]
# The search wins back about a tenth of what three bits cost. Whether another search at the same
# cost would do as well is a question for lesson 7, and what other integers would bring, for lesson
# 8.
#
# ## Characters whose label changed
#
# `before → evolved`, with ✓ for right and ✗ for wrong. Look for pairs that differ only in size or
# in a detail.

# %%
changed_figure(images, labels, found["before"], found["evolved"])

# %% [markdown]
# The confusion matrix of the float network shows which pairs are hard to begin with.

# %%
confusion_figure(found["float"], labels)

# %% [markdown]
# ## Your own search
#
# The panel runs the same search in its own folder (`runs/panel` next to this notebook). Set the
# options, press *Run*, and watch. *Pause* waits, *Cancel* stops, and *Resume* continues where the
# run stopped, even tomorrow: every candidate is saved to disk. The command line reads the same
# folder: run `python -m evolq_lite demo --resume --out notebooks/runs/panel --step 0.001` from the
# repository root, with any other options set as they were here.
#
# *Search* chooses what evolves: the scales, as in this lesson; the *bits* of each layer within a
# mean (`evolq_lite/bits.py`); or *both*, one after the other. At the end of a search of bits the
# panel draws which layers got more and which fewer.

# %%
SearchPanel()

# %% [markdown]
# As in lesson 5, *accepted* means better than all candidates before it.
#
# **Predict, then try.**
#
# 1. Set the population to 1 instead of 15. Does the search still work, and what does it become?
# 2. Set the mutation width to 0.1, a hundred times the paper's. What happens to the accepted share?
# 3. Compare 1 cycle and 20 passes with 10 cycles and 2 passes. (A *pass* visits every block once;
#    *cycles* are the candidates per visit.) Both try 120 candidates. Which would you prefer, and
#    why?
#
# <details><summary>What you should have seen</summary>
#
# 1. It works. With one member, the parent is always the best so far: a (1+1) search. Three cycles
#    per visit hardly use a population, since all its members start as copies.
# 2. Hardly any candidate is accepted: the scales themselves are about 0.1, so children no longer
#    resemble their parents.
# 3. Many short visits let every block respond to the current state of the others. Long visits save
#    nothing here, because preparing a visit costs little. With one seed the difference is within
#    the noise: say so, and use several seeds. (None of the claims in lesson 7 measures this.)
#
# </details>
#
# Every run ends with a look at the test images. Choosing options by that look means choosing by the
# test set; lesson 7 shows what that is worth.
#
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. Why can the inputs of block 5 be stored while its scales are searched?",
    {
        "They depend only on blocks 0 to 4": (
            "Right: a candidate differs only in block 5, so everything before it stays the same, "
            "bit for bit."
        ),
        "They change too little to matter": (
            "No: they do not change at all. If they did, the tiny differences that the search "
            "ranks would be lost in noise."
        ),
        "They are quantized": "That is true, but not the reason.",
    },
    answer=1,
)

# %% tags=["hide-input"]
Quiz(
    "2. Why does the search's own fitness not prove that it helped?",
    {
        "The fitness has a random part": "No: it is deterministic here.",
        "It was minimized on these very images": (
            "Right: what fits 500 images may be luck with these 500. The gain must be measured on "
            "images, here typefaces, that the search has not seen."
        ),
        "infoNCE is a poor loss": (
            "Perhaps, but even a perfect loss would look too good on the images it was minimized "
            "on."
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "3. The official code tests after every block and keeps the best snapshot. What is wrong "
    "with that?",
    {
        "It takes too long": "It does take long, but that only costs time.",
        "The best of many noisy results is too good on average": (
            "Right: the test set then chooses the scales, so its accuracy is no longer a "
            "measurement."
        ),
        "Nothing, since all snapshots come from the search": (
            "The search did not look at test images, but the choice among its snapshots did."
        ),
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima: Quantization in the Loss
# Landscape of Vision Transformers*, ICCV 2023, arXiv 2308.10814. Y. Lin et al., *FQ-ViT*, IJCAI
# 2022, arXiv 2111.13824.
