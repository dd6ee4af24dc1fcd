"""The course as a web site: built without warnings, complete, and alive in Chromium."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from bs4 import BeautifulSoup  # needed by nbconvert
from playwright.sync_api import Browser, Page, expect
from serving import chromium, free_port, server
from torch import Tensor

import evolq_lite as eq
from evolq_lite.config import KINDS
from evolq_lite.data import load_demo

ROOT = Path(__file__).resolve().parents[1]
EVERY = 33  # test image, as docs/site/export.py has it
SECOND = 1000  # Playwright counts in milliseconds; waits are long, for slow machines
ACTIVATIONS = ",".join(kind for kind in KINDS if kind != "weights")

in_browser = pytest.mark.browser
pytestmark = pytest.mark.long  # Sphinx takes a minute


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built anew with few calibration images; Sphinx says nothing, as all is well."""
    out = tmp_path_factory.mktemp("site")
    small = ["--images=32", "--points=5", "--passes=1"]
    command = [sys.executable, "docs/site/build.py", f"--out={out}", *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    assert done.stdout.strip() == f"Open {out / 'html' / 'index.html'}"
    return out / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, BeautifulSoup]:
    """All pages by their path, read."""
    return {
        path.relative_to(site).as_posix(): BeautifulSoup(path.read_text(), "html.parser")
        for path in site.rglob("*.html")
    }


def test_everything_has_its_page(pages: dict[str, BeautifulSoup]) -> None:
    sources = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "docs").glob("*.md")]
    wanted = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in sources}
    modules = [*(ROOT / "evolq_lite").glob("*.py"), *(ROOT / "evolq_lite").glob("*/__init__.py")]
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in modules}
    wanted |= {f"api/{name}.html" for name in names if name[0] != "_" and name != "evolq_lite"}
    assert (
        wanted | {"index.html", "try.html", "play.html", "data/results/README.html"} <= pages.keys()
    )
    first = pages["notebooks/00_start_here.html"]
    assert first.select(".cell_output img") and "stored outputs" in first.text
    assert "GPTQ (Frantar et al." in pages["api/gptq.html"].text
    assert pages["api/gptq.html"].find(id="evolq_lite.gptq.round_rows")


def test_nothing_is_loaded_from_elsewhere_and_every_link_leads_somewhere(
    pages: dict[str, BeautifulSoup], site: Path
) -> None:
    problems = []
    for name, page in pages.items():
        for tag in page.select("[src], [href]"):
            address = tag.get("src") or tag["href"]
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                loads = tag.name != "a" and parts.scheme != "data"
                problems += [f"{name}: {address}"] * loads
            elif parts.path:
                file = (site / name).parent / unquote(parts.path)
                problems += [f"{name}: {address} is not there"] * (not file.exists())
    assert not problems


def test_every_picture_has_an_alt_text(pages: dict[str, BeautifulSoup]) -> None:
    pictures = [(name, p) for name, page in pages.items() for p in page.select("img, [role=img]")]
    assert len(pictures) > 30
    missing = [n for n, p in pictures if len(p.get("alt", p.get("aria-label", ""))) < 20]
    assert not missing


