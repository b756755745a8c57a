"""Priors: conversions, exactness of the analytic ones, and checkpoints against diffusers' own pipelines and a second MVDream."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from zerolab.diffusion.analytic import MixturePrior, SpectrumPrior, gaussian_prior, natural_spectrum, ring_prior
from zerolab.diffusion.hub import KNOWN, CheckpointPrior, find_weights, load_prior, save_random_checkpoint
from zerolab.diffusion.priors import (PREDICTION_TYPES, NoiseSchedule, Prior, cat_conditions, check_inputs, check_prediction_type, ddim_sample,
                                      even_timesteps, guide, guided_eps, noise_schedule, per_sample, schedule_of, take_condition, to_eps, to_x0,
                                      training_target)
from zerolab.diffusion.views import camera_numbers, mvdream_unet, tile_views, untile_views
from zerolab.scene.cameras import orbit

SCHEDULES = [("linear", "epsilon"), ("linear", "v_prediction"), ("scaled_linear", "sample"), ("squaredcos_cap_v2", "v_prediction"),
             ("flow", "flow_prediction")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Tiny random checkpoints of the real classes, by kind."
    home = tmp_path_factory.mktemp("checkpoints")
    return {kind: save_random_checkpoint(home/kind, kind) for kind in ("unet", "pixart", "views")}


def noisy(prior, x0, t, seed=0):
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=x0.dtype)
    alpha, sigma = (per_sample(level, x0) for level in prior.alpha_sigma(t))
    return alpha*x0 + sigma*noise, noise


# ---- conversions


@pytest.mark.parametrize("name, kind", SCHEDULES)
def test_conversions_invert_the_training_target_and_each_other(name, kind):
    schedule = noise_schedule(name, prediction_type=kind)
    x0, noise = torch.randn(2, schedule.T, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha, sigma = schedule.alphas[:, None], schedule.sigmas[:, None]
    x_t = alpha*x0 + sigma*noise
    said = training_target(x0, noise, alpha, sigma, kind)
    torch.testing.assert_close(to_eps(said, x_t, alpha, sigma, kind), noise, atol=1e-8, rtol=0)
    torch.testing.assert_close(to_x0(said, x_t, alpha, sigma, kind), x0, atol=1e-8, rtol=0)
    back = training_target(to_x0(said, x_t, alpha, sigma, kind), to_eps(said, x_t, alpha, sigma, kind), alpha, sigma, kind)
    torch.testing.assert_close(back, said, atol=1e-8, rtol=0)


def test_the_formulas_of_the_papers():
    "eps = alpha v + sigma x_t and x0 = alpha x_t - sigma v; on the straight line eps = x_t + (1 - sigma) v and x0 = x_t - sigma v."
    v, x_t = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = 0.6, 0.8
    assert torch.equal(to_eps(v, x_t, alpha, sigma, "v_prediction"), alpha*v + sigma*x_t)
    assert torch.equal(to_x0(v, x_t, alpha, sigma, "v_prediction"), alpha*x_t - sigma*v)
    assert torch.equal(to_eps(v, x_t, 0.2, sigma, "flow_prediction"), x_t + (1 - sigma)*v)
    assert torch.equal(to_x0(v, x_t, 0.2, sigma, "flow_prediction"), x_t - sigma*v)


@pytest.mark.parametrize("name, kind", [("linear", "v_prediction"), ("flow", "flow_prediction")])
def test_velocities_are_finite_at_pure_noise_and_at_pure_data(name, kind):
    said, x_t = torch.ones(1), torch.full((1,), 2.)
    for alpha, sigma in ((0., 1.), (1., 0.)):
        assert to_eps(said, x_t, alpha, sigma, kind).isfinite() and to_x0(said, x_t, alpha, sigma, kind).isfinite()


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
                                  "UniPCMultistepScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler"])
def test_schedulers_of_diffusers_before_and_after_their_steps_are_set(name):
    import diffusers
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction")
    expected = noise_schedule("scaled_linear", prediction_type="v_prediction")
    for _ in range(2):
        schedule = schedule_of(scheduler)
        assert schedule.prediction_type == "v_prediction" and schedule.T == 1000
        torch.testing.assert_close(schedule.alphas, expected.alphas, atol=1e-5, rtol=0)
        scheduler.set_timesteps(7)


@pytest.mark.parametrize("name, options", [
    ("FlowMatchEulerDiscreteScheduler", dict(shift=3.)), ("FlowMatchHeunDiscreteScheduler", dict(shift=2.)),
    ("DPMSolverMultistepScheduler", dict(use_flow_sigmas=True, flow_shift=3., prediction_type="flow_prediction"))])
def test_flow_schedulers(name, options):
    import diffusers
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(5)
    schedule = schedule_of(scheduler)
    shift = options.get("shift", options.get("flow_shift"))
    assert schedule.prediction_type == "flow_prediction" and schedule.T == 1000
    sigma = torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigmas[399], shift*sigma/(1 + (shift - 1)*sigma))
    torch.testing.assert_close(schedule.timesteps.double(), schedule.sigmas*1000, atol=1e-3, rtol=0)


def test_zero_terminal_snr_is_accepted():
    import diffusers
    schedule = schedule_of(diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert schedule.alphas[-1] < 1e-6 and schedule.log_snr[-1] < -25


@pytest.mark.parametrize("change, message", [
    (lambda s: NoiseSchedule(s.alphas, s.sigmas[:5]), "need [T] each"),
    (lambda s: NoiseSchedule(s.alphas, s.sigmas.flip(0)), "sigmas rising"),
    (lambda s: NoiseSchedule(s.alphas, s.sigmas, "x0"), "unknown prediction type 'x0'"),
    (lambda s: NoiseSchedule(s.alphas, s.sigmas, "flow_prediction"), "alpha + sigma = 1")])
def test_bad_schedules(change, message):
    with pytest.raises(ValueError) as error: change(noise_schedule("linear"))
    assert message in str(error.value)


# ---- guidance and conditions


def test_guidance_is_diffusers_and_so_is_its_rescaling():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    u, c = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = u + 7.5*(c - u)
    torch.testing.assert_close(guide(c, u, 7.5), guided)
    torch.testing.assert_close(guide(c, u, 7.5, rescale=0.7), rescale_noise_cfg(guided, c, 0.7))


def test_guidance_asks_once_and_not_for_what_it_does_not_need():
    prior, calls = ring_prior(), []
    asked = prior.output
    prior.output = lambda x, t, cond: (calls.append(len(x)), asked(x, t, cond))[1]
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([10, 500, 900])
    cond, uncond = prior.condition([0, 1, 2]), prior.condition([-1]*3)
    guided_eps(prior, x, t, cond, uncond, 4.)
    guided_eps(prior, x, t, cond, uncond, 1.)
    assert calls == [6, 3]


def test_conditions_are_joined_and_taken_by_rows():
    one, two = {"text": torch.rand(2, 3, 4), "mask": torch.ones(2, 3)}, {"text": torch.rand(1, 3, 4), "mask": torch.zeros(1, 3)}
    joined = cat_conditions(one, two)
    assert joined["text"].shape == (3, 3, 4) and torch.equal(take_condition(joined, [2])["mask"], two["mask"])
    assert torch.equal(take_condition(joined, [0, 0, 1])["text"], one["text"][[0, 0, 1]])
    with pytest.raises(ValueError, match="different things"): cat_conditions(one, {"text": two["text"]})


# ---- analytic priors


@pytest.mark.parametrize("prompt", [0, 1, -1])
@pytest.mark.parametrize("t", [50, 200, 800])
def test_the_answer_is_the_mean_of_the_noise(prompt, t):
    "Importance sampling at one place: the noise of samples that land there, which no closed form goes into."
    prior, n = ring_prior(2, std=0.3), 200_000
    place, steps = torch.tensor([[-1.2 if prompt == 1 else 1.2, 0.3]], dtype=torch.float64), torch.tensor([t])   # where the prompt has data
    alpha, sigma = (float(level) for level in prior.alpha_sigma(torch.tensor(t)))
    x0 = prior.sample(prior.condition([prompt]*n), torch.Generator().manual_seed(t))
    noise = (place - alpha*x0)/sigma
    weight = torch.exp(-(noise**2).sum(-1)/2)
    mean = (weight[:, None]*noise).sum(0)/weight.sum()
    error = ((weight[:, None]*(noise - mean))**2).sum(0).sqrt()/weight.sum()
    assert ((prior.eps(place, steps, prior.condition([prompt]))[0] - mean).abs() < 4*error + 1e-6).all()


@pytest.mark.parametrize("name, kind", SCHEDULES)
def test_the_answer_does_not_depend_on_how_the_network_says_it(name, kind):
    schedule = noise_schedule(name, prediction_type=kind)
    prior = ring_prior(schedule=schedule)
    x, t = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(0, 1000, 20)
    cond = prior.condition([0, 1, 2, 3, -1]*10)
    inner = x.clone().requires_grad_(True)
    score, = torch.autograd.grad(prior.log_density(inner, t, cond).sum(), inner)
    torch.testing.assert_close(prior.eps(x, t, cond), -per_sample(prior.alpha_sigma(t)[1], x)*score, atol=1e-4, rtol=1e-4)


def test_without_a_prompt_the_model_knows_all_and_the_background():
    prior = MixturePrior(torch.tensor([[[1., 0.]], [[-1., 0.]]], dtype=torch.float64), 0.5, background=(0.25, 0.5, 3.))
    x, t = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.full((20,), 300)
    alone = [prior.log_density(x, t, prior.condition([prompt]*20)).exp() for prompt in (0, 1)]
    wide = gaussian_prior(torch.full((2,), 0.5, dtype=torch.float64), 3.)
    expected = 0.75*(alone[0] + alone[1])/2 + 0.25*wide.log_density(x, t, wide.condition([0]*20)).exp()
    torch.testing.assert_close(prior.log_density(x, t, prior.condition([-1]*20)).exp(), expected, atol=1e-9, rtol=1e-6)


def test_prompts_of_a_batch_do_not_see_each_other():
    prior = ring_prior()
    prompts = [3, -1, 0, 4, -1]
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([1, 10, 100, 500, 999])
    together = prior.eps(x, t, prior.condition(prompts))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(together[row], prior.eps(x[row:row + 1], t[row:row + 1], prior.condition([prompt]))[0])


def test_pure_noise_says_what_the_data_are_without_looking():
    "At alpha = 0 a velocity is x_t minus the mean of the data."
    prior = ring_prior(schedule=noise_schedule("flow"))
    x, t = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([999, 999])
    mean = (prior.weights[:, :, None]*prior.means).sum(1)
    torch.testing.assert_close(prior.output(x, t, prior.condition([1, -1])), x - torch.stack([mean[1], 0.8*mean.mean(0)]))
    pictures = SpectrumPrior(natural_spectrum(4), mean=0.3, schedule=noise_schedule("flow"))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(pictures.output(x, t, pictures.condition(["", ""])), x - 0.3)


@pytest.mark.parametrize("name, kind", SCHEDULES)
def test_the_flow_reaches_one_gaussian(name, kind):
    "Mean and deviation of 4,000 samples, whatever the schedule: within four standard errors and the last step's error."
    mean = torch.tensor([1.5, -0.5], dtype=torch.float64)
    prior = gaussian_prior(mean, 0.6, schedule=noise_schedule(name, prediction_type=kind))
    steps = sorted({round(999*(i/249)**2) for i in range(250)}, reverse=True)
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = (float(level) for level in prior.alpha_sigma(torch.tensor(999)))
    start = alpha*mean + math.sqrt(alpha**2*0.36 + sigma**2)*x               # exactly as noisy data are
    made = ddim_sample(prior, start, prior.condition([0]*4000), timesteps=steps)
    assert ((made.mean(0) - mean).abs() < 4*0.6/4000**0.5 + 5e-3).all()
    assert ((made.std(0)/0.6 - 1).abs() < 4/8000**0.5 + 0.02).all()


def test_ddim_converges_to_the_closed_form_of_the_flow():
    "One Gaussian: the flow scales the distance from the mean by the ratio of deviations. The error falls with the number of steps."
    prior = gaussian_prior(torch.zeros(3, dtype=torch.float64), 0.5, schedule=noise_schedule("linear"))
    x, cond, errors = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), prior.condition([0]*8), []
    alpha, sigma = (level.double() for level in prior.alpha_sigma(torch.tensor([999, 0])))
    deviation = (alpha**2*0.25 + sigma**2).sqrt()
    last = alpha[1]*0.25/(alpha[1]**2*0.25 + sigma[1]**2)                     # the step from t = 0 is the posterior's mean
    exact = x*deviation[1]/deviation[0]*last
    for n in (10, 100, 1000):
        steps = sorted({round(999*i/(n - 1)) for i in range(n)}, reverse=True)
        errors.append(float((ddim_sample(prior, x, cond, timesteps=steps) - exact).abs().max()))
    assert errors[0] > 5*errors[1] > 25*errors[2] and errors[2] < 5e-3


def test_spectrum_prior_equals_dense_algebra():
    "The same Gaussian with its covariance as a matrix."
    size, power = 6, natural_spectrum(6)
    prior = SpectrumPrior(power, mean=0.3)
    basis = torch.fft.ifft2(torch.fft.fft2(torch.eye(36, dtype=torch.float64).reshape(36, size, size))*power).real.reshape(36, 36)
    x, t = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([250])
    alpha, sigma = (float(level) for level in prior.alpha_sigma(t))
    dense = sigma*torch.linalg.solve(alpha**2*basis + sigma**2*torch.eye(36, dtype=torch.float64), (x - alpha*0.3).reshape(36))
    torch.testing.assert_close(prior.eps(x, t, prior.condition([""])).reshape(36), dense, atol=1e-6, rtol=1e-6)
    sampled = prior.sample(prior.condition([""]*50_000), torch.Generator().manual_seed(1)).reshape(-1, 36) - 0.3
    torch.testing.assert_close(sampled.T @ sampled/50_000, basis, atol=8e-3, rtol=0)


def test_a_real_float32_batch_keeps_its_type():
    prior = ring_prior()
    eps = prior.eps(torch.randn(2, 2), torch.tensor([5, 900]), prior.condition([0, -1]))
    assert eps.dtype == torch.float32 and eps.isfinite().all()


@pytest.mark.parametrize("said", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("claimed", ["epsilon", "v_prediction", "sample"])
def test_a_network_under_a_wrong_schedule_is_found_out(said, claimed):
    "With noise against the others; between a picture and minus a picture pure noise cannot decide."
    means = torch.randn(3, 2, 30, generator=torch.Generator().manual_seed(0))
    honest = MixturePrior(means, 0.4, schedule=noise_schedule("linear", prediction_type=said))
    prior = MixturePrior(means, 0.4, schedule=noise_schedule("linear", prediction_type=claimed))
    prior.output = honest.output
    cond = prior.condition([0, 1, 2, -1]*10)
    if (said == "epsilon") == (claimed == "epsilon"):
        share = check_prediction_type(prior, cond, torch.Generator().manual_seed(0))
        assert abs(share - (said == "epsilon")) < 0.1
    else:
        with pytest.raises(ValueError, match=f"the schedule says {claimed}"): check_prediction_type(prior, cond, torch.Generator().manual_seed(0))


# ---- checkpoints


def scheduler_of(folder):
    from diffusers import DDIMScheduler
    return DDIMScheduler.from_pretrained(folder/"scheduler")


def test_stable_diffusion_equals_its_pipeline(checkpoints):
    from diffusers import StableDiffusionPipeline
    prior = load_prior(checkpoints["unet"])
    parts = dict(tokenizer=prior.tokenizer, text_encoder=prior.text_encoder, unet=prior.network, vae=prior.vae)
    scheduler = scheduler_of(checkpoints["unet"])
    pipeline = StableDiffusionPipeline(**parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts, refused = ["a red cube", "two blue balls"], ["green", "cone"]
    latents = pipeline(prompts, negative_prompt=refused, height=16, width=16, num_inference_steps=4, guidance_scale=5., latents=x,
                       output_type="latent").images
    ours = ddim_sample(prior, x, prior.condition(prompts), uncond=prior.condition(refused), guidance_scale=5., timesteps=[751, 501, 251, 1])
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-4)
    pictures = pipeline(prompts, negative_prompt=refused, height=16, width=16, num_inference_steps=4, guidance_scale=5., latents=x,
                        output_type="pt").images
    torch.testing.assert_close(prior.decode(ours).clamp(0, 1), pictures, atol=1e-4, rtol=1e-4)


def test_pixart_equals_its_pipeline(checkpoints):
    from diffusers import PixArtAlphaPipeline
    prior = load_prior(checkpoints["pixart"])
    pipeline = PixArtAlphaPipeline(prior.tokenizer, prior.text_encoder, prior.vae, prior.network, scheduler_of(checkpoints["pixart"]))
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["A red cube ", "two blue balls"]
    latents = pipeline(prompts, height=16, width=16, num_inference_steps=4, guidance_scale=4., latents=x, output_type="latent",
                       clean_caption=False, use_resolution_binning=False).images
    ours = ddim_sample(prior, x, prior.condition(prompts), uncond=prior.condition(["", ""]), guidance_scale=4., timesteps=[750, 500, 250, 0])
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-4)


def test_pixart_with_resolutions_and_its_old_name(tmp_path):
    "The 1024 px models are told their size; early checkpoints call the class Transformer2DModel."
    from diffusers import PixArtTransformer2DModel
    folder = save_random_checkpoint(tmp_path/"p", "pixart")
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1,
                                       cross_attention_dim=24, caption_channels=24, sample_size=128)
    network.save_pretrained(folder/"transformer")
    path = folder/"transformer"/"config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}))
    prior = load_prior(folder)
    cond, x, t = prior.condition(["a red cube"]), torch.randn(1, 4, 16, 8), torch.tensor([300])
    added = dict(resolution=torch.tensor([[128., 64.]]), aspect_ratio=torch.tensor([[2.]]))
    network.eval()
    with torch.no_grad():
        said = network(x, encoder_hidden_states=cond["text"], timestep=t, encoder_attention_mask=cond["mask"], added_cond_kwargs=added).sample
    torch.testing.assert_close(prior.eps(x, t, cond), said[:, :4])


def test_stable_diffusions_files_as_they_are_on_the_hub(checkpoints, tmp_path):
    "vocab.json and merges.txt in place of tokenizer.json, and text_model. before the names of the weights."
    import shutil
    folder = shutil.copytree(checkpoints["unet"], tmp_path/"old")
    words, weights = folder/"tokenizer", folder/"text_encoder"/"model.safetensors"
    table = json.loads((words/"tokenizer.json").read_text())["model"]
    (words/"vocab.json").write_text(json.dumps(table["vocab"]))
    (words/"merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in table["merges"]))
    (words/"tokenizer.json").unlink()
    ends = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    (words/"tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="CLIPTokenizer", model_max_length=77, **ends)))
    save_file({f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    prompts = ["a red cube, two balls", ""]
    new, old = (load_prior(path).condition(prompts) for path in (checkpoints["unet"], folder))
    assert set(new) == set(old) and all(torch.equal(new[name], old[name]) for name in new)


def test_pixarts_tokenizer_as_it_is_on_the_hub(checkpoints, tmp_path):
    "A model of sentencepiece, against sentencepiece itself."
    import shutil
    spm = pytest.importorskip("sentencepiece", reason="pip install sentencepiece: T5's tokenizer on the hub is one")
    (tmp_path/"text").write_text("a red cube\ntwo blue balls\ngreen cone on a red ball\na cube and a ball\n"*50)
    spm.SentencePieceTrainer.train(input=str(tmp_path/"text"), model_prefix=str(tmp_path/"spiece"), vocab_size=24, pad_id=0, eos_id=1, unk_id=2,
                                   bos_id=-1, minloglevel=2)
    folder = shutil.copytree(checkpoints["pixart"], tmp_path/"old")
    shutil.rmtree(folder/"tokenizer")
    (folder/"tokenizer").mkdir()
    shutil.copy(tmp_path/"spiece.model", folder/"tokenizer")
    settings = dict(tokenizer_class="T5Tokenizer", extra_ids=0, model_max_length=512, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    (folder/"tokenizer"/"tokenizer_config.json").write_text(json.dumps(settings))
    prior, prompt = load_prior(folder), "two red cubes and a blue cone"
    assert prior.tokenizer(prompt).input_ids == spm.SentencePieceProcessor(model_file=str(tmp_path/"spiece.model")).encode(prompt) + [1]
    assert prior.condition([prompt])["mask"].sum() == len(prior.tokenizer(prompt).input_ids)


def test_padding_of_t5_is_masked(checkpoints):
    "A longer limit pads with more tokens; the answer is the same."
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    short, long = (load_prior(checkpoints["pixart"], max_tokens=limit) for limit in (40, 120))
    torch.testing.assert_close(short.eps(x, t, short.condition(["a red cube"])), long.eps(x, t, long.condition(["a red cube"])), atol=1e-5, rtol=1e-5)


def test_a_canvas_is_one_picture(tmp_path):
    prior = load_prior(save_random_checkpoint(tmp_path/"c", "pixart", views=4))
    assert prior.shape == (4, 4, 8, 8) and prior.canvas
    cond, x, t = prior.condition(["a cone"]), torch.randn(1, 4, 4, 8, 8), torch.tensor([300])
    canvas = CheckpointPrior(prior.network, prior.schedule, tokenizer=prior.tokenizer, text_encoder=prior.text_encoder, max_tokens=120)
    torch.testing.assert_close(prior.eps(x, t, cond), untile_views(canvas.eps(tile_views(x), t, cond)))
    changed = x.clone()
    changed[:, 3] += 1
    assert ((prior.eps(changed, t, cond) - prior.eps(x, t, cond)).abs().amax((0, 2, 3, 4)) > 1e-5).all()


@pytest.mark.parametrize("kind", ["unet", "pixart", "views"])
def test_flow_models_are_told_their_own_timesteps(tmp_path, kind):
    prior = load_prior(save_random_checkpoint(tmp_path/kind, kind, prediction_type="flow_prediction"))
    cond = prior.condition(["a cone"], orbit([0, 90, 180, 270]) if kind == "views" else None)
    x, t = torch.randn(1, *prior.shape), torch.tensor([299])
    heard = []
    prior.network.register_forward_pre_hook(lambda module, given, named: heard.append(named.get("timestep", given[1] if len(given) > 1 else None)),
                                            with_kwargs=True)
    said = prior.output(x, t, cond)
    torch.testing.assert_close(heard[0].double().unique(), torch.tensor([300.], dtype=torch.float64))
    torch.testing.assert_close(prior.eps(x, t, cond), x + 0.7*said, atol=1e-5, rtol=1e-5)


def test_every_prior_is_a_prior_and_frozen(checkpoints):
    for kind, folder in checkpoints.items():
        prior = load_prior(folder, dtype=torch.bfloat16)
        assert isinstance(prior, Prior) and not any(weight.requires_grad for part in prior.parts for weight in part.parameters())
        x = torch.randn(1, *prior.shape, requires_grad=True)
        cond = prior.condition(["a cube"], orbit([0, 90, 180, 270]) if kind == "views" else None)
        eps = prior.eps(x, torch.tensor([400]), cond)
        assert eps.dtype == torch.float32 and torch.autograd.grad(eps.sum(), x)[0].abs().sum() > 0
    assert isinstance(ring_prior(), Prior) and isinstance(SpectrumPrior(natural_spectrum(4)), Prior)


def test_latents_are_drawn_or_are_the_mean(checkpoints):
    prior, images = load_prior(checkpoints["unet"]), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean = prior.vae.encode(2*images - 1).latent_dist.mean*prior.vae.config.scaling_factor
    torch.testing.assert_close(prior.encode(images), mean)
    drawn = [prior.encode(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_importing_the_room_imports_neither_diffusers_nor_transformers():
    import subprocess
    import sys
    code = "import sys, zerolab.diffusion.hub, zerolab.diffusion.timesteps; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- MVDream, written down a second time with the names of its checkpoint


class Residual(nn.Module):
    def __init__(self, width, out, embedding):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x, embedding, text):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x) + self.emb_layers(embedding)[..., None, None])


class Attention(nn.Module):
    def __init__(self, width, heard, heads):
        super().__init__()
        self.heads, self.to_q = heads, nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(heard, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.))

    def forward(self, x, heard):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(heard), self.to_v(heard)))
        weights = (q @ k.transpose(-1, -2)/q.shape[-1]**0.5).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8*width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x*F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(Gated(width), nn.Dropout(0.), nn.Linear(4*width, width))


class Block3D(nn.Module):
    def __init__(self, width, text, heads):
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(width, width, heads), Attention(width, text, heads), FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, text, views=4):
        together = x.reshape(len(x)//views, -1, x.shape[-1])
        normed = self.norm1(together)
        x = (together + self.attn1(normed, normed)).reshape(x.shape)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff.net(self.norm3(x))


class Transformer3D(nn.Module):
    def __init__(self, width, text, heads):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = nn.GroupNorm(32, width, eps=1e-6), nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([Block3D(width, text, heads)])

    def forward(self, x, embedding, text):
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        return x + self.proj_out(self.transformer_blocks[0](tokens, text)).transpose(1, 2).unflatten(2, x.shape[2:])


class Resample(nn.Module):
    def __init__(self, width, name):
        super().__init__()
        self.add_module(name, nn.Conv2d(width, width, 3, stride=2 if name == "op" else 1, padding=1))

    def forward(self, x, embedding, text): return self.op(x) if hasattr(self, "op") else self.conv(F.interpolate(x, scale_factor=2))


class Plain(nn.Conv2d):
    def forward(self, x, embedding, text): return super().forward(x)


class MVDreamUNet(nn.Module):
    "Two levels of 32 and 64 channels with one residual block each, attention on both, and 8 numbers a head."
    def __init__(self, text=16, width=32):
        super().__init__()
        time, wide = 4*width, 2*width
        def mlp(heard): return nn.Sequential(nn.Linear(heard, time), nn.SiLU(), nn.Linear(time, time))
        def attend(w): return Transformer3D(w, text, w//8)
        self.time_embed, self.camera_embed, self.width = mlp(width), mlp(16), width
        self.input_blocks = nn.ModuleList([nn.ModuleList(layers) for layers in (
            [Plain(4, width, 3, padding=1)], [Residual(width, width, time), attend(width)], [Resample(width, "op")],
            [Residual(width, wide, time), attend(wide)])])
        self.middle_block = nn.ModuleList([Residual(wide, wide, time), attend(wide), Residual(wide, wide, time)])
        self.output_blocks = nn.ModuleList([nn.ModuleList(layers) for layers in (
            [Residual(wide + wide, wide, time), attend(wide)], [Residual(wide + width, wide, time), attend(wide), Resample(wide, "conv")],
            [Residual(wide + width, width, time), attend(width)], [Residual(width + width, width, time), attend(width)])])
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x, t, text, camera):
        angles = t[:, None]*torch.exp(-math.log(10000)*torch.arange(self.width//2)/(self.width//2))
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1)) + self.camera_embed(camera)
        kept = []
        for layers in self.input_blocks:
            for layer in layers: x = layer(x, embedding, text)
            kept.append(x)
        for layer in self.middle_block: x = layer(x, embedding, text)
        for layers in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for layer in layers: x = layer(x, embedding, text)
        return self.out(x)


MVDREAM = dict(_class_name="MultiViewUNetModel", image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1,
               attention_resolutions=[1, 2], channel_mult=[1, 2], num_head_channels=8, context_dim=32, camera_dim=16, transformer_depth=1)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_mvdream_equals_a_second_writing_of_it(tmp_path, checkpoints, prefix):
    "As a whole checkpoint folder, with the names of latent diffusion, through load_prior."
    import shutil
    folder = tmp_path/"mvdream"
    shutil.copytree(checkpoints["views"], folder)
    shutil.rmtree(folder/"unet")
    (folder/"unet").mkdir()
    torch.manual_seed(0)
    reference = MVDreamUNet(text=32).eval()
    (folder/"unet"/"config.json").write_text(json.dumps(MVDREAM))
    save_file({prefix + name: value for name, value in reference.state_dict().items()}, folder/"unet"/"diffusion_pytorch_model.safetensors")
    index = json.loads((folder/"model_index.json").read_text())
    for name in ("views", "layout"): del index[name]
    (folder/"model_index.json").write_text(json.dumps(index))
    prior = load_prior(folder)
    assert prior.views == 4 and prior.shape == (4, 4, 8, 8)
    cameras = orbit([0, 90, 180, 270], 15.)
    cond, x, t = prior.condition(["a red cube", "a cone"], cameras), torch.randn(2, 4, 4, 8, 8), torch.tensor([30, 700])
    with torch.no_grad():
        said = reference(x.flatten(0, 1), t.repeat_interleave(4), cond["text"].repeat_interleave(4, 0), camera_numbers(cameras).repeat(2, 1))
    torch.testing.assert_close(prior.eps(x, t, cond), said.unflatten(0, (2, 4)), atol=1e-5, rtol=1e-4)


def test_mvdream_with_weights_missing(tmp_path):
    (tmp_path/"config.json").write_text(json.dumps(MVDREAM))
    weights = MVDreamUNet(text=32).state_dict()
    for lost, message in (("out.2.bias", "weights missing: conv_out.bias"), ("camera_embed.0.weight", "does not fit its config.json")):
        save_file({name: value for name, value in weights.items() if name != lost}, tmp_path/"w.safetensors")
        with pytest.raises(ValueError, match=message): mvdream_unet(tmp_path)
    save_file(weights | {"out.2.bias": torch.zeros(5)}, tmp_path/"w.safetensors")
    with pytest.raises(ValueError, match="does not fit its config.json: size mismatch"): mvdream_unet(tmp_path)


# ---- bad checkpoints, and no network


def broken(folder, tmp_path, file, change):
    import shutil
    copy = shutil.copytree(folder, tmp_path/"broken")
    if change is None: (copy/file).unlink()
    elif isinstance(change, str): (copy/file).write_text(change)
    else: (copy/file).write_text(json.dumps(json.loads((copy/file).read_text()) | change))
    return copy


@pytest.mark.parametrize("kind, file, change, message", [
    ("unet", "scheduler/scheduler_config.json", {"prediction_type": "velocity"}, "unknown prediction type 'velocity'"),
    ("unet", "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "model and scheduler disagree"),
    ("unet", "scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}, "has no alphas_cumprod"),
    ("unet", "scheduler/scheduler_config.json", {"_class_name": "NoSuchScheduler"}, "unknown to this diffusers"),
    ("unet", "scheduler/scheduler_config.json", {"beta_schedule": "quadratic"}, "quadratic"),
    ("unet", "scheduler/scheduler_config.json", None, "noise levels are unknown"),
    ("pixart", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "trained on 1000 timesteps, the scheduler has 500"),
    ("unet", "model_index.json", {"num_train_timesteps": 4000}, "trained on 4000 timesteps, the scheduler has 1000"),
    ("unet", "unet/config.json", {"in_channels": 9}, "takes 9 channels, the VAE makes 4"),
    ("unet", "unet/config.json", {"out_channels": 5}, "makes 5 channels of 4"),
    ("unet", "unet/config.json", {"cross_attention_dim": 1024}, "the network hears 1024"),
    ("unet", "unet/config.json", {"_class_name": "UNetSpatioTemporalConditionModel"}, "UNetSpatioTemporalConditionModel"),
    ("unet", "unet/config.json", None, "neither unet/ nor transformer/"),
    ("unet", "unet/config.json", "{", "is not JSON"),
    ("unet", "unet/diffusion_pytorch_model.safetensors", None, "has no .safetensors file"),
    ("unet", "text_encoder/model.safetensors", None, "has no .safetensors file"),
    ("unet", "text_encoder/config.json", {"model_type": "gemma"}, "text encoder 'gemma'"),
    ("views", "model_index.json", {"layout": "canvas"}, "layout 'canvas', and several views of a unet are 'views'")])
def test_one_clear_error_each(checkpoints, tmp_path, kind, file, change, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error: load_prior(broken(checkpoints[kind], tmp_path, file, change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_without_a_network_names_the_remedy(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, command in (("runwayml/stable-diffusion-v1-5", "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --revision 451f4fe1"),
                          ("nobody/nothing", "hf download nobody/nothing."), ("not a name", "hf download not a name")):
        with pytest.raises(FileNotFoundError) as error: load_prior(name)
        assert command in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="--revision abc"): load_prior("nobody/nothing", "abc")


def test_what_would_be_downloaded(monkeypatch, tmp_path):
    "The pinned commit of the copy, and no pickles."
    import huggingface_hub
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(tmp_path))
    (tmp_path/"model_index.json").write_text("{}")
    assert find_weights("stabilityai/stable-diffusion-2-1-base", variant="fp16") == tmp_path
    known = KNOWN["stabilityai/stable-diffusion-2-1-base"]
    assert asked["name"] == known.repository and asked["revision"] == known.revision and len(known.revision) == 40
    patterns = asked["allow_patterns"]
    assert "unet/*.fp16.safetensors" in patterns and not any(pattern.endswith((".bin", ".ckpt", ".pt")) for pattern in patterns)


def test_bad_calls(checkpoints):
    prior = load_prior(checkpoints["views"])
    cameras = orbit([0, 90, 180, 270])
    cond, t = prior.condition(["a cube"], cameras), torch.tensor([10])
    for x, message in ((torch.zeros(1, 5, 4, 8, 8), "x has 5 views, the model was trained on 4"), (torch.zeros(4, 4, 8, 8), "need [B,4,4,8,8]"),
                       (torch.zeros(1, 4, 3, 8, 8), "need [B,4,4,8,8]")):
        with pytest.raises(ValueError) as error: prior.eps(x, t, cond)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="5 cameras for 4 views"): prior.condition(["a cube"], orbit([0, 72, 144, 216, 288]))
    with pytest.raises(ValueError, match="wants cameras"): prior.eps(torch.zeros(1, 4, 4, 8, 8), t, prior.condition(["a cube"]))
    flat = load_prior(checkpoints["unet"])
    with pytest.raises(ValueError, match="does not know cameras"):
        flat.eps(torch.zeros(1, 4, 8, 8), t, flat.condition(["a cube"]) | {"camera": torch.zeros(1, 16)})
    with pytest.raises(ValueError, match="a condition with text of 1, mask of 1, pooled of 1"):
        flat.eps(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), flat.condition(["a cube"]))


def test_prompts_over_the_limit(checkpoints):
    prior, exact = load_prior(checkpoints["unet"]), " ".join(["red"]*75)      # 75 words and two ends
    assert prior.condition([exact])["text"].shape == (1, 77, 32)
    with pytest.raises(ValueError, match=r"prompt 1 .* has 78 tokens, and the text encoder reads 77"): prior.condition(["red", exact + " red"])
    cut = load_prior(checkpoints["unet"], truncate=True)
    assert torch.equal(cut.condition([exact + " red"])["text"], prior.condition([exact])["text"])
    with pytest.raises(ValueError, match="reads 120"): load_prior(checkpoints["pixart"]).condition([" ".join(["red"]*120)])


def test_saving_what_was_loaded_changes_nothing(checkpoints, tmp_path):
    "A prior's network is diffusers' own, so its folder is, too."
    prior = load_prior(checkpoints["views"])
    prior.network.save_pretrained(tmp_path)
    one, two = (load_file(folder/"diffusion_pytorch_model.safetensors") for folder in (checkpoints["views"]/"unet", tmp_path))
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_timesteps_and_their_number():
    assert even_timesteps(1000, 4) == [999, 749, 499, 249] and even_timesteps(10, 10) == list(range(9, -1, -1))
    for steps in (0, 11):
        with pytest.raises(ValueError, match="need 1 to 10"): even_timesteps(10, steps)
    with pytest.raises(ValueError, match="knows 0 to 999"):
        check_inputs(ring_prior(), torch.zeros(1, 2), torch.tensor([-1]), {})
    assert set(PREDICTION_TYPES) == {"epsilon", "v_prediction", "sample", "flow_prediction"}
