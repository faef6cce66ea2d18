"""Regularizers: the discriminator (Eq. 4), KL, CIDEr and grammar (Eq. 10), behind one interface."""

import copy
import math

import pytest
import torch
from pycocoevalcap.cider.cider import Cider

import distcap

ALL = ("discriminator", "paced", "kl", "cider", "grammar", "none")


def rollout_of(learner, batch):
    """What a step writes."""
    return learner.roll_out(learner.captioner.encode(batch.pixels), batch)


@pytest.mark.parametrize("regularizer", ALL)
def test_one_interface(learn, regularizer):
    """A score for each caption of the pool, without gradient; a loss for the network alone."""
    learner, batch = learn(regularizer=regularizer, samples=2)
    rollout = rollout_of(learner, batch)
    scores, loss, record = learner.regularizer.score(rollout, batch)
    assert scores.shape == (16,) and scores.isfinite().all() and not scores.requires_grad
    assert loss.shape == () and all(math.isfinite(value) for value in record.values())
    learns = regularizer in distcap.LEARNING
    weights = [p for p in learner.regularizer.network.parameters() if p.requires_grad]
    assert loss.requires_grad == learns == bool(weights)
    if learns:
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in learner.regularizer.network.parameters())
    assert all(p.grad is None for p in learner.captioner.model.parameters())


@pytest.mark.parametrize("regularizer", ALL)
def test_eq_3_mixes_it_into_the_similarity(learn, regularizer):
    """From the record: the samples' mean reward is alpha of the similarity and the rest of this."""
    values = dict(baseline="greedy", regularizer=regularizer)
    learner, batch = learn(**values, similarity_weight=0.25)
    rollout = rollout_of(learner, batch)
    torch.manual_seed(2)
    scores, _, _ = learner.regularizer.score(rollout, batch)
    similarity = learner.similarity_rewards(rollout, batch)
    expected = 0.25 * similarity + 0.75 * scores if regularizer != "none" else similarity
    torch.manual_seed(2)  # grammar and paced corrupt by chance
    _, _, record = learner.judge(rollout, batch)
    assert record["reward"] == pytest.approx(expected[:4].mean().item(), abs=1e-6)
    assert record["ground_truth_reward"] == pytest.approx(expected[4:8].mean().item(), abs=1e-6)


def test_no_regularizer_pays_nothing(learn):
    learner, batch = learn(regularizer="none")
    scores, loss, record = learner.regularizer.score(rollout_of(learner, batch), batch)
    assert (scores == 0).all() and loss == 0 and record == {}


def test_discriminator_loss_by_hand():
    loss = distcap.discriminator_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0]))
    sigmoid = 1 / (1 + math.exp(-2))
    by_hand = -(2 * math.log(0.5) + math.log(1 - sigmoid) + math.log(sigmoid)) / 4
    torch.testing.assert_close(loss, torch.tensor(by_hand))


def test_discriminator_loss_equals_binary_cross_entropy_and_is_finite_for_sure_logits():
    sampled, human = torch.randn(7), torch.randn(7)
    labels = torch.cat([torch.zeros(7), torch.ones(7)])
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = cross_entropy(torch.cat([sampled, human]), labels)
    torch.testing.assert_close(distcap.discriminator_loss(sampled, human), expected)
    sure = distcap.discriminator_loss(torch.tensor([1000.0]), torch.tensor([-1000.0]))
    assert sure.isfinite()


def test_both_halves_of_the_loss_weigh_the_same():
    """K samples of each image against one human caption: more samples, no more weight."""
    sampled, human = torch.randn(3), torch.randn(3)
    expected = distcap.discriminator_loss(sampled, human)
    torch.testing.assert_close(distcap.discriminator_loss(sampled.repeat(4), human), expected)


def test_discriminator_scores_each_pair_on_its_own():
    discriminator = distcap.Discriminator(width=4)
    images, captions = torch.randn(3, 4), torch.randn(3, 4)
    logits = discriminator.logits(images, captions)
    assert logits.shape == (3,)
    torch.testing.assert_close(discriminator.logits(images[1:2], captions[1:2]), logits[1:2])
    layers = [layer.out_features for layer in discriminator.network[::2]]
    assert layers == [512, 256, 1]  # a Sequential that can be sliced


def test_discriminator_learns_to_tell_two_kinds_apart():
    discriminator = distcap.Discriminator(width=4)
    optimizer = torch.optim.Adam(discriminator.network.parameters(), lr=1e-3)
    images, sampled, human = torch.randn(16, 4), torch.randn(16, 4) - 2, torch.randn(16, 4) + 2
    for _ in range(60):
        logits = discriminator.logits(images, sampled), discriminator.logits(images, human)
        optimizer.zero_grad()
        distcap.discriminator_loss(*logits).backward()
        optimizer.step()
    assert (discriminator.logits(images, human) > 0).all()
    assert (discriminator.logits(images, sampled) < 0).all()


