"""RemoteView without a browser: frames, cameras, threads, and everything that can go away under it."""
import asyncio
import base64
import gc
import io
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from chromium import need_opengl, opengl
from zerolab.render.splats import render_splats
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians, rgb_to_sh
from zerolab.view.gl import ensure_gl
from zerolab.view.remote import (
    FrameLoop, PlotterDrawer, RemoteView, ViewCamera, aim, fit, look_along, move_camera, one_scene, pan, pyvista_backend, read_view, turn, zoom)


def cloud(count=400, seed=0):
    make = torch.Generator().manual_seed(seed)
    return Gaussians(.4 * torch.randn(count, 3, generator=make), torch.randn(count, 4, generator=make), .02 + .04 * torch.rand(count, 3, generator=make),
                     torch.full((count,), .9), rgb_to_sh(torch.rand(count, 3, generator=make))[:, None])


class Page:
    "The browser's side: says hello, keeps the frames and acknowledges them, unless `deaf`."
    def __init__(self, view, width=80, height=60, deaf=False, name="page"):
        self.view, self.frames, self.notes, self.deaf, self.name = view, [], [], deaf, name
        before = view.__dict__.get("send")
        def send(content, buffers=None):
            if before: before(content, buffers)
            self.receive(content, buffers)
        view.send = send
        self.hand(kind="hello", id=name, width=width, height=height)
    def hand(self, **event): self.view._handle_custom_msg(event, [])
    def receive(self, content, buffers=None):
        if content["kind"] == "note": return self.notes.append(content["text"])
        self.frames.append((content, np.asarray(Image.open(io.BytesIO(buffers[0])).convert("RGB"))))
        if not self.deaf: self.hand(kind="ack", ack=content["n"])
    def rest(self):
        assert self.view.loop.finish(60), (len(self.frames), self.notes)
        return self
    def drag(self, dx=30, dy=10, steps=5, **more):
        self.hand(kind="down", x=40, y=30, button=0, **more)
        for i in range(1, steps + 1): self.hand(kind="move", x=40 + dx * i / steps, y=30 + dy * i / steps, **more)
        self.hand(kind="up", x=40 + dx, y=30 + dy)
        return self.rest()
    last = property(lambda self: self.frames[-1][1])


def threads(): return [thread for thread in threading.enumerate() if thread.name == "zerolab-view"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(.02)
    assert not threads()


@pytest.fixture
def plotter():
    need_opengl()
    ensure_gl()
    import pyvista as pv
    plotter = pv.Plotter(off_screen=True, window_size=(80, 60))
    plotter.set_background("white")
    plotter.add_mesh(pv.Sphere(), color="red")
    plotter.add_mesh(pv.Cube(center=(1, 0, 0), x_length=.5, y_length=.5, z_length=.5), color="blue")
    yield plotter
    plotter.close()


@pytest.fixture
def view(plotter):
    view = RemoteView(plotter)
    yield view
    view.close()


# Cameras

@pytest.mark.parametrize("vertical", [(0, 0, 1), (0, -1, 0), (1, 0, 0)])
def test_turning_is_a_turntable(vertical):
    generator, vertical = np.random.default_rng(0), np.array(vertical, float)
    for _ in range(20):
        camera = ViewCamera(tuple(generator.normal(size=3) * 3), tuple(generator.normal(size=3)), tuple(vertical))
        eye, target = np.array(camera.position), np.array(camera.focal_point)
        height = np.degrees(np.arcsin((eye - target) @ vertical / np.linalg.norm(eye - target)))
        azimuth, elevation = generator.uniform(-180, 180), generator.uniform(-60, 60)
        turn(camera, azimuth, elevation, vertical)
        out = np.array(camera.position) - target
        assert np.isclose(np.linalg.norm(out), np.linalg.norm(eye - target)) and np.allclose(camera.focal_point, target)
        assert np.isclose(np.degrees(np.arcsin(out @ vertical / np.linalg.norm(out))), np.clip(height + elevation, -89.5, 89.5), atol=1e-6)
        flat, before = out - (out @ vertical) * vertical, (eye - target) - ((eye - target) @ vertical) * vertical
        angle = np.degrees(np.arctan2(np.cross(before, flat) @ vertical, before @ flat))
        assert np.isclose((angle - azimuth + 180) % 360 - 180, 0, atol=1e-6)


def test_what_is_under_the_hand_follows_it():
    camera = ViewCamera((3., 1., 2.), (.2, .1, -.1), (0., 0., 1.), 35.)
    right = read_view(camera, (120, 200)).w2c[0, 0, :3]
    point = torch.tensor(camera.focal_point)[None] + .1 * right
    before = read_view(camera, (120, 200)).project(point)[0][0, 0]
    pan(camera, 13, -8, 120)
    assert torch.allclose(read_view(camera, (120, 200)).project(point)[0][0, 0] - before, torch.tensor([13., -8.]), atol=1e-3)


def test_zoom_and_fit_and_sides():
    camera = ViewCamera((3., 0, 0))
    zoom(camera, .5)
    assert np.allclose(camera.position, (1.5, 0, 0))
    for axis in np.concatenate([np.eye(3), -np.eye(3)]):
        look_along(camera, axis)
        assert np.allclose(camera.position, 1.5 * axis) and abs(np.dot(camera.up, axis)) < 1e-9
    fit(camera, (1, 2, 3), 1.)
    sphere = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=-1) + torch.tensor([1., 2, 3])
    uv = read_view(camera, (100, 100)).project(sphere)[0]
    assert uv.min() > 0 and uv.max() < 100 and uv.max() - uv.min() > 80


