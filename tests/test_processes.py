"""A step in parts, and a step of two processes: both are the step of the joint batch."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import configure
from test_command_line import read_log
from test_training import Log

import distcap

ROOT = Path(distcap.__file__).parent


class ByPicture:
    """In place of `sample_and_greedy`: captions that depend on each picture alone, not on what it
    shares a batch with, so that a batch and its parts write the same."""

    def __init__(self, captioner):
        self.start, self.end, self.pad = captioner.start, captioner.end, captioner.pad

    def __call__(self, features, max_length, count):
        rows = []
        for picture in features:
            rng = torch.Generator().manual_seed(round(abs(picture[1, 0].item()) * 100))
            for _ in range(count + 1):
                length = int(torch.randint(1, max_length, (), generator=rng))
                words = torch.randint(5, self.end, (length,), generator=rng)
                rows.append(torch.tensor([*self.start, *words.tolist(), self.end]))
        tokens = torch.nn.utils.rnn.pad_sequence(rows, True, self.pad)
        tokens = tokens.view(len(features), count + 1, -1)
        return tokens[:, :-1].flatten(0, 1), tokens[:, -1]


def make_learner(clip, world, **values):
    """A learner about to begin RL that writes by picture."""
    config = configure(**{"similarity_weight": 0.94, "ground_truth_weight": 1.0, **values})
    captioner = distcap.toy_captioner(0)
    captioner.sample_and_greedy = ByPicture(captioner)
    learner = distcap.Learner(captioner, clip, config, config.max_length)
    distcap.prepare_reinforcement(learner, world, config)
    return learner


def joint_batch(learner, world, number=0):
    dataset = distcap.CaptionDataset(world, learner.captioner.pixels)
    return dataset[[(7 * n + number, n % 5) for n in range(8)]]


def gradients(learner, losses):
    """The sum of the losses, and the gradients of captioner and regularizer's network by name."""
    losses = [losses] if isinstance(losses, torch.Tensor) else losses
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    modules = {"captioner": learner.captioner.model, "network": learner.regularizer.network}
    found = {
        f"{name} {path}": weight.grad
        for name, module in modules.items()
        for path, weight in module.named_parameters()
        if weight.grad is not None
    }
    return total, found


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **tolerance, msg=name)


POOLS = [("contrastive", each) for each in ("discriminator", "kl", "cider", "grammar", "none")]
POOLS += [(each, "discriminator") for each in ("greedy", "group", "neighbours", "none")]


@pytest.mark.parametrize(("baseline", "regularizer"), POOLS)
@pytest.mark.parametrize("count", [2, 4])
def test_a_step_in_parts_is_the_step_of_the_batch(clip, world, baseline, regularizer, count):
    """The same rewards, loss and gradient, hard negatives and all."""
    settings = dict(baseline=baseline, regularizer=regularizer, samples=3, neighbours=4)
    results = []
    for in_parts in (False, True):
        learner = make_learner(clip, world, **settings)
        step = learner.reinforce_step
        if in_parts:
            step = functools.partial(distcap.reinforce_in_parts, learner, count)
        torch.manual_seed(5)  # of the grammar score's corrupted captions
        losses, record = step(joint_batch(learner, world))
        results.append((record, *gradients(learner, losses)))
    (record, loss, whole), (record_of_parts, loss_of_parts, parts) = results
    assert record_of_parts == pytest.approx(record, abs=1e-5)
    assert loss_of_parts == pytest.approx(loss, abs=1e-5)
    assert_same(whole, parts, atol=2e-6, rtol=1e-3)


def test_teacher_forcing_in_parts_is_that_of_the_batch(clip, world):
    results = []
    for in_parts in (False, True):
        learner = make_learner(clip, world)
        step = learner.teacher_forcing_step
        if in_parts:
            step = functools.partial(distcap.teacher_forcing_in_parts, learner, 4)
        results.append(gradients(learner, step(joint_batch(learner, world))[0]))
    (loss, whole), (loss_of_parts, parts) = results
    assert loss_of_parts == pytest.approx(loss, abs=1e-6)
    assert_same(whole, parts, atol=1e-6, rtol=1e-3)


