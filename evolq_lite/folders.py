"""Folders of images and class maps, as people have them.

The rule is timm's: an image's class is the folder that it lies in, classes are numbered in natural
order of their names, images are listed in natural order of their paths. Calibration images are
drawn by seed from that order, so for ordinary folders it must stay exactly timm's.

Real folders are not ordinary. What systems and programs leave there (`.ipynb_checkpoints`,
`._x.jpg`, `Thumbs.db`) is left out and counted, and a link that leads back is not followed.
Where a class could be one or another (images beside class folders, two names that read the same, a
map whose numbers contradict its order), the answer is a question and not a guess.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga"),
)
# Made by systems and programs, never by a person. Names that begin with a dot are hidden anyway.
SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle"}
SYSTEM |= {"$recycle.bin", "system volume information", "lost+found", "__pycache__"}
HIDDEN, OTHERS = "hidden files", "files of the system"  # what is left out, and of which kind


@dataclass(frozen=True)
class Listing:
    """The images below a folder, in natural order, and what is not among them.

    `names` are the folders that images lie in ("" directly in the top one); `labels` (n,) are their
    places in `classes`, once `label_images` has told them.
    """

    folder: Path
    paths: list[Path]
    names: list[str]
    empty: tuple[str, ...]  # innermost folders without an image
    left_out: Counter[str]
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def omissions(self) -> str:
        """What was left out, in words; "" if nothing was."""
        return ", ".join(f"{n} {kind}" for kind, n in sorted(self.left_out.items()))


@cache
def endings() -> frozenset[str]:
    """The endings of image files that Pillow can read here; some need a library that may lack."""
    Image.init()
    known = Image.registered_extensions()
    return frozenset(ending for ending in ENDINGS if known.get(ending) in Image.OPEN)


def plain(name: str) -> str:
    """A name as it is compared: an accent and its letter are one character, or two, by system."""
    return unicodedata.normalize("NFC", name).strip()


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sorts as timm does: digits as numbers, letters without case; what ties there, by its text.

    Words and numbers take turns, so only like is compared with like.
    """
    name = unicodedata.normalize("NFC", name)
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def list_folder(folder: Path) -> Listing:
    """All images below a folder; ValueError if there are none."""
    if not folder.is_dir():
        packed = "; unpack it first" if folder.is_file() else ""
        raise ValueError(f"{folder} is not a folder{packed}; give a folder of images")
    left_out: Counter[str] = Counter()
    found: list[tuple[str, Path]] = []
    empty = []
    for place, files, innermost in _walk(folder, Path(), left_out, ()):
        images = [name for name in files if os.path.splitext(name)[1].lower() in endings()]
        left_out.update(_kind(name) for name in files if name not in set(images))
        found += [(str(place / name), folder / place / name) for name in images]
        if innermost and not images and place != Path():
            empty.append(place.name)
    found.sort(key=lambda item: natural_key(item[0]))
    listing = Listing(
        folder=folder,
        paths=[path for _, path in found],
        names=[path.parent.name if Path(name).parent != Path() else "" for name, path in found],
        empty=tuple(sorted(empty)),
        left_out=left_out,
    )
    if not found:
        others = f"; it holds {listing.omissions}" if left_out else ""
        known = ", ".join(sorted(endings()))
        raise ValueError(
            f"{folder} holds no images ({known}){others}; give a folder of images that can be read"
        )
    return listing


def _walk(
    top: Path, place: Path, left_out: Counter[str], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[Path, list[str], bool]]:
    """(place, its files, whether it is innermost) of all folders below `top`, not hidden ones."""
    state = os.stat(top / place)
    here = (*above, (state.st_dev, state.st_ino))
    files, folders = [], []
    with os.scandir(top / place) as entries:  # an unreadable folder is an error, not an empty one
        for entry in entries:
            path = Path(entry.path)
            if kind := _leftover(entry.name):
                left_out[kind] += _count(path)
            elif path.is_file() or not path.exists():  # a dead link too: opening it names it
                files.append(entry.name)
            elif not path.is_dir():  # reading a pipe would wait for ever
                left_out["special files"] += 1
            elif (path.stat().st_dev, path.stat().st_ino) in here:
                left_out["links that lead back"] += 1
            else:
                folders.append(entry.name)
    yield place, sorted(files), not folders
    for name in sorted(folders):
        yield from _walk(top, place / name, left_out, here)


