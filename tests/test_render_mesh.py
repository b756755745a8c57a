"The mesh renderer against ray tracing, against formulas, and against meshes and cameras that are no good."
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from zerolab.render import mesh as renderer
from zerolab.render.light import bake_light, dome_directions, expose, random_environment
from zerolab.render.mesh import PASSES, bounds_solid, reflectance, render_mesh, render_views
from zerolab.scene.cameras import Cameras, intrinsics, look_at, orbit, random_views
from zerolab.scene.mesh import Mesh, linear_to_srgb, srgb_to_linear
from zerolab.shapes.zeroverse import PAPER, make_shape


def as_mesh(geometry, albedo=None, uvs=None, material_ids=None, roughness=1., metallic=0., smooth=False):
    "A trimesh geometry as a Mesh; flat normals unless `smooth`."
    if smooth: positions, normals, faces = geometry.vertices, geometry.vertex_normals, geometry.faces
    else:
        positions = geometry.vertices[geometry.faces].reshape(-1, 3)
        normals, faces = np.repeat(geometry.face_normals, 3, axis=0), np.arange(len(positions)).reshape(-1, 3)
    albedo = np.full((1, 4, 4, 3), 200, np.uint8) if albedo is None else albedo
    return Mesh(positions=positions, normals=normals, uvs=np.zeros((len(positions), 2)) if uvs is None else uvs, faces=faces.astype(np.int32),
                material_ids=np.zeros(len(faces), np.int32) if material_ids is None else material_ids, albedo=albedo,
                roughness=np.full(len(albedo), roughness), metallic=np.full(len(albedo), metallic))


def knot():
    "A torus through a box, with a ball beside: curved, sharp and self-occluding."
    pieces = [trimesh.creation.torus(.6, .2), trimesh.creation.box((.5, .3, 1.2)), trimesh.creation.icosphere(3, .3).apply_translation((.7, .5, .4))]
    return trimesh.util.concatenate(pieces)


def plate(angle=0., size=1.):
    "A quad in the plane x=0, turned about x by `angle` degrees."
    corners = np.array([[0, -size, -size], [0, size, -size], [0, size, size], [0, -size, size]])
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return trimesh.Trimesh(corners @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]).T, [[0, 1, 2], [0, 2, 3]], process=False)


def facing(distance=2., size=(32, 32), K=None):
    "A camera on +x that looks at the origin."
    cameras = look_at([[distance, 0., 0.]], size=size, dtype=torch.float64)
    return cameras if K is None else Cameras(K=torch.as_tensor(K, dtype=torch.float64)[None], w2c=cameras.w2c, size=size)


@pytest.mark.parametrize("supersample", [1, 3])
def test_depth_and_mask_agree_with_ray_tracing(supersample):
    pytest.importorskip("embreex")
    from trimesh.ray.ray_pyembree import RayMeshIntersector
    geometry, size = knot(), (200, 256)
    mesh, tracer = as_mesh(geometry), RayMeshIntersector(geometry)
    K = torch.tensor([[350., 0, 121.3], [0, 335., 108.7], [0, 0, 1]], dtype=torch.float64)  # off centre, fx != fy
    poses = random_views(np.random.default_rng(0), 3, size=size).to(dtype=torch.float64)
    cameras = Cameras(K=K.expand(3, 3, 3), w2c=poses.w2c, size=size)
    got = render_mesh(mesh, cameras, supersample=supersample, light=np.ones((len(mesh.positions), 4), np.float32))
    origins, directions = (x.numpy() for x in cameras.rays())
    for view in range(3):
        _, ray, where = tracer.intersects_id(origins[view].reshape(-1, 3), directions[view].reshape(-1, 3), multiple_hits=False, return_locations=True)
        depth = np.zeros(size[0] * size[1])
        depth[ray] = where @ cameras.w2c[view, 2, :3].numpy() + cameras.w2c[view, 2, 3].item()
        depth = depth.reshape(size)
        mask = got.rgba[view, ..., 3] >= 128  # with 3x3 samples the pixel's centre is one of them, and nearly always the median
        both = (depth > 0) & mask
        assert both.sum() > 5000
        assert np.median(np.abs(depth - got.depth[view])[both]) < 1e-5
        assert ((depth > 0) != mask).sum() < (20 if supersample == 1 else 200)
        if supersample == 1:
            assert ((got.depth[view] > 0) == mask).all() and ((got.material_ids[view] >= 0) == mask).all()
            first = tracer.intersects_first(origins[view].reshape(-1, 3), directions[view].reshape(-1, 3))
            flat = geometry.face_normals[first].reshape(*size, 3)
            assert (np.abs(flat - got.normals[view]).max(-1)[both] < 1e-4).mean() > .995


