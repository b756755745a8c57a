"""The splat views: the same picture in VTK and in the renderer that the loss sees."""
import gc
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from chromium import opengl
from clouds import cloud, psnr
from zerolab.render.splats import render_splats
from zerolab.scene.cameras import look_at, orbit
from zerolab.scene.gaussians import Gaussians, rgb_to_sh
from zerolab.view import splats as splats_module
from zerolab.view.gl import ensure_gl
from zerolab.view.splats import ELLIPSOID_RADIUS, MODES, OVERDRAW, SplatActor, SplatSettings, place_camera, read_camera


OUTSIDE, INSIDE = orbit([50.], 15., 2.7, size=(180, 240)), orbit([0.], 0., 0.5, size=(180, 240))


def wild(count=1500, degree=0, seed=0):
    """Small and large, needles and discs: an order of magnitude and a half in size."""
    make = torch.Generator().manual_seed(seed)
    gaussians = cloud(count, degree, seed)
    return replace(gaussians, scales=torch.exp(-5.5 + 2.7 * torch.rand(count, 3, generator=make)))


def exact(gaussians, camera, background=(1., 1., 1.)):
    render = render_splats(gaussians.to(dtype=torch.float64), camera.to(dtype=torch.float64), torch.tensor(background, dtype=torch.float64), backend="cpu")
    return (render.rgb[0].clamp(0, 1) * 255).round().byte().numpy()


@contextmanager
def shown(gaussians, camera, background=(1., 1., 1.), peeling=False, **settings):
    ensure_gl()
    import pyvista
    plotter = pyvista.Plotter(off_screen=True, window_size=(camera.width, camera.height))
    plotter.set_background(background)
    if peeling: plotter.enable_depth_peeling(8)
    actor = SplatActor(gaussians, **settings).attach(plotter)
    place_camera(plotter, camera)
    try: yield plotter, actor
    finally: plotter.close()


def shot(plotter):
    plotter.render_window.Render()
    return np.array(plotter.screenshot(return_img=True))


def drawn(*arguments, **settings):
    with shown(*arguments, **settings) as (plotter, _): return shot(plotter)


@opengl
@pytest.mark.parametrize("name, gaussians, camera, background, peeling, least", [
    ("outside", wild(), OUTSIDE, (1., 1., 1.), False, 50), ("black", wild(seed=2), OUTSIDE, (0., 0., 0.), True, 50),
    ("inside", wild(seed=1), INSIDE, (1., 1., 1.), False, 45), ("degree 3", wild(degree=3), OUTSIDE, (1., 1., 1.), True, 50),
    ("bright", replace(wild(800), sh=3 * wild(800).sh), OUTSIDE, (1., 1., 1.), False, 50),
    ("off centre", wild(), orbit([10.], 20., 2.7, size=(300, 300)).crop(20, 90, 160, 200), (1., 1., 1.), False, 50),
    ("stretched", wild(), orbit([10.], 20., 2.7, size=(200, 200)).resize((200, 260)), (1., 1., 1.), False, 50)])
def test_vtk_shows_what_the_loss_sees(name, gaussians, camera, background, peeling, least):
    with shown(gaussians, camera, background, peeling) as (plotter, _):
        assert not plotter.renderer.GetUseDepthPeeling() and not plotter.renderer.GetUseOIT()
        found = psnr(shot(plotter), exact(gaussians, camera, background))
    assert found > least, f"{name}: {found:.1f} dB"


@opengl
def test_small_slanted_gaussians_in_a_large_window():
    needles = replace(cloud(600), scales=torch.tensor([0.004, 0.0006, 0.0006]).repeat(600, 1), opacities=torch.full((600,), 0.95))
    camera = orbit([20.], 10., 1.5, size=(480, 640))
    assert psnr(drawn(needles, camera), exact(needles, camera)) > 50


