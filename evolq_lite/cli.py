"""The command line: `python -m evolq_lite demo | run | reproduce | export | verify | ...`.

Flags are made from the dataclasses of `config`. Every command that searches does the same:
quantize, calibrate, evolve on calibration images, then read the test images once and say what was
gained. Bad input gets one sentence and exit status 2.
"""

from __future__ import annotations

import argparse
import errno
import signal
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

import torch

from evolq_lite import __version__
from evolq_lite._openmp import UNBOUND
from evolq_lite._torchvision import torchvision_advice
from evolq_lite.config import (
    DEMO_IMAGES,
    DEMO_QUANT,
    EXPORTED_WEIGHTS,
    OFFICIAL_CROP,
    PRESETS,
    QuantConfig,
    SearchConfig,
)
from evolq_lite.files import DATA, check_target, printable
from evolq_lite.kernels import missing
from evolq_lite.runs.environment import device_of, environment, fix_kernels
from evolq_lite.terminal import progress, say

# A command imports what it needs when it runs: timm and SciPy take longer to load than torch, and
# neither --help nor a mistyped option needs them.
if TYPE_CHECKING:
    from evolq_lite.evolve import Evaluated
    from evolq_lite.runs.run import Outcome, Run
    from evolq_lite.runs.shipping import Shipment
    from evolq_lite.runs.source import Source
    from evolq_lite.runs.workers import Workers

# Seconds that a cell of an experiment may take on a worker before it counts as hanging.
CELL_PATIENCE = 7200.0
GRID_PATIENCE = 7 * 86400.0  # the same for a cell of the paper's grid, which one processor may need
SENSITIVITY_IMAGES = 100  # calibration images that --sensitivity looks at
# Where networks and photographs lie that are not in this repo; the options tell other places.
SHARED = DATA.resolve().parent.parent / "shared"


OF_TIMM = ("checkpoint", "calibration", "image_size")  # options of `export` for timm's networks
PAPER_ONLY = ("imagenet", "class_map", "networks", "passes", "seeds", "cost")

C = TypeVar("C", QuantConfig, SearchConfig)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ValueError(f"{message}; {self.prog} --help says what is possible")


def number(kind: Any, text: str) -> Callable[[str], Any]:
    """Read an int or a float (or a text as it is); the error says what the option is."""

    def read(value: str) -> Any:
        try:
            return kind(value)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{value!r} is not a {name} ({text})") from None

    return read


def a_path(value: str) -> Path:
    """Read a path; an empty one would be the folder that one is in, which nobody means."""
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return Path(value)


