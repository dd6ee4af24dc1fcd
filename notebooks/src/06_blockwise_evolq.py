# %% [markdown]
# # 6. Block-wise Evol-Q
#
# **Afterwards you can** name the scales that Evol-Q searches; run the whole block-wise search; read
# its history; say with an interval and a test whether it helped; stop a search and go on with it.
#
# **You need** lessons 1, 2, 4 and 5: quantizers, the blocks of a ViT, infoNCE, ask and tell.
#
# **Time:** 30 minutes to read, 2 minutes to run.
#
# **Works offline:** yes. The network and the images are in `data/`.
#
# **Module to read beside it:** `evolq_lite/evolve.py`, with `objective.py`, `genome.py`,
# `chain.py`.

# %%
import inspect

import torch
from IPython.display import Code
from tqdm.auto import tqdm

import evolq_lite as eq
from evolq_lite.evolve import evaluations_of
from evolq_lite.figures import (
    changed_figure,
    characters_figure,
    confusion_figure,
    history_figure,
    top1_figure,
)
from evolq_lite.panels import SearchPanel

torch.set_num_threads(2)
demo = eq.load_demo("vit", calibration=500, seed=0)
weights = sum(p.numel() for p in demo.model.parameters())
print(f"{weights:,} weights; calibration images {tuple(demo.calibration.shape)}")

# %% [markdown]
# ## The task
#
# 62 characters, A-Z, a-z, 0-9, in free typefaces. The test typefaces were never seen in training
# or calibration. Some pairs (O 0 o, l I 1) are hard for people too. Here are 30 calibration images
# and what the *float network* takes them for; the search will see no other labels than these
# predictions.

# %%
characters_figure(demo.calibration[:30], demo.targets[:30].argmax(1))

# %% [markdown]
# ## The idea
#
# Lesson 5 searched one block. A network has many, and their scales depend on each other. Evol-Q
# goes from block to block, last to first, improves each a little, and begins again: the loss is
# always that of the whole network, the genome always that of one block.
#
# ## Quantize and calibrate
#
# `quantize` makes a copy that shares the weights, with a quantizer at every operand of every
# matrix product. Weights get one scale per output channel, activations one per tensor (the sums
# before a LayerNorm also a power of two per channel). `calibrate`
# shows it the calibration images once, and the observers choose the first scales: from the smallest
# to the largest value seen (MinMax). Three bits are eight values, so much is lost in rounding.

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
# The network becomes a chain of segments. The *genome* of a block is the vector of its attention
# weight scales. The *objective* maps such a vector to one number: the infoNCE distance between the
# logits of the quantized network with these scales and the float network's logits. The inputs of
# the block are kept, so only the blocks from there on run again.
#
# $$L = -\frac{2T}{N} \sum_{i=1}^{N}
# \log \frac{\exp(q_i \cdot k_i / T)}{\sum_j \exp(q_i \cdot k_j / T)}$$
#
# $q_i$: normalised logits of the quantized network for image $i$; $k_j$: those of the float
# network for image $j$; $N$: images in a batch; $T$: temperature.

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
# **Predict, then run:** walk in a straight line from the first scales to a random neighbour, every
# scale moved by at most 0.001. Does the fitness change smoothly?

# %%
generator = torch.Generator().manual_seed(0)
direction = 1e-3 * (2 * torch.rand(len(start), generator=generator) - 1)
line = torch.linspace(0, 1, 9)
values = objective(torch.stack([start + t * direction for t in line]))
for t, value in zip(line, values, strict=True):
    print(f"{t:5.3f} of the way: {1e4 * (value - start_fitness):+8.3f} e-4")

# %% [markdown]
# It does not: it goes up and down, by more on the way than from end to end. The steps are those of
# lesson 3: integers that flip.

# %% [markdown]
# ## One block by hand
#
# Evolution as ask and tell: draw parents by tournament, add uniform noise, keep the better.
# Evaluating never writes to the model, so nothing has changed after this cell.

# %%
search = eq.EvolQ(start, float(start_fitness), step=1e-3, population=15, tournament=10, seed=0)
best, fitness = eq.minimize(objective, search, evaluations=12)
print(f"after 12 candidates: {fitness:.6f} (start {start_fitness:.6f})")

# %% [markdown]
# ## The whole search
#
# Passes over all blocks, last to first, three candidates a visit, and a commit: this is the
# paper's loop. The paper makes 10 passes on 1,000 images; here it is 10 on 500, so that the cell
# takes about a minute. This is the loop:

