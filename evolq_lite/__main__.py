"""`python -m evolq_lite`, and the command `evolq-lite`."""

from evolq_lite.cli import main
from evolq_lite.terminal import run


def start() -> int:
    """Run the command line where standard streams may be closed, full, or of another encoding."""
    return run(main)


if __name__ == "__main__":
    raise SystemExit(start())
