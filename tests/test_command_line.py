"""The command line: flags, recipes, the three verbs, exit codes, one-line errors."""

import dataclasses
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

import distcap

SCRIPT = Path(distcap.__file__)
HERE = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}


@pytest.fixture
def photographs(tmp_path):
    """A folder of pictures of several modes and sizes, and one broken file."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    kinds = {"RGB": ("jpg", 640, 480), "L": ("PNG", 31, 77), "RGBA": ("png", 9, 9)}
    kinds["CMYK"] = ("jpg", 50, 40)
    for number, (mode, (suffix, width, height)) in enumerate(kinds.items()):
        noise = numpy.random.default_rng(number).integers(0, 256, (height, width), numpy.uint8)
        Image.fromarray(noise).convert("RGB").convert(mode).save(folder / f"{number} é.{suffix}")
    return folder


def one_line(capsys):
    """The single line of standard error, with nothing on standard output."""
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1, streams
    return streams.err


def forbid_models(monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(distcap.Captioner, "load", load)
    monkeypatch.setattr(distcap.CLIP, "load", load)
    monkeypatch.setattr(distcap, "toy_clip", load)


def test_train_leaves_a_run_folder(run):
    results = json.loads((run / "results.json").read_text())
    for row in ("before", "after"):
        assert set(results[row]) == {
            "text_to_image_R@1", "text_to_image_R@5", "text_to_image_R@10",
            "text_to_image_median_rank", "image_to_text_R@1", "image_to_text_R@5",
            "image_to_text_R@10", "image_to_text_median_rank", "text_to_image_mrr",
            "image_to_text_mrr", "bag_R@1", "rd100_R@1", "pool", "bleu_1", "bleu_2", "bleu_3",
            "bleu_4", "rouge_l", "cider", "mean_length", "self_bleu", "repetition", "identical",
            "distinct", "vocabulary", "well_formed", "faithful", "oracle_R@1",
        }  # fmt: skip
    assert results["seed"] == 0 and results["split"] == "test" and results["images"] == 40
    assert results["beams"] == 1 and results["max_length"] == 20
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 4 and config["similarity_weight"] == 0.99
    stages = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert stages == ["clip"] * 40 + ["tf"] * 60 + ["rl"] * 4
    assert len(list((run / "test").glob("*.png"))) == 40 and not list(run.rglob("*.partial"))


def test_eval_reproduces_the_after_row_exactly(run, tmp_path, capsys):
    out = tmp_path / "measures.json"
    command = ["eval", str(run / "test"), "--captioner", str(run)]
    assert distcap.main([*command, "--out", str(out)]) == 0
    after = json.loads((run / "results.json").read_text())["after"]
    assert json.loads(out.read_text())["measures"] == after
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["test"] and f"{after['oracle_R@1']:.1%}" in lines[-1]


TINY = "--train-size 64 --test-size 6 --device cpu".split()
BRIEF = [*TINY, *"--tf-steps 2 --steps 2 --batch-size 8 --max-length 8".split()]


def read_log(folder):
    """The records of a run, but for what the clock said."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in record if name != "seconds"} for record in records]


def test_the_same_seed_gives_the_same_results(tmp_path, capsys):
    flags = [*TINY, *"--clip-steps 3 --tf-steps 3 --steps 2 --seed 7".split()]
    for name in ("one", "two"):
        assert distcap.main(["train", *flags, "--out", str(tmp_path / name)]) == 0
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("one", "two")]
    assert results[0] == results[1] and read_log(tmp_path / "one") == read_log(tmp_path / "two")
    out = capsys.readouterr().out
    assert "before" in out and "after" in out and "oracle_R@1" in out


@pytest.mark.parametrize(
    "flags",
    [
        "--tf-steps 1 --steps 1",
        "--baseline greedy --similarity-weight 1 --ground-truth-weight 0",
        "--direction image-to-text",
        "--neighbours 3 --samples 2 --beams 2",
        "--sampled-weight 0 --length-normalizer caption",
        "--regularizer kl --prompt a",
    ],
)
def test_train_continues_from_a_run_with_other_settings(flags, run, tmp_path):
    short = flags if "steps" in flags else f"{flags} --tf-steps 0 --steps 2"
    command = ["train", "--captioner", str(run), *TINY, "--batch-size", "16", *short.split()]
    assert distcap.main([*command, "--out", str(tmp_path / "run")]) == 0
    log = rows_of(tmp_path / "run/log.jsonl")
    assert len(log) == 2 and all(math.isfinite(value) for row in log for value in numbers(row))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(record):
    return [value for value in record.values() if not isinstance(value, str)]