def test_aim_is_the_inverse_of_read_view():
    for azimuth, elevation in [(0., -80.), (50., 10.), (200., 85.)]:
        camera, given = ViewCamera(), orbit([azimuth], elevation, 3., size=(50, 70))
        aim(camera, given, 3.)
        again = read_view(camera, (50, 70))
        assert torch.allclose(again.w2c, given.w2c, atol=1e-5) and torch.allclose(again.K, given.K, atol=1e-3)
        assert np.allclose(camera.focal_point, 0, atol=1e-5)


def test_unknown_events_move_nothing():
    camera = ViewCamera()
    for event in ({}, dict(kind="dance"), dict(kind="key", key="q"), dict(kind="key", key="xyz"), dict(kind="key", key="")):
        assert not move_camera(camera, event, 100)
    assert camera == ViewCamera()


# Frames

def test_a_drag_changes_camera_and_picture_and_ends_sharp(view, plotter):
    page = Page(view).rest()
    first, position = page.last, plotter.camera.position
    assert first.std() > 10 and first.shape == (60, 80, 3)
    page.drag()
    assert not np.allclose(plotter.camera.position, position) and np.abs(page.last.astype(float) - first).mean() > 3
    kinds = [content["mime"] for content, _ in page.frames]
    assert kinds[0] == kinds[-1] == "image/png" and "image/jpeg" in kinds
    assert np.array_equal(page.last, view.snapshot()), "PNG is what was drawn"
    page.hand(kind="key", key="r")
    assert np.array_equal(page.rest().last, first)
    page.drag(shift=True)
    assert np.allclose(np.subtract(plotter.camera.position, plotter.camera.focal_point), np.subtract(position, (0.375, 0, 0)), atol=.2), "shift pans"
    for event in (dict(kind="wheel", dy=-120), dict(kind="pinch", factor=.8, dx=3, dy=3), *(dict(kind="key", key=k) for k in ("x", "+", "ArrowUp", "Z"))):
        before, count = page.last, len(page.frames)
        page.hand(**event)
        page.rest()
        assert len(page.frames) > count and (page.last != before).any(), event


def test_messages_from_another_thread_while_the_main_thread_spins(view):
    page = Page(view).rest()
    count, stop = len(page.frames), threading.Event()
    def shake():
        page.hand(kind="down", x=0, y=0, button=0)
        for i in range(400):
            if stop.wait(.01): break
            page.hand(kind="move", x=i % 60, y=i % 40)
        page.hand(kind="up", x=0, y=0)
    hand = threading.Thread(target=shake)
    hand.start()
    deadline = time.monotonic() + 20
    while len(page.frames) < count + 8 and time.monotonic() < deadline: sum(range(1000))       # holds the interpreter, as a training loop does
    stop.set()
    hand.join()
    page.rest()
    assert len(page.frames) >= count + 8 and not page.notes
    assert min(picture.std() for _, picture in page.frames) > 10, "no frame is black"


