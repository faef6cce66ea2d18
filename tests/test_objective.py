"""Objective: gradients in closed form and by enumeration, isolation, padding; that it learns."""

import math

import pytest
import torch

import distcap

MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def test_log_p_of_a_caption_by_hand():
    log_probs = torch.tensor([[-1.0, -3.0, -99.0], [-1.0, -2.0, -3.0]])
    total = distcap.caption_log_probs(log_probs, MASK, divisor=4)
    torch.testing.assert_close(total, torch.tensor([-4 / 4, -6 / 4]))
    mean = distcap.caption_log_probs(log_probs, MASK, divisor=None)
    torch.testing.assert_close(mean, torch.tensor([-4 / 2, -6 / 3]))


@pytest.mark.parametrize("divisor", [20.0, None])
def test_log_p_equals_its_slow_twin(divisor):
    log_probs, slow = -torch.rand(2, 3), []
    for row, mask in zip(log_probs.tolist(), MASK.tolist()):
        real = [value for value, keep in zip(row, mask) if keep]
        slow.append(sum(real) / (divisor or len(real)))
    found = distcap.caption_log_probs(log_probs, MASK, divisor)
    torch.testing.assert_close(found, torch.tensor(slow))


@pytest.mark.parametrize("divisor", [20.0, None])
def test_padding_never_changes_log_p(divisor):
    log_probs = -torch.rand(2, 3)
    longer = torch.cat([log_probs, torch.full((2, 4), -50.0)], dim=1)
    longer_mask = torch.cat([MASK, torch.zeros(2, 4)], dim=1)
    found = distcap.caption_log_probs(longer, longer_mask, divisor)
    torch.testing.assert_close(found, distcap.caption_log_probs(log_probs, MASK, divisor))


@pytest.mark.parametrize("divisor", [20.0, None])
def test_log_p_of_nothing_is_zero(divisor):
    nothing = distcap.caption_log_probs(torch.tensor([[-5.0]]), torch.zeros(1, 1), divisor)
    assert nothing.item() == 0


def test_teacher_forcing_is_reinforce_with_advantage_one():
    log_probs = -torch.rand(4)
    expected = distcap.teacher_forcing_loss(log_probs)
    torch.testing.assert_close(expected, -log_probs.mean())
    torch.testing.assert_close(distcap.reinforce_loss(log_probs, torch.ones(4)), expected)
    torch.testing.assert_close(distcap.ground_truth_loss(log_probs, torch.ones(4)), expected)


def test_reinforce_gradient_is_advantage_times_score_function():
    """d/dz of -A log softmax(z)[w] is -A (onehot(w) - softmax(z))."""
    logits = torch.tensor([[0.3, -0.7, 1.1, 0.0]], requires_grad=True)
    word, advantage = 1, -1.3
    log_probs = logits.log_softmax(dim=-1)[:, word]
    distcap.reinforce_loss(log_probs, torch.tensor([advantage])).backward()
    onehot = torch.nn.functional.one_hot(torch.tensor([word]), 4)
    expected = -advantage * (onehot - logits.detach().softmax(dim=-1))
    torch.testing.assert_close(logits.grad, expected)


def test_reinforce_does_not_differentiate_the_advantage():
    advantages = torch.tensor([2.0, 1.0], requires_grad=True)
    log_probs = (-torch.rand(2)).requires_grad_()
    distcap.reinforce_loss(log_probs, advantages).backward()
    assert advantages.grad is None
    torch.testing.assert_close(log_probs.grad, torch.tensor([-1.0, -0.5]))


def test_ground_truth_loss_never_unlearns_a_human_caption():
    log_probs = (-torch.rand(2)).requires_grad_()
    distcap.ground_truth_loss(log_probs, torch.tensor([-4.0, 3.0])).backward()
    assert log_probs.grad[0] == 0 and log_probs.grad[1] < 0


def test_each_term_moves_only_its_own_log_probs():
    """The authors' script weighs the sampled log-probs twice; here each term touches its own."""
    sampled, human = ((-torch.rand(2)).requires_grad_() for _ in range(2))
    distcap.ground_truth_loss(human, torch.ones(2)).backward()
    assert sampled.grad is None and human.grad.abs().sum() > 0
    human.grad = None
    distcap.reinforce_loss(sampled, torch.ones(2)).backward()
    assert human.grad is None and sampled.grad.abs().sum() > 0


