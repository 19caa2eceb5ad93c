"""The audit report as its reader gets it: a self-contained page without paths, accessible, with the answers on the first page."""
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from ml_ensemble.audit_report import find_report, render_or_warn
from ml_ensemble.cli import app
from ml_ensemble.core import IntegrityError, ModelNotFoundError, StoreError, page_file, sha256_hex
from ml_ensemble.versioning import ModelStore

VOID = {"meta", "img", "br", "source"}


class Page(HTMLParser):
    """Elements of a page in order, each with its attributes and its text; and what is not well formed."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.open, self.faults = [], [], []
        self.feed(html)
        self.faults += [f"<{tag}> is not closed" for tag, _ in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.faults.append(f"</{tag}> closes another element")

    def handle_data(self, data):
        for _, number in self.open:
            self.elements[number][2] += data

    def all(self, *tags):
        return [(attributes, text) for tag, attributes, text in self.elements if tag in tags]


@pytest.fixture(scope="module")
def html(trained) -> str:
    return trained[2].report.with_suffix(".html").read_text()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def first_page(page: Page) -> str:
    return next(text for attributes, text in page.all("section") if attributes["aria-label"] == "First page")


@pytest.mark.parametrize("question, answer", [
    ("who answers for it", r"Answers for the model: not named \(production\.owner"),
    ("what it decides", r"the probability that the price gains 0\.30 % or more over 1 bar \(4 hours\), counted from the next open"),
    ("since when, until when", r"after \d{4}-\d\d-\d\d \d\d:\d\d UTC, 14 days after its newest bar"),
    ("how good it is", r"Skill is 0\.\d{3} \(95 % interval"),
    ("how sure that is", r"\(95 % interval -?0\.\d{3} to 0\.\d{3}\) on [\d,]+ out-of-sample bars"),
    ("on what data", r"data4,200 bars, \d{4}-\d\d-\d\d \d\d:\d\d to \d{4}-\d\d-\d\d \d\d:\d\d UTC"),
    ("what changed", r"Data: 0 new bars.*A decision means the same.*The packages are the same"),
    ("whether it may be traded", r"May it be traded\? No\. It was trained on simulated candles"),
    ("what stops it", r"Trading loses more than the largest fall of the backtest \(\d+\.\d %\)"),
    ("how to go back", r"ml-ensemble rollback --reason \"\.\.\.\" puts version {first} back into production")])
def test_the_first_page_answers_ten_questions(trained, page, question, answer):
    text = re.sub(r"\s*\n\s*", " ", first_page(page))
    assert re.search(answer.replace("{first}", trained[1].version), text), question


def test_the_first_page_names_version_commit_packages_and_what_happened_to_the_last_version(trained, page):
    _, first, second = trained
    text = first_page(page)
    assert f"candidate {second.version}" in text and f"gate passes candidate {second.version}" in text
    assert second.metadata["git"]["commit"] in text and f"numpy {second.metadata['packages']['numpy']}" in text
    assert f"Version {first.version}: no settled bar is newer than its training data" in text
    assert "Limits were changed for this run: production.allow_simulated is true instead of false." in text


def test_every_part_has_its_section_and_the_contents_lead_to_each(page):
    headings = [(attributes["id"], text) for attributes, text in page.all("h2") if "id" in attributes]
    titles = [text for _, text in headings]
    assert titles[:4] == ["What it is for", "Money at risk", "What changed since the last version",
                          "What the last version said and what happened"]
    assert titles[-4:] == ["Leakage audit", "Candidate", "Verdict", "Provenance"]
    assert [(attributes["href"][1:], text) for attributes, text in page.all("a")] == headings


def test_the_page_is_well_formed_accessible_and_needs_nothing_else(html, page):
    assert page.faults == []
    assert [attributes["lang"] for attributes, _ in page.all("html")] == ["en"] and page.all("title")[0][1].startswith("Audit report")
    levels = [int(tag[1]) for tag, attributes, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    identifiers = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    images = [attributes for attributes, _ in page.all("img")]
    assert len(images) >= 8 and len({image["alt"] for image in images}) == len(images)
    assert all(len(image["alt"]) > 20 and not image["alt"].startswith("<") for image in images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    narrow = [attributes for attributes, _ in page.all("source")]
    assert len(narrow) == len(images) and all(source["srcset"].startswith("data:image/png;base64,") for source in narrow)
    assert not page.all("script", "link", "iframe", "object") and not re.search(r"url\(|@import|\son\w+=", html)
    assert all(attributes.get("scope") in ("col", "row") for attributes, text in page.all("th"))
    assert all(attributes["tabindex"] == "0" for attributes, _ in page.all("div", "pre") if attributes.get("class") in ("wide", "scroll"))
    assert len(html.encode()) < 3e6


def test_code_is_folded_in_both_files(trained, page):
    assert not any("open" in attributes for attributes, _ in page.all("details"))
    shown = [text for attributes, text in page.all("p", "li", "td", "h2", "h3")]
    assert not any("import " in text or "settings.data" in text for text in shown)
    cells = nbformat.read(trained[2].report, 4).cells
    assert all(cell.metadata["jupyter"]["source_hidden"] for cell in cells if cell.cell_type == "code")
    assert cells[0].metadata["tags"] == ["first-page"]


def test_classes_have_names_and_numbers_one_format(html, page):
    text = "|".join([text for _, text in page.all("p", "li", "td", "th")] + [attributes["alt"] for attributes, _ in page.all("img")])
    assert not re.search(r"\d\.\d{6,}|\d{5,}\.\d|\d{4,} %|class -?[01]\b|label -?[01]\b|\bnan\b|\bNone\b", text)
    assert re.search(r"hold\s*\d", re.sub("<[^>]+>", " ", html)) and "26x" not in text


def luminance(colour: str) -> float:
    parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_enough_contrast_in_light_dark_and_print():
    style = page_file("report.css").read_text()
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(palettes) == 3
    for colours in palettes:
        for name in ("ink", "soft", "link", "good", "bad", "wait"):
            for ground in ("paper", "box"):
                bright, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, (name, ground, colours)


MARKER = "folder-of-this-machine"


def executed(folder: Path, failing: bool) -> Path:
    """A notebook as papermill leaves it, full of paths, with text that looks like markup."""
    path = folder / "store" / "reports" / "weekly_retrain_1.ipynb"
    path.parent.mkdir(parents=True)
    home = f"{folder}/{MARKER}/my data"
    Path(home).mkdir(parents=True)
    outputs = [new_output("stream", name="stderr", text=f"{home}/a.csv: <script>alert(1)</script>\n"),
               new_output("display_data", {"text/html": "<table><tr><td onclick=x><img src=x onerror=alert(2)>5</td></tr></table>"}),
               new_output("display_data", {"text/markdown": f"| source |\n|---|\n| file:{home}/a.csv <script>alert(3)</script> |"})]
    error = new_output("error", ename="GapError", evalue=f"50 bars are missing in {home}/a.csv",
                       traceback=[f"\x1b[0;31mFile {home}/code.py:3\x1b[0m"])
    verdict = {"text/markdown": "# Audit report: x\n\n**✓ Passed.** Fine.\n\n## Limits\n\nNone."}
    cells = [new_markdown_cell("# Weekly retrain\n\n> Test"), new_code_cell(f"source = 'file:{home}/a.csv'", outputs=outputs),
             new_markdown_cell("## Candles"), new_code_cell("load()", outputs=[error] if failing else []),
             new_markdown_cell("## Never reached"),
             new_code_cell("first_page()", metadata={"tags": ["first-page"], "papermill": {"status": "completed"}},
                           outputs=[] if failing else [new_output("execute_result", verdict)])]
    if failing:
        banner = {"tags": ["papermill-error-cell-tag"]}
        cells.insert(0, new_markdown_cell("<span>An Exception was encountered</span>", metadata=banner))
    metadata = {"papermill": {"input_path": f"{home}/weekly.ipynb", "parameters": {"models": f"{folder}/store"}}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    render_or_warn(path)
    return path


@pytest.mark.parametrize("failing", [False, True])
def test_no_path_of_the_machine_and_no_markup_of_others_reaches_the_report(tmp_path, failing):
    report = executed(tmp_path, failing)
    notebook, html = report.read_text(), report.with_suffix(".html").read_text()
    for text in (notebook, html):
        assert MARKER not in text and str(tmp_path) not in text and "a.csv" in text
        assert "\x1b" not in text and r"\u001b" not in text
    assert "papermill" not in notebook.lower().replace("papermill runs", "")
    page = Page(html)
    assert not page.all("script", "img") and page.faults == [] and "onclick" not in html


def test_the_report_of_a_failed_run_says_so_on_top_and_ends_at_the_error(tmp_path):
    report = executed(tmp_path, failing=True)
    page = Page(report.with_suffix(".html").read_text())
    assert page.all("h1")[0][1] == "Audit report: this run failed"
    assert "✗ Failed in the section Candles" in first_page(page) and "GapError: 50 bars are missing in …/a.csv" in first_page(page)
    assert [text for attributes, text in page.all("h2") if "id" in attributes] == ["Weekly retrain", "Candles"]
    assert nbformat.read(report, 4).cells[0].source.startswith("# Audit report: this run failed")


def test_the_metadata_have_the_hash_of_both_files(trained):
    for outcome in trained[1:]:
        recorded = trained[0].read(outcome.version)[0]["report"]
        assert recorded["sha256"] == sha256_hex(outcome.report.read_bytes())
        assert recorded["html_sha256"] == sha256_hex(outcome.report.with_suffix(".html").read_bytes())


def call(store: ModelStore, *words: str):
    return CliRunner(env={"ML_ENSEMBLE_MODELS": str(store.root)}).invoke(app, ["report", *words])


def test_the_command_finds_the_report_of_a_version_and_of_the_newest_run(trained, trained_copy, monkeypatch):
    _, first, second = trained
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    shown = json.loads(call(trained_copy, "--json", "--open").stdout)
    assert shown["version"] == second.version and Path(shown["html"]).name == second.report.with_suffix(".html").name and shown["checked"]
    assert opened == [Path(shown["html"]).as_uri()]
    assert first.report.stem in call(trained_copy, first.version).stdout
    shutil.copy(first.report.with_suffix(".html"), trained_copy.root / "reports/weekly_retrain_29991231T000000Z.html")
    newest = find_report(trained_copy, newest=True)
    assert (newest.version, newest.html.stem, newest.checked) == (None, "weekly_retrain_29991231T000000Z", False)
    assert "Use one of them" in str(call(trained_copy, first.version, "--last").exception)


def test_a_changed_or_missing_report_is_not_shown_as_that_of_a_version(trained, trained_copy, tmp_path):
    page = trained_copy.root / "reports" / trained[2].report.with_suffix(".html").name
    page.write_text(page.read_text().replace("May it be traded? No", "May it be traded? Yes"))
    with pytest.raises(IntegrityError, match="its SHA-256 is another one"):
        find_report(trained_copy)
    page.unlink()
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        find_report(trained_copy)
    with pytest.raises(ModelNotFoundError):
        find_report(ModelStore(tmp_path / "empty"))
    trained_copy.promote(b"model", {})
    with pytest.raises(StoreError, match="record no report"):
        find_report(trained_copy)
