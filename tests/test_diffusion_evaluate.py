"""The metrics of pictures: against brute force, analytic scenes and the real classes of transformers; nothing is rendered or trained."""
import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from zerolab.diffusion.alignment import hits_at, load_dual_encoder, measure_alignment, recall_at, write_rows
from zerolab.diffusion.attributes import (THING_WORDS, AttributeClassifier, ClassifierConfig, ViewBatches, attribute_report, caption_scores,
                                          load_classifier, read_attributes, save_classifier)
from zerolab.diffusion.consistency import band_power, foreground, hue_error, mirror_error, reprojection_error, row_error
from zerolab.diffusion.dual_encoder import DualEncoderConfig, build_dual_encoder, save_dual_encoder
from zerolab.diffusion.evaluate import is_turntable
from zerolab.diffusion.frechet import frechet_distance, measure_frechet
from zerolab.diffusion.text import word_tokenizer
from zerolab.diffusion.intervals import mean_interval, wilson
from zerolab.scene.cameras import orbit
from zerolab.shapes.things import WORDS, Thing


def ball(cameras, radius, colour=(0.8, 0.2, 0.1)):
    "A ball at the origin seen by cameras, anti-aliased: [V,3,h,w]."
    size = cameras.size
    fine = cameras.resize((size[0]*4, size[1]*4))
    origins, directions = fine.rays()
    nearest = origins - (origins*directions).sum(-1, keepdim=True)*directions
    mask = (nearest.norm(dim=-1) < radius).float()
    mask = torch.nn.functional.avg_pool2d(mask[:, None], 4)
    return 1 - mask*(1 - torch.tensor(colour)[:, None, None])


RIGS = ([0, 90, 180, 270], 20.), ([0, 60, 200], 0.), ([10, 75, 130, 190, 250, 310], [0, 40, -30, 10, 60, 5])


@pytest.mark.parametrize("azimuths, elevations", RIGS)
def test_a_ball_contradicts_itself_nowhere_and_one_of_another_size_does(azimuths, elevations):
    cameras = orbit(azimuths, elevations, 2.7, size=(32, 32))
    clean = ball(cameras, 0.6)[None]
    error = reprojection_error(clean, cameras)
    assert error.silhouette.item() < 0.02 and error.colour.item() < 0.01
    swollen = clean.clone()
    swollen[0, 0] = ball(cameras, 0.8)[0]
    assert reprojection_error(swollen, cameras).silhouette.item() > 0.08
    painted = clean.clone()
    painted[0, 0] = ball(cameras, 0.6, (0.2, 0.2, 0.8))[0]
    assert reprojection_error(painted, cameras).colour.item() > 0.9*(0.6 + 0 + 0.7)/3/len(cameras)      # all of one view is of another colour


def test_hull_does_not_depend_on_the_order_of_views_or_the_batch():
    cameras = orbit([0, 90, 180, 270], 20., size=(16, 16))
    pictures = torch.stack([ball(cameras, radius) for radius in (0.4, 0.5, 0.7)])
    pictures[1, 2] = pictures[0, 2]
    one, other = reprojection_error(pictures, cameras), reprojection_error(pictures[:, [2, 0, 3, 1]], cameras[[2, 0, 3, 1]], batch=2)
    for a, b in zip(one, other): assert torch.allclose(a, b, atol=1e-6)


def test_an_empty_view_contradicts_all_others_and_an_empty_object_says_nothing():
    cameras = orbit([0, 90, 180, 270], 20., size=(16, 16))
    pictures = ball(cameras, 0.6)[None].repeat(3, 1, 1, 1, 1)
    pictures[1, 0], pictures[2] = 1, 1
    silhouette = reprojection_error(pictures, cameras).silhouette
    assert silhouette[0] < 0.03 and silhouette[1] > 0.99 and silhouette[2].isnan()
    assert row_error(pictures)[1] > 0.05 and row_error(pictures)[2].isnan() and hue_error(pictures)[1].isnan()


def test_rows_ignore_moves_along_the_row_and_mirrors_do_not():
    pictures = torch.ones(1, 4, 3, 24, 24)
    pictures[..., 6:14, 9:15] = 0.2
    moved = pictures.clone()
    moved[:, 2] = moved[:, 2].roll(3, -1)
    assert row_error(moved).item() < 1e-6 < 0.02 < mirror_error(moved).item()
    assert mirror_error(pictures).item() < 1e-6


