"""Splats in a real browser: the page, the page inside a page and the widget show what the loss sees, and let go of what they took."""
import base64
import io
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from chromium import Browser, need_chromium
from clouds import cloud, psnr, truth
from zerolab.render.splats import render_splats
from zerolab.scene.cameras import orbit
from zerolab.jobs.cli import main
from zerolab.scene.gaussians import Gaussians, covariances, eval_sh, save_ply
from zerolab.view.local import STYLE, WIDGET_JS, LocalView, camera_dict, dict_camera, embed, splat_html, viewer_js
from zerolab.view.webgl import INFLATE_JS, pack_splats, unpack_splats

HIDE = "for (const kind of ['note', 'gear']) document.querySelector('.zl-' + kind).style.display = 'none'"

VIEWPORT = "<meta name=viewport content='width=device-width, initial-scale=1'>"


@pytest.fixture(scope="module")
def browser():
    need_chromium()
    browser = Browser()
    yield browser
    browser.close()


def picture(browser, view="window.splatView"):
    browser.wait(f"{view} && {view}.idle()", seconds=60)
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))


def opened(browser, page, size=(200, 200), **how):
    browser.messages.clear()
    browser.requests.clear()
    browser.open(page, width=size[1], height=size[0], **how)
    browser.evaluate(HIDE)
    return picture(browser)


@pytest.mark.parametrize("degree", [0, 3])
def test_the_page_shows_what_the_loss_sees(browser, tmp_path, degree):
    gaussians, size, white, black = cloud(degree=degree), (240, 200), (1., 1., 1.), (0., 0., 0.)
    page = splat_html(gaussians, tmp_path / "a.html", azimuth=20, elevation=35, radius=2.5, target=(0, 0, 0), background=white)
    camera = lambda *where: dict_camera(camera_dict(orbit(*where), where[-1]), size)
    assert psnr(opened(browser, page, size), truth(gaussians, camera([20.], 35., 2.5))) > 48
    for azimuth, elevation, radius in ((140., -10., 2.5), (20., 35., .4)):
        told = json.dumps(camera_dict(orbit([azimuth], elevation, radius), radius))
        browser.evaluate(f"splatView.camera.set({told}); splatView.changed()")
        assert psnr(picture(browser), truth(gaussians, camera([azimuth], elevation, radius))) > 48, "another view; then inside the cloud"
    browser.evaluate("splatView.set({background: [0, 0, 0]})")
    assert psnr(picture(browser), truth(gaussians, camera([20.], 35., .4), black)) > 48
    assert browser.outside() == [] and browser.messages == []


def test_a_mouse_and_fingers_turn_it(browser, tmp_path):
    page = splat_html(cloud(400), tmp_path / "a.html", title="</script><b>x", background=(1, 1, 1))
    before, start = opened(browser, page), browser.evaluate("splatView.camera.value")
    browser.drag((100, 100), (160, 90))
    after = picture(browser)
    assert np.abs(after.astype(float) - before).mean() > 3 and after.std() > 10
    turned = browser.evaluate("splatView.camera.value")
    radius = lambda camera: np.linalg.norm(np.subtract(camera["position"], camera["target"]))
    assert radius(turned) == pytest.approx(radius(start)) and turned["target"] == start["target"]
    browser.evaluate("document.querySelector('canvas').ondblclick()")
    assert np.array_equal(picture(browser), before), "a double click goes back"
    browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=100, y=100, deltaX=0, deltaY=300)
    browser.wait("splatView.camera.position[2] > " + str(start["position"][2] * 1.2))
    touch = lambda kind, *points: browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=[dict(x=x, y=y, id=k) for k, (x, y) in enumerate(points)])
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    touch("touchStart", (80, 100), (120, 100))
    touch("touchMove", (40, 100), (160, 100))
    touch("touchEnd")
    near = browser.evaluate("splatView.camera.value")
    assert radius(near) < 0.6 * radius(start), "a pinch comes nearer"
    assert browser.evaluate("document.querySelector('b') === null") and browser.messages == []


