"""Scenes: from any thread, through any camera, with and without OpenGL."""
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from chromium import opengl
from clouds import cloud, psnr
from test_view_splats import OUTSIDE, exact, wild
from zerolab.render.light import bake_light
from zerolab.render.mesh import render_mesh
from zerolab.render.splats import render_splats
from zerolab.scene.cameras import look_at, orbit
from zerolab.shapes.zeroverse import PAPER, make_shape
from zerolab.view.scene import Scene, compare, draw_lines, fit_camera
from zerolab.view.sheet import to_uint8
from PIL import Image

SIZE = (120, 160)
BACKENDS = [pytest.param("pyvista", marks=opengl), "cpu"]


@pytest.fixture(params=BACKENDS)
def scene(request):
    with Scene(SIZE, backend=request.param) as scene: yield scene


def noise(count, size, seed=0):
    """Smooth pictures, so that a shift by half a pixel shows and a filter does not."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1)


def test_a_scene_shows_what_the_loss_sees_through_any_camera(scene):
    gaussians = wild(600, degree=1)
    scene.add_splats(gaussians)
    for camera in (orbit([20.], 30., 2.7, size=SIZE), orbit([200.], -10., 2., size=(60, 60)), orbit([80.], 10., 2., size=(400, 100))):
        fitted = scene.look_from(camera).camera
        assert fitted.size == SIZE and torch.allclose(fitted.w2c, camera.w2c, atol=1e-5)
        assert psnr(scene.screenshot(), exact(gaussians, fit_camera(camera, SIZE))) > 50
    assert torch.allclose(fitted.K, fit_camera(camera, SIZE).K, atol=1e-3)


def test_a_fitted_camera_holds_the_whole_picture_in_the_middle():
    camera = orbit([10.], 20., size=(300, 300)).crop(20, 90, 160, 200)
    corners = torch.tensor([[0., 0], [200, 160]])
    for size in ((100, 400), (400, 100), (80, 100)):
        fitted = fit_camera(camera, size)
        depth = torch.tensor([[1.], [1.]])
        local = torch.cat([(corners - camera.K[0, :2, 2]) / camera.K[0].diagonal()[:2], depth], 1)
        pixels = local @ fitted.K[0].T
        low, high = pixels[0, :2], pixels[1, :2]
        assert torch.allclose(low + high, torch.tensor([size[1], size[0]], dtype=torch.float32), atol=1e-3), "in the middle"
        assert torch.isclose((high - low) / torch.tensor([size[1], size[0]]), torch.ones(2), atol=1e-5).any() and (low > -1e-3).all(), "whole, and touching"


@opengl
def test_a_picture_in_space_is_what_its_camera_saw():
    cameras, images = orbit([0., 120., 240.], 20., 2.4, size=SIZE), noise(3, SIZE)
    with Scene(SIZE) as scene:
        scene.add_cameras(cameras, images, scale=0.4)
        for k in range(3):
            seen = scene.look_from(cameras[k]).screenshot()[2:-2, 2:-2]
            assert psnr(seen, to_uint8(images[k])[2:-2, 2:-2]) > 40, "not mirrored, not turned, not shifted"
        assert (scene.go_to_camera(1).screenshot()[50:70, 70:90] == 255).all(), "its own picture is not in the way"
        assert (scene.look_from(cameras[1]).screenshot()[50:70, 70:90] != 255).any()


@opengl
def test_a_textured_mesh_looks_like_the_renderers():
    mesh = make_shape(5, replace(PAPER, texture_size=64)).mesh
    camera = orbit([30.], 20., 2.7, size=SIZE)
    light = bake_light(mesh, resolution=128)
    truth = to_uint8(render_mesh(mesh, camera, light=light).rgba[0])
    with Scene(SIZE) as scene:
        scene.add_mesh(mesh, light=light)
        picture = scene.look_from(camera).screenshot()
        assert np.allclose(scene.bounds(), mesh.bounds, atol=1e-5)
    inside = (render_mesh(mesh, camera, light=light).rgba[0, ..., 3] == 255)
    inside = inside.numpy() if hasattr(inside, "numpy") else inside
    assert psnr(picture, truth) > 20 and np.abs(picture[inside].astype(float) - truth[inside]).mean() < 12


def test_bounds_are_of_splats_and_meshes_and_not_of_cameras(scene):
    assert np.array_equal(scene.bounds(), [[-1, -1, -1], [1, 1, 1]]), "nothing is there"
    gaussians = wild(50)
    scene.add_splats(gaussians)
    scene.add_cameras(orbit([0.], 0., 9.))
    scene.add_bounds()
    assert np.allclose(scene.bounds(), [gaussians.means.amin(0), gaussians.means.amax(0)])


def test_lines_are_where_the_camera_projects_them(scene):
    scene.add_bounds([[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]], color="#000000")
    camera = orbit([30.], 20., 2.7, size=SIZE)
    dark = scene.look_from(camera).screenshot().min(-1) < 160
    signs = torch.tensor([[x, y, z] for x in (-.5, .5) for y in (-.5, .5) for z in (-.5, .5)])
    edges = torch.cat([signs[a] + torch.linspace(0, 1, 30)[:, None] * (signs[b] - signs[a]) for a in range(8) for b in range(8)
                       if a < b and (signs[a] != signs[b]).sum() == 1])
    u, v = camera.project(edges)[0][0].T.numpy()
    expected = np.zeros(SIZE, bool)
    expected[v.astype(int), u.astype(int)] = True
    near = np.zeros_like(expected)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1): near |= np.roll(expected, (dy, dx), (0, 1))
    assert not (dark & ~near).any(), "no line elsewhere"
    assert dark[v.astype(int), u.astype(int)].mean() > 0.5


def test_a_line_behind_the_camera_is_cut():
    camera = look_at([[0., 0, 0]], [1., 0, 0], size=(40, 40))
    image = Image.new("RGB", (40, 40), "white")
    draw_lines(image, camera, np.array([[[-5., 0.2, 0], [-1, 0.2, 0]]]), "black")
    assert np.array(image).min() == 255
    draw_lines(image, camera, np.array([[[-5., 0, -0.2], [5, 0, -0.2]]]), "black")
    assert np.array(image)[20:, 19:21].min() == 0 and np.array(image)[:20].min() == 255


def test_modes_and_settings_without_opengl():
    gaussians = wild(400)
    with Scene(OUTSIDE.size, backend="cpu") as scene:
        splats = scene.add_splats(gaussians)
        scene.look_from(OUTSIDE)
        plain = scene.screenshot()
        assert np.array_equal(plain, (255 * render_splats(gaussians, OUTSIDE, torch.ones(3)).rgb[0].clamp(0, 1)).round().byte().numpy())
        for mode in ("depth", "normal", "alpha"):
            splats.update(mode=mode)
            assert scene.screenshot().std() > 5 and not np.array_equal(scene.screenshot(), plain)
        splats.update(mode="rgb", min_opacity=0.5, scale=0.5)
        half = gaussians[gaussians.opacities >= 0.5]
        assert psnr(scene.screenshot(), exact(replace(half, scales=0.5 * half.scales), OUTSIDE)) > 60
        splats.update(min_opacity=0., scale=1.)
        scene.add_splats(wild(200, degree=2, seed=5))
        both = type(gaussians).cat([replace(gaussians, sh=torch.cat([gaussians.sh, torch.zeros(400, 8, 3)], 1)), wild(200, degree=2, seed=5)])
        assert psnr(scene.screenshot(), exact(both, OUTSIDE)) > 60, "two clouds are sorted as one"
        for each in scene.splats: each.set_data(wild(0))
        assert (scene.screenshot() == 255).all()
        assert scene.add_mesh("anything") == []


@opengl
@pytest.mark.parametrize("mode", ["normal", "depth"])
def test_cpu_and_opengl_speak_of_the_same_depth_and_normals(mode):
    surface = replace(cloud(4000), means=torch.nn.functional.normalize(cloud(4000).means, dim=-1))
    turn = torch.cat([1 + surface.means[:, 2:], -surface.means[:, 1:2], surface.means[:, :1], torch.zeros(4000, 1)], 1)
    surface = replace(surface, quats=turn, scales=torch.tensor([0.04, 0.04, 0.004]).repeat(4000, 1), opacities=torch.full((4000,), 0.95))
    pictures = []
    for backend in ("cpu", "pyvista"):
        with Scene(SIZE, backend=backend) as scene:
            scene.add_splats(surface, mode=mode)
            pictures.append(scene.look_from(orbit([30.], 20., 3., size=SIZE)).screenshot()[:, :140].astype(float))
    difference = np.abs(pictures[0] - pictures[1]).mean()
    assert difference < (3 if mode == "normal" else 20), "the ranges of the colours of depth differ a little"


@opengl
def test_any_thread_may_draw_while_another_changes_the_data():
    with Scene(SIZE) as scene:
        splats = scene.add_splats(wild(300))
        scene.look_from(orbit([20.], 30., 2.7, size=SIZE))
        expected = {count: exact(wild(count), scene.camera) for count in (300, 500)}
        found, failed = [], []
        def draw():
            try: found.extend(scene.screenshot() for _ in range(6))
            except Exception as error: failed.append(error)
        threads = [threading.Thread(target=draw) for _ in range(3)]
        for thread in threads: thread.start()
        for k in range(8):
            splats.set_data(wild((500, 300)[k % 2]))
        found.append(scene.screenshot())
        for thread in threads: thread.join()
        found.append(scene.screenshot())
    assert not failed and len(found) == 20
    assert all(max(psnr(picture, one) for one in expected.values()) > 45 for picture in found), "each is one or the other, and none is black"


@opengl
def test_scenes_come_and_go_without_a_message():
    script = """