def _leftover(name: str) -> str:
    """Why a file or folder is left out by its name, "" if it is not."""
    if name.startswith("."):
        return HIDDEN
    return OTHERS if name.lower() in SYSTEM else ""


def _count(path: Path) -> int:
    """How many files are left out with a file or folder; a folder without any counts too."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path)) or 1


def _kind(name: str) -> str:
    """What a file is that is not an image, by its ending."""
    ending = os.path.splitext(name)[1].lower()
    return f"{ending} files" if ending else "files without an ending"


# Labels


def label_images(
    listing: Listing,
    classes: int,
    class_map: Path | None = None,
    order: Sequence[str] = (),
) -> Listing:
    """The listing with labels, for a network of so many classes.

    Without a map, folders are classes, in natural order, or in that of `order` if it names them
    all. With one, its lines are. ValueError where that does not give each image one class beyond
    doubt.
    """
    folder, flat = listing.folder, listing.names.count("")
    if 0 < flat < len(listing.names):
        raise ValueError(
            f"{flat} of {len(listing.names)} images lie directly in {folder} and not in a class "
            "folder; move them into one"
        )
    _check_twins(listing)
    if class_map is not None:
        return _label_by_map(listing, classes, class_map)
    known = {plain(name): i for i, name in enumerate(order)}
    if not flat and known.keys() >= {plain(name) for name in listing.names}:
        return _with_labels(listing, known, [])
    if flat:
        raise ValueError(
            f"{folder} holds images but no class folders, so their classes are not known; "
            "give a folder with one folder for each class"
        )
    used = {plain(name) for name in listing.names}
    every = sorted({*used, *map(plain, listing.empty)}, key=natural_key)
    if len(every) != classes:
        bare = len(every) - len(used)
        without = f" ({bare} of them without images)" if bare else ""
        raise ValueError(
            f"{folder} has {len(every)} class folders{without}, the network {classes} classes; "
            "give --class-map FILE with the class folders in index order"
        )
    notes = []
    if missing := [name for name in every if name not in used]:
        notes.append(f"no images of the class {', '.join(missing)}")
    if every != sorted(every):
        notes.append(
            f"classes are numbered in timm's natural order ({every[0]}, {every[1]}, ...); if the "
            "network was trained with torchvision's order, give --class-map"
        )
    return _with_labels(listing, {name: i for i, name in enumerate(every)}, notes)


def _with_labels(listing: Listing, index: dict[str, int], notes: Iterable[str]) -> Listing:
    """The listing with the labels that an index of class folders gives."""
    notes = [f"{listing.folder}: {note}" for note in notes]
    places: dict[str, set[Path]] = {}  # where the images of a class lie
    for path, name in zip(listing.paths, listing.names):
        places.setdefault(plain(name), set()).add(path.parent)
    if several := sorted(name for name, where in places.items() if len(where) > 1):
        where = sorted(str(p.relative_to(listing.folder)) for p in places[several[0]])
        notes.append(
            f"{listing.folder}: {len(several)} classes lie in several folders, whose images count "
            f"together ({', '.join(where)})"
        )
    return replace(
        listing,
        labels=torch.tensor([index[plain(name)] for name in listing.names]),
        classes=tuple(sorted(index, key=index.__getitem__)),
        notes=tuple(notes),
    )


def _check_twins(listing: Listing) -> None:
    """ValueError for class folders whose names differ in accents' form or blanks only."""
    first: dict[str, str] = {}
    for name in (*listing.names, *listing.empty):
        other = first.setdefault(plain(name), name)
        if other != name:
            raise ValueError(
                f"{listing.folder} has two class folders that read {plain(name)!r}, spelled with "
                "other characters; make them one, or rename one"
            )


