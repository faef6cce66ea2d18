"""`distcap eval`: captions of files, what is refused before any work, what is written, tables."""

import csv
import json
import os
import random
import shutil
import statistics
from pathlib import Path

import pytest

import distcap

needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
TEXTS = ["a dog runs on grass", "two cats sleep", "a red bus", "a man rides a horse"]
NAMES = [f"{name}.jpg" for name in ("one", "two", "three", "four")]


@pytest.fixture
def data(tmp_path):
    """Four pictures' references, in a folder without pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"file_name": name, "caption": [text, f"{text} today"]}
            for name, text in zip(NAMES, TEXTS)]  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def no_models(monkeypatch):
    """Any load of a model fails the test."""

    def load(*_):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(distcap.Captioner, "load", load)
    monkeypatch.setattr(distcap.CLIP, "load", load)


def write_captions(path, pairs):
    """Write (name, caption) in the form that the path's suffix stands for; return the path."""
    pairs = list(pairs)
    if path.suffix == ".json":
        path.write_text(json.dumps([{"image_id": name, "caption": text} for name, text in pairs]))
    elif path.suffix == ".jsonl":
        rows = [json.dumps({"file_name": name, "caption": text}) + "\n" for name, text in pairs]
        path.write_text("".join(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *pairs])
    else:
        path.mkdir()
        for name, text in pairs:
            (path / Path(name).with_suffix(".txt")).write_text(text + "\n")
    return path


def run_eval(*arguments):
    return distcap.main(["eval", *map(str, arguments)])


def refusal(capsys, *arguments):
    """The one line that these arguments are refused with."""
    capsys.readouterr()
    assert run_eval(*arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1, streams
    return streams.err


TEXT_METRICS = "--metrics bleu rouge cider diversity".split()


@pytest.mark.parametrize("form", [".json", ".jsonl", ".csv", ""])
def test_captions_of_every_form_without_pictures_or_models(form, data, no_models, tmp_path, capsys):
    said = list(zip(NAMES, ["a dog", "two cats sleep", "a bus, red", "a horse"]))
    path = write_captions(tmp_path / f"captions{form}", random.Random(1).sample(said, 4))
    out = tmp_path / "x.json"
    assert run_eval(data, "--captions", path, *TEXT_METRICS, "--out", out) == 0
    streams = capsys.readouterr()
    assert "only 4 pictures" in streams.err and streams.err.count("\n") == 1
    results = json.loads(out.read_text())
    captions = [text for _, text in said]
    references = [[text, f"{text} today"] for text in TEXTS]
    expected = distcap.reference_measures(captions, references) | distcap.diversity(captions)
    assert results["measures"] == expected
    assert results["captions"] == str(path) and results["tokenizer"] == "regex"
    assert results["pictures"] == 4 and results["seed"] == 0 and results["versions"]["torch"]
    assert json.loads((tmp_path / "x.captions.json").read_text()) == [
        {"image_id": name, "caption": text} for name, text in said
    ]


def test_coco_results_find_coco_pictures_by_their_ids(no_models, tmp_path):
    """The ids are numbers that no file is named after."""
    images = [{"id": 10 + n, "file_name": f"{n}.jpg"} for n in range(4)]
    annotations = [{"image_id": 10 + n, "caption": text} for n, text in enumerate(TEXTS)]
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations}))
    results = [{"image_id": 10 + n, "caption": TEXTS[n]} for n in (2, 0, 3, 1)]
    (tmp_path / "results.json").write_text(json.dumps(results))
    out = tmp_path / "x.json"
    command = [coco, "--captions", tmp_path / "results.json", "--metrics", "rouge", "--out", out]
    assert run_eval(*command) == 0
    assert json.loads(out.read_text())["measures"] == {"rouge_l": pytest.approx(1)}
    again = json.loads((tmp_path / "x.captions.json").read_text())
    assert sorted(again, key=str) == sorted(results, key=str)  # ids are numbers again