def test_at_most_two_frames_are_under_way_and_none_for_nobody(view):
    page = Page(view, deaf=True)
    for i in range(30):
        page.hand(kind="key", key="ArrowLeft")
        time.sleep(.01)
    view.loop.finish(10)
    assert len(page.frames) == 2
    page.deaf = False
    page.hand(kind="ack", ack=2)
    assert len(page.rest().frames) >= 3, "the last wish is drawn once there is room"
    page.hand(kind="visible", id="page", on=False)
    count = len(page.rest().frames)
    page.drag()
    assert len(page.frames) == count
    page.hand(kind="visible", id="page", on=True)
    assert len(page.rest().frames) > count
    page.hand(kind="bye", id="page")
    count = len(page.rest().frames)
    page.drag()
    assert len(page.frames) == count


def test_no_more_frames_a_second_than_allowed(plotter):
    view = RemoteView(plotter, fps=10)
    page = Page(view).rest()
    began, count = time.monotonic(), len(page.frames)
    page.hand(kind="down", x=0, y=0, button=0)
    while time.monotonic() - began < 1:
        page.hand(kind="move", x=time.monotonic() % 1 * 80, y=5)
        time.sleep(.005)
    assert len(page.frames) - count <= 11
    page.hand(kind="up", x=0, y=0)
    view.close()


def test_the_page_says_how_large_it_is(view):
    page = Page(view).rest()
    page.hand(kind="size", width=120, height=50, ratio=1)
    assert page.rest().last.shape == (50, 120, 3)
    page.hand(kind="size", width=120, height=50, ratio=2)
    assert page.rest().last.shape == (100, 240, 3), "sharp on a fine screen"
    page.hand(kind="size", width=1e9, height=-4)
    assert page.rest().last.shape[0] == 8, "bounded"
    page.hand(kind="size", width=40, height=30, ratio=1)
    assert page.rest().last.shape == (30, 40, 3)


def test_changes_under_hold_are_never_seen_half(view, plotter):
    page = Page(view).rest()
    actors = list(plotter.actors.values())
    page.hand(kind="down", x=0, y=0, button=0)
    for i in range(20):
        page.hand(kind="move", x=i, y=0)
        with view.hold():
            actors[0].visibility = False
            time.sleep(.005)
            actors[1].visibility = False
            time.sleep(.005)
            actors[0].visibility = actors[1].visibility = True
    page.hand(kind="up", x=0, y=0)
    page.rest()
    red = [((picture[..., 0] > 100) & (picture[..., 2] < 100)).sum() for _, picture in page.frames]
    assert min(red) > 50
    with view.hold(): actors[1].visibility = False
    assert not ((page.rest().last[..., 2] > 100) & (page.last[..., 0] < 100)).any(), "a picture follows by itself"


def test_a_cell_that_draws_by_itself_does_not_blacken_the_view(view, plotter):
    page = Page(view).rest()
    with view.hold(): mine = plotter.screenshot(return_img=True)
    assert np.abs(np.asarray(mine).astype(float) - page.rest().last).mean() < 1
    page.drag()
    plotter.render()                              # outside of hold: gives the context back as well
    page.drag()
    assert min(picture.std() for _, picture in page.frames) > 10 and not page.notes


def test_subplots_have_cameras_of_their_own():
    need_opengl()
    ensure_gl()
    import pyvista as pv
    plotter = pv.Plotter(off_screen=True, shape=(1, 2), window_size=(80, 60))
    for column in range(2):
        plotter.subplot(0, column)
        plotter.add_mesh(pv.Cone(), color="green")
    view = RemoteView(plotter)
    page = Page(view).rest()
    left, right = (np.array(renderer.camera.position) for renderer in plotter.renderers)
    page.hand(kind="down", x=60, y=30, button=0)
    page.hand(kind="move", x=70, y=30)
    page.hand(kind="up", x=70, y=30)
    page.rest()
    assert np.allclose(plotter.renderers[0].camera.position, left) and not np.allclose(plotter.renderers[1].camera.position, right)
    view.close()
    plotter.close()


# Data and renderers

def test_the_cpu_renderer_is_what_the_loss_sees():
    gaussians = cloud()
    view = RemoteView(gaussians, renderer="cpu", size=(60, 80))
    camera = orbit([33.], 12., 2.5, size=(60, 80))
    view.look_through(camera)
    truth = (render_splats(gaussians, camera, torch.ones(3)).rgb[0].clamp(0, 1) * 255).round().byte().numpy()
    assert np.array_equal(view.snapshot(), truth)
    view.close()