def test_modes_and_settings_do_what_they_say(browser, tmp_path):
    gaussians, camera = cloud(800, degree=1), orbit([30.], 20., 2.6, size=(200, 200))
    page = splat_html(gaussians, tmp_path / "a.html", camera=camera, background=(0, 0, 0), cameras=orbit([210., 90.], 10., 2.6, size=(80, 80)))
    opened(browser, page)
    shown = lambda **look: (browser.evaluate(f"splatView.set({json.dumps(look)})"), picture(browser))[1]
    everything = dict(mode="rgb", show_cameras=False, sh_degree=1, splat_scale=1, min_opacity=0, crop=None)
    drawn = render_splats(gaussians, camera)
    assert psnr(shown(**everything | dict(mode="alpha")), 255 * drawn.alpha[0].clamp(0, 1).numpy().repeat(3, -1)) > 48
    plain = Gaussians(*gaussians.tensors()[:4], gaussians.sh[:, :1])
    assert psnr(shown(**everything | dict(sh_degree=0)), truth(plain, camera, (0., 0., 0.))) > 48
    small = Gaussians(gaussians.means, gaussians.quats, 0.4 * gaussians.scales, gaussians.opacities, gaussians.sh)
    assert psnr(shown(**everything | dict(splat_scale=.4)), truth(small, camera, (0., 0., 0.))) > 48
    solid = pack_splats(gaussians)
    opaque = unpack_splats(solid)
    assert psnr(shown(**everything | dict(min_opacity=.5)), truth(opaque[opaque.opacities >= .5], camera, (0., 0., 0.))) > 48
    box = (opaque.means > torch.tensor([-.3, -9, -.2])).all(1) & (opaque.means < torch.tensor([.5, 9, 9])).all(1)
    assert psnr(shown(**everything | dict(crop=[[-.3, -9, -.2], [.5, 9, 9]])), truth(opaque[box], camera, (0., 0., 0.))) > 48
    near, far = browser.evaluate("splatView.values().range")
    depth = shown(**everything | dict(mode="depth")).astype(float)
    alpha, level = drawn.alpha[0, ..., 0].numpy(), ((drawn.depth[0, ..., 0] - near) / (far - near)).numpy()
    expected = alpha * np.interp(level, np.arange(6) / 5, 255 * np.array([.91, .82, .66, .47, .27, 0]))
    assert (alpha > .7).sum() > 1000 and np.abs(depth[..., 1] - expected)[alpha > .7].max() < 4, "the colour tells the mean depth"
    without = shown(**everything)
    assert np.abs(shown(**everything | dict(show_cameras=True)).astype(float) - without).max() > 100
    assert shown(**everything | dict(mode="points")).std() > 10 and shown(**everything | dict(mode="normal")).std() > 10
    browser.evaluate("splatView.set({show_cameras: true}); splatView.go(1)")
    looked = truth(gaussians, orbit([90.], 10., 2.6, size=(200, 200)), (0., 0., 0.))
    assert psnr(shown(**everything), looked) > 48, "a button looks through an input camera"
    assert browser.messages == []


def test_the_controls_stand_beside_the_picture(browser, tmp_path):
    page = splat_html(cloud(200, degree=2), tmp_path / "a.html", cameras=orbit([0., 90.], 10., 2.6, size=(80, 80)), pictures=np.ones((2, 8, 8, 3)))
    for size, dark in (((500, 800), False), ((844, 390), True)):
        opened(browser, page, size, dark=dark)
        assert browser.evaluate("getComputedStyle(document.querySelector('.zl')).backgroundColor") == ("rgb(18, 20, 23)" if dark else "rgb(255, 255, 255)")
        browser.evaluate("document.querySelector('.zl-gear').click()")
        picture(browser)
        stage, panel = (browser.evaluate(f"document.querySelector('.zl-{name}').getBoundingClientRect().toJSON()") for name in ("stage", "panel"))
        assert stage["right"] <= panel["left"] + 1 or stage["bottom"] <= panel["top"] + 1
        assert stage["width"] * stage["height"] > 0.5 * size[0] * size[1], "the object keeps most of the window"
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[1]
        assert browser.evaluate("[...document.querySelectorAll('.zl-panel select')].every(select => select.selectedIndex >= 0)")
    browser.evaluate("const s = document.querySelector('.zl-panel select'); s.value = 'depth'; s.onchange()")
    assert browser.evaluate("splatView.look.mode") == "depth" and browser.messages == []