def test_kinds_of_names_are_never_mixed(data, tmp_path):
    """An id that is another picture's file name must not be taken for that."""
    examples = [
        distcap.Example("1", Path("2.jpg"), ("a dog",)),
        distcap.Example("2", Path("1.jpg"), ("a cat",)),
    ]
    path = write_captions(tmp_path / "a.json", [("1", "one"), ("2", "two")])
    assert distcap.read_captions(path, examples) == ["one", "two"]
    path = write_captions(tmp_path / "b.jsonl", [("1.jpg", "one"), ("2.jpg", "two")])
    assert distcap.read_captions(path, examples) == ["two", "one"]
    path = write_captions(tmp_path / "c.jsonl", [("1", "one"), ("3.jpg", "two")])
    with pytest.raises(distcap.UserError, match="does not match"):
        distcap.read_captions(path, examples)


def test_captions_of_pictures_with_equal_names(tmp_path):
    """In two folders: the whole names tell them apart, in a table and for files beside them."""
    examples = []
    for name in ("s", "t"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(f"in {name}\n")
        examples.append(distcap.Example(name, tmp_path / name / "1.jpg", ("x",)))
    pairs = [("t/1.jpg", "in t"), ("s/1.jpg", "in s")]
    path = write_captions(tmp_path / "c.jsonl", pairs)
    assert distcap.read_captions(path, examples) == ["in s", "in t"]
    assert distcap.read_captions(tmp_path, examples) == ["in s", "in t"]


def test_captions_of_pictures_that_are_left_out_are_left_out_too(data, no_models, tmp_path):
    """Another program has captioned all of them."""
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows[1]["caption"] = [" "]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = write_captions(tmp_path / "c.json", zip(NAMES, TEXTS))
    out = tmp_path / "x.json"
    assert run_eval(data, "--captions", path, *TEXT_METRICS, "--out", out) == 0
    assert json.loads(out.read_text())["pictures"] == 3
    path = write_captions(tmp_path / "d.json", zip([*NAMES, "five.jpg"], [*TEXTS, "x"]))
    assert run_eval(data, "--captions", path, *TEXT_METRICS) == 2


def test_pictures_that_cannot_be_read_are_left_out_before_captioning(
    run, tmp_path, monkeypatch, capsys
):
    """As `train` does; without CLIP they are only found on the way."""
    folder = tmp_path / "data"
    shutil.copytree(run / "test", folder)
    last = sorted(folder.glob("*.png"))[-1]
    last.write_bytes(last.read_bytes()[:60])
    count = len(list(folder.glob("*.png")))
    out = tmp_path / "x.json"
    command = [folder, "--captioner", run, "--metrics", "rouge", "retrieval", "--out", out]
    captioned = []
    search = distcap.caption_all

    def caption_all(captioner, images, *arguments, **options):
        captioned.extend(images)
        return search(captioner, images, *arguments, **options)

    monkeypatch.setattr(distcap, "caption_all", caption_all)
    assert run_eval(*command, "--device", "cpu") == 0
    assert f"left out 1 pictures or captions; the first: {last}" in capsys.readouterr().err
    assert len(captioned) == count - 1 == json.loads(out.read_text())["pictures"]


def test_names_that_do_not_match_are_one_line_that_names_them(data, no_models, tmp_path, capsys):
    pairs = list(zip(NAMES, TEXTS))

    def says(pairs, name="c.jsonl"):
        path = write_captions(tmp_path / name, pairs)
        return refusal(capsys, data, "--captions", path, *TEXT_METRICS)

    assert "1 without a caption (three.jpg)" in says([*pairs[:2], pairs[3]])
    assert "4 without a caption (one.jpg, two.jpg, three.jpg, ...)" in says([("x.jpg", "a")])
    line = says([*pairs[1:], ("five.jpg", "a")])
    assert "without a caption (one" in line and "not in the data (five" in line
    assert "1 there twice (two.jpg)" in says([*pairs, pairs[1]])
    assert "one.jpg: 2 captions; eval takes one" in says([("one.jpg", ["a", "b"]), *pairs[1:]])
    assert "[1]: needs an image_id" in says([("one.jpg", "a"), (None, "b")], "c.json")
    assert "caption must be a text" in says([("one.jpg", 3), *pairs[1:]], "c.json")
    assert "four.jpg: 0 captions" in says([*pairs[:3], ("four.jpg", None)], "c.json")
    assert "nowhere" in refusal(capsys, data, "--captions", "nowhere", *TEXT_METRICS)
    (tmp_path / "none").mkdir()
    assert "4 without a caption" in refusal(
        capsys, data, "--captions", tmp_path / "none", *TEXT_METRICS
    )


@pytest.mark.parametrize("needed", ["--metrics meteor", "--metrics spice", "--tokenizer ptb"])
def test_without_java_what_needs_it_is_refused_before_any_work(
    needed, no_models, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refusal(capsys, tmp_path, "--captioner", "unread", *needed.split())
    assert f"{needed}: needs Java" in line and "install it" in line


@needs_java
def test_spice_without_its_models_is_refused_before_any_work(no_models, tmp_path, capsys):
    from pycocoevalcap.spice import spice

    if list(Path(spice.__file__).parent.glob("lib/*-models.jar")):
        pytest.skip("SPICE's models are here")
    line = refusal(capsys, tmp_path, "--metrics", "spice")
    assert "get_stanford_models" in line


@needs_java
def test_meteor_and_ptb_from_the_command_line(data, no_models, tmp_path, capfd):
    path = write_captions(tmp_path / "c.csv", zip(NAMES, TEXTS))
    out = tmp_path / "x.json"
    flags = ["--metrics", "meteor", "--tokenizer", "ptb", "--out", out]
    assert run_eval(data, "--captions", path, *flags) == 0
    streams = capfd.readouterr()
    assert streams.err == "" and [line.split()[0] for line in streams.out.splitlines()] == [
        "data", "meteor"
    ]  # fmt: skip
    results = json.loads(out.read_text())
    assert results["measures"]["meteor"] == pytest.approx(1) and results["tokenizer"] == "ptb"


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--captions c --beams 3", "--beams: changes nothing with --captions c"),
        ("--captions c --captioner x", "--captioner: changes nothing with --captions c"),
        ("--metrics bleu --clip x", "--clip: changes nothing with --metrics bleu"),
        ("--metrics bleu cider --bag-size 5", "nothing with --metrics bleu cider"),
        ("--metrics retrieval --tokenizer ptb", "--tokenizer: changes nothing with"),
        ("--name x", "--name: changes nothing without --out"),
        ("--format latex", "--format: changes nothing without --table"),
        ("--table x.json", "--data: changes nothing with --table x.json"),
        ("--min-length 21", "--min-length 21: is above --max-length 20"),
        ("--out x", "must be a .json file"),
        ("--out data.json", "would write over data.json"),
        ("--captions x.captions.json --out x.json", "would write over x.captions.json"),
    ],
)
def test_flags_that_mean_nothing_or_harm_are_refused(flags, wanted, no_models, capsys):
    assert wanted in refusal(capsys, "data.json", *flags.split())


