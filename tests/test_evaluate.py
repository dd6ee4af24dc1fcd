"""Accuracy, intervals and the paired tests."""

import math

import pytest
import torch
from scipy.stats import binom, ttest_rel
from torch import nn

from evolq_lite.evaluate import (
    Accuracy,
    Comparison,
    LossChange,
    SeedComparison,
    accuracy,
    compare,
    pack_values,
    predict,
    score,
    unpack_values,
)


def test_accuracy_and_interval():
    result = accuracy(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 0, 0]))
    assert (result.correct, result.images, result.top1) == (3, 4, 0.75)
    low, high = Accuracy(50, 100).interval
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson (1927), textbook value
    assert str(Accuracy(50, 100)) == "50.00 % [40.38, 59.62]"


def test_comparison_by_hand():
    labels = torch.zeros(10, dtype=torch.long)
    before = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    after = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
    result = compare(before, after, labels)
    assert (result.gained, result.lost, result.images) == (4, 1, 10)
    assert result.gain == pytest.approx(0.3)
    exact = 2 * sum(binom.pmf(k, 5, 0.5) for k in (4, 5))
    assert result.p_value == pytest.approx(exact)
    assert "no significant" in result.verdict


def test_verdicts():
    assert "better" in Comparison(60, 20, 1000).verdict
    assert "worse" in Comparison(20, 60, 1000).verdict
    assert Comparison(0, 0, 10).p_value == 1.0
    low, high = Comparison(60, 20, 1000).interval
    assert low < 0.04 < high and low > 0


def test_interval_covers_the_truth_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        draws = torch.rand(500, generator=generator)
        result = Comparison(int((draws < 0.08).sum()), int((draws > 0.95).sum()), 500)
        inside += result.interval[0] <= 0.03 <= result.interval[1]
    assert 0.92 <= inside / 400 <= 0.98


def test_predict_reads_each_batch_once_for_all_models():
    read = []

    def stream():
        for i in range(3):
            read.append(i)
            yield torch.eye(4)

    seen = []
    found = predict({"a": nn.Identity(), "b": nn.Flatten()}, stream(), seen.append)
    assert read == [0, 1, 2] and seen == [4, 4, 4]
    assert torch.equal(found["a"], torch.arange(4).repeat(3))
    assert torch.equal(found["a"], found["b"])


def test_seeds_are_averaged_before_images_are_counted():
    """Coverage: methods that truly differ by nothing are called different in 5 % of cases."""
    generator, calls = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        # An image is hard or easy for all seeds; seeds flip a few of them.
        easy = torch.rand(1, 300, generator=generator).expand(3, -1)
        was, now = (torch.rand(3, 300, generator=generator) < easy for _ in range(2))
        calls += SeedComparison.of(was, now).p_value < 0.05
    assert 8 <= calls <= 36
    assert not SeedComparison.of(was, was).significant
    change = SeedComparison.of(torch.zeros(3, 50).bool(), torch.ones(3, 50).bool())
    assert change.gain == 1 and change.gains == (1, 1, 1) and change.images == 50
    assert SeedComparison.of(was, was).p_value == 1 and "no significant" in str(
        SeedComparison.of(was, was).verdict
    )


def test_images_of_a_typeface_are_not_counted_as_many():
    """Coverage with images that are alike within groups; without the groups it is far too low."""
    generator, calls, naive = torch.Generator().manual_seed(0), 0, 0
    groups = torch.arange(40).repeat_interleave(10)
    for _ in range(300):
        tilt = torch.rand(2, 40, generator=generator)[:, groups]
        was, now = (torch.rand(1, 400, generator=generator) < t for t in tilt)
        calls += SeedComparison.of(was, now, groups).p_value < 0.05
        naive += SeedComparison.of(was, now).p_value < 0.05
    assert 5 <= calls <= 33 and naive > 60


