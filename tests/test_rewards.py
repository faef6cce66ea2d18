"""Rewards and baselines: values by hand, slow twins, invariants, edges, expected gradients."""

import math

import pytest
import torch

import distcap

DIRECTIONS = ("both", "image-to-text", "text-to-image")


def slow_contrastive_reward(captions, images, image_index, scale, direction):
    """Eq. 6 with loops, in double precision."""
    rewards = []
    for c, i in enumerate(image_index.tolist()):

        def similarity(c, i):
            return scale * sum(x * y for x, y in zip(captions[c].tolist(), images[i].tolist()))

        other_captions = [
            math.exp(similarity(each, i)) for each in range(len(captions)) if each != c
        ]
        other_images = [math.exp(similarity(c, each)) for each in range(len(images)) if each != i]
        a = similarity(c, i) - math.log(sum(other_captions))
        b = similarity(c, i) - math.log(sum(other_images))
        rewards.append(
            {"both": (a + b) / 2, "image-to-text": a, "text-to-image": b}[direction] / scale
        )
    return torch.tensor(rewards)


def test_similarity_reward_by_hand():
    captions, images = (
        torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        torch.tensor([[0.0, 1.0], [0.6, 0.8]]),
    )
    torch.testing.assert_close(
        distcap.similarity_reward(captions, images), torch.tensor([0.0, 1.0])
    )


def test_contrastive_reward_by_hand():
    captions = images = torch.eye(
        2
    )  # own cosine 1, the other 0, so each competitor sum is exp(0) = 1
    rewards = distcap.contrastive_reward(captions, images, torch.tensor([0, 1]), logit_scale=3.0)
    torch.testing.assert_close(rewards, torch.ones(2))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contrastive_reward_equals_its_slow_twin(pool, direction):
    rewards = distcap.contrastive_reward(
        pool.captions, pool.images, pool.image_index, pool.scale, direction
    )
    expected = slow_contrastive_reward(
        pool.captions, pool.images, pool.image_index, pool.scale, direction
    )
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contrastive_reward_follows_a_permutation_of_the_pool(pool, direction):
    def reward(order):
        return distcap.contrastive_reward(
            pool.captions[order], pool.images, pool.image_index[order], pool.scale, direction
        )

    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(reward(order), reward(torch.arange(6))[order])


def test_the_other_captions_of_the_same_image_compete(pool):
    """Only the scored pair is left out: a perfect human caption lowers the sample's reward."""
    rewards = distcap.contrastive_reward(
        pool.captions, pool.images, pool.image_index, pool.scale, "image-to-text"
    )
    pool.captions[2] = pool.images[0]
    stronger = distcap.contrastive_reward(
        pool.captions, pool.images, pool.image_index, pool.scale, "image-to-text"
    )
    assert stronger[0] < rewards[0] and stronger[2] > rewards[2]


def test_hard_negative_images_may_join_the_image_pool(pool):
    more = torch.cat(
        [pool.images, pool.captions[:1]]
    )  # an image that caption 0 describes perfectly
    args = (pool.image_index, pool.scale, "text-to-image")
    before = distcap.contrastive_reward(pool.captions, pool.images, *args)
    assert distcap.contrastive_reward(pool.captions, more, *args)[0] < before[0]


@pytest.mark.parametrize("scale", (100.0, 1000.0))
def test_contrastive_reward_is_finite_and_exact_at_large_scales(pool, scale):
    """exp() first, as in the scripts, is inf at 100; the limit of log-sum-exp is the maximum."""
    rewards = distcap.contrastive_reward(
        pool.captions, pool.images, pool.image_index, 1000 * scale, "text-to-image"
    )
    cosines = pool.captions @ pool.images.T
    own, other = cosines[range(6), pool.image_index], cosines[range(6), 1 - pool.image_index]
    torch.testing.assert_close(rewards, own - other, atol=1e-4, rtol=1e-3)
    assert (
        distcap.contrastive_reward(pool.captions, pool.images, pool.image_index, scale)
        .isfinite()
        .all()
    )


def test_contrastive_reward_of_a_single_pair_is_finite():
    one = torch.ones(1, 1)
    reward = distcap.contrastive_reward(one, one, torch.tensor([0]), logit_scale=100.0)
    torch.testing.assert_close(reward, torch.tensor([1.0]))


def test_mixed_reward_by_hand():
    mixed = distcap.mixed_reward(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.0]), alpha=0.75)
    torch.testing.assert_close(mixed, torch.tensor([0.875, -0.75]))
    torch.testing.assert_close(
        distcap.mixed_reward(mixed, mixed, 0.3), mixed
    )  # both agree: no matter the weight


