"""The multi-view model: PixArt-XL's and MVDream's own shapes, folders against load_prior, and every scheduler against our sampler."""
import json
from dataclasses import replace

import pytest
import torch

from zerolab.diffusion.hub import ask_network, load_prior, random_text_encoder
from zerolab.diffusion.multiview import (BASE, BASE_UNET, SMALL, SMALL_UNET, TINY, TINY_UNET, build_network, parameter_count, sample_views,
                                         save_multiview)
from zerolab.diffusion.priors import ddim_sample, even_timesteps, noise_schedule
from zerolab.diffusion.views import AcrossViews
from zerolab.scene.cameras import orbit

CANVAS = replace(TINY, size=8, width=32, depth=2, head_width=16, text_width=32)
VIEWS = replace(TINY_UNET, size=8, levels=(1, 2), text_width=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "One model of each body, saved with a scheduler of each kind."
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    text_encoder, tokenizer = random_text_encoder("clip", 32)
    found = {}
    for body, config in (("canvas", CANVAS), ("views", VIEWS)):
        torch.manual_seed(0)
        network = build_network(config).eval()
        for kind, scheduler in (("epsilon", DDIMScheduler(clip_sample=False)), ("flow_prediction", FlowMatchEulerDiscreteScheduler())):
            folder = tmp_path_factory.mktemp(body)/kind
            found[body, kind] = save_multiview(folder, network, config, scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
    return found


def condition(prior, prompts): return prior.condition(prompts, None if prior.canvas else orbit([0, 90, 180, 270], 20.))


def test_base_has_the_weights_of_pixart_xl():
    "By its published configuration (transformer/config.json of PixArt-XL-2-512x512)."
    import diffusers
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
                                                    cross_attention_dim=1152, sample_size=64, patch_size=2, caption_channels=4096)
        ours = build_network(BASE)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {name: value.shape for name, value in theirs.state_dict().items()}
    assert ours.config.interpolation_scale == max(theirs.config.sample_size//64, 1)


def test_base_unet_has_the_weights_of_stable_diffusion_2_and_a_camera():
    "By the published configuration of Stable Diffusion 2.1 (unet/config.json)."
    import diffusers
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(sample_size=64, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
                                                use_linear_projection=True)
        ours = build_network(BASE_UNET)
    one, two = ({name: value.shape for name, value in network.state_dict().items()} for network in (ours, theirs))
    assert {name: shape for name, shape in one.items() if not name.startswith("class_embedding")} == two
    assert sum(weight.numel() for name, weight in ours.named_parameters() if name.startswith("class_embedding")) == 16*1280 + 1280 + 1280*1280 + 1280
    assert ours.config.attention_head_dim == theirs.config.attention_head_dim


def test_sizes():
    counts = [parameter_count(config) for config in (TINY, TINY_UNET, SMALL, SMALL_UNET)]
    assert max(counts[:2]) < 5e6 and all(1e7 < count < 6e7 for count in counts[2:])


@pytest.mark.parametrize("body", ["canvas", "views"])
@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_what_was_saved_is_what_is_read(folders, body, kind):
    prior = load_prior(folders[body, kind])
    index = json.loads((folders[body, kind]/"model_index.json").read_text())
    assert (index["views"], index["layout"], index["prediction_type"], index["multiview"]["size"]) == (4, body, kind, 8)
    assert prior.shape == (4, 3, 8, 8) and prior.schedule.prediction_type == kind and prior.vae is None
    assert body == "canvas" or any(isinstance(processor, AcrossViews) for processor in prior.network.attn_processors.values())
    torch.manual_seed(0)
    network = build_network(CANVAS if body == "canvas" else VIEWS).eval()
    x, t, cond = torch.randn(2, 4, 3, 8, 8), torch.tensor([99, 899]), condition(prior, ["a red cube", "a cone"])
    told = t if kind == "epsilon" else (t + 1).float()
    with torch.no_grad(): torch.testing.assert_close(prior.output(x, t, cond), ask_network(network, x, told, cond, views=4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("body", ["canvas", "views"])
def test_objects_of_a_batch_do_not_see_each_other(folders, body):
    prior = load_prior(folders[body, "epsilon"])
    x, t, cond = torch.randn(3, 4, 3, 8, 8), torch.tensor([5, 500, 990]), condition(prior, ["a red cube", "", "a cone"])
    together = prior.eps(x, t, cond)
    for row in range(3):
        alone = prior.eps(x[row:row + 1], t[row:row + 1], {name: value[row:row + 1] for name, value in cond.items()})
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


def test_the_weights_do_not_know_how_many_views_there_are(folders):
    "Eight views of one object, by the network that was made for four."
    prior = load_prior(folders["views", "epsilon"], views=8)
    cond = prior.condition(["a cone"], orbit(torch.arange(8)*45., 20.))
    x = torch.randn(1, 8, 3, 8, 8)
    changed = x.clone()
    changed[0, 7] += 1
    t = torch.tensor([300])
    assert ((prior.eps(changed, t, cond) - prior.eps(x, t, cond)).abs().amax((0, 2, 3, 4)) > 1e-6).all()


@pytest.mark.parametrize("body", ["canvas", "views"])
def test_sampling_through_diffusers_is_our_sampling(folders, body):
    from diffusers import DDIMScheduler
    prior = load_prior(folders[body, "epsilon"])
    cond, uncond = condition(prior, ["a red cube", "a cone"]), condition(prior, ["", ""])
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    made = sample_views(prior, cond, scheduler, torch.Generator().manual_seed(3), uncond=uncond, guidance_scale=2., steps=5)
    start = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = ddim_sample(prior, start, cond, uncond=uncond, guidance_scale=2., timesteps=even_timesteps(1000, 5))
    torch.testing.assert_close(made, prior.decode(ours).clamp(0, 1), atol=1e-4, rtol=1e-3)


def test_flow_matching_is_sampled_by_its_own_scheduler(folders):
    "Euler's steps along the straight line, written down a second time."
    from diffusers import FlowMatchEulerDiscreteScheduler
    prior = load_prior(folders["canvas", "flow_prediction"])
    cond = condition(prior, ["a red cube"])
    made = sample_views(prior, cond, FlowMatchEulerDiscreteScheduler(), torch.Generator().manual_seed(0), steps=4)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x, sigmas = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), scheduler.sigmas
    for now, following in zip(sigmas, sigmas[1:]):
        x = x + (following - now)*prior.output(x, (now*1000 - 1).round().long()[None], cond)
    torch.testing.assert_close(made, prior.decode(x).clamp(0, 1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "DDPMScheduler",
                                  "PNDMScheduler"])
def test_other_schedulers_reach_the_one_picture_a_perfect_network_knows(folders, name):
    "The network is replaced by one that knows a single picture: whatever way a scheduler steps, and whatever it scales, it must arrive there."
    import diffusers
    prior = load_prior(folders["canvas", "epsilon"])
    picture, schedule = torch.rand(1, 4, 3, 8, 8)*1.6 - 0.8, noise_schedule("linear")

    def perfect(x, t, cond):
        alpha, sigma = (level.reshape(-1, 1, 1, 1, 1) for level in schedule.alpha_sigma(t))
        return (x - alpha*picture)/sigma
    prior.output = perfect
    options = {} if name in ("DDPMScheduler", "PNDMScheduler") else dict(timestep_spacing="trailing")
    scheduler = getattr(diffusers, name)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **options)
    made = sample_views(prior, condition(prior, [""]), scheduler, torch.Generator().manual_seed(0), steps=50)
    assert (made - prior.decode(picture)).abs().max() < 0.06
