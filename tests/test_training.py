"""Training: the loop, updates that are finite or nothing, the schedule, and that it all learns."""

import copy
import fcntl
import functools
import io
import json
import math
import os
import pty
import struct
import sys
import termios
import time
import types

import pytest
import torch
from conftest import configure

import distcap


class Log(distcap.Run):
    """A run without a folder that keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.records = []

    def write(self, **record):
        record.pop("seconds", None)  # the clock is never the same
        self.records.append(record)


def teaches(network):
    """What `fit` asks of a learner whose regularizer has this network."""
    regularizer = types.SimpleNamespace(network=network)
    return types.SimpleNamespace(regularizer=regularizer, method=distcap.Method())


def fit_one_weight(step, batches, network=None, run=None, **values):
    """Fit a linear model of one weight, 1.0 at first; the model and what was logged."""
    model, run = torch.nn.Linear(1, 1, bias=False), run or Log()
    torch.nn.init.constant_(model.weight, 1.0)
    own = functools.partial(step, model)
    learner = teaches(network) if network else None
    rest = lambda first: batches[first:]  # noqa: E731
    config = configure(**values)
    distcap.fit("rl", model, own, rest, len(batches), 0.1, config, run, learner)
    return model, getattr(run, "records", None)


def test_gradients_are_clipped_and_every_step_is_logged():
    def step(model, batch):
        return 1e6 * model.weight.sum(), {"reward": float(batch)}

    model, records = fit_one_weight(step, [1, 2, 3], max_gradient_norm=0.5)
    found = [(record["stage"], record["step"], record["reward"]) for record in records]
    assert found == [("rl", 0, 1.0), ("rl", 1, 2.0), ("rl", 2, 3.0)]
    assert model.weight.grad.norm() <= 0.5 + 1e-6 and model.weight.item() < 1


BROKEN = ("loss", "gradient", "reward", "discriminator", "discriminator's gradient")


@pytest.mark.parametrize("what", BROKEN)
def test_a_step_that_is_not_finite_changes_nothing_at_all(what):
    """Neither model nor regularizer nor the state of their optimizers: four steps, of which the
    second is broken, leave what three steps leave. Bug of the first edition: the discriminator
    had stepped before the check, and one NaN in an embedding poisoned it for good."""

    def run(batches):
        torch.manual_seed(0)
        network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(network.weight, 2.0)
        weights = []

        def step(model, batch):
            weights.append((model.weight.item(), network.weight.item()))
            weight, other = model.weight.sum(), network.weight.sum()
            record = {"reward": 0.5, "regularizer_loss": 0.5}
            if batch == "loss":
                return weight * torch.inf, record
            if batch == "gradient":
                return (weight * 0).sqrt() + other, record  # finite, but its slope is not
            if batch == "reward":
                return weight + other, record | {"reward": math.nan}
            if batch == "discriminator":
                return weight + other * torch.nan, record | {"regularizer_loss": math.nan}
            if batch == "discriminator's gradient":
                return weight + (other * 0).sqrt(), record
            return weight**2 + other**2, record

        model, records = fit_one_weight(step, batches, network)
        return weights, (model.weight.item(), network.weight.item()), records

    weights, after, records = run(["good", what, "good", "good"])
    assert weights[1] == weights[2] != weights[3] and len(records) == 4
    assert all(math.isfinite(value) for value in after)
    assert weights[0] != weights[1]


def test_the_optimizers_state_survives_a_broken_step():
    """Adam's moments too: with a constant rate, three good steps are three good steps."""

    def run(batches):
        def step(model, batch):
            weight = model.weight.sum()
            return (weight - 3) ** 2 * (torch.nan if batch == "bad" else 1.0), {}

        with pytest.MonkeyPatch.context() as patch:
            constant = torch.optim.lr_scheduler.ConstantLR
            flat = lambda optimizer, *_: constant(optimizer, factor=1.0)  # noqa: E731
            patch.setattr(torch.optim.lr_scheduler, "OneCycleLR", flat)
            return fit_one_weight(step, batches)[0].weight.item()

    assert run(["good", "bad", "good", "good"]) == run(["good"] * 3)


def test_the_log_is_json_whatever_happens(tmp_path):
    """json.dumps writes NaN, which JSON does not have."""

    def step(model, batch):
        return model.weight.sum() * math.nan, {"reward": math.inf}

    fit_one_weight(step, [1], run=distcap.Run(tmp_path))
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert (record["loss"], record["reward"], record["updated"]) == (None, None, False)


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run():
    def step(model, batch):
        return model.weight.sum() * (torch.inf if batch else 1), {}

    model, _ = fit_one_weight(step, [1] * 9 + [0] + [1] * 9)  # nine are not ten
    assert model.weight.isfinite().all()
    with pytest.raises(distcap.UserError, match="lower --learning-rate"):
        fit_one_weight(step, [1] * 10 + [0])


