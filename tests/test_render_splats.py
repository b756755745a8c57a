"The splat rasterisers against an independent brute force, against gsplat's own PyTorch code, and against themselves."
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from zerolab.render.splats import SplatRender, pick_backend, render_splats, sh_colors
from zerolab.scene.cameras import Cameras, look_at, orbit
from zerolab.scene.gaussians import Gaussians

NAMES = ("means", "quats", "scales", "opacities", "sh")


def random_scene(count, *, seed=0, batch=(), degree=0, dtype=torch.float64, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*batch, count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    uniform = lambda *shape: torch.rand(*batch, count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return Gaussians(normal(3) * 0.4, normal(4), size * (0.1 + uniform(3)), uniform(), 0.5 * normal((degree + 1) ** 2, 3))


def some_cameras(views=2, size=(13, 18), dtype=torch.float64):
    return orbit(torch.arange(views) * 100.0 + 20, 25.0, 2.5, size=size).to(dtype=dtype)


def leaves(gaussians): return [getattr(gaussians, name).clone().requires_grad_() for name in NAMES]


def mixed_loss(render):
    "A loss that no symmetry can hide behind: another weight for every number."
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x).sin()).sum() for x in render)


def values_and_gradients(draw, gaussians, cameras):
    tensors, w2c = leaves(gaussians), cameras.w2c.clone().requires_grad_()
    moved = Cameras(cameras.K, cameras.w2c, cameras.size)
    object.__setattr__(moved, "w2c", w2c)
    render = draw(Gaussians(*tensors), moved)
    return [*render, *torch.autograd.grad(mixed_loss(render), [*tensors, w2c])]


def quaternion_to_matrix(q):
    "The rotation as the matrix of v -> q v q*, a route that shares no formula with the library."
    q = q / q.norm(dim=-1, keepdim=True)
    w, v = q[..., :1, None], q[..., 1:]
    zero = torch.zeros_like(v[..., 0])
    cross = torch.stack([zero, -v[..., 2], v[..., 1], v[..., 2], zero, -v[..., 0], -v[..., 1], v[..., 0], zero], -1).unflatten(-1, (3, 3))
    return torch.eye(3, dtype=q.dtype) + 2 * w * cross + 2 * cross @ cross


def brute_force(gaussians, cameras, *, antialiased=False):
    "One scene of SH degree 0: each pixel asks each Gaussian, the Jacobian comes from autograd's own, conics from `torch.linalg`."
    height, width = cameras.size
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([columns, rows], -1).to(gaussians.means.dtype)
    colors = (0.5 + 0.28209479177387814 * gaussians.sh[:, 0]).clamp_min(0)
    rotation = quaternion_to_matrix(gaussians.quats)
    covariance = rotation @ torch.diag_embed(gaussians.scales ** 2) @ rotation.mT
    pictures, alphas = [], []
    for K, w2c in zip(cameras.K, cameras.w2c):
        points = gaussians.means @ w2c[:3, :3].T + w2c[:3, 3]
        low = torch.stack([-(K[0, 2] + 0.15 * width) / K[0, 0], -(K[1, 2] + 0.15 * height) / K[1, 1]])
        high = torch.stack([(width - K[0, 2] + 0.15 * width) / K[0, 0], (height - K[1, 2] + 0.15 * height) / K[1, 1]])
        slopes = torch.minimum(torch.maximum(points[:, :2] / points[:, 2:], low), high)
        focal = K[[0, 1], [0, 1]]
        jacobian = torch.cat([torch.diag(focal).expand(len(points), 2, 2), -(focal * slopes)[..., None]], -1) / points[:, 2, None, None]
        sharp = jacobian @ w2c[:3, :3] @ covariance @ w2c[:3, :3].T @ jacobian.mT
        wide = sharp + 0.3 * torch.eye(2, dtype=sharp.dtype)
        opacities = gaussians.opacities
        if antialiased: opacities = opacities * (torch.linalg.det(sharp) / torch.linalg.det(wide)).clamp_min(0).sqrt()
        centres = focal * points[:, :2] / points[:, 2:] + K[:2, 2]
        light, picture = torch.ones(height, width, dtype=pixels.dtype), torch.zeros(height, width, 4, dtype=pixels.dtype)
        open_ = torch.ones(height, width, dtype=torch.bool)
        for n in torch.argsort(points[:, 2].detach().float(), stable=True).tolist():
            if not 0.01 <= points[n, 2] <= 1e10: continue
            offset = pixels - centres[n]
            exponent = 0.5 * (offset * (offset @ torch.linalg.inv(wide[n]))).sum(-1)
            alpha = (opacities[n] * torch.exp(-exponent)).clamp_max(0.999)
            drawn = open_ & (alpha >= 1 / 255)
            open_ = open_ & ~(drawn & (light * (1 - alpha) <= 1e-4))
            drawn = drawn & open_
            alpha = torch.where(drawn, alpha, torch.zeros_like(alpha))
            picture = picture + (light * alpha)[..., None] * torch.cat([colors[n], points[n, 2:]])
            light = light * (1 - alpha)
        pictures.append(picture)
        alphas.append(1 - light)
    picture, alpha = torch.stack(pictures), torch.stack(alphas)[..., None]
    return SplatRender(picture[..., :3], alpha, picture[..., 3:] / alpha.clamp_min(1e-10))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("antialiased", [False, True])