def first_given(arguments: argparse.Namespace, names: Sequence[str]) -> str:
    """The flag of the first of these options that the command was given; "" for none."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False:  # 0 was given, too
            return "--" + name.replace("_", "-")
    return ""


def add_options(parser: argparse.ArgumentParser, defaults: QuantConfig | SearchConfig) -> None:
    """Add a flag for every field of a config; a flag that is not given leaves no trace."""
    group = parser.add_argument_group(type(defaults).__name__)
    for f in fields(defaults):
        kind: Any = next((k for k in get_args(f.type) if k is not types.NoneType), f.type)
        default = str(getattr(defaults, f.name)).lower() or "none"
        flag = "--" + (f.metadata["flag"] or f.name.replace("_", "-"))
        choices = f.metadata["choices"]
        more: dict[str, Any] = {
            "dest": f.name,
            "default": argparse.SUPPRESS,
            "help": f"{f.metadata['help']} (default: {default})",
        }
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
            continue
        more["metavar"] = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        group.add_argument(flag, type=number(kind, f.metadata["help"]), **more)


def options_of(base: C, arguments: argparse.Namespace) -> C:
    """A config with the flags that were given in place of its values."""
    given = {f.name: getattr(arguments, f.name) for f in fields(base) if hasattr(arguments, f.name)}
    return replace(base, **given)


def quant_of(arguments: argparse.Namespace) -> QuantConfig:
    """How the options say to quantize: the preset, with single flags in place of its values."""
    base = DEMO_QUANT if arguments.command == "demo" else QuantConfig()
    if arguments.preset is not None:
        preset = PRESETS[arguments.preset]
        base = replace(preset, weight_bits=base.weight_bits, act_bits=base.act_bits)
    return options_of(base, arguments)


def device_for(arguments: argparse.Namespace) -> torch.device:
    """The device that the options ask for; workers compute on processors, all in the same way."""
    if arguments.workers is None and arguments.scheduler is None:
        return device_of(arguments.device)
    if arguments.device not in ("auto", "cpu"):
        raise ValueError(
            f"workers compute on processors, not on {arguments.device}; omit --workers and "
            "--scheduler, or give --device cpu"
        )
    return torch.device("cpu")


def source_of(arguments: argparse.Namespace) -> Source:
    """What the options say is to be searched."""
    from evolq_lite.runs.source import Embedded, Folders

    seed = options_of(SearchConfig(), arguments).seed
    if arguments.command == "demo":
        return Embedded(arguments.model, arguments.calibration_images, seed)
    return Folders.at(
        arguments.model,
        arguments.checkpoint,
        arguments.calibration,
        arguments.test,
        arguments.class_map,
        arguments.calibration_images,
        arguments.test_images,
        seed,
        arguments.image_size,
        crop_of(arguments),
    )


def crop_of(arguments: argparse.Namespace) -> float | None:
    """The share of an image that is kept; the official script keeps less of DeiT's and LeViT's."""
    from evolq_lite.runs.source import official_crop

    if arguments.crop is None and arguments.preset == "official":
        return official_crop(arguments.model)
    return arguments.crop


def search(arguments: argparse.Namespace) -> int:
    """Quantize, calibrate, evolve, evaluate, report: the main job, of `demo` and `run`."""
    quant, config = quant_of(arguments), options_of(SearchConfig(), arguments)
    if arguments.resume and arguments.replace:
        raise ValueError("--resume keeps the run and --replace removes it; give one of them")

    from evolq_lite.bits import layer_bits, tell_bits
    from evolq_lite.convert import describe
    from evolq_lite.evolve import Evaluated
    from evolq_lite.runs.folder import RunFolder
    from evolq_lite.runs.run import Run
    from evolq_lite.runs.workers import PATIENCE, check_search
    from evolq_lite.sensitivity import sensitivity, tell_sensitivity

    RunFolder.claim(arguments.out, arguments.resume, arguments.replace, arguments.lock)
    if config.searches_bits and hasattr(arguments, "weight_bits"):
        raise ValueError(
            f"--weight-bits has no effect with --search {config.search}, which takes --mean-bits; "
            "omit it"
        )
    if arguments.workers is not None or arguments.scheduler is not None:
        check_search(config)
    source, device = source_of(arguments), device_for(arguments)
    with workers_of(arguments, source.lack, PATIENCE) as workers:
        with progress(None, "images, opened", "image") as bar:
            hashes = source.check(bar.update)
        for note in source.notes():
            say(note)
        total = source.identity()["calibration_images"]
        with progress(total, "calibration images", "image") as bar:
            parts = source.load(bar.update)
        bar = progress(None, "rounding weights", "layer")
        with Run(
            source,
            quant,
            config,
            arguments.out,
            resume=arguments.resume,
            replace=arguments.replace,
            device=device,
            parts=parts,
            hashes=hashes,
            lock=arguments.lock,
            on_rounded=lambda event: bar.update(),
        ) as run:
            bar.close()
            if arguments.describe:
                say(describe(run.qmodel))
            if arguments.sensitivity:
                few = run.parts.images[:SENSITIVITY_IMAGES]
                say(tell_sensitivity(sensitivity(run.qmodel, few, layers=True)))
            refuse_float_products(run, arguments.strict)
            with progress(run.total, "search", "eval", initial=len(run.past)) as bar:
                for event in run.evolve(workers):
                    if isinstance(event, Evaluated):
                        fitness = f"{event.fitness:.5f}"
                        bar.set_postfix(block=event.block, fitness=fitness, refresh=False)
                        bar.update()
            others = {}
            if arguments.command == "demo" and quant.rounding == "nearest":
                others["GPTQ"] = run.round_start()
            with progress(len(source.labels()), "test, once", "image") as bar:
                outcome = run.test(bar.update, others)
            run.write(outcome)
    report(source, outcome)
    pictures = "fitness.png, top1.png"
    if config.searches_bits:
        say(f"\n{tell_bits(layer_bits(run.before), layer_bits(run.qmodel))}\n")
        pictures += ", bits.png"
    say(f"Written to {arguments.out}: summary.json, {pictures}, and the run itself.")
    return 0


def refuse_float_products(run: Run, strict: bool) -> None:
    """Say which matrix products stay float, if any; with `strict`, refuse them."""
    if not run.qmodel.float_products:
        return
    from evolq_lite.convert import tell_float_products

    told = tell_float_products(run.qmodel)
    if strict:
        raise ValueError(
            f"matrix products stay float ({told}); omit --strict to search the others all the same"
        )
    say(f"evolq_lite: matrix products that stay float: {told}", error=True)


def workers_of(
    arguments: argparse.Namespace, lack: Callable[[], str], patience: float
) -> AbstractContextManager[Workers | None]:
    """The workers that the options ask for, None for this process alone."""
    if arguments.scheduler is None and arguments.workers is None:
        return nullcontext()
    from evolq_lite.runs.workers import Workers

    if arguments.scheduler is not None:
        return Workers.cluster(arguments.scheduler, lack, patience)
    return Workers.local(arguments.workers, patience)


def report(source: Source, outcome: Outcome) -> None:
    """Print the table."""
    from evolq_lite.evaluate import LOSSES

    say(f"\n{source.identity()['model']}, {outcome.setting}: {source.note}\n")
    say(
        f"{'':16}{'top-1 [95 % interval]':28}{'gain over before':46}"
        f"{'evaluations':>12}{'seconds':>9}"
    )
    for name, title in outcome.titles.items():
        more = "" if name in ("float", "before") else f"{outcome.compare('before', name)!s:46}"
        if name == "evolved":
            more += f"{len(outcome.history):>12}{outcome.seconds:>9.1f}"
        say(f"{title:16}{outcome.accuracies[name]!s:28}{more}".rstrip())
    gain = outcome.gain
    say(f"\nEvolved against before: {gain.verdict}; {gain.gained} images gained, {gain.lost} lost.")
    for name, change in outcome.losses.items():
        say(
            f"{LOSSES[name]}, nats an image: "
            f"{change.was:.4f} before, {change.now:.4f} evolved; {change}: {change.verdict}."
        )
    if outcome.batches_share < 1:
        say(f"Racing computed {100 * outcome.batches_share:.0f} % of all batches.")
    if "GPTQ" in outcome.scores:
        race = outcome.compare("evolved", "GPTQ")
        say(f"GPTQ without a search, against evolved: {race}: {race.verdict}. See lesson 8.")


def reproduce(arguments: argparse.Namespace, workers: Workers | None) -> int:
    """Compute the cells of claims whose results are not there, then write figures and tables."""
    # pandas takes half a second
    from evolq_lite.experiments import (
        CLAIMS,
        KNOWN,
        ON_FOLDERS,
        real_cells,
        report,
    )

    wanted = [name.upper() for name in arguments.claims]
    if unknown := [name for name in wanted if name not in (*KNOWN, "ALL")]:
        known = ", ".join((*KNOWN, "PAPER"))
        raise ValueError(f"unknown experiment {unknown[0]!r}; known: {known}, all")
    if arguments.report and arguments.claims != ["all"]:
        raise ValueError("--report is about all results that are there; omit the experiments")
    if arguments.quick and (slow := [name for name in wanted if name in ON_FOLDERS]):
        raise ValueError(f"nothing of {slow[0]} is quick; omit --quick")
    wanted = [KNOWN[name].reads or name if name in KNOWN else name for name in wanted]
    if workers is not None and "REAL" in wanted:
        raise ValueError(
            "REAL consists of runs that share out their own work: omit --workers and --scheduler, "
            "or give them to python -m evolq_lite run"
        )
    names = {*wanted, *(CLAIMS if "ALL" in wanted else ())} if not arguments.report else {}
    claims = [claim for name, claim in KNOWN.items() if name in names]

    def watch(event: Evaluated) -> None:
        bar.set_postfix_str(f"{event.block}, fitness {event.fitness:.5f}")

    for option in ("device", "weights", "photographs"):
        if getattr(arguments, option) is None or any(name in ON_FOLDERS for name in names):
            continue
        if arguments.report:
            raise ValueError(f"--report computes nothing; omit --{option}")
        raise ValueError(
            f"--{option} is for REAL, R1 to R12 and PAPER; omit it: the others have networks and "
            "images of this repository, and are computed on processors, all in the same way"
        )
    if arguments.device is not None and workers is None:
        device_of(arguments.device)
    place = real_cells.Place(
        arguments.weights or SHARED / "weights",
        arguments.photographs or SHARED / "imagenet",
        arguments.device or "auto",
    )
    watched: dict[str, dict[str, Any]] = {"REAL": {"watch": watch}}  # its cells are whole runs
    claims = [
        real_cells.compute_at(claim, place, **watched.get(claim.name, {}))
        if claim.name in ON_FOLDERS
        else claim
        for claim in claims
    ]
    folder = arguments.out or (Path("runs/quick") if arguments.quick else report.RESULTS)
    there = [name for name, claim in KNOWN.items() if report.file_of(claim, folder).path.is_file()]
    if arguments.report and not there:
        raise ValueError(
            f"{folder} holds no results to report; give the folder that holds them as --out"
        )
    report.check_folder(folder, [claim.name for claim in claims])
    report.check_kind(folder, arguments.quick)
    with report.lock(folder):
        tasks = report.missing(claims, folder, arguments.quick)
        wanted_cells = tasks
        if arguments.weights or arguments.photographs:  # looked at, if all results are there, too
            wanted_cells = [(claim, cell) for claim in claims for cell in claim.cells(False)]
        if real := [cell for claim, cell in wanted_cells if claim.name in ON_FOLDERS]:
            with progress(None, "photographs, opened", "image") as opened:
                inputs = real_cells.check_folders(real, place, opened.update)
            report.keep_inputs(folder, inputs)
        cells = report.count(claims, arguments.quick)
        with progress(cells, "cells", "cell", initial=cells - len(tasks)) as bar:
            for cell in report.reproduce(tasks, folder, workers):
                bar.set_description(cell[:40], refresh=False)
                bar.update()
        told = report.write_report(folder, arguments.quick)
    for row in told:
        say(f"{row['claim']} {row['question']} {row['verdict'].capitalize()}. {row['sentence']}")
    say(f"Written to {folder}: README.md, claims.json, figures, and the results, line by line.")
    return 0


def reproduce_paper(arguments: argparse.Namespace) -> int:
    """Compute the cells of the paper's grid whose results are not there, then write its table."""
    from evolq_lite.experiments import paper_grid, report

    if len(arguments.claims) > 1:
        raise ValueError("PAPER has a folder and a table of its own; omit the other experiments")
    if arguments.quick or arguments.report:
        raise ValueError(
            "--quick and --report are for the claims; for less of PAPER give --networks, --seeds 1 "
            "or --passes 1"
        )
    if arguments.photographs is not None:
        raise ValueError("--photographs is for REAL and R1 to R12; PAPER reads --imagenet")
    if arguments.cost:
        return say_cost(arguments)
    if arguments.imagenet is None:
        raise ValueError("PAPER needs ImageNet: give --imagenet DIR, with train/ and val/ in it")
    alone = arguments.workers is None and arguments.scheduler is None
    if alone:
        device_of("auto" if arguments.device is None else arguments.device)

    def watch(event: Evaluated) -> None:
        bar.set_postfix_str(f"{event.block}, fitness {event.fitness:.5f}")

    folder = arguments.out or Path("runs/paper")
    grid = paper_grid.Grid.at(
        arguments.imagenet,
        arguments.weights or SHARED / "weights",
        folder,
        arguments.class_map,
        arguments.networks or (),
        arguments.device or "auto",
        paper_grid.PASSES if arguments.passes is None else arguments.passes,
        paper_grid.SEEDS if arguments.seeds is None else arguments.seeds,
        watch if alone else None,
    )
    with progress(grid.test_images, "validation images, opened", "image") as opened:
        grid.check(opened.update)
    report.check_folder(folder, [grid.name], paper_grid.HEADING)
    with report.lock(folder), workers_of(arguments, grid.lack, GRID_PATIENCE) as workers:
        left, cells = grid.missing(), len(grid.cells())
        if left:
            report.keep_inputs(folder, grid.inputs(left))
        with progress(cells, "cells", "cell", initial=cells - len(left)) as bar:
            for cell in report.reproduce([(grid, cell) for cell in left], folder, workers):
                bar.set_description(cell[:60], refresh=False)
                bar.update()
                grid.write_page()
        page = grid.write_page()
    say(f"Written to {folder}: {page.name}, the results line by line, and every run in runs/.")
    return 0


