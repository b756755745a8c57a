"""VSD's second models and the worlds in closed form: exactness, weights that stay, and that the checks can fail."""
import math

import pytest
import torch

from zerolab.diffusion.analytic import MixturePrior, gaussian_prior, ring_prior
from zerolab.diffusion.hub import load_prior, save_random_checkpoint
from zerolab.diffusion.priors import noise_schedule
from zerolab.distill.closed_form import (fitted_pull, gaussian_gain, gaussian_pull, judge_generator, mixture_fit, prompt_world, retrieval,
                                         run_particles, sign_flip, train_generator)
from zerolab.distill.objectives import FIXED, Recipe, add_noise, asd, csd, sds, vsd
from zerolab.distill.variational import OnlinePhi, ParticlePrior, adapter_weights, fit_phi, lora_copy

SCHEDULE = noise_schedule("scaled_linear")


# ---- the exact q


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_particles_are_a_mixture_of_width_zero(shape):
    generator = torch.Generator().manual_seed(0)
    particles = torch.randn(7, *shape, dtype=torch.float64, generator=generator)
    prior = ParticlePrior(particles, SCHEDULE)
    mixture = MixturePrior(particles.flatten(1)[None], 0., schedule=SCHEDULE)
    t, noise = torch.tensor([3, 50, 200, 500, 700, 900, 999]), torch.randn(7, *shape, dtype=torch.float64, generator=generator)
    x_t = add_noise(prior, particles, t, noise)
    expected = mixture.eps(x_t.flatten(1), t, mixture.condition([0]*7)).view_as(x_t)
    torch.testing.assert_close(prior.eps(x_t, t, {}), expected, rtol=1e-6, atol=1e-6)


def test_many_samples_of_a_gaussian_are_nearly_the_gaussian():
    "At high noise, where 4,000 particles cover it; the gap is the particles' own mean."
    world = gaussian_prior(torch.zeros(2, dtype=torch.float64), 0.5)
    generator = torch.Generator().manual_seed(0)
    particles = 0.5*torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    x_t, t = torch.randn(50, 2, dtype=torch.float64, generator=generator), torch.full((50,), 700)
    gap = ParticlePrior(particles, SCHEDULE).eps(x_t, t, {}) - world.eps(x_t, t, world.condition([0]*50))
    assert float(gap.abs().max()) < 0.02


# ---- models that learn


@pytest.mark.parametrize("kind", ("unet", "pixart", "views"))
def test_lora_shares_all_weights_and_changes_none(tmp_path, kind):
    from zerolab.scene.cameras import orbit
    prior = load_prior(save_random_checkpoint(tmp_path, kind))
    cond = prior.condition(["a red cube", "a ball"], *([orbit([0, 90, 180, 270], size=(8, 8))] if kind == "views" else []))
    x, t = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 800])
    kept, before = {name: value.clone() for name, value in prior.network.state_dict().items()}, prior.eps(x, t, cond)
    phi = lora_copy(prior, rank=2)
    assert torch.equal(phi.eps(x, t, cond), before)                       # the adapter starts at zero
    places = {weight.data_ptr() for weight in prior.network.parameters()}
    assert {weight.data_ptr() for weight in phi.network.parameters() if not weight.requires_grad} <= places
    optimizer, generator = torch.optim.Adam(adapter_weights(phi), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(3): fit_phi(phi, optimizer, x, cond, generator)
    assert not torch.equal(phi.eps(x, t, cond), before)                   # it has learned
    assert torch.equal(prior.eps(x, t, cond), before)                     # the prior does not know
    assert prior.network.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in prior.network.state_dict().items())
    assert not any(weight.requires_grad for weight in prior.network.parameters())


