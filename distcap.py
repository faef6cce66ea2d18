"""distcap: distinctive image captioning with CLIP-guided reinforcement learning, in one readable file.

A captioner trained by teacher forcing says what is true of many pictures. This one learns to say what is true of *this*
picture: its reward is how well CLIP finds the picture from the caption, and back; human captions keep the writing
human. The method: Chaffin, Kijak and Claveau, "Distinctive Image Captioning: Leveraging Ground Truth Captions in CLIP
Guided Reinforcement Learning" (arXiv 2402.13936). Equations are numbered as in the README.

    python distcap.py train                                               # the whole method on a built-in toy world
    python distcap.py caption runs/toy/test --captioner runs/toy          # one line per picture
    python distcap.py eval runs/toy/test --captioner runs/toy             # the measures of the table

Read top to bottom: data flows down the file and never back up. Shape letters in comments: B images of a batch,
C captions of the pool, T tokens, V vocabulary, D embedding width.

Departures from the authors' scripts, explained in the README: (1) the ground-truth term trains on the ground truth;
(2) log-probabilities are means over real tokens; (3) samples are samples; (4) no dropout in RL; (5) Eq. 6 masks its own
pair out; (6) centred advantages; (7) no negative weight on ground truth; (8) measures that the reward cannot hack.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's: the message names the file, flag or value and the remedy. The command exits with 2."""


@contextlib.contextmanager
def explain(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any error within into a UserError of one line: what it is about, what the error says, the remedy."""
    try:
        yield
    except Exception as error:  # damaged files make libraries raise all kinds
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise UserError(f"{what} ({reason}){remedy}") from None


# ---- 1  Configuration: the only home of a default and of its help text. The command line's flags are made from it. ---
def option(default, help: str, **limits):
    """A field and its help text. `choices`, `minimum`, `maximum` limit it; `toy` is its default on the toy world."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What every verb needs to write a caption."""

    captioner: str | None = option("Salesforce/blip-image-captioning-base", "Hub name, folder or run folder", toy=None)
    clip: str | None = option(None, "open_clip NAME/TAG, hf-hub:NAME, a folder, or a run folder of `train`")
    prompt: str | None = option(None, "words to continue (default: as trained; else, of a BLIP, a picture of)")
    beams: int = option(1, "beam search width; 1 decodes greedily", minimum=1)
    max_length: int = option(20, "most tokens in a caption", minimum=1)
    batch_size: int = option(64, "pictures per batch", minimum=1)
    seed: int = option(0, "seed of everything random", minimum=0, maximum=2**32 - 1)
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Decoding):
    """Train a captioner: teacher forcing, then reinforcement learning; ends with a table of before and after."""

    data: str = option("toy", "toy (the built-in world), or a folder with metadata.jsonl", positional="?")
    out: str | None = option(None, "run folder (default: runs/<name of data>)")
    objective: str = option("rl", "rl: Eq. 2-9 after teacher forcing; tf: teacher forcing only", choices="rl tf")
    baseline: str = option("contrastive", "Eq. 6, 7, 9, 8 or none", choices="contrastive greedy group neighbours none")
    direction: str = option("both", "direction of Eq. 6", choices="both image-to-text text-to-image")
    samples: int = option(1, "captions drawn per picture", minimum=1)
    neighbours: int = option(0, "similar images of Eq. 8; with Eq. 6, they compete", minimum=0)
    similarity_weight: float = option(0.94, "alpha of Eq. 3; D weighs the rest", toy=0.99, minimum=0, maximum=1)
    sampled_weight: float = option(1.0, "weight of REINFORCE on sampled captions (Eq. 2)", minimum=0)
    ground_truth_weight: float = option(1.0, "weight of REINFORCE on ground truth (Eq. 5)", toy=2.0, minimum=0)
    tf_steps: int = option(0, "steps of teacher forcing, first", toy=600, minimum=0)
    tf_learning_rate: float = option(1e-5, "its peak learning rate", toy=2e-3, minimum=0)
    steps: int = option(10_000, "steps of reinforcement learning", toy=400, minimum=0)
    learning_rate: float = option(1e-6, "its peak learning rate", toy=6e-4, minimum=0)
    discriminator_learning_rate: float = option(7e-5, "learning rate of Eq. 4", toy=1e-3, minimum=0)
    max_gradient_norm: float = option(1.0, "gradients are scaled down to this norm", minimum=0)
    clip_steps: int = option(600, "toy only: steps of CLIP's pretraining", minimum=1)
    train_size: int | None = option(None, "use at most so many training examples", toy=8000, minimum=1)
    test_size: int = option(1000, "examples held out for the table", minimum=1)


@dataclasses.dataclass(frozen=True)
class CaptionConfig(Decoding):
    """Write a caption for every picture: path, tab, caption, a line each, on standard output."""

    paths: tuple[str, ...] = option((), "pictures, folders of pictures, - for a list of them on stdin", positional="+")
    recursive: bool = option(True, "look into folders within folders")
    out: str | None = option(None, "write to this .jsonl file instead; one that is there is continued")
    overwrite: bool = option(False, "caption anew what has a caption in --out")
    samples: int = option(0, "draw so many captions per picture; 0: beam search", minimum=0)
    temperature: float = option(0.7, "of --samples; 1 is the captioner's own distribution", minimum=0.01)
    top_p: float = option(1.0, "of --samples: only the likeliest tokens that make up so much", minimum=0, maximum=1)
    min_length: int = option(5, "fewest tokens in a caption", minimum=0)
    repetition_penalty: float = option(1.0, "above 1, words written already are less likely", minimum=0.01)
    rerank: bool = option(False, "of --samples (here 8), keep what best tells a picture from its batch (Eq. 6)")
    beams: int = option(3, "beam search width; 1 decodes greedily", minimum=1)


@dataclasses.dataclass(frozen=True)
class EvalConfig(Decoding):
    """Caption a data set and measure the captions."""

    data: str = option("", "folder with metadata.jsonl", positional=None)
    out: str | None = option(None, "write the measures to this JSON file")


def configuration(cls, values: dict):
    """Make a `cls`; what is not given gets its default. Raises UserError for a number out of its limits."""
    toy = cls is TrainConfig and values.get("data") in (None, "toy")
    for each in dataclasses.fields(cls):
        if values.get(each.name) is None:
            values[each.name] = each.metadata.get("toy", each.default) if toy else each.default
        value, low, high = values[each.name], each.metadata.get("minimum"), each.metadata.get("maximum", float("inf"))
        if None not in (value, low) and not low <= value <= high:
            raise UserError(f"--{each.name.replace('_', '-')} {value}: must be from {low} to {high}")
    if values["device"] == "auto":
        values["device"] = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with explain(f"--device {values['device']}: cannot be used", "; try auto"):
        torch.empty(0, device=values["device"])
    return cls(**values)


