"""The tables of README.md beside this file: what the authors claim, measured on the toy world.

    python tests/claims/claims.py --seeds 5 --jobs 2 --readme   # everything, and write it down
    python tests/claims/claims.py --seeds 5 --jobs 2            # everything, and print the tables
    python tests/claims/claims.py --seeds 1 --quick             # a few steps of everything
    python tests/claims/claims.py --seeds 5 --only main         # one part
    python tests/claims/claims.py --seeds 3 --only tables       # of what is finished already
    python tests/claims/claims.py --seeds 8 --keep --readme     # add seeds to those of claims.json

The parts, in this order. *tune*: how much each regularizer weighs, and which discriminator the full
method has, on worlds that no table uses. *main*: a row for each objective, from the same start on
each seed. *departures*: the full method with a departure from the authors' scripts undone.
*robustness*: a few rows at other rates and for longer. *world*: the main claims in another world,
second_world.py.

A start (CLIP pretrained, captioner teacher-forced) and a judge (a second CLIP: another seed, twice
as wide, never a reward) are made once for each seed; every row of the seed continues from there.
Rows are trained with distcap's defaults for the toy world, but for what their name says.

Finished runs are kept in --out, and a command that was interrupted goes on where it stopped; after
a change to distcap.py, give another folder. With --keep, seeds that claims.json holds are not run
again, and nothing is tuned: that goes on on another machine. A job is a process with one thread on
the CPU: rounding depends on that, so keep it.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import second_world
import torch

import distcap

HERE = Path(__file__).resolve().parent
PARTS = ("tune", "main", "departures", "robustness", "world")

# ---- The rows ------------------------------------------------------------------------------------
DEFAULT = distcap.parse_arguments(["train", "--device", "cpu"])[1]  # the full method, as it is here
START, RERANKED, FULL = "teacher forcing", "best of 8 by CLIP", "the full method"
COSINE, BOTH, HUMAN = "cosine, self-critical", "Eq. 6, both", "ground truth only"
ALONE = "--regularizer none --ground-truth-weight 0"  # CLIP's reward and nothing else
DISCRIMINATORS = {"plain": "discriminator", "paced": "paced"}
REGULARIZERS = {
    "CIDEr": "cider", "KL": "kl", "grammar": "grammar",
    "discriminator": "discriminator", "paced discriminator": "paced",
}  # fmt: skip


def regularizer_flags(kind: str) -> str:
    """The flags of a regularizer, for any recipe. The paced discriminator takes five steps."""
    steps = {"paced": 5, "discriminator": 1, "grammar": 1}
    return f"--regularizer {kind}" + (
        f" --discriminator-steps {steps[kind]}" if kind in steps else ""
    )


def make_rows() -> dict[str, tuple[str, str | None]]:
    """Of each row its flags, and the row that it stands against."""
    weight = distcap.TOY["ground_truth_weight"]
    rows = {
        START: ("", None),
        RERANKED: ("", START),
        HUMAN: ("--recipe ground-truth", START),
        "CIDEr, self-critical": ("--recipe scst", START),
        "cosine, no baseline": ("--recipe no-baseline", START),
        COSINE: ("--recipe clip-scst", START),
    }
    for name, kind in REGULARIZERS.items():
        recipe = f"clip-scst-{kind}"
        recipe = recipe if recipe in distcap.RECIPES else "clip-scst"
        rows[f"{COSINE} + {name}"] = (f"--recipe {recipe} {regularizer_flags(kind)}", COSINE)
    rows |= {
        f"{COSINE} + ground truth": (f"--recipe clip-scst --ground-truth-weight {weight}", COSINE),
        "cosine, similar images": ("--recipe similar-images", COSINE),
        "cosine, group of 4": ("--recipe group", COSINE),
        "Eq. 6, image-to-text": (f"{ALONE} --direction image-to-text", BOTH),
        "Eq. 6, text-to-image": ("--recipe retrieval", BOTH),
        BOTH: (ALONE, COSINE),
    }
    for name, kind in REGULARIZERS.items():
        rows[f"{BOTH} + {name}"] = (f"{regularizer_flags(kind)} --ground-truth-weight 0", BOTH)
    rows |= {FULL: ("", BOTH), f"{FULL}, no discriminator": ("--regularizer none", FULL)}
    for name, kind in DISCRIMINATORS.items():
        if kind != DEFAULT.regularizer:
            rows[f"{FULL}, {name} discriminator"] = (regularizer_flags(kind), FULL)
    rows |= {
        f"{FULL}, image-to-text": ("--direction image-to-text", FULL),
        f"{FULL}, text-to-image": ("--direction text-to-image", FULL),
        f"{FULL}, log p by caption length": ("--length-normalizer caption", FULL),
        f"{FULL}, hard negatives": ("--neighbours 10", FULL),
    }
    return rows


ROWS = make_rows()
# These get alpha, the weight of the similarity, from tuning.json.
TUNED = [f"{row} + {name}" for row in (COSINE, BOTH) for name in REGULARIZERS]
WORLD_ROWS = (START, COSINE, HUMAN, BOTH, FULL)
UNDONE = (
    "not centred",
    "negative ground truth not clamped",
    "beam search for a sample",
    "greedy captions out of the pool",
)

TUNING_SEEDS = (100, 101)  # other worlds than the tables': scenes, pictures, CLIP and start
CHOICE_SEEDS = (200, 201, 202, 203)  # others again, on which distcap's defaults are chosen
CHOICE = {  # discriminators that the full method might have
    "plain": regularizer_flags("discriminator"),
    "paced": regularizer_flags("paced"),
    "paced, alpha 0.97": regularizer_flags("paced") + " --similarity-weight 0.97",
}
# How wide a regularizer's share of the reward spreads, in units of that of the similarity.
RHO = {"1/3": 1 / 3, "1": 1.0, "3": 3.0}
FASTER, LONGER, SLOWER = "3 x the learning rate", "3 x the steps", "1/3 of the learning rate"


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


def undone(departure: str) -> contextlib.AbstractContextManager:
    """Within it, distcap does not depart from the authors' scripts in this. "" is no departure."""
    patches = {
        "not centred": (distcap, "centred_advantages", keep_rewards),
        "negative ground truth not clamped": (distcap, "ground_truth_loss", distcap.reinforce_loss),
        "beam search for a sample": (distcap.Captioner, "sample_and_greedy", search_instead),
        "greedy captions out of the pool": (
            distcap.Learner,
            "similarity_rewards",
            compete_without_greedy,
        ),
    }
    return mock.patch.object(*patches[departure]) if departure else contextlib.nullcontext()


