"""The command line: `python -m evolq_lite demo | run | reproduce | check`.

Flags are made from the dataclasses of `config`. Every command that searches does the same:
quantize, calibrate, evolve on calibration images, then read the test images once and say what was
gained. Bad input gets one sentence and exit status 2.
"""

import argparse
import errno
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from tqdm import tqdm

from evolq_lite._torchvision import torchvision_advice
from evolq_lite.checkpoints import convert_checkpoint
from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.convert import describe
from evolq_lite.data import (
    DATA,
    DEMO_MODELS,
    check_images,
    checked,
    demo_file,
    hash_images,
    load_images,
    subset,
    transform_of,
)
from evolq_lite.evolve import Evaluation
from evolq_lite.files import sha256
from evolq_lite.folders import label_images, list_folder
from evolq_lite.integer import missing
from evolq_lite.networks import load_network
from evolq_lite.parallel import PATIENCE, LostWorkers, Pool
from evolq_lite.record import RunFolder, environment, fix_kernels
from evolq_lite.runs import (
    BATCH,
    DEMO_IMAGES,
    DEMO_QUANT,
    Outcome,
    Run,
    Task,
    calibration_paths,
    embedded_ready,
    embedded_task,
    folder_parts,
    folder_ready,
)
from evolq_lite.terminal import progress, say

# Seconds that a cell of an experiment may take on a worker before it counts as hanging.
CELL_PATIENCE = 7200.0
# Where networks and photographs lie that are not in this repo; the options tell other places.
SHARED = DATA.resolve().parent.parent / "shared"


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


def add_options(parser: argparse.ArgumentParser, defaults: QuantConfig | SearchConfig) -> None:
    """Add a flag for every field of a config."""
    group = parser.add_argument_group(type(defaults).__name__)
    for f in fields(defaults):
        kind: Any = next((k for k in get_args(f.type) if k is not types.NoneType), f.type)
        value = getattr(defaults, f.name)
        flag, text = (
            "--" + f.name.replace("_", "-"),
            f"{f.metadata['help']} (default: {str(value).lower()})",
        )
        if kind is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=value, help=text
            )
        else:
            names = (
                "{" + ",".join(f.metadata["choices"]) + "}"
                if f.metadata["choices"]
                else str(kind.__name__).upper()
            )
            group.add_argument(
                flag, type=number(kind, f.metadata["help"]), default=value, metavar=names, help=text
            )


def options_of(cls: type[Any], arguments: argparse.Namespace) -> Any:
    """Build a config from the flags."""
    return cls(**{f.name: getattr(arguments, f.name) for f in fields(cls)})


def device_for(arguments: argparse.Namespace) -> torch.device:
    """The device that the options ask for; workers compute on processors, all in the same way."""
    if arguments.workers is None and arguments.scheduler is None:
        return device_of(arguments.device)
    if arguments.device not in ("auto", "cpu"):
        raise ValueError(
            f"workers compute on processors, not on {arguments.device}; leave --workers and "
            "--scheduler away, or give --device cpu"
        )
    return torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device of that name, "auto" being CUDA if there is one; ValueError if torch has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        float(probe)  # "meta" has no numbers
        return probe.device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not possible ({why}); give cpu, or auto") from None


def demo_task(arguments: argparse.Namespace) -> Task:
    """The embedded network on Typefaces-62."""
    device = device_for(arguments)
    return embedded_task(arguments.model, arguments.calibration_images, arguments.seed, device)


def folder_task(arguments: argparse.Namespace) -> Task:
    """Any supported timm network on folders of images."""
    calibration, test = list_folder(arguments.calibration), list_folder(arguments.test)
    if len(calibration.paths) < 2:
        raise ValueError(
            f"{arguments.calibration} holds 1 image; give at least 2: infoNCE compares images"
        )
    device = device_for(arguments)
    loaded = load_network(arguments.model, arguments.checkpoint, arguments.image_size)
    model = loaded.model.to(device)
    transform = transform_of(model)
    test = label_images(test, int(model.num_classes), arguments.class_map)  # type: ignore[arg-type]
    paths, labels = test.paths, test.labels
    assert labels is not None
    chosen = calibration_paths(arguments.calibration, arguments.calibration_images, arguments.seed)
    wanted = len(chosen)
    if arguments.test_images is not None:
        picked = subset(len(paths), arguments.test_images, 0, "test images").sort().values
        paths, labels = [paths[int(i)] for i in picked], labels[picked]
    with progress(len(chosen) + len(paths), "images, opened", "image") as bar:
        digests = [check_images(files, bar.update) for files in (chosen, paths)]
    with progress(len(chosen), "calibration images", "image") as bar:
        images = load_images(chosen, transform, bar.update).to(device)
    for note in (*loaded.notes, *test.notes):
        say(note)
    for listing in (calibration, test):
        if listing.left_out:
            say(f"Left out of {listing.folder}: {listing.omissions}.")
    with tqdm(total=len(chosen), desc="float network", unit="image") as bar, torch.no_grad():
        parts = []
        for x in images.split(BATCH):
            parts.append(model(x))
            bar.update(len(x))
    names = ("model", "checkpoint", "calibration", "test", "class_map", "image_size")
    source = {
        name: str(v) if (v := getattr(arguments, name)) is not None else None for name in names
    }
    return Task(
        {**source, "calibration_images": wanted, "test_images": arguments.test_images},
        {
            **({"checkpoint": sha256(arguments.checkpoint)} if arguments.checkpoint else {}),
            "calibration images": hash_images(digests[0]),
            "test images": hash_images(digests[1], labels),
        },
        model,
        images,
        torch.cat(parts),
        lambda batch: (
            load_images(paths[i : i + batch], transform).to(device)
            for i in range(0, len(paths), batch)
        ),
        lambda: labels,
        f"{len(paths):,}-image check on {arguments.test}",
        folder_parts,
        (
            arguments.model,
            *map(absolute, (arguments.checkpoint, arguments.calibration)),
            wanted,
            arguments.seed,
            arguments.image_size,
        ),
    )


