"""The project's README: every command that it shows is run, and what it names exists.

So that it takes a minute and no network, flags are added that make models and data small, programs
that are not ours are left alone, and folders stand in for data that would be downloaded.
"""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import strip
from PIL import Image

import distcap

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    """The commands in the README's blocks, each on one line, without comments and prompts."""
    found = []
    for kind, block in BLOCKS:
        lines = block.replace("\\\n", "").split("\n")
        if kind == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines if kind in ("sh", "console") else ():
            words = shlex.split(line, comments=True)
            parts = " ".join(f'"{word}"' if " " in word else word for word in words)
            found += [part for part in re.split(" && ", parts) if part]
    return found


TINY = "--train-size 200 --test-size 20 --clip-steps 10 --tf-steps 10 --steps 3 --device cpu"
STAND_IN = "--captioner runs/toy --device cpu --batch-size 4"  # for BLIP-base, with its CLIP

# What is added to each of our commands; None: not ours, or another test's.
ADDED = {
    "git clone <address of this repository> distcap": None,
    "cd distcap": None,
    "pip install -e .": None,
    "distcap caption photos/": STAND_IN,
    "distcap caption photos/ --samples 8 --rerank": STAND_IN,
    "distcap caption photos/ --out captions.html": STAND_IN,
    "distcap caption runs/toy/test --captioner runs/toy --shard 1/300": "--device cpu",
    "distcap train": f"{TINY} --out runs/again",  # runs/toy is there
    "distcap train --recipe clip-scst --out runs/hacked": TINY,
    "curl --remote-name-all -L http://images.cocodataset.org/zips/{train2014,val2014}.zip "
    "http://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip": None,
    "unzip -q *.zip -d coco": None,
    "distcap train coco/dataset_coco.json --images coco/ --out runs/coco --precision bf16 "
    "--gradient-checkpointing": f"{STAND_IN} --steps 2 --workers 0",
    "distcap eval coco/dataset_coco.json --images coco/ --split test --captioner runs/coco "
    "--tokenizer ptb --out ours.json --name ours": "--device cpu --workers 0",
    "distcap eval coco/dataset_coco.json --images coco/ --split test --tokenizer ptb "
    "--out blip.json --name BLIP": f"{STAND_IN} --workers 0",
    "distcap eval --table blip.json ours.json --format latex": "",
    "pip install -e .[test]": None,
    "pytest": None,
}