def test_reinforce_teaches_a_five_word_policy():
    logits = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        words = torch.multinomial(logits.softmax(dim=0).detach(), 16, replacement=True)
        rewards = (words == 3).float()
        advantages = distcap.centred_advantages(rewards)
        loss = distcap.reinforce_loss(logits.log_softmax(dim=0)[words], advantages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(dim=0)[3] > 0.9


class TinyPolicy:
    """All captions over the words {end, a, b} of at most three tokens, and their probabilities.

    The logits of a token depend on how many came before and on the last of them: 3 x 3 x 3.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        self.logits = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
        self.logits.requires_grad_()
        self.captions = [[0]]
        self.captions += [[x, 0] for x in (1, 2)]
        self.captions += [[x, y, z] for x in (1, 2) for y in (1, 2) for z in (0, 1, 2)]
        self.mask = torch.tensor([[1.0] * len(c) + [0.0] * (3 - len(c)) for c in self.captions])

    def log_probs(self):
        """(C, T), with something finite where there is padding."""
        log_p, rows = self.logits.log_softmax(dim=-1), []
        for tokens in self.captions:
            before = [0, *tokens[:-1]]
            row = [log_p[place, before[place], token] for place, token in enumerate(tokens)]
            rows.append(torch.stack(row + [torch.tensor(-7.0)] * (3 - len(tokens))))
        return torch.stack(rows)

    def probabilities(self):
        """p(c) of every caption; they sum to 1."""
        return (self.log_probs() * self.mask).sum(dim=1).exp()

    def gradient_of_expectation(self, advantages):
        """The gradient of E[A] = sum of p(c) A(c)."""
        (gradient,) = torch.autograd.grad((self.probabilities() * advantages).sum(), self.logits)
        return gradient

    def expected_update(self, advantages, divisor):
        """Minus the gradient of Eq. 2's loss, in expectation over the caption that is drawn."""
        expected = torch.zeros_like(self.logits)
        for row, p in enumerate(self.probabilities().tolist()):
            log_p = distcap.caption_log_probs(self.log_probs(), self.mask, divisor)[row : row + 1]
            loss = distcap.reinforce_loss(log_p, advantages[row : row + 1])
            (gradient,) = torch.autograd.grad(loss, self.logits)
            expected -= p * gradient
        return expected


@pytest.fixture
def policy():
    return TinyPolicy()


def test_the_policy_is_whole(policy):
    assert policy.probabilities().sum().item() == pytest.approx(1)
    assert len(policy.captions) == 15


def test_the_expected_update_is_the_gradient_of_the_expected_advantage(policy):
    """The theorem that REINFORCE stands on, for every caption that there is, lengths 1 to 3."""
    advantages = torch.randn(15, dtype=torch.float64)
    update = policy.expected_update(advantages, divisor=3.0)
    torch.testing.assert_close(update, policy.gradient_of_expectation(advantages) / 3)
    assert update.abs().max() > 1e-3


def test_a_constant_reward_teaches_nothing(policy):
    update = policy.expected_update(torch.ones(15, dtype=torch.float64), divisor=3.0)
    assert update.abs().max() < 1e-12


def test_a_baseline_costs_nothing(policy):
    """Whatever is subtracted from every reward alike leaves the expected update as it was."""
    rewards = torch.randn(15, dtype=torch.float64)
    updates = [policy.expected_update(rewards - level, divisor=3.0) for level in (0.0, 0.7, -5.0)]
    torch.testing.assert_close(updates[0], updates[1])
    torch.testing.assert_close(updates[0], updates[2])


def test_with_each_captions_own_length_a_constant_reward_teaches_brevity(policy):
    """Bug of the first edition: log p was the mean over each caption's tokens. The update then is
    the gradient of E[A / length], so a reward of 1 for everything makes the end likelier, and a
    baseline is not free."""
    ones = torch.ones(15, dtype=torch.float64)
    update = policy.expected_update(ones, divisor=None)
    lengths = policy.mask.sum(dim=1)
    torch.testing.assert_close(update, policy.gradient_of_expectation(ones / lengths))
    first = update[0, 0]  # the logits of the first token: end, a, b
    assert first[0] > 0.01 and first[1] < 0 and first[2] < 0
    rewards = torch.randn(15, dtype=torch.float64)
    moved = policy.expected_update(rewards - 1, divisor=None)
    assert (moved - policy.expected_update(rewards, divisor=None)).abs().max() > 0.01


def test_the_constant_only_sets_the_scale(policy):
    advantages = torch.randn(15, dtype=torch.float64)
    short, long = (policy.expected_update(advantages, divisor) for divisor in (3.0, 30.0))
    torch.testing.assert_close(short, 10 * long)
    assert math.isclose(policy.probabilities().sum().item(), 1)
