# %% [markdown]
# # Assignment 3. InfoNCE
#
# **You build** the loss that guides Evol-Q, a measure of how many negatives it listens to, its
# batches, its limit for high temperatures, and an honest choice of the temperature. These are the
# pieces of `evolq_lite/fitness.py` and what lesson 4 asks of them, written by you.
#
# **You need** lesson 4 and PyTorch. **Time:** 2 to 4 hours. **Points:** 20.
# **Works offline:** yes.
#
# Each exercise has one cell to fill in: `# YOUR CODE HERE` marks each place. Write your code there and
# delete the line `raise NotImplementedError()` below it. The next cell holds public checks that say
# what is wrong; run it as often as you like. The cells after it are empty here and hold hidden tests
# when the assignment is graded: they try many random cases of what the text asks for, and nothing
# else. Test cells are restored before grading, so changing them changes nothing. The functions of
# `evolq_lite` that an exercise re-creates are not allowed in your answer.

# %% [markdown]
# ## About you and your work
#
# Assistants are allowed in this course if you name them here and say for what. You answer for every line that
# you hand in: your instructor may ask you to explain any of them, and what you cannot explain does not count.
# Write the answers to the questions in your own words. *(Release {release})*
#
# **Name:**
#
# **ID:**
#
# **Help received:** (people, books, sites, assistants; for which exercise; or "none")

# %% nbgrader={"grade": false, "grade_id": "A3-setup", "locked": true, "schema_version": 3, "solution": false, "task": false}
import math
import types
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

import evolq_lite as eq
from evolq_lite.figures import PETROFF, new_figure


def same(yours, expected, what, tolerance=1e-5):
    """Fail with a sentence unless two numbers or tensors agree."""
    assert yours is not None, f"{what}: None came back; is a return missing?"
    kind = type(yours).__name__
    try:
        yours = torch.as_tensor(yours)
        assert type(yours) in (torch.Tensor, torch.nn.Parameter)
        yours = yours.detach().double()
    except (TypeError, ValueError, RuntimeError, AssertionError):
        raise AssertionError(f"{what}: expected a number or a tensor, not {kind}") from None
    expected = torch.as_tensor(expected).double()
    shapes = f"shape {tuple(yours.shape)} instead of {tuple(expected.shape)}"
    assert yours.shape == expected.shape, f"{what}: {shapes}"
    far = ~((yours - expected).abs() <= tolerance * (1 + expected.abs()))
    if far.any():
        at = tuple(far.nonzero()[0].tolist())
        where = f" at index {at}" if at else ""
        raise AssertionError(
            f"{what}{where}: {float(yours[at]):.6g} instead of {float(expected[at]):.6g}"
        )


def own_work(thing, *names):
    """Fail if a function or class leaves its work to one of these names."""
    home = str(getattr(thing, "__module__", ""))
    assert not home.startswith("evolq_lite"), "write it yourself, without evolq_lite's own"
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    codes, used = [part.__code__ for part in parts if hasattr(part, "__code__")], set()
    while codes:
        code = codes.pop()
        used |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    assert not used & set(names), f"write it yourself, without {min(used & set(names))}"


def logits(n, classes, seed, noise=0.5):
    """Random targets (n, classes), and outputs that resemble them."""
    generator = torch.Generator().manual_seed(seed)
    targets = 3 * torch.randn(n, classes, generator=generator)
    return targets + noise * torch.randn(n, classes, generator=generator), targets


def quantized_vit(images=100, bits=3):
    """The embedded ViT with weights in few bits, and the images that calibrated it."""
    demo = eq.load_demo("vit", images)
    qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=bits))
    eq.calibrate(qmodel, demo.calibration)
    chain = eq.chain_of(qmodel)
    chain.fit_chunk(demo.calibration[:1])
    return chain, demo


@contextmanager
def trying(what):
    """Say which input it was if an answer raises an exception of its own."""
    try:
        yield
    except (AssertionError, NotImplementedError):
        raise
    except Exception as error:
        raise AssertionError(f"{what}: your code raised {type(error).__name__}") from error


