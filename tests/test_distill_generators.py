"""Generators beyond what their notebooks show: batches, gradients everywhere, noise, files, and what bad input gets."""
import json
from dataclasses import replace

import pytest
import torch

from zerolab.distill import conv3d, ingp, triplane
from zerolab.distill.fields import FAST, Field, field_gradients
from zerolab.distill.generators import draw, parameter_count, random_background, save_generator
from zerolab.distill.presets import GENERATORS, PRESETS, load_generator, make_generator, preset
from zerolab.scene.cameras import orbit
from zerolab.scene.gaussians import Gaussians
from zerolab.train.checkpoint import CheckpointError

CAMERAS = orbit([0, 90], 20, 2.7, size=(12, 12))
AMORTISED = [name for name in GENERATORS if name != "ingp"]


def prompts(count=3): return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", AMORTISED)
def test_a_batch_is_its_prompts_one_by_one(name):
    torch.manual_seed(0)
    model = make_generator(name).eval()
    with torch.no_grad():
        together = draw(model(prompts()), CAMERAS, torch.ones(3)).rgb
        for i in range(3):
            alone = draw(model(prompts()[i:i + 1]), CAMERAS, torch.ones(3)).rgb
            assert torch.allclose(together[i:i + 1], alone, atol=2e-4)


@pytest.mark.parametrize("name", GENERATORS)
def test_every_weight_gets_a_gradient(name):
    torch.manual_seed(0)
    changes = {} if name == "triplane-gaussians" else dict(first_radius=0.7)
    if name == "hyper-ingp": changes |= dict(hash_background=True)
    if name in ("conv3d", "triplane"): changes |= dict(direction_background=True)
    model = make_generator(name, **changes).train()
    z = torch.randn(2, 16) if name == "conv3d" else None
    picture = draw(model(prompts(2), z), CAMERAS, None, replace(FAST, normals="finite_difference"))
    (picture.rgb*torch.rand_like(picture.rgb)).sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", GENERATORS)
def test_what_a_generator_returns_is_in_its_sphere(name):
    model = make_generator(name).eval()
    scene = model(prompts(2))
    assert scene.batch == (1 if name == "ingp" else 2) if isinstance(scene, Field) else isinstance(scene, Gaussians)
    if isinstance(scene, Gaussians): assert scene.means.norm(dim=-1).max() < 1.5*model.config.radius and len(scene) > 500
    else:
        far = torch.nn.functional.normalize(torch.randn(scene.batch, 50, 3), dim=-1)*model.config.radius
        assert scene.density(scene.query_geometry(far)).max() < 1e-3        # nothing at the border when training starts


def test_noise_is_for_3dconv_alone_and_evaluation_has_none_of_its_own():
    torch.manual_seed(0)
    model = make_generator("conv3d")
    for block in model.blocks: torch.nn.init.ones_(block.noise)
    one = prompts(1)
    with torch.no_grad():
        assert not torch.equal(model.train().volume(one), model.volume(one))
        assert torch.equal(model.eval().volume(one), model.volume(one))
        assert not torch.equal(model.volume(one, torch.ones(1, 16)), model.volume(one))
        assert torch.allclose(model.volume(one, torch.ones(1, 16)), model.volume(one, 2*torch.ones(1, 16)), atol=1e-4)   # of unit power


def test_words_and_sentences():
    model = make_generator("triplane").eval()
    with torch.no_grad():
        sentence, word = model.planes(prompts(2)), model.planes(prompts(2)[:, None])
        assert torch.equal(sentence, word)
        order = torch.randn(1, 5, 64)
        assert torch.allclose(model.planes(order), model.planes(order.flip(1)), atol=1e-5)   # attention has no order of its own


def test_the_hash_grid_is_differentiable_in_its_points():
    grid = ingp.HashGrid(levels=4, log2_table=8, base=3, growth=1.6).double()
    with torch.no_grad(): grid.table.normal_()
    points = (torch.rand(5, 3, dtype=torch.float64)*1.8 - 0.9).requires_grad_()
    assert torch.autograd.gradcheck(grid, points)
    assert torch.isfinite(grid(torch.tensor([[-1., -1, -1], [1, 1, 1], [9, -9, 0]]).double())).all()


def test_planes_can_be_differentiated_twice():
    "Which a loss on normals by autograd needs; true of grid_sample in torch 2.13."
    numbers = torch.Generator().manual_seed(0)
    planes = torch.randn(1, 3, 2, 4, 4, generator=numbers, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(1, 5, 3, generator=numbers, dtype=torch.float64)*1.4 - 0.7).requires_grad_()
    assert torch.autograd.gradgradcheck(triplane.triplane_lookup, (planes, points))


