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
reward cannot hack; (9) optimizers are AdamW; (10) captions are normalized before they are judged;
(11) the discriminator starts untrained, and hard negatives are off; (12) a reference is drawn anew
each time, and one cut at the length limit has no end token; (13) processes average gradients by
all-reduce.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import hashlib
import html
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing.reduction
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

if Path(sys.argv[0]).stem == "distcap":
    # As a command, until `main` has imported torch: Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Threads that spin while they wait for each other make a small model twenty times slower as soon as
# another process wants a core. This must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm


def import_torch() -> None:
    """Import torch, for the whole file. It takes a second: a command looks first at what was typed,
    and then `main` calls this."""
    global F, Tensor, nn, torch
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn


if Path(sys.argv[0]).stem != "distcap":
    import_torch()


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
        known = getattr(error, "strerror", None)  # without the file's name, which `what` says
        reason = (known or str(error).strip() or type(error).__name__).split("\n")[0]
        reason = textwrap.shorten(reason, 200, placeholder=" ...")
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


def shard_of(text: str) -> tuple[int, int]:
    """A converter for `flag`: "2/4" to (2, 4)."""
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} must be like 1/4, 2/4, 3/4 or 4/4")
    return int(part), int(count)


# ---- 1  Method: the settings that define it ------------------------------------------------------
DISCRIMINATORS = ("discriminator", "paced")  # regularizers that learn what the captioner writes
LEARNING = (*DISCRIMINATORS, "grammar")  # regularizers that learn


@dataclasses.dataclass(frozen=True)
class Method:
    """What is optimized, and against what. The defaults are the method of Chaffin et al. Raises
    UserError for a choice that does not exist."""

    # fmt: off
    objective: str = flag("rl", "reinforcement learning, or teacher forcing alone (Eq. 1)",
                          ("rl", "tf"), group="method (equations as in the README)")
    baseline: str = flag("contrastive", "what a caption has to beat: the other captions and "
                         "pictures of the batch (contrastive, Eq. 6), the greedy caption (Eq. 7), "
                         "similar pictures (Eq. 8), a group of samples (Eq. 9), or nothing",
                         ("contrastive", "greedy", "neighbours", "group", "none"))
    direction: str = flag("both", "half of Eq. 6 used", ("both", "image-to-text", "text-to-image"))
    regularizer: str = flag("discriminator", "what rewards human writing (Eq. 4, 10); paced is a "
                            "discriminator that keeps pace, with --discriminator-steps 5",
                            ("discriminator", "paced", "kl", "cider", "grammar", "none"))
    samples: int = flag(1, "captions sampled for each picture", number(1))
    neighbours: int = flag(0, "similar pictures; with Eq. 6, hard negatives", number(0))
    similarity_weight: float = flag(0.94, "CLIP's share of the reward (Eq. 3)", number(0, 1, float))
    sampled_weight: float = flag(1.0, "weight of the loss on sampled captions (Eq. 2)", WEIGHT)
    ground_truth_weight: float = flag(1.0, "weight of the loss on human captions (Eq. 5)", WEIGHT)
    discriminator_steps: int = flag(1, "updates of the regularizer's network a step", number(1))
    normalize: bool = flag(True, "learn and judge captions without capitals and punctuation")
    length_normalizer: str = flag("constant", "what a caption's log p is divided by: a constant, "
                                  "or (to compare) its length", ("constant", "caption"))
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices")
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(f"{field.name} {value!r}: must be one of {', '.join(choices)}")

    @property
    def uses_images(self) -> bool:
        """Whether rewards depend on what CLIP sees in the images."""
        judged = self.alpha > 0 or self.regularizer in DISCRIMINATORS
        return self.objective == "rl" and judged

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
        used = ("objective", "normalize", "length_normalizer")
        return {name: "objective" for name in names if name not in used}
    if method.baseline != "contrastive":
        ignored["direction"] = "baseline"
    if method.baseline not in ("contrastive", "neighbours"):
        ignored["neighbours"] = "baseline"
    elif method.baseline == "contrastive" and method.direction == "image-to-text":
        ignored["neighbours"] = "direction"  # hard negatives are images
    if method.regularizer == "none":
        ignored["similarity_weight"] = "regularizer"
    if method.regularizer not in LEARNING:
        ignored["discriminator_steps"] = "regularizer"
    # Samples of no weight may still be competitors, a group's mean, or what D learns from.
    used = method.baseline in ("contrastive", "group") or method.regularizer in DISCRIMINATORS
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

    def rehearse(self, rollout: Rollout, batch: Batch) -> Tensor:
        """The loss () of a further update in the same step: on the pool that was just scored."""
        return self.score(rollout, batch)[1]


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