# %% [markdown]
# ## Exercise 1: the loss
#
# **Difficulty:** medium · **Minutes:** 50 · **Points:** 4 (public checks 1, hidden tests 1 and 2)
#
# `outputs` are the logits of the quantized network, `targets` those of the float network, for the
# same images: row $i$ of both belongs to image $i$. With $q_i$ and $k_j$ the rows, each divided
# by its own length,
#
# $$s_{ij} = q_i \cdot k_j, \qquad
# L = -\frac{2T}{N} \sum_{i=1}^{N} \log \frac{\exp(s_{ii} / T)}{\sum_{j=1}^{N} \exp(s_{ij} / T)}$$
#
# $N$ is the number of images in the batch, $T$ the temperature. Return $L$ as a tensor of shape `()` through
# which a gradient can flow. It must be right for small temperatures too: at $T = 0.005$, $\exp(1/T)$ is far
# beyond float32, and $\exp(-1/T)$ is 0.
#
# <details><summary>Hint</summary>
#
# `F.normalize(x, dim=1)` divides rows by their lengths. All $s_{ij}$ at once are one matrix
# product, $N \times N$. `log_softmax` over the right axis takes the logarithm without overflow;
# the diagonal of the result holds what is asked for.
#
# </details>
#
# **Expected** (the matrix $s_{ij}$ of 12 images, and its loss):
#
# ![Similarity of 12 quantized outputs with 12 float targets: at least 0.83 on the diagonal, at most 0.90 beside it. The loss at temperature 3 is 13.24.](figures/A3-1.png)