def test_new_data_during_a_training_step_are_copied_and_the_last_ones_are_drawn():
    gaussians = cloud()
    view = RemoteView(gaussians, renderer="cpu", size=(60, 80), data_fps=20)
    page = Page(view).rest()
    parameters = [tensor.clone().requires_grad_() for tensor in gaussians.tensors()]
    for step in range(50):
        with torch.no_grad(): parameters[0] += .01
        view.set_data(Gaussians(*parameters))
    with torch.no_grad(): parameters[0] += 100                     # in place, after it was handed over
    page.rest()
    want = RemoteView(Gaussians(gaussians.means + .5, *gaussians.tensors()[1:]), renderer="cpu", size=(60, 80))
    want.stage.drawer.camera = view.camera
    assert np.abs(page.last.astype(float) - want.snapshot()).mean() < 1 and len(page.frames) < 30
    view.close()
    want.close()


@pytest.mark.parametrize("renderer", ["cpu", pytest.param("vtk", marks=opengl)])
def test_data_that_come_faster_than_they_are_drawn_are_seen_while_the_main_thread_spins(renderer):
    """Each update takes longer to show than the next one takes to come: the view must not wait for the last."""
    gaussians, interval = cloud(), sys.getswitchinterval()
    view = RemoteView(gaussians, renderer=renderer, size=(60, 80), data_fps=20)
    page = Page(view).rest()
    count, deadline = len(page.frames), time.monotonic() + 20
    while len(page.frames) < count + 8 and time.monotonic() < deadline:
        view.set_data(Gaussians(gaussians.means + .001, *gaussians.tensors()[1:]))
        sum(range(1000))
    assert len(page.frames) >= count + 8 and not page.notes
    page.rest()
    view.close()
    assert sys.getswitchinterval() == interval, "threads take turns as before"


def test_batches_and_other_types_are_copied_to_plain_float32():
    batch = Gaussians.stack([cloud(5, 0), cloud(5, 1)]).to(dtype=torch.float64)
    first = one_scene(batch)
    assert first.means.dtype == torch.float32 and torch.allclose(first.means, cloud(5, 0).means)
    first.means.zero_()
    assert batch.means.abs().sum() > 0


def test_a_slow_renderer_gets_less_detail_while_it_moves_and_all_of_it_at_rest():
    sizes = []
    def slow(K, w2c, width, height):
        sizes.append((height, width))
        time.sleep(.4 * width / 80)
        return np.full((height, width, 3), .5)
    view = RemoteView(renderer=slow, size=(60, 80))
    page = Page(view).rest()
    page.hand(kind="down", x=0, y=0, button=0)
    for i in range(60):
        page.hand(kind="move", x=i, y=0)
        time.sleep(.02)
    page.hand(kind="up", x=0, y=0)
    page.rest()
    assert sizes[0] == sizes[-1] == (60, 80) and min(sizes) < (40, 60)
    view.close()


@pytest.mark.parametrize("function, words", [
    (lambda K, w2c, width, height: 1 / 0, "ZeroDivisionError"), (lambda K, w2c, width, height: None, "need \\[60,80,3\\]"),
    (lambda K, w2c, width, height: np.zeros((60, 80, 5)), "shape")])
def test_errors_of_a_renderer_are_said_and_the_thread_lives(function, words):
    view = RemoteView(renderer=function, size=(60, 80))
    page = Page(view).rest()
    page.hand(kind="key", key="+")
    page.rest()
    assert len(page.notes) == 2 and re.search(words, page.notes[0]) and view.loop.thread.is_alive()
    view.close()


def test_gradients_are_not_recorded_for_a_view():
    seen = []
    def function(K, w2c, width, height):
        seen.append(torch.is_grad_enabled())
        return torch.zeros(height, width, 3)
    view = RemoteView(renderer=function, size=(60, 80))
    Page(view).rest()
    view.close()
    assert seen and not any(seen)


# What can go away

def test_ten_views_of_one_plotter_turn_together_and_leave_no_thread(plotter):
    views = [RemoteView(plotter) for _ in range(10)]
    pages = [Page(view) for view in views]
    for page in pages: page.rest()
    pages[3].drag()
    for page in pages: page.rest()
    assert all(np.abs(page.last.astype(float) - pages[3].last).mean() < 1 for page in pages)
    views[0].close()
    pages[1].drag()
    assert not pages[1].notes, "the plotter is not closed with one of its views"
    for view in views: view.close()
    assert not threads()


def test_a_view_closed_while_it_draws(plotter):
    for delay in (0, .003, .01, .03):
        view = RemoteView(plotter)
        page = Page(view)
        for i in range(20): page.hand(kind="key", key="ArrowLeft")
        time.sleep(delay)
        view.close()
        assert not threads()
        page.hand(kind="key", key="ArrowLeft")                 # late messages
        view.request()
        view.close()