def say_cost(arguments: argparse.Namespace) -> int:
    """Say what a cell of each network costs, without computing one."""
    from evolq_lite.experiments import paper_cost, paper_grid, report

    useless = ("imagenet", "class_map", "weights", "seeds", "device", "workers", "scheduler", "out")
    if flag := first_given(arguments, useless):
        raise ValueError(f"{flag} has no effect with --cost, which computes nothing; omit it")
    passes = paper_grid.PASSES if arguments.passes is None else arguments.passes
    paper_grid.check_counts(passes, paper_grid.SEEDS)
    names = arguments.networks or paper_grid.NETWORKS
    networks = list(dict.fromkeys(paper_grid.find_network(name) for name in names))
    say(report.to_markdown(paper_cost.tabulate(networks, passes)))
    return 0


def convert_file(arguments: argparse.Namespace) -> int:
    """Write a checkpoint as safetensors, and say what was taken and what was left."""
    from evolq_lite.checkpoints import convert_checkpoint

    say(
        convert_checkpoint(
            arguments.source,
            arguments.target,
            ema=arguments.ema,
            key=arguments.key,
            replace=arguments.replace,
        )
    )
    return 0


def export_file(arguments: argparse.Namespace) -> int:
    """Write a run's network, or one quantized here, as an ONNX file."""
    out: Path = arguments.out
    check_target(out)  # all that can be refused is refused before minutes of calibration
    if out.exists() and not arguments.replace:
        raise ValueError(f"{out} exists; give another --out, or add --replace")
    from evolq_lite.export import export_onnx, require_extra

    require_extra()
    shipment = ship(arguments)
    export_onnx(
        shipment.qmodel,
        out,
        shipment.example,
        weights=arguments.weights,
        float_points=getattr(arguments, "float_points", ""),
        facts=shipment.facts,
    )
    say(f"Written to {out}: {out.stat().st_size / 1e6:.2f} MB.")
    return 0