# %% nbgrader={"grade": false, "grade_id": "A3-1", "locked": false, "schema_version": 3, "solution": true, "task": false}
def contrast(outputs, targets, temperature):
    """The infoNCE loss of outputs and targets (images, classes), a tensor of shape ()."""
    ### BEGIN SOLUTION
    outputs, targets = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
    similarity = outputs @ targets.T / temperature
    return -2 * temperature * similarity.log_softmax(1).diagonal().mean()
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A3-1-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(contrast, "info_nce", "FITNESS", "fitness_of")
two = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
expected = 2 * math.log(1 + math.exp(-1))
same(contrast(two, two, 1.0), expected, "two images at a right angle, temperature 1")
same(contrast(10 * two, two, 1.0), expected, "the same with outputs 10 times as long")
expected = 2 * math.log(1 + math.exp(1))
same(contrast(two.flip(0), two, 1.0), expected, "two images, each with the other's prediction")
expected = 6 * math.log(1 + math.exp(-1 / 3))
same(contrast(two, two, 3.0), expected, "two images at a right angle, temperature 3")
tilted = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
similarity = [[0.6, 0.8], [0.0, 1.0]]
expected = -sum(s[i] - math.log(sum(map(math.exp, s))) for i, s in enumerate(similarity))
same(
    contrast(tilted, two, 1.0),
    expected,
    "outputs (3, 4) and (0, 1) for targets (3, 0) and (0, 0.5)",
)
same(
    contrast(two.flip(0), two, 0.005),
    2.0,
    "two images, each with the other's prediction, temperature 0.005",
)
same(contrast(torch.ones(7, 3), torch.ones(7, 3), 0.5), math.log(7), "7 equal images: 2 T log 7")
print("Exercise 1: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A3-1-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
chain, demo = quantized_vit(20)
with torch.no_grad():
    outputs, targets = chain(demo.calibration)[:12], demo.targets[:12]
matrix = F.normalize(outputs, dim=1) @ F.normalize(targets, dim=1).T
own, others = matrix.diagonal().min(), matrix[~torch.eye(12, dtype=torch.bool)].max()
loss = contrast(outputs, targets, 3.0)
figure = new_figure(
    4.6,
    3.6,
    f"Similarity of 12 quantized outputs with 12 float targets: at least {own:.2f} on the "
    f"diagonal, at most {others:.2f} beside it. The loss at temperature 3 is {loss:.2f}.",
)
axes = figure.add_subplot()
shown = axes.imshow(matrix, cmap="cividis", vmin=-1, vmax=1)
figure.colorbar(shown, label="similarity")
axes.set(xlabel="float target of image", ylabel="quantized output of image")
axes.set_title(f"loss {loss:.2f}")
figure


# %% nbgrader={"grade": true, "grade_id": "A3-1-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_contrast(cases=80, seed=31):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        n, classes = (2 + torch.randint(9, (2,), generator=generator)).tolist()
        temperature = float(torch.rand((), generator=generator) * 4 + 0.1)
        outputs, targets = logits(n, classes, 1000 * seed + case)
        total = 0.0
        for i in range(n):
            row = [
                float(outputs[i] @ targets[j] / outputs[i].norm() / targets[j].norm())
                for j in range(n)
            ]
            total -= row[i] / temperature
            total += math.log(sum(math.exp(s / temperature) for s in row))
        said = f"{n} images, {classes} classes, temperature {temperature:.3f}"
        with trying(said):
            found = contrast(outputs.clone(), targets.clone(), temperature)
        same(found, 2 * temperature * total / n, said, 1e-4)


check_contrast()
### END HIDDEN TESTS


# %% nbgrader={"grade": true, "grade_id": "A3-1-hidden-2", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
# More hidden tests: small temperatures, and the gradient.
### BEGIN HIDDEN TESTS
def check_limits(cases=40, seed=32):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        outputs, targets = logits(6, 5, 1000 * seed + case, noise=2.0)
        temperature = float(0.005 + 0.02 * torch.rand((), generator=generator))
        q = F.normalize(outputs.double(), dim=1)
        similarity = q @ F.normalize(targets.double(), dim=1).T / temperature
        expected = -2 * temperature * similarity.log_softmax(1).diagonal().mean()
        said = f"6 images, 5 classes, temperature {temperature:.4f}"
        outputs.requires_grad_()
        with trying(said):
            found = contrast(outputs, targets.clone(), temperature)
        same(found, expected, said, 1e-4)
        assert found.requires_grad, f"{said}: no gradient flows through the loss"
        (mine,) = torch.autograd.grad(found, outputs)
        (reference,) = torch.autograd.grad(eq.info_nce(outputs, targets, temperature), outputs)
        same(mine, reference, f"gradient at {said}", 1e-3)


check_limits()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 2: how many negatives count?
#
# **Difficulty:** medium · **Minutes:** 40 · **Points:** 3 (public checks 1, hidden tests 2)
#
# Image $i$ is pushed away from the predictions of the other images, each with a weight $p_{ij}$: the
# softmax of $s_{ij} / T$ over $j \ne i$. If the weights are equal, all $N - 1$ negatives count; if
# one weight is 1, only that one does. The *effective number* of negatives of an image is
# $\exp\big(-\sum_{j \ne i} p_{ij} \ln p_{ij}\big)$. Return a number, its mean over the images. `outputs` and
# `targets` must not change.
#
# <details><summary>Hint</summary>
#
# Before the softmax, put $-\infty$ on the diagonal: `fill_diagonal_(-math.inf)` on a matrix of
# your own. With $p = 0$ there, $p \ln p$ would be NaN: `torch.special.entr(p)` is $-p \ln p$, and 0
# at 0. First the exponential of each image's entropy, then the mean.
#
# </details>
#
# **Expected** (100 images of the embedded network):
#
# ![Effective number of 99 negatives: 4 at temperature 0.07, 39 at temperature 0.2, 99 at temperature 3.](figures/A3-2.png)


# %% nbgrader={"grade": false, "grade_id": "A3-2", "locked": false, "schema_version": 3, "solution": true, "task": false}
def effective_negatives(outputs, targets, temperature):
    """The effective number of negatives of (images, classes) logits, mean over images."""
    ### BEGIN SOLUTION
    similarity = F.normalize(outputs, dim=1) @ F.normalize(targets, dim=1).T / temperature
    weights = similarity.fill_diagonal_(-math.inf).softmax(1)
    return float(torch.special.entr(weights).sum(1).exp().mean())
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A3-2-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
two = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
same(effective_negatives(torch.ones(5, 3), torch.ones(5, 3), 1.0), 4.0, "five equal images")
same(effective_negatives(two, two, 1.0), 1.0, "two images: there is one negative")
outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
targets = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])


def two_ways(a, b, temperature):
    """The effective number of two weights from similarities a and b."""
    p = 1 / (1 + math.exp((b - a) / temperature))
    return math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p))


for t in (1.0, 0.3):
    each = [two_ways(0.6, 0.0, t), two_ways(0.0, -1.0, t), two_ways(0.0, -0.8, t)]
    same(effective_negatives(outputs, targets, t), sum(each) / 3, f"three images, temperature {t}")
