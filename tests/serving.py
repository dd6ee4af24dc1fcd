"""JupyterLab, Voila and Chromium, for browser tests and screenshots.

Each is a context manager that ends what it started, also after a failure. The servers live in a
temporary home: nothing of the user's settings comes in, and nothing is left behind.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import nbformat
import psutil  # needed by ipykernel

if TYPE_CHECKING:  # conftest.py reads this file, also where no browser is wanted
    from playwright.sync_api import Browser, Page

JUPYTER = Path(__file__).resolve().parent / "jupyter"
APP = JUPYTER.parents[1] / "notebooks" / "app"  # what `make app` gives to Voila, with OPTIONS
OPTIONS = ["--template=offline", "--progressive_rendering=True"]
SECONDS = 120  # until a server answers
NO_CHROMIUM = "there is no Chromium: apt-get install chromium, or set CHROMIUM to its path."
FLAGS = [
    "--no-sandbox",  # root has none, as in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]

# Milliseconds from each key on a slider's handle until the picture has changed and the page is
# drawn; for `[selector of the panel, class of the control, keys]`.
DELAYS = """async ([root, name, keys]) => {
  const view = document.querySelector(`${root} .evolq-view`);
  const handle = document.querySelector(`${root} .evolq-${name} .noUi-handle`);
  const took = [];
  for (const key of keys) {
    const before = view.innerHTML, began = performance.now();
    const changed = new Promise(done => {
      const watch = new MutationObserver(() => {
        if (view.innerHTML !== before) { watch.disconnect(); requestAnimationFrame(done); }
      });
      watch.observe(view, {childList: true, subtree: true});
    });
    handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    await changed;
    took.push(performance.now() - began);
    await new Promise(done => setTimeout(done, 50));
  }
  return took;
}"""


def find_chromium() -> str | None:
    """The browser: `CHROMIUM`, else the first on the path; None if there is none."""
    if named := os.environ.get("CHROMIUM"):
        return shutil.which(named)
    names = "chromium", "chromium-browser", "google-chrome"
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def chromium() -> "Iterator[Browser]":
    """A headless Chromium; RuntimeError if there is none."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise RuntimeError(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def jupyterlab(root: Path) -> Iterator[str]:
    """JupyterLab on a folder: its address, with `{path}` in it for what to open."""
    port, token = free_port(), os.urandom(16).hex()
    options = [
        f"--config={JUPYTER / 'jupyter_server_config.py'}",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}",
    ]
    base = f"http://127.0.0.1:{port}"
    with server(
        ["jupyterlab", *options], root, f"{base}/api/status?token={token}", JUPYTER_TOKEN=token
    ):
        yield f"{base}/lab/{{path}}?token={token}"


@contextmanager
def voila(notebook: Path) -> Iterator[str]:
    """Voila on one notebook: its address."""
    base = f"http://127.0.0.1:{free_port()}"
    port = f"--port={base.rpartition(':')[2]}"
    command = ["voila", str(notebook), *OPTIONS, "--no-browser", port]
    ready = f"{base}/voila/static/voila.js"
    with server(command, notebook.parent, ready, JUPYTER_PATH=str(APP)):
        yield base


@contextmanager
def server(command: list[str], folder: Path, ready: str, **environment: str) -> Iterator[None]:
    """A module of this Python as a server, from when `ready` answers to the end of its kernels."""
    with tempfile.TemporaryDirectory(prefix="evolq-home-", ignore_cleanup_errors=True) as home:
        settings = shutil.copytree(JUPYTER / "lab_settings", Path(home) / "settings")
        log = Path(home) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={
                    **os.environ,
                    "HOME": home,
                    "JUPYTER_CONFIG_DIR": f"{home}/config",
                    "JUPYTER_DATA_DIR": f"{home}/data",
                    "JUPYTER_RUNTIME_DIR": f"{home}/runtime",
                    "JUPYTERLAB_SETTINGS_DIR": str(settings),
                    "JUPYTERLAB_WORKSPACES_DIR": f"{home}/workspaces",
                    "IPYTHONDIR": f"{home}/ipython",
                    "MPLCONFIGDIR": matplotlib.get_cachedir(),  # else fonts are searched anew
                    **environment,
                },
            )
        try:
            wait_for(ready, process, log)
            yield
        finally:
            stop(process)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers; RuntimeError with the end of its log if it ends or is slow."""
    end = time.monotonic() + SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < end:
        try:
            opener.open(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no answer from {process.args}:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its kernels: politely, then firmly."""
    family = []
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for left in psutil.wait_procs(family, timeout=5)[1]:
        left.kill()
    psutil.wait_procs(family, timeout=10)


def notebook_of(path: Path, *cells: str) -> Path:
    """A notebook of these cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, path)
    return path


def settled(page: "Page", panel: str, seconds: float = 120) -> None:
    """Wait until a panel says something that is not about computing."""
    page.wait_for_function(
        """panel => {
            const words = document.querySelector(`.${panel} .evolq-status [role=status]`);
            return words && words.textContent && !words.textContent.includes("Computing")
        }""",
        arg=panel,
        timeout=1000 * seconds,
    )
