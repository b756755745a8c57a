"""Play: what the controls say is built, nothing piles up, and a person in JupyterLab can turn, move and press."""
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from html import escape, unescape

import numpy as np
import pytest

from chromium import Browser, jupyterlab, need_chromium, opengl
from zerolab.data.scans import load_mesh
from zerolab.render.light import bake_light
from zerolab.scene.cameras import orbit
from zerolab.scene.paths import root
from zerolab.shapes import zeroverse
from zerolab.shapes.zeroverse import PAPER, RELEASE, THINGS, Recipe, make_shape
from zerolab.view import play as module
from zerolab.view.play import NAMED, Controls, MeshView, Studio, Worker, play, recipe_code

NAMES = {**vars(zeroverse), "replace": replace}


@pytest.fixture
def desk():
    return play(PAPER, 4, size=64, picture_size=16, backend="cpu")


def settled(desk):
    assert desk.studio.worker.finish(60)
    return desk.studio.shape


def test_every_number_of_a_recipe_has_a_control():
    without = {"extent", "version", "materials", "materials_fingerprint"}      # cameras fit the extent; folders are no knobs
    assert {field.name for field in fields(Recipe)} - set(Controls(PAPER, 0, lambda: None).inputs) == without


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_that_is_only_shown_is_not_changed(name):
    controls = Controls(PAPER, 0, lambda: None)
    controls.names.value = NAMED[name]
    assert controls.recipe() == NAMED[name]
    assert eval(recipe_code(NAMED[name]), NAMES) == NAMED[name]


@pytest.mark.parametrize("name, value, field", [
    ("count_weights", (9, 9), (0,) * 8 + (1,)), ("height_field_probability", 1., 1.), ("height_amplitude", .5, .5), ("boolean_probability", .25, .25),
    ("exclusive", False, False), ("half_extents", (.5, .75), (.5, .75)), ("wall", (.05, .1), (.05, .1)), ("kinds", ("torus",), ("torus",)),
    ("cutters", ("cube", "cone"), ("cube", "cone")), ("resolution", 8, 8), ("texture_size", 64, 64),
    ("placement", "chain", "chain"), ("one_material", True, True), ("uv_scale", (1., 4.), (1., 4.)), ("roughness", (0., .1), (0., .1)),
    ("metallic_probability", 1., 1.), ("natural_probability", .1 + .2, .3)])
def test_a_moved_control_changes_its_field_alone_and_the_line_of_code_says_so(name, value, field):
    controls = Controls(PAPER, 0, lambda: None)
    controls.inputs[name].value = value
    assert controls.recipe() == replace(PAPER, **{name: field})
    assert eval(recipe_code(controls.recipe()), NAMES) == controls.recipe()
    controls.press("reset")
    assert controls.recipe() == PAPER


def test_a_recipe_without_a_name_is_shown_as_it_is():
    recipe = replace(THINGS, count_weights=(0, 0, 1), extent=1.5)
    controls = Controls(recipe, 0, lambda: None)
    assert controls.recipe() == recipe and controls.names.label == "given"
    assert eval(recipe_code(recipe), NAMES) == recipe


def test_choosing_a_recipe_asks_once():
    asked = []
    controls = Controls(PAPER, 0, lambda: asked.append(1))
    controls.names.value = RELEASE
    assert len(asked) == 1


def test_seeds_stay_in_range():
    controls = Controls(PAPER, 0, lambda: None)
    controls.press("back")
    assert controls.seed.value == 0
    controls.seed.value = 2**32 - 1
    controls.press("next")
    assert controls.seed.value == 2**32 - 1
    controls.press("random")
    assert 0 <= controls.seed.value < 1_000_000