@pytest.mark.parametrize("name", ["ingp", "hyper-ingp", "conv3d", "triplane"])
def test_a_loss_on_normals_teaches_every_field(name):
    "By autograd: the gradient of the weights is what the loss does along it."
    torch.manual_seed(0)
    model, points = make_generator(name).double().eval(), torch.rand(1, 50, 3, dtype=torch.float64) - 0.5
    def loss(): return (field_gradients(model(prompts(1).double()), points, "autograd").norm(dim=-1) - 0.5).square().mean()
    loss().backward()
    learning = [p for p in model.parameters() if p.grad is not None]
    length = torch.cat([p.grad.flatten() for p in learning]).norm()
    def moved(step):
        with torch.no_grad():
            for p in learning: p += step*p.grad/length
        return loss().detach()
    slope = (moved(1e-10) - moved(-2e-10))/2e-10     # so small that no ReLU changes sides
    assert slope == pytest.approx(float(length), rel=1e-3)


@pytest.mark.parametrize("log2_table", [4, 12, 19])
def test_rows_of_the_hash_grid_stay_in_their_level(log2_table):
    grid = ingp.HashGrid(levels=7, log2_table=log2_table, base=4, growth=1.9)
    with torch.no_grad():
        ends = torch.cat([grid.starts[1:], torch.tensor([len(grid.table)])]).tolist()
        for level, end in enumerate(ends): grid.table[grid.starts[level]:end] = level
        found = grid(torch.rand(500, 3)*2 - 1).view(500, 7, 2)
    assert torch.allclose(found, torch.arange(7.).view(1, 7, 1).expand(500, 7, 2), atol=1e-4)


def test_paper_sizes_are_the_papers():
    count = lambda name, size="paper": parameter_count(GENERATORS[name][0], preset(name, size))/1e6
    assert round(count("conv3d"), 1) == 88.7 and round(count("conv3d", "paper-100k"), 1) == 144.8 and round(count("triplane"), 1) == 120.5
    assert round(parameter_count(ingp.HyperINGP, ingp.INGPConfig(), "grid")/1e6, 2) == 12.6 and round(count("ingp"), 2) == 12.6
    assert all(sum(p.numel() for p in make_generator(name).parameters()) < 1e6 for name in PRESETS["tiny"])


def test_paper_sizes_fit_together():
    with torch.device("meta"):      # shapes alone, nothing is computed
        for size in ("paper", "paper-100k"):
            assert make_generator("conv3d", size).volume(torch.zeros(2, 1024), torch.zeros(2, 64)).shape == (2, 32, 128, 128, 128)
        assert make_generator("triplane", "paper").planes(torch.zeros(2, 77, 1024)).shape == (2, 3, 32, 64, 64)
    model = make_generator("hyper-ingp", "paper")
    with torch.no_grad(): geometry, colour = model(torch.randn(2, 1024)).query(torch.randn(2, 10, 3))
    assert geometry.shape == (2, 10) and colour.shape == (2, 10, 3)


def test_a_random_background_uses_up_the_same_numbers_either_way():
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert random_background(0., 2, a) is None and random_background(1., 2, b).shape == (2, 1, 3)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


def test_files_that_are_no_generators_are_refused(tmp_path):
    save_generator(make_generator("triplane"), tmp_path, "triplane")
    config = json.loads((tmp_path/"config.json").read_text())
    for change, says in ((dict(model_type="gan"), "need one of ingp"), (dict(colour=3), "unknown fields"), (dict(width=97), "not divisible"),
                         (dict(width=32), "does not fit"), (dict(kind="mesh"), "need 'sdf' or 'density'")):
        (tmp_path/"config.json").write_text(json.dumps(config | change))
        with pytest.raises((ValueError, CheckpointError), match=says): load_generator(tmp_path)


@pytest.mark.parametrize("name", AMORTISED)
def test_embeddings_of_another_encoder_are_refused(name):
    model = make_generator(name)
    for wrong in (torch.zeros(2, 32), torch.zeros(64), None, torch.zeros(0, 64)):
        with pytest.raises(ValueError, match=r"need \[B"): model(wrong)


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="first_radius is 5"): make_generator("conv3d", first_radius=5.)
    with pytest.raises(ValueError, match="levels is -1"): make_generator("ingp", levels=-1)
    with pytest.raises(ValueError, match="no such setting"): make_generator("ingp", depth=3)
    assert conv3d.TINY.side == 32 and triplane.TINY.side*triplane.TINY.upsample == 32
