"""How well the measures of `distcap eval` agree with people: the Flickr8k-Expert table of Hessel et
al. 2021 (CLIPScore), ours beside theirs.

    python tests/bench/flickr8k.py FOLDER    # half a minute; needs Java, but no pictures
    python tests/bench/flickr8k.py FOLDER --images Flicker8k_Dataset --metrics clipscore

FOLDER holds Flickr8k.token.txt and ExpertAnnotations.txt of the Flickr8k text archive. Three people
rated 5,822 pairs of a picture and a caption from 1 to 4. The 158 pairs whose caption is one of the
picture's own references are left out. What remains is given to `distcap eval` as a data set and a
file of captions, and Kendall's tau_c (Stuart's) is taken between each measure of the single pairs
and their ratings, three for each pair.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

import distcap

PUBLISHED = {"bleu_1": 32.3, "bleu_4": 30.8, "rouge_l": 32.3, "meteor": 41.8, "cider": 43.9,
             "clip_score": 51.2, "ref_clip_score": 53.0}  # fmt: skip


def read_pairs(folder: Path) -> list[tuple[str, str, list[str], list[int]]]:
    """Picture, caption, the picture's references and three ratings of each pair that counts."""
    texts: dict[str, list[str]] = {}
    captions = {}
    for line in (folder / "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines():
        key, text = line.split("\t")
        captions[key] = text
        texts.setdefault(key.split("#")[0], []).append(text)
    pairs = []
    for line in (folder / "ExpertAnnotations.txt").read_text().splitlines():
        picture, key, *ratings = line.split("\t")
        if captions[key] not in texts[picture]:
            pairs.append((picture, captions[key], texts[picture], list(map(int, ratings))))
    return pairs


def tau_c(values: list[float], ratings: list[int]) -> float:
    """Stuart's tau_c: concordant less discordant pairs, 2 (P - Q) / (n^2 (m - 1) / m), where m is
    the smaller number of different values."""
    x = torch.tensor(values, dtype=torch.float64)
    y = torch.tensor(ratings)
    balance = 0
    for rows in torch.arange(len(x)).split(256):
        signs = (x[rows, None] - x).sign().to(torch.int8)
        balance += (signs * (y[rows, None] - y).sign().to(torch.int8)).sum(dtype=torch.int64).item()
    m = min(len(x.unique()), len(y.unique()))
    return balance / (len(x) ** 2 * (m - 1) / m)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", help="the folder of the pictures, for --metrics clipscore")
    parser.add_argument("--metrics", nargs="+", default=["bleu", "rouge", "cider", "meteor"])
    parser.add_argument("--tokenizer", default="ptb")
    flags = parser.parse_args()
    pairs = read_pairs(flags.folder)
    print(f"{len(pairs)} pairs, --tokenizer {flags.tokenizer}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows, captions = [], []
        for number, (picture, caption, references, _) in enumerate(pairs):
            name = f"{number}.jpg"  # a pair is a picture of its own
            if flags.images:
                (folder / name).symlink_to(Path(flags.images, picture).resolve())
            rows.append({"file_name": name, "caption": references})
            captions.append({"image_id": name, "caption": caption})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "captions.json").write_text(json.dumps(captions))
        command = ["eval", str(folder), "--captions", str(folder / "captions.json")]
        command += ["--metrics", *flags.metrics, "--out", str(folder / "x.json")]
        if set(flags.metrics) - {"clipscore"}:
            command += ["--tokenizer", flags.tokenizer]
        if status := distcap.main(command):
            return status
        each = list(map(json.loads, (folder / "x.each.jsonl").read_text().splitlines()))

    print("\nKendall's tau_c with the ratings, times 100\n                  ours  published")
    ratings = [rating for *_, three in pairs for rating in three]
    for name, published in PUBLISHED.items():
        if name in each[0]:
            values = [row[name] for row in each for _ in range(3)]
            print(f"{name:16} {100 * tau_c(values, ratings):5.1f} {published:10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
