"Median depth, absgrad, the bound on memory, opaque scenes, and gsplat's own spherical harmonics and antialiasing."
import math
import re

import pytest
import torch

from test_render_splats import (NAMES, brute_force, gsplat_on_cpu, leaves, mixed_loss, random_scene, some_cameras,  # noqa: F401 (a fixture)
                                values_and_gradients)
from zerolab.render.projection import Projection, project_gaussians
from zerolab.render.splats import SplatRender, median_depth, render_splats, sh_colors
from zerolab.render.splats_torch import draw_image
from zerolab.scene.cameras import Cameras, orbit
from zerolab.scene.gaussians import Gaussians


@pytest.mark.parametrize("antialiased", [False, True])
def test_median_depth_is_where_the_nearest_gaussians_alone_hide_half(antialiased):
    "The law that defines it: drawn one more at a time from the front, alpha passes one half at the median Gaussian."
    gaussians, cameras = random_scene(40, size=0.5), some_cameras(1)
    z = gaussians.means @ cameras.w2c[0, 2, :3] + cameras.w2c[0, 2, 3]
    order = z.argsort()
    expected = torch.zeros(13, 18, dtype=torch.float64)
    for n in range(40, 0, -1):
        alpha = render_splats(gaussians[order[:n].tolist()], cameras, antialiased=antialiased).alpha[0, ..., 0]
        expected = torch.where(alpha > 0.5, z[order[n - 1]], expected)
    depth = median_depth(gaussians, cameras, antialiased=antialiased)
    assert len(expected.unique()) > 5 and (expected == 0).any()
    torch.testing.assert_close(depth[0, ..., 0], expected)


def test_median_depth_agrees_between_backends_and_has_the_gradient_of_its_gaussians():
    cameras = Cameras.stack([some_cameras(2, (37, 50)), some_cameras(2, (37, 50))[[1, 0]]])
    tensors = leaves(random_scene(200, batch=(2,), size=0.2))
    kernel, plain = (median_depth(Gaussians(*tensors), cameras, backend=backend) for backend in ("cpu", "torch"))
    assert kernel.shape == (2, 2, 37, 50, 1)
    torch.testing.assert_close(kernel, plain)
    gradient, = torch.autograd.grad(kernel.sum(), tensors[0])
    with torch.no_grad():
        z = torch.einsum("bvk,bnk->bvn", cameras.w2c[:, :, 2, :3], tensors[0]) + cameras.w2c[:, :, 2, 3:]
        seen = ((kernel.flatten(2)[..., None] - z[:, :, None]).abs() < 1e-12).sum(2)          # pixels whose median each Gaussian is
        expected = torch.einsum("bvn,bvk->bnk", seen.double(), cameras.w2c[:, :, 2, :3])
    torch.testing.assert_close(gradient, expected)
    empty = median_depth(random_scene(0), some_cameras(1))
    assert empty.shape == (1, 13, 18, 1) and (empty == 0).all()


def test_a_median_gaussian_with_a_nan_is_not_drawn():
    gaussians, cameras = random_scene(30, size=0.3), some_cameras(1)
    expected = median_depth(gaussians[[n for n in range(30) if n != 7]], cameras)
    gaussians.means[7] = math.nan
    for backend in ("cpu", "torch"): torch.testing.assert_close(median_depth(gaussians, cameras, backend=backend), expected)


