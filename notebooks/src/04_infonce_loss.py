# %% [markdown]
# # 4. The infoNCE loss
#
# **After this lesson you can** write down infoNCE and compute it; explain what temperature and
# negatives do; compare it with MSE, cosine and KL on real logits; show that a search overfits its
# calibration images.
#
# **Prerequisites:** lessons 1 to 3. No knowledge of contrastive learning is assumed.
#
# **Time:** 30 minutes to read, 1 minute to run.
#
# **Works offline:** yes. The network and the images are in `data/`.
#
# **Read alongside:** `evolq_lite/fitness.py`.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

import inspect

import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Code, display
from scipy.stats import spearmanr

from evolq_lite.experiments.report import load_claim
from evolq_lite.figures import PETROFF, new_figure
from evolq_lite.landscape import direction
from evolq_lite.panels import Guess, InfoNCEPanel, Quiz
from evolq_lite.panels.infonce import ordered, shares

torch.set_num_threads(2)
demo = eq.load_demo("vit", calibration=300, seed=0)
images, targets = demo.calibration[:100], demo.targets[:100]

# %% [markdown]
# ## What should a search minimize?
#
# Calibration images have no labels here. What we do have is the float network: for every image, its
# logits tell us what the quantized network *should* answer. A *fitness* is a distance between two
# sets of logits: the *outputs* of the quantized network and the *targets* of the float network.
# Lower is better.
#
# There are many such distances. Here are four of them, for the ViT at four bit-widths: the mean
# squared error of the logits (MSE); 1 minus the cosine of the angle between the two; the divergence
# KL(target ‖ output) of their softmaxes; and infoNCE, which is explained below.

# %%
outputs = {}
for bits in (8, 4, 3, 2):
    qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=bits, act_bits=8))
    eq.calibrate(qmodel, images)
    with torch.no_grad():
        outputs[bits] = qmodel(images)
losses = {"MSE": eq.mse, "cosine": eq.cosine, "KL": eq.kl, "infoNCE": eq.info_nce}
print("      " + "".join(f"{name:>10}" for name in losses) + "   same label as float")
for bits, logits in outputs.items():
    values = "".join(f"{float(loss(logits, targets)):10.4f}" for loss in losses.values())
    same = eq.accuracy(logits.argmax(1), targets.argmax(1))
    print(f"W{bits}A8  {values}   {same}")

# %% [markdown]
# All four rise as bits are removed. (The last column may rise by an image or two from 8 to 4 bits:
# that is within its intervals. The lowest value of infoNCE is not 0; we will see below what
# it is.) They disagree where it matters to a search: between candidates that are nearly alike.
#
# ## InfoNCE
#
# Evol-Q compares every output with the targets of *all* images in the batch. The output should
# resemble the target of its own image, the *positive*, and not those of the other images, the
# *negatives*.
#
# $$L = -\frac{2T}{N} \sum_{i=1}^{N}
# \log \frac{\exp(q_i \cdot k_i / T)}{\sum_{j=1}^{N} \exp(q_i \cdot k_j / T)}$$
#
# $q_i$: the output for image $i$, scaled to length 1; $k_j$: the target of image $j$, scaled to
# length 1, so that $q_i \cdot k_j$ is the cosine of the angle between the two; $N$: the number of
# images in a batch; $T$: the *temperature*. InfoNCE is the cross-entropy of a classifier that must
# find, for each output, its own image among the $N$. The factor $2T$ cancels the $1/T$ that the
# temperature brings into the gradient.
#
# In code it takes five lines. The cell after it computes the formula term by term:

# %%
Code(inspect.getsource(eq.info_nce), language="python")

# %%
q, k = F.normalize(outputs[3][:4], dim=1), F.normalize(targets[:4], dim=1)
T = 3.0
total = 0.0
for i in range(4):
    others = sum(torch.exp(q[i] @ k[j] / T) for j in range(4))
    total -= torch.log(torch.exp(q[i] @ k[i] / T) / others)
print("cosines of four outputs (rows) with four targets (columns):")
print(np.array2string((q @ k.T).numpy(), precision=2, suppress_small=True))
print(f"by hand {float(2 * T / 4 * total):.6f}")
print(f"library {float(eq.info_nce(outputs[3][:4], targets[:4], T)):.6f}")

