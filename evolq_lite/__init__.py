"""evolq_lite: post-training quantization of vision transformers by evolution (Evol-Q, ICCV 2023).

A quantized model is a float model plus a vector of scales; Evol-Q searches that vector. Read the
modules in this order: numerics, observers, quantizer, layers, convert, landscape, fitness, search,
descent, chain, genome, objective, evolve, racing, evaluate, gptq, rounding, learned, bits, export,
deployed, runs.
"""

from evolq_lite import _openmp, _torchvision  # isort: skip  (before torch, before timm)

from evolq_lite.chain import Chain, chain_of
from evolq_lite.config import PRESETS, QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, describe, quantize, twin
from evolq_lite.data import Demo, load_demo
from evolq_lite.deployed import Deployed
from evolq_lite.evaluate import Accuracy, Comparison, accuracy, compare, predict
from evolq_lite.evolve import Committed, Evaluated, evolve
from evolq_lite.export import export_onnx
from evolq_lite.fast import set_execution
from evolq_lite.fitness import FITNESS, cosine, fisher, info_nce, kl, mse
from evolq_lite.genome import Genome, genome_of
from evolq_lite.numerics import (
    IntRange,
    affine_params,
    fake_quantize,
    log2_fake_quantize,
    round_ste,
)
from evolq_lite.objective import BlockObjective, Objective
from evolq_lite.observers import OBSERVERS
from evolq_lite.rounding import round_weights
from evolq_lite.runs.scales import load_scales, save_scales
from evolq_lite.search import EvolQ, RandomSearch, minimize
from evolq_lite.sensitivity import sensitivity

__version__ = "0.2.0"
