"""Write SHA256SUMS, by which the package checks the embedded files: `python data/sums.py`."""

import hashlib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def write_sums() -> None:
    """Hash every embedded file, in the format of `sha256sum`."""
    files = sorted([*HERE.glob("*.npz"), *HERE.glob("*.safetensors"), HERE / "typefaces.csv"])
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (HERE / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    write_sums()