def ship(arguments: argparse.Namespace) -> Shipment:
    """The network that `export` shall write: a run's, an embedded one, or a timm model."""
    from evolq_lite.export import check_packing, check_request
    from evolq_lite.runs.shipping import make_shipment, open_run, read_run

    path = Path(arguments.source)
    floats = getattr(arguments, "float_points", "")
    if not path.is_dir():
        quant, source = quant_of(arguments), shipped_source(arguments)
        kinds = check_request(quant, arguments.weights, floats)
        if arguments.weights == "int4":
            check_packing(quant, kinds)
        return make_shipment(source, quant)
    given = [f.name for f in fields(QuantConfig) if hasattr(arguments, f.name)]
    given += [
        name for name in ("preset", *OF_TIMM, "calibration_images") if getattr(arguments, name)
    ]
    if more := [name for name in given if name != "float_points"]:
        raise ValueError(
            f"{path} is a run, which knows its {more[0].replace('_', ' ')}; "
            f"omit --{more[0].replace('_', '-')}"
        )
    run = read_run(path)
    kinds = check_request(run.quant, arguments.weights, floats)
    if arguments.weights == "int4" and not run.search.searches_bits:
        check_packing(run.quant, kinds)
    return open_run(run)


def shipped_source(arguments: argparse.Namespace) -> Source:
    """The float network and the calibration images of `export` without a run."""
    from evolq_lite.data import DEMO_MODELS
    from evolq_lite.runs.source import Embedded, Folders

    name, calibration = arguments.source, arguments.calibration
    if name in DEMO_MODELS:
        if given := [option for option in OF_TIMM if getattr(arguments, option)]:
            raise ValueError(
                f"{name} is embedded, with its {given[0].replace('_', ' ')}; "
                f"omit --{given[0].replace('_', '-')}"
            )
        return Embedded(name, arguments.calibration_images or DEMO_IMAGES)
    if calibration is None:
        raise ValueError(
            f"{name} is neither the folder of a run nor an embedded network "
            f"({', '.join(DEMO_MODELS)}); for a network of timm give --calibration DIR"
        )
    return Folders.at(
        name,
        arguments.checkpoint,
        calibration,
        calibration,  # no test image is read
        None,
        arguments.calibration_images,
        image_size=arguments.image_size,
    )