def test_an_unknown_metric_is_one_line(capsys):
    with pytest.raises(SystemExit):
        run_eval("data", "--metrics", "bleu5")
    assert capsys.readouterr().err.count("\n") == 1


def test_the_captions_are_kept_if_scoring_fails(run, tmp_path, monkeypatch):
    def fail(*_):
        raise distcap.UserError("no")

    monkeypatch.setattr(distcap, "measure", fail)
    out = tmp_path / "x.json"
    assert run_eval(run / "test", "--captioner", run, "--out", out) == 2 and not out.exists()
    kept = json.loads((tmp_path / "x.captions.json").read_text())
    assert len(kept) == 40 and all(set(row) == {"image_id", "caption"} for row in kept)


def test_what_eval_wrote_can_be_evaluated_again_with_the_same_numbers(run, tmp_path):
    """Its captions and each picture's measures; the means of those are the table's."""
    out, again = tmp_path / "x.json", tmp_path / "y.json"
    metrics = ["--metrics", *distcap.METRICS[:3], *distcap.METRICS[5:]]
    assert run_eval(run / "test", "--captioner", run, *metrics, "--out", out) == 0
    first = json.loads(out.read_text())
    for captions in ("x.captions.json", "x.each.jsonl"):
        command = [run / "test", "--captions", tmp_path / captions, "--clip", run, *metrics]
        assert run_eval(*command, "--out", again) == 0
        assert json.loads(again.read_text())["measures"] == first["measures"]
        assert json.loads(again.read_text())["digest"] == first["digest"]

    rows = list(map(json.loads, (tmp_path / "x.each.jsonl").read_text().splitlines()))
    assert len(rows) == 40 and (tmp_path / rows[0]["file_name"]).is_file()
    for name, value in first["measures"].items():
        if name.startswith("bleu") or "median" in name or name not in rows[0]:
            continue
        assert statistics.fmean(row[name] for row in rows) == pytest.approx(value, rel=1e-12)
    assert {"cider", "clip_score", "bag_R@1", "self_bleu", "faithful"} <= set(rows[0])
    assert first["captioner"] == str(run) and first["clip"] == [str(run)] and first["beams"] == 1


