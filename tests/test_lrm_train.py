"""What a training step reads and compares; and the first test of any model: one object by heart."""
import numpy as np
import pytest
import torch

from zerolab.lrm import train as room
from zerolab.lrm.evaluate import predict_lrm
from zerolab.lrm.losses import psnr
from zerolab.lrm.model import GSLRM, TINY, GSLRMConfig
from zerolab.lrm.train import Reconstruction, choose_views, mute_colours, reconstruction_step, train_lrm, training_views
from zerolab.render.mesh import render_views
from zerolab.scene.cameras import Cameras, gso_inputs
from zerolab.scene.gaussians import Gaussians
from zerolab.scene.views import Views, composite
from zerolab.shapes.zeroverse import HEIGHT_FIELD, make_shape
from zerolab.train.loop import TrainConfig


# ---- which views, and what is made of them


@pytest.mark.parametrize("ring_share", [0., 0.6, 1.])
def test_inputs_and_targets_never_meet(ring_share):
    rng = np.random.default_rng(0)
    drawn = [choose_views(rng, 12, 8, ring_share=ring_share) for _ in range(2000)]
    assert all(len(set(views)) == 8 and 0 <= min(views) and max(views) < 12 for views in drawn)
    led = [sorted(views[:4]) == [0, 1, 2, 3] for views in drawn]
    assert np.mean(led) == pytest.approx(ring_share + (1 - ring_share)/495, abs=0.04)  # 495 ways to choose 4 of 12
    seen = np.bincount(np.concatenate([views[4:] for views in drawn]), minlength=12)
    if ring_share == 1: assert (seen[:4] == 0).all() and (seen[4:] > 800).all()
    else: assert (seen > 100).all(), "every view is a target at times"


def test_too_few_views_for_a_ring_are_taken_as_they_come():
    assert sorted(choose_views(np.random.default_rng(0), 3, 3, ring_share=1.)) == [0, 1, 2]


def test_training_views_begin_with_a_ring():
    for seed in range(20):
        cameras = training_views(np.random.default_rng(seed), (16, 16))
        distance = cameras.centers.norm(dim=-1)
        assert len(cameras) == 12 and 2 - 1e-5 <= distance.min() and distance.max() <= 3 + 1e-5
        torch.testing.assert_close(distance[:4], distance[:1].expand(4))
        height = torch.asin(cameras.centers[:4, 2]/distance[:4]).rad2deg()
        assert 0 <= height.min() and height.max() <= 40 and height.max() - height.min() < 1e-3
        azimuth = torch.atan2(cameras.centers[:4, 1], cameras.centers[:4, 0]).rad2deg()
        torch.testing.assert_close((azimuth.diff() % 360), torch.full((3,), 90.), atol=1e-3, rtol=0)


class Spy(torch.nn.Module):
    "Notes what it is given and predicts a few Gaussians."
    def __init__(self, silhouettes):
        super().__init__()
        self.config, self.seen = GSLRMConfig(centred_depth=True, silhouettes=silhouettes), []
        self.means = torch.nn.Parameter(torch.zeros(5, 3))

    def forward(self, images, cameras):
        self.seen.append((images, cameras))
        n = len(images)
        return Gaussians(self.means.expand(n, 5, 3), torch.ones(n, 5, 4), torch.full((n, 5, 3), 0.2), torch.full((n, 5), 0.9), torch.zeros(n, 5, 1, 3))


