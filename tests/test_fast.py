"""Fast layers: exact integer products, the network of the plain layers, clear refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import toy, toy_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import evolq_lite as eq
from evolq_lite import kernels
from evolq_lite.fast import FAST, Kept, set_execution
from evolq_lite.kernels import batch_pays, kernel_name, missing, multiply, multiply_batch, pack
from evolq_lite.layers import QuantLinear, QuantProducts

EXACT = [bits for bits in range(2, 9) if not missing(bits)]
here = pytest.mark.skipif(not EXACT, reason="no oneDNN quantized linear on this machine")


def test_this_machine_is_known_to_be_exact_for_some_bits_or_says_why():
    for bits in range(2, 9):
        reason = missing(bits)
        assert reason == "" or any(w in reason for w in ("oneDNN", "VNNI", "refuses"))
    assert "on cuda" in missing(4, "cuda")


def test_the_probe_finds_a_kernel_that_clips(monkeypatch):
    """The 16-bit sums of processors without VNNI, acted out."""

    def clipping(codes, scale, zero_point, packed, bias):
        pairs = (codes.long()[:, None] * weights["w"].long()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).float()

    weights = {}
    monkeypatch.setattr(kernels, "pack", lambda weight, scale: weights.update(w=weight))
    monkeypatch.setattr(kernels, "multiply", clipping)
    found = {bits: kernels.missing.__wrapped__(bits) for bits in (2, 7, 8)}
    assert found[2] == found[7] == "" and "VNNI" in found[8]


@here
@settings(max_examples=150)
@given(st.data())
def test_accumulators_are_exact(data):
    """Against an int64 product; depth is such that float32 holds every sum."""
    bits, act_bits = data.draw(st.sampled_from(EXACT)), data.draw(st.integers(2, 8))
    rows, depth = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 256))
    outputs, zero = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 2**act_bits - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    codes = torch.randint(2**act_bits, (rows, depth), generator=generator)
    largest = 2 ** (bits - 1)
    weight = torch.randint(-largest, largest, (outputs, depth), generator=generator)
    if data.draw(st.booleans()):  # the ends of both ranges
        codes = (codes >= 2 ** (act_bits - 1)).long() * (2**act_bits - 1)
        weight = torch.where(weight < 0, -largest, largest - 1)
    if data.draw(st.booleans()):  # all products of one sign, where 16 bits overflow
        codes.fill_(2**act_bits - 1), weight.fill_(data.draw(st.sampled_from([-largest])))
    wanted = (codes - zero) @ weight.T
    packed = pack(weight.to(torch.int8), torch.ones(outputs))
    found = multiply(codes.to(torch.uint8), 1.0, zero, packed, None)
    assert torch.equal(found, wanted.float()) and wanted.abs().max() <= 2**24


heads = pytest.mark.skipif(
    kernels.batch_missing(), reason="no exact product of two 8-bit tensors on this machine"
)


@pytest.fixture
def one_thread(same_threads):
    torch.set_num_threads(1)


@heads
@settings(max_examples=100)
@given(st.data())
def test_products_of_a_batch_are_exact(data):
    """Against an int64 product, for any zero points, at the ends of both ranges too."""
    images, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    rows, depth, columns = (data.draw(st.integers(1, 40)) for _ in range(3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    lo_left, lo_right = -data.draw(st.integers(0, 255)), -data.draw(st.integers(0, 255))
    left = torch.randint(256, (images, count, rows, depth), generator=generator)
    right = torch.randint(256, (images, count, columns, depth), generator=generator)
    if data.draw(st.booleans()):
        left, right = 255 * (left > 127), 255 * (right > 127)
    left, right = left + lo_left, (right + lo_right).transpose(-2, -1)
    found = multiply_batch(left.float(), lo_left + 128, right.float(), lo_right + 128)
    assert torch.equal(found, (left @ right).float())


@heads
@pytest.mark.parametrize(
    "options",
    [{}, {"act_bits": 4}, {"act_symmetric": True}, {"attention_bits": 4}, {"log2_attention": True}],
    ids=str,
)
def test_attention_by_integers_is_the_same_bit_for_bit(options, family, one_thread, monkeypatch):
    qmodel = eq.quantize(toy(family), eq.QuantConfig(weight_bits=4, **options))
    x = toy_images(family)
    eq.calibrate(qmodel, x)
    eq.set_execution(qmodel, "integer")
    calls = []

    def counted(*operands):
        calls.append(1)
        return multiply_batch(*operands)

    monkeypatch.setattr("evolq_lite.fast.multiply_batch", counted)
    with torch.no_grad():
        by_floats = qmodel(x)
        assert not calls  # toys are too small to be worth it
        monkeypatch.setattr(kernels, "WORTH_A_CALL", 0)
        assert torch.equal(qmodel(x), by_floats)
        products = sum(isinstance(module, QuantProducts) for module in qmodel.modules())
        assert len(calls) == products * (1 if "log2_attention" in options else 2)
        calls.clear()
        eq.set_execution(qmodel, "simulate")
        qmodel(x)
        assert not calls


@heads
def test_integer_attention_waits_for_one_thread_and_large_products(one_thread):
    large, small = torch.empty(2, 256, 64), torch.empty(2, 16, 64)
    assert batch_pays(large, large.transpose(1, 2))
    assert not batch_pays(small, small.transpose(1, 2))
    torch.set_num_threads(2)
    assert not batch_pays(large, large.transpose(1, 2))


@here
@pytest.mark.parametrize("act_bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_equals_its_simulation(act_bits, symmetric):
    """Float out, activation and codes out; the codes differ at ties only."""
    torch.manual_seed(0)
    config = eq.QuantConfig(weight_bits=4, act_bits=act_bits, act_symmetric=symmetric)
    first = QuantLinear.from_float(nn.Linear(48, 64), config)
    second = QuantLinear.from_float(nn.Linear(64, 8), config)
    x = torch.randn(100, 48)
    for layer, seen in ((first, x), (second, torch.randn(100, 64))):
        layer.input_quant.observe(), layer.weight_quant.observe()
        with torch.no_grad():
            layer(seen)
        layer.input_quant.freeze(), layer.weight_quant.freeze()
    set_execution(nn.ModuleList([first, second]), "integer")
    target = second.input_quant
    with torch.no_grad():
        for act in (None, nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU()):
            first.integer = False
            simulated = first(x, act)
            first.integer = True
            assert torch.allclose(first(x, act), simulated, atol=1e-4)
            codes = first(x, act, target)
            if act is None or kernel_name(act):
                assert codes.dtype is torch.uint8 and int(codes.max()) < 2**act_bits
                wanted = target.codes(simulated)
                assert (codes != wanted).float().mean() < 1e-3
                assert (codes.int() - wanted.int()).abs().max() <= 1
            else:
                assert torch.allclose(codes, simulated, atol=1e-4)


@here
def test_packed_weights_follow_their_sources():
    """New scales, rewritten scales, rewritten weights, another target: never an old product."""
    model, x = toy("vit"), toy_images("vit")
    qmodel = eq.quantize(model, eq.QuantConfig(weight_bits=4))
    eq.calibrate(qmodel, x)
    attention = qmodel.blocks[0].attn
    with torch.no_grad():
        for tensor in (
            attention.qkv.weight_quant.scale,
            attention.qkv.weight,
            attention.qkv.bias,
            attention.proj.input_quant.scale,
            qmodel.blocks[0].mlp.fc2.input_quant.scale,
        ):
            eq.set_execution(qmodel, "integer")
            before = qmodel(x)
            tensor.mul_(1.3).add_(0.01)
            after = qmodel(x)
            eq.set_execution(qmodel, "simulate")
            simulated = qmodel(x)
            assert (after - before).abs().max() > 10 * (after - simulated).abs().mean()
            fresh = copy.deepcopy(qmodel)
            eq.set_execution(fresh, "integer")
            assert torch.equal(fresh(x), after)


def test_families_agree_in_all_executions(family):
    """The fast layers against the plain ones, which define what is right."""
    qmodel = eq.quantize(toy(family), eq.QuantConfig(weight_bits=6))
    x = toy_images(family)
    eq.calibrate(qmodel, x)
    found = {}
    with torch.no_grad():
        for execution in ("plain", "simulate", *["integer"] * bool(EXACT)):
            assert eq.set_execution(qmodel, execution) == execution
            found[execution] = qmodel(x)
            again = pickle.loads(pickle.dumps(copy.deepcopy(qmodel)))
            assert torch.equal(again(x), found[execution])
    assert torch.equal(found["simulate"], found["plain"])
    if EXACT:
        assert (found["integer"] - found["plain"]).norm() / found["plain"].norm() < 0.02


def test_execution_swaps_classes_and_takes_them_back():
    qmodel = eq.quantize(toy("vit"), eq.QuantConfig(execution="plain"))
    plain = [type(module) for module in qmodel.modules()]
    assert not set(plain) & set(FAST.values()) and set(plain) & set(FAST)
    eq.set_execution(qmodel, "simulate")
    swapped = [type(module) for module in qmodel.modules()]
    assert swapped == [FAST.get(kind, kind) for kind in plain]
    eq.set_execution(qmodel, "plain")
    assert [type(module) for module in qmodel.modules()] == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_auto_falls_back_for_other_dtypes(dtype, caplog):
    model = toy("vit").to(dtype)
    with caplog.at_level("INFO", "evolq_lite"):
        qmodel = eq.quantize(model, eq.QuantConfig())
    assert str(dtype).removeprefix("torch.") in caplog.text
    x = toy_images("vit").to(dtype)
    eq.calibrate(qmodel, x)
    with torch.no_grad():
        assert torch.isfinite(qmodel(x)).all()
    with pytest.raises(ValueError, match="float32"):
        eq.set_execution(qmodel, "integer")


def test_kept_values_follow_their_sources():
    kept, source = Kept(), torch.zeros(2)
    assert kept.get("a", (source,), lambda: 1) == kept.get("a", (source,), lambda: 2) == 1
    source.add_(1)
    assert kept.get("a", (source,), lambda: 3) == 3
    assert kept.get("a", (source.clone(),), lambda: 4) == 4
    assert not pickle.loads(pickle.dumps(kept)).values


def in_two_sums(cut):
    """Another float kernel: the product as the sum of two, cut somewhere along the depth."""

    def product(self, x, weight, bias):
        k = cut % (self.in_features - 1) + 1
        return F.linear(x[..., :k], weight[:, :k]) + F.linear(x[..., k:], weight[:, k:], bias)

    return product


@here
def test_the_network_differs_by_less_than_two_float_kernels_do(monkeypatch):
    """Logits and fitness of integers and of fast floats against the plain layers.

    The noise floor, how far apart two float kernels are, is measured here too.
    """
    demo = eq.load_demo("vit", calibration=1000)
    qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=4))
    eq.calibrate(qmodel, demo.calibration[:100])

    def measured():
        with torch.no_grad():
            logits = torch.cat([qmodel(x) for x in demo.calibration.split(50)])
        fitness = [eq.info_nce(a, b) for a, b in zip(logits.split(100), demo.targets.split(100))]
        return logits, float(torch.stack(fitness).mean())

    found = {}
    for execution in ("integer", "simulate", "plain"):
        eq.set_execution(qmodel, execution)
        found[execution] = measured()
    plain, plain_fitness = found.pop("plain")
    logits, fitness = [], []
    for cut in (1, 17, 29, 40, 53):
        monkeypatch.setattr(QuantLinear, "product", in_two_sums(cut))
        other, other_fitness = measured()
        logits.append(float((other - plain).abs().mean()))
        fitness.append(abs(other_fitness - plain_fitness))
    # The differences come from few images, in which a rounding fell on the other side of a tie.
    assert min(logits) > 0
    assert torch.equal(found["simulate"][0], plain)
    integers, integer_fitness = found["integer"]
    assert float((integers - plain).abs().mean()) <= 1.5 * max(logits)
    assert abs(integer_fitness - plain_fitness) <= 1.5 * max(fitness)


@here
def test_top1_is_the_same_within_a_tenth_of_a_point():
    demo = eq.load_demo("vit", calibration=100)
    qmodel = eq.quantize(demo.model, eq.QuantConfig(weight_bits=4))
    eq.calibrate(qmodel, demo.calibration)
    images, labels = demo.test
    hits = []
    for execution in ("plain", "integer"):
        eq.set_execution(qmodel, execution)
        found = eq.predict({"q": qmodel}, images.split(100))["q"]
        hits.append(eq.accuracy(found, labels).top1)
    assert abs(hits[0] - hits[1]) <= 0.001


@here
def test_where_a_gradient_flows_it_simulates():
    qmodel = eq.quantize(toy("vit"), eq.QuantConfig(weight_bits=4))
    x = toy_images("vit")
    eq.calibrate(qmodel, x)
    gradients = []
    for execution in ("integer", "simulate"):
        eq.set_execution(qmodel, execution)
        chain = eq.chain_of(qmodel)
        inputs = [torch.randn(12, 17, 24, generator=torch.Generator().manual_seed(0))]
        objective = eq.BlockObjective(chain, "blocks.1", x, torch.randn(12, 10), inputs=inputs)
        objective.targets = [torch.eye(12)[:, :10]]
        gradients.append(torch.func.grad(objective.loss)(objective.start))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_refusals_name_what_is_missing():
    model = toy("vit")
    qmodel = eq.quantize(model, eq.QuantConfig())
    with pytest.raises(ValueError, match="unknown execution 'fast'; known: auto"):
        eq.set_execution(qmodel, "fast")
    with pytest.raises(ValueError, match="on meta"):
        eq.set_execution(eq.quantize(model, eq.QuantConfig()).to("meta"), "integer")
    with pytest.raises(ValueError, match="no quantized linear"):
        eq.set_execution(nn.Sequential(nn.Linear(2, 2)), "integer")
    if reason := missing(8):
        with pytest.raises(ValueError, match=reason[:20]):
            eq.quantize(model, eq.QuantConfig(weight_bits=8, execution="integer"))
