"""The OpenGL renderer draws what the CPU draws, frees what it takes, and says what is missing. Skipped where there is no OpenGL 4.3 through EGL."""
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import trimesh
from test_render_mesh import as_mesh, facing, knot, plate

from zerolab.render import mesh_gl
from zerolab.render.light import random_environment
from zerolab.render.mesh import PASSES, render_mesh
from zerolab.render.mesh_gl import agreement, beyond_limits, gl_device, mesh_renderer, render_mesh_gl, views_at_once, why_no_gl
from zerolab.scene.cameras import Cameras, look_at, orbit, random_views
from zerolab.shapes.zeroverse import PAPER, make_shape


@pytest.fixture
def gl():
    if reason := why_no_gl(): pytest.skip(reason)
    return gl_device()


def textured(seed=3, side=32):
    "The knot with a noisy texture whose coordinates go below 0 and above 1."
    rng = np.random.default_rng(seed)
    return as_mesh(knot(), rng.integers(0, 256, (1, side, side, 3)).astype(np.uint8), rng.uniform(-2, 2, (len(knot().faces) * 3, 2)))


def off_centre(size, views=3):
    "Random cameras whose principal point is beside the middle, with fx != fy."
    K = torch.tensor([[1.3 * size[1], 0, .47 * size[1] + .3], [0, 1.25 * size[1], .52 * size[0] - .2], [0, 0, 1]], dtype=torch.float64)
    poses = random_views(np.random.default_rng(0), views, size=size).to(dtype=torch.float64)
    return Cameras(K=K.expand(views, 3, 3), w2c=poses.w2c, size=size)


def differences(mesh, cameras, **kw): return beyond_limits(agreement(render_mesh(mesh, cameras, **kw), render_mesh_gl(mesh, cameras, **kw)))


def digest():
    render = render_mesh_gl(textured(), off_centre((40, 48)))
    return hashlib.sha256(b"".join(picture.tobytes() for picture in render)).hexdigest()


@pytest.mark.parametrize("supersample", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [2, 7, 19, 37])
def test_it_draws_what_the_cpu_draws(gl, seed, supersample):
    "Cut, hollow and wire shapes, white and coloured skies, principal points beside the middle."
    sky = random_environment(np.random.default_rng(seed), ambient=.3) if supersample % 2 else None
    assert differences(make_shape(seed, PAPER).mesh, off_centre((120, 160)), supersample=supersample, sh=sky) == {}


def test_textures_repeat_and_shrink_as_on_the_cpu(gl):
    chequer = np.zeros((1, 256, 256, 3), np.uint8)
    chequer[0, ::2, ::2] = chequer[0, 1::2, 1::2] = 255
    corners = plate()
    uvs = np.array([[0, 1], [1, 1], [1, 0], [0, 0]])[corners.faces].reshape(-1, 2)
    for distance in (1.2, 3., 8., 40.):
        for shift in (0, -7, 3.3):
            mesh = as_mesh(corners, chequer, uvs + shift)
            cpu, other = (render(mesh, facing(distance)).rgba.astype(int) for render in (render_mesh, render_mesh_gl))
            assert np.abs(cpu - other).max() <= 1, (distance, shift)
    assert len(textured().albedo[0]) == 32 and differences(textured(), off_centre((120, 160))) == {}


def test_a_plate_lies_where_it_should(gl):
    "Against the formula and not against the CPU: an edge that cuts a column covers the samples beyond it, at the right depth."
    corners = np.array([[0, -9., -9], [0, 9, -9], [0, 9, 9], [0, -9, 9]])
    corners[[0, 3], 1] = (7 + .3 - 8) * 2 / 40.
    mesh = as_mesh(trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False))
    render = render_mesh_gl(mesh, facing(2., (16, 16), [[40., 0, 8], [0, 40., 8], [0, 0, 1]]), supersample=4)
    alpha = render.rgba[0, ..., 3]
    assert (alpha[:, :7] == 0).all() and (alpha[:, 8:] == 255).all() and (alpha[:, 7] == 191).all()  # 3 of 4 sample columns
    assert np.abs(render.depth[0, :, 7:] - 2).max() < 1e-6 and np.abs(render.normals[0, :, 7:] - [1, 0, 0]).max() < 1e-6
    above = render_mesh_gl(as_mesh(plate().apply_translation((0, 0, .9))), facing()).rgba[0, ..., 3]
    assert above[:8].any() and not above[-8:].any()  # row 0 is at the top


def test_near_rule_behind_and_inside(gl):
    mesh = as_mesh(knot())
    inside = look_at([[.01, .02, .6], [.62, 0., 0.], [.6, .1, 1e-4]], target=(.5, .1, 0), size=(48, 48))
    for near in (.01, .05, .4): assert differences(mesh, inside, near=near) == {}
    assert not render_mesh_gl(mesh, look_at([[5., 0, 0]], target=(9., 0, 0), size=(16, 16))).rgba.any()


def test_empty_pixels_hold_nothing(gl):
    render = render_mesh_gl(as_mesh(knot()), random_views(np.random.default_rng(1), 6, size=(48, 40)))
    empty = render.rgba[..., 3] == 0
    assert empty.any() and (render.rgba[empty] == 0).all() and (render.depth[empty] == 0).all()
    assert (render.normals[empty] == 0).all() and (render.material_ids[empty] == -1).all()
    assert np.allclose(np.linalg.norm(render.normals[~empty], axis=-1), 1, atol=1e-5)


