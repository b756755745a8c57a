"""The dashboard: cheap looks, hostile runs, and a small sweep that a person watches, opens, cancels and repeats in a real JupyterLab."""
import json
import os
import re
import shutil
import time
from functools import partial
from types import SimpleNamespace

import pytest

from chromium import Browser, chromium, jupyterlab, need_chromium
from sweeping import command, write_notebook
from zerolab.jobs import dashboard as module
from zerolab.jobs.dashboard import Board, Dashboard, Series, Watched, detail, static_page
from zerolab.jobs.folder import this_process
from zerolab.jobs.sweep import grid, plan_sweep, write_plan

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">"


def write_run(folder, status="done", worker=None, error="", **params):
    (folder / "attempts").mkdir(parents=True)
    (folder / "attempts/1.json").write_text(json.dumps(worker or {"host": "elsewhere", "pid": 1, "born": 1}))
    (folder / "spec.json").write_text(json.dumps({"id": folder.name, "params": {"steps": 10} | params}))
    state = {"status": status, "attempt": 1, "error": error, "seconds": 3., "started": "2026-01-01T10:00:00+00:00"}
    (folder / "run.json").write_text(json.dumps(state))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / (1 + s)}) + "\n" for s in range(5)))
    (folder / "metrics.json").write_text(json.dumps({"psnr": 20., HOSTILE: HOSTILE}))
    (folder / "log.txt").write_text(f"{HOSTILE}\n10%\r20%")
    return folder


def test_only_runs_that_changed_are_read(tmp_path, monkeypatch):
    for k in range(30): write_run(tmp_path / f"run{k:02d}", seed=k)
    read = []
    monkeypatch.setattr(module, "read_run", lambda folder, inner=module.read_run: read.append(folder.name) or inner(folder))
    board = Board(tmp_path)
    assert len(read) == 30 and board.look() == [] and len(read) == 30
    (tmp_path / "run07/metrics.json").write_text('{"psnr": 21}')
    with open(tmp_path / "run09/log.txt", "a") as file: file.write("more")
    assert board.look() == ["run07", "run09"] and len(read) == 32 and board.brief("run07")["metrics"]["psnr"] == 21
    write_run(tmp_path / "run99", seed=99)
    shutil.rmtree(tmp_path / "run00")
    assert board.look() == ["run99"] and list(board.watched)[0] == "run01" and len(board.watched) == 30


def test_a_worker_that_dies_is_seen_though_no_file_changes(tmp_path, monkeypatch):
    watched = Watched(write_run(tmp_path / "run", "running", this_process()))
    assert watched.look() and watched.row["status"] == "running" and not watched.look()
    brief = watched.brief(["steps"])
    assert (brief["step"], brief["total"], brief["share"], brief["log"]) == (4, 10, 0.4, "20%") and brief["left"] > 0
    (tmp_path / "run/attempts/1.json").write_text(json.dumps(this_process() | {"born": 1}))
    os.utime(tmp_path / "run/attempts", ns=(0, watched.marks[1]))
    assert watched.look() and watched.row["status"] == "lost" and watched.brief([])["left"] is None and not watched.look()


@pytest.mark.parametrize("name, text", [("run.json", "[]"), ("run.json", "{"), ("run.json", "{}"), ("spec.json", "3"), ("metrics.json", "[[]]"),
                                        ("metrics.jsonl", '[]\n{"step": "x"}\n{"step": 1e400, "loss": 1}\n\xff\n'), ("out.ipynb", '{"cells": 3}')])
def test_damaged_runs_are_rows(tmp_path, name, text):
    (write_run(tmp_path / "run") / name).write_bytes(text.encode("latin1"))
    board = Board(tmp_path)
    json.dumps(board.brief("run"), allow_nan=False)
    assert detail(board.watched["run"], "live")[0] == "live" and static_page(board).count("<tr>") == 2 and sum(board.counts().values()) == 1


def test_words_of_runs_stay_words(tmp_path):
    write_run(tmp_path / "a", seed=HOSTILE)
    write_run(tmp_path / "b", "failed", error=HOSTILE, **{HOSTILE: 1})
    page = static_page(Board(tmp_path))
    assert "<img" not in page and page.count("&lt;img") == 3, "a parameter's name, its value, an error"


