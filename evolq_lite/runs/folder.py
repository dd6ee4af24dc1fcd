"""A run as a folder, written so that a stopped run resumes and a reader can check what was done.

| file | holds |
|---|---|
| `config.json` | model, data, quantization and search options |
| `environment.json` | versions, processor, threads, attention mode, dtype, hashes of the files |
| `history.jsonl` | one line per evaluation: **the run** |
| `scales.safetensors` | scales and zero points after the last finished visit, and chosen integers |
| `summary.json` | the result, once the test images have been read |

The history is all that a run needs to go on: `evolve` replays it. Each line carries a checksum of
itself and of all before it, from the config on, so a line that was cut, changed, moved, or that
comes from another run is noticed; it and what is behind it is dropped, and computed again to the
same end. Whole files are written under a temporary name and renamed. The folder is locked while a
run is in it.
"""

import errno
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from zlib import crc32

from filelock import FileLock, Timeout

from evolq_lite.config import QuantConfig, SearchConfig
from evolq_lite.evolve import Evaluated
from evolq_lite.files import checksum_of, in_line, parse_json, seal, unseal, write_whole
from evolq_lite.runs.environment import kernels_of

FORMAT = 2  # of the folder; version 0.1 had no such number, and snapshots instead of a history
OWN = (
    "config.json",
    "environment.json",
    "history.jsonl",
    "scales.safetensors",
    "summary.json",
    "fitness.png",
    "top1.png",
    "bits.png",
)
OLD = ("scales.previous.safetensors",)  # what version 0.1 wrote besides
LOCK = ".lock"
LEFT = {LOCK, *(f".{name}.new" for name in OWN)}  # what a process that was killed may leave
ANEW = "start over with another --out"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
log = logging.getLogger("evolq_lite")


class Busy(FileExistsError):
    """Another run is at work in a folder."""