def test_formulas_are_drawn_by_the_browser(pages: dict[str, BeautifulSoup]) -> None:
    lesson = pages["notebooks/01_uniform_quantization.html"]
    assert len(lesson.select("math")) > 10 and "$" not in lesson.select_one("article p").text
    assert not [s["src"] for page in pages.values() for s in page.select("script[src*=athJax]")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, site: Path) -> Iterator[Open]:
    """Open a page, as a file unless an address is given; it asks for nothing that is elsewhere."""
    errors: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_page(name: str, **options: object) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.set_default_timeout(120 * SECOND)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.extend([said.text] * (said.type == "error")))
        page.goto(name if ":" in name else (site / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    parts = [urlsplit(address) for address in asked]
    elsewhere = [p for p in parts if p.scheme not in ("file", "data", "blob")]
    assert asked and not [p for p in elsewhere if p.hostname != "127.0.0.1"]
    assert not errors


def wait_for(page: Page, setting: str) -> str:
    """Wait until all characters are read at a setting; what the page says then."""
    page.wait_for_function(
        """setting => vit.done &&
        document.querySelector('#vit-status').textContent.startsWith(`${setting}: top-1`)""",
        arg=setting,
        timeout=240 * SECOND,
    )
    return page.locator("#vit-status").inner_text()


def logits_of(page: Page, kind: str = "now") -> Tensor:
    return torch.tensor(page.evaluate(f"vit.{kind}.map(logits => [...logits])"))


@in_browser
def test_the_network_in_the_page_is_the_one_of_torch(visit: Open) -> None:
    page = visit("try.html")
    said = wait_for(page, "W3A8, MinMax")
    demo = load_demo("vit", 32)
    images, labels = (part[::EVERY] for part in demo.test)
    with torch.no_grad():
        assert (logits_of(page, "float") - demo.model(images)).abs().max() < 1e-4

        def compute(**options: object) -> Tensor:
            config = eq.QuantConfig(execution="plain", **options)
            qmodel = eq.quantize(demo.model, config)
            eq.calibrate(qmodel, demo.calibration)
            return qmodel(images)

        # A number halfway between two integers may go the other way: most agree to the last digits.
        wanted, found = compute(weight_bits=3), logits_of(page)
        assert (wanted - found).abs().amax(1).median() < 1e-4
        assert (wanted.argmax(1) == found.argmax(1)).float().mean() > 0.97
        right = int((found.argmax(1) == labels).sum())
        assert f"top-1 {100 * right / len(labels):.1f} %" in said
        interval = [f"{100 * end:.1f}" for end in eq.Accuracy(right, len(labels)).interval]
        assert f"[{', '.join(interval)}] on {len(labels)} test images" in said

        page.get_by_role("slider", name="Activations").press("End")
        wait_for(page, "W3Afloat, MinMax")
        wanted = compute(weight_bits=3, float_points=ACTIVATIONS)
        assert (wanted - logits_of(page)).abs().max() < 1e-4


@in_browser
def test_sliders_move_and_labels_flip(visit: Open) -> None:
    page = visit("try.html")
    weights = page.get_by_role("slider", name="Weights")
    flips = page.locator("#vit-grid .vit-flip")
    wait_for(page, "W3A8, MinMax")
    nearest = page.evaluate("vit.errors.at(-1)")
    few = flips.count()
    assert few and "→" in flips.first.inner_text()
    assert "flipped from" in (flips.first.get_attribute("aria-label") or "")

    page.get_by_role("radio", name="by GPTQ").check()
    assert "GPTQ moved" in wait_for(page, "W3A8, GPTQ")
    assert page.evaluate("vit.errors.at(-1)") < nearest

    weights.press("ArrowLeft")
    expect(page.locator("#vit-weights-said")).to_have_text("2 bits")
    expect(weights).to_have_attribute("aria-valuetext", "2 bits")
    page.get_by_role("radio", name="scales by MinMax").check()
    wait_for(page, "W2A8, MinMax")
    assert flips.count() > few

    page.get_by_label("Show").select_option("flips")
    shown = page.locator("#vit-grid li:visible")
    assert shown.count() > 60 and shown.count() == flips.count()
    flips.first.focus()
    page.keyboard.press("Enter")
    tables = page.locator("#vit-detail table")
    expect(tables).to_have_count(2)
    assert tables.first.locator("tr").count() == 5

    weights.press("End")  # float weights: no integers to choose
    expect(page.get_by_role("radio", name="by GPTQ")).to_be_disabled()
    page.get_by_role("button", name="float").click()
    assert "Nothing is rounded" in wait_for(page, "float")
    assert flips.count() == 0 and max(page.evaluate("vit.errors")) == 0


PIXELS = "id => document.getElementById(id).toDataURL()"


@in_browser
def test_a_landscape_turns_and_a_search_plays(visit: Open) -> None:
    page = visit("play.html")
    seen = {page.evaluate(PIXELS, "play-surface")}
    said = page.locator("#play-surface-said").inner_text()
    turn = page.get_by_role("slider", name="Turn")
    turn.press("ArrowRight")
    seen.add(page.evaluate(PIXELS, "play-surface"))
    assert "seen from 40 degrees" in (
        page.locator("#play-surface").get_attribute("aria-label") or ""
    )
    assert page.locator("#play-surface-said").inner_text() == said, "turning changes no number"
    box = page.locator("#play-surface").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 360, box["y"] + 230, steps=3)
    page.mouse.up()
    assert page.evaluate("play.turn") != 40 and page.evaluate("play.tilt") > 35
    seen.add(page.evaluate(PIXELS, "play-surface"))
    page.get_by_role("radio", name="nothing jumps").check()
    seen.add(page.evaluate(PIXELS, "play-surface"))
    assert len(seen) == 4
    assert "nothing jumps" in page.locator("#play-surface-said").inner_text()

    values = torch.tensor(page.evaluate("PLAY_DATA.landscapes.map(one => one.values)"))
    bends = values.diff(n=2, dim=-1).abs().mean((1, 2))
    assert bends.argmin() == 3 and bends[3] < 0.05 * bends[0], "frozen and float is the smooth one"

    search = page.evaluate("PLAY_DATA.search")
    assert (
        len(search) == 19 and "The first scales" in page.locator("#play-history-said").inner_text()
    )
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#play-at-said")).to_have_text("19", timeout=120 * SECOND)
    expect(page.locator("#play-history-said")).to_contain_text("Evaluation 19 of 19")
    page.get_by_role("slider", name="Evaluation").press("Home")
    expect(page.locator("#play-history-said")).to_contain_text("The first scales")


# The contrast of every visible text to what lies behind it.
CONTRASTS = """roots => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => {
    const [r, g, b] = channels(color).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = channels(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] === 1) return getComputedStyle(e).backgroundColor;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll(roots)].map(element => {
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))]
      .sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_readable_in_both_themes_and_narrow_windows(visit: Open, scheme: str) -> None:
    for name in [
        "index.html",
        "try.html",
        "play.html",
        "notebooks/02_quantizing_a_vit.html",
        "api/gptq.html",
    ]:
        page = visit(name, color_scheme=scheme, viewport={"width": 800, "height": 900})
        page.locator("h1").first.wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 800, f"{name} is {width} pixels wide"
        texts = "article :is(h1, p, li, th, td, label, button, legend, .highlight span)"
        found = page.evaluate(CONTRASTS, texts)
        assert len(found) > 10 and min(found) >= 4.5, (name, min(found))


@in_browser
def test_the_search_finds(visit: Open, site: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}/index.html"
    command = ["http.server", str(port), "--bind=127.0.0.1", f"--directory={site}"]
    with server(command, site, address):
        page = visit(address)
        page.get_by_role("textbox", name="Search").fill("temperature")
        page.keyboard.press("Enter")
        page.locator("#search-results").get_by_role(
            "link", name="The infoNCE loss"
        ).first.wait_for()
        page.close()