def test_a_long_series_is_read_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": k, "loss": 1.}) + "\n" for k in range(20000)))
    series = Series(path)
    began = time.process_time()
    series.look()
    first = time.process_time() - began
    with open(path, "a") as file: file.write('{"step": 20000, "loss": 2.0}\n')
    began = time.process_time()
    for _ in range(20): series.look()
    assert len(series.points["loss"]) == 20001 and time.process_time() - began < first / 2


def test_a_look_that_fails_is_said_and_the_next_one_works(tmp_path, monkeypatch):
    write_run(tmp_path / "runs/run", seed=1)
    live, sent = Dashboard(tmp_path / "runs", every=0.05), []
    live._start()
    live.panel.send = sent.append
    try:
        live.asked.put({"kind": "hello"})
        shutil.move(tmp_path / "runs", tmp_path / "away")
        live.asked.put({"kind": "look"})
        deadline = time.monotonic() + 20
        while not any("no sweep" in message.get("error", "") for message in sent): assert time.monotonic() < deadline; time.sleep(0.02)
        shutil.move(tmp_path / "away", tmp_path / "runs")
        (tmp_path / "runs/run/metrics.json").write_text('{"psnr": 30}')
        while sent[-1].get("kind") != "runs" or len(sent) < 3: assert time.monotonic() < deadline; time.sleep(0.02)
    finally: live.close()
    assert live.thread is None


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>CSS
body { margin: 8px; color-scheme: light dark; }</style><div id="here"></div><script type="module">
const sent = [], heard = [], model = {send: message => sent.push(message), on: (_, f) => heard.push(f), off: () => 0};
ESM
window.page = {sent, say: message => heard.forEach(f => f(message)), end: widget.render({model, el: document.getElementById('here')})};
</script>"""


@chromium
def test_the_table_without_a_kernel(tmp_path):
    for k in range(300):
        how = ("failed", None, HOSTILE) if k % 50 == 7 else ()
        write_run(tmp_path / f"runs/run{k:03d}", *how, seed=k, shape="cup" if k % 3 else HOSTILE)
    live, sent = Dashboard(tmp_path / "runs"), []
    live.panel = SimpleNamespace(send=lambda message: sent.append(json.loads(json.dumps(message, allow_nan=False))))
    live._hello({})
    live._open({"id": "run007", "what": "live"})
    (tmp_path / "runs/run003/metrics.json").write_text('{"psnr": 99}')
    live._look()
    program = module.WORDS_JS + module.TABLE_JS + module.ROWS_JS + module.PANEL_JS
    (tmp_path / "page.html").write_text(PAGE.replace("CSS", module.DASHBOARD_CSS).replace("ESM", program.replace("export default", "const widget =")))
    browser = Browser()
    def rows(): return browser.evaluate("[...document.querySelectorAll('.zd tbody tr')].filter(r => !r.hidden).map(r => r.dataset.id)")
    def say(message): browser.evaluate(f"page.say({json.dumps(message)})")
    try:
        browser.open(tmp_path / "page.html", width=1200)
        browser.wait("!!window.page")
        assert browser.evaluate("page.sent.map(m => m.kind)") == ["hello"]
        say(sent[0])
        assert rows() == [f"run{k:03d}" for k in range(300)] and "294 done" in browser.evaluate("document.querySelector('.zd-bar').textContent")
        say(sent[2])
        assert [run["id"] for run in sent[2]["runs"]] == ["run003"] and "99" in browser.evaluate(f"{row('run003')}.textContent")
        browser.evaluate("[...document.querySelectorAll('.zd-bar button')].find(b => b.textContent.includes('failed')).click(), 1")
        assert rows() == [f"run{k:03d}" for k in range(7, 300, 50)]
        browser.evaluate(f"{row('run007')}.click(), 1")
        assert browser.evaluate("page.sent.at(-1)") == {"kind": "open", "id": "run007", "what": "report"}, "of a run that failed one wants the report"
        say(sent[1] | {"what": "report"})
        assert browser.evaluate("document.querySelectorAll('.zd-live path').length") == 1
        assert browser.evaluate("[...document.querySelectorAll('.zd-detail button')].map(b => b.textContent)") == ["Live", "Log", "Try again", "×"]
        browser.evaluate("document.querySelector('.zd-detail [data-act=retry]').click(), 1")
        assert browser.evaluate("page.sent.at(-1)") == {"kind": "retry", "id": "run007"}
        if os.environ.get("DASHBOARD_PICTURES"): browser.screenshot(f"{os.environ['DASHBOARD_PICTURES']}/table.png")
        browser.evaluate("document.querySelector('.zd-detail [data-act=close]').click(), 1")
        assert browser.evaluate("document.querySelector('.zd-detail').hidden")
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        if os.environ.get("DASHBOARD_PICTURES"): browser.screenshot(f"{os.environ['DASHBOARD_PICTURES']}/phone.png")
        browser.evaluate("page.end(), 1")
        assert browser.evaluate("page.sent.at(-1).kind") == "bye"
        assert browser.evaluate("document.title") != "taken" and browser.messages == [] and browser.outside() == []
    finally: browser.close()


PARAMETERS = "seed = 0\nsteps = 20\ngo = ''"
SOURCE = """\
import time
from pathlib import Path
from zerolab.jobs.run import artifact, log_metrics, record
step = 0
while step <= steps or (seed == 0 and not Path(go).exists()):       # the first run goes on until it is let go
    log_metrics(step, loss=1 / (1 + step), psnr=10 + step / 6)
    time.sleep(0.03 if seed else 0.2)
    print(f"step {step} of seed {seed}", flush=True)
    step += 1
