"""Files from strangers: whatever is in them, they are read right or refused with one sentence.

12,000 inputs over six kinds of file; `EVOLQ_FUZZ=N` tries N of each kind.
"""

import json
import os
from dataclasses import asdict

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from evolq_lite import QuantConfig, SearchConfig
from evolq_lite.convert import calibrate, quantize, quantizers
from evolq_lite.evolve import Evaluated
from evolq_lite.experiments.results import VERSION, ResultFile
from evolq_lite.files import seal
from evolq_lite.folders import read_class_map
from evolq_lite.runs.folder import FORMAT, RunFolder
from evolq_lite.runs.scales import load_scales, save_scales

EACH = int(os.environ.get("EVOLQ_FUZZ", "2000"))
many = settings(
    max_examples=EACH,
    deadline=None,
    database=None,
    derandomize="EVOLQ_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.faults

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 0, 1e308, "evolq", "vit", "nan"])
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def dumped(value):
    """JSON as Python writes it, NaN and huge numbers included."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw, whole):
    """A valid file with bytes changed, cut, doubled or put in, or no such file at all."""
    data = bytearray(whole)
    kind = draw(st.sampled_from(["flip", "cut", "insert", "double", "noise", "deep", "none"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "deep":
        return draw(st.sampled_from([b"[", b'{"a":'])) * 100_000
    for _ in range(draw(st.integers(1, 3)) if kind != "none" and data else 0):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, len(whole)))]
        elif kind == "double":
            data[at:at] = data[at : at + 40]
        else:
            data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)


@st.composite
def altered(draw, whole):
    """A JSON object with fields changed, taken away or added."""
    found = dict(whole)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*whole, "more"]))
        if draw(st.booleans()):
            found[name] = draw(values)
        else:
            found.pop(name, None)
    return dumped(found)


def one_sentence(error):
    """What a refusal says: one line, and no bare Python."""
    said = str(error)
    return bool(said) and "\n" not in said.strip() and "Traceback" not in said


@many
@given(st.data())
def test_configs(data):
    config = data.draw(st.sampled_from([QuantConfig(), SearchConfig()]))
    whole = asdict(config)
    text = data.draw(altered(whole) | damaged(dumped(whole)))
    try:
        found = type(config).from_json(text.decode("utf-8", "replace"))
    except ValueError as error:
        assert one_sentence(error)
    else:
        assert type(config).from_json(found.to_json()) == found


CONFIG = {
    "format": FORMAT,
    "model": "m",
    "quantization": asdict(QuantConfig()),
    "search": asdict(SearchConfig()),
}
STATE = {
    "versions": {"torch": "2"}, "threads": 2, "vector_instructions": "AVX2", "workers": None,
    "execution": "integer", "device": "cpu", "chunk": 13, "sha256": {"a": "b"},
}  # fmt: skip


BROKEN = "a\nb\x1b"


@pytest.mark.parametrize(
    ("config", "state"),
    [
        ({"quantization": {BROKEN: 1}}, {}),
        ({BROKEN: 1}, {}),
        ({}, {"vector_instructions": BROKEN}),
        ({}, {"threads": BROKEN}),
        ({}, {"sha256": {BROKEN: "b"}}),
        ({"format": 0}, {"versions": {"evolq-lite": BROKEN}}),
    ],
)
def test_what_a_file_says_does_not_break_a_line(folder, config, state):
    out = folder / "broken"
    out.mkdir(exist_ok=True)
    (out / "config.json").write_bytes(dumped({**CONFIG, **config}))
    (out / "environment.json").write_bytes(dumped({**STATE, **state}))
    with pytest.raises(ValueError) as refusal:
        entered = RunFolder.resume(out, CONFIG)
        try:
            entered.enter(STATE)
        finally:
            entered.close()
    assert one_sentence(refusal.value) and str(refusal.value).isprintable()


@many
@given(st.data())
def test_run_folders(folder, data):
    """config.json and environment.json of a run that is resumed."""
    out = folder / "run"
    out.mkdir(exist_ok=True)
    configs = data.draw(altered(CONFIG) | damaged(dumped(CONFIG)) | st.just(dumped(CONFIG)))
    states = data.draw(altered(STATE) | damaged(dumped(STATE)))
    (out / "config.json").write_bytes(configs)
    (out / "environment.json").write_bytes(states)
    entered = None
    try:
        RunFolder.claim(out, resume=True, replace=False)
        entered = RunFolder.resume(out, CONFIG)
        entered.enter(STATE)
    except ValueError as error:
        assert one_sentence(error) and str(out) in str(error)
    else:
        found = json.loads((out / "environment.json").read_text())
        assert {**found, **STATE, "workers": found["workers"] or None} == found | {"workers": None}
    finally:
        if entered is not None:
            entered.close()
    if entered is None:
        assert (out / "environment.json").read_bytes() == states


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place for files."""
    return tmp_path_factory.mktemp("fuzz")


