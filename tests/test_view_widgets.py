"""view(): anything becomes a view, its controls do what they say, and it costs nothing where nobody looks."""
import base64
import gc
import io
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
from zerolab.scene.gaussians import Gaussians, rgb_to_sh, save_ply
from zerolab.shapes.zeroverse import PAPER, make_shape
from zerolab.view import widgets as module
from zerolab.view.gl import ensure_gl
from zerolab.view.widgets import Still, View, as_subject, view

RENDERERS = ["cpu", pytest.param("vtk", marks=opengl)]


def cloud(count=300, seed=0, degree=1):
    make = torch.Generator().manual_seed(seed)
    sh = torch.cat([rgb_to_sh(torch.rand(count, 3, generator=make))[:, None], .2 * torch.randn(count, (degree + 1)**2 - 1, 3, generator=make)], 1)
    return Gaussians(.4 * torch.randn(count, 3, generator=make), torch.randn(count, 4, generator=make), .03 + .05 * torch.rand(count, 3, generator=make),
                     .1 + .9 * torch.rand(count, generator=make), sh)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    deadline = time.monotonic() + 10
    while any(t.name == "zerolab-view" for t in threading.enumerate()) and time.monotonic() < deadline: gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "zerolab-view"]


def difference(a, b): return np.abs(a.astype(float) - b).mean()


@pytest.mark.parametrize("renderer", RENDERERS)
def test_what_the_controls_say_is_shown(renderer):
    gaussians, camera = cloud(), orbit([40.], 20., 2.5, size=(60, 80))
    v = view(gaussians, camera, size=(60, 80), renderer=renderer, static=False)
    def truth(shown, **more):
        return (render_splats(shown, camera, torch.ones(3), **more).rgb[0].clamp(0, 1) * 255).round().byte().numpy()
    v.remote.look_through(camera)
    items, close = v.controls.items, lambda picture: difference(v.snapshot(), picture) < .7
    assert close(truth(gaussians))
    items["scale"].value = .5
    assert close(truth(Gaussians(gaussians.means, gaussians.quats, gaussians.scales * .5, gaussians.opacities, gaussians.sh)))
    items["scale"].value = 1.
    items["min_opacity"].value = .6
    assert close(truth(gaussians[gaussians.opacities >= .6]))
    items["min_opacity"].value = 0.
    items["sh_degree"].value = 0
    assert close(truth(Gaussians(*gaussians.tensors()[:4], gaussians.sh[:, :1])))
    items["sh_degree"].value = 1
    assert close(truth(gaussians)), "and back"
    half = v.controls.crop[0]
    half.value = (half.min, 0.)
    edge = half.value[1]
    assert close(truth(gaussians[gaussians.means[:, 0] <= edge]))
    half.value = (half.min, half.max)
    assert close(truth(gaussians))
    pictures = {}
    for mode in items["mode"].options:
        items["mode"].value = mode
        pictures[mode] = v.snapshot()
    for mode, picture in pictures.items(): assert mode == "rgb" or difference(picture, pictures["rgb"]) > 1, mode
    v.close()


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("static", [True, False])
def test_new_gaussians_are_shown_and_keep_the_look(renderer, static):
    gaussians = cloud()
    v = view(gaussians, size=(60, 80), renderer=renderer, static=static, min_opacity=.5)
    other = view(cloud(seed=1), size=(60, 80), renderer=renderer, static=True, min_opacity=.5)
    before = v.snapshot()
    v.gaussians = cloud(seed=1)
    camera = v.subject.drawer.camera
    for name in ("position", "focal_point", "up", "view_angle"): setattr(other.subject.drawer.camera, name, getattr(camera, name))
    assert difference(v.snapshot(), before) > 1 and difference(v.snapshot(), other.snapshot()) < .01
    assert torch.equal(v.gaussians.means, cloud(seed=1).means)
    v.close()
    other.close()