@pytest.mark.parametrize("beams, shortest", [(1, 0), (3, 5)])
def test_caption_and_eval_write_the_same_captions(beams, shortest, run, tmp_path):
    pictures, out = run / "test", tmp_path / "c.jsonl"
    same = ["--captioner", str(run), "--beams", str(beams), "--min-length", str(shortest)]
    same += ["--batch-size", "16"]
    assert distcap.main(["caption", str(pictures), *same, "--out", str(out)]) == 0
    assert run_eval(pictures, *same, "--metrics", "diversity", "--out", tmp_path / "x.json") == 0
    theirs = [json.loads(line)["caption"][0] for line in out.read_text().splitlines()]
    ours = json.loads((tmp_path / "x.captions.json").read_text())
    assert [row["caption"] for row in ours] == theirs


def test_several_clips_stand_under_their_names(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run / "clip", other)
    out = tmp_path / "x.json"
    command = [run / "test", "--captioner", run, "--metrics", "retrieval", "--out", out]
    assert run_eval(*command, "--clip", run, "--clip", other) == 0
    measures = json.loads(out.read_text())["measures"]
    assert measures[str(run)] == measures[str(other)]  # the same weights
    assert f"{other} text_to_image_R@1" in capsys.readouterr().out


def test_split_names_what_is_evaluated(data, no_models, tmp_path):
    (tmp_path / "some.txt").write_text("two.jpg\nfour.jpg\n")
    path = write_captions(tmp_path / "c.csv", [pair for pair in zip(NAMES, TEXTS)][1::2])
    out = tmp_path / "x.json"
    flags = ["--split", tmp_path / "some.txt", "--metrics", "rouge", "--out", out]
    assert run_eval(data, "--captions", path, *flags) == 0
    assert json.loads(out.read_text())["pictures"] == 2


def test_what_is_left_out_is_told(data, no_models, tmp_path, capsys):
    with open(data / "metadata.jsonl", "a") as table:
        table.write('\n{"file_name": "five.jpg", "caption": ""}')
    path = write_captions(tmp_path / "c.csv", zip(NAMES, TEXTS))
    assert run_eval(data, "--captions", path, "--metrics", "rouge") == 0
    err = capsys.readouterr().err
    assert "left out 1 pictures or captions" in err and "five.jpg" in err and err.count("\n") == 1