def test_half_a_pixel_is_not_ignored():
    "The same comparison fails with pixel centres at +0: the test above can tell."
    mesh, size = as_mesh(knot()), (64, 64)
    right = render_mesh(mesh, facing(size=size), supersample=1).rgba[..., 3]
    K = intrinsics(50., size).double()
    K[:2, 2] += .5
    assert (render_mesh(mesh, facing(size=size, K=K), supersample=1).rgba[..., 3] != right).sum() > 20


def specular(cosine, roughness, f0=.04, steps=400):
    "What GGX microfacets mirror of an even sky: the integral over the light's directions, where the renderer takes it over the facets' tilts."
    z, turn = np.meshgrid((np.arange(steps) + .5) / steps, 2 * np.pi * (np.arange(steps) + .5) / steps)
    light = np.stack([np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn), z], -1)
    half = light + [np.sqrt(1 - cosine**2), 0, cosine]
    half /= np.linalg.norm(half, axis=-1, keepdims=True)
    a2 = roughness**4
    spread = a2 / (np.pi * (half[..., 2]**2 * (a2 - 1) + 1)**2)
    smith = lambda x: (np.sqrt(1 + a2 * (1 - x * x) / x**2) - 1) / 2
    fresnel = f0 + (1 - f0) * (1 - (half * light).sum(-1))**5
    return (spread * fresnel / (1 + smith(cosine) + smith(z)) / (4 * cosine)).mean() * 2 * np.pi


@pytest.mark.parametrize("f0", [.04, .5, 1.])
def test_mirrored_share_is_that_of_the_microfacets(f0):
    for roughness in (.3, .5, .8, 1.):
        for cosine in (.2, .5, .9, 1.):
            scale, offset = reflectance(roughness, cosine)
            assert f0 * scale + offset == pytest.approx(specular(cosine, roughness, f0), abs=.012), (roughness, cosine)


@pytest.mark.parametrize("level", [0, 17, 128, 255])
def test_convex_plate_shows_its_texel_times_the_irradiance(level):
    albedo = np.full((1, 4, 4, 3), level, np.uint8)
    albedo[..., 1] = 255 - level
    mesh = as_mesh(plate(), albedo)
    light = bake_light(mesh)
    assert np.allclose(light, 1, atol=1e-6)  # nothing hides the white sky
    rgba = render_mesh(mesh, facing(), light=light).rgba[0]
    mirrored = specular(1., 1.)
    assert mirrored < .02  # what a rough surface mirrors
    texel = srgb_to_linear(np.array([level, 255 - level, level]) / 255)
    want = 255 * linear_to_srgb(texel * (1 - mirrored) + mirrored)
    assert np.abs(rgba[16, 16, :3] - want).max() <= 1
    half = render_mesh(mesh, facing(), light=light * np.float32(.5)).rgba[0, 16, 16, :3]
    assert np.abs(half - 255 * linear_to_srgb(.5 * (texel * (1 - mirrored) + mirrored))).max() <= 1


def test_white_furnace():
    "A white matte body under the white sky is white, whatever its shape, its roughness and the view."
    ball = trimesh.creation.icosphere(3)
    for roughness in (0., .3, 1.):
        mesh = as_mesh(ball, np.full((1, 2, 2, 3), 255, np.uint8), roughness=roughness, smooth=True)
        rgba = render_mesh(mesh, orbit([0., 70, 200], size=(48, 48))).rgba
        assert rgba[..., :3][rgba[..., 3] == 255].min() >= 254


