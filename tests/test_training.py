"""Section 8: the steps touch what they should, and learn."""

import copy
import io
import json

import pytest
import torch

import distcap


def configure(**values):
    return distcap.configuration(distcap.TrainConfig, {"device": "cpu", **values})


@pytest.fixture
def learn(world, clip):
    """Make a learner with a fresh captioner and discriminator beside the session's CLIP."""
    return lambda **values: distcap.Learner(distcap.toy_captioner(0).eval(), clip, world, configure(**values))


@pytest.fixture
def batch(world, captioner):
    """What a step takes: indices, a ground-truth caption each, pixels."""
    indices = [3, 7, 11, 19]
    ground_truth = [world[index].references[reference] for index, reference in zip(indices, (0, 4, 2, 1))]
    return torch.tensor(indices), ground_truth, captioner.pixels([world[index].image for index in indices])


def gradients(learner, batch):
    """The captioner's gradient of one RL step, from the same random state each time."""
    torch.manual_seed(5)
    learner.captioner.zero_grad()
    loss, record = learner.reinforce_step(*batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in learner.captioner.parameters() if p.grad is not None]), record


def spy(monkeypatch, owner, name, result=None):
    """Record the arguments of each call of owner.name, which goes on, or gives `result`."""
    calls, original = [], getattr(owner, name)

    def called(*arguments, **options):
        calls.append(arguments)
        return original(*arguments, **options) if result is None else result

    monkeypatch.setattr(owner, name, called)
    return calls


@pytest.mark.parametrize("objective", ["tf", "rl"])
def test_a_step_gets_what_the_schedule_says(learn, world, objective):
    learner, seen = learn(steps=2, tf_steps=2, batch_size=4), []

    def step(*batch):
        seen.append(batch)
        return sum(p.sum() for p in learner.captioner.parameters()), {}

    setattr(learner, "teacher_forcing_step" if objective == "tf" else "reinforce_step", step)
    learner.fit(objective, io.StringIO())
    for (indices, ground_truth, pixels), batch in zip(seen, distcap.schedule(world, 4, 2, learner.config.seed)):
        assert indices.tolist() == [index for index, _ in batch]
        assert ground_truth == [world[index].references[reference] for index, reference in batch]
        torch.testing.assert_close(pixels, learner.captioner.pixels([world[index].image for index in indices]))


def test_teacher_forcing_step_equals_the_loss_of_transformers(learn, batch):
    """BLIP's own loss, without its label smoothing, on captions of equal length, is the same mean over tokens."""
    learner, (_, ground_truth, pixels) = learn(), batch
    loss, _ = learner.teacher_forcing_step(*batch)
    per_caption = []
    for row, text in enumerate(ground_truth):
        tokens = learner.captioner.tokenize([text], 20)
        logits = learner.captioner.model(pixel_values=pixels[row : row + 1], input_ids=tokens).logits[0, :-1]
        per_caption.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
    torch.testing.assert_close(loss, torch.stack(per_caption).mean())


def test_the_terms_of_the_step_add_up(learn, batch):
    """Weights scale the two terms: the full gradient is the sampled one plus the ground-truth one."""

    def part(**weights):
        return gradients(learn(baseline="greedy", **({"ground_truth_weight": 1.0} | weights)), batch)[0]

    sampled, ground_truth = part(ground_truth_weight=0.0), part(sampled_weight=0.0)
    assert sampled.abs().sum() > 0 and ground_truth.abs().sum() > 0
    torch.testing.assert_close(part(), sampled + ground_truth, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part(sampled_weight=2.0), 2 * sampled + ground_truth, atol=1e-5, rtol=1e-4)


# rewards of the pool: two samples of each of the four images, the ground truth, the greedy captions
POOL = torch.tensor([1.0, 3, 2, 4, 3, 5, 6, 8, 10, 20, 30, 40, 0.5, 1.5, 2.5, 3.5])
ADVANTAGES = {
    "contrastive": ([-3, -1, -2, 0, -1, 1, 2, 4], [10, 20, 30, 40]),
    "greedy": ([0.5, 2.5, 0.5, 2.5, 0.5, 2.5, 2.5, 4.5], [9.5, 18.5, 27.5, 36.5]),
    "group": ([-2, 2, -2, 2, -2, 2, -2, 2], [8, 17, 26, 33]),
    "neighbours": ([1, 3, 2, 4, 3, 5, 6, 8], [10, 20, 30, 40]),
    "none": ([1, 3, 2, 4, 3, 5, 6, 8], [10, 20, 30, 40]),
}


