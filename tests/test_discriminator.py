"""Section 6."""

import math

import torch

import distcap


def test_discriminator_loss_by_hand():
    loss = distcap.discriminator_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0]))
    sigmoid = 1 / (1 + math.exp(-2))
    by_hand = -(2 * math.log(0.5) + math.log(1 - sigmoid) + math.log(sigmoid)) / 4
    torch.testing.assert_close(loss, torch.tensor(by_hand))


def test_discriminator_loss_equals_binary_cross_entropy_and_is_finite_for_sure_logits():
    sampled, ground_truth = torch.randn(7), torch.randn(7)
    labels = torch.cat([torch.zeros(7), torch.ones(7)])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.cat([sampled, ground_truth]), labels)
    torch.testing.assert_close(distcap.discriminator_loss(sampled, ground_truth), expected)
    assert distcap.discriminator_loss(torch.tensor([1000.0]), torch.tensor([-1000.0])).isfinite()


def test_discriminator_scores_each_pair_on_its_own():
    discriminator = distcap.Discriminator(width=4)
    images, captions = torch.randn(3, 4), torch.randn(3, 4)
    logits = discriminator(images, captions)
    assert logits.shape == (3,)
    torch.testing.assert_close(discriminator(images[1:2], captions[1:2]), logits[1:2])
    assert [layer.out_features for layer in list(discriminator)[::2]] == [512, 256, 1]


def test_discriminator_learns_to_tell_two_kinds_apart():
    discriminator = distcap.Discriminator(width=4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    images, sampled, human = torch.randn(16, 4), torch.randn(16, 4) - 2, torch.randn(16, 4) + 2
    for _ in range(60):
        loss = distcap.discriminator_loss(discriminator(images, sampled), discriminator(images, human))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (discriminator(images, human) > 0).all() and (discriminator(images, sampled) < 0).all()
