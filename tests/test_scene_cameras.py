"""Cameras against oracles that share no code with them: a ray tracer, OpenGL's pipeline, cameras worked out by hand."""
import json
import math

import numpy as np
import pytest
import torch

from zerolab.scene.cameras import (Cameras, gso_inputs, gso_targets, intrinsics, invert_pose, load_cameras, look_at, orbit, random_views,
                                   save_cameras)
from zerolab.scene.formats import (from_opengl, gl_projection, load_colmap, load_nerf, matrix_to_quaternion, save_colmap, save_nerf, to_opengl)

SIZE = 480, 512
OFF_CENTRE = torch.tensor([[700, 0, 250.3], [0, 680, 270.7], [0, 0, 1]], dtype=torch.float64)


def off_centre_rig() -> Cameras:
    "Four poses with nothing symmetric about them, and a K with nothing centred about it."
    poses = look_at([[2.1, 0.3, 0.4], [-1.1, 1.9, 1.0], [0.2, -2.3, -0.8], [0, 0, 2.5]], target=(0.05, -0.1, 0.02), dtype=torch.float64)
    return Cameras(OFF_CENTRE.expand(4, 3, 3), poses.w2c, SIZE)


def numpy_pinhole(cameras, points):
    "Projection as homogeneous matrices: P = K [R|t]."
    projection = cameras.K.double().numpy() @ cameras.w2c.double().numpy()[:, :3]
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], 1) @ projection.transpose(0, 2, 1)
    return homogeneous[..., :2]/homogeneous[..., 2:], homogeneous[..., 2]


# ---- rays and projection


def test_autocast_changes_no_bit():
    "A network runs in bfloat16 around the cameras; with 8 bits these would stand a quarter of a pixel beside themselves."
    eyes, points = [[2.1, 0.3, 0.4], [-1.1, 1.9, 1.0], [0.2, -2.3, -0.8]], torch.randn(50, 3, generator=torch.Generator().manual_seed(0))/4
    def everything():
        cameras = look_at(eyes, target=(0.05, -0.1, 0.02), size=(6, 8))
        checked = Cameras(cameras.K, cameras.w2c, cameras.size)
        return cameras.w2c, invert_pose(cameras.w2c), *checked.rays(), *checked.project(points)
    whole = everything()
    with torch.autocast("cpu", torch.bfloat16): half = everything()
    for a, b in zip(whole, half): assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def test_projection_is_the_textbook_matrix():
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 3))
    cameras = off_centre_rig()
    uv, depth = cameras.project(torch.tensor(points))
    expected_uv, expected_depth = numpy_pinhole(cameras, points)
    np.testing.assert_allclose(uv, expected_uv, atol=1e-9)
    np.testing.assert_allclose(depth, expected_depth, atol=1e-12)


def test_rays_hit_what_project_says():
    "embree finds the first hit of every pixel's ray; the hit must be a mesh point that projects to that pixel's centre, at that depth."
    trimesh = pytest.importorskip("trimesh"); pytest.importorskip("embreex")
    mesh = trimesh.creation.torus(0.6, 0.25, major_sections=48, minor_sections=24)
    cameras = off_centre_rig().crop(100, 120, 240, 260).resize((60, 65))
    for view in range(len(cameras)):
        one = cameras[view]
        origins, directions = (t.reshape(-1, 3).numpy() for t in one.rays())
        hits, ray, triangle = mesh.ray.intersects_location(origins, directions, multiple_hits=False)
        assert len(hits) > 200
        # embree works in float32: recompute each hit exactly from the triangle that it names
        normal, corner = mesh.face_normals[triangle], mesh.triangles[triangle][:, 0]
        travelled = ((corner - origins[ray])*normal).sum(1)/(directions[ray]*normal).sum(1)
        exact = origins[ray] + travelled[:, None]*directions[ray]
        assert np.abs(exact - hits).max() < 1e-3
        uv, depth = one.project(torch.tensor(exact))
        rows, columns = np.divmod(ray, 65)
        np.testing.assert_allclose(uv[0], np.stack([columns + 0.5, rows + 0.5], 1), atol=1e-8)
        np.testing.assert_allclose(depth[0], travelled*(directions[ray] @ one.forward[0].numpy()), atol=1e-10)