# %% [markdown]
# ## Temperature and negatives
#
# The gradient of $L$ with respect to an output has two parts. The positive pulls with weight $1 -
# p_{ii}$, and each negative pushes with weight $p_{ij}$, where $p_{ij}$ is the softmax over the
# batch. A small $T$ makes the softmax sharp: only the most similar negatives count, and images that
# are already told apart no longer do. A large $T$ makes it nearly uniform: all negatives count
# equally.
#
# For each output, the pull has the same weight as all the pushes together. But the part that points
# along the output itself changes no cosine. The panel omits that part and compares the lengths of
# what remains. Near its own target, the pull points along the output, so little of it remains.

# %% tags=["hide-input"]
outputs_and_targets = ordered(3, 32)  # logits for 32 images, W3A8 and float
Guess(
    "What share of the gradient comes from the negatives?",
    {f"T = {t:g}": 100 * shares(*outputs_and_targets, t)[0] for t in (0.05, 0.3, 3.0)},
    low=0,
    high=100,
    unit="%",
    explanation="In the panel you see the whole curve, and why.",
)

# %%
InfoNCEPanel()

# %% [markdown]
# **Predict, then try.**
#
# 1. Lower the temperature from 3 to 0.05. What happens to the loss, and to the hardest negative's
#    share of the weight of all negatives?
# 2. Compare batches of 64 and 2 at T = 3. Why does the loss depend so much on the batch size, and
#    the cosine distance so little?
# 3. At T = 3, go from 3 to 8 bits, closer to the float network. Does the negatives' share of the
#    gradient shrink along with the distance?
#
# <details><summary>What you should have seen</summary>
#
# 1. The loss falls from 19 to 0.01, and the hardest negative's share rises from 4 % (equal shares
#    would be 3 %) to 78 %: nearly every image is told apart from nearly every other, and the
#    remaining loss comes from a few pairs.
# 2. With a nearly uniform softmax, the loss is $2T \log N$ (25 for 64 images, 4 for 2) minus a
#    number between about 1 and 2 that depends on the outputs. So the batch size determines most of
#    it. The cosine distance looks at one image at a time.
# 3. No, it rises from 29 % to 77 %. The pull vanishes as the output approaches its target, but the
#    push does not. So the float network itself is not a minimum of this loss. The next section
#    explains what is.
#
# </details>
#
# ## What is left of infoNCE at T = 3?
#
# For large $T$ the exponentials are nearly linear, and up to terms of order $1/T$
#
# $$L \approx 2T \log N - \frac{2}{N} \sum_i q_i \cdot (k_i - \bar k), \qquad
# \bar k = \frac{1}{N} \sum_j k_j$$
#
# So the negatives act only through their mean $\bar k$: the loss is a cosine distance to *centered*
# targets, and how hard each negative is no longer matters. The paper's code uses T = 3. Is that
# large? Cosines lie between -1 and 1, so the exponents lie between -1/3 and 1/3. Let us measure it:
# we take 40 random neighbors of the 3-bit network's scales and compute the rank correlation between
# losses over them. A correlation of 1 means that any search that compares candidates would make the
# same decisions.

# %%
qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=3, act_bits=8))
eq.calibrate(qmodel, images)
chain = eq.chain_of(qmodel)
chain.fit_chunk(images[:1])
seen = []


def keep(outputs, targets):
    """Remember the outputs, so that every loss sees the same ones."""
    seen.append(outputs)
    return eq.cosine(outputs, targets)


objective = eq.BlockObjective(chain, chain.searchable, images, targets, fitness=keep)
start = objective.start
near = torch.stack([start + 0.01 * direction(start, seed=seed) for seed in range(40)]).abs()
objective(near)


def centered(outputs, targets):
    """Cosine distance to targets without their mean, up to a constant."""
    q, k = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
    return -(q * (k - k.mean(0))).sum(1).mean()


table = {
    "cosine": [float(eq.cosine(logits, targets)) for logits in seen],
    "centered cosine": [float(centered(logits, targets)) for logits in seen],
}
print("rank correlation of infoNCE with   " + "   ".join(table))
for temperature in (0.05, 0.2, 1.0, 3.0, 10.0):
    values = [float(eq.info_nce(logits, targets, temperature)) for logits in seen]
    found = [spearmanr(values, other).statistic for other in table.values()]
    print(f"T = {temperature:<5}                          {found[0]:.3f}   {found[1]:14.3f}")