def test_values_and_gradients_equal_a_dense_reference(backend, antialiased):
    gaussians, cameras = random_scene(150, size=0.15), some_cameras()
    expected = values_and_gradients(lambda g, c: brute_force(g, c, antialiased=antialiased), gaussians, cameras)
    actual = values_and_gradients(lambda g, c: render_splats(g, c, backend=backend, antialiased=antialiased), gaussians, cameras)
    assert expected[1].max() > 0.99 and expected[1].min() < 0.5       # some pixels are full, some are not
    for x, y in zip(actual, expected): torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9 * y.abs().max().item())


def test_float32_is_close_to_float64():
    gaussians, cameras = random_scene(400), some_cameras(size=(37, 50))
    draw = lambda dtype: values_and_gradients(lambda g, c: render_splats(g, c), gaussians.to(dtype=dtype), cameras.to(dtype=dtype))
    for x, y in zip(draw(torch.float32), draw(torch.float64)):
        assert x.dtype == torch.float32
        assert (x - y).norm() <= 2e-3 * y.norm()
        assert (x - y).abs().median() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("antialiased", [False, True])
def test_gradcheck(antialiased):
    gaussians, cameras = random_scene(3, seed=3, size=0.3), some_cameras(1, (5, 6))
    def draw(w2c, *tensors):
        moved = Cameras(cameras.K, cameras.w2c, cameras.size)
        object.__setattr__(moved, "w2c", w2c)
        return tuple(render_splats(Gaussians(*tensors), moved, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), backend="cpu",
                                   antialiased=antialiased))[:2]
    inputs = [cameras.w2c.clone().requires_grad_(), *leaves(gaussians)]
    # steps far below the distance of any alpha to the 1/255 cut, so that no pixel appears or vanishes
    assert torch.autograd.gradcheck(draw, inputs, eps=1e-7, atol=1e-5, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.parametrize("degree", [0, 2])
def test_a_batch_equals_a_loop(degree):
    gaussians = random_scene(80, batch=(2, 3), degree=degree)
    cameras = Cameras.stack([some_cameras(), some_cameras(2)[[1, 0]], some_cameras()])
    background = torch.rand(3, 2, 3, dtype=torch.float64)
    batch = render_splats(gaussians, cameras, background)
    assert batch.rgb.shape == (2, 3, 2, 13, 18, 3) and batch.alpha.shape == batch.depth.shape == (2, 3, 2, 13, 18, 1)
    for i in range(2):
        for j in range(3):
            scene = Gaussians(*(getattr(gaussians, name)[i, j] for name in NAMES))
            view = Cameras(cameras.K[j], cameras.w2c[j], cameras.size)
            for x, y in zip(batch, render_splats(scene, view, background[j])): assert torch.equal(x[i, j], y)


def test_one_scene_under_many_batches_of_cameras_sums_its_gradients():
    cameras = Cameras.stack([some_cameras(), some_cameras(2)[[1, 0]]])
    tensors = leaves(random_scene(40))
    together = torch.autograd.grad(render_splats(Gaussians(*tensors), cameras).rgb.square().sum(), tensors)
    apart = [torch.autograd.grad(render_splats(Gaussians(*tensors), Cameras(cameras.K[i], cameras.w2c[i], cameras.size)).rgb.square().sum(), tensors)
             for i in range(2)]
    for x, *parts in zip(together, *apart): torch.testing.assert_close(x, sum(parts))


def test_one_gaussian_has_its_closed_form():
    "A sphere on the optical axis: alpha(r) = o exp(-r^2 / 2 (s f / z)^2 + 0.3), and the depth is its own."
    cameras = look_at(torch.tensor([[3.0, 0, 0]]), size=(33, 33)).to(dtype=torch.float64)
    one = lambda *values: torch.tensor([values], dtype=torch.float64)
    ball = Gaussians(one(0, 0, 0), one(2, 0, 0, 0), one(0.2, 0.2, 0.2), torch.tensor([0.8], dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.float64))
    render = render_splats(ball, cameras)
    variance = (0.2 * cameras.K[0, 0, 0] / 3) ** 2 + 0.3
    offsets = torch.arange(33, dtype=torch.float64) - 16
    expected = 0.8 * torch.exp(-(offsets[:, None] ** 2 + offsets ** 2) / (2 * variance))
    expected = torch.where(expected >= 1 / 255, expected, 0)
    torch.testing.assert_close(render.alpha[0, ..., 0], expected)
    torch.testing.assert_close(render.rgb[0], expected[..., None].expand(-1, -1, 3) / 2)
    torch.testing.assert_close(render.depth[0, ..., 0], 3 * (expected > 0).double())


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_sh_degrees_have_their_closed_form(degree):
    "Every coefficient against associated Legendre functions, in 3DGS's order and signs."
    from scipy.special import lpmv
    rng, one = np.random.default_rng(0), torch.ones(1, dtype=torch.float64)
    for index in range((degree + 1) ** 2):
        l = math.isqrt(index); m = index - l * l - l
        mean = rng.normal(size=3)
        sh = torch.zeros(1, (degree + 1) ** 2, 3, dtype=torch.float64)
        sh[0, index] = 0.1
        scene = Gaussians(torch.tensor(mean)[None], torch.eye(4, dtype=torch.float64)[:1], torch.ones(1, 3, dtype=torch.float64), one, sh)
        cameras = some_cameras(3)
        for view in range(3):
            direction = mean - cameras.centers[view].numpy()
            x, y, z = direction / np.linalg.norm(direction)
            norm = math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - abs(m)) / math.factorial(l + abs(m)))
            angle = {True: math.sqrt(2) * math.cos(m * math.atan2(y, x)), False: math.sqrt(2) * math.sin(-m * math.atan2(y, x))}[m > 0]
            value = norm * lpmv(abs(m), l, z) * (1 if m == 0 else angle)     # lpmv carries the Condon-Shortley sign, as 3DGS does
            colors = sh_colors(scene, cameras)
            expected = max(0.5 + 0.1 * value, 0)
            assert abs(colors[min(view, len(colors) - 1), 0, 0].item() - expected) < 1e-9, (l, m)