class PacedDiscriminator(Discriminator):
    """A discriminator that keeps pace with the captioner: Eq. 4, not as the authors have it.

    The plain one meets ill-formed captions only once the captioner writes them, and until then it
    takes whatever is new for human. This one is shown corrupted human captions too; its further
    updates (`discriminator_steps`) return to the pools of the last 20 steps; and r_reg is its logit
    within +-10, in nats, which still tells captions apart where every probability is near zero.
    `shown` has of each of these steps the rows of wrong and those of human captions, of all
    processes, so that what the first one saves is enough to resume them all.
    """

    def __init__(self, width: int, clip) -> None:
        super().__init__(width)
        self.clip = clip
        self.shown: list[tuple[Tensor, Tensor]] = []

    def loss(self, wrong: Tensor, human: Tensor) -> Tensor:
        """Eq. 4 on rows of image and caption: (K*B + B, D + D), (B, D + D) -> ()."""
        return discriminator_loss(self.network(wrong).squeeze(1), self.network(human).squeeze(1))

    def score(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The logit of every caption; the loss of Eq. 4, with sampled and corrupted captions as the
        zeros; D's accuracy on sampled and human captions."""
        images = rollout.image_embeddings[rollout.image_index]  # (C, D)
        pairs = torch.cat([images, rollout.caption_embeddings], dim=1)  # (C, D + D)
        sampled, human, _ = pairs.split(rollout.sizes)
        broken = [corrupt(caption) for caption in batch.ground_truth]
        corrupted = [rollout.image_embeddings, self.clip.embed_captions(broken)]
        wrong = torch.cat([sampled, torch.cat(corrupted, dim=1)])  # (K*B + B, D + D)
        self.shown.append((gather(wrong), gather(human)))
        del self.shown[:-20]

        logits = self.network(pairs).squeeze(1).detach()
        sampled_logits, human_logits, _ = logits.split(rollout.sizes)
        correct = torch.cat([sampled_logits < 0, human_logits > 0]).float().mean()
        record = {"discriminator_accuracy": correct.item()}
        return logits.clamp(-10, 10), self.loss(wrong, human), record

    def rehearse(self, rollout: Rollout, batch: Batch) -> Tensor:
        """Eq. 4 on the pool of one of the last 20 steps, drawn by torch's random numbers."""
        drawn = self.shown[torch.randint(len(self.shown), ())]
        wrong, human = (own_rows(rows).to(rollout.caption_embeddings.device) for rows in drawn)
        return self.loss(wrong, human)


class KL(Regularizer):
    """Stay near the captioner that reinforcement learning started from, p_0 (Eq. 10).

    r_reg is log p_0(c|i) - log p(c|i), in nats divided by `divisor`. Of a sampled caption that is
    minus an unbiased estimate of KL(p || p_0). `captioner` is copied as it is now. Pictures are
    taken in so many `parts`, one after the other, as fit into memory.
    """

    def __init__(self, captioner, divisor: float | None) -> None:
        super().__init__()
        self.captioner = captioner
        self.initial = copy.deepcopy(captioner)
        self.divisor = divisor
        self.parts = 1

    def score(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The log-ratio of every caption; no loss; the estimate of the divergence. It costs two
        passes over the pool that training itself does not need."""
        with torch.no_grad():
            now = self.log_probs(self.captioner, rollout, batch)
            before = self.log_probs(self.initial, rollout, batch)
        sampled_now, *_ = (now - before).split(rollout.sizes)
        return before - now, now.new_zeros(()), {"kl": sampled_now.mean().item()}

    def log_probs(self, captioner, rollout: Rollout, batch: Batch) -> Tensor:
        """log p(c|i) of every caption of the pool: (C,)."""
        result = torch.zeros_like(rollout.caption_embeddings[:, 0])
        size = len(batch.index) // self.parts
        for part in range(self.parts):
            own = rollout.image_index // size == part  # (C,): the captions of these pictures
            features = captioner.encode(batch.pixels[part * size :][:size])
            rows = rollout.image_index[own] - part * size
            words, mask = captioner.log_probs(features, rollout.tokens[own], rows)
            result[own] = caption_log_probs(words, mask, self.divisor)
        return result


def plain_words(text: str) -> str:
    """Lower-case words with single spaces, without punctuation: what n-grams are counted in."""
    return " ".join(re.findall(r"\w+(?:['-]\w+)*", text.lower()))


class Cider(Regularizer):
    """CIDEr of each caption against the references of its image (Eq. 10), from 0 to 10.

    By pycocoevalcap's scorer, with the document frequencies of the whole data set, not of a batch.
    `references` holds those of every picture of the data set.
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
        size = len(self.references)
        scores = []
        for start in range(0, len(pictures), size):  # a pool may be larger than the data set
            own = slice(start, start + size)
            words = [plain_words(caption) for caption in rollout.captions[own]]
            self.scorer.ctest = cook_refs(words)
            # The scorer takes the size of the data set from the length of this list. What follows
            # the references of these captions pads it to that length, and is never compared.
            compared = [self.references[index] for index in pictures[own]]
            self.scorer.crefs = compared + self.references[len(compared) :]
            scores += self.scorer.compute_cider()
        scores = rollout.caption_embeddings.new_tensor(scores)
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
    if kind == "paced":
        return PacedDiscriminator(width, learner.clip)
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
    """The number of this process, from 0."""
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


def normalize_caption(caption: str) -> str:
    """Lower case, without .!"()*#:;~ and with single spaces: as BLIP's captions were trained on.

    People end captions with a full stop and the captioner does not. A discriminator that is shown
    the difference learns nothing else.
    """
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split())


@dataclasses.dataclass(frozen=True)
class Batch:
    """B pictures to learn from, all different: a copy would be its own rival in Eq. 6."""

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
        self.judged: tuple[Rollout, Batch] | None = None  # what was judged last

    def on_device(self, batch: Batch) -> Batch:
        """The batch with its `index` where the embeddings are: batches come from the CPU."""
        index = batch.index.to(self.image_embeddings.device)
        return dataclasses.replace(batch, index=index)

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
        batch = self.on_device(batch)
        features = self.captioner.encode(batch.pixels)  # (B, L, H), once for all that follows
        with torch.no_grad():
            rollout = self.roll_out(features, batch)
        advantages, regularizer_loss, record = self.judge(rollout, batch)
        loss = self.loss(features, rollout, advantages)
        return loss + regularizer_loss, record

    def discriminator_step(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of the regularizer's network alone, on what the captioner writes now."""
        batch = self.on_device(batch)
        with torch.no_grad():
            features = self.captioner.encode(batch.pixels)
            rollout = self.roll_out(features, batch)
        _, loss, record = self.regularizer.score(rollout, batch)
        return loss, record

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
        if self.method.normalize:  # all of them alike, whoever wrote them
            captions = [normalize_caption(caption) for caption in captions]
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
        self.judged = rollout, batch
        similarity = self.similarity_rewards(rollout, batch)
        scores, regularizer_loss, record = self.regularizer.score(rollout, batch)
        rewards = mixed_reward(similarity, scores, self.method.alpha)  # (C,)
        sampled, human, greedy = rewards.split(rollout.sizes)
        advantages = self.advantages(sampled, human, greedy)

        words = [len(caption.split()) for caption in rollout.captions[: len(sampled)]]
        record = record | {
            "reward": sampled.mean().item(),
            "similarity": similarity[: len(sampled)].mean().item(),
            "regularizer": scores[: len(sampled)].mean().item(),
            "similarity_spread": gather(similarity[: len(sampled)]).std(correction=0).item(),
            "regularizer_spread": gather(scores[: len(sampled)]).std(correction=0).item(),
            "ground_truth_reward": human.mean().item(),
            "greedy_reward": greedy.mean().item(),
            "ground_truth_share": (advantages[len(sampled) :] > 0).float().mean().item(),
            "regularizer_loss": regularizer_loss.item(),
            "mean_length": sum(words) / len(words),
        }
        return advantages, regularizer_loss, record

    def similarity_rewards(self, rollout: Rollout, batch: Batch) -> Tensor:
        """r_sim of every caption of the pool (C,): Eq. 6, Eq. 8, or the cosine."""
        method = self.method
        captions = rollout.caption_embeddings
        images = rollout.image_embeddings
        own = images[rollout.image_index]  # (C, D): each caption's own image
        if method.alpha == 0:  # it would not count
            return torch.zeros_like(own[:, 0])
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
class Captioner:
    """A captioner p(c|i) with its preprocessing: BLIP. Subclasses say what other families change.

    `tokens` are (C, P + T): the P of `start` (the start token and the prompt, which are saved with
    the model, never scored and never shown), then the words, an end token, and padding."""

    default_prompt = "a picture of"  # what a BLIP that comes without a prompt learned to continue
    writer_name, vision_name = "text_decoder", "vision_model"  # of the model's parts
    bf16 = False

    def __init__(self, model: nn.Module, image_processor, tokenizer, prompt: str | None = None):
        from transformers import GenerationConfig

        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.pixels = functools.partial(prepare_pixels, image_processor)
        self.side = max(dict(image_processor.size).values())  # in pixels
        start, self.end, self.pad = self.special_tokens()
        if prompt is None:
            prompt = getattr(model.config, "prompt", self.default_prompt)
        self.prompt = model.config.prompt = prompt
        self.before = f"{prompt} "  # what a caption follows
        self.start = [start, *tokenizer(prompt, add_special_tokens=False).input_ids]
        self.skipped = len(self.start) - 1  # tokens that are not the caption's
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
        """The part of the model that writes: all of it, if the name is empty."""
        return self.model.get_submodule(self.writer_name)

    @property
    def vision(self) -> nn.Module:
        """The part of the model that sees."""
        return self.model.get_submodule(self.vision_name)

    def arithmetic(self) -> torch.autocast:
        """For `with`: the block computes in bf16 if `bf16` says so. Weights stay in fp32."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    def checkpoint_vision(self) -> None:
        """Keep only the inputs of the vision tower's layers, and recompute these for the gradient:
        far less memory, a quarter more time. (transformers does it in training mode alone.)"""
        from torch.utils.checkpoint import checkpoint
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in self.vision.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def inputs(self, features: Tensor, tokens: Tensor, image_index: Tensor, share=True) -> dict:
        """The writer's arguments: the tokens so far (C, P + T), and what it sees of their images.

        Cross-attention's keys and values depend on the image alone. If they are to be shared, they
        are computed once for each of the B images, in a cache that the writer finds filled."""
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

    def encode(self, pixels: Tensor) -> Tensor:
        """Features of images: (B, 3, height, width) -> (B, L, H). All that follows starts here."""
        with self.arithmetic():
            return self.vision(pixels.to(self.model.device)).last_hidden_state

    @staticmethod
    def load(name: str, device: str = "cpu", prompt: str | None = None) -> Captioner:
        """The captioner of a Hub name, a Hugging Face folder or a run folder: fp32, in eval mode.
        Raises UserError in one line for what cannot be loaded."""
        weights = ("model*.safetensors", "pytorch_model*.bin")
        folder = local_folder(name, "captioner", "config.json", weights)
        from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
        from transformers.models.auto import modeling_auto

        with explain(f"{name}: cannot load this captioner"):
            family = json.loads((folder / "config.json").read_text())["model_type"]
            kind = FAMILIES.get(family, ImageText)
            fits = family in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            text = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
            if not fits or (kind is ImageText and text.is_encoder_decoder):
                known = f"{', '.join(FAMILIES)}, or image-text-to-text with a decoder alone"
                raise ValueError(f"a model of type {family}; captioners are of type {known}")
            options = dict(dtype=torch.float32, output_loading_info=True)
            auto = modeling_auto.AutoModelForImageTextToText
            model, report = auto.from_pretrained(folder, **options)
            if missing := report["missing_keys"]:
                raise ValueError(f"it lacks the weights {min(missing)}; is it complete?")
            size = sum(weights.nbytes for weights in model.parameters())
            if device.startswith("cuda") and size > torch.cuda.mem_get_info(device)[0]:
                much = f"its weights take {size / 2**30:.1f} GiB, more than is free on {device}"
                raise ValueError(f"{much}; try --device cpu")
            processor = AutoProcessor if kind is ImageText else AutoImageProcessor
            parts = [each.from_pretrained(folder) for each in (processor, AutoTokenizer)]
            # Without its files a tokenizer loads all the same, and decodes everything to nothing.
            ids = parts[1].get_vocab().values()
            if len(ids) <= len(parts[1].all_special_ids):
                raise ValueError("the files of its tokenizer are missing")
            if max(ids) >= text.vocab_size:
                raise ValueError("its tokenizer is another model's: it has more words")
            return kind(model.eval().to(device), *parts, prompt)

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder, which transformers loads without distcap."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # which only their owner may read, when new
            file.chmod((folder / "config.json").stat().st_mode)

    def train_only(self, pattern: str) -> None:
        """Freeze the parameters in whose names the regular expression finds nothing: they need no
        gradients and, with bf16 arithmetic, half the memory. Raises UserError if it finds none."""
        with explain(f"--train-only {pattern}: not a regular expression"):
            find = re.compile(pattern).search
        frozen = {name: each for name, each in self.model.named_parameters() if not find(name)}
        if len(frozen) == len([*self.model.parameters()]):
            raise UserError(f"--train-only {pattern}: finds no parameter; one is {min(frozen)}")
        for parameter in frozen.values():
            parameter.requires_grad = False
            parameter.data = parameter.data.bfloat16() if self.bf16 else parameter.data

    def check_length(self, max_length: int) -> None:
        """Raise UserError for captions longer than there are positions for."""
        if self.longest < 1:
            taken = f"has {len(self.start)} tokens, and leaves no room for a caption"
            raise UserError(f"--prompt {textwrap.shorten(self.prompt, 40)}: {taken}; shorten it")
        if max_length > self.longest:
            most = f"this captioner writes at most {self.longest} tokens"
            raise UserError(f"--max-length {max_length}: {most}")

    def tokenize(self, captions: Sequence[str], max_length: int) -> Tensor:
        """Captions as tokens (B, P + T). One longer than `max_length` is cut, without an end."""
        texts = [f"{self.before}{caption}".strip() for caption in captions]
        words = self.tokenizer(texts, add_special_tokens=False).input_ids
        words = [[*row[self.skipped :], self.end][:max_length] for row in words]
        rows = [torch.tensor(self.start + row) for row in words]
        return nn.utils.rnn.pad_sequence(rows, True, self.pad).to(self.model.device)

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens (C, P + T) as texts, without the prompt, each a single line."""
        options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=True)
        texts = self.tokenizer.batch_decode(tokens[:, len(self.start) :], **options)
        lines = [text.strip().partition("\n")[0] for text in texts]
        lines = [" ".join(line.split()) for line in lines]
        quoted = re.compile(r"""^(["'“])((?:(?!\1)[^"”])*)["'”]$""")
        return [quoted.sub(r"\2", line) for line in lines]

    def sample(self, features: Tensor, max_length: int, count: int = 1, temperature: float = 1.0,
               top_p: float = 1.0, **limits) -> Tensor:  # fmt: skip
        """Draw `count` captions of each image: (B, L, H) -> (K*B, P + T), an image's in a row. They
        come from p(c|i) itself by default, as REINFORCE assumes; generate's own default, the 50
        likeliest tokens, would not. `limits` are generate's, such as min_new_tokens."""
        drawing = dict(do_sample=True, top_k=0, top_p=top_p, temperature=temperature)
        return self.generate(features, max_length, count, **drawing, **limits)

    def greedy(self, features: Tensor, max_length: int) -> Tensor:
        """A caption of each image, always the likeliest token next: (B, L, H) -> (B, P + T)."""
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

    def generate(self, features: Tensor, max_length: int, count: int = 1, **options) -> Tensor:
        """The one call of transformers' generate. At most `max_length` tokens follow the start."""
        own = torch.arange(len(features), device=self.model.device).repeat_interleave(count)
        start = torch.tensor([self.start] * len(own), device=self.model.device)  # (K*B, P)
        share = options.get("num_beams", 1) == 1  # a beam search reorders a cache of its own
        with torch.no_grad(), self.arithmetic():
            options |= self.inputs(features, start, own, share)
            return self.writer.generate(**options, max_new_tokens=max_length)

    def log_probs(self, features: Tensor, tokens: Tensor,
                  image_index: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """log p of each token after the start, given those before it, in nats; and the mask:
        (B, L, H), (C, P + T), (C,) -> (C, T), (C, T). `image_index` tells each caption's image; by
        default there is one of each. Differentiable down to the pixels; meaningless if masked."""
        if image_index is None:
            image_index = torch.arange(len(tokens), device=tokens.device)
        words = tokens[:, len(self.start) :]  # (C, T)
        with self.arithmetic():
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
    writer_name, vision_name = "", "encoder"  # given features, the whole does not encode again

    def special_tokens(self) -> tuple[int, int, int]:
        """The ids of start, end and padding."""
        config = self.model.generation_config
        return config.decoder_start_token_id, config.eos_token_id, config.pad_token_id

    def inputs(self, features: Tensor, tokens: Tensor, image_index: Tensor, share=True) -> dict:
        """The writer's arguments. Decoders differ too much to share anything."""
        from transformers.modeling_outputs import BaseModelOutput

        seen = BaseModelOutput(features[image_index])
        return {"decoder_input_ids": tokens, "encoder_outputs": seen}


class GIT(Captioner):
    """Microsoft's GIT: it reads the image as a prefix, so that its features are the pixels, which
    it encodes anew each time."""

    default_prompt = ""
    writer_name, vision_name = "", "git.image_encoder"

    def special_tokens(self) -> tuple[int, int, int]:
        """The ids of start, end and padding."""
        config = self.model.config
        return config.bos_token_id, config.eos_token_id, config.pad_token_id

    def inputs(self, features: Tensor, tokens: Tensor, image_index: Tensor, share=True) -> dict:
        """The writer's arguments."""
        return {"input_ids": tokens, "pixel_values": features[image_index]}

    def encode(self, pixels: Tensor) -> Tensor:
        """The pixels themselves: there is nothing to reuse."""
        return pixels.to(self.model.device)


# Families without a chat template: the prompt that each learned, and what stands around it.
PLAIN = {"paligemma": ("caption en", "<image>{}\n"), "blip-2": ("", "{} ")}


class ImageText(GIT):
    """Any other image-text-to-text model with a decoder alone: Qwen-VL, SmolVLM, LLaVA, Gemma 3...

    Its features are what its processor makes of each picture and the question: tokens and pixels,
    as many as it likes. `tokens` are then (C, T), without the question."""

    default_prompt = "Describe this picture in one sentence."

    def __init__(self, model: nn.Module, processor, tokenizer, prompt: str | None = None):
        family, tokenizer = model.config.model_type, processor.tokenizer
        self.default_prompt, form = PLAIN.get(family, (self.default_prompt, "<image>{} "))
        super().__init__(model, processor.image_processor, tokenizer, prompt)
        self.image_processor, self.start = processor, []
        self.before, after = self.conversation(processor, form)
        texts = [self.before.rstrip(" "), after.strip()]
        prompt, closing = tokenizer(texts, add_special_tokens=False).input_ids
        self.skipped = len(prompt)
        self.end = next(filter(tokenizer.added_tokens_decoder.get, closing), self.end)
        model.generation_config.eos_token_id = self.end
        if family == "blip-2":  # its generate is that of the model within
            model.language_model.generation_config = model.generation_config
        asked = self.before.rstrip(" " if processor.chat_template else None)
        self.pixels = functools.partial(prepare_prompts, processor, asked)
        (example,) = self.pixels([Image.new("RGB", (64, 64))])
        self.longest -= example["input_ids"].shape[1]
        image = getattr(model.config, "image_token_id", -1)

        def forbid(layer: nn.Module, arguments: tuple, logits: Tensor) -> None:
            logits[..., image : image + 1] = -torch.inf  # it holds a picture's place: no word

        model.get_output_embeddings().register_forward_hook(forbid)

    def special_tokens(self) -> tuple[None, int, int]:
        """No start; the ids of end and padding."""
        end, pad = self.model.generation_config.eos_token_id, self.tokenizer.pad_token_id
        end = end[0] if isinstance(end, list) else end
        return None, end, end if pad is None else pad

    def conversation(self, processor, form: str) -> tuple[str, str]:
        """What stands before a caption, with a place for the picture, and what after it: by the
        checkpoint's chat template, if it has one, else in this plain form."""
        if not processor.chat_template:
            return form.format(self.prompt).lstrip(), ""
        question = [{"type": "image"}, {"type": "text", "text": self.prompt}]
        answer = [{"type": "text", "text": "CAPTION"}]
        chat = [dict(role="user", content=question), dict(role="assistant", content=answer)]
        before, _, after = processor.apply_chat_template(chat).rpartition("CAPTION")
        return before, after

    def inputs(self, features: list, tokens: Tensor, image_index: Tensor, share=True) -> dict:
        """The writer's arguments: for each caption the question, then its tokens so far."""
        rows = [features[row] for row in image_index.tolist()]
        suffix = self.model.config.model_type == "paligemma"  # its type of what is causal
        kinds = dict(input_ids=tokens.long(), attention_mask=1, token_type_ids=int(suffix))
        arguments = {}
        for name in rows[0].keys() - {"labels"}:
            of_tokens = rows[0][name].shape == rows[0]["input_ids"].shape
            arguments[name] = stack_padded([row[name] for row in rows], left=of_tokens)
            if of_tokens:
                more = torch.zeros_like(tokens, dtype=torch.long) + kinds.get(name, 0)
                arguments[name] = torch.cat([arguments[name], more], dim=1)
        if "logits_to_keep" in inspect.signature(self.writer.forward).parameters:
            arguments["logits_to_keep"] = tokens.shape[1] + 1
        return arguments

    @property
    def vision(self) -> nn.Module:
        """The part of the model that sees."""
        return self.model.get_encoder(modality="image")

    def encode(self, pixels: list) -> list:
        """The same on the model's device: there is nothing to reuse."""
        return [each.to(self.model.device) for each in pixels]

    def generate(self, features: list, max_length: int, count: int = 1, **options) -> Tensor:
        """As for every captioner, without the question."""
        tokens = super().generate(features, max_length, count, **options)
        return tokens[:, max(each["input_ids"].shape[1] for each in features) :]


# transformers' name of a model type -> the class that knows it
FAMILIES = {"blip": Captioner, "vision-encoder-decoder": EncoderDecoder, "git": GIT}


def prepare_pixels(image_processor, pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures, resized and normalized as a checkpoint wants them: (B, 3, height, width).
    No method of Captioner, so that a worker process can be given it without the model."""
    return image_processor(list(pictures), return_tensors="pt").pixel_values


def prepare_prompts(processor, asked: str, pictures: Sequence[Image.Image]) -> list:
    """What a checkpoint's processor makes of each picture and the question, one by one."""
    torch.multiprocessing.set_sharing_strategy("file_system")  # files would be too many to be open
    bos = processor.tokenizer.bos_token
    options = dict(add_special_tokens=False) if bos and asked.startswith(bos) else {}
    options |= dict(text=asked, return_tensors="pt")
    return [processor(images=picture, **options) for picture in pictures]


def stack_padded(parts: Sequence[Tensor], left: bool) -> Tensor:
    """Tensors of different sizes stacked, the smaller padded with zeros on the left or right."""
    sizes = torch.tensor([part.shape[1:] for part in parts])
    gaps = (sizes.amax(dim=0) - sizes).flip(1)  # F.pad begins with the last dimension
    sides = torch.stack([gaps * left, gaps * (not left)], dim=2).flatten(1).tolist()
    return torch.cat([F.pad(part, some) for part, some in zip(parts, sides)])


def local_folder(name: str, inside: str, wanted: str, kinds: Sequence[str]) -> Path:
    """The folder of a checkpoint, the one that holds the file `wanted`: `name` itself, `inside` a
    run folder of that name, or what the Hugging Face Hub has. `kinds` are patterns of weights."""
    for folder in (Path(name) / inside, Path(name)):
        if (folder / wanted).is_file():
            return folder
    if Path(name).exists():
        raise UserError(f"{name}: not a checkpoint: no {wanted} and no {inside}/{wanted} in it")
    what = f"{name}: not a folder, nor to be had from the Hugging Face Hub"
    with explain(what, "; its first use needs the Internet, later ones do not; or give a folder"):
        return download(name, kinds)


def download(name: str, kinds: Sequence[str]) -> Path:
    """A repository of the Hub, or its copy in the cache if the Hub cannot be reached: small files,
    and weights of the first of `kinds` that it offers. Raises ValueError if it offers none."""
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
        patterns = ["*.json", "*.txt", "*.model", "*.jinja", kind]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
            if any(folder.glob(kind)):
                return folder
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
    raise unreachable or ValueError("it has no weights of a kind that can be loaded")


# ---- 7  CLIP: images and captions as unit rows ---------------------------------------------------
class CLIP:
    """A frozen open_clip model: images and captions as unit rows (N, D), without gradient."""

    def __init__(self, model: nn.Module, preprocess, tokenizer, device: str = "cpu") -> None:
        self.model = model.eval().to(device)  # open_clip returns it in training mode
        self.tokenizer, self.device = tokenizer, device
        self.pixels = functools.partial(stack_pixels, preprocess)
        size = model.visual.image_size
        self.side = max(size) if isinstance(size, tuple) else size  # in pixels
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
            if not architecture:
                advice = f"needs the name of its weights too, as in {name}/openai"
                raise UserError(f"--clip {name}: {advice}")
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

    @functools.cached_property
    def digest(self) -> bytes:
        """A hash of its weights and of how it prepares pictures, whatever process it is in."""
        prepare = re.sub(" at 0x[0-9a-f]+", "", repr(self.pixels))  # without addresses
        digest = hashlib.sha256(f"{prepare} {self.side}".encode())
        for weight in self.model.state_dict().values():
            digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.digest()

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Prepared pictures as unit rows: (B, 3, height, width) -> (B, D)."""
        with torch.no_grad():
            return self.model.encode_image(pixels.to(self.device), normalize=True)

    def embed_images(self, images: Iterable[Path | Image.Image], workers: int = 0,
                     failures: list | None = None, quiet: bool = False) -> Tensor:  # fmt: skip
        """Pictures as unit rows (N, D). Raises UserError for one that cannot be read; given a list
        of `failures`, adds (number, UserError) to it instead, and leaves out the row."""
        own = own_share(list(images))
        batches = PictureBatches(own, [self.pixels], 64, self.side)
        rows, failed = [], []
        quiet = quiet or process_rank() > 0
        with Bar(total=len(own), desc="embed", leave=False, disable=quiet) as bar:
            for batch in read_ahead(batches, range(len(batches)), workers):
                bad = [failure for failure in batch.failures if failure]
                if bad and failures is None:
                    raise bad[0]
                rows += [self.encode_pixels(pixels) for pixels in batch.pixels]
                failed += batch.failures
                bar.update(len(batch.failures))
        if failures is not None:
            failures += [(n, each) for n, each in enumerate(put_together(failed)) if each]
        rows = [each.to(self.device) for each in put_together(rows)]
        return torch.cat(rows or [torch.zeros(0, 1)])

    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Captions as unit rows (C, D). Equal captions are embedded once, so that they tie."""
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        tokens = [self.tokenizer(texts) for texts in batched(list(row_of), batch_size)]
        with torch.no_grad():
            rows = [self.encode_tokens(each.to(self.device)) for each in tokens]
        return torch.cat(rows)[[row_of[caption] for caption in captions]]

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens as unit rows. A text tower like OpenAI's is causal and pools at the end token, so
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
    """A picture, on disk or in memory, and what people wrote of it. `split` is what the data say
    (train, val, test), if anything. The toy world's pictures have a `scene`."""

    image_id: str
    image: Path | Image.Image
    references: tuple[str, ...]
    split: str | None = None
    scene: Scene | None = None


HEIF = (".heic", ".heif", ".hif")
# Formats for which Pillow runs another program, or which it recognizes but cannot read.
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Files that are often beside pictures.
COMPANIONS = (".jsonl", ".csv", ".html", ".json", ".txt", ".caption", ".part")


@functools.cache
def picture_formats() -> tuple[list[str], tuple[str, ...]]:
    """The formats that can be read, as Image.open wants them, and the suffixes of such files. HEIC
    can be read where pillow-heif is installed; its suffixes are there in any case."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    formats = [name for name in Image.OPEN if name not in NOT_READ]
    suffixes = Image.registered_extensions().items()
    return formats, (*HEIF, *(suffix for suffix, name in suffixes if name in formats))


def open_image(path: Path) -> Image.Image:
    """A picture of which only the header is read. Raises OSError with the true reason."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        if path.is_dir():
            os.scandir(path).close()  # raises the reason, if it may not be listed
        raise OSError("a folder" if path.is_dir() else "not a file")  # a pipe would make us wait
    formats, _ = picture_formats()
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            start = file.read(12)
        reason = "cannot identify it as a picture" if start else "an empty file"
        if start[4:8] == b"ftyp" and "HEIF" not in formats:
            reason = "HEIC or a film; for HEIC, pip install pillow-heif"
        if start[:2] == b"%!":
            reason = "PostScript, which would run a program; convert it first"
        raise OSError(reason) from None


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey pictures of 16 or 32 bits, or of floats, as 8 bits.

    Black is 0, and white the first of 1, 255 and 65535 that 99.9 % of the pixels do not exceed.
    If these span less than half of that range, as a camera's 12 bits do in a file of 16, or exceed
    it, they are stretched to their own limits. NaN is black."""
    values = numpy.asarray(picture.convert("F"))
    values = numpy.nan_to_num(values, posinf=0, neginf=0)
    low, high = numpy.percentile(values, (0.1, 99.9))
    if low == high:  # all but a few pixels: the few are the picture
        low, high = values.min(), values.max()
    white = next((most for most in (1, 255, 65535) if high <= most), high)
    if low == high or (low >= 0 and high - low >= white / 2):
        low, high = 0, white
    grey = (values - low) * (255 / (high - low)) + 0.5
    grey[values == picture.info.get("transparency")] = 255
    return Image.fromarray(grey.clip(0, 255).astype(numpy.uint8))


def load_image(image: Path | Image.Image, side: int | None = None) -> Image.Image:
    """Any picture as upright RGB. EXIF rotation is applied; transparency becomes white, unless all
    of the picture is transparent; more than 8 bits become 8 (see `eight_bits`); of an animation,
    the first frame is taken. Raises UserError for what cannot be read.

    For a model that wants pictures of `side` pixels, larger ones are reduced to a half, a third and
    so on, though never to less than twice that side: it saves memory and time."""
    with explain(f"{image}: cannot be read"):
        picture = open_image(image) if isinstance(image, Path) else image
        if side:
            picture.draft(None, (2 * side, 2 * side))  # a JPEG is decoded at a smaller size
        picture.load()  # a truncated file fails here, not later
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":  # convert would clip them to white
            picture = eight_bits(picture)
        if picture.has_transparency_data:
            clear = picture.info.get("transparency")
            if isinstance(clear, tuple) and max(clear) > 255:  # of a PNG with 16 bits a channel
                picture.info["transparency"] = tuple(value >> 8 for value in clear)
            picture = picture.convert("RGBA")
            if picture.getchannel("A").getextrema()[1]:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
        if side:
            picture = picture.reduce(max(min(picture.size) // (2 * side), 1))
        return picture.convert("RGB")


def find_images(paths: Sequence[str], recursive: bool = True,
                notes: list[str] | None = None) -> list[Path]:  # fmt: skip
    """The pictures named, and those in the folders named, each once, in order; hidden ones only if
    they are named. What does not exist fails when it is read. What is passed over is added to
    `notes`. Raises UserError if there are no pictures at all."""
    found: dict[Path, None] = {}  # a dict keeps the order
    _, suffixes = picture_formats()
    others: Counter[str] = Counter()
    notes = [] if notes is None else notes

    def keep(error: OSError) -> None:  # a file, or a folder we may not read: fails later
        found[Path(error.filename)] = None

    for path in paths:
        # Links to folders are not followed: they may go in circles.
        for folder, folders, names in os.walk(Path(path), onerror=keep):
            folders[:] = sorted(name for name in folders if recursive and name[0] != ".")
            links = [name for name in folders if os.path.islink(f"{folder}/{name}")]
            notes += [f"{folder}/{name}: a link to a folder, not followed" for name in links]
            for name in sorted(name for name in names if name[0] != "."):
                if name.lower().endswith(suffixes):
                    found[Path(folder, name)] = None
                elif not name.lower().endswith(COMPANIONS):
                    others[Path(name).suffix] += 1
    if others:
        kinds = ", ".join(f"{count} {kind or 'without'}" for kind, count in others.most_common(5))
        notes.append(f"files passed over, not pictures by their suffix: {kinds}")
    if not found:
        nothing = "no pictures in this folder (looked for .jpg, .png and what else Pillow reads)"
        raise UserError(f"{', '.join(paths) or '-'}: {nothing}")
    return list(found)


def read_text(path: Path) -> str:
    """A file in UTF-8, with or without a byte order mark; each line ends in "\\n". Raises UserError
    with the line that is not UTF-8, lest we train on wrong characters."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(error.object[: error.end].splitlines())
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def numbered(text: str) -> list[tuple[int, str]]:
    """The lines of a text that are not blank, each with its number."""
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file whole or not at all: a partial one first, then renamed. Links are followed."""
    path = Path(os.path.realpath(path))
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Row(NamedTuple):
    """What one line or entry of a data file says of a picture. There may be several."""

    name: str
    captions: list[str]
    more: dict  # its other columns: split, image_id, scene, ...


# What data files call a picture's name, and what people wrote of it.
NAME_KEYS = ("file_name", "filename", "image", "image_name")
CAPTION_KEYS = ("caption", "captions", "text", "comment")


def make_row(where: str, fields: dict) -> Row:
    """Check one entry of a data file; `where` is its place. Raises UserError if the name or the
    captions are not texts. Captions may be empty or missing."""
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object with file_name and caption")
    name = next((fields[key] for key in NAME_KEYS if key in fields), None)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(f"{where}: no file_name, or one that is not a text")
    captions = next((fields[key] for key in CAPTION_KEYS if fields.get(key) is not None), "")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where}: caption must be a text or a list of texts")
    for key, kinds in (("split", str | None), ("image_id", str | int | None)):
        if not isinstance(fields.get(key), kinds):
            raise UserError(f"{where}: {key} must be a text")
    with explain(f"{where}: not text"):  # half a character is an error here, not in training
        os.fsencode(name)
        "".join(captions).encode("utf-8")
    return Row(name, captions, fields)


def parse_json(where: str, text: str, line: int = 1):
    """A JSON value. Raises UserError with the line, where `text` begins at line `line`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # wrong; or a number, or depth, beyond limits
        number = line + getattr(error, "lineno", 1) - 1
        reason = getattr(error, "msg", error)
        raise UserError(f"{where}:{number}: not JSON that can be read ({reason})") from None


def read_lines(path: Path, text: str) -> Iterator[Row]:
    """Rows of JSON lines: Hugging Face's metadata.jsonl."""
    for number, line in numbered(text):
        yield make_row(f"{path}:{number}", parse_json(str(path), line, number))


def read_csv(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """Rows of a table with a header: metadata.csv, Flickr8k's captions.txt, Flickr30k's results."""
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    header: list[str] = []
    for number, line in numbered(text):
        # Each line alone: a quote that is never closed would swallow those of other pictures.
        what = f"{path}:{number}: not a whole line of a table"
        with explain(what, "; a quoted text must end in its line"):
            (cells,) = csv.reader([line], delimiter=delimiter, quoting=quoting, strict=True)
        cells = [cell.strip() for cell in cells]
        if header and len(cells) > len(header):
            count = f"{len(cells)} columns, but {len(header)} in the first line"
            raise UserError(f"{path}:{number}: {count}; a text with a {delimiter} needs quotes")
        if header and any(cells):
            yield make_row(f"{path}:{number}", dict(zip(header, cells)))
        header = header or [cell.lower() for cell in cells]


def read_tokens(path: Path, text: str) -> Iterator[Row]:
    """Rows of `name#number`, tab, caption: Flickr8k.token.txt."""
    for number, line in numbered(text):
        found = re.fullmatch(r"([^\t]+)#\d+\t([^\t]*)", line)
        if not found:
            raise UserError(f"{path}:{number}: not `name#number`, tab, caption")
        yield make_row(f"{path}:{number}", {"file_name": found[1], "caption": found[2]})


def read_karpathy(path: Path, images: Sequence[dict]) -> Iterator[Row]:
    """Rows of the `images` of Karpathy's JSON, each with its split and its sentences."""
    for number, image in enumerate(images):
        where = f"{path}: images[{number}]"
        with explain(f"{where}: no sentences with raw texts"):
            captions = [sentence["raw"] for sentence in image["sentences"]]
            name = os.path.join(image.get("filepath") or "", image["filename"])
        more = {"split": image.get("split"), "image_id": image.get("cocoid", image.get("imgid"))}
        yield make_row(where, {"file_name": name, "caption": captions} | more)


def read_coco(path: Path, images: Sequence[dict], annotations: Sequence[dict]) -> Iterator[Row]:
    """Rows of COCO's captions: `annotations`, each of which names one of the `images` by its id."""
    fields: dict[str, dict] = {}  # by the id as it is written: 1, "1" and true are three
    for number, image in enumerate(images):
        with explain(f"{path}: images[{number}]: needs an id of its own and a file_name"):
            image_id, name = image["id"], image["file_name"]
            if type(image_id) not in (int, str) or repr(image_id) in fields:
                raise ValueError(f"id {image_id!r}")
            fields[repr(image_id)] = {"file_name": name, "caption": [], "image_id": image_id}
    for number, annotation in enumerate(annotations):
        what = "needs the image_id of one of the images, and a caption"
        with explain(f"{path}: annotations[{number}]: {what}"):
            fields[repr(annotation["image_id"])]["caption"].append(annotation["caption"])
    for key, each in fields.items():
        yield make_row(f"{path}: image {key}", each)


def read_json(path: Path, text: str) -> Iterator[Row]:
    """Rows of COCO's captions, or of Karpathy's splits of them: one JSON object with `images`."""
    data = parse_json(str(path), text)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise unknown_form(path, "JSON without a list of images")
    if "annotations" not in data:
        return read_karpathy(path, images)
    if not isinstance(data["annotations"], list):
        raise UserError(f"{path}: annotations must be a list")
    return read_coco(path, images, data["annotations"])


def read_sidecars(folder: Path) -> Iterator[Row]:
    """Rows of a folder of pictures, with a caption a line in the .txt file beside each."""
    for image in find_images([str(folder)]):
        sidecar = image.with_suffix(".txt")
        lines = numbered(read_text(sidecar)) if sidecar.is_file() else []
        captions = [line.strip() for _, line in lines]
        fields = {"file_name": os.path.relpath(image, folder), "caption": captions}
        yield make_row(str(image), fields)


def unknown_form(path: Path, found: str) -> UserError:
    """The error for data in a form that distcap does not know."""
    known = "metadata.jsonl or .csv, JSON of COCO or Karpathy, a table with image and caption, "
    known += "name#number tab caption, or pictures with .txt files"
    return UserError(f"{path}: {found}; looked for {known}")


def read_data(path: Path) -> Iterator[Row]:
    """Rows of data in any of the forms that distcap knows, recognized by their content."""
    if path.is_dir():
        for name in ("metadata.jsonl", "metadata.csv"):
            if (path / name).is_file():
                return read_data(path / name)
        _, suffixes = picture_formats()
        pictures = [each for each in path.rglob("*") if each.suffix.lower() in suffixes]
        if not any(each.with_suffix(".txt").is_file() for each in pictures):
            found = f"a folder with {len(pictures)} pictures and no captions"
            raise unknown_form(path, f"{found} (if a file has them, give that file)")
        return read_sidecars(path)
    if not path.is_file():
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
        header = {cell.strip(' "').lower() for cell in first.split(delimiter)}
        if header & set(NAME_KEYS) and header & set(CAPTION_KEYS):
            return read_csv(path, text, delimiter)
    raise unknown_form(path, f"begins with {first[:40]!r}" if first else "empty")


class Skipped(NamedTuple):
    """Something in a data set that is not used, and why; the example, if it is left out whole."""

    name: str
    reason: str
    example: Example | None = None


def find_pictures(names: Iterable[str], folders: Sequence[Path]) -> dict[str, Path]:
    """The paths of pictures: in one of the folders, by the whole name; else by its last part, if it
    is unique, also in folders within (COCO has one a split). Raises UserError if two fit."""
    basenames = Counter(map(os.path.basename, names))
    inside = [each for folder in folders for each in folder.glob("*") if each.is_dir()]
    found = {}
    for name in names:
        places = [folder / name for folder in folders if os.path.isfile(folder / name)][:1]
        own, base = os.path.split(name)
        if not places and basenames[base] == 1:
            # Where its own folder is there, it is missing, whatever has its name in another.
            other = [] if own and any((folder / own).is_dir() for folder in folders) else inside
            within = [folder / base for folder in (*folders, *other)]
            places = [place for place in within if os.path.isfile(place)]
            if len({os.path.realpath(place) for place in places}) > 1:
                both = f"{places[0]} or {places[1]}"
                raise UserError(f"{name}: which picture is meant, {both}? give --images")
        found[name] = places[0] if places else folders[0] / name
    return found


def join_rows(rows: Iterable[Row], folders: Sequence[Path]) -> list[Example]:
    """One example for each picture, existing or not, with what all its rows say, under whatever
    name. Names are relative to one of the folders."""
    rows = list(rows)
    images = find_pictures(dict.fromkeys(row.name for row in rows), folders)
    pictures: dict[str, Row] = {}  # by the place on disk
    for name, captions, more in rows:
        picture = pictures.setdefault(os.path.realpath(images[name]), Row(name, [], {}))
        picture.captions.extend(captions or [""])
        more = {key: value for key, value in more.items() if value not in (None, "")}
        parts = {split_name(each["split"]) for each in (more, picture.more) if "split" in each}
        if len(parts) > 1:
            raise UserError(f"{name}: in two splits, {' and '.join(sorted(parts))}; keep one")
        picture.more.update(more | picture.more)  # what the first row says stands

    examples = []
    for name, captions, more in pictures.values():
        scene = parse(more["scene"]) if isinstance(more.get("scene"), str) else None
        part = split_name(more["split"]) if "split" in more else None
        image_id = str(more.get("image_id", name))
        examples.append(Example(image_id, images[name], tuple(captions), part, scene))
    return examples


def split_name(text: str) -> str:
    """A split by its usual name, however the data spell it."""
    name = text.strip().lower()
    return "val" if name in ("validation", "valid", "dev") else name


def read_examples(
    data: str,
    images: str | None = None,
    split: str | None = None,
    need_pictures: bool = True,
    skipped: list[Skipped] | None = None,
    usual: str | None = None,
) -> list[Example]:
    """The examples of a data set: a folder or a file, whose pictures are beside it or in the folder
    `images`. Only those of a `split`: its name, or a file with the names of pictures; without one,
    those of the split `usual`, if there are any, or all.

    What is missing or empty is left out, and added to the list `skipped`. A picture under two names
    is one picture. Raises UserError for what is wrong, with file and line."""
    path = Path(data)
    beside = path if path.is_dir() else path.parent
    folder = Path(images) if images else beside
    skipped = [] if skipped is None else skipped
    chosen = join_rows(read_data(path), list(dict.fromkeys([folder, beside])))
    if not chosen:
        raise unknown_form(path, "no pictures with captions in it")
    if split:
        chosen = choose_split(data, chosen, split, skipped)
    else:
        chosen = [each for each in chosen if usual and each.split == usual] or chosen

    examples = []
    for example in chosen:
        texts = tuple(text.strip() for text in example.references if text.strip())
        if len(texts) < len(example.references):
            whole = None if texts else example
            skipped.append(Skipped(str(example.image), "an empty caption", whole))
        if need_pictures and not os.path.isfile(example.image):
            skipped.append(Skipped(str(example.image), "no such picture", example))
        elif texts:
            examples.append(dataclasses.replace(example, references=texts))
    if not examples:
        missing = f"none of its {len(chosen)} pictures is in {folder} with a caption"
        raise UserError(f"{data}: {missing}; give the folder of the pictures with --images")
    return examples


def choose_split(
    data: str, examples: Sequence[Example], split: str, skipped: list
) -> list[Example]:
    """The examples of a split: one that the data name (train with restval), or a file that lists an
    image_id or file name a line, with or without its suffix and folders."""
    if os.path.isfile(split):
        owners: dict[str, list[Example]] = {}
        for each in examples:
            places = [path.parts for path in (each.image, each.image.with_suffix(""))]
            ends = {"/".join(parts[-count:]) for parts in places for count in (1, 2, 3)}
            for name in {each.image_id, *ends}:
                owners.setdefault(name, []).append(each)
        listed = set()
        for number, line in numbered(read_text(Path(split))):
            name = line.strip()
            found = owners.get(name) or owners.get(os.path.basename(name)) or []
            if len(found) > 1:
                raise UserError(f"{split}:{number}: {name!r} is the name of {len(found)} pictures")
            if not found:
                skipped.append(Skipped(name, f"in {split}, but not in the data"))
            listed.update(found)
        chosen = [each for each in examples if each in listed]
    else:
        wanted = {"train": ("train", "restval")}.get(split_name(split), (split_name(split),))
        chosen = [each for each in examples if each.split in wanted]
    if not chosen:
        known = ", ".join(sorted({each.split for each in examples if each.split})) or "no splits"
        has = f"{data} has {known}; give one of them, or a file with the names of pictures"
        raise UserError(f"{split}: no picture is of this split: {has}")
    return chosen


def name_within(folder: Path, path: Path) -> str:
    """What a file in the folder calls a path: relative to it, unless there is a link on the way to
    the folder, where `..` leads elsewhere."""
    name = os.path.relpath(path, folder)
    if name.startswith("..") and os.path.realpath(folder) != os.path.abspath(folder):
        return os.path.abspath(path)
    return name


def write_rows(path: Path, rows: dict[str, dict]) -> None:
    """Write {name: other fields} as JSON lines, whole or not at all."""
    lines = [json.dumps({"file_name": name} | row) + "\n" for name, row in rows.items()]
    write_text(path, "".join(lines))


def write_examples(folder: Path, examples: Sequence[Example]) -> list[Example]:
    """Save examples as a metadata.jsonl with paths of the pictures on disk; those in memory are
    saved beside it as PNG files. Returns them as `read_examples` does."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for example in examples:
        row = {"caption": example.references}
        if isinstance(example.image, Path):
            name = name_within(folder, example.image)
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
    """For each step a batch of pairs: an example's row, and which of its references to learn from.
    No row is twice in a batch: a rival of itself. A longer schedule begins like a shorter one."""
    rng = random.Random(seed)
    batches = []
    for _ in range(steps):
        rows = rng.sample(range(len(examples)), size)
        batches.append([(row, rng.randrange(len(examples[row].references))) for row in rows])
    return batches


class CaptionDataset:
    """Examples to learn from. Item [(row, which), ...] is a whole Batch, ready for the captioner.
    Pictures already in memory, like those of the toy world, are prepared once and for all."""

    def __init__(self, examples: Sequence[Example], prepare: Callable, side: int | None = None):
        self.examples, self.side = examples, side
        self.prepare = prepare  # pictures -> (B, 3, height, width)
        self.prepared = None
        images = [example.image for example in examples]
        small = getattr(prepare, "func", None) is not prepare_prompts  # which makes many tiles
        if small and all(isinstance(image, Image.Image) for image in images):
            self.prepared = torch.cat([prepare(some) for some in batched(images, 256)])

    def __getitem__(self, pairs: Sequence[tuple[int, int]]) -> Batch | UserError:
        rows = [row for row, _ in pairs]
        ground_truth = [self.examples[row].references[which] for row, which in pairs]
        if self.prepared is not None:
            return Batch(torch.tensor(rows), ground_truth, self.prepared[rows])
        try:
            pictures = [load_image(self.examples[row].image, self.side) for row in rows]
        except UserError as error:  # returned, since a worker process would wrap the exception
            return error
        return Batch(torch.tensor(rows), ground_truth, self.prepare(pictures))


class PictureBatch(NamedTuple):
    """Some pictures, read and prepared, and what could not be read."""

    pixels: list[Tensor]  # (B, 3, height, width) for each way to prepare, of those that are good
    failures: list[UserError | None]  # of each picture, in order
    thumbnails: list[str]  # of those that are good: addresses for a page, or "" if not wanted


class PictureBatches:
    """Pictures to look at. Item n is the n-th batch of them, a PictureBatch.
    `prepare` lists the ways to make pixels of pictures: the captioner's, CLIP's, or both."""

    def __init__(self, images: Sequence, prepare: Sequence[Callable], batch_size: int,
                 side: int | None = None, thumbnails: bool = False) -> None:  # fmt: skip
        self.batches, self.prepare = list(batched(images, batch_size)), prepare
        self.side, self.thumbnails = side, thumbnails

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PictureBatch:
        rows, failures, thumbnails = [], [], []
        for image in self.batches[number]:
            try:
                picture = load_image(image, self.side)
            except UserError as error:
                failures.append(error)
                continue
            failures.append(None)
            # Prepared one by one: no more than one is in memory at its own size.
            rows.append([prepare([picture]) for prepare in self.prepare])
            thumbnails.append(thumbnail(picture) if self.thumbnails else "")
        pixels = [join_pixels(parts) for parts in zip(*rows)]
        return PictureBatch(pixels, failures, thumbnails)


def join_pixels(parts: Sequence) -> Tensor | list:
    """Pictures that were prepared one by one as a batch: what a captioner's `pixels` returns."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [picture for part in parts for picture in part]  # ImageText's: of any sizes


def thumbnail(picture: Image.Image) -> str:
    """A small JPEG of a picture, as an address for a page that needs no other file."""
    picture.thumbnail((240, 240))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def own_share(items: Sequence) -> Sequence:
    """This process's part of the things to do; `put_together` joins the results in order."""
    rank, count = process_rank(), process_count()
    return items[rank * len(items) // count : (rank + 1) * len(items) // count]


def put_together(items: list) -> list:
    """The lists of all processes, one after the other."""
    if process_count() == 1:
        return items
    lists = [None] * process_count()
    torch.distributed.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def wait_for_all() -> None:
    """Wait for the other processes: afterwards, what the first one wrote can be read."""
    if process_count() > 1:
        torch.distributed.barrier()


class Bar(tqdm):
    """A progress bar; a line every half minute where standard error is no terminal."""

    def __init__(self, *arguments, **options) -> None:
        pace = dict(mininterval=30, miniters=1, delay=30, ncols=100)
        pace = dict(dynamic_ncols=True) if sys.stderr.isatty() else pace
        super().__init__(*arguments, **pace | options)

    @staticmethod
    def status_printer(file) -> Callable:
        """The function that shows a status: tqdm's own overwrites the last one, in files too."""
        if sys.stderr.isatty():
            return tqdm.status_printer(file)
        return lambda status: status and print(status, file=file, flush=True)


def begin_worker(_: int) -> None:
    """How a worker process begins. Ctrl-C reaches it too, but the main process decides."""
    import_torch()  # if it is no fork: it has imported this file as the command did
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").total < 2**30:
        # In Docker it has 64 MB, which a few batches fill; then all would wait for ever.
        multiprocessing.reduction.ForkingPickler.register(Tensor, by_value)


def by_value(tensor: Tensor) -> tuple:
    """How a tensor goes through a pipe whole, and not as a place in shared memory."""
    return torch.from_numpy, (tensor.numpy(),)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    held = []
    before = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def read_ahead(dataset, order: Sequence, workers: int) -> Iterator:
    """The items of a dataset in this order, made by worker processes while the model works."""
    workers = max(min(workers, len(order) - 1), 0)  # not worth a process for a single batch
    options = dict(num_workers=workers, worker_init_fn=begin_worker)
    items = iter(torch.utils.data.DataLoader(dataset, None, sampler=order, **options))
    for _ in order:
        with hold_interrupts():  # else Ctrl-C may leave one of the loader's locks locked for good
            item = next(items)
        if isinstance(item, UserError):
            raise item
        yield item


# ---- 9  Training ---------------------------------------------------------------------------------
STAGES = ("clip", "tf", "discriminator", "rl")  # in this order


class Run:
    """The folder of a training run: its log, and the state from which it can be resumed.

    Only the first of several processes writes. Without a folder, nothing is written."""

    def __init__(
        self, folder: Path | None = None, resume: bool = False, tensorboard: bool = False
    ) -> None:
        self.folder = folder
        self.writes = folder is not None and process_rank() == 0
        self.state: dict = {}
        if resume and (folder / "state.pt").is_file():
            with explain(f"{folder}/state.pt: cannot be read", "; remove it to start again"):
                path = folder / "state.pt"
                self.state = torch.load(path, map_location="cpu", weights_only=True)
        # What else to remember: the captions before RL, the best weights so far, ...
        self.notes: dict = self.state.get("notes", {})
        self.parts: dict[str, nn.Module] = {}  # what every stage saves, even if it is not trained
        self.stop = 0.0  # the time at which it was asked to stop, if it was
        self.board = None
        if self.writes and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder))
        if self.writes:
            with open(folder / "log.jsonl", "ab") as log:
                # What came after the state will come again. What was removed is not made up.
                log.truncate(min(self.state.get("log_size", 0), log.tell()))

    def write(self, **record) -> None:
        """Add a line to log.jsonl. JSON has no number that is not finite: it becomes null."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        if self.writes:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")

    def save(self, stage: str, step: int, parts: dict) -> None:
        """Write state.pt: the states of `parts`, with `step` steps of the stage done."""
        if not self.writes:
            return
        state = {name: part.state_dict() for name, part in (self.parts | parts).items()}
        state |= dict(stage=stage, step=step, notes=self.notes)
        state["log_size"] = os.path.getsize(self.folder / "log.jsonl")
        with explain(f"{self.folder}/state.pt: cannot be written"):  # torch has errors of its own
            torch.save(state, self.folder / "state.pt.partial")
        (self.folder / "state.pt.partial").replace(self.folder / "state.pt")

    def is_past(self, stage: str) -> bool:
        """Whether the run was resumed from a later stage than this."""
        return bool(self.state) and STAGES.index(self.state["stage"]) > STAGES.index(stage)

    def restore(self, stage: str, steps: int, parts: dict) -> int:
        """Load the saved states into `parts`; return how many of the stage's `steps` are done: all
        of them, with nothing to load, if the run was resumed from a later stage."""
        if self.is_past(stage):
            return steps
        if self.state.get("stage") != stage:
            return 0
        state, self.state = self.state, {"stage": stage}  # it is large, and needed once
        for name, part in (self.parts | parts).items():
            part.load_state_dict(state[name])
        return state["step"]

    @contextlib.contextmanager
    def heed_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM set `stop`, so that no step is left half-done. A second one ends
        the program, but not within a second of the first, which torchrun passes on as well."""

        def ask_to_stop(number: int, frame) -> None:
            if self.stop and time.monotonic() > self.stop + 1:
                raise KeyboardInterrupt
            self.stop = self.stop or time.monotonic()

        main_thread = threading.current_thread() is threading.main_thread()
        names = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
        before = {name: signal.signal(name, ask_to_stop) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def average(values: Sequence[float], device: str) -> list[float]:
    """Each of some numbers, averaged over all processes."""
    if process_count() == 1:
        return list(values)
    return gather(torch.tensor([values], device=device)).mean(dim=0).tolist()


def average_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Average each gradient over all processes, and return them: the gradients of the joint batch.
    (DistributedDataParallel wants all work in one `forward`; a captioner has two methods.)"""
    gradients = [each.grad for each in parameters if each.grad is not None]
    if process_count() > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= process_count()
    return gradients


def fit(
    stage: str,
    model: nn.Module,
    step: Callable,
    batches: Callable[[int], Iterable],
    steps: int,
    learning_rate: float,
    config: TrainConfig,
    run: Run,
    learner: Learner | None = None,
    validate: Callable[[], dict] | None = None,
) -> None:
    """The loop of every stage: a batch, a loss, a gradient, and an update if all of it is finite.

    `batches(n)` are the batches from the n-th on. `step` takes one, and returns its loss, or those
    of its parts, and what to log. `model` learns by AdamW with a one-cycle learning rate, and the
    network of a `learner`'s regularizer at a rate of its own. Raises what `give_up` does."""
    network = learner.regularizer.network if learner else nn.Identity()
    optimizers = make_optimizers(model, learning_rate, network, config)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizers["model"], learning_rate, max(steps, 2))
    parts = {"model": model, "network": network, "cycle": cycle}
    parts |= {f"optimizer of the {name}": optimizer for name, optimizer in optimizers.items()}
    first = run.restore(stage, steps, parts)

    model.train(stage != "rl")  # RL without dropout: score the policy that was sampled from
    bar = Bar(batches(first), stage, steps, initial=first, disable=process_rank() > 0)
    with run.heed_signals():
        for number, batch in enumerate(bar, first):
            torch.manual_seed(step_seed(config, number))  # draws depend on nothing before
            started = time.monotonic()
            record = update(optimizers, model, network, step, batch, config, run)
            if learner and record["updated"]:
                rehearse(learner, optimizers)
            record["learning_rate"] = cycle.get_last_lr()[0]
            cycle.step()

            stop = record.pop("stop") > 0 or run.notes["failures"] >= 10
            record["seconds"] = time.monotonic() - started
            run.write(stage=stage, step=number, **record)
            show_progress(bar, stage, number, record, config, run, learner)
            last = number + 1 == steps
            due = (number + 1) % config.validate_every == 0 or (last and config.select != "last")
            if validate and due:
                keep_best(model, validate(), stage, number, config, run)
                model.train(stage != "rl")
            if stop or last or (number + 1) % config.save_every == 0:
                run.save(stage, number + 1, parts)
            if stop:
                give_up(stage, number + 1, run)
    model.eval()


def step_seed(config: TrainConfig, number: int) -> int:
    """The seed of a step, a different one in each process."""
    return (config.seed * 1_000_003 + number) * process_count() + process_rank()


def make_optimizers(model: nn.Module, learning_rate: float, network: nn.Module,
                    config: TrainConfig) -> dict[str, torch.optim.Optimizer]:  # fmt: skip
    """AdamW for the trainable weights of the model and, if it has any, a regularizer's network."""
    rates = {"model": learning_rate, "network": config.discriminator_learning_rate}
    optimizers = {}
    for name, module in (("model", model), ("network", network)):
        learned = [weight for weight in module.parameters() if weight.requires_grad]
        if learned:
            options = dict(lr=rates[name], fused=config.device != "mps")
            optimizers[name] = torch.optim.AdamW(learned, **options)
    return optimizers


def update(
    optimizers: dict[str, torch.optim.Optimizer],
    model: nn.Module,
    network: nn.Module,
    step: Callable,
    batch: Batch,
    config: TrainConfig,
    run: Run,
) -> dict[str, float]:
    """One step of all optimizers, or of none if anything is not finite. Returns what to log."""
    # Gradients.
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    losses, record = step(batch)
    total = 0.0
    for loss in [losses] if isinstance(losses, Tensor) else losses:
        loss.backward()
        total += loss.item()
    average_gradients(model.parameters())
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm).item()
    network_norm = nn.utils.get_total_norm(average_gradients(network.parameters())).item()

    # Update, all or nothing.
    record = {"loss": total, **record, "gradient_norm": norm, "network_gradient_norm": network_norm}
    record["stop"] = float(run.stop > 0)
    record = dict(zip(record, average(list(record.values()), config.device)))
    finite = all(math.isfinite(value) for value in record.values())
    for optimizer in optimizers.values() if finite else ():
        optimizer.step()
    notes = run.notes
    notes["failures"] = 0 if finite else notes.get("failures", 0) + 1  # in a row
    notes["skipped"] = notes.get("skipped", 0) + (not finite)  # in all
    return record | {"updated": finite, "skipped_steps": notes["skipped"]}


def rehearse(learner: Learner, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """The further updates of the regularizer's network in a step."""
    for _ in range(learner.method.discriminator_steps - 1):
        loss = learner.regularizer.rehearse(*learner.judged)
        optimizers["network"].zero_grad()
        loss.backward()
        average_gradients(learner.regularizer.network.parameters())
        optimizers["network"].step()


def show_progress(bar: Bar, stage: str, number: int, record: dict, config: TrainConfig, run: Run,
                  learner: Learner | None) -> None:  # fmt: skip
    """Report progress on the bar, in TensorBoard if wanted, and by a few captions now and then."""
    names = ("reward", "discriminator_accuracy", "mean_length", "ground_truth_share")
    shown = {name: record[name] for name in names if name in record} or {"loss": record["loss"]}
    bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
    if run.board:
        for name, value in record.items():
            run.board.add_scalar(f"{stage}/{name}", value, number)
    if learner and config.log_every and (number + 1) % config.log_every == 0:
        rollout, _ = learner.judged
        captions = rollout.captions[: rollout.sizes[0] : learner.method.samples][:3]
        run.write(stage=stage, step=number, captions=captions)
        for caption in captions if run.writes else ():
            put(f"  step {number}: {caption}", sys.stderr)


def keep_best(model: nn.Module, measures: dict, stage: str, number: int, config: TrainConfig,
              run: Run) -> None:  # fmt: skip
    """Log the validation. Remember the weights if they are the best so far by --select."""
    run.write(stage=stage, step=number, validation=measures)
    best = run.notes.get("best", {"value": -math.inf})
    if config.select != "last" and measures[config.select] > best["value"]:
        weights = {name: weight.cpu().clone() for name, weight in model.state_dict().items()}
        value = measures[config.select]
        run.notes["best"] = {"value": value, "step": number, "weights": weights}


def give_up(stage: str, step: int, run: Run) -> None:
    """End a run after a save: UserError after ten steps that were not finite, else as by Ctrl-C."""
    if run.notes["failures"] >= 10:
        changes = {"clip": "another --seed", "tf": "a lower --tf-learning-rate",
                   "discriminator": "a lower --discriminator-learning-rate",
                   "rl": "a lower --learning-rate"}  # fmt: skip
        advice = f"begin again, in another --out, with {changes[stage]}"
        raise UserError(f"{stage}: ten steps in a row were not finite; {advice}")
    if run.writes:
        say(f"stopped after step {step} of {stage}; with --resume the same command goes on")
    raise KeyboardInterrupt


def in_parts(batch: Batch, count: int) -> list[Batch]:
    """A batch as `count` batches of equal size, in order."""
    size = len(batch.ground_truth) // count
    rows = [slice(start, start + size) for start in range(0, count * size, size)]
    return [Batch(batch.index[own], batch.ground_truth[own], batch.pixels[own]) for own in rows]


def join(rollouts: Sequence[Rollout], pad: int) -> Rollout:
    """The rollouts of the parts of a batch, of equal size, as that of the whole batch."""
    kinds, rows, captions, image_index = [], [], [], []
    for number, rollout in enumerate(rollouts):
        kinds += [kind for kind, size in enumerate(rollout.sizes) for _ in range(size)]
        rows += rollout.tokens
        captions += rollout.captions
        image_index.append(rollout.image_index + number * len(rollout.image_embeddings))
    # All sampled captions first, then the human ones, then the greedy ones.
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    padded = nn.utils.rnn.pad_sequence([rows[n] for n in order], True, pad)
    embeddings = torch.cat([rollout.caption_embeddings for rollout in rollouts])[order]
    images = torch.cat([rollout.image_embeddings for rollout in rollouts])
    sizes = tuple(sum(each) for each in zip(*(rollout.sizes for rollout in rollouts)))
    texts = [captions[n] for n in order]
    return Rollout(padded, texts, torch.cat(image_index)[order], embeddings, images, sizes)


def teacher_forcing_in_parts(learner: Learner, count: int, batch: Batch) -> tuple[Iterator, dict]:
    """`Learner.teacher_forcing_step` in the memory that one part of the batch takes."""
    parts = in_parts(batch, count)
    return (learner.teacher_forcing_step(part)[0] / count for part in parts), {}


def reinforce_in_parts(learner: Learner, count: int, batch: Batch) -> tuple[Iterator, dict]:
    """`Learner.reinforce_step` in the memory that one part of the batch takes: all parts roll out,
    their captions are judged as one pool, and then each part is scored by itself."""
    batch = learner.on_device(batch)
    parts = in_parts(batch, count)
    with torch.no_grad():
        encode = learner.captioner.encode
        rollouts = [learner.roll_out(encode(part.pixels), part) for part in parts]
    pool = join(rollouts, learner.captioner.pad)
    advantages, regularizer_loss, record = learner.judge(pool, batch)
    sampled, human = advantages.split(pool.sizes[:2])

    def losses() -> Iterator[Tensor]:
        if regularizer_loss.requires_grad:
            yield regularizer_loss
        for part, rollout, *own in zip(parts, rollouts, sampled.chunk(count), human.chunk(count)):
            yield learner.loss(encode(part.pixels), rollout, torch.cat(own)) / count

    return losses(), record


# ---- 10  Evaluation ------------------------------------------------------------------------------
REFERENCE_METRICS = ("bleu", "rouge", "cider", "meteor", "spice")
CLIP_METRICS = ("clipscore", "retrieval")
METRICS = (*REFERENCE_METRICS, *CLIP_METRICS, "diversity")  # what --metrics takes


class Measures(dict):
    """Measures of a set of captions, by name. `each` has the values of the single captions, for the
    measures that exist for one; the set's is their mean unless `overall` says otherwise."""

    def __init__(self, each: dict[str, list], **overall: float) -> None:
        means = {name: statistics.fmean(values) for name, values in each.items()}
        super().__init__(means | overall)
        self.each = dict(each)

    def add(self, other: Measures) -> None:
        """Add other measures."""
        self.update(other)
        self.each.update(other.each)


def retrieval_ranks(queries: Tensor, targets: Tensor, chunk: int = 256,
                    pools: Tensor | None = None) -> Tensor:  # fmt: skip
    """Rank, from 1, of target n for query n: (N, D), (N, D) -> (N,), without an (N, N) matrix. Ties
    lose: who says one thing of every picture finds none. With `pools` (N, M) only the targets
    pools[n] compete, n among them. UserError for embeddings not finite, which would rank first."""
    if not (queries + targets).isfinite().all():
        raise UserError("CLIP's embeddings are not finite and cannot be ranked; try another --clip")
    # One tensor, made first: many small ones among the large would fragment memory.
    ranks = torch.empty(len(queries), dtype=torch.long, device=queries.device)
    for rows in torch.arange(len(queries), device=queries.device).split(chunk):
        own = similarity_reward(queries[rows], targets[rows])[:, None]
        if pools is None:
            similarity = queries[rows] @ targets.T  # (chunk, N)
        else:
            similarity = torch.einsum("nd,nmd->nm", queries[rows], targets[pools[rows]])
        ranks[rows] = (similarity >= own - 1e-6).sum(dim=1)  # counts the target itself
    return ranks


def retrieval(caption_embeddings: Tensor, image_embeddings: Tensor, bag_size: int = 10,
              seed: int = 0) -> Measures:  # fmt: skip
    """Does the caption find its picture, and the picture its caption? (N, D), (N, D).

    Both ways among all N, the pool: recall at 1, 5 and 10, median and mean reciprocal rank. Text to
    picture also in two smaller pools, comparable between data of different sizes: bag_R@1, the
    picture and the bag_size - 1 most similar to it; rd100_R@1, the picture and 99 random ones."""
    count = len(image_embeddings)
    each, overall = {}, {"pool": count}
    ways = {"text_to_image": retrieval_ranks(caption_embeddings, image_embeddings)}
    ways["image_to_text"] = retrieval_ranks(image_embeddings, caption_embeddings)
    for way, ranks in ways.items():
        ranks = ranks.cpu()  # not every accelerator has float64
        for k in (1, 5, 10):
            each[f"{way}_R@{k}"] = (ranks <= k).int().tolist()
        each[f"{way}_median_rank"] = ranks.tolist()
        each[f"{way}_mrr"] = (1 / ranks.double()).tolist()
        overall[f"{way}_median_rank"] = ranks.median().item()

    # The smaller pools, the picture itself first.
    rows = torch.arange(count, device=image_embeddings.device)
    bags = rows[:, None].repeat(1, min(bag_size, count))  # (N, M)
    for some in rows.split(256):
        bags[some, 1:] = nearest_images(image_embeddings, some, bags.shape[1] - 1)
    # Those that follow a picture in a shuffled circle are a fair draw of the others.
    circle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(rows.device)
    followers = torch.stack([circle.roll(-step) for step in range(min(100, count))], dim=1)
    for name, pools in [("bag_R@1", bags), ("rd100_R@1", followers[circle.argsort()])]:
        ranks = retrieval_ranks(caption_embeddings, image_embeddings, pools=pools)
        each[name] = (ranks == 1).int().tolist()
    return Measures(each, **overall)


def clip_scores(captions: Sequence[str], references: Sequence[Sequence[str]],
                image_embeddings: Tensor, clip: CLIP) -> Measures:  # fmt: skip
    """CLIPScore, 2.5 max(cos, 0) of the picture and "A photo depicts ...", and RefCLIPScore, its
    harmonic mean with the nearest reference's max(cos, 0) (Hessel et al. 2021): (N, D)."""
    embeddings = clip.embed_captions([f"A photo depicts {caption}" for caption in captions])
    scores = 2.5 * similarity_reward(embeddings, image_embeddings).clamp(min=0)

    texts = [f"A photo depicts {text}" for text in itertools.chain(*references)]
    counts = [len(texts) for texts in references]
    human = clip.embed_captions(texts).split(counts)
    cosines = [(some @ own).max() for some, own in zip(human, embeddings)]
    nearest = torch.stack(cosines).clamp(min=0)
    harmonic = 2 * scores * nearest / (scores + nearest).clamp(min=1e-12)
    return Measures({"clip_score": scores.tolist(), "ref_clip_score": harmonic.tolist()})


# Of any machine's locale: METEOR fails where numbers have decimal commas.
JAVA_OPTIONS = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"


def check_java(metrics: Sequence[str], tokenizer: str) -> None:
    """Raise UserError if these need Java and it does not run, or need what was never downloaded."""
    needs = [f"--metrics {metric}" for metric in ("meteor", "spice") if metric in metrics]
    needs += ["--tokenizer ptb"] if tokenizer == "ptb" else []
    if needs:
        what = f"{', '.join(needs)}: needs Java, which does not run here"
        with explain(what, "; install it (openjdk.org), or leave that out"):
            subprocess.run(["java", "-version"], check=True, capture_output=True, timeout=60)
    if "spice" in metrics:
        from pycocoevalcap.spice import spice

        if not list(Path(spice.__file__).parent.glob("lib/stanford-corenlp-*-models.jar")):
            remedy = "run python -m pycocoevalcap.spice.get_stanford_models first"
            raise UserError(f"--metrics spice: its models, 384 MB, are not here; {remedy}")


def ptb_words(texts: Sequence[str]) -> list[str]:
    """Texts as pycocoevalcap's PTBTokenizer makes them, by its own Java program. The class itself
    writes into the installed package, and scores a text with an odd line separator, and all texts
    after it, against the wrong picture. Raises UserError if the program fails."""
    from pycocoevalcap.tokenizer import ptbtokenizer as ptb

    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", *JAVA_OPTIONS.split(), "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    given = "".join(" ".join(text.split()) + "\n" for text in texts)
    coding = dict(encoding="utf-8", errors="replace")
    with explain("--tokenizer ptb: its Java program failed"):
        done = subprocess.run(command, input=given, capture_output=True, check=True, **coding)
        lines = done.stdout.removesuffix("\n").split("\n")
        if len(lines) != len(texts):
            raise ValueError(f"{len(texts)} texts became {len(lines)}")
    words = [[word for word in line.split() if word not in ptb.PUNCTUATIONS] for line in lines]
    return [" ".join(each) for each in words]


def meteor(human: dict, written: dict) -> tuple[float, list[float]]:
    """METEOR by pycocoevalcap. Raises UserError if its Java program fails."""
    from pycocoevalcap.meteor.meteor import Meteor

    options = os.environ.get("JAVA_TOOL_OPTIONS", "")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{options} {JAVA_OPTIONS}"
    scorer = Meteor()
    try:
        with explain("--metrics meteor: its Java program failed"):
            return scorer.compute_score(human, written)
    finally:  # an error leaves it locked, to be waited for at the end, and its pipe broken
        scorer.lock = threading.Lock()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()


def reference_measures(captions: Sequence[str], references: Sequence[Sequence[str]],
                       metrics: Sequence[str] = ("bleu", "rouge", "cider"),
                       tokenizer: str = "regex") -> Measures:  # fmt: skip
    """BLEU-1 to 4, ROUGE-L, CIDEr, METEOR and SPICE, those that are named, by pycocoevalcap.

    Texts are split once for all: by `plain_words`, or as ptb by the Java program that most papers
    use. References without a word do not count."""
    from pycocoevalcap.eval import Bleu, Cider, Rouge, Spice

    texts = [*captions, *itertools.chain(*references)]
    words = iter(ptb_words(texts) if tokenizer == "ptb" else map(plain_words, texts))
    written = {row: [next(words)] for row in range(len(captions))}
    human = {}
    for row, texts in enumerate(references):
        split_texts = [next(words) for _ in texts]
        # U+E000, which is in no caption, stands for references none of which has a word.
        human[row] = [text for text in split_texts if text] or ["\ue000"]

    found = {}  # by name, the score of all together and those of each
    with concurrent.futures.ThreadPoolExecutor(1) as beside:  # METEOR is another process, and slow
        waiting = beside.submit(meteor, human, written) if "meteor" in metrics else None
        if "bleu" in metrics:
            scores = zip(*Bleu(4).compute_score(human, written, verbose=0))
            found |= {f"bleu_{n}": score for n, score in enumerate(scores, 1)}
        if "rouge" in metrics:
            found["rouge_l"] = Rouge().compute_score(human, written)
        if "cider" in metrics:
            found["cider"] = Cider().compute_score(human, written)
        if waiting:
            found["meteor"] = waiting.result()
    if "spice" in metrics:
        with explain("--metrics spice: its Java program failed", "; it wants Java 8 to 15"):
            score, parts = Spice().compute_score(human, written)
        found["spice"] = score, [part["All"]["f"] for part in parts]
    measures = Measures({})
    for name, (score, values) in found.items():
        # Python's own numbers: a state that holds numpy's could not be loaded safely.
        measures[name], measures.each[name] = float(score), list(map(float, values))
    return measures


def self_bleu(captions: Sequence[str]) -> list[float]:
    """BLEU-4 of each caption with all the others as its references (Zhu et al. 2018), which is high
    where captions are much alike. By pycocoevalcap's scorer; of each n-gram the two highest counts
    tell how often some other caption has it, so that time grows with N, not with its square."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer, cook_test, precook

    texts = [plain_words(caption) for caption in captions]
    cooked = [precook(text) for text in texts]  # of each its length and {n-gram: count}
    lengths = Counter(length for length, _ in cooked)
    highest = {}  # of each n-gram, lowest first
    for _, counts in cooked:
        for ngram, count in counts.items():
            highest[ngram] = sorted([*highest.get(ngram, [0, 0]), count])[1:]

    scorer = BleuScorer(n=4)
    for text, (length, counts) in zip(texts, cooked):
        elsewhere = {}
        for ngram, count in counts.items():
            second, first = highest[ngram]
            elsewhere[ngram] = second if count == first else first
        others = [each for each in lengths if each != length or lengths[each] > 1]
        scorer.crefs.append((others or [0], elsewhere))
        scorer.ctest.append(cook_test(text, scorer.crefs[-1]))
    return scorer.compute_score(option="closest")[1][3]


def diversity(captions: Sequence[str]) -> Measures:
    """How much captions differ, and how they are written: mean_length in words; self_bleu;
    repetition, the share with a 3-gram that occurs twice; identical, the share that another picture
    has too; distinct, different captions over captions; vocabulary, different words."""
    words = [plain_words(caption).split() for caption in captions]
    trigrams = [list(zip(each, each[1:], each[2:])) for each in words]
    times = Counter(captions)
    each = {
        "mean_length": [len(caption.split()) for caption in captions],
        "self_bleu": self_bleu(captions),
        "repetition": [int(len(set(each)) < len(each)) for each in trigrams],
        "identical": [int(times[caption] > 1) for caption in captions],
    }
    vocabulary = set().union(*words)
    return Measures(each, distinct=len(times) / len(captions), vocabulary=len(vocabulary))


def measure(captions: Sequence[str], examples: Sequence[Example],
            clips: dict[str, tuple[CLIP, Tensor]], config: EvalConfig) -> Measures:  # fmt: skip
    """The measures that --metrics names of captions[n] for examples[n], and those of the toy world
    for its pictures. `clips`: by name, a CLIP and its embeddings of the images (N, D); the measures
    of several are apart, under their names."""
    references = [example.references for example in examples]
    measures = Measures({})
    for name, (clip, image_embeddings) in clips.items():
        seen = measures
        if len(clips) > 1:
            seen = measures[name] = Measures({})
            measures.each[name] = seen.each
        if "retrieval" in config.metrics:
            embeddings = clip.embed_captions(captions)
            seen.add(retrieval(embeddings, image_embeddings, config.bag_size, config.seed))
        if "clipscore" in config.metrics:
            seen.add(clip_scores(captions, references, image_embeddings, clip))
    if set(REFERENCE_METRICS) & set(config.metrics):
        measures.add(reference_measures(captions, references, config.metrics, config.tokenizer))
    if "diversity" in config.metrics:
        measures.add(diversity(captions))
    scenes = [example.scene for example in examples]
    if all(scenes):
        measures.add(toy_measures(captions, scenes))
    return measures


def evaluate(captions: Sequence[str], examples: Sequence[Example], image_embeddings: Tensor,
             clip: CLIP) -> Measures:  # fmt: skip
    """What `eval` measures by default. Captions, examples and embeddings (N, D) go together."""
    return measure(captions, examples, {"": (clip, image_embeddings)}, EvalConfig())


def read_captions(path: Path, examples: Sequence[Example],
                  left_out: Sequence[Example] = ()) -> list[str]:  # fmt: skip
    """A caption for each example from a file: COCO results (image_id and caption), what
    `read_data` reads, or a folder of .txt files. Raises UserError unless there is exactly one for
    each: a caption beside the wrong picture would show in no number. There may be one for each of
    the examples that were left out."""
    rows = []
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            lines, name = read_text(file).strip().split("\n"), os.path.relpath(file, path)
            rows.append(make_row(str(file), {"file_name": name, "caption": lines}))
    elif path.is_file() and read_text(path).lstrip().startswith("["):
        for number, row in enumerate(parse_json(str(path), read_text(path))):
            where = f"{path}: [{number}]"
            if not isinstance(row, dict) or type(row.get("image_id")) not in (int, str):
                raise UserError(f"{where}: needs an image_id and a caption")
            rows.append(make_row(where, row | {"file_name": str(row["image_id"])}))
    else:
        rows += read_data(path)
    for row in rows:
        missing = all(row.more.get(key) is None for key in CAPTION_KEYS)
        count = 0 if missing else len(row.captions)
        if count != 1:
            raise UserError(f"{path}: {row.name}: {count} captions; eval takes one")
    return pair_captions(path, rows, examples, left_out)


def pair_captions(path: Path, rows: Sequence[Row], examples: Sequence[Example],
                  left_out: Sequence[Example]) -> list[str]:  # fmt: skip
    """The captions of the rows in the order of the examples, by the first kind of name that fits
    all: one picture's id may be another's name. Raises UserError with what is left over."""
    ids, others = ([each.image_id for each in some] for some in (examples, left_out))
    files, other_files = (
        [os.path.abspath(each.image) for each in some] for some in (examples, left_out)
    )
    here = path if path.is_dir() else path.parent  # base names may be equal, whole ones are not

    def place(name: str) -> str:
        return os.path.realpath(here / name)

    kinds = [
        (str, ids, others),
        (os.path.basename, files, other_files),
        (lambda name: Path(name).stem, files, other_files),
        (place, files, other_files),
        (lambda name: os.path.splitext(place(name))[0], files, other_files),
    ]
    faults = []
    for kind, names, other_names in kinds:
        wanted, unwanted = Counter(map(kind, names)), set(map(kind, other_names))
        known = [row for row in rows if kind(row.name) in wanted or kind(row.name) not in unwanted]
        given = Counter(kind(row.name) for row in known)
        left = {
            "without a caption": [name for name in wanted if name not in given],
            "not in the data": [name for name in given if name not in wanted],
            "there twice": [name for name, count in (wanted | given).items() if count > 1],
        }
        if not any(left.values()):
            caption_of = {kind(row.name): row.captions[0] for row in known}
            return [caption_of[name] for name in wanted]
        faults.append(left)

    least = min(faults, key=lambda left: sum(map(len, left.values())))
    texts = []
    for what, names in least.items():
        some = ", ".join([*names[:3], "..."][: len(names)])
        texts += [f"{len(names)} {what} ({some})"] if names else []
    raise UserError(f"{path}: does not match the pictures: {'; '.join(texts)}")


SHARES = ("R@1", "R@5", "R@10", "well_formed", "faithful", "distinct", "repetition", "identical")
LOWER = ("rank", "self_bleu", "repetition", "identical")  # are better
NEITHER = ("pool", "vocabulary", "mean_length")


def flat(measures: dict) -> dict[str, float]:
    """Measures with those of several CLIPs in one row: NAME measure."""
    found = {}
    for name, value in measures.items():
        inner = value if isinstance(value, dict) else {"": value}
        found |= {f"{name} {measure}".strip(): each for measure, each in inner.items()}
    return found


def shown(name: str, value: float) -> str:
    """A measure for people: shares in percent, counts and ranks without needless decimals."""
    if name.endswith(SHARES):
        return f"{value:.1%}"
    if name.endswith(("rank", "pool", "vocabulary")):
        return f"{value:,.1f}".removesuffix(".0")
    return f"{value:.3f}"


def table(columns: dict[str, dict]) -> str:
    """Measures as lines of text, with a column for each mapping; shares are in percent."""
    measures = [flat(each) for each in columns.values()]
    rows = [["", *columns]]
    rows += [[name, *(shown(name, each[name]) for each in measures)] for name in measures[0]]
    width = max(26, *(len(name) for name, *_ in rows))
    lines = [[f"{name:{width}}", *(f"{cell:>10}" for cell in cells)] for name, *cells in rows]
    return "\n".join(map(" ".join, lines))


def read_results(paths: Sequence[str]) -> dict[str, list[dict]]:
    """The measures that `eval --out` wrote, by the results' names. Raises UserError for any other
    file, and for results of different data."""
    about = ("data", "split", "pictures", "digest", "tokenizer", "clip", "bag_size")
    results = [parse_json(path, read_text(Path(path))) for path in paths]
    groups, first = {}, results[0]
    for path, result in zip(paths, results):
        with explain(f"{path}: no results of eval --out"):
            groups.setdefault(str(result["name"]), []).append(flat(result["measures"]))
            differ = [key for key in about if first[key] != result[key]]
            if not (first["clip"] and result["clip"]):  # what both measured needs none
                differ = [key for key in differ if key not in ("clip", "bag_size")]
        if set(differ) & set(about[3:]):  # of the same digest, names for the data may differ
            texts = [f"{key} {first[key]} and {result[key]}" for key in differ]
            raise UserError(f"{paths[0]}, {path}: not to be compared: {'; '.join(texts)}")
    return groups


def results_table(paths: Sequence[str], form: str) -> str:
    """Results of `eval --out` as a table in Markdown or LaTeX: a row for each name, the mean ± the
    standard deviation of its files, the best of each measure in bold."""
    groups = read_results(paths)
    files = [*itertools.chain(*groups.values())]
    names = [name for name in files[0] if all(name in each for each in files)]
    rows = [[heading] for heading in groups]
    for name in names:
        columns = [[each[name] for each in group] for group in groups.values()]
        means = [statistics.fmean(values) for values in columns]
        best = shown(name, min(means) if name.endswith(LOWER) else max(means))
        for row, mean, values in zip(rows, means, columns):
            cell = shown(name, mean)
            bold = cell == best and len(rows) > 1 and not name.endswith(NEITHER)
            if len(values) > 1:
                cell += f" ± {shown(name, statistics.stdev(values))}"
            row.append(f"**{cell}**" if bold else cell)

    escapes = {"|": r"\|"}
    if form == "latex":
        escapes = {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
        escapes |= {letter: f"\\{letter}" for letter in "_%#$&{}"}
    rows.insert(0, ["", *names])
    rows = [[cell.translate(str.maketrans(escapes)) for cell in row] for row in rows]
    if form == "markdown":
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text = "".join(" & ".join(row) + " \\\\\n" for row in rows)
    text = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text).replace("±", r"$\pm$")
    return f"\\begin{{tabular}}{{l{'r' * len(names)}}}\n{text}\\end{{tabular}}"


# ---- 11  Toy world: pictures of two shapes, whose truth is known ---------------------------------
class Scene(NamedTuple):
    """What a picture shows, or what a caption says, where None is what it leaves open."""

    size: str | None
    colour: str | None
    shape: str | None
    relation: str | None  # "and" also leaves the order open
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
    """Whether a caption is well-formed, and says nothing that is false of the scene."""
    if said is None:
        return False
    orders = [seen]
    if said.relation == "and":
        said = said._replace(relation=None)
        orders.append(seen.swapped())
    return any(all(word in (None, true) for word, true in zip(said, order)) for order in orders)


def write_references(scene: Scene, rng: random.Random, count: int = 5,
                     generic: float = 0.88) -> tuple[str, ...]:  # fmt: skip
    """What people might write of a scene: mostly something generic, or else all of it. (The more is
    generic, the more training must find out by itself.)"""
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
        holds = f"more than the {len(scenes)} scenes of the toy world; give less"
        raise UserError(f"--train-size {train_size}, --test-size {test_size}: {holds}")
    examples = []
    for number, scene in enumerate(rng.sample(scenes, train_size + test_size)):
        picture = draw(scene, rng)
        references = write_references(scene, rng)
        examples.append(Example(f"{number:05d}", picture, references, scene=scene))
    return examples[:train_size], examples[train_size:]


def toy_measures(captions: Sequence[str], scenes: Sequence[Scene]) -> Measures:
    """What only a known world can tell, exactly. well_formed: the caption is a sentence of the
    world. faithful: it is true of its scene. oracle_R@1: how often an ideal reader would pick the
    right scene: 1 / number of scenes that it is true of, or 0 if it is not true of its own."""
    said = [parse(caption) for caption in captions]
    faithful = [is_true(each, scene) for each, scene in zip(said, scenes)]
    matches = {each: sum(is_true(each, scene) for scene in scenes) for each in set(said)}
    found = [true / max(matches[each], 1) for true, each in zip(faithful, said)]
    well_formed = [each is not None for each in said]
    return Measures({"well_formed": well_formed, "faithful": faithful, "oracle_R@1": found})


def toy_tokenizer():
    """A BERT tokenizer of the world's words. [SEP] has the highest id: CLIP pools at the argmax."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "[DEC]", *dict.fromkeys(WORDS), "[SEP]"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]")


def toy_captioner(seed: int, device: str = "cpu") -> Captioner:
    """A BLIP of 0.5 million parameters with random weights, for 32-pixel pictures."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    torch.manual_seed(seed)
    tokenizer = toy_tokenizer()
    end = tokenizer.sep_token_id
    size = dict(hidden_size=96, intermediate_size=384, num_attention_heads=3)
    # About 1 / sqrt(width). BLIP's own default for the vision tower, 1e-10, expects loaded weights:
    # trained from scratch, it would stay blind.
    size["initializer_range"] = 0.1
    vision = dict(size, num_hidden_layers=2, image_size=32, patch_size=8)
    text = dict(size, num_hidden_layers=1, encoder_hidden_size=96, max_position_embeddings=32)
    text |= dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=end)
    text |= dict(sep_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))
    image_processor = BlipImageProcessor(size=dict(height=32, width=32))
    return Captioner(model.eval().to(device), image_processor, tokenizer, prompt="")


def toy_clip(folder: Path, examples: Sequence[Example], config: TrainConfig, run: Run,
             width: int = 96) -> CLIP:  # fmt: skip
    """Train an open_clip model of 0.5 million parameters on pictures and alt texts, and save it.
    Its loss is CLIP's own; its texts say more than the references do: all of each scene."""
    import open_clip
    from safetensors.torch import save_model

    tokenizer = toy_tokenizer()
    tower = dict(width=width, layers=2)
    text = dict(tower, heads=3, context_length=22, vocab_size=len(tokenizer))  # 20 words and ends
    vision = dict(tower, head_width=32, image_size=32, patch_size=8, pool_type="avg")
    shape = dict(embed_dim=width, vision_cfg=vision, text_cfg=text | dict(hf_tokenizer_name="toy"))
    if process_rank() == 0:
        tokenizer.save_pretrained(folder)
        settings = {"model_cfg": shape, "preprocess_cfg": {}}
        write_text(folder / "open_clip_config.json", json.dumps(settings, indent=2))
    wait_for_all()

    torch.manual_seed(config.seed)
    model = open_clip.CLIP(**shape, init_logit_scale=math.log(10)).to(config.device)
    for weight in model.visual.transformer.parameters():
        if weight.ndim == 2:  # as in `toy_captioner`; from torch's own it learns more slowly
            nn.init.normal_(weight, std=width**-0.5)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    preprocess = open_clip.image_transform(32, is_train=False)
    pixels = stack_pixels(preprocess, [example.image for example in examples]).to(config.device)
    tokens = tokenize([str(example.scene) for example in examples]).to(config.device)
    encode_tokens = CLIP(model, preprocess, tokenize, config.device).encode_tokens
    contrastive_loss = open_clip.ClipLoss()

    def step(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, dict[str, float]]:
        rows = [row for row, _ in pairs]
        images = model.encode_image(pixels[rows], normalize=True)
        texts = encode_tokens(tokens[rows])
        return contrastive_loss(images, texts, model.logit_scale.exp()), {}

    # Each process learns from all of each batch: they make the same CLIP.
    batches = schedule(examples, min(128, len(examples)), config.clip_steps, config.seed)
    fit("clip", model, step, lambda first: batches[first:], len(batches), 2e-3, config, run)
    if process_rank() == 0 and not run.is_past("clip"):  # then it is there already
        save_model(model, str(folder / "open_clip_model.safetensors"))
    wait_for_all()
    return CLIP.load(str(folder), config.device)


# ---- 12  Command line ----------------------------------------------------------------------------
# fmt: off
@dataclasses.dataclass(frozen=True)
class Decoding:
    """Models, and how captions are decoded: the settings that every verb has."""
    captioner: str | None = flag("Salesforce/blip-image-captioning-base", "Hugging Face Hub name, "
                                 "folder, or run folder of distcap train", group="models")
    clip: str | None = flag(None, "open_clip NAME/TAG, hf-hub:NAME, folder or run folder; if not "
                            "given, the CLIP the captioner was trained with, or ViT-B-32/openai")
    prompt: str | None = flag(None, "words to continue; if not given, as the captioner was trained")
    beams: int = flag(1, "beams of the search; 1: greedy decoding", number(1), group="decoding")
    max_length: int = flag(20, "longest caption, in tokens", number(1))
    batch_size: int = flag(64, "pictures in a batch", number(1), group="computing")
    workers: int = flag(2, "processes that read pictures ahead", number(0), group="computing")
    precision: str = flag("fp32", "arithmetic of the captioner", ("fp32", "bf16"))
    device: str = flag("auto", "cpu, cuda, cuda:1, mps, or auto: the best there is")
    seed: int = flag(0, "seed of all random numbers", number(0, 2**32 - 1))


@dataclasses.dataclass(frozen=True)
class TrainConfig(Method, Decoding):
    """Train a captioner, and measure what that changed.

    examples:
      distcap train
      distcap train --recipe clip-scst --out runs/hacked
      distcap train dataset_coco.json --images coco/ --precision bf16"""
    data: str = flag("toy", "folder or file of pictures with captions, in one of the README's "
                     "forms; or toy, a built-in world with a tiny captioner and CLIP of its own",
                     nargs="?", group="data")
    images: str | None = flag(None, "folder of the pictures, if they are not beside the file")
    train_split: str | None = flag(None, "learn from this split, or from the pictures that this "
                                   "file lists; if not given, from train and restval")
    validation: str | None = flag(None, "other data to validate on; else the split val, or a tenth")
    test: str | None = flag(None, "other data to test on; else the split test, or a tenth")
    train_size: int | None = flag(None, "learn from at most N pictures", number(1))
    test_size: int = flag(1000, "hold out at most N pictures, and at most a tenth, to test on; and "
                          "as many to validate on", number(1))
    strict: bool = flag(False, "refuse data with missing pictures or captions")
    recipe: str = flag("distinctive", f"settings of a published method, which other flags "
                       f"override; one of {', '.join(RECIPES)}", tuple(RECIPES),
                       group="method (equations as in the README)")
    tf_steps: int = flag(0, "steps of teacher forcing, first", number(0), group="training")
    tf_learning_rate: float = flag(1e-5, "peak learning rate of teacher forcing", WEIGHT)
    steps: int = flag(10_000, "steps of reinforcement learning", number(0))
    learning_rate: float = flag(1e-6, "peak learning rate of reinforcement learning", WEIGHT)
    discriminator_learning_rate: float = flag(
        7e-5, "learning rate of the regularizer's network: discriminator or grammar", WEIGHT)
    pretrain_discriminator: int = flag(0, "steps in which that network learns alone", number(0))
    max_gradient_norm: float = flag(1.0, "the gradient is clipped to this norm", WEIGHT)
    freeze_vision: bool = flag(False, "do not train the vision tower")
    train_only: str | None = flag(None, "train only the parameters in whose names this regular "
                                  "expression finds something, as lm_head|layers.1[0-9]")
    validate_every: int = flag(1000, "steps between validations", number(1))
    select: str = flag("last", "keep the last weights, or the best of validation by this measure",
                       ("last", "reward", "cider", "text_to_image_R@1", "oracle_R@1"))
    clip_steps: int = flag(400, "steps in which the toy world's CLIP is trained", number(1))
    out: str | None = flag(None, "run folder; else runs/ and the data's name", group="run folder")
    resume: bool = flag(False, "continue the run in that folder, if there is one")
    save_every: int = flag(500, "steps between saves of what --resume continues from", number(1))
    log_every: int = flag(0, "print three sampled captions every N steps; 0: never", number(0))
    tensorboard: bool = flag(False, "log to TensorBoard too, in the run folder")
    accumulate: int = flag(1, "batches in a step, all competing", number(1), group="computing")
    gradient_checkpointing: bool = flag(False, "less memory for the vision tower, more time")


@dataclasses.dataclass(frozen=True)
class CaptionConfig(Decoding):
    """Write captions of pictures, a line each.

    examples:
      distcap caption photos/
      distcap caption photos/ --samples 8 --rerank --out captions.csv
      find . -name '*.jpg' -print0 | distcap caption - --null"""
    paths: tuple[str, ...] = flag((), "pictures, folders of pictures, or - for a list of them on "
                                  "standard input", nargs="+", group="pictures")
    recursive: bool = flag(True, "search the folders within folders")
    null: bool = flag(False, "the listed names end in null characters, as find -print0 writes them")
    shard: tuple[int, int] | None = flag(None, "2/4: the second of four parts; with --out, the "
                                         "same command without --shard joins the parts", shard_of)
    out: str | None = flag(None, "write or continue this .jsonl, .csv or .html", group="output")
    sidecar: str | None = flag(None, "write a file beside each picture", (".txt", ".caption"))
    json: bool = flag(False, "print a JSON object a line, for failures too")
    overwrite: bool = flag(False, "caption again what has a caption in --out or --sidecar")
    prefix: str = flag("", "text before each caption")
    suffix: str = flag("", "text after each caption")
    scores: bool = flag(False, "add CLIP's cosine, the rank of the picture among all by CLIP, the "
                        "contrastive reward (Eq. 6) and the mean log-probability of the tokens")
    quiet: bool = flag(False, "report only failures on standard error")
    beams: int = flag(3, "beams of the search; 1: greedy decoding", number(1), group="decoding")
    samples: int = flag(0, "sample N captions of each picture; 0: search for one", number(0))
    temperature: float = flag(0.7, "of samples: the lower, the closer to the likeliest words",
                              number(0.01, kind=float))
    top_p: float = flag(1.0, "sample from the likeliest tokens with this probability in all",
                        number(0, 1, float))
    rerank: bool = flag(False, "keep the sample (of 8, unless --samples is given) by which CLIP "
                        "best tells the picture from the others")
    min_length: int | None = flag(None, "shortest caption, in tokens; if not given, 5 including "
                                  "the prompt, as BLIP counts", number(0))
    max_length: int | None = flag(None, "longest caption, in tokens; if not given, 20 including "
                                  "the prompt, as BLIP counts", number(1))
    repetition_penalty: float = flag(1.0, "above 1, words are less likely to be repeated",
                                     number(0.01, kind=float))
    no_repeat_ngram_size: int = flag(0, "never repeat N tokens in a row; 0: allowed", number(0))
    batch_size: int = flag(16, "pictures in a batch", number(1), group="computing")


@dataclasses.dataclass(frozen=True)
class EvalConfig(Decoding):
    """Measure captions, or put results in a table.

    examples:
      distcap eval runs/toy/test --captioner runs/toy
      distcap eval dataset_coco.json --split test --captions mine.jsonl
      distcap eval --table first.json second.json --format latex"""
    data: str | None = flag(None, "pictures with captions, as for train", nargs="?", group="data")
    images: str | None = flag(None, "folder of the pictures, if they are not beside the file")
    split: str | None = flag(None, "a split, or a file that lists pictures; if not given, the "
                             "split test, or all if there is none")
    captions: str | None = flag(None, "measure these instead of a captioner's: COCO results, "
                                ".jsonl, .csv, or a folder of .txt files", group="measures")
    metrics: Sequence[str] = flag(
        ("bleu", "rouge", "cider", "retrieval", "diversity"), f"some of {' '.join(METRICS)}",
        METRICS, nargs="+", action="extend")
    tokenizer: str = flag("regex", "what splits captions into words: a regular expression, or as "
                          "in most papers ptb, which needs Java", ("regex", "ptb"))
    bag_size: int = flag(10, "pictures among which bag_R@1 looks for the right one", number(2))
    out: str | None = flag(None, "write the measures to this .json file, each picture's to "
                           ".each.jsonl beside it, and captions to .captions.json", group="output")
    name: str | None = flag(None, "name of the row in tables, the same for all seeds; if not "
                            "given, that of the captioner or the captions")
    table: Sequence[str] | None = flag(None, "put results that --out wrote in a table", nargs="+",
                                       action="extend")
    format: str = flag("markdown", "form of the table", ("markdown", "latex"))
    clip: Sequence[str] | None = flag(
        None, "one or more CLIPs, named as for train; if not given, the one that the captioner "
        "was trained with, or ViT-B-32/openai", nargs="+", action="extend", group="models")
    min_length: int = flag(0, "shortest caption, in tokens", number(0), group="decoding")


# What stands in results beside the measures: how captions were written, and whose versions.
DECODING = ["captioner", "prompt", "beams", "min_length", "max_length", "precision"]
PACKAGES = ("torch", "transformers", "open_clip_torch", "pycocoevalcap")

# What the toy world changes; everything else is as for photographs.
TOY = dict(captioner=None, similarity_weight=0.99, ground_truth_weight=2.0, tf_steps=600,
           tf_learning_rate=2e-3, steps=250, learning_rate=1e-3,
           discriminator_learning_rate=1e-3, validate_every=50, train_size=8000, workers=0)
# fmt: on


def train(config: TrainConfig) -> None:
    """`distcap train`: see TrainConfig. Mistakes are found before anything slow begins."""
    skipped: list[Skipped] = []
    sets = toy_sets(config) if config.data == "toy" else split(config, skipped)
    training, validation, test = sets
    check_size(training, config)
    if config.captioner:
        config = dataclasses.replace(config, clip=clip_name(config))
    captioner, clip = load_models(config, with_clip=bool(config.captioner))
    out = open_run_folder(config)
    run = Run(out, config.resume, config.tensorboard)
    clip = clip or toy_clip(out / "clip", training, config, run)

    # Look at every picture, now rather than in the middle of training.
    named = zip(("training", "validation", "test"), sets)
    digests = {} if config.data == "toy" else tell_same_bytes(dict(named))
    training, embeddings = examine(training, clip, config, skipped, digests, config.uses_images)
    validation, validation_embeddings = examine(validation, clip, config, skipped, digests)
    test, test_embeddings = examine(test, clip, config, skipped, digests)
    tell_skipped(out, skipped, config)
    check_size(training, config)
    if run.writes:
        write_examples(out / "validation", validation)
        write_examples(out / "test", test)
        if config.data != "toy":
            names = [f"{os.path.realpath(example.image)}\n" for example in training]
            write_text(out / "training.txt", "".join(names), "surrogateescape")

    learner = Learner(captioner, clip, config, config.max_length)
    learner.image_embeddings = embeddings

    def validate() -> dict[str, float]:
        captions = caption_all(captioner, [each.image for each in validation], config)
        rows = torch.arange(len(captions), device=validation_embeddings.device)
        written = clip.embed_captions(captions)
        rewards = contrastive_reward(written, validation_embeddings, rows, clip.logit_scale)
        measures = evaluate(captions, validation, validation_embeddings, clip)
        return {"reward": rewards.mean().item()} | measures

    captions = learn(learner, training, test, config, run, validate)
    if run.writes:
        results = {}
        for row, texts in captions.items():
            results[row] = evaluate(texts, test, test_embeddings, clip)
        finish(out, captioner, results, captions, test, config)
    wait_for_all()


def toy_sets(config: TrainConfig) -> tuple[list[Example], list[Example], list[Example]]:
    """Training, validation and test examples of the toy world. No scene is in two of them."""
    training, test = toy_world(config.seed, config.train_size, config.test_size)
    seen = {example.scene for example in (*training, *test)}
    others = toy_world(config.seed + 2**32, 0, 2 * min(config.test_size, 200))[1]
    unseen = [example for example in others if example.scene not in seen]
    if not unseen:
        sizes = f"--train-size {config.train_size}, --test-size {config.test_size}"
        raise UserError(f"{sizes}: leave no scene of the toy world to validate on; change one")
    return training, unseen[: min(config.test_size, 200)], test


def split(config: TrainConfig, skipped: list[Skipped]) -> tuple[list, list, list]:
    """Training, validation and test examples of a data set: its own splits, or else pictures held
    out by a rule that depends on their ids alone, and on no seed."""

    def chance(example: Example) -> str:
        name = example.image_id.encode("utf-8", "surrogateescape")
        return hashlib.sha256(name).hexdigest()

    examples = read_examples(config.data, config.images, skipped=skipped)
    names = {example.split for example in examples}
    if config.train_split:
        training = choose_split(config.data, examples, config.train_split, skipped)
    else:
        training = [each for each in examples if each.split in ("train", "restval", None)]
        if (unused := names - {"train", "restval", None, "val", "test"}) and process_rank() == 0:
            say(f"{config.data}: its splits {', '.join(sorted(unused))} are not used")
    count = max(min(config.test_size, len(training) // 10), 1)
    held_out = {}
    for name, data in (("test", config.test), ("val", config.validation)):
        if data:
            held_out[name] = read_examples(data, config.images, skipped=skipped, usual=name)
        elif name in names:
            held_out[name] = [each for each in examples if each.split == name]
        else:
            training = sorted(training, key=chance)
            held_out[name], training = training[:count], training[count:]

    # No picture is both learned from and tested on, whatever the data say.
    used = {os.path.realpath(each.image) for part in held_out.values() for each in part}
    kept = [each for each in training if os.path.realpath(each.image) not in used]
    if len(kept) < len(training):
        shared = [each for each in training if os.path.realpath(each.image) in used]
        skipped += [Skipped(str(each.image), "also held out") for each in shared]
    if not kept:
        known = ", ".join(sorted(name for name in names if name)) or "none"
        has = f"its splits: {known}; name one by --train-split"
        raise UserError(f"{config.data}: no picture is left to learn from ({has})")
    if config.normalize:
        kept = [normalized for each in kept if (normalized := normalize_references(each, skipped))]
    return kept[: config.train_size], held_out["val"], held_out["test"]


def tell_same_bytes(parts: dict[str, Sequence[Example]]) -> dict[Path, bytes]:
    """Warn of pictures that are copies of one another, as they often are by mistake. Returns the
    digests of all."""
    part_of = {each.image: name for name, examples in parts.items() for each in examples}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = dict(zip(part_of, pool.map(file_digest, part_of)))
    first: dict[bytes, Path] = {}
    copies = []
    for image, digest in digests.items():
        earlier = first.setdefault(digest, image)
        if earlier != image:
            copies.append(f"{image} ({part_of[image]}) and {earlier} ({part_of[earlier]})")
    if copies and process_rank() == 0:
        what = f"{len(copies)} pictures have the same bytes as another: {copies[0]}"
        say(what + ", ..." * (len(copies) > 1))
    return digests


def normalize_references(example: Example, skipped: list[Skipped]) -> Example | None:
    """An example to learn from, its references normalized; None if they were all punctuation."""
    references = [normalize_caption(text) for text in example.references]
    if not all(references):
        skipped.append(Skipped(str(example.image), "a caption without words"))
    words = tuple(filter(None, references))
    return dataclasses.replace(example, references=words) if words else None


def check_size(training: Sequence[Example], config: TrainConfig) -> None:
    """Raise UserError if there are fewer training examples than a step needs."""
    batch = config.batch_size * config.accumulate * process_count()
    if len(training) < max(batch, config.neighbours + 1):
        few = f"a step takes {batch}, of only {len(training)} training examples; give less"
        raise UserError(f"--batch-size, --accumulate, --neighbours: {few}")


# What may differ between a run and its continuation.
FREE = ("resume", "strict", "workers", "device", "save_every", "log_every", "tensorboard")


def open_run_folder(config: TrainConfig) -> Path:
    """Make the run folder, with the settings in its config.json. Raises UserError if there is a run
    that is not to be resumed, was made with other settings, or is complete, or anything else."""
    out = Path(config.out or f"runs/{Path(config.data).resolve().stem}")
    path = out / "config.json"
    if out.exists() and not path.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is no run folder; give another folder with --out")
    if path.exists() and not config.resume:
        advice = "go on with it by --resume, remove it, or give another folder with --out"
        raise UserError(f"{out}: already exists; {advice}")
    settings = dataclasses.asdict(config) | {"processes": process_count()}
    if path.exists():
        with explain(f"{path}: cannot be read"):
            earlier = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name not in FREE and earlier.get(name) != value:
                wrong = f"--{name.replace('_', '-')}".replace("--processes", "--nproc-per-node")
                was = f"the run began with {earlier.get(name)}; give the same command"
                raise UserError(f"{wrong} {value}: {was}")
        if (out / "results.json").exists():
            raise UserError(f"{out}: this run is complete; nothing to resume")
    wait_for_all()  # or another process would find what this one makes
    if process_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
    wait_for_all()
    return out


def examine(examples: list[Example], clip: CLIP, config: TrainConfig, skipped: list[Skipped],
            digests: dict[Path, bytes], needed: bool = True) -> tuple[list, Tensor]:  # fmt: skip
    """The examples whose pictures can be read, and the embeddings (N, D) of these pictures: zeros
    if they are not `needed`, though every picture is read all the same."""
    images = [example.image for example in examples]
    failures: list[tuple[int, UserError]] = []
    if needed:
        embeddings = embed_cached(clip, images, config.workers, failures, digests)
    else:
        batches = PictureBatches(own_share(images), [], 64, clip.side)
        order = range(len(batches)) if isinstance(images[0], Path) else ()
        read = []
        for batch in read_ahead(batches, order, config.workers):
            read += batch.failures
        failures = [(n, each) for n, each in enumerate(put_together(read)) if each]
        width = clip.embed_captions(["a"]).shape[1]
        embeddings = torch.zeros(1, width, device=clip.device).expand(len(images), -1)
    bad = dict(failures)
    skipped += unread(images, failures)
    good = [example for n, example in enumerate(examples) if n not in bad]
    if not good:
        reason = failures[0][1] if failures else "there are none"
        raise UserError(f"none of {len(examples)} pictures can be read: {reason}")
    return good, embeddings[: len(good)]


def unread(images: Sequence, failures: Sequence[tuple[int, UserError]]) -> list[Skipped]:
    """What to say of pictures that cannot be read."""
    named = [(str(images[number]), str(error)) for number, error in failures]
    return [Skipped(name, text.removeprefix(f"{name}: ")) for name, text in named]


def embed_cached(clip: CLIP, images: list, workers: int, failures: list,
                 digests: dict[Path, bytes]) -> Tensor:  # fmt: skip
    """`CLIP.embed_images`, from a cache if the same pictures, by their `digests`, were embedded by
    the same weights before. Pictures in memory are always embedded anew."""
    if not all(isinstance(image, Path) for image in images):
        return clip.embed_images(images, workers)
    key = hashlib.sha256(clip.digest + b"".join(digests[image] for image in images))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "distcap")
    path = folder / f"{key.hexdigest()}.pt"
    found = None
    with contextlib.suppress(Exception):  # whatever is wrong with it, it can be made again
        saved = torch.load(path, map_location=clip.device, weights_only=True)
        reasons = [(n, UserError(reason)) for n, reason in saved["failures"]]
        found = saved["embeddings"], reasons
    if all(put_together([found is not None])):  # every process has it, or all work together
        failures += found[1]
        return found[0]
    embeddings = clip.embed_images(images, workers, failures)
    if process_rank() == 0:
        with contextlib.suppress(OSError):  # no room for it, or no permission
            folder.mkdir(parents=True, exist_ok=True)
            reasons = [(n, str(error)) for n, error in failures]
            torch.save({"embeddings": embeddings, "failures": reasons}, f"{path}.partial")
            Path(f"{path}.partial").replace(path)
    return embeddings


def file_digest(path: Path) -> bytes:
    """A hash of a file's bytes; of its name, if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
        return digest.digest()
    return hashlib.sha256(os.fsencode(path)).digest()


def tell_skipped(out: Path, skipped: Sequence[Skipped], config: TrainConfig) -> None:
    """Say what of the data is not used, and list it in the run folder. UserError if --strict."""
    if not skipped:
        return
    first = f"{skipped[0].name}: {skipped[0].reason}"
    if config.strict:
        if process_rank() == 0 and not config.resume:
            shutil.rmtree(out)  # made a moment ago; the same command would find it next time
        raise UserError(f"--strict: {len(skipped)} faults in the data, the first: {first}")
    if process_rank() == 0:
        lines = [json.dumps({"name": name, "reason": reason}) for name, reason, _ in skipped]
        write_text(out / "skipped.jsonl", "".join(f"{line}\n" for line in lines))
        listed = f"listed in {out}/skipped.jsonl; the first: {first}"
        say(f"left out {len(skipped)} pictures or captions, {listed}")


def learn(learner: Learner, training: Sequence[Example], test: Sequence[Example],
          config: TrainConfig, run: Run, validate: Callable) -> dict[str, list[str]]:  # fmt: skip
    """Teacher forcing (Eq. 1), then reinforcement learning (Eq. 2 to 10). Returns captions of the
    test pictures before and after RL; with `--objective tf`, before and after teacher forcing."""
    captioner, count = learner.captioner, config.accumulate
    images = [example.image for example in test]
    dataset = CaptionDataset(training, captioner.pixels, captioner.side)
    run.parts["captioner"] = captioner.model
    if config.freeze_vision:
        captioner.vision.requires_grad_(False)
    if config.gradient_checkpointing:
        captioner.checkpoint_vision()

    def stage(name: str, model: nn.Module, step: Callable, steps: int, rate: float,
              **options) -> None:  # fmt: skip
        size = config.batch_size * count
        joint = schedule(training, size * process_count(), steps, config.seed)
        order = [pairs[process_rank() * size :][:size] for pairs in joint]

        def batches(first: int) -> Iterator[Batch]:
            return read_ahead(dataset, order[first:], config.workers)

        fit(name, model, step, batches, steps, rate, config, run, **options)

    def remember_before() -> None:
        if "before" not in run.notes:  # after a resumption they are there already
            run.notes["before"] = caption_all(captioner, images, config)

    tf_step, rl_step = learner.teacher_forcing_step, learner.reinforce_step
    if count > 1:
        tf_step = functools.partial(teacher_forcing_in_parts, learner, count)
        rl_step = functools.partial(reinforce_in_parts, learner, count)
    if config.objective == "tf":
        remember_before()
        rate = config.tf_learning_rate
        stage("tf", captioner.model, tf_step, config.tf_steps, rate, validate=validate)
    else:
        stage("tf", captioner.model, tf_step, config.tf_steps, config.tf_learning_rate)
        remember_before()
        prepare_reinforcement(learner, training, config)
        if config.regularizer == "paced":  # to be saved with the run
            learner.regularizer.shown = run.notes.setdefault("shown", [])
        if steps := config.pretrain_discriminator:
            network, rate = learner.regularizer.network, config.discriminator_learning_rate
            stage("discriminator", network, learner.discriminator_step, steps, rate)
        options = dict(learner=learner, validate=validate)
        stage("rl", captioner.model, rl_step, config.steps, config.learning_rate, **options)
    if "best" in run.notes:
        captioner.model.load_state_dict(run.notes["best"]["weights"])
    return {"before": run.notes["before"], "after": caption_all(captioner, images, config)}


def prepare_reinforcement(learner: Learner, training: Sequence[Example], config: TrainConfig):
    """Embed the training pictures, if they are not yet, once for all epochs. Make the regularizer,
    which may compare with the captioner as it is now."""
    if learner.image_embeddings is None:
        images = [example.image for example in training]
        learner.image_embeddings = learner.clip.embed_images(images, config.workers)  # (N, D)
    torch.manual_seed(config.seed)
    learner.regularizer = make_regularizer(learner, [each.references for each in training])
    if isinstance(learner.regularizer, KL):  # its captioner is saved with the rest, not learned
        learner.regularizer.network = learner.regularizer.initial.model.requires_grad_(False)
        learner.regularizer.parts = config.accumulate
    learner.regularizer.network.to(config.device)


def finish(
    out: Path,
    captioner: Captioner,
    results: dict[str, dict[str, float]],
    captions: dict[str, list[str]],
    test: Sequence[Example],
    config: TrainConfig,
) -> None:
    """Write what a run leaves: the captioner with a model card, captions.json in COCO's form,
    report.html and results.json. Print the table and a few captions."""
    partial = out / "captioner.partial"
    captioner.save(partial)
    about = dict(split="test", images=len(test), seed=config.seed, beams=config.beams)
    about |= dict(max_length=config.max_length, versions={name: version(name) for name in PACKAGES})
    write_text(partial / "README.md", model_card(results["after"], about, config))
    shutil.rmtree(out / "captioner", ignore_errors=True)
    partial.replace(out / "captioner")
    write_text(out / "captions.json", coco_results(test, captions["after"]))
    write_report(out, results, captions, test)
    write_text(out / "results.json", json.dumps(results | about, indent=2) + "\n")
    (out / "state.pt").unlink(missing_ok=True)  # large, and of no more use

    print(table(results))
    for example, before, after in zip(test[:6], captions["before"], captions["after"]):
        print(f"\n{example.image_id}\n  before  {before}\n  after   {after}")


def model_card(measures: dict[str, float], about: dict, config: TrainConfig) -> str:
    """What the Hugging Face Hub shows of a captioner, as Markdown."""
    usual = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    toy = TOY if config.data == "toy" else {}
    usual |= toy | RECIPES[config.recipe]  # as `parse_arguments` presets it
    left_out = {"data", "out", *FREE, *ignored_flags(config)}
    command = ["distcap", "train", config.data]
    for name, value in vars(config).items():
        if value not in (usual[name], None) and name not in left_out:
            text = name.replace("_", "-")
            switch = f"--{text}" if value else f"--no-{text}"
            command += [switch] if isinstance(value, bool) else [f"--{text}", str(value)]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in measures.items())
    return f"""---
library_name: transformers
pipeline_tag: image-to-text
tags: [image-captioning, reinforcement-learning, distcap]
---
# An image captioner, trained by distcap

`{shlex.join(command)}`

On {about["images"]} pictures of the test split:

| | |
|---|---|
{rows}

{versions}
"""


class Written(NamedTuple):
    """The outcome for one picture: its captions with their scores, or why there are none."""

    captions: list[str]
    failure: UserError | None
    scores: dict[str, list[float]]
    thumbnail: str = ""


def write_captions(captioner: Captioner, images: Sequence[Path | Image.Image], config: Decoding,
                   write: Callable, clip: CLIP | None = None, wanted: Sequence[int] | None = None,
                   thumbnails: bool = False) -> Iterator[Written]:  # fmt: skip
    """The captions of each image, or of those whose numbers are `wanted`, in order. `write` makes
    tokens (K*B, P + T) from features and pixels. With a `clip`, all images compete."""
    size, quiet = config.batch_size, getattr(config, "quiet", False)
    wanted = range(len(images)) if wanted is None else wanted
    pool, unread = None, []
    if clip:
        pool = clip.embed_images(images, config.workers, unread, quiet)  # (N, D)
    absent = dict(unread)
    readable = [number for number in range(len(images)) if number not in absent]
    pool_row = {number: row for row, number in enumerate(readable)}
    side = max(captioner.side, 120 if thumbnails else 0)
    chosen = [images[number] for number in wanted]
    batches = PictureBatches(chosen, [captioner.pixels], size, side, thumbnails)
    numbers = iter(wanted)
    with Bar(total=len(wanted), desc="caption", disable=quiet) as bar:
        for batch in read_ahead(batches, range(len(batches)), config.workers):
            good = [number for failure, number in zip(batch.failures, numbers) if not failure]

            def work(some: slice, good=good, pixels=batch.pixels) -> list[Written]:
                index = [pool_row.get(number, 0) for number in good[some]]
                with torch.no_grad():
                    return write_batch(pixels[0][some], index, captioner, config, write, clip, pool)

            written, size = halving(work, [images[number] for number in good], size)
            results = iter(zip(written, batch.thumbnails))
            for failure in batch.failures:
                if failure:
                    yield Written([], failure, {})
                else:
                    result, small = next(results)
                    yield result._replace(thumbnail=small)
                bar.update()


# How errors speak of too little memory: on the CPU, torch raises a plain RuntimeError.
SCARCE = re.compile("MemoryError|out of memory|not enough memory|can't allocate memory")


def halving(work: Callable, images: Sequence, size: int) -> tuple[list[Written], int]:
    """What `work` writes of the images, given slices of `size` of them, and of half as many each
    time that memory does not suffice; and the size that did."""
    written: list[Written] = []
    while len(written) < len(images):
        try:
            written += work(slice(len(written), len(written) + size))
        except (MemoryError, RuntimeError) as error:
            if not SCARCE.search(repr(error)):
                raise
            if size == 1:
                alone = "not enough memory for it, even alone; try --precision bf16"
                failure = UserError(f"{images[len(written)]}: {alone}")
                written.append(Written([], failure, {}))
                continue
            size //= 2
            say(f"not enough memory; going on with --batch-size {size}")
    return written, size


def write_batch(pixels: Tensor, index: Sequence[int], captioner: Captioner, config: Decoding,
                write: Callable, clip: CLIP | None, pool: Tensor | None) -> list:  # fmt: skip
    """The captions of a batch (B, 3, height, width) that are not empty. With a `clip`, all pictures
    of the call, `pool` (N, D), compete; the batch's are its rows `index` (B,)."""
    features = captioner.encode(pixels)  # (B, L, H)
    tokens = write(features, pixels)  # (K*B, P + T)
    captions = captioner.decode(tokens)
    count = len(captions) // len(features)
    own = torch.arange(len(features), device=tokens.device).repeat_interleave(count)  # (K*B,)
    scores, kept = {}, range(len(captions))
    if clip:
        pool_index = torch.tensor(index, device=pool.device)
        scores = caption_scores(captions, clip, pool, pool_index[own])
    if clip and config.rerank:
        kept, count = rerank(captions, scores["reward"], count), 1
    if clip and config.scores:
        words, mask = captioner.log_probs(features, tokens, own)
        scores["log_p"] = caption_log_probs(words, mask, None)
    else:
        scores = {}

    written = []
    for group in batched(kept, count):
        group = [place for place in group if captions[place]]
        known = {}
        for key, each in scores.items():
            known[key] = [round(value, 4) for value in each[group].tolist()]
        written.append(Written([captions[place] for place in group], None, known))
    return written


def caption_scores(captions: Sequence[str], clip: CLIP, image_embeddings: Tensor,
                   image_index: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """CLIP's scores of captions, each of the image `image_index` of the images (N, D): (C,) each.
    The cosine; the rank of its image among all, from 1, where ties lose; and the reward of Eq. 6,
    for which all N images and all C captions compete."""
    embeddings = clip.embed_captions(captions)
    similarity = embeddings @ image_embeddings.T  # (C, N)
    cosine = similarity.gather(1, image_index[:, None])
    rank = (similarity >= cosine - 1e-6).sum(dim=1)
    reward = contrastive_reward(embeddings, image_embeddings, image_index, clip.logit_scale)
    return {"cosine": cosine.squeeze(1), "rank": rank, "reward": reward}


def rerank(captions: Sequence[str], rewards: Tensor, count: int) -> list[int]:
    """Of the `count` captions of each image, the place of the best one that is not empty."""
    empty = torch.tensor([not caption for caption in captions], device=rewards.device)
    best = rewards.masked_fill(empty, -torch.inf).view(-1, count).argmax(dim=1)
    return [row * count + place for row, place in enumerate(best.tolist())]


def sample_by_picture(captioner: Captioner, features: Tensor, pixels: Tensor, max_length: int,
                      count: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
                      **limits) -> Tensor:  # fmt: skip
    """Draw `count` captions of each picture: (B, L, H), (B, 3, height, width) -> (K*B, P + T).

    Random numbers come from a hash of a picture's pixels: it gets the same captions whatever its
    name, place and batch. Each token takes one, where its cumulative distribution reaches it."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    uniform = []
    for picture in pixels:
        values = picture if isinstance(picture, Tensor) else picture["pixel_values"]
        data = values.float().cpu().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(data, seed))
        uniform.append(torch.rand(count, max_length, generator=generator))
    columns = iter(torch.cat(uniform).to(captioner.model.device).T)  # each (K*B,)

    def draw(tokens: Tensor, logits: Tensor) -> Tensor:  # (K*B, V)
        reached = logits.float().softmax(dim=1).cumsum(dim=1)
        level = next(columns)[:, None] * reached[:, -1:]
        chosen = torch.searchsorted(reached, level, right=True).clamp(max=logits.shape[1] - 1)
        return torch.full_like(logits, -torch.inf).scatter(1, chosen, 0.0)

    steps = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), draw]
    return captioner.search(features, max_length, count=count, logits_processor=steps, **limits)


def caption_all(captioner: Captioner, images: Sequence, config: Decoding, **limits) -> list[str]:
    """One caption of each picture, by search; each of several processes writes a share. Raises
    UserError for a picture that cannot be read."""
    options = dict(max_length=config.max_length, beams=config.beams) | limits

    def search(features: Tensor, _: Tensor) -> Tensor:
        return captioner.search(features, **options)

    captions = []
    for written in write_captions(captioner, own_share(images), config, search):
        if written.failure:
            raise written.failure
        captions += written.captions or [""]
    return put_together(captions)


def clip_name(config: Decoding) -> str:
    """The CLIP that the flags name, or else that of the captioner's run, or else the default."""
    if not config.clip and Path(config.captioner, "captioner").is_dir():
        path = Path(config.captioner, "config.json")
        with explain(f"{path}: cannot be read", "; give --clip"):
            return json.loads(path.read_text())["clip"] or config.captioner
    return config.clip or "ViT-B-32/openai"


def load_models(config: Decoding, with_clip: bool = True) -> tuple[Captioner, CLIP | None]:
    """The captioner that the flags name, or the toy world's, and the CLIP if it is wanted."""
    if config.captioner:
        captioner = Captioner.load(config.captioner, config.device, config.prompt)
    else:
        captioner = toy_captioner(config.seed, config.device)
    captioner.check_length(config.max_length or 1)
    captioner.bf16 = config.precision == "bf16"
    if isinstance(config, TrainConfig) and config.train_only:
        captioner.train_only(config.train_only)
        frozen = {*captioner.vision.parameters()} if config.freeze_vision else set()
        if not any(each.requires_grad for each in {*captioner.model.parameters()} - frozen):
            raise UserError("--freeze-vision, --train-only: leave nothing to train")
    return captioner, CLIP.load(clip_name(config), config.device) if with_clip else None


# Characters that move a terminal's cursor, or make a name look like two fields or lines.
ESCAPES = {place: repr(chr(place))[1:-1] for place in (*range(32), *range(127, 160))}


def put(text: str, file=None) -> None:
    """Print a line at once: above the progress bar, if both share a terminal."""
    file = file or sys.stdout
    shared = file.isatty() and sys.stderr.isatty()
    with Bar.external_write_mode(file) if shared else contextlib.nullcontext():
        print(text, file=file, flush=True)


def say(text: str) -> None:
    """Print a line for a person to read, on standard error."""
    put(f"distcap: {text.translate(ESCAPES)}", sys.stderr)


SCORES = ("cosine", "rank", "reward", "log_p")


def table_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .csv or .html file, or of a .part of one, as they are in it."""
    with explain(f"{path}: cannot be read"):
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        table = csv.DictReader(io.StringIO(text if path.suffix == ".csv" else "", newline=""))
        cells, columns = list(table), table.fieldnames or []
        foreign = not text.startswith(PAGE.partition("<style>")[0]) and text.strip() != ""
        if path.suffix == ".html":
            found = re.findall('<img src="(.*?)" alt="" data-row="(.*?)"', text)
            rows = [json.loads(html.unescape(row)) | {"thumbnail": src} for src, row in found]
            text = "\n".join(map(json.dumps, rows))
    if path.suffix == ".html" and foreign:
        raise UserError(f"{path}: a page that distcap did not write; give another --out")
    if path.suffix == ".part":  # a kill may have cut its last line short
        text = text[: text.rfind("\n") + 1]
    if path.suffix != ".csv":
        yield from read_lines(path, text)
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: two columns have the same name; rename one")
    for number, fields in enumerate(cells, 2):
        if None in fields or None in fields.values():
            raise UserError(f"{path}: row {number}: not as many columns as the first row")
        yield make_row(f"{path}: row {number}", fields)


def read_table(path: Path) -> dict[str, Row]:
    """{name: Row} of such a file, perhaps without captions. A picture's rows are merged into one,
    with as many of each score as captions. Raises UserError if they contradict each other."""
    rows: dict[str, Row] = {}
    for name, captions, more in table_rows(path):
        texts = [text for text in captions if text.strip()]
        if (own := more.keys() & SCORES) and len(own) < len(SCORES):
            theirs = f"its {min(own)} is not from --scores; rename it, or give another --out"
            raise UserError(f"{path}: {name}: {theirs}")
        empty = {key: [] for key in SCORES if key in more}
        known = rows.setdefault(name, Row(name, [], more | empty))
        known.captions.extend(texts)
        for key, value in more.items():
            if key in SCORES:
                values = value if isinstance(value, list) else [value]
                values = values if texts else []
                known.more[key] = known.more.get(key, []) + values
            elif key not in CAPTION_KEYS and value != known.more.get(key):
                differ = f"its rows differ in {key}, of which one row can hold but one"
                raise UserError(f"{path}: {name}: {differ}; give another --out")
    return rows


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Captions</title>
<style>
:root { color-scheme: light dark; font: 1rem/1.4 system-ui, sans-serif; }
body { margin: 1rem auto; max-width: 50rem; padding: 0 1rem; overflow-wrap: anywhere; }
input { font: inherit; width: 100%; box-sizing: border-box; position: sticky; top: .5rem; }
figure { display: flex; gap: 1rem; margin: 1rem 0; break-inside: avoid; }
figure[hidden] { display: none; }
figure a { flex: 0 0 min(10rem, 35%); }
img, svg { width: 100%; }
p { margin: 0 0 .3rem; }
pre { overflow: auto; }
@media print { input { display: none; } }
</style>
<input type="search" aria-label="Search" placeholder="Search names and captions">
<script>
document.querySelector("input").oninput = ({target}) => {
  for (const figure of document.querySelectorAll("figure"))
    figure.hidden = !figure.textContent.toLowerCase().includes(target.value.toLowerCase());
};
</script>
"""


def figure(name: str, thumbnail: str, lines: Iterable[tuple[str, str]], row: str = "") -> str:
    """A picture on a page: its thumbnail, some texts with a note each, and its name. If it stands
    for a `row` of a table, it is a link to the picture, and the row can be read from it."""
    link = f' href="{urllib.parse.quote(os.fsencode(name))}"' if row else ""
    image = f'<img src="{thumbnail}" alt="" data-row="{html.escape(row)}">'
    texts = [f"<p>{html.escape(text)} <small>{note}</small></p>" for text, note in lines]
    told = f"<figcaption>{''.join(texts)}<small>{html.escape(name)}</small></figcaption>"
    return f"<figure><a{link}>{image}</a>{told}</figure>\n"


def table_text(suffix: str, rows: Sequence[Row], failures: Sequence[UserError] = ()) -> str:
    """A whole table, whose columns keep their names. A .csv has a line for each caption. Failures
    are listed on a page only."""
    known = {key for row in rows for key in row.more}
    name_key = next((key for key in NAME_KEYS if key in known), "file_name")
    caption_key = next((key for key in CAPTION_KEYS if key in known), "caption")
    table = []
    for row in rows:
        first = {} if name_key in row.more else {name_key: row.name, caption_key: []}
        table.append(first | row.more | {caption_key: row.captions})
    if suffix == ".jsonl":
        return "".join(json.dumps(fields) + "\n" for fields in table)

    listed = (caption_key, *SCORES)  # a value for each caption
    if suffix == ".csv":
        columns = dict.fromkeys(key for fields in table for key in fields)
        # With line ends of "\r\n", a cell with a lone "\r" is quoted, too.
        file, lines = io.StringIO(), []
        file.write = lambda line: lines.append(line.removesuffix("\r\n") + "\n")
        writer = csv.DictWriter(file, columns or [name_key, caption_key], lineterminator="\r\n")
        writer.writeheader()
        for fields in table:
            own = {key: fields[key] or [""] for key in listed if key in fields}
            for cells in itertools.zip_longest(*own.values(), fillvalue=""):
                writer.writerow(fields | dict(zip(own, cells)))
        return "".join(lines)

    parts = [PAGE]
    for fields in table:
        thumbnail = fields.pop("thumbnail", "")
        scores = [[f"{key} {value}" for value in fields[key]] for key in SCORES if key in fields]
        notes = map(", ".join, zip(*scores)) if scores else itertools.repeat("")
        lines = zip(fields[caption_key], notes)
        parts.append(figure(fields[name_key], thumbnail, lines, json.dumps(fields)))
    items = "".join(f"<li>{html.escape(str(failure))}\n" for failure in failures)
    failed = f"<h2>Failures: {len(failures)}</h2>\n<ul>\n{items}</ul>\n" if failures else ""
    return "".join([*parts, failed])


def curve(name: str, values: Sequence[float | None]) -> str:
    """A curve of values as inline SVG; of many values, the means of two hundred parts."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return ""
    means = [statistics.fmean(part) for part in batched(values, math.ceil(len(values) / 200))]
    low, high = min(means), max(means)
    across = 600 / max(len(means) - 1, 1)
    up = 110 / ((high - low) or 1)
    points = " ".join(f"{across * n:.1f},{120 - up * (y - low):.1f}" for n, y in enumerate(means))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor"/>'
    told = f"from {means[0]:.3f} to {means[-1]:.3f}; lowest {low:.3f}, highest {high:.3f}"
    return f'<h2>{name}</h2>\n<svg viewBox="0 0 600 130">{line}</svg>\n<p>{told}</p>\n'


def write_report(folder: Path, results: dict[str, dict[str, float]],
                 captions: dict[str, list[str]], test: Sequence[Example]) -> None:  # fmt: skip
    """Write report.html into a run's folder: the table, the curves of its log.jsonl, and 24 test
    pictures with their captions before and after."""
    log = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
    parts = [PAGE, f"<h1>{html.escape(folder.name)}</h1>\n"]
    parts.append(f"<pre>{html.escape(table(results))}</pre>\n")
    for stage, name in (("tf", "loss"), ("rl", "reward")):
        values = [each.get(name) for each in log if each["stage"] == stage]
        parts.append(curve(f"{stage}: {name}", values))
    for name in ("reward", "text_to_image_R@1", "cider"):
        values = [each.get("validation", {}).get(name) for each in log]
        parts.append(curve(f"validation: {name}", values))
    for example, before, after in zip(test[:24], captions["before"], captions["after"]):
        lines = [(before, "before"), (after, "after")]
        image = thumbnail(load_image(example.image, 240))
        parts.append(figure(example.image_id, image, lines))
    write_text(folder / "report.html", "".join(parts))


class Output:
    """Where captions go: standard output, as path, tab, caption, or as a JSON object a line. It is
    made before a model is loaded, and finds out what is there and whether it can be written to."""

    def __init__(self, config: CaptionConfig, found: Sequence[Path]) -> None:
        self.config = config
        if not (sys.stdout or config.out or config.sidecar):
            raise UserError("standard output is closed; give --out")

    def has(self, path: Path) -> bool:
        """Whether the picture has a caption there."""
        return False

    def write(self, path: Path, written: Written) -> UserError | None:
        """Add the outcome for a picture, at once. Returns why not, if the others may do better."""
        if self.config.json:
            known = {"caption": written.captions} | written.scores
            known = {"error": str(written.failure)} if written.failure else known
            put(json.dumps({"file_name": str(path)} | known))
            return
        for cells in zip(written.captions, *written.scores.values()):
            put("\t".join([str(path).translate(ESCAPES), *map(str, cells)]))

    def close(self, failures: Sequence[UserError]) -> None:
        """Finish, after the last picture."""


class Sidecars(Output):
    """A text file beside each picture, with a caption a line."""

    def __init__(self, config: CaptionConfig, found: Sequence[Path]) -> None:
        super().__init__(config, found)
        self.files = {path: path.with_suffix(config.sidecar) for path in found}
        for folder in {file.parent for file in self.files.values()}:
            if os.path.isdir(folder) and not os.access(folder, os.W_OK):
                raise UserError(f"--sidecar: {folder}: must not be written to; give --out")

    def has(self, path: Path) -> bool:
        """Whether its sidecar holds a text, or what we may not read."""
        file = self.files[path]
        closed = not os.access(file, os.R_OK)
        return os.path.isfile(file) and (closed or file.read_bytes().strip() != b"")

    def write(self, path: Path, written: Written) -> UserError | None:
        """Write the sidecar, whole."""
        file = self.files[path]
        try:
            write_text(file, "".join(f"{text}\n" for text in written.captions))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
                raise  # of the whole disk: full, read-only, broken
            return UserError(f"{path}: {file.name}: cannot be written to ({error.strerror})")


class Table(Output):
    """A .jsonl, .csv or .html file. Each row is saved at once in a part of it, JSON lines in a file
    beside it, as x.csv.1-of-1.part, and moved to the table at the end, or by the next call. With
    --shard, x.csv.2-of-4.part remains; a call without --shard moves all parts to the table."""

    def __init__(self, config: CaptionConfig, found: Sequence[Path]) -> None:
        super().__init__(config, found)
        self.out, self.part = Path(config.out), part_file(config, found)
        self.names = {path: name_within(self.out.parent, path) for path in found}
        self.rows = read_table(self.out) if self.out.exists() else {}
        form = re.escape(self.out.name) + r"\.\d+-of-\d+\.part"
        if config.shard:
            form = re.escape(self.part.name)
        beside = sorted(self.out.parent.iterdir())
        self.parts = [path for path in beside if re.fullmatch(form, path.name)]
        self.added: dict[str, Row] = {}
        for part in self.parts:
            self.added |= {row.name: row for row in table_rows(part)}
        known = (*self.rows.values(), *self.added.values())
        self.done = {row.name for row in known if row.captions}
        # Anew: the last line may have been cut short.
        write_text(self.part, table_text(".jsonl", [*self.added.values()]))
        if not self.added:  # perhaps no model can be loaded
            self.part.unlink()

    def has(self, path: Path) -> bool:
        """Whether its row has a caption."""
        return self.names[path] in self.done

    def write(self, path: Path, written: Written) -> None:
        """Add the row of a picture to the part."""
        name, more = self.names[path], dict(written.scores)
        if written.thumbnail:
            more["thumbnail"] = written.thumbnail
        row = self.added[name] = Row(name, written.captions, more)
        with explain(f"{self.part}: cannot be written to"), open(self.part, "a") as file:
            file.write(table_text(".jsonl", [row]))

    def close(self, failures: Sequence[UserError]) -> None:
        """Move the parts to the table. Other columns of a picture's row stay."""
        if self.config.shard:
            return
        order = {name: number for number, name in enumerate(self.names.values())}
        for name in sorted(self.added, key=lambda name: order.get(name, -1)):
            row = self.added[name]
            more = {key: row.more[key] for key in (*SCORES, "thumbnail") if key in row.more}
            if name in self.rows:
                kept = self.rows[name].more.items()
                more = {key: value for key, value in kept if key not in SCORES} | more
            self.rows[name] = Row(name, row.captions, more)
        text = table_text(self.out.suffix, [*self.rows.values()], failures)
        # In a .csv, names that are not UTF-8 can only be written as they are.
        write_text(self.out, text, "surrogateescape" if self.out.suffix == ".csv" else "replace")
        for part in {*self.parts, self.part}:
            part.unlink(missing_ok=True)


def check_sidecars(found: Sequence[Path], suffix: str) -> None:
    """Raise UserError if two pictures, of any shards, would have the same sidecar."""
    owners: dict[Path, Path] = {}
    for path in found:
        file = path.with_suffix(suffix)
        if owners.setdefault(file, path) is not path:
            both = f"{owners[file]} and {path} would share {file}"
            raise UserError(f"--sidecar: {both}; caption them apart, or give --out")


def part_file(config: CaptionConfig, found: Sequence[Path]) -> Path:
    """The file that only this process writes to; for sidecars, a name for it, where the first of
    them is written: the folder that holds all of them may be another user's."""
    part, count = config.shard or (1, 1)
    folders = {path.absolute().parent for path in found}
    folders = [folder for folder in folders if os.access(folder, os.W_OK)]
    whole = config.out or min(folders, default=Path(tempfile.gettempdir())) / ".distcap"
    return Path(f"{whole}.{part}-of-{count}.part")


@contextlib.contextmanager
def locked(config: CaptionConfig, found: Sequence[Path]) -> Iterator[None]:
    """Refuse to write where another process writes: what this one writes would be lost."""
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        if config.out or config.sidecar:
            path = part_file(config, found).with_suffix(".lock")
            try:
                stack.enter_context(FileLock(path, timeout=0))
            except Timeout:
                message = f"{path}: another distcap writes there; wait until it is done"
                raise UserError(message) from None
            stack.callback(path.unlink, missing_ok=True)
        yield


def read_list(null: bool) -> list[str]:
    """The names on standard input, a line each, or each ended by a null character."""
    if not sys.stdin:
        raise UserError("-: standard input is closed")
    getattr(sys.stdin, "reconfigure", dict)(newline="")
    text = sys.stdin.read().removeprefix("\ufeff")
    if null:
        return [name for name in text.split("\0") if name]
    if "\0" in text:
        raise UserError("-: the names end in null characters; give --null")
    names = [line.rstrip("\r") for line in text.split("\n")]
    return [name for name in names if name]


def caption(config: CaptionConfig) -> int:
    """`distcap caption`: see CaptionConfig. Returns 1 if some pictures could not be captioned, 130
    after Ctrl-C, when what was written until then stays."""
    notes: list[str] = []
    listed = read_list(config.null) if "-" in config.paths else []
    named = [path for path in config.paths if path != "-"]
    found = find_images([*named, *listed], config.recursive, notes)
    if config.sidecar:
        check_sidecars(found, config.sidecar)
    part, count = config.shard or (1, 1)
    found = found[part - 1 :: count]
    failures: list[UserError] = []
    done, status = 0, 0
    with locked(config, found):
        kind = Table if config.out else Sidecars if config.sidecar else Output
        output = kind(config, found)
        wanted = [n for n, path in enumerate(found) if config.overwrite or not output.has(path)]
        try:
            for written, number in zip(write_paths(found, wanted, config), wanted):
                path, failure = found[number], written.failure
                if not (written.captions or failure):
                    failure = UserError(f"{path}: the captioner wrote an empty caption")
                if config.json or not failure:
                    failure = output.write(path, written._replace(failure=failure)) or failure
                failures += [failure] if failure else []
                done += not failure
        except KeyboardInterrupt:
            status = 130
        output.close(failures)
    for note in notes if not config.quiet else ():
        say(note)
    for failure in failures if not config.json else ():
        say(str(failure))
    if (config.out or config.sidecar or status) and not config.quiet:
        stopped = "stopped: " if status else ""
        kept = len(found) - len(wanted)
        joins = "; the same command without --shard or torchrun joins the parts"
        joins = joins if config.out and config.shard else ""
        say(f"{stopped}{done} captioned, {len(failures)} failed, {kept} had a caption{joins}")
    return status or (1 if failures else 0)


def write_paths(found: Sequence[Path], wanted: Sequence[int],
                config: CaptionConfig) -> Iterator[Written]:  # fmt: skip
    """The outcome for each path whose number is wanted, captioned as the flags say; the others
    compete too. If nothing is wanted, no model is loaded."""
    if not wanted:
        return
    captioner, clip = load_models(config, config.rerank or config.scores)
    start = len(captioner.start)
    longest = config.max_length or min(max(20 - start, 5), captioner.longest)
    if (config.min_length or 0) > longest:
        above = f"above the longest caption, {longest} tokens after the prompt"
        raise UserError(f"--min-length {config.min_length}: {above}; give --max-length")
    shortest = max(5 - start, 1) if config.min_length is None else config.min_length
    limits = dict(min_new_tokens=min(shortest, longest), max_length=longest)
    limits["repetition_penalty"] = config.repetition_penalty
    limits["no_repeat_ngram_size"] = config.no_repeat_ngram_size
    drawing = dict(temperature=config.temperature, top_p=config.top_p, seed=config.seed)

    def write(features: Tensor, pixels: Tensor) -> Tensor:
        if config.samples or config.rerank:
            options = limits | drawing | {"count": config.samples or 8}
            return sample_by_picture(captioner, features, pixels, **options)
        return captioner.search(features, beams=config.beams, **limits)

    page = bool(config.out) and config.out.endswith(".html")
    for written in write_captions(captioner, found, config, write, clip, wanted, page):
        texts = [f"{config.prefix}{text}{config.suffix}" for text in written.captions]
        yield written._replace(captions=texts)


def evaluate_command(config: EvalConfig) -> None:
    """`distcap eval`: see EvalConfig. Mistakes are found before anything slow begins."""
    if config.table:
        print(results_table(config.table, config.format))
        return
    check_java(config.metrics, config.tokenizer)
    looks = bool(set(CLIP_METRICS) & set(config.metrics))
    skipped: list[Skipped] = []
    which = (config.images, config.split, looks or not config.captions, skipped)
    examples = read_examples(config.data, *which, usual="test")
    warn_of_training_pictures(examples, config)
    captions = []
    if config.captions:
        left_out = [each.example for each in skipped if each.example]
        captions = read_captions(Path(config.captions), examples, left_out)
    else:
        captioner, _ = load_models(config, with_clip=False)
    names = (config.clip or [clip_name(config)]) if looks else []
    clips = {name: CLIP.load(name, config.device) for name in names}

    # Leave out what cannot be read, as `train` does, and say so before captioning begins.
    images, failures, seen = [example.image for example in examples], [], {}
    for name, clip in clips.items():
        failures = []
        seen[name] = (clip, clip.embed_images(images, config.workers, failures))
    skipped += unread(images, failures)
    kept = sorted(set(range(len(images))) - {n for n, _ in failures})
    if not kept:
        raise failures[0][1]
    examples = [examples[n] for n in kept]
    captions = [captions[n] for n in kept] if captions else []
    if skipped and process_rank() == 0:
        first = f"the first: {skipped[0].name}: {skipped[0].reason}"
        say(f"left out {len(skipped)} pictures or captions; {first}")
    images = [example.image for example in examples]
    if not config.captions:
        captions = caption_all(captioner, images, config, min_new_tokens=config.min_length)
    if config.out and process_rank() == 0:
        written = coco_results(examples, captions)
        write_text(Path(config.out).with_suffix(".captions.json"), written)
    if process_rank() > 0:
        return
    measures = measure(captions, examples, seen, config)
    print(table({Path(config.data).resolve().name: measures}))
    if len(examples) < 50 and "cider" in config.metrics:
        few = f"only {len(examples)} pictures: CIDEr weighs words by how rare they are among them"
        say(f"{few}, and means little below 50")
    if config.out:
        write_results(config, names, examples, captions, measures)


def coco_results(examples: Sequence[Example], captions: Sequence[str]) -> str:
    """Captions in COCO's form of results, JSON. Ids that look like numbers are numbers."""
    rows = []
    for example, caption in zip(examples, captions):
        name = example.image_id
        image_id = int(name) if re.fullmatch("0|[1-9][0-9]*", name) else name
        rows.append({"image_id": image_id, "caption": caption})
    return json.dumps(rows, indent=1) + "\n"


def warn_of_training_pictures(examples: Sequence[Example], config: EvalConfig) -> None:
    """Warn if the captioner's run has learned from some of the pictures."""
    names = Path(config.captioner, "training.txt")
    if not config.captions and names.is_file():
        learned = set(names.read_text(encoding="utf-8", errors="surrogateescape").split("\n"))
        count = sum(os.path.realpath(example.image) in learned for example in examples)
        if count and process_rank() == 0:
            what = f"{count} of {len(examples)} pictures were trained on, by {config.captioner}"
            say(f"{what}; its test/ holds others")


def write_results(config: EvalConfig, clips: Sequence[str], examples: Sequence[Example],
                  captions: Sequence[str], measures: Measures) -> None:  # fmt: skip
    """Write x.each.jsonl, a line for each picture, and x.json: the measures, and of what."""
    out = Path(config.out)
    each = flat(measures.each)
    rows = {}
    for n, (example, caption) in enumerate(zip(examples, captions)):
        own = {name: values[n] for name, values in each.items()}
        rows[name_within(out.parent, example.image)] = {"caption": caption} | own
    write_rows(out.with_suffix(".each.jsonl"), rows)

    about = vars(config) | dict(pictures=len(examples), clip=clips)
    if config.captions:  # what captioner wrote them, and how, is not known
        about |= dict.fromkeys(DECODING)
    about["name"] = config.name or config.captions or config.captioner
    data = json.dumps([(example.image_id, example.references) for example in examples])
    about["digest"] = hashlib.sha256(data.encode()).hexdigest()[:16]
    about["versions"] = {name: version(name) for name in PACKAGES}
    write_text(out, json.dumps(about | {"measures": measures}, indent=2) + "\n")


def ignored_flags(config: Decoding) -> dict[str, str]:
    """The flags that would change nothing, each with the flag that is the reason."""
    ignored = {}
    if isinstance(config, CaptionConfig):
        sampling = config.samples or config.rerank
        reason = "samples" if config.samples or not config.rerank else "rerank"
        ignored = dict.fromkeys(["beams"] if sampling else ["temperature", "top_p"], reason)
        if not (config.rerank or config.scores):
            ignored["clip"] = "rerank"
        if not (config.out or config.sidecar):
            ignored["overwrite"] = "out"
        if "-" not in config.paths:
            ignored["null"] = "paths"
        others = {"json": config.out or config.sidecar, "sidecar": config.out}
        ignored |= {name: "out" if config.out else "sidecar" for name in others if others[name]}
        if config.sidecar:  # a sidecar holds captions and nothing else: others read it
            ignored["scores"] = "sidecar"
    elif isinstance(config, EvalConfig):
        if config.captions:
            ignored = dict.fromkeys([*DECODING, "batch_size"], "captions")
        uses = {"clip": CLIP_METRICS, "bag_size": ["retrieval"], "tokenizer": REFERENCE_METRICS}
        for name, metrics in uses.items():
            if not set(metrics) & set(config.metrics):
                ignored[name] = "metrics"
        if not config.out:
            ignored["name"] = "out"
        ignored["format"] = "table"
        if config.table:
            ignored = dict.fromkeys(vars(config).keys() - {"table", "format"}, "table")
    elif isinstance(config, TrainConfig):
        ignored = ignored_settings(config)
        if config.regularizer not in LEARNING:
            names = ["discriminator_learning_rate", "pretrain_discriminator"]
            ignored |= dict.fromkeys(names, "regularizer")
        if config.objective == "tf":
            names = ["steps", "learning_rate", "discriminator_learning_rate", "log_every"]
            ignored |= dict.fromkeys([*names, "pretrain_discriminator"], "objective")
            ignored |= {"recipe": "objective"} if config.recipe != "tf" else {}
        if config.tf_steps == 0:
            ignored["tf_learning_rate"] = "tf_steps"
        if config.data != "toy" or config.captioner:
            ignored["clip_steps"] = "captioner"
        else:
            ignored |= dict.fromkeys(["prompt", "train_only"], "captioner")
        if config.data == "toy":
            names = ("images", "train_split", "validation", "test", "strict")
            ignored |= dict.fromkeys(names, "data")
    return ignored


def check(config: Decoding, given: set[str]) -> None:
    """Refuse settings that make no sense, before any slow work. `given` are the flags given."""
    for name, reason in ignored_flags(config).items():
        if name in given:
            value = getattr(config, reason)
            value = " ".join(value) if isinstance(value, list | tuple) else value
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
        if config.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise UserError("--tensorboard: it is not installed; pip install tensorboard")
        if config.select == "oracle_R@1" and config.data != "toy":
            raise UserError("--select oracle_R@1: only the toy world knows the truth")
        if config.baseline == "group" and config.samples < 2:
            raise UserError("--baseline group: needs --samples 2 or more")
        if config.baseline == "neighbours" and config.neighbours < 1:
            raise UserError("--baseline neighbours: needs --neighbours 1 or more")
        if config.data == "toy" and config.clip and not config.captioner:
            own = "the toy world trains its own, unless --captioner is given too"
            raise UserError(f"--clip {config.clip}: {own}")
    elif (config.min_length or 0) > (config.max_length or 20):
        above = f"is above --max-length {config.max_length or 20}; give a higher one"
        raise UserError(f"--min-length {config.min_length}: {above}")
    if isinstance(config, EvalConfig) and not config.table and not config.data:
        raise UserError("eval: which DATA? give a data set, or results with --table")
    if isinstance(config, CaptionConfig | EvalConfig) and config.out is not None:
        check_out(config)
    for name in ("paths", "data", "images", "validation", "test", "captions", "table"):
        value = getattr(config, name, None) or ()
        for path in [value] if isinstance(value, str) else value:
            why = "a web address; download it first" if "://" in path else "no such file or folder"
            if not os.path.lexists(path) and (name, path) not in (("paths", "-"), ("data", "toy")):
                raise UserError(f"{path or repr(path)}: {why}")


def check_out(config: CaptionConfig | EvalConfig) -> None:
    """Refuse an --out that cannot be written, or that would replace what eval reads."""
    evaluates = isinstance(config, EvalConfig)
    if evaluates and not config.out.endswith(".json"):
        raise UserError(f"--out {config.out}: must be a .json file")
    if not evaluates and not config.out.endswith((".jsonl", ".csv", ".html")):
        raise UserError(f"--out {config.out}: must be a .jsonl, .csv or .html file")
    if not Path(config.out).parent.is_dir():
        raise UserError(f"--out {config.out}: must be in a folder that exists; make it first")
    for path in (config.data, config.captions) if evaluates else ():
        for suffix in (".json", ".each.jsonl", ".captions.json"):
            if path and Path(path).resolve() == Path(config.out).with_suffix(suffix).resolve():
                raise UserError(f"--out {config.out}: would write over {path}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


VERBS = {"train": (TrainConfig, train), "caption": (CaptionConfig, caption),
         "eval": (EvalConfig, evaluate_command)}  # fmt: skip
USAGE = {"train": "[DATA]", "caption": "PATHS", "eval": "[DATA]"}
# What the help calls a flag's value, where neither N nor TEXT says enough.
METAVARS = dict(images="DIR", captioner="NAME", clip="NAME", recipe="NAME", train_split="SPLIT",
                split="SPLIT", validation="DATA", test="DATA", out="PATH", captions="PATH",
                shard="I/N", train_only="REGEX", metrics="METRIC", table="JSON")  # fmt: skip


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with the examples as they were written, and no word broken at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def make_parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of its verbs: a flag for each setting."""
    parser = Parser("distcap", description="Distinctive image captioning with RL and CLIP.")
    parser.add_argument("--version", action="version", version=version("distcap"))
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,caption,eval}")
    parsers = {}
    for verb, (cls, _) in VERBS.items():
        summary, _, examples = inspect.getdoc(cls).partition("\n\n")
        options = dict(description=summary, epilog=examples, formatter_class=HelpFormatter)
        usage = f"%(prog)s {USAGE[verb]} [flags]"
        parsers[verb] = verbs.add_parser(verb, help=summary, usage=usage, **options)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        groups, heading = {}, ""
        for base in cls.__mro__[:-1]:  # its own settings first; `object` has none
            for field in [fields.pop(name) for name in base.__annotations__ if name in fields]:
                heading = field.metadata.get("group", heading)
                if heading not in groups:
                    groups[heading] = parsers[verb].add_argument_group(heading)
                add_flag(groups[heading], field, TOY if verb == "train" else {})
    return parser, parsers


def add_flag(group, field: dataclasses.Field, toy: dict) -> None:
    """A flag for one setting, or a positional argument if it has `nargs`. A flag not given is None;
    the help names its default, and the toy world's."""
    options = {key: value for key, value in field.metadata.items() if key != "group"}
    if "nargs" in options and "action" not in options:
        group.add_argument(field.name, metavar=field.name.upper(), **options)
        return
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    notes = {"default": default, "toy world": toy.get(field.name)}
    notes = [f"{key}: {value}" for key, value in notes.items() if value not in (None, "")]
    if isinstance(default, bool):
        options = dict(help=options["help"], action="store_true", default=None)
        if default:  # a flag to switch it off, too
            options["action"] = argparse.BooleanOptionalAction
    elif notes:
        options["help"] += f" ({'; '.join(notes)})"
    if "type" in options or field.name in METAVARS:
        usual = {"int": "N", "float": "X"}.get(getattr(options.get("type"), "__name__", ""), "TEXT")
        options["metavar"] = METAVARS.get(field.name, usual)
    group.add_argument("--" + field.name.replace("_", "-"), **options)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[str, Decoding, set[str]]:
    """The verb, its settings, and the names of the flags given. The others have the values of the
    recipe, or else of the toy world, or else of the class."""
    parser, _ = make_parsers()
    values = vars(parser.parse_args(arguments))
    verb = values.pop("verb")
    given = {name: value for name, value in values.items() if value is not None}
    preset = {}
    if verb == "train":
        toy = TOY if given.get("data", "toy") == "toy" else {}
        preset = toy | RECIPES[given.get("recipe", "distinctive")]
    return verb, VERBS[verb][0](**preset | given), set(given)


def choose_device(config: Decoding) -> Decoding:
    """The settings with the device that `auto` is here. Raises UserError if it cannot be used."""
    if config.device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        config = dataclasses.replace(config, device=str(device or "cpu"))
    with explain(f"--device {config.device}: cannot be used", "; try auto"):
        torch.empty(0, device=config.device)
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32, which is much faster
    return config


def join_processes(config: Decoding) -> Decoding:
    """Join the processes that torchrun started: each has a GPU of its own, or none has. Returns the
    settings with this one's device. To caption they need not meet: each takes its shard."""
    if config.device == "cuda":
        config = dataclasses.replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(config.device)
    if isinstance(config, CaptionConfig):
        part, count = config.shard or (1, 1)  # a machine's, dealt out to its processes
        shard = part + count * int(os.environ["RANK"]), count * int(os.environ["WORLD_SIZE"])
        return dataclasses.replace(config, shard=shard)
    with explain("torchrun: the processes do not meet"):
        torch.distributed.init_process_group("nccl" if "cuda" in config.device else "gloo")
    return config


def memory_advice(config: Decoding) -> str:
    """The flags that save memory and were not given."""
    advice = ["a smaller --batch-size"]
    if isinstance(config, TrainConfig):
        advice[0] += " with as much more --accumulate"
    if config.precision == "fp32":
        advice.append("--precision bf16")
    for name in ("gradient_checkpointing", "freeze_vision"):
        if not getattr(config, name, True):
            advice.append(f"--{name.replace('_', '-')}")
    return ", ".join(advice)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 some inputs failed, 2 a mistake."""
    verb, config, given = parse_arguments(arguments)
    logging.getLogger().setLevel(logging.CRITICAL)  # the libraries announce what they load
    logging.captureWarnings(True)  # and Pillow warns of what it reads all the same
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  # it was closed
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Names need not be UTF-8. A notebook's streams cannot be changed, and need not be.
        getattr(stream, "reconfigure", dict)(encoding="utf-8", errors="surrogateescape")
    try:
        check(config, given)
        import_torch()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as set where this file begins
            signal.signal(signal.SIGINT, signal.default_int_handler)
        config = choose_device(config)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            config = join_processes(config)
        return VERBS[verb][1](config) or 0
    except (BrokenPipeError, KeyboardInterrupt) as stop:  # the reader has seen enough; or Ctrl-C
        with contextlib.suppress(OSError):  # a notebook's standard output is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130 if isinstance(stop, KeyboardInterrupt) else 0
    except (MemoryError, RuntimeError) as error:
        if not SCARCE.search(repr(error)):
            raise
        say(f"{config.device} has too little memory; try {memory_advice(config)}")
        return 2
    except (UserError, OSError) as error:  # a full disk or a forbidden folder is no bug of ours
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
