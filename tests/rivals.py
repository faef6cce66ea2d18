"""Eq. 10, the regularisers that came before: CIDEr, KL to the teacher-forced captioner, and a grammar score.

tests/claims.py measures them as rows of its table, in the training step of distcap.py, in the place of its
discriminator: r = alpha r_sim + (1 - alpha) r_reg (Eq. 3). Nothing here has a gradient to give.
"""

import copy
import dataclasses
import random
from collections.abc import Sequence

import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs
from torch import Tensor

import distcap


class CiderReward:
    """CIDEr of captions against the references of their images, with the document frequencies of a whole data set."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.scorer = CiderScorer()
        for each in references:
            self.scorer += (None, each)
        self.scorer.compute_doc_freq()
        self.references = self.scorer.crefs

    def __call__(self, captions: Sequence[str], indices: Sequence[int]) -> Tensor:
        """captions[n], lower-case words with spaces between, is of image indices[n]: -> (C,), 0 to 10."""
        self.scorer.ctest = cook_refs(captions)
        rest = self.references[len(indices) :]  # never compared: the scorer takes the data set's size from the length
        self.scorer.crefs = [self.references[index] for index in indices] + rest
        return torch.tensor(self.scorer.compute_cider(), dtype=torch.float32)


def kl_reward(log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Minus the estimate of KL(p || p_0) that a caption drawn from p gives, in nats a token: (C, T) each -> (C,)."""
    return distcap.mean_log_probs(teacher_log_probs - log_probs, mask)


def corrupt(caption: str, rng: random.Random) -> str:
    """The caption with a word repeated, dropped, said again elsewhere or swapped with the next, or all shuffled."""
    words = caption.split()
    place, how = rng.randrange(len(words)), rng.choice(("repeat", "drop", "insert", "swap", "shuffle"))
    if how == "shuffle":
        rng.shuffle(words)
    else:
        word = words[place]
        following = words[place + 1 : place + 2]
        changed = {
            "repeat": [word, word, *following],
            "drop": following,
            "insert": [rng.choice(words), word, *following],
            "swap": [*following, word],
        }
        words[place : place + 2] = changed[how]
    return " ".join(words)


class Rival(distcap.Learner):
    """A Learner with `cider`, `kl` or `grammar` as r_reg. Its similarity_rewards are those of Eq. 3, alpha and all."""

    def __init__(self, captioner, clip, examples, config, regularizer: str) -> None:
        super().__init__(captioner, copy.copy(clip), examples, dataclasses.replace(config, similarity_weight=1.0))
        self.alpha, self.r_reg = config.similarity_weight, getattr(self, regularizer)
        self.embed, self.clip.embed_captions = clip.embed_captions, self.embed_captions
        self.rng, self.teacher = random.Random(config.seed), copy.deepcopy(captioner).eval()
        if regularizer == "cider":
            self.cider_reward = CiderReward([example.references for example in examples])
        self.critic = distcap.Discriminator(self.images.shape[1]).to(clip.device)  # of `grammar`
        self.critics_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=config.discriminator_learning_rate)

    def reinforce_step(self, indices: Tensor, ground_truth: list[str], pixels: Tensor) -> tuple[Tensor, dict]:
        self.ground_truth, self.pixels = ground_truth, pixels
        return super().reinforce_step(indices, ground_truth, pixels)

    def embed_captions(self, captions: list[str]) -> Tensor:
        self.written = captions  # the pool of this step: sampled, ground truth, greedy
        return self.embed(captions)

    def similarity_rewards(self, captions: Tensor, indices: Tensor, own: Tensor) -> Tensor:
        similarity = super().similarity_rewards(captions, indices, own)
        return distcap.mixed_reward(similarity, self.r_reg(captions, indices, own), self.alpha)

    def cider(self, captions: Tensor, indices: Tensor, own: Tensor) -> Tensor:
        return self.cider_reward(self.written, indices[own].tolist()).to(captions.device)

    @torch.no_grad()
    def kl(self, captions: Tensor, indices: Tensor, own: Tensor) -> Tensor:
        tokens = self.captioner.tokenize(self.written, self.config.max_length)
        both = [each.log_probs(each.encode(self.pixels)[own], tokens) for each in (self.captioner, self.teacher)]
        return kl_reward(*both, self.captioner.mask(tokens))

    def grammar(self, captions: Tensor, indices: Tensor, own: Tensor) -> Tensor:
        """As Eq. 4, but D sees no image and learns to tell references from corrupted references, not from samples."""
        nothing, count = torch.zeros_like(captions), len(indices)
        logits = self.critic(nothing, captions)  # before its step
        corrupted = self.embed([corrupt(caption, self.rng) for caption in self.ground_truth])
        loss = distcap.discriminator_loss(self.critic(nothing[:count], corrupted), logits[-2 * count : -count])
        self.critics_optimizer.zero_grad()
        loss.backward()
        self.critics_optimizer.step()
        return logits.detach().sigmoid()