def test_lora_repeats_with_its_seed(tmp_path):
    prior = load_prior(save_random_checkpoint(tmp_path, "unet"))
    state = torch.random.get_rng_state()
    first, second, third = (adapter_weights(lora_copy(prior, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and not all(torch.equal(a, b) for a, b in zip(first, third))
    assert torch.equal(torch.random.get_rng_state(), state)               # nobody else's random numbers were used


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction", "flow_prediction"))
def test_fitting_lowers_the_loss_for_any_prediction_type(tmp_path, kind):
    "The target of training is what the network says of itself."
    prior = load_prior(save_random_checkpoint(tmp_path, "unet", prediction_type=kind))
    phi, cond = lora_copy(prior, rank=8), prior.condition(["a red cube"]*4)
    x, generator = torch.randn(4, *prior.shape, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(adapter_weights(phi), lr=1e-2)
    losses = [fit_phi(phi, optimizer, x, cond, generator) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_correction_of_zero_is_the_prior_and_prompts_are_heard_or_not():
    ring = ring_prior()
    x, t, prompts = torch.randn(4, 2, dtype=torch.float64), torch.tensor([10, 300, 600, 900]), ring.condition([0, 1, 2, 3])
    torch.testing.assert_close(OnlinePhi(ring, start=ring).eps(x, t, prompts), ring.eps(x, t, prompts))
    blind, hears = OnlinePhi(ring, seed=1), OnlinePhi(ring, hears=torch.eye(5), seed=1)
    other = ring.condition([4, 4, 4, 4])
    assert torch.equal(blind.eps(x, t, prompts), blind.eps(x, t, other)) and not torch.equal(hears.eps(x, t, prompts), hears.eps(x, t, other))


def test_vectors_have_no_network_to_adapt():
    with pytest.raises(ValueError, match="use OnlinePhi or ParticlePrior"): lora_copy(ring_prior())


# ---- closed form


@pytest.mark.parametrize("t, delta_t", [(20, 0), (60, 13), (300, 100), (980, 19)])
@pytest.mark.parametrize("scale", (1., 7.5))
def test_gradients_of_a_gaussian_are_the_algebra(t, delta_t, scale):
    "Linear in 1, z and noise: least squares finds the parts without an error."
    world = gaussian_prior(torch.full((3,), -0.2, dtype=torch.float64), 0.4, uncond_mean=0.3, uncond_std=1.1)
    own = gaussian_prior(torch.full((3,), 0.5, dtype=torch.float64), 0.7)
    z, noise = torch.randn(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    given = dict(prior=world, x=0.5 + 0.7*z, t=torch.full((40,), t), cond=world.condition([0]*40), noise=noise, weight="uniform",
                 uncond=world.condition([-1]*40))
    found = {"sds": sds(guidance_scale=scale, **given), "vsd": vsd(phi=own, guidance_scale=scale, **given), "csd": csd(**given),
             "asd": asd(delta_t=torch.full((40,), delta_t), guidance_scale=scale, **given)}
    for name, (gradient, _) in found.items():
        expected = gaussian_pull(name, world.schedule, t, offset=0.7, spread=0.7, std=0.4, uncond_offset=0.2, uncond_std=1.1,
                                 **({} if name == "csd" else dict(guidance_scale=scale)), **(dict(delta_t=delta_t) if name == "asd" else {}))
        assert list(fitted_pull(gradient, z, noise)[0]) == pytest.approx(list(expected), abs=2e-5*max(1, scale))


def test_where_asd_repels():
    assert [sign_flip(SCHEDULE, std) for std in (0.05, 0.1, 0.3, 0.5, 1.)] == [2, 10, 81, 169, 354]
    for std in (0.1, 0.3, 1.):
        flip = sign_flip(SCHEDULE, std)
        assert gaussian_gain(SCHEDULE, flip - 5, std)[0] < gaussian_gain(SCHEDULE, flip, std)[0] > gaussian_gain(SCHEDULE, flip + 5, std)[0]
        assert float(SCHEDULE.sigmas[flip]/SCHEDULE.alphas[flip]) == pytest.approx(std, rel=0.15)


def test_what_is_left_of_sds_at_the_papers_shifts():
    at = dict(offset=1., spread=0.3, std=0.3, uncond_offset=1., uncond_std=2.)
    for t, delta_t, noise, pull in ((500, 24, 0.145, 0.073), (100, 4, 0.029, 0.004)):
        asked, plain = gaussian_pull("asd", SCHEDULE, t, delta_t=delta_t, **at), gaussian_pull("sds", SCHEDULE, t, **at)
        assert abs(asked.noise/plain.noise) == pytest.approx(noise, abs=1e-3) and asked.mean/plain.mean == pytest.approx(pull, abs=1e-3)
    found = {name: gaussian_pull(name, SCHEDULE, 500, guidance_scale=7.5, **at, **more) for name, more in (("asd", dict(delta_t=48)), ("vsd", {}))}
    assert [round(found[name].scale, 3) for name in ("asd", "vsd")] == [0.714, 0.688]
    assert [round(found[name].noise, 3) for name in ("asd", "vsd")] == [3.703, 3.712]


def test_closed_form_of_something_else():
    with pytest.raises(ValueError, match="need one of sds, vsd, csd, asd"):
        gaussian_pull("ism", SCHEDULE, 5, offset=1, spread=1, std=1, uncond_offset=1, uncond_std=1)


# ---- mixtures and generators


def test_mixture_fit_by_hand():
    ring = ring_prior()
    x = torch.cat([ring.means[0, 0].expand(30, 2), ring.means[0, 1].expand(10, 2) + torch.tensor([0.1, 0.])])
    found = mixture_fit(ring, 0, x)
    p, q = (0.75, 0.25, 0, 0), (0.4, 0.3, 0.2, 0.1)
    expected = 0.5*sum((a*math.log(2*a/(a + b)) if a else 0) + b*math.log(2*b/(a + b)) for a, b in zip(p, q))
    assert found["modes"] == 2 and found["divergence"] == pytest.approx(expected) and found["bias"] == pytest.approx(0.25) and found["std"] < 1e-9


def test_vsd_spreads_and_sds_collapses():
    "A short version of the experiment, on fewer particles."
    ring, settings = ring_prior(), dict(count=96, steps=400, lr=0.08)
    spread, point = (mixture_fit(ring, 0, run_particles(ring, 0, Recipe(name, 1., FIXED), **settings)) for name in ("vsd", "sds"))
    assert spread["modes"] == 4 and spread["divergence"] < 0.03 and spread["std"] > 0.8
    assert point["modes"] <= 2 and point["std"] < 0.4 and point["divergence"] > 0.09
    assert torch.equal(*(run_particles(ring, 0, Recipe(), count=8, steps=3) for _ in range(2)))


def test_retrieval_counts_and_chance_is_chance():
    means = torch.eye(4)
    assert retrieval(means, torch.arange(4), means) == 1 and retrieval(means, torch.tensor([0, 1, 3, 2]), means) == 0.5
    x = torch.randn(8000, 4, generator=torch.Generator().manual_seed(0))
    assert abs(retrieval(x, torch.arange(8000) % 4, means) - 0.25) < 0.02


def test_true_samples_are_judged_as_true():
    world, embeddings = prompt_world(32, unseen=4)
    draw = lambda heard, generator: world.sample({"prompt": torch.arange(36).repeat_interleave(16)}, generator)
    found = judge_generator(draw, world, embeddings, 32)
    assert abs(found["std"] - 1) < 0.05 and found["bias"] == pytest.approx((8/16)**0.5, abs=0.15) and found["r1"] > 0.95


def test_training_repeats_and_leaves_the_global_generator_alone():
    world, embeddings = prompt_world(4)
    state = torch.random.get_rng_state()
    models = [train_generator(world, embeddings, Recipe("vsd", 1.), phi=OnlinePhi(world, start=world, hears=embeddings), steps=3) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models)))
    assert torch.equal(torch.random.get_rng_state(), state)
