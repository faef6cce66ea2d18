"""How long captions and training steps take, on a CPU, beside other ways to go about it, and beside the least there is.

    python tests/bench.py caption                     # captions, about five minutes on two cores
    python tests/bench.py caption --base-pictures 0   # the small captioner alone, for which reading pictures matters
    python tests/bench.py train                       # a step of the full method, about three minutes and 8 GB

caption: distcap  `write_captions` over a list of files: read, resize, encode, generate, decode
         plain    transformers' BLIP, one picture at a time
         floor    encode and generate alone, on pixels that are in memory already, in batches like distcap's
train:   distcap  `Learner.reinforce_step`, gradient and update: the image encoded once, one pass for both terms
         scripts  the same terms the way the authors' scripts go about it: a beam search of 5, greedy search, and a pass
                  for each term, and the image encoded anew for each of the four
         floor    the one pass over both terms, gradient and update alone, with captions that are there already

All use one random checkpoint, whose end never comes: every caption has exactly LENGTH words. They take turns, so that
other work on the machine hits them alike. Compare the ratios, not the seconds. On a busy machine set
OMP_WAIT_POLICY=passive: else torch's threads spin while they wait for each other, and the ratios mean nothing.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
from transformers.utils import logging

import distcap

LENGTH, BEAMS, PROMPT = 20, 3, "a picture of"
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """JPEG files of mixed sizes, from 200 to 1600 pixels: gradients under noise, about as hard to decode as photos."""
    rng, paths = np.random.default_rng(0), [folder / f"{number:04d}.jpg" for number in range(count)]
    for path in paths:
        height, width = rng.integers(200, 1601, size=2)
        across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
        colours = rng.uniform(0, 255, size=(3, 3))
        picture = (colours[0] + across * colours[1] + down * colours[2]) / 2 + rng.normal(0, 10, (height, width, 1))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def save_checkpoint(folder: Path, size: str) -> str:
    """A random BLIP in the layout of Salesforce/blip-image-captioning-base; 'base' is also as large."""
    torch.manual_seed(0)
    if size == "base":
        ids, words = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}, 30522
        config = BlipConfig(vision_config=dict(initializer_range=0.02))  # its default, 1e-10, makes all features equal
    else:
        ids, words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}, 30
        text = dict(TINY, encoder_hidden_size=64, vocab_size=words + 2, max_position_embeddings=64, bos_token_id=words,
                    eos_token_id=2, sep_token_id=3, pad_token_id=0)  # fmt: skip
        config = BlipConfig(text_config=text, vision_config=dict(TINY, image_size=64, patch_size=16))
    free = [number for number in range(words) if number not in ids.values()]
    ids |= dict(zip(PROMPT.split() + [f"word{number}" for number in free[3:]], free))
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():  # neither the end nor anything else that is not a word is ever written
        never = sorted(set(range(config.text_config.vocab_size)) - set(free))
        model.text_decoder.cls.predictions.bias[never] = -1e4
    image_size = dict.fromkeys(("height", "width"), config.vision_config.image_size)
    for part in (model, BlipProcessor(BlipImageProcessor(size=image_size), BertTokenizer(vocab=ids))):
        part.save_pretrained(folder)
    return str(folder)


def bench_caption(checkpoint: str, paths: list[Path], batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds that each of the three takes for all pictures, round by round."""
    values = dict(captioner=checkpoint, prompt=PROMPT, beams=BEAMS, max_length=LENGTH, batch_size=batch_size)
    config = distcap.configuration(distcap.CaptionConfig, values | {"device": "cpu"})
    captioner = distcap.Captioner.load(checkpoint, "cpu", PROMPT)
    model = BlipForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = BlipProcessor.from_pretrained(checkpoint)
    starts = range(0, len(paths), batch_size)
    batches = [captioner.pixels([distcap.load_image(each) for each in paths[n : n + batch_size]]) for n in starts]

    def run_distcap(few: int | None = None) -> list[str]:
        return [caption for (caption,) in distcap.write_captions(captioner, paths[:few], config)]

    def run_plain(few: int | None = None) -> list[str]:
        captions = []
        for path in paths[:few]:
            inputs = processor(Image.open(path).convert("RGB"), PROMPT, return_tensors="pt")
            tokens = model.generate(**inputs, num_beams=BEAMS, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
            captions.append(processor.decode(tokens[0], skip_special_tokens=True))
        return [caption.removeprefix(PROMPT) for caption in captions]

    @torch.no_grad()
    def run_floor(few: int | None = None) -> list[torch.Tensor]:
        few = batches if few is None else [batches[0][:few]]
        return [captioner.generate(captioner.encode(pixels), LENGTH, num_beams=BEAMS) for pixels in few]

    contestants, seconds = dict(distcap=run_distcap, plain=run_plain, floor=run_floor), {}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            captions = run(None if number else 2)  # the round before the first is short: it warms up
            if number:
                seconds.setdefault(name, []).append(time.perf_counter() - began)
            if name == "floor":
                captions = [caption for tokens in captions for caption in captioner.decode(tokens)]
            lengths = [len(caption.split()) for caption in captions]
            assert lengths == [LENGTH] * len(paths[: None if number else 2]), f"unequal work: {name} {lengths}"
    return seconds


def bench_train(checkpoint: str, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds that a step takes each of the three, round by round. A toy CLIP rewards: its time is next to nothing."""
    values = dict(batch_size=batch_size, max_length=LENGTH, clip_steps=1, device="cpu")
    config, rng = distcap.configuration(distcap.TrainConfig, values), np.random.default_rng(0)
    world = distcap.toy_world(0, 8, 0)[0]
    words = [" ".join(f"word{number}" for number in rng.integers(3, 20, LENGTH)) for _ in world]
    examples = [distcap.dataclasses.replace(each, references=(text,)) for each, text in zip(world, words)]
    with tempfile.TemporaryDirectory() as folder:
        clip = distcap.toy_clip(Path(folder, "clip"), world, config, io.StringIO())
    captioner = distcap.Captioner.load(checkpoint)
    learner, optimizer = distcap.Learner(captioner, clip, examples, config), torch.optim.AdamW(captioner.parameters())
    batch = torch.arange(batch_size), words[:batch_size], captioner.pixels([each.image for each in world[:batch_size]])
    tokens = captioner.tokenize(batch[1], LENGTH)

    def pass_of(pixels: torch.Tensor, tokens: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        log_probs = captioner.log_probs(captioner.encode(pixels), tokens)
        return distcap.reinforce_loss(log_probs, captioner.mask(tokens), advantages)

    def step_distcap() -> torch.Tensor:
        return learner.reinforce_step(*batch)[0]

    def step_scripts() -> torch.Tensor:
        indices, ground_truth, pixels = batch
        with torch.no_grad():
            sampled = captioner.generate(captioner.encode(pixels), LENGTH, num_beams=5)
            greedy = captioner.generate(captioner.encode(pixels), LENGTH)
        texts = captioner.decode(sampled) + ground_truth + captioner.decode(greedy)
        rewards = learner.similarity_rewards(clip.embed_captions(texts), indices, indices.repeat(3))
        advantages, human, _ = rewards.chunk(3)
        return pass_of(pixels, sampled, advantages) + pass_of(pixels, tokens, human)

    def step_floor() -> torch.Tensor:
        features, twice = captioner.encode(batch[2]), torch.cat([tokens, tokens])
        log_probs = captioner.log_probs(torch.cat([features, features]), twice)
        return distcap.reinforce_loss(log_probs, captioner.mask(twice), torch.ones(len(twice)))

    contestants, seconds = dict(distcap=step_distcap, scripts=step_scripts, floor=step_floor), {}
    for number in range(rounds + 1):  # the first round warms up
        for name, step in contestants.items():
            began = time.perf_counter()
            optimizer.zero_grad()
            step().backward()
            optimizer.step()
            if number:
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> str:
    """The ratio of the medians, and how it varies from round to round."""
    each = [one / other for one, other in zip(above, below)]
    return f"{statistics.median(above) / statistics.median(below):.2f} ({min(each):.2f}-{max(each):.2f})"


def print_captions(given: argparse.Namespace) -> None:
    columns = ("size", "pictures", "distcap s", "plain s", "floor s", "distcap/floor", "plain/distcap")
    layout = "{:<6} {:>8} {:>10} {:>9} {:>9}   {:<18} {:<18}"
    print(layout.format(*columns), flush=True)
    for size, count in (("small", given.pictures), ("base", given.base_pictures)):
        with tempfile.TemporaryDirectory() as folder:
            if count:
                checkpoint, paths = save_checkpoint(Path(folder, size), size), draw_pictures(Path(folder), count)
                seconds = bench_caption(checkpoint, paths, given.batch_size, given.rounds)
                medians = (f"{statistics.median(each):.2f}" for each in seconds.values())
                ratios = ratio(seconds["distcap"], seconds["floor"]), ratio(seconds["plain"], seconds["distcap"])
                print(layout.format(size, count, *medians, *ratios), flush=True)


def print_steps(given: argparse.Namespace) -> None:
    columns = ("size", "distcap s", "scripts s", "floor s", "distcap/floor", "scripts/distcap")
    layout = "{:<6} {:>10} {:>10} {:>9}   {:<18} {:<18}"
    print(layout.format(*columns), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        seconds = bench_train(save_checkpoint(Path(folder), given.size), given.batch_size, given.rounds)
    medians = (f"{statistics.median(each):.2f}" for each in seconds.values())
    ratios = ratio(seconds["distcap"], seconds["floor"]), ratio(seconds["scripts"], seconds["distcap"])
    print(layout.format(given.size, *medians, *ratios), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    flags = verbs.add_parser("caption", help="speed of `distcap caption`")
    flags.add_argument("--pictures", type=int, default=200, help="pictures for the small captioner; 0: leave it out")
    flags.add_argument("--base-pictures", type=int, default=6, help="pictures for the base captioner; 0: leave it out")
    flags.add_argument("--batch-size", type=int, default=distcap.CaptionConfig.batch_size, help="pictures per batch")
    flags.add_argument("--rounds", type=int, default=3, help="how often each is timed; medians are printed")
    flags = verbs.add_parser("train", help="speed of a step of `distcap train`")
    flags.add_argument("--size", choices=("base", "small"), default="base", help="of the captioner")
    flags.add_argument("--batch-size", type=int, default=2, help="pictures per batch")
    flags.add_argument("--rounds", type=int, default=5, help="how often each is timed; medians are printed")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"batches of {given.batch_size}, {given.rounds} rounds, {torch.get_num_threads()} threads; medians")
    {"caption": print_captions, "train": print_steps}[given.verb](given)


if __name__ == "__main__":
    main()
