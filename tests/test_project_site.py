"""The site loads nothing from elsewhere and misses nothing of its own; the README says what the front page says."""
import json
import re
import shutil
from pathlib import Path

import pytest

from zerolab.dev import site as pages
from zerolab.scene.paths import root

ROOT = Path(__file__).resolve().parents[1]


def test_readme_is_made_from_the_front_page():
    assert pages.write_readme(ROOT, check=True), "README.md differs from nbs/index.ipynb. Run: make readme"


def test_links_and_pictures_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    missing = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http") and not (ROOT / link).exists()]
    assert missing == []


def test_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text(), flags=re.M)) <= targets


def notebook(title, *cells):
    front = {"cell_type": "raw", "metadata": {}, "source": f"---\ntitle: {title}\ndescription: one line\noutput-file: {title.lower()}.html\n---"}
    return {"cells": [front, *cells], "metadata": {}}


def prose(text): return {"cell_type": "markdown", "metadata": {}, "source": text}


@pytest.fixture
def processed(tmp_path):
    """A small project as nbdev leaves it: two pages that link to each other, a formula, a table, a picture."""
    for name in ("settings.ini",): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs/_assets", tmp_path / "nbs/_assets")
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
    drawing = {"cell_type": "code", "metadata": {}, "source": "draw()", "outputs": [{"output_type": "display_data", "data": {"image/png": pixel}}]}
    entry = {"cell_type": "code", "metadata": {}, "source": "#| echo: false\nshow_doc(Ball)",
             "outputs": [{"output_type": "execute_result", "data": {"text/markdown": "---\n\n### Ball\n\nRound."}}]}
    for name, book in {"index.ipynb": notebook("Index", prose("See [the ball](scene/00_ball.ipynb#ball). $x^2$\n\n| a | b |\n|---|---|\n| 1 | 2 |")),
                       "scene/00_ball.ipynb": notebook("Ball", entry, drawing, prose("Back to [the front](../index.ipynb)."))}.items():
        path = tmp_path / "_proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(book))
    return tmp_path


def build(folder, monkeypatch):
    monkeypatch.setattr(pages, "process_notebooks", lambda folder, workers: folder / "_proc")   # nbdev's part has been done by hand
    return pages.build_site(folder)


def test_a_built_site_stands_alone(processed, monkeypatch):
    site = build(processed, monkeypatch)
    text = (site / "scene/ball.html").read_text()
    assert 'id="ball"' in text and 'href="../index.html"' in text
    assert len(list((site / "scene/assets").glob("*.png"))) == 1
    assert (site / "_assets/katex/katex.min.js").exists() and "_assets/katex/katex.min.js" in text


@pytest.mark.parametrize("link", ["[x](scene/00_gone.ipynb)", "[x](scene/00_ball.ipynb#gone)"])
def test_a_broken_link_stops_the_build(processed, monkeypatch, link):
    (processed / "_proc/index.ipynb").write_text(json.dumps(notebook("Index", prose(link))))
    with pytest.raises(SystemExit, match="Zensical refuses"): build(processed, monkeypatch)


@pytest.mark.parametrize("tag", ['<img src="https://img.example/a.png">', '<script src="//cdn.example/a.js"></script>', '<iframe src="http://x.example"></iframe>',
                                 '<div style="background: url(https://img.example/b.png)">b</div>', '<img src="gone.png">'])
def test_a_page_that_loads_from_elsewhere_stops_the_build(processed, monkeypatch, tag):
    (processed / "_proc/index.ipynb").write_text(json.dumps(notebook("Index", prose(tag))))
    with pytest.raises(SystemExit, match="index.html: loads"): build(processed, monkeypatch)


def test_the_built_documentation_stands_alone():
    """`make test` builds it first; by itself this looks at whatever site is there."""
    if not (root() / "_site/index.html").exists(): pytest.skip("no site yet: make docs")
    assert pages.audit_site(root() / "_site", "/zerolab") == []


def test_a_page_carries_no_terminal_codes_and_survives_fences():
    output = {"output_type": "stream", "name": "stdout", "text": "\x1b[1mbold\x1b[0m ```x```"}
    block, _ = pages.output_to_markdown(output, {}, "a")
    assert "\x1b" not in block and block.startswith("````{.text") and block.endswith("\n````")


def test_an_unchanged_picture_keeps_its_name():
    output = {"output_type": "display_data", "data": {"image/svg+xml": ["<svg/>"]}}
    assert pages.output_to_markdown(output, {}, "a") == pages.output_to_markdown(output, {}, "a")