def test_the_shape_shown_is_the_shape_of_the_line(desk):
    desk.controls.seed.value = 11
    desk.controls.inputs["wireframe_probability"].value = .6
    shape = settled(desk)
    line = re.search("<code>(.*?)</code>", desk.text.value)[1]
    again = eval(unescape(line), {**NAMES, "make_shape": make_shape})
    assert (again.seed, again.recipe, again.caption) == (11, shape.recipe, shape.caption)
    for name in ("positions", "uvs", "faces", "albedo"): assert getattr(again.mesh, name).tobytes() == getattr(shape.mesh, name).tobytes()
    assert escape(shape.dense_caption) in desk.text.value and f"{len(shape.mesh.faces):,} triangles" in desk.text.value


def test_a_dragged_slider_builds_the_last_value_and_few_between(desk, monkeypatch):
    built, first = [], threading.Event()
    def slow(seed, recipe):
        built.append(recipe.height_amplitude)
        first.wait(10)
        return make_shape(seed, recipe)
    monkeypatch.setattr(module, "make_shape", slow)
    values = np.linspace(.3, .9, 50).round(2)
    for value in values: desk.controls.inputs["height_amplitude"].value = float(value)
    first.set()
    assert settled(desk).recipe.height_amplitude == .9
    assert built[-1] == .9 and len(built) <= 3, built


def test_an_impossible_recipe_is_said_in_place_and_the_last_shape_stays(desk, capfd):
    before = settled(desk), desk.picture.value
    desk.controls.inputs["boolean_probability"].value = .9
    assert (settled(desk), desk.picture.value) == before
    assert "0.9 boolean and 0.2 wireframe are more than 1" in desk.note.value and "reset" in desk.note.value
    desk.controls.inputs["materials_probability"].value = .5
    desk.controls.inputs["boolean_probability"].value = .4
    assert "materials_probability needs a folder" in desk.note.value
    desk.controls.inputs["materials_probability"].value = 0.
    desk.controls.inputs["kinds"].value = ()
    assert "kinds () must be some of" in desk.note.value
    desk.controls.press("reset")
    settled(desk)
    assert desk.note.value == "" and capfd.readouterr() == ("", "")


def test_a_message_outlasts_a_build_that_was_under_way(desk, monkeypatch):
    began, gate = threading.Event(), threading.Event()
    def slow(seed, recipe):
        began.set()
        gate.wait(10)
        return make_shape(seed, recipe)
    monkeypatch.setattr(module, "make_shape", slow)
    desk.controls.press("next")
    assert began.wait(10)
    desk.controls.inputs["boolean_probability"].value = .9
    gate.set()
    assert settled(desk).seed == 5 and "more than 1" in desk.note.value


def test_without_a_first_shape_there_is_nothing_to_play_with(monkeypatch):
    def broken(seed, recipe): raise ZeroDivisionError
    monkeypatch.setattr(module, "make_shape", broken)
    with pytest.raises(RuntimeError, match="seed 3, recipe THINGS"): play(THINGS, 3, size=32, picture_size=8, backend="cpu")


def test_an_error_while_building_is_said_and_the_next_shape_is_built(desk, monkeypatch, capfd):
    def broken(seed, recipe): raise ZeroDivisionError("<b>oh</b>")
    with monkeypatch.context() as patch:
        patch.setattr(module, "make_shape", broken)
        desk.controls.press("next")
        settled(desk)
    assert "ZeroDivisionError: &lt;b&gt;oh&lt;/b&gt;" in desk.note.value and capfd.readouterr().err == ""
    desk.controls.press("next")
    assert settled(desk).seed == 6 and desk.note.value == ""


def test_an_impossible_recipe_forgets_the_wish_before_it(desk):
    settled(desk)
    gate = threading.Event()
    desk.studio.worker.tasks["turn"] = lambda: gate.wait(10)
    desk.studio.turn(0., 0., 2.7)
    while not desk.studio.worker.busy: time.sleep(.001)
    desk.controls.seed.value = 77
    desk.controls.inputs["boolean_probability"].value = .9
    gate.set()
    assert settled(desk).seed == 4