def test_the_discriminator_sees_each_caption_beside_its_own_image(learn):
    learner, batch = learn(samples=2)
    rollout = rollout_of(learner, batch)
    scores, loss, record = learner.regularizer.score(rollout, batch)
    logits = []
    for caption, row in zip(rollout.caption_embeddings, rollout.image_index):
        image = learner.image_embeddings[batch.index[row]]
        logits.append(learner.regularizer.logits(image[None], caption[None]))
    logits = torch.cat(logits)
    torch.testing.assert_close(scores, logits.sigmoid().detach())
    torch.testing.assert_close(loss, distcap.discriminator_loss(logits[:8], logits[8:12]))
    right = (logits[:8] < 0).sum() + (logits[8:12] > 0).sum()
    assert record["discriminator_accuracy"] == pytest.approx(right.item() / 12)


REFERENCES = [["a red ring", "a ring"], ["a blue bar", "two shapes"], ["a red bar", "a bar."]]


def test_the_paced_discriminator_is_eq_4_with_corrupted_captions_among_the_zeros(learn):
    """Its loss from a slow loop over the pairs; its score is the logit, within +-10."""
    learner, batch = learn(regularizer="paced", samples=2)
    rollout = rollout_of(learner, batch)
    paced = learner.regularizer
    torch.manual_seed(3)
    scores, loss, _ = paced.score(rollout, batch)
    torch.manual_seed(3)
    broken = [distcap.corrupt(caption) for caption in batch.ground_truth]
    embeddings = [*rollout.caption_embeddings, *learner.clip.embed_captions(broken)]
    owners = [*rollout.image_index.tolist(), 0, 1, 2, 3]
    probabilities = [
        paced.logits(rollout.image_embeddings[[owner]], caption[None]).sigmoid().item()
        for owner, caption in zip(owners, embeddings)
    ]
    wrong = [*range(8), *range(16, 20)]  # samples, corrupted captions
    by_hand = sum(-math.log(1 - probabilities[n]) for n in wrong) / 12 / 2
    by_hand += sum(-math.log(probabilities[n]) for n in range(8, 12)) / 4 / 2
    assert loss.item() == pytest.approx(by_hand, abs=1e-5)
    odds = torch.tensor(probabilities[:16]).logit()
    torch.testing.assert_close(scores, odds, atol=1e-4, rtol=1e-4)
    for parameter in paced.network.parameters():
        parameter.data *= 100
    assert paced.score(rollout, batch)[0].abs().max() == 10


def test_the_paced_discriminator_rehearses_the_last_twenty_pools(learn):
    learner, batch = learn(regularizer="paced")
    rollout = rollout_of(learner, batch)
    paced = learner.regularizer
    losses = [paced.score(rollout, batch)[1].item() for _ in range(23)]  # corrupted anew each time
    assert len(paced.shown) == 20
    drawn = {round(paced.rehearse(rollout, batch).item(), 5) for _ in range(300)}
    assert drawn == {round(loss, 5) for loss in losses[-20:]}


def test_cider_equals_pycocoevalcap_on_the_whole_data_set():
    """Also for a pool of another order and size: document frequencies are those of all images."""
    captions = ["A red ring!", "a blue blue bar", "a ring and a bar"]
    human = {n: [distcap.plain_words(text) for text in texts] for n, texts in enumerate(REFERENCES)}
    written = {n: [distcap.plain_words(caption)] for n, caption in enumerate(captions)}
    _, expected = Cider().compute_score(human, written)
    regularizer = distcap.Cider(REFERENCES)
    for index in ([0, 1, 2], [2, 0]):
        batch = distcap.Batch(torch.tensor(index), [], torch.zeros(0))
        texts = [captions[n] for n in index]
        row, nothing = torch.arange(len(index)), torch.zeros(len(index), 4)
        rollout = distcap.Rollout(nothing, texts, row, nothing, nothing, (len(index), 0, 0))
        scores, _, _ = regularizer.score(rollout, batch)
        torch.testing.assert_close(scores, torch.tensor(expected[index]).float())


def test_cider_of_a_pool_larger_than_the_data_set_is_the_same():
    """Bug: its size was then taken for the number of pictures, and all scores were higher."""
    captions = ["a red ring!", "a blue blue bar", "a ring and a bar"]
    index, nothing = torch.tensor([2, 0, 1]), torch.zeros(12, 4)
    batch = distcap.Batch(index, [], nothing)
    found = []
    for times in (1, 4):
        own = torch.arange(3).repeat(times)
        rollout = distcap.Rollout(nothing, captions * times, own, nothing, nothing, (3, 0, 0))
        found.append(distcap.Cider(REFERENCES).score(rollout, batch)[0])
    once, often = found
    assert once.max() > 0 and often.equal(once.repeat(4))


def test_cider_of_a_human_caption_is_high_and_of_another_images_low(learn, world):
    learner, batch = learn(regularizer="cider")
    rollout = rollout_of(learner, batch)
    scores, _, _ = learner.regularizer.score(rollout, batch)
    assert scores[4:8].min() > 1 and scores[:4].mean() < scores[4:8].mean()