def test_a_difference_that_depends_on_the_seed_is_not_significant():
    was = torch.zeros(2, 1000).bool()
    now = was.clone()
    now[0, :200] = True
    assert SeedComparison.of(was, now).significant is False  # the second seed gains nothing
    assert SeedComparison.of(now, was).significant is False  # nor does it lose
    now[1, :1] = True
    assert SeedComparison.of(was, now).significant
    was[1, 500:503] = True
    assert SeedComparison.of(was, now).p_value < 1e-9
    assert not SeedComparison.of(was, now).significant


def test_scores_by_hand():
    """Two classes; logits log(p) and log(1 - p) give the probability p to the first."""

    def network(*shares):
        logits = torch.tensor([[math.log(p), math.log(1 - p)] for p in shares])
        return nn.Embedding.from_pretrained(logits)

    images = torch.arange(3)
    models = {"float": network(0.5001, 0.75, 0.2), "other": network(0.5001, 0.25, 0.4)}
    seen = []
    found = score(models, images.split(2), torch.tensor([0, 0, 1]), seen.append)
    assert seen == [2, 1]
    assert found["float"].right.tolist() == [True, True, True]
    assert found["float"].agrees.all() and found["float"].kl.abs().max() < 1e-6
    other = found["other"]
    assert other.right.tolist() == [True, False, True]
    assert other.agrees.tolist() == [True, False, True]
    # KL(0.75 || 0.25) = 0.75 log 3 + 0.25 log(1/3); KL(0.2 || 0.4) = 0.2 log(1/2) + 0.8 log(4/3)
    expected = [0.0, 0.5 * math.log(3), -0.2 * math.log(2) + 0.8 * math.log(4 / 3)]
    assert other.kl.tolist() == pytest.approx(expected, abs=1e-5)
    expected = [-math.log(0.5001), -math.log(0.25), -math.log(0.6)]
    assert other.cross_entropy.tolist() == pytest.approx(expected, abs=1e-5)


def test_change_of_a_loss_is_the_paired_test():
    generator = torch.Generator().manual_seed(0)
    was = torch.rand(2000, generator=generator)
    now = was - 0.01 + 0.1 * torch.randn(2000, generator=generator)
    change = LossChange.of(was, now)
    known = ttest_rel(now.double(), was.double())
    assert change.p_value == pytest.approx(known.pvalue, rel=0.3)
    assert change.interval == pytest.approx(known.confidence_interval(0.95), abs=1e-5)
    assert change.change == pytest.approx(change.now - change.was)
    assert change.better and "better" in change.verdict
    assert "worse" in LossChange.of(now, was).verdict
    assert "no significant" in LossChange.of(was, was).verdict
    # Ten copies of each image are no more evidence, if it is said that they are copies.
    copies, groups = torch.arange(2000).repeat_interleave(10), torch.arange(2000)
    many = LossChange.of(was[copies], now[copies], groups[copies])
    assert many.error == pytest.approx(change.error, rel=1e-3)
    assert LossChange.of(was[copies], now[copies]).error < 0.4 * change.error


def test_one_image_says_nothing_of_others():
    change = LossChange.of(torch.tensor([1.0]), torch.tensor([0.5]))
    assert change.change == -0.5 and change.p_value == 1 and not change.significant


def test_seeds_that_differ_in_sign_are_no_significant_change():
    was = torch.ones(2, 1000)
    now = was - torch.tensor([[0.2], [-0.001]]) * torch.linspace(0.5, 1.5, 1000)
    assert LossChange.of(was, now).p_value < 1e-9
    assert not LossChange.of(was, now).significant
    now[1] = was[1]  # a seed that changes nothing
    for before, after in ((was, now), (now, was)):
        assert LossChange.of(before, after).p_value < 1e-9
        assert not LossChange.of(before, after).significant


def test_losses_are_kept_to_three_digits():
    losses = torch.tensor([0.0, 1.2345e-3, 0.5, 17.25])
    assert torch.allclose(unpack_values(pack_values(losses)).float(), losses, rtol=1e-3)