EVENTS = [Evaluated(i // 3, 0, "b", i % 3 + 1, 1.5 - i, True, 0.1) for i in range(6)]


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A folder whose run has made a few evaluations, and its history as bytes."""
    out = tmp_path_factory.mktemp("fuzz") / "run"
    run = RunFolder.create(out, CONFIG)
    for event in EVENTS:
        run.append(event)
    run.close()
    return out, (out / "history.jsonl").read_bytes()


@many
@given(st.data())
def test_histories(history, data):
    """Whatever befalls the file, what is read is how the history began, and nothing else."""
    out, whole = history
    line = json.loads(whole.splitlines()[2])
    lines = whole.splitlines(keepends=True)
    content = data.draw(
        damaged(whole)
        | altered(line).map(lambda text: b"".join([*lines[:2], text, b"\n", *lines[3:]]))
        | st.permutations(lines).map(b"".join)
    )
    (out / "history.jsonl").write_bytes(content)
    folder = RunFolder(out)
    found = folder.restore()
    assert found == EVENTS[: len(found)]
    left = (out / "history.jsonl").read_bytes()
    assert left == b"".join(lines[: len(found)]) and content.startswith(left)
    for event in EVENTS[len(found) :]:
        folder.append(event)
    assert (out / "history.jsonl").read_bytes() == whole


@pytest.fixture(scope="module")
def scales(folder):
    """A small quantized network, its scales as a file, and as tensors."""
    torch.manual_seed(0)
    model = timm.models.resnet.resnet10t(num_classes=3, channels=(8, 8, 8, 8))
    qmodel = quantize(model.eval(), QuantConfig())
    calibrate(qmodel, torch.randn(2, 3, 32, 32), QuantConfig())
    save_scales(folder / "whole", qmodel, visits=3, fitness=0.5)
    return qmodel, (folder / "whole").read_bytes()


def state(qmodel):
    """All scales and zero points."""
    return {
        name: (point.scale.clone(), point.zero_point.clone())
        for name, point in quantizers(qmodel).items()
    }


@many
@given(st.data())
def test_scales(scales, folder, data):
    qmodel, whole = scales
    before = state(qmodel)
    content = data.draw(damaged(whole) | strange(list(before)))
    path = folder / "scales.safetensors"
    path.write_bytes(content)
    try:
        found = load_scales(path, qmodel)
    except ValueError as error:
        assert one_sentence(error), str(error)
        assert "scales.safetensors" in str(error)
    else:
        assert content == whole and found == {"visits": 3, "fitness": 0.5}
    after = state(qmodel)  # refused or not, the scales are what they were
    assert all(torch.equal(x, y) for n in before for x, y in zip(before[n], after[n]))


@st.composite
def strange(draw, points):
    """Safetensors that are well-formed, but not what a run writes."""
    kinds = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool])
    shape, kind = draw(st.lists(st.integers(0, 4), max_size=3)), draw(kinds)
    tensors = {
        f"{name}.{part}": torch.zeros(shape, dtype=kind)
        for name in points
        for part in ("scale", "zero_point")
    }
    return save(tensors, {"run": json.dumps(draw(values))})


@many
@given(st.data())
def test_class_maps(folder, data):
    whole = "\n".join(f"n{i:08d}" for i in range(20)).encode()
    path = folder / "classes.txt"
    path.write_bytes(data.draw(damaged(whole) | st.text().map(lambda x: x.encode("utf-16"))))
    try:
        found = read_class_map(path)
    except ValueError as error:
        assert one_sentence(error) and "classes.txt" in str(error)
    else:
        assert list(found.values()) == list(range(len(found)))


CELL = {"network": "vit", "weight_bits": 3, "seed": 0}
RESULT = {
    "claim": "C1", "cell": CELL, "result": {"top1": 0.5}, "seconds": 1.0, "environment": 0,
    "version": VERSION,
}  # fmt: skip
RESULTS = [RESULT, {"environment": 0, "machine": {"threads": 1}}]


@many
@given(st.data())
def test_results(folder, data):
    """A line from a stranger is the result that was written, or it is not there."""
    whole = b"".join(map(seal, RESULTS))
    line = data.draw(st.sampled_from(RESULTS))
    strange = altered(line) | altered(line).map(lambda text: seal(json.loads(text)))
    file = ResultFile(folder, "C1")
    file.path.write_bytes(data.draw(damaged(whole) | strange.map(lambda text: text + b"\n")))
    (found,) = file.find([CELL])
    assert found is None or (found["cell"], found["version"]) == (CELL, VERSION)
    assert found is None or isinstance(found["result"], dict)
    file.repair()
    assert json.dumps(file.find([CELL])) == json.dumps([found])
    file.append({**RESULT, "environment": {"threads": 1}})
    assert file.find([CELL])[0]["result"] == {"top1": 0.5}