# %%
Code(inspect.getsource(eq.evolve), language="python")

# %%
options = eq.SearchConfig(passes=10, cycles=3, population=15, tournament=10)
history = []
with tqdm(total=evaluations_of(chain, options), unit="evaluation") as bar:

    def note(evaluation: eq.Evaluation) -> None:
        history.append(evaluation.as_dict())
        bar.update()

    eq.evolve(
        chain, demo.calibration, demo.targets, options, options.width(config.weight_bits), note
    )
accepted = sum(line["accepted"] for line in history[1:])
print(f"{len(history)} evaluations, {accepted} better than all before")
history_figure(history)

# %% [markdown]
# ## Did it help? The test images, once
#
# Until here no test image was read. Now all three networks see each of them once. The gain is
# *paired*: only images on which exactly one of two networks is right say anything about the
# difference.

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
# ## Characters whose label changed
#
# `before → evolved`, with ✓ for right and ✗ for wrong. Look for pairs that only size or a detail
# tells apart.

# %%
changed_figure(images, labels, found["before"], found["evolved"])

# %% [markdown]
# The confusion matrix of the float network shows which pairs are hard to begin with.

# %%
confusion_figure(found["float"], labels)

# %% [markdown]
# ## Your own search
#
# The panel runs the same search, in a folder of its own (`runs/panel` beside this notebook). Set
# the options, press *Run*, watch; *Pause* waits, *Cancel* stops, *Resume* goes on from the last
# finished block, even tomorrow: every candidate is on the disk. The command line reads the same
# folder: `python -m evolq_lite demo --resume --out notebooks/runs/panel --step 0.001`, from the
# repository's root, with the other options as they were set here.

# %%
SearchPanel()

# %% [markdown]
# *Accepted* means here: better than all before. (In lesson 5's panel it meant: has joined the
# population.)
#
# **Predict, then try.**
#
# 1. Population 1 instead of 15: does the search still work, and what is it then?
# 2. Mutation width 0.1, a hundred times the paper's. What becomes of the accepted share?
# 3. Cycles 1 and passes 20, against cycles 10 and passes 2: the same number of candidates, 120.
#    Which would you rather have, and why?
#
# <details><summary>What you should have seen</summary>
#
# 1. It works. With one member, the parent is always the best so far: a (1+1) search. Three cycles a
#    visit hardly make use of a population, since all its members begin as copies.
# 2. Hardly any candidate is accepted: scales are about 0.1 themselves, so the children are no
#    neighbours of their parents any more.
# 3. Many short visits let every block answer to the present state of the others. Long visits save
#    nothing here, because the cost of a visit's preparation is small. The difference on one seed is
#    within the noise: say so, and use several seeds. (No claim of lesson 7 has measured it.)
#
# </details>
#
# Every run ends with a look at the test images. Choosing options by that look would be choosing by
# the test set; lesson 7 shows what that is worth.
#
# ## Check yourself
#
# **1. Why may the inputs of block 5 be kept while its scales are searched?**
#
# <details><summary>They depend on blocks 0 to 4 only</summary>Right: a candidate differs in block
# 5, so everything before it stays the same, bit for bit.</details>
# <details><summary>They change too little to matter</summary>No: they do not change at all. If they
# did, differences as small as those the search ranks could not be told from noise.</details>
# <details><summary>They are quantized</summary>That is true, but not the reason.</details>
#
# **2. Why is the search's own fitness no proof that it helped?**
#
# <details><summary>The fitness has a random part</summary>No: it is deterministic here.</details>
# <details><summary>It was minimised on these very images</summary>Right: what fits 500 images may
# be luck with these 500. The gain must be measured on images, here typefaces, that took no part.
# </details>
# <details><summary>infoNCE is a poor loss</summary>Perhaps, but even a perfect loss would be too
# good on the images that it was minimised on.</details>
#
# **3. The official code tests after every block and keeps the best snapshot. What is wrong?**
#
# <details><summary>It takes too long</summary>It does take long, but that only wastes
# time.</details>
# <details><summary>The best of many noisy results is too good on average</summary>Right: the test
# set has then chosen the scales, and its accuracy is no longer a measurement.</details>
# <details><summary>Nothing, since all snapshots come from the search</summary>The search did not
# look at test images, but the choice among its snapshots did.</details>
#
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima: Quantization in the Loss
# Landscape of Vision Transformers*, ICCV 2023, arXiv 2308.10814. Y. Lin et al., *FQ-ViT*, IJCAI
# 2022, arXiv 2111.13824.
