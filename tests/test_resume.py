"""A run that was interrupted, however and wherever, and resumed is the run that was not."""

import json
import signal

import pytest
import torch
from conftest import configure
from test_command_line import read_log

import distcap

TINY = "--train-size 40 --test-size 8 --clip-steps 3 --tf-steps 3 --steps 3 --batch-size 4"
TINY += " --save-every 2 --validate-every 2 --device cpu --log-every 2"
METHODS = {
    "discriminator": "--pretrain-discriminator 3 --discriminator-steps 2 --select oracle_R@1",
    "paced": "--regularizer paced --discriminator-steps 3",
    "KL": "--regularizer kl --select cider",
    "teacher forcing": "--recipe tf --select reward",
}


class Killed(BaseException):
    """In place of SIGKILL: nobody catches it, and nothing is written."""


def command(out, method, *more):
    flags = f"{TINY} {METHODS[method]}"
    if method == "teacher forcing":
        flags = flags.replace("--steps 3 ", "").replace("--log-every 2", "")
    return ["train", "--out", str(out), *flags.split(), *more]


def contents(out):
    """All that a run leaves: files that hold weights or words, and the log without the clock."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    del found["config.json"]  # holds the folder's name, and --resume
    lines = [json.loads(line) for line in found.pop("log.jsonl").splitlines()]
    return found, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """`uninterrupted(method)`: what that run leaves."""
    known = {}

    def of(method):
        if method not in known:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert distcap.main(command(out, method)) == 0
            known[method] = contents(out)
        return known[method]

    return of


def interrupt(monkeypatch, how, after):
    """From now on, whoever takes `after` steps is interrupted before the next."""
    steps, update = [], distcap.update

    def interrupted(*arguments):
        if len(steps) == after:
            if how is Killed:
                raise Killed
            signal.raise_signal(how)
        steps.append(None)
        return update(*arguments)

    monkeypatch.setattr(distcap, "update", interrupted)


WAYS = [("discriminator", Killed, 2), ("discriminator", signal.SIGTERM, 1), ("KL", Killed, 3)]
WAYS += [("KL", signal.SIGINT, 2), ("teacher forcing", Killed, 2), ("paced", Killed, 2)]


@pytest.mark.parametrize(("method", "how", "after"), WAYS)
def test_interrupted_again_and_again_and_resumed_it_is_the_same_run(
    method, how, after, uninterrupted, tmp_path, capsys
):
    """In every stage, before odd and even steps: the same weights, log and results to the last bit.
    Bugs of the first attempt: what interrupted the discriminator's stage lost the captioner, and
    resumption after the first stage put an untrained CLIP in the place of the trained one."""
    out, attempts = tmp_path / "run", 0
    while not (out / "results.json").exists():
        attempts += 1
        assert attempts < 20
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, how, after)
            try:
                status = distcap.main(command(out, method, "--resume"))
            except Killed:
                (out / "state.pt.partial").write_bytes(b"torn")  # as if killed while it was written
                with open(out / "log.jsonl", "a") as log:
                    log.write('{"stage": "tf", "st')
                continue
        if not (out / "results.json").exists():
            assert status == 130
            told = capsys.readouterr().err.splitlines()
            assert "distcap: stopped after step" in told[-1] and "--resume" in told[-1]
            assert (out / "state.pt").is_file()
    assert attempts >= 3
    (out / "state.pt.partial").unlink(missing_ok=True)
    files, log = contents(out)
    expected, expected_log = uninterrupted(method)
    assert log == expected_log
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []


def test_killed_between_training_and_results_it_is_the_same_run(
    uninterrupted, tmp_path, monkeypatch
):
    """As the captioner's folder is half written."""
    out = tmp_path / "run"

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(distcap, "model_card", killed)
        with pytest.raises(Killed):
            distcap.main(command(out, "KL"))
    assert (out / "captioner.partial").is_dir() and not (out / "captioner").exists()
    assert distcap.main(command(out, "KL", "--resume")) == 0
    assert contents(out) == uninterrupted("KL")


@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys):
    """A run folder of a run that was stopped."""
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM, 1)
        assert distcap.main(command(tmp_path / "run", "discriminator")) == 130
    return tmp_path / "run"


def refused(capsys, arguments):
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert distcap.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("distcap: ") and err.count("\n") == 1
    return err