def test_the_background_shows_through_what_is_transparent():
    gaussians, cameras = random_scene(30), some_cameras()
    background = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    plain, render = render_splats(gaussians, cameras), render_splats(gaussians, cameras, background)
    torch.testing.assert_close(render.rgb, plain.rgb + (1 - plain.alpha) * background[:, None, None])
    (gradient,) = torch.autograd.grad(render.rgb.sum(), background)
    torch.testing.assert_close(gradient, (1 - plain.alpha).sum((1, 2)).expand(2, 3))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_nothing_to_see_is_black_with_zero_gradients(backend):
    cameras = some_cameras()
    empty = render_splats(random_scene(0), cameras, torch.ones(3), backend=backend)
    assert (empty.rgb == 1).all() and (empty.alpha == 0).all() and (empty.depth == 0).all()
    behind = random_scene(6)
    tensors = leaves(Gaussians(behind.means + cameras.centers[0] * 3, *(getattr(behind, name) for name in NAMES[1:])))
    render = render_splats(Gaussians(*tensors), cameras[0], backend=backend)
    assert (render.rgb == 0).all() and (render.alpha == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(render.rgb.sum() + render.depth.sum(), tensors))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gaussian_with_a_nan_is_not_drawn_and_harms_nobody(backend, name, value):
    gaussians, cameras = random_scene(20, degree=1), some_cameras(1)
    tensors = leaves(gaussians)
    with torch.no_grad(): tensors[NAMES.index(name)][7].view(-1)[0] = value
    render = render_splats(Gaussians(*tensors), cameras, backend=backend)
    others = render_splats(gaussians[[n for n in range(20) if n != 7]], cameras, backend=backend)
    for x, y in zip(render, others): torch.testing.assert_close(x, y)
    gradients = torch.autograd.grad(mixed_loss(render), tensors)
    assert all(x.isfinite().all() and (x[7] == 0).all() for x in gradients)