@opengl
def test_a_cloud_far_from_the_origin_and_a_moved_actor():
    away = torch.tensor([300., -200., 100.])
    camera = look_at(away[None] + torch.tensor([[2., 1., 1.]]), away, size=(150, 200))
    far = wild(600)
    far = replace(far, means=far.means + away)
    assert psnr(drawn(far, camera), exact(far, camera)) > 45, "float32 leaves less there"
    here = wild(600, degree=1)
    moved = replace(here, means=1.5 * here.means + torch.tensor([0.2, 0., -0.1]), scales=1.5 * here.scales)
    with shown(here, OUTSIDE) as (plotter, actor):
        actor.actor.user_matrix = np.array([[1.5, 0, 0, 0.2], [0, 1.5, 0, 0], [0, 0, 1.5, -0.1], [0, 0, 0, 1]])
        assert psnr(shot(plotter), exact(moved, OUTSIDE)) > 50


@opengl
def test_the_order_of_the_data_does_not_matter():
    gaussians = wild(800, degree=2)
    shuffled = gaussians[torch.randperm(800, generator=torch.Generator().manual_seed(3))]
    assert np.array_equal(drawn(gaussians, OUTSIDE), drawn(shuffled, OUTSIDE))


@opengl
def test_every_subplot_and_every_move_is_sorted_and_nothing_is_sorted_twice(monkeypatch):
    ensure_gl()
    import pyvista
    gaussians, cameras, sorts = wild(700, degree=1), [OUTSIDE, orbit([200.], -30., 2.2, size=(180, 240))], []
    original = splats_module._set_order
    monkeypatch.setattr(splats_module, "_set_order", lambda *arguments: (sorts.append(1), original(*arguments)))
    plotter = pyvista.Plotter(off_screen=True, window_size=(480, 180), shape=(1, 2), border=False)
    actor = SplatActor(gaussians)
    for k, camera in enumerate(cameras):
        plotter.subplot(0, k)
        plotter.set_background("white", all_renderers=False)
        actor.attach(plotter)
        place_camera(plotter, camera)
    image = shot(plotter)
    for k, camera in enumerate(cameras): assert psnr(image[:, 240*k:240*(k + 1)], exact(gaussians, camera)) > 50
    plotter.close()
    with shown(gaussians, OUTSIDE) as (plotter, _):
        sorts.clear()
        for _ in range(3): shot(plotter)
        assert len(sorts) == 1
        place_camera(plotter, cameras[1])
        assert psnr(shot(plotter), exact(gaussians, cameras[1])) > 50 and len(sorts) == 2


@opengl
def test_a_larger_screenshot_has_the_blur_of_its_size():
    with shown(wild(700), OUTSIDE) as (plotter, _):
        image = np.array(plotter.screenshot(return_img=True, window_size=(480, 360)))
    assert psnr(image, exact(wild(700), OUTSIDE.resize((360, 480)))) > 50


@opengl
def test_a_movie_is_sorted_in_every_frame(tmp_path):
    imageio = pytest.importorskip("imageio", reason="no imageio here: pip install imageio")
    with shown(wild(500), OUTSIDE) as (plotter, _):
        plotter.open_gif(str(tmp_path / "a.gif"))
        for azimuth in (50., 140.):
            place_camera(plotter, orbit([azimuth], 15., 2.7, size=OUTSIDE.size))
            plotter.write_frame()
    frames = [np.asarray(frame)[..., :3] for frame in imageio.mimread(tmp_path / "a.gif")]
    for frame, azimuth in zip(frames, (50., 140.)):  # a gif has 256 colours
        assert psnr(frame, exact(wild(500), orbit([azimuth], 15., 2.7, size=OUTSIDE.size))) > 25


