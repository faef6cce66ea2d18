"""The tables of README.md beside this file: the toy world over seeds and objectives.

    python tests/claims/claims.py --seeds 5 --jobs 2            # print the tables
    python tests/claims/claims.py --seeds 5 --jobs 2 --readme   # and write them where they are read
    python tests/claims/claims.py --seeds 1 --quick             # a few steps of everything
    python tests/claims/claims.py --tune --jobs 2               # settings of rivals, on other seeds

A start (CLIP pretrained, captioner teacher-forced) and a judge (a second CLIP: another seed, twice
as wide, never a reward) are made once per seed. Every row continues from the start of its seed.
Rows called "tuned" have the settings that did best in tuning.json, which `--tune` writes.

Finished runs are kept in --out, so an interrupted command picks up where it stopped; after a change
to distcap.py, give another folder. A job is a process with one thread on the CPU: rounding depends
on that, so keep it.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

import distcap

HERE = Path(__file__).resolve().parent
TUNING = HERE / "tuning.json"

# ---- The rows ------------------------------------------------------------------------------------
START, RERANKED = "teacher forcing", "teacher forcing, best of 8 by CLIP"
FULL = "**the full method**"
ALONE = "--regularizer none --ground-truth-weight 0"  # CLIP's reward and nothing else

# Row: its flags, and the row that a claim holds it against.
ROWS: dict[str, tuple[str, str | None]] = {
    START: ("", None),
    RERANKED: ("", START),
    "ground truth only": ("--recipe ground-truth", START),
    "CIDEr, self-critical": ("--recipe scst", START),
    "cosine, no baseline": ("--recipe no-baseline", START),
    "cosine, self-critical": ("--recipe clip-scst", START),
    "cosine, self-critical + CIDEr": ("--recipe clip-scst-cider", "cosine, self-critical"),
    "cosine, self-critical + KL": ("--recipe clip-scst-kl", "cosine, self-critical"),
    "cosine, self-critical + grammar": (
        "--recipe clip-scst-grammar --similarity-weight 0.94",  # as the others, for comparison
        "cosine, self-critical",
    ),
    "cosine, self-critical + discriminator": (
        "--recipe clip-scst-discriminator",
        "cosine, self-critical",
    ),
    "cosine, self-critical + ground truth": (
        "--recipe clip-scst --ground-truth-weight 2",
        "cosine, self-critical",
    ),
    "cosine, similar images": ("--recipe similar-images", "cosine, self-critical"),
    "cosine, group of 4": ("--recipe group", "cosine, self-critical"),
    "Eq. 6, image-to-text": (f"{ALONE} --direction image-to-text", "Eq. 6, both"),
    "Eq. 6, text-to-image": (f"{ALONE} --direction text-to-image", "Eq. 6, both"),
    "Eq. 6, both": (ALONE, "cosine, self-critical"),
    "Eq. 6, both + discriminator": (
        "--similarity-weight 0.94 --ground-truth-weight 0",
        "Eq. 6, both",
    ),
    "Eq. 6, both + ground truth": ("--regularizer none", "Eq. 6, both"),
    FULL: ("", "Eq. 6, both + ground truth"),
    "image-to-text + discriminator + ground truth": ("--direction image-to-text", FULL),
    "text-to-image + discriminator + ground truth": ("--direction text-to-image", FULL),
    # These four undo a departure from the authors' scripts: see `departures`.
    "the full method, not centred": ("", FULL),
    "the full method, negative ground truth not clamped": ("", FULL),
    "the full method, beam search for a sample": ("", FULL),
    "the full method, greedy captions out of the pool": ("", FULL),
}

# What every row is trained with. It is longer and slower than distcap's default, which came later.
SCHEDULE = ["--learning-rate", "6e-4", "--steps", "400"]
RATES = [f"--learning-rate {rate}" for rate in ("6e-4", "2e-4", "6e-5")]  # that of every row first
WEIGHED = [
    f"{RATES[rate]} --similarity-weight {alpha}" for rate, alpha in ((0, 0.94), (1, 0.94), (0, 0.8))
]
# What is tried on TUNING_SEEDS, a row's own settings first. If others find more pictures, they get
# a row too.
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
    FULL: [f"--similarity-weight {alpha}" for alpha in (0.99, 0.94, 0.97, 0.98)],
    "Eq. 6, both + ground truth": ["--regularizer none"],  # what alpha tends to, for comparison
}
TUNING_SEEDS = (100, 101)  # other worlds than the table's: scenes, pictures, CLIP and start


def best_tried(row: str, tried: dict[str, list[float]]) -> str:
    """The flags that did best in mean oracle R@1: the row's own, unless others are better by a
    picture in a hundred."""
    own = TRIED[row][0]
    best = max(tried, key=lambda flags: statistics.fmean(tried[flags]))
    gain = statistics.fmean(tried[best]) - statistics.fmean(tried[own])
    return best if gain >= 0.01 else own


def add_tuned_rows(tuning: dict[str, dict[str, list[float]]]) -> None:
    """Give each row that did better with other settings a second row, "tuned". It stands against a
    row that is tuned as well, where there is one."""
    better = {}
    for row, tried in tuning.items():
        best = best_tried(row, tried)
        if best != TRIED[row][0]:
            better[row] = best
    for row, best in better.items():
        flags, against = ROWS[row]
        if against in better:
            against = f"{against}, tuned"
        ROWS[f"{row}, tuned"] = (f"{flags} {best}".strip(), against)


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
    "discriminator": "discriminator accuracy",
}
COMPARED = ("oracle_R@1", "text_to_image_R@1", "well_formed")  # their differences are told
HEADLINE = (  # what the README of the project shows
    START,
    RERANKED,
    "cosine, self-critical",
    "cosine, self-critical, tuned",
    FULL,
)


# ---- Departures from the authors' scripts, undone ------------------------------------------------
SIMILARITY_REWARDS = distcap.Learner.similarity_rewards


def keep_rewards(rewards: torch.Tensor) -> torch.Tensor:
    """In the place of `centred_advantages`: the rewards as they are."""
    return rewards


def search_instead(captioner, features, max_length, count) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `Captioner.sample_and_greedy`: the best of a beam search of 5 for a sample."""
    assert count == 1, "a beam search has one best caption"
    searched = captioner.search(features, max_length, beams=5)
    return searched, captioner.greedy(features, max_length)