def test_a_new_wish_interrupts_the_sheet():
    told = []
    studio = Studio(lambda what, value: told.append(what), 32, 8, "cpu")
    portions, original = [], studio._sheet
    def sheet():
        portions.append(1)
        if len(portions) == 2: studio.build(2, PAPER)
        original()
    studio.worker.tasks["sheet"] = sheet
    studio.build(1, PAPER)
    assert studio.worker.finish(60)
    assert studio.shape.seed == 2 and told.count("sheet") == 1 and len(portions) == 2 + 4 and len(studio.views) == 32


def test_the_thread_ends_when_nothing_is_asked_and_gives_back_its_window():
    ended = []
    worker = Worker(dict(add=lambda: None), print, lambda: ended.append(threading.current_thread()), patience=.02)
    for round in range(3):
        worker.ask("add")
        thread = worker.thread
        thread.join(10)
        assert not thread.is_alive() and worker.thread is None and ended[round] is thread


def test_the_camera_from_the_browser_turns_the_picture(desk):
    settled(desk)
    before, camera = desk.picture.value, desk.table.children[1]
    camera.value = "100.00 30.00 2.00"
    settled(desk)
    assert desk.picture.value != before and desk.studio.camera == (100., 30., 2.)
    for nonsense in ("", "1 2", "nan 0 1", "1 2 x", "inf 0 1"): camera.value = nonsense
    settled(desk)
    assert desk.studio.camera == (100., 30., 2.) and desk.note.value == ""


def test_the_saved_file_is_the_shape(desk, tmp_path):
    shape = settled(desk)
    mesh = load_mesh(desk.save_glb(tmp_path))
    assert len(mesh.faces) == len(shape.mesh.faces) and np.allclose(mesh.bounds, shape.mesh.bounds, atol=1e-5)
    order = np.argsort(shape.mesh.material_ids, kind="stable")
    assert np.allclose(mesh.positions[mesh.faces], shape.mesh.positions[shape.mesh.faces[order]], atol=1e-5)
    assert np.array_equal(mesh.albedo[mesh.material_ids[0]], shape.mesh.albedo[shape.mesh.material_ids[order[0]]])
    desk.controls.inputs["upright_probability"].value = 1.
    settled(desk)
    assert len({desk.save_glb(tmp_path).name, *os.listdir(tmp_path)}) == 2, "another recipe, another name"
    desk.save.click()
    assert "Saved " in desk.note.value