def test_self_critical_advantages_by_hand():
    rewards, greedy = torch.tensor([[0.7, 0.1], [0.2, 0.9]]), torch.tensor([0.5, 0.4])
    advantages = distcap.self_critical_advantages(rewards, greedy)
    torch.testing.assert_close(advantages, torch.tensor([[0.2, -0.4], [-0.2, 0.5]]))


def test_centred_advantages_by_hand():
    advantages = distcap.centred_advantages(torch.tensor([[1.0, 2.0], [5.0, 0.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 0.0], [3.0, -2.0]]))


def test_soft_maximum_by_hand_and_without_competitors():
    rows = torch.tensor([[0.0, math.log(3.0)], [-torch.inf, 2.0], [-torch.inf, -torch.inf]])
    torch.testing.assert_close(distcap.soft_maximum(rows), torch.tensor([math.log(4.0), 2.0, 0.0]))
    assert distcap.soft_maximum(torch.zeros(2, 0)).tolist() == [0, 0]


class FakeCLIP:
    """Captions are their embeddings, written as digits."""

    logit_scale = 10.0

    def embed_captions(self, captions):
        return torch.tensor([[float(x) for x in caption.split()] for caption in captions])


def reranked(texts, images):
    """Of as many captions of each image the best, all competing."""
    count = len(texts) // len(images)
    index = torch.arange(len(images)).repeat_interleave(count)
    rewards = distcap.caption_scores(texts, FakeCLIP(), images, index)["reward"]
    return [texts[place] for place in distcap.rerank(texts, rewards, count)]


def test_reranking_keeps_the_caption_with_the_highest_eq_6_among_all():
    torch.manual_seed(3)
    images = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    captions = torch.nn.functional.normalize(torch.randn(4, 5, 3), dim=2)
    texts = [" ".join(map(repr, row.tolist())) for row in captions.view(-1, 3)]
    index = torch.arange(4).repeat_interleave(5)
    slow = slow_contrastive_reward(captions.view(-1, 3), images, index, 10.0, "both").view(4, 5)
    best = [texts[5 * image + slow[image].argmax()] for image in range(4)]
    assert reranked(texts, images) == best
    assert reranked(texts[:5], images[:1])  # one picture: the others' part is empty


def test_reranking_prefers_what_tells_the_pictures_apart_to_what_fits_both():
    images = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.2, 1.0]]), dim=1)
    both, first, second = "0.7071 0.7071", "1 0", "0 1"
    assert reranked([both, first, both, second], images) == [first, second]


def test_reranking_never_keeps_an_empty_caption():
    assert distcap.rerank(["", "a", "b", ""], torch.tensor([9.0, 1.0, 2.0, 3.0]), 2) == [1, 2]


def test_scores_of_captions_among_more_images_than_they_describe():
    """Two captions of a batch, five images of the call: cosine, rank and Eq. 6 by slow loops."""
    images = torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    captions = torch.nn.functional.normalize(torch.randn(2, 3), dim=1)
    texts = [" ".join(map(repr, row.tolist())) for row in captions]
    index = torch.tensor([3, 1])
    scores = distcap.caption_scores(texts, FakeCLIP(), images, index)
    slow = slow_contrastive_reward(captions, images, index, 10.0, "both")
    torch.testing.assert_close(scores["reward"], slow)
    for row, own in enumerate(index.tolist()):
        cosines = [float(captions[row] @ image) for image in images]
        assert scores["cosine"][row].item() == pytest.approx(cosines[own], abs=1e-6)
        assert scores["rank"][row] == 1 + sum(each > cosines[own] for each in cosines)


def test_group_advantages_by_hand_and_by_a_slow_loop():
    """Each sample against the mean of the other samples of its image, not its own included."""
    by_hand = torch.tensor([[1 - 3.5, 2 - 3.0, 5 - 1.5]])
    torch.testing.assert_close(distcap.group_advantages(torch.tensor([[1.0, 2.0, 5.0]])), by_hand)
    rewards = torch.randn(3, 4)
    slow = [[row[k] - (sum(row) - row[k]) / 3 for k in range(4)] for row in rewards.tolist()]
    torch.testing.assert_close(distcap.group_advantages(rewards), torch.tensor(slow))