# ---- 2  Data: examples, the toy world, pictures from disk ------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Example:
    """A picture, on disk or in memory, and its references: the human captions. In the toy world, also its `scene`."""

    image_id: str
    image: Path | Image.Image
    references: tuple[str, ...]
    scene: str | None = None


SIZES = {"small": 4.5, "large": 7.5}  # radius in pixels
SHAPES = ("circle", "ring", "triangle", "star", "bar")
CORNERS = {  # in units of the radius, y downwards
    "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
    "star": ((0, -1), (0.3, -0.3), (1, 0), (0.3, 0.3), (0, 1), (-0.3, 0.3), (-1, 0), (-0.3, -0.3)),
    "bar": ((-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)),
}
COLOURS = dict(red="#e02020", green="#20a020", blue="#2040e0", yellow="#f0e000", purple="#8020a0", pink="#ff80c0",
               brown="#804010", cyan="#20d0e0")  # fmt: skip
BACKGROUNDS = dict(white="#ffffff", black="#000000", gray="#808080", beige="#e8d8b0")
RELATIONS = ("to the left of", "above")
WORDS = [*"a two shapes and on background to the left of above".split(), *SIZES, *SHAPES, *COLOURS, *BACKGROUNDS]

_NOUN = rf"a(?: ({'|'.join(SIZES)}))?(?: ({'|'.join(COLOURS)}))? ({'|'.join(SHAPES)})"
_BACKGROUND = rf"(?: on a ({'|'.join(BACKGROUNDS)}) background)?"
_GRAMMAR = re.compile(rf"(?:two shapes|{_NOUN} (and|{'|'.join(RELATIONS)}) {_NOUN}){_BACKGROUND}")


def parse(caption: str) -> tuple[str | None, ...] | None:
    """(size, colour, shape, relation, size, colour, shape, background), None where left open; None if ill-formed."""
    return (match := _GRAMMAR.fullmatch(caption)) and match.groups()


def is_true(caption: str, scene: str) -> bool:
    """Whether the caption is well-formed and nothing it says is false of the scene. "and" says nothing of the order."""
    said, seen = parse(caption), parse(scene)
    orders = [seen, (*seen[:3], "and", *seen[4:]), (*seen[4:7], "and", *seen[:3], seen[7])]
    return bool(said) and any(all(word in (None, true) for word, true in zip(said, order)) for order in orders)


def write_references(scene: str, rng: random.Random, count: int = 5, generic: float = 0.7) -> tuple[str, ...]:
    """What people might write: something generic, or else the whole scene."""
    _, colour1, shape1, _, _, colour2, shape2, background = parse(scene)
    coloured = f"a {colour1} {shape1} and a {colour2} {shape2}"
    choices = (coloured, coloured, f"a {shape1} and a {shape2}", f"two shapes on a {background} background")
    return tuple(rng.choice(choices) if rng.random() < generic else scene for _ in range(count))


def draw(scene: str, rng: random.Random, pixels: int = 32) -> Image.Image:
    """The scene as a picture; each shape's place varies by a pixel. Drawn four times too large, then shrunk."""
    size1, colour1, shape1, relation, size2, colour2, shape2, background = parse(scene)
    picture = Image.new("RGB", (4 * pixels, 4 * pixels), BACKGROUNDS[background])
    canvas = ImageDraw.Draw(picture)
    for along, size, colour, shape in ((8, size1, colour1, shape1), (24, size2, colour2, shape2)):
        x, y = 4 * (along + rng.uniform(-0.5, 0.5)), 4 * (16 + rng.uniform(-1, 1))
        x, y = (x, y) if relation == "to the left of" else (y, x)
        r, ink = 4 * SIZES[size], COLOURS[colour]
        if shape in CORNERS:
            canvas.polygon([(x + r * dx, y + r * dy) for dx, dy in CORNERS[shape]], fill=ink)
        else:  # a ring is a circle without its inside
            canvas.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=round(r if shape == "circle" else 0.45 * r))
    return picture.resize((pixels, pixels), Image.Resampling.BOX)


