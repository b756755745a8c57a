"""GS-LRM: its size, its activations against a table written down a second time, its symmetries, its gradients and its files."""
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from faults import file_size_limit
from zerolab.lrm.model import (GSLRM, PAPER, SMALL, TINY, Attention, GSLRMConfig, decode, draw, hull_features, input_feedback, load_lrm,
                               parameter_count, patchify, save_lrm, unpatchify)
from zerolab.render.splats import render_splats
from zerolab.scene.cameras import Cameras, orbit, random_views

PLAIN = GSLRMConfig(width=64, depth=2, heads=2)
SILHOUETTES = replace(PLAIN, centred_depth=True, silhouettes=True)
CONFIGS = {"plain": PLAIN, "silhouettes": SILHOUETTES, "small": replace(SMALL, width=48, depth=2), "tiny": replace(TINY, width=48, depth=2)}
FIELDS = ("means", "quats", "scales", "opacities", "sh")


def model_of(config, seed=0, spread=None):
    "A model with weights large enough that every path matters."
    torch.manual_seed(seed)
    model = GSLRM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1: torch.nn.init.normal_(parameter, std=spread or 0.7/parameter.shape[1]**0.5)
    return model


def rig(views=4, batch=1, size=(16, 16)): return Cameras.stack([orbit(torch.arange(views)*360./views + 15*b, 20. + 5*b, size=size) for b in range(batch)])


def pictures(config, cameras, seed=0):
    "Coloured noise within the silhouettes of a ball."
    origins, directions = cameras.rays()
    distance = (origins - (origins*directions).sum(-1, keepdim=True)*directions).norm(dim=-1, keepdim=True)
    alpha = torch.sigmoid((0.7 - distance)/0.05)
    rgb = torch.rand(*alpha.shape[:-1], 3, generator=torch.Generator().manual_seed(seed))*alpha + 1 - alpha
    return torch.cat([rgb, alpha], -1) if config.silhouettes else rgb


def assert_close(a, b, config):
    tolerance = 1e-4 if config.refinements else 1e-5      # gradients, normalised and applied five times, carry rounding on
    for name in FIELDS: torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")


# ---- size


def test_the_papers_model_has_303_million_weights():
    "24 blocks of attention (4 d^2), MLP (8 d^2) and two norms; embedding of 9 and head of 12 numbers for 64 pixels; two more norms."
    assert parameter_count(PAPER) == 24*(12*1024**2 + 2*1024) + (9 + 12)*64*1024 + 2*1024 == 303_417_344
    assert PAPER == GSLRMConfig() and (PAPER.patch, PAPER.width, PAPER.depth, PAPER.heads) == (8, 1024, 24, 16)