@opengl
def test_settings_do_what_they_say():
    gaussians, low, high = wild(900, degree=2), torch.tensor([-0.3, -1., -1.]), torch.tensor([1., 0.2, 1.])
    inside = ((gaussians.means >= low) & (gaussians.means <= high)).all(1)
    same = [(dict(crop=(low, high)), gaussians[inside]), (dict(min_opacity=0.5), gaussians[gaussians.opacities >= 0.5]),
            (dict(scale=0.5), replace(gaussians, scales=0.5 * gaussians.scales)), (dict(sh_degree=1), replace(gaussians, sh=gaussians.sh[:, :4])),
            (dict(sh_degree=3), gaussians)]
    with shown(gaussians, OUTSIDE) as (plotter, actor):
        before = shot(plotter)
        for settings, like in same:
            actor.update(**settings)
            assert psnr(shot(plotter), exact(like, OUTSIDE)) > 50, settings
            actor.update(**{name: getattr(SplatSettings(), name) for name in settings})
        actor.update(crop=((5, 5, 5), (6, 6, 6)))
        assert (shot(plotter) == 255).all(), "nothing is left"
        actor.update(crop=None)
        for mode in MODES:
            actor.update(mode=mode)
            assert shot(plotter).std() > 5, mode
        actor.update(mode="rgb")
        assert np.array_equal(shot(plotter), before), "back as it was"


@opengl
def test_other_data_in_the_same_actor():
    with shown(wild(300), OUTSIDE) as (plotter, actor):
        shot(plotter)
        for gaussians in (wild(900, degree=3, seed=4), wild()[:0], wild(1), wild(500, degree=1, seed=5)):
            actor.set_data(gaussians)
            assert psnr(shot(plotter), exact(gaussians, OUTSIDE)) > 50, gaussians
        with pytest.raises(ValueError, match="holds NaN"): actor.set_data(replace(wild(5), scales=torch.full((5, 3), torch.nan)))
        assert psnr(shot(plotter), exact(wild(500, degree=1, seed=5), OUTSIDE)) > 50, "bad data change nothing"


@opengl
def test_a_training_that_goes_on_does_not_reach_into_the_picture():
    gaussians = wild(300, degree=1)
    with shown(gaussians, OUTSIDE) as (plotter, actor):
        before = shot(plotter)
        for tensor in gaussians.tensors(): tensor.mul_(0.5)
        actor.update(scale=1.).seen = None
        assert np.array_equal(shot(plotter), before)


@opengl
def test_what_was_attached_can_be_detached_and_is_freed():
    with shown(wild(200), OUTSIDE, mode="depth") as (plotter, actor):
        assert shot(plotter).std() > 5
        actor.detach()
        assert (shot(plotter) == 255).all()
        actor.attach(plotter)
        assert shot(plotter).std() > 5
    freed = [weakref.ref(actor), weakref.ref(plotter)]
    del actor, plotter
    gc.collect()
    assert [reference() for reference in freed] == [None, None]


@opengl
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "points"])
def test_a_parallel_projection_shows_a_gaussian_in_its_size(mode):
    ball = Gaussians(torch.zeros(1, 3), torch.tensor([[1., 0, 0, 0]]), torch.full((1, 3), 0.2), torch.tensor([0.9]), torch.full((1, 1, 3), -1.))
    with shown(ball, OUTSIDE, mode=mode) as (plotter, _):
        plotter.enable_parallel_projection()
        plotter.camera.parallel_scale = 1.  # half the height
        image = shot(plotter)[:, :200]
        different = (image != image[0, 0]).any(-1).sum()
    sigmas = ELLIPSOID_RADIUS if mode == "ellipsoids" else np.sqrt(2 * np.log(0.9 * 255))
    assert abs(different / (np.pi * (sigmas * 0.2 * 90)**2) - 1) < 0.1


@opengl
def test_alpha_and_the_background_that_it_needs():
    alpha = render_splats(wild(), OUTSIDE).alpha[0]
    with shown(wild(), OUTSIDE, background=(0.2, 0.6, 1.), mode="alpha") as (plotter, actor):
        assert psnr(shot(plotter), (255 * alpha).round().expand(-1, -1, 3).numpy()) > 50
        actor.update(mode="rgb")
        assert psnr(shot(plotter), exact(wild(), OUTSIDE, (0.2, 0.6, 1.))) > 50