@pytest.mark.parametrize("supersample", [1, 2, 4])
@pytest.mark.parametrize("offset", [.1, .3, .55, .8])
def test_alpha_of_a_half_plane(supersample, offset):
    "An edge that cuts a column of pixels covers the samples beyond it, in rows too."
    fx, size = 40., (16, 16)
    for axis in (0, 1):
        corners = np.array([[0, -9., -9], [0, 9, -9], [0, 9, 9], [0, -9, 9]])
        # screen x = fx * y / 2 + cx and y = cy - fx * z / 2, camera at x=2; the edge lies at pixel 7 + offset
        if axis == 0: corners[[0, 3], 1] = (7 + offset - 8) * 2 / fx
        else: corners[[2, 3], 2] = -(7 + offset - 8) * 2 / fx
        mesh = as_mesh(trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False))
        alpha = render_mesh(mesh, facing(2., size, [[fx, 0, 8], [0, fx, 8], [0, 0, 1]]), supersample=supersample).rgba[0, ..., 3]
        if axis: alpha = alpha.T
        covered = ((np.arange(supersample) + .5) / supersample > offset).mean()
        assert (alpha[:, :7] == 0).all() and (alpha[:, 8:] == 255).all()
        assert np.abs(alpha[:, 7] / 255 - covered).max() <= .5 / 255 + 1e-6


def test_texture_lands_where_uv_says():
    albedo = np.zeros((1, 64, 64, 3), np.uint8)
    albedo[0, :32, :32], albedo[0, :32, 32:], albedo[0, 32:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    corners = plate()
    uvs = np.array([[0, 1], [1, 1], [1, 0], [0, 0]])[corners.faces].reshape(-1, 2)
    rgba = render_mesh(as_mesh(corners, albedo, uvs), facing(3.)).rgba[0]
    seen = [tuple(int(c) for c in (rgba[i, j, :3] > 128) * 255) for i, j in ((11, 11), (11, 20), (20, 11), (20, 20))]
    assert seen == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]
    shifted = render_mesh(as_mesh(corners, albedo, uvs - 7), facing(3.)).rgba[0]
    assert (shifted == rgba).all()  # the texture repeats


def test_far_texture_takes_its_mean_in_linear_light():
    albedo = np.zeros((1, 256, 256, 3), np.uint8)
    albedo[0, ::2, ::2] = albedo[0, 1::2, 1::2] = 255
    corners = plate()
    uvs = np.array([[0, 1], [1, 1], [1, 0], [0, 0]])[corners.faces].reshape(-1, 2)
    rgba = render_mesh(as_mesh(corners, albedo, uvs), facing(8.)).rgba[0]
    inside = rgba[rgba[..., 3] == 255]
    assert np.abs(inside[:, :3].astype(int) - 189).max() <= 4  # sRGB of half the light (188), and a little mirrored sky


def test_colour_is_zero_where_nothing_is():
    render = render_mesh(as_mesh(knot()), random_views(np.random.default_rng(1), 6, size=(48, 40)))
    empty = render.rgba[..., 3] == 0
    assert empty.any() and (render.rgba[empty] == 0).all() and (render.depth[empty] == 0).all()
    assert (render.normals[empty] == 0).all() and (render.material_ids[empty] == -1).all()
    assert np.allclose(np.linalg.norm(render.normals[~empty], axis=-1), 1, atol=1e-5) and (render.depth[~empty] > 0).all()


def test_material_of_the_nearest_surface():
    back, front = plate(size=2.), plate(size=.5).apply_translation((.5, 0, 0))
    both = trimesh.util.concatenate([back, front])
    albedo = np.stack([np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)])
    ids = render_mesh(as_mesh(both, albedo, material_ids=np.array([0, 0, 1, 1], np.int32)), facing(2.5)).material_ids[0]
    assert ids[16, 16] == 1 and ids[16, 1] == 0 and set(np.unique(ids)) <= {-1, 0, 1}


