"""What a run is made of, in two frozen dataclasses.

They are checked when built, so that a run cannot fail late on a typing error. Each field carries
its help text; the command line makes its flags from them, so nothing is configured twice.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from evolq_lite.files import parse_json
from evolq_lite.fitness import FITNESS
from evolq_lite.kernels import EXECUTIONS
from evolq_lite.numerics import IntRange
from evolq_lite.observers import OBSERVERS

TENSOR_OBSERVERS = tuple(name for name in OBSERVERS if name != "ptf")
KINDS = ("sums", "gelu", "probabilities", "scores", "qkv", "inputs", "outputs", "weights")
SAMPLING = ("mse", "percentile", "ptf")  # observers that look at values, not at ranges only


def option(default: Any, text: str, choices: tuple[str, ...] = (), flag: str = "") -> Any:
    """Declare a field with the help text and the choices that the command line shows.

    `flag` is the flag's name where it is not the field's.
    """
    return field(default=default, metadata={"help": text, "choices": choices, "flag": flag})


class _Checked:
    """Common part of both: types and choices checked, to and from JSON."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, choices = getattr(self, f.name), f.metadata["choices"]
            absent = value is None and f.default is None
            if choices and value not in choices and not absent:
                raise ValueError(f"unknown {f.name} {value!r}; known: {', '.join(choices)}")
            wanted = (int, float) if f.type in (float, float | None) else f.type
            right = isinstance(value, wanted) and (f.type is bool or not isinstance(value, bool))  # type: ignore[arg-type]
            if not right and not absent:
                kind = getattr(f.type, "__name__", f.type)
                raise ValueError(f"{f.name} must be of type {kind}, not {value!r}")

    def require(self, name: str, least: float) -> None:
        """Raise ValueError unless the field is a finite number of at least `least`."""
        value = getattr(self, name)
        if not least <= value < math.inf:  # NaN is neither
            raise ValueError(f"{name} must be at least {least}, not {value}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The reverse of `to_json`; ValueError for other texts, or for unknown fields."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from None
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, dict) or not set(values) <= known:
            raise ValueError(
                f"a {cls.__name__} is a JSON object with fields among: {', '.join(sorted(known))}"
            )
        return cls(**values)