def test_an_empty_cloud_is_a_blank_page_and_no_error(browser, tmp_path):
    page = splat_html(cloud()[:0], tmp_path / "a.html", background=(1, 1, 1))
    assert opened(browser, page, (100, 100)).min() == 255 and browser.messages == []
    browser.evaluate("document.querySelector('.zl-gear').click()")
    assert browser.messages == []


def test_an_old_browser_inflates_by_itself(browser, tmp_path):
    page = splat_html(cloud(300, degree=1), tmp_path / "a.html", background=(1, 1, 1))
    new = opened(browser, page, (100, 100))
    old = page.read_text().replace("<script>(() => {", "<script>delete globalThis.DecompressionStream; delete Uint8Array.fromBase64; (() => {")
    (tmp_path / "old.html").write_text(old)
    assert np.array_equal(opened(browser, tmp_path / "old.html", (100, 100)), new)
    numbers = np.random.default_rng(0)
    for data in (b"", b"a", bytes(5000), numbers.bytes(70000), bytes(numbers.geometric(.2, 40000).astype(np.uint8)) * 2):
        for level in (0, 1, 9):
            squeezed = list(zlib.compress(data, level))
            browser.evaluate(f"{INFLATE_JS}; globalThis.made = inflate(new Uint8Array({squeezed}))")
            assert browser.evaluate("made.length") == len(data)
            assert browser.evaluate("made.reduce((sum, byte) => (sum * 31 + byte) % 1000003, 7)") == hashed(data)


def hashed(data):
    value = 7
    for byte in data: value = (value * 31 + byte) % 1000003
    return value


def test_a_damaged_page_says_so(browser, tmp_path):
    page = splat_html(cloud(300), tmp_path / "a.html")
    text = page.read_text()
    start = text.index('<script id="splats"')
    (tmp_path / "b.html").write_text(text.replace('"count": 300', '"count": 301'))
    (tmp_path / "c.html").write_text(text[:start + 400] + "AAAA" + text[start + 404:])
    for name in ("b.html", "c.html"):
        browser.open(tmp_path / name, width=300, height=200)
        browser.wait("!document.querySelector('.zl-note').textContent.startsWith('loading')")
        assert "splats ·" not in browser.evaluate("document.querySelector('.zl-note').textContent")


def test_a_page_inside_a_page_is_alive(browser, tmp_path):
    gaussians = cloud(300, degree=1)
    output = embed(gaussians, azimuth=20, radius=2.5, target=(0, 0, 0), height=200, background=(1, 1, 1))
    (tmp_path / "a.html").write_text(f"<!doctype html>{VIEWPORT}<body style='margin:0;width:200px'>{output._repr_html_()}<div style='height:2000px'></div>")
    browser.messages.clear()
    browser.requests.clear()
    browser.open(tmp_path / "a.html", width=200, height=400)
    shot = lambda: np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))[45:165, 15:185]
    expected = truth(gaussians, orbit([20.], 20., 2.5, size=(200, 200)))[45:165, 15:185]
    for _ in range(200):
        if psnr(shot(), expected) > 48: break
        browser.evaluate("new Promise(done => setTimeout(done, 50))")
    assert psnr(shot(), expected) > 48
    before = shot()
    browser.drag((100, 100), (150, 95))
    browser.evaluate("new Promise(done => setTimeout(done, 500))")
    assert np.abs(shot().astype(float) - before).mean() > 3
    assert browser.outside() == [] and browser.messages == []


