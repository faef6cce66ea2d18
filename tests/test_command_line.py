"""Sections 1 and 10: flags, the three verbs, exit codes, one-line errors."""

import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import distcap

SCRIPT = Path(distcap.__file__)


@pytest.fixture
def photographs(tmp_path):
    """A folder of pictures of several modes and sizes, and one broken file."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, (mode, size) in enumerate((("RGB", (640, 480)), ("L", (31, 77)), ("RGBA", (9, 9)), ("CMYK", (50, 40)))):
        suffix = {"RGBA": "png", "L": "PNG"}.get(mode, "jpg")
        Image.effect_noise(size, 90).convert("RGB").convert(mode).save(folder / f"{number} é.{suffix}")
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
        assert {"text_to_image_R@1", "image_to_text_R@10", "bleu_4", "rouge_l", "cider", "well_formed", "faithful",
                "oracle_R@1", "mean_length"} <= set(results[row])  # fmt: skip
    assert results["seed"] == 0 and results["split"] == "test" and results["images"] == 40
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 4 and config["similarity_weight"] == 0.99
    stages = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert stages == ["clip"] * 40 + ["tf"] * 60 + ["rl"] * 4
    assert len(list((run / "test").glob("*.png"))) == 40 and not list(run.rglob("*.partial"))


def test_eval_reproduces_the_after_row_exactly(run, tmp_path, capsys):
    out = tmp_path / "measures.json"
    assert distcap.main(["eval", str(run / "test"), "--captioner", str(run), "--out", str(out)]) == 0
    after = json.loads((run / "results.json").read_text())["after"]
    assert json.loads(out.read_text()) == after
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["test"] and f"{after['oracle_R@1']:.1%}" in lines[-1]


def test_the_same_seed_gives_the_same_results(tmp_path, capsys):
    flags = ["--train-size", "64", "--test-size", "6", "--clip-steps", "3", "--tf-steps", "3", "--steps", "2"]
    for name in ("one", "two"):
        assert distcap.main(["train", *flags, "--seed", "7", "--device", "cpu", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one/results.json").read_bytes() == (tmp_path / "two/results.json").read_bytes()
    assert (tmp_path / "one/log.jsonl").read_bytes() == (tmp_path / "two/log.jsonl").read_bytes()
    out = capsys.readouterr().out
    assert "before" in out and "after" in out and "oracle_R@1" in out


def test_train_continues_from_a_run_with_any_objective(run, tmp_path):
    flags = ["--captioner", str(run), "--clip", str(run), "--tf-steps", "0", "--steps", "2", "--batch-size", "16",
             "--train-size", "64", "--test-size", "6", "--device", "cpu"]  # fmt: skip
    for number, objective in enumerate((
        ["--baseline", "greedy", "--similarity-weight", "1", "--ground-truth-weight", "0"],
        ["--direction", "image-to-text"], ["--sampled-weight", "0"], ["--objective", "tf", "--tf-steps", "1"],
    )):  # fmt: skip
        assert distcap.main(["train", *flags, *objective, "--out", str(tmp_path / str(number))]) == 0


def test_train_takes_a_folder_of_the_users(run, tmp_path):
    flags = ["--captioner", str(run), "--clip", str(run), "--steps", "2", "--batch-size", "8", "--device", "cpu"]
    assert distcap.main(["train", str(run / "test"), *flags, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["images"] == 8  # a fifth is held out


def test_caption_writes_a_line_per_picture_in_order(run, capsys):
    pictures = sorted((run / "test").glob("*.png"))
    assert distcap.main(["caption", str(run / "test"), "--captioner", str(run), "--batch-size", "7"]) == 0
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


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_out_holds_what_standard_output_would_and_is_a_data_set(run, capsys):
    out = run / "test" / "captions.jsonl"
    assert distcap.main(["caption", str(run / "test"), "--captioner", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert distcap.main(["caption", str(run / "test"), "--captioner", str(run), "--out", str(out)]) == 0
    streams, rows = capsys.readouterr(), rows_of(out)
    out.unlink()
    assert streams.out == "" and streams.err.endswith("distcap: 40 captioned, 0 failed, 0 had a caption\n")
    assert [f"{run / 'test' / row['file_name']}\t{row['caption']}" for row in rows] == lines


def test_out_is_continued_and_keeps_what_it_holds(run, photographs, tmp_path, capsys, monkeypatch):
    out, command = tmp_path / "x.jsonl", ["caption", str(photographs), "--captioner", str(run), "--out"]
    assert distcap.main([*command, str(out)]) == 0
    whole = rows_of(out)
    assert [row["file_name"] for row in whole] == [f"photographs/{path.name}" for path in sorted(photographs.iterdir())]
    theirs = {"file_name": "elsewhere.png", "caption": ["mine", "too"], "licence": 3}
    out.write_text("".join(json.dumps(row) + "\n" for row in ({**whole[1], "caption": "my own"}, theirs)))
    capsys.readouterr()
    assert distcap.main([*command, str(out)]) == 0
    assert "distcap: 3 captioned, 0 failed, 1 had a caption\n" in capsys.readouterr().err
    assert rows_of(out) == [{**whole[1], "caption": "my own"}, theirs, whole[0], *whole[2:]]
    assert distcap.main([*command, str(out), "--overwrite"]) == 0
    assert rows_of(out) == [whole[1], theirs, whole[0], *whole[2:]]
    forbid_models(monkeypatch)  # nothing is left to do: nothing is loaded
    assert distcap.main([*command, str(out)]) == 0


def test_a_broken_picture_is_tried_again_and_the_rest_is_kept(run, photographs, tmp_path, capsys):
    out, broken = tmp_path / "x.jsonl", photographs / "0 a.png"
    command = ["caption", str(photographs), "--captioner", str(run), "--out", str(out)]
    broken.write_text("no picture")
    assert distcap.main(command) == 1
    assert "4 captioned, 1 failed" in capsys.readouterr().err and len(rows_of(out)) == 4
    Image.new("RGB", (9, 9)).save(broken)
    assert distcap.main(command) == 0
    assert "1 captioned, 0 failed, 4 had a caption" in capsys.readouterr().err and len(rows_of(out)) == 5


def test_killed_at_any_moment_and_started_again_the_table_is_the_same(run, tmp_path):
    command = [sys.executable, SCRIPT, "caption", run / "test", "--captioner", run, "--batch-size", "1", "--out"]
    subprocess.run([*command, tmp_path / "whole.jsonl"], check=True, capture_output=True)
    out, kills, rng = tmp_path / "killed.jsonl", 0, random.Random(0)
    for _ in range(3):
        with subprocess.Popen([*command, out], stderr=subprocess.PIPE) as process:
            while process.poll() is None and not out.exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        kills += process.returncode == -9
        done = len(rows_of(out))  # whatever was written is whole
    assert kills and done
    subprocess.run([*command, out], check=True, capture_output=True)
    assert sorted(out.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())


def test_names_that_look_like_two_lines_or_are_no_utf8(run, tmp_path, capsys):
    for name in (b"tab\there.png", b"new\nline.png", b"caf\xe9.png"):
        Image.new("RGB", (9, 9)).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    out = tmp_path / "x.jsonl"
    assert distcap.main(["caption", str(tmp_path), "--captioner", str(run), "--out", str(out)]) == 0
    assert {row["file_name"] for row in rows_of(out)} == {"tab\there.png", "new\nline.png", "caf\udce9.png"}
    assert distcap.main(["caption", str(tmp_path), "--captioner", str(run), "--out", str(out)]) == 0
    assert "3 had a caption" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, SCRIPT, "caption", tmp_path, "--captioner", run], capture_output=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.count(b"\t") == 1 for line in lines) and b"caf\xe9.png" in done.stdout


def test_a_folder_that_must_not_be_written_to_is_one_line(run, tmp_path, monkeypatch, capsys):
    def refuse(path, rows):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(distcap, "write_rows", refuse)
    out = tmp_path / "x.jsonl"
    assert distcap.main(["caption", str(run / "test"), "--captioner", str(run), "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
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


def test_lengths_repetition_and_top_p_shape_what_is_written(run, capsys):
    def words(*flags):
        assert distcap.main(["caption", str(run / "test"), "--captioner", str(run), "--beams", "1", *flags]) == 0
        return [line.split("\t")[1].split() for line in capsys.readouterr().out.splitlines()]

    assert {len(each) for each in words("--min-length", "12", "--max-length", "12")} == {12}
    assert {len(each) for each in words("--max-length", "3")} == {3}  # the shorter limit wins
    greedy = words()
    assert words("--samples", "1", "--top-p", "0") == greedy  # only the likeliest token is left
    assert words("--samples", "1") != greedy
    once = words("--repetition-penalty", "1000", "--min-length", "10")
    assert all(len(set(each)) == len(each) for each in once) and once != greedy


def test_the_prompt_of_the_command_reaches_the_captioner(run, capsys, monkeypatch):
    seen, load = [], distcap.Captioner.load
    monkeypatch.setattr(distcap.Captioner, "load", lambda *given: seen.append(given[2]) or load(*given))
    picture = str(next((run / "test").glob("*.png")))
    for flags in ([], ["--prompt", "a red"]):
        assert distcap.main(["caption", picture, "--captioner", str(run), *flags]) == 0
    assert seen == [None, "a red"]


def test_caption_takes_a_list_on_standard_input(run, monkeypatch, capsys):
    first, second, *_ = sorted((run / "test").glob("*.png"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{second}\n\n{first}\n{second}\n"))
    assert distcap.main(["caption", "-", "--captioner", str(run)]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [str(second), str(first)]


def test_eval_of_a_continued_run_measures_with_the_clip_it_learned_with(run, tmp_path):
    out, measures = tmp_path / "run", tmp_path / "measures.json"
    flags = ["--captioner", str(run), "--tf-steps", "0", "--steps", "1", "--batch-size", "8", "--train-size", "32"]
    assert distcap.main(["train", *flags, "--test-size", "6", "--device", "cpu", "--out", str(out)]) == 0
    assert not (out / "clip").exists()
    assert distcap.main(["eval", str(out / "test"), "--captioner", str(out), "--out", str(measures)]) == 0
    assert json.loads(measures.read_text()) == json.loads((out / "results.json").read_text())["after"]


def test_eval_checks_where_it_is_to_write_first(run, tmp_path, monkeypatch, capsys):
    forbid_models(monkeypatch)
    assert distcap.main(["eval", str(run / "test"), "--captioner", str(run), "--out", str(tmp_path / "no/x.json")]) == 2
    assert "make it first" in one_line(capsys)


def test_a_broken_training_picture_is_one_line(run, tmp_path, capsys):
    rows = [json.dumps({"file_name": f"{n}.png", "caption": "two shapes"}) for n in range(10)]
    for n in range(10):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{n}.png")
    (tmp_path / "3.png").write_text("no picture")
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    flags = ["--captioner", str(run), "--batch-size", "2", "--steps", "1", "--out", str(tmp_path / "run")]
    assert distcap.main(["train", str(tmp_path), *flags]) == 2
    assert "3.png: cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_a_broken_test_picture_is_one_line(run, tmp_path, capsys):
    shutil.copytree(run / "test", tmp_path / "data")
    whole = sorted((tmp_path / "data").glob("*.png"))[7]
    whole.write_bytes(whole.read_bytes()[:60])
    assert distcap.main(["eval", str(tmp_path / "data"), "--captioner", str(run)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and str(whole) in printed.err and printed.out == ""


@pytest.mark.parametrize("verb", ["caption", "eval"])
def test_a_length_that_the_captioner_cannot_write_is_one_line(verb, run, capsys):
    command = [verb, str(run / "test"), "--captioner", str(run), "--max-length"]
    assert distcap.main([*command, "32"]) == 2
    assert capsys.readouterr().err == "distcap: --max-length 32: this captioner writes at most 31 tokens\n"
    assert distcap.main([*command, "31"]) == 0


def test_a_captioner_that_cannot_load_leaves_no_run_folder(tmp_path, capsys):
    out = tmp_path / "run"
    assert distcap.main(["train", "--captioner", str(tmp_path), "--clip", str(tmp_path), "--out", str(out)]) == 2
    assert "not a checkpoint" in one_line(capsys) and not out.exists()


def test_the_script_runs_as_a_command(run):
    picture = next((run / "test").glob("*.png"))
    done = subprocess.run(
        [sys.executable, SCRIPT, "caption", picture, "--captioner", run], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith(f"{picture}\t") and done.stdout.count("\n") == 1
    assert done.stderr == ""  # no bar, no chatter where nobody watches


def test_a_reader_that_has_seen_enough_ends_caption_quietly(run):
    command = [sys.executable, SCRIPT, "caption", run / "test", "--captioner", run, "--batch-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["train", "--batch-size", "-3"], "--batch-size -3: must be from 1"),
        (["train", "--similarity-weight", "1.5"], "--similarity-weight 1.5: must be from 0 to 1"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--objective", "ppo"], "'rl', 'tf'"),
        (["train", "--baseline", "group"], "--baseline group: needs --samples 2 or more"),
        (["train", "--baseline", "neighbours"], "--baseline neighbours: needs --neighbours 1 or more"),
        (["train", "--neighbours", "80", "--train-size", "80"], "only 80 training examples; give less"),
        (["train", "--batch-size", "100", "--train-size", "50"], "only 50 training examples; give less"),
        (["train", "--device", "warp"], "--device warp"),
        (["train", "--clip", "x"], "--clip x"),
        (["train", "--train-size", "60000"], "--train-size 60000"),
        (["train", "--objective", "tf", "--tf-steps", "0"], "nothing to train"),
        (["train", "--seed", "100000000000000"], "--seed"),
        (["train", "nowhere"], "nowhere"),
        (["caption"], "PATHS"),
        (["caption", "nowhere"], "nowhere: no such file or folder"),
        (["caption", "EMPTY"], "no pictures in this folder"),
        (["caption", "EMPTY", "--out", "x.txt"], "--out x.txt: must be a .jsonl file"),
        (["caption", "EMPTY", "--out", "no/x.jsonl"], "in a folder that exists"),
        (["eval", "EMPTY", "--captioner", "x"], "metadata.jsonl"),
        (["paint"], "paint"),
        ([], "distcap --help"),
    ],
)
def test_mistakes_are_one_line_and_exit_2_before_any_model_loads(arguments, wanted, tmp_path, monkeypatch, capsys):
    forbid_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    try:
        status = distcap.main(arguments)
    except SystemExit as stop:  # argparse leaves this way
        status = stop.code
    assert status == 2 and wanted in one_line(capsys)


def test_a_run_is_not_overwritten_by_mistake(run, capsys):
    before = (run / "results.json").read_bytes()
    assert distcap.main(["train", "--out", str(run)]) == 2
    assert "--out" in one_line(capsys) and (run / "results.json").read_bytes() == before


def test_what_is_no_checkpoint_is_one_line(run, tmp_path, capsys):
    pictures = str(run / "test")
    assert distcap.main(["caption", pictures, "--captioner", str(tmp_path)]) == 2
    assert "not a checkpoint" in one_line(capsys)
    assert distcap.main(["caption", pictures]) == 2  # the default captioner is on the Hub, which no test can reach
    assert "Salesforce/blip-image-captioning-base" in one_line(capsys)


@pytest.mark.parametrize("verb", ["train", "caption", "eval"])
def test_help_names_every_field_with_its_default(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stop:
        distcap.main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for each in dataclasses.fields(distcap.VERBS[verb][0]):
        positional = "positional" in each.metadata
        assert (each.name.upper() if positional else "--" + each.name.replace("_", "-")) in text


def test_importing_the_module_does_nothing_heavy():
    code = (
        "import sys, distcap; print(*[m for m in ('transformers', 'open_clip', 'pycocoevalcap') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SCRIPT.parent)
    assert done.stdout.strip() == "" and done.stderr == ""
