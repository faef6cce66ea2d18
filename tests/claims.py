"""The README's results table: the toy world over seeds and objectives, each row from the same start of its seed.

    python tests/claims.py --seeds 5 --jobs 2             # print the tables; runs go to runs/claims
    python tests/claims.py --seeds 5 --jobs 2 --readme    # and write claims.json, claims.png and README.md's tables
    python tests/claims.py --seeds 1 --quick              # a smoke: a few steps of everything
    python tests/claims.py --tune --jobs 2                # what a rival is trained with, chosen on two other seeds

A start (CLIP pretrained, captioner teacher-forced) and a judge (a second CLIP: another seed, twice as wide, never a
reward) are made once per seed; every row continues from the start with the same settings. Rows called "tuned" have
those that did best in tuning.json, which `--tune` writes. Finished runs are kept: an interrupted command picks up where
it stopped. A job is a process with one thread; rounding depends on that, so keep it.
"""

import argparse
import contextlib
import functools
import io
import json
import re
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import rivals
import torch

import distcap

START, RERANKED = "teacher forcing", "teacher forcing, best of 8 by CLIP"
ALONE = ["--similarity-weight", "1", "--ground-truth-weight", "0"]  # neither discriminator nor ground truth
REGULARIZED = ["--similarity-weight", "0.94", "--ground-truth-weight", "0"]  # a regulariser as its authors weigh it
GREEDY, GROUP = ["--baseline", "greedy"], ["--baseline", "group", "--samples", "4"]
# row: its flags, and the row that a claim holds it against
ROWS = {
    START: ([], None),
    RERANKED: ([], START),
    "ground truth only": (["--sampled-weight", "0"], START),
    "CIDEr, self-critical": ([*GREEDY, "--similarity-weight", "0", "--ground-truth-weight", "0"], START),
    "cosine, no baseline": (["--baseline", "none", *ALONE], START),
    "cosine, self-critical": ([*GREEDY, *ALONE], START),
    "cosine, self-critical + CIDEr": ([*GREEDY, *REGULARIZED], "cosine, self-critical"),
    "cosine, self-critical + KL": ([*GREEDY, *REGULARIZED], "cosine, self-critical"),
    "cosine, self-critical + grammar": ([*GREEDY, *REGULARIZED], "cosine, self-critical"),
    "cosine, self-critical + discriminator": ([*GREEDY, *REGULARIZED], "cosine, self-critical"),
    "cosine, self-critical + ground truth": ([*GREEDY, "--similarity-weight", "1"], "cosine, self-critical"),
    "cosine, similar images": (["--baseline", "neighbours", "--neighbours", "10", *ALONE], "cosine, self-critical"),
    "cosine, group of 4": ([*GROUP, *ALONE], "cosine, self-critical"),
    "Eq. 6, image-to-text": (["--direction", "image-to-text", *ALONE], "Eq. 6, both"),
    "Eq. 6, text-to-image": (["--direction", "text-to-image", *ALONE], "Eq. 6, both"),
    "Eq. 6, both": (ALONE, "cosine, self-critical"),
    "Eq. 6, both + discriminator": (REGULARIZED, "Eq. 6, both"),
    "Eq. 6, both + ground truth": (["--similarity-weight", "1"], "Eq. 6, both"),
    "**the full method**": ([], "Eq. 6, both + ground truth"),
    "image-to-text + discriminator + ground truth": (["--direction", "image-to-text"], "**the full method**"),
    "text-to-image + discriminator + ground truth": (["--direction", "text-to-image"], "**the full method**"),
    "the full method, not centred": ([], "**the full method**"),
    "the full method, negative ground truth not clamped": ([], "**the full method**"),
    "the full method, beam search for a sample": ([], "**the full method**"),
    "the full method, greedy captions out of the pool": ([], "**the full method**"),
}
RATES = [f"--learning-rate {rate}" for rate in ("6e-4", "2e-4", "6e-5")]  # the first is that of every row
WEIGHED = [f"{RATES[rate]} --similarity-weight {alpha}" for rate, alpha in ((0, 0.94), (1, 0.94), (0, 0.8))]
# what is tried on TUNING_SEEDS, a row's own settings first; if others find more pictures, they get a row, too
TRIED = {
    "cosine, self-critical": RATES,
    "cosine, self-critical + CIDEr": WEIGHED,
    "cosine, self-critical + KL": WEIGHED,
    "cosine, self-critical + grammar": WEIGHED,
    "cosine, self-critical + discriminator": WEIGHED,
    "cosine, similar images": RATES[:2],
    "cosine, group of 4": RATES[:2],
    "Eq. 6, text-to-image": RATES,
    "Eq. 6, both": RATES,
    "Eq. 6, both + discriminator": WEIGHED,
    "**the full method**": [f"--similarity-weight {alpha}" for alpha in (0.99, 0.94, 0.97, 0.98)],
    "Eq. 6, both + ground truth": ["--similarity-weight 1"],  # what alpha tends to, for comparison
}
TUNING_SEEDS = (100, 101)  # other worlds than the table's: scenes, pictures, CLIP and start
TUNING = Path(__file__).with_name("tuning.json")