def noisy_batch(views=8, size=16):
    rgba = torch.randint(0, 256, (2, views, size, size, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return dict(rgba=rgba, cameras=Cameras.stack([gso_inputs(8, size=(size, size))[:views]]*2))


@pytest.mark.parametrize("silhouettes", [False, True])
def test_a_step_shows_the_first_views_and_compares_the_last(silhouettes, monkeypatch):
    model, batch, compared = Spy(silhouettes), noisy_batch(), []
    plain = room.reconstruction_loss
    def loss(rgb, alpha, target_rgb, target_alpha, **weights):
        compared.append((target_rgb, target_alpha, weights))
        return plain(rgb, alpha, target_rgb, target_alpha, **weights)
    monkeypatch.setattr(room, "reconstruction_loss", loss)
    task = Reconstruction(size=16, inputs=(4, 2), targets=3, alpha_weight=0.25)
    rgb, alpha = composite(batch["rgba"])
    for step, count in ((0, 4), (1, 2), (4, 4)):
        value, parts = reconstruction_step(model, batch, step, task)
        images, cameras = model.seen[-1]
        assert torch.equal(images[..., :3], rgb[:, :count]) and images.shape[-1] == 3 + silhouettes
        assert torch.equal(cameras.w2c, batch["cameras"].w2c[:, :count]) and (not silhouettes or torch.equal(images[..., 3:], alpha[:, :count]))
        target_rgb, target_alpha, weights = compared[-1]
        assert torch.equal(target_rgb, rgb[:, 5:]) and torch.equal(target_alpha, alpha[:, 5:]) and weights["alpha_weight"] == 0.25
        torch.testing.assert_close(value.detach(), parts["mse"] + 0.25*parts["alpha_mse"])
        assert float(parts["psnr"]) == pytest.approx(-10*np.log10(float(parts["mse"])), abs=1)
    value.backward()
    assert model.means.grad.abs().max() > 0


def test_stored_views_are_reduced_to_the_tasks_size():
    model, batch = Spy(False), noisy_batch(size=32)
    reconstruction_step(model, batch, 0, Reconstruction(size=16))
    images, cameras = model.seen[0]
    assert images.shape == (2, 4, 16, 16, 3) and cameras.size == (16, 16)
    torch.testing.assert_close(cameras.K[0, 0, 0, 0], batch["cameras"].K[0, 0, 0, 0]/2)


def test_inputs_can_be_targets_too(monkeypatch):
    model, batch, compared = Spy(True), noisy_batch(), []
    plain = room.reconstruction_loss
    monkeypatch.setattr(room, "reconstruction_loss", lambda *pictures, **weights: compared.append(pictures) or plain(*pictures, **weights))
    _, parts = reconstruction_step(model, batch, 0, Reconstruction(size=16, targets=3, inputs_shown=2))
    rgb, _ = composite(batch["rgba"])
    assert torch.equal(compared[0][2], rgb[:, [0, 1, 5, 6, 7]])
    assert float(parts["psnr"]) == pytest.approx(psnr(compared[0][0].detach()[:, 2:], rgb[:, 5:]).mean().item()), "of the held-out targets alone"


def test_muted_colours():
    "One factor for the contrast and one for the saturation of an object, in all of its views; opacity and emptiness stay."
    rgba = noisy_batch()["rgba"]
    rgba[..., 3] = torch.where(rgba[..., 3] > 128, 255, 0); rgba[rgba[..., 3] == 0] = 0
    solid = rgba[..., 3] > 0
    assert torch.equal(mute_colours(rgba, 0., np.random.default_rng(0)), rgba)
    muted = mute_colours(rgba, 1., np.random.default_rng(0))
    assert torch.equal(muted[..., 3], rgba[..., 3]) and (muted[~solid] == 0).all()
    for before, after, mask in zip(rgba.float(), muted.float(), solid):
        before, after = before[mask][:, :3], after[mask][:, :3]
        grey = lambda x: x.mean(-1, keepdim=True)
        contrast = (grey(after) - grey(after).mean()).norm()/(grey(before) - grey(before).mean()).norm()
        saturation = (after - grey(after)).norm()/(before - grey(before)).norm()
        assert 0 < saturation < contrast < 1, "muted, and saturation twice"
        torch.testing.assert_close(grey(after), grey(before).mean() + contrast*(grey(before) - grey(before).mean()), atol=1, rtol=0)
    again = mute_colours(rgba[:, :1], 1., np.random.default_rng(0))
    assert again.shape == (2, 1, 16, 16, 4)


def test_too_few_views_are_named(tmp_path):
    blank = Views(torch.zeros(4, 16, 16, 4, dtype=torch.uint8), gso_inputs(4, size=(16, 16)))
    with pytest.raises(ValueError, match="reads 8 views of an object, the data set has 4"):
        train_lrm(Spy(False), [blank], tmp_path, Reconstruction(size=16), TrainConfig(steps=2, warmup=1))
    assert not list(tmp_path.iterdir())


# ---- one object by heart


def learn_one_object(seed, size, steps, out, learning_rate):
    "TINY on one object, four fixed inputs and eight fixed targets: mean PSNR of the targets before and after, dB."
    views = render_views(make_shape(seed, HEIGHT_FIELD).mesh, training_views(np.random.default_rng(seed), (size, size)))
    score = lambda: psnr(predict_lrm(views[:4], views[4:].cameras, model=model).rgb, views[4:].composite()).mean().item()
    torch.manual_seed(0)
    model = GSLRM(TINY)
    before = score()
    # the ring is always the input, so that the object is one fixed task
    task = Reconstruction(size=size, inputs=(4,), targets=8, ring_share=1., alpha_weight=0.5)
    config = TrainConfig(steps=steps, learning_rate=learning_rate, warmup=steps//10, ema_decay=0.95, log_every=10, save_every=steps)
    history = train_lrm(model, [views], out, task, config, batch_size=1, progress=False)
    assert history.finished and history.skipped == 0
    return before, score()


def test_one_object_in_80_steps(tmp_path):
    "A cone with a weave as fine as the pixels. Measured: 18.3 dB before, 26.2 after."
    before, after = learn_one_object(1, size=32, steps=80, out=tmp_path, learning_rate=1e-3)
    assert after > 25 and after > before + 6, f"{before:.2f} -> {after:.2f} dB"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_object_in_500_steps(tmp_path, seed):
    "27 dB at 64 px, where a white page scores 10 to 16. The second has the hardest texture."
    before, after = learn_one_object(seed, size=64, steps=500, out=tmp_path, learning_rate=1e-3)
    assert after > 27, f"{before:.2f} -> {after:.2f} dB"
