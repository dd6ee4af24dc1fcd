"""Train both embedded networks on Typefaces-62: `python data/train_models.py cnn`, then `... vit`.

| | CNN (timm `ResNet`) | ViT (timm `VisionTransformer`) |
|---|---|---|
| optimizer | AdamW | AdamW |
| schedule | one cycle: 10 % warm-up, cosine to zero | the same |
| loss | cross-entropy | half of it, half KL to the CNN's soft labels |
| decay, smoothing | weight decay 0.05, label smoothing 0.05 | none: they flatten the weights |
| augmentation | shift, rotation, shear, size; thicker or thinner strokes | the same |

The CNN comes first because it is the ViT's teacher: a small ViT lacks the CNN's sense of
neighbourhood and learns much faster from soft labels (distillation: Touvron et al., DeiT, 2021).
Every 16th group of training faces is held out to watch progress; the test typefaces are read once,
at the end. An epoch is a checkpoint: start the same command again and it goes on, with the same
random numbers, so that a stopped run ends like one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sums import write_sums

import evolq_lite as eq
from evolq_lite.data import (
    DATA,
    DEMO_MODELS,
    build_demo_model,
    demo_file,
    normalised,
    read_typefaces,
    subset,
)

HERE = Path(__file__).resolve().parent
HELD_OUT_EVERY = 16


@dataclass(frozen=True)
class Recipe:
    """What defines a training run; kept in the weights file."""

    epochs: int
    learning_rate: float
    teacher: str = ""
    batch: int = 256
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    warmup: float = 0.1
    seed: int = 0


RECIPES = {
    "cnn": Recipe(epochs=12, learning_rate=3e-3),
    "vit": Recipe(
        epochs=14,
        learning_rate=2e-3,
        batch=128,
        teacher="cnn",
        weight_decay=0.0,
        label_smoothing=0.0,
    ),
}


def augment(images: Tensor) -> Tensor:
    """Move, turn, shear, resize, re-stroke images (n, 1, 28, 28) in [0, 1], as typefaces differ."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.25
    shear = (torch.rand(n) - 0.5) * 0.4
    size = 1 + (torch.rand(n, 2) - 0.5) * 0.24
    shift = (torch.rand(n, 2) - 0.5) * 4 * 2 / 28
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack(
        [
            torch.stack([cos * size[:, 0], -sin * size[:, 1] + shear, shift[:, 0]], 1),
            torch.stack([sin * size[:, 0], cos * size[:, 1], shift[:, 1]], 1),
        ],
        1,
    )
    images = F.grid_sample(
        images, F.affine_grid(matrix, list(images.shape), False), align_corners=False
    )
    thick = F.max_pool2d(images, 3, 1, 1)
    thin = -F.max_pool2d(-images, 3, 1, 1)
    kind, amount = torch.rand(n, 1, 1, 1), torch.rand(n, 1, 1, 1)
    images = torch.where(kind < 0.25, images + amount * (thick - images), images)
    return torch.where(kind > 0.80, images + 0.6 * amount * (thin - images), images)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """One cycle: the share of the peak learning rate at a step."""
    warm = recipe.warmup * steps
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images (n, 1, 28, 28), normalised, whose largest logit is the label."""
    model.eval()
    hits = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(512), labels.split(512))
    )
    return hits / len(labels)


def train(name: str, recipe: Recipe) -> None:
    """Train one network and write its weights file."""
    faces = read_typefaces("train")
    images, labels = faces.images.float() / 255, faces.labels
    held = faces.groups % HELD_OUT_EVERY == 0
    held_images, held_labels = normalised(images[held]), labels[held]
    images, labels = images[~held], labels[~held]
    torch.manual_seed(recipe.seed)
    model = build_demo_model(name).to(memory_format=torch.channels_last)
    teacher = (
        build_demo_model(recipe.teacher, DATA / demo_file(recipe.teacher)).eval()
        if recipe.teacher
        else None
    )
    optimizer = optimizer_of(model, recipe)
    steps_per_epoch = len(labels) // recipe.batch
    checkpoint = HERE / "checkpoints" / f"{name}.pt"
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise SystemExit(f"{checkpoint} belongs to another recipe; remove it to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    for epoch in range(start, recipe.epochs):
        torch.manual_seed(1000 * recipe.seed + epoch + 1)
        model.train()
        order = torch.randperm(len(labels))[: steps_per_epoch * recipe.batch].view(-1, recipe.batch)
        bar = tqdm(order, desc=f"{name} epoch {epoch + 1}/{recipe.epochs}", mininterval=5)
        for i, batch in enumerate(bar):
            share = rate(recipe, epoch * steps_per_epoch + i, recipe.epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * share
            x, y = normalised(augment(images[batch])), labels[batch]
            logits = model(x)
            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(x).softmax(1)
                loss = 0.5 * loss + 0.5 * F.kl_div(
                    logits.log_softmax(1), soft, reduction="batchmean"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if i % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        print(
            f"{name} epoch {epoch + 1}: held-out top-1 {top1(model, held_images, held_labels):.4f}",
            flush=True,
        )
        checkpoint.parent.mkdir(exist_ok=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
            "recipe": asdict(recipe),
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)
    test = read_typefaces("test")
    score = top1(model, normalised(test.images.float() / 255), test.labels)
    print(f"{name}: top-1 {score:.4f} on {len(test.labels)} images of typefaces never seen")
    metadata = {
        "architecture": json.dumps(DEMO_MODELS[name]),
        "recipe": json.dumps(asdict(recipe)),
        "top1": f"{score:.4f}",
    }
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        DATA / demo_file(name),
        metadata=metadata,
    )
    write_sums()


@torch.inference_mode()
def cost(name: str) -> None:
    """Print what quantization with MinMax costs a trained network on the held-out typefaces."""
    faces = read_typefaces("train")
    held = faces.groups % HELD_OUT_EVERY == 0
    images, labels = normalised(faces.images[held].float() / 255), faces.labels[held]
    pool = faces.images[~held]
    calibration = normalised(pool[subset(len(pool), 500, 0)].float() / 255)
    model = build_demo_model(name, DATA / demo_file(name)).eval()
    print(f"{name}, {len(labels)} images of training typefaces that it was not trained on")
    for bits in ((8, 8), (4, 8), (3, 8), (2, 8), (4, 4), (3, 4)):
        qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=bits[0], act_bits=bits[1]))
        eq.calibrate(qmodel, calibration)
        found = eq.predict({"float": model, "quantized": qmodel}, images.split(200))
        print(f"W{bits[0]}A{bits[1]}: {eq.compare(found['float'], found['quantized'], labels)}")


def main() -> None:
    """Command line: which network, how many threads, train or measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=list(RECIPES), help="cnn first: it teaches the vit")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument(
        "--cost", action="store_true", help="do not train: measure what quantization costs"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cost:
        cost(arguments.name)
    else:
        train(arguments.name, RECIPES[arguments.name])


if __name__ == "__main__":
    main()