def test_a_full_disk_is_said_in_place(desk, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    desk.save.click()
    assert "No space left on device" in desk.note.value and "slider" not in desk.note.value


@opengl
def test_pyvista_and_our_renderer_show_the_same_place_from_any_thread():
    camera, views = orbit([30.], 20., size=(160, 160)), {}
    for seed in (2, 12):
        mesh = make_shape(seed, PAPER).mesh
        light = bake_light(mesh, resolution=128)
        for backend in ("pyvista", "cpu"):
            view = views.setdefault(backend, MeshView(160, backend))
            view.show(mesh, light)
            drawn = []
            thread = threading.Thread(target=lambda: (drawn.append(view.draw(camera)), view.close()))
            thread.start()
            thread.join(60)
            views[backend, seed] = drawn[0].astype(float)
        masks = [views[backend, seed].min(2) < 250 for backend in ("pyvista", "cpu")]
        assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() > .95
        assert np.abs(views["pyvista", seed] - views["cpu", seed]).mean() < 8
    assert np.abs(views["pyvista", 2] - views["pyvista", 12]).mean() > 10, "the second shape replaces the first"


def test_without_opengl_our_renderer_draws(monkeypatch):
    monkeypatch.setattr(module, "find_opengl", lambda: None)
    desk = play(PAPER, 0, size=48, picture_size=16)
    assert desk.edges.disabled and settled(desk).seed == 0 and len(desk.picture.value) > 500
    with pytest.raises(ValueError, match="no OpenGL"): MeshView(48, "pyvista")


def test_a_stored_notebook_has_a_picture_beside_the_widget(desk):
    bundle = desk._repr_mimebundle_()
    assert {"image/jpeg", "application/vnd.jupyter.widget-view+json"} <= set(bundle)


def test_importing_the_module_does_not_load_vtk():
    script = "import sys, zerolab.view.play; print({'vtk', 'vtkmodules', 'pyvista'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the notebook, with settings of its own; its address."""
    need_chromium()
    (tmp_path / "work").mkdir()
    shutil.copy(root() / "nbs/experiments/play_zeroverse.ipynb", tmp_path / "work")
    with jupyterlab(tmp_path, tmp_path / "work") as address: yield f"{address}/lab/tree/play_zeroverse.ipynb"


def slider(label): return f"[...document.querySelectorAll('.widget-slider')].find(x => x.querySelector('label').textContent == '{label}')"
def button(label): return f"[...document.querySelectorAll('button.widget-button')].find(x => x.textContent == '{label}')"


CODE = "(document.querySelector('.zerolab-play code') || {}).textContent"
SOURCE = "document.querySelector('.zerolab-picture').src"


@pytest.mark.slow
def test_a_person_plays_in_jupyterlab(lab):
    browser = Browser()
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=1500, height=1050, deviceScaleFactor=1, mobile=False)
        browser.call("Page.navigate", url=lab)
        browser.wait("!!window.jupyterapp && !!document.querySelector('.jp-OutputArea-output img')", 60)
        assert "Error displaying widget" not in browser.evaluate("document.body.innerText"), "the stored page has a picture, not a dead widget"
        browser.wait("[...jupyterapp.shell.widgets('main')][0]?.sessionContext?.session?.kernel?.status == 'idle'", 60)
        browser.evaluate("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
        browser.wait(f"{CODE} == 'make_shape(12, PAPER)'", 120)
        browser.wait("!!document.querySelector('.zerolab-picture') && window.zerolabTurntable", 30)
        browser.evaluate("document.querySelector('.zerolab-turntable').closest('.jp-Cell').scrollIntoView()")

        before = browser.evaluate(SOURCE)
        x, y, width, height = browser.evaluate("(r => [r.x, r.y, r.width, r.height])(document.querySelector('.zerolab-picture').getBoundingClientRect())")
        browser.drag((x + width / 2, y + height / 2), (x + width / 2 + 80, y + height / 2 + 20), steps=8)
        browser.wait(f"{SOURCE} != '{before}'")
        assert browser.evaluate("document.querySelector('.zerolab-camera input').value") == "-10.00 30.00 2.70"

        browser.evaluate(f"{slider('height field')}.querySelector('.noUi-handle').focus()")
        for _ in range(5):
            for kind in ("keyDown", "keyUp"): browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
        browser.wait(f"{CODE} == 'make_shape(12, replace(PAPER, height_field_probability=0.55))'")

        browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
        browser.evaluate("document.querySelector('.zerolab-play button').click()")
        browser.wait(f"navigator.clipboard.readText().then(text => text == {CODE})")

        browser.evaluate(f"{button('next')}.click()")
        browser.wait(f"({CODE}).startsWith('make_shape(13, ')")
        browser.evaluate(f"{slider('wireframe')}.querySelector('.noUi-handle').focus()")
        for kind in ("keyDown", "keyUp"): browser.call("Input.dispatchKeyEvent", type=kind, key="End", code="End", windowsVirtualKeyCode=35)
        browser.wait("!!document.querySelector('.zerolab-play .trouble')")
        assert "0.4 boolean and 1.0 wireframe are more than 1" in browser.evaluate("document.querySelector('.zerolab-play .trouble').textContent")
        browser.evaluate(f"{button('reset')}.click()")
        browser.wait(f"{CODE} == 'make_shape(13, PAPER)' && !document.querySelector('.zerolab-play .trouble')")
        browser.evaluate(f"{button('save GLB')}.click()")
        browser.wait("document.body.innerText.includes('.glb, ')")
        assert "Traceback" not in browser.evaluate("document.body.innerText")
        address = lab.split("/lab/")[0]
        assert browser.outside(address, address.replace("http", "ws")) == [], "nothing is asked of other servers"
    finally: browser.close()