def test_shadow_of_a_roof():
    "A floor under a roof loses the light that comes from above, more the nearer it is to the middle."
    floor = trimesh.creation.box((2, 2, .02)).subdivide().subdivide().subdivide().subdivide()
    roof = trimesh.creation.box((1, 1, .02)).apply_translation((0, 0, .3))
    mesh = as_mesh(trimesh.util.concatenate([floor, roof]))
    light = bake_light(mesh, directions=256, resolution=512)
    top = (mesh.positions[:, 2] < .1) & (mesh.normals[:, 2] > .9)
    radius = np.linalg.norm(mesh.positions[:, :2], axis=1)
    assert light[top & (radius < .1), 3].mean() < .35 < .9 < light[top & (radius > 1.2), 3].mean()
    # the middle sees the sky outside the roof: 1 - form factor of a 1x1 rectangle at distance .3 above its centre
    a = .5 / .29
    form = 4 / (2 * np.pi) * 2 * a / np.sqrt(1 + a * a) * np.arctan(a / np.sqrt(1 + a * a))
    assert light[top & (radius < .02), 3].mean() == pytest.approx(1 - form, abs=.03)


def test_environment_is_linear_in_its_light():
    mesh, rng = as_mesh(knot()), np.random.default_rng(0)
    sh = random_environment(rng)
    assert sh[0].mean() == pytest.approx(1)
    one, two = bake_light(mesh, sh=sh, directions=32, resolution=64), bake_light(mesh, sh=2 * sh, directions=32, resolution=64)
    assert np.allclose(2 * one[:, :3], two[:, :3], atol=1e-5) and np.allclose(one[:, 3], two[:, 3])
    assert len(dome_directions(32)) == 16


@pytest.mark.parametrize("metallic", [0., 1.])
def test_exposed_objects_do_not_clip(metallic):
    "Lobes make a white object clip; exposed, hardly a pixel does in any view, and colours keep their ratios."
    geometry = trimesh.creation.icosphere(4)
    mesh = as_mesh(geometry, np.full((1, 4, 4, 3), 255, np.uint8), roughness=.9, metallic=metallic, smooth=True)
    cameras = random_views(np.random.default_rng(0), 8, size=(48, 48))
    clipped = lambda light, sh: (lambda rgba: (rgba[rgba[..., 3] == 255][:, :3] == 255).any(-1).mean())(render_mesh(mesh, cameras, light=light, sh=sh).rgba)
    for seed in range(4):
        sh = random_environment(np.random.default_rng(seed), ambient=.3)
        light = bake_light(mesh, sh=sh)
        darker, sky = expose(mesh, light, sh)
        factor = sky[0, 0] / sh[0, 0]
        assert factor < 1 and np.allclose(sky, factor * sh) and np.allclose(darker, light * [factor, factor, factor, 1], atol=1e-6)
        assert clipped(light, sh) > .05 and clipped(darker, sky) < .02


def test_exposure_looks_at_what_is_seen():
    "White plates hidden inside a dark box do not darken it; a white spark smaller than the share that may clip does not either."
    box = as_mesh(trimesh.creation.box((1, 1, 1)).subdivide().subdivide().subdivide(), np.stack([np.full((4, 4, 3), level, np.uint8) for level in (60, 255)]))
    inner = as_mesh(trimesh.creation.box((.5, .5, .5)), box.albedo, material_ids=np.ones(12, np.int32))
    both = Mesh(positions=np.concatenate([box.positions, inner.positions]), normals=np.concatenate([box.normals, inner.normals]),
                uvs=np.concatenate([box.uvs, inner.uvs]), faces=np.concatenate([box.faces, inner.faces + len(box.positions)]).astype(np.int32),
                material_ids=np.concatenate([box.material_ids, inner.material_ids]), albedo=box.albedo, roughness=box.roughness, metallic=box.metallic)
    sh = np.zeros((9, 3))
    sh[0] = 3
    light = bake_light(both, sh=sh)
    assert np.array_equal(expose(both, light, sh)[0], light)
    spark = both.material_ids.copy()
    spark[0] = 1
    sparked = Mesh(**{**vars(both), "material_ids": spark})
    assert np.array_equal(expose(sparked, light, sh)[0], light)
    assert expose(sparked, light, sh, share=1.)[1][0, 0] == pytest.approx(.9, rel=1e-6)