def compete_without_greedy(learner, rollout, batch) -> torch.Tensor:
    """In the place of `Learner.similarity_rewards`: greedy captions do not compete. With Eq. 6
    nobody asks for theirs, so it is 0."""
    sampled_count, human_count, greedy_count = rollout.sizes
    kept = sampled_count + human_count
    pool = dataclasses.replace(
        rollout,
        tokens=rollout.tokens[:kept],
        captions=rollout.captions[:kept],
        image_index=rollout.image_index[:kept],
        caption_embeddings=rollout.caption_embeddings[:kept],
        sizes=(sampled_count, human_count, 0),
    )
    rewards = SIMILARITY_REWARDS(learner, pool, batch)
    return torch.cat([rewards, rewards.new_zeros(greedy_count)])


def departures() -> dict[str, tuple]:
    """Of each row that undoes a departure: the owner, the name, and what takes its place."""
    learner = distcap.Learner
    rows = {
        "not centred": (distcap, "centred_advantages", keep_rewards),
        "negative ground truth not clamped": (distcap, "ground_truth_loss", distcap.reinforce_loss),
        "beam search for a sample": (distcap.Captioner, "sample_and_greedy", search_instead),
        "greedy captions out of the pool": (learner, "similarity_rewards", compete_without_greedy),
    }
    return {f"the full method, {name}": patch for name, patch in rows.items()}


def patched(row: str) -> contextlib.AbstractContextManager:
    """The patch of a row that undoes a departure; for any other row, nothing."""
    patch = departures().get(row)
    return mock.patch.object(*patch) if patch else contextlib.nullcontext()


# ---- Runs ----------------------------------------------------------------------------------------
def few_pictures(quick: bool) -> list[str]:
    """Flags of the toy world's size."""
    return "--train-size 200 --test-size 30".split() if quick else []


def start_flags(quick: bool) -> list[str]:
    """The flags of what every row of a seed continues from."""
    few_steps = "--clip-steps 10 --tf-steps 10".split() if quick else []
    return ["--objective", "tf", *few_pictures(quick), *few_steps]