def _label_by_map(listing: Listing, classes: int, class_map: Path) -> Listing:
    """Labels by the lines of a class map; in a flat folder, by the class in each file's name."""
    flat = not any(listing.names)
    lines = read_class_map(class_map, {plain(name) for name in listing.names if name})
    if len(lines) != classes:
        raise ValueError(
            f"{class_map} lists {len(lines)} class folders, the network has {classes} classes; "
            "list all of them in index order, those without images too, or give the weights of a "
            f"network with {len(lines)} classes"
        )
    if flat:
        return _label_by_file_names(listing, class_map)
    if missing := sorted({name for name in listing.names if plain(name) not in lines}):
        raise ValueError(
            f"{class_map} does not list the class folder {missing[0]!r} of {listing.folder}; "
            "add or remove it"
        )
    return _with_labels(listing, lines, [])


def _label_by_file_names(listing: Listing, class_map: Path) -> Listing:
    """Labels of a flat folder: n01440764_18.JPEG, or ILSVRC2012_val_00000293_n01440764.JPEG."""
    fitting: list[tuple[list[str], dict[str, int]]] = []
    for which in (0, -1):
        names = [plain(path.stem.split("_")[which]) for path in listing.paths]
        index = read_class_map(class_map, names)
        if index.keys() >= set(names) and names not in [other for other, _ in fitting]:
            fitting.append((names, index))
    if len(fitting) != 1:
        raise ValueError(
            f"{listing.folder} holds images but no class folders, and it is not clear which class "
            f"of {class_map} the name of each begins or ends with; give a folder with one folder "
            "for each class"
        )
    names, index = fitting[0]
    named = _with_labels(replace(listing, names=names), index, ["classes are read from file names"])
    return replace(named, names=listing.names)


def read_class_map(file: Path, folders: Iterable[str] = ()) -> dict[str, int]:
    """The class folders that a text file lists, one a line, and their indices.

    Read as `ls`, `find` and lists of names with explanations have them: where the class folders in
    use are not whole lines, they may be a line's first field or word, or follow its number. UTF-8
    or, with a byte order mark, UTF-16. Blank lines, and those that begin with #, do not count.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} is not a file; --class-map lists the class folders, one a line, in index order"
        )
    wanted = {plain(name) for name in folders}
    lines = [plain(line) for line in _text(file).splitlines()]
    lines = [line for line in lines if line not in ("", ".", "..")]
    lines = [line for line in lines if line in wanted or not line.startswith("#")]
    for read in READINGS:
        names = [read(line) for line in lines]
        if wanted <= set(names):
            break
    else:  # none fits: whole lines are what the caller shall compare
        read, names = READINGS[0], [READINGS[0](line) for line in lines]
    if twice := sorted(name for name, n in Counter(names).items() if n > 1):
        raise ValueError(
            f"{file} lists the class folder {twice[0]!r} twice; list each once, in index order"
        )
    if read not in READINGS[:2]:  # then numbers in a line are not part of a name
        _check_numbers(file, lines)
    return {name: i for i, name in enumerate(names)}


def _path_end(line: str) -> str:
    """The folder that `ls -F`, `ls -Q` or `find` means: without quotes, path and slash."""
    for quote in "'\"":
        if len(line) > 1 and line[0] == line[-1] == quote:
            line = line[1:-1]
    return plain(line.rstrip("/\\").rpartition("/")[2].rpartition("\\")[2])


# How a line may name a class folder, the plainest first.
READINGS = (
    _path_end,
    lambda line: line,
    lambda line: plain(re.split(r"[\t,;]", line)[0]),
    lambda line: line.split()[0],
    lambda line: plain(re.sub(r"^\d+\W+", "", line)),
    lambda line: (re.sub(r"^\d+\W+", "", line).split() or [""])[0],
)


def _check_numbers(file: Path, lines: list[str]) -> None:
    """ValueError if lines hold numbers that are not in the order of the lines."""
    for pattern in (r"^(\d+)[\s,;:]", r"^[^\s,;:]+[\s,;:]+(\d+)\b"):
        matches = [re.search(pattern, line) for line in lines]
        numbers = [int(match[1]) for match in matches if match]
        if len(numbers) == len(lines) > 1 and numbers not in (
            list(range(len(lines))),
            list(range(1, len(lines) + 1)),
        ):
            raise ValueError(
                f"{file} numbers its lines, but not in their order; --class-map lists the class "
                "folders in index order"
            )


def _text(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark; ValueError for anything else."""
    content = file.read_bytes()
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(
            f"{file} is not text in UTF-8; --class-map lists the class folders, one a line"
        )
    return text