@opengl
def test_overdraw_counts():
    stack = Gaussians(torch.linspace(0, 0.01, 20)[:, None].repeat(1, 3), torch.tensor([[1., 0, 0, 0]]).repeat(20, 1), torch.full((20, 3), 0.2),
                      torch.full((20,), 0.9), torch.zeros(20, 1, 3))
    assert np.abs(drawn(stack, OUTSIDE, mode="overdraw")[90, 120] - 255 * 20 / np.array(OVERDRAW)).max() < 1
    assert (drawn(stack, OUTSIDE, mode="overdraw")[5, 5] == 0).all()


@opengl
def test_an_ellipsoid_has_its_size_and_cuts_a_mesh_at_its_surface():
    import pyvista
    ball = Gaussians(torch.zeros(1, 3), torch.tensor([[1., 0, 0, 0]]), torch.full((1, 3), 0.2), torch.ones(1), rgb_to_sh(torch.tensor([[[1., 0., 0.]]])))
    camera = orbit([0.], 0., 4., size=(200, 200))
    red = lambda image: int(((image[..., 0] > 60) & (image[..., 2] < 100)).sum())
    radius = ELLIPSOID_RADIUS * 0.2
    with shown(ball, camera, mode="ellipsoids") as (plotter, _):
        area = np.pi * (radius * float(camera.K[0, 0, 0]) / 4)**2
        whole = red(shot(plotter))
        assert abs(whole / area - 1) < 0.05
        for depth, seen in ((1.1, 0), (0.8, 0.36), (-0.1, 1)):  # of a blue plane before the camera: how much of the ball's disc stands out of it
            plane = pyvista.Plane(center=(depth * radius, 0, 0), direction=(1, 0, 0), i_size=4, j_size=4)
            plotter.add_mesh(plane, color="blue", lighting=False, name="plane", reset_camera=False)
            assert abs(red(shot(plotter)) / whole - seen) < 0.06, depth


@opengl
def test_points_are_dots_of_one_size():
    one, large = (drawn(replace(cloud(40), scales=torch.full((40, 3), size)), OUTSIDE, mode="points") for size in (0.001, 0.3))
    assert np.array_equal(one, large) and 40 * 4 < (one < 250).any(-1).sum() < 40 * 25


@opengl
def test_splats_lie_before_and_behind_meshes():
    import pyvista
    ball = Gaussians(torch.zeros(1, 3), torch.tensor([[1., 0, 0, 0]]), torch.full((1, 3), 0.3), torch.ones(1), rgb_to_sh(torch.tensor([[[1., 0., 0.]]])))
    camera = orbit([0.], 0., 4., size=(100, 100))
    with shown(ball, camera) as (plotter, _):
        for depth, color in ((1., (0, 0, 255)), (-1., (255, 0, 0))):
            plane = pyvista.Plane(center=(depth, 0, 0), direction=(1, 0, 0), i_size=4, j_size=4)
            plotter.add_mesh(plane, color="blue", lighting=False, name="plane", reset_camera=False)
            assert np.abs(shot(plotter)[50, 50].astype(int) - color).max() < 3


@opengl
def test_coarse_levels_keep_what_is_seen():
    gaussians = wild(4000)
    full, third, tenth = (drawn(gaussians, OUTSIDE, lod=lod) for lod in (1., 0.3, 0.1))
    any_tenth = drawn(gaussians[::10], OUTSIDE)
    assert psnr(third, full) > psnr(tenth, full) > psnr(any_tenth, full) + 2
    with shown(gaussians, OUTSIDE, lod=0.1) as (plotter, actor): assert len(actor.shown) == 400


