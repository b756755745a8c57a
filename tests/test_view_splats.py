"""The splat views: the same picture in VTK and in the renderer that the loss sees."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from zerolab.render.splats import render_splats
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians, rgb_to_sh
from zerolab.view.gl import find_opengl
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