MODEL = """
globalThis.workers = 0;
const Plain = Worker;
globalThis.Worker = class extends Plain { constructor(...a) { super(...a); workers++; } terminate() { workers--; super.terminate(); } };
globalThis.contexts = [];
const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function(kind, ...a) {
  const made = get.call(this, kind, ...a);
  if (kind === 'webgl2' && made && !contexts.includes(made)) contexts.push(made);
  return made;
};
globalThis.alive = () => contexts.filter(gl => !gl.isContextLost()).length;
class Model {
  constructor(values) { this.values = structuredClone(values); this.listeners = {}; this.saved = 0; }
  get(name) { return this.values[name]; }
  set(name, value) {
    for (const [key, one] of typeof name === 'string' ? [[name, value]] : Object.entries(name)) {
      this.values[key] = one;
      (this.listeners['change:' + key] || []).forEach(listener => listener());
    }
  }
  save_changes() { this.saved++; }
  on(event, listener) { (this.listeners[event] ||= []).push(listener); }
  off(event, listener) { this.listeners[event] = this.listeners[event].filter(other => other !== listener); }
}
globalThis.show = async (number, values) => {
  globalThis.models = []; globalThis.ends = [];
  for (let k = 0; k < number; k++) {       // each from a module of its own, as anywidget does it
    const {default: widget} = await import(URL.createObjectURL(new Blob([source], {type: 'text/javascript'})));
    const model = new Model(values), el = document.body.appendChild(document.createElement('div'));
    models.push(model);
    ends.push(widget.render({model, el}));
  }
  globalThis.views = [...document.querySelectorAll('.zl')].map(root => root.splatView);
};
"""


@pytest.fixture
def widgets(browser, tmp_path):
    "A page that shows so many widgets of these splats, with a stand-in for the kernel's side."
    def show(number, gaussians, height=80, **settings):
        view = LocalView(gaussians, height=height, **settings)
        names = ("settings", "camera", "height", *view.settings["look"])
        values = json.dumps({name: getattr(view, name) for name in names})
        packed, data = json.dumps(view.packed["header"]), list(bytes(view.packed["data"]))
        view.close()
        script = (f"globalThis.source = {json.dumps(viewer_js() + WIDGET_JS)}; {MODEL} const bytes = new Uint8Array({data});"
                  f"globalThis.packed = {{header: {packed}, data: new DataView(bytes.buffer)}};"
                  f"globalThis.ready = show({number}, {{...{values}, packed}}).then(() => true);")
        script = script.replace("</", "<\\/")
        (tmp_path / "widgets.html").write_text(f"<!doctype html>{VIEWPORT}<style>{STYLE}</style><body style='margin:0'><script>{script}</script>")
        browser.messages.clear()
        browser.open(tmp_path / "widgets.html", width=300, height=400)
        browser.evaluate("ready")
    return show


def test_twenty_widgets_take_one_context_and_give_everything_back(browser, widgets):
    widgets(20, cloud(200))
    browser.wait("views.length === 20 && views.slice(0, 4).every(view => view.idle())", seconds=60)
    assert browser.evaluate("alive()") == 1
    browser.wait("views.filter(view => view.held).length < 10", seconds=30)      # those out of sight let go
    browser.evaluate("document.scrollingElement.scrollTop = 1e6")
    browser.wait("views.at(-1).idle() && views.at(-1).held && !views[0].held", seconds=30)
    browser.evaluate("views[0].painter.gl.getExtension('WEBGL_lose_context').loseContext(); views.at(-1).ask()")   # as a browser does under pressure
    browser.wait("views.at(-1).idle() && views.at(-1).painter.lost === false && alive() === 1", seconds=30)
    corner = "views.at(-1).canvas.getContext('2d').getImageData(0, 0, 300, 80).data.reduce((sum, byte) => sum + (byte < 200), 0)"
    assert browser.evaluate(corner) > 1000, "drawn again in a new context"
    browser.evaluate("ends.forEach(end => end())")
    assert browser.evaluate("alive()") == 0 and browser.evaluate("workers") == 0
    assert browser.evaluate("document.querySelectorAll('canvas').length") == 0
    assert browser.evaluate("models.every(model => Object.values(model.listeners).every(list => list.length === 0))")
    assert browser.messages == []


