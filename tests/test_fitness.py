"""The fitness functions against written-out loops."""

import math

import pytest
import torch

from evolq_lite.fitness import FITNESS, cosine, fisher, fitness_of, info_nce, kl, mse


def logits(seed: int, n: int = 7, classes: int = 5) -> torch.Tensor:
    return 3 * torch.randn(
        n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def info_nce_by_loop(outputs, targets, temperature):
    """The definition, one image and one comparison at a time."""
    total = 0.0
    for i in range(len(outputs)):
        similarity = []
        for j in range(len(targets)):
            dot = sum(float(a * b) for a, b in zip(outputs[i], targets[j]))
            norms = math.sqrt(
                sum(float(a) ** 2 for a in outputs[i]) * sum(float(b) ** 2 for b in targets[j])
            )
            similarity.append(dot / norms / temperature)
        total += -math.log(math.exp(similarity[i]) / sum(math.exp(s) for s in similarity))
    return 2 * temperature * total / len(outputs)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0, 3.0])
def test_info_nce_equals_a_double_loop(temperature):
    outputs, targets = logits(0), logits(1)
    ours = info_nce(outputs, targets, temperature).item()
    assert ours == pytest.approx(info_nce_by_loop(outputs, targets, temperature), rel=1e-12)


@pytest.mark.parametrize("name", FITNESS)
def test_gradient_equals_finite_differences(name):
    targets = logits(1)
    function = fitness_of(name, temperature=0.5)
    assert torch.autograd.gradcheck(lambda x: function(x, targets), logits(0).requires_grad_())


@pytest.mark.parametrize("name", FITNESS)
def test_the_teacher_itself_is_best_and_noise_is_worse(name):
    targets = logits(1, n=40)
    function = fitness_of(name, temperature=0.5)
    values = [
        function(targets + noise * logits(2, n=40), targets).item()
        for noise in (0.0, 0.1, 0.5, 2.0)
    ]
    assert values == sorted(values)


def test_simple_values():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert mse(a, b).item() == pytest.approx(2.5)
    assert cosine(a, b).item() == pytest.approx(1.0)
    assert kl(a, a).item() == pytest.approx(0.0)


def test_fisher_is_kl_to_second_order():
    targets, noise = logits(1, n=30), logits(2, n=30)
    small = 1e-3 * noise
    assert fisher(targets + small, targets).item() == pytest.approx(
        kl(targets + small, targets).item(), rel=2e-2
    )


def test_unknown_fitness_lists_the_known():
    with pytest.raises(ValueError, match="info_nce, mse, cosine, kl, fisher"):
        fitness_of("infonce")