def test_train_takes_a_folder_of_the_users(run, tmp_path):
    """Whether worker processes read the pictures or not, the numbers are the same."""
    flags = ["--captioner", str(run), "--steps", "2", "--batch-size", "8", "--device", "cpu"]
    for workers in ("0", "2"):
        out = ["--workers", workers, "--out", str(tmp_path / workers)]
        assert distcap.main(["train", str(run / "test"), *flags, *out]) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "02"]
    assert results[0] == results[1] and results[0]["images"] == 4  # a tenth
    assert read_log(tmp_path / "0") == read_log(tmp_path / "2")


def test_caption_writes_a_line_per_picture_in_order(run, capsys):
    pictures = sorted((run / "test").glob("*.png"))
    command = ["caption", str(run / "test"), "--captioner", str(run), "--batch-size", "7"]
    assert distcap.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(path) for path in pictures]
    assert all(len(line.split("\t")) == 2 and line.split("\t")[1] for line in lines)


def test_caption_takes_photographs_and_reports_a_broken_one(run, photographs, capsys):
    assert distcap.main(["caption", str(photographs), "--captioner", str(run)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    (photographs / "broken.jpg").write_text("no picture")
    assert distcap.main(["caption", str(photographs), "--captioner", str(run)]) == 1
    streams = capsys.readouterr()
    assert len(streams.out.splitlines()) == 4 and "broken.jpg" in streams.err


def test_out_holds_what_standard_output_would_and_is_a_data_set(run, capsys):
    out = run / "test" / "captions.jsonl"
    command = ["caption", str(run / "test"), "--captioner", str(run)]
    assert distcap.main(command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert distcap.main([*command, "--out", str(out)]) == 0
    streams, rows = capsys.readouterr(), rows_of(out)
    out.unlink()
    done = "distcap: 40 captioned, 0 failed, 0 had a caption\n"
    assert streams.out == "" and streams.err.endswith(done)
    names = [Path(path).name for path, _ in lines]
    wanted = [{"file_name": name, "caption": [text]} for name, (_, text) in zip(names, lines)]
    assert rows == wanted
    data = run / "test" / "metadata.jsonl"
    truth = data.read_bytes()
    distcap.write_rows(data, {row["file_name"]: row for row in rows})
    read = distcap.read_examples(str(run / "test"))
    data.write_bytes(truth)
    assert [example.references for example in read] == [(text,) for _, text in lines]


def test_out_is_continued_and_keeps_what_it_holds(run, photographs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "x.jsonl"
    command = ["caption", str(photographs), "--captioner", str(run), "--out", str(out)]
    assert distcap.main(command) == 0
    whole = rows_of(out)
    names = [f"photographs/{path.name}" for path in sorted(photographs.iterdir())]
    assert [row["file_name"] for row in whole] == names
    mine = {**whole[1], "caption": "my own"}  # a text, as people write it, is read as a list
    theirs = {"file_name": "elsewhere.png", "caption": ["mine", "too"], "licence": 3}
    out.write_text("".join(json.dumps(row) + "\n" for row in (mine, theirs)))
    capsys.readouterr()
    assert distcap.main(command) == 0
    assert "distcap: 3 captioned, 0 failed, 1 had a caption\n" in capsys.readouterr().err
    assert rows_of(out) == [{**mine, "caption": ["my own"]}, theirs, whole[0], *whole[2:]]
    assert distcap.main([*command, "--overwrite"]) == 0
    assert rows_of(out) == [whole[1], theirs, whole[0], *whole[2:]]
    forbid_models(monkeypatch)  # nothing is left to do: nothing is loaded
    assert distcap.main(command) == 0


def test_a_broken_picture_is_tried_again_and_the_rest_is_kept(run, photographs, tmp_path, capsys):
    out, broken = tmp_path / "x.jsonl", photographs / "0 a.png"
    command = ["caption", str(photographs), "--captioner", str(run), "--out", str(out)]
    broken.write_text("no picture")
    assert distcap.main(command) == 1
    assert "4 captioned, 1 failed" in capsys.readouterr().err and len(rows_of(out)) == 4
    Image.new("RGB", (9, 9)).save(broken)
    assert distcap.main(command) == 0
    assert "1 captioned, 0 failed, 4 had a caption" in capsys.readouterr().err
    assert len(rows_of(out)) == 5


def test_killed_at_any_moment_and_started_again_the_table_is_the_same(run, tmp_path):
    command = [sys.executable, SCRIPT, "caption", run / "test", "--captioner", run]
    command += ["--batch-size", "1", "--out"]
    subprocess.run([*command, tmp_path / "whole.jsonl"], check=True, capture_output=True)
    out, kills, rng = tmp_path / "killed.jsonl", 0, random.Random(0)
    part = tmp_path / "killed.jsonl.1-of-1.part"
    done = 0
    for _ in range(3):
        with subprocess.Popen([*command, out], stderr=subprocess.PIPE) as process:
            while process.poll() is None and not (part.exists() and part.stat().st_size):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        kills += process.returncode == -9
        done += sum(len(rows_of(path)) for path in (out, part) if path.exists())  # whole
    assert kills and done
    subprocess.run([*command, out], check=True, capture_output=True)
    whole = (tmp_path / "whole.jsonl").read_text()
    assert out.read_text() == whole and not part.exists()


def test_names_that_look_like_two_lines_or_are_no_utf8(run, tmp_path, capsys):
    for name in (b"tab\there.png", b"new\nline.png", b"caf\xe9.png"):
        Image.new("RGB", (9, 9)).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    out = tmp_path / "x.jsonl"
    command = ["caption", str(tmp_path), "--captioner", str(run)]
    assert distcap.main([*command, "--out", str(out)]) == 0
    names = {row["file_name"] for row in rows_of(out)}
    assert names == {"tab\there.png", "new\nline.png", "caf\udce9.png"}
    assert distcap.main([*command, "--out", str(out)]) == 0
    assert "3 had a caption" in capsys.readouterr().err
    done = subprocess.run([sys.executable, SCRIPT, *command], capture_output=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.count(b"\t") == 1 for line in lines)
    assert b"caf\xe9.png" in done.stdout


def test_a_folder_that_must_not_be_written_to_is_one_line(run, tmp_path, monkeypatch, capsys):
    def refuse(path, text, *_):
        raise PermissionError(13, "Permission denied", str(path))

    forbid_models(monkeypatch)  # before which this is found
    monkeypatch.setattr(distcap, "write_text", refuse)
    out = tmp_path / "x.jsonl"
    command = ["caption", str(run / "test"), "--captioner", str(run), "--out", str(out)]
    assert distcap.main(command) == 2
    last = one_line(capsys)
    assert "Permission denied" in last and str(out) in last and not out.exists()


def test_samples_are_a_line_each_and_reranking_keeps_one_of_them(run, tmp_path, capsys):
    command = ["caption", str(run / "test"), "--captioner", str(run), "--temperature", "1"]
    assert distcap.main([*command, "--samples", "3"]) == 0
    drawn = {}
    for line in capsys.readouterr().out.splitlines():
        path, caption = line.split("\t")
        drawn.setdefault(path, []).append(caption)
    assert len(drawn) == 40 and {len(each) for each in drawn.values()} == {3}
    assert any(len(set(each)) > 1 for each in drawn.values())
    assert distcap.main([*command, "--samples", "3", "--rerank"]) == 0
    kept = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [path for path, _ in kept] == list(drawn)
    assert all(caption in drawn[path] for path, caption in kept)  # the same seed draws the same
    out = tmp_path / "x.jsonl"
    assert distcap.main([*command, "--samples", "2", "--out", str(out)]) == 0
    assert all(len(row["caption"]) == 2 for row in rows_of(out))


def test_reranking_alone_draws_eight(run, capsys):
    command = ["caption", str(run / "test"), "--captioner", str(run), "--rerank"]

    def captions(*flags):
        assert distcap.main([*command, *flags]) == 0
        return capsys.readouterr().out

    assert captions() == captions("--samples", "8") == captions("--clip", str(run))
    assert captions() != captions("--samples", "2")


def test_reranking_keeps_the_caption_that_is_best_by_a_slow_loop(run, clip, world):
    """Of 2 captions of each of 3 pictures, all six competing in both directions of Eq. 6."""
    rows = clip.embed_images([example.image for example in world[:3]])
    texts = ["two shapes", *[str(example.scene) for example in world[:5]]]
    logits = (clip.logit_scale * clip.embed_captions(texts) @ rows.T).tolist()

    def reward(c, i):
        captions = [math.exp(logits[other][i]) for other in range(6) if other != c]
        images = [math.exp(logits[c][other]) for other in range(3) if other != i]
        return 2 * logits[c][i] - math.log(sum(captions)) - math.log(sum(images))

    best = [max((2 * i, 2 * i + 1), key=lambda c, i=i: reward(c, i)) for i in range(3)]
    index = torch.arange(3).repeat_interleave(2)
    rewards = distcap.caption_scores(texts, clip, rows, index)["reward"]
    assert distcap.rerank(texts, rewards, 2) == best


def test_lengths_repetition_and_top_p_shape_what_is_written(run, capsys):
    def words(*flags):
        flags = flags if "--samples" in flags else ("--beams", "1", *flags)
        assert distcap.main(["caption", str(run / "test"), "--captioner", str(run), *flags]) == 0
        return [line.split("\t")[1].split() for line in capsys.readouterr().out.splitlines()]

    assert {len(each) for each in words("--min-length", "12", "--max-length", "12")} == {12}
    assert {len(each) for each in words("--max-length", "3")} == {3}  # the shorter limit wins
    greedy = words()
    assert words("--samples", "1", "--top-p", "0") == greedy  # only the likeliest token is left

    def like_greedy(temperature):
        drawn = words("--samples", "1", "--temperature", temperature)
        return sum(one == other for one, other in zip(drawn, greedy))

    assert like_greedy("0.01") > 20 > 5 > like_greedy("5")
    once = words("--repetition-penalty", "1000", "--min-length", "10")
    assert all(len(set(each)) == len(each) for each in once) and once != greedy


def test_the_prompt_of_the_command_is_continued(run, capsys):
    """The captions are those of a captioner that was loaded with the prompt, and are without it."""
    pictures = sorted((run / "test").glob("*.png"))[:5]
    command = ["caption", *map(str, pictures), "--captioner", str(run)]

    def captions(*flags):
        assert distcap.main([*command, *flags]) == 0
        return [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]

    captioner = distcap.Captioner.load(str(run), prompt="a red")
    features = captioner.encode(captioner.pixels(map(distcap.load_image, pictures)))
    start = len(captioner.start)  # prompt and start count, as in BLIP's own limits
    wanted = captioner.search(features, 20 - start, beams=3, min_new_tokens=5 - start)
    assert captions("--prompt", "a red") == captioner.decode(wanted) != captions()

    # Bugs: a prompt that leaves less than 5 tokens was a traceback, and a shortest length above
    # the longest was cut in silence.
    room = captioner.longest - 1
    assert all(captions("--prompt", "a red" + " red" * room))
    assert distcap.main([*command, "--prompt", "a red", "--min-length", "19"]) == 2
    assert f"caption, {20 - start} tokens after the prompt; give --max" in one_line(capsys)


def test_caption_takes_a_list_on_standard_input(run, monkeypatch, capsys):
    first, second, *_ = sorted((run / "test").glob("*.png"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{second}\n\n{first}\n{second}\n"))
    assert distcap.main(["caption", "-", "--captioner", str(run)]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(second),
        str(first),
    ]


def test_a_list_with_null_characters_wants_its_flag(monkeypatch, capsys):
    """Bug: a traceback, for a name cannot hold one."""
    forbid_models(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a.png\0b.png\0"))
    assert distcap.main(["caption", "-"]) == 2
    assert "-: the names end in null characters; give --null" in one_line(capsys)


def test_eval_of_a_continued_run_measures_with_the_clip_it_learned_with(run, tmp_path):
    out, measures = tmp_path / "run", tmp_path / "measures.json"
    flags = ["--captioner", str(run), *TINY, *"--tf-steps 0 --steps 1 --batch-size 8".split()]
    assert distcap.main(["train", *flags, "--out", str(out)]) == 0
    assert not (out / "clip").exists()
    command = ["eval", str(out / "test"), "--captioner", str(out)]
    assert distcap.main([*command, "--out", str(measures)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert json.loads(measures.read_text())["measures"] == results["after"]


def test_eval_checks_where_it_is_to_write_first(run, tmp_path, monkeypatch, capsys):
    forbid_models(monkeypatch)
    command = ["eval", str(run / "test"), "--captioner", str(run)]
    assert distcap.main([*command, "--out", str(tmp_path / "no/x.json")]) == 2
    assert "make it first" in one_line(capsys)


def test_a_broken_training_picture_is_left_out_or_refused(run, tmp_path, capsys):
    rows = [json.dumps({"file_name": f"{n}.png", "caption": "two shapes"}) for n in range(10)]
    for n in range(10):
        Image.new("RGB", (9, 9), (n, n, n)).save(tmp_path / f"{n}.png")
    (tmp_path / "3.png").write_text("no picture")
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    flags = ["--captioner", str(run), "--batch-size", "2", "--steps", "1"]
    command = ["train", str(tmp_path), *flags, "--out", str(tmp_path / "run")]
    assert distcap.main([*command, "--strict"]) == 2
    assert "3.png: cannot be read" in one_line(capsys)
    assert distcap.main(command) == 0
    assert "left out 1 pictures or captions" in capsys.readouterr().err
    (skipped,) = map(json.loads, (tmp_path / "run/skipped.jsonl").read_text().splitlines())
    assert skipped["name"].endswith("3.png") and "cannot be read" in skipped["reason"]


def test_broken_test_pictures_are_one_line(run, tmp_path, capsys):
    """One is left out, and told; of all of them there is nothing to evaluate."""
    shutil.copytree(run / "test", tmp_path / "data")
    pictures = sorted((tmp_path / "data").glob("*.png"))
    pictures[7].write_bytes(pictures[7].read_bytes()[:60])
    command = ["eval", str(tmp_path / "data"), "--captioner", str(run)]
    assert distcap.main(command) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    first = f"the first: {pictures[7]}: cannot be read (image file is truncated)"
    assert told == [f"distcap: left out 1 pictures or captions; {first}"]
    for picture in pictures:
        picture.write_bytes(b"")
    assert distcap.main(command) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and str(pictures[0]) in printed.err and printed.out == ""


@pytest.mark.parametrize("verb", ["caption", "eval"])
def test_a_length_that_the_captioner_cannot_write_is_one_line(verb, run, capsys):
    command = [verb, str(run / "test"), "--captioner", str(run), "--max-length"]
    assert distcap.main([*command, "32"]) == 2
    message = "distcap: --max-length 32: this captioner writes at most 31 tokens\n"
    assert one_line(capsys) == message
    assert distcap.main([*command, "31"]) == 0


def test_a_captioner_that_cannot_load_leaves_no_run_folder(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--captioner", str(tmp_path), "--clip", str(tmp_path), "--out", str(out)]
    assert distcap.main(["train", *flags]) == 2
    assert "not a checkpoint" in one_line(capsys) and not out.exists()
    assert distcap.main(["train", *TINY, "--max-length", "40", "--out", str(out)]) == 2
    assert "writes at most 31 tokens" in one_line(capsys) and not out.exists()


def test_the_script_runs_as_a_command(run):
    picture = next((run / "test").glob("*.png"))
    command = [sys.executable, SCRIPT, "caption", picture, "--captioner", run]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{picture}\t") and done.stdout.count("\n") == 1
    assert done.stderr == ""  # no bar, no chatter where nobody watches


def test_a_reader_that_has_seen_enough_ends_caption_quietly(run):
    command = [sys.executable, SCRIPT, "caption", run / "test", "--captioner", run]
    command += ["--batch-size", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_ctrl_c_ends_quietly(run):
    """Of the worker processes, too, each of which gets the signal and has a traceback to show."""
    command = [sys.executable, SCRIPT, "caption", run / "test", "--captioner", run]
    command += ["--batch-size", "1", "--workers", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in (130, 0) and error.count(b"\n") <= 1  # what was done
    assert process.returncode == 0 or error.startswith(b"distcap: stopped: ")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["train", "--batch-size", "-3"], "argument --batch-size: -3 must be at least 1"),
        (["train", "--similarity-weight", "1.5"], "--similarity-weight: 1.5 must be from 0 to 1"),
        (["train", "--similarity-weight", "nan"], "--similarity-weight: nan must be"),
        (["train", "--learning-rate", "inf"], "--learning-rate: inf must be finite"),
        (["train", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["train", "--objective", "ppo"], "--objective: invalid choice: 'ppo'"),
        (["train", "--baseline", "group"], "--baseline group: needs --samples 2 or more"),
        (
            ["train", "--baseline", "neighbours"],
            "--baseline neighbours: needs --neighbours 1 or more",
        ),
        (
            ["train", "--neighbours", "80", "--train-size", "80"],
            "of only 80 training examples; give less",
        ),
        (
            ["train", "--batch-size", "100", "--train-size", "50"],
            "of only 50 training examples; give less",
        ),
        (["train", "--device", "warp"], "--device warp"),
        (["train", "--clip", "x"], "--clip x"),
        (["train", "--train-size", "60000"], "--train-size 60000"),
        (["train", "--objective", "tf", "--tf-steps", "0"], "nothing to train"),
        (["train", "--sampled-weight", "0", "--ground-truth-weight", "0"], "nothing to train"),
        (["train", "--recipe", "nobody"], "--recipe: invalid choice: 'nobody'"),
        (["train", "--seed", "100000000000000"], "--seed"),
        (["train", "nowhere"], "nowhere"),
        (["caption"], "PATHS"),
        (["caption", "nowhere"], "nowhere: no such file or folder"),
        (["caption", "EMPTY"], "no pictures in this folder"),
        (["caption", "EMPTY", "--out", "x.txt"], "x.txt: must be a .jsonl, .csv or .html file"),
        (["caption", "EMPTY", "--out="], "--out : must be a .jsonl"),
        (["caption", ""], "'': no such file or folder"),
        (["caption", "https://x.org/a.jpg"], "a web address; download"),
        (["caption", "EMPTY", "--shard", "5/4"], "--shard: 5/4 must be like 1/4"),
        (["caption", "x", "--min-length", "9", "--max-length", "5"], "--min-length 9: is above"),
        (["caption", "x", "--min-length", "40"], "--min-length 40: is above --max-length 20; give"),
        (["caption", "EMPTY", "--out", "no/x.jsonl"], "in a folder that exists"),
        (["eval", "EMPTY", "--captioner", "x"], "pictures and no captions"),
        (["eval"], "DATA"),
        (["paint"], "paint"),
        ([], "distcap --help"),
    ],
)
def test_mistakes_are_one_line_and_exit_2_before_any_model_loads(
    arguments, wanted, tmp_path, monkeypatch, capsys
):
    forbid_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    try:
        status = distcap.main(arguments)
    except SystemExit as stop:  # argparse leaves this way
        status = stop.code
    assert status == 2 and wanted in one_line(capsys)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("train --recipe clip-scst --direction image-to-text", "--direction: --baseline greedy"),
        ("train --recipe clip-scst --direction both", "--direction: --baseline greedy"),
        ("train --baseline greedy --neighbours 3", "--neighbours: --baseline greedy"),
        ("train --direction image-to-text --neighbours 3", "--neighbours: --direction"),
        ("train --regularizer none --similarity-weight 0.5", "--similarity-weight: --regularizer"),
        ("train --recipe group --similarity-weight 0.5", "--similarity-weight: --regularizer"),
        ("train --regularizer kl --discriminator-learning-rate 1", ": --regularizer kl"),
        ("train --objective tf --steps 5", "--steps: --objective tf"),
        ("train --objective tf --learning-rate 1", "--learning-rate: --objective tf"),
        ("train --objective tf --samples 2", "--samples: --objective tf"),
        ("train --recipe tf --baseline greedy", "--baseline: --objective tf"),
        ("train --recipe tf --discriminator-learning-rate 1", ": --objective tf"),
        ("train --tf-steps 0 --tf-learning-rate 1", "--tf-learning-rate: --tf-steps 0"),
        ("train --captioner x --clip-steps 5", "--clip-steps: --captioner x"),
        ("train --recipe similar-images --sampled-weight 0 --ground-truth-weight 1 --samples 2",
         "--samples: --sampled-weight 0"),
        ("caption x --temperature 1", "--temperature: --samples"),
        ("caption x --top-p 1", "--top-p: --samples"),
        ("caption x --samples 2 --beams 3", "--beams: --samples 2"),
        ("caption x --rerank --beams 3", "--beams: "),
        ("caption x --clip x", "--clip: --rerank"),
        ("caption x --overwrite", "--overwrite: --out"),
        ("caption x --json --out x.jsonl", "--json: --out"),
        ("caption x --sidecar .txt --out x.jsonl", "--sidecar: --out"),
        ("caption x --sidecar .txt --scores", "--scores: --sidecar"),
        ("caption x --null", "--null: paths"),
    ],
)  # fmt: skip
def test_a_flag_that_would_change_nothing_is_refused_in_one_line(
    command, wanted, monkeypatch, capsys
):
    """Even with its default value. Silence would let people report what they did not run."""
    forbid_models(monkeypatch)
    assert distcap.main(command.split()) == 2
    message = one_line(capsys)
    assert all(part in message for part in wanted.split(": ")), message
    assert "changes nothing" in message


METHODS = {name: distcap.Method(**recipe) for name, recipe in distcap.RECIPES.items()} | {
    "image-to-text": distcap.Method(direction="image-to-text"),
    "human captions, Eq. 8": distcap.Method(
        "rl", "neighbours", regularizer="cider", neighbours=3, sampled_weight=0.0
    ),
    "human captions, Eq. 7": distcap.Method("rl", "greedy", sampled_weight=0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_just_the_settings_that_are_refused_change_nothing(name, captioner, world):
    """The loss of a step, from the same random numbers, with each setting changed in turn.

    CLIP sees in a picture its whole scene, and in each text a direction of its own.
    """

    def embed(texts):
        seeds = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        rows = torch.stack([torch.randn(96, generator=seed) for seed in seeds])
        return torch.nn.functional.normalize(rows, dim=1)

    clip = SimpleNamespace(embed_captions=embed, logit_scale=50.0)
    scenes = [str(example.scene) for example in world]
    references = [example.references for example in world]
    pixels = captioner.pixels([example.image for example in world[:5]])
    batch = distcap.Batch(torch.arange(5), scenes[:5], pixels)

    def loss(method):
        learner = distcap.Learner(captioner, clip, method, 15)
        learner.image_embeddings = embed(scenes)
        torch.manual_seed(1)
        learner.regularizer = distcap.make_regularizer(learner, references)
        torch.manual_seed(2)
        if method.objective == "tf":
            return learner.teacher_forcing_step(batch)[0].item()
        return learner.reinforce_step(batch)[0].item()

    method = METHODS[name]
    changes = dict(
        baseline="greedy" if method.baseline == "none" else "none",
        direction="both" if method.direction == "text-to-image" else "text-to-image",
        regularizer="none" if method.regularizer == "cider" else "cider",
        samples=method.samples + 1,
        neighbours=method.neighbours + 5,
        similarity_weight=0.5,
        sampled_weight=method.sampled_weight + 1,
    )
    before = loss(method)
    unmoved = {
        setting
        for setting, value in changes.items()
        if loss(dataclasses.replace(method, **{setting: value})) == pytest.approx(before, rel=1e-5)
    }
    assert unmoved == set(distcap.ignored_settings(method)) & set(changes)


@pytest.mark.parametrize("data", ["toy", "photographs"])
@pytest.mark.parametrize("name", distcap.RECIPES)
def test_a_recipe_changes_what_it_says_and_no_more(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    flags = ["--recipe", name, "--tf-steps", "9"]
    verb, config, given = distcap.parse_arguments(["train", data, *flags])
    values = {"recipe": name, "tf_steps": 9, "data": data, **distcap.RECIPES[name]}
    toy = distcap.TOY if data == "toy" else {}
    assert verb == "train" and config == distcap.TrainConfig(**{**toy, **values})
    distcap.check(config, given)  # nothing in it contradicts itself
    if data == "photographs":
        method = distcap.Method(**distcap.RECIPES[name])
        assert not set(distcap.ignored_settings(method)) & set(distcap.RECIPES[name])


RECIPE_SETTINGS = [(name, setting) for name in distcap.RECIPES for setting in distcap.RECIPES[name]]


@pytest.mark.parametrize(("name", "setting"), RECIPE_SETTINGS)
def test_a_flag_has_the_last_word_over_a_recipe_even_with_its_default(name, setting):
    """`--recipe group --samples 1` means one sample, although 1 is what samples are by default."""
    default = getattr(distcap.Method(), setting)
    flags = ["--recipe", name, f"--{setting.replace('_', '-')}", str(default)]
    for arguments in (flags, [*flags[2:], *flags[:2]]):
        _, config, given = distcap.parse_arguments(["train", *arguments])
        assert given == {"recipe", setting}
        changed = distcap.RECIPES[name] | {setting: default}
        assert {key: getattr(config, key) for key in changed} == changed
        assert config.steps == distcap.TOY["steps"]


def test_a_flag_has_the_last_word_over_the_toy_world(run):
    arguments = "train --recipe scst --tf-steps 0 --captioner x --similarity-weight 0.25".split()
    _, config, given = distcap.parse_arguments(arguments)
    assert (config.tf_steps, config.captioner, config.similarity_weight) == (0, "x", 0.25)
    assert (config.steps, config.regularizer) == (distcap.TOY["steps"], "cider")
    assert given == {"recipe", "tf_steps", "captioner", "similarity_weight"}


@pytest.mark.parametrize("name", distcap.RECIPES)
def test_every_recipe_trains(name, run, tmp_path, capsys):
    steps = ["--tf-steps", "2"] if name == "tf" else ["--tf-steps", "0", "--steps", "2"]
    command = ["train", "--recipe", name, "--captioner", str(run), *TINY, *steps]
    out = tmp_path / "run"
    assert distcap.main([*command, "--batch-size", "16", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    recipe = distcap.RECIPES[name]
    assert {setting: config[setting] for setting in recipe} == recipe
    log = rows_of(out / "log.jsonl")
    assert [row["stage"] for row in log] == ["tf" if name == "tf" else "rl"] * 2
    assert all(math.isfinite(value) for row in log for value in numbers(row))
    before = distcap.Captioner.load(str(run)).model.state_dict()
    after = distcap.Captioner.load(str(out)).model.state_dict()
    assert not all(torch.equal(before[key], after[key]) for key in before)
    assert set(json.loads((out / "results.json").read_text())) >= {"before", "after"}


def test_a_run_is_not_overwritten_by_mistake(run, capsys):
    before = (run / "results.json").read_bytes()
    assert distcap.main(["train", "--out", str(run)]) == 2
    assert "--out" in one_line(capsys) and (run / "results.json").read_bytes() == before


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_folder_of_the_users_is_no_run_folder(more, run, tmp_path, capsys):
    """Bug: --resume wrote a run over what is in it, and without it the message advised --resume."""
    kept = tmp_path / "mine" / "log.jsonl"
    kept.parent.mkdir()
    command = ["train", "--captioner", str(run), *BRIEF, "--out", str(kept.parent), *more]
    kept.write_text("mine")
    assert distcap.main(command) == 2
    said = one_line(capsys)
    assert f"{kept.parent}: is no run folder; give another folder with --out" in said
    assert os.listdir(kept.parent) == ["log.jsonl"] and kept.read_text() == "mine"
    assert distcap.main([*command, "--out", str(kept)]) == 2
    assert f"{kept}: is no run folder" in one_line(capsys)
    kept.unlink()
    assert distcap.main(command) == 0  # it is empty
    assert (kept.parent / "results.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        "train --recipe clip-scst --out runs/hacked",
        "train --recipe tf",
        "train --similarity-weight 0.94",
        "train --tf-steps 0 --no-normalize --freeze-vision",
        "train DATA --recipe scst --ground-truth-weight 1",
        "train DATA --prompt 'a photo of' --train-only 'lm_head|layers.1[0-9]'",
    ],
)
def test_the_command_of_a_model_card_is_the_runs(arguments, tmp_path):
    """Bug: it repeated what a recipe sets, which was refused, and left out what was set back from
    the toy world's or a recipe's value to the usual one; and texts of several words fell apart."""
    (tmp_path / "my data").mkdir()
    data = str(tmp_path / "my data")
    given = [data if word == "DATA" else word for word in shlex.split(arguments)]
    _, config, _ = distcap.parse_arguments(given)
    card = distcap.model_card({}, {"versions": {}, "images": 6}, config)
    printed = shlex.split(re.search("^`distcap (.*)`$", card, flags=re.M)[1])
    _, again, flags = distcap.parse_arguments(printed)
    distcap.check(again, flags)
    assert dataclasses.replace(again, out=config.out) == config


def test_a_run_that_was_stopped_before_it_wrote_anything_is_a_run(run, tmp_path, capsys):
    """All that it has is its config.json."""
    command = ["train", "--captioner", str(run), *BRIEF, "--out", str(tmp_path)]
    _, config, _ = distcap.parse_arguments(command)
    distcap.open_run_folder(dataclasses.replace(config, clip=distcap.clip_name(config)))
    assert os.listdir(tmp_path) == ["config.json"]
    assert distcap.main(command) == 2 and "go on with it by --resume" in one_line(capsys)
    assert distcap.main([*command, "--resume"]) == 0


def test_a_vision_tower_that_is_all_to_train_and_frozen_is_one_line(run, tmp_path, capsys):
    """Bug: a KeyError, after the pictures were embedded."""
    command = ["train", "--captioner", str(run), *BRIEF, "--out", str(tmp_path / "new")]
    command += ["--freeze-vision", "--train-only"]
    assert distcap.main([*command, "vision_model"]) == 2
    assert "--freeze-vision, --train-only: leave nothing to train" in one_line(capsys)
    assert not (tmp_path / "new").exists()
    assert distcap.main([*command, "vision_model|crossattention"]) == 0


def test_what_is_no_checkpoint_is_one_line(run, tmp_path, capsys):
    pictures = str(run / "test")
    assert distcap.main(["caption", pictures, "--captioner", str(tmp_path)]) == 2
    assert "not a checkpoint" in one_line(capsys)
    assert distcap.main(["caption", pictures]) == 2  # the default is on the Hub, out of reach
    assert "Salesforce/blip-image-captioning-base" in one_line(capsys)


@pytest.mark.parametrize("verb", ["train", "caption", "eval"])
def test_help_names_every_field_with_its_default(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stop:
        distcap.main([verb, "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens, too
    assert stop.value.code == 0
    for each in dataclasses.fields(distcap.VERBS[verb][0]):
        positional = "nargs" in each.metadata and "action" not in each.metadata
        assert (each.name.upper() if positional else "--" + each.name.replace("_", "-")) in text
        assert "".join(each.metadata["help"].split()) in text
        several = each.default and "action" in each.metadata
        default = "".join(each.default) if several else str(each.default)
        switch = isinstance(each.default, bool) or each.default in (None, "")
        assert positional or switch or re.search(rf"\(default:{re.escape(default)}[;)]", text)
    assert not re.search(r"(default|world):(None|False|\(\)|)[;)]", text)
    for name, value in distcap.TOY.items():
        assert verb != "train" or value is None or f"toyworld:{value})" in text, name


def test_what_can_be_said_without_torch_does_not_wait_for_it(tmp_path):
    """Of a command, which takes several times as long with it: help, typos, what is not there."""
    (tmp_path / "EMPTY").mkdir()
    code = """
        import sys
        sys.argv[0] = "distcap"  # as a command: in Python, `import distcap` brings torch along
        import distcap
        for line in sys.argv[1:]:
            try:
                status = distcap.main(line.split())
            except SystemExit as stop:
                status = stop.code
            print(status, "torch" in sys.modules, file=sys.stderr)
    """
    done = ["--help", "--version", "caption --help"]
    wrong = ["train --recipe nobody", "caption EMPTY --beans 3", "paint", "eval", "train nowhere"]
    wrong += ["caption EMPTY --overwrite", "caption EMPTY nowhere", "eval EMPTY --captions nowhere"]
    command = [sys.executable, "-c", textwrap.dedent(code), *done, *wrong]
    options = dict(cwd=tmp_path, capture_output=True, text=True)
    told = subprocess.run(command, env=HERE, check=True, **options).stderr.splitlines()
    assert [line for line in told if line[0] != "d"] == ["0 False"] * 3 + ["2 False"] * len(wrong)
    assert len(told) == 3 + 2 * len(wrong)  # a line for each mistake


def test_worker_processes_need_not_be_forks(run, tmp_path):
    """As on macOS: a fresh interpreter imports the file as the command did, without torch."""
    start = "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"
    (tmp_path / "sitecustomize.py").write_text(start)
    path = os.pathsep.join([str(tmp_path), HERE["PYTHONPATH"]])
    command = [sys.executable, SCRIPT, "caption", run / "test", "--captioner", run]
    command += ["--workers", "1", "--batch-size", "30"]
    options = dict(env=HERE | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert len(subprocess.run(command, **options).stdout.splitlines()) == 40


def test_importing_the_module_does_nothing_heavy():
    heavy = {"transformers", "open_clip", "pycocoevalcap"}
    code = f"import sys, distcap; print(*{heavy} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPT.parent)
    assert done.stdout.strip() == "" and done.stderr == ""