@pytest.mark.parametrize("baseline", ADVANTAGES)
def test_every_caption_gets_its_own_advantage(learn, batch, monkeypatch, baseline):
    """The pool is sampled (an image's K in a row), ground truth, greedy; each part goes where it belongs."""
    learner = learn(baseline=baseline, samples=2, neighbours=2)
    monkeypatch.setattr(distcap, "mixed_reward", lambda *_: POOL)
    sampled, human = (spy(monkeypatch, distcap, name) for name in ("reinforce_loss", "ground_truth_loss"))
    learner.reinforce_step(*batch)
    assert (sampled[0][2].tolist(), human[0][2].tolist()) == ADVANTAGES[baseline]
    lengths = learner.captioner.mask(learner.captioner.tokenize(batch[1], 20)).sum(dim=1).tolist()
    assert len(sampled[0][0]) == 8 and human[0][1].sum(dim=1).tolist() == lengths


@pytest.mark.parametrize("samples", [1, 3])
def test_every_caption_is_scored_beside_its_own_image(learn, batch, monkeypatch, samples):
    """What the losses get are the log-probabilities of each image's own captions, as one pair at a time gives them."""
    learner, captioner = learn(samples=samples), distcap.Captioner
    drawn = []
    generate = captioner.generate
    monkeypatch.setattr(captioner, "generate", lambda *a, **o: drawn.append(generate(*a, **o)) or drawn[-1])
    losses = spy(monkeypatch, distcap, "reinforce_loss")
    learner.reinforce_step(*batch)
    sampled, log_probs, mask = drawn[0], losses[0][0], losses[0][1]
    features = learner.captioner.encode(batch[2])
    for row, tokens in enumerate(sampled):
        alone = learner.captioner.log_probs(features[row // samples][None], tokens[None])[0]
        length = int(mask[row].sum())
        torch.testing.assert_close(log_probs[row, :length], alone[:length], atol=1e-5, rtol=1e-4)


def test_only_the_right_networks_change(learn, batch):
    learner = learn()
    frozen = {name: value.clone() for name, value in learner.clip.model.state_dict().items()}
    before = [p.clone() for p in learner.discriminator.parameters()]
    gradients(learner, batch)
    assert all(torch.equal(value, frozen[name]) for name, value in learner.clip.model.state_dict().items())
    assert all(p.grad is None for p in learner.clip.model.parameters())
    assert not torch.equal(before[0], next(learner.discriminator.parameters()))


def test_rewards_are_eq_3_with_scores_from_before_the_discriminators_step(learn, batch, monkeypatch):
    learner = learn(similarity_weight=0.6)
    before, embedded = copy.deepcopy(learner.discriminator), []
    embed = learner.clip.embed_captions
    monkeypatch.setattr(learner.clip, "embed_captions", lambda texts: embedded.append(embed(texts)) or embedded[-1])
    mixed, advantages = spy(monkeypatch, distcap, "mixed_reward"), spy(monkeypatch, learner, "advantages")
    _, record = learner.reinforce_step(*batch)
    captions, own = embedded[0], torch.arange(4).repeat(3)
    human = before(learner.images[batch[0]][own], captions).sigmoid().detach()
    similarity = distcap.contrastive_reward(captions, learner.images[batch[0]], own, learner.clip.logit_scale)
    torch.testing.assert_close(torch.cat(advantages[0]), 0.6 * similarity + 0.4 * human)
    assert not mixed[0][1].requires_grad
    right = (human[:4] < 0.5).sum() + (human[4:8] > 0.5).sum()
    assert record["discriminator_accuracy"] == pytest.approx(right.item() / 8)


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_similarity_rewards_by_baseline(learn):
    """Eq. 6 over the batch, Eq. 8 over the neighbours of each caption's image, else the plain cosine."""
    captions, indices, own = unit(6, 96), torch.tensor([3, 7]), torch.tensor([0, 1, 0, 1, 0, 1])
    learner = learn(baseline="contrastive")
    images = learner.images[indices]
    eq_6 = distcap.contrastive_reward(captions, images, own, learner.clip.logit_scale)
    torch.testing.assert_close(learner.similarity_rewards(captions, indices, own), eq_6)
    for baseline in ("greedy", "group", "none"):
        rewards = learn(baseline=baseline).similarity_rewards(captions, indices, own)
        torch.testing.assert_close(rewards, (captions * images[own]).sum(dim=1))
    learner = learn(baseline="neighbours", neighbours=3)
    near = learner.images[distcap.nearest_images(learner.images, indices[own], 3)]
    eq_8 = distcap.neighbours_reward(captions, images[own], near)
    torch.testing.assert_close(learner.similarity_rewards(captions, indices, own), eq_8)


def test_hard_negatives_compete_once_each_and_never_the_own_image(learn):
    captions, own = unit(6, 96), torch.tensor([0, 1, 0, 1, 0, 1])
    learner = learn(neighbours=4)
    near = distcap.nearest_images(learner.images, torch.arange(len(learner.images)), 4)
    indices = torch.tensor([3, near[3, 0]])  # one neighbour of the first is in the batch
    extra = set(near[indices].flatten().tolist()) - set(indices.tolist())
    images = torch.cat([learner.images[indices], learner.images[sorted(extra)]])
    expected = distcap.contrastive_reward(captions, images, own, learner.clip.logit_scale)
    rewards = learner.similarity_rewards(captions, indices, own)
    torch.testing.assert_close(rewards, expected)
    assert (rewards <= learn().similarity_rewards(captions, indices, own) + 1e-6).all()  # rivals cannot help


@pytest.mark.parametrize("baseline", ["group", "neighbours", "none"])
def test_every_baseline_trains(learn, baseline):
    log = io.StringIO()
    learner = learn(baseline=baseline, samples=2, neighbours=2, steps=3, batch_size=4)
    before = torch.cat([p.detach().flatten() for p in learner.captioner.parameters()])
    learner.fit("rl", log)
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in learner.captioner.parameters()]))
    assert all(abs(json.loads(line)["loss"]) < 100 for line in log.getvalue().splitlines())


