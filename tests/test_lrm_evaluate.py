"""Metrics against their definitions and scikit-image, baselines against scenes with a known answer, and a benchmark that must not move."""
import hashlib
import math
from functools import partial

import numpy as np
import pytest
import torch

from zerolab.lrm import evaluate as room
from zerolab.lrm.evaluate import (BASELINES, REFERENCES, TEST_SEED, Item, Prediction, best_baseline, comparison_pictures, evaluate, hull_points, make_item,
                                  mean_scores, nearest_inputs, paint_mean, paint_nearest, paint_visible, predict_hull, predict_lrm,
                                  predict_nearest, predict_white, reconstruct, score, score_table, zeroverse_items)
from zerolab.lrm.losses import gaussian_window, load_perceptual, mask_iou, psnr, reconstruction_loss, ssim
from zerolab.lrm.model import GSLRM, GSLRMConfig
from zerolab.scene.cameras import Cameras, gso_inputs, orbit
from zerolab.scene.views import Views

METRICS = {"psnr": psnr, "ssim": ssim}


def noise(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- metrics


@pytest.mark.parametrize("difference", [0.5, 0.1, 0.01, 1/255])
def test_psnr_of_a_constant_difference(difference):
    truth = 0.4*noise(5, 16, 16, 3).double()
    assert psnr(truth + difference, truth).tolist() == pytest.approx([-20*math.log10(difference)]*5, abs=1e-6)
    assert psnr(truth, truth).tolist() == [math.inf]*5


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_of_a_batch_are_those_of_its_pictures(metric):
    a, b = noise(2, 3, 17, 23, 3), noise(2, 3, 17, 23, 3, seed=1)
    together = metric(a, b)
    assert together.shape == (2, 3)
    torch.testing.assert_close(together, torch.stack([torch.stack([metric(a[i, j], b[i, j]) for j in range(3)]) for i in range(2)]))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_are_symmetric_clip_the_prediction_and_fall_with_noise(metric):
    a, b = noise(4, 32, 32, 3), noise(4, 32, 32, 3, seed=1)
    torch.testing.assert_close(metric(a, b), metric(b, a))
    torch.testing.assert_close(metric(a*3 - 1, b), metric((a*3 - 1).clamp(0, 1), b))
    falling = [metric((a + level*(b - 0.5)).clamp(0, 1), a).mean().item() for level in (0.05, 0.1, 0.2, 0.4)]
    assert falling == sorted(falling, reverse=True)


def test_ssim_is_scikit_images():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    rng = np.random.default_rng(0)
    for shape in ((11, 11, 3), (24, 37, 3), (64, 64, 1)):
        truth = rng.random(shape).cumsum(0).cumsum(1) % 1
        for prediction in (truth, 1 - truth, np.clip(truth + 0.1*rng.normal(size=shape), 0, 1), rng.random(shape)):
            expected = structural_similarity(prediction, truth, win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                             data_range=1, channel_axis=-1)
            assert ssim(torch.from_numpy(prediction), torch.from_numpy(truth)).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_bounds_and_gradient():
    a = noise(2, 16, 16, 3).double().requires_grad_()
    assert ssim(a, a).tolist() == pytest.approx([1., 1.]) and (ssim(a, 1 - a.detach()) < 0.2).all()
    torch.testing.assert_close(gaussian_window().sum(), torch.tensor(1.))
    small = (0.1 + 0.8*noise(11, 11, 1, seed=2).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, 0.5*a[0, :11, :11, :1].detach()), small)


def test_iou_laws():
    a, b = (noise(3, 20, 20, seed=seed) for seed in (0, 1))
    iou = mask_iou(a, b)
    assert torch.equal(iou, mask_iou(b, a)) and ((0 < iou) & (iou < 1)).all() and mask_iou(a, a).tolist() == [1]*3
    assert torch.equal(iou[1], mask_iou(a[1], b[1]))
    half = torch.zeros(20, 20); half[:10] = 1
    assert mask_iou(half, torch.ones(20, 20)) == 0.5 and mask_iou(half, 1 - half) == 0 and mask_iou(half, half*0) == 0
    assert mask_iou(half*0, half*0) == 1
    assert mask_iou(a, b, threshold=0.9) == pytest.approx([(((x > 0.9) & (y > 0.9)).sum()/((x > 0.9) | (y > 0.9)).sum()).item() for x, y in zip(a, b)])