@pytest.mark.parametrize("config", [PAPER, SMALL, TINY, replace(PLAIN, patch=4, mlp_ratio=3)])
def test_parameter_count_by_formula(config):
    d, values = config.width, config.patch**2
    block = (4 + 2*config.mlp_ratio)*d**2 + 2*d + (2*d//config.heads if config.qk_norm else 0)
    hidden, channels = config.pixel_head, config.channels
    numbers = 14 if config.shift else 12
    ends = (channels + 16)*values*d + (16 + channels)*hidden + numbers*hidden if hidden else (channels + numbers)*values*d
    if config.refinements: ends += (16 + channels + 2*numbers + 5 + numbers)*hidden + numbers*config.refinements
    assert parameter_count(config) == config.depth*block + ends + 2*d


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_bias_anywhere(config): assert not [name for name, _ in GSLRM(config).named_parameters() if "bias" in name]


# ---- the parts


def test_a_token_is_a_patch_and_views_come_first():
    pixels = torch.arange(2*3*16*24*5.).reshape(2, 3, 16, 24, 5)
    tokens = patchify(pixels, 8)
    for view, row, column in ((0, 0, 0), (1, 0, 2), (2, 1, 1)):
        token = tokens[1, view*2*3 + row*3 + column]
        assert torch.equal(token, pixels[1, view, 8*row:8*row + 8, 8*column:8*column + 8].reshape(-1))
    assert torch.equal(unpatchify(tokens, (3, 16, 24), 8), pixels)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_its_definition(qk_norm):
    torch.manual_seed(0)
    attention, x = Attention(12, 3, qk_norm).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    if qk_norm:
        with torch.no_grad(): attention.query_norm.weight.mul_(1.7), attention.key_norm.weight.add_(torch.arange(4))
    heads = []
    for head in range(3):
        q, k, v = (x @ attention.qkv.weight[12*part + 4*head:12*part + 4*head + 4].T for part in range(3))
        if qk_norm: q, k = (y/y.square().mean(-1, keepdim=True).add(torch.finfo(y.dtype).eps).sqrt()*norm.weight
                            for y, norm in ((q, attention.query_norm), (k, attention.key_norm)))
        heads.append(torch.softmax(q @ k.mT/4**0.5, -1) @ v)
    torch.testing.assert_close(attention(x), torch.cat(heads, -1) @ attention.out.weight.T)


def pixel_by_hand(raw, image, origin, direction, axes, config, span):
    "Appendix A.4 of GS-LRM and zerolab's switches, for one pixel, in plain Python."
    sigmoid = lambda x: 1/(1 + math.exp(-x))
    dot = sum(o*d for o, d in zip(origin, direction))
    if config.silhouettes: distance = -dot + span[0] + (span[1] - span[0])*sigmoid(raw[0] - 3)
    elif config.centred_depth: distance = -dot + config.centred_radius*(2*sigmoid(raw[0]) - 1)
    else: distance = (1 - sigmoid(raw[0]))*config.near + sigmoid(raw[0])*config.far
    aside = [config.shift*sum(amount*axis[c] for amount, axis in zip(raw[12:], axes)) for c in range(3)]
    mean = [min(max(o + distance*d + s, -1), 1) for o, d, s in zip(origin, direction, aside)]
    colour = [raw[1 + c] + ((image[c] - 0.5)*math.sqrt(4*math.pi) if config.colour_residual else 0) for c in range(3)]
    scale = [min(math.exp(x + config.scale_bias), config.scale_max) for x in raw[4:7]]
    rotation = [raw[7] + bool(config.refinements), *raw[8:11]]
    length = math.sqrt(sum(x*x for x in rotation))
    opacity = sigmoid(raw[11] + config.opacity_bias)*(image[3] if config.silhouettes else 1)
    return mean, [x/length for x in rotation], scale, opacity, colour


@pytest.mark.parametrize("config", [PAPER, SMALL, TINY, replace(PAPER, colour_residual=True, near=0.5, far=3., scale_max=0.05),
                                    replace(SILHOUETTES, opacity_bias=1., centred_radius=0.4)])
def test_decode_is_the_papers_table(config):
    generator = torch.Generator().manual_seed(1)
    cameras = random_views_batch()
    origins, directions = cameras.rays()
    raw = 2*torch.randn(2, 3, 4, 5, 14 if config.shift else 12, generator=generator, dtype=torch.float64)
    images = torch.rand(2, 3, 4, 5, 4, generator=generator, dtype=torch.float64)[..., :4 if config.silhouettes else 3]
    span = torch.randn(2, 3, 4, 5, 2, generator=generator, dtype=torch.float64).sort(-1).values
    gaussians = decode(raw, images, cameras, config, span if config.silhouettes else None)
    right_and_down = cameras.c2w[..., None, None, :3, :2].mT.expand(2, 3, 4, 5, 2, 3)
    values = (x.flatten(0, 3).tolist() for x in (raw, images, origins, directions, right_and_down, span))
    by_hand = [pixel_by_hand(*pixel[:5], config, pixel[5]) for pixel in zip(*values)]
    for name, expected in zip(FIELDS, zip(*by_hand)):
        found = getattr(gaussians, name)
        expected = torch.tensor(expected, dtype=torch.float64).reshape(found.shape)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12, msg=lambda m: f"{name}: {m}")
    clipped = (gaussians.means.abs() == 1).any(-1).double().mean()
    assert 0.02 < clipped < 0.98 and 0 < (gaussians.scales == config.scale_max).double().mean() < 0.98, "both sides of the table's bounds are reached"


def random_views_batch():
    import numpy as np
    return Cameras.stack([random_views(np.random.default_rng(seed), 3, size=(4, 5), dtype=torch.float64) for seed in range(2)])


