"""One step: what is in a Rollout, how it is judged, where the gradient goes."""

import dataclasses

import pytest
import torch

import distcap


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def gradients(learner, batch, seed=5):
    """The captioner's gradient of one RL step, from the same random state each time."""
    torch.manual_seed(seed)
    learner.captioner.model.zero_grad()
    loss, record = learner.reinforce_step(batch)
    loss.backward()
    grads = [p.grad.flatten() for p in learner.captioner.model.parameters() if p.grad is not None]
    return torch.cat(grads), record


@pytest.mark.parametrize("samples", [1, 3])
def test_the_pool_is_sampled_human_greedy_in_that_order(learn, samples):
    learner, batch = learn(samples=samples)
    captioner = learner.captioner
    with torch.no_grad():
        features = captioner.encode(batch.pixels)
    torch.manual_seed(7)
    sampled, greedy = map(captioner.decode, captioner.sample_and_greedy(features, 20, samples))
    torch.manual_seed(7)
    rollout = learner.roll_out(features, batch)
    assert rollout.captions == sampled + batch.ground_truth + greedy
    assert rollout.sizes == (4 * samples, 4, 4)
    row = torch.arange(4)
    own = torch.cat([row.repeat_interleave(samples), row, row])
    assert rollout.image_index.tolist() == own.tolist()
    assert captioner.decode(rollout.tokens) == rollout.captions
    embeddings = learner.clip.embed_captions(rollout.captions)
    assert rollout.caption_embeddings.equal(embeddings)
    assert rollout.image_embeddings.equal(learner.image_embeddings[batch.index])


def test_nothing_in_a_rollout_has_a_gradient(learn):
    learner, batch = learn()
    rollout = learner.roll_out(learner.captioner.encode(batch.pixels), batch)
    for field in dataclasses.fields(rollout):
        value = getattr(rollout, field.name)
        assert not (isinstance(value, torch.Tensor) and value.requires_grad), field.name
    advantages, _, _ = learner.judge(rollout, batch)
    assert not advantages.requires_grad


def test_a_step_is_roll_out_judge_and_loss_in_a_row(learn):
    learner, batch = learn()
    torch.manual_seed(3)
    loss, record = learner.reinforce_step(batch)
    torch.manual_seed(3)
    features = learner.captioner.encode(batch.pixels)
    rollout = learner.roll_out(features, batch)
    advantages, regularizer_loss, judged = learner.judge(rollout, batch)
    torch.testing.assert_close(loss, learner.loss(features, rollout, advantages) + regularizer_loss)
    assert record == judged


# Rewards of the pool: two samples of each of the four images, the human and the greedy captions.
SAMPLED = torch.tensor([1.0, 3, 2, 4, 3, 5, 6, 8])
HUMAN, GREEDY = torch.tensor([10.0, 20, 30, 40]), torch.tensor([0.5, 1.5, 2.5, 3.5])
ADVANTAGES = {
    "contrastive": ([-3, -1, -2, 0, -1, 1, 2, 4], [10, 20, 30, 40]),
    "greedy": ([0.5, 2.5, 0.5, 2.5, 0.5, 2.5, 2.5, 4.5], [9.5, 18.5, 27.5, 36.5]),
    "group": ([-2, 2, -2, 2, -2, 2, -2, 2], [8, 17, 26, 33]),
    "neighbours": ([1, 3, 2, 4, 3, 5, 6, 8], [10, 20, 30, 40]),
    "none": ([1, 3, 2, 4, 3, 5, 6, 8], [10, 20, 30, 40]),
}


@pytest.mark.parametrize("baseline", ADVANTAGES)
def test_advantages_of_each_baseline_by_hand(learn, baseline):
    learner, _ = learn(baseline=baseline, samples=2, neighbours=2)
    sampled, human = ADVANTAGES[baseline]
    found = learner.advantages(SAMPLED, HUMAN, GREEDY)
    torch.testing.assert_close(found, torch.tensor([*sampled, *human]).float())


@pytest.mark.parametrize("samples", [1, 3])
def test_every_caption_is_scored_beside_its_own_image(learn, samples):
    """The gradient of the loss is that of one caption at a time, each with its own advantage."""
    learner, batch = learn(samples=samples, sampled_weight=0.7, ground_truth_weight=1.3)
    captioner = learner.captioner
    features = captioner.encode(batch.pixels)
    rollout = learner.roll_out(features, batch)
    advantages = torch.randn(4 * samples + 4)
    loss = learner.loss(features, rollout, advantages)
    slow = 0
    for row, advantage in enumerate(advantages.tolist()):
        image = batch.pixels[rollout.image_index[row]][None]
        log_probs, mask = captioner.log_probs(captioner.encode(image), rollout.tokens[row][None])
        log_p = (log_probs * mask).sum() / 20
        sampled = row < 4 * samples
        weight = 0.7 / (4 * samples) if sampled else 1.3 / 4
        slow = slow - weight * (advantage if sampled else max(advantage, 0)) * log_p
    torch.testing.assert_close(loss, slow, atol=1e-6, rtol=1e-4)
    parameters = list(captioner.model.parameters())
    fast = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    twin = torch.autograd.grad(slow, parameters, allow_unused=True)
    for one, other in zip(fast, twin):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_the_longest_caption_allowed_is_the_constant(learn):
    learner, _ = learn(max_length=12)
    assert learner.divisor == 12
    assert learn(length_normalizer="caption")[0].divisor is None