def test_what_cannot_be_resumed_is_one_line(stopped, capsys, monkeypatch):
    go_on = command(stopped, "discriminator", "--resume")
    other = refused(capsys, [*go_on, "--learning-rate", "3e-4"])
    assert "--learning-rate 0.0003: the run began with 0.001; give the same command" in other
    assert "--seed 5" in refused(capsys, [*go_on, "--seed", "5"])
    with monkeypatch.context() as patch:
        patch.setattr(distcap, "process_count", lambda: 2)
        assert "--nproc-per-node 2: the run began with 1" in refused(capsys, go_on)
    assert f"{stopped}: already exists" in refused(capsys, go_on[:-1])

    state = (stopped / "state.pt").read_bytes()
    for broken in (b"", b"nonsense", state[: len(state) // 2]):
        (stopped / "state.pt").write_bytes(broken)
        assert f"{stopped}/state.pt: cannot be read" in refused(capsys, go_on)
        assert (stopped / "state.pt").read_bytes() == broken  # it is for the user to remove
    (stopped / "config.json").write_text("{")
    assert f"{stopped}/config.json: cannot be read" in refused(capsys, go_on)


@pytest.mark.parametrize("left", [0, 1])
def test_a_log_that_lost_lines_is_continued(left, stopped):
    """Bug: NUL bytes filled the place of what was removed, and no results could be written."""
    path = stopped / "log.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:left]
    path.write_bytes(b"".join(kept))
    assert distcap.main(command(stopped, "discriminator", "--resume")) == 0
    assert path.read_bytes().startswith(b"".join(kept) + b'{"stage": "clip", "step": 2,')


def test_what_does_not_change_the_run_may_change(stopped, capsys):
    more = "--resume --workers 1 --save-every 1 --log-every 1"
    assert distcap.main(command(stopped, "discriminator", *more.split())) == 0
    assert "complete" in refused(capsys, command(stopped, "discriminator", "--resume"))


def test_a_state_is_tensors_and_plain_values(stopped):
    """It is read without running any code of its own."""
    state = torch.load(stopped / "state.pt", weights_only=True)
    assert (state["stage"], state["step"]) == ("clip", 2)


def test_the_second_signal_ends_the_program_where_it_is():
    """But not one that comes with the first: torchrun sends its own after the terminal's."""
    before = signal.getsignal(signal.SIGINT)
    run = distcap.Run()
    with pytest.raises(KeyboardInterrupt), run.heed_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert run.stop
        run.stop -= 2
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ten_bad_steps_leave_a_state_and_the_eleventh_ends_it_again(tmp_path):
    network = torch.nn.Linear(1, 1)
    config = configure()
    for resume in (False, True):
        run = distcap.Run(tmp_path, resume)
        step = lambda _: (network.weight.sum() * torch.nan, {})  # noqa: E731
        with pytest.raises(distcap.UserError, match="ten steps in a row"):
            distcap.fit("rl", network, step, lambda n: [0] * (30 - n), 30, 0.1, config, run)
        steps = [line["step"] for line in read_log(tmp_path)]
        assert steps == list(range(11 if resume else 10))


def test_the_log_of_the_discriminators_stages(uninterrupted):
    """--pretrain-discriminator: as many steps in which it learns alone; --log-every: captions."""
    _, log = uninterrupted("discriminator")
    steps = [(line["stage"], line["step"]) for line in log if "loss" in line]
    assert steps == [(stage, step) for stage in distcap.STAGES for step in range(3)]
    alone = [line for line in log if line["stage"] == "discriminator"]
    assert all(line["gradient_norm"] > 0 and "reward" not in line for line in alone)
    (captions,) = [line for line in log if "captions" in line]
    assert (captions["stage"], captions["step"], len(captions["captions"])) == ("rl", 1, 3)
    validated = [line["step"] for line in log if "validation" in line]
    assert validated == [1, 2]  # every second step, and the last


def test_the_weights_of_the_best_validation_are_kept(tmp_path, monkeypatch):
    """--select: of three looks at the validation pictures, the second is the best."""
    values, seen = iter([0.1, 0.3, 0.2]), []
    keep_best = distcap.keep_best

    def pretend(model, measures, *rest):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append(weights)
        keep_best(model, measures | {"oracle_R@1": next(values)}, *rest)

    monkeypatch.setattr(distcap, "keep_best", pretend)
    out = tmp_path / "run"
    assert distcap.main([*command(out, "discriminator"), "--validate-every", "1"]) == 0
    kept = distcap.Captioner.load(str(out)).model.state_dict()
    same = [all(kept[k].equal(each[k]) for k in kept) for each in seen]
    assert same == [False, True, False]