# ---- symmetries


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_views_are_a_set(config):
    model, cameras = model_of(config), rig(4)
    images, order = pictures(config, cameras), [2, 0, 3, 1]
    with torch.no_grad(): straight, permuted = model(images, cameras), model(images[:, order], cameras[order])
    rows = torch.arange(4*16*16).reshape(4, -1)[order].reshape(-1)
    assert_close(permuted, straight[rows], config)
    assert (straight.sh[:, rows] - straight.sh).abs().max() > 0.1, "the views differ"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_view_matters_to_every_other(config):
    model, cameras = model_of(config), rig(3)
    images = pictures(config, cameras)
    images[:, 2, ..., :3] *= 0.5
    with torch.no_grad(): changed, before = model(images, cameras), model(pictures(config, cameras), cameras)
    assert (changed.sh - before.sh)[0, :16*16].abs().max() > 1e-3, "the first view's Gaussians hear of the third view's colours"


@pytest.mark.parametrize("views, size", [(1, (16, 16)), (2, (8, 24)), (5, (16, 8)), (9, (8, 8))])
@pytest.mark.parametrize("name", ["plain", "tiny"])
def test_any_number_of_views_of_any_shape(views, size, name):
    cameras = rig(views, size=size)
    with torch.no_grad(): gaussians = model_of(CONFIGS[name])(pictures(CONFIGS[name], cameras), cameras)
    assert gaussians.means.shape == (1, views*size[0]*size[1], 3) and all(getattr(gaussians, field).isfinite().all() for field in FIELDS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_batch_equals_a_loop(config):
    model, cameras = model_of(config), rig(3, batch=3)
    images = pictures(config, cameras)
    with torch.no_grad():
        together = model(images, cameras).unstack()
        for b, alone in enumerate(together): assert_close(alone, model(images[b:b + 1], Cameras.stack([cameras.unstack()[b]])).unstack()[0], config)


# ---- gradients


def drawn_loss(model, images, cameras):
    seen = render_splats(model(images, cameras), rig(2), torch.ones(3))
    return (seen.rgb - 0.3).square().mean() + (seen.alpha - 0.5).square().mean()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_picture_teaches_every_weight(config):
    model, cameras = model_of(config), rig(4)
    drawn_loss(model, pictures(config, cameras), cameras).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    last = model.pixel_head[-1].weight.grad[None] if config.pixel_head else model.head.weight.grad.reshape(config.patch**2, 12, -1)
    if config.refinements: assert (model.update[-1].weight.grad.abs().amax(1) > 0).all() and all((step.grad != 0).all() for step in model.steps)
    outputs = last.abs().amax((0, 2))
    assert (outputs > 0).all(), f"one of the outputs learns nothing: {outputs.tolist()}"


@pytest.mark.parametrize("config", [PLAIN, SILHOUETTES, CONFIGS["small"]])
def test_recomputing_blocks_changes_no_gradient(config):
    cameras, gradients, calls = rig(4), [], []
    for checkpoint in (False, True):
        model = model_of(replace(config, checkpoint_blocks=checkpoint))
        count = [0]
        def counted(*ignored, count=count): count[0] += 1
        model.blocks[0].register_forward_pre_hook(counted)
        loss = drawn_loss(model, pictures(config, cameras), cameras)
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        calls.append(count[0])
    assert calls == [1, 2], "the block runs again in the backward pass"
    for plain, again in zip(*gradients): torch.testing.assert_close(again, plain, atol=1e-7, rtol=1e-5)
    with torch.no_grad(): model(pictures(config, cameras), cameras)
    assert count[0] == 3, "without gradients nothing is recomputed"


def test_some_steps_on_one_picture_lower_the_loss():
    config, cameras = CONFIGS["small"], rig(4)
    torch.manual_seed(0)
    model, images = GSLRM(config), pictures(config, cameras)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (render_splats(model(images, cameras), cameras, torch.ones(3)).rgb - images).square().mean()
        loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7*losses[0], losses


def test_empty_silhouettes_make_no_gaussian_and_no_nan():
    model, cameras = model_of(SILHOUETTES), rig(4)
    images = torch.ones(1, 4, 16, 16, 4)
    images[..., 3] = 0
    loss = drawn_loss(model, images, cameras)
    loss.backward()
    with torch.no_grad(): assert (model(images, cameras).opacities == 0).all()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- looking again


def input_error(raw, images, cameras, config, span):
    picture = draw(decode(raw, images, cameras, config, span), cameras, config)
    return (picture.rgb - images[..., :3]).square().sum() + 1.5*(picture.alpha - images[..., 3:]).square().sum()


def test_feedback_points_where_the_inputs_error_grows():
    "A finite difference along every field's own part of the normalised gradient, in float64."
    config, cameras = CONFIGS["tiny"], rig(3, size=(8, 8))
    cameras = Cameras(cameras.K.double(), cameras.w2c.double(), cameras.size)
    images = pictures(config, cameras).double()
    raw = 0.3*torch.randn(1, 3, 8, 8, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    span = hull_features(images[..., 3], cameras, *cameras.rays())
    gradient, error = input_feedback(raw, images, cameras, config, span)
    assert gradient.shape == raw.shape and error.shape == (1, 3, 8, 8, 5) and not gradient.requires_grad and not error.requires_grad
    assert 2 < gradient.abs().max() <= 3, "clipped"
    leaf = raw.clone().requires_grad_()
    exact, = torch.autograd.grad(input_error(leaf, images, cameras, config, span), leaf)
    start = 0
    for name, count in config.outputs.items():
        field = slice(start, start + count); start += count
        step = torch.zeros_like(raw); step[..., field] = gradient[..., field]
        slope = (input_error(raw + 1e-6*step, images, cameras, config, span) - input_error(raw - 1e-6*step, images, cameras, config, span))/2e-6
        assert slope > 0 and slope.item() == pytest.approx((exact*step).sum().item(), rel=1e-3), name
        free = gradient[..., field].abs() < 2.99
        ratio = (gradient[..., field]/exact[..., field])[free & (exact[..., field] != 0)]
        assert ratio.std() < 1e-6*ratio.mean() and ratio.mean() > 0, f"{name}: one factor for the object"
    seen = images[..., 3] > 0.05
    factor = (gradient[..., 0]/exact[..., 0])[exact[..., 0] != 0].median()
    assert factor*exact[..., 0][seen].square().mean().sqrt() == pytest.approx(1, rel=1e-3), "a root mean square of 1 in the object"


def test_an_untrained_model_that_looks_again_meets_its_inputs_better():
    config, cameras = TINY, rig(4, size=(32, 32))
    images, errors = pictures(config, cameras), []
    for count in (0, config.refinements):
        torch.manual_seed(0)
        model = GSLRM(replace(config, refinements=count))
        with torch.no_grad(): picture = draw(model(images, cameras), cameras, config)
        errors.append(((picture.rgb - images[..., :3]).square().mean().item(), (picture.alpha - images[..., 3:]).square().mean().item()))
    assert errors[1][0] < 0.5*errors[0][0] and errors[1][1] < 0.5*errors[0][1], errors


# ---- the hull


def test_hull_features_are_zero_where_nothing_is_seen():
    cameras = rig(4)
    alpha = pictures(SILHOUETTES, cameras)[..., 3]
    span = hull_features(alpha, cameras, *cameras.rays())
    assert (span[alpha <= 0.05] == 0).all() and (span[alpha > 0.95] != 0).any(-1).float().mean() > 0.99
    assert (span[..., 0] <= span[..., 1]).all() and not span.requires_grad


@pytest.mark.parametrize("inset", [0., 0.1, 9.])
def test_a_silent_network_starts_inside_of_the_hull(inset):
    "A twentieth of the way through what is left of the hull when both its ends are kept free; in the middle where nothing is left."
    config, cameras = replace(SILHOUETTES, hull_inset=inset), rig(4)
    model, images = GSLRM(config), pictures(SILHOUETTES, cameras)
    torch.nn.init.zeros_(model.head.weight)
    origins, directions = cameras.rays()
    span = hull_features(images[..., 3], cameras, origins, directions)
    near, far = torch.minimum(span[..., 0] + inset, span.mean(-1)), torch.maximum(span[..., 1] - inset, span.mean(-1))
    depth = near + (far - near)/(1 + math.exp(3))
    middles = origins - (origins*directions).sum(-1, keepdim=True)*directions
    with torch.no_grad(): means = model(images, cameras).means
    torch.testing.assert_close(means, (middles + depth[..., None]*directions).flatten(1, 3).clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_half_precision_leaves_the_rays_alone(config):
    """A network that says zeros predicts points that depend on the rays alone: these must not be rounded to the 8 bits of bfloat16,
    with which a camera at distance 2.7 stands a quarter of a 64 px pixel beside itself."""
    model, cameras = GSLRM(config), rig(4)
    torch.nn.init.zeros_((model.pixel_head[-1] if config.pixel_head else model.head).weight)
    if config.refinements: torch.nn.init.zeros_(model.update[-1].weight)
    images = pictures(config, cameras)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): half = model(images, cameras).means
    with torch.no_grad(): whole = model(images, cameras).means
    assert (half - whole).abs().max() < 1e-5, f"points move by up to {(half - whole).abs().max():.4f}"


# ---- files


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0), (torch.float16, 2e-3)])
def test_round_trip(tmp_path, dtype, tolerance):
    model = model_of(CONFIGS["tiny"])
    again = load_lrm(save_lrm(model, tmp_path/"m", dtype=dtype))
    assert again.config == model.config and not again.training
    for a, b in zip(model.parameters(), again.parameters()):
        assert b.dtype == torch.float32 and (a - b).abs().max() <= tolerance*a.abs().max()


