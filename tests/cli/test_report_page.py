"""`compare --report`: one page that holds everything and asks for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from specmpc_cli.workflows.svg import Chart, ticks
from tests.cli.conftest import Command

VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def page(pipeline: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out.html"
    arguments = ("--horizons", "3,5", "--episodes", "4", "--max-return-loss", "0.5", "--report", str(out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["specmpc", "compare", *arguments])  # as the console script sees it
        result = pipeline("compare", *arguments)
    assert result.code == 0 and f"report:  {out}" in result.out, result.err
    return out


def test_the_page_holds_every_row_chart_and_setting(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    ways = ["baseline", "policy", "naive 3", "naive 5", "corrected 3 (two-tower)", "corrected 5 (temporal)", "distilled"]
    assert all(way in parsed.texts for way in ways)
    assert "pointmass" in parsed.texts and any("chosen on 2 episodes for at most 50.0% lost return" in part for part in parsed.texts)
    assert any('"num_samples": 32' in part for part in parsed.texts) and any(
        part.startswith("specmpc compare --horizons 3,5 ") for part in parsed.texts
    )
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 1 + 2 + 8  # the front, two by age, one per speculative way
    for chart in charts:
        ET.fromstring(chart)  # well-formed
        assert "nan" not in chart and "inf" not in chart


def test_the_page_asks_for_nothing_and_adapts(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"https?://|<script|<link|src=|url\(", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text and "overflow-x: auto" in text


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs Chromium, which it does not install")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it_without_sideways_scrolling(page: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    shot = tmp_path / "page.png"
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text() + "<script>document.title = [innerWidth, document.documentElement.scrollWidth]</script>")
    options = [str(browser), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2400"]
    subprocess.run([*options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=60)
    assert shot.stat().st_size > 20_000
    shown = subprocess.run([*options, "--dump-dom", asking.as_uri()], check=True, capture_output=True, timeout=60, text=True).stdout
    title = re.search(r"<title>(\d+),(\d+)</title>", shown)
    assert title is not None and int(title[2]) <= int(title[1]), title


@pytest.mark.parametrize(("name", "message"), [("x.pdf", "--report writes .html, got 'x.pdf'"), ("none/x.html", "there is no folder")])
def test_a_page_that_cannot_be_written_is_refused_before_anything_runs(
    pipeline: Command, tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmpc_cli.workflows.compare.VectorEnv.make", lambda *_: pytest.fail("it ran"))
    assert message in pipeline.fails("compare", "--report", str(tmp_path / name))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.93, 1.01, [0.94, 0.96, 0.98, 1.0]), (-3, 950, [0, 200, 400, 600, 800]), (2, 2, [2])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_lines_break_where_there_is_no_value() -> None:
    chart = Chart((0, 3), (0, 1), "x", "y")
    chart.line([(0, 0.5), (1, float("nan")), (2, 0.5), (3, 1.0)], 2)
    path = re.findall(r'class="line s2" d="([^"]*)"', chart.svg())[0]
    assert path.count("M") == 2 and path.count("L") == 1
