"""Folders of images and class maps as people have them: read right, or refused in words."""

import os
import pickle
import random
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import call, command, make_photos, noise_image
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from evolq_lite.data import check_images, hash_images, load_images
from evolq_lite.folders import Listing, label_images, list_folder, natural_key, read_class_map

NFC, NFD = "café", unicodedata.normalize("NFD", "café")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and one thread (small networks)."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos() -> Path:
    """Three classes of two images."""
    return make_photos(Path("photos"))


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a network is built."""
    monkeypatch.setattr(timm, "create_model", forbidden)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an image is read."""
    monkeypatch.setattr(Image, "open", forbidden)


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("work began before an error that could be known")


def touch(*paths: str) -> None:
    """Empty files, with the folders that they need."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()


def labels(listing: Listing, classes: int, class_map: Path | None = None) -> list[int]:
    found = label_images(listing, classes, class_map).labels
    assert found is not None
    return found.tolist()


# What is listed

ORDINARY = ["n{:02}", "class{}", "class {}", "Class_{}", "{}", "a{}b{}", "x.{}", "写真{}", "é{}"]


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_folders_are_listed_as_timm_lists_them(seed):
    """The same images in the same order with the same labels: a seed draws from this order."""
    draw = random.Random(seed)
    for _ in range(12):
        form = draw.choice(ORDINARY)
        folder = Path(
            "photos", *["deep"] * draw.randint(0, 1), form.format(draw.randint(0, 120), 7)
        )
        for _ in range(draw.randint(1, 5)):
            ending = draw.choice([".png", ".jpg", ".jpeg", ".JPEG", ".Png"])
            touch(
                str(folder / f"{draw.choice(['img_', '', 'IMG'])}{draw.randint(0, 2000)}{ending}")
            )
    wanted, index = find_images_and_targets("photos")
    listing = list_folder(Path("photos"))
    assert [str(path) for path in listing.paths] == [path for path, _ in wanted]
    assert labels(listing, len(index)) == [label for _, label in wanted]
    assert list(label_images(listing, len(index)).classes) == list(index)
    assert not listing.left_out


def listing_of(*names: str) -> Listing:
    """A listing that not every file system can hold: some take a for A, and é for é."""
    paths = [Path("x") / name for name in names]
    folders = [path.parent.name for path in paths]
    return Listing(Path("x"), paths, folders, (), Counter())


def test_the_order_does_not_depend_on_the_file_system():
    """Names that differ in case only tie in timm's order; here they never change places."""
    names = ["a/1.png", "A/1.png", "b/x.png", "b/X.png"]
    ways = [sorted(way, key=natural_key) for way in (names, names[::-1])]
    assert ways[0] == ways[1] == ["A/1.png", "a/1.png", "b/X.png", "b/x.png"]
    for way in (names, names[::-1]):
        assert label_images(listing_of(*way), 3).classes == ("A", "a", "b")


