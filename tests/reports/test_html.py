"""The page: whole, quiet, and loading nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_prune.reports import Cost, Latency, Moment, PruningReport, Validation, report_html, write_html
from lightning_prune.reports.charts import epochs, linear, logarithmic
from lightning_prune.reports.origin import commit
from lightning_prune.structure import Outcome

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('x')</script> & \"http://a.b/c.js\""
VOID = {"meta", "line", "polyline", "rect", "link", "img", "br", "input"}
LATENCY = [Latency(ms, 0.1, batch, "cpu <of> a test", 2, 40) for batch, ms in ((1, 3.0), (64, 40.0))]
REPORT = PruningReport(
    [("net.conv1", 64, 32), (EVIL, 10, 1)],
    Cost(4_112_000_000, 25_557_032),
    Cost(2_056_000_000, 12_000_000, (EVIL,)),
    LATENCY,
    [replace(LATENCY[0], median_ms=2.0), replace(LATENCY[1], median_ms=20.0)],
    monitor=EVIL,
    accuracy={"dense": 0.98, "before": 0.97, "after": 0.9651, "finetuned": 0.9772},
    error=2.5e-16,
    tolerance=1e-8,
    renormalised=[EVIL],
    warnings=[EVIL],
    bytes_before=102_000_000,
    bytes_after=48_000_000,
    history=[Moment(EVIL, e, 10 * e, "grow", 0.1 * e, 0.3 / e, 0.5**e, 2.0**e) for e in range(1, 9)],
    validations=[Validation(e, 10 * e, 0.9 + 0.01 * e, slim=e > 6) for e in range(8)],
    config={EVIL: {EVIL: [EVIL], "ratio": 0.5, "ignore": None}},
    commit="0123456789" * 4 + "+",
)


class Page(HTMLParser):
    """Tags in their order, attributes, and text; fails where tags don't balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


BARE = PruningReport([], Cost(None, 0), Cost(None, 0), versions={})
SPARSE = replace(REPORT, unit="weights", latency_before=(), latency_after=())


@pytest.mark.parametrize("report", [REPORT, BARE, SPARSE], ids=["full", "bare", "weights"])
def test_it_is_whole_and_refers_to_nothing_outside(report: PruningReport) -> None:
    text = report_html(report)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not set(page.tags) & {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use", "form"}
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "srcset", "href", "xlink:href", "data", "action", "background", "ping", "xmlns"}
    assert not any(name.startswith("on") for name in names)
    assert "default-src 'none'; style-src 'unsafe-inline'" in [value for _, value in page.attributes]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert page.tags.count("style") == page.tags.count("h1") == page.tags.count("main") == 1


def test_names_are_text_and_nothing_else() -> None:
    page = Page(report_html(REPORT))
    assert EVIL not in report_html(REPORT)
    # layer, monitor, norm, warning, method, callback, argument, value, operator: as they were given
    assert sum(EVIL in words for words in page.words) >= 9
    assert "cpu <of> a test" in " ".join(page.words)


def test_it_says_what_the_report_says() -> None:
    words = [word for word in Page(report_html(REPORT)).words if word]
    for wanted in (
        *("4.112 G", "2.056 G", "-50.0 %", "12 M", "102 MB", "48 MB"),
        *("0.9800", "0.9700", "0.9651", "0.9772", "-0.0149", "-0.0028"),
        *("batch 1", "batch 64", "1.50x", "2.00x", "75 %", "100 %", "2.5e-16", "0123456789" * 4),
        *("surgery", "64 to 32", "10 to 1", "0.5", "None"),
    ):
        assert wanted in words, wanted