def row_flags(row: str, start: Path, quick: bool = False, tried: str = "") -> list[str]:
    """The flags of a row, with its own and those that are `tried`."""
    models = ["--captioner", str(start), "--clip", str(start), "--tf-steps", "0"]
    models += [*SCHEDULE, *(["--steps", "2"] if quick else [])]
    return [*models, *few_pictures(quick), *ROWS[row][0].split(), *tried.split()]


def train(folder: Path, seed: int, flags: list[str]) -> None:
    """A run of `distcap train`, unless it is finished already."""
    if (folder / "results.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    command = ["train", "--seed", str(seed), "--out", str(folder), "--device", "cpu", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        status = distcap.main(command)
    assert status == 0, f"{folder}: exit {status}"


def train_start(seed: int, out: Path, quick: bool) -> Path:
    """The run that every row of a seed continues from."""
    torch.set_num_threads(1)
    folder = out / f"seed{seed}-start"
    train(folder, seed, start_flags(quick))
    return folder


def train_row(row: str, seed: int, start: Path, quick: bool, tried: str = "") -> Path:
    """The run of a row."""
    name = re.sub(r"\W+", "-", f"{row} {tried}").strip("-")
    folder = start.with_name(f"seed{seed}-{name}")
    with patched(row):
        train(folder, seed, row_flags(row, start, quick, tried))
    return folder


def tune_seed(seed: int, out: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Oracle R@1 of everything that is tried, on one seed."""
    start = train_start(seed, out, quick)
    found = {}
    for row, settings in TRIED.items():
        found[row] = {}
        for flags in settings:
            folder = train_row(row, seed, start, quick, flags)
            results = json.loads((folder / "results.json").read_text())
            found[row][flags] = results["after"]["oracle_R@1"]
            print(f"seed {seed}: {row} {flags}: oracle R@1 {found[row][flags]:.2f}", flush=True)
    return found


def make_judge(folder: Path, seed: int, quick: bool) -> distcap.CLIP:
    """A CLIP that rewards nothing: another seed, twice the width of the one that does."""
    if not (folder / "open_clip_model.safetensors").exists():
        values = distcap.TOY | dict(seed=seed + 1000, device="cpu")
        if quick:
            values |= dict(clip_steps=10, train_size=200)
        config = distcap.TrainConfig(**values)
        examples, _ = distcap.toy_world(config.seed, config.train_size, 0)
        distcap.toy_clip(folder, examples, config, distcap.Run(), width=192)
    return distcap.CLIP.load(str(folder))


# ---- Measures ------------------------------------------------------------------------------------
def write_captions(
    folder: Path, seed: int, examples: list[distcap.Example], clip: distcap.CLIP | None
) -> list[str]:
    """The captions of the test pictures: greedy, or with a `clip` the best of 8 samples."""
    captioner = distcap.Captioner.load(str(folder))
    settings = dict(seed=seed, batch_size=64, workers=0, device="cpu", rerank=bool(clip))
    config = distcap.CaptionConfig(**settings)
    longest = distcap.TrainConfig.max_length

    def write(features: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        if not clip:
            return captioner.greedy(features, longest)
        drawing = dict(count=8, temperature=config.temperature, seed=seed)
        return distcap.sample_by_picture(captioner, features, pixels, longest, **drawing)

    images = [example.image for example in examples]
    found = distcap.write_captions(captioner, images, config, write, clip)
    return ["".join(written.captions[:1]) for written in found]


def look_alikes(captions: torch.Tensor, images: torch.Tensor, count: int = 9) -> float:
    """Share of captions that are nearer to their own image than to each of the `count` images most
    similar to it: (N, D), (N, D)."""
    count = min(count, len(images) - 1)
    near = distcap.nearest_images(images, torch.arange(len(images)), count)  # (N, count)
    others = torch.einsum("nd,ncd->nc", captions, images[near]).max(dim=1).values
    right = distcap.similarity_reward(captions, images) > others + 1e-6
    return right.float().mean().item()


def discriminator_accuracy(folder: Path, last: int = 50) -> float | None:
    """Share of captions, sampled or human, that the discriminator told rightly in the last steps;
    None for a run without a discriminator."""
    steps = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    values = [step.get("discriminator_accuracy") for step in steps]
    values = [value for value in values if value is not None]
    return statistics.fmean(values[-last:]) if values else None


def measure_seed(seed: int, out: Path, quick: bool) -> dict[str, dict[str, float | None]]:
    """For each row its measures on this seed."""
    start = train_start(seed, out, quick)
    examples = distcap.read_examples(str(start / "test"))
    pictures = [example.image for example in examples]
    clip = distcap.CLIP.load(str(start))
    judge = make_judge(out / f"seed{seed}-judge", seed, quick)
    images = clip.embed_images(pictures)
    judged_images = judge.embed_images(pictures)
    measured = {}
    for row in ROWS:
        folder = start if row in (START, RERANKED) else train_row(row, seed, start, quick)
        saved = folder / ("reranked.json" if row == RERANKED else "measured.json")
        if not saved.exists():
            captions = write_captions(folder, seed, examples, clip if row == RERANKED else None)
            found = distcap.evaluate(captions, examples, images, clip)
            judged = judge.embed_captions(captions)
            found["judge_R@1"] = distcap.retrieval(judged, judged_images)["text_to_image_R@1"]
            found["look_alikes_R@1"] = look_alikes(judged, judged_images)
            found["discriminator"] = discriminator_accuracy(folder)
            distcap.write_text(saved, json.dumps(found | {"captions": captions}))
        measured[row] = json.loads(saved.read_text())
        print(f"seed {seed}: {row}: oracle R@1 {measured[row]['oracle_R@1']:.2f}", flush=True)
    return measured


# ---- Tables --------------------------------------------------------------------------------------
# 97.5 % of Student's t lie below these, for 2 to 10 seeds.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """To six decimals, as the files hold them."""
    return [None if value is None else round(value, 6) for value in values]


def summary(seeds: list[dict[str, dict]]) -> dict[str, dict]:
    """What claims.json holds: of each row every column's value on each seed, and the row that it
    stands against."""
    rows = {}
    for row, (_, against) in ROWS.items():
        rows[row] = {column: rounded(each[row][column] for each in seeds) for column in COLUMNS}
        if against:
            rows[row]["against"] = against
    return rows


def line_by_line(rows: dict[str, dict]) -> str:
    """JSON with a line for each row."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def gaps(rows: dict[str, dict], row: str, column: str) -> list[float]:
    """On each seed, a row's value less that of the row that it stands against."""
    others = rows[rows[row]["against"]][column]
    return [own - other for own, other in zip(rows[row][column], others)]


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % t interval of their mean; None for a single value."""
    if len(values) < 2:
        return None
    quantile = STUDENT_T[min(len(values) - 2, len(STUDENT_T) - 1)]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def difference(values: list[float]) -> str:
    """Their mean, its interval, and on how many seeds there is more and less, by 0.005 or more."""
    more = sum(round(value, 6) >= 0.005 for value in values)
    less = sum(round(value, 6) <= -0.005 for value in values)
    half = interval(values)
    mean = round(statistics.fmean(values), 2) + 0.0  # no "-0.00"
    spread = "" if half is None else f" ± {half:.2f}"
    return f"{mean:+.2f}{spread} ({more} : {less})"


def markdown(rows: dict[str, dict], chosen=tuple(ROWS), columns=tuple(COLUMNS)) -> str:
    """Mean ± standard deviation over the seeds, a line for each row."""
    headings = " | ".join(COLUMNS[name] for name in columns)
    lines = [f"| | {headings} |", "|---|" + "---|" * len(columns)]
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
    """The few rows and columns that the README of the project shows."""
    dropped = ("judge_R@1", "look_alikes_R@1", "distinct", "discriminator")
    return markdown(rows, HEADLINE, [name for name in COLUMNS if name not in dropped])


def differences(rows: dict[str, dict]) -> str:
    """The differences that the claims are about, a line for each row."""
    headings = " | ".join(COLUMNS[name] for name in COMPARED)
    lines = [f"| | against | {headings} |", "|---|---|" + "---|" * len(COMPARED)]
    for row, columns in rows.items():
        if "against" in columns:
            cells = [difference(gaps(rows, row, name)) for name in COMPARED]
            lines.append(f"| {row} | {columns['against']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tuning(_: dict) -> str:
    """What was tried for the rows that were tuned, a line each."""
    seeds = " and ".join(map(str, TUNING_SEEDS))
    lines = [f"| | tried | oracle R@1 on seeds {seeds} |", "|---|---|---|"]
    for row, tried in json.loads(TUNING.read_text()).items():
        best = best_tried(row, tried)
        for flags, values in tried.items():
            cell = f"**`{flags}`**" if flags == best else f"`{flags}`"
            numbers = ", ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {row.strip('*')} | {cell} | {numbers} |")
    return "\n".join(lines)


def figure(rows: dict[str, dict], path: Path) -> None:
    """Oracle R@1 against reward-CLIP R@1: a row's distance below the diagonal is hacking."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(9, 0.19 * len(rows) + 0.4), layout="constrained")
    left, bottom = 0.85, 0.91  # above and to the right of this the best rows crowd
    corner = axes.inset_axes((0.09, 0.63, 0.25, 0.35), xlim=(left, 0.96), ylim=(bottom, 1))
    for each in (axes, corner):
        each.plot([0, 1], [0, 1], color="0.7", linestyle=":")
        for number, (row, columns) in enumerate(rows.items(), 1):
            x = statistics.fmean(columns["text_to_image_R@1"])
            y = statistics.fmean(columns["oracle_R@1"])
            inside = "white" if "tuned" in row else "black"
            each.plot(x, y, "ko", markersize=4, markerfacecolor=inside)
            if each is corner or not (x > left and y > bottom):
                place, side = ((-4, -3), "right") if number % 2 else ((4, -3), "left")
                style = dict(xytext=place, textcoords="offset points", fontsize=8, ha=side)
                each.annotate(str(number), (x, y), clip_on=True, **style)
    axes.indicate_inset_zoom(corner)
    names = "\n".join(f"{number}  {row.strip('*')}" for number, row in enumerate(rows, 1))
    axes.text(1.03, 1.0, names, transform=axes.transAxes, va="top", fontsize=8)
    axes.set(xlabel="text-to-image R@1 of the CLIP that rewards", ylabel="oracle R@1")
    axes.set(xlim=(-0.04, 1.02))
    pyplot.savefig(path, dpi=100)


PLACES = {  # where each table is read
    headline: HERE.parents[1] / "README.md",
    markdown: HERE / "README.md",
    differences: HERE / "README.md",
    tuning: HERE / "README.md",
}


def block(make) -> re.Pattern:
    """Finds the table of this function in a README: three groups, the second of which is it."""
    name = make.__name__
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(\n<!-- end of {name} -->)", re.DOTALL)


def publish(rows: dict[str, dict], places: dict | None = None) -> None:
    """Put the tables into the READMEs, between their marks."""
    for make, path in (places or PLACES).items():
        table = make(rows)
        text = path.read_text()
        text = block(make).sub(lambda found, table=table: found[1] + table + found[3], text)
        distcap.write_text(path, text)


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--seeds", type=int, default=5)
    flag("--jobs", type=int, default=1, help="seeds at a time, each in a process with one thread")
    flag("--out", type=Path, default=Path("runs/claims"))
    flag("--quick", action="store_true", help="a few steps of everything, to see that it works")
    flag("--readme", action="store_true", help="write claims.json, claims.png and the READMEs")
    flag("--tune", action="store_true", help="write tuning.json instead (not with --quick)")
    arguments = parser.parse_args()
    work, seeds = measure_seed, range(arguments.seeds)
    if arguments.tune:
        work, seeds = tune_seed, TUNING_SEEDS
    with ProcessPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(work, seed, arguments.out, arguments.quick) for seed in seeds]
        found = [each.result() for each in waiting]
    if arguments.tune:
        tried = {}
        for row, settings in TRIED.items():
            tried[row] = {flags: rounded(each[row][flags] for each in found) for flags in settings}
        if not arguments.quick:
            distcap.write_text(TUNING, line_by_line(tried))
        return
    rows = summary(found)
    print("\n" + markdown(rows) + "\n\n" + differences(rows))
    if arguments.readme:
        distcap.write_text(HERE / "claims.json", line_by_line(rows))
        figure(rows, HERE / "claims.png")
        publish(rows)


if __name__ == "__main__":
    main()