def result(path, name, digest="d", **measures):
    same = {"data": f"data-{digest}", "split": None, "pictures": 4, "tokenizer": "regex"}
    same |= {"clip": [], "bag_size": 10, "digest": digest, "name": name}
    path.write_text(json.dumps(same | {"measures": measures}))
    return path


def test_tables_by_hand(tmp_path, no_models, capsys):
    paths = [
        result(tmp_path / "a.json", "tf", cider=1.0, vocabulary=5, distinct=0.5, old=1),
        result(tmp_path / "b.json", "my_rl", cider=2.0, vocabulary=9, distinct=0.25),
        result(tmp_path / "c.json", "tf", cider=1.5, vocabulary=7, distinct=0.75),
    ]
    assert run_eval("--table", *paths) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|  | cider | vocabulary | distinct |",
        "| --- | --- | --- | --- |",
        "| tf | 1.250 ± 0.354 | 6 ± 1.4 | **62.5% ± 17.7%** |",
        "| my_rl | **2.000** | 9 | 25.0% |",
    ]
    assert run_eval("--table", *paths, "--format", "latex") == 0
    assert capsys.readouterr().out.splitlines() == [
        r"\begin{tabular}{lrrr}",
        r" & cider & vocabulary & distinct \\",
        r"tf & 1.250 $\pm$ 0.354 & 6 $\pm$ 1.4 & \textbf{62.5\% $\pm$ 17.7\%} \\",
        r"my\_rl & \textbf{2.000} & 9 & 25.0\% \\",
        r"\end{tabular}",
    ]
    odd = result(tmp_path / "odd.json", "a & b|c", cider=1.0)
    raised = result(tmp_path / "raised.json", r"a^2~b\c", cider=1.0)
    assert run_eval("--table", raised, "--format", "latex") == 0
    assert r"a\^{}2\~{}b\textbackslash{}c & " in capsys.readouterr().out
    assert run_eval("--table", odd) == run_eval("--table", odd, "--format", "latex") == 0
    text = capsys.readouterr().out
    assert r"| a & b\|c | 1.000 |" in text and r"a \& b|c & 1.000 \\" in text
    lower = [result(tmp_path / f"{n}.json", f"{n}", self_bleu=n / 4) for n in (1, 2)]
    assert run_eval("--table", *lower) == 0
    assert "| 1 | **0.250** |\n| 2 | 0.500 |" in capsys.readouterr().out


def test_ids_are_numbers_where_they_were_in_coco():
    names = ["0", "391895", "007", "1.jpg", "\u0663"]
    examples = [distcap.Example(name, Path("x.jpg"), ("a",)) for name in names]
    rows = json.loads(distcap.coco_results(examples, ["a dog"] * 5))
    assert [row["image_id"] for row in rows] == [0, 391895, "007", "1.jpg", "\u0663"]


def test_rows_of_other_data_are_not_compared(tmp_path, capsys):
    one = result(tmp_path / "a.json", "a", cider=1)
    two = result(tmp_path / "b.json", "b", digest="e", cider=1)
    line = refusal(capsys, "--table", one, two)
    assert "not to be compared: data data-d and data-e" in line and "b.json" in line
    same = json.loads(one.read_text()) | {"data": "./data-d", "split": "test"}
    two.write_text(json.dumps(same))
    assert run_eval("--table", one, two) == 0  # the same pictures and references, by other names
    both = json.loads(one.read_text())
    two.write_text(json.dumps(both | {"clip": ["this"], "bag_size": 5}))
    assert run_eval("--table", one, two) == 0  # what both measured needs no CLIP
    one.write_text(json.dumps(both | {"clip": ["other"]}))
    assert "not to be compared: clip" in refusal(capsys, "--table", one, two)
    (tmp_path / "x.json").write_text("[1]")
    assert "no results of eval" in refusal(capsys, "--table", tmp_path / "x.json")
    assert "nowhere" in refusal(capsys, "--table", "nowhere")