def test_a_batch_is_its_first_scene_with_a_note():
    batch = Gaussians.stack([cloud(seed=0), cloud(seed=1)])
    v = view(batch, size=(60, 80), renderer="cpu", static=False)
    assert torch.equal(v.gaussians.means, cloud(seed=0).means) and "2 scenes" in v.note.value
    v.gaussians = Gaussians.stack([cloud(seed=2), cloud(seed=1)])
    assert torch.equal(v.gaussians.means, cloud(seed=2).means)
    v.close()
    assert "scenes" not in as_subject(cloud(), "cpu").note


def test_files_meshes_scenes_plotters_and_functions(tmp_path):
    save_ply(cloud(), tmp_path / "a.ply")
    v = view(tmp_path / "a.ply", size=(60, 80), renderer="cpu", static=True)
    assert torch.allclose(v.gaussians.means, cloud().means) and v.snapshot().std() > 5
    assert view(str(tmp_path / "a.ply"), size=(60, 80), renderer="cpu", static=True).snapshot().std() > 5
    shape = make_shape(1, PAPER).mesh
    mesh = view(shape, size=(60, 80), renderer="cpu", static=True)
    assert mesh.snapshot().std() > 5
    with pytest.raises(ValueError, match="shows no Gaussians"): mesh.gaussians = cloud()
    with pytest.raises(ValueError, match="scale is for Gaussians"): view(shape, scale=.5)
    model = view(None, size=(60, 80), renderer=lambda K, w2c, width, height: torch.full((height, width, 3), .25), static=True)
    assert (model.snapshot() == 64).all()


def test_what_pyvista_draws(tmp_path):
    need_opengl()
    ensure_gl()
    import pyvista as pv
    from zerolab.view.scene import Scene
    sphere = pv.Sphere()
    assert view(sphere, size=(60, 80), static=True).snapshot().std() > 5
    sphere.save(tmp_path / "a.ply")
    assert view(tmp_path / "a.ply", size=(60, 80), static=True).snapshot().std() > 5, "a mesh in a .ply"
    (tmp_path / "a.vtk").write_text("nothing")
    with pytest.raises(ValueError, match="a.vtk"): view(tmp_path / "a.vtk")
    plotter = pv.Plotter(off_screen=True, window_size=(80, 60))
    plotter.add_mesh(sphere)
    assert view(plotter, static=True).snapshot().shape == (60, 80, 3)
    plotter.close()
    scene = Scene((60, 80))
    scene.add_mesh(sphere)
    scene.add_splats(cloud())
    v = view(scene, static=False)
    before = v.snapshot()
    v.controls.items["mode"].value = "ellipsoids"
    assert difference(v.snapshot(), before) > .5
    v.close()
    assert scene.screenshot().std() > 5, "closing a view does not close somebody's scene"
    scene.close()


def test_input_cameras_show_render_truth_and_difference():
    gaussians, cameras = cloud(), orbit([0., 90., 200.], 15., 2.5, size=(40, 60))
    images = render_splats(gaussians, cameras, torch.ones(3)).rgb
    v = view(gaussians, cameras=cameras, images=images, size=(90, 120), renderer="cpu", static=False)
    v.go_to_camera(1)
    assert v.snapshot().shape == (80, 120, 3), "as large as it fits"
    v.against.value = "truth"
    assert np.array_equal(v.snapshot(), (images[1].clamp(0, 1) * 255).round().byte().numpy())
    v.go_to_camera(2, "difference")
    assert v.snapshot()[:40, :60].max() < 10
    v.gaussians = cloud(seed=3)
    assert v.snapshot()[:40, :60].max() > 100, "of the Gaussians there are now"
    v.remote.stage.apply(dict(kind="wheel", dy=10))
    assert v.chosen.value is None and v.snapshot().shape == (90, 120, 3)
    with pytest.raises(ValueError, match="camera 3 of 3"): v.go_to_camera(3)
    v.close()
    still = view(gaussians, cameras=cameras, images=images, size=(90, 120), renderer="cpu", static=True)
    still.go_to_camera(0, "truth")
    assert np.array_equal(still.snapshot(), (images[0].clamp(0, 1) * 255).round().byte().numpy())
    with pytest.raises(ValueError, match="no cameras"): view(gaussians, renderer="cpu", static=True).go_to_camera(0)


