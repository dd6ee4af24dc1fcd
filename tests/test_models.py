"""Quantized networks and chains, for every supported family at toy size."""

import copy
import hashlib
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from conftest import SMALL_REGNET, enliven, toy, toy_images
from timm.layers import Attention
from torch import nn

from evolq_lite import QuantConfig, calibrate, chain_of, describe, load_demo, quantize, twin
from evolq_lite.convert import example_images, pass_floats, points, tell_float_products
from evolq_lite.layers import QuantAttention, QuantBlock, QuantConv2d, QuantLinear
from evolq_lite.networks import unfused


def state_hash(model: nn.Module) -> str:
    """A hash of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def quantized(name: str, **options) -> nn.Module:
    model = quantize(toy(name), QuantConfig(**options))
    calibrate(model, toy_images(name))
    return model


def test_chain_equals_model_bit_for_bit(family):
    x = toy_images(family, 3)
    with torch.no_grad():
        for model in (toy(family), quantized(family)):
            assert torch.equal(chain_of(model)(x), model(x))


def test_suffix_from_any_point_equals_the_whole(family):
    x, chain = toy_images(family, 3), chain_of(quantized(family))
    with torch.no_grad():
        whole, inputs = chain(x), chain.trace(x)
        for i in range(len(chain.segments)):
            assert torch.equal(chain(inputs[i], start=i), whole), chain.names[i]
            assert torch.equal(chain(x, stop=i), inputs[i])
            assert all(map(torch.equal, chain.trace(x, i), inputs[: i + 1])), chain.names[i]
            assert len(chain.trace(x, i)) == i + 1
            rest = chain.trace(inputs[i], start=i)
            assert len(rest) == len(inputs) - i
            assert all(map(torch.equal, rest, inputs[i:])), chain.names[i]


def test_observing_network_equals_the_float_one(family):
    """While quantizers look on, only folding and the order in attention differ from timm."""
    model, x = toy(family), toy_images(family, 3)
    qmodel = quantize(model, QuantConfig())
    with torch.no_grad(), pass_floats(qmodel):
        torch.testing.assert_close(qmodel(x), model(x), rtol=1e-3, atol=1e-4)


def test_quantize_leaves_the_float_model_untouched(family):
    model, x = toy(family), toy_images(family, 3)
    before, kinds = state_hash(model), [type(m) for m in model.modules()]
    with torch.no_grad():
        logits = model(x)
        qmodel = quantize(model, QuantConfig(weight_bits=3, bias_correction=True))
        calibrate(qmodel, x, QuantConfig(bias_correction=True))
        assert torch.equal(model(x), logits)
    assert state_hash(model) == before
    assert [type(m) for m in model.modules()] == kinds
    assert not any("quant" in name for name, _ in model.named_buffers())


def test_weights_are_shared():
    model = toy("vit")
    qmodel = quantize(model, QuantConfig())
    assert qmodel.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight


def test_error_falls_with_bits_and_8_bits_are_close(family):
    model, x = toy(family), toy_images(family, 6)
    with torch.no_grad():
        logits = model(x)
        errors = [
            (
                (quantized(family, weight_bits=b, act_bits=b)(x) - logits).norm() / logits.norm()
            ).item()
            for b in (8, 4, 2)
        ]
    assert errors[0] < errors[1] < errors[2] * 1.2
    assert errors[0] < 0.25


def test_every_layer_and_every_product_is_quantized(family):
    model = quantized(family)
    for module in model.modules():
        assert type(module) not in (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d)
    names = {point.name.rsplit(".", 1)[-1] for point in points(model)}
    assert {"input_quant", "weight_quant"} <= names
    if family in ("vit", "deit", "swin", "levit"):
        assert {"q", "k", "v", "scores", "probabilities", "sum1", "sum2"} <= names
    text = describe(model)
    assert "stays float" in text and all(point.name in text for point in points(model))
    if family == "vit":
        assert isinstance(model.blocks[0], QuantBlock)
        assert isinstance(model.patch_embed.proj, QuantConv2d)
        assert isinstance(model.head, QuantLinear)
        assert "LayerNorm" in text


def test_outputs_really_lie_on_the_grid():
    """A quantized weight takes at most 2^bits values per channel, an activation 2^bits in all."""
    model = quantized("vit", weight_bits=3, act_bits=4)
    seen = {}
    layer = model.blocks[1].mlp.fc1
    layer.register_forward_hook(lambda m, i, o: seen.update(x=m.input_quant(i[0])))
    with torch.no_grad():
        model(toy_images("vit", 2))
        weight = layer.weight_quant(layer.weight)
    assert max(len(row.unique()) for row in weight) <= 8
    assert len(seen["x"].unique()) <= 16


def test_a_kept_weight_follows_its_scale_and_its_weight():
    layer = quantized("vit", weight_bits=3).blocks[0].attn.proj
    with torch.no_grad():
        first = layer.keep_weight()
        assert layer.keep_weight() is first
        layer.weight_quant.scale.mul_(1.1)
        second = layer.keep_weight()
        assert not torch.equal(first, second)
        layer.weight.mul_(2)
        assert not torch.equal(layer.keep_weight(), second)


@pytest.mark.parametrize(
    "options",
    [
        {"log2_attention": True, "attention_bits": 4},
        {"sums": "tensor"},
        {"sums": "channel"},
        {"ptf_levels": 8},
        {"edge_bits": 8, "gelu_observer": "percentile"},
        {"float_points": "sums, gelu"},
        {"act_symmetric": True},
        {"weight_symmetric": False},
        {"weight_observer": "mse", "act_observer": "mse"},
        {"weight_observer": "percentile", "act_observer": "moving_average"},
        {"bias_correction": True},
        {"moment_correction": True},
        {"moment_correction": True, "bias_correction": True, "weight_symmetric": False},
        {"outputs": True},
        {"qkv": "shared"},
        {"sample_batches": "last", "act_observer": "mse"},
    ],
)
def test_options_work_and_stay_close_at_8_bits(options):
    model, x = toy("vit"), toy_images("vit")
    config = QuantConfig(weight_bits=8, **options)
    qmodel = quantize(model, config)
    calibrate(qmodel, x, config)
    with torch.no_grad():
        assert ((qmodel(x) - model(x)).norm() / model(x).norm()) < 0.3


def test_bias_correction_removes_the_mean_error_of_a_layer():
    model, x = toy("resnet"), toy_images("resnet")
    errors = []
    for correct in (False, True):
        config = QuantConfig(weight_bits=2, bias_correction=correct)
        qmodel = quantize(model, config)
        calibrate(qmodel, x, config)
        layer, seen = qmodel.conv1, {}
        layer.register_forward_hook(lambda m, i, o, seen=seen: seen.update(x=i[0], y=o.clone()))
        with torch.no_grad():
            qmodel(x)
            plain = layer.product(layer.input_quant(seen["x"]), layer.weight, None)
            offset = quantize(model, config).conv1.bias
            errors.append((seen["y"] - plain).mean((0, 2, 3)).sub(offset).abs().max().item())
    assert errors[1] < 0.05 * errors[0]


def test_biases_are_corrected_once_and_as_quantize_was_told():
    model, x = toy("vit"), toy_images("vit")
    qmodel = quantize(model, QuantConfig(weight_bits=3, bias_correction=True))
    calibrate(qmodel, x)
    first = [layer.bias.clone() for layer in qmodel.modules() if isinstance(layer, QuantLinear)]
    plain = quantize(model, QuantConfig(weight_bits=3))
    calibrate(plain, x)
    assert not torch.equal(first[0], plain.blocks[0].attn.qkv.bias)
    calibrate(qmodel, x)
    again = [layer.bias for layer in qmodel.modules() if isinstance(layer, QuantLinear)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("execution", ["simulate", "auto"])
def test_bias_correction_keeps_the_means_of_every_linear_layer(execution):
    """Also of fc2, which integer execution hands codes instead of numbers."""
    demo = load_demo("vit", 50)
    config = QuantConfig(weight_bits=3, bias_correction=True, execution=execution)
    qmodel = quantize(demo.model, config)
    calibrate(qmodel, demo.calibration, config)
    plain = quantize(demo.model, replace(config, bias_correction=False))
    calibrate(plain, demo.calibration)
    shifts = [
        (one.bias - other.bias).abs().max()
        for one, other in zip(qmodel.modules(), plain.modules())
        if isinstance(one, QuantLinear)
    ]
    assert 0 < max(shifts) < 0.5
    with torch.no_grad():
        exact = demo.model(demo.calibration)
        errors = [(m(demo.calibration) - exact).norm() for m in (qmodel, plain)]
    assert errors[0] < 1.1 * errors[1]


def test_uncalibrated_network_says_so():
    with pytest.raises(RuntimeError, match="calibrate"):
        quantize(toy("vit"), QuantConfig())(toy_images("vit", 2))


def test_unsupported_network_says_what_to_do():
    with pytest.raises(ValueError, match="build Chain"):
        chain_of(nn.Linear(3, 3))


def test_copies_and_pickles_agree(family):
    model, x = quantized(family), toy_images(family, 2)
    with torch.no_grad():
        logits = model(x)
        for other in (twin(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), logits)
            assert torch.equal(chain_of(other)(x), logits)


def test_attention_mask_is_obeyed():
    """A masked key changes nothing, as in timm."""
    block = quantized("vit").blocks[0]
    x = torch.randn(2, 17, 24)
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[:, 5] = False
    with torch.no_grad():
        one = block(x, attn_mask=mask)
        changed = x.clone()
        changed[:, 5] = 0
        two = block(changed, attn_mask=mask)
    keep = [i for i in range(17) if i != 5]
    assert torch.equal(one[:, keep], two[:, keep])
    assert not torch.equal(block(x), one)


def test_attention_may_come_from_a_timm_that_knows_no_gates():
    """1.0.26 is allowed, and its attention has no `gate`; one that has a gate is refused."""
    config = QuantConfig()
    layer = Attention(8, num_heads=2)
    if hasattr(layer, "gate"):
        del layer.gate
    assert QuantAttention.from_float(layer, config).products.q
    layer.gate = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="gated attention is not supported"):
        QuantAttention.from_float(layer, config)


def test_calibration_in_inference_mode_works_and_keeps_nothing_stale():
    """Tensors made there do not count their changes, so nothing made from them may be kept."""
    model, x = toy("vit"), toy_images("vit")
    with torch.inference_mode():
        qmodel = quantize(model, QuantConfig())
        calibrate(qmodel, x)
        before = qmodel(x)
        assert torch.equal(qmodel(x), before)
        qmodel.blocks[0].attn.qkv.weight_quant.scale.mul_(1.5)
        assert not torch.equal(qmodel(x), before)


# Networks that are nearly what we know


def nearly(name: str, **options) -> nn.Module:
    """A small network of timm with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7, **options).eval()
    return unfused(enliven(model))


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL_CNN = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}
NEARLY = {
    "BatchNorm with an activation, 18": ("skresnet18", SMALL_CNN),
    "BatchNorm with an activation, 50": ("skresnet50", SMALL_CNN),
    "squeeze and excite": ("seresnet18", SMALL_CNN),
    "anti-aliasing": ("resnetblur18", SMALL_CNN),
    "a deep stem": ("resnet26t", SMALL_CNN),
    "parallel blocks": ("vit_small_patch16_18x2_224", SMALL_VIT),
    "attention pooling": ("vit_base_patch16_siglip_224", SMALL_VIT),
    "registers and swiglu": ("vit_small_patch14_reg4_dinov2", SMALL_VIT),
    "a convolutional stem": ("vit_tiny_r_s16_p8_224", {**SMALL_VIT, "patch_size": 1}),
    "queries and keys normalized": ("vit_tiny_patch16_224", {**SMALL_VIT, "qk_norm": True}),
    "parallel scaling": ("vit_base_patch16_xp_224", SMALL_VIT),
    "RegNet with BatchNorm before convolutions": ("regnetv_040", SMALL_REGNET),
    "RegNet without activations after sums": ("regnetz_005", SMALL_REGNET),
    "RegNet without shortcuts where shapes change": (
        "regnetx_002",
        {**SMALL_REGNET, "downsample": None},
    ),
}