# ---- What a run is watched for -------------------------------------------------------------------
def ranking(scores: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Of the samples of one step: how many there are and are ill-formed, how many pairs of a
    well-formed and an ill-formed one, and in how many the well-formed one scores higher."""
    well = torch.tensor([distcap.parse(caption) is not None for caption in captions])
    gaps = scores[well][:, None] - scores[~well]
    won = (gaps > 0).sum().item() + (gaps == 0).sum().item() / 2
    return dict(count=len(well), ill=(~well).sum().item(), pairs=gaps.numel(), won=won)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within it, a regularizer with a network leaves in discriminator.json how it ranked the
    samples of each step, before it learned from them."""
    steps: list[dict] = []
    make = distcap.make_regularizer

    def make_watched(learner, references):
        regularizer = make(learner, references)
        score, last = regularizer.score, [None]

        def watch(rollout, batch):
            found = score(rollout, batch)
            if rollout is not last[0]:  # further updates score the same pool again
                last[0] = rollout
                count = rollout.sizes[0]
                steps.append(ranking(found[0][:count], rollout.captions[:count]))
            return found

        if not isinstance(regularizer.network, torch.nn.Identity):
            regularizer.score = watch
        return regularizer

    with mock.patch.object(distcap, "make_regularizer", make_watched):
        yield
    if steps:
        distcap.write_text(folder / "discriminator.json", json.dumps(steps))


# ---- Runs ----------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Task:
    """Something to be made in a process: a start, a judge, or the run of a row."""

    part: str
    row: str
    seed: int
    out: Path
    flags: str = ""
    departure: str = ""
    quick: bool = False

    @property
    def folder(self) -> Path:
        """Where it leaves what it makes."""
        name = re.sub(r"\W+", "-", f"seed{self.seed} {self.row}").strip("-")
        return self.out / self.part / name

    @property
    def origin(self) -> "Task":
        """What makes the start of its seed."""
        part = "world" if self.part == "world" else "starts"
        return Task(part, START, self.seed, self.out, quick=self.quick)

    @property
    def start(self) -> Path:
        """The folder of what it continues from."""
        return self.origin.folder

    @property
    def made(self) -> bool:
        """Whether its folder is there, made with these very flags."""
        path = self.folder / "run.json"
        return path.exists() and json.loads(path.read_text())["flags"] == self.flags

    @property
    def finished(self) -> bool:
        """Whether its values are known: it is made, or claims.json has them and is kept."""
        return self in HELD or self.made


JUDGE = "judge"
HELD: dict[Task, dict] = {}  # the values of runs that claims.json holds, with --keep


def hold(rows: dict[str, list[Task]], table: dict[str, dict]) -> None:
    """Take the values of these tasks from a table of claims.json, where it has them."""
    for row, tasks in rows.items():
        found = table.get(row, {"flags": None, "seed": []})
        for task in tasks:
            if task.flags == found["flags"] and task.seed in found["seed"]:
                number = found["seed"].index(task.seed)
                HELD[task] = {name: found[name][number] for name in KEPT}


def size_flags(quick: bool) -> list[str]:
    """Flags that make everything small."""
    small = "--train-size 200 --test-size 30 --clip-steps 10 --steps 2"
    return small.split() if quick else []


def train(task: Task, flags: list[str]) -> None:
    """A run of `distcap train`."""
    command = ["train", "--seed", str(task.seed), "--out", str(task.folder), "--device", "cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = distcap.main([*command, *flags])
    assert status == 0, f"{task.folder}: exit {status}"


def train_start(task: Task) -> None:
    """What every row of a seed continues from."""
    flags = [flag for flag in size_flags(task.quick) if flag not in ("--steps", "2")]
    train(task, ["--objective", "tf", *flags, *(["--tf-steps", "10"] if task.quick else [])])


def make_judge(task: Task) -> None:
    """A CLIP that rewards nothing: another seed, twice the width of the one that does. With it, its
    embeddings of the test pictures."""
    values = distcap.TOY | dict(seed=task.seed + 1000, device="cpu")
    if task.quick:
        values |= dict(clip_steps=10, train_size=200)
    config = distcap.TrainConfig(**values)
    examples, _ = distcap.toy_world(config.seed, config.train_size, 0)
    task.folder.mkdir(parents=True)
    judge = distcap.toy_clip(task.folder, examples, config, distcap.Run(), width=192)
    test = distcap.read_examples(str(task.start / "test"))
    torch.save(judge.embed_images([each.image for each in test]), task.folder / "images.pt")


def rerank(task: Task) -> None:
    """No training: the best of 8 samples, by `distcap caption` with all test pictures."""
    task.folder.mkdir(parents=True)
    captions, test = task.folder / "captions.jsonl", task.start / "test"
    command = f"caption {test} --captioner {task.start} --samples 8 --rerank --quiet --workers 0"
    status = distcap.main(
        [*command.split(), "--seed", str(task.seed), "--device", "cpu", "--out", str(captions)]
    )
    assert status == 0, f"{task.folder}: exit {status}"
    examples = distcap.read_examples(str(test))
    written = distcap.read_captions(captions, examples)
    clip = distcap.CLIP.load(str(task.start))
    images = clip.embed_images([example.image for example in examples])
    results = {"after": distcap.evaluate(written, examples, images, clip)}
    distcap.write_text(task.folder / "results.json", json.dumps(results))
    distcap.write_text(task.folder / "captions.json", distcap.coco_results(examples, written))


def train_row(task: Task) -> None:
    """The run of a row, of which little is kept."""
    models = ["--captioner", str(task.start), "--clip", str(task.start), "--tf-steps", "0"]
    small = [flag for flag in size_flags(task.quick) if flag not in ("--clip-steps", "10")]
    if task.part != "robustness":  # nothing is read of its validation
        small += ["--validate-every", "1000000"]
    with undone(task.departure), watched(task.folder):
        train(task, [*models, *small, *task.flags.split()])
    for name in ("captioner", "test", "validation"):
        shutil.rmtree(task.folder / name)
    (task.folder / "report.html").unlink()


def judged(task: Task) -> float:
    """Text-to-image R@1 by the judge. The judge's own is that of the start."""
    folder = Task("starts", JUDGE, task.seed, task.out).folder
    written = task.start if task.row == JUDGE else task.folder
    captions = json.loads((written / "captions.json").read_text())
    embeddings = distcap.CLIP.load(str(folder)).embed_captions([c["caption"] for c in captions])
    images = torch.load(folder / "images.pt", weights_only=True)
    return distcap.retrieval(embeddings, images)["text_to_image_R@1"]


def make(task: Task) -> Task:
    """Make it anew: in a process of the pool."""
    torch.set_num_threads(1)
    started = time.process_time()
    shutil.rmtree(task.folder, ignore_errors=True)  # what an interrupted run left
    makers = {START: train_start, JUDGE: make_judge, RERANKED: rerank}
    world = second_world.installed() if task.part == "world" else contextlib.nullcontext()
    with world, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            makers.get(task.row, train_row)(task)
            found = {"flags": task.flags}
            if task.part in ("main", "departures") or task.row == JUDGE:
                found["judge_R@1"] = judged(task)
        except BaseException:
            print(errors.getvalue()[-2000:], file=sys.__stderr__, flush=True)
            raise
    found["seconds"] = time.process_time() - started
    distcap.write_text(task.folder / "run.json", json.dumps(found))
    return task


def begin() -> None:
    """In a process of the pool: draw a world once for all rows, and end when the command ends,
    however it does."""
    distcap.toy_world = functools.lru_cache(maxsize=8)(distcap.toy_world)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def make_all(pool: ProcessPoolExecutor, tasks: Iterable[Task]) -> list[str]:
    """Make what is not made, and tell. Returns what failed; the rest is made all the same."""
    waiting = {pool.submit(make, task): task for task in tasks if not task.made}
    failures = []
    for number, done in enumerate(as_completed(waiting), 1):
        task, found = waiting[done], "done"
        if done.exception():
            failures.append(f"{task.folder}: {done.exception()!r}")
            found = "failed"
        elif (task.folder / "results.json").exists():
            found = f"oracle R@1 {values_of_run(task)['oracle_R@1']:.2f}"
        where = f"{task.part} {number}/{len(waiting)}, seed {task.seed}"
        print(f"{time.strftime('%X')} {where}: {task.row} {task.flags}: {found}", flush=True)
    return failures


# ---- What is made --------------------------------------------------------------------------------
class Plan:
    """The tasks of each part."""

    def __init__(self, out: Path, seeds: int, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.seeds = range(seeds)
        self.few_seeds = range(min(seeds, 3))
        self.tuning_seeds = TUNING_SEEDS[:1] if quick else TUNING_SEEDS
        self.choice_seeds = CHOICE_SEEDS[:1] if quick else CHOICE_SEEDS

    def task(self, part: str, row: str, seed: int, flags: str = "", **more) -> Task:
        """A task; its flags in a form that does not depend on spaces."""
        flags = " ".join(flags.split())
        return Task(part, row, seed, self.out, flags, quick=self.quick, **more)

    def spreads(self) -> dict[str, Task]:
        """Of each row that is tuned, a short run in which the spreads are measured."""
        steps = "" if self.quick else "--steps 60"
        tasks = {}
        for row in TUNED:
            flags = f"{ROWS[row][0]} --similarity-weight 0.94 {steps}"
            tasks[row] = self.task("spread", row, TUNING_SEEDS[0], flags)
        return tasks

    def tuning(self) -> dict[tuple[str, str], list[Task]]:
        """Of each row that is tuned and each rho, a run on each of the tuning seeds."""
        tasks = {}
        for row, measured in self.spreads().items():
            for name in ["1"] if self.quick else RHO:
                alpha = equal_spread(*spreads(measured), RHO[name])
                flags = f"{ROWS[row][0]} --similarity-weight {alpha}"
                label = f"{row}, rho {name}"
                tasks[row, name] = [
                    self.task("tune", label, seed, flags) for seed in self.tuning_seeds
                ]
        return tasks

    def choice(self) -> dict[str, list[Task]]:
        """The full method with one discriminator or another."""
        return {
            name: [self.task("choice", name, seed, flags) for seed in self.choice_seeds]
            for name, flags in CHOICE.items()
        }

    def rows(self, alphas: dict[str, float]) -> dict[str, list[Task]]:
        """The main table."""
        tasks = {}
        for row, (flags, _) in ROWS.items():
            if row in alphas:
                flags = f"{flags} --similarity-weight {alphas[row]}"
            part = "starts" if row == START else "main"
            tasks[row] = [self.task(part, row, seed, flags) for seed in self.seeds]
        return tasks

    def departures(self) -> dict[str, list[Task]]:
        """The full method with one departure undone."""
        flags = ROWS[FULL][0]
        return {
            f"{FULL}, {name}": [
                self.task("departures", f"{FULL}, {name}", seed, flags, departure=name)
                for seed in self.seeds
            ]
            for name in UNDONE
        }

    def robustness(self, alphas: dict[str, float]) -> dict[str, list[Task]]:
        """A few rows at other rates, and for longer."""
        rate = distcap.TOY["learning_rate"]
        steps = 2 if self.quick else distcap.TOY["steps"]
        changes = {FASTER: f"--learning-rate {3 * rate:g}", LONGER: f"--steps {3 * steps}"}
        rows = self.rows(alphas)
        tasks = {}
        for row in (FULL, HUMAN, self.best_rival(rows), COSINE):
            slower = {SLOWER: f"--learning-rate {rate / 3:.2g}"} if row == COSINE else {}
            for name, change in (changes | slower).items():
                label, flags = f"{row}; {name}", f"{rows[row][0].flags} {change}"
                tasks[label] = [
                    self.task("robustness", label, seed, flags) for seed in self.few_seeds
                ]
        return tasks

    def best_rival(self, rows: dict[str, list[Task]]) -> str:
        """The row without human trajectories that finds most, on the first three seeds."""
        found = {}
        for row, tasks in rows.items():
            flags = ["train", "--device", "cpu", *tasks[0].flags.split()]
            weight = distcap.parse_arguments(flags)[1].ground_truth_weight
            if weight == 0 and row not in (START, RERANKED, COSINE):
                few = [task for task in tasks[: len(self.few_seeds)] if task.finished]
                found[row] = sum(values(task)["oracle_R@1"] for task in few)
        return max(found, key=found.get)

    def world(self) -> dict[str, list[Task]]:
        """The main claims in another world."""
        return {
            row: [self.task("world", row, seed, ROWS[row][0]) for seed in self.few_seeds]
            for row in WORLD_ROWS
        }

    def table(self, part: str, alphas: dict[str, float], kept: dict) -> dict[str, list[Task]]:
        """The tasks of a part. From now on, what the tables `kept` have of it is known."""
        rows = {
            "main": lambda: self.rows(alphas),
            "departures": self.departures,
            "robustness": lambda: self.robustness(alphas),
            "world": self.world,
        }[part]()
        hold(rows, kept.get(part, {}))
        return rows


def flat(tasks: dict[str, list[Task]]) -> list[Task]:
    """The tasks of a table, seed by seed."""
    return [task for seed in zip(*tasks.values()) for task in seed]


def starts(tasks: Iterable[Task]) -> list[Task]:
    """What has to be there before these are made."""
    return list(dict.fromkeys(task.origin for task in tasks))


def judges(tasks: Iterable[Task]) -> list[Task]:
    """The judges that these need."""
    judged = [task for task in tasks if task.part in ("starts", "main", "departures")]
    found = (Task("starts", JUDGE, task.seed, task.out, quick=task.quick) for task in judged)
    return list(dict.fromkeys(found))


# ---- Tuning --------------------------------------------------------------------------------------
def read_log(folder: Path) -> list[dict]:
    """The steps of reinforcement learning, and what validation found in between."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["stage"] == "rl"]


def spreads(task: Task) -> tuple[float, float]:
    """How widely r_sim and r_reg spread over a batch's samples: medians over the first 50 steps."""
    steps = [step for step in read_log(task.folder) if "similarity_spread" in step][:50]
    names = ("similarity_spread", "regularizer_spread")
    return tuple(statistics.median(step[name] for step in steps) for name in names)


def equal_spread(similarity: float, regularizer: float, rho: float) -> float:
    """The alpha with which the regularizer's share of the reward spreads `rho` times as widely as
    that of the similarity: (1 - alpha) regularizer = rho alpha similarity. 1 - alpha has two
    digits."""
    share = rho * similarity / (regularizer + rho * similarity)
    return round(1 - float(f"{share:.2g}"), 8)


def best_rho(tried: dict[str, list[float]]) -> str:
    """What did best in mean oracle R@1: 1, unless another is better by a picture in a hundred."""
    means = {name: statistics.fmean(found) for name, found in tried.items()}
    best = max(means, key=means.get)
    return best if means[best] >= means["1"] + 0.01 else "1"


def tuned(plan: Plan) -> dict[str, dict]:
    """Of each row that is tuned its spreads, what was tried, and what was taken."""
    rows: dict[str, dict] = {}
    for row, task in plan.spreads().items():
        similarity, regularizer = rounded(spreads(task))
        rows[row] = {"similarity_spread": similarity, "regularizer_spread": regularizer}
        rows[row] |= {"alpha": {}, "oracle_R@1": {}}
    for (row, name), tasks in plan.tuning().items():
        found = rounded(values(task)["oracle_R@1"] for task in tasks)
        rows[row]["alpha"][name] = float(tasks[0].flags.split()[-1])
        rows[row]["oracle_R@1"][name] = found
    for row in rows.values():
        row["best"] = best_rho(row["oracle_R@1"])
    return rows


def chosen(plan: Plan) -> dict[str, dict]:
    """Of each discriminator of CHOICE what the full method comes to with it."""
    found = {}
    for name, tasks in plan.choice().items():
        each = [values(task) for task in tasks]
        columns = {key: rounded(one[key] for one in each) for key in ("oracle_R@1", "faithful")}
        found[name] = {"flags": CHOICE[name], "seed": [task.seed for task in tasks]} | columns
    return found


def alphas(tuning: dict[str, dict[str, dict]]) -> dict[str, float]:
    """The alpha of each row that was tuned. `tuning` is what tuning.json holds."""
    return {row: found["alpha"][found["best"]] for row, found in tuning["tuning"].items()}


# ---- Measures ------------------------------------------------------------------------------------
COLUMNS = {
    "text_to_image_R@1": "text-to-image R@1",
    "judge_R@1": "R@1 by a judge",
    "oracle_R@1": "oracle R@1",
    "well_formed": "well-formed",
    "faithful": "faithful",
    "cider": "CIDEr",
    "mean_length": "words",
    "distinct": "distinct",
    "accuracy": "accuracy of D",
    "auc": "AUC of D",
    "end": "ends",
}
KEPT = (*COLUMNS, "image_to_text_R@1", "bleu_4", "cracked", "seconds")  # what claims.json holds
FALL = 0.1  # more of the captions than this must have turned false to speak of hacking


def rewards(steps: list[dict], count: int = 25) -> tuple[float, float]:
    """The samples' mean reward in the first and in the last steps."""
    found = [step["reward"] for step in steps if step.get("reward") is not None]
    return statistics.fmean(found[:count]), statistics.fmean(found[-count:])


def end(folder: Path, results: dict) -> str:
    """Where training led. "no words": most captions have none. "hacked": more than FALL of them
    turned false, an ideal reader finds fewer pictures than before, and the reward rose. "spoilt":
    the same, but it did not rise. "errs": they turned false, but the reader finds more, or it was
    not the captioner's own samples that were rewarded. Else ""."""
    captions = json.loads((folder / "captions.json").read_text())
    if sum(not each["caption"].split() for each in captions) > len(captions) / 2:
        return "no words"
    before, after = results["before"], results["after"]
    if before["faithful"] - after["faithful"] <= FALL:
        return ""
    sampled_weight = json.loads((folder / "config.json").read_text())["sampled_weight"]
    if after["oracle_R@1"] > before["oracle_R@1"] or sampled_weight == 0:
        return "errs"
    first, last = rewards(read_log(folder))
    return "hacked" if last > first else "spoilt"


def cracked(folder: Path) -> str:
    """What went first by the validation pictures, if anything did by more than FALL: "grammar"
    (ill-formed captions) or "truth" (well-formed ones that are false)."""
    for step in read_log(folder):
        if found := step.get("validation"):
            broken = {
                "grammar": 1 - found["well_formed"],
                "truth": found["well_formed"] - found["faithful"],
            }
            worst = max(broken, key=broken.get)
            if broken[worst] > FALL:
                return worst
    return ""


def accuracy(folder: Path, last: int = 50) -> float | None:
    """Share of captions that a run's discriminator, or grammar score, told rightly in the last
    steps; None for a run without one."""
    found = []
    for step in read_log(folder):
        found += [step[name] for name in step if name.endswith("_accuracy")]
    found = [value for value in found if value is not None]
    return statistics.fmean(found[-last:]) if found else None


def auc(steps: list[dict], window: int = 10) -> float | None:
    """How often a well-formed sample scored higher than an ill-formed one of the same step, before
    the collapse: the first step at which half of the samples of the last ten are ill-formed. None
    if there were fewer than 100 ill-formed samples until then."""
    for number in range(len(steps)):
        recent = steps[max(0, number + 1 - window) : number + 1]
        ill, count = (sum(step[name] for step in recent) for name in ("ill", "count"))
        if len(recent) == window and 2 * ill >= count:
            steps = steps[:number]
            break
    ill, pairs, won = (sum(step[name] for step in steps) for name in ("ill", "pairs", "won"))
    return won / pairs if ill >= 100 and pairs else None


def values(task: Task) -> dict[str, float | str | None]:
    """All that is known of a run, whether it was made here or is kept."""
    return HELD[task] if task in HELD else values_of_run(task)


def values_of_run(task: Task) -> dict[str, float | str | None]:
    """All that the folder of a run tells."""
    results = json.loads((task.folder / "results.json").read_text())
    found = dict.fromkeys(KEPT) | results["after"]
    found |= json.loads((task.folder / "run.json").read_text())
    judge = Task("starts", JUDGE, task.seed, task.out).folder / "run.json"
    if task.row == START and task.part == "starts" and judge.exists():
        found["judge_R@1"] = json.loads(judge.read_text())["judge_R@1"]
    if task.row not in (START, RERANKED):
        found |= {"end": end(task.folder, results), "cracked": cracked(task.folder)}
        found["accuracy"] = accuracy(task.folder)
        path = task.folder / "discriminator.json"
        found["auc"] = auc(json.loads(path.read_text())) if path.exists() else None
    return {name: found[name] for name in KEPT}


def rounded(found: Iterable) -> list:
    """Numbers to six digits, as the files hold them; anything else as it is."""
    return [round(value, 6) if isinstance(value, float) else value for value in found]


def summary(plan: Plan, alphas: dict[str, float], kept: dict) -> dict[str, dict[str, dict]]:
    """What claims.json holds: of each table each row's values, on each seed that is complete. What
    the tables `kept` have is taken from them."""
    found = {}
    for part in PARTS[1:]:
        rows, found[part] = plan.table(part, alphas, kept), {}
        seeds = [seed for seed in zip(*rows.values()) if all(task.finished for task in seed)]
        for number, row in enumerate(rows if seeds else ()):
            each = [values(seed[number]) for seed in seeds]
            columns = {name: rounded(one[name] for one in each) for name in KEPT}
            columns["seed"] = [seed[number].seed for seed in seeds]
            found[part][row] = {"flags": rows[row][0].flags} | columns
    return found


# ---- Tables --------------------------------------------------------------------------------------
COMPARED = ("oracle_R@1", "text_to_image_R@1", "well_formed", "faithful")  # differences are told
# 97.5 % of Student's t lie below these, for 2 to 10 seeds.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def line_by_line(tables: dict[str, dict[str, dict]]) -> str:
    """JSON with a line for each row of each table."""
    parts = []
    for name, rows in tables.items():
        lines = [f"{json.dumps(row)}: {json.dumps(columns)}" for row, columns in rows.items()]
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def gaps(own: list[float], other: list[float]) -> list[float]:
    """What a row has more than another, on each seed."""
    return [value - against for value, against in zip(own, other)]


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


def cell(name: str, found: list) -> str:
    """Mean ± standard deviation over the seeds. Where a share is near 0 or near 1 on each seed, but
    not the same on all, on how many it is near 1. Of words, on how many seeds each was said."""
    if name in ("end", "cracked"):
        counts = {word: found.count(word) for word in dict.fromkeys(found) if word}
        return ", ".join(f"{word} {count}/{len(found)}" for word, count in counts.items()) or "-"
    found = [value for value in found if value is not None]
    if not found:
        return "-"
    mean = statistics.fmean(found)
    spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    extreme = all(min(value, 1 - value) <= 0.05 for value in found)
    if name in ("well_formed", "faithful", "oracle_R@1") and extreme and 0.1 < mean < 0.9:
        return f"{sum(value > 0.5 for value in found)} of {len(found)}"
    return f"{mean:.2f}{spread}"


def markdown(rows: dict[str, dict], columns: Iterable[str] = tuple(COLUMNS)) -> str:
    """A line for each row."""
    headings = COLUMNS | {"cracked": "what cracks first"}
    head = " | ".join(headings[name] for name in columns)
    lines = [f"| | {head} |", "|---|" + "---|" * len(tuple(columns))]
    for row, found in rows.items():
        cells = " | ".join(cell(name, found[name]) for name in columns)
        lines.append(f"| {f'**{row}**' if row == FULL else row} | {cells} |")
    return "\n".join(lines)


def against(row: str) -> str | None:
    """The row of the main table that a row is held against."""
    return ROWS[row][1] if row in ROWS else FULL


def differences(tables: dict[str, dict[str, dict]]) -> str:
    """The differences that the claims are about, a line for each row."""
    head = " | ".join(COLUMNS[name] for name in COMPARED)
    lines = [f"| | against | {head} |", "|---|---|" + "---|" * len(COMPARED)]
    for row, found in (tables["main"] | tables["departures"]).items():
        if (other := against(row)) and other in tables["main"]:
            columns = tables["main"][other]
            cells = [difference(gaps(found[name], columns[name])) for name in COMPARED]
            lines.append(f"| {row} | {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- What is read: two READMEs and a figure ------------------------------------------------------
HEADLINE = (START, RERANKED, COSINE, BOTH, f"{BOTH} + paced discriminator", HUMAN,
            f"{FULL}, no discriminator", FULL)  # fmt: skip
SHORT_COLUMNS = ("text_to_image_R@1", "oracle_R@1", "well_formed", "faithful", "cider",
                 "mean_length", "end")  # fmt: skip
SECOND = "second world: "  # begins the names of its rows in the prose


def refill(block: str) -> str:
    """A paragraph, or the items of a list, in lines of at most a hundred characters."""
    items = re.split(r"\n(?=(?:-|\d\.) )", block)
    indents = [re.match(r"(?:-|\d\.) |", item).end() * " " for item in items]
    options = dict(width=100, break_long_words=False, break_on_hyphens=False)

    def together(item: str) -> str:
        """On one line, with spaces that do not break in 0.52 ± 0.02 and 4 of 5."""
        return re.sub(r"(?<=\d) (±|of) (?=\d)", "\xa0\\1\xa0", " ".join(item.split()))

    return "\n".join(
        textwrap.fill(together(item), subsequent_indent=indent, **options)
        for item, indent in zip(items, indents)
    ).replace("\xa0", " ")


class Prose:
    """What a template may call, as {mean('ground truth only', 'oracle_R@1')}: every number of the
    text. Arguments are literals."""

    def __init__(self, tables: dict, tuning: dict) -> None:
        self.tables, self.tuned, self.choices = tables, tuning["tuning"], tuning["choice"]
        self.rows = tables["main"] | tables["departures"] | tables["robustness"]
        self.rows |= {SECOND + row: found for row, found in tables["world"].items()}

    def render(self, template: str) -> str:
        """The text with every call in braces replaced by what it returns."""

        def call(found: re.Match) -> str:
            arguments = ast.literal_eval(f"({found[2]},)") if found[2] else ()
            return getattr(self, found[1])(*arguments)

        def fill(block: str) -> str:
            text = re.sub(r"\{([a-z_]+)\((.*?)\)\}", call, block)
            return text if text == block or text.startswith(("|", "#")) else refill(text)

        return "\n\n".join(map(fill, template.split("\n\n")))

    def mean(self, row: str, column: str) -> str:
        """The mean over the seeds."""
        return f"{statistics.fmean(self.rows[row][column]):.2f}"

    def each(self, row: str, column: str) -> str:
        """The value on each seed."""
        return ", ".join(f"{value:.2f}" for value in self.rows[row][column])

    def gaps(self, row: str, column: str, other: str | None) -> list[float]:
        """What a row has more than another, on each seed."""
        prefix = SECOND if row.startswith(SECOND) else ""
        other = other or prefix + (against(row.removeprefix(SECOND)) or "")
        return gaps(self.rows[row][column], self.rows[other][column])

    def diff(self, row: str, column: str, other: str | None = None) -> str:
        """The mean difference from another row, by default that of `against`, and its interval."""
        return difference(self.gaps(row, column, other)).rpartition(" (")[0]

    def more(self, row: str, column: str, other: str | None = None) -> str:
        """On how many seeds there is more than in the other row, by 0.005 or more."""
        found = self.gaps(row, column, other)
        return f"{sum(round(gap, 6) >= 0.005 for gap in found)} of {len(found)}"

    def less(self, row: str, column: str, other: str | None = None) -> str:
        """On how many seeds there is less."""
        found = self.gaps(row, column, other)
        return f"{sum(round(gap, 6) <= -0.005 for gap in found)} of {len(found)}"

    def below(self, row: str, column: str, limit: float) -> str:
        """On how many seeds a value is below a limit."""
        found = self.rows[row][column]
        return f"{sum(value < limit for value in found)} of {len(found)}"

    def ends(self, row: str, word: str) -> str:
        """On how many seeds training ends so: "hacked", "no words", "spoilt"."""
        found = self.rows[row]["end"]
        return f"{found.count(word)} of {len(found)}"

    def cracks(self, row: str, word: str) -> str:
        """On how many seeds this cracks first: "grammar", "truth", "" for nothing."""
        found = self.rows[row]["cracked"]
        return f"{found.count(word)} of {len(found)}"

    def auc(self, row: str) -> str:
        """The mean AUC over the seeds that have one, and how many do, if not all."""
        found = [value for value in self.rows[row]["auc"] if value is not None]
        if not found:
            return "none"
        count = len(self.rows[row]["auc"])
        seeds = f" on {len(found)} of {count} seeds" if len(found) < count else ""
        return f"{statistics.fmean(found):.2f}{seeds}"

    def rival(self) -> str:
        """The best rival, that is in the table of robustness."""
        others = [row.partition(";")[0] for row in self.tables["robustness"]]
        return next(row for row in others if row not in (FULL, HUMAN, COSINE))

    def alpha(self, row: str) -> str:
        """The weight of the similarity of a row that was tuned."""
        return f"{self.tuned[row]['alpha'][self.tuned[row]['best']]:g}"

    def choice(self, name: str, column: str) -> str:
        """What the full method comes to on each seed of CHOICE_SEEDS, with this discriminator."""
        return ", ".join(f"{value:.2f}" for value in self.choices[name][column])

    def spread(self, row: str) -> str:
        """How many times as widely as the regularizer the similarity spreads in a tuned row."""
        found = self.tuned[row]
        return f"{found['similarity_spread'] / found['regularizer_spread']:.1f}"

    def toy(self, name: str) -> str:
        """A setting of the toy world's."""
        return f"{distcap.TOY[name]:g}"

    def generic(self) -> str:
        """Which share of the references is generic, in percent."""
        parameters = inspect.signature(distcap.write_references).parameters
        return f"{100 * parameters['generic'].default:.0f}"

    def generic_there(self) -> str:
        """The same in the second world."""
        return f"{100 * second_world.GENERIC:.0f}"

    def seed_count(self, part: str = "main") -> str:
        """How many seeds a table has."""
        first = next(iter(self.tables[part].values()))
        return str(len(first["seed"]))

    def row_count(self) -> str:
        """How many rows it has."""
        return str(len(self.tables["main"]))

    def minutes(self) -> str:
        """What all runs in the tables took, in minutes of one core."""
        found = [row["seconds"] for rows in self.tables.values() for row in rows.values()]
        return f"{sum(map(sum, found)) / 60:.0f}"

    def table(self, part: str) -> str:
        """A table of claims.json."""
        columns = dict.fromkeys(COLUMNS)
        if part == "robustness":
            columns = ("oracle_R@1", "well_formed", "faithful", "text_to_image_R@1", "cracked")
        elif part == "world":
            columns = SHORT_COLUMNS
        return markdown(self.tables[part], columns)

    def headline(self) -> str:
        """The few rows and columns that the README of the project shows."""
        return markdown({row: self.tables["main"][row] for row in HEADLINE}, SHORT_COLUMNS)

    def differences(self) -> str:
        """The table of differences."""
        return differences(self.tables)

    def tuning(self) -> str:
        """What was tried for the rows that were tuned."""
        names = list(RHO)
        head = " | ".join(f"rho = {name}" for name in names)
        lines = [f"| | spread of the similarity, of the regularizer | {head} | alpha |"]
        lines.append("|---|---|" + "---|" * len(names) + "---|")
        for row, found in self.tuned.items():
            cells = []
            for name in names:
                scores = ", ".join(f"{value:.2f}" for value in found["oracle_R@1"][name])
                cells.append(f"**{scores}**" if name == found["best"] else scores)
            both = f"{found['similarity_spread']:.3f}, {found['regularizer_spread']:.3f}"
            lines.append(f"| {row} | {both} | {' | '.join(cells)} | {self.alpha(row)} |")
        return "\n".join(lines)


def figure(rows: dict[str, dict], path: Path) -> None:
    """Oracle R@1 against the reward CLIP's R@1. What is hacked lies far below the diagonal: CLIP
    finds the picture, an ideal reader does not. The rows of HEADLINE have their names."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False})
    _, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":")
    points = {}
    for row, found in rows.items():
        points[row] = [
            statistics.fmean(found[name]) for name in ("text_to_image_R@1", "oracle_R@1")
        ]
        if row not in HEADLINE:
            axes.plot(*points[row], "o", color="0.75", markersize=7)

    # Names stand beside the plot, from bottom to top as the points do, but not on one another.
    height = -0.07
    for row in sorted(HEADLINE, key=lambda row: points[row][::-1]):
        x, y = points[row]
        ends = rows[row]["end"]
        broken = ends.count("hacked") + ends.count("spoilt") > len(ends) / 2
        colour, marker = ("#d55e00", "X") if broken else ("#0072b2", "o")  # for all eyes
        axes.plot(x, y, marker, color=colour, markersize=11, markeredgecolor="white")
        height = max(height + 0.085, min(y, 1.02 - 0.085 * (len(HEADLINE) - 1)))
        style = dict(arrowstyle="-", color="0.5", linewidth=0.8, shrinkB=6)
        axes.annotate(row, (x, y), (1.06, height), va="center", color=colour, arrowprops=style)
    axes.set(xlabel="text-to-image R@1 of the CLIP that rewards", ylabel="oracle R@1")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.05))
    pyplot.savefig(path, dpi=110)
    pyplot.close()


BLOCK = re.compile(r"(<!-- claims -->\n).*(\n<!-- end of claims -->)", re.DOTALL)


def texts(tables: dict, tuning: dict) -> dict[Path, str]:
    """The two READMEs as they should be: this folder's, from its template, and the project's, with
    the other template between its marks."""
    prose, project = Prose(tables, tuning), HERE.parents[1] / "README.md"
    page = prose.render((HERE / "README.template.md").read_text(encoding="utf-8")).rstrip() + "\n"
    part = prose.render((HERE / "headline.template.md").read_text(encoding="utf-8")).strip()
    whole = project.read_text(encoding="utf-8")
    whole = BLOCK.sub(lambda found: found[1] + part + found[2], whole)
    return {HERE / "README.md": page, project: whole}


def publish() -> None:
    """Write what is made of claims.json and tuning.json: the figure and the two READMEs."""
    tables = json.loads((HERE / "claims.json").read_text())
    tuning = json.loads((HERE / "tuning.json").read_text())
    figure(tables["main"], HERE / "claims.png")
    for path, text in texts(tables, tuning).items():
        distcap.write_text(path, text)


# ---- The command ---------------------------------------------------------------------------------
def read_tuning(out: Path) -> dict[str, dict[str, dict]]:
    """What tuning found: in this folder, else the file beside this one, else nothing yet."""
    for path in (out / "tuning.json", HERE / "tuning.json"):
        if path.exists():
            return json.loads(path.read_text())
    return {"tuning": {}, "choice": {}}


def train_all(plan: Plan, parts: tuple[str, ...], jobs: int, kept: dict) -> list[str]:
    """Make whatever is not finished of these parts, but for what the tables `kept` hold. Returns
    what failed."""
    with ProcessPoolExecutor(jobs, initializer=begin) as pool:

        def make_now(tasks: Iterable[Task]) -> list[str]:
            """These, after what they need."""
            missing = [task for task in tasks if not task.finished]
            failures = make_all(pool, starts(missing)) + make_all(pool, judges(missing))
            return failures + make_all(pool, missing)

        failures = []
        if "tune" in parts:
            failures += make_now(plan.spreads().values())
            failures += make_now(itertools.chain(*plan.tuning().values()))
            failures += make_now(flat(plan.choice()))
            found = {"tuning": tuned(plan), "choice": chosen(plan)}
            distcap.write_text(plan.out / "tuning.json", line_by_line(found))
        weights = alphas(read_tuning(plan.out))
        for part in PARTS[1:]:
            rows = plan.table(part, weights, kept)  # of main too, for what robustness asks of it
            failures += make_now(flat(rows)) if part in parts else []
    return failures


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--seeds", type=int, default=5)
    flag("--jobs", type=int, default=1, help="runs at a time, each in a process with one thread")
    flag("--out", type=Path, default=Path("runs/claims"))
    flag("--quick", action="store_true", help="a few steps of everything, to see that it works")
    flag("--keep", action="store_true", help="seeds that claims.json holds are not run again")
    flag("--readme", action="store_true", help="write claims.json, tuning.json and the READMEs")
    flag("--only", choices=(*PARTS, "tables", "readme"), help="one part; the tables of what is "
         "finished; or the READMEs, from claims.json")  # fmt: skip
    arguments = parser.parse_args()
    plan = Plan(arguments.out, arguments.seeds, arguments.quick)
    if arguments.only == "readme":
        return publish()
    kept = json.loads((HERE / "claims.json").read_text()) if arguments.keep else {}
    failures = []
    if arguments.only != "tables":
        parts = (arguments.only,) if arguments.only else PARTS[1:] if arguments.keep else PARTS
        failures = train_all(plan, parts, arguments.jobs, kept)
    if arguments.only in (None, "tables"):
        tuning = read_tuning(plan.out)
        tables = summary(plan, alphas(tuning), kept)
        for part, rows in tables.items():
            print(f"\n{part}\n\n{markdown(rows)}" if rows else f"\n{part}: nothing yet")
        print(f"\n{differences(tables)}")
        if arguments.readme and not failures:
            distcap.write_text(HERE / "claims.json", line_by_line(tables))
            distcap.write_text(HERE / "tuning.json", line_by_line(tuning))
            # In a process of its own: the text may have been edited while all this was trained.
            subprocess.run([sys.executable, __file__, "--only", "readme"], check=True)
    if failures:
        raise SystemExit("failed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