def test_the_kernel_and_the_mouse_move_the_same_camera(browser, widgets):
    gaussians = cloud(300)
    widgets(1, gaussians, height=300, background=(1, 1, 1))
    browser.wait("views[0].idle()")
    browser.drag((150, 150), (220, 130))
    browser.wait("models[0].saved > 0")
    there = browser.evaluate("models[0].get('camera')")
    browser.evaluate(HIDE)
    camera = dict_camera(there, (300, 300))
    assert psnr(picture(browser, "views[0]")[:300], truth(gaussians, camera)) > 48, "the trait says what is seen"
    told = camera_dict(orbit([200.], -30., 2.))
    saved = browser.evaluate("models[0].saved")
    browser.evaluate(f"models[0].set('camera', {json.dumps(told)}); models[0].set('splat_scale', 0.5)")
    small = Gaussians(gaussians.means, gaussians.quats, 0.5 * gaussians.scales, gaussians.opacities, gaussians.sh)
    assert psnr(picture(browser, "views[0]")[:300], truth(small, orbit([200.], -30., 2., size=(300, 300)))) > 48
    assert browser.evaluate("models[0].saved") == saved, "what comes from the kernel is not sent back"
    browser.evaluate("models[0].set('packed', {...packed, header: {...packed.header, middle: [-9, -9, -9]}})")
    browser.wait("views[0].data.header.middle[0] === -9")
    assert picture(browser, "views[0]")[:300].min() == 255, "new splats, out of sight"
    assert browser.messages == []


def test_a_slow_machine_turns_coarsely_and_rests_fine(browser, tmp_path):
    page = splat_html(cloud(4000), tmp_path / "a.html", background=(1, 1, 1))
    opened(browser, page)
    browser.evaluate("splatView.camera.turn(30, 0); splatView.changed()")
    fine = picture(browser)
    browser.evaluate("splatView.camera.turn(-30, 0); splatView.changed()")
    picture(browser)
    browser.evaluate("Object.assign(splatView, {slow: true, known: true}); splatView.camera.turn(30, 0); splatView.changed(true); clearTimeout(splatView.rest)")
    browser.wait("splatView.coarse && !splatView.sorting")
    assert browser.evaluate("splatView.values().keep") == 4
    rough = "splatView.draw(), splatView.canvas.toDataURL().split(',')[1]"
    rough = np.asarray(Image.open(io.BytesIO(base64.b64decode(browser.evaluate(rough)))).convert("RGB"))
    blocks = lambda image: image.reshape(10, 20, 10, 20, 3).mean((1, 3))
    assert psnr(rough, fine) < 45 and psnr(blocks(rough), blocks(fine)) > 24, "other splats, the same colours"
    browser.evaluate("splatView.moving = false; splatView.ask()")
    assert np.array_equal(picture(browser), fine)