def test_rollouts_are_joined_as_a_slow_loop_joins_them():
    """Three parts of two images, two samples of each, captions of different lengths."""
    parts = []
    for number in range(3):
        captions = [f"part {number} caption {row}" for row in range(8)]
        tokens = torch.randint(1, 9, (8, 3 + number))
        own = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1])
        images = torch.randn(2, 5)
        parts.append(distcap.Rollout(tokens, captions, own, torch.randn(8, 5), images, (4, 2, 2)))
    whole = distcap.join(parts, pad=0)
    assert whole.sizes == (12, 6, 6)
    place = 0
    for rows in (range(4), range(4, 6), range(6, 8)):  # sampled, human, greedy
        for number, part in enumerate(parts):
            for row in rows:
                assert whole.captions[place] == part.captions[row]
                padding = [0] * (2 - number)
                assert whole.tokens[place].tolist() == [*part.tokens[row].tolist(), *padding]
                assert whole.caption_embeddings[place].equal(part.caption_embeddings[row])
                image = whole.image_embeddings[whole.image_index[place]]
                assert image.equal(part.image_embeddings[part.image_index[row]])
                place += 1
    assert place == len(whole.tokens) == 24


def test_train_accumulates(run, tmp_path):
    """A step takes accumulate x batch-size pictures, and logs one line."""
    flags = "--train-size 60 --test-size 8 --tf-steps 2 --steps 2 --batch-size 4 --accumulate 4"
    out = ["--captioner", str(run), "--device", "cpu", "--out", str(tmp_path / "new")]
    assert distcap.main(["train", *flags.split(), *out]) == 0
    lines = read_log(tmp_path / "new")
    assert [line["stage"] for line in lines if "loss" in line] == ["tf", "tf", "rl", "rl"]
    assert all(line["updated"] for line in lines if "loss" in line)


# ---- Two processes -------------------------------------------------------------------------------
METHODS = {
    "the full method with hard negatives": dict(neighbours=4, samples=2),
    "KL": dict(regularizer="kl"),
    "CIDEr, self-critical": dict(regularizer="cider", baseline="greedy"),
    "group": dict(regularizer="none", baseline="group", samples=2),
    "teacher forcing": dict(objective="tf"),
}


def train_a_little(clip, world, name):
    """Three steps of a method on this process's part of joint batches: what was logged, the
    advantages, the gradient of the first step, and the weights before each step and at the end."""
    learner = make_learner(clip, world, **METHODS[name])
    step, stage = learner.reinforce_step, "rl"
    if name == "teacher forcing":
        step, stage = learner.teacher_forcing_step, "tf"
    advantages, weights = [], []
    judge = learner.judge

    def remember(*arguments):
        result = judge(*arguments)
        advantages.append(result[0])
        return result

    def watched(batch):
        parts = torch.nn.ModuleList([learner.captioner.model, learner.regularizer.network])
        weights.append({key: value.clone() for key, value in parts.state_dict().items()})
        return step(batch)

    learner.judge = remember
    joint = [joint_batch(learner, world, number) for number in range(3)]
    count = distcap.process_count()
    batches = [distcap.in_parts(batch, count)[distcap.process_rank()] for batch in joint]
    log, model = Log(), learner.captioner.model
    first = {}
    for steps in (1, 2):  # after the first step alone, its gradient is still there
        done = lambda _, own=batches[:steps]: own  # noqa: E731
        distcap.fit(stage, model, watched, done, steps, 1e-3, learner.method, log, learner)
        for path, weight in model.named_parameters():
            if weight.grad is not None:
                first.setdefault(path, weight.grad.clone())
    watched(batches[2])
    return dict(records=log.records, advantages=advantages, gradients=first, weights=weights)


def rehearsals(clip, world):
    """The loss of a rehearsal, and of the same one with what the first process alone remembers, as
    after a resumption."""
    learner = make_learner(clip, world, regularizer="paced")
    count, rank = distcap.process_count(), distcap.process_rank()
    learner.reinforce_step(distcap.in_parts(joint_batch(learner, world), count)[rank])
    paced, losses = learner.regularizer, []
    for shown in (paced.shown, distcap.put_together(paced.shown)[:1]):
        paced.shown = shown
        losses.append(paced.rehearse(*learner.judged).item())
    return losses