@pytest.mark.parametrize("objective", ["tf", "rl"])
def test_captioner_has_dropout_only_while_teacher_forcing(learn, objective):
    learner, modes = learn(steps=1, tf_steps=1, batch_size=4), []

    def step(*_):
        modes.append(learner.captioner.training)
        return sum(p.sum() for p in learner.captioner.parameters()), {}

    learner.teacher_forcing_step = learner.reinforce_step = step
    learner.fit(objective, io.StringIO())
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


def test_a_step_that_is_not_finite_changes_nothing():
    """Infinite loss and infinite gradient of a finite loss alike; the steps between them count."""
    model, log = torch.nn.Linear(1, 1, bias=False), io.StringIO()
    weights = []

    def step(batch):
        weights.append(model.weight.item())
        weight = model.weight.sum()
        return {"good": weight, "loss": weight * torch.inf, "gradient": (weight * 0).sqrt()}[batch], {}

    batches = ["good", "loss", "gradient", "good"]
    distcap.fit("rl", model, step, batches, 0.1, configure(), log)
    assert weights[0] != weights[1] == weights[2] == weights[3] != model.weight.item()
    assert model.weight.isfinite().all() and len(log.getvalue().splitlines()) == 4


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run():
    model, log = torch.nn.Linear(1, 1, bias=False), io.StringIO()

    def step(batch):
        return model.weight.sum() * (torch.inf if batch else 1), {}

    distcap.fit("rl", model, step, [1] * 9 + [0] + [1] * 9, 0.1, configure(), log)  # nine are not ten
    with pytest.raises(distcap.UserError, match="lower --learning-rate"):
        distcap.fit("rl", model, step, [1] * 10 + [0], 0.1, configure(), log)
    assert model.weight.isfinite().all()


def test_teacher_forcing_learns(learn):
    log = io.StringIO()
    learn(tf_steps=30, batch_size=16).fit("tf", log)
    losses = [json.loads(line)["loss"] for line in log.getvalue().splitlines()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_reinforcement_raises_the_mean_reward(run):
    """From the captioner of a short run: the samples' mean reward of the last steps beats that of the first."""
    training, log = distcap.toy_world(0, 300, 40)[0], io.StringIO()
    parts = distcap.Captioner.load(str(run)), distcap.CLIP.load(str(run))
    distcap.Learner(*parts, training, configure(steps=60, batch_size=32)).fit("rl", log)
    rewards = [json.loads(line)["reward"] for line in log.getvalue().splitlines()]
    assert sum(rewards[-15:]) > sum(rewards[:15]) + 15 * 0.01


def test_the_same_seed_gives_the_same_bits(learn):
    def train():
        learner, log = learn(steps=3, batch_size=8), io.StringIO()
        learner.fit("rl", log)
        return log.getvalue(), torch.cat([p.detach().flatten() for p in learner.captioner.parameters()])

    (log, weights), (log_again, weights_again) = train(), train()
    assert log == log_again and torch.equal(weights, weights_again)