def test_absgrad_sums_the_absolute_gradients_of_the_pixels():
    "Pixel after pixel, autograd differentiates the readable rasteriser with respect to the centres."
    gaussians, cameras = random_scene(12, size=0.4), some_cameras(1, (10, 17))
    absgrad = torch.zeros(1, 12, 2, dtype=torch.float64)
    render = render_splats(Gaussians(*leaves(gaussians)), cameras, absgrad=absgrad)
    weights = torch.linspace(-1, 1, render.rgb.numel(), dtype=torch.float64).view_as(render.rgb).sin()
    ((render.rgb * weights).sum() + render.alpha.square().sum()).backward()
    splats = project_gaussians(gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, cameras.w2c, cameras.K, cameras.size)
    centres = splats.means2d[0].clone().requires_grad_()
    picture, alpha = draw_image(Projection(centres, *(x[0] for x in splats[1:])), sh_colors(gaussians, cameras)[0], cameras.size)
    pixels = ((picture * weights[0]).sum(-1) + alpha.square()).flatten()
    parts = torch.stack([torch.autograd.grad(pixel, centres, retain_graph=True)[0] for pixel in pixels])
    torch.testing.assert_close(absgrad[0], parts.abs().sum(0), rtol=1e-8, atol=1e-12)
    assert (parts.abs().sum(0) > 1.5 * parts.sum(0).abs()).any()      # the plain gradient is another one


def test_absgrad_adds_up_and_changes_nothing_else():
    cameras = Cameras.stack([some_cameras(2, (37, 50))] * 3).to(dtype=torch.float32)
    tensors = leaves(random_scene(300, batch=(3,), dtype=torch.float32))
    absgrad = torch.zeros(3, 2, 300, 2)
    step = lambda **options: torch.autograd.grad(mixed_loss(render_splats(Gaussians(*tensors), cameras, **options)), tensors)
    plain, once = step(), step(absgrad=absgrad)
    assert all(torch.equal(x, y) for x, y in zip(plain, once)) and (absgrad > 0).any()
    first = absgrad.clone()
    step(absgrad=absgrad)
    torch.testing.assert_close(absgrad, 2 * first)
    with pytest.raises(ValueError, match=r"need torch.zeros\(3, 2, 300, 2\)"): step(absgrad=torch.zeros(3, 300, 2))
    with pytest.raises(ValueError, match="keeps no absgrad"): step(absgrad=absgrad, backend="torch")


@pytest.mark.parametrize("draw", [render_splats, median_depth])
def test_what_would_not_fit_is_refused_before_it_is_allocated(draw):
    "2,000 Gaussians as large as a picture of 4096 x 4096 pixels touch 262 million tiles: 17 GB, of which nothing is allocated."
    gaussians, cameras = random_scene(2000, dtype=torch.float32, size=30.), some_cameras(1, (4096, 4096), torch.float32)
    message = r"1 pictures of 4096 x 4096 pixels with 2,000 Gaussians touch .* max_bytes = 4 GB: draw fewer"
    with pytest.raises(MemoryError, match=message): draw(gaussians, cameras)


def test_the_bound_on_memory_is_what_the_error_says():
    gaussians, cameras = random_scene(500, dtype=torch.float32), some_cameras(2, (64, 64), torch.float32)
    with pytest.raises(MemoryError) as error: render_splats(gaussians, cameras, max_bytes=1e5)
    need = 1e9 * float(re.search(r"needs (\S+) GB", str(error.value))[1])
    with pytest.raises(MemoryError): render_splats(gaussians, cameras, max_bytes=0.99 * need)
    render_splats(gaussians, cameras, max_bytes=1.01 * need)


def test_rows_that_are_full_are_left_out_without_a_trace():
    "Opaque layers, some hundred deep: tiles close row by row, forward and backward."
    gaussians, cameras = random_scene(600, size=0.3), some_cameras(1, (40, 21))
    gaussians = Gaussians(gaussians.means, gaussians.quats, gaussians.scales, 0.5 + gaussians.opacities / 2, gaussians.sh)
    expected = values_and_gradients(brute_force, gaussians, cameras)
    actual = values_and_gradients(lambda g, c: render_splats(g, c, backend="cpu"), gaussians, cameras)
    assert (expected[1] > 0.999).float().mean() > 0.2 and expected[1].min() < 0.9
    for x, y in zip(actual, expected): torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8 * y.abs().max().item())