def test_extreme_gaussians_stay_finite():
    "Needles, discs, giants, dust, and some at the camera: float32 pictures and gradients remain finite."
    gaussians, cameras = random_scene(300, dtype=torch.float32), some_cameras(2, (40, 56), torch.float32)
    generator = torch.Generator().manual_seed(1)
    scales = 10 ** (torch.rand(300, 3, generator=generator) * 9 - 7)
    means = gaussians.means.clone()
    means[:50] = cameras.centers[0] + 0.02 * torch.randn(50, 3, generator=generator)
    for antialiased in (False, True):
        tensors = leaves(Gaussians(means, gaussians.quats, scales, gaussians.opacities, gaussians.sh))
        render = render_splats(Gaussians(*tensors), cameras, antialiased=antialiased)
        gradients = torch.autograd.grad(render.rgb.square().sum() + render.alpha.sum(), tensors)
        assert all(x.isfinite().all() for x in (*render, *gradients))
        assert 0 <= render.alpha.min() and render.alpha.max() <= 1


def test_the_same_bits_for_any_number_of_threads():
    code = """
import hashlib, sys, torch
sys.path.insert(0, "tests")
from test_render_splats import leaves, mixed_loss, random_scene, some_cameras
from zerolab.render.splats import render_splats
from zerolab.scene.gaussians import Gaussians
for threads in (1, 2):
    torch.set_num_threads(threads)
    tensors = leaves(random_scene(2000, dtype=torch.float32))
    render = render_splats(Gaussians(*tensors), some_cameras(3, (60, 70), torch.float32))
    results = [*render, *torch.autograd.grad(mixed_loss(render), tensors)]
    print(hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in results)).hexdigest())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NUMBA_NUM_THREADS": "2"},
                         cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert run.returncode == 0, run.stderr
    one, two = run.stdout.split()
    assert one == two


def test_a_process_that_keeps_to_one_thread_still_does_after_drawing():
    "Numba's pool sets the OpenMP runtime that PyTorch shares to all cores."
    code = """
import sys, numba, torch
sys.path.insert(0, "tests")
from test_render_splats import leaves, random_scene, some_cameras
from zerolab.render import splats_cpu
from zerolab.render.splats import render_splats
from zerolab.scene.gaussians import Gaussians
torch.set_num_threads(1)
used, enter = [], splats_cpu._OneAtATime.__enter__
def counted(self):
    enter(self)
    used.append(numba.get_num_threads())
splats_cpu._OneAtATime.__enter__ = counted
render_splats(Gaussians(*leaves(random_scene(20, dtype=torch.float32))), some_cameras(1, (16, 16), torch.float32))
print(torch.get_num_threads(), *used)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NUMBA_NUM_THREADS": "2"},
                         cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) == {"1"}


def test_a_forked_child_gets_a_clear_error_instead_of_dying():
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, "tests")
from test_render_splats import leaves, random_scene, some_cameras
from zerolab.render.splats import render_splats
draw = lambda: render_splats(random_scene(3), some_cameras())
draw()
child = os.fork()
if child == 0:
    try: draw()
    except RuntimeError as error: os._exit(7 if "spawn" in str(error) else 8)
    os._exit(9)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert run.stdout.strip() == "7", run.stderr