def test_silhouettes_stand_where_points_project():
    "Balls at known places: the traced mask's centroid is the projected centre (corrected for perspective), which half a pixel would break."
    trimesh = pytest.importorskip("trimesh"); pytest.importorskip("embreex")
    centres = np.random.default_rng(3).uniform(-0.3, 0.3, (6, 3))
    cameras, radius, errors = off_centre_rig(), 0.03, []
    for view in range(len(cameras)):
        one = cameras[view]
        for centre in centres:
            ball = trimesh.creation.icosphere(3, radius); ball.apply_translation(centre)
            (uv,), (depth,) = numpy_pinhole(one, centre[None])
            left, top = (uv[0] - 24).astype(int)
            window = one.crop(int(top), int(left), 48, 48)
            origins, directions = (t.reshape(-1, 3).numpy() for t in window.rays())
            mask = ball.ray.intersects_any(origins, directions)
            assert 150 < mask.sum() < 2000
            rows, columns = np.divmod(np.flatnonzero(mask), 48)
            centroid = np.array([columns.mean() + 0.5 + left, rows.mean() + 0.5 + top])
            stretch = 1 + (radius/depth[0])**2  # a ball's outline is an ellipse, a little further from the axis than the centre
            expected = OFF_CENTRE[:2, 2].numpy() + (uv[0] - OFF_CENTRE[:2, 2].numpy())*stretch
            errors.append(centroid - expected)
    assert np.abs(errors).max() < 0.25 and np.abs(np.mean(errors, 0)).max() < 0.03  # pixels; a mask of 500 of them is that exact


def test_depth_map_of_a_ball_is_the_analytic_one():
    cameras = off_centre_rig().resize((60, 64))
    origins, directions = cameras.rays()
    along = -(origins*directions).sum(-1)
    inside = along**2 - (origins**2).sum(-1) + 0.5**2
    hit = inside > 1e-3
    points = (origins + (along - inside.clamp(min=0).sqrt())[..., None]*directions)[0][hit[0]]
    assert hit[0].sum() > 500 and torch.allclose(points.norm(dim=-1), torch.tensor(0.5, dtype=torch.float64))
    uv, depth = cameras[0].project(points)
    assert torch.allclose(uv[0].floor().flip(-1).long(), hit[0].nonzero())
    assert depth.min() > 0


def test_points_behind_have_no_pixel_and_finite_gradients():
    points = torch.tensor([[0., 0, 0], [0, -9, 0], [0, -2.75, 0]], requires_grad=True)
    uv, depth = orbit(-90, 0).project(points)
    assert uv[0, 1].isnan().all() and uv[0, 2].isnan().all() and uv[0, 0].isfinite().all() and depth[0, 1] < 0
    uv[0, 0].sum().backward()
    assert points.grad.isfinite().all()


def test_batches_project_like_their_members():
    cameras = gso_inputs(8, size=(24, 32))
    batch = Cameras.stack([cameras[:4], cameras[4:]])
    shared, own = (torch.rand(*shape, 3, generator=torch.Generator().manual_seed(0)) - 0.5 for shape in ((5,), (2, 5)))
    assert torch.allclose(batch.project(shared)[0][1], cameras[4:].project(shared)[0], atol=1e-4)
    assert torch.allclose(batch.project(own)[0][1], cameras[4:].project(own[1])[0], atol=1e-4)
    assert torch.equal(batch.rays()[1][1], cameras[4:].rays()[1]) and batch.rays()[0].shape == (2, 4, 24, 32, 3)


# ---- OpenGL


