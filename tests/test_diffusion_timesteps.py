"""Timestep policies: Bootstrap3D's numbers, exact marginals against brute force and against draws, every schedule, and the closed form of TTR."""
import math
from dataclasses import replace

import pytest
import torch

from zerolab.diffusion.analytic import SpectrumPrior, blur_transfer, measured_power, natural_spectrum, radial_frequency
from zerolab.diffusion.priors import NoiseSchedule, Prior, ddim_sample, noise_schedule, schedule_of, training_target
from zerolab.diffusion.timesteps import (TimestepPolicy, cell_edges, density_of, even_like, even_over_t, high_frequency_ratio, log_normal, log_ratios,
                                         logit_normal, min_snr_weighting, power_ratio, ratio_at, supplements, surviving_share, t_at, ttr, uniform)

NAMES = ("linear", "scaled_linear", "squaredcos_cap_v2", "flow")


def generator(seed=0): return torch.Generator().manual_seed(seed)


# ---- the axis


@pytest.mark.parametrize("name", NAMES)
def test_t_and_noise_are_each_others_inverse(name):
    schedule = noise_schedule(name)
    assert [t_at(schedule, ratio_at(schedule, t)) for t in range(1001)] == list(range(1001))
    edges, logs = cell_edges(schedule), log_ratios(schedule)
    assert (edges.diff() > 0).all() and (edges[:-1] < logs).all() and (logs < edges[1:]).all() and edges.isfinite().all()


def test_reference_numbers_of_the_schedules():
    "Signal-to-noise 32, 1.9 and 0.24 at t = 50, 200, 400 of the linear schedule, 3.1 at 200 of the scaled linear one; cosine's 394 is linear's 200."
    linear, scaled, cosine = (noise_schedule(name) for name in NAMES[:3])
    kept = (linear.alphas**2)[[50, 200, 400]]
    assert [round(float(value), 3) for value in kept] == [0.970, 0.656, 0.194]
    snr = linear.log_snr.exp()
    assert round(float(snr[50])) == 32 and round(float(snr[200]), 1) == 1.9 and round(float(snr[400]), 2) == 0.24
    assert round(float(scaled.log_snr[200].exp()), 1) == 3.1
    share = torch.cos(torch.tensor((0.2 + 0.008)/1.008*math.pi/2, dtype=torch.float64))**2/math.cos(0.008/1.008*math.pi/2)**2
    assert round(float(share/(1 - share)), 1) == 8.9                      # the paper's formula at t/T = 0.2; diffusers' index is one less
    assert t_at(cosine, ratio_at(linear, 200)) + 1 == 394


def test_a_schedule_from_diffusers_has_the_same_thresholds_as_ours():
    "diffusers keeps its table in single precision; thresholds lie between timesteps, so no timestep changes sides."
    import diffusers
    ours, theirs = noise_schedule("linear"), schedule_of(diffusers.DDPMScheduler())
    one, two = ttr(), ttr(schedule=theirs)
    for source in one.sources: assert one.t_range(one.intervals([source])) == two.t_range(two.intervals([source]))
    torch.testing.assert_close(two.density, even_over_t(ours), atol=2e-5, rtol=0)


# ---- TTR


def test_the_supplements_of_bootstrap3d():
    "0.1875 and 0.0526 of its training code, and other thresholds by the formula."
    assert [round(value, 4) for value in supplements(ttr()).values()] == [0.1875, 0.0526]
    for low, mid in ((0, 200), (50, 50), (100, 400), (7, 693)):
        found = supplements(ttr(low, mid))
        assert found.get("mid", 0) == pytest.approx((mid - low)/(1000 - mid), abs=1e-9)
        assert found.get("photo", 0) == pytest.approx(low/(1000 - low), abs=1e-9)
        assert set(found) == {name for name, there in (("mid", low < mid), ("photo", low > 0)) if there}


def test_the_marginal_is_flat_with_supplements():
    policy = ttr(80, 310)
    ratio = supplements(policy)
    mass = policy.marginal(policy.intervals(["synthetic", "mid"]), torch.tensor([1., ratio["mid"]], dtype=torch.float64))
    torch.testing.assert_close(mass[80:], mass[80:].mean().expand(920), atol=1e-12, rtol=1e-9)
    assert (mass[:80] == 0).all()