def test_from_the_kernel_to_the_browser_and_back():
    v = view(cloud(), size=(60, 80), renderer="cpu", static=False, scale=.5)
    v.remote.stage.apply(dict(kind="key", key="ArrowLeft"))
    position = np.array(v.remote.camera.position)
    v.where.value = "browser"
    assert v.place.children == (v.local,) and np.allclose(v.local.camera["position"], position, atol=1e-4)
    assert v.local.splat_scale == .5
    v.controls.items["min_opacity"].value = .3
    assert v.local.min_opacity == .3
    v.gaussians = cloud(seed=1)
    assert torch.equal(v.local.gaussians.means, cloud(seed=1).means)
    v.local.camera = v.local.camera | dict(position=(position * 1.5).tolist())
    v.where.value = "kernel"
    assert v.place.children == (v.remote,) and np.allclose(v.remote.camera.position, position * 1.5, atol=1e-3)
    v.close()


def test_the_button_saves_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROLAB_RUN_DIR", str(tmp_path))
    v = view(cloud(), size=(60, 80), renderer="cpu", static=False, title="<b>A title</b>")
    v.save.click()
    pages = list(tmp_path.glob("*.html"))
    assert len(pages) == 1 and "Saved " in v.note.value and "&lt;b&gt;A title" in pages[0].read_text()
    monkeypatch.setattr("zerolab.view.local.splat_html", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    v.save.click()
    assert "No space left" in v.note.value
    v.close()


def test_a_widget_for_a_person_and_a_picture_for_a_tool(monkeypatch):
    monkeypatch.setattr(module, "has_front_end", lambda: False)
    still = view(cloud(), size=(60, 80), renderer="cpu")
    assert isinstance(still, Still) and set(still._repr_mimebundle_()) == {"image/png", "text/plain"}
    assert not [t for t in threading.enumerate() if t.name == "zerolab-view"]
    monkeypatch.setattr(module, "has_front_end", lambda: True)
    v = view(cloud(), size=(60, 80), renderer="cpu")
    data, _ = v._repr_mimebundle_()
    assert isinstance(v, View) and {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(data)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")), v.snapshot())
    v.close()


def test_where_a_person_is(monkeypatch):
    import IPython
    from zerolab.view.remote import has_front_end
    class Shell: kernel, user_ns = object(), {}
    for name in ("CI", "ZEROLAB_STATIC", "JPY_SESSION_NAME"): monkeypatch.delenv(name, raising=False)
    assert not has_front_end(), "no notebook at all"
    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell)
    assert not has_front_end(), "a tool executes the notebook"
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert has_front_end()
    monkeypatch.setenv("CI", "true")
    assert not has_front_end()
    monkeypatch.setenv("ZEROLAB_STATIC", "0")
    assert has_front_end()
    monkeypatch.setenv("ZEROLAB_STATIC", "1")
    assert not has_front_end()


def test_without_opengl_the_cpu_renderer_draws(monkeypatch):
    for name in ("zerolab.view.widgets", "zerolab.view.remote", "zerolab.view.scene"): monkeypatch.setattr(f"{name}.ensure_gl", lambda: None)
    v = view(cloud(), cameras=orbit([0.], 0., 3.), size=(60, 80), static=False)
    assert v.snapshot().std() > 5 and tuple(v.controls.items["mode"].options) == module.CPU_MODES
    v.close()
    with pytest.raises(ValueError, match="libosmesa6"): view(cloud(), renderer="vtk")


def test_hopeless_gaussians_are_said():
    empty = view(cloud()[:0], size=(60, 80), renderer="cpu", static=False)
    assert (empty.snapshot() == 255).all()
    empty.close()
    bad = cloud()
    bad.means[3] = torch.nan
    with pytest.raises(ValueError, match="means of Gaussian 3 holds NaN"): view(bad, renderer="cpu")


def test_importing_the_module_does_not_load_vtk():
    script = "import sys, zerolab.view.widgets; print({'vtk', 'vtkmodules', 'pyvista'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"
