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
# command makes a short run, as in lesson 6, from weights rounded by GPTQ (lesson 8); the second
# writes the resulting network.

# %%
run = "runs/lesson9"
status = main(["demo", "--out", run, "--replace", "--passes", "1", "--rounding", "gptq"])

# %% [markdown]
# The search gained nothing here, as lesson 8 predicts for a start by GPTQ. The file will hold
# GPTQ's work.

# %%
file = Path("runs/lesson9.onnx")
status = main(["export", run, "--out", str(file), "--replace"])

# %% [markdown]
# The file also says what a receiver must know besides the arithmetic:

# %%
network = eq.Deployed(file)
facts = network.facts
for key in ("network", "input_size", "mean", "std", "interpolation", "digest", "weights"):
    print(f"{key:14} {facts[key]}")
print(f"{'classes':14} {' '.join(facts['classes'])}")
how = facts["quantization"]
print(
    f"{'quantization':14} {', '.join(f'{k} {how[k]}' for k in ('weight_bits', 'act_bits'))}, ",
    end="",
)
print(f"rounding {how['rounding']}, and {len(how) - 3} more options")
print(f"{'test':14} which of {facts['test']['images']:,} test images the run has right, as bits")

# %% [markdown]
# ## What is in the file
#
# ONNX has no fake-quantization operator; a file expresses it with two. (The integers that they
# write are *codes*.)
#
# | operator | computes |
# |---|---|
# | QuantizeLinear (Q) | `clamp(round(x / scale) + zero_point, 0, 255)`, float to uint8 |
# | DequantizeLinear (DQ) | `(q - zero_point) * scale`, back to float |
#
# A quantization point becomes a Q and a DQ. A weight is stored as integers (int8, one byte each,
# even if it has 3 bits), followed by a DQ. Here is the attention half of a block, one operator
# after another as the file lists them. The last four, *Mul Q DQ Mul*, are the first form of the
# list below.

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
for name in ("MatMul", "MatMulIntegerToFloat", "QLinearMatMul", "Gemm", "Softmax", "Conv"):
    print(f"{name:22} in the file {sum(n.op_type == name for n in graph.node):3}   "
          f"in the runtime {inside.count(name):3}")  # fmt: skip

# %% [markdown]
# One float product is left, the patch embedding (Conv). The two new operators multiply integers.
# That they do, and that they compute the same, depends on how the file is written:
#
# - *A scale per channel at an activation's Q and DQ* is slower than float in ONNX Runtime and wrong
#   in OpenVINO. We write `x * (1/f)`, Q and DQ with one scale, `x * f`; if the factors f are powers
#   of two, no digit changes.
# - *A weight as torch keeps it* is transposed before the product, which is then not recognized. We
#   store it transposed. (A transposed *activation*, as in q times k, is recognized.)
# - *Q and DQ right before softmax*: ONNX Runtime replaces the three by a lookup table, and many of
#   the next codes change. We quantize the scores first, and multiply by 1/sqrt(d) after their DQ.
# - *Q and DQ for the pixels*: pixels had 8 bits before, 256 values from -1 to 1, and with the scale
#   2/255 each lies exactly between two codes, a tie. `x / s` and `x * (1/s)` differ in the last
#   digit, which decides a tie. We write multiply by 1/s, Round, Clip, multiply by s.
# - *The head's bias, added to a matrix* (images, classes): ONNX Runtime computes a Gemm in float.
#   We subtract its negative instead, and the integer product stays.
# - *The attention values v as uint8* on the right of a product: more codes change in OpenVINO. They
#   are int8.
# - *Packed 4-bit weights and a DQ* become a kernel that quantizes activations once more. We put a
#   Cast to int8 in between, done once when the file is loaded. (For other people's files there are
#   options: `docs/export.md` names them.) Weights of 2 bits are int4 too: int2 is younger than
#   opset 21, the version of ONNX that we write, and needs 25.
# - *Operators of `torch.ao`*, in which torch once wrote quantized networks, will be removed. We
#   write the standard's own Q and DQ.
#
# ## Is it the same network?
#
# A person who was sent the file has neither the run nor our code's network, only images. `verify`
# needs no more: the file remembers on which test images the run was right.

