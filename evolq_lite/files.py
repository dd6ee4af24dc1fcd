"""Files that are whole or not there, and what identifies them."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

# Where the embedded images, networks and results lie.
DATA = Path(os.environ.get("EVOLQ_DATA", Path(__file__).resolve().parents[1] / "data"))


def in_line(value: object) -> str:
    """What a file says, for one line of an error: quoted where it would break the line."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def printable(text: object) -> str:
    """A text in one line: characters that no terminal shows, as in file names, become escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def temporary_beside(path: Path) -> Path:
    """Under which name a file is written before it gets its own."""
    return path.with_name(f".{path.name}.new")


def check_target(path: Path) -> None:
    """ValueError if `write_whole` cannot write there: found out by trying, before any work."""
    temporary = temporary_beside(path)
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the path of a file")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path.parent} is not a folder; give the path of a file in one")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is a device, not a file; give the path of a file")
        try:
            with open(temporary, "wb") as file:
                file.write(bytes(4096))  # a block, which a full disk has no room for
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}); give the path of a file in a "
            "folder that has space and that you may write to"
        ) from None


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, make sure that it is on the disk, and rename it."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says; ValueError for whatever is wrong with it, nesting without end too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def sha256(*paths: Path) -> str:
    """The SHA-256 of one file, or of several one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


CHECKSUM = b',"crc32":"'


def seal(content: Mapping[str, Any], before: int = 0) -> bytes:
    """A JSON object as one line that ends with a checksum of itself, and of `before`."""
    body = json.dumps(content, separators=(",", ":")).encode()[:-1]  # without the last brace
    return body + CHECKSUM + f'{crc32(body, before):08x}"}}\n'.encode()


def unseal(line: bytes, before: int = 0) -> dict[str, Any]:
    """What a sealed line says; ValueError if it is not as it was written."""
    body, _, end = line.rpartition(CHECKSUM)
    if end != f'{crc32(body, before):08x}"}}\n'.encode():
        raise ValueError("its checksum differs")
    content: dict[str, Any] = parse_json(body + b"}")
    return content


def checksum_of(line: bytes) -> int:
    """The checksum that a sealed line ends with."""
    return int(line.rpartition(CHECKSUM)[2][:8], 16)


def mistake(start: bytes) -> str:
    """What a file is instead of what its name says, by its first bytes; "" if that is not seen."""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"
    if start[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, so the download went wrong"
    return ""
