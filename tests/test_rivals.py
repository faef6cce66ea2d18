"""The regularisers of Eq. 10 against hand values, slow twins, and the training step that they live in."""

import copy
import json
import math
import random

import pytest
import rivals
import torch
from pycocoevalcap.cider.cider import Cider

import distcap


@pytest.fixture
def start(captioner, clip):
    return captioner, clip


def test_cider_reward_equals_pycocoevalcap_on_the_whole_data_set():
    references = [["a red ring", "a ring"], ["a blue bar", "two shapes"], ["a red bar and a ring", "a bar"]]
    captions = ["a red ring", "a blue blue bar", "a ring and a bar"]
    _, expected = Cider().compute_score(dict(enumerate(references)), {n: [each] for n, each in enumerate(captions)})
    reward = rivals.CiderReward(references)
    torch.testing.assert_close(reward(captions, [0, 1, 2]), torch.tensor(expected).float())
    # a batch of another order and size is scored with the frequencies of all three images
    torch.testing.assert_close(reward([captions[2], captions[0]], [2, 0]), torch.tensor(expected[[2, 0]]).float())


def test_kl_reward_by_hand():
    now, start = torch.tensor([[0.5, 0.25, 0.1]]).log(), torch.tensor([[0.25, 0.5, 0.9]]).log()
    reward = rivals.kl_reward(now, start, torch.tensor([[1.0, 1.0, 0.0]]))  # the third is padding
    assert reward.item() == pytest.approx((math.log(0.25 / 0.5) + math.log(0.5 / 0.25)) / 2, abs=1e-6)


def test_kl_reward_of_samples_estimates_the_kl_divergence():
    torch.manual_seed(0)
    now, start = torch.randn(2, 5).log_softmax(dim=1)
    drawn = torch.multinomial(now.exp(), 200_000, replacement=True)
    estimate = rivals.kl_reward(now[drawn, None], start[drawn, None], torch.ones(len(drawn), 1)).mean()
    assert -estimate.item() == pytest.approx((now.exp() * (now - start)).sum().item(), abs=0.01)


def test_corrupting_makes_every_kind_of_error_and_no_new_word():
    rng, caption = random.Random(0), "a red ring above a large blue bar"
    made = {rivals.corrupt(caption, rng) for _ in range(2000)}
    for error in ("a red red ring above a large blue bar", "a red above a large blue bar",
                  "a ring red above a large blue bar", "a red blue ring above a large blue bar"):  # fmt: skip
        assert error in made  # repeated, dropped, swapped, put in
    assert {len(each.split()) for each in made} == {7, 8, 9} and set(" ".join(made).split()) == set(caption.split())
    assert any(sorted(each.split()) == sorted(caption.split()) and each.split()[:2] == ["bar", "a"] for each in made)
    assert rivals.corrupt("ring", rng) in ("ring", "ring ring", "")


@pytest.mark.parametrize("regularizer", ["cider", "kl", "grammar"])
def test_a_rival_mixes_its_reward_into_that_of_clip(regularizer, start, world):
    captioner, clip = start
    config = distcap.configuration(distcap.TrainConfig, dict(baseline="greedy", similarity_weight=0.25, batch_size=4))
    rival = rivals.Rival(captioner, clip, world, config, regularizer)
    plain = distcap.Learner(captioner, clip, world, config)
    with torch.no_grad():  # move the captioner away from its teacher, else their KL is 0
        rival.captioner = copy.deepcopy(captioner)
        next(rival.captioner.model.text_decoder.parameters()).mul_(1.1)
    indices, own = torch.arange(4), torch.arange(4).repeat(3)
    rival.ground_truth, rival.pixels = (
        [world[n].references[0] for n in range(4)],
        captioner.pixels([world[n].image for n in range(4)]),
    )
    captions = ["a ring and a bar"] * 4 + rival.ground_truth + ["two shapes"] * 4
    embedded = rival.clip.embed_captions(captions)
    torch.manual_seed(0)
    mixed, rival.alpha = rival.similarity_rewards(embedded, indices, own), 0.0
    similarity = plain.similarity_rewards(embedded, indices, own)
    if regularizer == "grammar":  # its critic has learned since; its reward is a probability
        alone = (mixed - 0.25 * similarity) / 0.75
        assert alone.min() > 0 and alone.max() < 1
    else:
        alone = rival.similarity_rewards(embedded, indices, own)
        torch.testing.assert_close(mixed, 0.25 * similarity + 0.75 * alone)
        assert alone.abs().max() > 1e-3
    assert clip.embed_captions.__func__ is distcap.CLIP.embed_captions  # the CLIP that measures is left as it was


def test_the_grammar_critic_learns_to_tell_references_from_corrupted_ones(start, world):
    config = distcap.configuration(distcap.TrainConfig, dict(discriminator_learning_rate=3e-3))
    rival = rivals.Rival(*start, world, config, "grammar")
    rival.ground_truth, indices = [example.references[0] for example in world[:8]], torch.arange(8)
    captions = rival.clip.embed_captions([*rival.ground_truth, *rival.ground_truth, *rival.ground_truth])
    for _ in range(60):
        rival.grammar(captions, indices, indices.repeat(3))
    wrong = rival.embed([" ".join(reversed(caption.split())) for caption in rival.ground_truth])
    scores = [rival.critic(torch.zeros_like(each), each).mean().item() for each in (captions, wrong)]
    assert scores[0] > scores[1] + 1


@pytest.mark.parametrize("regularizer", ["cider", "kl", "grammar"])
def test_a_rival_trains(regularizer, start, world, tmp_path):
    captioner, clip = start
    config = distcap.configuration(
        distcap.TrainConfig, dict(baseline="greedy", ground_truth_weight=0.0, batch_size=4, steps=2, learning_rate=1e-3)
    )
    before = copy.deepcopy(captioner.state_dict())
    rival = rivals.Rival(copy.deepcopy(captioner), clip, world, config, regularizer)
    with open(tmp_path / "log.jsonl", "w") as log:
        rival.fit("rl", log)
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(step["reward"]) for step in steps) and len(steps) == 2
    assert any(not value.equal(before[name]) for name, value in rival.captioner.state_dict().items())
    assert all(value.equal(before[name]) for name, value in rival.teacher.state_dict().items())