def absolute(path: Path | None) -> str | None:
    """A path as workers must know it, who may have started elsewhere."""
    return None if path is None else str(path.absolute())


def run(task: Task, arguments: argparse.Namespace, pool: Pool | None) -> int:
    """Quantize, calibrate, evolve, evaluate, report: the main job."""
    quant, search = options_of(QuantConfig, arguments), options_of(SearchConfig, arguments)
    with Run(task, quant, search, arguments.out, arguments.resume, arguments.replace) as whole:
        if arguments.describe:
            print(describe(whole.qmodel))
        searched(whole, pool)
        with tqdm(total=len(task.labels()), desc="test, once", unit="image") as bar:
            outcome = whole.test(bar.update)
        report(task, outcome)
        whole.write(outcome)
    print(f"Written to {arguments.out}: summary.json, fitness.png, top1.png, and the run itself.")
    return 0


def searched(whole: Run, pool: Pool | None) -> None:
    """Search to the end behind a progress bar."""
    bar = tqdm(total=whole.total, initial=len(whole.past), desc="search", unit="evaluation")
    with bar:

        def on_evaluation(e: Evaluation) -> None:
            bar.set_postfix(block=e.block, fitness=f"{e.fitness:.5f}", refresh=False)
            bar.update()

        whole.evolve(on_evaluation, pool)


def pool_of(arguments: argparse.Namespace) -> AbstractContextManager[Pool | None]:
    """The workers that the options ask for, None for this process alone."""
    patience = CELL_PATIENCE if arguments.command == "reproduce" else PATIENCE
    if arguments.scheduler is not None:
        files = [absolute(getattr(arguments, name, None)) for name in ("checkpoint", "calibration")]
        networks = [arguments.model] if arguments.command == "demo" else ["vit", "cnn"]
        ready = (
            partial(folder_ready, *files)
            if arguments.command == "run"
            else partial(embedded_ready, *networks)
        )
        return Pool.cluster(arguments.scheduler, ready, patience)
    return nullcontext() if arguments.workers is None else Pool.local(arguments.workers, patience)


def report(task: Task, outcome: Outcome) -> None:
    """Print the table."""
    gain, evaluations = outcome.gain, len(outcome.history)
    print(f"\n{task.source['model']}, {outcome.setting}: {task.note}\n")
    print(
        f"{'':16}{'top-1 [95 % interval]':28}{'gain over before':46}"
        f"{'evaluations':>12}{'seconds':>9}"
    )
    for name, title in outcome.titles.items():
        evolved = name == "evolved"
        more = f"{gain!s:46}{evaluations:>12}{outcome.seconds:>9.1f}" if evolved else ""
        print(f"{title:16}{outcome.accuracies[name]!s:28}{more}")
    print(
        f"\nEvolved against before: {gain.verdict}; {gain.gained} images gained, {gain.lost} lost."
    )


def convert_file(arguments: argparse.Namespace) -> int:
    """Write a checkpoint as safetensors, and say what was taken and what was left."""
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


