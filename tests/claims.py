"""The README's results table: the toy world over seeds and objectives, each row from the same start of its seed.

    python tests/claims.py --seeds 3 --jobs 2             # print the tables; runs go to runs/claims
    python tests/claims.py --seeds 3 --jobs 2 --readme    # and write claims.json, claims.png and README.md's tables
    python tests/claims.py --seeds 1 --quick              # a smoke: a few steps of everything

A start (CLIP pretrained, captioner teacher-forced) and a judge (a second CLIP: another seed, twice as wide, never a
reward) are made once per seed; every row continues from the start with the same settings. Finished runs are kept: an
interrupted command picks up where it stopped. A job is a process with one thread; rounding depends on that, so keep it.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

import distcap

START, RERANKED = "teacher forcing", "teacher forcing, best of 8 by CLIP"
ALONE = ["--similarity-weight", "1", "--ground-truth-weight", "0"]  # neither discriminator nor ground truth
GREEDY, GROUP = ["--baseline", "greedy"], ["--baseline", "group", "--samples", "4"]
# row: its flags, and the row that a claim holds it against
ROWS = {
    START: ([], None),
    RERANKED: ([], START),
    "ground truth only": (["--sampled-weight", "0"], START),
    "cosine, no baseline": (["--baseline", "none", *ALONE], START),
    "cosine, self-critical": ([*GREEDY, *ALONE], START),
    "cosine, self-critical + discriminator": ([*GREEDY, "--ground-truth-weight", "0"], "cosine, self-critical"),
    "cosine, self-critical + ground truth": ([*GREEDY, "--similarity-weight", "1"], "cosine, self-critical"),
    "cosine, similar images": (["--baseline", "neighbours", "--neighbours", "10", *ALONE], "cosine, self-critical"),
    "cosine, group of 4": ([*GROUP, *ALONE], "cosine, self-critical"),
    "Eq. 6, image-to-text": (["--direction", "image-to-text", *ALONE], "Eq. 6, both"),
    "Eq. 6, text-to-image": (["--direction", "text-to-image", *ALONE], "Eq. 6, both"),
    "Eq. 6, both": (ALONE, "cosine, self-critical"),
    "Eq. 6, both + discriminator": (["--ground-truth-weight", "0"], "Eq. 6, both"),
    "Eq. 6, both + ground truth": (["--similarity-weight", "1"], "Eq. 6, both"),
    "**the full method**": ([], "Eq. 6, both + discriminator"),
    "image-to-text + discriminator + ground truth": (["--direction", "image-to-text"], "**the full method**"),
    "text-to-image + discriminator + ground truth": (["--direction", "text-to-image"], "**the full method**"),
    "the full method, not centred": ([], "**the full method**"),
    "the full method, negative ground truth not clamped": ([], "**the full method**"),
    "the full method, beam search for a sample": ([], "**the full method**"),
}
COLUMNS = {
    "text_to_image_R@1": "text-to-image R@1",
    "image_to_text_R@1": "image-to-text R@1",
    "judge_R@1": "R@1 by a judge",
    "look_alikes_R@1": "R@1 among look-alikes",
    "oracle_R@1": "oracle R@1",
    "well_formed": "well-formed",
    "faithful": "faithful",
    "cider": "CIDEr",
    "bleu_4": "BLEU-4",
    "mean_length": "words",
    "distinct": "distinct",
}
HEADLINE = (START, RERANKED, "cosine, self-critical", "**the full method**")  # what the README begins with
QUICK = ["--train-size", "200", "--test-size", "30", "--clip-steps", "10", "--tf-steps", "10", "--steps", "2"]


def departures(row: str) -> contextlib.AbstractContextManager:
    """A patch that brings back what distcap does otherwise than the authors' scripts, for the rows that measure it."""
    generate = distcap.Captioner.generate

    def not_centred(self, sampled, ground_truth, greedy):
        return sampled, ground_truth

    def beam_search(self, features, max_length, **decoding):
        return generate(self, features, max_length, **({"num_beams": 5} if decoding.get("do_sample") else decoding))

    patched = {
        "the full method, not centred": (distcap.Learner, "advantages", not_centred),
        "the full method, negative ground truth not clamped": (distcap, "ground_truth_loss", distcap.reinforce_loss),
        "the full method, beam search for a sample": (distcap.Captioner, "generate", beam_search),
    }
    return mock.patch.object(*patched[row]) if row in patched else contextlib.nullcontext()


