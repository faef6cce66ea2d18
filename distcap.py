"""distcap: distinctive image captioning with CLIP-guided reinforcement learning, in one file.

A captioner trained by teacher forcing says what is true of many pictures. This one learns to say
what is true of *this* picture: its reward is how well CLIP finds the picture from the caption and
the caption from the picture, and human captions keep the writing human. The method is that of
Chaffin, Kijak and Claveau, "Distinctive Image Captioning: Leveraging Ground Truth Captions in CLIP
Guided Reinforcement Learning" (arXiv 2402.13936). Equations are numbered as in the README.

    python distcap.py train                                       # all of it, on a built-in world
    python distcap.py caption runs/toy/test --captioner runs/toy  # a line for each picture
    python distcap.py eval runs/toy/test --captioner runs/toy     # the numbers of its table again

One step of training, from left to right and back:

    picture ── encode ──> features ─┬─ sample x K ─┐              Eq. 6, 8 or cosine
                                    ├─ greedy ─────┼─> pool ── CLIP ──┬── r_sim ──┐
    human caption ── tokenize ──────┴──────────────┘                  └── r_reg ──┤ Eq. 3
                                                          human? Eq. 4 or 10      v
    loss = Eq. 2 on samples + Eq. 5 on human captions <── advantages <── Eq. 7, 9 ── rewards
           (log p: one forward pass)

Sections 1 to 5 are the method, and can be read, imported and tested alone. They know no file, flag
or model class: of the rest they use five methods of a captioner (encode, sample_and_greedy,
tokenize, decode, log_probs) with its `pad`, and one of a CLIP (embed_captions) with its
`logit_scale`. Sections 6 to 12 are the program.

Shape letters, the same in every comment below:
    B images of a batch; K captions sampled for each image
    C captions of a pool (K*B sampled, B human, B greedy)
    I images of a pool (B, and hard negatives if any); M images most similar to an image
    N pictures of a data set
    P tokens before a caption (the start token and the prompt)
    T tokens of the longest caption of a batch, its end included; V tokens of the vocabulary
    D width of CLIP's embeddings; H width of the captioner's features; L places in them

This file departs from the authors' scripts as follows (the README says why): (1) the ground-truth
term trains on the human caption, not once more on the sample; (2) log p is the sum over a caption's
real tokens, divided by a constant; (3) samples are drawn from the captioner itself; (4) there is no
dropout in reinforcement learning; (5) Eq. 6 masks its own pair out; (6) with Eq. 6, the samples'
advantages are centred; (7) no human caption is unlearned; (8) results include measures that the
reward cannot hack.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import inspect
import io
import json
import logging
import math
import os
import pickle
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

# Threads that spin while they wait for each other make a small model twenty times slower as soon as
# another process wants a core. This must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's. The message is one line: the file, flag or value, and the remedy."""


@contextlib.contextmanager
def explain(what: str, remedy: str = "") -> Iterator[None]:
    """Turn an exception of a library call in the block into a UserError of one line.

    Put it around that call alone: a mistake of ours should keep its traceback.
    """
    try:
        yield
    except pickle.UnpicklingError:  # torch's advice is to trust it all the same: not ours
        raise UserError(f"{what} (its weights hold more than tensors){remedy}") from None
    except Exception as error:  # damaged files make libraries raise all kinds
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise UserError(f"{what} ({reason}){remedy}") from None


def flag(default, help: str, kind=str, **options):
    """A field of a settings class, and the command line's flag of that name. `kind` is a function
    that converts its text, or a tuple of its choices."""
    chosen = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
    return dataclasses.field(default=default, metadata={"help": help, **chosen, **options})


def number(low: float, high: float = math.inf, kind: type = int) -> Callable[[str], float]:
    """A converter for `flag`: text to a number from `low` to `high`, or argparse's error."""

    def convert(text: str) -> float:
        value = kind(text)
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        if value == math.inf:
            limits = "finite"
        if value == math.inf or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


WEIGHT = number(0, kind=float)


# ---- 1  Method: the settings that define it ------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Method:
    """What is optimized, and against what. The defaults are the method of Chaffin et al.

    Raises UserError for a choice that does not exist.
    """

    # fmt: off
    objective: str = flag("rl", "reinforcement learning after teacher forcing, or teacher forcing "
                          "alone (Eq. 1)", ("rl", "tf"))
    baseline: str = flag("contrastive", "what a caption is held against, in reward and advantage: "
                         "the pool (Eq. 6), the greedy caption (Eq. 7), similar images (Eq. 8), "
                         "other samples (Eq. 9), or nothing",
                         ("contrastive", "greedy", "neighbours", "group", "none"))
    direction: str = flag("both", "the half of Eq. 6 that counts",
                          ("both", "image-to-text", "text-to-image"))
    regularizer: str = flag("discriminator", "what rewards human writing (Eq. 4, 10)",
                            ("discriminator", "kl", "cider", "grammar", "none"))
    samples: int = flag(1, "captions sampled for each picture", number(1))
    neighbours: int = flag(0, "similar images; with Eq. 6, hard negatives", number(0))
    similarity_weight: float = flag(0.94, "alpha of Eq. 3; the regularizer gets the rest",
                                    number(0, 1, float))
    sampled_weight: float = flag(1.0, "weight of sampled captions (Eq. 2)", WEIGHT)
    ground_truth_weight: float = flag(1.0, "weight of human captions (Eq. 5)", WEIGHT)
    length_normalizer: str = flag("constant", "what log p of a caption is divided by: a constant, "
                                  "or its own length (for comparison)", ("constant", "caption"))
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices")
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(f"{field.name} {value!r}: must be one of {', '.join(choices)}")

    @property
    def alpha(self) -> float:
        """The weight of the similarity in Eq. 3: all of it where there is no regularizer."""
        return 1.0 if self.regularizer == "none" else self.similarity_weight


# Samples alone, without human captions and without a regularizer.
CLIP_ALONE = dict(regularizer="none", ground_truth_weight=0.0)
# The same, each sample held against the greedy caption of its image.
SELF_CRITICAL = CLIP_ALONE | dict(baseline="greedy")
# To be completed by a regularizer, which gets the weight of the authors' discriminator.
WEIGHTED = SELF_CRITICAL | dict(similarity_weight=0.94)

# Published methods by name: what each changes in Method. They are faithful in the objective, not in
# every detail (architectures, data, schedules).
RECIPES: dict[str, dict] = {
    "distinctive": {},  # Chaffin et al.: everything
    "ground-truth": dict(sampled_weight=0.0, regularizer="none"),  # theirs, human captions alone
    "tf": dict(objective="tf"),
    "scst": SELF_CRITICAL | dict(regularizer="cider", similarity_weight=0.0),  # Rennie et al. 2017
    "clip-scst": SELF_CRITICAL,  # Cho et al. 2022
    # Theirs with grammar; they add 2 * 2.5 cosine and 1 grammar score, so alpha is 5/6.
    "clip-scst-grammar": SELF_CRITICAL | dict(regularizer="grammar", similarity_weight=0.83),
    "clip-scst-cider": WEIGHTED | dict(regularizer="cider"),
    "clip-scst-kl": WEIGHTED | dict(regularizer="kl"),
    "clip-scst-discriminator": WEIGHTED | dict(regularizer="discriminator"),
    "similar-images": CLIP_ALONE | dict(baseline="neighbours", neighbours=10),  # Zhang et al. 2022
    "retrieval": CLIP_ALONE | dict(direction="text-to-image"),  # after Dessì et al. 2023
    "group": CLIP_ALONE | dict(baseline="group", samples=4),  # as in RLOO and GRPO
    "no-baseline": CLIP_ALONE | dict(baseline="none"),
}


def ignored_settings(method: Method) -> dict[str, str]:
    """The settings that change nothing in this method, each with the setting that is the reason."""
    ignored = {}
    if method.objective == "tf":
        names = [field.name for field in dataclasses.fields(Method)]
        return {name: "objective" for name in names[1:] if name != "length_normalizer"}
    if method.baseline != "contrastive":
        ignored["direction"] = "baseline"
    if method.baseline not in ("contrastive", "neighbours"):
        ignored["neighbours"] = "baseline"
    elif method.baseline == "contrastive" and method.direction == "image-to-text":
        ignored["neighbours"] = "direction"  # hard negatives are images
    if method.regularizer == "none":
        ignored["similarity_weight"] = "regularizer"
    # Samples of no weight may still be competitors, a group's mean, or what D learns from.
    used = method.baseline in ("contrastive", "group") or method.regularizer == "discriminator"
    if method.sampled_weight == 0 and not used:
        ignored["samples"] = "sampled_weight"
    return ignored


# ---- 2  Objective: the only place where a loss of the captioner is made --------------------------
def caption_log_probs(log_probs: Tensor, mask: Tensor, divisor: float | None) -> Tensor:
    """log p(c|i) of each caption, as it stands in Eq. 1, 2 and 5: (C, T), (C, T) -> (C,).

    The sum of the token log-probabilities, in nats, over the caption's real tokens; padding is
    ignored. It is divided by `divisor`, the same constant for every caption, which only sets the
    scale. With `divisor` None each caption is divided by its own length, as many scripts do. Then
    REINFORCE is biased: the update follows the gradient of E[A / length], so that an advantage of 1
    for everything, which should teach nothing, teaches brevity.
    """
    total = log_probs.masked_fill(mask == 0, 0.0).sum(dim=1)
    if divisor is None:
        return total / mask.sum(dim=1).clamp(min=1)
    return total / divisor


def teacher_forcing_loss(human_log_probs: Tensor) -> Tensor:
    """-log p(ground truth | i) (Eq. 1), the mean over the batch: (B,) -> ()."""
    return -human_log_probs.mean()