def brute_force(policy, intervals, amounts):
    "The marginal, one timestep at a time."
    ratios, total = (policy.schedule.sigmas/policy.schedule.alphas).tolist(), [0.]*policy.schedule.T
    for (low, high), amount in zip(intervals.tolist(), amounts.tolist()):
        inside = [t for t in range(policy.schedule.T) if low <= ratios[t] < high]
        mass = sum(float(policy.density[t]) for t in inside)
        for t in inside: total[t] += amount*float(policy.density[t])/mass
    return torch.tensor(total, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_marginal_equals_brute_force_and_draws(name):
    schedule = noise_schedule(name)
    policy = TimestepPolicy(schedule, density_of(schedule, log_normal(0., 0.8)), torch.ones(1000), {})
    rng = generator(1)
    low = torch.rand(40, generator=rng, dtype=torch.float64)
    intervals = torch.stack([low, low + 0.3 + torch.rand(40, generator=rng, dtype=torch.float64)], -1)
    intervals[0, 0], intervals[1, 1] = 0, math.inf
    amounts = torch.rand(40, generator=rng, dtype=torch.float64)
    exact = policy.marginal(intervals, amounts)
    torch.testing.assert_close(exact, brute_force(policy, intervals, amounts), atol=1e-12, rtol=1e-9)
    t, _ = policy.sample(rng, intervals.repeat(3000, 1))
    expected = policy.marginal(intervals, torch.full((40,), 3000.))
    counts = torch.bincount(t, minlength=1000).double()
    assert (counts[expected == 0] == 0).all()
    seen = expected > 5
    assert float(((counts - expected)[seen]**2/expected[seen]).sum()) < int(seen.sum()) + 4*math.sqrt(2*int(seen.sum()))


@pytest.mark.parametrize("name", NAMES)
def test_every_draw_is_inside_its_interval(name):
    policy = ttr(schedule=noise_schedule(name))
    names = ["real", "synthetic", "mid", "photo"]*2000
    t, weight = policy.sample(generator(), policy.intervals(names))
    ratio = log_ratios(policy.schedule).exp()[t]
    for source, (low, high) in policy.sources.items():
        own = ratio[torch.tensor([name == source for name in names])]
        assert (own >= low).all() and (own < high).all()
    assert t.dtype == torch.int64 and (weight == 1).all()


def test_draws_are_the_same_for_the_same_seed_and_for_any_split_of_a_batch():
    policy, intervals = ttr(), ttr().intervals(["synthetic", "mid"]*50)
    one = policy.sample(generator(3), intervals)[0]
    rng = generator(3)
    two = torch.cat([policy.sample(rng, part)[0] for part in intervals.split(10)])
    assert torch.equal(one, two)


def cumulative(policy, source, points):
    "The share of draws of a source with log SNR below some points, of all inside (-5, 6)."
    log_snr, mass = -2*log_ratios(policy.schedule), policy.marginal(policy.intervals([source]), torch.ones(1))
    mass = torch.where((log_snr > -5) & (log_snr < 6), mass, 0.)
    return torch.stack([mass[log_snr < point].sum() for point in points])/mass.sum(), float(mass.max()/mass.sum())


@pytest.mark.parametrize("low, mid", [(50, 200), (100, 400), (150, 300)])
@pytest.mark.parametrize("name", NAMES[1:])
def test_equal_noise_gives_equal_marginals_under_every_schedule(name, low, mid):
    "The claim that TTR is a rule about noise: the marginal over log SNR of each source does not know which schedule counts it."
    points = torch.linspace(-5, 6, 45, dtype=torch.float64)
    here, there = ttr(low, mid), ttr(low, mid, schedule=noise_schedule(name))
    for source in here.sources:
        (one, cell), (two, own_cell) = cumulative(here, source, points), cumulative(there, source, points)
        assert (one - two).abs().max() < 1.5*(cell + own_cell)
    even = replace(there, density=even_over_t(there.schedule))              # the usual way fails the same test
    (one, cell), (two, own_cell) = cumulative(here, "synthetic", points), cumulative(even, "synthetic", points)
    assert (one - two).abs().max() > 1.5*(cell + own_cell)


def test_supplements_do_not_depend_on_the_schedule_where_it_has_all_the_noise():
    for name in ("squaredcos_cap_v2", "flow"):
        found = supplements(ttr(schedule=noise_schedule(name)))
        assert found["mid"] == pytest.approx(0.1875, abs=5e-4) and found["photo"] == pytest.approx(0.0526, abs=5e-4)


def test_thresholds_may_be_meant_on_another_schedule():
    cosine = noise_schedule("squaredcos_cap_v2")
    policy = ttr(100, 394, schedule=cosine, reference=cosine)
    torch.testing.assert_close(policy.density, even_over_t(cosine), atol=1e-9, rtol=0)
    assert [int(edge) for edge in policy.t_range(policy.intervals(["mid"])[0])] == [100, 394]


def test_narrow_intervals_get_the_next_noisier_timestep():
    policy = uniform()
    ratio = log_ratios(policy.schedule).exp()
    between = torch.tensor([[float(ratio[300]) + 1e-6, float(ratio[301]) - 1e-6], [0., 1e-9]], dtype=torch.float64)
    assert policy.sample(generator(), between)[0].tolist() == [301, 0]
    with pytest.raises(ValueError, match="begins at sigma/alpha = 200, the schedule ends at 157"): policy.mass(torch.tensor([200., math.inf]))
    last = torch.tensor([[1e9, math.inf]])                                # flow matching ends at pure noise, which is enough for anything
    assert uniform(noise_schedule("flow")).sample(generator(), last)[0].tolist() == [999]


# ---- densities and weights


def test_even_like_is_even_on_its_own_schedule_and_a_pushforward_elsewhere():
    for name in NAMES:
        schedule = noise_schedule(name)
        torch.testing.assert_close(density_of(schedule, even_like(schedule)), even_over_t(schedule), atol=1e-12, rtol=1e-9)
    linear, cosine = noise_schedule("linear"), noise_schedule("squaredcos_cap_v2")
    expected = torch.searchsorted(cell_edges(cosine), log_ratios(linear)) - 1   # where each of linear's timesteps falls
    counts = torch.bincount(expected.clamp(0, 999), minlength=1000)/1000
    density = density_of(cosine, even_like(linear))
    assert (density.cumsum(0) - counts.cumsum(0)).abs().max() < 2e-3


@pytest.mark.parametrize("mean, std", [(0., 1.), (0.5, 0.6), (-1., 1.5)])
def test_log_normal_is_the_logit_normal_of_diffusers(mean, std):
    from diffusers.training_utils import compute_density_for_timestep_sampling
    times = compute_density_for_timestep_sampling("logit_normal", 400_000, logit_mean=mean, logit_std=std, generator=generator())
    counts = torch.histc(times.double(), 50, 0.0005, 1.0005)/400_000
    density = logit_normal(mean=mean, std=std).density
    assert (density.reshape(50, 20).sum(1) - counts).abs().max() < 3e-3


def test_logit_normal_is_for_any_schedule():
    "Half of the draws have less noise than exp(mean), with the variance-preserving schedule as well."
    policy = logit_normal(noise_schedule("squaredcos_cap_v2"), mean=-0.4, std=0.7)
    assert float(policy.mass(torch.tensor([0., math.exp(-0.4)]))) == pytest.approx(0.5, abs=3e-3)


@pytest.mark.parametrize("name, kind", [("linear", "epsilon"), ("linear", "v_prediction"), ("linear", "sample"), ("flow", "flow_prediction")])
def test_min_snr_weighs_the_picture_alike_whatever_the_network_says(name, kind):
    "An error of the picture, translated into the output by differentiating the training target, costs min(SNR, gamma) times its square."
    schedule = noise_schedule(name, prediction_type=kind)
    for t in (3, 100, 500, 900):
        alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
        x_t = torch.tensor(0.7, dtype=torch.float64)

        def said(x0): return training_target(x0, (x_t - alpha*x0)/sigma, alpha, sigma, kind)
        slope = torch.func.jacrev(said)(torch.tensor(0.2, dtype=torch.float64))
        expected = min(float((alpha/sigma)**2), 5.)
        assert float(min_snr_weighting(schedule, 5.)[t]*slope**2) == pytest.approx(expected, rel=1e-6)


def test_weights_come_with_the_draws():
    policy = ttr(gamma=5.)
    t, weight = policy.sample(generator(), policy.intervals(["real"]*100))
    torch.testing.assert_close(weight, min_snr_weighting(policy.schedule, 5.)[t].float())
    assert weight.dtype == torch.float32 and uniform(gamma=2.).weighting.max() <= 2


def test_zero_terminal_snr_has_finite_weights_and_edges():
    schedule = noise_schedule("flow")
    assert schedule.alphas[-1] == 0
    policy = ttr(schedule=schedule, gamma=5.)
    assert policy.weighting.isfinite().all() and policy.density.isfinite().all() and float(policy.density.sum()) == pytest.approx(1)


# ---- the closed form


def spectra(size=16, blur=1.1):
    real = natural_spectrum(size)
    return real*blur_transfer(size, blur)**2, real, radial_frequency(size)


def test_table_of_high_frequency_ratios():
    "Signal-to-noise at t itself, as the table was made."
    synthetic, real, frequency = spectra()
    snr = noise_schedule("linear").log_snr.exp()
    found = [high_frequency_ratio(math.inf, synthetic, real, frequency)]
    found += [high_frequency_ratio(float(snr[t]), synthetic, real, frequency) for t in (50, 100, 150, 200, 300, 400, 600)]
    assert [round(value, 2) for value in found] == [0.02, 0.24, 0.51, 0.69, 0.81, 0.92, 0.97, 1.0]


class Switched(Prior):
    def __init__(self, noisy, clean, threshold):
        self.noisy, self.clean, self.threshold, self.shape, self.schedule = noisy, clean, threshold, clean.shape, clean.schedule

    def condition(self, prompts, cameras=None): return self.clean.condition(prompts)

    def output(self, x_t, t, cond): return (self.noisy if int(t[0]) >= self.threshold else self.clean).output(x_t, t, cond)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_closed_form_against_ddim_per_mode(name):
    "Every mode is only scaled by DDIM, so one picture shows all gains, and they converge to the closed form with the number of steps."
    schedule = noise_schedule(name)
    synthetic, real, frequency = spectra()
    threshold = t_at(schedule, ratio_at(noise_schedule("linear"), 200))
    prior = Switched(SpectrumPrior(synthetic, schedule=schedule), SpectrumPrior(real, schedule=schedule), threshold)
    start = torch.randn(1, 1, 16, 16, generator=generator(), dtype=torch.float64)
    made = ddim_sample(prior, start, prior.condition([""]), timesteps=range(998, -1, -1))
    gain = measured_power(made)/measured_power(start)/real
    expected = power_ratio(ratio_at(schedule, threshold)**-2, synthetic, real)
    high = frequency > 0.2
    ratio = float((gain*real)[high].sum()/real[high].sum())
    assert ratio == pytest.approx(0.805, abs=0.015)
    if name == "linear": assert ratio == pytest.approx(0.799, abs=2e-3)
    low = frequency < 0.2
    assert (gain[low] - expected[low]).abs().max() < 0.02


def test_what_survives_does_not_depend_on_the_defect():
    _, real, _ = spectra()
    for factor in (0., 0.3, 2., 50.):
        for snr in (0.1, 2., 30.):
            left = power_ratio(snr, factor*real, real) - 1
            torch.testing.assert_close(left, (factor - 1)*surviving_share(snr, real), atol=1e-12, rtol=1e-9)


def test_disagreement_where_real_data_have_no_power_is_removed_at_any_threshold():
    share = surviving_share(1e3, torch.tensor([1e-6, 1.], dtype=torch.float64))
    assert share[0] < 1e-2 and share[1] > 0.99


# ---- bad input


def test_bad_input():
    schedule, policy = noise_schedule("linear"), ttr()
    for call, message in (
        (lambda: ttr(200, 50), "low is 200 and mid is 50"), (lambda: ttr(-1, 50), "low is -1"), (lambda: ttr(0, 1000), "mid < 1000"),
        (lambda: policy.intervals(["web"]), "unknown source 'web', this policy has real, synthetic, mid, photo"),
        (lambda: policy.sample(generator(), torch.tensor([[2., 1.]])), "0 <= min < max"),
        (lambda: policy.sample(generator(), torch.tensor([[-1., 1.]])), "0 <= min < max"),
        (lambda: policy.sample(generator(), torch.tensor([[math.nan, 1.]])), "0 <= min < max"),
        (lambda: policy.marginal(torch.ones(2, 3), torch.ones(2)), "intervals [2, 3]"),
        (lambda: min_snr_weighting(schedule, -1), "gamma is -1"), (lambda: ratio_at(schedule, -0.5), "t is -0.5"),
        (lambda: density_of(schedule, log_normal(50., 0.1)), "no noise level in common"),
        (lambda: NoiseSchedule(schedule.alphas, schedule.sigmas, "noise"), "unknown prediction type")):
        with pytest.raises(ValueError) as error: call()
        assert message in str(error.value) and "\n" not in str(error.value)