# %% [markdown]
# For a search, infoNCE at T = 3 is nearly the centered cosine: the two rank almost all candidates
# alike. It is close to the plain cosine as well, though not the same. (Further up we compared
# images within one network; a search compares candidates, and that is what counts here.) Individual
# negatives come into play from about T = 0.2 downwards. This does not refute the paper's comparison
# of losses; it clarifies what is being compared.
#
# Centering has a price. The float network's own logits are not the best outputs:

# %%
own = F.normalize(targets, dim=1)
print(f"mean target: length {float(own.mean(0).norm()):.2f} (single ones: 1)")
for name, logits in (
    ("W3A8", outputs[3]),
    ("float itself", targets),
    ("float without the mean target", own - own.mean(0)),
):
    values = [f"{float(eq.info_nce(logits, targets, t)):9.4f}" for t in (0.05, 3.0)]
    print(f"{name:30} infoNCE at T = 0.05 {values[0]}, at T = 3 {values[1]}")

# %% [markdown]
# At T = 3, outputs that lean away from the mean target get a lower loss than the float network
# itself. So a search may gain a little by leaning away instead of coming closer.
#
# ## Four losses side by side
#
# What does each of them see? We change the float network's logits in three ways. The first two
# change no label:

# %%
changes = {
    "float": targets,
    "all logits doubled": 2 * targets,
    "1 added to all logits": targets + 1,
    "noise of 0.1": targets
    + 0.1 * torch.randn(targets.shape, generator=torch.Generator().manual_seed(0)),
}
print(f"{'':22}" + "".join(f"{name:>10}" for name in losses))
for name, logits in changes.items():
    row = "".join(f"{float(loss(logits, targets)):10.4f}" for loss in losses.values())
    print(f"{name:22}{row}")

# %% [markdown]
# MSE sees all three. Cosine and infoNCE ignore the length of an output. KL ignores a constant added
# to all logits, because the probabilities do not change. And on real neighbors?

# %% tags=["hide-input"]
values = np.array([[float(loss(logits, targets)) for loss in losses.values()] for logits in seen])
rank = spearmanr(values).statistic
names = list(losses)
pairs = "; ".join(
    f"{names[i]} and {names[j]} {rank[i, j]:.2f}" for i in range(4) for j in range(i + 1, 4)
)
figure = new_figure(4.6, 3.6, f"Rank correlation of losses over 40 neighbors: {pairs}.")
axes = figure.add_subplot()
image = axes.imshow(rank, cmap="cividis", vmin=0, vmax=1)
axes.set_xticks(range(4), names)
axes.set_yticks(range(4), names)
for i in range(4):
    for j in range(4):
        color = "black" if rank[i, j] > 0.6 else "white"
        axes.text(j, i, f"{rank[i, j]:.2f}", ha="center", va="center", color=color)
axes.set_title("Rank correlation over 40 neighbors", fontsize="medium")
figure.colorbar(image, ax=axes)
figure

# %% [markdown]
# Cosine, MSE and infoNCE mostly agree. KL goes its own way because it weights each logit by the
# probability of its class and so sees little beyond the leading classes.
#
# Which is the best guide? Correlations cannot tell. Only a search with each loss can, tested on
# images that the search has not seen. That takes over an hour, so here is the shipped result of
# `python -m evolq_lite reproduce C4` (three seeds for each loss):

# %%
figure, verdict = load_claim("C4")
display(verdict)
figure

# %% [markdown]
# (*fisher*: half the variance of the difference of the logits, under the float network's
# probabilities. For outputs close to the float network's, it equals KL to second order.)
#
# All of them help, and with 1,000 images most help equally: having a loss matters more than which
# one. KL, which went its own way above, is then as good a guide as infoNCE; with fewer images its
# gains are smaller. C4 also asks about overfitting, our next topic: how much of its gain a loss
# loses on fresh images. Apart from infoNCE at T = 0.07, it is largest for KL and Fisher, yet three
# seeds are too few to be sure that this is more than for infoNCE at T = 3.
#
# ## Overfitting
#
# A search lowers the loss on its calibration images. Does the loss fall on other images, too? We
# search all attention scales with infoNCE (120 candidates of an `EvolQ`, which lesson 5 takes
# apart), once on 10 images and once on 100, and at each improvement compute the same loss on 200
# fresh images. (Within each search, its own and the fresh images come in batches of the same size,
# 10 or 100, because the loss depends on it.)

