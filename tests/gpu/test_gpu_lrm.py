"Training the SMALL model on CUDA: how fast, how much memory, and whether half precision learns the same."
import time
from dataclasses import replace

import pytest
import torch

from zerolab.lrm.model import GSLRM, SMALL
from zerolab.lrm.train import Reconstruction, reconstruction_step
from zerolab.scene.cameras import Cameras, orbit
from zerolab.train.loop import TrainConfig, TrainState, train_step

pytestmark = pytest.mark.gpu


def striped_balls(objects, size, views=8):
    "A batch as the loader gives it, of striped balls of several sizes: nothing is read, nothing is random."
    cameras = Cameras.stack([orbit(torch.arange(views)*360./views + 7*b, 20 + 5*b % 40, size=(size, size)) for b in range(objects)])
    origins, directions = cameras.rays()
    middle = -(origins*directions).sum(-1)
    radius = torch.linspace(0.5, 0.8, objects)[:, None, None, None]
    half = radius**2 - origins.square().sum(-1) + middle.square()
    point = origins + (middle - half.clamp_min(0).sqrt())[..., None]*directions
    rgb = 0.5 + 0.5*torch.sin(point*torch.tensor([9., 14., 21.]))
    rgba = torch.cat([rgb, torch.ones_like(rgb[..., :1])], -1)*(half > 0)[..., None]
    return dict(rgba=(255*rgba).to(torch.uint8), cameras=cameras)


class Repeat:
    "The same batch for ever."
    def __init__(self, batch): self.batch = batch
    def __iter__(self): return self
    def __next__(self): return self.batch


def step_of(task): return lambda model, batch, step: reconstruction_step(model, batch, step, task)


def moved(batch, device): return {name: value.to(device) for name, value in batch.items()}


def training_throughput(size, objects, precision, *, config=SMALL, steps=30, device="cuda"):
    "Steps of the real loop on one batch that is on the device already: time, memory, and that the loss falls."
    batch, task = moved(striped_balls(objects, size), device), Reconstruction(size=size)
    torch.manual_seed(0)
    state = TrainState(GSLRM(config).to(device), Repeat(batch), TrainConfig(steps=1000, warmup=10, precision=precision))
    losses, times = [], []
    for step in range(steps):
        if step == 5 and device == "cuda": torch.cuda.reset_peak_memory_stats()       # the optimiser's state is there by then
        state.sums, start = {}, time.perf_counter()
        train_step(state, step_of(task))                                              # ends by reading the loss, which waits for the device
        times.append(time.perf_counter() - start)
        losses.append(state.sums["loss"][0] if "loss" in state.sums else None)
    seconds = sorted(times[5:])[len(times[5:])//2]
    kept = [loss for loss in losses if loss is not None]
    return {"size": size, "objects": objects, "precision": precision, "recomputed": config.checkpoint_blocks, "step_ms": 1e3*seconds,
            "objects_per_second": objects/seconds, "peak_MB": torch.cuda.max_memory_allocated()/2**20 if device == "cuda" else None,
            "first_loss": kept[0], "last_loss": kept[-1], "skipped": state.skipped}


def precision_agreement(size, objects=2, *, config=SMALL, device="cuda"):
    "Loss and gradient of one step in bfloat16 against float32, and the drawing of one model on CUDA against the CPU."
    batch, task = moved(striped_balls(objects, size), device), Reconstruction(size=size)
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        model = GSLRM(config).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=half): loss, _ = reconstruction_step(model, batch, 0, task)
        loss.backward()
        found.append((loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    (whole, gradient), (half, rounded) = found
    return {"size": size, "loss_float32": whole, "loss_bfloat16": half, "loss_relative": abs(half - whole)/whole,
            "gradient_cosine": torch.nn.functional.cosine_similarity(gradient, rounded, 0).item(),
            "gradient_relative": ((gradient - rounded).norm()/gradient.norm()).item()}


def cpu_agreement(size, *, config=SMALL):
    "Loss and gradient of one step in float32 on CUDA with gsplat against the CPU with the numba rasteriser."
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = GSLRM(config).to(device)
        loss, _ = reconstruction_step(model, moved(striped_balls(1, size), device), 0, Reconstruction(size=size))
        loss.backward()
        found.append((loss.item(), torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])))
    (cpu, expected), (cuda, gradient) = found
    return {"size": size, "loss_cpu": cpu, "loss_cuda": cuda, "loss_relative": abs(cuda - cpu)/cpu,
            "gradient_cosine": torch.nn.functional.cosine_similarity(expected, gradient, 0).item()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls_and_no_step_is_skipped(precision):
    numbers = training_throughput(64, 4, precision)
    assert numbers["skipped"] == 0 and numbers["last_loss"] < 0.8*numbers["first_loss"], numbers


def test_bfloat16_learns_what_float32_learns():
    numbers = precision_agreement(64)
    assert numbers["loss_relative"] < 0.01 and numbers["gradient_cosine"] > 0.97, numbers


def test_a_step_on_cuda_is_a_step_on_the_cpu():
    numbers = cpu_agreement(64)
    assert numbers["loss_relative"] < 1e-3 and numbers["gradient_cosine"] > 0.999, numbers


def test_recomputing_blocks_saves_memory():
    plain, recomputed = (training_throughput(128, 2, "bfloat16", config=replace(SMALL, checkpoint_blocks=value), steps=10) for value in (False, True))
    assert recomputed["peak_MB"] < plain["peak_MB"] and abs(recomputed["last_loss"] - plain["last_loss"]) < 0.05*plain["last_loss"], (plain, recomputed)
