"""The views in a real JupyterLab, by a real browser: turned, slid, switched, saved, also while a cell computes; nothing leaves the machine."""
import json
import time
from io import BytesIO

import nbformat
import numpy as np
import pytest
from PIL import Image

from chromium import Browser, jupyterlab, need_chromium, need_opengl

CELLS = ["""\
import threading, time
import torch
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians, rgb_to_sh
from zerolab.view.remote import RemoteView, use_in_pyvista
from zerolab.view.widgets import view
make = torch.Generator().manual_seed(0)
means = torch.nn.functional.normalize(torch.randn(1500, 3, generator=make), dim=-1) * torch.tensor([1., .6, .3])
gaussians = Gaussians(means, torch.randn(1500, 4, generator=make), .02 + .05 * torch.rand(1500, 3, generator=make), torch.full((1500,), .9),
                      rgb_to_sh((means > 0).float())[:, None])
""", """\
v = view(gaussians, size=(240, 320), title="Test splats")
v
""", """\
import pyvista as pv
use_in_pyvista()
plotter = pv.Plotter(window_size=(200, 150))
plotter.add_mesh(pv.Cone(), color="orange")
plotter.show()
""", """\
began, steps = time.monotonic(), 0
while time.monotonic() - began < SECONDS:
    steps += sum(range(100))
    if UPDATE and int(10 * (time.monotonic() - began)) > UPDATE:
        UPDATE += 1
        v.gaussians = Gaussians(means * (1 - .02 * UPDATE), *gaussians.tensors()[1:])
"the loop is over"
"""]


PANEL = "[...jupyterapp.shell.widgets('main')].find(x => x.sessionContext)"


class Lab:
    "A notebook in JupyterLab, as a person sees it."
    def __init__(self, browser, address, folder):
        self.browser, self.address, self.folder = browser, address, folder

    def open(self):
        b = self.browser
        b.call("Emulation.setDeviceMetricsOverride", width=1100, height=1000, deviceScaleFactor=1, mobile=False)
        b.call("Page.navigate", url=f"{self.address}/lab/tree/test.ipynb")
        b.wait(f"!!window.jupyterapp && {PANEL}?.sessionContext?.session?.kernel?.status == 'idle'", 90)
        b.wait(f"{PANEL}.content?.widgets?.length > 3", 30)
        return self

    def start(self, k):
        "Run cell `k`, and do not wait."
        self.browser.evaluate(f"(notebook => {{ notebook.activeCellIndex = {k}; notebook.deselectAll(); "
                              f"jupyterapp.shell.activateById({PANEL}.id); jupyterapp.commands.execute('notebook:run-cell'); return 1; }})({PANEL}.content)")

    def run(self, k, seconds=90):
        self.start(k)
        self.browser.wait(f"{PANEL}.content.widgets[{k}].model.executionState == 'idle' && "
                          f"!!{PANEL}.content.widgets[{k}].model.executionCount", seconds)

    def kernel(self, code):
        "What code prints in the kernel."
        return self.browser.evaluate("""(async code => {
            const future = PANEL.sessionContext.session.kernel.requestExecute({code, store_history: false});
            let text = ''; future.onIOPub = message => { text += message.content.text || (message.content.traceback || []).join('\\n'); };
            await future.done; return text; })""".replace("PANEL", PANEL) + f"({json.dumps(code)})").strip()

    def computes(self, k): return self.browser.evaluate(f"{PANEL}.content.widgets[{k}].model.executionState == 'running'")


def cell(k): return f"document.querySelectorAll('.jp-Notebook .jp-Cell')[{k}]"
def canvas(k): return f"{cell(k)}.querySelector('canvas')"
def button(label): return f"[...document.querySelectorAll('button')].find(x => x.textContent.trim() == '{label}')"
def frames(browser, k): return int(browser.evaluate(f"+({canvas(k)}?.dataset.frames || 0)"))
def at_rest(browser, k): browser.wait(f"{canvas(k)}?.dataset.sharp == 'true'", 30)


def drag(browser, k, steps=8, seconds=0., reach=60):
    "Drag in the view of cell `k`, with `seconds` between steps."
    x, y, width, height = browser.box(canvas(k))
    x, y = x + width / 2, y + height / 2
    browser.mouse("mousePressed", x, y, clickCount=1)
    for i in range(1, steps + 1):
        browser.mouse("mouseMoved", x + reach * i / steps, y + 10 * i / steps)
        time.sleep(seconds)
    browser.mouse("mouseReleased", x + reach, y + 10, clickCount=1)