def test_the_advice_after_ten_bad_steps_is_the_flag_of_the_stage():
    """Bug: it named --learning-rate in every stage, and --resume refuses another rate."""
    run, wanted = distcap.Run(), {"tf": "--tf-learning-rate", "rl": "--learning-rate"}
    wanted |= {"discriminator": "--discriminator-learning-rate", "clip": "--seed"}
    run.notes["failures"] = 10
    for stage in distcap.STAGES:
        advice = f"^{stage}: .*; begin again, in another --out, with .* {wanted[stage]}$"
        with pytest.raises(distcap.UserError, match=advice):
            distcap.give_up(stage, 10, run)


@pytest.mark.parametrize(("stage", "dropout"), [("tf", True), ("clip", True), ("rl", False)])
def test_there_is_dropout_but_not_in_reinforcement_learning(stage, dropout):
    """The policy that is scored must be the one that was sampled from."""
    model, modes = torch.nn.Linear(1, 1), []

    def step(_):
        modes.append(model.training)
        return model.weight.sum(), {}

    distcap.fit(stage, model, step, lambda _: [1], 1, 0.1, configure(), distcap.Run())
    assert modes == [dropout] and not model.training


def test_a_steps_draws_depend_on_nothing_before_it():
    draws = []

    def step(model, batch):
        torch.rand(batch)
        draws.append(torch.rand(1).item())
        return model.weight.sum(), {}

    fit_one_weight(step, [1, 1, 1])
    fit_one_weight(step, [5, 1, 7])
    assert draws[1] == draws[4] != draws[2]


def test_a_broken_embedding_leaves_captioner_and_discriminator_as_they_were(learn):
    """The whole step, with a NaN where CLIP's embedding of a training picture should be."""
    learner, batch = learn()
    model, network = learner.captioner.model, learner.regularizer.network
    before = copy.deepcopy((model.state_dict(), network.state_dict()))
    learner.image_embeddings[batch.index[0]] = torch.nan
    step, log = learner.reinforce_step, Log()
    distcap.fit("rl", model, step, lambda _: [batch], 1, 1e-3, configure(), log, learner)
    for module, state in zip((model, network), before):
        assert all(value.equal(state[name]) for name, value in module.state_dict().items())
    assert math.isnan(log.records[0]["reward"])


def run_stage(learner, stage, steps, batch_size, examples):
    """Fit `steps` steps of a stage; what was logged."""
    log = Log()
    dataset = distcap.CaptionDataset(examples, learner.captioner.pixels)
    order = distcap.schedule(examples, batch_size, steps, 0)
    batches = lambda first: distcap.read_ahead(dataset, order[first:], 0)  # noqa: E731
    config = learner.method
    step, rate = learner.teacher_forcing_step, config.tf_learning_rate
    if stage == "rl":
        step, rate = learner.reinforce_step, config.learning_rate
    model = learner.captioner.model
    distcap.fit(stage, model, step, batches, steps, rate, config, log, learner)
    return log.records


@pytest.mark.parametrize("baseline", ["contrastive", "greedy", "group", "neighbours", "none"])
@pytest.mark.parametrize("regularizer", ["discriminator", "kl", "cider", "grammar", "none"])
def test_every_baseline_trains_with_every_regularizer(learn, world, baseline, regularizer):
    values = dict(baseline=baseline, regularizer=regularizer, samples=2, neighbours=2)
    learner, _ = learn(**values)
    before = copy.deepcopy(learner.captioner.model.state_dict())
    records = run_stage(learner, "rl", 2, 4, world)
    assert len(records) == 2 and all(abs(record["loss"]) < 100 for record in records)
    after = learner.captioner.model.state_dict()
    assert any(not value.equal(before[name]) for name, value in after.items())


def test_the_discriminator_learns_while_the_captioner_does(learn, world):
    """The captioner learns slowly here: it must not get better at once."""
    learner, _ = learn(discriminator_learning_rate=2e-3, learning_rate=1e-5)
    records = run_stage(learner, "rl", 60, 16, world)
    losses = [record["regularizer_loss"] for record in records]
    accuracies = [record["discriminator_accuracy"] for record in records]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert sum(accuracies[-10:]) > 0.9 * 10


def test_teacher_forcing_learns(learn, world):
    records = run_stage(learn()[0], "tf", 30, 16, world)
    losses = [record["loss"] for record in records]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_reinforcement_raises_the_mean_reward(run):
    """From the captioner of a short run: the last steps' mean reward beats that of the first."""
    training = distcap.toy_world(0, 300, 40)[0]
    captioner, clip = distcap.Captioner.load(str(run)), distcap.CLIP.load(str(run))
    config = configure()
    learner = distcap.Learner(captioner, clip, config, config.max_length)
    distcap.prepare_reinforcement(learner, training, config)
    rewards = [record["reward"] for record in run_stage(learner, "rl", 60, 32, training)]
    assert sum(rewards[-15:]) > sum(rewards[:15]) + 15 * 0.01