def gsplat_sh_antialiased(gaussians, cameras):
    "gsplat's `_torch_impl` with its own spherical harmonics and its own compensation for the blur."
    from gsplat.cuda import _torch_impl as impl
    height, width = cameras.size
    covariances, _ = impl._quat_scale_to_covar_preci(gaussians.quats, gaussians.scales, True, False)
    radii, means2d, depths, conics, ratio = impl._fully_fused_projection(gaussians.means, covariances, cameras.w2c, cameras.K, width, height,
                                                                         calc_compensations=True)
    _, ids, flat_ids = impl._isect_tiles(means2d, radii, depths, 16, math.ceil(width / 16), math.ceil(height / 16))
    offsets = impl._isect_offset_encode(ids, len(cameras), math.ceil(width / 16), math.ceil(height / 16))
    directions = gaussians.means - cameras.centers[:, None]
    colors = (impl._spherical_harmonics(gaussians.sh_degree, directions, gaussians.sh.expand(len(cameras), -1, -1, -1)) + 0.5).clamp_min(0)
    picture, alpha = impl._rasterize_to_pixels(means2d, conics, torch.cat([colors, depths[..., None]], -1), gaussians.opacities * ratio,
                                               width, height, 16, offsets, flat_ids)
    return SplatRender(picture[..., :3], alpha, picture[..., 3:] / alpha.clamp_min(1e-10))


@pytest.mark.parametrize("degree", [0, 3])
def test_parity_with_gsplats_harmonics_and_antialiasing(gsplat_on_cpu, degree):      # noqa: F811
    gaussians, cameras = random_scene(200, degree=degree, size=0.05), some_cameras(2, (45, 60))
    expected = values_and_gradients(gsplat_sh_antialiased, gaussians, cameras)
    actual = values_and_gradients(lambda g, c: render_splats(g, c, antialiased=True), gaussians, cameras)
    for x, y in zip(actual[:3], expected[:3]): assert torch.quantile((x - y).abs(), 0.998) <= 1e-6 * y.abs().max()
    for name, x, y in zip((*NAMES, "w2c"), actual[3:], expected[3:]): assert (x - y).norm() <= 1e-5 * y.norm(), name


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_float32_float64_and_views_at_every_degree(degree):
    "A degree adds to the colours alone: alpha and depth stay, and one view at a time gives the same picture."
    gaussians, cameras = random_scene(100, degree=degree), orbit([0., 120, 240], 10., 2.5, size=(21, 30)).to(dtype=torch.float64)
    dull = Gaussians(*(getattr(gaussians, name) for name in NAMES[:4]), gaussians.sh[:, :1])
    render, flat = render_splats(gaussians, cameras), render_splats(dull, cameras)
    assert torch.equal(render.alpha, flat.alpha) and torch.equal(render.depth, flat.depth) and not torch.equal(render.rgb, flat.rgb)
    for view in range(3): assert torch.equal(render_splats(gaussians, cameras[[view]]).rgb[0], render.rgb[view])
    single = render_splats(gaussians.to(dtype=torch.float32), cameras.to(dtype=torch.float32))
    assert single.rgb.dtype == torch.float32 and torch.quantile((single.rgb - render.rgb).abs(), 0.998) < 1e-5


def test_what_gsplat_hangs_on_its_centres_is_collected():
    "gsplat sets `.absgrad` on a saved tensor within the backward pass; the same is done here without CUDA."
    import gc
    import weakref
    from zerolab.render.splats import _collect_absgrad

    class LikeGsplat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, means2d):
            ctx.save_for_backward(means2d)
            return means2d.sum()

        @staticmethod
        def backward(ctx, v):
            means2d, = ctx.saved_tensors
            means2d.absgrad = torch.full_like(means2d, 3.)
            return torch.ones_like(means2d) * v

    leaf, absgrad = torch.rand(2, 3, 5, 2, requires_grad=True), torch.ones(2, 3, 5, 2)
    means2d = leaf * 2
    _collect_absgrad(means2d, absgrad)
    loss, gone = LikeGsplat.apply(means2d), weakref.ref(means2d)
    del means2d
    loss.backward()
    assert (absgrad == 4).all() and (leaf.grad == 2).all()
    del loss
    gc.collect()
    assert gone() is None