def test_a_plotter_closed_under_the_view_is_said(view, plotter):
    page = Page(view).rest()
    plotter.close()
    page.hand(kind="key", key="ArrowLeft")
    page.hand(kind="draw")
    page.rest()
    assert any("closed" in note for note in page.notes)


def test_a_forgotten_view_ends_its_thread():
    from ipywidgets.widgets import widget
    view = RemoteView(cloud(), renderer="cpu", size=(60, 80))
    Page(view).rest()
    assert threads()
    widget._instances.pop(view.model_id)                       # ipywidgets and the comm hold every widget; this is what closing a comm lets go
    view.comm.on_msg(None)
    view.comm.on_close(None)
    del view
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline: gc.collect()
    assert not threads()


def test_a_comm_closed_by_the_page_closes_the_view():
    view = RemoteView(cloud(), renderer="cpu", size=(60, 80))
    Page(view).rest()
    view.comm.handle_close({})
    assert view.comm is None and not threads()


def test_an_idle_thread_goes_home_and_comes_back():
    view = RemoteView(cloud(), renderer="cpu", size=(60, 80))
    view.loop.patience = .05
    page = Page(view).rest()
    thread = view.loop.thread
    if thread: thread.join(10)
    assert view.loop.thread is None
    count = len(page.frames)
    page.hand(kind="key", key="ArrowLeft")
    assert len(page.rest().frames) > count
    view.close()


def test_many_threads_put_events_and_none_is_lost():
    class Owner:
        def __init__(self): self.seen, self.loop = [], FrameLoop(self.work, patience=.001)
        def work(self, events): self.seen += events
    owner = Owner()
    def put(k):
        for i in range(300): owner.loop.put((k, i))
    workers = [threading.Thread(target=put, args=(k,)) for k in range(6)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert owner.loop.finish(20) and len(owner.seen) == 1800
    assert all([i for k, i in owner.seen if k == wanted] == list(range(300)) for wanted in range(6)), "each in its order"
    owner.loop.close()


def test_the_end_of_the_program_is_clean():
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_view_remote import Page, RemoteView, ensure_gl
ensure_gl()
import pyvista as pv
plotter = pv.Plotter(off_screen=True, window_size=(80, 60)); plotter.add_mesh(pv.Sphere())
view = RemoteView(plotter)
page = Page(view)
page.hand(kind="down", x=0, y=0, button=0)
for i in range(100): page.hand(kind="move", x=i, y=0)
"""
    need_opengl()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]


# Notebooks

def test_a_stored_notebook_has_a_picture(view):
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))
    assert np.array_equal(picture, view.snapshot())


def test_pyvista_shows_it(plotter, monkeypatch):
    monkeypatch.setattr("zerolab.view.remote.has_front_end", lambda: True)
    view = pyvista_backend(plotter)
    assert isinstance(view, RemoteView) and isinstance(view.stage.drawer, PlotterDrawer)
    page, seen = Page(view).rest(), []
    plotter.add_key_event("k", lambda: seen.append(1))
    before = plotter.camera.position
    page.drag()
    page.hand(kind="key", key="k")
    page.hand(kind="key", key="q")
    page.rest()
    assert not np.allclose(plotter.camera.position, before) and seen and plotter.render_window is not None and not page.notes
    view.close()
    monkeypatch.setattr("zerolab.view.remote.has_front_end", lambda: False)
    assert isinstance(pyvista_backend(plotter), Image.Image)


def test_importing_the_module_does_not_load_vtk():
    script = "import sys, zerolab.view.remote; print({'vtk', 'vtkmodules', 'pyvista'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_a_main_thread_that_keeps_the_context_is_asked_for_it(plotter):
    async def main():
        view = RemoteView(plotter)
        page = Page(view).rest()
        count = len(page.frames)
        plotter.render_window.MakeCurrent()                    # as plotter.screenshot() leaves it
        page.hand(kind="key", key="ArrowLeft")
        deadline = time.monotonic() + 20
        while len(page.frames) == count and time.monotonic() < deadline: await asyncio.sleep(.05)
        page.rest()
        view.close()
        return count, page
    count, page = asyncio.run(main())
    assert len(page.frames) > count and not page.notes and min(picture.std() for _, picture in page.frames) > 10
