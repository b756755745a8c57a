"""Objectives: identities on any model, the traps of ASD's defaults, batches, prediction types, and what is refused."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from zerolab.diffusion.analytic import MixturePrior, ring_prior
from zerolab.diffusion.hub import load_prior, save_random_checkpoint
from zerolab.diffusion.priors import Prior, ddim_sample, noise_schedule, take_condition
from zerolab.distill import objectives
from zerolab.distill.objectives import (ANNEALED, FIXED, LOWERED, NORMALISERS, OBJECTIVES, RECIPES, WEIGHTS, DeltaT, Negatives, Recipe, Window,
                                        add_noise, asd, csd, ddim_invert, distill, draw_t, falling, guidance_ratio, inversion_start, ism,
                                        perpendicular, push, sdi, sds, sjc, view_conditions, view_weights, vsd)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    "Tiny random checkpoints of the real classes, with two prompts, none, and two unwanted ones."
    home, found = tmp_path_factory.mktemp("checkpoints"), {}
    for kind, prediction_type in (("unet", "epsilon"), ("unet", "v_prediction"), ("pixart", "epsilon"), ("unet", "flow_prediction")):
        prior = load_prior(save_random_checkpoint(home/f"{kind}-{prediction_type}", kind, prediction_type=prediction_type))
        conds = [prior.condition(prompts) for prompts in (["a red cube", "a blue ball"], ["", ""], ["a green cone", "a"], ["ball", "b c d"])]
        found[f"{kind}-{prediction_type}"] = (prior, *conds)
    return found


@pytest.fixture(scope="module")
def worlds(networks):
    "The same for exact mixtures, whatever they say of themselves."
    ring = ring_prior()
    found = dict(networks)
    for name, kind in (("scaled_linear", "epsilon"), ("scaled_linear", "v_prediction"), ("linear", "sample"), ("flow", "flow_prediction")):
        prior = MixturePrior(ring.means, 0.1, ring.weights, schedule=noise_schedule(name, prediction_type=kind))
        found[f"mixture-{kind}"] = (prior, *(prior.condition(prompts) for prompts in ([0, 3], [-1, -1], [1, 2], [4, 4])))
    return found


WORLDS = ["unet-epsilon", "unet-v_prediction", "unet-flow_prediction", "pixart-epsilon", "mixture-epsilon", "mixture-v_prediction", "mixture-sample",
          "mixture-flow_prediction"]


def request(prior, seed=0, B=2, low=20, high=981):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, B, *prior.shape, generator=generator, dtype=torch.float64 if isinstance(prior, MixturePrior) else torch.float32)
    return x, torch.randint(low, high, (B,), generator=generator), noise


def near(found, expected, scale, bound=1e-4):
    "Within a share of the largest entry of what is measured."
    assert float((found - expected).abs().max()/scale.abs().max()) < bound


# ---- identities


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scale", (1., 7.5, 100.))
@pytest.mark.parametrize("weight", ("uniform", "sds"))
def test_identities_hold_on_any_model(worlds, world, scale, weight):
    prior, cond, uncond, *_ = worlds[world]
    x, t, noise = request(prior)
    given = dict(uncond=uncond, weight=weight)
    towards, _ = csd(prior, x, t, cond, noise, **given)
    at_once, _ = asd(prior, x, t, cond, noise, delta_t=torch.zeros_like(t), guidance_scale=scale, **given)
    plain, _ = sds(prior, x, t, cond, noise, guidance_scale=scale, **given)
    own, _ = vsd(prior, x, t, cond, noise, phi=prior, guidance_scale=scale, **given)
    w = WEIGHTS[weight](prior.schedule, t).reshape(-1, *[1]*(x.ndim - 1)).to(x)
    unseen = w*(prior.eps(add_noise(prior, x, t, noise), t, uncond) - noise).detach()
    size = torch.maximum((scale - 1)*towards.abs().max(), w.max())
    near(at_once, (scale - 1)*towards, size)
    near(own, (scale - 1)*towards, size)
    near(plain - scale*towards, unseen, size)


@pytest.mark.parametrize("name", ("sds", "sjc", "csd", "vsd", "asd", "ism"))
def test_prediction_types_make_no_difference(worlds, name):
    "The same exact model, saying epsilon, v, x0: the same gradients (SDI draws on the way, and is tested below)."
    ring = ring_prior()
    found = []
    for kind in ("epsilon", "v_prediction", "sample"):
        prior = MixturePrior(ring.means, 0.1, ring.weights, schedule=noise_schedule("scaled_linear", prediction_type=kind))
        x, t, noise = request(prior)
        extra = {"vsd": dict(phi=prior), "asd": dict(delta_t=torch.tensor([7, 0])), "ism": dict(first=0)}.get(name, {})
        found.append(OBJECTIVES[name](prior, x, t, prior.condition([0, 3]), noise, uncond=prior.condition([-1, -1]), **extra)[0])
    near(found[1], found[0], found[0], 1e-5)
    near(found[2], found[0], found[0], 1e-5)


def test_flow_is_the_same_as_noise_at_the_same_levels():
    "alpha' = alpha/(alpha+sigma), sigma' = sigma/(alpha+sigma): a straight path through the same noise-to-signal ratios sees the same noise."
    ring, curved = ring_prior(), noise_schedule("scaled_linear")
    total = curved.alphas + curved.sigmas
    straight = replace(curved, alphas=curved.alphas/total, sigmas=curved.sigmas/total, prediction_type="flow_prediction")
    gradients = []
    for schedule in (curved, straight):
        prior = MixturePrior(ring.means, 0.1, ring.weights, schedule=schedule)
        x, t, noise = request(prior)
        gradients.append(asd(prior, x, t, prior.condition([0, 3]), noise, uncond=prior.condition([-1, -1]), delta_t=torch.tensor([9, 30]),
                             weight="uniform")[0])
    near(gradients[1], gradients[0], gradients[0], 1e-4)


def test_sdi_without_noise_on_the_way_does_not_depend_on_the_prediction_type():
    ring = ring_prior()
    found = []
    for kind in ("epsilon", "v_prediction"):
        prior = MixturePrior(ring.means, 0.1, ring.weights, schedule=noise_schedule("scaled_linear", prediction_type=kind))
        x, t, noise = request(prior)
        found.append(sdi(prior, x, t, prior.condition([0, 3]), noise, uncond=prior.condition([-1, -1]), eta=0.)[0])
    near(found[1], found[0], found[0], 1e-4)


def test_inversion_undoes_sampling():
    "Up in steps of 2 and down again: back at x, for samples that go to different timesteps."
    ring, last = ring_prior(), torch.tensor([600, 250])
    cond = ring.condition([0, 3])
    x = ring.sample(cond, torch.Generator().manual_seed(0))
    noisy, steps = ddim_invert(ring, x, last, lambda x_t, t: ring.eps(x_t, t, cond), 2)
    assert steps == 300 and (noisy - x).norm(dim=1).min() > 0.1
    for row in range(2):
        back = ddim_sample(ring, noisy[[row]], take_condition(cond, [row]), timesteps=range(int(last[row]), -1, -2))
        assert (back - x[row]).norm() < 0.02


class Blurred(MixturePrior):
    "Exact but for an error of its pictures, as a network's are."
    def output(self, x_t, t, cond):
        return super().output(x_t, t, cond) + 0.05


@pytest.mark.parametrize("name", ("ism", "sdi"))
def test_an_error_of_pictures_is_no_noise(name):
    "A network that says pictures, a little wrong: begun at t = 0, its error would count 1/sigma(0) times; begun where sigma is 0.1, it stays an error."
    ring, schedule = ring_prior(), noise_schedule("squaredcos_cap_v2", prediction_type="sample")
    exact, wrong = (kind(ring.means, 0.1, ring.weights, schedule=schedule) for kind in (MixturePrior, Blurred))
    first = inversion_start(wrong)
    assert wrong.alpha_sigma(torch.tensor([first - 1, first]))[1].tolist() == pytest.approx([0.1, 0.1], abs=0.002)
    assert inversion_start(ring) == 0
    x, t, noise = request(exact)
    def found(prior, first):
        more = dict(eta=0.) if name == "sdi" else {}
        return OBJECTIVES[name](prior, x, t, prior.condition([0, 3]), noise, uncond=prior.condition([-1, -1]), first=first, weight="uniform", **more)[0]
    def harm(first): return float((found(wrong, first) - found(exact, first)).norm())
    assert harm(0) > 5*harm(None)


def test_the_noise_of_sdi_comes_from_its_generator():
    ring = ring_prior()
    x, t, noise = request(ring)
    given = dict(cond=ring.condition([0, 3]), noise=noise, uncond=ring.condition([-1, -1]))
    run = lambda seed: sdi(ring, x, t, generator=torch.Generator().manual_seed(seed), **given)[0]
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_ism_at_interval_zero_is_guidance_alone():
    "s = t: the baseline is the unconditional prediction at the same place."
    ring = ring_prior()
    x, t, noise = request(ring)
    given = dict(uncond=ring.condition([-1, -1]))
    gradient, seen = ism(ring, x, t, ring.condition([0, 3]), noise, interval=0, guidance_scale=7.5, weight="uniform", **given)
    assert float(seen["cosine_csd"].min()) > 1 - 1e-9


# ---- one call of the network, nothing differentiated


class Counting(Prior):
    def __init__(self, inner): self.inner, self.schedule, self.shape, self.calls, self.samples = inner, inner.schedule, inner.shape, 0, 0
    def output(self, x_t, t, cond):
        assert not torch.is_grad_enabled()
        self.calls, self.samples = self.calls + 1, self.samples + len(x_t)
        return self.inner.output(x_t, t, cond)


@pytest.mark.parametrize("name, calls, questions, with_negatives", [("sds", 1, 2, 4), ("sjc", 1, 2, 4), ("csd", 1, 2, 4), ("asd", 1, 3, 5)])
def test_all_questions_are_one_call(worlds, name, calls, questions, with_negatives):
    prior, cond, uncond, *unwanted = worlds["mixture-epsilon"]
    x, t, noise = request(prior)
    extra = dict(delta_t=torch.tensor([3, 4])) if name == "asd" else {}
    for negatives, expected in ((None, questions), (Negatives(tuple(unwanted), -torch.ones(2, 2)), with_negatives)):
        counted = Counting(prior)
        with torch.enable_grad():
            gradient, seen = OBJECTIVES[name](counted, x.requires_grad_(), t, cond, noise, uncond=uncond, negatives=negatives, **extra)
        assert (counted.calls, counted.samples, seen["calls"]) == (calls, expected*2, expected) and not gradient.requires_grad


@pytest.mark.parametrize("name", ("vsd", "ism", "sdi"))
def test_what_the_others_cost_is_reported(worlds, name):
    prior, cond, uncond, *_ = worlds["mixture-epsilon"]
    x, t, noise = request(prior)
    counted = Counting(prior)
    _, seen = OBJECTIVES[name](counted, x, t, cond, noise, uncond=uncond, **(dict(phi=counted) if name == "vsd" else {}))
    assert counted.samples == seen["calls"]*2


# ---- batches


@pytest.mark.parametrize("world", ("unet-epsilon", "mixture-epsilon"))
@pytest.mark.parametrize("name", ("sds", "csd", "vsd", "asd", "ism", "sdi"))
def test_a_batch_is_its_samples_one_by_one(worlds, world, name):
    prior, cond, uncond, *unwanted = worlds[world]
    x, t, noise = request(prior, 3)
    weights, delta_t = torch.tensor([[-0.5, -1.], [-2., -0.1]]), torch.tensor([5, 40])
    def ask(rows):
        of = lambda condition: take_condition(condition, rows)
        extra = {"vsd": dict(phi=prior), "asd": dict(delta_t=delta_t[rows]), "sdi": dict(eta=0.)}.get(name, {})
        negatives = Negatives(tuple(of(condition) for condition in unwanted), weights[rows])
        return OBJECTIVES[name](prior, x[rows], t[rows], of(cond), noise[rows], uncond=of(uncond), negatives=negatives, **extra)[0]
    both = ask([0, 1])
    near(both[:1], ask([0]), both)
    near(both[1:], ask([1]), both)
    near(ask([1, 0]).flip(0), both, both)


def test_interleaved_negatives_would_be_seen():
    "What others do (negatives b0n0, b0n1, b1n0, b1n1 against pictures b0, b1, b0, b1) differs from batches of one, so the test above can fail."
    ring = ring_prior()
    x, t, noise = request(ring, 3)
    cond, uncond = ring.condition([0, 3]), ring.condition([-1, -1])
    right = Negatives((ring.condition([1, 2]), ring.condition([4, 0])), torch.full((2, 2), -1.))
    mixed = Negatives((ring.condition([1, 4]), ring.condition([2, 0])), torch.full((2, 2), -1.))
    a, b = (sds(ring, x, t, cond, noise, uncond=uncond, negatives=negatives, guidance_scale=7.5)[0] for negatives in (right, mixed))
    assert (a - b).norm() > 0.05*a.norm()


def test_perp_neg_by_hand():
    "eps_u + w (d + sum_i lambda_i (d_i - <d_i,d>/|d|^2 d)), one sample at a time."
    ring = ring_prior()
    x, t, noise = request(ring, 5)
    cond, uncond, *unwanted = (ring.condition(prompts) for prompts in ([0, 3], [-1, -1], [1, 2], [4, 4]))
    weights = torch.tensor([[-0.5, -1.], [-2., 0.]])
    found, _ = sds(ring, x, t, cond, noise, uncond=uncond, guidance_scale=7.5, weight="uniform", negatives=Negatives(tuple(unwanted), weights))
    x_t = add_noise(ring, x, t, noise)
    said = [ring.eps(x_t, t, condition) for condition in (cond, uncond, *unwanted)]
    for row in range(2):
        c, u, *n = (part[row] for part in said)
        d, total = c - u, c - u
        for weight, unwanted_part in zip(weights[row], n):
            away = unwanted_part - u
            total = total + weight*(away - (away @ d)/(d @ d)*d)
        torch.testing.assert_close(found[row], u + 7.5*total - noise[row], rtol=1e-9, atol=1e-9)


def test_perpendicular_is_taken_picture_by_picture():
    vectors, directions = torch.randn(2, 3, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    left = perpendicular(vectors, directions)
    assert float((left*directions).sum((-3, -2, -1)).abs().max()) < 1e-4
    torch.testing.assert_close(left[1:, 2:3], perpendicular(vectors[1:, 2:3], directions[1:, 2:3]))
    assert torch.equal(perpendicular(vectors, torch.zeros_like(vectors)), vectors)


def test_views_are_continuous_and_symmetric():
    azimuth = torch.linspace(-180, 180, 721)
    shares, which, weights = view_weights(azimuth, torch.zeros(721), strength=1.)
    assert float(shares.diff(dim=0).abs().max()) < 0.01
    torch.testing.assert_close(shares, shares.flip(0))
    front = (weights*(which == 0)).sum(1)
    assert float(front.diff().abs().max()) < 0.03 and float(front.max()) <= 0.001
    torch.testing.assert_close(view_weights(azimuth + 360, torch.zeros(721))[0], view_weights(azimuth, torch.zeros(721))[0], atol=1e-4, rtol=0)
    r = 1 - 30/90                                                     # threestudio's constants at azimuth 30, from front and from side
    _, _, at = view_weights(torch.tensor([30.]), torch.zeros(1), strength=1.)
    assert at[0].tolist() == pytest.approx([-(4*math.exp(-0.5*r) - 2.426), -(4*math.exp(-0.5*(1 - r)) - 2.426)], abs=1e-5)


def test_view_conditions_mix_numbers_and_choose_words(worlds):
    views = {view: {"text": torch.full((3, 2), float(i)), "mask": torch.full((3, 2), i)} for i, view in enumerate(objectives.VIEWS)}
    cond, negatives = view_conditions(views, torch.tensor([0., 45., 180.]), torch.tensor([0., 0., 80.]))
    assert cond["text"][:, 0].tolist() == pytest.approx([0., 0.5, 3.]) and cond["mask"][:, 0].tolist()[::2] == [0, 3]
    assert negatives.weights.shape == (3, 2) and negatives.weights[2].tolist() == [0, 0]
    assert [int(condition["mask"][0, 0]) for condition in negatives.conditions] == [0, 1]


# ---- ASD's defaults, and the traps around them


def test_asd_defaults_are_the_papers():
    recipe = Recipe()
    assert (recipe.objective, recipe.guidance_scale, recipe.normaliser, recipe.one_t) == ("asd", 7.5, "none", False)
    assert recipe.delta_t == DeltaT(eta=0.1, random=True, rule="above_min")
    assert recipe.window == Window((0.5, 0.02), (0.98, 0.5), (0., 1.))
    assert ANNEALED(0., 1000) == (500, 980) and ANNEALED(1., 1000) == (20, 500) and ANNEALED(0.5, 1000) == (260, 740)


def test_the_window_includes_both_ends():
    t = draw_t(20_000, (20, 24), torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=26)
    assert counts[:20].sum() == 0 and counts[25] == 0 and (counts[20:25] - 4000).abs().max() < 4*4000**0.5


def test_delta_t_goes_from_the_annealed_lower_end():
    rule, t = DeltaT(random=False), torch.full((1,), 600)
    assert int(rule(t, 500, 1000, None)) == 10 and int(rule(t, 20, 1000, None)) == 58
    assert int(rule(t, 700, 1000, None)) == 0                          # never to earlier timesteps


def test_delta_t_stays_inside_the_model():
    t = torch.arange(1000)
    for rule in ("above_min", "t", "to_end"):
        for random in (True, False):
            delta = DeltaT(1., random, rule)(t, 20, 1000, torch.Generator().manual_seed(0))
            later = t + delta
            assert int(later.min()) >= 1 and int(later.max()) <= 999 and int(delta.min()) >= 0
    assert int(DeltaT(random=False)(torch.tensor([980]), 20, 1000, None)) == 19     # 96, clamped by 999 - 980


def test_random_delta_is_the_floor_of_an_even_draw():
    "P(delta = k) = 1/m for k < floor(m); a rounded draw would give 0 half as often."
    delta = DeltaT()(torch.full((60_000,), 520), 20, 1000, torch.Generator().manual_seed(0))      # m = 50
    counts = torch.bincount(delta, minlength=51)
    assert counts[50] == 0 and (counts[:50] - 1200).abs().max() < 5*1200**0.5


def test_asd_shares_noise_has_no_guidance_later_and_weighs_at_t():
    ring = ring_prior()
    x, t, noise = request(ring, 7)
    cond, uncond, delta_t = ring.condition([0, 3]), ring.condition([-1, -1]), torch.tensor([11, 29])
    found, seen = asd(ring, x, t, cond, noise, delta_t=delta_t, uncond=uncond)
    now, later = add_noise(ring, x, t, noise), add_noise(ring, x, t + delta_t, noise)
    c, u, after = ring.eps(now, t, cond), ring.eps(now, t, uncond), ring.eps(later, t + delta_t, cond)
    weight = 1 - ring.schedule.alphas[t]**2
    torch.testing.assert_close(found, weight[:, None]*(u + 7.5*(c - u) - after), rtol=1e-5, atol=1e-6)
    alpha, sigma = ring.schedule.alphas[t + delta_t][:, None], ring.schedule.sigmas[t + delta_t][:, None]
    torch.testing.assert_close(seen["x0_later"], (later - sigma*after)/alpha, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["x0"], (now - ring.schedule.sigmas[t][:, None]*(u + 7.5*(c - u)))/ring.schedule.alphas[t][:, None],
                               rtol=1e-4, atol=1e-4)


def test_one_t_for_the_whole_batch():
    ring = ring_prior()
    _, seen = distill(ring, torch.zeros(6, 2), ring.condition([0]*6), RECIPES["asd_multiview"], torch.Generator().manual_seed(1),
                      uncond=ring.condition([-1]*6))
    assert len(seen["t"].unique()) == 1 and len(seen["delta_t"].unique()) == 1
    _, seen = distill(ring, torch.zeros(6, 2), ring.condition([0]*6), Recipe(), torch.Generator().manual_seed(1), uncond=ring.condition([-1]*6))
    assert len(seen["t"].unique()) > 1


@pytest.mark.parametrize("name", [*RECIPES])
def test_recipes_repeat_bit_for_bit_and_do_not_look_at_the_graph(worlds, name):
    prior, cond, uncond, *_ = worlds["unet-epsilon"]
    x = torch.randn(2, *prior.shape, requires_grad=True)
    more = dict(phi=prior) if name == "vsd" else {}
    runs = [distill(prior, x, cond, RECIPES[name], torch.Generator().manual_seed(0), progress=0.7, uncond=uncond, **more)[0] for _ in range(2)]
    assert torch.equal(*runs) and not runs[0].requires_grad and x.grad is None


def test_windows():
    assert FIXED(0.3, 1000) == (20, 980) and LOWERED(0.19, 1000) == (20, 980) and LOWERED(0.2, 1000) == (20, 500)
    assert [falling(progress, 1000) for progress in (0., 0.5, 1.)] == [(980, 980), (500, 500), (20, 20)]
    assert ANNEALED(0.5, 100) == (26, 74)


# ---- the gradient's way


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_push_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (10*torch.randn(4, 3, 5, generator=generator)).to(dtype).requires_grad_()
    gradient = (1e-3*torch.randn(4, 3, 5, generator=generator)).to(dtype)
    loss = push(x, gradient)
    loss.backward()
    torch.testing.assert_close(x.grad, gradient/4, rtol=0, atol=0)


def test_push_goes_through_what_drew_x():
    weights = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    inputs, gradient = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    push(inputs @ weights, gradient).backward()
    torch.testing.assert_close(weights.grad, inputs.T @ gradient/7)


def test_normalisers():
    ring = ring_prior()
    x, t, noise = request(ring)
    asked = (ring, x, t, ring.condition([0, 3]), noise)
    raw, seen = sds(*asked, uncond=ring.condition([-1, -1]))
    assert torch.equal(NORMALISERS["none"](raw, x, seen), raw)
    assert float(NORMALISERS["global"](raw, x, seen).norm()) == pytest.approx(1)
    torch.testing.assert_close(NORMALISERS["unit"](raw, x, seen).square().mean(1), torch.ones(2, dtype=torch.float64))
    by_hand = raw/((x - seen["x0"]).abs().mean(1, keepdim=True) + 0.1)
    torch.testing.assert_close(NORMALISERS["dmd"](raw, x, seen), by_hand)
    found, _ = distill(ring, x, asked[3], Recipe("sds", normaliser="global"), torch.Generator().manual_seed(0), uncond=ring.condition([-1, -1]))
    assert float(found.norm()) == pytest.approx(1)


def test_diagnostics_agree_with_what_they_name():
    ring = ring_prior()
    x, t, noise = request(ring)
    cond, uncond = ring.condition([0, 3]), ring.condition([-1, -1])
    gradient, seen = asd(ring, x, t, cond, noise, uncond=uncond, delta_t=torch.tensor([20, 5]), guidance_scale=3.)
    for other, name in ((sds(ring, x, t, cond, noise, uncond=uncond, guidance_scale=3.)[0], "cosine_sds"),
                        (csd(ring, x, t, cond, noise, uncond=uncond)[0], "cosine_csd")):
        torch.testing.assert_close(seen[name], F.cosine_similarity(gradient, other), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen["gradient_norm"], gradient.norm(dim=1))
    assert guidance_ratio(gradient, gradient/20) == pytest.approx(20)
    assert "cosine_csd" not in asd(ring, x, t, cond, noise, delta_t=torch.zeros_like(t), guidance_scale=1.)[1]


def test_sjc_without_variance_reduction_agrees_on_average():
    ring, N = ring_prior(), 20_000
    x, t = torch.tensor([[0.4, -0.2]], dtype=torch.float64).expand(N, 2), torch.full((N,), 400)
    noise = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = [sjc(ring, x, t, ring.condition([0]*N), noise, guidance_scale=1., variance_reduction=reduce)[0] for reduce in (True, False)]
    error = (runs[0] - runs[1]).std(0)/N**0.5
    assert ((runs[0].mean(0) - runs[1].mean(0)).abs() < 4*error).all()
    assert (runs[0].std(0) < runs[1].std(0)).all()                                  # that is what it is for


def test_csd_moves_from_no_prompt_to_a_negative_one():
    ring = ring_prior()
    x, t, noise = request(ring)
    cond, uncond, negative = ring.condition([0, 3]), ring.condition([-1, -1]), ring.condition([1, 1])
    x_t = add_noise(ring, x, t, noise)
    for share in (0., 0.3, 1.):
        found, _ = csd(ring, x, t, cond, noise, uncond=uncond, negative=negative, negative_share=share)
        expected = ring.eps(x_t, t, cond) - (1 - share)*ring.eps(x_t, t, uncond) - share*ring.eps(x_t, t, negative)
        torch.testing.assert_close(found, expected)


# ---- several views


def test_views_of_an_object_are_one_sample(tmp_path):
    from zerolab.scene.cameras import orbit
    prior = load_prior(save_random_checkpoint(tmp_path, "views"))
    cameras = orbit([0, 90, 180, 270], size=(8, 8))
    cond, uncond = prior.condition(["a red cube", "a ball"], cameras), prior.condition(["", ""], cameras)
    x, t, noise = request(prior)
    gradient, seen = asd(prior, x, t, cond, noise, uncond=uncond, delta_t=torch.tensor([1, 9]), negatives=Negatives((uncond,), -torch.ones(2, 1)))
    assert gradient.shape == (2, 4, 4, 8, 8) and seen["t"].shape == seen["gradient_norm"].shape == (2,)


# ---- bad input


REFUSED = {
    "no uncond": (dict(uncond=None), r"prior.condition\(\[''\]\*2\)"),
    "unknown weight": (dict(weight="sd"), "unknown weight 'sd'"),
    "noise of another batch": (dict(noise=torch.zeros(3, 2)), "torch.randn_like"),
    "x of another width": (dict(x=torch.zeros(2, 3), noise=torch.zeros(2, 3)), r"need \[B,2\]"),
    "t for one": (dict(t=torch.tensor([5])), "one a sample"),
    "t with a fraction": (dict(t=torch.tensor([5., 6.])), "whole numbers"),
    "t too late": (dict(t=torch.tensor([5, 1000])), "the model knows 0 to 999"),
    "negative t": (dict(t=torch.tensor([5, -1])), "the model knows 0 to 999"),
    "condition of another batch": (dict(cond={"prompt": torch.zeros(3, dtype=torch.long)}), "take_condition"),
    "uncond of another batch": (dict(uncond={"prompt": torch.zeros(1, dtype=torch.long)}), "take_condition"),
    "negatives of another batch": (dict(negatives=Negatives(({"prompt": torch.zeros(1, dtype=torch.long)},), torch.zeros(2, 1))), "take_condition"),
    "weights of other negatives": (dict(negatives=Negatives((), torch.zeros(2, 1))), r"need \[2,0\]"),
}


@pytest.mark.parametrize("changes, says", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ("sds", "csd", "asd", "ism", "sdi"))
def test_bad_input_is_refused(name, changes, says):
    ring = ring_prior()
    x, t, noise = request(ring)
    given = dict(x=x, t=t, cond=ring.condition([0, 3]), noise=noise, uncond=ring.condition([-1, -1])) | changes
    if name == "asd": given["delta_t"] = torch.zeros_like(t)
    with pytest.raises(ValueError, match=says): OBJECTIVES[name](ring, **given)