@pytest.mark.parametrize("kind", NEARLY)
def test_nearly_known_networks_compute_what_their_float_network_computes(kind):
    """Or they are refused; and a product that stays float is listed."""
    name, options = NEARLY[kind]
    model = nearly(name, **options)
    qmodel = quantize(model, QuantConfig(weight_bits=8))
    x = example_images(model, 8)
    with torch.no_grad():
        wanted = model(x)
        with pass_floats(qmodel):
            torch.testing.assert_close(qmodel(x), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max())
        calibrate(qmodel, x)
        assert (qmodel(x) - wanted).norm() / wanted.norm() < 0.35


class Louder(nn.BatchNorm2d):
    """A BatchNorm that does something else besides."""

    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.Linear):
    """A linear layer that does something else besides."""

    def forward(self, x):
        return super().forward(x) + 1


class Gated(Attention):
    """An attention of somebody's own: its products are not ours."""

    def forward(self, x, **_):
        images, tokens, channels = x.shape
        q, k, v = self.qkv(x).view(images, tokens, 3, channels).unbind(2)
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


def test_subclasses_are_not_taken_for_what_they_inherit_from():
    """Neither folded nor swapped: what they do besides would be lost without a word."""
    model = toy("resnet")
    model.layer1[0].bn1.__class__ = Louder
    model.fc.__class__ = Shifted
    qmodel = quantize(model, QuantConfig())
    assert type(qmodel.layer1[0].bn1) is Louder and type(qmodel.fc) is Shifted
    assert "1, in fc" in tell_float_products(qmodel)


def test_products_that_stay_float_are_listed_however_they_are_computed():
    model = toy("vit")
    assert "products that stay float: none" in describe(quantize(model, QuantConfig()))
    model.blocks[1].attn.__class__ = Gated
    qmodel = quantize(model, QuantConfig())
    assert tell_float_products(qmodel) == "2, in blocks.1.attn"
    assert "products that stay float: 2, in blocks.1.attn" in describe(qmodel)


def test_a_network_that_would_compute_something_else_is_refused_with_the_first_difference():
    """Acted out: a block whose quantized form forgets something."""
    model = toy("vit")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantBlock, "forward", lambda self, x, **_: x)
        with pytest.raises(ValueError, match=r"would compute something else.*from blocks\.0 on"):
            quantize(model, QuantConfig())
