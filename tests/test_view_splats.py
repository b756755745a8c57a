"""The splat views: the same picture in a browser, in VTK and in the renderer that the loss sees."""
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from chromium import BINARY, Browser
from zerolab.render.splats import render_splats
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians, rgb_to_sh
from zerolab.view.gl import find_opengl
from zerolab.view.local import SCALE_UNIT, pack_splats, splat_html
from zerolab.view.splats import view


def cloud(count=1500, degree=0, seed=0):
    make = torch.Generator().manual_seed(seed)
    normal, uniform = lambda *size: torch.randn(size, generator=make), lambda *size: torch.rand(size, generator=make)
    sh = torch.cat([rgb_to_sh(uniform(count, 3))[:, None], 0.15 * normal(count, (degree + 1)**2 - 1, 3)], 1)
    return Gaussians(0.4 * normal(count, 3), normal(count, 4), torch.exp(-4.5 + 1.5 * uniform(count, 3)), 0.05 + 0.9 * uniform(count), sh)


def psnr(a, b): return -10 * np.log10(max(np.mean((np.asarray(a, float) - np.asarray(b, float))**2) / 255**2, 1e-12))


def truth(gaussians, camera, background=(1., 1., 1.)):
    rgb = render_splats(gaussians, camera, torch.tensor(background), backend="cpu").rgb[0]
    return (rgb.clamp(0, 1) * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def browser():
    if not BINARY: pytest.skip("no chromium here: apt-get install chromium")
    browser = Browser()
    yield browser
    browser.close()


def picture(browser):
    browser.wait("window.splatView && splatView.frames && splatView.idle()", seconds=60)
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))


def test_the_page_shows_what_the_loss_sees_and_turns(browser, tmp_path):
    gaussians, size = cloud(), (256, 256)
    page = splat_html(gaussians, tmp_path / "a.html", azimuth=20, elevation=35, radius=2.5, target=(0, 0, 0), background=(1, 1, 1), title="</script><b>x")
    browser.requests.clear()
    browser.open(page, width=size[1], height=size[0])
    browser.evaluate("document.querySelector('p').style.display = 'none'")
    first = picture(browser)
    assert psnr(first, truth(gaussians, orbit([20.], 35., 2.5, size=size))) > 40
    browser.evaluate("splatView.camera.azimuth = 140; splatView.camera.elevation = -10; splatView.changed()")
    assert psnr(picture(browser), truth(gaussians, orbit([140.], -10., 2.5, size=size))) > 40, "sorted again for the new view"
    before = picture(browser)
    browser.drag((128, 128), (188, 118))
    after = picture(browser)
    assert np.abs(after.astype(float) - before).mean() > 3 and after.std() > 10
    assert browser.evaluate("splatView.camera.azimuth") != 140
    browser.evaluate("document.querySelector('canvas').ondblclick()")
    assert psnr(picture(browser), first) > 45, "a double click goes back"
    assert browser.outside() == [] and browser.messages == []
    assert browser.evaluate("document.querySelector('b') === null")


def test_inside_the_cloud_and_on_black(browser, tmp_path):
    gaussians = cloud(600, seed=1)
    page = splat_html(gaussians, tmp_path / "a.html", azimuth=0, elevation=0, radius=0.5, target=(0, 0, 0), background=(0, 0, 0))
    browser.open(page, width=200, height=200)
    browser.evaluate("document.querySelector('p').style.display = 'none'")
    assert psnr(picture(browser), truth(gaussians, orbit([0.], 0., 0.5, size=(200, 200)), (0., 0., 0.))) > 30


def test_an_empty_cloud_is_a_blank_page_and_no_error(browser, tmp_path):
    page = splat_html(cloud()[:0], tmp_path / "a.html")
    browser.messages.clear()
    browser.open(page, width=100, height=100)
    browser.evaluate("document.querySelector('p').style.display = 'none'")
    assert picture(browser).min() == 255 and browser.messages == []


def test_packing_keeps_what_can_be_seen():
    gaussians = cloud(200)
    words = pack_splats(gaussians)
    assert np.array_equal(words[:, :3].copy().view(np.float32), gaussians.means.numpy())
    rgba = words[:, 3:4].copy().view(np.uint8) / 255
    assert np.abs(rgba[:, 3] - gaussians.opacities.numpy()).max() <= 0.5 / 255 + 1e-6
    scales = words[:, 4:6].copy().view(np.float16)[:, :3].astype(float) / SCALE_UNIT
    assert np.abs(scales / gaussians.scales.numpy() - 1).max() < 1e-3
    quats = words[:, 6:8].copy().view(np.int16) / 32767
    assert np.abs(quats - torch.nn.functional.normalize(gaussians.quats, dim=-1).numpy()).max() < 2e-5


def test_half_a_file_is_never_left(tmp_path, monkeypatch):
    splat_html(cloud(3), tmp_path / "a.html")
    whole = (tmp_path / "a.html").read_text()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"): splat_html(cloud(4), tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == whole and len(list(tmp_path.iterdir())) <= 2


@pytest.mark.skipif(not find_opengl(), reason="no OpenGL here: apt-get install libosmesa6")
def test_vtk_shows_what_the_loss_sees():
    camera = orbit([50.], 15., 2.7, size=(180, 240))
    for gaussians in (cloud(), cloud(800, degree=2)):
        shuffled = gaussians[torch.randperm(len(gaussians), generator=torch.Generator().manual_seed(3))]
        picture = view(gaussians, camera, backend="pyvista")
        assert psnr(picture, truth(gaussians, camera)) > 40
        assert psnr(picture, view(shuffled, camera, backend="pyvista")) > 60, "the order of the data does not matter"


@pytest.mark.skipif(not find_opengl(), reason="no OpenGL here: apt-get install libosmesa6")
def test_an_off_centre_camera_is_the_same_camera_in_vtk():
    camera = orbit([10.], 20., 2.7, size=(300, 300)).crop(20, 90, 160, 200)
    assert psnr(view(cloud(), camera, backend="pyvista"), truth(cloud(), camera)) > 35


def test_without_opengl_the_cpu_renderer_draws(monkeypatch):
    monkeypatch.setattr("zerolab.view.splats.find_opengl", lambda: None)
    camera = orbit([50.], 15., 2.7, size=(60, 80))
    assert np.array_equal(view(cloud(), camera), truth(cloud(), camera))
    with pytest.raises(ValueError, match="no OpenGL"): view(cloud(), camera, backend="pyvista")


def test_importing_the_module_does_not_load_vtk():
    script = "import sys, zerolab.view.splats; print({'vtk', 'vtkmodules', 'pyvista'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"