def test_group_advantages_sum_to_zero_and_know_no_other_image():
    rewards = torch.randn(3, 4)
    torch.testing.assert_close(distcap.group_advantages(rewards).sum(dim=1), torch.zeros(3))
    alone = torch.cat([distcap.group_advantages(row[None]) for row in rewards])
    torch.testing.assert_close(distcap.group_advantages(rewards), alone)
    torch.testing.assert_close(distcap.group_advantages(rewards + 7), alone, atol=1e-5, rtol=1e-4)


def test_neighbours_reward_by_hand():
    """One caption, its image, two similar images, all in the plane."""
    caption, image = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    neighbours = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]])
    torch.testing.assert_close(
        distcap.neighbours_reward(caption, image, neighbours), torch.tensor([0.6 - 0.4])
    )


def test_neighbours_reward_equals_a_slow_loop_and_is_zero_where_nothing_distinguishes():
    unit = torch.nn.functional.normalize
    captions, images, near = (
        unit(torch.randn(4, 5), dim=1),
        unit(torch.randn(4, 5), dim=1),
        torch.randn(4, 3, 5),
    )
    slow = [
        captions[c] @ images[c] - sum(captions[c] @ near[c, n] for n in range(3)) / 3
        for c in range(4)
    ]
    torch.testing.assert_close(distcap.neighbours_reward(captions, images, near), torch.stack(slow))
    same = images[:, None].expand(4, 3, 5)
    torch.testing.assert_close(distcap.neighbours_reward(captions, images, same), torch.zeros(4))


def test_nearest_images_equals_sorting_and_leaves_the_image_out():
    embeddings, indices = (
        torch.nn.functional.normalize(torch.randn(30, 6), dim=1),
        torch.tensor([4, 0, 29, 4]),
    )
    found = distcap.nearest_images(embeddings, indices, 3)
    for row, index in enumerate(indices.tolist()):
        similarity = (embeddings @ embeddings[index]).tolist()
        others = sorted((n for n in range(30) if n != index), key=lambda n: -similarity[n])
        assert found[row].tolist() == others[:3]


def test_nearest_images_of_twins_are_the_twins():
    embeddings = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    assert distcap.nearest_images(embeddings, torch.arange(6), 1).squeeze(1).tolist() == [
        3,
        4,
        5,
        0,
        1,
        2,
    ]


class TestHalvesOfEq6:
    """One image, three captions that the policy may draw, a fixed rest of the pool: the expected
    gradient of REINFORCE, by enumeration."""

    @pytest.fixture(autouse=True)
    def world(self):
        unit = torch.nn.functional.normalize
        self.drawn = unit(torch.randn(3, 8, dtype=torch.float64), dim=1)
        self.images = unit(torch.randn(4, 8, dtype=torch.float64) + 0.5 * self.drawn[:1], dim=1)
        self.others = unit(torch.randn(6, 8, dtype=torch.float64), dim=1)
        self.p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)

    def expected_gradient(self, rewards):
        """Sum of p(c) r(c) times the score function, of the logits of a softmax policy."""
        scores = torch.eye(3, dtype=torch.float64) - self.p
        return (self.p * rewards) @ scores

    def cosine(self):
        return self.drawn @ self.images[0]

    def eq_6(self, direction):
        rewards, index = [], torch.tensor([0, 0, 0, 1, 2, 3, 1])
        for caption in self.drawn:
            pool = torch.cat([caption[None], self.others])
            rewards.append(distcap.contrastive_reward(pool, self.images, index, 20.0, direction)[0])
        return torch.stack(rewards)

    def test_image_to_text_is_the_cosine_plus_a_baseline(self):
        """What it subtracts depends on the image and the rest of the pool, not on the caption."""
        gap = self.eq_6("image-to-text") - self.cosine()
        torch.testing.assert_close(gap, gap[:1].expand(3))
        expected = self.expected_gradient(self.cosine())
        found = self.expected_gradient(self.eq_6("image-to-text"))
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)

    @pytest.mark.parametrize("direction", ["text-to-image", "both"])
    def test_text_to_image_is_another_reward(self, direction):
        expected = self.expected_gradient(self.cosine())
        found = self.expected_gradient(self.eq_6(direction))
        assert (found - expected).abs().max() > 0.01

    def test_similar_images_are_another_reward_too(self):
        near = self.images[1:3].expand(3, 2, 8)
        rewards = distcap.neighbours_reward(self.drawn, self.images[:1].expand(3, 8), near)
        expected = self.expected_gradient(self.cosine())
        assert (self.expected_gradient(rewards) - expected).abs().max() > 0.01