def test_python_threads_may_draw_at_once():
    from concurrent.futures import ThreadPoolExecutor
    gaussians, cameras = random_scene(300, dtype=torch.float32), some_cameras(2, (40, 50), torch.float32)
    expected = render_splats(gaussians, cameras).rgb
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(expected, x) for x in pool.map(lambda _: render_splats(gaussians, cameras).rgb, range(12)))


def test_memory_is_bounded_by_tiles_touched_not_by_pixels_times_gaussians():
    "20,000 Gaussians at 256 x 256 would be 5 GB of pairs in float32; a step stays under 300 MB."
    code = """
import resource, sys, torch
sys.path.insert(0, "tests")
from test_render_splats import leaves, random_scene, some_cameras
from zerolab.render.splats import render_splats
from zerolab.scene.gaussians import Gaussians
def step(count, size):
    tensors = leaves(random_scene(count, dtype=torch.float32, size=0.02))
    torch.autograd.grad(render_splats(Gaussians(*tensors), some_cameras(1, size, torch.float32)).rgb.square().sum(), tensors)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(-step(50, (16, 16)) + step(20000, (256, 256)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 300


def test_errors_name_the_remedy(monkeypatch):
    gaussians, cameras = random_scene(3), some_cameras()
    with pytest.raises(ValueError, match="backend is 'opengl'"): render_splats(gaussians, cameras, backend="opengl")
    with pytest.raises(ValueError, match="backend='cpu'"): render_splats(gaussians, cameras, backend="gsplat")
    with pytest.raises(ValueError, match="must broadcast"): render_splats(random_scene(3, batch=(2,)), Cameras.stack([cameras] * 3))
    with pytest.raises(ValueError, match=r"\.to\('cpu'\)"): pick_backend("cpu", torch.device("cuda"))
    monkeypatch.setattr("zerolab.render.splats.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gsplat==1.5.3"): pick_backend("auto", torch.device("cuda"))
    monkeypatch.setattr("zerolab.render.splats.find_spec", lambda name: object())
    monkeypatch.setattr("zerolab.render.splats.version", lambda name: "1.6.0")
    with pytest.raises(ImportError, match="1.6.0, need 1.5.3"): pick_backend("auto", torch.device("cuda"))
    monkeypatch.setattr("zerolab.render.splats.version", lambda name: "1.5.3+pt24cu124")
    assert pick_backend("auto", torch.device("cuda")) == "gsplat"


# gsplat's own PyTorch code. Two of its pieces exist on CUDA alone: the search for the Gaussians of each pixel, and nerfacc's weights.

def pairs_in_range(first_batch, last_batch, light, means2d, conics, opacities, width, height, tile, offsets, flat_ids):
    "Stands in for gsplat's CUDA `rasterize_to_indices_in_range`: (gaussian, pixel, image) of all contributions."
    images, count = math.prod(means2d.shape[:-2]), means2d.shape[-2]
    means2d, conics, opacities = means2d.detach().reshape(-1, 2), conics.detach().reshape(-1, 3), opacities.detach().reshape(-1)
    ends = [*offsets.flatten().tolist(), len(flat_ids)]
    tiles_y, tiles_x = offsets.shape[-2:]
    found = []
    for index in range(images * tiles_y * tiles_x):
        start, end = ends[index] + first_batch * tile ** 2, min(ends[index + 1], ends[index] + last_batch * tile ** 2)
        image, row, column = index // (tiles_y * tiles_x), index // tiles_x % tiles_y * tile, index % tiles_x * tile
        pixels = torch.cartesian_prod(torch.arange(row, min(row + tile, height)), torch.arange(column, min(column + tile, width)))
        ids = flat_ids[start:end].long()
        x, y = (means2d[ids] - (pixels.flip(-1)[:, None] + 0.5)).unbind(-1)
        exponent = 0.5 * (conics[ids, 0] * x * x + conics[ids, 2] * y * y) + conics[ids, 1] * x * y
        alphas = (opacities[ids] * torch.exp(-exponent)).clamp_max(0.999)
        hit = (exponent >= 0) & (alphas >= 1 / 255)
        before = light.reshape(images, height, width)[image, pixels[:, 0], pixels[:, 1]]
        after = before[:, None] * torch.cumprod(torch.where(hit, 1 - alphas, 1), 1)
        pixel, k = torch.nonzero(hit & (after > 1e-4), as_tuple=True)
        found.append(torch.stack([ids[k] % count, (pixels[:, 0] * width + pixels[:, 1])[pixel], torch.full_like(pixel, image)]))
    ids, pixels, image = torch.cat(found, 1)
    order = torch.argsort(image * width * height + pixels, stable=True)
    return ids[order], pixels[order], image[order]


def weights_from_alpha(alphas, ray_indices=None, n_rays=None):
    "Stands in for nerfacc's CUDA `render_weight_from_alpha`: alpha times what is left of the light, ray by ray."
    logs = torch.log1p(-alphas.double())
    before = torch.cumsum(logs, 0) - logs
    first = torch.cat([torch.ones(1, dtype=torch.bool), ray_indices[1:] != ray_indices[:-1]])
    start = torch.cummax(torch.where(first, torch.arange(len(first)), 0), 0).values
    light = torch.exp(before - before[start]).to(alphas.dtype)
    return alphas * light, light


def gsplat_torch(gaussians, cameras):
    "The picture by gsplat's `_torch_impl`: its projection, its tiles, its accumulation."
    from gsplat.cuda import _torch_impl as impl
    height, width = cameras.size
    tensors = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities)
    means, quats, scales, opacities = tensors
    covariances, _ = impl._quat_scale_to_covar_preci(quats, scales, True, False)
    radii, means2d, depths, conics, _ = impl._fully_fused_projection(means, covariances, cameras.w2c, cameras.K, width, height)
    _, ids, flat_ids = impl._isect_tiles(means2d, radii, depths, 16, math.ceil(width / 16), math.ceil(height / 16))
    offsets = impl._isect_offset_encode(ids, len(cameras), math.ceil(width / 16), math.ceil(height / 16))
    colors = torch.cat([sh_colors(gaussians, cameras).expand(len(cameras), -1, -1), depths[..., None]], -1)
    picture, alpha = impl._rasterize_to_pixels(means2d, conics, colors, opacities.expand(len(cameras), -1), width, height, 16, offsets, flat_ids)
    return SplatRender(picture[..., :3], alpha, picture[..., 3:] / alpha.clamp_min(1e-10))


@pytest.fixture
def gsplat_on_cpu(monkeypatch):
    pytest.importorskip("gsplat")
    import gsplat.cuda._wrapper as wrapper
    stub = types.ModuleType("nerfacc")
    stub.render_weight_from_alpha = weights_from_alpha
    def accumulate_along_rays(weights, values=None, ray_indices=None, n_rays=None):
        values = weights[:, None] if values is None else weights[:, None] * values
        return torch.zeros(n_rays, values.shape[-1], dtype=values.dtype).index_add(0, ray_indices, values)
    stub.accumulate_along_rays = accumulate_along_rays
    monkeypatch.setitem(sys.modules, "nerfacc", stub)
    monkeypatch.setattr(wrapper, "rasterize_to_indices_in_range", pairs_in_range)


@pytest.mark.parametrize("dtype,pixel,gradient", [(torch.float64, 1e-9, 1e-7), (torch.float32, 1e-5, 1e-3)])
def test_parity_with_gsplats_own_torch_code(gsplat_on_cpu, dtype, pixel, gradient):
    gaussians, cameras = random_scene(300, dtype=dtype, degree=1), some_cameras(2, (45, 60), dtype)
    expected = values_and_gradients(gsplat_torch, gaussians, cameras)
    actual = values_and_gradients(lambda g, c: render_splats(g, c, backend="cpu"), gaussians, cameras)
    for x, y in zip(actual[:3], expected[:3]): assert torch.quantile((x - y).abs(), 0.998) <= pixel * y.abs().max()
    for x, y in zip(actual[3:], expected[3:]): assert (x - y).norm() <= gradient * y.norm()
