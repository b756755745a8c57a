"""The page of a sweep in a browser: what it shows, what a person does with it, and what a hostile run cannot; and the diff of two runs."""
import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from chromium import Browser, chromium
from zerolab.jobs import cli
from zerolab.jobs.compare import bootstrap_interval, find_sweep, grouped, read_runs, t_interval, write_comparison
from zerolab.jobs.diff import diff_page, diff_runs, diff_text
from zerolab.jobs.report import write_report

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"


def png(grey, size=24):
    buffer = io.BytesIO()
    Image.new("L", (size, size), grey).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_run(folder, params, status="done", error="", pictures=1, **metrics):
    "What a worker leaves."
    (folder / "attempts").mkdir(parents=True)
    drawn = [new_output("display_data", data={"image/png": png(100 + k + params.get("seed", 0))}) for k in range(pictures)]
    cells = [new_markdown_cell("# Fit"), new_code_cell("rate = 1", metadata={"tags": ["parameters"]}), new_code_cell("fit()"),
             new_markdown_cell("## Front"), new_code_cell("draw()", outputs=drawn)]
    for name, content in {
            "spec.json": {"id": folder.name, "params": params, "notebook": "fit.ipynb", "commit": "0123456789ab", "dirty": True, "gpus": 0.5},
            "run.json": {"status": status, "error": error, "cause": "cell" * bool(error), "cell": 3 if error else None, "attempt": 1, "seconds": 4.,
                         "peak_memory": 210., "started": "2026-01-01T10:00:00", "notebook": "fit.ipynb", "machine": {"name": "m", "cores": 2}},
            "attempts/1.json": {}, "metrics.json": metrics, "in.ipynb": new_notebook(cells=cells), "out.ipynb": new_notebook(cells=cells)}.items():
        (folder / name).write_text(json.dumps(content))
    rows = [{"step": step, "loss": 2. ** -step + 0.1 * params.get("seed", 0)} for step in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(folder)
    return folder


@pytest.fixture
def sweep(tmp_path):
    "2 rates x 2 shapes x 2 seeds; one has failed with words that would like to be more."
    parent, points = tmp_path / "runs/fit", []
    for k in range(8):
        rate, shape, seed = (0.01, 0.1)[k // 4], ("cup", "plate")[k // 2 % 2], k % 2
        params = dict(rate=rate, shape=shape, seed=seed, note=HOSTILE)
        if k == 7: write_run(parent / f"{k:016x}", params, "failed", f"failed in cell [3] `fit()`: ValueError: {HOSTILE}", pictures=0)
        else: write_run(parent / f"{k:016x}", params, psnr=20. + 10 * rate + (shape == "cup") + seed, words=HOSTILE)
        points.append({"id": f"{k:016x}", "params": params})
    (parent / "sweeps").mkdir()
    about = {"id": "feedc0ffee12", "name": "fit", "notebook": "fit.ipynb", "created": "2026-01-01T10:00:00", "points": points}
    (parent / "sweeps/feedc0ffee12.json").write_text(json.dumps(about))
    return SimpleNamespace(runs=tmp_path / "runs", parent=parent, path=write_comparison("feed", tmp_path / "runs").path)


def test_a_sweep_is_found_by_every_name(sweep):
    listing = sweep.parent / "sweeps/feedc0ffee12.json"
    for name in ("feed", "feedc0ffee12", "fit", listing): assert len(find_sweep(name, sweep.runs).folders) == 8
    assert find_sweep("fit", sweep.runs).place == find_sweep(sweep.path.parent.with_suffix(".json")).place == listing.with_suffix("")
    assert find_sweep(sweep.parent).place.name == "all" and write_comparison(sweep.parent).runs == 8
    (sweep.parent / "sweeps/feedd0d0.json").write_text(listing.read_text())
    for name, said in [("feed", "2 sweeps begin with feed"), ("x", "or a notebook: fit"), ("feed*", "no sweep"), ("", "no sweep"), ("..", "no")]:
        with pytest.raises(ValueError, match=said.replace("*", ".")): find_sweep(name, sweep.runs)
    listing.write_text("[1]")
    with pytest.raises(ValueError, match="no list of the points"): find_sweep(listing)


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).gamma(2., size=(40, 5))
    for row, ends in zip(values, t_interval(values, 0.9)):
        assert np.allclose(ends, stats.t.interval(0.9, 4, row.mean(), stats.sem(row)))
    theirs = stats.bootstrap((values[0],), np.mean, method="percentile", n_resamples=20_000, random_state=0).confidence_interval
    assert np.allclose(bootstrap_interval(values[0], resamples=20_000), theirs, rtol=0.03)


def test_groups_hold_runs_that_are_done_and_differ_in_their_seed(sweep):
    groups = grouped(read_runs(find_sweep("feed", sweep.runs)), ["rate", "shape", "seed"], ["psnr", "nothing"])
    assert [(group["runs"], group["of"][0]["n"]) for group in groups] == [([0, 1], 2), ([2, 3], 2), ([4, 5], 2), ([6, 7], 1)]
    assert groups[0]["of"][0]["mean"] == 21.6 and groups[0]["of"][0]["t"] == [15.247, 27.953] and "t" not in groups[3]["of"][0]
    assert groups[0]["of"][1] is None


def test_only_what_changed_is_read_again(sweep):
    assert write_comparison("feed", sweep.runs).anew == 0
    first = sweep.parent / f"{0:016x}"
    with open(first / "metrics.jsonl", "a") as file: file.write('{"step": 9, "loss": 0.5}\n')
    assert write_comparison("feed", sweep.runs).anew == 1
    pictures = sweep.path.parent / "pictures"
    before = set(pictures.iterdir())
    assert len(before) == 2, "equal pictures are one file"
    next(iter(before)).unlink()
    assert write_comparison("feed", sweep.runs).anew == 1 and set(pictures.iterdir()) == before, "a picture that went is made again"
    for k in range(8): (sweep.parent / f"{k:016x}" / "out.ipynb").unlink()
    assert write_comparison("feed", sweep.runs).anew == 8 and not list(pictures.iterdir()), "and one that nobody has is removed"
    (sweep.path.parent / "cache.json").write_text('{"0000000000000000": {"stamp": 3}, "x": []}')
    assert write_comparison("feed", sweep.runs).anew == 8, "a damaged cache is no cache"


def test_runs_that_are_queued_or_damaged_are_on_the_page(sweep):
    queued = sweep.parent / f"{0:016x}"
    for path in ("run.json", "attempts/1.json", "out.ipynb", "metrics.json", "metrics.jsonl", "report.html"): (queued / path).unlink()
    for k, text in enumerate(["[]", "{", "3", '{"cells": [{"outputs": [{"data": {"image/png": "%%%"}}]}, {"cell_type": "markdown"}]}']):
        (sweep.parent / f"{k + 1:016x}/out.ipynb").write_text(text)
    (sweep.parent / f"{2:016x}/metrics.json").write_text("[]")
    page = write_comparison("feed", sweep.runs).path.read_text()
    assert '"status":"queued"' in page and page.count('"status":"done"') == 6 and "<b>1</b> queued" in page


def visible(browser): return browser.evaluate("[...document.querySelectorAll('#runs tbody tr')].filter(row => !row.hidden).length")
def column(browser, k): return browser.evaluate(f"[...document.querySelectorAll('#runs tbody tr')].map(row => row.children[{k}].textContent)")
def settled(browser): browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@chromium
def test_a_person_sorts_filters_brushes_and_looks(sweep):
    browser = Browser()
    try:
        browser.open(sweep.path, width=1200)
        browser.wait("document.querySelectorAll('#runs tbody tr').length == 8")
        assert browser.evaluate("document.title") == "Fit" and visible(browser) == 8, browser.messages
        def click(expression):
            browser.evaluate(f"{expression}.click(), 1")
            settled(browser)
        def type_in(text):
            browser.evaluate(f"(b => {{ b.value = {json.dumps(text)}; b.dispatchEvent(new Event('input')); }})(document.getElementById('filter'))")
            settled(browser)
        head = "[...document.querySelectorAll('#runs th button')].find(x => x.textContent == 'psnr')"
        click(head)
        assert column(browser, 5)[:2] == ["23", "22.1"] and column(browser, 5)[-1] == "–", "the largest first, what has no value last"
        click(head)
        assert column(browser, 5)[0] == "20.1" and column(browser, 5)[-1] == "–"
        for text, count in [("cup", 4), ("shape=cup rate<0.05", 2), ("rate=0.1", 4), ("seed!=0", 4), ("failed", 1), ("psnr>=22", 3), ("", 8)]:
            type_in(text)
            assert visible(browser) == count, text
        assert browser.evaluate("document.querySelectorAll('#lines path[data-k]').length") == 8
        browser.evaluate("document.getElementById('lines').scrollIntoView({block: 'center'}), 1")
        x, y, width, height = browser.box("document.querySelector('[data-axis=rate] .brush')")
        browser.drag((x + width / 2, y + height - 2), (x + width / 2, y + height * 0.7))
        settled(browser)
        assert visible(browser) == 4 and browser.evaluate("document.querySelectorAll('#lines path.off').length") == 4
        kept = browser.evaluate("[...document.querySelectorAll('#runs tbody tr')].filter(row => !row.hidden).map(row => row.children[2].textContent)")
        assert set(kept) == {"0.01"}
        click("document.getElementById('clear')")
        assert visible(browser) == 8
        said = browser.evaluate("document.getElementById('said').textContent")
        assert "95 %" in said and "Student" in said and "n = 1 to 2 seeds" in said and "1 of 4 points have one value" in said
        assert browser.evaluate("[...document.querySelectorAll('#bars .bar')].length") == 3
        assert browser.evaluate("[...document.querySelectorAll('#pictures tbody tr')].map(r => r.querySelectorAll('figure').length)") == [4, 4]
        assert "failed" in browser.evaluate("document.querySelector('#pictures figure.none').textContent")
        browser.wait("[...document.images].filter(x => x.naturalWidth == 24).length == 7")
        click("document.querySelector('#pictures figure button')")
        first = browser.evaluate("document.querySelector('#large p').textContent")
        browser.key("ArrowRight", 39)
        assert browser.evaluate("document.getElementById('look').open")
        assert browser.evaluate("document.querySelector('#large p').textContent") != first
        click("document.getElementById('close')")
        for k in (0, 7): click(f"document.querySelector('#runs tr[data-k=\"{k}\"] input')")
        assert browser.evaluate("document.getElementById('command').textContent") == f"zerolab diff {0:016x} {7:016x}"
        click("document.getElementById('averaged')")
        assert browser.evaluate("document.querySelectorAll('#curves path.mean').length") == 4
        assert "taken" not in browser.evaluate("document.title") and not [m for m in browser.messages if "onerror" in m]
        browser.open(sweep.path, width=390, dark=True)
        browser.wait("document.querySelectorAll('#runs tbody tr').length == 8")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("document.querySelector('#runs a').href").endswith(f"/fit/{0:016x}/report.html")
        assert browser.outside() == [] and browser.messages == [], "nothing is asked of the network, and the policy had nothing to forbid"
    finally: browser.close()


@chromium
def test_one_file_holds_its_pictures_and_a_diff_fits_a_phone(sweep, tmp_path):
    mail = write_comparison("feed", sweep.runs, out=tmp_path / "mail.html").path
    assert "pictures/" not in mail.read_text()
    first, last = sweep.parent / f"{0:016x}", sweep.parent / f"{7:016x}"
    page = diff_page(diff_runs(first, last), tmp_path / "diff.html")
    browser = Browser()
    try:
        browser.open(mail)
        browser.wait("[...document.images].filter(x => x.naturalWidth == 24).length == 7")
        browser.open(page, width=390)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("document.images.length && [...document.images].every(x => x.naturalWidth == 24)")
        assert "taken" not in browser.evaluate("document.title") and browser.outside() == [] and browser.messages == []
    finally: browser.close()


def test_a_diff_says_what_differs(sweep):
    first, last = sweep.parent / f"{0:016x}", sweep.parent / f"{7:016x}"
    text = diff_text(diff_runs(first, last))
    for line in ("+0.09 (+900.0 %)", "cup", "plate", "code: the same (2 cells)", "failed in cell [3]"): assert line in text, text
    assert all(len(line) < 200 for line in text.splitlines())
    book = json.loads((last / "in.ipynb").read_text())
    book["cells"][2]["source"] = ["fit(\n", "    2)"]
    (last / "in.ipynb").write_text(json.dumps(book))
    assert "code: 1 of 2 cells differ" in diff_text(diff_runs(first, last))


def test_both_are_commands(sweep, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ZEROLAB_ROOT", str(tmp_path))
    assert cli.main(["report", "feed"]) == 0 and "8 runs" in (said := capsys.readouterr().out) and "sweeps/feedc0ffee12/report.html" in said
    assert cli.main(["report", str(sweep.parent), "--out", str(tmp_path / "one.html")]) == 0 and (tmp_path / "one.html").is_file()
    assert cli.main(["report", str(sweep.parent / f"{0:016x}")]) == 0 and f"{0:016x}/report.html" in capsys.readouterr().out
    assert cli.main(["report", "nobody"]) == 2 and "no sweep 'nobody'" in capsys.readouterr().err
    assert cli.main(["diff", f"{0:016x}", str(sweep.parent / f"{7:016x}"), "--page", str(tmp_path / "d.html")]) == 0
    assert "parameters:" in capsys.readouterr().out and (tmp_path / "d.html").is_file()
    assert cli.main(["diff", f"{0:016x}", "0"]) == 2 and "8 runs begin with '0'" in capsys.readouterr().err
