"""Section 8: the steps touch what they should, and learn."""

import io
import json

import pytest
import torch

import distcap


@pytest.fixture
def learner(world, clip):
    """A fresh captioner and discriminator beside the session's CLIP."""
    discriminator = distcap.Discriminator(96)
    embeddings = clip.embed_images(example.image for example in world)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    return distcap.Learner(distcap.toy_captioner(0).eval(), clip, embeddings, discriminator, optimizer)


@pytest.fixture
def batch(world, learner):
    """What `fit_captioner` hands to a step: indices, a ground-truth caption each, pixels."""
    indices = [3, 7, 11, 19]
    ground_truth = [world[index].references[reference] for index, reference in zip(indices, (0, 4, 2, 1))]
    return indices, ground_truth, learner.captioner.pixels([world[index].image for index in indices])


def configure(**values):
    return distcap.configuration(distcap.TrainConfig, {"device": "cpu", **values})


def gradients(learner, batch, config):
    """The captioner's gradient of one RL step, from the same random state each time."""
    torch.manual_seed(5)
    learner.captioner.zero_grad()
    loss, record = distcap.reinforce_step(learner, batch, config)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in learner.captioner.parameters() if p.grad is not None]), record


@pytest.mark.parametrize("objective", ["tf", "rl"])
def test_a_step_gets_what_the_schedule_says(learner, world, monkeypatch, objective):
    seen = []

    def step(learner, batch, config):
        seen.append(batch)
        return sum(p.sum() for p in learner.captioner.parameters()), {}

    monkeypatch.setattr(distcap, "teacher_forcing_step" if objective == "tf" else "reinforce_step", step)
    config = configure(steps=2, tf_steps=2, batch_size=4)
    distcap.fit_captioner(learner, world, objective, config, io.StringIO())
    for (indices, ground_truth, pixels), batch in zip(seen, distcap.schedule(world, 4, 2, config.seed)):
        assert indices == [index for index, _ in batch]
        assert ground_truth == [world[index].references[reference] for index, reference in batch]
        torch.testing.assert_close(pixels, learner.captioner.pixels([world[index].image for index in indices]))


def test_teacher_forcing_step_equals_the_loss_of_transformers(learner, batch):
    """BLIP's own loss, without its label smoothing, on captions of equal length, is the same mean over tokens."""
    _, ground_truth, pixels = batch
    loss, _ = distcap.teacher_forcing_step(learner, batch, configure())
    per_caption = []
    for row, text in enumerate(ground_truth):
        tokens = learner.captioner.tokenize([text], 20)
        logits = learner.captioner.model(pixel_values=pixels[row : row + 1], input_ids=tokens).logits[0, :-1]
        per_caption.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
    torch.testing.assert_close(loss, torch.stack(per_caption).mean())


def test_the_terms_of_the_step_add_up(learner, batch):
    """Weights scale the two terms: the full gradient is the sampled one plus the ground-truth one."""
    state = {name: value.clone() for name, value in learner.discriminator.state_dict().items()}

    def part(**weights):
        learner.discriminator.load_state_dict(state)
        return gradients(learner, batch, configure(baseline="greedy", **weights))[0]

    sampled, ground_truth = part(ground_truth_weight=0.0), part(sampled_weight=0.0)
    assert sampled.abs().sum() > 0 and ground_truth.abs().sum() > 0
    torch.testing.assert_close(part(), sampled + ground_truth, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part(sampled_weight=2.0), 2 * sampled + ground_truth, atol=1e-5, rtol=1e-4)