def test_kl_is_zero_at_the_start_and_the_log_ratio_afterwards(learn):
    learner, batch = learn(regularizer="kl", max_length=12)
    scores, _, record = learner.regularizer.score(rollout_of(learner, batch), batch)
    assert scores.abs().max() < 1e-5 and abs(record["kl"]) < 1e-5
    with torch.no_grad():  # move the captioner away from its teacher
        next(learner.captioner.model.text_decoder.parameters()).mul_(1.1)
    rollout = rollout_of(learner, batch)
    scores, _, record = learner.regularizer.score(rollout, batch)
    slow = []
    for row in range(12):
        pixels, tokens = batch.pixels[rollout.image_index[row]][None], rollout.tokens[row][None]
        total = []
        for captioner in (learner.regularizer.initial, learner.captioner):
            log_probs, mask = captioner.log_probs(captioner.encode(pixels), tokens)
            total.append((log_probs * mask).sum() / 12)  # the constant: the longest caption
        slow.append(total[0] - total[1])
    torch.testing.assert_close(scores, torch.stack(slow).detach(), atol=1e-5, rtol=1e-4)
    assert record["kl"] == pytest.approx(-scores[:4].mean().item(), abs=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_kl_takes_no_more_pictures_at_a_time_than_a_part_has(learn, parts):
    """Bug: with --accumulate, whose promise is the memory of one part, it took all at once."""
    learner, batch = learn(regularizer="kl", accumulate=parts, samples=2)
    with torch.no_grad():  # move the captioner away from its teacher
        next(learner.captioner.model.text_decoder.parameters()).mul_(1.1)
    rollout, taken = rollout_of(learner, batch), []
    for captioner in (learner.captioner, learner.regularizer.initial):
        encode = captioner.encode
        captioner.encode = lambda pixels, encode=encode: taken.append(len(pixels)) or encode(pixels)
    scores, _, record = learner.regularizer.score(rollout, batch)
    assert taken == [4 // parts] * parts * 2
    learner.regularizer.parts = 1
    whole, _, record_of_whole = learner.regularizer.score(rollout, batch)
    torch.testing.assert_close(scores, whole, atol=1e-6, rtol=1e-4)
    assert record == pytest.approx(record_of_whole, abs=1e-6) and scores.abs().max() > 1e-3


def test_minus_the_log_ratio_of_samples_estimates_the_kl_divergence():
    now, start = torch.randn(2, 5).log_softmax(dim=1)
    drawn = torch.multinomial(now.exp(), 200_000, replacement=True)
    mask = torch.ones(len(drawn), 1)
    ratio = [distcap.caption_log_probs(each[drawn, None], mask, 1.0) for each in (now, start)]
    exact = (now.exp() * (now - start)).sum().item()
    assert (ratio[0] - ratio[1]).mean().item() == pytest.approx(exact, abs=0.01)


def test_the_teacher_of_kl_stays_as_it_was(learn):
    learner, batch = learn(regularizer="kl")
    before = copy.deepcopy(learner.captioner.model.state_dict())
    loss, _ = learner.reinforce_step(batch)
    loss.backward()
    torch.optim.SGD(learner.captioner.model.parameters(), lr=0.1).step()
    teacher = learner.regularizer.initial.model.state_dict()
    assert all(value.equal(before[name]) for name, value in teacher.items())
    now = learner.captioner.model.state_dict()
    assert any(not value.equal(before[name]) for name, value in now.items())


def test_corrupting_makes_every_kind_of_error_and_no_new_word():
    caption = "a red ring above a large blue bar"
    made = {distcap.corrupt(caption) for _ in range(2000)}
    repeated, dropped = "a red red ring above a large blue bar", "a red above a large blue bar"
    swapped, inserted = (
        "a ring red above a large blue bar",
        "a red blue ring above a large blue bar",
    )
    assert {repeated, dropped, swapped, inserted} <= made
    assert {len(each.split()) for each in made} == {7, 8, 9}
    assert set(" ".join(made).split()) == set(caption.split())
    shuffled = [each.split() for each in made if sorted(each.split()) == sorted(caption.split())]
    assert any(words[:2] == ["bar", "a"] for words in shuffled)
    assert distcap.corrupt("ring") in ("ring", "ring ring", "") and distcap.corrupt("") == ""


def test_grammar_learns_to_tell_human_captions_from_corrupted_ones(learn, world):
    learner, batch = learn(regularizer="grammar")
    grammar, rollout = learner.regularizer, rollout_of(learner, batch)
    optimizer = torch.optim.Adam(grammar.network.parameters(), lr=3e-3)
    for _ in range(60):
        _, loss, _ = grammar.score(rollout, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backwards = [" ".join(reversed(caption.split())) for caption in batch.ground_truth]
    human = grammar.logits(learner.clip.embed_captions(batch.ground_truth)).mean()
    assert human > grammar.logits(learner.clip.embed_captions(backwards)).mean() + 1