def without(name):
    def change(folder):
        from safetensors.torch import load_file, save_file
        save_file({key: value for key, value in load_file(folder/"model.safetensors").items() if key != name}, folder/"model.safetensors")
    return change


def with_config(**changes):
    def change(folder):
        config = json.loads((folder/"config.json").read_text()) | changes
        (folder/"config.json").write_text(json.dumps(config))
    return change


def cut(name, keep):
    def change(folder): (folder/name).write_bytes((folder/name).read_bytes()[:keep])
    return change


def extra_tensor(folder):
    from safetensors.torch import load_file, save_file
    save_file(load_file(folder/"model.safetensors") | {"blocks.9.mlp.0.weight": torch.zeros(2)}, folder/"model.safetensors")


# what is wrong -> (how it comes about, what the message must name beside the folder)
DAMAGE = {
    "no config": (lambda folder: (folder/"config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder/"model.safetensors").unlink(), "model.safetensors"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors"),
    "weights cut in the header": (cut("model.safetensors", 40), "model.safetensors"),
    "weights cut in the numbers": (cut("model.safetensors", -7), "model.safetensors"),
    "weights are text": (lambda folder: (folder/"model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "model.safetensors"),
    "config cut": (cut("config.json", 30), "config.json"),
    "config is a list": (lambda folder: (folder/"config.json").write_text("[]"), "gs-lrm"),
    "another kind of model": (with_config(model_type="sdxl"), "gs-lrm"),
    "a field of the future": (with_config(flux=3), "flux"),
    "heads that do not divide": (with_config(heads=7), "heads"),
    "no heads": (with_config(heads=0), "heads"),
    "width is text": (with_config(width="48"), "width"),
    "width is nothing": (with_config(width=None), "width"),
    "another width": (with_config(width=64, heads=2), ".weight is"),
    "another depth": (with_config(depth=3), "blocks.2."),
    "a weight too few": (without("head.weight"), "head.weight"),
    "a weight too many": (extra_tensor, "blocks.9.mlp.0.weight"),
}
@pytest.mark.parametrize("name", DAMAGE)
def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path, name):
    change, named = DAMAGE[name]
    folder = save_lrm(model_of(CONFIGS["tiny"]), tmp_path/"m")
    change(folder)
    with pytest.raises((ValueError, OSError)) as caught: load_lrm(folder)
    message = str(caught.value)
    assert str(folder) in message and named in message and "\n" not in message and len(message) < 300 + len(str(folder)), message


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as caught: load_lrm(tmp_path/"nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, old):
    before = model_of(CONFIGS["tiny"], seed=1)
    if old: save_lrm(before, tmp_path/"m")
    with file_size_limit(20_000), pytest.raises(Exception): save_lrm(model_of(CONFIGS["tiny"]), tmp_path/"m")
    assert sorted(path.name for path in (tmp_path/"m").iterdir()) == (["config.json", "model.safetensors"] if old else [])
    if old: assert torch.equal(load_lrm(tmp_path/"m").head.weight, before.head.weight)


def test_a_full_disk_is_one_clear_line(tmp_path):
    model = model_of(CONFIGS["tiny"])
    with file_size_limit(20_000), pytest.raises(OSError, match="model.safetensors") as caught: save_lrm(model, tmp_path/"m")
    assert "\n" not in str(caught.value)


def test_config_json_says_everything(tmp_path):
    saved = json.loads((save_lrm(GSLRM(CONFIGS["small"]), tmp_path/"m")/"config.json").read_text())
    assert saved == {"model_type": "gs-lrm", **asdict(CONFIGS["small"])}
