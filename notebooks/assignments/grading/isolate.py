"""What a kernel may see and touch while it runs code of students.

Three ways, the best that the machine offers is used:

- "namespace" (Linux with `unshare` and `setpriv`): no network; folders of the instructor (home, the
  repository with its solutions, submissions, results) are covered by empty ones; processes that
  detach end with the kernel. As root, the kernel also runs as another user.
- "user" (root, in a container that allows no namespaces): another user, so that files with mode
  0700 are out of reach. The container must do the rest.
- "none": the kernel can do what the instructor can do. Everywhere, its environment is a clean one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534
WAYS = ("namespace", "user", "none")
PROBE_SECONDS = 60

# Sums are the same however many notebooks run at a time, and idle OpenMP threads do not spin.
FIXED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "2000",
    "KMP_BLOCKTIME": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore",
    "PYTHONDONTWRITEBYTECODE": "1",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    # Memory is kept, but each thread has a heap of its own: where a cell has taken all that there
    # is, the threads that talk for the kernel must not die of it.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
# Which kernels a processor runs is the instructor's to say; so are the places of system libraries.
PASSED = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE", "LD_LIBRARY_PATH", "SYSTEMROOT",
)  # fmt: skip

# $1: folders to cover, $2: folders to keep although they lie in one of those, $3: folders to cover
# although they lie in a kept one; each list one a line. What is kept is first bound to a place of
# its own, then bound back over the cover.
COVER = r"""
set -eu
stage=/mnt
mount -t tmpfs -o size=64k none $stage
number=0
old_ifs=$IFS
IFS='
'
for kept in $2; do
  number=$((number + 1))
  mkdir "$stage/$number"
  mount --rbind "$kept" "$stage/$number"
done
for covered in $1; do
  if [ -d "$covered" ]; then mount -t tmpfs -o size=64k,mode=755 none "$covered"; fi
done
number=0
for kept in $2; do
  number=$((number + 1))
  if [ ! -d "$kept" ]; then mkdir -p "$kept"; fi
  mount --rbind "$stage/$number" "$kept"
done
umount -l $stage
for covered in $3; do
  if [ -d "$covered" ]; then mount -t tmpfs -o size=64k,mode=755 none "$covered"; fi
done
IFS=$old_ifs
shift 3
exec "$@"
"""


@dataclass(frozen=True)
class Isolation:
    """How kernels are kept apart from the rest; `covered` are folders that they must not see."""

    way: str = "none"
    other_user: bool = False
    covered: tuple[str, ...] = ()

    def command(self, argv: Sequence[str], folder: str, env: dict[str, str]) -> list[str]:
        """A command, wrapped so that it sees what it may; `folder` is its own.

        However it is wrapped, it ends when the grader does, killed or not.
        """
        watched = env | {"JPY_PARENT_PID": str(os.getpid())}  # a kernel looks for its parent
        if self.way == "none":
            return [*clean(watched), *argv] if shutil.which("env") else list(argv)
        # Another user's process forgets whose end is to be its own, so this comes with the change.
        drop = ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        drop += ["--pdeathsig=KILL"]
        if self.other_user:
            drop += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        if self.way == "user":
            return [*drop, *clean(watched), *argv]
        # From inside, the parent cannot be seen.
        apart = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--net", "--pid", "--ipc"]
        apart += ["--fork", "--kill-child", "--mount-proc"]
        apart += [] if os.geteuid() == 0 else ["--map-root-user"]
        lists = ["\n".join(paths) for paths in places(self.covered, folder)]
        return [*apart, "sh", "-c", COVER, "sh", *lists, *drop, *clean(env), *argv]

    def says(self) -> str:
        """A sentence for the instructor."""
        if self.way == "namespace":
            who = "as another user, " if self.other_user else ""
            return f"Kernels ran {who}without network, apart from your files."
        if self.way == "user":
            return "Kernels ran as another user, but with the network of this machine."
        return "Kernels ran without isolation: code of students could read and change your files."


def clean(env: dict[str, str]) -> list[str]:
    """The beginning of a command that is to see these variables and no others."""
    return ["env", "-i", *(f"{name}={value}" for name, value in env.items())]


def places(covered: Sequence[str], folder: str) -> tuple[list[str], list[str], list[str]]:
    """Folders to cover, those inside them that a kernel needs, and those to cover inside these."""
    tops = {Path(path).resolve() for path in (*covered, ROOT, Path.home(), Path(folder).parent)}
    # Never the system itself, and nothing twice: a folder inside a covered one is gone with it.
    tops = {path for path in tops if len(path.parts) > 1 and path != Path("/usr")}
    outer = [path for path in tops if not any(other in path.parents for other in tops)]
    needed = [sys.prefix, sys.base_prefix, ROOT / "evolq_lite", ROOT / "data", Path(folder)]
    found = dict.fromkeys(Path(path).resolve() for path in needed)
    kept = [path for path in found if path.is_dir() and any(t in path.parents for t in outer)]
    inner = [path for path in tops if path not in outer and any(k in path.parents for k in kept)]
    return sorted(map(str, outer)), list(map(str, kept)), sorted(map(str, inner))


def environment(folder: str) -> dict[str, str]:
    """All variables of a kernel that works in `folder`: none of the instructor's own."""
    env = {name: os.environ[name] for name in PASSED if name in os.environ}
    path = os.environ.get("PATH", os.defpath) if os.name == "nt" else "/usr/local/bin:/usr/bin:/bin"
    places = ("HOME", "TMPDIR", "TEMP", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")
    return {**env, **FIXED, "PATH": path, "PYTHONPATH": str(ROOT), **dict.fromkeys(places, folder)}


def works(isolation: Isolation) -> bool:
    """Whether Python starts with it, sees the packages, and does not see what is covered."""
    with tempfile.TemporaryDirectory() as base:
        folder, secret = Path(base) / "kernel", Path(base) / "secret"
        folder.mkdir()
        secret.mkdir(mode=0o700)
        (secret / "key").write_text("key")
        if isolation.other_user:
            Path(base).chmod(0o755)
            os.chown(folder, NOBODY, NOBODY)
        key = str(secret / "key")
        seen = f"import ipykernel, os; open('here', 'w'); print(os.path.exists({key!r}))"
        trial = Isolation(isolation.way, isolation.other_user, (str(secret),))
        command = trial.command([sys.executable, "-c", seen], str(folder), environment(str(folder)))
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0 and done.stdout.strip() == "False"


def best(wanted: str = "auto", covered: Sequence[str] = ()) -> Isolation:
    """The strongest isolation that works here, or the one wanted; ValueError if that fails."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    users = (True, False) if root else (False,)
    ways = [(way, user) for way in ("namespace", "user") for user in users if user or way != "user"]
    for way, user in ways if os.name == "posix" else []:
        isolation = Isolation(way, user, tuple(covered))
        if wanted in ("auto", way) and works(isolation):
            return isolation
    if wanted not in ("auto", "none"):
        raise ValueError(f"isolation {wanted!r} does not work on this machine; try auto or none")
    return Isolation("none", False, tuple(covered))