def mutate(text, rng):
    """A file of captions with one thing wrong, or several."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(text) + 1)
        lines = text.split(b"\n")
        line = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:place] + rng.randbytes(rng.randint(1, 3)) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + rng.randint(1, 9) :]
        elif kind == 2:
            text = text[:place]
        elif kind == 3:
            text = b"\n".join(lines[:line] + lines[line + 1 :])
        elif kind == 4:
            text = b"\n".join([*lines, lines[line]])
        elif kind == 5:
            odd = [b'"', b"\n", b",", b"[", b"}", b"\0", "\u2028".encode(), b"\\ud800", b"null"]
            text = text[:place] + rng.choice(odd) + text[place:]
        else:
            text = text.replace(rng.choice([b"caption", b"image", b".jpg", b"a", b"1"]), b"", 1)
    return text


def fuzz(examples, folder, seeds):
    """How many mutated files were taken. Every caption says whose it is: none may be another's."""
    taken = 0
    for seed in seeds:
        rng = random.Random(seed)
        path = folder / f"c{seed}{rng.choice(['.json', '.jsonl', '.csv', '.txt'])}"
        said = [(e.image_id, f"this is <{n}>, a picture") for n, e in enumerate(examples)]
        if path.suffix == ".txt":
            path.write_text("".join(f"{name}#0\t{text}\n" for name, text in said))
        else:
            write_captions(path, said)
        if path.suffix == ".json":
            path.write_text(path.read_text().replace("}, ", "},\n"))
        path.write_bytes(mutate(path.read_bytes(), rng))
        try:
            captions = distcap.read_captions(path, examples)
        except distcap.UserError as error:
            assert "\n" not in str(error)
            continue
        taken += 1
        assert len(captions) == len(examples)
        for n, caption in enumerate(captions):
            assert not any(f"<{m}>" in caption for m in range(len(examples)) if m != n), path
    return taken


def test_mutated_captions_are_refused_or_rightly_paired(tmp_path):
    examples = [distcap.Example(f"{n}a.jpg", Path(f"{n}a.jpg"), ("a",)) for n in range(12)]
    seeds = range(int(os.environ.get("DISTCAP_FUZZ", "60")))
    assert 0 < fuzz(examples, tmp_path, seeds) < len(seeds)


def test_of_data_with_splits_the_test_pictures_are_measured(tmp_path, capsys):
    """Unless another split is named: nobody means to measure what was trained on."""
    rows = [{"file_name": f"{n}.jpg", "caption": ["a dog"], "split": ["train", "test"][n == 2]}
            for n in range(4)]  # fmt: skip
    rows[0]["caption"] += [""]  # of what is not measured, nothing is told
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.jsonl").write_text('{"file_name": "2.jpg", "caption": "a dog"}\n')
    command = ["eval", str(tmp_path / "data.jsonl"), "--captions", str(tmp_path / "own.jsonl")]
    assert distcap.main([*command, "--metrics", "bleu"]) == 0
    assert capsys.readouterr().err == ""
    assert distcap.main([*command, "--metrics", "bleu", "--split", "train"]) == 2
    assert "3 without a caption" in capsys.readouterr().err


def test_of_several_processes_one_tells_what_was_trained_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "training.txt").write_text(f"{os.path.realpath('x.png')}\n")
    examples = [distcap.Example("x", Path("x.png"), ("a dog",))]
    for rank in (0, 1):
        monkeypatch.setattr(distcap, "process_rank", lambda rank=rank: rank)
        config = distcap.EvalConfig(captioner=str(tmp_path))
        distcap.warn_of_training_pictures(examples, config)
    assert capsys.readouterr().err.count("1 of 1 pictures were trained on") == 1