import threading, torch
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians
from zerolab.view.scene import Scene
gaussians = Gaussians(torch.randn(50, 3), torch.randn(50, 4), torch.full((50, 3), 0.1), torch.ones(50), torch.zeros(50, 1, 3))
scenes = [Scene((40, 60)) for _ in range(5)]
for scene in scenes:
    scene.add_splats(gaussians)
    scene.add_cameras(orbit([0., 90.], 0.), torch.rand(2, 8, 8, 3))
for scene in scenes:
    thread = threading.Thread(target=scene.screenshot); thread.start(); thread.join()
    scene.screenshot()
for scene in scenes[::2]: scene.close(); scene.close()
thread = threading.Thread(target=scenes[1].close); thread.start(); thread.join()
assert scenes[3].screenshot().std() > 5
print(threading.active_count())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")


@opengl
def test_a_view_changes_its_size():
    with Scene(SIZE) as scene:
        scene.add_splats(wild(500))
        scene.look_from(orbit([20.], 30., 2.7, size=SIZE)).screenshot()
        scene.resize((90, 240))
        assert scene.screenshot().shape == (90, 240, 3)
        assert psnr(scene.screenshot(), exact(wild(500), fit_camera(orbit([20.], 30., 2.7, size=SIZE), (90, 240)))) > 50