@dataclass(frozen=True)
class QuantConfig(_Checked):
    """How a network is quantized; the defaults follow the paper (docs/deviations.md: where not)."""

    weight_bits: int = option(4, "bits of weights, 2 to 8")
    act_bits: int = option(8, "bits of activations, 2 to 8")
    weight_observer: str = option(
        "minmax", "first weight scales, per output channel", TENSOR_OBSERVERS
    )
    act_observer: str = option("minmax", "activation scales, per tensor", TENSOR_OBSERVERS)
    weight_symmetric: bool = option(True, "weights with zero point 0")
    act_symmetric: bool = option(False, "activations with the zero point in the middle")
    sums: str = option(
        "ptf",
        "residual sums, the inputs of LayerNorm: one scale per tensor, one per tensor with a "
        "power-of-two factor per channel, or one per channel",
        ("tensor", "ptf", "channel"),
    )
    ptf_levels: int = option(4, "factors that ptf chooses from: 1, 2, 4 ... 2^(levels - 1)")
    gelu_observer: str | None = option(
        None,
        "activation scales of GELU's output, the input of fc2; none: as other activations",
        TENSOR_OBSERVERS,
    )
    gelu_factors: bool = option(
        False,
        "divide each channel of GELU's output by a power of two that its range suggests, and "
        "multiply fc2's weights by it",
    )
    edge_bits: int | None = option(
        None,
        "bits of weights and inputs of the first and the last layer; none: as others",
    )
    float_points: str = option(
        "",
        f"kinds of points that stay float, separated by commas, out of: {', '.join(KINDS)}",
        flag="float",
    )
    log2_attention: bool = option(
        False, "attention probabilities as powers of two instead of uniform"
    )
    attention_bits: int | None = option(
        None, "bits of attention probabilities, 2 to 8; none: those of activations"
    )
    rounding: str = option(
        "nearest",
        "which integer a weight becomes: the nearest, or chosen on the calibration images: by "
        "GPTQ, or learned block by block from GPTQ's",
        ("nearest", "gptq", "learned"),
    )
    bias_correction: bool = option(False, "shift biases by the mean error of the quantized weights")
    moment_correction: bool = option(
        False,
        "scale and shift each output channel's quantized weights to the float weights' mean and "
        "variance, anew for other scales",
    )
    outputs: bool = option(
        False,
        "quantize also what proj, fc2 and the patch embedding write, tokens and positions before "
        "they are added, and the logits (ViT, DeiT)",
    )
    qkv: str = option(
        "separate",
        "q, k and v with a scale each, or one scale for the three",
        ("separate", "shared"),
    )
    sample_batches: str = option(
        "all",
        "calibration batches whose values mse, percentile and ptf look at; ranges are those of all",
        ("all", "last"),
    )
    execution: str = option(
        "auto",
        "multiply integers, simulate that in float, or run the plain layers that lessons print; "
        "auto: integers where they are exact",
        EXECUTIONS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_bits", "act_bits", "attention_bits", "edge_bits"):
            if (bits := getattr(self, name)) is not None:
                try:
                    IntRange(bits, True)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        if not 1 <= self.ptf_levels <= 16:
            raise ValueError(f"ptf_levels must be from 1 to 16, not {self.ptf_levels}")
        if self.ptf_levels != 4 and self.sums != "ptf":
            raise ValueError("ptf_levels has no effect without sums ptf; omit it")
        if unknown := [kind for kind in self.float_kinds if kind not in KINDS]:
            raise ValueError(
                f"float_points: unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}"
            )

        if self.moment_correction and self.rounding != "nearest":
            raise ValueError(
                f"moment_correction would rescale the weights that rounding {self.rounding} has "
                "fitted to their inputs; omit one of the two"
            )
        if self.qkv == "shared" and self.act_observer == "moving_average":
            raise ValueError(
                "qkv shared has one observer for q, k and v, and moving_average would take them "
                "for three batches; give another act_observer, or qkv separate"
            )
        if self.sample_batches == "last" and not {
            self.act_observer,
            self.gelu_observer,
            self.sums,
        } & {*SAMPLING}:
            raise ValueError(
                "sample_batches last has no effect without an activation observer that looks at "
                f"values ({', '.join(SAMPLING)}); omit it"
            )

    @property
    def float_kinds(self) -> list[str]:
        """The kinds of points that stay float."""
        return [kind.strip() for kind in self.float_points.split(",") if kind.strip()]


PRESETS: dict[str, QuantConfig] = {
    # What we know of the paper: MinMax everywhere, power-of-two factors on residual sums.
    "paper": QuantConfig(),
    # Ours, chosen on calibration images: the first and last layer at 8 bits, scales that minimize
    # the squared error of weights, zero points where the weights want them, a scale per channel or
    # a factor where channels differ by orders of magnitude (residual sums, GELU's output), and
    # integers by GPTQ.
    "recommended": QuantConfig(
        weight_observer="mse",
        weight_symmetric=False,
        edge_bits=8,
        sums="channel",
        gelu_observer="mse",
        gelu_factors=True,
        rounding="gptq",
    ),
    # What the authors' published script does (docs/deviations.md: what is left out).
    "official": QuantConfig(
        weight_symmetric=False,
        moment_correction=True,
        outputs=True,
        qkv="shared",
        act_observer="mse",
        sample_batches="last",
    ),
}

# What the command `demo` searches.
DEMO_QUANT = QuantConfig(weight_bits=3, act_bits=8)
DEMO_IMAGES = 500
OFFICIAL_CROP = 0.875  # what the paper's script keeps of an image for DeiT and LeViT; timm 0.9
EXPORTED_WEIGHTS = ("int8", "int4")  # how a file of `export` may hold them


def preset_of(config: QuantConfig) -> str:
    """The preset that a config is nearest to, and what differs: "paper, with weight_bits 3"."""

    def changes(preset: QuantConfig) -> list[str]:
        return [
            f"{f.name} {str(getattr(config, f.name)).lower() or 'none'}"
            for f in fields(QuantConfig)
            if f.name != "execution"  # how, not what
            and getattr(config, f.name) != getattr(preset, f.name)
        ]

    name = min(PRESETS, key=lambda name: len(changes(PRESETS[name])))  # the first one of equals
    different = ", ".join(changes(PRESETS[name]))
    return f"{name}, with {different}" if different else name


# Options that mean something in one kind of search only.
SCALES_ONLY = (
    "passes",
    "cycles",
    "step",
    "mutation",
    "scales",
    "integers",
    "granularity",
    "order",
    "racing",
)
BITS_ONLY = ("mean_bits", "budget_bytes", "widths", "evaluations")
IDLE: dict[str, tuple[str, ...]] = {"scales": BITS_ONLY, "bits": SCALES_ONLY, "both": ()}


@dataclass(frozen=True)
class SearchConfig(_Checked):
    """How to search scales; the paper's defaults: 10 passes, population 15, 3 cycles, infoNCE."""

    search: str = option(
        "scales",
        "what is searched: scales, bits by layer, or both: bits first, then the scales of the "
        "network that was found",
        ("scales", "bits", "both"),
    )
    mean_bits: float | None = option(
        None,
        "search bits or both: what a weight may have on average, without layers of fixed edge_bits",
    )
    budget_bytes: int | None = option(
        None, "search bits or both: what the weights of these layers may take, not mean_bits"
    )
    widths: str = option(
        "2,3,4,5,6,7,8",
        "search bits or both: what a layer may have, separated by commas; each costs a rounding of "
        "the network before the search",
    )
    evaluations: int = option(
        360,
        "search bits or both: candidates of bits; 360 are as many as ten passes over twelve blocks "
        "have",
    )
    passes: int = option(10, "how often every block is visited")
    cycles: int = option(3, "candidates per visit")
    population: int = option(
        15, "members kept per visit; all start as copies of the current scales"
    )
    tournament: int = option(10, "members drawn, with replacement; the best is the parent")
    step: float | None = option(
        None,
        "mutation width; none: the paper's, 1e-3 up to 4-bit weights, 1e-4 above; 1e-2 if relative",
    )
    mutation: str = option(
        "absolute",
        "width in the units of the scale, or relative to it, or relative and adapted by success",
        ("absolute", "relative", "adaptive"),
    )
    scales: str = option(
        "attention",
        "which scales: attention weights, all weights, or all with activations (ptf's factors too)",
        ("attention", "weights", "all"),
    )
    integers: str = option(
        "free",
        "weights' integers while their scales are searched: rounded anew for each scale, or frozen "
        "(weight = integer * scale, all layers)",
        ("free", "frozen"),
    )
    granularity: str = option("block", "what is visited at a time", ("layer", "block", "global"))
    order: str = option("last_first", "order of the blocks in a pass", ("last_first", "first_last"))
    algorithm: str = option(
        "evolq", "evolutionary search, or random search at the same cost", ("evolq", "random")
    )
    fitness: str = option("info_nce", "distance to the float network's predictions", tuple(FITNESS))
    temperature: float = option(3.0, "temperature of infoNCE")
    parallel: int = option(1, "candidates drawn at a time from one population; the paper has 1")
    batch: int = option(100, "calibration images per batch; infoNCE's negatives come from it")
    racing: bool = option(
        False,
        "drop a candidate once its first batches say that it will not win; the paper evaluates all",
    )
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("passes", "cycles", "population", "tournament", "parallel", "evaluations"):
            self.require(name, 1)
        self.require("batch", 2)
        self.require("seed", 0)
        if self.seed >= 2**32:  # visits derive theirs from it, and torch takes 64 bits
            raise ValueError(f"seed must be at most {2**32 - 1}, not {self.seed}")
        self.require("temperature", 1e-3)
        if self.step is not None:
            self.require("step", 0)
        idle = ["temperature"] if self.fitness != "info_nce" else []
        if self.algorithm == "random":
            idle += ["population", "tournament", *["mutation"] * (self.mutation == "adaptive")]
        for name in idle:
            if (own := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                other = "fitness info_nce" if name == "temperature" else "algorithm evolq"
                raise ValueError(f"{name} {own} has no effect without {other}; omit it")
        self.check_bits()

    def check_bits(self) -> None:
        """ValueError for a budget that is missing or impossible, and for options without effect."""
        for name in IDLE[self.search]:
            if (own := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} {own} has no effect with search {self.search}; omit it")
        if not self.searches_bits:
            return
        least, most = self.bit_widths[0], self.bit_widths[-1]
        if (self.mean_bits is None) == (self.budget_bytes is None):
            raise ValueError(
                f"search {self.search} needs a budget: give mean_bits or budget_bytes, one of them"
            )
        if self.budget_bytes is not None:
            self.require("budget_bytes", 1)
        elif not least < self.mean_bits < most:  # type: ignore[operator]
            raise ValueError(
                f"mean_bits must be between {least} and {most}, the narrowest and the widest of "
                f"widths, not {self.mean_bits}; at either end there is nothing to choose"
            )

    @property
    def searches_bits(self) -> bool:
        """Whether bits are searched, alone or before scales."""
        return self.search != "scales"

    @property
    def bit_widths(self) -> list[int]:
        """The bits that a layer may have, ascending; ValueError if they cannot be read so."""
        try:
            widths = sorted({int(word) for word in self.widths.split(",")})
        except ValueError:
            widths = []
        if len(widths) < 2 or not (widths[0] >= 2 and widths[-1] <= 8):
            raise ValueError(
                "widths must be at least two whole numbers from 2 to 8, such as 2,3,4, not "
                f"{self.widths!r}"
            )
        return widths

    def width(self, weight_bits: float) -> float:
        """The first mutation width: `step`, or the paper's for these weight bits."""
        if self.step is not None:
            return self.step
        return 1e-2 if self.mutation != "absolute" else 1e-3 if weight_bits <= 4 else 1e-4