if seed == 1 and not artifact("again").exists():
    artifact("again").touch()
    raise ValueError("<b>not the first time</b>")"""
KEEP = """\
import torch
from PIL import Image
from zerolab.scene.gaussians import Gaussians, save_ply
ball = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
save_ply(Gaussians(ball, torch.ones(500, 4), torch.full((500, 3), 0.05), torch.full((500,), 0.9), torch.zeros(500, 1, 3)), artifact("ball.ply"))
Image.new("RGB", (64, 64), "red").save(artifact("red.png"))
_ = record(psnr=20. + seed)"""
SHOW = """\
from zerolab.jobs.dashboard import dashboard
shown = dashboard("runs/little", every=0.3)
shown"""


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with a notebook that shows the dashboard of a sweep that is planned and not yet begun."
    need_chromium()
    work = tmp_path / "work"
    work.mkdir()
    (work / "settings.ini").write_text("[DEFAULT]\nlib_name = zerolab\n")
    write_notebook(work / "watch.ipynb", SHOW, "import time\ntime.sleep(3)\nprint('slept')", language="python")
    points = grid({"seed": [0, 1, 2, 3], "go": [str(work / "go")]})
    plan = plan_sweep(write_notebook(work / "little.ipynb", SOURCE, KEEP, parameters=PARAMETERS), points, runs=work / "runs")
    write_plan(plan)
    with jupyterlab(tmp_path, work, ZEROLAB_STATIC="0", ZEROLAB_ROOT=str(work)) as address: yield address, plan


def row(name): return f"document.querySelector('.zd tr[data-id=\"{name}\"]')"
def state(name): return f"{row(name)}?.querySelector('.state')?.textContent"
def button(what): return f"document.querySelector('.zd-detail [data-{what}]')"


@pytest.mark.slow
def test_a_person_watches_a_sweep_in_jupyterlab(lab):
    address, plan = lab
    names, browser, sweep = [folder.name for folder in plan.folders], Browser(), None
    browser.wait = partial(browser.wait, seconds=240)      # JupyterLab on a busy machine
    def picture(name):
        if os.environ.get("DASHBOARD_PICTURES"): browser.screenshot(f"{os.environ['DASHBOARD_PICTURES']}/{name}.png")
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=1500, height=1100, deviceScaleFactor=1, mobile=False)
        browser.call("Page.navigate", url=f"{address}/lab/tree/watch.ipynb")
        browser.wait("!!window.jupyterapp && [...jupyterapp.shell.widgets('main')][0]?.sessionContext?.session?.kernel?.status == 'idle'")
        browser.evaluate("jupyterapp.commands.execute('notebook:run-all-cells'), 1")
        browser.wait("document.querySelectorAll('.zd tbody tr').length == 4")
        assert [browser.evaluate(state(name)) for name in names] == ["queued"] * 4

        go = plan.path.parent / "go"
        points = ("-g", "seed=0,1,2,3", "-p", "go", go)
        sweep = command("sweep", plan.path, *points, "--runs", plan.parent.parent, "--workers", "2", cwd=plan.path.parent)
        browser.wait(f"{state(names[0])} == 'running'")
        browser.wait(f"/[1-9]\\d*\\/20.* left/.test({row(names[0])}.textContent)")
        picture("running")
        browser.evaluate(f"{row(names[3])}.click(), 1")
        browser.wait(f"!!{button('act=cancel')}")
        browser.evaluate(f"{button('act=cancel')}.click(), 1")
        browser.wait(f"{state(names[3])} == 'cancelled'")
        browser.evaluate(f"{row(names[0])}.click(), 1")
        browser.wait("document.querySelector('.zd-detail')?.dataset.what == 'live' && document.querySelectorAll('.zd-live path').length == 2")
        browser.wait("/step [1-9]\\d* of seed 0/.test(document.querySelector('.zd-detail pre').textContent)")
        before = browser.evaluate("document.querySelector('.zd-live .zd-dim').textContent")
        browser.wait(f"document.querySelector('.zd-live .zd-dim').textContent != {json.dumps(before)}")
        picture("live")
        go.touch()
        browser.wait(f"{state(names[0])} == 'done' && {state(names[1])} == 'failed' && {state(names[2])} == 'done'")
        assert sweep.wait(240) == 1

        assert "<b>not the first time</b>" in browser.evaluate(f"{row(names[1])}.textContent"), "words are words"
        browser.evaluate(f"{row(names[1])}.click(), 1")
        browser.wait("!!document.querySelector('.zd-detail iframe')")
        assert browser.evaluate("document.querySelector('.zd-detail iframe').sandbox.value") == "allow-scripts"
        assert "not the first time" in browser.evaluate("document.querySelector('.zd-detail iframe').srcdoc")
        deadline = time.monotonic() + 120
        while browser.picture("document.querySelector('.zd-detail iframe')").std() < 3: assert time.monotonic() < deadline, "the report is blank"
        picture("report")
        browser.evaluate(f"{button('act=retry')}.click(), 1")
        browser.wait(f"{state(names[1])} == 'running'")
        browser.wait(f"{state(names[1])} == 'done'")
        assert "(2)" in browser.evaluate(f"{row(names[1])}.textContent")

        browser.evaluate(f"{row(names[2])}.click(), 1")
        browser.wait(f"!!{button('what=splats')}")
        browser.evaluate(f"{button('what=splats')}.click(), 1")
        browser.wait("[...document.querySelectorAll('canvas')].some(canvas => canvas.dataset.sharp == 'true')")
        browser.evaluate("document.querySelector('canvas').scrollIntoView({block: 'center'}), 1")
        assert browser.picture("document.querySelector('canvas')").std() > 5, "splats are seen"
        picture("splats")
        browser.evaluate(f"{button('what=live')}.click(), 1")
        browser.wait("!document.querySelector('canvas') && document.querySelector('.zd-live img')?.naturalWidth == 64")

        def type_in(text):
            browser.evaluate(f"(b => {{ b.value = {json.dumps(text)}; b.dispatchEvent(new Event('input')); }})(document.querySelector('.zd input'))")
        for text, shown in [("cancelled", [3]), ("psnr>=22", [2]), ("seed<2", [0, 1]), ("", [0, 1, 2, 3])]:
            type_in(text)
            found = browser.evaluate("[...document.querySelectorAll('.zd tbody tr')].filter(r => !r.hidden).map(r => r.dataset.id)")
            assert sorted(found) == sorted(names[k] for k in shown), text
        head = "[...document.querySelectorAll('.zd th button')].find(x => x.textContent.startsWith('seed'))"
        for first in (0, 3):
            browser.evaluate(f"{head}.click(), 1")
            assert browser.evaluate("document.querySelector('.zd tbody tr').dataset.id") == names[first]
        assert "slept" in browser.evaluate("document.querySelector('.jp-Notebook').innerText"), "the kernel was free for the next cell"
        browser.evaluate("[...jupyterapp.shell.widgets('main')][0].context.save().then(() => 1)")
        stored = json.loads((plan.path.parent / "watch.ipynb").read_text())["cells"][0]["outputs"][0]["data"]
        assert re.search(r"<td><b[^>]*>queued", "".join(stored["text/html"])), "the stored notebook has a table"
        assert browser.outside(address, address.replace("http", "ws")) == [], "nothing leaves the machine"
    finally:
        browser.close()
        if sweep is not None and sweep.poll() is None: sweep.terminate()
