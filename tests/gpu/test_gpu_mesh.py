"render_mesh_gl on a graphics card against the CPU kernels: the same pictures; and how fast it is."
import time

import numpy as np
import pytest

from zerolab.render.light import bake_light
from zerolab.render.mesh import PASSES, render_mesh
from zerolab.render.mesh_gl import agreement, beyond_limits, gl_device, render_mesh_gl, why_no_gl
from zerolab.scene.cameras import random_views
from zerolab.shapes.zeroverse import PAPER, make_shape

pytestmark = pytest.mark.gpu


def mesh_agreement(seed, supersample, size=256):
    "How far the card is from the CPU: the numbers of `agreement`."
    mesh, cameras = make_shape(seed, PAPER).mesh, random_views(np.random.default_rng(seed), 4, size=(size, size))
    light = bake_light(mesh)
    return agreement(*(render(mesh, cameras, light=light, supersample=supersample) for render in (render_mesh, render_mesh_gl)))


def mesh_throughput(passes=(), views=32, size=512, objects=3):
    "Seconds a view of this process and of the clock, upload and copy back included."
    meshes, cameras = [make_shape(seed, PAPER).mesh for seed in range(objects)], random_views(np.random.default_rng(0), views, size=(size, size))
    lights = [bake_light(mesh) for mesh in meshes]
    render_mesh_gl(meshes[0], cameras, light=lights[0], passes=passes)
    clock, cpu = time.perf_counter(), time.process_time()
    for mesh, light in zip(meshes, lights): render_mesh_gl(mesh, cameras, light=light, passes=passes)
    count, seconds, cpu_seconds = views * objects, time.perf_counter() - clock, time.process_time() - cpu
    return {"views": count, "size": size, "passes": list(passes), "seconds": seconds / count, "cpu_seconds": cpu_seconds / count}


def on_a_card():
    "Why these numbers would not be a card's, or None."
    return why_no_gl() or (f"OpenGL is {gl_device().name}, which runs on the CPU" if gl_device().software else None)


@pytest.mark.parametrize("supersample", [1, 2, 3])
@pytest.mark.parametrize("seed", [2, 19, 37])
def test_the_card_draws_what_the_cpu_draws(seed, supersample):
    if reason := on_a_card(): pytest.skip(reason)
    assert beyond_limits(mesh_agreement(seed, supersample)) == {}


def test_all_passes_come_back():
    if reason := on_a_card(): pytest.skip(reason)
    assert mesh_throughput(tuple(PASSES), views=4, size=128, objects=1)["seconds"] > 0
