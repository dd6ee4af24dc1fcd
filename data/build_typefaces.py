"""Render Typefaces-62: characters A-Z, a-z, 0-9 of Debian's free typefaces as 28x28 grey images.

    python data/build_typefaces.py --packages  # the Debian packages that it needs; installs nothing
    python data/build_typefaces.py             # writes typefaces-{train,test}.npz and typefaces.csv

What is done to a face, in order:

1. *Read.* All `.ttf` and `.otf` files of the packages in `typefaces-packages.txt` whose character
   map holds all 62.
2. *Draw.* All 62 at one size, so that the tallest and deepest of them just fit: a `c` stays smaller
   than a `C`. One baseline, each character centred. Drawn four times too large without hinting,
   then averaged, so that the pixels do not depend on a hinting engine.
3. *Skip.* Blank or doubled glyphs (a font that draws the same box for many characters); fonts whose
   small letters are capitals; symbol fonts, told by how few of their characters look like the
   average character of that name.
4. *Group.* Faces of one family, and families that draw nearly the same shapes (Arimo and Liberation
   Sans, say), form one group. A group lies wholly in the training or wholly in the test part: test
   typefaces are never seen in training.

Deterministic: the same packages and the same Pillow give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import subprocess
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from sums import write_sums
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
SIDE, MARGIN, OVERSAMPLE = 28, 1, 4
FACES_PER_GROUP = {"train": 7, "test": 1}
TEST_GROUPS = 160
LARGEST_TEST_GROUP = 24  # faces
SAME_DESIGN = (
    0.005  # mean squared difference (ink 0 to 1) below which two families count as one design
)
SAME_FACE = 0.002  # and below which two faces of one group are not both taken
LEGIBLE = 0.7  # share of letters that must look like the average letter of that name
LOOKALIKE = (
    "O0o",
    "lI1",
    "Il",
    "sS",
    "vV",
    "wW",
    "xX",
    "zZ",
    "cC",
)  # may coincide in an honest font
DIFFERENT_IN_LOWER_CASE = "abdeghnqr"
STYLE_WORDS = re.compile(
    r"\b(thin|hairline|extra|ultra|semi|demi|light|book|regular|roman|normal|medium|bold|black|heavy|"
    r"fat|italic|oblique|slanted|condensed|cond|narrow|wide|expanded|extended|compressed|mono|"
    r"monospaced|sans|serif|caps|sc|osf|text|display|caption|small|std|pro|new|nf|otf|ttf|[0-9]+(pt)?)\b",
    re.IGNORECASE,
)
LICENCES = (  # first match wins, in the text of /usr/share/doc/PACKAGE/copyright
    ("OFL-1.1", r"SIL Open Font Licen[cs]e|\bOFL\b"),
    ("Apache-2.0", r"Apache Licen[cs]e|\bApache-2"),
    ("GUST-Font", r"GUST Font Licen[cs]e"),
    ("LPPL", r"LaTeX Project Public Licen[cs]e|\bLPPL\b"),
    ("Bitstream-Vera", r"Bitstream Vera"),
    ("AGPL-3 with font exception", r"Affero General Public"),
    ("GPL", r"GNU General Public Licen[cs]e|\bGPL"),
    ("LGPL", r"\bLGPL"),
    ("CC-BY-SA", r"CC-BY-SA|Attribution-ShareAlike"),
    ("CC-BY", r"CC-BY|Creative Commons Attribution"),
    ("CC0", r"\bCC0"),
    ("MIT", r"\bMIT\b|Expat|Permission is hereby granted, free of charge"),
    ("BSD", r"\bBSD\b|Redistribution and use in source and binary"),
    ("public domain", r"public[ -]domain"),
    ("freeware, DFSG-free", r"freeware|freely"),
)


@dataclass
class Face:
    """One font file: names, where it came from, and its 62 drawn characters."""

    family: str
    style: str
    package: str
    path: str
    pixels: np.ndarray | None = None  # (62, 28, 28) uint8


def package_files(package: str) -> list[str]:
    """List the font files of an installed Debian package, sorted; empty if it is not installed."""
    listing = subprocess.run(
        ["dpkg", "-L", package], capture_output=True, text=True, check=False
    ).stdout
    return sorted(
        f for f in listing.splitlines() if re.search(r"\.(ttf|otf)$", f, re.I) and Path(f).is_file()
    )


def licence_of(package: str) -> str:
    """Name the licence in a package's copyright file, in one word or two."""
    file = Path(f"/usr/share/doc/{package}/copyright")
    text = file.read_text(errors="replace") if file.is_file() else ""
    return next(
        (name for name, pattern in LICENCES if re.search(pattern, text)),
        "see the package's copyright file",
    )