class RunFolder:
    """A run's folder. `create` refuses one that exists, `resume` one with another config.

    Both lock it until `close`, or until the process ends, whatever ends it; `lock=False` is for
    file systems that know no locks.
    """

    def __init__(self, path: Path, lock: bool = True) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, 0, thread_local=False) if lock else None
        self.checksum = 0  # of the history so far

    def close(self) -> None:
        """Let others in. The lock's file stays: who removed it could remove the next one's lock."""
        if self._lock is not None:
            self._lock.release(force=True)

    def _enter(self) -> None:
        """Lock the folder; Busy while another run is in it, OSError if it cannot be locked."""
        if self._lock is None:
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise Busy(
                f"another run is at work in {self.path}; wait for it, or give another --out"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            raise OSError(
                f"{self.path} lies on a file system without locks ({error}); give --out on another "
                "one, or add --no-lock if no other run will use the folder"
            ) from None

    @classmethod
    def create(
        cls, path: Path | str, config: Mapping[str, Any], replace: bool = False, lock: bool = True
    ) -> "RunFolder":
        """Make the folder and write its config; FileExistsError if it already holds a run.

        `replace` removes that run first.
        """
        path = Path(path)
        made, folder = not path.exists(), cls(path, lock)
        path.mkdir(parents=True, exist_ok=True)
        entered = False
        try:
            folder._enter()
            entered = True
            if replace:
                cls.remove(path)
            there = sorted({p.name for p in path.iterdir()} - LEFT)
            if "config.json" in there:
                raise FileExistsError(
                    f"{path} exists; give another --out, add --resume to continue, or remove it"
                )
            if there:
                raise in_the_way(path, there[0])
            folder.write("config.json", {"format": FORMAT, **config})
        except BaseException:
            if entered:
                folder.close()
            if made:
                with suppress(OSError):  # somebody else is in it by now
                    (path / LOCK).unlink(missing_ok=True)
                    path.rmdir()
            raise
        folder.checksum = seed_of(config)
        return folder

    @classmethod
    def claim(cls, path: Path, resume: bool, replace: bool, lock: bool = True) -> None:
        """Raise if a run could not be begun, resumed or replaced here; changes nothing."""
        config = path / "config.json"
        try:
            old = parse_json(config.read_bytes()) if config.is_file() else None
            run = isinstance(old, dict) and {"quantization", "search"} <= old.keys()
        except ValueError:
            run = resume  # `resume` says that it is damaged
        if (path / LOCK).exists():
            folder = cls(path, lock)
            folder._enter()
            folder.close()
        if resume:
            if not (run or (config.is_file() and not isinstance(old, dict))):
                raise nothing_to_resume(path)
            return
        above = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not above.is_dir():
            raise FileExistsError(
                f"{above} is a file, so {path} cannot be a run folder; give another --out"
            )
        names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        names -= LEFT
        if run and not replace:
            raise FileExistsError(f"{path} holds a run; give another --out, --resume or --replace")
        if foreign := names - {*(OWN + OLD if run else ())}:
            raise in_the_way(path, min(foreign))

    @classmethod
    def remove(cls, path: Path) -> None:
        """Remove a run: the files that it wrote, and no others."""
        for name in (OLD + OWN)[::-1]:  # config.json last
            (path / f".{name}.new").unlink(missing_ok=True)
            (path / name).unlink(missing_ok=True)

    @classmethod
    def resume(cls, path: Path | str, config: Mapping[str, Any], lock: bool = True) -> "RunFolder":
        """Open the folder of a stopped run; ValueError for none, or one with another config.

        What stands under `paths` is not compared: files may have moved.
        """
        folder = cls(Path(path), lock)
        file = folder.path / "config.json"
        if not file.is_file():
            raise nothing_to_resume(path)
        old, new = read_object(file), json.loads(json.dumps({"format": FORMAT, **config}))
        if old.get("format") != FORMAT:
            raise ValueError(
                f"{path} was made by {maker_of(folder.path)}, which kept runs in another form; "
                f"resume it with that version, or {ANEW}"
            )
        was, now = in_full(old), in_full(new)
        if was != now:
            differ = ", ".join(sorted(set(_differences(was, now))))
            raise ValueError(
                f"{path} was run with other options ({differ}); resume with the same ones"
            )
        folder._enter()
        folder.checksum = seed_of(old)
        return folder

    @property
    def scales(self) -> Path:
        """The file of scales and integers."""
        return self.path / "scales.safetensors"

    @property
    def calibrated(self) -> str | None:
        """The digest of the scales and integers that the run began with, where it is known."""
        file = self.path / "environment.json"
        return read_object(file).get("calibrated") if file.is_file() else None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder."""
        write_whole(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def enter(self, state: Mapping[str, Any]) -> None:
        """Write environment.json; ValueError if the run was begun with other kernels or files.

        `workers` is what the workers say of themselves, None for a run without any; it is missing
        before that is known. What a run began with is never written over.
        """
        file = self.path / "environment.json"
        old = read_object(file) if file.is_file() else state
        for key, what in (("sha256", "files"), ("calibrated", "scales from calibration")):
            if old.get(key) != state.get(key):
                differ = ", ".join(sorted(set(_differences(old.get(key), state.get(key)))))
                raise ValueError(
                    f"{file}: the run began with other {what} ({differ or 'unknown ones'}); put "
                    f"them back, or {ANEW}"
                )
        try:
            mine, theirs = kernels_of(state, old), kernels_of(old, state)
            keys = sorted({*mine, *theirs})
        except (TypeError, ValueError, KeyError, IndexError):
            raise ValueError(f"{file} is damaged; {ANEW}") from None
        for key in keys:
            if (was := theirs.get(key)) != (now := mine.get(key)):
                began = in_line(was)
                hint = f"give --threads {began}" if key == "threads" else "resume on such a machine"
                raise ValueError(
                    f"{file}: the run began with {key} {began}, here it is {now}; {hint}, or {ANEW}"
                )
        if not file.is_file() or ("workers" in state and "workers" not in old):
            self.write("environment.json", state)

    def append(self, event: Evaluated) -> None:
        """Add a line to the history, and make sure that it is on the disk."""
        line = seal(event.as_dict(), self.checksum)
        with open(self.path / "history.jsonl", "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.checksum = checksum_of(line)

    def history(self) -> list[Evaluated]:
        """The evaluations so far, up to the first line that is not as it was written."""
        return [event for event, _, _ in self._lines()]

    def restore(self) -> list[Evaluated]:
        """The same, and cut the file there, so that the run can go on behind the last whole line.

        The log says how many bytes were dropped.
        """
        lines, file = self._lines(), self.path / "history.jsonl"
        end = lines[-1][2] if lines else 0
        self.checksum = lines[-1][1] if lines else self._seed()
        content = file.read_bytes() if file.is_file() else b""
        if len(content) > end:
            log.warning(
                "%s is damaged behind line %d: %d bytes are dropped, and what they stood for is "
                "computed again",
                file,
                len(lines),
                len(content) - end,
            )
            write_whole(file, content[:end])
        return [event for event, _, _ in lines]

    def _seed(self) -> int:
        """What the checksums begin with."""
        return seed_of(read_object(self.path / "config.json"))

    def _lines(self) -> list[tuple[Evaluated, int, int]]:
        """Whole lines from the start: event, checksum, and where the line ends."""
        file = self.path / "history.jsonl"
        content = file.read_bytes() if file.is_file() else b""
        checksum = self._seed()
        out: list[tuple[Evaluated, int, int]] = []
        end = 0
        for line in content.splitlines(keepends=True):
            try:
                event = read_event(unseal(line, checksum))
            except ValueError:
                break
            checksum, end = checksum_of(line), end + len(line)
            out.append((event, checksum, end))
        return out


def read_event(values: dict[str, Any]) -> Evaluated:
    """A line of a history as an event; ValueError if a field is missing, foreign or misshapen."""
    kinds: dict[str, Any] = {f.name.rstrip("_"): f.type for f in fields(Evaluated)}
    if "share" not in values:
        del kinds["share"]
    if values.keys() != kinds.keys() or any(type(values[k]) is not t for k, t in kinds.items()):
        raise ValueError("not an evaluation")
    return Evaluated(**{{"pass": "pass_"}.get(k, k): v for k, v in values.items()})


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run this run: all of its config but where its files lie, and a name for it."""
    return {key: value for key, value in config.items() if key not in ("paths", "format", "preset")}


def in_full(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's identity with all options: those that it is too old to know have their defaults."""
    found = {key: value for key, value in identity_of(config).items() if value is not None}
    for key, kind in (("quantization", QuantConfig), ("search", SearchConfig)):
        if isinstance(found.get(key), dict):
            found[key] = {**asdict(kind()), **found[key]}
    return found


def seed_of(config: Mapping[str, Any]) -> int:
    """What the checksums of a history begin with."""
    return crc32(json.dumps(identity_of(config), sort_keys=True).encode())


def maker_of(path: Path) -> str:
    """Which version made an old folder, as well as it tells."""
    try:
        versions = read_object(path / "environment.json")["versions"]
        return f"evolq_lite {in_line(versions['evolq-lite'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "evolq_lite 0.1"


def read_object(path: Path, advice: str = ANEW) -> dict[str, Any]:
    """A JSON file that holds an object; ValueError, with advice, if it is damaged."""
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (not a JSON object); {advice}")
    return found


def nothing_to_resume(path: Path | str) -> ValueError:
    """The error of --resume where no run is."""
    return ValueError(f"{path} holds no run to resume; omit --resume to start one")


def in_the_way(path: Path, name: str) -> FileExistsError:
    """The error of a folder for a run where somebody else's file is."""
    return FileExistsError(
        f"{path} holds {name}, which no run wrote; move it, or give another --out"
    )


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The names under which two nested dicts differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    out = []
    for key in {*old, *new}:
        name = in_line(key)  # of a file that anybody may have written
        out += _differences(old.get(key), new.get(key), f"{prefix}.{name}".lstrip("."))
    return out