def best_tried(row: str, tried: dict[str, list[float]]) -> str:
    """The flags that did best in mean oracle R@1; the row's own unless others are better by a picture in a hundred."""
    best = max(tried, key=lambda flags: statistics.fmean(tried[flags]))
    gain = statistics.fmean(tried[best]) - statistics.fmean(tried[TRIED[row][0]])
    return best if gain >= 0.01 else TRIED[row][0]


def add_tuned_rows(tuning: dict[str, dict[str, list[float]]]) -> None:
    """Give each row that did better with other settings a second row, "tuned", against a row that is tuned as well."""
    better = {row: best for row, tried in tuning.items() if (best := best_tried(row, tried)) != TRIED[row][0]}
    for row, best in better.items():
        flags, against = ROWS[row]
        ROWS[f"{row}, tuned"] = ([*flags, *best.split()], f"{against}, tuned" if against in better else against)


add_tuned_rows(json.loads(TUNING.read_text()) if TUNING.exists() else {})
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
    "discriminator": "D tells",
}
PAIRED = ("oracle_R@1", "text_to_image_R@1", "well_formed")  # columns of which differences are told
HEADLINE = (
    START,
    RERANKED,
    "cosine, self-critical",
    "cosine, self-critical, tuned",
    "**the full method**",
)  # what the README begins with
QUICK = ["--train-size", "200", "--test-size", "30", "--clip-steps", "10", "--tf-steps", "10", "--steps", "2"]


def patched(row: str) -> contextlib.AbstractContextManager:
    """A patch for what a row names and no flag does: a regulariser of Eq. 10, or what the authors do."""
    generate, similarity_rewards = distcap.Captioner.generate, distcap.Learner.similarity_rewards

    def not_centred(self, sampled, ground_truth, greedy):
        return sampled, ground_truth

    def beam_search(self, features, max_length, **decoding):
        return generate(self, features, max_length, **({"num_beams": 5} if decoding.get("do_sample") else decoding))

    def without_greedy(self, captions, indices, own):
        kept = len(captions) - len(indices)
        rewards = similarity_rewards(self, captions[:kept], indices, own[:kept])
        return torch.cat([rewards, rewards.new_zeros(len(indices))])  # with Eq. 6, nobody asks for theirs

    def learner(regularizer):
        return distcap, "Learner", functools.partial(rivals.Rival, regularizer=regularizer)

    patches = {
        "CIDEr, self-critical": learner("cider"),
        "cosine, self-critical + CIDEr": learner("cider"),
        "cosine, self-critical + KL": learner("kl"),
        "cosine, self-critical + grammar": learner("grammar"),
        "the full method, not centred": (distcap.Learner, "advantages", not_centred),
        "the full method, negative ground truth not clamped": (distcap, "ground_truth_loss", distcap.reinforce_loss),
        "the full method, beam search for a sample": (distcap.Captioner, "generate", beam_search),
        "the full method, greedy captions out of the pool": (distcap.Learner, "similarity_rewards", without_greedy),
    }
    row = row.removesuffix(", tuned")
    return mock.patch.object(*patches[row]) if row in patches else contextlib.nullcontext()


