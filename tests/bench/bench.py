"""How long captions and training steps take on a CPU, beside other ways and the least there is.

    python tests/bench/bench.py caption                    # about five minutes on two cores
    python tests/bench/bench.py caption --base-pictures 0  # the small captioner alone, for which
                                                           # reading pictures matters
    python tests/bench/bench.py train                      # a step of the full method: about three
                                                           # minutes and 8 GB

caption: distcap  `write_captions` over a list of files: read, resize, encode, generate, decode
         plain    transformers' BLIP, one picture at a time
         model    encode and generate alone, in batches like distcap's, on pixels that are in
                  memory already
         reading  read and resize alone, in worker processes like distcap's
train:   distcap  `Learner.reinforce_step`, gradient and update: the image encoded once, one pass
                  for both terms
         bf16     the same with `--precision bf16`
         scripts  the same terms the way the authors' scripts go about it: a beam search of 5,
                  greedy search, and a pass for each term, and the image encoded anew for each of
                  the four
         floor    the one pass over both terms, gradient and update alone, with captions that are
                  there already

All use one random checkpoint, whose end never comes: every caption has exactly LENGTH words. They
take turns, so that other work on the machine hits them alike. Each line is printed twice, in
seconds by the clock (wall) and in seconds of the processor, those of worker processes included
(CPU). Compare the ratios, not the seconds. On a busy machine trust the CPU's, and set
OMP_WAIT_POLICY=passive: else torch's threads spin while they wait for each other.
"""

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)
from transformers.utils import logging

import distcap

LENGTH, BEAMS, PROMPT = 20, 3, "a picture of"
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.3,
)
KINDS = ("wall", "CPU")
Seconds = dict[str, list[tuple[float, float]]]  # of each contestant and round: by the clock, CPU