LEFT: dict[str, tuple[str, ...]] = {
    "hidden files": ("a/.hidden.png", "a/._0.png", ".DS_Store", "b/.git/x.png", ".trash/y/z.png"),
    "files of Jupyter": ("a/.ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints/x.png"),
    "files of macOS": ("__MACOSX/a/._0.png", "__MACOSX/a/0.png"),
    "files of Windows": ("a/Thumbs.db", "desktop.ini", "b/Desktop.ini", "$RECYCLE.BIN/x.png"),
    "files of a server": ("a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/x.jpg"),
    "files of a disk": ("lost+found/x.jpg", "System Volume Information/x.jpg"),
    "other files": ("a/notes.txt", "b/0.xml", "list.csv", "a/0.png.part", "c/README", "c/0.heic"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_systems_leave_in_folders_is_left_out_and_counted(photos, kind):
    """It is neither an image nor a class."""
    before = list_folder(photos)
    touch(*[f"photos/{name}" for name in LEFT[kind]])
    listing = list_folder(photos)
    assert listing.paths == before.paths
    assert labels(listing, 3) == [0, 0, 1, 1, 2, 2]
    assert sum(listing.left_out.values()) == len(LEFT[kind])
    assert all(re.search(r"\d+ ", part) for part in listing.omissions.split(", "))


def test_what_was_left_out_is_said(folders, capsys):
    touch("photos/a/.hidden.png", "photos/b/notes.txt")
    assert call(*command(folders)) == 0
    said = capsys.readouterr().out
    assert "1 hidden files" in said and "1 .txt files" in said and "photos" in said


def test_a_hidden_folder_may_be_the_one_that_was_asked_for():
    """Only what lies below the folder counts."""
    make_photos(Path(".cache/photos"))
    assert len(list_folder(Path(".cache/photos")).paths) == 6


FORMATS = {
    **{".png": "PNG", ".JPG": "JPEG", ".jpeg": "JPEG", ".JPEG": "JPEG", ".jpe": "JPEG"},
    **{".jfif": "JPEG", ".webp": "WEBP", ".WebP": "WEBP", ".bmp": "BMP", ".tif": "TIFF"},
    **{".TIFF": "TIFF", ".gif": "GIF", ".ppm": "PPM", ".pgm": "PPM", ".jp2": "JPEG2000"},
    **{".tga": "TGA", ".avif": "AVIF"},
}


def test_all_endings_that_pillow_reads():
    """Each is listed, opened, and gives pixels."""
    Path("x").mkdir()
    for i, (ending, form) in enumerate(FORMATS.items()):
        noise_image(0).save(f"x/{i}{ending}", form)
    listing = list_folder(Path("x"))
    assert {path.suffix for path in listing.paths} == set(FORMATS)
    assert len(check_images(listing.paths)) == len(FORMATS)


def test_links(photos):
    """A linked folder or file is read, a link that leads back is not followed."""
    Path("elsewhere").mkdir()
    shutil.move("photos/c", "elsewhere/c")
    Path("photos/c").symlink_to(Path("elsewhere/c").absolute())
    Path("photos/a/loop").symlink_to(photos.absolute())
    Path("photos/a/self").symlink_to("self")
    listing = list_folder(photos)
    assert len(listing.paths) == 6 and labels(listing, 3) == [0, 0, 1, 1, 2, 2]
    assert listing.left_out["links that lead back"] == 1


def test_a_dead_link_is_named_when_it_is_opened(photos):
    """It stands for an image that is missing: leaving it out would change the set."""
    Path("photos/a/gone.png").symlink_to("/nowhere/gone.png")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read \(No such file"):
        check_images(list_folder(photos).paths)


def test_a_pipe_is_not_opened(photos):
    os.mkfifo("photos/a/pipe.png")
    listing = list_folder(photos)
    assert len(listing.paths) == 6 and listing.left_out["special files"] == 1


def test_a_folder_that_may_not_be_read_is_an_error(photos, monkeypatch):
    """Not a class without images."""
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="photos/b"):
        list_folder(photos)


@pytest.mark.parametrize("flag", ["--calibration", "--test"])
@pytest.mark.parametrize(
    "kind", ["missing", "empty", "a file", "an archive", "no images", "hidden"]
)
def test_folder_without_images(refused, folders, unbuilt, tmp_path, flag, kind):
    """It is found before the network is built or fetched."""
    folder = tmp_path / "bad"
    if kind == "a file":
        folder.write_text("x")
    elif kind == "an archive":
        folder = tmp_path / "bad.zip"
        folder.write_bytes(b"PK")
    elif kind != "missing":
        folder.mkdir()
    if kind == "no images":
        touch("bad/a/notes.txt", "bad/a/0.heic")
    elif kind == "hidden":
        touch("bad/.a/0.png")
    words = {
        "missing": "not a folder",
        "a file": "not a folder",
        "an archive": "unpack it",
        "no images": r"no images.*\.png.*1 \.heic files, 1 \.txt files",
        "hidden": "no images.*1 hidden files",
    }.get(kind, r"no images.*\.png")
    refused(command({**folders, flag: folder}), re.escape(str(folder)), words)


# Labels


def test_a_flat_folder_is_fine_for_calibration(folders, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in Path("photos").rglob("*.png"):
        shutil.copy(path, flat)
    assert call(*command({**folders, "--calibration": flat})) == 0


def test_a_flat_folder_has_no_labels(refused, folders, unread, tmp_path):
    make_photos(tmp_path / "x", "a", 3)
    flat = tmp_path / "x" / "a"
    refused(
        command({**folders, "--test": flat}), re.escape(str(flat)), "no class folders", "one folder"
    )


@pytest.mark.parametrize(
    "form", ["{1}_{0}.JPEG", "{1}_val_{0}.JPEG", "ILSVRC2012_val_{0}_{1}.JPEG"]
)
def test_a_flat_folder_whose_file_names_tell_the_class(form):
    """As ImageNet's are, with a class map."""
    classes = ["n01", "n03", "n03"]
    touch(*["flat/" + form.format(i, name) for i, name in enumerate(classes)])
    Path("map.txt").write_text("n01 tench\nn02 goldfish\nn03 shark\n")
    listing = label_images(list_folder(Path("flat")), 3, Path("map.txt"))
    assert listing.labels.tolist() == [0, 2, 2]
    assert "file names" in listing.notes[0]


@pytest.mark.parametrize("names", [["n01_n02.png"], ["n01_1.png", "cat_2.png"], ["x.png"]])
def test_file_names_that_leave_the_class_open(names):
    touch(*[f"flat/{name}" for name in names])
    Path("map.txt").write_text("n01\nn02\nn03\n")
    with pytest.raises(ValueError, match="not clear which class"):
        label_images(list_folder(Path("flat")), 3, Path("map.txt"))


@pytest.mark.parametrize("class_map", [None, "a\nb\nc\n"])
def test_images_beside_class_folders(photos, class_map):
    """Of which class are they?"""
    noise_image(9).save("photos/stray.png")
    if class_map:
        Path("map.txt").write_text(class_map)
    with pytest.raises(ValueError, match="1 of 7 images lie directly in photos"):
        label_images(list_folder(photos), 3, Path("map.txt") if class_map else None)


def test_an_empty_class_folder_keeps_its_number(photos):
    """A class without test images is a class, and the ones behind it do not move up."""
    shutil.rmtree("photos/b")
    Path("photos/b").mkdir()
    touch("photos/b/.gitkeep")
    listing = label_images(list_folder(photos), 3)
    assert listing.labels.tolist() == [0, 0, 2, 2]
    assert listing.notes == ("photos: no images of the class b",)


def test_a_folder_that_may_be_a_class_or_not(photos):
    """Four folders, three of them with images, three classes: asked, not guessed."""
    touch("photos/annotations/0.xml")
    with pytest.raises(
        ValueError, match=r"4 class folders \(1 of them without images\).*--class-map"
    ):
        label_images(list_folder(photos), 3)
    Path("map.txt").write_text("a\nb\nc\n")
    assert labels(list_folder(photos), 3, Path("map.txt")) == [0, 0, 1, 1, 2, 2]


def test_class_folders_that_do_not_match_the_network(refused, folders, unread, tmp_path):
    """Two folders for three classes need a class map."""
    test = Path(shutil.copytree(folders["--test"], tmp_path / "two"))
    shutil.rmtree(test / "b")
    refused(command({**folders, "--test": test}), "2 class folders", "3 classes", "--class-map")


def test_folders_of_the_same_name_are_one_class(refused, folders, tmp_path):
    """timm's rule is the last part of the path, so three folders can be two classes."""
    test = Path(shutil.copytree(folders["--test"], tmp_path / "deep"))
    (test / "c").rename(test / "a" / "b")
    refused(command({**folders, "--test": test}), "3 classes", "--class-map")


def test_classes_in_several_folders_are_said():
    """A folder above train/ and val/ would test on both."""
    for part in ("train", "val"):
        make_photos(Path("data") / part)
    listing = label_images(list_folder(Path("data")), 3)
    assert len(listing.paths) == 12
    assert (
        "3 classes lie in several folders" in listing.notes[0]
        and "train/a, val/a" in listing.notes[0]
    )


def test_natural_order_is_said_where_another_is_usual():
    """timm numbers class2 before class10, torchvision does not."""
    touch("x/class2/0.png", "x/class10/0.png")
    listing = label_images(list_folder(Path("x")), 2)
    assert listing.classes == ("class2", "class10")
    assert "natural order (class2, class10" in listing.notes[0]
    touch("y/class02/0.png", "y/class10/0.png")
    assert not label_images(list_folder(Path("y")), 2).notes


def test_two_folders_that_read_the_same():
    listing = listing_of(f"{NFC}/0.png", f"{NFD}/0.png", "b/0.png")
    for classes in (2, 3):
        with pytest.raises(ValueError, match="two class folders that read 'café'"):
            label_images(listing, classes)


# Class maps

MAPS: dict[str, str | bytes] = {
    "ls": "a\nb\nc\n",
    "ls -p": "a/\nb/\nc/\n",
    "ls -a": ".\n..\na\nb\nc\n",
    "ls -Q": '"a"\n"b"\n"c"\n',
    "ls -d photos/*/": "photos/a/\nphotos/b/\nphotos/c/\n",
    "find": "./a\n./b\n./c\n",
    "no newline at the end": "a\nb\nc",
    "Windows": "a\r\nb\r\nc\r\n",
    "Windows paths": "C:\\photos\\a\r\nC:\\photos\\b\r\nC:\\photos\\c\r\n",
    "old macOS": "a\rb\rc\r",
    "blank lines": "\n\na\n\nb\n  \nc\n\n\n",
    "blanks around": "  a\nb  \n\tc\n",
    "a byte order mark": b"\xef\xbb\xbfa\nb\nc\n",
    "UTF-16": "a\nb\nc\n".encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + "a\nb\nc\n".encode("utf-16-be"),
    "PowerShell": "a\r\nb\r\nc\r\n".encode("utf-16"),
    "comments": "# my classes\na\nb\n# the last\nc\n",
    "words after it": "a tench, Tinca tinca\nb goldfish, Carassius auratus\nc great white shark\n",
    "tabs": "a\ttench\nb\tgoldfish\nc\tshark\n",
    "commas": "a,tench\nb,goldfish\nc,shark\n",
    "numbers before it": "0 a\n1 b\n2 c\n",
    "numbers from one": "1: a\n2: b\n3: c\n",
    "numbers after it": "a 0\nb 1\nc 2\n",
    "numbers and words": "a 1 kit_fox\nb 2 English_setter\nc 3 Siberian_husky\n",
}


@pytest.mark.parametrize("form", MAPS)
def test_class_map(photos, form):
    """However the list was made, the line tells the index."""
    content = MAPS[form]
    Path("map.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert labels(list_folder(photos), 3, Path("map.txt")) == [0, 0, 1, 1, 2, 2]
    listing = label_images(list_folder(photos), 3, Path("map.txt"))
    assert listing.classes == ("a", "b", "c")


NAMES = {
    "blanks": ("great white shark", "great white shark"),
    "comma": ("tench, Tinca tinca", "tench, Tinca tinca"),
    "composed in the map": (NFD, NFC),
    "composed in the folder": (NFC, NFD),
    "other scripts": ("写真", "写真"),
    "right to left": ("قطة", "قطة"),
    "emoji": ("🐟 fish", "🐟 fish"),
    "a hash": ("#1", "#1"),
    "a quote": ("o'neill", "o'neill"),
    "a number at the end": ("class 3", "class 3"),
    "blanks at the end": ("fish ", "fish"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_any_kind_are_found_in_the_map(kind):
    folder, line = NAMES[kind]
    touch(f"x/{folder}/0.png", "x/class 1/0.png")
    Path("map.txt").write_text(f"other 2\n{line}\nclass 1\n", "utf-8")
    listing = label_images(list_folder(Path("x")), 3, Path("map.txt"))
    assert dict(zip(listing.names, listing.labels.tolist())) == {folder: 1, "class 1": 2}


def test_whole_lines_go_before_their_first_words():
    """A folder named like a whole line is that class, whatever its first word is."""
    touch("x/cat/0.png", "x/cat house/0.png")
    Path("map.txt").write_text("cat house\ncat\n")
    listing = label_images(list_folder(Path("x")), 2, Path("map.txt"))
    assert dict(zip(listing.names, listing.labels.tolist())) == {"cat house": 0, "cat": 1}


BAD_MAPS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("none.txt", None, "not a file"),
    "a folder": (".", None, "not a file"),
    "other names": ("other.txt", b"x\ny\nz\n", "does not list the class folder 'a'"),
    "one name missing": ("part.txt", b"a\nb\nx\n", "'c'"),
    "too few": ("few.txt", b"a\nb\n", "2 class folders.*3 classes"),
    "too many": ("long.txt", b"a\nb\nc\nd\n", "4 class folders.*3 classes"),
    "twice": ("twice.txt", b"a\nb\na\n", "'a' twice"),
    "twice, with words": ("twice.txt", b"a tench\nb shark\na fish\nc x\n", "'a' twice|4 class"),
    "accents of two forms": ("acc.txt", f"a\n{NFC}\n{NFD}\n".encode(), "twice"),
    "empty": ("empty.txt", b"", "0 class folders"),
    "Latin-1": ("latin.txt", "a\nb\ncafé\n".encode("latin-1"), "UTF-8"),
    "bytes": ("bytes.txt", b"\x00\x01\x02", "UTF-8"),
    "UTF-16 without a mark": ("utf16.txt", "a\nb\nc\n".encode("utf-16-le"), "UTF-8"),
    "half of UTF-16": ("half.txt", b"\xff\xfea", "UTF-8"),
    "a table": ("map.csv", b"c\nx\na\n", "'b'"),
    "a pickle": ("map.pkl", pickle.dumps(["a"]), "UTF-8"),
    "JSON": ("map.json", b'{"0": ["a", "tench"], "1": ["b", "shark"]}', "1 class folders"),
    "a heading": ("head.csv", b"id,name\na,x\nb,y\nc,z\n", "4 class folders"),
    "ls -l": ("long.txt", b"total 0\ndrwxr a\ndrwxr b\ndrwxr c\n", "4 class folders"),
    "numbers out of order": ("n.txt", b"2 a\n0 b\n1 c\n", "not in their order"),
    "indices out of order": ("n.txt", b"a 2\nb 0\nc 1\n", "not in their order"),
    "a table with indices": ("n.csv", b"a,1\nb,0\nc,2\n", "not in their order"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_class_map_that_does_not_fit(refused, folders, unread, tmp_path, case):
    """A map that is missing or does not fit the folders and the network is refused."""
    name, content, words = BAD_MAPS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(command({**folders, "--class-map": tmp_path / name}), re.escape(str(tmp_path)), words)


def test_a_class_map_alone_is_read_by_whole_lines():
    Path("map.txt").write_text("n01 tench\nn02 fish/\n")
    assert read_class_map(Path("map.txt")) == {"n01 tench": 0, "n02 fish": 1}


# Images


def damaged(kind: str) -> bytes:
    """A file that looks like an image by its name."""
    noise_image(0, (64, 64)).save("whole.jpg")
    noise_image(0, (64, 64)).save("whole.png")
    jpg, png = Path("whole.jpg").read_bytes(), Path("whole.png").read_bytes()
    return {
        "truncated.jpg": jpg[: len(jpg) // 2],
        "cut_at_the_end.jpg": jpg[:-2],
        "text.jpg": b"no image\n",
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "truncated.png": png[: len(png) // 2],
        "header.png": png[:20],
        "flipped.png": png[:40] + bytes(b ^ 0xFF for b in png[40:80]) + png[80:],
        "zip.png": b"PK\x03\x04" + bytes(60),
    }[kind]


DAMAGED = [
    *("truncated.jpg", "cut_at_the_end.jpg", "text.jpg", "empty.jpg", "page.jpg", "pointer.png"),
    *("truncated.png", "header.png", "flipped.png", "zip.png"),
]


@pytest.mark.parametrize("flag", ["--calibration", "--test"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_image(refused, folders, tmp_path, flag, name):
    """Named before the search begins, be it a calibration or a test image."""
    content = damaged(name)
    bad = Path(shutil.copytree("photos", tmp_path / "bad"))
    (bad / "b" / name).write_bytes(content)
    said = refused(
        command({**folders, flag: bad}), re.escape(str(bad / "b" / name)), "remove or replace"
    )
    assert "BytesIO" not in said


def test_a_damaged_image_whose_name_breaks_the_line(refused, folders, tmp_path):
    """One sentence in one line, whatever a file system takes for a name."""
    bad = Path(shutil.copytree("photos", tmp_path / "bad"))
    (bad / "b" / "two\nlines\x1b[2J.png").write_bytes(b"no image")
    said = refused(command({**folders, "--test": bad}), r"two\\nlines\\x1b\[2J\.png", "replace")
    assert said.isprintable()


def test_the_first_damaged_image_is_named(photos):
    for name in ("a/1.png", "c/4.png"):
        (photos / name).write_bytes(b"x")
    seen: list[int] = []
    with pytest.raises(ValueError, match=r"photos/a/1\.png"):
        check_images(list_folder(photos).paths, seen.append)
    assert seen == [1]


def test_image_that_is_too_large(refused, folders, monkeypatch):
    """Pillow's guard against decompression bombs is an error like the others."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refused(command(folders), "photos", "decompression bomb", "remove or replace")


@pytest.mark.filterwarnings("error")
def test_image_that_pillow_only_warns_of(photos, monkeypatch):
    """Large, but not forbidden: read, without two lines of warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 - 1)
    check_images(list_folder(photos).paths)


def test_a_strip_would_become_huge(photos):
    """One pixel high, 256 wanted: 256 times as wide."""
    noise_image(0, (4000, 1)).save("photos/a/line.png")
    with pytest.raises(ValueError, match=r"line\.png .*4000 x 1 pixels.*strip"):
        check_images(list_folder(photos).paths)


GREY = np.repeat(np.array([[10, 90], [160, 250]]), 8, 0)
PICTURE = Image.fromarray(GREY.astype(np.uint8))
WHITE = np.repeat(np.array([[0, 255], [255, 0]]), 8, 0)
MODES: dict[str, tuple[str, Callable[[str], object]]] = {
    "1": ("x.png", lambda path: Image.fromarray(WHITE.astype(np.uint8)).convert("1").save(path)),
    "L": ("x.png", PICTURE.save),
    "LA": ("x.png", lambda path: PICTURE.convert("LA").save(path)),
    "P": ("x.png", lambda path: PICTURE.convert("P").save(path)),
    "RGBA": ("x.png", lambda path: PICTURE.convert("RGBA").save(path)),
    "palette with alpha": (
        "x.png",
        lambda path: PICTURE.convert("P").save(path, transparency=b"\x00\x80\xff"),
    ),
    "16 bits": ("x.png", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path)),
    "16 bits, TIFF": (
        "x.tif",
        lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path),
    ),
    "16 bits, big end first": (
        "x.tif",
        lambda path: Image.fromarray((GREY * 257).astype(">u2")).save(path),
    ),
    "16 bits, PGM": (
        "x.pgm",
        lambda path: Path(path).write_bytes(
            b"P5 2 16 65535\n" + (GREY * 257).astype(">u2").tobytes()
        ),
    ),
    "16 bits a colour": (
        "x.ppm",
        lambda path: Path(path).write_bytes(
            b"P6 2 16 65535\n" + np.repeat((GREY * 257)[..., None], 3, 2).astype(">u2").tobytes()
        ),
    ),
    "GIF": ("x.gif", PICTURE.save),
    "WebP": ("x.webp", lambda path: PICTURE.save(path, lossless=True)),
    "CMYK": ("x.tif", lambda path: cmyk().save(path)),
    "turned by EXIF": ("x.png", lambda path: PICTURE.save(path, exif=turned())),
}


def cmyk() -> Image.Image:
    """Black ink only, so that every reader agrees on the colours."""
    zero = np.zeros_like(GREY)
    return Image.fromarray(np.stack([zero, zero, zero, 255 - GREY], 2).astype(np.uint8), "CMYK")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter
    return exif


@pytest.mark.filterwarnings("ignore:'mode' parameter")
@pytest.mark.parametrize("mode", MODES)
def test_images_of_all_modes(mode):
    """Every mode is read as the RGB image it shows; as in timm, EXIF does not turn it."""
    name, make = MODES[mode]
    make(name)
    found = load_images([Path(name)], lambda image: torch.tensor(np.array(image)))
    wanted = WHITE if mode == "1" else GREY
    np.testing.assert_array_equal(found[0].numpy(), np.repeat(wanted[..., None], 3, 2))
    assert len(check_images([Path(name)])) == 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_whose_white_is_not_known(kind):
    """Pillow would clip 32-bit numbers to black and white without a word."""
    Image.fromarray(GREY.astype(kind)).save("x.tif")
    with pytest.raises(ValueError, match=r"x\.tif .*32-bit.*8 bits"):
        check_images([Path("x.tif")])


def test_identity_is_content_order_and_labels(photos):
    """Moved images are the same images; another order, label or pixel is another set."""
    paths = list_folder(photos).paths
    digests = check_images(paths)
    whole = hash_images(digests, torch.arange(6))
    shutil.move("photos", "elsewhere")
    moved = check_images(list_folder(Path("elsewhere")).paths)
    assert hash_images(moved, torch.arange(6)) == whole
    others = [
        hash_images(digests),
        hash_images(digests[::-1], torch.arange(6)),
        hash_images(digests, torch.tensor([0, 0, 1, 1, 2, 2])),
        hash_images(digests[:5], torch.arange(5)),
    ]
    noise_image(77).save("elsewhere/a/0.png")
    others.append(hash_images(check_images(list_folder(Path("elsewhere")).paths), torch.arange(6)))
    assert len({whole, *others}) == 6


@pytest.mark.parametrize("wanted", ["0", "1", "-2", "7", "1000000000"])
@pytest.mark.parametrize("flag", ["--calibration-images", "--test-images"])
def test_wrong_number_of_images(refused, folders, unread, flag, wanted):
    """What can be asked for is said, before any image is read."""
    what = "calibration images" if "calibration" in flag else "test images"
    refused(command(folders, f"{flag}={wanted}"), f"{wanted} {what} from .*photos", r"\b6\b")


def test_single_calibration_image(refused, folders, tmp_path):
    """One image is too few for infoNCE, and that is what is said."""
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(folders["--calibration"] / "a" / "0.png", single)
    refused(command({**folders, "--calibration": single}), "single", "at least 2")


def test_names_in_any_script(folders, tmp_path):
    """Names need not be ASCII, nor without blanks."""
    place = tmp_path / "Füße 写真 🙂"
    shutil.copytree(folders["--test"], place / "my bilder")
    (place / "my bilder" / "a").rename(place / "my bilder" / f"a {NFD}")
    options = {**folders, "--calibration": place / "my bilder", "--test": place / "my bilder"}
    assert call(*command({**options, "--out": place / "läuft"})) == 0
    assert (place / "läuft" / "summary.json").is_file()