def toy_world(seed: int, train_size: int, test_size: int) -> tuple[list[Example], list[Example]]:
    """Training and test examples of the toy world. No scene occurs twice."""
    rng = random.Random(seed)
    nouns = [f"a {size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]
    scenes = [
        f"{first} {relation} {second} on a {background} background"
        for first in nouns for second in nouns for relation in RELATIONS for background in BACKGROUNDS
    ]  # fmt: skip
    if train_size + test_size > len(scenes):
        raise UserError(f"--train-size {train_size}: the toy world has {len(scenes)} scenes, test included")
    drawn = enumerate(rng.sample(scenes, train_size + test_size))
    examples = [Example(f"{n:05d}", draw(scene, rng), write_references(scene, rng), scene) for n, scene in drawn]
    return examples[:train_size], examples[train_size:]


ESCAPES = {9: "\\t", 10: "\\n", 13: "\\r"}  # lest a file's name look like two fields or lines
SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def load_image(image: Path | Image.Image) -> Image.Image:
    """Any picture as upright RGB: EXIF rotation, transparency on white, 16 bits scaled, first frame; or UserError."""
    with explain(f"{image}: cannot be read"):
        if isinstance(image, Path) and not image.is_file():
            raise OSError("no such file")  # a pipe or a device would be waited for
        picture = Image.open(image) if isinstance(image, Path) else image
        picture.load()  # a truncated file fails here, not later
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":  # 16 bits or more: convert("RGB") would clip nearly all of them to white
            high = 65535 if picture.mode.startswith("I;16") else picture.convert("F").getextrema()[1]
            white = 65535 if high > 255 else 255 if high > 1 else 1
            picture = picture.convert("F").point(lambda value: value * (255 / white) + 0.5).convert("L")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def find_images(paths: Iterable[str], recursive: bool = True) -> list[Path]:
    """The pictures named, and those in the folders named, each once, in order; hidden ones only if they are named."""
    found: dict[Path, None] = {}  # links to folders are not followed: they may go in circles
    for path in map(Path, paths):
        if not os.path.lexists(path):
            raise UserError(f"{path}: no such file or folder")
        # what os.walk cannot walk through is found, too: it is a picture, or fails later
        for folder, inner, names in os.walk(path, onerror=lambda error: found.setdefault(Path(error.filename))):
            inner[:] = sorted(name for name in inner if recursive and not name.startswith("."))
            pictures = sorted(name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
            found.update(dict.fromkeys(Path(folder, name) for name in pictures))
    if not found:
        raise UserError(f"{', '.join(paths) or '-'}: no pictures in this folder (looked for {' '.join(SUFFIXES)})")
    return list(found)


def read_rows(path: Path) -> dict[str, dict]:
    """{file_name: row} of a metadata.jsonl; a row's caption is a list, of all the captions given for the picture."""
    rows: dict[str, dict] = {}
    lines = enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"), 1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        with explain(f"{path}:{number}: not JSON with file_name and caption"):
            row = json.loads(line)
            name, captions = row["file_name"], [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
            if not captions or not all(isinstance(each, str) and each.strip() for each in (name, *captions)):
                raise ValueError("caption must be a text or a list of texts, none empty")
            rows[name] = row | {"caption": [*rows[name]["caption"], *captions] if name in rows else [*captions]}
    return rows


def write_rows(path: Path, rows: dict[str, dict]) -> None:
    """Write what `read_rows` reads, whole or not at all."""
    single = {name: {"caption": row["caption"][0]} for name, row in rows.items() if len(row["caption"]) == 1}
    lines = (json.dumps({"file_name": name} | row | single.get(name, {})) for name, row in rows.items())
    write_text(path, "".join(line + "\n" for line in lines))


def read_examples(folder: str) -> list[Example]:
    """Read a folder with pictures and their metadata.jsonl. Raises UserError for what is not as it should be."""
    table, examples = Path(folder) / "metadata.jsonl", []
    for name, row in (read_rows(table) if table.is_file() else {}).items():
        image, scene = table.parent / name, str(row.get("scene"))
        if not image.is_file():
            raise UserError(f"{table}: no such picture: {image}")
        examples.append(Example(name, image, tuple(row["caption"]), scene if parse(scene) else None))
    if not examples:
        raise UserError(f"{table}: no examples there; DATA must be a folder with pictures and a metadata.jsonl")
    return examples


def split(config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """Training and test examples from a data set of the user's, shuffled by the seed."""
    examples = read_examples(config.data)
    random.Random(config.seed).shuffle(examples)
    test_size = max(min(config.test_size, len(examples) // 5), 1)
    return examples[test_size:][: config.train_size], examples[:test_size]


def write_examples(folder: Path, examples: Sequence[Example]) -> list[Example]:
    """Save examples as PNG files and a metadata.jsonl; return them as `read_examples` reads them from there."""
    folder.mkdir(parents=True, exist_ok=True)
    for example in examples:
        load_image(example.image).save(folder / f"{example.image_id}.png")
    rows = {f"{each.image_id}.png": {"caption": each.references, "scene": each.scene} for each in examples}
    write_rows(folder / "metadata.jsonl", rows)
    return read_examples(str(folder))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def schedule(examples: Sequence[Example], batch_size: int, steps: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """For each step a batch of (index of an example, index of the reference that is its ground truth)."""
    rng = random.Random(seed)
    for _ in range(steps):  # drawn anew, never twice in a batch: a picture would be its own rival in Eq. 6
        batch = rng.sample(range(len(examples)), batch_size)
        yield [(index, rng.randrange(len(examples[index].references))) for index in batch]


# ---- 3  Captioner: encode once, then sample, decode greedily and score from the same features ------------------------
class Captioner(nn.Module):
    """A captioner p(c|i): BLIP, VisionEncoderDecoder (ViT-GPT2 and the like) or GIT, with its preprocessing.

    `tokens` are (B, T): P of `start` (start token and prompt, saved with the model), words, end, padding.
    """

    def __init__(self, model: nn.Module, image_processor, tokenizer, prompt: str | None = None) -> None:
        from transformers import GenerationConfig

        super().__init__()
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.family = model.config.model_type
        encoder_decoder = self.family == "vision-encoder-decoder"
        ids = model.generation_config if encoder_decoder else getattr(model.config, "text_config", model.config)
        start = ids.decoder_start_token_id if encoder_decoder else ids.bos_token_id
        self.end, self.pad = ids.sep_token_id if self.family == "blip" else ids.eos_token_id, ids.pad_token_id
        if prompt is None:  # a BLIP from elsewhere learned to caption after these words
            prompt = getattr(model.config, "prompt", "a picture of" if self.family == "blip" else "")
        self.prompt = model.config.prompt = prompt
        self.start = [start, *tokenizer(prompt, add_special_tokens=False).input_ids]
        self.longest = model.config.get_text_config(decoder=True).max_position_embeddings - len(self.start)
        ids = dict(decoder_start_token_id=start, eos_token_id=self.end, pad_token_id=self.pad)
        writer = model.text_decoder if self.family == "blip" else model
        writer.generation_config = GenerationConfig(**ids)  # the checkpoint's own settings would bias the samples

    @classmethod
    def load(cls, name: str, device: str = "cpu", prompt: str | None = None) -> Captioner:
        """Load a Hub name, a Hugging Face folder, or the captioner of a run folder: fp32, in eval mode."""
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        folder = local_folder(name, "captioner", "config.json")
        with explain(f"{name}: cannot load this captioner"):
            family = json.loads((folder / "config.json").read_text())["model_type"]
            if family not in (known := ("blip", "vision-encoder-decoder", "git")):
                raise ValueError(f"a model of type {family}; captioners are of type {', '.join(known)}")
            options = dict(dtype=torch.float32, output_loading_info=True)
            model, report = AutoModelForImageTextToText.from_pretrained(folder, **options)
            if report["missing_keys"]:
                raise ValueError(f"it lacks the weights {min(report['missing_keys'])}; is it complete?")
            parts = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            return cls(model, *parts, prompt).eval().to(device)

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder."""
        for part in (self.model, self.image_processor, self.tokenizer):
            part.save_pretrained(folder)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures, resized and normalised as the checkpoint wants them: (B, 3, H, W)."""
        return self.image_processor(list(images), return_tensors="pt").pixel_values

    def encode(self, pixels: Tensor) -> Tensor:
        """Image features (B, N, H), computed once and used by everything below."""
        pixels = pixels.to(self.model.device)
        if self.family == "git":
            return pixels  # it has no features to reuse
        return (self.model.vision_model if self.family == "blip" else self.model.encoder)(pixels).last_hidden_state

    def writer(self, features: Tensor, tokens: Tensor) -> tuple[nn.Module, dict]:
        """The module that writes, and its inputs: what it sees of each image, and the tokens so far."""
        if self.family == "blip":
            return self.model.text_decoder, {"input_ids": tokens, "encoder_hidden_states": features}
        if self.family == "git":
            return self.model, {"input_ids": tokens, "pixel_values": features}
        from transformers.modeling_outputs import BaseModelOutput

        return self.model, {"decoder_input_ids": tokens, "encoder_outputs": BaseModelOutput(features)}

    def tokenize(self, captions: Sequence[str], max_length: int) -> Tensor:
        """Captions as tokens (B, T), T <= P + max_length. Longer ones are cut, and then have no end token."""
        words = self.tokenizer([f"{self.prompt} {c}".strip() for c in captions], add_special_tokens=False).input_ids
        rows = [torch.tensor([self.start[0], *row, self.end][: len(self.start) + max_length]) for row in words]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad).to(self.model.device)

    def mask(self, tokens: Tensor) -> Tensor:
        """1.0 for the tokens after the start up to and with the first end, 0.0 for padding: (B, T - P)."""
        ends = tokens[:, len(self.start) :] == self.end
        return ((ends.cumsum(dim=1) - ends.long()) == 0).float()  # not `!= pad`: in GPT-2, pad is end

    @torch.no_grad()
    def generate(self, features: Tensor, max_length: int, **decoding) -> Tensor:
        """Write captions: tokens (B, T). Greedy, or as `decoding` says; do_sample=True draws from p(c|i) itself."""
        module, inputs = self.writer(features, torch.tensor([self.start] * len(features), device=self.model.device))
        pure = dict(top_k=0, top_p=1.0, temperature=1.0) if decoding.get("do_sample") else {"do_sample": False}
        return module.generate(**inputs, max_new_tokens=max_length, **(pure | decoding))

    def log_probs(self, features: Tensor, tokens: Tensor) -> Tensor:
        """log p of each token given those before it, in nats: (B, T - P). Differentiable; padding is up to `mask`."""
        module, inputs = self.writer(features, tokens[:, :-1])
        words = tokens[:, len(self.start) :, None]  # (B, T - P, 1)
        logits = module(**inputs).logits[:, -words.shape[1] :]  # (B, T - P, V): GIT's begin with the image
        return logits.log_softmax(dim=-1).gather(2, words).squeeze(2)

    def decode(self, tokens: Tensor) -> list[str]:
        """Tokens as text, each caption a single line."""
        words = tokens[:, len(self.start) :]
        texts = self.tokenizer.batch_decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        return [" ".join(text.split()) for text in texts]


def local_folder(name: str, inside: str, wanted: str) -> Path:
    """The folder of a checkpoint: `name`, `name`/`inside` (of a run), or the Hub's, cached or downloaded now."""
    for folder in (Path(name) / inside, Path(name)):
        if (folder / wanted).is_file():
            return folder
    if Path(name).exists():
        raise UserError(f"{name}: not a checkpoint: no {wanted} and no {inside}/{wanted} in it")
    from huggingface_hub import snapshot_download  # fails at once without the Hub; the libraries try for a minute

    patterns = ["*.json", "*.txt", "*.model", "open_clip_*.safetensors" if inside == "clip" else "*.safetensors"]
    with explain(f"{name}: not a folder, nor to be had from the Hugging Face Hub", "; give a folder, such as runs/toy"):
        return Path(snapshot_download(name, allow_patterns=patterns))


def toy_tokenizer():
    """A BERT tokenizer that knows the toy world's words. [SEP] has the highest id: CLIP pools at the argmax."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "[DEC]", *dict.fromkeys(WORDS), "[SEP]"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, bos_token="[DEC]")


def toy_captioner(seed: int) -> Captioner:
    """A BLIP of 0.5 M parameters with random weights, for 32-pixel pictures and the toy world's words."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    torch.manual_seed(seed)
    tokenizer = toy_tokenizer()
    # 0.1 is about 1 / sqrt(width). BLIP's own default for the vision tower, 1e-10, supposes that weights are loaded
    size = dict(hidden_size=96, intermediate_size=384, num_attention_heads=3, initializer_range=0.1)
    config = BlipConfig(
        vision_config=dict(size, num_hidden_layers=2, image_size=32, patch_size=8),
        text_config=dict(
            size, num_hidden_layers=1, encoder_hidden_size=96, vocab_size=len(tokenizer), max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.sep_token_id,
            sep_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
    )  # fmt: skip
    model, pixels = BlipForConditionalGeneration(config), BlipImageProcessor(size=dict(height=32, width=32))
    return Captioner(model, pixels, tokenizer, prompt="")


# ---- 4  CLIP: images and captions as unit rows -----------------------------------------------------------------------
class CLIP:
    """A frozen open_clip model: `embed_images` and `embed_captions` give unit rows (B, D) without gradient."""

    def __init__(self, model: nn.Module, preprocess, tokenizer, device: str | torch.device = "cpu") -> None:
        self.model, self.device = model.eval().to(device), device
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.logit_scale = model.logit_scale.exp().item()  # s, after exp

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> CLIP:
        """Load an open_clip NAME/TAG, hf-hub:NAME, a folder with open_clip_config.json, or the CLIP of a run folder."""
        import open_clip

        architecture, weights, options = name, None, {}
        if Path(name).exists() or name.startswith("hf-hub:"):
            architecture = f"local-dir:{local_folder(name.removeprefix('hf-hub:'), 'clip', 'open_clip_config.json')}"
        else:
            architecture, _, weights = name.rpartition("/")
            known = open_clip.get_pretrained_cfg(architecture, weights)
            # weights trained with QuickGELU embed wrongly without it, and open_clip only warns
            options = {"force_quick_gelu": known.get("quick_gelu", False)}
            options |= {f"image_{each}": known.get(each) for each in ("mean", "std", "interpolation", "resize_mode")}
            if repository := os.path.dirname(known.get("hf_hub", "")):
                weights = f"{local_folder(repository, 'clip', 'open_clip_config.json')}/open_clip_model.safetensors"
        with explain(f"{name}: cannot load this CLIP", "; give --clip NAME/TAG or a folder"):
            model, preprocess = open_clip.create_model_from_pretrained(architecture, weights, **options)
            return cls(model, preprocess, open_clip.get_tokenizer(architecture), device)

    @torch.no_grad()
    def embed_images(self, images: Iterable[Path | Image.Image], batch_size: int = 64) -> Tensor:
        """Pictures as unit rows (B, D). Raises UserError for one that cannot be read."""
        rows, images = [], iter(images)
        while batch := [self.preprocess(load_image(image)) for image in itertools.islice(images, batch_size)]:
            rows.append(self.model.encode_image(torch.stack(batch).to(self.device), normalize=True))
        return torch.cat(rows)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Captions as unit rows (B, D). Each distinct caption is embedded once, so that equal captions tie exactly."""
        distinct = list(dict.fromkeys(captions))
        batches = (distinct[start : start + batch_size] for start in range(0, len(distinct), batch_size))
        rows = [self.model.encode_text(self.tokenizer(batch).to(self.device), normalize=True) for batch in batches]
        number = {caption: row for row, caption in enumerate(distinct)}
        return torch.cat(rows)[[number[caption] for caption in captions]]


# ---- 5  Rewards: pure functions of unit embeddings; nothing here has a gradient to give ------------------------------
def similarity_reward(caption_embeddings: Tensor, image_embeddings: Tensor) -> Tensor:
    """Cosine of each caption with its own image: (C, D), (C, D) -> (C,), in [-1, 1]. The reward of Cho et al. 2022."""
    return (caption_embeddings * image_embeddings).sum(dim=1)


def contrastive_reward(
    caption_embeddings: Tensor, image_embeddings: Tensor, image_index: Tensor, logit_scale: float, direction="both"
) -> Tensor:
    """Bidirectional contrastive reward (Eq. 6) of each caption of the pool: (C, D), (I, D), (C,) -> (C,), as a cosine.

        a(c, i) = s e_c.e_i - log sum_{c' != c} exp(s e_c'.e_i)    image-to-text: does the image pick this caption?
        b(c, i) = s e_c.e_i - log sum_{i' != i} exp(s e_c.e_i')    text-to-image: does the caption pick its image?

    image_index[c] is c's own image. The reward is (a + b) / 2s; of one direction, a / s or b / s. The log-sum-exp is a
    soft maximum: the strongest competitor is the baseline; without any, it is zero. Only the scored pair is left out.
    """
    logits = logit_scale * caption_embeddings @ image_embeddings.T  # (C, I)
    own = logits.gather(1, image_index[:, None]).squeeze(1)  # (C,)
    competitors = logits.T[image_index].fill_diagonal_(-torch.inf), logits.scatter(1, image_index[:, None], -torch.inf)
    soft_maxima = [torch.where((value := each.logsumexp(dim=1)).isneginf(), 0.0, value) for each in competitors]
    image_to_text, text_to_image = own - soft_maxima[0], own - soft_maxima[1]
    both = (image_to_text + text_to_image) / 2
    return {"both": both, "image-to-text": image_to_text, "text-to-image": text_to_image}[direction] / logit_scale


def nearest_images(image_embeddings: Tensor, indices: Tensor, count: int) -> Tensor:
    """Of each image indexed, the `count` most similar other images, most similar first: (N, D), (B,) -> (B, count)."""
    similarity = image_embeddings[indices] @ image_embeddings.T  # (B, N)
    return similarity.scatter(1, indices[:, None], -torch.inf).topk(count, dim=1).indices  # no image is its own


def neighbours_reward(caption_embeddings: Tensor, image_embeddings: Tensor, neighbour_embeddings: Tensor) -> Tensor:
    """Cosine with the own image less the mean over its similar images (Eq. 8): (C, D), (C, D), (C, N, D) -> (C,)."""
    others = torch.einsum("cd,cnd->cn", caption_embeddings, neighbour_embeddings)
    return similarity_reward(caption_embeddings, image_embeddings) - others.mean(dim=1)


def mixed_reward(similarity: Tensor, regularizer: Tensor, similarity_weight: float) -> Tensor:
    """r = alpha r_sim + (1 - alpha) r_reg (Eq. 3), elementwise."""
    return similarity_weight * similarity + (1 - similarity_weight) * regularizer


def self_critical_advantages(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """A = r - r(greedy caption of the same image) (Eq. 7): (B,), (B,) -> (B,)."""
    return rewards - greedy_rewards


def group_advantages(rewards: Tensor) -> Tensor:
    """A = r - the mean reward of the other samples of the same image (Eq. 9): (B, K) -> (B, K), K > 1."""
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


# ---- 6  Discriminator: is this caption human? ------------------------------------------------------------------------
class Discriminator(nn.Sequential):
    """D(i, c) of Eq. 4: two hidden layers on e_i and e_c side by side; `forward` gives logits (C,)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(2 * width, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, image_embeddings: Tensor, caption_embeddings: Tensor) -> Tensor:
        return super().forward(torch.cat([image_embeddings, caption_embeddings], dim=1)).squeeze(1)


def discriminator_loss(sampled_logits: Tensor, ground_truth_logits: Tensor) -> Tensor:
    """Binary cross-entropy (Eq. 4), in nats: sampled captions are 0, ground truth is 1, both halves weigh the same."""
    return (F.softplus(sampled_logits).mean() + F.softplus(-ground_truth_logits).mean()) / 2


# ---- 7  Objective: the only place where a loss of the captioner is made ----------------------------------------------
def mean_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    """log p(c|i) of each caption: the mean over its real tokens, in nats: (B, T), (B, T) -> (B,)."""
    return (log_probs * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def teacher_forcing_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """-log p(ground truth | i) (Eq. 1), the mean over the batch: (B, T), (B, T) -> ()."""
    return -mean_log_probs(log_probs, mask).mean()


def reinforce_loss(log_probs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """-A log p(c|i) (Eq. 2), the mean over the batch: (B, T), (B, T), (B,) -> (). The advantages are detached.

    The gradient is the score function's, and only it means something: the value is no measure of progress.
    """
    return -(advantages.detach() * mean_log_probs(log_probs, mask)).mean()


def ground_truth_loss(log_probs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE with the ground-truth caption as the trajectory (Eq. 5): teacher forcing weighted by distinctiveness.

    Negative advantages count as zero: a human caption that is less distinctive than others is not to be unlearned.
    """
    return reinforce_loss(log_probs, mask, advantages.clamp(min=0))


# ---- 8  Training -----------------------------------------------------------------------------------------------------
def fit(stage: str, model: nn.Module, step: Callable, batches, learning_rate: float, config: TrainConfig, log) -> None:
    """The loop of every stage: batch -> `step`, a loss and what to log -> gradient, if finite -> AdamW, one cycle."""
    optimizer, bad = torch.optim.AdamW(model.parameters(), lr=learning_rate), 0
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(len(batches), 2))
    bar = tqdm(batches, stage, disable=None)
    for number, batch in enumerate(bar):
        torch.manual_seed(config.seed * 1_000_003 + number)  # a step's randomness depends on nothing before it
        loss, record = step(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        bad = 0 if torch.isfinite(loss + norm) else bad + 1
        if bad == 10:
            raise UserError(f"{stage}: ten steps in a row were not finite; try a lower --learning-rate")
        if not bad:
            optimizer.step()
        cycle.step()
        log.write(json.dumps({"stage": stage, "step": number, "loss": loss.item(), **record}) + "\n")
        bar.set_postfix({name: f"{value:.3f}" for name, value in record.items()})


def toy_clip(folder: Path, examples: Sequence[Example], config: TrainConfig, log, width: int = 96) -> CLIP:
    """Train an open_clip model of 0.5 M parameters on pictures and alt texts with CLIP's loss, save it, and load it."""
    import open_clip
    from safetensors.torch import save_model

    tower = dict(width=width, layers=2)
    text = dict(tower, heads=3, context_length=20, vocab_size=len(toy_tokenizer()), hf_tokenizer_name="toy")
    shape = dict(embed_dim=width, vision_cfg=dict(tower, head_width=32, image_size=32, patch_size=8), text_cfg=text)
    toy_tokenizer().save_pretrained(folder)
    write_text(folder / "open_clip_config.json", json.dumps({"model_cfg": shape, "preprocess_cfg": {}}, indent=2))
    torch.manual_seed(config.seed)
    tokenizer, model = open_clip.get_tokenizer(f"local-dir:{folder}"), open_clip.CLIP(**shape).to(config.device)
    contrastive_loss, preprocess = open_clip.ClipLoss(), open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([preprocess(example.image) for example in examples]).to(config.device)
    rng = random.Random(config.seed)

    def step(batch: Sequence[tuple[int, int]]) -> tuple[Tensor, dict[str, float]]:
        indices = [index for index, _ in batch]
        texts = [write_references(examples[index].scene, rng, 1, generic=0.2)[0] for index in indices]
        return contrastive_loss(*model(pixels[indices], tokenizer(texts).to(pixels.device))), {}

    batches = list(schedule(examples, min(128, len(examples)), config.clip_steps, config.seed))
    fit("clip", model, step, batches, 2e-3, config, log)
    save_model(model, str(folder / "open_clip_model.safetensors"))
    return CLIP.load(str(folder), config.device)


class Learner:
    """A captioner that learns from examples, and what teaches it. A step takes B indices of examples, a ground-truth
    caption of each, and their pixels; it gives a loss and what to log."""

    def __init__(self, captioner: Captioner, clip: CLIP, examples: Sequence[Example], config: TrainConfig) -> None:
        self.captioner, self.clip, self.examples, self.config = captioner, clip, examples, config
        self.images = clip.embed_images(example.image for example in examples)  # (N, D), once for all epochs
        torch.manual_seed(config.seed)
        self.discriminator = Discriminator(self.images.shape[1]).to(clip.device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=config.discriminator_learning_rate)

    def fit(self, objective: str, log) -> None:
        """Run one stage: `tf`, by Eq. 1, or `rl`, by Eq. 2-9."""
        config, step, steps, rate = self.config, self.reinforce_step, self.config.steps, self.config.learning_rate
        if objective == "tf":
            step, steps, rate = self.teacher_forcing_step, config.tf_steps, config.tf_learning_rate
        self.captioner.train(objective == "tf")  # in RL no dropout: score the policy that was sampled

        def read_and_step(batch: Sequence[tuple[int, int]]) -> tuple[Tensor, dict[str, float]]:
            chosen = [self.examples[index] for index, _ in batch]
            ground_truth = [example.references[which] for example, (_, which) in zip(chosen, batch)]
            pixels = self.captioner.pixels([load_image(example.image) for example in chosen])  # (B, 3, H, W)
            return step(torch.tensor([index for index, _ in batch]).to(self.images.device), ground_truth, pixels)

        batches = list(schedule(self.examples, config.batch_size, steps, config.seed))
        fit(objective, self.captioner, read_and_step, batches, rate, config, log)
        self.captioner.eval()

    def teacher_forcing_step(self, indices: Tensor, ground_truth: list[str], pixels: Tensor) -> tuple[Tensor, dict]:
        """The loss of Eq. 1."""
        tokens = self.captioner.tokenize(ground_truth, self.config.max_length)
        log_probs = self.captioner.log_probs(self.captioner.encode(pixels), tokens)
        return teacher_forcing_loss(log_probs, self.captioner.mask(tokens)), {}

    def reinforce_step(self, indices: Tensor, ground_truth: list[str], pixels: Tensor) -> tuple[Tensor, dict]:
        """The loss of Eq. 2-9. The discriminator takes its step, too."""
        captioner, config, features = self.captioner, self.config, self.captioner.encode(pixels)  # (B, N, H), once
        seen, longest, count = features.detach(), config.max_length, config.samples
        sampled = captioner.generate(seen, longest, do_sample=True, num_return_sequences=count)  # an image's K in a row
        human, greedy = captioner.tokenize(ground_truth, longest), captioner.generate(seen, longest)
        pool = [*sampled, *human, *greedy]  # C = KB + B + B captions
        tokens = nn.utils.rnn.pad_sequence(pool, batch_first=True, padding_value=captioner.pad)  # (C, T)
        captions = self.clip.embed_captions(captioner.decode(sampled) + ground_truth + captioner.decode(greedy))
        rows, sizes = torch.arange(len(indices), device=indices.device), (len(sampled), len(human), len(greedy))
        own = torch.cat([rows.repeat_interleave(count), rows, rows])  # (C,): whose caption it is, a row of the batch
        similarity = self.similarity_rewards(captions, indices, own)
        logits = self.discriminator(self.images[indices][own], captions)  # (C,), before its step
        sampled_logits, human_logits, _ = logits.split(sizes)
        self.optimizer.zero_grad()
        discriminator_loss(sampled_logits, human_logits).backward()
        self.optimizer.step()
        rewards = mixed_reward(similarity, logits.detach().sigmoid(), config.similarity_weight)  # (C,)
        advantages, human_advantages = self.advantages(*rewards.split(sizes))
        drawn, trained = len(sampled), len(sampled) + len(human)
        log_probs = captioner.log_probs(features[own[:trained]], tokens[:trained])  # one pass for both terms
        mask = captioner.mask(tokens[:trained])
        sampled_loss = reinforce_loss(log_probs[:drawn], mask[:drawn], advantages)
        human_loss = ground_truth_loss(log_probs[drawn:], mask[drawn:], human_advantages)
        return config.sampled_weight * sampled_loss + config.ground_truth_weight * human_loss, {
            "reward": rewards[:drawn].mean().item(),
            "ground_truth_reward": rewards[drawn:trained].mean().item(),
            "discriminator_accuracy": torch.cat([sampled_logits < 0, human_logits > 0]).float().mean().item(),
            "mean_length": mask[:drawn].sum(dim=1).mean().item(),
        }

    def similarity_rewards(self, captions: Tensor, indices: Tensor, own: Tensor) -> Tensor:
        """r_sim: Eq. 6, Eq. 8 or, for other baselines, the cosine with the own image: (C, D), (B,), (C,) -> (C,)."""
        images, count = self.images[indices], self.config.neighbours  # (B, D)
        near = nearest_images(self.images, indices, count) if count else indices[:0]  # (B, n), or none
        if self.config.baseline == "contrastive":
            images = torch.cat([images, self.images[near[~torch.isin(near, indices)].unique()]])  # hard negatives
            return contrastive_reward(captions, images, own, self.clip.logit_scale, self.config.direction)
        if self.config.baseline == "neighbours":
            return neighbours_reward(captions, images[own], self.images[near[own]])
        return similarity_reward(captions, images[own])

    def advantages(self, sampled: Tensor, ground_truth: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (KB,), (B,), (B,) -> advantages of the sampled (KB,) and of the ground-truth captions (B,)."""
        groups = sampled.view(len(greedy), -1)  # (B, K)
        if self.config.baseline == "greedy":
            own = greedy.repeat_interleave(groups.shape[1])
            return self_critical_advantages(sampled, own), self_critical_advantages(ground_truth, greedy)
        if self.config.baseline == "group":
            return group_advantages(groups).flatten(), ground_truth - groups.mean(dim=1)
        # Eq. 6 has its baseline inside: the ground truth's reward says how far it beats its competitors
        return sampled - sampled.mean() if self.config.baseline == "contrastive" else sampled, ground_truth


# ---- 9  Evaluation ---------------------------------------------------------------------------------------------------
def retrieval_ranks(queries: Tensor, targets: Tensor) -> Tensor:
    """Rank, from 1, of target n for query n: (N, D), (N, D) -> (N,). Ties are lost: to say one thing scores nothing."""
    similarity = queries @ targets.T  # (N, N)
    return (similarity >= similarity.diagonal()[:, None] - 1e-6).sum(dim=1)  # counts the target itself


def retrieval(caption_embeddings: Tensor, image_embeddings: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank, both ways, over all the images given."""
    measures, rows = {}, (caption_embeddings, image_embeddings)
    for direction, (queries, targets) in {"text_to_image": rows, "image_to_text": rows[::-1]}.items():
        ranks = retrieval_ranks(queries, targets)
        measures |= {f"{direction}_R@{k}": (ranks <= k).float().mean().item() for k in (1, 5, 10)}
        measures[f"{direction}_median_rank"] = ranks.median().item()
    return measures


def ngram_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4, ROUGE-L and CIDEr by pycocoevalcap, on lower-case words without punctuation."""
    from pycocoevalcap.eval import Bleu, Cider, Rouge

    words = re.compile(r"\w+(?:['-]\w+)*").findall
    written = {number: [" ".join(words(caption.lower()))] for number, caption in enumerate(captions)}
    human = {number: [" ".join(words(text.lower())) for text in texts] for number, texts in enumerate(references)}
    return {
        "bleu_4": float(Bleu(4).compute_score(human, written, verbose=0)[0][3]),
        "rouge_l": float(Rouge().compute_score(human, written)[0]),
        "cider": float(Cider().compute_score(human, written)[0]),
    }


def toy_measures(captions: Sequence[str], scenes: Sequence[str]) -> dict[str, float]:
    """What only a known world can tell. oracle_R@1: 1 / number of scenes a caption is true of; 0 if not of its own."""
    faithful = [is_true(caption, scene) for caption, scene in zip(captions, scenes)]
    matches = {caption: sum(is_true(caption, scene) for scene in scenes) for caption in set(captions)}
    return {
        "well_formed": statistics.fmean(parse(caption) is not None for caption in captions),
        "faithful": statistics.fmean(faithful),
        "oracle_R@1": statistics.fmean(true / max(matches[caption], 1) for true, caption in zip(faithful, captions)),
    }


def evaluate(captions: Sequence[str], examples: Sequence[Example], images: Tensor, clip: CLIP) -> dict[str, float]:
    """All the measures of captions[n] for examples[n], of which images[n] is the image's embedding: (N, D)."""
    measures = retrieval(clip.embed_captions(captions), images)
    measures |= ngram_metrics(captions, [example.references for example in examples])
    measures["mean_length"] = statistics.fmean(len(caption.split()) for caption in captions)
    measures["distinct"] = len(set(captions)) / len(captions)
    if all(example.scene for example in examples):
        measures |= toy_measures(captions, [example.scene for example in examples])
    return measures


def table(columns: dict[str, dict[str, float]]) -> str:
    """Measures as lines, a column per mapping; shares in percent."""
    rows = [("", *columns)]
    for name in next(iter(columns.values())):
        share = "R@" in name or name in ("well_formed", "faithful", "distinct")
        form = "{:.1%}" if share else "{:,.0f}" if "rank" in name else "{:.3f}"
        rows.append((name, *(form.format(column[name]) for column in columns.values())))
    return "\n".join(f"{name:26}" + "".join(f" {value:>10}" for value in values) for name, *values in rows)


# ---- 10  Command line ------------------------------------------------------------------------------------------------
@torch.no_grad()
def write_captions(
    captioner: Captioner, images: Sequence[Path], config: Decoding, clip: CLIP | None = None, skip=False, **decoding
) -> Iterator[list[str] | UserError]:
    """Captions of each picture; with a `clip`, the best one. A bad file's error is raised, or given if `skip`."""
    if config.max_length > captioner.longest:
        raise UserError(f"--max-length {config.max_length}: this captioner writes at most {captioner.longest} tokens")
    with ThreadPoolExecutor() as threads:
        for start in tqdm(range(0, len(images), config.batch_size), "caption", disable=None):
            torch.manual_seed(config.seed * 1_000_003 + start)
            loads = [threads.submit(load_image, image) for image in images[start : start + config.batch_size]]
            captions = iter(())
            if good := [load.result() for load in loads if not (skip and load.exception())]:
                features = captioner.encode(captioner.pixels(good))
                written = captioner.decode(
                    captioner.generate(features, config.max_length, **{"num_beams": config.beams} | decoding)
                )
                written = rerank(written, clip, clip.embed_images(good)) if clip else written
                captions = zip(*[iter(written)] * (len(written) // len(good)))
            yield from (load.exception() or list(next(captions)) for load in loads)


def rerank(captions: Sequence[str], clip: CLIP, image_embeddings: Tensor) -> list[str]:
    """Of the N captions of each of B images the one with the highest reward of Eq. 6, all B * N competing."""
    count = len(captions) // len(image_embeddings)
    own = torch.arange(len(image_embeddings), device=image_embeddings.device).repeat_interleave(count)
    rewards = contrastive_reward(clip.embed_captions(captions), image_embeddings, own, clip.logit_scale)
    return [captions[row * count + best] for row, best in enumerate(rewards.view(-1, count).argmax(dim=1).tolist())]


def clip_name(config: Decoding) -> str:
    """The CLIP that the flags name; else the one that the captioner's run learned with; else the usual one."""
    if not config.clip and Path(config.captioner, "captioner").is_dir():
        return json.loads(Path(config.captioner, "config.json").read_text())["clip"] or config.captioner
    return config.clip or "ViT-B-32/openai"


def train(config: TrainConfig) -> None:
    """`distcap train`: see TrainConfig."""
    out, toy = Path(config.out or f"runs/{Path(config.data).resolve().name}"), config.data == "toy"
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or give another folder with --out")
    if config.objective == "tf" and not config.tf_steps:
        raise UserError("--objective tf --tf-steps 0: nothing to train; give --tf-steps")
    if toy and config.clip and not config.captioner:
        raise UserError(f"--clip {config.clip}: the toy world trains its own, unless --captioner is given too")
    training, test = toy_world(config.seed, config.train_size, config.test_size) if toy else split(config)
    if len(training) < max(config.batch_size, config.neighbours + 1):
        raise UserError(f"--batch-size, --neighbours: only {len(training)} training examples; give less")
    flag, least = {"group": ("samples", 2), "neighbours": ("neighbours", 1)}.get(config.baseline, ("samples", 1))
    if getattr(config, flag) < least:
        raise UserError(f"--baseline {config.baseline}: needs --{flag} {least} or more")
    if config.captioner:
        config = dataclasses.replace(config, clip=clip_name(config))
        captioner = Captioner.load(config.captioner, config.device, config.prompt)
        clip = CLIP.load(config.clip, config.device)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", json.dumps(dataclasses.asdict(config), indent=2))
    if toy:
        test = write_examples(out / "test", test)
    with open(out / "log.jsonl", "w", encoding="utf-8") as log:
        if not config.captioner:
            captioner = toy_captioner(config.seed).to(config.device)
            clip = toy_clip(out / "clip", training, config, log)
        learner, images = Learner(captioner, clip, training, config), [example.image for example in test]
        shown = clip.embed_images(images)  # a picture that cannot be read ends the run here, before the slow part
        if config.objective == "rl":
            learner.fit("tf", log)
        before = [each for (each,) in write_captions(captioner, images, config)]
        learner.fit(config.objective, log)
    captioner.save(out / "captioner")
    captions = {"before": before, "after": [each for (each,) in write_captions(captioner, images, config)]}
    measured = {row: evaluate(captions[row], test, shown, clip) for row in captions}
    about = dict(split="test", images=len(test), seed=config.seed, beams=config.beams, max_length=config.max_length)
    about["versions"] = {name: version(name) for name in ("torch", "transformers", "open_clip_torch", "pycocoevalcap")}
    write_text(out / "results.json", json.dumps(measured | about, indent=2))
    print(table(measured))
    for example, *pair in zip(test[:6], *captions.values()):
        print(f"\n{example.image_id}\n  before  {pair[0]}\n  after   {pair[1]}")


def caption(config: CaptionConfig) -> int:
    """`distcap caption`: see CaptionConfig."""
    out = Path(config.out) if config.out else None
    if out and (out.suffix != ".jsonl" or not out.parent.is_dir()):
        raise UserError(f"--out {out}: must be a .jsonl file in a folder that exists")
    listed = sys.stdin.read().split("\n") if "-" in config.paths else []
    found = find_images([path for path in (*config.paths, *listed) if path not in ("-", "")], config.recursive)
    rows = read_rows(out) if out and out.exists() else {}
    names = {path: os.path.relpath(path, out.parent) if out else "" for path in found}
    paths, failures = [path for path in found if config.overwrite or names[path] not in rows], []
    captioner = Captioner.load(config.captioner, config.device, config.prompt) if paths else None
    clip = CLIP.load(clip_name(config), config.device) if paths and config.rerank else None
    extra = dict(repetition_penalty=config.repetition_penalty, min_new_tokens=min(config.min_length, config.max_length))
    if samples := config.samples or 8 * config.rerank:
        drawing = dict(do_sample=True, temperature=config.temperature, top_p=config.top_p)
        extra |= drawing | dict(num_beams=1, num_return_sequences=samples)
    captions = write_captions(captioner, paths, config, clip, skip=True, **extra)
    for number, (path, written) in enumerate(zip(paths, captions), 1):
        if isinstance(written, UserError):
            failures.append(written)
        elif out:
            rows[names[path]] = rows.get(names[path], {}) | {"caption": written}
        else:
            print(*(f"{str(path).translate(ESCAPES)}\t{each}" for each in written), sep="\n", flush=True)
        if out and (number % config.batch_size == 0 or number == len(paths)):  # always whole, so never cut short
            write_rows(out, rows)
    for failure in failures:
        print(f"distcap: {str(failure).translate(ESCAPES)}", file=sys.stderr)
    if out:
        done, kept = len(paths) - len(failures), len(found) - len(paths)
        print(f"distcap: {done} captioned, {len(failures)} failed, {kept} had a caption", file=sys.stderr)
    return 1 if failures else 0


def evaluate_command(config: EvalConfig) -> None:
    """`distcap eval`: see EvalConfig."""
    examples = read_examples(config.data)
    if config.out and not Path(config.out).parent.is_dir():
        raise UserError(f"--out {config.out}: the folder {Path(config.out).parent} is not there; make it first")
    captioner = Captioner.load(config.captioner, config.device, config.prompt)
    clip = CLIP.load(clip_name(config), config.device)
    images = [example.image for example in examples]
    captions = [each for (each,) in write_captions(captioner, images, config)]
    measures = evaluate(captions, examples, clip.embed_images(images), clip)
    print(table({Path(config.data).resolve().name: measures}))
    if config.out:
        write_text(Path(config.out), json.dumps(measures, indent=2))


VERBS = {"train": (TrainConfig, train), "caption": (CaptionConfig, caption), "eval": (EvalConfig, evaluate_command)}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_flags(parser: argparse.ArgumentParser, cls) -> None:
    """A flag for each field of a configuration; one that is not given parses as None, `configuration` has defaults."""
    for each in dataclasses.fields(cls):
        limits, flag, kind = each.metadata, "--" + each.name.replace("_", "-"), each.type.split(" ")[0]
        toy = f"; on toy {limits['toy'] or 'its own'}" if "toy" in limits else ""
        told = toy or each.default not in (None, "", ())
        help = limits["help"] + (f" (default: {each.default}{toy})" if told else "")
        if "positional" in limits:
            parser.add_argument(each.name, metavar=each.name.upper(), nargs=limits["positional"], help=limits["help"])
        elif kind == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        elif "choices" in limits:
            parser.add_argument(flag, choices=limits["choices"].split(), help=help)
        else:
            convert, metavar = {"int": (int, "N"), "float": (float, "X")}.get(kind, (str, "TEXT"))
            parser.add_argument(flag, type=convert, metavar=metavar, help=help)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 some inputs failed, 2 the user's mistake."""
    parser = Parser("distcap", description="Distinctive image captioning with CLIP-guided reinforcement learning.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,caption,eval}")
    for verb, (cls, _) in VERBS.items():
        add_flags(verbs.add_parser(verb, help=cls.__doc__, description=cls.__doc__), cls)
    values = vars(parser.parse_args(arguments))
    cls, run = VERBS[values.pop("verb")]
    logging.getLogger().setLevel(logging.CRITICAL)  # the libraries announce what they load
    logging.captureWarnings(True)  # and Pillow warns of what it reads all the same
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # names need not be UTF-8; a notebook's streams cannot change
        getattr(stream, "reconfigure", dict)(encoding="utf-8", errors="surrogateescape")
    try:
        return run(configuration(cls, values)) or 0
    except (BrokenPipeError, KeyboardInterrupt) as stop:  # whoever read us has seen enough, as `head` does; or Ctrl-C
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130 if isinstance(stop, KeyboardInterrupt) else 0
    except (UserError, OSError) as error:  # a full disk or a folder that must not be written to: no bug of ours
        print(f"distcap: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