def wait_for(happened, seconds=30):
    "Until something is so."
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    need_chromium()
    need_opengl()
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    book.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(book, folder / "work/test.ipynb")
    with jupyterlab(folder, folder / "work", ZEROLAB_STATIC="0", ZEROLAB_RUN_DIR=str(folder / "run")) as address:
        browser = Browser()
        try:
            lab = Lab(browser, address, folder).open()
            lab.run(0)
            lab.run(1)
            browser.evaluate(f"{cell(1)}.scrollIntoView(), 1")
            at_rest(browser, 1)
            yield lab
            assert browser.outside(address, address.replace("http", "ws")) == [], "nothing leaves the machine"
        finally: browser.close()


def test_a_drag_turns_the_picture(lab):
    b = lab.browser
    before, count = b.picture(canvas(1)), frames(b, 1)
    assert before.std() > 10
    drag(b, 1)
    b.wait(f"{canvas(1)}.dataset.frames > {count + 1}")
    at_rest(b, 1)
    assert b.picture(canvas(1)).std() > 10 and np.abs(b.picture(canvas(1)) - before).mean() > 3


def test_keys_stay_in_the_view(lab):
    b = lab.browser
    cells = b.evaluate("document.querySelectorAll('.jp-Notebook .jp-Cell').length")
    b.evaluate(f"{canvas(1)}.focus(), 1")
    before = b.picture(canvas(1))
    for key in "xz": b.key(key)
    time.sleep(.2)
    at_rest(b, 1)
    assert np.abs(b.picture(canvas(1)) - before).mean() > 3
    assert b.evaluate("document.querySelectorAll('.jp-Notebook .jp-Cell').length") == cells, "x did not cut the cell"
    b.key("r")
    label = b.evaluate(f"{canvas(1)}.getAttribute('aria-label')")
    assert label.startswith("Test splats") and b.evaluate(f"[...{cell(1)}.querySelectorAll('.zerolab-bar button')].every(x => x.ariaLabel)")


def test_a_slider_changes_the_picture_and_it_is_not_black(lab):
    b = lab.browser
    at_rest(b, 1)
    before, count = b.picture(canvas(1)), frames(b, 1)
    handle = f"[...{cell(1)}.querySelectorAll('.widget-slider')].find(x => x.textContent.includes('splat size')).querySelector('.noUi-handle')"
    b.evaluate(f"{handle}.focus(), 1")
    for _ in range(8): b.key("ArrowLeft", 37)
    b.wait(f"{canvas(1)}.dataset.frames > {count}")
    b.wait(f"{canvas(1)}.dataset.sharp == 'true'")
    time.sleep(.6)
    at_rest(b, 1)
    after = b.picture(canvas(1))
    assert after.std() > 10 and np.abs(after - before).mean() > 2
    for _ in range(8): b.key("ArrowRight", 39)


def test_two_frames_a_second_and_more_while_a_cell_computes(lab):
    b = lab.browser
    assert lab.kernel("SECONDS, UPDATE = 6, 0") == ""
    at_rest(b, 1)
    before = b.picture(canvas(1))
    lab.start(3)
    b.wait(f"{PANEL}.content.widgets[3].model.executionState == 'running'")
    time.sleep(.5)
    b.evaluate(f"{cell(1)}.scrollIntoView(), 1")           # JupyterLab scrolls to the cell that runs
    began, count = time.monotonic(), frames(b, 1)
    while time.monotonic() - began < 3: drag(b, 1, 10, .03, reach=90)
    rate = (frames(b, 1) - count) / (time.monotonic() - began)
    picture = b.picture(canvas(1))
    assert lab.computes(3)
    print(f"{rate:.1f} frames a second while a cell computes")
    assert rate >= 2, (b.box(canvas(1)), lab.kernel("print(vars(v.remote.stage.pace))"))
    assert picture.std() > 10 and np.abs(picture - before).mean() > 1
    b.wait(f"{cell(3)}.innerText.includes('the loop is over')", 30)


def test_training_is_seen_while_it_happens(lab):
    b = lab.browser
    at_rest(b, 1)
    lab.kernel("SECONDS, UPDATE = 3, 1")
    count, before = frames(b, 1), b.picture(canvas(1))
    lab.start(3)
    time.sleep(.5)
    b.evaluate(f"{cell(1)}.scrollIntoView(), 1")
    time.sleep(1.5)
    assert lab.computes(3) and frames(b, 1) - count >= 2 and np.abs(b.picture(canvas(1)) - before).mean() > 1
    b.wait(f"{PANEL}.content.widgets[3].model.executionState == 'idle'", 30)