@pytest.mark.parametrize("passes", [(), ("depth",), ("normals",), ("material_ids",), ("material_ids", "depth")])
def test_passes_on_request(passes):
    mesh, cameras = as_mesh(knot()), orbit([0., 90], size=(40, 56))
    everything, some = render_mesh(mesh, cameras), render_mesh(mesh, cameras, passes=passes)
    assert (everything.rgba == some.rgba).all()
    for name in PASSES:
        if name in passes: assert (getattr(everything, name) == getattr(some, name)).all()
        else: assert getattr(some, name) is None
    with pytest.raises(ValueError, match="no pass 'flow'"): render_mesh(mesh, cameras, passes=(*passes, "flow"))


def test_which_meshes_bound_solids():
    solid = lambda mesh, faces=None: bounds_solid(mesh.positions, mesh.normals, mesh.faces if faces is None else faces)
    for smooth in (False, True):  # flat: every triangle has corners of its own
        mesh = as_mesh(knot(), smooth=smooth)
        assert solid(mesh)
        flipped = mesh.faces.copy()
        flipped[7] = flipped[7, ::-1]
        assert not solid(mesh, flipped) and not solid(mesh, mesh.faces[1:]) and not solid(mesh, mesh.faces[:, ::-1].copy())
        assert not solid(mesh, np.concatenate([mesh.faces, mesh.faces[:1]]))
    assert not solid(as_mesh(plate()))


@pytest.mark.parametrize("seed", range(6))
def test_solids_look_the_same_without_the_faces_seen_from_behind(monkeypatch, seed):
    "Objects of the paper's recipe: cut, hollow, with struts, and overlapping."
    mesh, cameras = make_shape(seed, replace(PAPER, texture_size=32)).mesh, random_views(np.random.default_rng(seed), 4, size=(96, 96))
    light = bake_light(mesh, directions=16, resolution=64)
    assert bounds_solid(mesh.positions, mesh.normals, mesh.faces)
    front = render_mesh(mesh, cameras, light=light)
    monkeypatch.setattr(renderer, "bounds_solid", lambda *args: False)
    every = render_mesh(mesh, cameras, light=light)
    differ = (front.rgba != every.rgba).any(-1) | (front.material_ids != every.material_ids)
    assert differ.sum() <= 2e-5 * differ.size  # where a sample lies on an outline to the last bit


def test_open_meshes_and_solids_from_inside_show_the_faces_seen_from_behind():
    behind = render_mesh(as_mesh(plate()), look_at([[-2., 0, 0]], size=(16, 16)))
    assert (behind.rgba[0, 4:12, 4:12, 3] == 255).all()
    inside = render_mesh(as_mesh(trimesh.creation.box((2, 2, 2)).subdivide().subdivide().subdivide()), look_at([[.1, .2, 0]], target=(1, 0, 0), size=(16, 16)))
    assert inside.depth.any() and (inside.depth[inside.depth > 0] < 1.5).all()


def test_the_faces_seen_from_behind_cost_time():
    mesh = make_shape(0, replace(PAPER, texture_size=32)).mesh
    pose = look_at([[2.5, 1., .5]], size=(512, 512), dtype=torch.float64)
    lens = tuple(2 * pose.K[0, row, column].item() for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)))
    screen, visible = renderer.project_vertices(mesh.positions, pose.w2c[0, :3].numpy(), lens), np.empty((1024, 1024), np.int64)
    taken = {True: [], False: []}
    for front_only in 8 * [True, False]:
        start = time.process_time()
        renderer.draw_visible(screen, mesh.faces, .05, front_only, visible)
        taken[front_only].append(time.process_time() - start)
    assert min(taken[True]) < .85 * min(taken[False])


SCRIPT = """
import hashlib, sys
sys.path.insert(0, {folder!r})
from test_render_mesh import digest
print(digest())
"""


def digest():
    texture = np.random.default_rng(3).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    mesh = as_mesh(knot(), texture, np.random.default_rng(4).uniform(-2, 2, (len(knot().faces) * 3, 2)))
    render = render_mesh(mesh, random_views(np.random.default_rng(0), 3, size=(40, 48)))
    return hashlib.sha256(b"".join(picture.tobytes() for picture in render)).hexdigest()