def test_variants_have_tables_of_their_own_and_the_fastest_is_named() -> None:
    taken = [
        [Latency(ms, 0.1, batch, "cpu", 1, 40, variant) for variant, ms in times for batch in (1, 64)]
        for times in (
            (("eager", 4.0), ("channels_last", 3.0), ("compiled", 2.0)),
            (("eager", 2.0), ("channels_last", 1.0), ("compiled", 1.05)),
        )
    ]
    taken[1][0] = replace(taken[1][0], median_ms=1.06)  # no worse than the spread of the fastest
    report = replace(REPORT, latency_before=taken[0], latency_after=taken[1])
    assert [(each.batch, each.variant) for each in report.fastest] == [(1, "eager"), (64, "channels_last")]
    assert '"fastest": [' in report.to_json() and PruningReport.from_json(report.to_json()) == report
    words = Page(report_html(report)).words
    assert "Fastest slim network: eager at batch 1, channels_last at batch 64." in words
    heads = [words.index(variant) for variant in ("eager", "channels_last", "compiled")]
    assert heads == sorted(heads) and words.count("measured speed-up") == 3
    assert words[words.index("compiled") :].count("1.90x") == 2
    assert REPORT.fastest == () and "Fastest" not in report_html(REPORT)


def test_what_is_unknown_is_left_out_or_said() -> None:
    words = " ".join(Page(report_html(BARE)).words)
    assert "No metric was named" in words and "No layer lost any" in words
    assert "Latency" not in words and "The sparse stage" not in words and "Commit" not in words


def test_what_was_asked_for_stands_beside_what_was_reached() -> None:
    budget = Outcome("macs", asked=500, reached=498, dense=1000)
    words = " ".join(Page(report_html(replace(REPORT, budgets=(budget,), round_to=8))).words)
    assert "Budget: 0.500 of MACs, reached 0.498. Widths are multiples of 8." in words


def test_phones_and_dark_rooms() -> None:
    text = report_html(REPORT)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme: dark)" in text


def test_a_point_for_every_epoch_and_every_validation() -> None:
    text = report_html(REPORT)
    assert text.count('<path class="dot') == 8 + 4 * 8
    assert text.count("<polyline") == 5
    assert text.count('class="mark"') == 1


def test_axes_hold_their_values() -> None:
    for values in ([0.0], [3.0, 3.0], [-1.0, 2.5], [1e-9, 2e-9], [0.983, 0.9841], [5.0, 12345.0]):
        axis = linear(values)
        assert 2 <= len(axis.ticks) <= 6
        assert all(-1e-6 <= axis.place(value) <= 100 + 1e-6 for value in values)
    for values in ([0.0], [1.0], [0.0, 1e-7, 1.0], [3.0, 4e5], [0.2, 0.3]):
        axis = logarithmic(values)
        assert 2 <= len(axis.ticks) <= 6
        assert all(0 <= axis.place(value) <= 100 for value in values)
    for low, high in ((0, 0), (0, 1), (3, 200), (0, 99_999)):
        assert 1 <= len(epochs(low, high).ticks) <= 10


def test_the_data_behind_the_page_survives_json() -> None:
    assert PruningReport.from_json(REPORT.to_json()) == REPORT
    assert [(each.batch, each.share) for each in REPORT.speed] == [(1, 0.75), (64, 1.0)]
    assert '"share": 0.75' in REPORT.to_json()


def test_writing_replaces_the_page_and_leaves_no_other(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    write_html(BARE, target)
    write_html(REPORT, target)
    assert target.read_text(encoding="utf-8") == report_html(REPORT)
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_the_commit_is_gits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # which may lie in a checkout
    assert commit(tmp_path) is None  # no repository
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = commit(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == clean + "+"
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert commit() is None
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None  # no git


def test_without_a_browser_the_screenshot_says_so(tmp_path: Path) -> None:
    write_html(BARE, tmp_path / "report.html")
    command = [sys.executable, str(ROOT / "scripts" / "screenshot"), str(tmp_path / "report.html")]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "No Chromium or Chrome was found; install one, or set CHROMIUM=/path/to/it.\n"
    absent = subprocess.run([*command[:2], str(tmp_path / "no.html")], capture_output=True, text=True, check=False)
    assert absent.returncode == 1 and "is no file" in absent.stderr