def test_the_same_seed_gives_the_same_bits(learn, world):
    def train():
        learner, _ = learn()
        records = run_stage(learner, "rl", 3, 8, world)
        return records, learner.captioner.model.state_dict()

    (records, weights), (records_again, weights_again) = train(), train()
    assert records == records_again
    assert all(value.equal(weights_again[name]) for name, value in weights.items())


@pytest.mark.parametrize("regularizer", ["discriminator", "grammar"])
def test_the_discriminator_takes_so_many_steps_on_the_same_captions(learn, regularizer):
    """--discriminator-steps 3: three updates by AdamW, on the captions of the captioner's step."""
    networks = []
    for by_hand in (False, True):
        settings = dict(regularizer=regularizer, discriminator_steps=1 if by_hand else 3)
        learner, batch = learn(**settings, discriminator_learning_rate=1e-3)
        network = learner.regularizer.network
        log = Log()
        step = learner.reinforce_step
        if by_hand:
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
            torch.manual_seed(distcap.step_seed(learner.method, 0))
            loss, _ = step(batch)
            for number in range(3):
                if number:
                    _, loss, _ = learner.regularizer.score(*learner.judged)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        else:
            fit = [lambda _, batch=batch: [batch], 1, 0.0, learner.method, log, learner]
            distcap.fit("rl", learner.captioner.model, step, *fit)
        networks.append({name: value.clone() for name, value in network.state_dict().items()})
    for name, value in networks[0].items():
        torch.testing.assert_close(networks[1][name], value, atol=1e-6, rtol=1e-5)


def test_the_discriminator_learns_alone_before_the_captioner_does(learn, world):
    """--pretrain-discriminator: the captioner stays as it is, and its loss falls."""
    learner, _ = learn()
    before = copy.deepcopy(learner.captioner.model.state_dict())
    dataset = distcap.CaptionDataset(world, learner.captioner.pixels)
    batches = lambda first: distcap.read_ahead(dataset, order[first:], 0)  # noqa: E731
    order, log = distcap.schedule(world, 16, 20, 0), Log()
    network, step = learner.regularizer.network, learner.discriminator_step
    distcap.fit("discriminator", network, step, batches, 20, 1e-3, learner.method, log)
    losses = [record["loss"] for record in log.records]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    after = learner.captioner.model.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())


def bar_on(stream, monkeypatch):
    """What a bar writes on a stream in half a second, a line of news in its midst."""
    monkeypatch.setattr(sys, "stderr", stream)
    with distcap.Bar(range(10), "rl", 10, mininterval=0.1, delay=0) as bar:
        for number in bar:
            time.sleep(0.05)
            if number == 5:
                distcap.put("  step 5: a dog", sys.stderr)
    stream.flush()


def test_where_there_is_no_terminal_a_bar_is_lines(monkeypatch):
    """Not thousands of states behind carriage returns, nor silence."""
    stream = io.StringIO()
    bar_on(stream, monkeypatch)
    assert "\r" not in stream.getvalue()
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) <= 10 and "  step 5: a dog" in lines
    assert all(line.startswith(("rl", "  step")) for line in lines if line.strip())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert distcap.Bar(range(3)).mininterval == 30  # seconds


def test_on_a_terminal_a_bar_is_drawn_anew_in_its_line(monkeypatch):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(writer, "w") as stream:
        bar_on(stream, monkeypatch)
        text = os.read(reader, 100_000).decode()
    os.close(reader)
    assert text.count("\rrl") > 2 and "  step 5: a dog\r\n" in text


@pytest.mark.parametrize(
    "fail",
    [
        lambda _: torch.empty(2**60),
        lambda _: exec("raise torch.OutOfMemoryError('CUDA out of memory. Tried to', 1)"),
        lambda _: exec("raise MemoryError"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_helps(fail, monkeypatch, capsys):
    monkeypatch.setattr(distcap, "toy_sets", fail)
    assert distcap.main(["train", "--device", "cpu", "--freeze-vision"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "cpu has too little memory" in err
    for flag in ("--batch-size", "--accumulate", "--precision bf16", "--gradient-checkpointing"):
        assert flag in err
    assert "--freeze-vision" not in err  # it is given


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(distcap, "toy_sets", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        distcap.main(["train", "--device", "cpu"])


def test_tensorboard_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(distcap.importlib.util, "find_spec", lambda name: None)
    assert distcap.main(["train", "--device", "cpu", "--tensorboard"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install tensorboard" in err