def test_clip_matrix_is_the_pinhole():
    cameras, points = off_centre_rig(), torch.rand(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    near, far = 0.05, 10.
    eye = torch.cat([points, torch.ones(300, 1, dtype=torch.float64)], 1) @ torch.linalg.inv(to_opengl(cameras)).mT
    clip = eye @ gl_projection(cameras, near, far).mT
    ndc = clip[..., :3]/clip[..., 3:]
    height, width = SIZE
    pixels = torch.stack([(ndc[..., 0] + 1)/2*width, (1 - ndc[..., 1])/2*height], -1)
    uv, depth = numpy_pinhole(cameras, points.numpy())
    assert np.abs(pixels.numpy() - uv).max() < 1e-9
    np.testing.assert_allclose(2*far*near/(far + near - ndc[..., 2]*(far - near)), depth, atol=1e-11)  # the depth buffer read back


def test_clip_matrix_maps_the_planes():
    matrix = gl_projection(off_centre_rig(), 0.1, 7.)[0]
    for z, ndc in ((-0.1, -1), (-7., 1)):
        clip = matrix @ torch.tensor([0, 0, z, 1], dtype=torch.float64)
        assert abs(clip[2]/clip[3] - ndc) < 1e-12
    for near, far in ((0, 1), (1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="0 < near < far"): gl_projection(off_centre_rig(), near, far)


# ---- resize and crop


@pytest.mark.parametrize("size", [(240, 256), (77, 1024), (1, 1)])
def test_resize_scales_pixels(size):
    cameras, points = off_centre_rig(), torch.rand(20, 3, dtype=torch.float64) - 0.5
    scale = torch.tensor([size[1]/SIZE[1], size[0]/SIZE[0]], dtype=torch.float64)
    assert torch.allclose(cameras.resize(size).project(points)[0], cameras.project(points)[0]*scale, atol=1e-9)
    assert cameras.resize(size).size == size and torch.allclose(cameras.resize(size).resize(SIZE).K, cameras.K)


def test_halving_averages_the_rays_of_two_by_two():
    "A pixel of the half-size picture looks through the common corner of the four that it replaces."
    K = OFF_CENTRE/16; K[2, 2] = 1
    cameras = Cameras(K[None], off_centre_rig().w2c[:1], (30, 32))
    x = lambda c: (c.rays()[1]/(c.rays()[1]*c.forward[:, None, None]).sum(-1, keepdim=True))[0]  # where rays cross the plane at depth 1
    assert torch.allclose(x(cameras).reshape(15, 2, 16, 2, 3).mean((1, 3)), x(cameras.resize((15, 16))), atol=1e-12)


def test_crop_cuts_the_rays():
    cameras = off_centre_rig().resize((48, 51))
    assert torch.allclose(cameras.crop(7, 3, 20, 30).rays()[1], cameras.rays()[1][:, 7:27, 3:33], atol=1e-12)
    padded = cameras.crop(-2, -1, 52, 53)
    assert torch.allclose(padded.rays()[1][:, 2:-2, 1:-1], cameras.rays()[1], atol=1e-12)


# ---- rigs


def test_look_at_by_hand():
    "At (0,-3,0), looking along +y: right is +x, down -z, forward +y."
    camera = look_at([[0, -3, 0]], dtype=torch.float64)
    assert torch.allclose(camera.w2c[0], torch.tensor([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 3], [0, 0, 0, 1]], dtype=torch.float64))
    assert torch.allclose(camera.centers, torch.tensor([[0., -3, 0]], dtype=torch.float64))


@pytest.mark.parametrize("eye", [(0, 0, 3), (0, 0, -3), (1e-9, 0, 3), (0, 1e-13, -3)])
@pytest.mark.parametrize("up", [(0, 0, 1), (0, 0, -2)])
def test_straight_views_are_cameras(eye, up):
    camera = look_at([eye], up=up, dtype=torch.float64)
    rotation = camera.w2c[0, :3, :3]
    assert torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-12) and torch.linalg.det(rotation) > 0
    assert torch.allclose(camera.project(torch.zeros(1, 3))[0], torch.tensor([32., 32], dtype=torch.float64), atol=1e-6)


def test_looking_along_y_with_y_up():
    camera = look_at([[0, 3, 0]], up=(0, 1, 0), dtype=torch.float64)
    assert camera.project(torch.tensor([[0, 0, 1.]]))[0][0, 0, 1] < 32  # z takes over as up


def test_orbit_stands_where_it_says():
    cameras = orbit([0, 90, 180, 270], [0, 30, 60, 89.9], [1, 2, 3, 4], target=(0.1, 0.2, 0.3), dtype=torch.float64)
    for azimuth, elevation, radius, centre in zip([0, 90, 180, 270], [0, 30, 60, 89.9], [1, 2, 3, 4], cameras.centers.numpy()):
        a, e = math.radians(azimuth), math.radians(elevation)
        expected = np.array([0.1, 0.2, 0.3]) + radius*np.array([math.cos(e)*math.cos(a), math.cos(e)*math.sin(a), math.sin(e)])
        np.testing.assert_allclose(centre, expected, atol=1e-12)


def test_orbit_agrees_with_look_at_away_from_poles():
    cameras = orbit(np.arange(0, 360, 17), 33, dtype=torch.float64)
    assert torch.allclose(cameras.w2c, look_at(cameras.centers, dtype=torch.float64).w2c, atol=1e-12)