@pytest.mark.parametrize("call, said", [
    (lambda: psnr(noise(8, 8, 3), noise(1, 8, 8, 3)), r"psnr: shapes \(8, 8, 3\) and \(1, 8, 8, 3\)"), (lambda: psnr(noise(8, 8), noise(8, 8)), "psnr"),
    (lambda: ssim(noise(10, 30, 3), noise(10, 30, 3)), r"\(10, 30\) px.*11 x 11"), (lambda: mask_iou(noise(8, 8), noise(8, 9)), "mask_iou")])
def test_pictures_that_do_not_match_are_refused(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_the_loss_is_the_sum_of_its_parts():
    rgb, alpha, other, mask = noise(2, 3, 8, 8, 3), noise(2, 3, 8, 8, 1, seed=1), noise(2, 3, 8, 8, 3, seed=2), noise(2, 3, 8, 8, 1, seed=3)
    seen = []
    def perceptual(a, b): seen.append((a.shape, b.shape)); return (a - b).abs().mean()
    loss, parts = reconstruction_loss(rgb, alpha, other, mask, alpha_weight=0.5, perceptual_weight=0.2, perceptual=perceptual)
    expected = ((rgb - other)**2).mean() + 0.5*((alpha - mask)**2).mean() + 0.2*(rgb - other).abs().mean()
    torch.testing.assert_close(loss, expected)
    assert set(parts) == {"mse", "alpha_mse", "perceptual"} and seen == [((6, 8, 8, 3), (6, 8, 8, 3))]
    assert reconstruction_loss(rgb, alpha, other, mask)[1].keys() == {"mse"}
    for call in (lambda: reconstruction_loss(rgb, alpha, other, mask, perceptual_weight=0.2), lambda: load_perceptual(None)):
        with pytest.raises(ValueError, match="VGG-19"): call()


# ---- the benchmark stands still


@pytest.fixture
def unrendered(monkeypatch):
    "Items in no time: `make_item` gets blank pictures from the cameras that it asks for."
    monkeypatch.setattr(room, "render_views", lambda mesh, cameras, **ignored: Views(torch.zeros(len(cameras), *cameras.size, 4, dtype=torch.uint8), cameras))


def fingerprint(cameras):
    "A hash of poses and intrinsics to two digits; no number may be so near a rounding edge that another machine rounds it differently."
    numbers = torch.cat([cameras.w2c.double().flatten(), cameras.K.double().flatten()/cameras.width])*100
    assert (numbers - numbers.floor() - 0.5).abs().min() > 1e-4
    return hashlib.sha256(numbers.round().to(torch.int32).numpy().astype("<i4").tobytes()).hexdigest()[:16]


def test_target_cameras_are_frozen(unrendered):
    """Scores are comparable only as long as these cameras are the same. If this fails on purpose, published results must be made again."""
    items = [make_item("x", None, place) for place in range(16)]
    assert fingerprint(Cameras.cat([item.targets.cameras for item in items])) == "16ba50141e8e3f99"
    assert fingerprint(items[0].inputs[4].cameras) == "9d2fe5441d9a64d9" and fingerprint(items[0].inputs[8].cameras) == "6ca44ad1f88e7f12"
    first = items[0].targets.cameras.centers[0]
    assert first.tolist() == pytest.approx([1.776015, -1.911247, -0.694915], abs=1e-5)


def test_targets_depend_on_the_place_alone(unrendered):
    plain, other = make_item("a", None, 3), make_item("b", None, 3, size=32, counts=(8,))
    assert torch.equal(plain.targets.cameras.w2c, other.targets.cameras.w2c) and set(other.inputs) == {8}
    assert not torch.equal(plain.targets.cameras.w2c, make_item("a", None, 4).targets.cameras.w2c)
    assert torch.equal(make_item("a", None, 3, targets=4).targets.cameras.w2c, plain.targets.cameras.w2c[:4]), "fewer targets are the first ones"
    torch.testing.assert_close(plain.targets.cameras.centers.norm(dim=-1), torch.full((10,), 2.7))
    assert {n: len(views) for n, views in plain.inputs.items()} == {4: 4, 8: 8}
    assert torch.equal(plain.inputs[8].cameras.w2c, gso_inputs(8).w2c)


def test_test_seeds_stay_where_they_are(unrendered, monkeypatch):
    asked = []
    monkeypatch.setattr(room, "make_shape", lambda seed, recipe: asked.append(seed) or type("Shape", (), {"mesh": None}))
    assert TEST_SEED == 1_000_000 and [item.name for item in zeroverse_items(3)] == [f"zeroverse {1_000_000 + i}" for i in range(3)]
    assert asked == [1_000_000, 1_000_001, 1_000_002]


# ---- a scene with a known answer: a ball, red on one side and blue on the other


SIZE = (40, 40)
METHODS = {**BASELINES, **REFERENCES}


def two_coloured_ball(cameras, radius=0.6):
    origins, directions = (x.double() for x in cameras.rays())
    middle = -(origins*directions).sum(-1)
    half = radius**2 - origins.square().sum(-1) + middle.square()
    point = origins + (middle - half.clamp_min(0).sqrt())[..., None]*directions
    rgba = torch.zeros(*half.shape, 4)
    rgba[..., 0], rgba[..., 2], rgba[..., 3] = (point[..., 0] > 0)*1., (point[..., 0] <= 0)*1., 1.
    return Views((rgba*(half > 0)[..., None]*255).to(torch.uint8), cameras)


@pytest.fixture(scope="module")
def ball():
    targets = Cameras.cat([orbit([10., 100, 200, 300], 35., size=SIZE), orbit([45., 225], -10., size=SIZE)])
    return Item("ball", {n: two_coloured_ball(gso_inputs(n, size=SIZE)) for n in (4, 8)}, two_coloured_ball(targets))


def test_white_page_is_perfect_only_for_nothing(ball):
    empty = Views(torch.zeros(2, 16, 16, 4, dtype=torch.uint8), gso_inputs(4, size=(16, 16))[:2])
    assert score(predict_white(empty, empty.cameras), empty) == dict(psnr=math.inf, ssim=1, iou=1)
    assert score(predict_white(ball.inputs[4], ball.targets.cameras), ball.targets)["iou"] == 0


def test_nearest_view_is_the_one_at_the_smallest_angle(ball):
    inputs, targets = ball.inputs[8].cameras, ball.targets.cameras
    for row, target in zip(nearest_inputs(inputs, targets), targets.centers):
        angles = [math.acos(float(torch.cosine_similarity(target, centre, 0).clamp(-1, 1))) for centre in inputs.centers]
        assert [angles[i] for i in row] == pytest.approx(sorted(angles), abs=1e-3)
    again = predict_nearest(ball.inputs[8], inputs)
    assert torch.equal(again.rgb, ball.inputs[8].composite()) and torch.equal(again.alpha, ball.inputs[8].alpha)


@pytest.mark.parametrize("count", [4, 8])
def test_the_hull_covers_the_ball_and_little_more(ball, count):
    alpha = predict_hull(ball.inputs[count], ball.targets.cameras, paint=paint_mean).alpha
    truth = ball.targets.alpha > 0.5
    inner = torch.nn.functional.max_pool2d(-truth[:, None].float(), 3, 1, 1)[:, 0] < -0.5  # without its outermost pixels
    assert (alpha[inner] > 0.9).float().mean() > 0.995
    assert mask_iou(alpha, ball.targets.alpha).mean() > {4: 0.75, 8: 0.88}[count]
    distance = hull_points(ball.inputs[count], ball.targets.cameras)[0][truth].norm(dim=-1)
    assert 0.55 < distance.quantile(0.01) and distance.median() < {4: 0.76, 8: 0.7}[count]


def test_the_coloured_hull_takes_colours_from_views_that_see_the_point(ball):
    prediction = predict_hull(ball.inputs[8], ball.targets.cameras, paint=paint_visible)
    inside = (ball.targets.alpha > 0.5) & (prediction.alpha > 0.99)
    right = (prediction.rgb - ball.targets.composite()).abs().amax(-1) < 0.1
    assert right[inside].float().mean() > 0.93
    plain = predict_hull(ball.inputs[8], ball.targets.cameras, paint=paint_mean)
    torch.testing.assert_close(plain.rgb[inside], paint_mean(ball.inputs[8], ball.targets.cameras, plain.rgb)[inside], atol=1e-5, rtol=0)
    assert torch.equal(plain.alpha, prediction.alpha)
    better = [score(METHODS[name](ball.inputs[8], ball.targets.cameras), ball.targets)["psnr"] for name in
              ("white page", "hull, mean colour", "hull, visible view")]
    assert better == sorted(better)


def test_the_mean_colour_is_of_the_object_alone(ball):
    mean = lambda views: paint_mean(views, views.cameras, torch.zeros(1, 1, 1, 3)).flatten()
    assert mean(ball.inputs[4])[1] == 0 and mean(ball.inputs[4]).sum() == pytest.approx(1, abs=1e-4)
    assert mean(Views(torch.zeros(4, 16, 16, 4, dtype=torch.uint8), gso_inputs(4, size=(16, 16)))).tolist() == [0, 0, 0]


def test_paint_from_the_nearest_view_is_its_pixel(ball):
    "Points on the input's own rays get the input's own pixels."
    inputs = ball.inputs[4]
    points, hit = hull_points(inputs, inputs.cameras)
    right = (paint_nearest(inputs, inputs.cameras, points) == inputs.rgba[..., :3]/255.).all(-1)
    assert right[hit].float().mean() > 0.99


@pytest.mark.parametrize("name", METHODS)
def test_baselines_are_deterministic_pictures(ball, name):
    a, b = (METHODS[name](ball.inputs[4], ball.targets.cameras) for _ in range(2))
    assert torch.equal(a.rgb, b.rgb) and torch.equal(a.alpha, b.alpha)
    assert a.rgb.shape == (6, *SIZE, 3) and a.alpha.shape == (6, *SIZE)
    assert all(x.isfinite().all() and x.min() >= 0 and x.max() <= 1 + 1e-6 for x in a)
    empty = Views(torch.zeros(4, *SIZE, 4, dtype=torch.uint8), ball.inputs[4].cameras)
    assert (METHODS[name](empty, ball.targets.cameras).rgb == 1).all(), "of nothing, nothing"


# ---- the model as a method, and the tables


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GSLRM(GSLRMConfig(width=48, depth=1, heads=2, centred_depth=True, silhouettes=True, colour_residual=True)).eval()


def test_the_model_is_a_method(ball, model):
    a, b = (predict_lrm(ball.inputs[8], ball.targets.cameras, model=model) for _ in range(2))
    assert torch.equal(a.rgb, b.rgb) and a.rgb.shape == (6, *SIZE, 3) and a.alpha.shape == (6, *SIZE) and not a.rgb.requires_grad
    assert a.rgb.min() >= 0 and a.rgb.max() <= 1
    for count in (1, 3): assert len(reconstruct(model, ball.inputs[8][:count])) == count*SIZE[0]*SIZE[1]


def test_scores_are_means_over_views_and_rows_name_what_they_are(ball, model):
    methods = {**METHODS, "model": partial(predict_lrm, model=model)}
    rows = evaluate([ball, ball._replace(name="again")], methods, 8)
    assert [(row["object"], row["method"], row["inputs"]) for row in rows] == [(name, method, 8) for name in ("ball", "again") for method in methods]
    views = [score(Prediction(*(x[i:i + 1] for x in predict_nearest(ball.inputs[8], ball.targets.cameras))), ball.targets[i]) for i in range(6)]
    for metric in ("psnr", "ssim", "iou"): assert rows[1][metric] == pytest.approx(np.mean([view[metric] for view in views]), rel=1e-5)
    assert evaluate([ball], methods, 8) == rows[:len(methods)]


def test_best_baseline_and_tables():
    rows = [dict(object=name, method=method, psnr=value, ssim=value/40, iou=0.5) for name, method, value in
            [("cup", "white page", 10.), ("cup", "hull, mean colour", 21.), ("cup", "nearest view", 22.), ("cup", "model", 30.),
             ("shoe", "white page", 12.), ("shoe", "hull, mean colour", 19.), ("shoe", "nearest view", 17.), ("shoe", "model", 31.)]]
    assert mean_scores(rows) == {"white page": 11, "hull, mean colour": 20, "nearest view": 19.5, "model": 30.5}
    assert best_baseline(rows) == ("hull, mean colour", 20), "by the mean, not by the best object; the model is none"
    with pytest.raises(ValueError, match="no baseline"): best_baseline([row for row in rows if row["method"] == "model"])
    lines = score_table(rows).splitlines()
    assert lines[0] == "| psnr | white page | hull, mean colour | nearest view | model |" and lines[3] == "| shoe | 12.00 | 19.00 | 17.00 | 31.00 |"
    assert lines[-1] == "| **mean** | 11.00 | 20.00 | 19.50 | 30.50 |" and len({line.count("|") for line in lines}) == 1
    assert score_table(rows, "ssim", 3).splitlines()[2] == "| cup | 0.250 | 0.525 | 0.550 | 0.750 |"


@pytest.mark.parametrize("count, targets", [(4, 4), (8, 4), (4, 6)])
def test_comparison_pictures_fill_a_grid(ball, count, targets):
    pictures, titles = comparison_pictures(ball, predict_white(ball.inputs[count], ball.targets.cameras), count, targets)
    assert len(pictures) == len(titles) == 4*max(count, targets) and {picture.shape for picture in pictures} == {(*SIZE, 3)}
    assert torch.equal(pictures[max(count, targets)], ball.targets.composite()[0])
    assert titles[::max(count, targets)] == ["input", "truth", "prediction", "error"]


def test_a_number_of_inputs_that_was_not_rendered_is_named(ball):
    with pytest.raises((ValueError, KeyError), match="5"): evaluate([ball], METHODS, 5)
