# %% [markdown]
# # 6. Block-wise Evol-Q
#
# **Afterwards you can** quantize a vision transformer, name the scales that Evol-Q searches, run
# the whole search, read its history, and say with an interval and a test whether it helped.
#
# **You need** PyTorch, and the idea of uniform quantization: `x' = (clamp(round(x / s) + z) - z) *
# s`, where `s` is the *scale*, `z` the *zero point*, and the clamp keeps the integer within the
# bits.
#
# **Works offline:** yes. The network and the images are in `data/`.
#
# **Modules to read beside it:** `evolq_lite/evolve.py`, `search.py`, `objective.py`, `genome.py`,
# `chain.py`.

# %%
import torch
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
# ## Quantize and calibrate
#
# `quantize` makes a copy that shares the weights, with a quantizer at every operand of every
# matrix product. Weights get one scale per output channel, activations one per tensor. `calibrate`
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
# takes about a minute.

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
print(f"{len(history)} evaluations, {accepted} accepted")
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
# ## Check yourself
#
# 1. *Why may the inputs of block 5 be kept while its scales are searched?* They depend on blocks 0
#    to 4 only, and a candidate differs in block 5.
# 2. *Why is the search's own fitness no proof that it helped?* It was minimised on these very
#    images; the gain must be measured on images, here typefaces, that took no part.
# 3. *The official code evaluates on the test set after every block and keeps the best snapshot.
#    What is wrong with that?* The best of many noisy results is too good on average: the test set
#    has then chosen the scales.
#
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima: Quantization in the Loss
# Landscape of Vision Transformers*, ICCV 2023, arXiv 2308.10814. Y. Lin et al., *FQ-ViT*, IJCAI
# 2022, arXiv 2111.13824.
