"""The README's results table: the toy world over seeds and objectives, each row from the same start of its seed.

    python tests/claims.py --seeds 3               # print the table (Markdown); runs go to runs/claims
    python tests/claims.py --seeds 3 --readme      # and put it into README.md, between its two markers

A start (CLIP pretrained, captioner teacher-forced) is made once per seed; every other row continues from it. Finished
runs are kept: an interrupted command picks up where it stopped.
"""

import argparse
import json
import re
import shutil
import statistics
from pathlib import Path

import distcap

RERANKED = "teacher forcing, best of 8 by CLIP"  # caption --samples 8 --rerank: no training
ROWS = {
    "teacher forcing": None,
    RERANKED: None,
    "CLIP reward, self-critical": ["--similarity-weight", "1", "--ground-truth-weight", "0", "--baseline", "greedy"],
    "**the full method**": [],
}
COLUMNS = {
    "text_to_image_R@1": "text-to-image R@1",
    "image_to_text_R@1": "image-to-text R@1",
    "oracle_R@1": "oracle R@1",
    "well_formed": "well-formed",
    "faithful": "faithful",
    "cider": "CIDEr",
    "bleu_4": "BLEU-4",
    "mean_length": "words",
}


def measures(row: str, seed: int, out: Path, extra: list[str]) -> dict[str, float]:
    """The `after` measures of one row and seed; trains it if it is not there yet."""
    start = out / f"seed{seed}-start"
    if row == RERANKED:
        return reranked(start, seed)
    folder = start if ROWS[row] is None else out / f"seed{seed}-{list(ROWS).index(row)}"
    if not (folder / "results.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        flags = ["--objective", "tf"] if ROWS[row] is None else [
            "--captioner", str(start), "--clip", str(start), "--tf-steps", "0", *ROWS[row]
        ]  # fmt: skip
        status = distcap.main(["train", "--seed", str(seed), "--out", str(folder), *flags, *extra])
        assert status == 0, f"{row}, seed {seed}: exit {status}"
    return json.loads((folder / "results.json").read_text())["after"]


def reranked(start: Path, seed: int) -> dict[str, float]:
    """The measures of the start's captions, each the best of 8 samples by Eq. 6 within batches of 64."""
    measured = start / "reranked.json"
    if not measured.exists():
        values = {"seed": seed, "captioner": str(start), "batch_size": 64}
        config = distcap.configuration(distcap.CaptionConfig, values)
        captioner, clip = (
            distcap.Captioner.load(str(start), config.device),
            distcap.CLIP.load(str(start), config.device),
        )
        examples = distcap.read_examples(str(start / "test"))
        images = [example.image for example in examples]
        drawn = dict(do_sample=True, num_beams=1, temperature=config.temperature, num_return_sequences=8)
        captions = [each for (each,) in distcap.write_captions(captioner, images, config, clip, **drawn)]
        measures = distcap.evaluate(captions, examples, clip, clip.embed_images(images))
        distcap.write_text(measured, json.dumps(measures, indent=2))
    return json.loads(measured.read_text())


def markdown(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation over the seeds, a line per row."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for row, seeds in results.items():
        cells = []
        for name in COLUMNS:
            values = [each[name] for each in seeds]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    arguments, extra = parser.parse_known_args()
    results = {row: [measures(row, seed, arguments.out, extra) for seed in range(arguments.seeds)] for row in ROWS}
    table = markdown(results)
    print("\n" + table)
    if arguments.readme:
        readme = Path(__file__).parent.parent / "README.md"
        marked = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)
        distcap.write_text(readme, marked.sub(lambda match: f"{match[1]}{table}\n{match[2]}", readme.read_text()))


if __name__ == "__main__":
    main()