def test_benchmark_rigs():
    eight, four = gso_inputs(8), gso_inputs(4)
    angles = lambda c: (torch.rad2deg(torch.atan2(c.centers[:, 1], c.centers[:, 0])).round().long() % 360).tolist()
    height = lambda c: torch.rad2deg(torch.asin(c.centers[:, 2]/2.7)).round().long().tolist()
    assert angles(eight) == [0, 90, 180, 270, 45, 135, 225, 315] and height(eight) == [0]*4 + [40]*4
    assert angles(four) == [0, 90, 180, 270] and height(four) == [20]*4
    targets = gso_targets(np.random.default_rng(0))
    assert len(targets) == 10 and torch.allclose(targets.centers.norm(dim=-1), torch.tensor(2.7))
    assert torch.equal(targets.w2c, gso_targets(np.random.default_rng(0)).w2c)
    with pytest.raises(ValueError, match="need 8 or 4"): gso_inputs(5)


def test_intrinsics_of_the_paper():
    "LRM-Zero: 512 pixels, 50 degrees: fx = 548.994."
    assert abs(intrinsics(50, (512, 512), dtype=torch.float64)[0, 0] - 548.99376) < 1e-4


def test_random_directions_are_uniform():
    "On a sphere each coordinate is uniform: the Kolmogorov-Smirnov distance of 4000 draws stays under 0.03; a normalised cube fails."
    centres = random_views(np.random.default_rng(1), 4000, size=(4, 4)).centers
    for axis in torch.nn.functional.normalize(centres, dim=-1).T:
        assert (axis.sort().values - torch.linspace(-1, 1, 4000)).abs().max()/2 < 0.03


# ---- files


def test_json_round_trip_is_exact(tmp_path):
    for dtype in (torch.float32, torch.float64):
        cameras = off_centre_rig().to(dtype=dtype)
        save_cameras(cameras, tmp_path/"opencv_cameras.json", [f"renderings/{i:08d}_rgba.png" for i in range(4)])
        again = load_cameras(tmp_path/"opencv_cameras.json", dtype=dtype)
        assert torch.equal(again.K, cameras.K) and torch.equal(again.w2c, cameras.w2c) and again.size == SIZE
    frame = json.loads((tmp_path/"opencv_cameras.json").read_text())["frames"][2]
    assert set(frame) == {"w", "h", "fx", "fy", "cx", "cy", "w2c", "file_path"} and (frame["w"], frame["h"], frame["cx"]) == (512, 480, 250.3)


BAD_JSON = {
    "[1]": "no cameras", '{"frames": []}': "no cameras", '{"frames": [3]}': r"frames\[0\] is a int", '{"frames"': "no JSON",
    '{"frames": [{"w": 4}]}': r"frames\[0\] lacks h, fx",
    '{"frames": [{"w":4,"h":4,"fx":1,"fy":1,"cx":2,"cy":2,"w2c":[[1,0,0,0]]}]}': r"frames\[0\].w2c is 1x4, need 4x4",
    '{"frames": [{"w":4,"h":4,"fx":1,"fy":1,"cx":2,"cy":2,"w2c":"left"}]}': r"frames\[0\] is malformed",
    '{"frames": [{"w":4,"h":0,"fx":1,"fy":1,"cx":2,"cy":2,"w2c":[[1,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]]}]}': "at least 1 pixel",
    '{"frames": [{"w":4,"h":4,"fx":NaN,"fy":1,"cx":2,"cy":2,"w2c":[[1,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]]}]}': r"Cameras\[0\]: K holds NaN"}


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_json_is_named(tmp_path, text):
    path = tmp_path/"opencv_cameras.json"; path.write_text(text)
    with pytest.raises(ValueError, match=BAD_JSON[text]) as caught: load_cameras(path)
    assert str(path) in str(caught.value)


def hand_camera() -> Cameras:
    "At (0,-3,0) looking along +y with +z up: its matrices are written down below, in each format's terms."
    K = torch.tensor([[70, 0, 30.5], [0, 68, 25.25], [0, 0, 1]], dtype=torch.float64)
    return Cameras(K[None], torch.tensor([[[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 3], [0, 0, 0, 1]]], dtype=torch.float64), (48, 64))


def assert_same(a: Cameras, b: Cameras, eps=1e-12):
    assert a.size == b.size and torch.allclose(a.K, b.K, atol=eps) and torch.allclose(a.w2c, b.w2c, atol=eps)


def test_blender_by_hand():
    "Blender's camera rotated by Euler x = 90 degrees looks along +y; its matrix_world is [Rx(90) | location]."
    matrix_world = torch.tensor([[[1, 0, 0, 0], [0, 0, -1, -3], [0, 1, 0, 0], [0, 0, 0, 1]]], dtype=torch.float64)
    assert torch.allclose(to_opengl(hand_camera()), matrix_world)
    assert_same(from_opengl(matrix_world, hand_camera().K[0], (48, 64)), hand_camera())