def test_the_gradient_reaches_the_vision_tower_and_no_other_network(learn):
    learner, batch = learn()
    frozen = {name: value.clone() for name, value in learner.clip.model.state_dict().items()}
    gradients(learner, batch)
    vision = learner.captioner.model.vision_model.embeddings.patch_embedding.weight
    assert vision.grad.abs().sum() > 0
    assert all(value.equal(frozen[name]) for name, value in learner.clip.model.state_dict().items())
    assert all(p.grad is None for p in learner.clip.model.parameters())


def test_the_regularizers_loss_does_not_reach_the_captioner(learn):
    """One backward serves both; without the discriminator's loss the gradient is the same."""
    learner, batch = learn()
    whole, _ = gradients(learner, batch)
    torch.manual_seed(5)
    learner.captioner.model.zero_grad()
    features = learner.captioner.encode(batch.pixels)
    rollout = learner.roll_out(features, batch)
    advantages, _, _ = learner.judge(rollout, batch)
    learner.loss(features, rollout, advantages).backward()
    alone = [p.grad.flatten() for p in learner.captioner.model.parameters() if p.grad is not None]
    assert torch.equal(whole, torch.cat(alone))


def test_the_terms_of_the_step_add_up(learn):
    """Weights scale the two terms: the whole gradient is the sampled one plus the human one."""

    def part(**weights):
        return gradients(*learn(baseline="greedy", **weights))[0]

    sampled, human = part(ground_truth_weight=0.0), part(sampled_weight=0.0)
    assert sampled.abs().sum() > 0 and human.abs().sum() > 0
    torch.testing.assert_close(part(), sampled + human, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part(sampled_weight=2.0), 2 * sampled + human, atol=1e-5, rtol=1e-4)


def test_similarity_rewards_by_baseline(learn):
    """Eq. 6 over the batch, Eq. 8 over the neighbours of each caption's image, or the cosine."""
    for baseline in ("contrastive", "greedy", "group", "none", "neighbours"):
        learner, batch = learn(baseline=baseline, samples=2, neighbours=3)
        rollout = learner.roll_out(learner.captioner.encode(batch.pixels), batch)
        captions, own = rollout.caption_embeddings, rollout.image_index
        images = learner.image_embeddings[batch.index]
        expected = (captions * images[own]).sum(dim=1)
        if baseline == "neighbours":
            near = distcap.nearest_images(learner.image_embeddings, batch.index, 3)
            near = learner.image_embeddings[near[own]]
            expected = distcap.neighbours_reward(captions, images[own], near)
        if baseline == "contrastive":
            learner.method = dataclasses.replace(learner.method, neighbours=0)
            scale = learner.clip.logit_scale
            expected = distcap.contrastive_reward(captions, images, own, scale)
        torch.testing.assert_close(learner.similarity_rewards(rollout, batch), expected)


def test_hard_negatives_compete_once_each_and_never_the_own_image(learn):
    learner, batch = learn(neighbours=4)
    near = distcap.nearest_images(learner.image_embeddings, batch.index, 4)
    index = torch.cat([batch.index[:3], near[:1, 0]])  # a neighbour of the first is in the batch
    batch = dataclasses.replace(batch, index=index)
    near = distcap.nearest_images(learner.image_embeddings, index, 4)
    rollout = learner.roll_out(learner.captioner.encode(batch.pixels), batch)
    extra = sorted(set(near.flatten().tolist()) - set(index.tolist()))
    images = torch.cat([learner.image_embeddings[index], learner.image_embeddings[extra]])
    scale, own = learner.clip.logit_scale, rollout.image_index
    expected = distcap.contrastive_reward(rollout.caption_embeddings, images, own, scale)
    rewards = learner.similarity_rewards(rollout, batch)
    torch.testing.assert_close(rewards, expected)
    learner.method = dataclasses.replace(learner.method, neighbours=0)
    without = learner.similarity_rewards(rollout, batch)
    assert (rewards <= without + 1e-6).all() and extra  # rivals cannot help