def verify_file(arguments: argparse.Namespace) -> int:
    """Say what an exported file gets right, and whether that is what its run got right."""
    from evolq_lite.deployed import Deployed
    from evolq_lite.runs.shipping import verify

    if arguments.class_map is not None and arguments.test is None:
        raise ValueError("--class-map names the folders of --test DIR; give that too, or omit it")
    network = Deployed(arguments.file)
    facts = network.facts
    quant = facts.get("quantization") or {}
    say(
        f"{facts.get('network')}, W{quant.get('weight_bits')}A{quant.get('act_bits')}, weights as "
        f"{facts.get('weights')}, digest {str(facts.get('digest'))[:16]}"
    )
    with progress(None, "test", "image") as bar:
        verdict = verify(network, arguments.test, arguments.class_map, bar.update)
    say(f"{arguments.file}: {verdict}.")
    return 0


def check() -> int:
    """Say whether this machine is ready, and what to do if not."""
    from evolq_lite.data import DEMO_MODELS, checked, demo_file

    ready = True
    state = environment()
    versions = ", ".join(f"{k} {v}" for k, v in state["versions"].items())
    say(f"python {state['python']}, {versions}")
    lock = Path(__file__).resolve().parents[1] / "requirements.lock"
    pins = (
        dict(line.split("==") for line in lock.read_text().split() if "==" in line)
        if lock.is_file()
        else {}
    )
    for package, wanted in pins.items():
        try:
            have = version(package).split("+")[0]
        except ModuleNotFoundError:
            have = "missing"
        if have != wanted:
            say(
                f"  note: {package} is {have}, the lock says {wanted}; "
                "results may differ in the last digits"
            )
    if advice := torchvision_advice():
        say(f"  note: {advice}")
    say(f"  threads: {UNBOUND or 'OK, their spin is bounded, so a busy machine is no trouble'}")
    for name in ("typefaces-train.npz", "typefaces-test.npz", *map(demo_file, DEMO_MODELS)):
        try:
            checked(name)
            say(f"  data: {name} is OK")
        except ValueError as error:
            ready = False
            say(f"  data: {error}")
    say(
        f"  processor: {state['processor']}, {state['vector_instructions']}, "
        f"{state['threads']} threads"
    )
    reasons = {bits: missing(bits) for bits in range(2, 9)}
    exact = [str(bits) for bits, reason in reasons.items() if not reason]
    say(f"  integer execution: for weights of {', '.join(exact) or 'no'} bits")
    for reason in sorted({reason for reason in reasons.values() if reason}):
        say(f"    otherwise simulated: {reason}")
    say("Ready." if ready else "Not ready: see above.")
    return 0 if ready else 2


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(prog="python -m evolq_lite", description=__doc__)
    top.add_argument("--version", action="version", version=f"evolq_lite {__version__}")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="{demo,run,reproduce,export,verify,convert,check}"
    )
    demo = commands.add_parser(
        "demo", help="the embedded network: search, then one table and two figures, offline"
    )
    demo.add_argument(
        "--model", default="vit", metavar="{vit,cnn}", help="embedded network (default: vit)"
    )
    demo.add_argument(
        "--calibration-images",
        type=number(int, "2 or more"),
        default=DEMO_IMAGES,
        help=f"default: {DEMO_IMAGES}",
    )
    own = commands.add_parser(
        "run", help="any timm ViT, DeiT, Swin, LeViT, ResNet or RegNet on folders of images"
    )
    own.add_argument("--model", required=True, help="timm name, such as deit_tiny_patch16_224")
    own.add_argument(
        "--checkpoint",
        type=a_path,
        help="weights with timm's key names (default: timm's pretrained ones)",
    )
    own.add_argument(
        "--calibration",
        type=a_path,
        required=True,
        help="folder of calibration images, labels unused",
    )
    own.add_argument(
        "--test", type=a_path, required=True, help="folder of test images, one folder a class"
    )
    own.add_argument(
        "--class-map", type=a_path, help="file of class folders in index order, if some are missing"
    )
    own.add_argument(
        "--calibration-images",
        type=number(int, "2 or more"),
        help="drawn by seed (default: 1000, or all if fewer)",
    )
    own.add_argument(
        "--image-size",
        type=number(int, "8 to 4096"),
        help="pixels, where the checkpoint does not tell (default: what it tells, or timm's)",
    )
    own.add_argument(
        "--crop",
        type=number(float, "0.1 to 1"),
        help="share of the shorter side of an image that is kept (default: timm's, mostly 0.9; "
        f"with --preset official {OFFICIAL_CROP} for DeiT and LeViT)",
    )
    own.add_argument(
        "--test-images", type=number(int, "2 or more"), help="a fixed random subset (default: all)"
    )
    for command, default in ((demo, Path("runs/demo")), (own, Path("runs/run"))):
        command.add_argument(
            "--out", type=a_path, default=default, help=f"run folder (default: {default})"
        )
        command.add_argument(
            "--resume", action="store_true", help="continue the stopped run in --out"
        )
        command.add_argument("--replace", action="store_true", help="remove the run in --out first")
        command.add_argument(
            "--threads",
            type=number(int, "1 to 1024"),
            help="processor threads (default: torch's choice)",
        )
        command.add_argument(
            "--device", default="auto", help="cpu, cuda, mps; auto: cuda if there is one, else cpu"
        )
        command.add_argument(
            "--describe", action="store_true", help="print every quantization point"
        )
        command.add_argument(
            "--sensitivity",
            action="store_true",
            help="print what each kind of point, and each layer's weights, costs; then search",
        )
        command.add_argument(
            "--preset",
            choices=sorted(PRESETS),
            help="how to quantize, by name; single options win over it",
        )
        command.add_argument(
            "--strict",
            action="store_true",
            help="refuse a network in which a matrix product stays float",
        )
        command.add_argument(
            "--no-lock",
            dest="lock",
            action="store_false",
            help="for a file system without locks, if no other run will use the folder",
        )
        add_options(command, DEMO_QUANT if command is demo else QuantConfig())
        add_options(command, SearchConfig())
    again = commands.add_parser(
        "reproduce", help="the paper's claims as experiments, on the embedded networks"
    )
    again.add_argument(
        "claims",
        nargs="*",
        default=["all"],
        metavar="C1 ... C12 | all | REAL | R1 ... R12 | PAPER",
        help="default: all; REAL, R1 to R12: real networks, need the two folders below; PAPER: the "
        "paper's whole grid, needs --imagenet",
    )
    again.add_argument("--quick", action="store_true", help="few small cells, to try it")
    again.add_argument(
        "--report", action="store_true", help="compute nothing: figures and tables of what is there"
    )
    again.add_argument(
        "--out", type=a_path, help="results (default: data/results; PAPER: runs/paper)"
    )
    again.add_argument("--threads", type=number(int, "1 to 1024"), help="processor threads")
    again.add_argument(
        "--weights",
        type=a_path,
        help="REAL, R1 to R12, PAPER: folder of checkpoints",
    )
    again.add_argument(
        "--photographs",
        type=a_path,
        help="REAL, R1 to R12: folder with calibration/, validation/ and wnids.txt",
    )
    again.add_argument(
        "--device",
        help="REAL, R1 to R12, PAPER: cpu, cuda, mps (default: cuda if there is one, else cpu)",
    )
    paper = again.add_argument_group("PAPER")
    paper.add_argument(
        "--imagenet", type=a_path, metavar="DIR", help="folder of ImageNet, with train/ and val/"
    )
    paper.add_argument(
        "--class-map", type=a_path, help="file of class folders in index order, if some are missing"
    )
    paper.add_argument(
        "--networks", nargs="+", metavar="NAME", help="of the paper or of timm (default: all 11)"
    )
    paper.add_argument("--passes", type=number(int, "1 or more"), help="default: 10, the paper's")
    paper.add_argument("--seeds", type=number(int, "1 or more"), help="default: 3, from 0 on")
    paper.add_argument("--cost", action="store_true", help="say what it costs, compute nothing")
    for command in (demo, own, again):
        command.add_argument(
            "--workers",
            type=number(int, "1 or more"),
            help="compute in so many processes of one thread each (default: in this one)",
        )
        command.add_argument(
            "--scheduler", help="compute on the workers of a Dask scheduler, tcp://host:port"
        )
    turn = commands.add_parser(
        "convert", help="a checkpoint of any kind as safetensors, running nothing that is in it"
    )
    turn.add_argument("source", type=a_path, metavar="FILE.pth", help="what torch.save has written")
    turn.add_argument("target", type=a_path, metavar="FILE.safetensors", help="what to write")
    turn.add_argument("--ema", action="store_true", help="take the averaged weights")
    turn.add_argument("--key", help="take the weights under this name in the file")
    turn.add_argument("--replace", action="store_true", help="write over FILE.safetensors")
    away = commands.add_parser("export", help="a run's network as an ONNX file (extra: export)")
    away.add_argument(
        "source",
        metavar="RUN_OR_MODEL",
        help="folder of a run, or vit, cnn (embedded), or timm's name with --calibration",
    )
    away.add_argument(
        "--out", type=a_path, required=True, metavar="FILE.onnx", help="what to write"
    )
    away.add_argument("--replace", action="store_true", help="write over FILE.onnx")
    away.add_argument(
        "--weights",
        default=EXPORTED_WEIGHTS[0],
        metavar="{" + ",".join(EXPORTED_WEIGHTS) + "}",
        help="a byte for each weight, or half a byte for those of 2 to 4 bits (default: int8)",
    )
    away.add_argument("--checkpoint", type=a_path, help="of a timm network, as in run")
    away.add_argument("--calibration", type=a_path, help="of a timm network, as in run")
    away.add_argument(
        "--calibration-images", type=number(int, "2 or more"), help="without a run, as in run"
    )
    away.add_argument("--image-size", type=number(int, "8 to 4096"), help="as in run")
    away.add_argument(
        "--preset", choices=sorted(PRESETS), help="how to quantize, without a run, by name"
    )
    add_options(away, QuantConfig())
    look = commands.add_parser("verify", help="top-1 of an exported file, from the file alone")
    look.add_argument("file", type=a_path, metavar="FILE.onnx")
    look.add_argument(
        "--test", type=a_path, help="folder of test images, one folder a class (default: embedded)"
    )
    look.add_argument("--class-map", type=a_path, help="as in run; default: what the file says")
    for command in (away, look):
        command.add_argument("--threads", type=number(int, "1 to 1024"), help="processor threads")
    commands.add_parser("check", help="is this machine ready?")
    return top