def test_every_caption_gets_its_own_advantage(learner, batch, monkeypatch):
    """The pool is (sampled, ground truth, greedy), and each third goes where it belongs, for either baseline."""
    seen = {}
    rewards = torch.tensor([1.0, 2, 3, 6, 10, 20, 30, 40, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(distcap, "pool_rewards", lambda *_: (rewards, 0.5))
    for name in ("reinforce_loss", "ground_truth_loss"):

        def spy(log_probs, mask, advantages, name=name):
            seen[name] = advantages.tolist(), mask.sum(dim=1).tolist()
            return log_probs.sum()

        monkeypatch.setattr(distcap, name, spy)
    lengths = learner.captioner.mask(learner.captioner.tokenize(batch[1], 20)).sum(dim=1).tolist()
    distcap.reinforce_step(learner, batch, configure())
    assert seen["reinforce_loss"][0] == [-2, -1, 0, 3] and seen["ground_truth_loss"] == ([10, 20, 30, 40], lengths)
    distcap.reinforce_step(learner, batch, configure(baseline="greedy"))
    assert seen["reinforce_loss"][0] == [0.5, 1.5, 2.5, 5.5]
    assert seen["ground_truth_loss"] == ([9.5, 19.5, 29.5, 39.5], lengths)


def test_only_the_right_networks_change(learner, batch):
    frozen = {name: value.clone() for name, value in learner.clip.model.state_dict().items()}
    before = [p.clone() for p in learner.discriminator.parameters()]
    gradients(learner, batch, configure())
    assert all(torch.equal(value, frozen[name]) for name, value in learner.clip.model.state_dict().items())
    assert all(p.grad is None for p in learner.clip.model.parameters())
    assert not torch.equal(before[0], next(learner.discriminator.parameters()))


def test_rewards_are_eq_3_with_scores_from_before_the_discriminators_step(learner):
    captions, images = (torch.nn.functional.normalize(torch.randn(n, 96), dim=1) for n in (6, 2))
    own = images[[0, 1, 0, 1, 0, 1]]
    human = learner.discriminator(own, captions).sigmoid().detach()
    rewards, accuracy = distcap.pool_rewards(learner, captions, images, configure(similarity_weight=0.6))
    scale = learner.clip.logit_scale
    similarity = distcap.contrastive_reward(captions, images, torch.tensor([0, 1, 0, 1, 0, 1]), scale)
    torch.testing.assert_close(rewards, 0.6 * similarity + 0.4 * human)
    assert not rewards.requires_grad
    assert accuracy == pytest.approx(((human[:2] < 0.5).sum() + (human[2:4] > 0.5).sum()).item() / 4)


def test_the_self_critical_reward_is_the_plain_cosine(learner):
    captions, images = (torch.nn.functional.normalize(torch.randn(n, 96), dim=1) for n in (6, 2))
    config = configure(similarity_weight=1.0, baseline="greedy")
    rewards, _ = distcap.pool_rewards(learner, captions, images, config)
    torch.testing.assert_close(rewards, (captions * images.repeat(3, 1)).sum(dim=1))


@pytest.mark.parametrize("objective", ["tf", "rl"])
def test_captioner_has_dropout_only_while_teacher_forcing(learner, world, objective, monkeypatch):
    modes = []

    def step(learner, batch, config):
        modes.append(learner.captioner.training)
        return sum(p.sum() for p in learner.captioner.parameters()), {}

    monkeypatch.setattr(distcap, "teacher_forcing_step", step)
    monkeypatch.setattr(distcap, "reinforce_step", step)
    config = configure(steps=1, tf_steps=1, batch_size=4)
    distcap.fit_captioner(learner, world, objective, config, io.StringIO())
    assert modes == [objective == "tf"] and not learner.captioner.training


def test_gradients_are_clipped_and_every_step_is_logged():
    model, log = torch.nn.Linear(1, 1, bias=False), io.StringIO()
    torch.nn.init.constant_(model.weight, 1.0)
    norms = []

    def step(batch):
        model.weight.register_hook(lambda gradient: norms.append(gradient.item()))
        return 1e6 * model.weight.sum(), {"reward": float(batch)}

    distcap.fit("rl", model, step, [1, 2, 3], 0.1, configure(max_gradient_norm=0.5), log)
    records = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [(record["stage"], record["step"], record["reward"]) for record in records] == [
        ("rl", 0, 1.0), ("rl", 1, 2.0), ("rl", 2, 3.0)
    ]  # fmt: skip
    assert model.weight.grad.norm() <= 0.5 + 1e-6 and model.weight.item() < 1


def test_teacher_forcing_learns(learner, world):
    log = io.StringIO()
    config = configure(tf_steps=30, batch_size=16)
    distcap.fit_captioner(learner, world, "tf", config, log)
    losses = [json.loads(line)["loss"] for line in log.getvalue().splitlines()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_reinforcement_raises_the_mean_reward(run, world):
    """From the captioner of a short run: the samples' mean reward of the last steps beats that of the first."""
    captioner, clip = distcap.Captioner.load(str(run)), distcap.CLIP.load(str(run))
    training = distcap.toy_world(0, 300, 40)[0]
    embeddings = clip.embed_images(example.image for example in training)
    discriminator = distcap.Discriminator(96)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    learner = distcap.Learner(captioner, clip, embeddings, discriminator, optimizer)
    log = io.StringIO()
    distcap.fit_captioner(learner, training, "rl", configure(steps=60, batch_size=32), log)
    rewards = [json.loads(line)["reward"] for line in log.getvalue().splitlines()]
    assert sum(rewards[-15:]) > sum(rewards[:15]) + 15 * 0.01


def test_the_same_seed_gives_the_same_bits(learner, world):
    def train():
        learner.captioner = distcap.toy_captioner(0)
        torch.manual_seed(0)
        learner.discriminator = distcap.Discriminator(96)
        learner.discriminator_optimizer = torch.optim.AdamW(learner.discriminator.parameters(), lr=1e-3)
        log = io.StringIO()
        distcap.fit_captioner(learner, world, "rl", configure(steps=3, batch_size=8), log)
        return log.getvalue(), torch.cat([p.detach().flatten() for p in learner.captioner.parameters()])

    (log, weights), (log_again, weights_again) = train(), train()
    assert log == log_again and torch.equal(weights, weights_again)