def test_foreground_keeps_the_half_of_a_blurred_edge():
    ramp = torch.linspace(0, 1, 9)
    pictures = torch.ones(1, 1, 3, 32, 32)
    pictures[..., 8:] = 0.3
    pictures[..., 4:13] = 1 - 0.7*ramp
    mask = foreground(pictures)[0, 0, 0]
    assert mask[7] < 0.5 < mask[8] and mask[4] == 0 and mask[12] == 1


@pytest.mark.parametrize("size", [(8, 8), (31, 17), (32, 64)])
def test_bands_add_up_to_the_mean_square_whatever_the_size(size):
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 3, *size)
    pictures[..., :size[0]//8 + 1, :], pictures[..., -(size[0]//8 + 1):, :] = 1, 1
    pictures[..., :size[1]//8 + 1], pictures[..., -(size[1]//8 + 1):] = 1, 1          # where the window is not 1
    assert torch.allclose(band_power(pictures).sum(-1), (1 - pictures).square().mean((2, 3, 4)), rtol=1e-4)


def test_turntables():
    assert is_turntable(orbit([5, 95, 185, 275], 0, 400., fov=0.3)) and is_turntable(orbit([0, 180], 0, 400., fov=0.3))
    assert not is_turntable(orbit([0, 80, 180, 270], 0, 400., fov=0.3))


@pytest.mark.parametrize("n, m, d", [(300, 200, 8), (30, 40, 8), (9, 200, 8)])
def test_frechet_against_the_matrix_root_and_its_invariances(n, m, d):
    generator = torch.Generator().manual_seed(n)
    def drawn(*shape): return torch.randn(*shape, generator=generator).double()
    one, two = drawn(n, d) @ drawn(d, d), drawn(m, d) @ drawn(d, d) + 1
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (one, two)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = float((one.mean(0) - two.mean(0)).square().sum()) + np.trace(sum(covariances)) - 2*np.trace(root)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-5)
    turn = torch.linalg.qr(drawn(d, d)).Q
    assert frechet_distance(one @ turn + 3, two @ turn + 3) == pytest.approx(frechet_distance(one, two), rel=1e-8)
    assert frechet_distance(2*one, 2*two) == pytest.approx(4*frechet_distance(one, two), rel=1e-8)


def test_frechet_survives_a_collapsed_set_and_repeats_itself():
    torch.manual_seed(0)
    reference, collapsed = torch.randn(64, 16), torch.ones(64, 16)
    assert frechet_distance(collapsed, reference) == pytest.approx(float((1 - reference.mean(0)).square().sum() + reference.var(0).sum()), rel=1e-5)
    assert measure_frechet(reference, reference.flip(1), resamples=10) == measure_frechet(reference, reference.flip(1), resamples=10)
    assert "interval" not in str(measure_frechet(collapsed[:20], reference)) and "unknown" in str(measure_frechet(collapsed[:20], reference))


def test_ties_are_broken_as_all_orders_together_would():
    for row in ([1., 1., 0.], [1., 1., 1.], [2., 1., 1.], [0., 3., 3.], [5., 5., 7.]):
        for truth, k in itertools.product(range(3), (1, 2)):
            orders = [sorted(order, key=lambda i: -row[i]) for order in itertools.permutations(range(3))]     # stable: ties as permuted
            expected = sum(truth in order[:k] for order in orders)/len(orders)
            assert hits_at(torch.tensor([row]), torch.tensor([truth]), k).item() == pytest.approx(expected)


def test_several_objects_of_a_prompt_count_as_one_draw():
    similarity = torch.eye(4).repeat_interleave(5, 0)[:, None]
    truth = torch.arange(4).repeat_interleave(5)
    recall = recall_at(similarity, truth)
    assert recall.view == wilson(4, 4) and recall.chance == 0.25


def test_intervals_depend_on_the_seed_alone():
    values = torch.arange(50.)**2
    assert mean_interval(values) == mean_interval(values) and mean_interval(values, seed=1) != mean_interval(values)
    assert mean_interval(values).low < values.mean() < mean_interval(values).high


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return AttributeClassifier(ClassifierConfig({name: list(words) for name, words in THING_WORDS.items()}, 16, 8)).eval()


def test_views_are_witnesses_whose_order_does_not_matter(classifier, tmp_path):
    pictures = torch.rand(3, 4, 3, 16, 16)
    found, features = read_attributes(classifier, pictures)
    again, _ = read_attributes(load_classifier(save_classifier(tmp_path/"judge", classifier)), pictures[:, [3, 1, 0, 2]], batch=5)
    for name, values in found.items():
        assert torch.allclose(values, again[name], atol=1e-5) and torch.allclose(values.exp().sum(-1), torch.ones(3), atol=1e-5)
    labels = torch.stack([values.argmax(-1) for values in found.values()], 1)
    assert attribute_report(found, labels).all == wilson(3, 3)
    assert (caption_scores(found, labels).diagonal() >= caption_scores(found, (labels + 1) % 4).max(1).values - 1e-6).all()
    assert read_attributes(classifier, torch.rand(2, 4, 3, 40, 40))[1].shape == (2, 64)                     # larger pictures are reduced


def test_labels_of_things_are_the_classifiers_words():
    for thing in (Thing("cone", "red"), Thing("torus", "black", "spots", "pink")):
        said = dict(zip(THING_WORDS, (words[number] for words, number in zip(THING_WORDS.values(), thing.labels))))
        assert said == dict(shape=thing.shape, colour=thing.colour, pattern=thing.pattern, second=thing.second or "none")


def test_coverage_counts_pairs_and_not_pictures(classifier):
    found = {name: torch.zeros(4, len(words)) for name, words in THING_WORDS.items()}
    for values in found.values(): values[:, 0] = 1
    labels = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [2, 2, 0, 0]])
    report = attribute_report(found, labels, [True, True, True, False])
    assert report.coverage == wilson(1, 2) and report.unseen == wilson(1, 3) and report.seen == wilson(0, 1)
    assert attribute_report(found, labels, [False]*4).unseen is None