@opengl
@pytest.mark.parametrize("seed", range(20))
def test_what_is_placed_is_read(seed):
    ensure_gl()
    import pyvista
    rng = np.random.default_rng(seed)
    camera = look_at(rng.normal(size=(1, 3)) * 10.**rng.uniform(-1, 2), rng.normal(size=3), rng.normal(size=3), fov=rng.uniform(5, 130),
                     size=tuple(rng.integers(20, 900, 2)), dtype=torch.float64)
    camera = camera.crop(*rng.uniform(-50, 50, 2), *(int(x) for x in rng.integers(20, 900, 2)))
    if seed % 2: camera = camera.resize(tuple(int(x) for x in rng.integers(20, 900, 2)))
    plotter = pyvista.Plotter(off_screen=True, window_size=camera.size[::-1])
    place_camera(plotter, camera)
    back = read_camera(plotter, camera.size, torch.float64)
    plotter.close()
    assert torch.allclose(back.K, camera.K, rtol=1e-9, atol=1e-7) and torch.allclose(back.w2c, camera.w2c, rtol=1e-9, atol=1e-9)


@opengl
def test_closing_leaves_no_message():
    script = """
import torch, pyvista
from zerolab.scene.gaussians import Gaussians
from zerolab.view.gl import ensure_gl
from zerolab.view.splats import SplatActor
ensure_gl()
gaussians = Gaussians(torch.randn(50, 3), torch.randn(50, 4), torch.full((50, 3), 0.1), torch.ones(50), torch.zeros(50, 4, 3))
for mode in ("rgb", "ellipsoids", "depth"):
    plotter = pyvista.Plotter(off_screen=True, window_size=(60, 40))
    SplatActor(gaussians, mode=mode).attach(plotter)
    plotter.screenshot(return_img=True)
    plotter.close()
print("done")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("settings, message", [
    (dict(mode="x-ray"), "need one of rgb"), (dict(sh_degree=5), "need 0 to 4"), (dict(scale=0.), "above 0"), (dict(scale=float("nan")), "above 0"),
    (dict(min_opacity=2.), "need 0 to 1"), (dict(lod=0.), "above 0"), (dict(crop=((0, 0, 0), (1, 1))), "crop|inhomogeneous"),
    (dict(crop=((0, 0, 0), (1, 1, -1))), "lowest and the highest")])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message): SplatSettings(**settings)


def test_bad_gaussians_are_named():
    pytest.importorskip("pyvista")
    with pytest.raises(ValueError, match="is a batch, need one scene"): SplatActor(Gaussians.stack([cloud(3), cloud(3)]))
    with pytest.raises(ValueError, match="got a str"): SplatActor("cloud.ply")
    for name in ("means", "quats", "scales", "opacities", "sh"):
        broken = cloud(4)
        getattr(broken, name)[2] = torch.inf
        with pytest.raises(ValueError, match=f"{name} of Gaussian 2 holds NaN or infinity"): SplatActor(broken)


@pytest.mark.slow
@opengl
def test_a_million_gaussians_open_and_turn_in_four_gigabytes():
    script = """
import resource, time, torch, pyvista
from zerolab.scene.cameras import look_at, orbit
from zerolab.scene.gaussians import Gaussians
from zerolab.view.gl import ensure_gl
from zerolab.view.splats import SplatActor, place_camera
ensure_gl()
count = 1_000_000
gaussians = Gaussians(0.4 * torch.randn(count, 3), torch.randn(count, 4), torch.full((count, 3), 0.004), torch.rand(count), torch.zeros(count, 16, 3))
plotter = pyvista.Plotter(off_screen=True, window_size=(640, 480))
actor = SplatActor(gaussians).attach(plotter)
def frame(azimuth):
    place_camera(plotter, orbit([azimuth], 20., 2.7, size=(480, 640)))
    start = time.perf_counter(); plotter.render_window.Render(); return time.perf_counter() - start
first, full = frame(0), frame(10)
actor.update(lod=0.1); frame(20); coarse = frame(30)
actor.update(lod=1.); frame(40)
plotter.close()
print(full, coarse, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    full, coarse, gigabytes = map(float, subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    print(f"full {full:.2f} s, a tenth {coarse:.2f} s, {gigabytes:.2f} GB")
    assert gigabytes < 4 and coarse < full / 3


def test_importing_the_module_does_not_load_vtk():
    script = "import sys, zerolab.view.splats; print({'vtk', 'vtkmodules', 'pyvista'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"