def begun(arguments: argparse.Namespace) -> bool:
    """Whether the command's run folder holds a run that --resume could continue."""
    return arguments.command in ("demo", "run") and (arguments.out / "config.json").is_file()


def how_to_resume(arguments: argparse.Namespace) -> str:
    """How to continue what was stopped."""
    if arguments.command == "reproduce":
        return "; the same command continues with the next cell"
    if arguments.command in ("export", "convert", "verify", "check"):
        return "; give the same command again"  # no run, nothing to continue
    if begun(arguments):
        how = "--resume in place of --replace" if arguments.replace else "--resume"
        return f"; the same command with {how} continues after the last evaluation"
    return " before the run began"


def another_out(arguments: argparse.Namespace, error: OSError) -> str:
    """What to try where a file could not be read or written that may be one below --out."""
    out = getattr(arguments, "out", None)
    if out is None:
        return ""
    file = Path(error.filename or out).absolute()
    return ", or give another --out" if file.is_relative_to(Path(out).absolute()) else ""


def interrupt(*_: object) -> NoReturn:
    """What SIGTERM does: the same as Ctrl-C."""
    raise KeyboardInterrupt


def dispatch(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed."""
    if arguments.command == "check":
        return check()
    if arguments.command == "convert":
        return convert_file(arguments)
    fix_kernels()
    if arguments.threads is not None:
        if not 1 <= arguments.threads <= 1024:
            raise ValueError(f"--threads must be from 1 to 1024, not {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if arguments.command in ("export", "verify"):
        return export_file(arguments) if arguments.command == "export" else verify_file(arguments)
    if arguments.scheduler is not None and arguments.workers is not None:
        raise ValueError("--scheduler has workers of its own; give it or --workers, not both")
    if arguments.command != "reproduce":
        return search(arguments)
    if "PAPER" in map(str.upper, arguments.claims):
        return reproduce_paper(arguments)
    if flag := first_given(arguments, PAPER_ONLY):
        raise ValueError(f"{flag} is for PAPER; omit it, or name PAPER in place of the others")
    from evolq_lite.runs.source import Embedded

    with workers_of(arguments, Embedded().lack, CELL_PATIENCE) as workers:
        return reproduce(arguments, workers)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    with suppress(ValueError):  # in a thread that is not the main one
        signal.signal(signal.SIGTERM, interrupt)
    arguments = argparse.Namespace(command=None)
    try:
        arguments = parser().parse_args(argv)
        return dispatch(arguments)
    except KeyboardInterrupt:
        say(f"\nevolq_lite: stopped{how_to_resume(arguments)}", error=True)
        return 130
    except RuntimeError as error:
        from evolq_lite.runs.workers import LostWorkers

        if not isinstance(error, LostWorkers):
            raise
        say(f"evolq_lite: {printable(error)}{how_to_resume(arguments)}", error=True)
    except OSError as error:
        hint = "" if error.errno is None else f"; check the path{another_out(arguments, error)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"; free some space{how_to_resume(arguments)}"
        named = (
            f"{error.strerror}: {error.filename}"
            if error.strerror and error.filename
            else str(error)
        )
        say(f"evolq_lite: {printable(named)}{hint}", error=True)
    except ValueError as error:
        say(f"evolq_lite: {printable(error)}", error=True)
    return 2
