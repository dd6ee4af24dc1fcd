# %% [markdown]
# # 9. Ship it
#
# **After this lesson you can** turn a run into a file that other programs run; say what
# QuantizeLinear and DequantizeLinear mean, and what a runtime makes of them; check that a file
# holds the same network; compare its size and speed with those of the float network; name the
# mistake that most often ruins a good file.
#
# **Prerequisites:** lessons 2 and 6: the points of a quantized network, and a run.
#
# **Time:** 25 minutes to read, 3 minutes to run.
#
# **Works offline:** yes, once the extra is installed. This lesson alone needs it:
# `pip install 'evolq_lite[export]'` (`make` has installed it already).
#
# **Read alongside:** `evolq_lite/export.py`, with `deployed.py`.

# %% tags=["hide-input"]
import evolq_lite as eq  # isort: skip  (before torch, whose threads it keeps from spinning)

from pathlib import Path
from time import perf_counter

import onnx
import torch

from evolq_lite.cli import main
from evolq_lite.config import KINDS
from evolq_lite.data import CHARACTERS
from evolq_lite.figures import operators_figure, tiles
from evolq_lite.panels import GalleryPanel, Quiz

torch.set_num_threads(2)

# %% [markdown]
# ## From a run to a file
#
# So far our quantized network runs nowhere but here. ONNX is a format for networks that many
# programs read: a list of operators, the numbers that they need, and nothing of Python. The first
# command makes a short run, as in lesson 6, from weights rounded by GPTQ; the second writes the
# network that it has come to.

# %%
run = "runs/lesson9"
status = main(["demo", "--out", run, "--replace", "--passes", "1", "--rounding", "gptq"])

# %%
file = Path("runs/lesson9.onnx")
status = main(["export", run, "--out", str(file), "--replace"])

# %% [markdown]
# The file also says what a receiver must know besides the arithmetic:

# %%
network = eq.Deployed(file)
for key, value in network.facts.items():
    print(f"{key:14} {str(value)[:76]}")

# %% [markdown]
# ## What stands in it
#
# ONNX knows no fake quantization. It has two operators:
#
# | operator | computes |
# |---|---|
# | QuantizeLinear (Q) | `clamp(round(x / scale) + zero_point, 0, 255)`, float to uint8 |
# | DequantizeLinear (DQ) | `(q - zero_point) * scale`, back to float |
#
# A quantization point becomes a Q and a DQ, a weight becomes its integers behind a DQ. Here is the
# attention half of a block, in the order of the file.

# %%
graph = onnx.load(file).graph
KIND = {
    "QuantizeLinear": ("Q", "quantize"),
    "DequantizeLinear": ("DQ", "dequantize"),
    "MatMul": ("MatMul", "product"),
}
block = [node for node in graph.node if node.name.startswith(("blocks.0.attn", "blocks.0.sum1"))]
operators_figure(
    [KIND.get(node.op_type, (node.op_type, "other")) for node in block],
    "Attention of block 0",
)

# %% [markdown]
# Read as it stands, this is float arithmetic on rounded numbers, just what the plain layers of
# lesson 2 compute. A runtime sees more in it: two DQs in front of a MatMul say that both factors
# are integers times a scale, so it multiplies the integers and scales the sum. ONNX Runtime tells
# us what it has made of the file:

# %%
import onnxruntime

options = onnxruntime.SessionOptions()
options.optimized_model_filepath = "runs/lesson9-optimized.onnx"
options.log_severity_level = 3
onnxruntime.InferenceSession(str(file), options)
inside = [node.op_type for node in onnx.load("runs/lesson9-optimized.onnx").graph.node]
for name in ("MatMul", "MatMulIntegerToFloat", "QLinearMatMul", "Softmax", "Conv"):
    print(f"{name:22} in the file {sum(n.op_type == name for n in graph.node):3}   "
          f"in the runtime {inside.count(name):3}")  # fmt: skip

# %% [markdown]
# Hardly a float product is left: the two new operators multiply integers. That they do, and that
# they compute the same, depends on how the file is written:
#
# - A *scale per channel* at an activation's Q and DQ is slower than float in one runtime and wrong
#   in another. We write `x / f`, Q and DQ with one scale, `x f`; if the factors f are powers of
#   two, no digit changes.
# - A *weight as torch keeps it* needs a transposition, which hides the product. We store it
#   transposed.
# - *Q and DQ right before softmax* are replaced, with softmax, by a table, and many of the next
#   codes change. So the scores are multiplied by 1 / sqrt(d) behind DQ and not before Q.
# - *Pixels divided by a scale* lie on ties: they had 8 bits before. Every runtime rounds them in a
#   way of its own, so this point is written out in the order of lesson 1.
# - *The head's bias, added to a table*, makes the runtime compute a Gemm in float. Subtracted, it
#   leaves the integer product alone.
# - *Values as uint8* on the right of a product change more codes in OpenVINO. They are int8.
# - *Weights of 4 bits behind a DQ* become a kernel that quantizes activations once more. A Cast to
#   int8, done once when the file is loaded, keeps the arithmetic.
#
# ## Is it the same network?
#
# A person who was sent the file has neither the run nor our code's network, only images. `verify`
# needs no more: the file remembers on which test images the run was right.

# %%
status = main(["verify", str(file)])

# %% [markdown]
# Not every image agrees, and none of the two is wrong. Both compute sums in another order, whose
# last digits differ; a value that lies near a tie then becomes the next integer, and later layers
# multiply that. Block by block, at most a few codes in a thousand differ.
#
# OpenVINO shows how much the order matters. It adds the zero point before it rounds,
# `round(x / s + z)`. On paper that is the same. In float32, a sum near 128 has fewer digits left
# for what decides near a tie: about ten codes in a million change, and through six blocks up to
# four labels in a thousand (`docs/export.md` has the numbers).
#
# ## Size and speed
#
# The same network as float (all points left out), with weights of a byte, and packed, two weights
# in a byte:

# %%
demo = eq.load_demo("vit", calibration=200)
qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=4))
eq.calibrate(qmodel, demo.calibration)
forms = {"float": {"float_points": ",".join(KINDS)}, "int8": {}, "int4": {"weights": "int4"}}
seconds = {}
for name, how in forms.items():
    path = Path(f"runs/lesson9-{name}.onnx")
    eq.export_onnx(qmodel, path, demo.calibration[:2], **how)
    network = eq.Deployed(path)
    found = []
    for _ in range(9):
        began = perf_counter()
        network(demo.calibration)
        found.append(perf_counter() - began)
    seconds[name] = sorted(found)[4]
    print(
        f"{name:6} {path.stat().st_size / 1e6:5.2f} MB   "
        f"{seconds[name] / seconds['float']:.2f} of the float file's time"
    )

# %% [markdown]
# A quarter of the bits does not make a quarter of the file here: in a network this small, biases,
# LayerNorms, position embeddings and the graph itself weigh as much as its weights. The time has
# the same reason. With 48 channels, products are a small part of the work, and Q and DQ are extra;
# [benchmarks](../benchmarks/README.md) has DeiT-Tiny, where products are most of it.
#
# ## The commonest mistake
#
# The file is right, and its user is wrong: that is the usual story when accuracy "drops after
# export". The network was trained on pixels from -1 to 1, that is, with mean 0.5 and deviation 0.5
# taken off. The same file, the same images, prepared in three ways:

# %%
network = eq.Deployed(file)
images, labels = (part[::10] for part in demo.test)
pixels = 0.5 * images + 0.5  # from 0 to 1 again
ways = {
    "mean 0.5, deviation 0.5 (right)": (0.5, 0.5),
    "mean 0, deviation 1 (forgotten)": (0.0, 1.0),
    "ImageNet's mean and deviation": (0.449, 0.226),
}
read = {}
for name, (mean, std) in ways.items():
    read[name] = network((pixels - mean) / std).argmax(1)
    print(f"{name:34} {eq.accuracy(read[name], labels)}")

# %%
wrong = list(read.values())[1]
which = (wrong != labels).nonzero().flatten()[:20]
tiles(
    images[which],
    [f"{CHARACTERS[int(labels[i])]} → {CHARACTERS[int(wrong[i])]}" for i in which],
    10,
    "Twenty characters that the file misreads because nobody subtracted the mean.",
)

# %% [markdown]
# Nothing warns you: the file takes any numbers. So the mean, the deviation and the size are in the
# file (`facts` above), and `Deployed.prepare` is made from them. If you write the receiving
# program, read them from there instead of typing them.
#
# ## Try it
#
# Type a text. It is drawn with characters of a test typeface, which the network has never seen, and
# the exported file reads it in ONNX Runtime.

# %%
GalleryPanel(file)

# %% [markdown]
# **Predict, then try.**
#
# 1. Type `O0oIl1`. Which of them will be confused in most typefaces?
# 2. Press *Mean forgotten*. Will all characters be misread, or some?
# 3. Keep the mean at 0.5. Which does more harm: a deviation of 1, or one of 0.25?
#
# <details><summary>What you should have seen</summary>
#
# 1. O and 0, I, l and 1: their pictures are nearly the same, with or without quantization.
# 2. Nearly all, mostly as W or M: paper is now 0 instead of -1, which to the network is a page full
#    of gray strokes.
# 3. The deviation of 1. It turns paper into -0.5, gray again, and about one test image in ten is
#    read correctly. With 0.25 the contrast doubles, paper is -2, and most characters are still
#    read. Do not count on that: it is luck of this network.
#
# </details>
#
# ## Check yourself
#
# Choose an answer and press *Check*. Where no kernel runs, the answers unfold.

# %% tags=["hide-input"]
Quiz(
    "1. A file has Q and DQ everywhere. Does a runtime multiply integers?",
    {
        "Yes, that is what Q and DQ mean": (
            "No: they mean float arithmetic on rounded numbers. A runtime may replace it."
        ),
        "Only if it recognizes the pattern": (
            "Right. A transposition or a scale per channel between DQ and MatMul can hide it, and "
            "the file is then slower than float."
        ),
        "Never, DQ gives floats": (
            'Taken literally, yes; but runtimes replace "DQ, DQ, MatMul" by an integer product.'
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "2. The file and the network here differ on 3 of 1,000 images. What do you conclude?",
    {
        "The export is wrong": (
            "Not from that. A wrong scale would show in most codes of a block; compare block by "
            "block."
        ),
        "Values near ties were rounded the other way, and later layers amplified that": (
            "Right: sums in another order differ in the last digit, and some values lie on the "
            "edge."
        ),
        "The test images are too few": (
            "The number of images does not matter here: the same images went through both."
        ),
    },
    answer=2,
)

# %% tags=["hide-input"]
Quiz(
    "3. Accuracy is 20 points lower in production than in `verify`. Where do you look first?",
    {
        "At the quantization": "`verify` has run the same file, so it is not that.",
        "At the preprocessing": (
            "Right: mean, deviation, size, crop, color order. Feed one image through both programs "
            "and compare the numbers that enter the network."
        ),
        "At the runtime's version": (
            "That changes a few images in a thousand, not a fifth of them."
        ),
    },
    answer=2,
)

# %% [markdown]
# ## Sources
#
# ONNX, *Operators*: QuantizeLinear and DequantizeLinear. B. Jacob et al., *Quantization and
# Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR 2018, arXiv
# 1712.05877.