@pytest.fixture
def place(run, tmp_path, monkeypatch):
    """A folder with the run that the README has made before, photographs, and COCO in small."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/toy").symlink_to(run)
    (tmp_path / "photos").mkdir()
    pictures = sorted((run / "test").glob("*.png"))
    for picture in pictures[:5]:
        shutil.copy(picture, tmp_path / "photos")

    images = []
    for number, picture in enumerate(pictures[:16]):
        folder, split = ("train2014", "train") if number < 12 else ("val2014", "test")
        name = f"COCO_{folder}_{number:012d}.jpg"
        (tmp_path / "coco" / folder).mkdir(parents=True, exist_ok=True)
        Image.open(picture).save(tmp_path / "coco" / folder / name)
        image = dict(filepath=folder, filename=name, cocoid=number, imgid=number)
        image["split"] = {10: "val", 11: "restval"}.get(number, split)
        images.append(image | {"sentences": [{"raw": "A red ring and a blue bar."}] * 2})
    text = json.dumps({"images": images, "dataset": "coco"})
    (tmp_path / "coco/dataset_coco.json").write_text(text)
    monkeypatch.chdir(tmp_path)


def test_every_command_is_known_and_tested():
    assert list(ADDED) == commands()
    extras = re.findall(r"^(\w+) = \[\"", (ROOT / "pyproject.toml").read_text(), re.M)
    assert "test" in extras and 'distcap = "distcap:main"' in (ROOT / "pyproject.toml").read_text()


def test_every_command_does_what_the_readme_says(place, capfd):
    for command, added in ADDED.items():
        if added is None or ("ptb" in command and not shutil.which("java")):
            continue
        if "--table" in command and not Path("ours.json").exists():
            continue  # for want of Java
        words = [word for word in shlex.split(command)[1:] if added or word]
        assert distcap.main([*words, *added.split()]) == 0, command
        out = capfd.readouterr().out
        if command.startswith("distcap caption") and "--out" not in command:
            assert len(out.splitlines()) == (5 if "photos/" in command else 1)
            assert all(re.fullmatch(r"\S+\.png\t.+", line) for line in out.splitlines())
    assert Path("captions.html").is_file() and Path("runs/coco/report.html").is_file()
    assert distcap.Captioner.load("runs/hacked") and (ROOT / "tests/claims/strip.png").is_file()


def test_the_lines_shown_are_of_the_form_that_caption_prints():
    (block,) = [block for kind, block in BLOCKS if kind == "console"]
    command, *lines = block.splitlines()
    folder = shlex.split(command)[3]
    for line in lines:
        path, caption = line.split("\t")
        assert path.startswith(f"{folder}/") and distcap.parse(caption)


def test_its_first_table_has_measures_as_train_prints_them(run):
    table = README.split("<!-- toy -->")[1].split("<!-- end of toy -->")[0].strip()
    measures = json.loads((run / "results.json").read_text())["after"]
    for row in table.split("\n")[2:]:
        cell, *values = row.strip("| ").split(" | ")
        name = cell.partition(":")[0]
        form = re.sub(r"\d+", "9", distcap.shown(name, measures[name]))
        assert [re.sub(r"\d+", "9", value) for value in values] == [form, form]


def test_it_names_every_recipe_and_every_choice():
    named = re.findall(r"`([a-z-]+)`", README.split("`--recipe NAME`")[1].split("\n\n")[0])
    assert set(distcap.RECIPES) <= set(named)
    metrics = README.split("| `--metrics` |")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z]+)`", metrics)) >= set(distcap.METRICS)


def test_its_equations_are_functions_of_the_file():
    rows = re.findall(r"^\| (\d+) \|.*\| ((?:`\w+`,? ?)+)\|$", README, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for number, names in rows:
        docs = [getattr(distcap, name).__doc__ for name in re.findall(r"`(\w+)`", names)]
        assert all(f"Eq. {number}" in text for text in docs), (number, names)


def test_its_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)", README)
    local = [link for link in links if "://" not in link]
    assert local and not [link for link in local if not (ROOT / link).exists()]


def test_it_has_thirteen_sections_and_marks_to_be_filled_in():
    assert README.count("\n## ") == 12 and len(README.split("\n")) < 285
    for name in ("toy", "claims"):
        assert README.index(f"<!-- {name} -->\n") < README.index(f"\n<!-- end of {name} -->")


SCENE = distcap.Scene("large", "red", "ring", "above", "small", "blue", "bar", "white")


@pytest.mark.parametrize(
    ("caption", "false", "broken"),
    [
        ("a large red ring above a small blue bar on a white background", "", ""),
        ("a small red ring above a small blue bar on a gray background", "small gray", ""),
        ("a blue bar and a large red ring", "", ""),  # "and" leaves the order open
        ("a blue bar and a small red ring", "small", ""),
        ("a red ring to the left of a bar", "to the left of", ""),
        ("two shapes on a black background", "black", ""),
        ("a ring and a bar and a a bar", "", "and a a bar"),
        ("ring ring", "", "ring ring"),
        ("", "", ""),
    ],
)
def test_the_strip_judges_words(caption, false, broken):
    judged = strip.judge(caption, SCENE)
    assert " ".join(word for word, _ in judged) == caption
    assert " ".join(word for word, verdict in judged if verdict == strip.FALSE) == false
    assert " ".join(word for word, verdict in judged if verdict == strip.BROKEN) == broken


def test_the_strip_is_drawn_from_three_runs(run, tmp_path, capsys):
    """Of the first picture whose captions make the point, here the third."""
    examples = distcap.read_examples(str(run / "test"))
    scenes = [str(example.scene) for example in examples]
    texts = {
        "before": ["two shapes"] * len(scenes),
        "hacked": ["a ring and a bar", "a ring and a bar", *["a a ring"] * (len(scenes) - 2)],
        "regularized": scenes,
    }
    for name, captions in texts.items():
        shutil.copytree(run / "test", tmp_path / name / "test")
        written = distcap.coco_results(examples, captions)
        (tmp_path / name / "captions.json").write_text(written)
    out = tmp_path / "x.png"
    assert strip.main([*(str(tmp_path / name) for name in texts), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(examples[2].image.name) in printed and f"2 of {len(scenes)} well-formed" in printed
    assert Image.open(out).width == strip.WIDTH
    before = str(tmp_path / "before")
    with pytest.raises(SystemExit):
        strip.main([before, before, before, "--out", str(out)])


@pytest.mark.parametrize("verb", distcap.VERBS)
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal_and_has_a_group_for_every_flag(verb, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        distcap.main([verb, "--help"])
    text, _, examples = capsys.readouterr().out.partition("examples:\n")
    # One name of a model is longer than what a narrow terminal has for it.
    long = [line for line in text.split("\n") if len(line) > columns and "Salesforce" not in line]
    assert not long and len(max(text.split("\n"), key=len)) <= max(columns, 65)
    assert re.findall(r"^(\w.*):$", text, re.M)[1:] and "\n:\n" not in text
    for line in examples.replace("\\\n", "").splitlines():
        words = shlex.split(line.rpartition("| ")[2])
        parsed, config, _ = distcap.parse_arguments(words[1:])
        assert parsed == verb and dataclasses.is_dataclass(config)