def check() -> int:
    """Say whether this machine is ready, and what to do if not."""
    ready = True
    state = environment()
    versions = ", ".join(f"{k} {v}" for k, v in state["versions"].items())
    print(f"python {state['python']}, {versions}")
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
            print(
                f"  note: {package} is {have}, the lock says {wanted}; "
                "results may differ in the last digits"
            )
    if advice := torchvision_advice():
        print(f"  note: {advice}")
    for name in ("typefaces-train.npz", "typefaces-test.npz", *map(demo_file, DEMO_MODELS)):
        try:
            checked(name)
            print(f"  data: {name} is as it should be")
        except ValueError as error:
            ready = False
            print(f"  data: {error}")
    print(
        f"  processor: {state['processor']}, {state['vector_instructions']}, "
        f"{state['threads']} threads"
    )
    reasons = {bits: missing(bits) for bits in range(2, 9)}
    exact = [str(bits) for bits, reason in reasons.items() if not reason]
    print(f"  integer execution: for weights of {', '.join(exact) or 'no'} bits")
    for reason in sorted({reason for reason in reasons.values() if reason}):
        print(f"    otherwise simulated: {reason}")
    print("Ready." if ready else "Not ready: see above.")
    return 0 if ready else 2


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = Parser(prog="python -m evolq_lite", description=__doc__)
    commands = top.add_subparsers(
        dest="command", required=True, metavar="{demo,run,reproduce,convert,check}"
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
        "run", help="any timm ViT, DeiT, Swin, LeViT or ResNet on folders of images"
    )
    own.add_argument("--model", required=True, help="timm name, such as deit_tiny_patch16_224")
    own.add_argument(
        "--checkpoint",
        type=Path,
        help="weights with timm's key names (default: timm's pretrained ones)",
    )
    own.add_argument(
        "--calibration",
        type=Path,
        required=True,
        help="folder of calibration images, labels unused",
    )
    own.add_argument(
        "--test", type=Path, required=True, help="folder of test images, one folder a class"
    )
    own.add_argument(
        "--class-map", type=Path, help="file of class folders in index order, if some are missing"
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
        "--test-images", type=number(int, "2 or more"), help="a fixed random subset (default: all)"
    )
    for command, default in ((demo, Path("runs/demo")), (own, Path("runs/run"))):
        command.add_argument(
            "--out", type=Path, default=default, help=f"run folder (default: {default})"
        )
        command.add_argument(
            "--resume", action="store_true", help="go on with the stopped run in --out"
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
        add_options(command, DEMO_QUANT if command is demo else QuantConfig())
        add_options(command, SearchConfig())
    again = commands.add_parser(
        "reproduce", help="the paper's claims as experiments, on the embedded networks"
    )
    again.add_argument(
        "claims",
        nargs="*",
        default=["all"],
        metavar="C1 ... C8 | all | REAL",
        help="default: all; REAL: real networks, needs the two folders below",
    )
    again.add_argument("--quick", action="store_true", help="few small cells, to try it")
    again.add_argument(
        "--report", action="store_true", help="compute nothing: figures and tables of what is there"
    )
    again.add_argument("--out", type=Path, help="results (default: data/results)")
    again.add_argument("--threads", type=number(int, "1 to 1024"), help="processor threads")
    again.add_argument(
        "--weights", type=Path, default=SHARED / "weights", help="REAL: folder of checkpoints"
    )
    again.add_argument(
        "--photographs",
        type=Path,
        default=SHARED / "imagenet",
        help="REAL: folder with calibration/, validation/ and wnids.txt",
    )
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
    turn.add_argument("source", type=Path, metavar="FILE.pth", help="what torch.save has written")
    turn.add_argument("target", type=Path, metavar="FILE.safetensors", help="what to write")
    turn.add_argument("--ema", action="store_true", help="take the averaged weights")
    turn.add_argument("--key", help="take the weights under this name in the file")
    turn.add_argument("--replace", action="store_true", help="write over FILE.safetensors")
    commands.add_parser("check", help="is this machine ready?")
    return top


def begun(arguments: argparse.Namespace) -> bool:
    """Whether the command's run folder holds a run that --resume could go on with."""
    return arguments.command in ("demo", "run") and (arguments.out / "config.json").is_file()


def way_on(arguments: argparse.Namespace) -> str:
    """How to go on with what was stopped."""
    if arguments.command == "reproduce":
        return "; the same command goes on with the next cell"
    if begun(arguments):
        how = "--resume in place of --replace" if arguments.replace else "--resume"
        return f"; the same command with {how} goes on from the last finished block"
    return " before the run began"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        arguments = parser().parse_args(argv)
        if arguments.command == "check":
            return check()
        if arguments.command == "convert":
            return convert_file(arguments)
        fix_kernels()
        if arguments.threads is not None:
            if not 1 <= arguments.threads <= 1024:
                raise ValueError(f"--threads must be from 1 to 1024, not {arguments.threads}")
            torch.set_num_threads(arguments.threads)
        if arguments.scheduler is not None and arguments.workers is not None:
            raise ValueError("--scheduler has workers of its own; give it or --workers, not both")
        if arguments.command == "reproduce":
            with pool_of(arguments) as pool:
                from evolq_lite.experiments import command

                return command.reproduce(arguments, pool)
        options_of(QuantConfig, arguments), options_of(SearchConfig, arguments)  # before any work
        if arguments.resume and arguments.replace:
            raise ValueError("--resume keeps the run and --replace removes it; give one of them")
        RunFolder.claim(arguments.out, arguments.resume, arguments.replace)
        with pool_of(arguments) as pool:
            task = (demo_task if arguments.command == "demo" else folder_task)(arguments)
            return run(task, arguments, pool)
    except KeyboardInterrupt:
        print(f"\nevolq_lite: stopped{way_on(arguments)}", file=sys.stderr)
        return 130
    except LostWorkers as error:
        print(f"evolq_lite: {error}{way_on(arguments)}", file=sys.stderr)
        return 2
    except OSError as error:
        hint = "; check the path, or give another --out" if error.errno is not None else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"; free some space{way_on(arguments)}"
        named = (
            f"{error.strerror}: {error.filename}"
            if error.strerror and error.filename
            else str(error)
        )
        print(f"evolq_lite: {named}{hint}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"evolq_lite: {error}", file=sys.stderr)
        return 2
