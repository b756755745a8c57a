"""Distillation on the loop beyond what its notebook shows: exact truths, every kind of prior, resume, several processes, and what bad input gets."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zerolab.distill.train as module
from zerolab.data.things import four_cameras
from zerolab.diffusion.analytic import MixturePrior
from zerolab.diffusion.hub import load_prior, save_random_checkpoint
from zerolab.diffusion.priors import Prior, noise_schedule
from zerolab.distill.embeddings import encode_corpus
from zerolab.distill.fields import Field
from zerolab.distill.generators import draw
from zerolab.distill.objectives import RECIPES, Window, sds
from zerolab.distill.presets import make_generator
from zerolab.distill.train import (
    DISTILLATION, DistillConfig, Distillation, PhiLearner, PromptBatches, distill_generator, distill_step, draw_prompts, generator_condition, live_view,
)
from zerolab.distill.variational import OnlinePhi, fit_phi

SIZE = 12
COLOURS = {"a red ball": (0.9, 0.1, 0.1), "a green ball": (0.1, 0.7, 0.1), "a blue ball": (0.1, 0.2, 0.9)}
PROMPTS = list(COLOURS)
TRAINING = replace(DISTILLATION, steps=3, warmup=1, log_every=1, save_every=100)


def ball(colour):
    def query(points): return points.norm(dim=-1) - 0.6, torch.tensor(colour).expand(points.shape)
    return draw(Field(query, lambda points: points.norm(dim=-1) - 0.6, beta=0.02), four_cameras(SIZE), torch.ones(3)).rgb[0].movedim(-1, -3)


class ExactPrior(Prior):
    """Knows coloured balls by heart, and nothing else; four views at once, or one picture at a time."""
    def __init__(self, views=4):
        pictures = torch.stack([ball(colour)[:views] for colour in COLOURS.values()])
        self.truth, self.views, self.shape = pictures, views, tuple(pictures.shape[1:] if views > 1 else pictures.shape[2:])
        self.exact = MixturePrior(2*pictures.flatten(1)[:, None] - 1, 0.1, background=(0.2, 0., 1.), schedule=noise_schedule("squaredcos_cap_v2"))
        self.schedule, self.asked = self.exact.schedule, []

    def condition(self, prompts, cameras=None):
        numbers = [PROMPTS.index(prompt.split(",")[0]) if prompt else -1 for prompt in prompts]
        words = torch.eye(8)[numbers]*3
        return self.exact.condition(numbers) | {"text": words[:, None], "pooled": words}

    def output(self, x_t, t, cond):
        self.asked.append(cond["prompt"].tolist())
        return self.exact.output(x_t.flatten(1), t, {"prompt": cond["prompt"]}).view_as(x_t)


@pytest.fixture(scope="module")
def exact(): return ExactPrior()


@pytest.fixture(scope="module")
def single(tmp_path_factory): return load_prior(save_random_checkpoint(tmp_path_factory.mktemp("unet"), "unet"))


def fresh(name="triplane-gaussians", **changes):
    torch.manual_seed(0)
    return make_generator(name, **{"text_width": 8} | changes)


MULTI = DistillConfig("asd", weight="ism", guidance_scale=2., prompts=2, size=SIZE)
SINGLE = DistillConfig("sds", guidance_scale=5., prompts=1, views=2, size=16, elevations=(-10., 80.), check_prior=False)


def run(folder, prior, config, training=TRAINING, prompts=PROMPTS, generator=None, **options):
    generator = generator or fresh()
    return generator, distill_generator(generator, prior, prompts, config, training, folder, progress=False, **options)


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items(): assert torch.equal(value, b[name]), name


def error(generator, prior, config=MULTI):
    drawn = draw_prompts(generator, prior, PROMPTS, config=config)
    assert drawn.shape == prior.truth.shape
    return (drawn - prior.truth).square().mean((1, 2, 3, 4))


@pytest.mark.parametrize("objective", ["sds", "asd"])
def test_one_prompt_comes_near_its_truth(exact, tmp_path, objective):
    config = replace(MULTI, objective=objective, prompts=1)
    generator, history = run(tmp_path, exact, config, replace(TRAINING, steps=25, learning_rate=8e-3), ["a red ball"])
    before, after = error(fresh(), exact), error(generator, exact)
    assert after[0] < before[0]/5 and after[0] < after[1:].min()/3 and history.finished


def test_many_prompts_come_near_their_own_truth(exact, tmp_path):
    generator, _ = run(tmp_path, exact, replace(MULTI, objective="sds", prompts=3), replace(TRAINING, steps=30, learning_rate=8e-3))
    drawn = draw_prompts(generator, exact, PROMPTS, config=MULTI)
    distance = (drawn[:, None] - exact.truth[None]).square().mean((2, 3, 4, 5))
    assert distance.argmin(1).tolist() == [0, 1, 2] and distance.diagonal().max() < error(fresh(), exact).min()/2


CASES = {
    "asd, turning rig, all regularisers": (DistillConfig("asd", prompts=1, size=SIZE, turn=True, elevations=(0., 40.), random_background=.5,
                                                           sparsity=1., opacity=lambda progress: progress, eikonal=.1, orientation=.1), "triplane"),
    "asd, splats": (MULTI, "triplane-gaussians"),
    "csd, a z": (replace(MULTI, objective="csd", guidance_scale=None, noise=True, prompts=1), "conv3d"),
    "one scene, empty cells": (replace(MULTI, prompts=1, occupancy=2), "ingp"),
    "sdi, mean of words": (replace(MULTI, objective="sdi", prompts=1, told="mean"), "hyper-ingp"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_ends_as_one_that_was_not(exact, tmp_path, case):
    config, name = CASES[case]
    prompts = PROMPTS[:1] if name == "ingp" else PROMPTS
    _, whole = run(tmp_path/"whole", exact, config, prompts=prompts, generator=fresh(name))
    _, part = run(tmp_path/"parts", exact, config, prompts=prompts, generator=fresh(name), max_seconds=0)
    assert part.step == 1 and not part.finished
    _, resumed = run(tmp_path/"parts", exact, config, prompts=prompts, generator=fresh(name))
    same(whole.average, resumed.average)
    def numbers(history): return [{key: value for key, value in row.items() if "second" not in key} for row in history.rows]
    assert numbers(whole) == numbers(resumed) and len(whole.rows) == 3


@pytest.mark.parametrize("objective", ["sds", "vsd"])
def test_single_pictures_with_perp_neg_and_a_vae_resume_exactly(single, tmp_path, objective):
    config = replace(SINGLE, objective=objective, phi_rate=1e-2)
    def make(): return fresh(text_width=32)
    prompts = ["a red cube", "a blue ball"]
    _, whole = run(tmp_path/"whole", single, config, prompts=prompts, generator=make())
    _, part = run(tmp_path/"parts", single, config, prompts=prompts, generator=make(), max_seconds=0)
    _, resumed = run(tmp_path/"parts", single, config, prompts=prompts, generator=make())
    assert part.step == 1
    same(whole.average, resumed.average)
    learned = [name for name in whole.average if name.startswith("learner.weights")]
    assert bool(learned) == (objective == "vsd")
    if learned:
        start = Distillation(make(), single, prompts, config).state_dict()
        assert any(not torch.equal(start[name], whole.average[name]) for name in learned)
        assert whole.average["learner.step_0"] > 1 and all("phi_error" in row for row in whole.rows)


def test_the_same_twice_and_another_seed_is_another_run(exact, tmp_path):
    ends = [run(tmp_path/str(i), exact, replace(MULTI, seed=seed))[1].average for i, seed in enumerate((3, 3, 4))]
    same(ends[0], ends[1])
    assert any(not torch.equal(value, ends[2][name]) for name, value in ends[0].items())


def test_settings_of_a_recipe_are_kept_unless_changed():
    assert DistillConfig("vsd").recipe == RECIPES["vsd"] and DistillConfig(RECIPES["ism"]).recipe is not None
    changed = DistillConfig("csd", window=Window((.1, .1), (.5, .5)), normaliser="none").recipe
    assert (changed.normaliser, changed.window.low, changed.guidance_scale) == ("none", (.1, .1), RECIPES["csd"].guidance_scale)


def test_the_second_model_learns_as_with_an_optimizer_of_its_own():
    prior = MixturePrior(torch.zeros(2, 1, 6), 0.3)
    x, cond = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), prior.condition([0, 1, 0, 1])
    phis = [OnlinePhi(prior, seed=1) for _ in range(2)]
    learner, plain = PhiLearner(phis[0], 1e-2), torch.optim.AdamW(phis[1].network.parameters(), lr=1e-2, weight_decay=0.)
    numbers = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(3): assert learner.fit(x, cond, numbers[0]) == fit_phi(phis[1], plain, x, cond, numbers[1])
    for a, b in zip(phis[0].network.parameters(), phis[1].network.parameters()): assert torch.equal(a, b) and a.grad is None
    assert sum(name.startswith("exp_avg_sq") for name in learner.state_dict()) == len(learner.weights) and learner.step_0 == 3


def test_what_the_prior_is_told_of_single_pictures(tmp_path):
    prior = ExactPrior(views=1)
    config = replace(MULTI, objective="sds", views=3, elevations=(0., 20.))
    model = Distillation(fresh(), prior, PROMPTS, config)
    batch = next(PromptBatches(PROMPTS, config))
    prior.asked.clear()
    distill_step(model, batch, 0.)
    of_prompt = batch["rows"].repeat_interleave(3).tolist()
    assert prior.asked == [of_prompt + [-1]*6 + of_prompt*2]                     # with, without, and two negatives, in one call
    prior.asked.clear()
    distill_step(Distillation(fresh(), prior, PROMPTS, replace(config, view_prompts=0.)), batch, 0.)
    assert prior.asked == [of_prompt + [-1]*6]


def test_cameras_go_to_a_prior_that_wants_them(tmp_path):
    prior = load_prior(save_random_checkpoint(tmp_path, "views"))
    config = replace(MULTI, size=16, check_prior=False, turn=True)
    model = Distillation(fresh(text_width=32), prior, ["a cube"], config)
    batch = next(PromptBatches(["a cube"], config, 4))
    cond, nothing, negatives, _ = model.conditions(batch, module.rig_cameras(batch["azimuth"], batch["elevation"], config))
    assert cond["camera"].shape == nothing["camera"].shape == (2, 4, 16) and negatives is None
    assert not torch.equal(cond["camera"][0], cond["camera"][1])                 # each prompt has its own rig
    loss, _ = distill_step(model, batch, 0.)
    assert loss.isfinite()


def test_a_store_says_what_the_encoder_says(exact, tmp_path):
    store = encode_corpus(PROMPTS, tmp_path/"store", exact.condition, keep=("text", "pooled"), progress=False)
    in_memory, stored = (Distillation(fresh(), exact, PROMPTS, MULTI, store=one).texts(torch.tensor([2, 0])) for one in (None, store))
    for name, value in stored.items(): assert torch.allclose(value, in_memory[name], atol=1e-2)


def test_the_ratio_measures_the_weight_of_a_regulariser(exact):
    ratios = []
    for weight in (0.1, 1.):
        config = replace(MULTI, sparsity=weight)
        _, details = distill_step(Distillation(fresh(), exact, PROMPTS, config), next(PromptBatches(PROMPTS, config, 4)), 0., compare=True)
        ratios.append(details["guidance_ratio"])
    assert ratios[0] == pytest.approx(10*ratios[1], rel=1e-4)


def test_live_pictures(exact):
    model = Distillation(fresh(), exact, PROMPTS, MULTI)
    assert [picture.shape for picture in live_view(model)] == [(2*SIZE, 2*SIZE, 3)]*4
    distill_step(model, next(PromptBatches(PROMPTS, MULTI, 4)), 0.)
    shown = live_view(model)
    assert [picture.shape for picture in shown] == [(2*SIZE, 2*SIZE, 3)]*4
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in shown)
    assert torch.allclose(shown[0][:SIZE, :SIZE], model.prior.decode(model.seen["x"])[0, 0].permute(1, 2, 0).clamp(0, 1))


def test_ranks_have_different_prompts_and_numbers(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 3)
    batches = []
    for rank in range(3):
        monkeypatch.setattr(module, "world_rank", lambda: rank)
        batches.append(next(PromptBatches(list("abcdef"), replace(MULTI, turn=True), 4)))
    assert sorted(row for batch in batches for row in batch["rows"].tolist()) == [0, 1, 2, 3, 4, 5]
    assert len({float(batch["azimuth"][0, 0]) for batch in batches}) == 3


RANKS = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
import torch, torch.distributed as dist
import test_distill_train as t
from zerolab.distill.train import distill_generator
torch.set_num_threads(1)
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
prior = t.load_prior(sys.argv[4])
_, history = t.run(out, prior, replace(t.SINGLE, objective="vsd", phi_rate=1e-2), prompts=["a red cube", "a blue ball"], generator=t.fresh(text_width=32))
torch.save(history.average, out + f"/rank{{rank}}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_the_same_second_model(tmp_path):
    script, prior = tmp_path/"ranks.py", save_random_checkpoint(tmp_path/"unet", "unet")
    script.write_text(RANKS.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path/"store"), str(tmp_path), str(prior)]
    processes = [subprocess.Popen([sys.executable, script, str(rank), *arguments], env=environment) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    same(*(torch.load(tmp_path/f"rank{rank}", weights_only=True) for rank in range(2)))


BAD = {
    "empty prompt": (dict(prompts=["a red ball", ""]), "prompts[1] is empty"),
    "unknown objective": (lambda: DistillConfig("asdf"), "unknown objective 'asdf', need one of sds"),
    "window in timesteps": (lambda: Window((20, 20), (980, 500)), "these are shares of T: 0.02, not 20"),
    "window outside": (dict(config=replace(MULTI, window=lambda progress, T: (0, T))), "the model knows t from 0 to 999"),
    "size": (dict(config=replace(MULTI, size=16)), "set another size"),
    "text width": (dict(generator=lambda: fresh(text_width=64)), "make_generator(..., text_width=8)"),
    "one scene": (dict(generator=lambda: fresh("ingp")), "holds one scene"),
    "clock": (dict(training=replace(TRAINING, time_budget=9.)), "not a time_budget"),
    "normals of splats": (dict(config=replace(MULTI, orientation=1.)), "orientation is for fields"),
    "distance of a density": (dict(config=replace(MULTI, eikonal=1.), generator=lambda: fresh("triplane", kind="density")), "this field is a density"),
    "prompts": (lambda: DistillConfig(prompts=0), "prompts is 0"),
    "half a prompt": (lambda: DistillConfig(prompts=1.5), "prompts is 1.5, need a whole number, 1 or more"),
    "size with a point": (lambda: DistillConfig(size=32.), "size is 32.0, need a whole number, 4 or more"),
    "fov": (lambda: DistillConfig(fov=0), "fov is 0, need more than 0 and less than 180"),
    "negative weight": (lambda: DistillConfig(sparsity=-1), "sparsity is -1, need 0 or more"),
    "negative strength": (lambda: DistillConfig(view_prompts=-1), "view_prompts is -1, need 0 or more"),
    "background by name": (lambda: DistillConfig(background="white"), "need a colour such as (1., 1., 1.)"),
    "grey background": (lambda: DistillConfig(background=1.), "background is 1.0, need a colour"),
    "window as a pair": (lambda: DistillConfig("asd", window=(.02, .98)), "window is (0.02, 0.98), need a function, such as Window("),
    "delta t as a number": (lambda: DistillConfig("asd", delta_t=.1), "delta_t is 0.1, need a function, such as DeltaT(0.1)"),
    "objective of no recipe": (lambda: DistillConfig(sds), "or a Recipe"),
    "one elevation": (lambda: DistillConfig(elevations=20.), "lowest and highest"),
    "nothing to draw": (lambda: draw_prompts(fresh(), None, []), "no prompts: give one or more"),
    "elevations": (lambda: DistillConfig(elevations=(30., 10.)), "lowest and highest"),
    "told": (lambda: DistillConfig(told="letters"), "need one of auto, words"),
    "LoRA of an exact prior": (dict(config=replace(MULTI, objective="vsd")), "use OnlinePhi or ParticlePrior"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(exact, tmp_path, case):
    call, says = BAD[case]
    with pytest.raises(ValueError) as caught:
        if callable(call): call()
        else: run(tmp_path, exact, **{"config": MULTI} | call | ({"generator": call["generator"]()} if "generator" in call else {}))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_networks_that_say_something_else_are_refused(single, tmp_path):
    with pytest.raises(ValueError, match="the schedule says epsilon, but of pure noise"):
        run(tmp_path, single, replace(SINGLE, check_prior=True), prompts=["a cube"], generator=fresh(text_width=32))


def test_too_long_prompts_and_other_corpora_are_refused(single, exact, tmp_path):
    with pytest.raises(ValueError, match="the text encoder reads 77: shorten it"):
        run(tmp_path/"long", single, SINGLE, prompts=["a red cube on "*20], generator=fresh(text_width=32))
    run(tmp_path/"there", exact, MULTI, max_seconds=0)
    with pytest.raises(ValueError, match="another run is in this folder: corpus is 3 prompts from .* there and 2 prompts from .* here: use another folder"):
        run(tmp_path/"there", exact, MULTI, prompts=PROMPTS[:2])


CHANGES = {
    "objective": (replace(MULTI, objective="csd"), PROMPTS, "objective is 'asd' there and 'csd' here"),
    "omega": (replace(MULTI, guidance_scale=3.), PROMPTS, "guidance_scale is 2.0 there and 3.0 here"),
    "window": (replace(MULTI, window=Window((.1, .1), (.5, .5))), PROMPTS, "window is Window"),
    "regulariser": (replace(MULTI, sparsity=1.), PROMPTS, "sparsity is 0.0 there and 1.0 here"),
    "seed": (replace(MULTI, seed=1), PROMPTS, "seed is 0 there and 1 here"),
    "a later prompt": (MULTI, [PROMPTS[0], PROMPTS[2], PROMPTS[1]], "corpus is 3 prompts"),
}


@pytest.fixture(scope="module")
def half_way(exact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, exact, MULTI, max_seconds=0)
    return exact, folder


@pytest.mark.parametrize("changes", CHANGES)
def test_a_folder_is_not_taken_over_by_another_run(half_way, changes):
    "It would go on, or be finished, and show the old run under a new name."
    (exact, folder), (config, prompts, says) = half_way, CHANGES[changes]
    with pytest.raises(ValueError, match=says): run(folder, exact, config, prompts=prompts)


def test_settings_are_the_same_text_in_every_process():
    code = "from zerolab.distill.train import DistillConfig; print(DistillConfig('sdi', sparsity=abs).settings)"
    texts = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout for _ in range(2)}
    assert len(texts) == 1 and "falling" in texts.pop()


def test_a_generator_remembers_what_it_was_told(exact, tmp_path):
    config = replace(MULTI, prompts=1, told="mean")
    generator, _ = run(tmp_path, exact, config, generator=fresh("conv3d"))
    said = exact.condition(PROMPTS) | {"pooled": torch.zeros(3, 8)}
    assert generator.config.told == "mean" and torch.equal(generator_condition(generator, said), said["text"][:, 0])
    assert not generator_condition(generator, said, "pooled").any()


def test_pictures_of_a_generator_that_was_taught_with_noise_have_noise(exact):
    generator = fresh("conv3d")
    def drawn(**changes): return draw_prompts(generator, exact, PROMPTS[:1], config=replace(MULTI, **changes))
    assert not torch.equal(drawn(noise=True), drawn()) and not torch.equal(drawn(noise=True), drawn(noise=True, seed=1))
    assert torch.equal(drawn(noise=True), drawn(noise=True))


def test_the_prior_is_asked_in_its_own_precision(exact, tmp_path):
    "Autocast is for the generator: the difference of two predictions that nearly agree has no digits to spare."
    batch = next(PromptBatches(PROMPTS, MULTI, 4))
    seen = []
    class Watching(ExactPrior):
        def output(self, x_t, t, cond):
            seen.append((x_t.dtype, (x_t.flatten(1) @ x_t.flatten(1).T).dtype))
            return super().output(x_t, t, cond)
    model = Distillation(fresh(), Watching(), PROMPTS, MULTI)
    with torch.autocast("cpu", torch.bfloat16): distill_step(model, batch, 0.5)
    assert set(seen) == {(torch.float32, torch.float32)}


def test_an_encoder_without_a_pooled_vector():
    said = {"text": torch.randn(2, 5, 8), "mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])}
    with pytest.raises(ValueError, match="set told='mean'"): generator_condition(fresh("conv3d"), said)
    mean = generator_condition(fresh("conv3d"), said, "mean")
    assert torch.allclose(mean, torch.stack([said["text"][0, :2].mean(0), said["text"][1].mean(0)]), atol=1e-6)
