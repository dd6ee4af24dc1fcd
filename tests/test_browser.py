"""Lessons and panels in a real browser: JupyterLab and Voila, driven in Chromium."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import nbformat
import psutil  # needed by ipykernel
import pytest
from conftest import slowness
from lessons import IN_LAB, MARGIN, stated_seconds
from playwright.sync_api import Browser, Locator, Page, expect
from serving import APP, DELAYS, OPTIONS, chromium, jupyterlab, notebook_of, voila

from evolq_lite.panels import QuantizerPanel

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
from build import read_source  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.long]
SECOND = 1000  # Playwright counts in milliseconds; waits are long, for slow machines
END = "MARK-END"
KEYS = 2 * (5 * ["ArrowLeft"] + 5 * ["ArrowRight"])


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Servers, kernels and browsers end with this module."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not psutil.wait_procs(left, timeout=20)[1]


@pytest.fixture(scope="module")
def browser(no_process_is_left: None) -> Iterator[Browser]:
    """One Chromium for all tests of this module: Playwright's event loop must end with it."""
    expect.set_options(timeout=60 * SECOND)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab on lessons made from their sources, with a last cell that prints END."""
    root = tmp_path_factory.mktemp("lab")
    for name in IN_LAB:
        notebook = read_lesson(name)
        notebook.cells.append(nbformat.v4.new_code_cell(f'print("{END}")', id="the-end"))
        nbformat.write(notebook, root / f"{name}.ipynb")
    with jupyterlab(root) as address:
        yield address


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A fresh page; afterwards: no error on it, and no request that left this machine."""
    errors, addresses = [], []
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    context.on("request", lambda request: addresses.append(request.url))
    page = context.new_page()
    page.set_default_timeout(60 * SECOND)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("websocket", lambda socket: addresses.append(socket.url))
    yield page
    page.screenshot(path=tmp_path / "last.png")
    context.close()
    assert addresses and not [url for url in addresses if is_external(url)]
    assert not errors


def is_external(url: str) -> bool:
    """Whether an address leads off this machine."""
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.hostname not in ("127.0.0.1", "localhost")


def test_external_addresses_are_told_from_others():
    inside = [
        "http://127.0.0.1:80/lab",
        "ws://localhost/x",
        "data:image/png;base64,A",
        "blob:null/1",
    ]
    outside = ["https://example.org/a", "http://127.0.0.1.example.org/", "//example.org", "wss://a"]
    assert not any(map(is_external, inside)) and all(map(is_external, outside))


def read_lesson(name: str) -> nbformat.NotebookNode:
    """A lesson without outputs."""
    return read_source(NOTEBOOKS / "src" / f"{name}.py")