def test_degenerate_triangles_draw_nothing(gl):
    mesh = as_mesh(knot())
    flat = np.concatenate([mesh.faces, [[0, 0, 1], [5, 5, 5]]]).astype(np.int32)
    more = type(mesh)(**{**vars(mesh), "faces": flat, "material_ids": np.zeros(len(flat), np.int32)})
    light, cameras = np.ones((len(mesh.positions), 4), np.float32), orbit([0., 90], size=(40, 40))
    assert all((a == b).all() for a, b in zip(render_mesh_gl(more, cameras, light=light), render_mesh_gl(mesh, cameras, light=light)))


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (70, 2), (65, 7)])
def test_odd_sizes(gl, size):
    cpu, other = (render(as_mesh(knot()), orbit([17., 121], size=size)) for render in (render_mesh, render_mesh_gl))
    assert (cpu.rgba[..., 3] == other.rgba[..., 3]).all()
    assert np.abs(cpu.rgba.astype(int) - other.rgba).max() <= 3  # triangles are smaller than samples here: now and then the neighbour is seen


def test_passes(gl):
    mesh, cameras = as_mesh(knot()), orbit([0., 90], size=(24, 20))
    whole = render_mesh_gl(mesh, cameras)
    for wanted in ((), ("normals",), ("material_ids", "depth")):
        part = render_mesh_gl(mesh, cameras, passes=wanted)
        assert (part.rgba == whole.rgba).all()
        for name in PASSES:
            if name in wanted: assert (getattr(part, name) == getattr(whole, name)).all()
            else: assert getattr(part, name) is None
    for one, other in zip(whole, render_mesh(mesh, cameras)): assert one.dtype == other.dtype and one.shape == other.shape


def test_views_may_be_drawn_in_any_portions(gl, monkeypatch):
    mesh, cameras = as_mesh(knot()), orbit(np.arange(7) * 50., size=(32, 24))
    whole = render_mesh_gl(mesh, cameras)
    for views in (1, 3):
        monkeypatch.setattr(mesh_gl, "SAMPLES", views * 4 * 32 * 24)
        assert views_at_once(7, (32, 24), 2, 6, 16384, 1 << 27) == views
        assert all((a == b).all() for a, b in zip(render_mesh_gl(mesh, cameras), whole))


def test_bytes_are_the_same_twice_and_in_another_process(gl):
    first = digest()
    assert first == digest()
    with multiprocessing.get_context("spawn").Pool(1) as pool: assert pool.apply(digest) == first


def test_a_forked_process_is_told_to_be_spawned(gl):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        with pytest.raises(RuntimeError, match="start workers with 'spawn'"): pool.apply(digest)


def test_threads_and_other_contexts_do_not_disturb(gl):
    import moderngl
    first, found = digest(), []
    thread = threading.Thread(target=lambda: found.append(digest()))
    thread.start()
    thread.join()
    other = moderngl.create_context(standalone=True, backend="egl")  # is now the current one
    assert found == [first] and digest() == first
    other.release()


def test_memory_is_given_back(gl):
    mesh, cameras = as_mesh(knot(), np.zeros((1, 1024, 1024, 3), np.uint8)), orbit([0., 90, 180, 270], size=(256, 256))
    light = np.ones((len(mesh.positions), 4), np.float32)
    for _ in range(4): render_mesh_gl(mesh, cameras, light=light)
    before = psutil.Process().memory_info().rss
    for _ in range(12): render_mesh_gl(mesh, cameras, light=light)  # some 20 MB each
    assert psutil.Process().memory_info().rss - before < 40e6


def test_choosing(gl):
    assert mesh_renderer("cpu") is render_mesh and mesh_renderer("gl") is render_mesh_gl
    assert mesh_renderer() is (render_mesh if gl.software else render_mesh_gl)


def run(code, **environment):
    code = "from zerolab.render.mesh_gl import *\nfrom zerolab.render.mesh import render_mesh\n" + code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=Path(__file__).parents[1])
    return result.stdout + result.stderr


def test_without_egl_the_reason_is_given():
    "No driver for EGL's loader to find; also the way of a machine without any."
    pytest.importorskip("moderngl")
    nowhere = dict(__EGL_VENDOR_LIBRARY_FILENAMES="/nowhere.json")
    assert "no OpenGL 4.3 through EGL here" in run("print(why_no_gl())", **nowhere)
    assert "RuntimeError: render_mesh_gl: no OpenGL 4.3 through EGL here" in run("mesh_renderer('gl')", **nowhere)
    assert run("print(mesh_renderer('auto') is render_mesh)", **nowhere).strip() == "True"
    assert "moderngl is not installed: pip install" in run("import sys; sys.modules['moderngl'] = None; print(why_no_gl())")


@pytest.mark.parametrize("change, message", [
    (dict(supersample=0), "supersample is 0"), (dict(near=0.), "near is 0"), (dict(light=np.ones((3, 4), np.float32)), "light has shape"),
    (dict(sh=np.ones((4, 3))), "sh has shape"), (dict(passes=("color",)), "no pass 'color'")])
def test_bad_arguments(gl, change, message):
    with pytest.raises(ValueError, match=message): render_mesh_gl(as_mesh(plate()), facing(), **change)


def test_too_large(gl, monkeypatch):
    with pytest.raises(ValueError, match="views of 9000x8 pixels and 16x16 samples are larger"):
        render_mesh_gl(as_mesh(plate()), orbit([0], size=(8, 9000)), supersample=16)
    monkeypatch.setitem(gl.context.info, "GL_MAX_SHADER_STORAGE_BLOCK_SIZE", 5000)
    with pytest.raises(ValueError, match="bytes of texels are more than the 5000"):
        render_mesh_gl(as_mesh(plate(), np.zeros((1, 64, 64, 3), np.uint8)), facing())