def test_batches_go_on_where_they_stopped():
    pictures = torch.randint(256, (5, 4, 3, 16, 16), dtype=torch.uint8)
    one, other = ViewBatches(pictures, 6, seed=3), ViewBatches(pictures, 6, seed=3)
    skipped = [next(one) for _ in range(4)][-1]
    other.load_state_dict(dict(step=3))
    again = next(other)
    assert (skipped["rows"] == again["rows"]).all() and (skipped["pictures"] == again["pictures"]).all() and one.state_dict() == other.state_dict()


def test_siglip_runs_through_the_same_code(tmp_path):
    import json

    from transformers import SiglipConfig, SiglipModel
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, 8)
    body = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = SiglipModel(SiglipConfig(text_config=body | dict(vocab_size=len(tokenizer), max_position_embeddings=8, pad_token_id=0, bos_token_id=2,
                                     eos_token_id=3, projection_size=32), vision_config=body | dict(image_size=16, patch_size=8)))
    model.save_pretrained(tmp_path/"siglip"); tokenizer.save_pretrained(tmp_path/"siglip")
    (tmp_path/"siglip/preprocessor_config.json").write_text(json.dumps(dict(image_processor_type="SiglipImageProcessor", do_resize=True, resample=3,
        size=dict(height=16, width=16), do_normalize=True, image_mean=[.5]*3, image_std=[.5]*3)))
    encoder = load_dual_encoder(tmp_path/"siglip")
    found = measure_alignment(encoder, torch.rand(3, 4, 3, 20, 20), ["a red cone", "a blue cube with red spots and", "a teapot"], ks=(1,))
    assert (found.limit, found.cut, found.unknown, found.prompts) == (8, 1, 2, 3)


def test_a_prompt_that_is_cut_is_embedded_as_its_beginning_and_reported(tmp_path):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, 6)
    network = build_dual_encoder(DualEncoderConfig(size=16, width=32, depth=1, heads=2, joint=8, limit=6), tokenizer).eval()
    encoder = load_dual_encoder(save_dual_encoder(tmp_path/"clip", network, tokenizer))
    assert encoder.tokens(["a red cone", "a red cone with blue spots"]) == [5, 8]
    short, long = encoder.text(["a red cone with", "a red cone with blue spots"])
    assert torch.allclose(short, long, atol=1e-6)
    padded = encoder.text(["a red cone", "a blue cube with"])                          # padding changes nothing
    assert torch.allclose(padded[0], encoder.text(["a red cone"])[0], atol=1e-5)
    found = measure_alignment(encoder, torch.rand(2, 3, 3, 16, 16), ["a red cone", "a red cone with blue spots"], ks=(1, 5))
    assert "1 cut at 6 tokens" in str(found) and [recall.k for recall in found.recalls] == [1]
    assert write_rows(found.rows, tmp_path/"rows.csv").read_text().count("\n") == 3