def test_a_competitor_changes_the_reward_but_is_not_scored(learn):
    """The greedy captions compete in Eq. 6; no gradient makes them likelier."""
    learner, batch = learn()
    features = learner.captioner.encode(batch.pixels)
    rollout = learner.roll_out(features, batch)
    advantages, _, _ = learner.judge(rollout, batch)
    stronger = rollout.caption_embeddings.clone()
    stronger[8:] = rollout.image_embeddings  # greedy captions that fit perfectly
    other = dataclasses.replace(rollout, caption_embeddings=stronger)
    assert (learner.judge(other, batch)[0][4:] < advantages[4:]).all()
    tokens = rollout.tokens.clone()
    tokens[8:] = rollout.tokens[:4]
    other = dataclasses.replace(rollout, tokens=tokens)
    whole, same = (learner.loss(features, each, advantages) for each in (rollout, other))
    assert whole.equal(same)


def test_the_record_is_numbers_that_json_can_hold(learn):
    learner, batch = learn()
    _, record = learner.reinforce_step(batch)
    names = {"reward", "ground_truth_reward", "greedy_reward", "regularizer_loss", "mean_length"}
    names |= {"similarity", "regularizer", "ground_truth_share"}
    names |= {"similarity_spread", "regularizer_spread"}
    assert names | {"discriminator_accuracy"} == set(record)
    assert all(type(value) is float for value in record.values())


def test_teacher_forcing_equals_the_loss_of_transformers(learn):
    """BLIP's own loss, one caption at a time, without its label smoothing; summed, not averaged."""
    learner, batch = learn()
    loss, _ = learner.teacher_forcing_step(batch)
    per_caption = []
    for row, text in enumerate(batch.ground_truth):
        tokens, pixels = learner.captioner.tokenize([text], 20), batch.pixels[row : row + 1]
        logits = learner.captioner.model(pixel_values=pixels, input_ids=tokens).logits[0, :-1]
        summed = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        per_caption.append(summed / 20)
    torch.testing.assert_close(loss, torch.stack(per_caption).mean())


class Table:
    """A captioner that is no network: a table of logits for each place, of words 0 (end), 1, 2."""

    pad = 0

    def __init__(self):
        self.logits = torch.randn(2, 4, 3, requires_grad=True)  # of 2 images, 4 places

    def eval(self):
        return self

    def encode(self, pixels):
        return pixels  # (B, 1): which image

    def sample_and_greedy(self, features, max_length, count):
        rows = self.logits[features[:, 0].repeat_interleave(count)].softmax(dim=-1).detach()
        sampled = torch.multinomial(rows.flatten(0, 1), 1).view(len(rows), -1)[:, :max_length]
        return sampled, self.greedy(features, max_length)

    def greedy(self, features, max_length):
        return self.logits[features[:, 0]].argmax(dim=-1)[:, :max_length]

    def tokenize(self, captions, max_length):
        return torch.tensor([[*map(int, c), 0, 0, 0, 0][:max_length] for c in captions])

    def decode(self, tokens):
        return ["".join(map(str, row.tolist())).split("0")[0] for row in tokens]

    def log_probs(self, features, tokens, image_index):
        images = features[image_index, 0]
        rows = self.logits[images][:, : tokens.shape[1]].log_softmax(dim=-1)
        ends = (tokens == 0).long()
        mask = ((ends.cumsum(dim=1) - ends) == 0).float()
        return rows.gather(2, tokens[:, :, None]).squeeze(2), mask


class Clip:
    """Captions as unit rows, by their words alone."""

    logit_scale = 5.0

    def embed_captions(self, captions):
        rows = [[c.count("1") + 0.1, c.count("2") + 0.1, 1.0] for c in captions]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


@pytest.mark.parametrize("regularizer", ["discriminator", "kl", "grammar", "cider", "none"])
def test_the_core_needs_five_methods_of_a_captioner_and_one_of_a_clip(regularizer):
    """It learns with a table for a captioner and a word count for CLIP: the words of each image."""
    method = distcap.Method(regularizer=regularizer, samples=8)
    learner = distcap.Learner(Table(), Clip(), method, max_length=4)
    learner.image_embeddings = learner.clip.embed_captions(["111", "222"])
    learner.regularizer = distcap.make_regularizer(learner, [["111"], ["222"]])
    pixels = torch.tensor([[0], [1]])
    batch = distcap.Batch(torch.tensor([0, 1]), ["111", "222"], pixels)
    optimizer = torch.optim.Adam([learner.captioner.logits], lr=0.1)
    for _ in range(80):
        loss, _ = learner.reinforce_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    greedy = learner.captioner.greedy(pixels, 4)
    first, second = learner.captioner.decode(greedy)
    assert set(first) == {"1"} and set(second) == {"2"}
