"""Reports hold what a run left, run nothing hostile, and fit a phone."""
import json

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from chromium import Browser, chromium
from zerolab.jobs.report import write_report

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
WIDE = "<table><tr>" + "".join(f"<td>column{i:03d}</td>" for i in range(60)) + "</tr></table>"


def make_run(folder, *cells, params=None, metrics=None, **spec):
    spec = dict(notebook=str(folder / "job.ipynb"), status="done", started="2026-01-01T10:00:00", seconds=3., versions={}, machine={}) | spec
    files = {"run.json": spec, "spec.json": {"params": params or {}}, "metrics.json": metrics or {}, "out.ipynb": new_notebook(cells=list(cells))}
    for name, content in files.items(): (folder / name).write_text(json.dumps(content))
    return folder


def test_text_from_a_run_is_text(tmp_path):
    hostile = "<script>alert(1)</script>"
    page = write_report(make_run(
        tmp_path, new_markdown_cell(f"# {hostile}"), new_code_cell(hostile, outputs=[new_output("stream", text=hostile)]),
        new_code_cell("2", outputs=[new_output("error", ename="E", evalue=hostile, traceback=[hostile])]),
        params={hostile: hostile}, metrics={hostile: {hostile: {hostile: hostile}}, "x": 1}, error=hostile, status="failed")).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 8


def test_what_tables_say_is_not_said_twice(tmp_path):
    page = write_report(make_run(
        tmp_path, new_code_cell("steps = 3", metadata={"tags": ["parameters"]}), new_code_cell("steps = 4", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("#| hide\nhidden()"), new_code_cell("never()", metadata={"papermill": {"status": "pending"}}),
        new_markdown_cell("![a](attachment:a.png)", attachments={"a.png": {"image/png": PIXEL}}), params={"steps": 4})).read_text()
    assert "<td>4</td>" in page and f"data:image/png;base64,{PIXEL}" in page
    for absent in ("steps = 3", "steps = 4", "hidden()", "never()"): assert absent not in page


def test_a_run_without_a_notebook_has_a_report(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed", "error": "cannot write", "notebook": "a/job.ipynb"}))
    page = write_report(tmp_path).read_text()
    assert "<title>job</title>" in page and "cannot write" in page and "show the cell" not in page


@chromium
def test_a_report_fits_a_phone_and_asks_nothing_of_the_network(tmp_path):
    outside = '<img src="http://127.0.0.1:9/a.png"><script src="http://127.0.0.1:9/a.js"></script><link rel=stylesheet href="http://127.0.0.1:9/a.css">'
    page = write_report(make_run(
        tmp_path, new_markdown_cell("# A run\n\n" + "word " * 80 + "\n\n" + "x" * 300),
        new_code_cell("y" * 500, execution_count=1, outputs=[new_output("display_data", data={"image/png": PIXEL}), new_output("stream", text="z" * 500),
                      new_output("display_data", data={"text/html": WIDE + outside})]),
        params={"a_rather_long_name_of_a_parameter": "v" * 300}, metrics={"objects": [{f"metric{i}": i / 7 for i in range(30)}]}))
    browser = Browser()
    try:
        for width, dark in [(390, False), (1280, True)]:
            browser.open(page, width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, "only tables and code may scroll sideways"
            assert browser.evaluate("document.querySelector('.scroll table').clientWidth > 0")
            assert browser.evaluate("document.querySelector('img').naturalWidth") == 1, "the picture inside is shown"
            dim = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)")
            assert (dim < 200) == dark
        refused = [message for message in browser.messages if "Content Security Policy" in message]
        assert len(refused) >= 3 and not any("ERR_CONNECTION" in message for message in browser.messages), browser.messages
    finally: browser.close()