def test_what_a_scene_refuses(scene):
    with pytest.raises(IndexError, match="no camera 0, 0 were added"): scene.go_to_camera(0)
    with pytest.raises(ValueError, match="1 images for 2 cameras"): scene.add_cameras(orbit([0., 90.], 0.), torch.zeros(1, 4, 4, 3))
    with pytest.raises(ValueError, match="need auto, pyvista or cpu"): Scene(backend="vulkan")
    with pytest.raises(ValueError, match="is a batch"): scene.add_splats(type(cloud(2)).stack([cloud(2), cloud(2)]))
    scene.close()
    scene.close()
    with pytest.raises(ValueError, match="it is closed"): scene.screenshot()


def test_comparisons_of_gaussians_pictures_and_both():
    cameras, gaussians, other = orbit([0., 90.], 10., 2.7, size=(40, 60)), wild(200), wild(200, seed=3)
    truth = render_splats(gaussians, cameras, torch.ones(3)).rgb
    expected = psnr(to_uint8(truth[0]), exact(other, cameras[0])), psnr(to_uint8(truth[1]), exact(other, cameras[1]))
    expected = -10 * np.log10(np.mean([10**(-x / 10) for x in expected]))
    for mode in ("side", "swipe", "difference"):
        for one in (gaussians, truth, [to_uint8(picture) for picture in truth]):
            result = compare(one, other, cameras, mode)
            assert abs(result.psnr - expected) < 0.05 and result._repr_png_()[:4] == b"\x89PNG"
    assert compare(truth[0], truth[0]).psnr == float("inf")
    swiped = np.array(compare(np.zeros((8, 40, 3)), np.ones((8, 40, 3)), mode="swipe", split=0.25).picture)
    assert (swiped[:8, :9] == 0).all() and (swiped[:8, 11:] == 255).all()