def one_of_two(rank, folder, clip_folder):
    """What each of the processes does."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    clip = distcap.CLIP.load(clip_folder)
    world = distcap.toy_world(0, 60, 1)[0]
    results = {name: train_a_little(clip, world, name) for name in METHODS}
    gathered = distcap.gather(torch.tensor([[rank, 1], [rank, 2]]))
    results["gathered"] = gathered, distcap.own_rows(gathered)
    results["rehearsals"] = rehearsals(clip, world)
    results["shared"] = distcap.put_together(list(distcap.own_share(range(5))))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("processes") / "clip"
    distcap.toy_clip(folder, world, configure(clip_steps=5), distcap.Run())
    return str(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, clip_folder):
    """What two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_of_two, (str(folder), clip_folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_take_the_step_of_the_joint_batch(ranks, clip_folder, world, name):
    one = train_a_little(distcap.CLIP.load(clip_folder), world, name)
    first, second = (rank[name] for rank in ranks)
    if one["advantages"]:
        own = [each["advantages"][0] for each in (first, second)]
        joint = [each[:-4] for each in own] + [each[-4:] for each in own]  # sampled, then human
        torch.testing.assert_close(torch.cat(joint), one["advantages"][0], atol=1e-5, rtol=1e-4)
    for key, value in one["records"][0].items():
        assert first["records"][0][key] == (
            value if isinstance(value, str) else pytest.approx(value, abs=1e-5, rel=1e-4)
        )
    assert_same(one["gradients"], first["gradients"], atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_stay_one_captioner(ranks, name):
    """Weights, the discriminator's too, and records: to the last bit, after every step."""
    first, second = (rank[name] for rank in ranks)
    assert first["records"] == second["records"] and len(first["records"]) == 3
    for mine, other in zip(first["weights"], second["weights"]):
        assert all(value.equal(other[key]) for key, value in mine.items())
    moved = first["weights"]
    assert any(not value.equal(moved[-1][key]) for key, value in moved[0].items())


def test_rows_are_gathered_in_the_order_of_the_ranks(ranks):
    for rank, result in enumerate(ranks):
        gathered, own = result["gathered"]
        assert gathered.tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
        assert own.tolist() == [[rank, 1], [rank, 2]]
        assert result["shared"] == [0, 1, 2, 3, 4]


def test_each_process_rehearses_on_its_own_rows_also_when_resumed(ranks):
    """Bug: resumed, all of them rehearsed on those of the first process."""
    losses = [result["rehearsals"] for result in ranks]
    assert all(before == resumed for before, resumed in losses)
    assert losses[0] != losses[1]


def test_torchrun_leaves_one_run_folder(run, world, tmp_path, capsys):
    """One line a step, one broken picture told once; one process measures the same. Bug of the
    first attempt: --log-every ended the second process, whose bar is none."""
    data = tmp_path / "data"
    distcap.write_examples(data, world[:40])
    (data / "00003.png").write_bytes(b"no picture")
    flags = "--tf-steps 2 --steps 3 --batch-size 4 --workers 0 --device cpu --max-length 18"
    flags += " --log-every 2"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(ROOT / "distcap.py"), "train", str(data)]
    command += ["--captioner", str(run), "--out", str(tmp_path / "run"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out 1 pictures or captions") == 1
    assert done.stderr.count("  step 1: ") == 3
    assert "Traceback" not in done.stderr and done.stdout.count("oracle_R@1") == 1

    lines = read_log(tmp_path / "run")
    steps = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert steps == [("tf", 0), ("tf", 1), ("rl", 0), ("rl", 1), ("rl", 2)]
    found = json.loads((tmp_path / "run" / "results.json").read_text())["after"]
    assert (tmp_path / "run" / "captioner" / "model.safetensors").is_file()

    again = ["eval", str(tmp_path / "run" / "test"), "--captioner", str(tmp_path / "run")]
    again += ["--max-length", "18", "--device", "cpu", "--out", str(tmp_path / "again.json")]
    assert distcap.main(again) == 0
    measured = json.loads((tmp_path / "again.json").read_text())
    for name, value in found.items():
        assert measured.get(name, value) == pytest.approx(value, abs=1e-6), name
    capsys.readouterr()