def train(folder: Path, seed: int, flags: list[str]) -> None:
    """A run of `distcap train`, unless it is there already."""
    if not (folder / "results.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        with io.StringIO() as quiet, mock.patch("sys.stdout", quiet):
            status = distcap.main(["train", "--seed", str(seed), "--out", str(folder), *flags])
        assert status == 0, f"{folder}: exit {status}"


def judge(folder: Path, seed: int, quick: bool) -> distcap.CLIP:
    """A CLIP that rewards nothing: another seed, twice the width of the one that does."""
    if not (folder / "open_clip_model.safetensors").exists():
        values = {"seed": seed + 1000, "clip_steps": 10 if quick else 600}
        config = distcap.configuration(distcap.TrainConfig, values)
        examples = distcap.toy_world(seed + 1000, 200 if quick else 8000, 0)[0]
        distcap.toy_clip(folder, examples, config, io.StringIO(), width=192)
    return distcap.CLIP.load(str(folder))


def write(folder: Path, seed: int, examples: list[distcap.Example], clip: distcap.CLIP | None) -> list[str]:
    """The captions of the test pictures: greedy, or with a `clip` the best of 8 samples."""
    config = distcap.configuration(distcap.CaptionConfig, {"seed": seed, "captioner": str(folder), "beams": 1})
    drawn = dict(do_sample=True, temperature=config.temperature, num_return_sequences=8) if clip else {}
    captioner, images = distcap.Captioner.load(str(folder)), [example.image for example in examples]
    return [each for (each,) in distcap.write_captions(captioner, images, config, clip, **drawn)]


def look_alikes(captions: torch.Tensor, images: torch.Tensor, count: int = 9) -> float:
    """Share of captions that are nearer to their own image than to each of the `count` images most similar to it."""
    rivals = images[
        distcap.nearest_images(images, torch.arange(len(images)), min(count, len(images) - 1))
    ]  # (N, count, D)
    others = torch.einsum("nd,ncd->nc", captions, rivals).max(dim=1).values
    return (distcap.similarity_reward(captions, images) > others + 1e-6).float().mean().item()


def oracle(captions: list[str], examples: list[distcap.Example]) -> list[float]:
    """Oracle R@1 of each caption by itself."""
    scenes = [example.scene for example in examples]
    true = {caption: sum(distcap.is_true(caption, scene) for scene in scenes) for caption in set(captions)}
    return [distcap.is_true(c, scene) / max(true[c], 1) for c, scene in zip(captions, scenes)]


def measure_seed(seed: int, out: Path, quick: bool) -> dict[str, dict]:
    """For each row, its measures on this seed, and `oracle`: the oracle R@1 of each picture."""
    torch.set_num_threads(1)
    extra, start = (QUICK if quick else []), out / f"seed{seed}-start"
    train(start, seed, ["--objective", "tf", *extra])
    examples, clip = distcap.read_examples(str(start / "test")), distcap.CLIP.load(str(start))
    second, measured = judge(out / f"seed{seed}-judge", seed, quick), {}
    judged_images = second.embed_images(example.image for example in examples)
    for row, (flags, _) in ROWS.items():
        name = re.sub(r"\W+", "-", row).strip("-")
        folder = start if row in (START, RERANKED) else out / f"seed{seed}-{name}"
        if folder != start:
            both = ["--captioner", str(start), "--clip", str(start), "--tf-steps", "0"]
            with departures(row):
                train(folder, seed, [*both, *extra, *flags])
        saved = folder / ("reranked.json" if row == RERANKED else "measured.json")
        if not saved.exists():
            captions = write(folder, seed, examples, clip if row == RERANKED else None)
            each, judged = oracle(captions, examples), second.embed_captions(captions)
            found = distcap.evaluate(captions, examples, clip) | {
                "judge_R@1": distcap.retrieval(judged, judged_images)["text_to_image_R@1"],
                "look_alikes_R@1": look_alikes(judged, judged_images),
            }
            distcap.write_text(saved, json.dumps(found | {"oracle": each, "captions": captions}))
        measured[row] = json.loads(saved.read_text())
        print(f"seed {seed}: {row}: oracle R@1 {measured[row]['oracle_R@1']:.2f}", flush=True)
    return measured


def difference(row: str, against: str, seeds: list[dict[str, dict]], rounds: int = 2000) -> tuple[float, float, float]:
    """Oracle R@1 of `row` less that of `against`, with the 95 % interval of a bootstrap, paired by picture and seed."""
    rng, seeds = random.Random(0), [(each[row]["oracle"], each[against]["oracle"]) for each in seeds]
    gaps = [[a - b for a, b in zip(*pair)] for pair in seeds]
    means = []
    for _ in range(rounds):  # both seeds and pictures are drawn: neither alone is the population
        drawn = [rng.choice(gaps) for _ in gaps]
        means.append(statistics.fmean(statistics.fmean(rng.choices(gap, k=len(gap))) for gap in drawn))
    means.sort()
    return statistics.fmean(map(statistics.fmean, gaps)), means[rounds // 40], means[-rounds // 40]


def summary(seeds: list[dict[str, dict]]) -> dict[str, dict]:
    """What claims.json holds: of each row, every column's value on each seed, and the difference that it is about."""
    rows = {row: {column: [each[row][column] for each in seeds] for column in COLUMNS} for row in ROWS}
    for row, (_, against) in ROWS.items():
        if against:
            rows[row]["against"] = against
            rows[row]["oracle_difference"] = [round(value, 4) for value in difference(row, against, seeds)]
    return rows


def markdown(rows: dict[str, dict], chosen=tuple(ROWS), columns=tuple(COLUMNS)) -> str:
    """Mean ± standard deviation over the seeds, a line per row."""
    lines = ["| | " + " | ".join(COLUMNS[name] for name in columns) + " |", "|---|" + "---|" * len(columns)]
    for row in chosen:
        cells = []
        for name in columns:
            values = rows[row][name]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(rows: dict[str, dict]) -> str:
    """The few rows and columns that the README begins with."""
    dropped = ("judge_R@1", "look_alikes_R@1", "distinct")
    return markdown(rows, HEADLINE, [name for name in COLUMNS if name not in dropped])


def differences(rows: dict[str, dict]) -> str:
    """The differences in oracle R@1 that the claims are about, a line per row."""
    lines = ["| | against | oracle R@1, difference | 95 % interval |", "|---|---|---|---|"]
    for row, columns in rows.items():
        if "against" in columns:
            mean, low, high = columns["oracle_difference"]
            lines.append(f"| {row} | {columns['against']} | {mean:+.2f} | {low:+.2f} to {high:+.2f} |")
    return "\n".join(lines)


def figure(rows: dict[str, dict], path: Path) -> None:
    """Oracle R@1 against reward-CLIP R@1: a row's distance below the diagonal is hacking."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    corner = axes.inset_axes((0.1, 0.54, 0.48, 0.43), xlim=(0.7, 1), ylim=(0.76, 1.02))  # where most rows crowd
    points = [
        [statistics.fmean(columns[name]) for name in ("text_to_image_R@1", "oracle_R@1")] for columns in rows.values()
    ]
    for each in (axes, corner):
        each.plot([0, 1], [0, 1], color="0.7", linestyle=":")
        for number, (x, y) in enumerate(points, 1):
            each.plot(x, y, "k.")
            if each is corner or not (x > 0.7 and y > 0.76):
                place = (4, 3) if number % 2 else (4, -10)
                each.annotate(str(number), (x, y), xytext=place, textcoords="offset points", fontsize=9, clip_on=True)
    axes.indicate_inset_zoom(corner)
    names = "\n".join(f"{number}  {row.strip('*')}" for number, row in enumerate(rows, 1))
    axes.text(1.04, 0.98, names, transform=axes.transAxes, va="top", fontsize=9)
    axes.set(xlabel="text-to-image R@1 of the CLIP that rewards", ylabel="oracle R@1", xlim=(-0.02, 1.02))
    pyplot.savefig(path, dpi=100)


def publish(rows: dict[str, dict]) -> None:
    """Write tests/claims.json and its figure, and put the tables into README.md."""
    here = Path(__file__).parent
    distcap.write_text(here / "claims.json", json.dumps(rows, indent=1) + "\n")
    figure(rows, here / "claims.png")
    readme = here.parent / "README.md"
    text = readme.read_text()
    for make in (headline, markdown, differences):
        marked = re.compile(rf"(<!-- {make.__name__} -->\n).*?(<!-- end of {make.__name__} -->)", re.DOTALL)
        table = make(rows)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    distcap.write_text(readme, text)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each in a process with one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--readme", action="store_true", help="write claims.json, claims.png and README.md's tables")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(measure_seed, seed, arguments.out, arguments.quick) for seed in range(arguments.seeds)]
        rows = summary([each.result() for each in waiting])
    print("\n" + markdown(rows) + "\n\n" + differences(rows))
    if arguments.readme:
        publish(rows)


if __name__ == "__main__":
    main()