outputs, targets = logits(50, 20, 0)
cold, hot = (effective_negatives(outputs, targets, t) for t in (0.01, 100.0))
assert cold < 3, f"at temperature 0.01 few of 49 negatives count, not {cold:.1f}"
assert 48.99 < hot <= 49.001, f"at temperature 100 all 49 negatives count, not {hot:.2f}"
print("Exercise 2: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A3-2-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
chain, demo = quantized_vit(100)
with torch.no_grad():
    outputs, targets = chain(demo.calibration), demo.targets
temperatures = torch.logspace(-2, 1, 31).tolist()
numbers = [effective_negatives(outputs, targets, t) for t in temperatures]
at = {t: effective_negatives(outputs, targets, t) for t in (0.07, 0.2, 3.0)}
said = ", ".join(f"{number:.0f} at temperature {t:g}" for t, number in at.items())
figure = new_figure(6.4, 2.8, f"Effective number of 99 negatives: {said}.")
axes = figure.add_subplot()
axes.plot(temperatures, numbers, color=PETROFF[0])
axes.plot(list(at), list(at.values()), "s", color=PETROFF[1])
axes.set(xscale="log", xlabel="temperature", ylabel="effective negatives", ylim=(0, 102))
figure


# %% nbgrader={"grade": true, "grade_id": "A3-2-hidden", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_negatives(cases=80, seed=33):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        n, classes = (2 + torch.randint(12, (2,), generator=generator)).tolist()
        temperature = float(10 ** (3 * torch.rand((), generator=generator) - 2))
        outputs, targets = logits(n, classes, 1000 * seed + case, noise=1.5)
        kept = outputs.clone(), targets.clone()
        numbers = []
        for i in range(n):
            row = torch.stack(
                [F.cosine_similarity(outputs[i], targets[j], dim=0) for j in range(n) if j != i]
            )
            p = (row.double() / temperature).softmax(0)
            numbers.append(float(torch.special.entr(p).sum().exp()))
        expected = sum(numbers) / n
        said = f"{n} images, {classes} classes, temperature {temperature:.3f}"
        with trying(said):
            found = effective_negatives(outputs, targets, temperature)
        same(found, expected, said, 1e-3)
        same(outputs, kept[0], "the outputs, which must not change")
        same(targets, kept[1], "the targets, which must not change")


check_negatives()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 3: batches
#
# **Difficulty:** easy · **Minutes:** 30 · **Points:** 2 (public checks 1, hidden tests 1)
#
# The negatives of an image are the other images of its batch, so the batches belong to the loss.
# Split `outputs` and `targets` alike, in the given order, into batches of `batch` images; the last one may
# be smaller. A last batch of a single image would have no negatives, so it joins the batch before it.
# Return a number: the mean of `loss(outputs, targets)` over the *batches* (not weighted by their sizes; this
# is how `BlockObjective` does it). There are at least two images, and `batch` is at least 2; `loss` returns
# a tensor of shape `()`.
#
# <details><summary>Hint</summary>
#
# `x.split(batch)` cuts along the first axis. If the last part has length 1, join it with the one
# before by `torch.cat(parts[-2:])`.
#
# </details>
#
# **Expected** (the loss of 100 images in batches of 2 to 100; dashed: $2T \log N$):
#
# ![InfoNCE at temperature 3 of 100 images: 3.3 for batches of 2, 8.3 for batches of 5, 12.2 for batches of 10, 16.3 for batches of 20, 21.7 for batches of 50, 25.9 for batches of 100.](figures/A3-3.png)


# %% nbgrader={"grade": false, "grade_id": "A3-3", "locked": false, "schema_version": 3, "solution": true, "task": false}
def in_batches(loss, outputs, targets, batch):
    """The mean of loss(outputs, targets) over batches of (images, classes) logits, a number."""
    ### BEGIN SOLUTION
    losses = []
    start = 0
    while start < len(outputs):
        stop = start + batch
        if len(outputs) - stop <= 1:
            stop = len(outputs)
        losses.append(float(loss(outputs[start:stop], targets[start:stop])))
        start = stop
    return sum(losses) / len(losses)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A3-3-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(in_batches, "objective", "BlockObjective")


def cuts(n, batch):
    """The batches that the loss sees, as lists of row numbers, and the mean that comes back."""
    seen = []

    def loss(outputs, targets):
        same(targets, outputs + 0.5, "targets must be cut exactly as outputs are")
        seen.append(outputs[:, 0].int().tolist())
        return torch.tensor(float(len(outputs)) ** 2)

    rows = torch.arange(float(n))[:, None].repeat(1, 3)
    return seen, in_batches(loss, rows, rows + 0.5, batch)


for n, batch, expected in (
    (6, 3, [[0, 1, 2], [3, 4, 5]]),
    (5, 3, [[0, 1, 2], [3, 4]]),
    (7, 3, [[0, 1, 2], [3, 4, 5, 6]]),
    (4, 10, [[0, 1, 2, 3]]),
    (3, 2, [[0, 1, 2]]),
    (2, 2, [[0, 1]]),
):
    seen, mean = cuts(n, batch)
    assert seen == expected, f"{n} images, batch {batch}: batches {seen} instead of {expected}"
    mean_of = sum(len(rows) ** 2 for rows in expected) / len(expected)
    same(mean, mean_of, f"{n} images, batch {batch}: mean over the batches")
print("Exercise 3: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A3-3-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
chain, demo = quantized_vit(100)
with torch.no_grad():
    outputs, targets = chain(demo.calibration), demo.targets
sizes = [2, 5, 10, 20, 50, 100]
losses = [in_batches(eq.info_nce, outputs, targets, size) for size in sizes]
said = ", ".join(f"{loss:.1f} for batches of {size}" for size, loss in zip(sizes, losses))
figure = new_figure(6.4, 2.8, f"InfoNCE at temperature 3 of 100 images: {said}.")
axes = figure.add_subplot()
axes.plot(sizes, losses, "s", color=PETROFF[0], label="loss")
axes.plot(sizes, [6 * math.log(size) for size in sizes], "--", color="0.4", label="2 T log N")
axes.set(xscale="log", xlabel="images in a batch, N", ylabel="loss")
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.minorticks_off()
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A3-3-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_batches(cases=120, seed=34):
    from evolq_lite.objective import batches

    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        n, batch = (2 + torch.randint(20, (2,), generator=generator)).tolist()
        outputs, targets = logits(n, 4, 1000 * seed + case)
        pairs = list(zip(batches(outputs, batch), batches(targets, batch)))
        expected = sum(float(eq.info_nce(q, k, 0.3)) for q, k in pairs) / len(pairs)
        loss = partial(eq.info_nce, temperature=0.3)
        with trying(f"{n} images, batch {batch}"):
            found = in_batches(loss, outputs.clone(), targets.clone(), batch)
        same(found, expected, f"{n} images, batch {batch}")


check_batches()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 4: what is left at a high temperature
#
# **Difficulty:** hard · **Minutes:** 40 · **Points:** 3 (public checks 1, hidden tests 2)
#
# Return a number: what is left of the loss of exercise 1 when $T$ is large. Then all $s_{ij} / T$ are small, and
# $\log \frac{1}{N} \sum_j \exp(s_{ij} / T) \approx \frac{1}{N} \sum_j s_{ij} / T$. Put that into
# the loss and keep what does not vanish for $T \to \infty$: a constant that depends on $T$ and $N$ only, plus
# a loss *without* temperature, in which each image's own similarity is compared with the mean similarity
# over all $N$ images (its own included). This is a cosine loss with centered targets; plain cosine,
# $1 - \frac{1}{N} \sum_i s_{ii}$, lacks the mean.
#
# <details><summary>Hint</summary>
#
# $L = \frac{2T}{N} \sum_i \big( \log \sum_j \exp(s_{ij} / T) - s_{ii} / T \big)$, and
# $\log \sum_j \exp(\ldots) = \log N + \log \frac{1}{N} \sum_j \exp(\ldots)$. The factor $2T$ meets
# a $1/T$ in all terms but one.
#
# </details>
#
# **Expected** (how alike infoNCE, its limit and plain cosine rank 20 candidates of block 5):
#
# ![Rank correlation of infoNCE, 20 candidates, with the limit: 0.66 at 0.07, 1.00 at 3; plain cosine: 0.53 at 0.07, 0.88 at 3.](figures/A3-4.png)


# %% nbgrader={"grade": false, "grade_id": "A3-4", "locked": false, "schema_version": 3, "solution": true, "task": false}
def high_temperature(outputs, targets, temperature):
    """What infoNCE comes to for a high temperature, a number."""
    ### BEGIN SOLUTION
    similarity = F.normalize(outputs, dim=1) @ F.normalize(targets, dim=1).T
    centred = similarity.mean() - similarity.diagonal().mean()
    return float(2 * temperature * math.log(len(outputs)) + 2 * centred)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A3-4-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
own_work(high_temperature, "info_nce", "contrast")
two = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
same(high_temperature(two, two, 1.0), 2 * math.log(2) - 1, "two images at a right angle, T = 1")
same(high_temperature(two, two, 5.0), 10 * math.log(2) - 1, "two images at a right angle, T = 5")
same(high_temperature(two.flip(0), two, 1.0), 2 * math.log(2) + 1, "the same, exchanged, T = 1")
same(high_temperature(9 * two, two, 1.0), 2 * math.log(2) - 1, "outputs 9 times as long, T = 1")
three = torch.eye(3)
same(high_temperature(three, three, 2.0), 4 * math.log(3) - 4 / 3, "three images, T = 2")
same(high_temperature(-three, three, 2.0), 4 * math.log(3) + 4 / 3, "three images, opposite, T = 2")
print("Exercise 4: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A3-4-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
chain, demo = quantized_vit(100)
start = eq.genome_of(chain.model, ["blocks.5"]).read(chain.model)
generator = torch.Generator().manual_seed(0)
candidates = (start + 1e-3 * (2 * torch.rand(20, len(start), generator=generator) - 1)).abs()


def order(loss):
    """The ranks of 20 candidates near the start, by one loss."""
    values = eq.BlockObjective(chain, "blocks.5", demo.calibration, demo.targets, loss)(candidates)
    return values.argsort().argsort().double()


def alike(a, b):
    """Rank correlation."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


temperatures = [0.03, 0.07, 0.2, 0.5, 1.0, 3.0, 10.0]
orders = [order(partial(eq.info_nce, temperature=t)) for t in temperatures]
limit = order(lambda outputs, targets: torch.tensor(high_temperature(outputs, targets, 3.0)))
plain = order(eq.cosine)
curves = {"the limit": [alike(o, limit) for o in orders]}
curves["plain cosine"] = [alike(o, plain) for o in orders]
said = "; ".join(f"{n}: {c[1]:.2f} at 0.07, {c[5]:.2f} at 3" for n, c in curves.items())
figure = new_figure(6.4, 2.8, f"Rank correlation of infoNCE, 20 candidates, with {said}.")
axes = figure.add_subplot()
for i, (name, curve) in enumerate(curves.items()):
    axes.plot(temperatures, curve, "os"[i] + "-", color=PETROFF[i], label=name)
axes.set(xscale="log", xlabel="temperature", ylabel="rank correlation")
axes.legend()
figure


# %% nbgrader={"grade": true, "grade_id": "A3-4-hidden", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_high(cases=80, seed=35):
    generator = torch.Generator().manual_seed(seed)
    for case in range(cases):
        n, classes = (2 + torch.randint(20, (2,), generator=generator)).tolist()
        temperature = float(10 ** (3 * torch.rand((), generator=generator) - 1))
        outputs, targets = logits(n, classes, 1000 * seed + case)
        q, k = F.normalize(outputs.double(), dim=1), F.normalize(targets.double(), dim=1)
        s = q @ k.T
        own = sum(float(s[i, i] - s[i].mean()) for i in range(n)) / n
        expected = 2 * temperature * math.log(n) - 2 * own
        said = f"{n} images, {classes} classes, temperature {temperature:.2f}"
        with trying(said):
            found = high_temperature(outputs.clone(), targets.clone(), temperature)
        same(found, expected, said, 1e-4)


check_high()
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise 5: an honest choice
#
# **Difficulty:** easy · **Minutes:** 20 · **Points:** 2 (public checks 1, hidden tests 1)
#
# Which temperature leads the search best? The loss itself cannot say: its value depends on $T$. So
# for each temperature a search gives a vector of scales, and another measure, on images that the
# search has not seen, judges it. Return a tuple `(temperature, error)`: the temperature whose vector has
# the lowest `held_out` value (the first among equals), and the `test_error` of that vector.
#
# - `search(temperature)` returns a vector. It is slow: call it once for each temperature, in the order
#   in which they are given (they need not be sorted).
# - `held_out(vector)` returns a number, lower is better.
# - `test_error(vector)` returns a number. Test data must not take part in a choice: call it once,
#   when all is chosen.
#
# <details><summary>Hint</summary>
#
# Collect first, choose afterwards. Does `min` compare vectors in your tuples?
#
# </details>
#
# **Expected** (search of block 5, 20 candidates, four temperatures, one seed; "unseen" images stand in
# for test data. The differences are about one standard error, and without a search the divergence
# is lower still: the procedure is honest, this one run settles nothing):
#
# ![Held-out divergence by temperature: 0.1712 for 0.07, 0.1734 for 0.2, 0.1681 for 1, 0.1717 for 3. Without a search: 0.1703. Chosen: 1, with 0.1956 on unseen images.](figures/A3-5.png)


# %% nbgrader={"grade": false, "grade_id": "A3-5", "locked": false, "schema_version": 3, "solution": true, "task": false}
def choose_temperature(temperatures, search, held_out, test_error):
    """The temperature whose search does best on held-out data, and the test error of its vector."""
    ### BEGIN SOLUTION
    rows = []
    for temperature in temperatures:
        vector = search(temperature)
        rows.append((held_out(vector), temperature, vector))
    _, temperature, vector = min(rows, key=lambda row: row[0])
    return temperature, test_error(vector)
    ### END SOLUTION


# %% nbgrader={"grade": true, "grade_id": "A3-5-check", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
def watched(temperatures, held_out_values, test_values):
    """What your choice returns for vectors with these values; fails if test data is misused."""
    searched, judged, tested = [], [], []

    def search(temperature):
        searched.append(temperature)
        return torch.full((3,), float(temperatures.index(temperature)))

    def held_out(vector):
        assert not tested, "test_error was called before the choice was made"
        judged.append(int(vector[0]))
        return held_out_values[judged[-1]]

    def test_error(vector):
        tested.append(int(vector[0]))
        return test_values[tested[-1]]

    answer = choose_temperature(temperatures, search, held_out, test_error)
    assert isinstance(answer, tuple) and len(answer) == 2, "return a tuple (temperature, error)"
    assert searched == list(temperatures), f"searched with {searched}; once each is enough"
    calls = f"test_error was called {len(tested)} times"
    assert len(tested) == 1, f"{calls}: test data is read once, after the choice"
    return answer


for temperatures, held_out_values, test_values, expected in (
    ([0.07, 0.2, 3.0], [0.5, 0.2, 0.4], [0.3, 0.9, 0.1], (0.2, 0.9)),
    ([0.07, 0.2, 3.0], [0.1, 0.2, 0.4], [0.3, 0.2, 0.1], (0.07, 0.3)),
    ([0.07, 0.2, 3.0], [0.4, 0.3, 0.3], [0.3, 0.2, 0.1], (0.2, 0.2)),
    ([3.0, 0.07, 0.2], [0.3, 0.3, 0.5], [0.3, 0.2, 0.1], (3.0, 0.3)),
):
    answer = watched(temperatures, held_out_values, test_values)
    said = f"temperatures {temperatures} with held-out values {held_out_values}"
    same(answer[0], expected[0], f"{said}: the temperature")
    same(answer[1], expected[1], f"{said}: the test error of the chosen vector")
print("Exercise 5: the public checks pass.")

# %% nbgrader={"grade": false, "grade_id": "A3-5-picture", "locked": true, "schema_version": 3, "solution": false, "task": false}
chain, demo = quantized_vit(100)
start = eq.genome_of(chain.model, ["blocks.5"]).read(chain.model)
more = eq.load_demo("vit", 500)  # the first 100 are those that calibrated the network
parts = {
    "held out": (more.calibration[100:300], more.targets[100:300]),
    "unseen": (more.calibration[300:], more.targets[300:]),
}


def by_temperature(temperature):
    """The best of 20 candidates at one temperature."""
    loss = partial(eq.info_nce, temperature=temperature)
    objective = eq.BlockObjective(chain, "blocks.5", demo.calibration, demo.targets, loss)
    search = eq.EvolQ(start, float(objective(start[None])[0]), step=1e-3, seed=0)
    return eq.minimize(objective, search, 20)[0]


def divergence(part):
    """KL divergence from the float network on one of the parts, for a vector of scales."""
    objective = eq.BlockObjective(chain, "blocks.5", *parts[part], eq.kl)
    return lambda vector: float(objective(vector[None])[0])


judged = {}


def noted(vector):
    """The held-out divergence, kept for the picture."""
    judged[len(judged)] = divergence("held out")(vector)
    return judged[len(judged) - 1]


temperatures = [0.07, 0.2, 1.0, 3.0]
chosen, error = choose_temperature(temperatures, by_temperature, noted, divergence("unseen"))
said = ", ".join(f"{value:.4f} for {t:g}" for t, value in zip(temperatures, judged.values()))
without = divergence("held out")(start)
figure = new_figure(
    6.4,
    2.6,
    f"Held-out divergence by temperature: {said}. Without a search: {without:.4f}. Chosen: "
    f"{chosen:g}, with {error:.4f} on unseen images.",
)
axes = figure.add_subplot()
for i, (t, value) in enumerate(zip(temperatures, judged.values())):
    axes.plot(i, value, "s", color=PETROFF[0], fillstyle="full" if t == chosen else "none")
axes.axhline(without, color="0.4", ls="--", label=f"no search: {without:.4f}")
axes.legend()
axes.set_xticks(range(4), [f"{t:g}" for t in temperatures])
axes.set(xlabel="temperature of the search (filled: chosen)", ylabel="held-out KL")
figure


# %% nbgrader={"grade": true, "grade_id": "A3-5-hidden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
# Hidden tests run here when the assignment is graded.
### BEGIN HIDDEN TESTS
def check_choice(cases=60, seed=36):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        n = int(torch.randint(1, 9, (), generator=generator))
        temperatures = (0.1 * (1 + torch.randperm(n, generator=generator))).tolist()
        values = torch.randint(5, (2, n), generator=generator).tolist()
        best = min(range(n), key=lambda i: values[0][i])
        said = f"{n} temperatures, held-out values {values[0]}"
        with trying(said):
            answer = watched(temperatures, *values)
        same(answer[0], temperatures[best], f"{said}: the temperature")
        same(answer[1], values[1][best], f"{said}: the test error")


check_choice()
### END HIDDEN TESTS

# %% [markdown]
# ## Question 1
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences; use your pictures of exercises 2 and 4. The paper's code takes $T = 3$. How many of the 99
# negatives count there, and which simpler loss would rank candidates nearly alike? What does plain cosine lack?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A3-6", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: nearly all 99 count, with nearly equal weights, so the loss is, up to a constant, a cosine loss with
#   centered targets (own similarity against the mean one).
# - 1 point: plain cosine lacks the mean similarity to all targets.
#
# Accept: "About 99. High temperature = own similarity minus average similarity; plain cosine has no average." (2)
#
# Reject: "All 99 count because of the softmax." (1 at most, if the simpler loss is right)
#
# Reject: "Plain cosine lacks the temperature." (0 for that part)

# %% [markdown]
# ## Question 2
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. All images of a batch show the same character. What does that change for the negatives, and
# what does it mean for how batches should be drawn?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A3-7", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: the negatives then have nearly the same target, so an output is pushed away from predictions that
#   it should have.
# - 1 point: batches should mix classes, drawn at random (and kept fixed, so that the fitness is deterministic).
#
# Accept: "They are false negatives; shuffle the images over classes before you cut batches." (2)
#
# Reject: "The loss is lower because the images are similar." (0: it is higher, about 2 T log N)
#
# Reject: "Use larger batches." (0; 1 if because they then hold other classes)

# %% [markdown]
# ## Question 3
#
# **Minutes:** 20 · **Points:** 2, marked by hand
#
# Two or three sentences. In exercise 4 you saw that at $T = 3$ infoNCE ranks candidates almost as its limit does.
# Does this show that infoNCE is useless? Which experiment would tell, and on which images?

# %% [markdown] nbgrader={"grade": true, "grade_id": "A3-8", "locked": false, "points": 2, "schema_version": 3, "solution": true, "task": false}
# - 1 point: no. At this temperature the contrast adds little; at about 0.07 to 0.2 the ranking differs, and
#   different is not yet better or worse.
# - 1 point: search with both losses at equal cost, several seeds, paired, and judge both by another measure
#   (accuracy or divergence) on images that neither search has seen.
#
# Accept: "No; run the search with T = 0.07, T = 3 and centered cosine on the same seeds and compare held-out
# accuracy with intervals." (2)
#
# Reject: "Yes, a simpler loss does the same." (0)
#
# Reject: "No, since the paper got good results with it." (0)