def read_face(package: str, path: str) -> Face | None:
    """Read a font's names; None if it lacks one of the 62 characters or cannot be read."""
    try:
        font = TTFont(path, lazy=True)
        cmap = font.getBestCmap()
        if cmap is None or not set(map(ord, CHARACTERS)) <= set(cmap):
            return None
        names = font["name"]
        family = names.getDebugName(16) or names.getDebugName(1) or Path(path).stem
        style = names.getDebugName(17) or names.getDebugName(2) or "Regular"
        return Face(family.strip(), style.strip(), package, path)
    except Exception as error:  # a broken font is skipped, and said to be so
        print(f"skipped {path}: {error}", file=sys.stderr)
        return None


def draw(path: str) -> np.ndarray | None:
    """Draw the 62 characters of a font: (62, 28, 28) uint8, ink 255; None if a glyph is blank."""
    probe = ImageFont.truetype(path, 200, layout_engine=ImageFont.Layout.BASIC)
    boxes = np.array([probe.getbbox(c, anchor="ls") for c in CHARACTERS], dtype=float)
    if (boxes[:, 2] <= boxes[:, 0]).any() or (boxes[:, 3] <= boxes[:, 1]).any():
        return None
    room = (SIDE - 2 * MARGIN) * OVERSAMPLE
    top, bottom = boxes[:, 1].min(), boxes[:, 3].max()
    widest = (boxes[:, 2] - boxes[:, 0]).max()
    scale = room / max(bottom - top, widest)
    font = ImageFont.truetype(path, 200 * scale, layout_engine=ImageFont.Layout.BASIC)
    canvas = SIDE * OVERSAMPLE
    baseline = round((canvas - (bottom - top) * scale) / 2 - top * scale)
    out = np.zeros((len(CHARACTERS), SIDE, SIDE), np.uint8)
    for i, character in enumerate(CHARACTERS):
        image = Image.new("L", (canvas, canvas))
        left, _, right, _ = font.getbbox(character, anchor="ls")
        ImageDraw.Draw(image).text(
            ((canvas - left - right) // 2, baseline), character, fill=255, font=font, anchor="ls"
        )
        large = np.asarray(image, np.float32).reshape(SIDE, OVERSAMPLE, SIDE, OVERSAMPLE)
        out[i] = np.round(large.mean((1, 3)))
    return out


def draw_or_none(path: str) -> np.ndarray | None:
    """`draw`, with a font that FreeType refuses counted as not drawable."""
    try:
        return draw(path)
    except (OSError, ValueError):
        return None


def cropped(image: np.ndarray, side: int = 16) -> np.ndarray:
    """Crop to the ink and stretch to a unit-norm, zero-mean square, so that only shape counts."""
    rows, columns = np.where(image.max(1) > 40)[0], np.where(image.max(0) > 40)[0]
    if not len(rows):
        return np.zeros(side * side, np.float32)
    box = Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    vector = np.asarray(box.resize((side, side), Image.Resampling.BILINEAR), np.float32).ravel()
    vector -= vector.mean()
    return vector / (np.linalg.norm(vector) + 1e-6)


def why_unfit(pixels: np.ndarray) -> str | None:
    """Say why a face is no honest alphabet: blank, doubled, small capitals; None if it is one."""
    if (pixels.reshape(len(pixels), -1).max(1) < 100).any():
        return "blank"
    seen: dict[bytes, str] = {}
    for character, image in zip(CHARACTERS, pixels):
        other = seen.setdefault(image.tobytes(), character)
        if other != character and not any(
            other in pair and character in pair for pair in LOOKALIKE
        ):
            return "doubled"
    alike = [
        float(cropped(pixels[CHARACTERS.index(c)]) @ cropped(pixels[CHARACTERS.index(c.upper())]))
        for c in DIFFERENT_IN_LOWER_CASE
    ]
    return "small capitals" if np.median(alike) > 0.85 else None


def resemblance(faces: list[Face]) -> np.ndarray:
    """Share of each face's 52 letters among the 12 nearest class averages, shape (faces,)."""
    shapes = np.stack([[cropped(image) for image in face.pixels] for face in faces])
    means = np.median(shapes, 0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    similarity = shapes @ means.T  # (faces, 62, 62)
    own = np.diagonal(similarity, axis1=1, axis2=2)[..., None]
    return ((similarity > own).sum(2) < 12)[:, :52].mean(1)


def differences(faces: list[Face]) -> np.ndarray:
    """Mean squared difference of every two faces' drawings, ink 0 to 1, shape (faces, faces)."""
    flat = (
        np.stack([face.pixels for face in faces]).reshape(len(faces), -1).astype(np.float32) / 255
    )
    norms = (flat**2).sum(1)
    return np.maximum(norms[:, None] + norms - 2 * flat @ flat.T, 0) / flat.shape[1]


def grouped(faces: list[Face]) -> list[int]:
    """Number the groups: same family name without its style words, or nearly the same drawings."""
    parent = list(range(len(faces)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_name: dict[str, int] = {}
    for i, face in enumerate(faces):
        words = STYLE_WORDS.sub(" ", re.sub(r"(?<=[a-z])(?=[A-Z])|[-_]", " ", face.family))
        name = " ".join(words.lower().split()) or face.family.lower()
        parent[root(i)] = root(by_name.setdefault(name, i))
    for i, j in np.argwhere(np.triu(differences(faces) < SAME_DESIGN, 1)):
        parent[root(int(j))] = root(int(i))
    return [root(i) for i in range(len(faces))]


def plainness(face: Face) -> tuple[int, str, str]:
    """Order the faces of a group: regular first, then bold, then slanted, then the rest."""
    style = f"{face.family} {face.style}".lower()
    rank = 0
    rank += 2 * bool(re.search(r"italic|oblique|slanted", style))
    rank += 1 * bool(re.search(r"bold|black|heavy", style))
    rank += 4 * bool(
        re.search(
            r"thin|hairline|light|extra|ultra|cond|narrow|expanded|outline|semi|demi|medium", style
        )
    )
    return rank, face.family, face.style


def collect(packages: list[str], jobs: int) -> list[Face]:
    """Read, draw and sift every face of the packages."""
    warnings.filterwarnings("ignore")
    found = [(p, f) for p in packages for f in package_files(p)]
    faces = [face for p, f in tqdm(found, desc="read", unit="file") if (face := read_face(p, f))]
    with ProcessPoolExecutor(jobs) as pool:
        drawn = pool.map(draw_or_none, [face.path for face in faces], chunksize=16)
        for face, pixels in tqdm(zip(faces, drawn), desc="draw", unit="face", total=len(faces)):
            face.pixels = pixels
    kept, skipped = [], defaultdict(int)
    for face in faces:
        reason = "blank" if face.pixels is None else why_unfit(face.pixels)
        skipped[reason or "kept"] += 1
        if reason is None:
            kept.append(face)
    like = resemblance(kept)
    print(f"{len(faces)} faces: {dict(skipped)}; {int((like < LEGIBLE).sum())} symbol faces")
    return [face for face, share in zip(kept, like) if share >= LEGIBLE]


def split(faces: list[Face]) -> list[tuple[str, int, Face]]:
    """Choose (part, group, face) rows.

    Test groups are chosen by a hash of their plainest name, so that adding fonts moves few.
    """
    groups: dict[int, list[Face]] = defaultdict(list)
    for number, face in zip(grouped(faces), faces):
        groups[number].append(face)
    members = [sorted(group, key=plainness) for group in groups.values()]
    members.sort(key=lambda group: hashlib.sha256(group[0].family.encode()).hexdigest())
    # A group of very many faces is a chain of alike designs, too broad to be one test typeface.
    test = {
        id(group)
        for group in [group for group in members if len(group) <= LARGEST_TEST_GROUP][:TEST_GROUPS]
    }
    rows = []
    for number, group in enumerate(members):
        part = "test" if id(group) in test else "train"
        far = differences(group) >= SAME_FACE
        chosen: list[int] = []
        # The plainest first, then those that look different from all chosen ones.
        for i in range(len(group)):
            if len(chosen) < FACES_PER_GROUP[part] and far[i, chosen].all():
                chosen.append(i)
        rows += [(part, number, group[i]) for i in chosen]
    return rows


def write(rows: list[tuple[str, int, Face]]) -> None:
    """Write the two image files and the table of faces."""
    licences = {package: licence_of(package) for package in {face.package for _, _, face in rows}}
    with open(HERE / "typefaces.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["split", "face", "group", "family", "style", "package", "licence"])
        for part in ("train", "test"):
            chosen = [(group, face) for p, group, face in rows if p == part]
            for i, (group, face) in enumerate(chosen):
                table.writerow(
                    [part, i, group, face.family, face.style, face.package, licences[face.package]]
                )
            images = np.concatenate([face.pixels for _, face in chosen])
            np.savez_compressed(
                HERE / f"typefaces-{part}.npz",
                images=images,
                labels=np.tile(np.arange(62, dtype=np.uint8), len(chosen)),
                faces=np.repeat(np.arange(len(chosen), dtype=np.uint16), 62),
                groups=np.repeat(np.array([group for group, _ in chosen], np.uint16), 62),
            )
            size = (HERE / f"typefaces-{part}.npz").stat().st_size / 1e6
            print(
                f"{part}: {len(chosen)} faces, {len({g for g, _ in chosen})} groups, "
                f"{len(images)} images, {size:.1f} MB"
            )


def main() -> int:
    """Command line: list the packages, or build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--packages", action="store_true", help="print the Debian packages needed, and stop"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw (default: 2)")
    arguments = parser.parse_args()
    packages = (HERE / "typefaces-packages.txt").read_text().split()
    if arguments.packages:
        print("apt-get install --no-install-recommends " + " ".join(packages))
        return 0
    missing = [p for p in packages if not package_files(p)]
    if missing:
        print(
            f"{len(missing)} of {len(packages)} font packages are not installed "
            f"(first: {missing[0]}); "
            "install what `python data/build_typefaces.py --packages` prints, then run this again.",
            file=sys.stderr,
        )
        return 2
    write(split(collect(packages, arguments.jobs)))
    write_sums()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