# %%
histories = {}
for count in (10, 100):
    own_images = eq.BlockObjective(
        chain, chain.searchable, images[:count], targets[:count], batch=count
    )
    fresh = eq.BlockObjective(
        chain, chain.searchable, demo.calibration[100:], demo.targets[100:], batch=count
    )
    first = float(own_images(start[None])[0]), float(fresh(start[None])[0])
    history = [(0.0, 0.0)]

    def note(vector, value, history=history, fresh=fresh, first=first):
        """At an improvement: changes since the start, on own and on fresh images."""
        if value - first[0] < history[-1][0]:
            history.append((value - first[0], float(fresh(vector[None])[0]) - first[1]))
        else:
            history.append(history[-1])

    search = eq.EvolQ(start, first[0], step=0.02, relative=True, seed=0)
    eq.minimize(own_images, search, 120, note)
    histories[count] = np.array(history)
said = {
    count: f"{count} images: {h[-1, 0]:+.4f} on its own, {h[-1, 1]:+.4f} on fresh images, so "
    f"{1 - h[-1, 1] / h[-1, 0]:.0%} of the gain is lost there"
    for count, h in histories.items()
}
for line in said.values():
    print(line)

# %% tags=["hide-input"]
figure = new_figure(8.4, 3.2, f"InfoNCE over 120 candidates. {'; '.join(said.values())}.")
for axes, (count, h) in zip(figure.subplots(1, 2, sharey=True), histories.items()):
    axes.step(range(len(h)), h[:, 0], "-", color=PETROFF[0], where="post", label="own images")
    axes.step(range(len(h)), h[:, 1], "--", color=PETROFF[1], where="post", label="fresh images")
    axes.set(title=f"search on {count} images", xlabel="candidates")
    axes.legend(fontsize="small")
figure.axes[0].set_ylabel("change of infoNCE")
figure

# %% [markdown]
# The gap between the two lines is overfitting: the scales suit these images rather than images in
# general. It is much smaller with 100 images than with 10; Evol-Q uses 1,000. The paper says that
# infoNCE helps against overfitting. Does it help more than other losses? One search with one seed
# cannot tell. C4 has three seeds: at T = 3, infoNCE loses less of its gain than KL and Fisher with
# every number of images ([results](../data/results/README.md)), but three seeds are too few to call
# that significant, and MSE and cosine are close to it.
#
# On a real network it can be worse. R4 searched trained DeiT-Tiny and ViT-Tiny with 3-bit weights
# on 256 photographs, for one pass and with three seeds. On 256 fresh photographs DeiT-Tiny loses a
# quarter of its gain in infoNCE, and ViT-Tiny all of it; other losses lose all of theirs there,
# too. So **the fitness that a search reaches is not evidence that it helped.**
#
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. All outputs equal their targets. What is infoNCE for a batch of N images?",
    {
        "0": (
            "No: the softmax gives the positive a probability below 1, since the negatives get "
            "some as well."
        ),
        "More than 0, and it depends on T and on the other images": (
            "Right: for large T it is near 2 T log N."
        ),
        "2 T log N exactly": (
            "Only if all cosines were equal. An output resembles its own target more than the "
            "others, so the loss is somewhat lower."
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "2. Two candidates have the same cosine distance, but infoNCE at T = 3 prefers the "
    "second. How is that possible?",
    {
        "Its outputs resemble the mean target less": (
            "Right: to first order, that is the only other thing the loss sees."
        ),
        "It gets the hardest pair of images right": (
            "Unlikely: at T = 3 each negative has about the same weight."
        ),
        "Its logits are larger": "No: outputs are scaled to length 1 first.",
    },
    answer=1,
)

# %% tags=["hide-input"]
Quiz(
    "3. A search on 50 images reaches a lower fitness than one on 500. Which scales do you choose?",
    {
        "Those from 50 images: lower is better": (
            "No: the two numbers describe different images, and fewer images are easier to overfit."
        ),
        "Whichever does better on images that neither search has seen": (
            "Right. And those must not be the test images; otherwise the test set has made the "
            "choice."
        ),
        "Those from 500, always": (
            "Probably, but the fitness cannot tell you: it takes fresh images to know."
        ),
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# N. Frumkin, D. Gope, D. Marculescu, *Jumping through Local Minima*, ICCV 2023, arXiv 2308.10814:
# infoNCE as fitness; T = 3 is the value in its code. X. Chen, S. Xie, K. He, *An Empirical Study of
# Training Self-Supervised Vision Transformers* (MoCo v3), ICCV 2021, arXiv 2104.02057: this form of
# the loss. A. van den Oord, Y. Li, O. Vinyals, arXiv 1807.03748: the origin of the name.