@pytest.mark.parametrize("line, cx", [("PINHOLE 64 48 70 68 30.5 25.25", 30.5), ("SIMPLE_PINHOLE 64 48 70 32 24", 32)])
def test_colmap_by_hand(tmp_path, line, cx):
    (tmp_path/"cameras.txt").write_text(f"# comment\n7 {line}\n")
    half = math.sqrt(0.5)
    (tmp_path/"images.txt").write_text(f"# comment\n# another\n3 {2*half} {2*half} 0 0 0 0 3 7 a picture.png\n"
                                       f"1.5 2.5 -1 3 4 5\n9 {half} {half} 0 0 0 0 3 7 b.png\n\n")
    cameras, names = load_colmap(tmp_path, dtype=torch.float64)
    assert names == ["a picture.png", "b.png"] and cameras.K[0, 0, 2] == cx and cameras.size == (48, 64)
    for pose in cameras.w2c: assert torch.allclose(pose, hand_camera().w2c[0], atol=1e-12)
    if "SIMPLE" not in line: assert_same(cameras[0], hand_camera())


def test_colmap_round_trip(tmp_path):
    cameras = Cameras.cat([off_centre_rig(), random_views(np.random.default_rng(0), 20, size=SIZE, dtype=torch.float64)])
    save_colmap(cameras, tmp_path)
    again, names = load_colmap(tmp_path, dtype=torch.float64)
    assert_same(again, cameras); assert names[3] == "003.png" and (tmp_path/"points3D.txt").exists()


def test_quaternions_at_half_turns():
    "Half turns have w = 0, where the naive formula divides by nothing."
    for axis in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0.36, 0.48, 0.8]):
        axis = torch.tensor(axis, dtype=torch.float64)
        quaternion = matrix_to_quaternion(2*torch.outer(axis, axis) - torch.eye(3, dtype=torch.float64))
        assert abs(quaternion[0]) < 1e-12 and torch.allclose(quaternion[1:].abs(), axis, atol=1e-12)


def test_quaternions_agree_with_scipy():
    from scipy.spatial.transform import Rotation
    turns = Rotation.random(500, rng=np.random.default_rng(0))
    expected = np.roll(turns.as_quat(canonical=True), 1, axis=1)
    np.testing.assert_allclose(matrix_to_quaternion(torch.tensor(turns.as_matrix())), expected, atol=1e-12)


BAD_COLMAP = [("1 OPENCV 64 48 1 1 1 1 0 0 0 0", "1 1 0 0 0 0 0 3 1 a.png", "model OPENCV has distortion"),
              ("1 PINHOLE 64 48 1 1 1", "1 1 0 0 0 0 0 3 1 a.png", "3 parameters, PINHOLE has 4"),
              ("1 PINHOLE 64 x 1 1 1 1", "1 1 0 0 0 0 0 3 1 a.png", "cameras.txt line 1"),
              ("1 PINHOLE 64 48 1 1 1 1", "1 1 0 0 0 0 0 3 2 a.png", "camera 2 is not in cameras.txt"),
              ("1 PINHOLE 64 48 1 1 1 1", "1 0 0 0 0 0 0 3 1 a.png", "is no rotation"),
              ("1 PINHOLE 64 48 1 1 1 1", "1 1 0 0 0 0 0 3 a.png", "9 words"),
              ("1 PINHOLE 64 48 0 1 1 1", "1 1 0 0 0 0 0 3 1 a.png", "K is singular"),
              ("1 PINHOLE 64 48 1 1 1 1", "", "no pictures")]


@pytest.mark.parametrize("shot, pose, message", BAD_COLMAP)
def test_bad_colmap_is_named(tmp_path, shot, pose, message):
    (tmp_path/"cameras.txt").write_text(shot + "\n"); (tmp_path/"images.txt").write_text(pose + "\n\n" if pose else "")
    with pytest.raises(ValueError, match=message): load_colmap(tmp_path)