# %%
status = main(["verify", str(file)])

# %% [markdown]
# Not every image agrees, and neither is wrong. They add the same numbers in different orders, so
# the last digits differ; a value that lies near a tie then becomes the next integer, and later
# layers amplify that. (To find a mistake in an export, compare block by block: `docs/export.md`.)
#
# OpenVINO shows how much the order matters. It adds the zero point before it rounds,
# `round(x / s + z)`. On paper that is the same. In float32, a sum near 128 has fewer digits left
# for what decides near a tie: about ten codes in a million change, and through six blocks up to
# four labels in a thousand (`docs/export.md` has the numbers).
#
# ## Size and speed
#
# A network with 4-bit MinMax weights, as float (all points left out), with a byte for each weight,
# and packed, two weights in a byte:

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
# A quarter of the bits does not make a quarter of the file here, nor an eighth an eighth: in a
# network this small, biases, scales, LayerNorms, position embeddings and the list of operators
# weigh as much as its weights. The timings have the same explanation. With 48 channels, products
# are a small part of the work, and Q and DQ are extra, so all three take about the same time
# (differences of a tenth are noise). [Benchmarks](../benchmarks/README.md#exported-files) has
# DeiT-Tiny, where products are most of the work, and the exported file is clearly faster than
# float.
#
# ## The commonest mistake
#
# The file is right, and its user is wrong: that is the usual story when accuracy "drops after
# export". The network was trained on pixels from -1 to 1, that is, after subtracting a mean of 0.5
# and dividing by a deviation of 0.5. The same file, every tenth test image, prepared in five ways:

# %%
network = eq.Deployed(file)
images, labels = (part[::10] for part in demo.test)
pixels = 0.5 * images + 0.5  # from 0 to 1 again
ways = {
    "mean 0.5, deviation 0.5 (right)": (0.5, 0.5),
    "mean 0, deviation 1 (forgotten)": (0.0, 1.0),
    "ImageNet's mean and deviation": (0.449, 0.226),
    "mean 0.5, deviation 1": (0.5, 1.0),
    "mean 0.5, deviation 0.25": (0.5, 0.25),
}
read = {}
for name, (mean, std) in ways.items():
    read[name] = network((pixels - mean) / std).argmax(1)
    print(f"{name:34} {eq.accuracy(read[name], labels)}")

# %%
right, wrong = list(read.values())[:2]
which = ((wrong != labels) & (right == labels)).nonzero().flatten()[:20]
tiles(
    images[which],
    [f"{CHARACTERS[int(labels[i])]} → {CHARACTERS[int(wrong[i])]}" for i in which],
    10,
    "Twenty characters that the file misreads only because nobody normalized them.",
)

# %% [markdown]
# The third row is the dangerous one: with ImageNet's numbers the network still reads, a few points
# worse, and one blames the quantization. Nothing warns you: the file takes any numbers. So the
# mean, the deviation and the size are in the file (`facts` above), and `Deployed.prepare` is made
# from them. If you write the receiving program, read them from there instead of typing them.
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
# 2. Press *Mean forgotten*. As what are most of the characters misread, and why?
# 3. Keep the mean at 0.5. Why does a deviation of 1 do more harm than one of 0.25?
#
# <details><summary>What you should have seen</summary>
#
# 1. O and 0, I, l and 1: their pictures are nearly the same, with or without quantization.
# 2. Mostly as W or M: paper is now 0 instead of -1, which to the network is a page full of gray
#    strokes.
# 3. It turns paper into -0.5, gray again. With 0.25 the contrast doubles, paper is -2, and most
#    characters are still read. Do not count on that: this network happens to tolerate it.
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
            "Right: sums in different orders differ in the last digit, and some values lie near a "
            "tie."
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