def test_pyvista_shows_any_scene(lab):
    b = lab.browser
    lab.run(2)
    b.evaluate(f"{cell(2)}.scrollIntoView(), 1")
    at_rest(b, 2)
    before, count = b.picture(canvas(2)), frames(b, 2)
    assert before.std() > 10
    drag(b, 2)
    b.wait(f"{canvas(2)}.dataset.frames > {count}")
    at_rest(b, 2)
    assert np.abs(b.picture(canvas(2)) - before).mean() > 1 and lab.kernel("print(plotter.camera.position[0] > 1e6)") == "False"
    b.evaluate(f"{cell(1)}.scrollIntoView(), 1")


def test_the_view_in_the_browser_and_a_page_for_a_colleague(lab):
    b = lab.browser
    lab.kernel("v.gaussians = gaussians")                  # as large as before the training
    b.evaluate(f"{button('in the browser')}.click(), 1")
    b.wait(f"!{cell(1)}.querySelector('.zerolab-canvas') && !!{canvas(1)}", 30)
    wait_for(lambda: b.picture(canvas(1)).std() > 10)
    drag(b, 1, reach=1)                                    # the outline of the focus
    before = b.picture(canvas(1))
    drag(b, 1)
    wait_for(lambda: np.abs(b.picture(canvas(1)) - before).mean() > 3)
    b.evaluate(f"{button('Save HTML')}.click(), 1")
    b.wait(f"{cell(1)}.innerText.includes('Saved ')", 30)
    b.evaluate(f"{button('in the kernel')}.click(), 1")
    b.wait(f"!!{cell(1)}.querySelector('.zerolab-canvas')", 30)
    at_rest(b, 1)
    assert b.picture(canvas(1)).std() > 10


def test_a_closed_tab_leaves_the_kernel_at_rest_and_comes_back(lab):
    b = lab.browser
    b.evaluate("jupyterapp.commands.execute('docmanager:save').then(() => 1)")
    stored = json.loads((lab.folder / "work/test.ipynb").read_text())
    data = stored["cells"][1]["outputs"][0]["data"]
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(data) or "image/jpeg" in data, "a picture is in the stored notebook"
    page = next((lab.folder / "run").glob("*.html"))
    b.open(page, 400, 300)
    b.wait("window.splatView && splatView.frames && splatView.idle()", 60)
    b.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert np.asarray(Image.open(BytesIO(b.screenshot())).convert("RGB")).std() > 10, "the saved page opens from a file"
    lab.open()
    b.wait(f"!!{canvas(1)}", 60)
    b.evaluate(f"{cell(1)}.scrollIntoView(), 1")
    b.wait(f"{canvas(1)}.dataset.frames > 0", 60)
    assert lab.kernel("print([len(part.stage.pace.viewers) for part in [v.remote]])") == "[1]", "the closed tab is forgotten"
    count = frames(b, 1)
    drag(b, 1)
    b.wait(f"{canvas(1)}.dataset.frames > {count}")


def test_deleted_views_leave_no_thread(lab):
    many = ("many = [RemoteView(gaussians, renderer='cpu', size=(30, 40)) for _ in range(10)]\n"
            "for one in many: one.loop.put(dict(kind='hello', id='a', width=40, height=30))\n"
            "time.sleep(.2)\n")
    count = "print(sum(thread.name == 'zerolab-view' for thread in threading.enumerate()))"
    assert int(lab.kernel(many + count)) >= 10
    assert lab.kernel("for one in many: one.close()\nprint(sum(one.loop.thread is not None for one in many))") == "0"
    assert lab.kernel("import ipywidgets\nipywidgets.Widget.close_all()\n" + count) == "0"


def test_a_restarted_kernel_is_said_and_a_new_run_is_alive(lab):
    b = lab.browser
    lab.run(1)
    b.wait(f"{canvas(1)}?.dataset.frames > 0", 60)
    b.evaluate(f"{PANEL}.sessionContext.session.kernel.restart().then(() => 1)")
    b.wait(f"{PANEL}.sessionContext.session.kernel.status == 'idle'", 60)
    if b.evaluate(f"!!{canvas(1)}"):
        drag(b, 1)
        b.wait(f"/The kernel of this view is gone|Waiting for the kernel/.test({cell(1)}.innerText)", 15)
    lab.run(0)
    lab.run(1)
    b.wait(f"{canvas(1)}?.dataset.frames > 0", 60)
    count = frames(b, 1)
    drag(b, 1)
    b.wait(f"{canvas(1)}.dataset.frames > {count}")
    assert "Traceback" not in b.evaluate("document.querySelector('.jp-Notebook').innerText")