def test_nerf_by_hand(tmp_path):
    "The first NeRF's files: one angle, no size, OpenGL poses. tan(45 degrees) = 1, so the focal length is half the width."
    path = tmp_path/"transforms_train.json"
    pose = [[1, 0, 0, 0], [0, 0, -1, -3], [0, 1, 0, 0], [0, 0, 0, 1]]
    path.write_text(json.dumps(dict(camera_angle_x=math.pi/2, frames=[dict(file_path="./train/r_0", rotation=0.01, transform_matrix=pose)])))
    cameras, names = load_nerf(path, (48, 64), dtype=torch.float64)
    assert names == ["./train/r_0"]
    assert torch.allclose(cameras.K[0], torch.tensor([[32, 0, 32], [0, 32, 24], [0, 0, 1]], dtype=torch.float64))
    assert torch.allclose(cameras.w2c, hand_camera().w2c)
    with pytest.raises(ValueError, match=r"size=\(height, width\)"): load_nerf(path)


def test_nerf_frame_values_win(tmp_path):
    path = tmp_path/"transforms.json"
    pose = [[1, 0, 0, 0], [0, 0, -1, -3], [0, 1, 0, 0], [0, 0, 0, 1]]
    path.write_text(json.dumps(dict(fl_x=50, fl_y=51, cx=1, cy=2, w=64, h=48, camera_angle_x=1, frames=[
        dict(transform_matrix=pose), dict(transform_matrix=pose, fl_x=70, fl_y=68, cx=30.5, cy=25.25)])))
    cameras, _ = load_nerf(path, dtype=torch.float64)
    assert cameras.K[0].diagonal().tolist() == [50, 51, 1]
    assert_same(cameras[1], hand_camera())


def test_nerf_round_trip(tmp_path):
    save_nerf(off_centre_rig(), tmp_path/"transforms.json")
    cameras, names = load_nerf(tmp_path/"transforms.json", dtype=torch.float64)
    assert_same(cameras, off_centre_rig()); assert names == ["000.png", "001.png", "002.png", "003.png"]


@pytest.mark.parametrize("change, message", [(dict(k1=0.1), "lens distortion k1"), (dict(transform_matrix=[[1]]), "is 1x1, need 4x4"),
                                             (dict(fl_x="wide"), "malformed"), (dict(transform_matrix=None), "transform_matrix")])
def test_bad_nerf_is_named(tmp_path, change, message):
    frame = dict(fl_x=50, w=64, h=48, transform_matrix=np.eye(4).tolist()) | change
    (tmp_path/"transforms.json").write_text(json.dumps(dict(frames=[frame])))
    with pytest.raises(ValueError, match=message) as caught: load_nerf(tmp_path/"transforms.json")
    assert "frames[0]" in str(caught.value)


# ---- the type


def test_types_and_precision():
    K, w2c = intrinsics()[None], torch.eye(4)[None]
    assert Cameras(K, w2c, (64, 64)).dtype == torch.float32
    assert Cameras(K.double(), w2c, (64, 64)).w2c.dtype == torch.float64
    assert Cameras(K.int().numpy(), w2c.tolist(), [64, 64]).dtype == torch.float32
    assert Cameras(K, w2c, (64, 64)).to(dtype=torch.float64).rays()[1].dtype == torch.float64
    with pytest.raises(ValueError, match="need torch.float32"): Cameras(K, w2c, (64, 64)).to(dtype=torch.float16)
    with pytest.raises(ValueError, match="no array of numbers"): Cameras("K", w2c, (64, 64))
    with pytest.raises(ValueError, match="K is for"): Cameras(K.expand(2, 3, 3), w2c, (64, 64))


@pytest.mark.parametrize("size", [(0, 4), (4, -1), (4,), 4, (4.5, 4), ("a", 4), None, (4, 4, 3)])
def test_sizes_are_refused(size):
    with pytest.raises(ValueError, match="size is"): Cameras(intrinsics()[None], torch.eye(4)[None], size)


def test_one_bad_camera_of_a_batch_is_named():
    cameras = Cameras.stack([gso_inputs(4)]*3)
    for name, field, place, value in (("w2c", "w2c", (2, 1, 0, 3), math.inf), ("K", "K", (2, 1, 0, 0), -1.), ("w2c", "w2c", (2, 1, 3, 0), 1.)):
        tensors = dict(K=cameras.K.clone(), w2c=cameras.w2c.clone()); tensors[field][place] = value
        with pytest.raises(ValueError, match=rf"Cameras\[2, 1\]: .*{name}"): Cameras(**tensors, size=(64, 64))


def test_pose_inverse():
    pose = off_centre_rig().w2c
    assert torch.allclose(invert_pose(pose) @ pose, torch.eye(4, dtype=torch.float64).expand(4, 4, 4), atol=1e-14)