def run_all(page: Page, lab: str, name: str, seconds: float) -> float:
    """Open a notebook, run all its cells, wait for the last one; how many seconds that took.

    No cell may have failed.
    """
    page.goto(lab.format(path=f"tree/{name}.ipynb") + "&reset")
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    page.get_by_role("tab", name=f"{name}.ipynb").first.wait_for()
    page.locator("#jp-main-statusbar").get_by_text("Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    began = time.perf_counter()
    failed = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    last = page.locator(".jp-OutputArea-output", has_text=END)
    expect(failed.or_(last).first).to_be_visible(timeout=seconds * SECOND)
    expect(failed).to_have_count(0)
    return time.perf_counter() - began


def run_lesson(page: Page, lab: str, name: str, record: Callable[[str, object], None]) -> None:
    """Run a lesson within its stated time, with a margin, and half a minute for pictures."""
    stated = stated_seconds(read_lesson(name))
    seconds = run_all(page, lab, name, MARGIN * stated + 30)
    record("lesson", f"{name[:2]} {seconds:.0f} s of {stated} s stated, in JupyterLab")


class Shown:
    """What a panel shows: picture, alt text, words."""

    def __init__(self, page: Page, kind: str) -> None:
        self.page, self.root = page, page.locator(f".evolq-{kind}")
        self.image = self.root.locator(".evolq-view .evolq-drawing").first
        self.status = self.root.locator(".evolq-status").get_by_role("status")

    def picture(self) -> tuple[str, str]:
        """Drawing and alt text."""
        drawing, alt = self.image.inner_html(), self.image.get_attribute("aria-label")
        assert "<svg" in drawing and alt and 5 < len(alt.split()) <= 40
        assert self.image.get_attribute("role") == "img"
        return drawing, alt

    def control(self, name: str) -> Locator:
        """A control by name."""
        return self.root.locator(f".evolq-{name}")

    def expect_words(self, words: str, seconds: float = 180) -> None:
        """Wait for words in the status line."""
        expect(self.status).to_contain_text(words, timeout=seconds * SECOND)

    def expect_other_picture(self, before: tuple[str, str], seconds: float = 180) -> None:
        """Wait until both the picture and its alt text have changed."""
        end = time.monotonic() + seconds
        while any(new == old for new, old in zip(self.picture(), before)):
            assert time.monotonic() < end, f"still the picture: {before[1]}"
            self.page.wait_for_timeout(100)

    def changes(self, act: Callable[[], object], words: str) -> None:
        """Do something that changes picture, alt text and status line."""
        before = self.picture()
        act()
        self.expect_other_picture(before)
        self.expect_words(words)

    def press(self, name: str, key: str) -> None:
        """Move a slider by keyboard."""
        handle = self.control(name).locator(".noUi-handle")
        handle.focus()
        handle.press(key)

    def drag_to_end(self, name: str) -> None:
        """Move a slider by mouse, from where it is to its right end."""
        slider = self.control(name)
        slider.scroll_into_view_if_needed()
        handle = slider.locator(".noUi-handle").bounding_box()
        track = slider.locator(".noUi-base").bounding_box()
        assert handle and track
        mouse = self.page.mouse
        mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
        mouse.down()
        mouse.move(track["x"] + track["width"] + 2, track["y"] + track["height"] / 2, steps=12)
        mouse.up()


def test_lesson_1_in_lab(page: Page, lab: str, record_property: Callable[[str, object], None]):
    run_lesson(page, lab, "01_uniform_quantization", record_property)
    panel = Shown(page, "quantizerpanel")
    panel.expect_words("4 bits, symmetric, per tensor")
    for act, words in [
        (lambda: panel.press("bits", "ArrowLeft"), "3 bits"),
        (lambda: panel.drag_to_end("bits"), "8 bits"),
        (lambda: panel.press("clip", "Home"), "5% of the range"),
        (lambda: panel.control("channels").locator("input").click(), "per channel"),
        (lambda: panel.control("tensor").locator("select").select_option(index=2), "8 bits"),
    ]:
        panel.changes(act, words)


def test_lesson_3_in_lab(page: Page, lab: str, record_property: Callable[[str, object], None]):
    run_lesson(page, lab, "03_non_smooth_landscapes", record_property)
    panel = Shown(page, "landscapepanel")
    panel.expect_words("ViT blocks.2.attn.qkv, W3A8")
    for act, words in [
        (lambda: panel.press("bits", "ArrowRight"), "W4A8"),
        (lambda: panel.drag_to_end("bits"), "W8A8"),
        (lambda: panel.control("network").locator("select").select_option("CNN"), "CNN layer2.0"),
        (lambda: panel.press("radius", "ArrowRight"), "CNN layer2.0.conv1, W8A8"),
    ]:
        panel.changes(act, words)


def test_lesson_6_in_lab(page: Page, lab: str, record_property: Callable[[str, object], None]):
    run_lesson(page, lab, "06_blockwise_evolq", record_property)
    panel = Shown(page, "searchpanel")
    panel.press("weight-bits", "ArrowRight")
    panel.expect_words("Press Run to search with these options.")
    for name, value in (("population", "40"), ("passes", "20")):
        panel.drag_to_end(name)
        expect(panel.control(name).locator(".widget-readout")).to_have_text(value)
    panel.press("population", "ArrowLeft")
    expect(panel.control("population").locator(".widget-readout")).to_have_text("39")
    run, pause, resume, cancel = map(panel.control, ("run", "pause", "resume", "cancel"))
    before = panel.picture() if panel.image.count() else ("", "")

    run.press("Enter")  # buttons by keyboard, and by mouse
    panel.expect_words("evaluations, blocks.", seconds=180)
    panel.expect_other_picture(before)
    expect(run).to_be_disabled()
    before = panel.picture()
    panel.expect_other_picture(before)
    pause.click()
    panel.expect_words("Paused.")
    resume.press("Enter")
    expect(panel.status).not_to_contain_text("Paused.", timeout=2 * SECOND)
    cancel.click()
    panel.expect_words("Cancelled. Resume continues", seconds=5)
    expect(run).to_be_enabled()
    expect(cancel).to_be_disabled()
    assert "Fitness over" in panel.picture()[1]


PANELS = [
    "from evolq_lite.panels import InfoNCEPanel, QuantizerPanel\n\nQuantizerPanel()",
    "QuantizerPanel(bits=3)",
    "InfoNCEPanel(batch=8)",
    f'print("{END}")',
]

QUESTIONS = [
    "from evolq_lite.panels import Guess, Quiz, ReadingPanel\n\n"
    'Quiz("What is `2 + 2`?", {"3": "No: count again.", "4": "Right: two pairs."}, answer=2)',
    'Guess("How much?", {"4 bits": 8.0, "3 bits": 34.0}, 0, 100, unit="%")',
    "ReadingPanel()",
    f'print("{END}")',
]

# The ratio of the lightest to the darkest of each text's, or line's, color and its background.
CONTRASTS = """([root, marks]) => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/rgba\\(.*, 0\\)|transparent/.test(color)) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll(`${root} .evolq-drawing ${marks}`)].map(mark => {
    const style = getComputedStyle(mark);
    const color = style.stroke !== 'none' && mark.tagName !== 'text' ? style.stroke : style.fill;
    const [a, b] = [light(color), light(behind(mark))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def panels(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """JupyterLab on a notebook of panels only, and on one that has not been run here."""
    root = tmp_path_factory.mktemp("panels")
    notebook_of(root / "panels.ipynb", *PANELS)
    notebook_of(root / "questions.ipynb", *QUESTIONS)
    notebook = nbformat.read(notebook_of(root / "unrun.ipynb", "QuantizerPanel()"), 4)
    panel = QuantizerPanel()
    html = {"text/html": panel._repr_mimebundle_()["text/html"]}
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", html)]
    nbformat.write(notebook, root / "unrun.ipynb")
    panel.close()
    with jupyterlab(root) as address:
        yield address


def use_theme(page: Page, theme: str) -> None:
    """Change JupyterLab's theme."""
    change = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"
    page.evaluate(change, theme)
    light = str("Light" in theme).lower()
    page.locator(f'body[data-jp-theme-light="{light}"]').wait_for(state="attached")


def test_panels_in_lab(page: Page, panels: str):
    """Two of a kind, names for handles, quick answers, dark theme, a narrow page, a restart."""
    run_all(page, panels, "panels", 300)
    both = page.locator(".evolq-quantizerpanel")
    expect(both).to_have_count(2)
    for i, bits in enumerate((4, 3)):
        expect(both.nth(i).get_by_role("status")).to_contain_text(f"{bits} bits")
        assert both.nth(i).get_by_role("slider", name="Bits").get_attribute("aria-valuenow")
    assert both.nth(0).get_by_role("slider", name="Range kept").count() == 1

    took = page.evaluate(DELAYS, [".evolq-quantizerpanel", "clip", KEYS])
    assert min(took) < 100 * slowness(), took
    took = page.evaluate(DELAYS, [".evolq-infoncepanel", "temperature", KEYS])
    assert min(took) < 150 * slowness(), took

    info = Shown(page, "infoncepanel")
    info.press("temperature", "Home")
    info.expect_words("T = 0.03")
    for _ in range(40):
        info.press("temperature", "ArrowRight")
    info.expect_words("T = 3:")
    info.control("reset").click()
    info.expect_words("8 images, T = 3:")

    with page.expect_download() as saved:
        info.root.get_by_role("button", name="Save picture").click()
    assert ElementTree.parse(saved.value.path()).getroot().tag.endswith("svg")

    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        use_theme(page, theme)
        for panel in (".evolq-quantizerpanel", ".evolq-infoncepanel"):
            assert min(page.evaluate(CONTRASTS, [panel, "text"])) >= 4.5, (theme, panel)
            assert min(page.evaluate(CONTRASTS, [panel, "polyline"])) >= 3, (theme, panel)

    page.set_viewport_size({"width": 800, "height": 900})
    for plot in both.nth(0).locator(".evolq-drawing > svg").all():
        plot.scroll_into_view_if_needed()
        box, frame = plot.bounding_box(), both.nth(0).bounding_box()
        assert box and frame and box["x"] + box["width"] <= frame["x"] + frame["width"] + 1

    lost = both.nth(0).get_by_text("Kernel restarted: run this cell again.")
    expect(lost).to_be_hidden()
    page.evaluate("void jupyterapp.commands.execute('kernelmenu:restart')")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    expect(lost).to_be_visible()


def test_questions_in_lab(page: Page, panels: str):
    """By mouse and by keyboard: choose and check, guess and see; labels flip with the slider."""
    run_all(page, panels, "questions", 300)
    quiz = page.locator(".evolq-quiz")
    check = quiz.get_by_role("button", name="Check")
    check.click()
    expect(quiz.get_by_role("status")).to_have_text("Choose an answer first.")
    quiz.get_by_text("3", exact=True).click()
    check.click()
    expect(quiz.get_by_role("status")).to_contain_text("✗ No: count again.")
    quiz.get_by_role("radio").nth(1).press("Space")  # ipywidgets' radios: each has its own Tab stop
    check.press("Enter")
    expect(quiz.get_by_role("status")).to_contain_text("✓ Right: two pairs.")

    guess = page.locator(".evolq-guess")
    handle = guess.get_by_role("slider", name="3 bits")
    handle.press("Home")
    picture = guess.locator(".evolq-drawing")
    expect(picture).to_have_attribute("aria-label", "Your guess: 50 %, 0 %.")
    guess.get_by_role("button", name="Show the truth").click()
    expect(guess.get_by_role("status")).to_contain_text("3 bits: you 0 %, truth 34 %")
    expect(picture).to_have_attribute("aria-label", "Your guess: 50 %, 0 %. The truth: 8 %, 34 %.")

    panel = Shown(page, "readingpanel")
    panel.expect_words("8 bits: ")
    panel.changes(lambda: panel.press("bits", "Home"), "2 bits: ")
    expect(panel.image.get_by_text("now wrong")).to_be_visible()
    assert panel.image.get_by_text("→").count() > 20
    panel.changes(lambda: panel.press("bits", "End"), "8 bits: ")  # five steps down, five up
    took = page.evaluate(DELAYS, [".evolq-readingpanel", "bits", KEYS])
    assert min(took) < 150 * slowness(), took


def test_a_panel_that_was_not_run_says_so(page: Page, panels: str):
    """As a lesson on the disk: no kernel has run it, and Lab does not trust what it holds."""
    page.goto(panels.format(path="tree/unrun.ipynb") + "&reset")
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    expect(page.get_by_text("The controls appear when you run this cell.")).to_be_visible()
    expect(page.get_by_role("img", name="4 bits, symmetric, per tensor")).to_be_visible()


def test_the_panel_of_lesson_6_alone_in_voila(page: Page, tmp_path: Path):
    """What `make app` serves."""
    served = shutil.copy(APP / "search.ipynb", tmp_path)
    with voila(Path(served)) as address:
        page.goto(address, timeout=180 * SECOND)
        panel = Shown(page, "searchpanel")
        panel.status.wait_for(timeout=400 * SECOND)
        panel.press("population", "ArrowLeft")
        panel.expect_words("Press Run to search with these options.")
        expect(page.get_by_text("Traceback")).to_have_count(0)


def test_make_app_uses_the_options_that_are_tested_here():
    makefile = (NOTEBOOKS.parent / "Makefile").read_text()
    recipe = makefile.partition("\napp: ")[2].partition("\n\n")[0]
    assert f"JUPYTER_PATH={APP.relative_to(NOTEBOOKS.parent)} " in recipe
    assert all(option in recipe for option in OPTIONS)
    assert f"{(APP / 'search.ipynb').relative_to(NOTEBOOKS.parent)}" in recipe