def test_the_command_writes_a_page_and_says_where(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/train/1/artifacts"
    run.mkdir(parents=True)
    for age, name in enumerate(("new.ply", "old.ply")):
        save_ply(cloud(20 + age, degree=1), run / name)
        os.utime(run / name, (1e9 - age, 1e9 - age))
    assert main(["view", "runs/train/1"]) == 0
    assert capsys.readouterr().out == "zerolab: 20 Gaussians of runs/train/1/artifacts/new.ply, 0.1 MB: runs/train/1/artifacts/new.ply.html\n"
    assert main(["view", "runs/train/1", "--list"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [f"runs/train/1/artifacts/{name}.ply" for name in ("new", "old")]
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert main(["view", str(run / "old.ply"), "--out", "a.html", "--sh-degree", "0", "--axes", "y-down"]) == 0
    assert opened == [(tmp_path / "a.html").as_uri()]
    text = (tmp_path / "a.html").read_text()
    assert '"degree": 0' in text and '"count": 21' in text and '"axis": [0.0, -1.0, 0.0]' in text
    assert main(["view", str(run / "old.ply"), "--out", "a.html", "--no-open"]) == 0 and len(opened) == 1
    (run / "bad.ply").write_bytes((run / "old.ply").read_bytes()[:-9])
    (run / "a.txt").write_text("x")
    capsys.readouterr()
    for source, said in (("gone.ply", "no file or folder gone.ply"), (str(run / "bad.ply"), "truncated"), (str(run / "a.txt"), "suffix")):
        assert main(["view", source, "--no-open"]) == 2 and said in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["view", "empty"]) == 2 and "no Gaussians in empty" in capsys.readouterr().err


def test_where_workers_are_forbidden_the_page_sorts_by_itself(browser, tmp_path):
    page = splat_html(cloud(300), tmp_path / "a.html", background=(1, 1, 1))
    expected = opened(browser, page, (100, 100))
    (tmp_path / "b.html").write_text(page.read_text().replace("worker-src blob:", "worker-src 'none'"))
    browser.messages.clear()
    browser.open(tmp_path / "b.html", width=100, height=100)
    browser.evaluate(HIDE)
    assert np.array_equal(picture(browser), expected)


def test_packing_keeps_every_number_within_half_its_step():
    for degree in range(4):
        gaussians = cloud(500, degree)
        packed = pack_splats(gaussians)
        seen, steps = unpack_splats(packed), packed.header["steps"]
        found = torch.cdist(seen.means.double(), gaussians.means.double()).argmin(1)
        assert len(found.unique()) == 500
        original = gaussians[found]
        assert (seen.means - original.means).abs().max() <= 0.51 * steps["position"]
        assert (seen.scales / original.scales).log2().abs().max() <= 0.51 * steps["octave"]
        assert (seen.opacities - original.opacities).abs().max() <= 0.51 / 255
        assert all((difference.abs() <= 0.51 * steps["sh"]).all() for difference in seen.sh[:, 1:] - original.sh[:, 1:])
        direction = torch.nn.functional.normalize(torch.tensor([1., -2., .5]), dim=0).expand(500, 3)
        assert (eval_sh(seen.sh, direction) - eval_sh(original.sh, direction)).abs().max() < 0.04
        axes = original.scales.amax(1)[:, None, None]**2
        assert ((covariances(seen) - covariances(original)) / axes).abs().max() < 0.03


def test_a_far_floater_costs_no_precision_and_a_strange_splat_no_error():
    gaussians = cloud(200)
    far = Gaussians(torch.cat([gaussians.means[:-1], torch.tensor([[500., -800., 300.]])]), *gaussians.tensors()[1:])
    packed = pack_splats(far)
    assert packed.header["steps"]["position"] < 2e-5
    assert (unpack_splats(packed).means - torch.tensor([500., -800., 300.])).norm(dim=1).min() < 1e-4
    strange = cloud(4, degree=4)
    strange.scales[0], strange.quats[1], strange.opacities[2], strange.sh[3, 0] = 0., 0., 7., 100.
    seen = unpack_splats(pack_splats(strange))
    assert seen.sh_degree == 3 and seen.opacities.max() == 1. and (seen.opacities == 0).sum() == 1
    same = cloud(1)[[0] * 50]
    assert (unpack_splats(pack_splats(same)).means - same.means).abs().max() < 1e-5, "no extent, no division by it"


def test_half_a_file_is_never_left(tmp_path, monkeypatch):
    splat_html(cloud(3), tmp_path / "a.html")
    whole = (tmp_path / "a.html").read_text()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): splat_html(cloud(4), tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == whole and len(list(tmp_path.iterdir())) <= 2


def test_the_widget_carries_a_picture_and_new_data():
    view = LocalView(cloud(200), title="A cloud")
    data, _ = view._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/jpeg"} <= set(data)
    view.set_data(cloud(300, degree=1))
    assert view.packed["header"]["count"] == 300
    with pytest.raises(ValueError, match="NaN"): view.set_data(Gaussians(cloud(5).means * np.nan, *cloud(5).tensors()[1:]))
    assert len(view.gaussians) == 300, "the last good splats stay"
    view.close()


def test_importing_the_module_loads_no_widgets():
    script = "import sys, zerolab.view.local; print({'anywidget', 'ipywidgets', 'vtk', 'pyvista'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"
