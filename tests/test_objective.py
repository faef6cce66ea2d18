"""Section 7: gradients in closed form, isolation, padding; and that the objective learns."""

import torch

import distcap

MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def test_mean_log_probs_by_hand_and_padding_is_ignored():
    log_probs = torch.tensor([[-1.0, -3.0, -99.0], [-1.0, -2.0, -3.0]])
    torch.testing.assert_close(distcap.mean_log_probs(log_probs, MASK), torch.tensor([-2.0, -2.0]))


def test_mean_log_probs_of_nothing_is_zero():
    assert distcap.mean_log_probs(torch.tensor([[-5.0]]), torch.zeros(1, 1)).item() == 0


def test_padding_never_changes_a_loss():
    log_probs, advantages = -torch.rand(2, 3), torch.tensor([0.5, -0.2])
    longer = torch.cat([log_probs, torch.full((2, 4), -50.0)], dim=1)
    longer_mask = torch.cat([MASK, torch.zeros(2, 4)], dim=1)
    for loss, rest in (
        (distcap.teacher_forcing_loss, ()),
        (distcap.reinforce_loss, (advantages,)),
        (distcap.ground_truth_loss, (advantages,)),
    ):
        torch.testing.assert_close(loss(longer, longer_mask, *rest), loss(log_probs, MASK, *rest))


def test_teacher_forcing_loss_equals_its_slow_twin():
    log_probs = -torch.rand(2, 3)
    per_caption = []
    for row, mask in zip(log_probs.tolist(), MASK.tolist()):
        real = [value for value, keep in zip(row, mask) if keep]
        per_caption.append(-sum(real) / len(real))
    torch.testing.assert_close(distcap.teacher_forcing_loss(log_probs, MASK), torch.tensor(sum(per_caption) / 2))


def test_teacher_forcing_is_reinforce_with_advantage_one():
    log_probs = -torch.rand(2, 3)
    expected = distcap.teacher_forcing_loss(log_probs, MASK)
    torch.testing.assert_close(distcap.reinforce_loss(log_probs, MASK, torch.ones(2)), expected)
    torch.testing.assert_close(distcap.ground_truth_loss(log_probs, MASK, torch.ones(2)), expected)


def test_reinforce_gradient_is_advantage_times_score_function():
    """d/dz of -A log softmax(z)[w] is -A (onehot(w) - softmax(z))."""
    logits = torch.tensor([[0.3, -0.7, 1.1, 0.0]], requires_grad=True)
    word, advantage = 1, -1.3
    log_probs = logits.log_softmax(dim=-1)[:, [word]]
    distcap.reinforce_loss(log_probs, torch.ones(1, 1), torch.tensor([advantage])).backward()
    onehot = torch.nn.functional.one_hot(torch.tensor([word]), 4)
    torch.testing.assert_close(logits.grad, -advantage * (onehot - logits.detach().softmax(dim=-1)))


def test_reinforce_does_not_differentiate_the_advantage():
    advantages = torch.tensor([2.0, 1.0], requires_grad=True)
    log_probs = (-torch.rand(2, 3)).requires_grad_()
    distcap.reinforce_loss(log_probs, MASK, advantages).backward()
    assert advantages.grad is None
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-0.5, -0.5, 0], [-1 / 6, -1 / 6, -1 / 6]]))


def test_ground_truth_loss_never_unlearns_a_human_caption():
    log_probs = (-torch.rand(2, 3)).requires_grad_()
    distcap.ground_truth_loss(log_probs, MASK, torch.tensor([-4.0, 3.0])).backward()
    assert (log_probs.grad[0] == 0).all() and (log_probs.grad[1] < 0).all()


def test_each_term_moves_only_its_own_log_probs():
    """The authors' script weighs the sampled log-probs twice; here, each term touches its own captions alone."""
    sampled, ground_truth = ((-torch.rand(2, 3)).requires_grad_() for _ in range(2))
    distcap.ground_truth_loss(ground_truth, MASK, torch.ones(2)).backward()
    assert sampled.grad is None and ground_truth.grad.abs().sum() > 0
    ground_truth.grad = None
    distcap.reinforce_loss(sampled, MASK, torch.ones(2)).backward()
    assert ground_truth.grad is None and sampled.grad.abs().sum() > 0


def test_reinforce_teaches_a_five_word_policy():
    logits = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        words = torch.multinomial(logits.softmax(dim=0).detach(), 16, replacement=True)
        rewards = (words == 3).float()
        advantages = rewards - rewards.mean()
        log_probs = logits.log_softmax(dim=0)[words][:, None]
        loss = distcap.reinforce_loss(log_probs, torch.ones(16, 1), advantages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(dim=0)[3] > 0.9