def train(folder: Path, seed: int, flags: list[str]) -> None:
    """A run of `distcap train`, unless it is there already."""
    if not (folder / "results.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        with io.StringIO() as quiet, mock.patch("sys.stdout", quiet):
            status = distcap.main(["train", "--seed", str(seed), "--out", str(folder), *flags])
        assert status == 0, f"{folder}: exit {status}"


def train_start(seed: int, out: Path, quick: bool) -> Path:
    """What every row of a seed continues from."""
    torch.set_num_threads(1)
    train(out / f"seed{seed}-start", seed, ["--objective", "tf", *(QUICK if quick else [])])
    return out / f"seed{seed}-start"


def train_row(row: str, seed: int, start: Path, quick: bool, tried: str = "") -> Path:
    """The run of a row, with its own flags and those that are `tried`."""
    folder = start.with_name(f"seed{seed}-" + re.sub(r"\W+", "-", f"{row} {tried}").strip("-"))
    both = ["--captioner", str(start), "--clip", str(start), "--tf-steps", "0"]
    with patched(row):
        train(folder, seed, [*both, *(QUICK if quick else []), *ROWS[row][0], *tried.split()])
    return folder


def tune_seed(seed: int, out: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Oracle R@1 of everything that is tried, on one seed."""
    start, found = train_start(seed, out, quick), {}
    for row, all_flags in TRIED.items():
        found[row] = {}
        for flags in all_flags:
            results = json.loads((train_row(row, seed, start, quick, flags) / "results.json").read_text())
            found[row][flags] = results["after"]["oracle_R@1"]
            print(f"seed {seed}: {row} {flags}: oracle R@1 {found[row][flags]:.2f}", flush=True)
    return found


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
    near = distcap.nearest_images(images, torch.arange(len(images)), min(count, len(images) - 1))  # (N, count)
    others = torch.einsum("nd,ncd->nc", captions, images[near]).max(dim=1).values
    return (distcap.similarity_reward(captions, images) > others + 1e-6).float().mean().item()


def told_apart(folder: Path, last: int = 50) -> float | None:
    """Share of captions that the discriminator told rightly, sampled or human, in the last steps; None without RL."""
    steps = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    accuracies = [step["discriminator_accuracy"] for step in steps if "discriminator_accuracy" in step]
    return statistics.fmean(accuracies[-last:]) if accuracies else None


def each_picture(
    captions: list[str], examples: list[distcap.Example], images, clip: distcap.CLIP
) -> dict[str, list[float]]:
    """The PAIRED measures of each caption by itself: their means are what `evaluate` gives."""
    scenes = [example.scene for example in examples]
    true = {caption: sum(distcap.is_true(caption, scene) for scene in scenes) for caption in set(captions)}
    return {
        "oracle_R@1": [distcap.is_true(c, scene) / max(true[c], 1) for c, scene in zip(captions, scenes)],
        "text_to_image_R@1": (distcap.retrieval_ranks(clip.embed_captions(captions), images) == 1).float().tolist(),
        "well_formed": [float(distcap.parse(caption) is not None) for caption in captions],
    }


def remembered() -> contextlib.AbstractContextManager:
    """A row asks two million times whether a caption is true of a scene: parse each text, and answer each, but once."""
    return mock.patch.multiple(distcap, parse=functools.cache(distcap.parse), is_true=functools.cache(distcap.is_true))


def measure_seed(seed: int, out: Path, quick: bool) -> dict[str, dict]:
    """For each row, its measures on this seed, and `each`: the PAIRED measures of each picture."""
    start = train_start(seed, out, quick)
    examples, clip = distcap.read_examples(str(start / "test")), distcap.CLIP.load(str(start))
    second, measured = judge(out / f"seed{seed}-judge", seed, quick), {}
    images, judged_images = (each.embed_images(example.image for example in examples) for each in (clip, second))
    for row in ROWS:
        folder = start if row in (START, RERANKED) else train_row(row, seed, start, quick)
        saved = folder / ("reranked.json" if row == RERANKED else "measured.json")
        if not saved.exists():
            captions = write(folder, seed, examples, clip if row == RERANKED else None)
            judged = second.embed_captions(captions)
            with remembered():
                found = distcap.evaluate(captions, examples, images, clip)
                found["each"] = each_picture(captions, examples, images, clip)
            found["judge_R@1"] = distcap.retrieval(judged, judged_images)["text_to_image_R@1"]
            found["look_alikes_R@1"] = look_alikes(judged, judged_images)
            found["discriminator"] = told_apart(folder)
            distcap.write_text(saved, json.dumps(found | {"captions": captions}))
        measured[row] = json.loads(saved.read_text())
        print(f"seed {seed}: {row}: oracle R@1 {measured[row]['oracle_R@1']:.2f}", flush=True)
    return measured


def difference(first: list[list[float]], second: list[list[float]], rounds: int = 2000) -> tuple[float, float, float]:
    """Mean of `first` less that of `second`, a list of pictures for each seed, and its 95 % interval.

    A bootstrap, paired by picture and seed; both are drawn, since neither alone is the population.
    """
    gaps = torch.tensor(first) - torch.tensor(second)  # (S, N)
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(gaps.shape[0], (rounds, gaps.shape[0], 1), generator=generator)
    pictures = torch.randint(gaps.shape[1], (rounds, *gaps.shape), generator=generator)
    means = gaps[seeds, pictures].mean(dim=(1, 2)).sort().values
    return tuple(round(each.item(), 4) for each in (gaps.mean(), means[rounds // 40], means[-rounds // 40]))


def summary(seeds: list[dict[str, dict]]) -> dict[str, dict]:
    """What claims.json holds: of each row, every column's value on each seed, and the differences that it is about."""
    rows = {row: {column: [each[row][column] for each in seeds] for column in COLUMNS} for row in ROWS}
    for row, (_, against) in ROWS.items():
        if against:
            pairs = {
                name: [[each[which]["each"][name] for each in seeds] for which in (row, against)] for name in PAIRED
            }
            rows[row]["against"] = against
            rows[row]["differences"] = {name: difference(*pair) for name, pair in pairs.items()}
    return rows


def markdown(rows: dict[str, dict], chosen=tuple(ROWS), columns=tuple(COLUMNS)) -> str:
    """Mean ± standard deviation over the seeds, a line per row."""
    lines = ["| | " + " | ".join(COLUMNS[name] for name in columns) + " |", "|---|" + "---|" * len(columns)]
    for row in chosen:
        cells = []
        for name in columns:
            values = rows[row][name]
            if None in values:
                cells.append("-")
                continue
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(rows: dict[str, dict]) -> str:
    """The few rows and columns that the README begins with."""
    dropped = ("judge_R@1", "look_alikes_R@1", "distinct", "discriminator")
    return markdown(rows, HEADLINE, [name for name in COLUMNS if name not in dropped])


def differences(rows: dict[str, dict]) -> str:
    """The differences that the claims are about, a line per row, each with its 95 % interval."""
    lines = ["| | against | " + " | ".join(COLUMNS[name] for name in PAIRED) + " |", "|---|---|" + "---|" * len(PAIRED)]
    for row, columns in rows.items():
        if "against" in columns:
            cells = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*columns["differences"][name]) for name in PAIRED]
            lines.append(f"| {row} | {columns['against']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning(_: dict) -> str:
    """What was tried for the rows that were tuned, a line each."""
    lines = ["| | tried | oracle R@1 on seeds " + " and ".join(map(str, TUNING_SEEDS)) + " |", "|---|---|---|"]
    for row, tried in json.loads(TUNING.read_text()).items():
        best = best_tried(row, tried)
        for flags, values in tried.items():
            mark = "**" * (flags == best)
            cells = f"{mark}`{flags}`{mark}", ", ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {row.strip('*')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: dict[str, dict], path: Path) -> None:
    """Oracle R@1 against reward-CLIP R@1: a row's distance below the diagonal is hacking."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(9, 0.19 * len(rows) + 0.4), layout="constrained")
    left, bottom = 0.85, 0.91  # above and to the right of this the best rows crowd
    corner = axes.inset_axes((0.09, 0.63, 0.25, 0.35), xlim=(left, 0.96), ylim=(bottom, 1))
    points = [
        [statistics.fmean(columns[name]) for name in ("text_to_image_R@1", "oracle_R@1")] for columns in rows.values()
    ]
    for each in (axes, corner):
        each.plot([0, 1], [0, 1], color="0.7", linestyle=":")
        for number, (row, (x, y)) in enumerate(zip(rows, points), 1):
            each.plot(x, y, "ko", markersize=4, markerfacecolor="white" if "tuned" in row else "black")
            if each is corner or not (x > left and y > bottom):
                place, side = ((-4, -3), "right") if number % 2 else ((4, -3), "left")
                style = dict(xytext=place, textcoords="offset points", fontsize=8, ha=side, clip_on=True)
                each.annotate(str(number), (x, y), **style)
    axes.indicate_inset_zoom(corner)
    names = "\n".join(f"{number}  {row.strip('*')}" for number, row in enumerate(rows, 1))
    axes.text(1.03, 1.0, names, transform=axes.transAxes, va="top", fontsize=8)
    axes.set(xlabel="text-to-image R@1 of the CLIP that rewards", ylabel="oracle R@1", xlim=(-0.04, 1.02))
    pyplot.savefig(path, dpi=100)


def publish(rows: dict[str, dict]) -> None:
    """Write tests/claims.json and its figure, and put the tables into README.md."""
    here = Path(__file__).parent
    distcap.write_text(here / "claims.json", json.dumps(rows, indent=1) + "\n")
    figure(rows, here / "claims.png")
    readme = here.parent / "README.md"
    text = readme.read_text()
    for make in (headline, markdown, differences, tuning):
        marked = re.compile(rf"(<!-- {make.__name__} -->\n).*?(<!-- end of {make.__name__} -->)", re.DOTALL)
        table = make(rows)
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    distcap.write_text(readme, text)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each in a process with one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--readme", action="store_true", help="write claims.json, claims.png and README.md's tables")
    parser.add_argument("--tune", action="store_true", help="write tuning.json instead (not with --quick)")
    arguments = parser.parse_args()
    work, seeds = (tune_seed, TUNING_SEEDS) if arguments.tune else (measure_seed, range(arguments.seeds))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(work, seed, arguments.out, arguments.quick) for seed in seeds]
        found = [each.result() for each in waiting]
    if arguments.tune:
        tried = {row: {flags: [each[row][flags] for each in found] for flags in TRIED[row]} for row in TRIED}
        if not arguments.quick:
            distcap.write_text(TUNING, json.dumps(tried, indent=1) + "\n")
        return
    rows = summary(found)
    print("\n" + markdown(rows) + "\n\n" + differences(rows))
    if arguments.readme:
        publish(rows)


if __name__ == "__main__":
    main()