def reinforce_loss(sampled_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-A log p(c|i) (Eq. 2), the mean over the samples: (K*B,), (K*B,) -> ().

    The advantages are detached. Only the gradient is meaningful: minus the score-function estimate
    of the gradient of the expected reward. The value is no measure of progress.
    """
    return -(advantages.detach() * sampled_log_probs).mean()


def ground_truth_loss(human_log_probs: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE with the human caption in place of a sample (Eq. 5): (B,), (B,) -> ().

    Teacher forcing, weighted by how distinctive each caption is (and how human: the advantage is of
    Eq. 3's reward). A negative advantage counts as zero: a human caption that loses against its
    competitors is left alone, not unlearned.
    """
    return reinforce_loss(human_log_probs, advantages.clamp(min=0))


# ---- 3  Rewards and baselines: pure functions; nothing that goes in or out has a gradient --------
def similarity_reward(caption_embeddings: Tensor, image_embeddings: Tensor) -> Tensor:
    """Cosine of each caption with its own image: (C, D), (C, D) -> (C,). Cho et al. 2022."""
    return (caption_embeddings * image_embeddings).sum(dim=1)


def soft_maximum(logits: Tensor) -> Tensor:
    """log sum exp of each row: (C, I) -> (C,). Zero if all of it is -inf: no competitors."""
    maxima = logits.logsumexp(dim=1)
    return torch.where(maxima.isneginf(), 0.0, maxima)


def contrastive_reward(
    caption_embeddings: Tensor,
    image_embeddings: Tensor,
    image_index: Tensor,
    logit_scale: float,
    direction: str = "both",
) -> Tensor:
    """Bidirectional contrastive reward (Eq. 6): (C, D), (I, D), (C,) -> (C,), in units of cosine.

        a(c, i) = s e_c.e_i - log sum_{c' != c} exp(s e_c'.e_i)    image-to-text
        b(c, i) = s e_c.e_i - log sum_{i' != i} exp(s e_c.e_i')    text-to-image

    image_index[c] is the image that caption c was written for; s is `logit_scale`, the factor
    itself (100 for OpenAI's CLIP), not its logarithm. The reward is (a + b) / 2s, or a / s or b / s
    for one direction. The log-sum-exp is a soft maximum: the strongest competitor sets the bar.
    Only the pair (c, i) itself is left out: all other captions of the same image compete too.

    The halves are different things. What a subtracts does not depend on c: for a sampled caption it
    is a *baseline*, and leaves the expected gradient that of the plain cosine. (For a human one,
    which is not drawn, it decides the weight.) What b subtracts moves with c: it is part of the
    *reward*, and makes a caption pay for fitting other images.
    """
    logits = logit_scale * caption_embeddings @ image_embeddings.T  # (C, I)
    own = logits.gather(1, image_index[:, None]).squeeze(1)  # (C,)

    # Does the image pick this caption? Row c: the image of c with every caption but c.
    other_captions = logits.T[image_index].fill_diagonal_(-torch.inf)  # (C, C)
    image_to_text = own - soft_maximum(other_captions)

    # Does the caption pick its image? Row c: c with every image but its own.
    other_images = logits.scatter(1, image_index[:, None], -torch.inf)  # (C, I)
    text_to_image = own - soft_maximum(other_images)

    if direction == "image-to-text":
        return image_to_text / logit_scale
    if direction == "text-to-image":
        return text_to_image / logit_scale
    return (image_to_text + text_to_image) / (2 * logit_scale)


def nearest_images(image_embeddings: Tensor, index: Tensor, count: int) -> Tensor:
    """The `count` other images most similar to each image indexed: (N, D), (B,) -> (B, M)."""
    similarity = image_embeddings[index] @ image_embeddings.T  # (B, N)
    similarity = similarity.scatter(1, index[:, None], -torch.inf)  # no image is its own neighbour
    return similarity.topk(count, dim=1).indices


def neighbours_reward(
    caption_embeddings: Tensor, image_embeddings: Tensor, neighbour_embeddings: Tensor
) -> Tensor:
    """Cosine with the own image less its mean over similar ones (Eq. 8) of Zhang et al. 2022.

    (C, D), (C, D), (C, M, D) -> (C,). It is called a baseline, but like the text-to-image half of
    Eq. 6 it moves with the caption: it is part of the reward.
    """
    others = torch.einsum("cd,cmd->cm", caption_embeddings, neighbour_embeddings)  # (C, M)
    return similarity_reward(caption_embeddings, image_embeddings) - others.mean(dim=1)


def mixed_reward(similarity: Tensor, regularizer: Tensor, alpha: float) -> Tensor:
    """r = alpha r_sim + (1 - alpha) r_reg (Eq. 3), elementwise: (C,), (C,) -> (C,)."""
    return alpha * similarity + (1 - alpha) * regularizer


def self_critical_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """A = r - r(greedy caption of the same image) (Eq. 7): (B, K), (B,) -> (B, K)."""
    return rewards - greedy_rewards[:, None]


def group_advantages(rewards: Tensor) -> Tensor:
    """A = r - the mean reward of the image's other samples (Eq. 9): (B, K) -> (B, K), K > 1."""
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def centred_advantages(rewards: Tensor) -> Tensor:
    """A = r - the mean reward of all samples of the batch: (B, K) -> (B, K)."""
    return rewards - rewards.mean()


# ---- 4  Regularizers: r_reg of Eq. 3, what rewards human writing ---------------------------------
class Regularizer:
    """One interface for all of them. This one pays nothing: `--regularizer none`.

    `network` is what the regularizer learns, if it learns. Its optimizer steps when the captioner's
    does, and not at all in a step that is not finite.
    """

    def __init__(self) -> None:
        self.network: nn.Module = nn.Identity()

    def score(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """r_reg of each caption of the pool (C,), without gradient; the loss () from which the
        network learns, with a gradient for the network alone; and what to log."""
        nothing = torch.zeros_like(rollout.caption_embeddings[:, 0])
        return nothing, nothing.sum(), {}


def perceptron(width: int) -> nn.Sequential:
    """Two hidden layers, one logit: the network of the authors' discriminator."""
    return nn.Sequential(
        nn.Linear(width, 512), nn.ReLU(),
        nn.Linear(512, 256), nn.ReLU(),
        nn.Linear(256, 1),
    )  # fmt: skip


def discriminator_loss(wrong_logits: Tensor, human_logits: Tensor) -> Tensor:
    """Binary cross-entropy (Eq. 4), in nats: sampled (or corrupted) captions are 0, human ones 1.

    (K*B,), (B,) -> (); both halves weigh the same, however many captions they hold.
    """
    wrong_loss = F.softplus(wrong_logits).mean()  # -log (1 - D)
    human_loss = F.softplus(-human_logits).mean()  # -log D
    return (wrong_loss + human_loss) / 2


class Discriminator(Regularizer):
    """Is the caption of this image human? (Eq. 4). r_reg is D(i, c), a probability.

    It learns while the captioner does: sampled captions are 0, human captions 1. Scores are those
    from before its step on the same captions.
    """

    def __init__(self, width: int) -> None:
        self.network = perceptron(2 * width)

    def logits(self, image_embeddings: Tensor, caption_embeddings: Tensor) -> Tensor:
        """(C, D), (C, D) -> (C,): log odds that a person wrote the caption."""
        pairs = torch.cat([image_embeddings, caption_embeddings], dim=1)  # (C, D + D)
        return self.network(pairs).squeeze(1)

    def score(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """D of every caption; the loss of Eq. 4; D's accuracy on sampled and human captions."""
        images = rollout.image_embeddings[rollout.image_index]  # (C, D)
        logits = self.logits(images, rollout.caption_embeddings)
        sampled, human, _ = logits.split(rollout.sizes)
        correct = torch.cat([sampled < 0, human > 0]).float().mean()
        record = {"discriminator_accuracy": correct.item()}
        return logits.detach().sigmoid(), discriminator_loss(sampled, human), record


class KL(Regularizer):
    """Stay near the captioner that reinforcement learning started from, p_0 (Eq. 10).

    r_reg is log p_0(c|i) - log p(c|i), in nats divided by `divisor`. Of a sampled caption that is
    minus an unbiased estimate of KL(p || p_0). `captioner` is copied as it is now.
    """

    def __init__(self, captioner, divisor: float | None) -> None:
        super().__init__()
        self.captioner = captioner
        self.initial = copy.deepcopy(captioner).eval()
        self.divisor = divisor

    @torch.no_grad()
    def score(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The log-ratio of every caption; no loss; the estimate of the divergence. It costs two
        passes over the pool that training itself does not need."""
        log_probs = []
        for captioner in (self.captioner, self.initial):
            features = captioner.encode(batch.pixels)
            words, mask = captioner.log_probs(features, rollout.tokens, rollout.image_index)
            log_probs.append(caption_log_probs(words, mask, self.divisor))
        now, before = log_probs
        sampled_now, *_ = (now - before).split(rollout.sizes)
        return before - now, now.new_zeros(()), {"kl": sampled_now.mean().item()}


def plain_words(text: str) -> str:
    """Lower-case words with single spaces, without punctuation: what n-grams are counted in."""
    return " ".join(re.findall(r"\w+(?:['-]\w+)*", text.lower()))


class Cider(Regularizer):
    """CIDEr of each caption against the references of its image (Eq. 10), from 0 to 10.

    By pycocoevalcap's scorer, with the document frequencies of the whole data set, not of a batch.
    `references` holds those of every picture of the data set, of which no pool is larger.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        super().__init__()
        self.scorer = CiderScorer()
        for texts in references:
            self.scorer += (None, [plain_words(text) for text in texts])
        self.scorer.compute_doc_freq()
        self.references = self.scorer.crefs  # n-grams, counted once

    def score(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """CIDEr of every caption, the human one included: it is among its own references."""
        from pycocoevalcap.cider.cider_scorer import cook_refs

        pictures = batch.index[rollout.image_index].tolist()
        self.scorer.ctest = cook_refs([plain_words(caption) for caption in rollout.captions])
        # The scorer takes the size of the data set from the length of this list. What follows the
        # references of this pool pads it to that length, and is never compared.
        uncompared = self.references[len(pictures) :]
        self.scorer.crefs = [self.references[index] for index in pictures] + uncompared
        scores = rollout.caption_embeddings.new_tensor(self.scorer.compute_cider())
        return scores, scores.new_zeros(()), {}


CORRUPTIONS = ("repeat", "drop", "insert", "swap", "shuffle")


def corrupt(caption: str) -> str:
    """The caption with one of its words repeated, dropped, inserted elsewhere or swapped with the
    next, or all of it shuffled, by torch's random numbers. Now and then nothing changes."""
    words = caption.split()
    if not words:
        return caption
    kind = CORRUPTIONS[torch.randint(len(CORRUPTIONS), ())]
    place, other = torch.randint(len(words), (2,)).tolist()
    if kind == "repeat":
        words.insert(place, words[place])
    elif kind == "drop":
        del words[place]
    elif kind == "insert":
        words.insert(place, words[other])
    elif kind == "swap":
        words.insert(place + 1, words.pop(place))
    else:
        words = [words[n] for n in torch.randperm(len(words))]
    return " ".join(words)


class Grammar(Regularizer):
    """Does the caption read well? (Eq. 10). r_reg is a probability, whatever the image.

    A discriminator of captions alone. It learns to tell human captions from corrupted ones, so it
    knows the mistakes that `corrupt` makes, not those that the captioner makes.
    """

    def __init__(self, width: int, clip) -> None:
        self.network = perceptron(width)
        self.clip = clip

    def logits(self, caption_embeddings: Tensor) -> Tensor:
        """(C, D) -> (C,): log odds that the caption is uncorrupted."""
        return self.network(caption_embeddings).squeeze(1)

    def score(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The score of every caption; the loss of Eq. 4, with corrupted captions as the zeros."""
        logits = self.logits(rollout.caption_embeddings)
        _, human, _ = logits.split(rollout.sizes)
        broken = [corrupt(caption) for caption in batch.ground_truth]
        corrupted = self.logits(self.clip.embed_captions(broken))
        correct = torch.cat([corrupted < 0, human > 0]).float().mean()
        record = {"grammar_accuracy": correct.item()}
        return logits.detach().sigmoid(), discriminator_loss(corrupted, human), record


def make_regularizer(learner: Learner, references: Sequence[Sequence[str]]) -> Regularizer:
    """The regularizer that the learner's method names, before reinforcement learning begins.
    `references` are those of every picture of the data set."""
    kind = learner.method.regularizer
    width = learner.image_embeddings.shape[1]
    if kind == "discriminator":
        return Discriminator(width)
    if kind == "kl":
        return KL(learner.captioner, learner.divisor)
    if kind == "cider":
        return Cider(references)
    if kind == "grammar":
        return Grammar(width, learner.clip)
    return Regularizer()


# ---- 5  One step: encode, roll out, judge, learn -------------------------------------------------
def process_count() -> int:
    """How many processes learn together, each from its own pictures: 1 without torchrun."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def process_rank() -> int:
    """Which of them this one is, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks, without gradient: as many of each."""
    if process_count() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(process_count())]
    torch.distributed.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def own_rows(rows: Tensor) -> Tensor:
    """Of the rows that `gather` returns, or of something computed for each, those of this one."""
    return rows.chunk(process_count())[process_rank()]


@dataclasses.dataclass(frozen=True)
class Batch:
    """B pictures to learn from, none twice: its own copy would be a rival in Eq. 6."""

    index: Tensor  # (B,): their rows in the data set
    ground_truth: list[str]  # B texts: of each picture one human caption, one of its references
    pixels: Tensor  # (B, 3, height, width): as the captioner wants them


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What one step wrote, and what CLIP makes of it. Nothing here has a gradient.

    The pool holds C captions in this order: the K samples of each image, image by image; the human
    caption of each; the greedy caption of each. `sizes` is (K*B, B, B), for Tensor.split.
    """

    tokens: Tensor  # (C, P + T)
    captions: list[str]  # C texts
    image_index: Tensor  # (C,): whose caption it is, a row of the batch
    caption_embeddings: Tensor  # (C, D), unit rows
    image_embeddings: Tensor  # (B, D), unit rows
    sizes: tuple[int, int, int]


class Learner:
    """A captioner and what teaches it. Both steps take a Batch and return a loss and what to log.

    `max_length` is the most tokens that a caption may have, its end included, its start not. After
    teacher forcing and before reinforcement learning, set `image_embeddings` to those of the whole
    data set (N, D), where a batch finds its own by `index`; then `regularizer` to what
    `make_regularizer` returns.
    """

    def __init__(self, captioner, clip, method: Method, max_length: int) -> None:
        self.captioner = captioner
        self.clip = clip
        self.method = method
        self.max_length = max_length
        self.divisor = None if method.length_normalizer == "caption" else float(max_length)
        self.image_embeddings: Tensor | None = None
        self.regularizer = Regularizer()

    def teacher_forcing_step(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of Eq. 1."""
        features = self.captioner.encode(batch.pixels)
        tokens = self.captioner.tokenize(batch.ground_truth, self.max_length)
        log_probs, mask = self.captioner.log_probs(features, tokens)
        return teacher_forcing_loss(caption_log_probs(log_probs, mask, self.divisor)), {}

    def reinforce_step(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of the captioner, Eq. 2 and 5, plus that of the regularizer's network.

        One backward pass serves both: neither loss depends on the other's parameters.
        """
        device = self.image_embeddings.device  # batches come from the CPU
        batch = dataclasses.replace(batch, index=batch.index.to(device))
        features = self.captioner.encode(batch.pixels)  # (B, L, H), once for all that follows
        rollout = self.roll_out(features, batch)
        advantages, regularizer_loss, record = self.judge(rollout, batch)
        loss = self.loss(features, rollout, advantages)
        return loss + regularizer_loss, record

    @torch.no_grad()
    def roll_out(self, features: Tensor, batch: Batch) -> Rollout:
        """Write the pool of captions and embed it. `features` (B, L, H) are those of the batch."""
        # Write: K samples and one greedy caption of each image. Read: what a person wrote.
        write = self.captioner.sample_and_greedy
        sampled, greedy = write(features, self.max_length, self.method.samples)
        human = self.captioner.tokenize(batch.ground_truth, self.max_length)
        sizes = (len(sampled), len(human), len(greedy))

        # The same as one block of tokens, as texts, and as embeddings.
        rows = [*sampled, *human, *greedy]
        pad = self.captioner.pad
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)  # (C, P + T)
        captions = [*self.captioner.decode(sampled), *batch.ground_truth]
        captions += self.captioner.decode(greedy)
        caption_embeddings = self.clip.embed_captions(captions)

        # Whose caption is it? For B = 2 and K = 2: [0 0 1 1 | 0 1 | 0 1].
        row = torch.arange(len(batch.index), device=caption_embeddings.device)
        image_index = torch.cat([row.repeat_interleave(self.method.samples), row, row])
        image_embeddings = self.image_embeddings[batch.index]
        return Rollout(tokens, captions, image_index, caption_embeddings, image_embeddings, sizes)

    def judge(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Rewards (Eq. 3) less a baseline: advantages (K*B + B,) of the sampled and the human
        captions; the regularizer's loss; what to log. It needs no gradient of the captioner, so
        that the pool may be larger than what fits into one forward pass."""
        similarity = self.similarity_rewards(rollout, batch)
        scores, regularizer_loss, record = self.regularizer.score(rollout, batch)
        rewards = mixed_reward(similarity, scores, self.method.alpha)  # (C,)
        sampled, human, greedy = rewards.split(rollout.sizes)

        words = [len(caption.split()) for caption in rollout.captions[: len(sampled)]]
        record = record | {
            "reward": sampled.mean().item(),
            "ground_truth_reward": human.mean().item(),
            "greedy_reward": greedy.mean().item(),
            "regularizer_loss": regularizer_loss.item(),
            "mean_length": sum(words) / len(words),
        }
        return self.advantages(sampled, human, greedy), regularizer_loss, record

    def similarity_rewards(self, rollout: Rollout, batch: Batch) -> Tensor:
        """r_sim of every caption of the pool (C,): Eq. 6, Eq. 8, or the cosine."""
        method = self.method
        captions = rollout.caption_embeddings
        images = rollout.image_embeddings
        own = images[rollout.image_index]  # (C, D): each caption's own image
        if method.baseline == "neighbours":
            near = nearest_images(self.image_embeddings, batch.index, method.neighbours)  # (B, M)
            near_embeddings = self.image_embeddings[near]  # (B, M, D)
            return neighbours_reward(captions, own, near_embeddings[rollout.image_index])
        if method.baseline != "contrastive":
            return similarity_reward(captions, own)

        # The captions and images of all processes compete, whoever wrote them.
        image_index = gather(rollout.image_index + process_rank() * len(images))
        captions = gather(captions)
        images = gather(images)
        if method.neighbours:  # hard negatives join the pool of images, each once
            index = gather(batch.index)
            near = nearest_images(self.image_embeddings, index, method.neighbours)
            new = near[~torch.isin(near, index)].unique()
            images = torch.cat([images, self.image_embeddings[new]])  # (I, D)
        scale = self.clip.logit_scale
        rewards = contrastive_reward(captions, images, image_index, scale, method.direction)
        return own_rows(rewards)

    def advantages(self, sampled: Tensor, human: Tensor, greedy: Tensor) -> Tensor:
        """Rewards of the sampled (K*B,), human (B,) and greedy captions (B,), less the baseline:
        the advantages of the sampled and the human captions (K*B + B,)."""
        groups = sampled.view(len(human), -1)  # (B, K)
        if self.method.baseline == "greedy":
            groups = self_critical_advantages(groups, greedy)
            human = human - greedy
        elif self.method.baseline == "group":
            human = human - groups.mean(dim=1)
            groups = group_advantages(groups)
        elif self.method.baseline == "contrastive":
            # Eq. 6 has its competitors inside; the samples are centred on top. A human caption is
            # not: the sign of its reward says whether it beats its competitors.
            groups = own_rows(centred_advantages(gather(groups)))
        return torch.cat([groups.flatten(), human])

    def loss(self, features: Tensor, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Eq. 2 on the sampled and Eq. 5 on the human captions: (B, L, H), (K*B + B,) -> ().

        One forward pass for both. Its gradient reaches all of the captioner, the vision tower by
        way of `features`. The greedy captions were competitors only: nothing is learned from them.
        """
        sampled_count, human_count, _ = rollout.sizes
        scored = sampled_count + human_count
        tokens = rollout.tokens[:scored]
        image_index = rollout.image_index[:scored]
        log_probs, mask = self.captioner.log_probs(features, tokens, image_index)
        log_probs = caption_log_probs(log_probs, mask, self.divisor)  # (K*B + B,)

        sampled_loss = reinforce_loss(log_probs[:sampled_count], advantages[:sampled_count])
        human_loss = ground_truth_loss(log_probs[sampled_count:], advantages[sampled_count:])
        method = self.method
        return method.sampled_weight * sampled_loss + method.ground_truth_weight * human_loss


# ---- 6  Captioner: encode once, then sample, search and score from the same features -------------
def in_precision(method: Callable) -> Callable:
    """Run a captioner's method in bf16 arithmetic if its `bf16` says so. Weights stay in fp32."""

    @functools.wraps(method)
    def run(captioner: Captioner, *arguments, **options):
        device = captioner.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=captioner.bf16):
            return method(captioner, *arguments, **options)

    return run


class Captioner(nn.Module):
    """A captioner p(c|i) with its preprocessing: BLIP. EncoderDecoder and GIT say what differs.

    `tokens` are (C, P + T): the P of `start` (the start token and the prompt, which are saved with
    the model, never scored and never shown), then the words, an end token, and padding."""

    default_prompt = "a picture of"  # what a BLIP that comes without a prompt learned to continue
    bf16 = False

    def __init__(self, model: nn.Module, image_processor, tokenizer, prompt: str | None = None):
        from transformers import GenerationConfig

        super().__init__()
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.pixels = functools.partial(prepare_pixels, image_processor)
        self.side = max(dict(image_processor.size).values())  # in pixels
        start, self.end, self.pad = self.special_tokens()
        if prompt is None:
            prompt = getattr(model.config, "prompt", self.default_prompt)
        self.prompt = model.config.prompt = prompt
        self.start = [start, *tokenizer(prompt, add_special_tokens=False).input_ids]
        decoder = model.config.get_text_config(decoder=True)
        self.longest = decoder.max_position_embeddings - len(self.start)

        # transformers called it past_key_values before 5.24.
        arguments = inspect.signature(self.writer.forward).parameters
        self.cache_name = "cache" if "cache" in arguments else "past_key_values"
        # The checkpoint's own generation settings (top-k, penalties, ...) would bias the samples.
        ids = dict(decoder_start_token_id=start, eos_token_id=self.end, pad_token_id=self.pad)
        self.writer.generation_config = GenerationConfig(**ids)

    def special_tokens(self) -> tuple[int, int, int]:
        """The ids of start, end and padding."""
        config = self.model.config.text_config
        return config.bos_token_id, config.sep_token_id, config.pad_token_id

    @property
    def writer(self) -> nn.Module:
        """The part of the model that writes."""
        return self.model.text_decoder

    def inputs(self, features: Tensor, tokens: Tensor, image_index: Tensor, share=True) -> dict:
        """The writer's arguments: the tokens so far (C, P + T), and what it sees of their images.

        Cross-attention's keys and values are the image's, whatever the caption. To `share` them is
        to compute them once for each of the B images, in a cache that the writer finds filled."""
        if not share:
            return {"input_ids": tokens, "encoder_hidden_states": features[image_index]}
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for number, layer in enumerate(self.writer.bert.encoder.layer):
            attention = layer.crossattention.self
            rows = []
            for project in (attention.key, attention.value):
                heads = project(features).unflatten(2, (attention.num_attention_heads, -1))
                rows.append(heads.transpose(1, 2)[image_index])  # (C, heads, L, H / heads)
            cache.cross_attention_cache.update(*rows, number)
            cache.is_updated[number] = True
        return {"input_ids": tokens, "encoder_hidden_states": features, self.cache_name: cache}

    @in_precision
    def encode(self, pixels: Tensor) -> Tensor:
        """Features of images: (B, 3, height, width) -> (B, L, H). All that follows starts here."""
        return self.model.vision_model(pixels.to(self.model.device)).last_hidden_state

    @staticmethod
    def load(name: str, device: str = "cpu", prompt: str | None = None) -> Captioner:
        """The captioner of a Hub name, a Hugging Face folder or a run folder: fp32, in eval mode.
        Raises UserError in one line for what cannot be loaded."""
        weights = ("model*.safetensors", "pytorch_model*.bin")
        folder = local_folder(name, "captioner", "config.json", weights)
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        with explain(f"{name}: cannot load this captioner"):
            family = json.loads((folder / "config.json").read_text())["model_type"]
            if family not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise ValueError(f"a model of type {family}; captioners are of type {known}")
            options = dict(dtype=torch.float32, output_loading_info=True)
            model, report = AutoModelForImageTextToText.from_pretrained(folder, **options)
            if missing := report["missing_keys"]:
                raise ValueError(f"it lacks the weights {min(missing)}; is it complete?")
            image_processor = AutoImageProcessor.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        return FAMILIES[family](model, image_processor, tokenizer, prompt).eval().to(device)

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder, which transformers loads without distcap."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(folder)

    def check_length(self, max_length: int) -> None:
        """Raise UserError for captions longer than there are positions for."""
        if max_length > self.longest:
            most = f"this captioner writes at most {self.longest} tokens"
            raise UserError(f"--max-length {max_length}: {most}")

    def tokenize(self, captions: Sequence[str], max_length: int) -> Tensor:
        """Captions as tokens (B, P + T). One of more than `max_length` is cut and has no end."""
        texts = [f"{self.prompt} {caption}".strip() for caption in captions]
        words = self.tokenizer(texts, add_special_tokens=False).input_ids
        most = len(self.start) + max_length
        rows = [torch.tensor([self.start[0], *row, self.end][:most]) for row in words]
        return nn.utils.rnn.pad_sequence(rows, True, self.pad).to(self.model.device)

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens (C, P + T) as texts, without the prompt, each a single line."""
        options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=True)
        texts = self.tokenizer.batch_decode(tokens[:, len(self.start) :], **options)
        return [" ".join(text.split()) for text in texts]

    def sample(self, features: Tensor, max_length: int, count: int = 1, temperature: float = 1.0,
               top_p: float = 1.0, **limits) -> Tensor:  # fmt: skip
        """Draw `count` captions of each image: (B, L, H) -> (K*B, P + T), an image's in a row. From
        p(c|i) itself unless told otherwise: REINFORCE needs that, and generate's default of the 50
        likeliest tokens would break it. `limits` are generate's, as min_new_tokens."""
        drawing = dict(do_sample=True, top_k=0, top_p=top_p, temperature=temperature)
        return self.generate(features, max_length, count, **drawing, **limits)

    def greedy(self, features: Tensor, max_length: int) -> Tensor:
        """Of each image the caption whose every token is the likeliest: (B, L, H) -> (B, P + T)."""
        return self.search(features, max_length)

    def sample_and_greedy(self, features: Tensor, max_length: int, count: int) -> tuple:
        """The same two, (K*B, P + T) and (B, P + T), in one decoding pass: of the K + 1 captions of
        each image that are sampled together, the last may only choose its likeliest token."""

        def last_is_greedy(tokens: Tensor, logits: Tensor) -> Tensor:  # (B * (K + 1), V)
            last = logits[count :: count + 1]
            best = last.argmax(dim=1, keepdim=True)
            last.fill_(-torch.inf).scatter_(1, best, 0.0)
            return logits

        processors = [last_is_greedy]
        tokens = self.sample(features, max_length, count + 1, logits_processor=processors)
        tokens = tokens.view(len(features), count + 1, -1)
        return tokens[:, :-1].flatten(0, 1), tokens[:, -1]

    def search(self, features: Tensor, max_length: int, beams: int = 1, **limits) -> Tensor:
        """Beam search for a likely caption of each image: (B, L, H) -> (B, P + T)."""
        return self.generate(features, max_length, do_sample=False, num_beams=beams, **limits)

    @torch.no_grad()
    @in_precision
    def generate(self, features: Tensor, max_length: int, count: int = 1, **options) -> Tensor:
        """The one call of transformers' generate. At most `max_length` tokens follow the start."""
        own = torch.arange(len(features), device=self.model.device).repeat_interleave(count)
        start = torch.tensor([self.start] * len(own), device=self.model.device)  # (K*B, P)
        share = options.get("num_beams", 1) == 1  # a beam search reorders a cache of its own
        options |= self.inputs(features, start, own, share)
        return self.writer.generate(**options, max_new_tokens=max_length)

    @in_precision
    def log_probs(self, features: Tensor, tokens: Tensor,
                  image_index: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """log p of each token after the start, given those before it, in nats; and the mask:
        (B, L, H), (C, P + T), (C,) -> (C, T), (C, T). `image_index` tells each caption's image; if
        not given, there is one caption of each. Differentiable down to the pixels. What stands
        where the mask is 0 means nothing."""
        if image_index is None:
            image_index = torch.arange(len(tokens), device=tokens.device)
        words = tokens[:, len(self.start) :]  # (C, T)
        logits = self.writer(**self.inputs(features, tokens[:, :-1], image_index)).logits
        logits = logits[:, -words.shape[1] :]  # (C, T, V): each predicts the token after it
        log_probs = logits.float().log_softmax(dim=-1).gather(2, words[:, :, None]).squeeze(2)
        return log_probs, self.mask(tokens)

    def mask(self, tokens: Tensor) -> Tensor:
        """1.0 for the tokens up to the first end and for that end, 0.0 after: (C, P + T) -> (C, T).
        Not simply "where it is not padding": GPT-2 pads with its end token."""
        ends = (tokens[:, len(self.start) :] == self.end).long()
        ends_before = ends.cumsum(dim=1) - ends
        return (ends_before == 0).float()


class EncoderDecoder(Captioner):
    """Any VisionEncoderDecoder of transformers: ViT-GPT2 and the like."""

    default_prompt = ""

    def special_tokens(self) -> tuple[int, int, int]:
        """The ids of start, end and padding."""
        config = self.model.generation_config
        return config.decoder_start_token_id, config.eos_token_id, config.pad_token_id

    @property
    def writer(self) -> nn.Module:
        """The whole model: given features, it does not encode again."""
        return self.model

    def inputs(self, features: Tensor, tokens: Tensor, image_index: Tensor, share=True) -> dict:
        """The writer's arguments. Decoders differ too much to share anything."""
        from transformers.modeling_outputs import BaseModelOutput

        seen = BaseModelOutput(features[image_index])
        return {"decoder_input_ids": tokens, "encoder_outputs": seen}

    @in_precision
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, L, H)."""
        return self.model.encoder(pixels.to(self.model.device)).last_hidden_state


class GIT(Captioner):
    """Microsoft's GIT: it reads the image as a prefix, so that its features are the pixels."""

    default_prompt = ""

    def special_tokens(self) -> tuple[int, int, int]:
        """The ids of start, end and padding."""
        config = self.model.config
        return config.bos_token_id, config.eos_token_id, config.pad_token_id

    @property
    def writer(self) -> nn.Module:
        """The whole model, which encodes the image anew each time."""
        return self.model

    def inputs(self, features: Tensor, tokens: Tensor, image_index: Tensor, share=True) -> dict:
        """The writer's arguments."""
        return {"input_ids": tokens, "pixel_values": features[image_index]}

    def encode(self, pixels: Tensor) -> Tensor:
        """The pixels themselves: there is nothing to reuse."""
        return pixels.to(self.model.device)


# transformers' name of a model type -> the class that knows it
FAMILIES = {"blip": Captioner, "vision-encoder-decoder": EncoderDecoder, "git": GIT}


def prepare_pixels(image_processor, pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures, resized and normalized as a checkpoint wants them: (B, 3, height, width).
    No method of Captioner, so that a worker process can be given it without the model."""
    return image_processor(list(pictures), return_tensors="pt").pixel_values


def local_folder(name: str, inside: str, wanted: str, kinds: Sequence[str]) -> Path:
    """The folder of a checkpoint, the one that holds the file `wanted`: `name` itself, `inside` a
    run folder of that name, or what the Hugging Face Hub has. `kinds` are patterns of weights."""
    for folder in (Path(name) / inside, Path(name)):
        if (folder / wanted).is_file():
            return folder
    if Path(name).exists():
        raise UserError(f"{name}: not a checkpoint: no {wanted} and no {inside}/{wanted} in it")
    what = f"{name}: not a folder, nor to be had from the Hugging Face Hub"
    with explain(what, "; give a folder, such as runs/toy"):
        return download(name, kinds)


def download(name: str, kinds: Sequence[str]) -> Path:
    """A repository of the Hub, from the cache if it cannot be reached: its small files, and its
    weights of the first of `kinds` that it offers. Raises ValueError if it offers none."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    unreachable = None
    try:  # unlike other calls, this one does not try for half a minute where there is no network
        files = [file.rfilename for file in HfApi().model_info(name, timeout=10).siblings]
        kinds = [kind for kind in kinds if any(Path(file).match(kind) for file in files)][:1]
    except RepositoryNotFoundError:
        raise ValueError("no such repository, or one that needs a login") from None
    except Exception as error:  # whatever it is, the cache may hold the files
        unreachable = error
    bar = functools.partial(tqdm, disable=None, leave=False)  # on a terminal only
    options = dict(tqdm_class=bar, local_files_only=bool(unreachable))
    options["ignore_patterns"] = ["*/*"]  # a pattern's * matches slashes too
    for kind in kinds:
        patterns = ["*.json", "*.txt", "*.model", kind]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
        except LocalEntryNotFoundError:
            raise unreachable or ValueError("it vanished from the cache") from None
        if any(folder.glob(kind)):
            return folder
    raise unreachable or ValueError("it has no weights of a kind that can be loaded")


# ---- 7  CLIP: images and captions as unit rows ---------------------------------------------------
class CLIP:
    """A frozen open_clip model: images and captions as unit rows (N, D), without gradient."""

    def __init__(self, model: nn.Module, preprocess, tokenizer, device: str = "cpu") -> None:
        self.model = model.eval().to(device)  # open_clip returns it in training mode
        self.tokenizer, self.device = tokenizer, device
        self.pixels = functools.partial(stack_pixels, preprocess)
        self.side = int(
            torch.tensor(model.visual.image_size).max()
        )  # a number, or height and width
        self.logit_scale = model.logit_scale.exp().item()  # s of Eq. 6

    @classmethod
    def load(cls, name: str, device: str = "cpu") -> CLIP:
        """The CLIP of an open_clip NAME/TAG, hf-hub:NAME, a folder, or a run folder.
        Raises UserError in one line for what cannot be loaded."""
        from open_clip import create_model_from_pretrained, get_pretrained_cfg, get_tokenizer

        kinds = ("open_clip_*.safetensors", "open_clip_pytorch_model*.bin")
        inside = ("clip", "open_clip_config.json", kinds)
        weights, options = None, {}
        if Path(name).exists() or name.startswith("hf-hub:"):
            architecture = f"local-dir:{local_folder(name.removeprefix('hf-hub:'), *inside)}"
        else:
            architecture, _, weights = name.rpartition("/")
            known = get_pretrained_cfg(architecture, weights)
            for setting in ("mean", "std", "interpolation", "resize_mode"):
                options[f"image_{setting}"] = known.get(setting)
            # Weights trained with QuickGELU embed wrongly without it, and open_clip only warns.
            options["force_quick_gelu"] = known.get("quick_gelu", False)
            if repository := os.path.dirname(known.get("hf_hub", "")):
                files = local_folder(repository, *inside).glob("open_clip_*model.*")
                weights = str(min(files))  # safetensors if there are any
        with explain(f"{name}: cannot load this CLIP", "; give --clip NAME/TAG or a folder"):
            model, preprocess = create_model_from_pretrained(architecture, weights, **options)
            return cls(model, preprocess, get_tokenizer(architecture), device)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Prepared pictures as unit rows: (B, 3, height, width) -> (B, D)."""
        return self.model.encode_image(pixels.to(self.device), normalize=True)

    def embed_images(self, images: Iterable[Path | Image.Image], workers: int = 0) -> Tensor:
        """Pictures as unit rows (N, D). Raises UserError for one that cannot be read."""
        batches = PictureBatches(list(images), [self.pixels], 64, self.side)
        rows = []
        for batch in read_ahead(batches, range(len(batches)), workers):
            batch.raise_failure()
            rows.append(self.encode_pixels(batch.pixels[0]))
        return torch.cat(rows)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Captions as unit rows (C, D). Equal captions are embedded once, so that they tie."""
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        tokens = [self.tokenizer(texts) for texts in batched(list(row_of), batch_size)]
        rows = [self.encode_tokens(each.to(self.device)) for each in tokens]
        return torch.cat(rows)[[row_of[caption] for caption in captions]]

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens as unit rows. OpenAI's kind of text tower is causal and pools at the end token, so
        it need not read the padding after it, which is most of its 77 tokens."""
        model = self.model
        if type(model).__name__ != "CLIP" or getattr(model, "text_pool_type", "") != "argmax":
            return model.encode_text(tokens, normalize=True)
        length = int(tokens.argmax(dim=1).max()) + 1  # the end token has the highest id
        shorter = {"positional_embedding": model.positional_embedding[:length]}
        shorter["attn_mask"] = model.attn_mask[:length, :length]
        return torch.func.functional_call(model, shorter, (None, tokens[:, :length]))[1]


def stack_pixels(preprocess: Callable, pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures as a CLIP wants them: (B, 3, height, width)."""
    return torch.stack([preprocess(picture) for picture in pictures])


# ---- 8  Data: pictures, data sets, and reading ahead ---------------------------------------------
@dataclasses.dataclass(frozen=True)
class Example:
    """A picture, on disk or in memory, and what people wrote of it. `split` (train, val, test):
    where the data say so. `scene`: in the toy world."""

    image_id: str
    image: Path | Image.Image
    references: tuple[str, ...]
    split: str | None = None
    scene: Scene | None = None


SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def load_image(image: Path | Image.Image, side: int | None = None) -> Image.Image:
    """Any picture as upright RGB: EXIF rotation is applied, transparency becomes white, 16 bits are
    scaled to 8, of a film the first frame is taken. Raises UserError for what cannot be read.

    For a model that wants pictures of `side` pixels, a JPEG may be decoded at a half, a quarter or
    an eighth of its size, which is much faster, but never at less than twice what is wanted."""
    with explain(f"{image}: cannot be read"):
        if isinstance(image, Path) and not image.is_file():
            raise OSError("no such file")  # a pipe or a device would be waited for
        picture = Image.open(image) if isinstance(image, Path) else image
        if side:
            picture.draft(None, (2 * side, 2 * side))  # nothing happens but to a JPEG
        picture.load()  # a truncated file fails here, not later
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":  # 16 or 32 bits or floats: convert would clip them to white
            values = picture.convert("F")
            high = 65535 if picture.mode.startswith("I;16") else values.getextrema()[1]
            white = next((most for most in (1, 255) if high <= most), 65535)
            picture = values.point(lambda value: value * (255 / white) + 0.5).convert("L")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def find_images(paths: Iterable[str], recursive: bool = True) -> list[Path]:
    """The pictures named, and those in the folders named, each once, in order; hidden ones only if
    they are named. Raises UserError for a path that is not there, and for no picture at all."""
    found: dict[Path, None] = {}  # a dict keeps the order

    def keep(error: OSError) -> None:  # a file, or a folder that must not be read: fails later
        found[Path(error.filename)] = None

    for path in map(Path, paths):
        if not os.path.lexists(path):
            raise UserError(f"{path}: no such file or folder")
        # Links to folders are not followed: they may go in circles.
        for folder, folders, names in os.walk(path, onerror=keep):
            folders[:] = sorted(name for name in folders if recursive and name[0] != ".")
            names = [name for name in sorted(names) if name.lower().endswith(SUFFIXES)]
            found |= {Path(folder, name): None for name in names if name[0] != "."}
    if not found:
        nothing = f"no pictures in this folder (looked for {' '.join(SUFFIXES)})"
        raise UserError(f"{', '.join(paths) or '-'}: {nothing}")
    return list(found)


def read_text(path: Path) -> str:
    """A file in UTF-8, with or without a byte order mark. Raises UserError with the line that is
    not: characters read wrongly would be trained on."""
    with explain(f"{path}: cannot be read"):
        data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, then in its place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class Row(NamedTuple):
    """What a data file says of a picture, in one of perhaps many places."""

    name: str
    captions: list[str]
    more: dict  # its other columns: split, image_id, scene, ...


# What data files call a picture's name, and what people wrote of it.
NAME_KEYS = ("file_name", "filename", "image", "image_name")
CAPTION_KEYS = ("caption", "captions", "text", "comment")


def make_row(where: str, fields: dict) -> Row:
    """Check what a data file says of a picture, `where` it says it. Raises UserError if that is no
    name, or no texts; there may be no caption, or an empty one."""
    names = [fields.get(key) for key in NAME_KEYS if key in fields]
    if not names or not isinstance(names[0], str) or not names[0].strip():
        raise UserError(f"{where}: no file_name, or one that is not a text")
    found = [fields[key] for key in CAPTION_KEYS if fields.get(key) is not None]
    captions = found[0] if found else []
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where}: caption must be a text or a list of texts")
    with explain(f"{where}: not text"):  # half a character is an error here, not in training
        "".join(captions).encode("utf-8")
    return Row(names[0], captions, fields)


def parse_json(where: str, text: str, line: int = 1):
    """A JSON value. Raises UserError with the line, where `text` begins at line `line`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number = line + error.lineno - 1
        raise UserError(f"{where}:{number}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}:{line}: not JSON that can be read ({error})") from None


def read_lines(path: Path, text: str) -> Iterator[Row]:
    """Rows of JSON lines: Hugging Face's metadata.jsonl."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            value = parse_json(str(path), line, number)
            if not isinstance(value, dict):
                raise UserError(f"{path}:{number}: not a JSON object with file_name and caption")
            yield make_row(f"{path}:{number}", value)


def read_csv(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """Rows of a table with a header: metadata.csv, Flickr8k's captions.txt, Flickr30k's results."""
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    header, before = None, 0
    while True:
        with explain(f"{path}:{lines.line_num + 1}: not a line of a table"):
            cells = next(lines, None)
        if cells is None:
            return
        where, before = f"{path}:{before + 1}", lines.line_num
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if header is None:
            header = [cell.lower() for cell in cells]
            continue
        # A quote that is never closed would swallow the lines of other pictures.
        if len(cells) > len(header) or any("\n" in cell for cell in cells):
            raise UserError(
                f"{where}: more than {len(header)} columns, or a quote that is not closed"
            )
        yield make_row(where, dict(zip(header, cells)))


def read_tokens(path: Path, text: str) -> Iterator[Row]:
    """Rows of `name#number`, tab, caption: Flickr8k.token.txt."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            name, hash_sign, caption = re.sub(r"#\d+\t", "\n", line, count=1).partition("\n")
            if not hash_sign:
                raise UserError(f"{path}:{number}: not `name#number`, tab, caption")
            yield make_row(f"{path}:{number}", {"file_name": name, "caption": caption.strip()})


def read_json(path: Path, text: str) -> Iterator[Row]:
    """Rows of COCO's captions, or of Karpathy's splits of them: one JSON object with `images`."""
    data = parse_json(str(path), text)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise unknown_form(path, "JSON without a list of images")
    if "annotations" not in data:  # Karpathy's
        for number, image in enumerate(images):
            where = f"{path}: images[{number}]"
            with explain(f"{where}: no sentences with raw texts"):
                captions = [sentence["raw"] for sentence in image["sentences"]]
                folder = image.get("filepath") or ""
                name = os.path.join(folder, image["filename"])
            image_id = image.get("cocoid", image.get("imgid"))
            more = {"split": image.get("split"), "image_id": image_id}
            yield make_row(where, {"file_name": name, "caption": captions} | more)
        return

    names: dict[int | str, str] = {}
    for number, image in enumerate(images):
        with explain(f"{path}: images[{number}]: needs an id of its own and a file_name"):
            if type(image["id"]) not in (int, str) or image["id"] in names:
                raise ValueError(f"id {image['id']!r}")
            names[image["id"]] = image["file_name"]
    captions: dict[int | str, list] = {image_id: [] for image_id in names}
    for number, annotation in enumerate(data["annotations"] or []):
        with explain(
            f"{path}: annotations[{number}]: needs an image_id of the images and a caption"
        ):
            if type(annotation["image_id"]) not in (int, str):
                raise ValueError(f"image_id {annotation['image_id']!r}")
            captions[annotation["image_id"]].append(annotation["caption"])
    for image_id, name in names.items():
        fields = {"file_name": name, "caption": captions[image_id], "image_id": image_id}
        yield make_row(f"{path}: image {image_id}", fields)


def read_sidecars(folder: Path) -> Iterator[Row]:
    """Rows of a folder of pictures, beside each a text file of its name, with a caption a line."""
    for image in find_images([str(folder)]):
        sidecar = image.with_suffix(".txt")
        lines = read_text(sidecar).split("\n") if sidecar.is_file() else []
        captions = [line.strip() for line in lines if line.strip()]
        yield make_row(
            str(image), {"file_name": os.path.relpath(image, folder), "caption": captions}
        )


def unknown_form(path: Path, found: str) -> UserError:
    """What to raise for data in a form that distcap does not know."""
    known = "metadata.jsonl or .csv, COCO or Karpathy JSON, a table with image and caption, "
    known += "name#number tab caption, or pictures with .txt files"
    return UserError(f"{path}: {found}; looked for {known}")


def read_data(path: Path) -> Iterator[Row]:
    """Rows of data in any of the forms that distcap knows, recognized by their content."""
    if path.is_dir():
        tables = [path / name for name in ("metadata.jsonl", "metadata.csv")]
        for table in filter(Path.is_file, tables):
            return read_data(table)
        if not any(image.with_suffix(".txt").is_file() for image in find_images([str(path)])):
            raise unknown_form(path, "a folder of pictures without captions")
        return read_sidecars(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")

    text = read_text(path)
    first = text.lstrip().split("\n", 1)[0]
    if path.suffix == ".jsonl" or re.match(r'\{(?!.*"images").*\}\s*$', first):
        return read_lines(path, text)
    if first[:1] in ("{", "["):
        return read_json(path, text)
    if re.match(r"[^\t]+#\d+\t", first):
        return read_tokens(path, text)
    for delimiter in ("|", ","):
        header = {cell.strip().lower() for cell in first.split(delimiter)}
        if header & set(NAME_KEYS) and header & set(CAPTION_KEYS):
            return read_csv(path, text, delimiter)
    raise unknown_form(path, f"begins with {first[:40]!r}" if first else "empty")


class Skipped(NamedTuple):
    """What of a data set is not used, and why."""

    name: str
    reason: str


def read_examples(
    data: str,
    images: str | None = None,
    split: str | None = None,
    need_pictures: bool = True,
    skipped: list[Skipped] | None = None,
) -> list[Example]:
    """The examples of a data set: a folder or a file, whose pictures are beside it or in the folder
    `images`. Only those of a `split`: its name, or a file with the names of pictures.

    What is missing or empty is left out, and added to the list `skipped`. A picture under two names
    is one picture. Raises UserError for what is wrong, with file and line."""
    path = Path(data)
    folder = Path(images or (path if path.is_dir() else path.parent))
    skipped = [] if skipped is None else skipped
    references: dict[str, list[str]] = {}
    more: dict[str, dict] = {}  # what the first row of each name says
    for row in read_data(path):
        texts = [text for text in row.captions if text.strip()]
        if not texts or len(texts) < len(row.captions):
            skipped.append(Skipped(row.name, "an empty caption"))
        references.setdefault(row.name, []).extend(texts)
        more.setdefault(row.name, row.more)

    examples: dict[str, Example] = {}
    for name, texts in references.items():
        image = folder / name
        if not os.path.isfile(image) and os.path.isfile(folder / os.path.basename(name)):
            image = folder / os.path.basename(name)  # Karpathy's names may have folders
        if need_pictures and not os.path.isfile(image):
            skipped.append(Skipped(name, "no such picture"))
        elif texts:
            scene = parse(str(more[name].get("scene")))
            image_id, part = more[name].get("image_id") or name, more[name].get("split")
            example = Example(str(image_id), image, tuple(texts), part and str(part), scene)
            known = examples.setdefault(os.path.realpath(image), example)
            if known is not example:
                both = known.references + example.references
                examples[os.path.realpath(image)] = dataclasses.replace(known, references=both)
    if not references:
        raise unknown_form(path, "no pictures with captions in it")
    if not examples:
        missing = f"none of its {len(references)} pictures is in {folder} with a caption"
        raise UserError(f"{data}: {missing}; give the folder of the pictures with --images")
    found = list(examples.values())
    return choose_split(data, found, split, skipped) if split else found


def choose_split(
    data: str, examples: Sequence[Example], split: str, skipped: list
) -> list[Example]:
    """The examples of a split that the data names (train: restval too), or that a file lists."""
    if os.path.isfile(split):
        listed = dict.fromkeys(line.strip() for line in read_text(Path(split)).split("\n"))
        names = [{each.image_id, each.image.name, each.image.stem} for each in examples]
        chosen = [each for each, own in zip(examples, names) if own & listed.keys()]
        absent = listed.keys() - set().union(*names) - {""}
        skipped += [
            Skipped(name, f"in {split}, but not in the data") for name in listed if name in absent
        ]
    else:
        wanted = ("train", "restval") if split == "train" else (split,)
        chosen = [each for each in examples if each.split in wanted]
    if not chosen:
        known = ", ".join(sorted({each.split for each in examples if each.split})) or "no splits"
        has = f"{data} has {known}; give one of them, or a file with the names of pictures"
        raise UserError(f"{split}: no picture is of this split: {has}")
    return chosen


def read_rows(path: Path) -> dict[str, dict]:
    """{file_name: row} of a metadata.jsonl. A row's `caption`, in the file a text or a list, is the
    list of all the picture's captions: its rows are read as one. Raises UserError with the number
    of the line that is wrong."""
    rows: dict[str, dict] = {}
    for row in read_lines(path, read_text(path)):
        if not row.captions or not all(text.strip() for text in row.captions):
            raise UserError(f"{path}: {row.name}: has no caption, or an empty one")
        earlier = rows.get(row.name, {"caption": []})
        rows[row.name] = earlier | row.more | {"caption": earlier["caption"] + row.captions}
    return rows


def write_rows(path: Path, rows: dict[str, dict]) -> None:
    """Write what `read_rows` reads, whole or not at all."""
    lines = [json.dumps({"file_name": name} | row) + "\n" for name, row in rows.items()]
    write_text(path, "".join(lines))


def write_examples(folder: Path, examples: Sequence[Example]) -> list[Example]:
    """Save examples as a metadata.jsonl, which leads to pictures on disk; those in memory are saved
    beside it as PNG files. Returns them as `read_examples` does."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for example in examples:
        row = {"caption": example.references}
        if isinstance(example.image, Path):
            name = os.path.relpath(example.image, folder)
            row |= {"image_id": example.image_id}
        else:
            name = f"{example.image_id}.png"
            load_image(example.image).save(folder / name)
            row |= {"scene": str(example.scene)}
        rows[name] = row
    write_rows(folder / "metadata.jsonl", rows)
    return read_examples(str(folder))


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    """Slices of `size` items, the last one perhaps shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def schedule(examples: Sequence[Example], size: int, steps: int, seed: int) -> list[list]:
    """For each step a batch of pairs: row of an example, and which of its references to learn from.
    Drawn anew each time, never the same example twice in a batch: it would be its own rival in
    Eq. 6. A longer schedule begins like a shorter one."""
    rng = random.Random(seed)
    batches = []
    for _ in range(steps):
        rows = rng.sample(range(len(examples)), size)
        batches.append([(row, rng.randrange(len(examples[row].references))) for row in rows])
    return batches


class CaptionDataset(torch.utils.data.Dataset):
    """Examples to learn from. Item [(row, which), ...] is a whole Batch, ready for the captioner.
    Pictures that are in memory already, as those of the toy world, are prepared once for all."""

    def __init__(self, examples: Sequence[Example], prepare: Callable, side: int | None = None):
        self.examples, self.side = examples, side
        self.prepare = prepare  # pictures -> (B, 3, height, width)
        self.prepared = None
        images = [example.image for example in examples]
        if all(isinstance(image, Image.Image) for image in images):
            self.prepared = torch.cat([prepare(some) for some in batched(images, 256)])

    def __getitem__(self, pairs: Sequence[tuple[int, int]]) -> Batch | UserError:
        rows = [row for row, _ in pairs]
        ground_truth = [self.examples[row].references[which] for row, which in pairs]
        if self.prepared is not None:
            return Batch(torch.tensor(rows), ground_truth, self.prepared[rows])
        try:
            pictures = [load_image(self.examples[row].image, self.side) for row in rows]
        except UserError as error:  # returned, since a worker process would wrap what it raises
            return error
        return Batch(torch.tensor(rows), ground_truth, self.prepare(pictures))


class PictureBatch(NamedTuple):
    """Some pictures, read and prepared, and what could not be read."""

    pixels: list[Tensor]  # (B, 3, height, width) for each way to prepare, of those that are good
    failures: list[UserError | None]  # of each picture, in order

    def raise_failure(self) -> None:
        """Raise the first failure, if there is one."""
        for failure in filter(None, self.failures):
            raise failure


class PictureBatches(torch.utils.data.Dataset):
    """Pictures to look at. Item n is the n-th batch of them, a PictureBatch.
    `prepare` lists the ways to make pixels of pictures: the captioner's, CLIP's, or both."""

    def __init__(self, images: Sequence, prepare: Sequence[Callable], batch_size: int,
                 side: int | None = None) -> None:  # fmt: skip
        self.batches, self.prepare = list(batched(images, batch_size)), prepare
        self.side = side

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PictureBatch:
        pictures, failures = [], []
        for image in self.batches[number]:
            try:
                pictures.append(load_image(image, self.side))
                failures.append(None)
            except UserError as error:
                failures.append(error)
        pixels = [prepare(pictures) for prepare in self.prepare] if pictures else []
        return PictureBatch(pixels, failures)


class Bar(tqdm):
    """A progress bar; a line every half minute where standard error is no terminal."""

    def __init__(self, *arguments, **options) -> None:
        terminal = sys.stderr.isatty()
        pace = dict(dynamic_ncols=True) if terminal else dict(mininterval=30, delay=30, ncols=100)
        super().__init__(*arguments, **pace | options)

    @staticmethod
    def status_printer(file) -> Callable:
        """The function that shows a status: tqdm's own overwrites the last one, in a file too."""
        if sys.stderr.isatty():
            return tqdm.status_printer(file)
        return lambda status: status and print(status, file=file, flush=True)


def read_ahead(dataset: torch.utils.data.Dataset, order: Sequence, workers: int) -> Iterator:
    """The items of a dataset in this order, made by worker processes while the model works."""
    workers = max(min(workers, len(order) - 1), 0)  # a process for a single batch does not pay
    loader = torch.utils.data.DataLoader
    for item in loader(dataset, batch_size=None, sampler=order, num_workers=workers):
        if isinstance(item, UserError):
            raise item
        yield item


# ---- 9  Training ---------------------------------------------------------------------------------
def fit(stage: str, model: nn.Module, step: Callable, batches: Iterable, steps: int,
        learning_rate: float, config: TrainConfig, log, network=None) -> None:  # fmt: skip
    """The loop of every stage: a batch, a loss, a gradient, an update if all of it is finite.
    `step` takes a batch and returns the loss and what to log. `model` learns by AdamW with a
    one-cycle learning rate; a regularizer's `network`, if any, by AdamW at a rate of its own.
    Raises UserError when ten steps in a row were not finite."""
    fused = dict(fused=config.device != "mps")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=learning_rate, **fused)]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], learning_rate, max(steps, 2))
    learned = list(network.parameters()) if network else []
    if learned:
        rate = config.discriminator_learning_rate
        optimizers.append(torch.optim.AdamW(learned, lr=rate, **fused))

    model.train(stage != "rl")  # RL without dropout: score the policy that was sampled from
    bar = Bar(batches, stage, steps)
    failures = 0
    for number, batch in enumerate(bar):
        # A step's draws depend on nothing that came before it.
        torch.manual_seed(config.seed * 1_000_003 + number)
        loss, record = step(batch)

        # Gradients.
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        gradients = [each.grad for each in learned if each.grad is not None]
        network_norm = nn.utils.get_total_norm(gradients)

        # Update, all or nothing.
        values = [loss.item(), norm.item(), network_norm.item(), *record.values()]
        finite = all(math.isfinite(value) for value in values)
        for optimizer in optimizers if finite else ():
            optimizer.step()
        failures = 0 if finite else failures + 1
        if failures == 10:
            advice = "try a lower --learning-rate"
            raise UserError(f"{stage}: ten steps in a row were not finite; {advice}")
        cycle.step()

        write_record(log, {"stage": stage, "step": number, "loss": loss.item(), **record})
        bar.set_postfix({name: f"{value:.3f}" for name, value in record.items()})
    model.eval()


def write_record(log, record: dict) -> None:
    """Add a line of JSON to a log. A number that is not finite, which JSON lacks, becomes null."""
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = None
    log.write(json.dumps(record) + "\n")
    log.flush()


def split(config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """Training and test examples of a data set of the user's, shuffled by the seed."""
    examples = read_examples(config.data)
    random.Random(config.seed).shuffle(examples)
    test_size = max(min(config.test_size, len(examples) // 5), 1)
    return examples[test_size:][: config.train_size], examples[:test_size]


# ---- 10  Evaluation ------------------------------------------------------------------------------
def retrieval_ranks(queries: Tensor, targets: Tensor, chunk: int = 256) -> Tensor:
    """Rank, from 1, of target n for query n: (N, D), (N, D) -> (N,). Never makes (N, N) of it. Ties
    are lost: who says one thing of every picture finds none. Raises UserError for embeddings that
    are not finite, which would rank first."""
    if not (queries.isfinite().all() and targets.isfinite().all()):
        raise UserError("CLIP's embeddings are not finite and cannot be ranked; try another --clip")
    ranks = []
    for rows in torch.arange(len(queries), device=queries.device).split(chunk):
        similarity = queries[rows] @ targets.T  # (chunk, N)
        own = similarity.gather(1, rows[:, None])
        ranks.append((similarity >= own - 1e-6).sum(dim=1))  # counts the target itself
    return torch.cat(ranks)


def retrieval(caption_embeddings: Tensor, image_embeddings: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank, both ways, among all given: (N, D), (N, D)."""
    text_to_image = retrieval_ranks(caption_embeddings, image_embeddings)
    image_to_text = retrieval_ranks(image_embeddings, caption_embeddings)
    measures = {}
    for way, ranks in [("text_to_image", text_to_image), ("image_to_text", image_to_text)]:
        measures |= {f"{way}_R@{k}": (ranks <= k).float().mean().item() for k in (1, 5, 10)}
        measures[f"{way}_median_rank"] = ranks.median().item()
    return measures


def ngram_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4, ROUGE-L and CIDEr by pycocoevalcap, on `plain_words`."""
    from pycocoevalcap.eval import Bleu, Cider, Rouge

    written = {row: [plain_words(caption)] for row, caption in enumerate(captions)}
    human = {row: list(map(plain_words, texts)) for row, texts in enumerate(references)}
    any_words = any(any(texts) for texts in human.values())  # without, CIDEr is an error
    return {
        "bleu_4": float(Bleu(4).compute_score(human, written, verbose=0)[0][3]),
        "rouge_l": float(Rouge().compute_score(human, written)[0]),
        "cider": float(Cider().compute_score(human, written)[0]) if any_words else 0.0,
    }


def evaluate(captions: Sequence[str], examples: Sequence[Example], image_embeddings: Tensor,
             clip: CLIP) -> dict[str, float]:  # fmt: skip
    """All the measures of captions[n] for examples[n], whose image's embedding is row n: (N, D)."""
    measures = retrieval(clip.embed_captions(captions), image_embeddings)
    measures |= ngram_metrics(captions, [example.references for example in examples])
    measures["mean_length"] = statistics.fmean(len(caption.split()) for caption in captions)
    measures["distinct"] = len(set(captions)) / len(captions)
    scenes = [example.scene for example in examples]
    return measures | (toy_measures(captions, scenes) if all(scenes) else {})


def table(columns: dict[str, dict[str, float]]) -> str:
    """Measures as lines of text, with a column for each mapping; shares are in percent."""
    shares = ("well_formed", "faithful", "distinct")
    lines = [" " * 26 + "".join(f" {heading:>10}" for heading in columns)]
    for name in next(iter(columns.values())):
        form = "10,.0f" if "rank" in name else "10.3f"
        if "R@" in name or name in shares:
            form = "10.1%"
        cells = [f" {measures[name]:{form}}" for measures in columns.values()]
        lines.append(f"{name:26}" + "".join(cells))
    return "\n".join(lines)


# ---- 11  Toy world: pictures of two shapes, whose truth is known ---------------------------------
class Scene(NamedTuple):
    """What a picture shows, or what a caption says: then None is what it leaves open."""

    size: str | None
    colour: str | None
    shape: str | None
    relation: str | None  # "and" leaves the order open too
    other_size: str | None
    other_colour: str | None
    other_shape: str | None
    background: str | None

    def __str__(self) -> str:
        first = f"a {self.size} {self.colour} {self.shape}"
        second = f"a {self.other_size} {self.other_colour} {self.other_shape}"
        return f"{first} {self.relation} {second} on a {self.background} background"

    def swapped(self) -> Scene:
        """The two shapes in the other order."""
        return Scene(*self[4:7], self.relation, *self[:3], self.background)


SIZES = {"small": 4.5, "large": 7.5}  # radius in pixels
SHAPES = ("circle", "ring", "triangle", "star", "bar")
CORNERS = {  # in units of the radius, y downwards
    "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
    "star": ((0, -1), (0.3, -0.3), (1, 0), (0.3, 0.3), (0, 1), (-0.3, 0.3), (-1, 0), (-0.3, -0.3)),
    "bar": ((-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)),
}
COLOURS = {"red": "#e02020", "green": "#20a020", "blue": "#2040e0",
           "yellow": "#f0e000", "purple": "#8020a0", "pink": "#ff80c0",
           "brown": "#804010", "cyan": "#20d0e0"}  # fmt: skip
BACKGROUNDS = {"white": "#ffffff", "black": "#000000", "gray": "#808080", "beige": "#e8d8b0"}
RELATIONS = ("to the left of", "above")
FUNCTION_WORDS = "a two shapes and on background to the left of above".split()
WORDS = [*FUNCTION_WORDS, *SIZES, *SHAPES, *COLOURS, *BACKGROUNDS]

# The grammar of the world's captions. Its groups are the fields of Scene, in order.
_NOUN = rf"a(?: ({'|'.join(SIZES)}))?(?: ({'|'.join(COLOURS)}))? ({'|'.join(SHAPES)})"
_GROUND = rf"(?: on a ({'|'.join(BACKGROUNDS)}) background)?"
_RELATION = rf" (and|{'|'.join(RELATIONS)}) "
_GRAMMAR = re.compile(rf"(?:two shapes|{_NOUN}{_RELATION}{_NOUN}){_GROUND}")


@functools.lru_cache(maxsize=100_000)
def parse(caption: str) -> Scene | None:
    """What the caption says; None if it is not a sentence of the world's grammar."""
    match = _GRAMMAR.fullmatch(caption)
    return Scene(*match.groups()) if match else None


def is_true(said: Scene | None, seen: Scene) -> bool:
    """Whether what a caption says is well-formed, and nothing of it false of the scene."""
    if said is None:
        return False
    orders = [seen]
    if said.relation == "and":
        said = said._replace(relation=None)
        orders.append(seen.swapped())
    return any(all(word in (None, true) for word, true in zip(said, order)) for order in orders)


def write_references(scene: Scene, rng: random.Random, count: int = 5,
                     generic: float = 0.7) -> tuple[str, ...]:  # fmt: skip
    """What people might write of a scene: something generic, else all of it."""
    coloured = f"a {scene.colour} {scene.shape} and a {scene.other_colour} {scene.other_shape}"
    shapes = f"a {scene.shape} and a {scene.other_shape}"
    ground = f"two shapes on a {scene.background} background"
    texts = []
    for _ in range(count):
        vague = rng.random() < generic
        texts.append(rng.choice((coloured, coloured, shapes, ground)) if vague else str(scene))
    return tuple(texts)


def draw(scene: Scene, rng: random.Random, pixels: int = 32) -> Image.Image:
    """The scene as a picture. Each shape's place varies by a pixel."""
    scale = 4  # drawn four times too large, then shrunk, so that edges are smooth
    picture = Image.new("RGB", (scale * pixels, scale * pixels), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for centre, (size, colour, shape) in zip((8, 24), (scene[:3], scene[4:7])):
        x = scale * (centre + rng.uniform(-0.5, 0.5))
        y = scale * (16 + rng.uniform(-1, 1))
        if scene.relation == "above":
            x, y = y, x
        radius = scale * SIZES[size]
        if shape in CORNERS:
            corners = [(x + radius * across, y + radius * down) for across, down in CORNERS[shape]]
            canvas.polygon(corners, fill=COLOURS[colour])
        else:  # a ring is a circle without its inside
            line = round(radius if shape == "circle" else 0.45 * radius)
            box = (x - radius, y - radius, x + radius, y + radius)
            canvas.ellipse(box, outline=COLOURS[colour], width=line)
    return picture.resize((pixels, pixels), Image.Resampling.BOX)


def toy_world(seed: int, train_size: int, test_size: int) -> tuple[list[Example], list[Example]]:
    """Training and test examples of the toy world. No scene occurs twice."""
    rng = random.Random(seed)
    nouns = [(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
    scenes = [Scene(*first, relation, *second, ground) for first in nouns for second in nouns
              for relation in RELATIONS for ground in BACKGROUNDS]  # fmt: skip
    if train_size + test_size > len(scenes):
        holds = f"the toy world has {len(scenes)} scenes, test included"
        raise UserError(f"--train-size {train_size}: {holds}")
    examples = []
    for number, scene in enumerate(rng.sample(scenes, train_size + test_size)):
        picture = draw(scene, rng)
        references = write_references(scene, rng)
        examples.append(Example(f"{number:05d}", picture, references, scene=scene))
    return examples[:train_size], examples[train_size:]


def toy_measures(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """What only a known world can tell, exactly. well_formed: the caption is a sentence of the
    world. faithful: it is true of its scene. oracle_R@1: how often an ideal reader would pick the
    right scene: 1 / number of scenes that it is true of, or 0 if it is not true of its own."""
    said = [parse(caption) for caption in captions]
    faithful = [is_true(each, scene) for each, scene in zip(said, scenes)]
    matches = {each: sum(is_true(each, scene) for scene in scenes) for each in set(said)}
    found = [true / max(matches[each], 1) for true, each in zip(faithful, said)]
    well_formed = [each is not None for each in said]
    measures = {"well_formed": well_formed, "faithful": faithful, "oracle_R@1": found}
    return {name: statistics.fmean(values) for name, values in measures.items()}


def toy_tokenizer():
    """A BERT tokenizer of the world's words. [SEP] has the highest id: CLIP pools at the argmax."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "[DEC]", *dict.fromkeys(WORDS), "[SEP]"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]")


def toy_captioner(seed: int) -> Captioner:
    """A BLIP of 0.5 million parameters with random weights, for 32-pixel pictures."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    torch.manual_seed(seed)
    tokenizer = toy_tokenizer()
    end = tokenizer.sep_token_id
    size = dict(hidden_size=96, intermediate_size=384, num_attention_heads=3)
    # About 1 / sqrt(width). BLIP's own default for the vision tower, 1e-10, supposes that weights
    # are loaded: from scratch, it would stay blind.
    size["initializer_range"] = 0.1
    vision = dict(size, num_hidden_layers=2, image_size=32, patch_size=8)
    text = dict(size, num_hidden_layers=1, encoder_hidden_size=96, max_position_embeddings=32)
    text |= dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=end)
    text |= dict(sep_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))
    image_processor = BlipImageProcessor(size=dict(height=32, width=32))
    return Captioner(model, image_processor, tokenizer, prompt="")


def toy_clip(folder: Path, examples: Sequence[Example], config: TrainConfig, log,
             width: int = 96) -> CLIP:  # fmt: skip
    """Train an open_clip model of 0.5 million parameters on pictures and alt texts, and save it.
    Its loss is CLIP's own; its texts say more than the references do (20 % are generic)."""
    import open_clip
    from safetensors.torch import save_model

    tokenizer = toy_tokenizer()
    tower = dict(width=width, layers=2)
    text = dict(tower, heads=3, context_length=22, vocab_size=len(tokenizer))  # 20 words and ends
    vision = dict(tower, head_width=32, image_size=32, patch_size=8)
    shape = dict(embed_dim=width, vision_cfg=vision, text_cfg=text | dict(hf_tokenizer_name="toy"))
    tokenizer.save_pretrained(folder)
    settings = {"model_cfg": shape, "preprocess_cfg": {}}
    write_text(folder / "open_clip_config.json", json.dumps(settings, indent=2))

    torch.manual_seed(config.seed)
    model = open_clip.CLIP(**shape).to(config.device)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    preprocess = open_clip.image_transform(32, is_train=False)
    pixels = stack_pixels(preprocess, [example.image for example in examples]).to(config.device)
    rng = random.Random(config.seed)
    contrastive_loss = open_clip.ClipLoss()

    def step(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, dict[str, float]]:
        rows = [row for row, _ in pairs]
        texts = [write_references(examples[row].scene, rng, 1, generic=0.2)[0] for row in rows]
        return contrastive_loss(*model(pixels[rows], tokenize(texts).to(config.device))), {}

    batches = schedule(examples, min(128, len(examples)), config.clip_steps, config.seed)
    fit("clip", model, step, batches, len(batches), 2e-3, config, log)
    save_model(model, str(folder / "open_clip_model.safetensors"))
    return CLIP.load(str(folder), config.device)


# ---- 12  Command line ----------------------------------------------------------------------------
# fmt: off
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Models and captions: what every verb needs."""
    captioner: str | None = flag("Salesforce/blip-image-captioning-base",
                                 "Hub name, Hugging Face folder or run folder")
    clip: str | None = flag(None, "open_clip NAME/TAG, hf-hub:NAME, folder or run folder; "
                            "otherwise that of the captioner's run, or ViT-B-32/openai")
    prompt: str | None = flag(None, "words to continue; otherwise those it was trained with, or "
                              "for a BLIP that has none: a picture of")
    beams: int = flag(1, "beams of the search; 1 decodes greedily", number(1))
    max_length: int = flag(20, "most tokens in a caption", number(1))
    batch_size: int = flag(64, "pictures in a batch", number(1))
    workers: int = flag(2, "processes that read pictures while the model works", number(0))
    precision: str = flag("fp32", "arithmetic of the captioner", ("fp32", "bf16"))
    seed: int = flag(0, "seed of everything random", number(0, 2**32 - 1))
    device: str = flag("auto", "cpu, cuda, cuda:1, mps, or auto")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Decoding, Method):
    """Train a captioner, and print what changed on pictures that were held out."""
    data: str = flag("toy", "toy, the built-in world, or a folder with metadata.jsonl", nargs="?")
    recipe: str = flag("distinctive", f"a published method; other flags override it; one of "
                       f"{', '.join(RECIPES)}", tuple(RECIPES), metavar="NAME")
    out: str | None = flag(None, "run folder; otherwise runs/NAME-OF-DATA")
    tf_steps: int = flag(0, "steps of teacher forcing, first", number(0))
    tf_learning_rate: float = flag(1e-5, "its peak learning rate", WEIGHT)
    steps: int = flag(10_000, "steps of reinforcement learning", number(0))
    learning_rate: float = flag(1e-6, "its peak learning rate", WEIGHT)
    discriminator_learning_rate: float = flag(
        7e-5, "learning rate of a regularizer's network (Eq. 4, 10)", WEIGHT)
    max_gradient_norm: float = flag(1.0, "gradients are scaled down to this norm", WEIGHT)
    clip_steps: int = flag(600, "steps of pretraining the toy world's CLIP", number(1))
    train_size: int | None = flag(None, "use at most so many training examples", number(1))
    test_size: int = flag(1000, "examples held out for the table, at most a fifth", number(1))


@dataclasses.dataclass(frozen=True)
class CaptionConfig(Decoding):
    """Write a caption for every picture: path, tab, caption, a line each, on standard output."""
    paths: tuple[str, ...] = flag((), "pictures, folders of pictures, or - for a list of them on "
                                  "standard input", nargs="+")
    recursive: bool = flag(True, "look into folders within folders")
    out: str | None = flag(None, "write to this .jsonl file; one that exists is continued")
    overwrite: bool = flag(False, "caption anew what has a caption in --out")
    samples: int = flag(0, "sample so many captions of each picture; 0: search", number(0))
    temperature: float = flag(
        0.7, "of --samples; 1 is the captioner's own distribution", number(0.01, kind=float))
    top_p: float = flag(1.0, "of --samples: only the likeliest tokens that make up this much",
                        number(0, 1, float))
    rerank: bool = flag(False, "of --samples (8 if not given), keep what best tells a picture from "
                        "those of its batch (Eq. 6)")
    min_length: int = flag(5, "fewest tokens in a caption", number(0))
    repetition_penalty: float = flag(
        1.0, "above 1, words that were written are less likely", number(0.01, kind=float))
    beams: int = flag(3, "beams of the search; 1 decodes greedily", number(1))
    batch_size: int = flag(16, "pictures in a batch", number(1))


@dataclasses.dataclass(frozen=True)
class EvalConfig(Decoding):
    """Caption a data set, and measure the captions."""
    data: str = flag("", "folder with metadata.jsonl", nargs=None)
    out: str | None = flag(None, "write the measures to this JSON file")


# What the toy world changes; everything else is as for photographs.
TOY = dict(captioner=None, similarity_weight=0.99, ground_truth_weight=2.0, tf_steps=600,
           tf_learning_rate=2e-3, steps=250, learning_rate=1e-3,
           discriminator_learning_rate=1e-3, train_size=8000, workers=0)
# fmt: on


def train(config: TrainConfig) -> None:
    """`distcap train`: see TrainConfig. What can be wrong is found before anything slow begins."""
    out = Path(config.out or f"runs/{Path(config.data).resolve().name}")
    if out.exists():
        raise UserError(f"{out}: already exists; remove it, or give another folder with --out")
    if config.data == "toy":
        training, test = toy_world(config.seed, config.train_size, config.test_size)
    else:
        training, test = split(config)
    if len(training) < max(config.batch_size, config.neighbours + 1):
        few = f"only {len(training)} training examples; give less"
        raise UserError(f"--batch-size, --neighbours: {few}")
    if config.captioner:
        config = dataclasses.replace(config, clip=clip_name(config))
        captioner, clip = load_models(config)

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    if config.data == "toy":
        test = write_examples(out / "test", test)
    with open(out / "log.jsonl", "w", encoding="utf-8") as log:
        if not config.captioner:
            captioner = toy_captioner(config.seed).to(config.device)
            captioner.check_length(config.max_length)
            captioner.bf16 = config.precision == "bf16"
            clip = toy_clip(out / "clip", training, config, log)
        embeddings = clip.embed_images([example.image for example in test], config.workers)
        captions = learn(captioner, clip, training, test, config, log)
    captioner.save(out / "captioner")

    results = {row: evaluate(texts, test, embeddings, clip) for row, texts in captions.items()}
    packages = ("torch", "transformers", "open_clip_torch", "pycocoevalcap")
    about = dict(split="test", images=len(test), seed=config.seed, beams=config.beams)
    about |= dict(max_length=config.max_length, versions={name: version(name) for name in packages})
    write_text(out / "results.json", json.dumps(results | about, indent=2) + "\n")
    print(table(results))
    for example, before, after in zip(test[:6], captions["before"], captions["after"]):
        print(f"\n{example.image_id}\n  before  {before}\n  after   {after}")


def learn(captioner: Captioner, clip: CLIP, training: Sequence[Example], test: Sequence[Example],
          config: TrainConfig, log) -> dict[str, list[str]]:  # fmt: skip
    """Teacher forcing (Eq. 1), then reinforcement learning (Eq. 2 to 10). Returns captions of the
    test pictures before and after RL; with `--objective tf`, before and after teacher forcing."""
    images = [example.image for example in test]
    dataset = CaptionDataset(training, captioner.pixels, captioner.side)
    learner = Learner(captioner, clip, config, config.max_length)

    def write() -> list[str]:
        return caption_all(captioner, images, config)

    def stage(name: str, step: Callable, steps: int, rate: float, network=None) -> None:
        order = schedule(training, config.batch_size, steps, config.seed)
        batches = read_ahead(dataset, order, config.workers)
        fit(name, captioner, step, batches, steps, rate, config, log, network)

    before = write() if config.objective == "tf" else []
    stage("tf", learner.teacher_forcing_step, config.tf_steps, config.tf_learning_rate)
    if config.objective == "rl":
        before = write()
        prepare_reinforcement(learner, training, config)
        network = learner.regularizer.network
        stage("rl", learner.reinforce_step, config.steps, config.learning_rate, network)
    return {"before": before, "after": write()}


def prepare_reinforcement(learner: Learner, training: Sequence[Example], config: TrainConfig):
    """Embed the training pictures, once for all epochs, and make the regularizer, which may compare
    with the captioner as it is now."""
    images = [example.image for example in training]
    learner.image_embeddings = learner.clip.embed_images(images, config.workers)  # (N, D)
    torch.manual_seed(config.seed)
    learner.regularizer = make_regularizer(learner, [each.references for each in training])
    learner.regularizer.network.to(config.device)


class Written(NamedTuple):
    """What became of one picture: its captions, or why there are none."""

    captions: list[str]
    failure: UserError | None


@torch.no_grad()
def write_captions(captioner: Captioner, images: Sequence[Path | Image.Image], config: Decoding,
                   write: Callable, clip: CLIP | None = None) -> Iterator[Written]:  # fmt: skip
    """The captions of each picture, in order. `write` makes tokens (K*B, P + T) of features.
    With a `clip`, of each picture's K captions the one that best tells it from its batch."""
    prepare = [captioner.pixels] + ([clip.pixels] if clip else [])
    side = max(captioner.side, clip.side if clip else 0)
    batches = PictureBatches(images, prepare, config.batch_size, side)
    bar = Bar(total=len(images), desc="caption")
    for number, batch in enumerate(read_ahead(batches, range(len(batches)), config.workers)):
        torch.manual_seed(config.seed * 1_000_003 + number)
        groups = iter(())
        if batch.pixels:
            features = captioner.encode(batch.pixels[0])  # (B, L, H)
            captions = captioner.decode(write(features))  # K*B of them
            if clip:
                captions = rerank(captions, clip, clip.encode_pixels(batch.pixels[1]))
            groups = batched(captions, len(captions) // len(features))
        for failure in batch.failures:
            yield Written([], failure) if failure else Written(list(next(groups)), None)
        bar.update(len(batch.failures))
    bar.close()


def rerank(captions: Sequence[str], clip: CLIP, image_embeddings: Tensor) -> list[str]:
    """Of the K captions of each of B images the best by Eq. 6, all K*B competing: (B, D)."""
    count = len(captions) // len(image_embeddings)
    row = torch.arange(len(image_embeddings), device=image_embeddings.device)
    image_index = row.repeat_interleave(count)
    embeddings = clip.embed_captions(captions)
    rewards = contrastive_reward(embeddings, image_embeddings, image_index, clip.logit_scale)
    best = row * count + rewards.view(-1, count).argmax(dim=1)
    return [captions[place] for place in best.tolist()]


def caption_all(captioner: Captioner, images: Sequence, config: Decoding) -> list[str]:
    """One caption of each picture, by search. Raises UserError for one that cannot be read."""
    search = functools.partial(captioner.search, max_length=config.max_length, beams=config.beams)
    captions = []
    for written in write_captions(captioner, images, config, search):
        if written.failure:
            raise written.failure
        captions += written.captions
    return captions


def clip_name(config: Decoding) -> str:
    """The CLIP that the flags name, else that of the captioner's run, else the usual one."""
    if not config.clip and Path(config.captioner, "captioner").is_dir():
        run = json.loads(Path(config.captioner, "config.json").read_text())
        return run["clip"] or config.captioner
    return config.clip or "ViT-B-32/openai"


def load_models(config: Decoding, with_clip: bool = True) -> tuple[Captioner, CLIP | None]:
    """The captioner that the flags name and, if it is wanted, the CLIP."""
    captioner = Captioner.load(config.captioner, config.device, config.prompt)
    captioner.check_length(config.max_length)
    captioner.bf16 = config.precision == "bf16"
    return captioner, CLIP.load(clip_name(config), config.device) if with_clip else None


def caption(config: CaptionConfig) -> int:
    """`distcap caption`: see CaptionConfig. Returns 1 if some pictures could not be read."""
    escapes = {9: "\\t", 10: "\\n", 13: "\\r"}  # lest a file's name look like two fields or lines
    listed = sys.stdin.read().split("\n") if "-" in config.paths else []
    named = [path for path in (*config.paths, *listed) if path not in ("-", "")]
    found = find_images(named, config.recursive)
    out = Path(config.out) if config.out else None
    rows = read_rows(out) if out and out.exists() else {}
    names = {path: os.path.relpath(path, out.parent) if out else "" for path in found}
    paths = [path for path in found if config.overwrite or names[path] not in rows]

    failures = []
    for number, (written, path) in enumerate(zip(write_paths(paths, config), paths), 1):
        if written.failure:
            failures.append(written.failure)
        elif out:
            rows[names[path]] = rows.get(names[path], {}) | {"caption": written.captions}
        else:
            for text in written.captions:
                print(f"{str(path).translate(escapes)}\t{text}", flush=True)
        if out and (number % config.batch_size == 0 or number == len(paths)):
            write_rows(out, rows)  # always whole, so never cut short

    for failure in failures:
        print(f"distcap: {str(failure).translate(escapes)}", file=sys.stderr)
    if out:
        done = f"{len(paths) - len(failures)} captioned, {len(failures)} failed"
        print(f"distcap: {done}, {len(found) - len(paths)} had a caption", file=sys.stderr)
    return 1 if failures else 0


def write_paths(paths: Sequence[Path], config: CaptionConfig) -> Iterator[Written]:
    """What becomes of each path, written as the flags say. Without any, no model is loaded."""
    if not paths:
        return
    captioner, clip = load_models(config, config.rerank)
    count = config.samples or 8 * config.rerank
    options = dict(max_length=config.max_length, repetition_penalty=config.repetition_penalty)
    options["min_new_tokens"] = min(config.min_length, config.max_length)
    if count:
        options |= dict(count=count, temperature=config.temperature, top_p=config.top_p)
    else:
        options["beams"] = config.beams
    write = functools.partial(captioner.sample if count else captioner.search, **options)
    yield from write_captions(captioner, paths, config, write, clip)


def evaluate_command(config: EvalConfig) -> None:
    """`distcap eval`: see EvalConfig."""
    examples = read_examples(config.data)
    captioner, clip = load_models(config)
    images = [example.image for example in examples]
    captions = caption_all(captioner, images, config)
    measures = evaluate(captions, examples, clip.embed_images(images, config.workers), clip)
    print(table({Path(config.data).resolve().name: measures}))
    if config.out:
        write_text(Path(config.out), json.dumps(measures, indent=2) + "\n")


def ignored_flags(config: Decoding) -> dict[str, str]:
    """The flags that change nothing beside the others, each with the flag that is the reason."""
    ignored = {}
    if isinstance(config, CaptionConfig):
        sampling = config.samples or config.rerank
        reason = "samples" if config.samples or not config.rerank else "rerank"
        ignored = dict.fromkeys(["beams"] if sampling else ["temperature", "top_p"], reason)
        if not config.rerank:
            ignored["clip"] = "rerank"
        if not config.out:
            ignored["overwrite"] = "out"
    elif isinstance(config, TrainConfig):
        ignored = ignored_settings(config)
        if config.regularizer not in ("discriminator", "grammar"):
            ignored["discriminator_learning_rate"] = "regularizer"
        if config.objective == "tf":
            rates = ["learning_rate", "discriminator_learning_rate"]
            ignored |= dict.fromkeys(["steps", *rates], "objective")
            ignored |= {"recipe": "objective"} if config.recipe != "tf" else {}
        if config.tf_steps == 0:
            ignored["tf_learning_rate"] = "tf_steps"
        if config.data != "toy" or config.captioner:
            ignored["clip_steps"] = "captioner"
        else:
            ignored["prompt"] = "captioner"
    return ignored


def check(config: Decoding, given: set[str]) -> None:
    """Refuse what cannot be meant, before any slow work. `given` are the flags that were given."""
    with explain(f"--device {config.device}: cannot be used", "; try auto"):
        torch.empty(0, device=config.device)
    for name, reason in ignored_flags(config).items():
        if name in given:
            value = getattr(config, reason)
            setting = f"with --{reason.replace('_', '-')} {value}"
            if value is None or isinstance(value, bool):
                setting = f"{'with' if value else 'without'} --{reason.replace('_', '-')}"
            raise UserError(f"--{name.replace('_', '-')}: changes nothing {setting}")

    if isinstance(config, TrainConfig):
        if config.objective == "tf" and config.tf_steps == 0:
            raise UserError("--objective tf --tf-steps 0: nothing to train; give --tf-steps")
        if config.sampled_weight == config.ground_truth_weight == 0:
            what = "--sampled-weight 0 --ground-truth-weight 0"
            raise UserError(f"{what}: nothing to train; give one of them")
        if config.baseline == "group" and config.samples < 2:
            raise UserError("--baseline group: needs --samples 2 or more")
        if config.baseline == "neighbours" and config.neighbours < 1:
            raise UserError("--baseline neighbours: needs --neighbours 1 or more")
        if config.data == "toy" and config.clip and not config.captioner:
            own = "the toy world trains its own, unless --captioner is given too"
            raise UserError(f"--clip {config.clip}: {own}")
    elif config.out:
        if isinstance(config, CaptionConfig) and not config.out.endswith(".jsonl"):
            raise UserError(f"--out {config.out}: must be a .jsonl file")
        if not Path(config.out).parent.is_dir():
            raise UserError(f"--out {config.out}: must be in a folder that exists; make it first")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


VERBS = {"train": (TrainConfig, train), "caption": (CaptionConfig, caption),
         "eval": (EvalConfig, evaluate_command)}  # fmt: skip
TITLES = {TrainConfig: "training", CaptionConfig: "captioning", EvalConfig: "evaluation",
          Decoding: "captions and models", Method: "the method"}  # fmt: skip


def make_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of its verbs: a flag for each setting."""
    parser = Parser("distcap", description="Distinctive image captioning with RL and CLIP.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,caption,eval}")
    parsers = {}
    for verb, (cls, _) in VERBS.items():
        parsers[verb] = verbs.add_parser(verb, help=cls.__doc__, description=cls.__doc__)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for base in cls.__mro__[:-1]:  # its own settings first; `object` has none
            group = parsers[verb].add_argument_group(TITLES[base])
            for name in [name for name in base.__annotations__ if name in fields]:
                add_flag(group, fields.pop(name))
    toy = [f"--{name.replace('_', '-')} {value}" for name, value in TOY.items()]
    parsers["train"].epilog = f"On the toy world: {' '.join(toy[1:])}."
    return parser, parsers


def add_flag(group, field: dataclasses.Field) -> None:
    """A flag for one setting, or a positional argument where it has `nargs`. What is not given is
    None, to be told from what is; the help names the default."""
    options = dict(field.metadata)
    if "nargs" in options:
        group.add_argument(field.name, metavar=field.name.upper(), **options)
        return
    if field.default is not None:
        options["help"] += f" (default: {field.default})"
    if isinstance(field.default, bool):
        options = dict(help=options["help"], action=argparse.BooleanOptionalAction)
    elif "choices" not in options:
        options["metavar"] = {"int": "N", "float": "X"}.get(options["type"].__name__, "TEXT")
    group.add_argument("--" + field.name.replace("_", "-"), **options)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[str, Decoding, set[str]]:
    """The verb, its settings, and the names of the flags that were given. What is not given comes
    from the recipe, else from the toy world, else from the class."""
    parser, _ = make_parsers()
    values = vars(parser.parse_args(arguments))
    verb = values.pop("verb")
    given = {name: value for name, value in values.items() if value is not None}
    preset = {}
    if verb == "train":
        toy = TOY if given.get("data", "toy") == "toy" else {}
        preset = toy | RECIPES[given.get("recipe", "distinctive")]
    config = VERBS[verb][0](**preset | given)
    if config.device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        config = dataclasses.replace(config, device=str(device or "cpu"))
    return verb, config, set(given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 some inputs failed, 2 a mistake."""
    verb, config, given = parse_arguments(arguments)
    logging.getLogger().setLevel(logging.CRITICAL)  # the libraries announce what they load
    logging.captureWarnings(True)  # and Pillow warns of what it reads all the same
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Names need not be UTF-8. A notebook's streams cannot be changed, and need not be.
        getattr(stream, "reconfigure", dict)(encoding="utf-8", errors="surrogateescape")
    try:
        check(config, given)
        return VERBS[verb][1](config) or 0
    except (BrokenPipeError, KeyboardInterrupt) as stop:  # the reader has seen enough; or Ctrl-C
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130 if isinstance(stop, KeyboardInterrupt) else 0
    except (UserError, OSError) as error:  # a full disk or a forbidden folder is no bug of ours
        print(f"distcap: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
