"render_splats on CUDA (gsplat) against the CPU rasteriser: the same picture, the same gradients; and how fast it is."
import pytest
import torch

from zerolab.render.splats import median_depth, render_splats
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians

pytestmark = pytest.mark.gpu
NAMES = ("means", "quats", "scales", "opacities", "sh")


def shell_scene(count, *, batch=(), degree=0, seed=0, footprint=0.01):
    "Gaussians near a sphere, of a size and opacity like a trained reconstruction's."
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*batch, count, *shape, generator=generator)
    means = 0.8 * torch.nn.functional.normalize(normal(3), dim=-1) * (1 + 0.02 * normal(1))
    return Gaussians(means, normal(4), footprint * (0.4 * normal(3)).exp(), (2.5 * normal()).sigmoid(), 0.5 * normal((degree + 1) ** 2, 3))


def outputs_and_gradients(gaussians, cameras, device, **options):
    tensors = [getattr(gaussians, name).detach().clone().to(device).requires_grad_() for name in NAMES]
    render = render_splats(Gaussians(*tensors), cameras.to(device), torch.tensor([0.2, 0.5, 0.9], device=device), **options)
    weights = torch.linspace(-1, 1, render.rgb.numel()).view(render.rgb.shape).to(device)
    gradients = torch.autograd.grad((render.rgb * weights).sum() + render.alpha.square().sum() + render.depth.mean(), tensors)
    return [x.detach().cpu() for x in (*render, *gradients)]


def parity(*, batch=(), degree=0, antialiased=False, size=(72, 100), count=4096):
    "How far CUDA is from the CPU: one dictionary of numbers."
    gaussians, cameras = shell_scene(count, batch=batch, degree=degree), orbit([20., 140], 25., size=size)
    cpu, cuda = (outputs_and_gradients(gaussians, cameras, device, antialiased=antialiased) for device in ("cpu", "cuda"))
    difference = (cpu[0] - cuda[0]).abs().amax(-1)
    numbers = {"pixel_median": difference.median().item(), "pixel_max": difference.max().item(),
               "pixels_beyond_1e-4": (difference > 1e-4).float().mean().item()}
    for name, x, y in zip(NAMES, cpu[3:], cuda[3:]):
        numbers[f"{name}_relative"] = ((x - y).norm() / y.norm()).item()
        numbers[f"{name}_cosine"] = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0).item()
    return numbers


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("degree", [0, 2])
def test_cuda_draws_what_the_cpu_draws(antialiased, batch, degree):
    numbers = parity(batch=batch, degree=degree, antialiased=antialiased)
    # single pixels may flip at the 1/255 and 1e-4 cuts, so quantiles and norms are compared and not maxima
    assert numbers["pixel_median"] < 1e-6 and numbers["pixels_beyond_1e-4"] < 2e-3, numbers
    assert all(numbers[f"{name}_relative"] < 5e-3 and numbers[f"{name}_cosine"] > 0.9999 for name in NAMES), numbers


def test_half_precision_and_float64_are_drawn_in_float32():
    gaussians, cameras = shell_scene(256).to("cuda"), orbit([0.], size=(32, 32)).to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16): inside = render_splats(gaussians, cameras).rgb
    assert inside.dtype == torch.float32 and torch.equal(inside, render_splats(gaussians, cameras).rgb)
    assert render_splats(gaussians.to(dtype=torch.float64), cameras).rgb.dtype == torch.float32


def test_a_nan_is_not_drawn():
    gaussians, cameras = shell_scene(256), orbit([0.], size=(32, 32))
    gaussians.means[3] = float("nan")
    results = outputs_and_gradients(gaussians, cameras, "cuda")
    assert all(x.isfinite().all() for x in results) and (results[3][3] == 0).all()


@pytest.mark.parametrize("batch", [(), (2,)])
def test_absgrad_and_median_depth_agree_with_the_cpu(batch):
    gaussians, cameras = shell_scene(4096, batch=batch), orbit([20., 140], 25., size=(72, 100))
    found, medians = [], []
    for device in ("cpu", "cuda"):
        absgrad = torch.zeros(*batch, 2, 4096, 2, device=device)
        tensors = [getattr(gaussians, name).to(device).requires_grad_() for name in NAMES]
        render_splats(Gaussians(*tensors), cameras.to(device), absgrad=absgrad).rgb.square().sum().backward()
        found.append(absgrad.cpu())
        medians.append(median_depth(Gaussians(*tensors), cameras.to(device)).detach().cpu())
    assert (found[0] - found[1]).norm() < 5e-3 * found[0].norm()
    assert ((medians[0] - medians[1]).abs() > 1e-4).float().mean() < 2e-3


def milliseconds(step, repeats=20):
    "Median time of a step on the GPU."
    for _ in range(3): step()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(); step(); end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def throughput(scenes, views, count, size):
    "Time and memory of a full step (forward and backward), and its ratio to a matrix product that reads as many numbers."
    gaussians = shell_scene(count, batch=(scenes,), footprint=1.3 * 2.5 / size).to("cuda")
    cameras = orbit(torch.arange(views) * 360. / views, size=(size, size)).to("cuda")
    tensors = [getattr(gaussians, name).requires_grad_() for name in NAMES]
    def step(): torch.autograd.grad(render_splats(Gaussians(*tensors), cameras, torch.ones(3, device="cuda")).rgb.square().mean(), tensors)
    torch.cuda.reset_peak_memory_stats()
    step_ms = milliseconds(step)
    matrix = torch.randn(4096, 4096, device="cuda")
    matmul_ms = milliseconds(lambda: matrix @ matrix)
    return {"scenes": scenes, "views": views, "gaussians": count, "size": size, "step_ms": step_ms, "matmul_4096_ms": matmul_ms,
            "ratio_to_matmul": step_ms / matmul_ms, "peak_MB": torch.cuda.max_memory_allocated() / 2 ** 20,
            "million_splats_per_second": scenes * views * count / step_ms / 1e3}


def test_throughput_is_far_above_the_cpu():
    numbers = throughput(1, 4, 65536, 128)
    assert numbers["step_ms"] < 60, numbers