# ---- What all of them work on --------------------------------------------------------------------
def draw_pictures(folder: Path, count: int, megapixels: float) -> list[Path]:
    """JPEG files of this size: gradients under noise, about as hard to decode as photographs. Eight
    are drawn, the rest are copies."""
    rng = np.random.default_rng(0)
    height, width = round((megapixels * 0.75e6) ** 0.5), round((megapixels * 1e6 / 0.75) ** 0.5)
    across = np.linspace(0, 1, width)[None, :, None]
    down = np.linspace(0, 1, height)[:, None, None]
    paths = [folder / f"{number:04d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if number >= 8:
            shutil.copy(paths[number % 8], path)
            continue
        colours = rng.uniform(0, 255, size=(3, 3))
        gradient = (colours[0] + across * colours[1] + down * colours[2]) / 2
        picture = gradient + rng.normal(0, 10, (height, width, 1))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def save_checkpoint(folder: Path, size: str) -> str:
    """A random BLIP in the layout of Salesforce/blip-image-captioning-base; 'base' is as large."""
    torch.manual_seed(0)
    if size == "base":
        ids = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
        words = 30522
        # The default of the vision tower, 1e-10, makes all features equal.
        config = BlipConfig(vision_config=dict(initializer_range=0.02))
    else:
        ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
        words = 30
        special = dict(bos_token_id=words, eos_token_id=2, sep_token_id=3, pad_token_id=0)
        shape = dict(encoder_hidden_size=64, vocab_size=words + 2, max_position_embeddings=64)
        vision = TINY | dict(image_size=64, patch_size=16)
        config = BlipConfig(text_config=TINY | shape | special, vision_config=vision)
    free = [number for number in range(words) if number not in ids.values()]
    names = PROMPT.split() + [f"word{number}" for number in free[3:]]
    ids |= dict(zip(names, free))

    model = BlipForConditionalGeneration(config)
    with torch.no_grad():  # neither the end nor anything else that is not a word is ever written
        never = sorted(set(range(config.text_config.vocab_size)) - set(free))
        model.text_decoder.cls.predictions.bias[never] = -1e4
    image_size = dict.fromkeys(("height", "width"), config.vision_config.image_size)
    processor = BlipProcessor(BlipImageProcessor(size=image_size), BertTokenizer(vocab=ids))
    for part in (model, processor):
        part.save_pretrained(folder)
    return str(folder)


# ---- Timing --------------------------------------------------------------------------------------
def cpu_seconds() -> float:
    """What this process, and those that it started and that have ended, took of the processor."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def take_turns(contestants: dict[str, Callable[[bool], None]], rounds: int) -> Seconds:
    """Time each in turn, round by round. Each is told whether the round is the first, which warms
    up and is not counted."""
    seconds = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            cpu, wall = cpu_seconds(), time.perf_counter()
            run(number == 0)
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            if number:
                seconds[name].append((wall, cpu))
    return seconds


def medians(seconds: Seconds, kind: str) -> list[str]:
    """The median of each contestant, by the clock or of the processor."""
    place = KINDS.index(kind)
    return [f"{statistics.median(pair[place] for pair in each):.2f}" for each in seconds.values()]


def ratio(seconds: Seconds, above: str, below: str, kind: str) -> str:
    """The ratio of two contestants' medians, and how it varies from round to round."""
    place = KINDS.index(kind)
    tops = [pair[place] for pair in seconds[above]]
    bottoms = [pair[place] for pair in seconds[below]]
    each = [top / bottom for top, bottom in zip(tops, bottoms)]
    middle = statistics.median(tops) / statistics.median(bottoms)
    return f"{middle:.2f} ({min(each):.2f}-{max(each):.2f})"


# ---- The contestants -----------------------------------------------------------------------------
def check_work(captions: list[str], count: int) -> None:
    """Fail unless there are `count` captions of LENGTH words: else the times compare nothing."""
    lengths = [len(caption.split()) for caption in captions]
    assert lengths == [LENGTH] * count, f"unequal work: {lengths}"


def bench_caption(checkpoint: str, paths: list[Path], batch_size: int, rounds: int) -> Seconds:
    """The seconds that each of the three takes for all pictures."""
    config = distcap.CaptionConfig(
        captioner=checkpoint, prompt=PROMPT, batch_size=batch_size, device="cpu"
    )
    captioner = distcap.Captioner.load(checkpoint, "cpu", PROMPT)
    model = BlipForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = BlipProcessor.from_pretrained(checkpoint)
    batches = []
    for some in distcap.batched(paths, batch_size):
        pictures = [distcap.load_image(path, captioner.side) for path in some]
        batches.append(captioner.pixels(pictures))

    def write(features: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return captioner.search(features, LENGTH, beams=BEAMS)

    def run_distcap(warm_up: bool) -> None:
        some = paths[:2] if warm_up else paths
        found = list(distcap.write_captions(captioner, some, config, write))
        check_work([written.captions[0] for written in found], len(some))

    def run_plain(warm_up: bool) -> None:
        some = paths[:2] if warm_up else paths
        limits = dict(num_beams=BEAMS, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
        captions = []
        for path in some:
            inputs = processor(Image.open(path).convert("RGB"), PROMPT, return_tensors="pt")
            tokens = model.generate(**inputs, **limits)
            caption = processor.decode(tokens[0], skip_special_tokens=True)
            captions.append(caption.removeprefix(PROMPT))
        check_work(captions, len(some))

    @torch.no_grad()
    def run_model(warm_up: bool) -> None:
        some = [batches[0][:2]] if warm_up else batches
        tokens = [write(captioner.encode(pixels), pixels) for pixels in some]
        captions = [caption for each in tokens for caption in captioner.decode(each)]
        check_work(captions, sum(len(pixels) for pixels in some))

    def run_reading(warm_up: bool) -> None:
        some = paths[:2] if warm_up else paths
        pictures = distcap.PictureBatches(some, [captioner.pixels], batch_size, captioner.side)
        order = range(len(pictures))
        read = [
            len(batch.pixels[0]) for batch in distcap.read_ahead(pictures, order, config.workers)
        ]
        assert sum(read) == len(some)

    contestants = dict(distcap=run_distcap, plain=run_plain, model=run_model, reading=run_reading)
    return take_turns(contestants, rounds)


def make_learner(checkpoint: str, batch_size: int) -> tuple[distcap.Learner, distcap.Batch]:
    """The full method, and a batch. A toy CLIP rewards: its time is next to nothing."""
    values = distcap.TOY | dict(batch_size=batch_size, max_length=LENGTH, clip_steps=1)
    config = distcap.TrainConfig(**values, device="cpu")
    world, _ = distcap.toy_world(0, max(batch_size, 8), 0)
    with tempfile.TemporaryDirectory() as folder:
        clip = distcap.toy_clip(Path(folder, "clip"), world, config, distcap.Run())
    captioner = distcap.Captioner.load(checkpoint)
    learner = distcap.Learner(captioner, clip, config, LENGTH)
    distcap.prepare_reinforcement(learner, world, config)

    rng = np.random.default_rng(0)
    ground_truth = []
    for _ in range(batch_size):
        words = rng.integers(8, 25, LENGTH)  # any words of the small captioner's
        ground_truth.append(" ".join(f"word{number}" for number in words))
    pixels = captioner.pixels([example.image for example in world[:batch_size]])
    return learner, distcap.Batch(torch.arange(batch_size), ground_truth, pixels)


def bench_train(checkpoint: str, batch_size: int, rounds: int) -> Seconds:
    """The seconds that a step takes each of the three."""
    learner, batch = make_learner(checkpoint, batch_size)
    captioner, clip = learner.captioner, learner.clip
    tokens = captioner.tokenize(batch.ground_truth, LENGTH)
    learned = [*captioner.model.parameters(), *learner.regularizer.network.parameters()]
    optimizer = torch.optim.AdamW(learned)

    def one_pass(
        features: torch.Tensor, tokens: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        log_probs, mask = captioner.log_probs(features, tokens)
        log_probs = distcap.caption_log_probs(log_probs, mask, LENGTH)
        return distcap.reinforce_loss(log_probs, advantages)

    def loss_distcap() -> torch.Tensor:
        loss, _ = learner.reinforce_step(batch)
        return loss

    def loss_bf16() -> torch.Tensor:
        captioner.bf16 = True
        loss, _ = learner.reinforce_step(batch)
        captioner.bf16 = False
        return loss

    def loss_scripts() -> torch.Tensor:
        with torch.no_grad():
            searched = captioner.search(captioner.encode(batch.pixels), LENGTH, beams=5)
            greedy = captioner.greedy(captioner.encode(batch.pixels), LENGTH)
        texts = captioner.decode(searched) + batch.ground_truth + captioner.decode(greedy)
        rewards = distcap.contrastive_reward(
            clip.embed_captions(texts),
            learner.image_embeddings[batch.index],
            torch.arange(batch_size).repeat(3),
            clip.logit_scale,
        )
        advantages, human_advantages, _ = rewards.chunk(3)
        sampled_loss = one_pass(captioner.encode(batch.pixels), searched, advantages)
        return sampled_loss + one_pass(captioner.encode(batch.pixels), tokens, human_advantages)

    def loss_floor() -> torch.Tensor:
        features = captioner.encode(batch.pixels)
        twice = torch.cat([tokens, tokens])
        return one_pass(torch.cat([features, features]), twice, torch.ones(len(twice)))

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[bool], None]:
        def run(warm_up: bool) -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return run

    losses = dict(distcap=loss_distcap, bf16=loss_bf16, scripts=loss_scripts, floor=loss_floor)
    return take_turns({name: step(loss) for name, loss in losses.items()}, rounds)


# ---- Tables --------------------------------------------------------------------------------------
def print_table(label: str, seconds: Seconds, ratios: list[tuple[str, str]]) -> None:
    """For each kind of seconds, the medians and the ratios; then the most memory so far."""
    for kind in KINDS:
        figures = [f"{name} {value}" for name, value in zip(seconds, medians(seconds, kind))]
        print(f"{label}, {kind} seconds: {', '.join(figures)}")
        for above, below in ratios:
            print(f"    {above} / {below} {ratio(seconds, above, below, kind)}", flush=True)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"    most memory of the process so far: {gigabytes:.1f} GiB", flush=True)


def print_captions(given: argparse.Namespace) -> None:
    """A table for each size of captioner."""
    for size, count in (("small", given.pictures), ("base", given.base_pictures)):
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = save_checkpoint(Path(folder, size), size)
            paths = draw_pictures(Path(folder), count, given.megapixels)
            seconds = bench_caption(checkpoint, paths, given.batch_size, given.rounds)
        ratios = [("distcap", "model"), ("distcap", "reading"), ("plain", "distcap")]
        print_table(f"{size}, {count} pictures", seconds, ratios)


def print_steps(given: argparse.Namespace) -> None:
    """A table of the training step."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(Path(folder), given.size)
        seconds = bench_train(checkpoint, given.batch_size, given.rounds)
    ratios = [("distcap", "floor"), ("scripts", "distcap"), ("scripts", "bf16")]
    print_table(given.size, seconds, ratios)


def main() -> None:
    """Time what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    flag = verbs.add_parser("caption", help="speed of `distcap caption`").add_argument
    flag("--megapixels", type=float, default=12.0, help="of each JPEG")
    flag("--pictures", type=int, default=200, help="for the small captioner; 0: leave it out")
    flag("--base-pictures", type=int, default=6, help="for the base captioner; 0: leave it out")
    usual = distcap.CaptionConfig.batch_size
    flag("--batch-size", type=int, default=usual, help="pictures in a batch")
    flag("--rounds", type=int, default=3, help="how often each is timed; medians are printed")
    flag = verbs.add_parser("train", help="speed of a step of `distcap train`").add_argument
    flag("--size", choices=("base", "small"), default="base", help="of the captioner")
    flag("--batch-size", type=int, default=2, help="pictures in a batch")
    flag("--rounds", type=int, default=5, help="how often each is timed; medians are printed")
    given = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    print(f"batches of {given.batch_size}, {given.rounds} rounds, {threads} threads; medians")
    (print_captions if given.verb == "caption" else print_steps)(given)


if __name__ == "__main__":
    main()