def test_bytes_are_the_same_twice_and_in_another_process():
    first = digest()
    assert first == digest()
    script = SCRIPT.format(folder=str(Path(__file__).parent))
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == first, other.stderr


def test_degenerate_triangles_draw_nothing_and_break_nothing():
    good = knot()
    point = len(good.vertices)
    vertices = np.concatenate([good.vertices, [[0, 0, 2], [0, 0, 2], [.1, 0, 2], [.2, 0, 2]]])
    faces = np.concatenate([good.faces, [[point, point + 1, point], [point, point + 2, point + 3], [point, point, point]]])
    normals = np.tile([[0., 0, 1]], (len(vertices), 1))
    make = lambda f: Mesh(positions=vertices, normals=normals, uvs=np.zeros((len(vertices), 2)), faces=f.astype(np.int32),
                          material_ids=np.zeros(len(f), np.int32), albedo=np.full((1, 1, 1, 3), 99, np.uint8), roughness=np.ones(1), metallic=np.zeros(1))
    cameras = orbit([0., 90], 70., size=(40, 40))
    with_bad, without = render_mesh(make(faces), cameras), render_mesh(make(good.faces), cameras)
    assert all((a == b).all() for a, b in zip(with_bad, without))


def test_camera_inside_the_object_drops_triangles():
    render = render_mesh(as_mesh(knot()), look_at([[.01, .02, .6], [.62, 0., 0.], [.6, .1, 1e-4]], target=(.5, .1, 0), size=(32, 32)), near=.05)
    assert (render.depth[render.depth > 0] >= .05 - 1e-6).all() and np.isfinite(render.normals).all()


def test_behind_the_camera_nothing_is_seen():
    assert not render_mesh(as_mesh(knot()), look_at([[5., 0, 0]], target=(9., 0, 0), size=(16, 16))).rgba.any()


def test_one_pixel_and_tall_pictures():
    for size in ((1, 1), (1, 33), (70, 2)):
        render = render_mesh(as_mesh(knot()), orbit([10.], size=size))
        assert render.rgba.shape == (1, *size, 4)


def test_views():
    views = render_views(as_mesh(knot()), orbit([0., 90], size=(24, 24)), caption="a knot", source="test", seed=3, supersample=1)
    assert (len(views), views.caption, views.source, views.seed) == (2, "a knot", "test", 3)


@pytest.mark.parametrize("change, message", [
    (dict(supersample=0), "supersample is 0"), (dict(near=0.), "near is 0"), (dict(near=float("nan")), "near is nan"),
    (dict(light=np.ones((3, 4), np.float32)), "light has shape"), (dict(sh=np.ones((4, 3))), "sh has shape"),
    (dict(sh=np.full((9, 3), np.nan)), "sh has shape")])
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message): render_mesh(as_mesh(plate()), facing(), **change)


def test_bad_light_cameras_and_meshes():
    mesh, cameras = as_mesh(plate()), facing()
    with pytest.raises(ValueError, match="light holds NaN"): render_mesh(mesh, cameras, light=np.full((len(mesh.positions), 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="need .V,3,3."): render_mesh(mesh, Cameras.stack([cameras, cameras]))
    with pytest.raises(ValueError, match="NaN"): render_mesh(mesh, Cameras(K=cameras.K * float("nan"), w2c=cameras.w2c, size=cameras.size))
    broken = cameras[0]
    broken.w2c[0, 0, 3] = float("nan")  # behind the back of Cameras' own check
    with pytest.raises(ValueError, match="NaN"): render_mesh(mesh, broken)
    with pytest.raises(ValueError, match="no triangles"): as_mesh(trimesh.Trimesh(np.zeros((3, 3)), np.zeros((0, 3), int), process=False), smooth=True)
    for wrong in (dict(directions=7), dict(directions=0), dict(resolution=2)):
        with pytest.raises(ValueError, match="bake_light|dome_directions"): bake_light(mesh, **wrong)
