"""How far a quantized network's predictions are from its teacher's: the lecture of lesson 4.

Every function takes `outputs` (logits of the quantized network) and `targets` (logits of the float
network on the same images), both of shape (images, classes), and returns one number; lower is
better. No labels are used.

Evol-Q's choice is infoNCE: normalize both, compare every output with every target of the batch,

    similarity[i, j] = <outputs[i], targets[j]> / T
    loss = 2 T * mean_i( -log softmax_j(similarity[i])[i] )

so an output must be closer to the prediction for *its own* image than to those for the other images
of the batch, the negatives. With a large temperature T the softmax is nearly uniform and the loss
is, to first order, a centered cosine distance; small T makes the hardest negatives count.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Logits = Float[Tensor, "images classes"]
Fitness = Callable[[Tensor, Tensor], Tensor]


def info_nce(outputs: Logits, targets: Logits, temperature: float = 3.0) -> Float[Tensor, ""]:
    """InfoNCE in the form of MoCo v3 (arXiv 2104.02057), times 2 T; Evol-Q's code uses T = 3."""
    outputs, targets = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
    # (images, images): row i holds output i against the targets of all images of the batch
    similarity = outputs @ targets.T / temperature
    # on the diagonal, the positive: the target of the same image
    log_probability = similarity.log_softmax(1).diagonal()
    return -2 * temperature * log_probability.mean()


def mse(outputs: Logits, targets: Logits) -> Float[Tensor, ""]:
    """Mean squared difference of the logits."""
    return F.mse_loss(outputs, targets)


def cosine(outputs: Logits, targets: Logits) -> Float[Tensor, ""]:
    """One minus the cosine of the angle between output and target, averaged over images."""
    return 1 - F.cosine_similarity(outputs, targets, dim=1).mean()


def kl(outputs: Logits, targets: Logits) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of the predicted distributions, KL(target || output), in nats."""
    return F.kl_div(
        outputs.log_softmax(1), targets.log_softmax(1), reduction="batchmean", log_target=True
    )


def fisher(outputs: Logits, targets: Logits) -> Float[Tensor, ""]:
    """Squared logit difference weighted by the target's Fisher information: KL to second order.

    With p = softmax(target) and d = output - target: mean of (sum p d^2 - (sum p d)^2) / 2.
    """
    p = targets.softmax(1)  # (images, classes)
    # the variance of the difference under p: what is added to all logits alike changes nothing
    difference = outputs - targets
    return ((p * difference**2).sum(1) - (p * difference).sum(1) ** 2).mean() / 2


FITNESS: dict[str, Fitness] = {
    "info_nce": info_nce,
    "mse": mse,
    "cosine": cosine,
    "kl": kl,
    "fisher": fisher,
}


def fitness_of(name: str, temperature: float = 3.0) -> Fitness:
    """A fitness by name, the temperature bound where it has one; ValueError lists known names."""
    if name not in FITNESS:
        raise ValueError(f"unknown fitness {name!r}; known: {', '.join(FITNESS)}")
    return partial(info_nce, temperature=temperature) if name == "info_nce" else FITNESS[name]
