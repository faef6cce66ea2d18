"""What `train` makes of a user's data: splits that hold, what is left out and told, the cache of
embeddings, captions alike on both sides."""

import copy
import dataclasses
import functools
import json
import os
import random
import shutil
import types
from pathlib import Path

import pytest
import torch
from conftest import configure
from test_command_line import read_log

import distcap


@pytest.fixture
def data(world, tmp_path):
    """A folder of 40 pictures with captions."""
    distcap.write_examples(tmp_path / "data", world[:40])
    return tmp_path / "data"


def rewrite(folder, change):
    """Put `change(rows)` in the place of the rows, dicts, of a folder's metadata."""
    path = folder / "metadata.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(examples):
    return [Path(example.image).name for example in examples]


def split(data, skipped=None, **values):
    """Names of the training, validation and test pictures."""
    config = configure(data=str(data), **values)
    return [names(part) for part in distcap.split(config, [] if skipped is None else skipped)]


def test_the_datas_own_splits_are_kept(data):
    parts = ["train", "restval", "val", "test"]
    rewrite(data, lambda rows: [row | {"split": parts[n % 4]} for n, row in enumerate(rows)])
    training, validation, test = split(data)
    wanted = [f"{n:05d}.png" for n in range(40)]
    assert training == [name for n, name in enumerate(wanted) if n % 4 < 2]
    assert (validation, test) == (wanted[2::4], wanted[3::4])
    assert split(data, train_split="restval")[0] == wanted[1::4]
    (data / "chosen.txt").write_text("00000\n00004.png\n")
    assert split(data, train_split=str(data / "chosen.txt")) == [
        ["00000.png", "00004.png"], wanted[2::4], wanted[3::4],
    ]  # fmt: skip


def test_a_split_that_is_not_used_is_told(data, capsys):
    parts = ["train", "val", "test", "held back"]
    rewrite(data, lambda rows: [row | {"split": parts[n % 4]} for n, row in enumerate(rows)])
    assert [len(part) for part in split(data)] == [10, 10, 10]
    assert capsys.readouterr().err.endswith(": its splits held back are not used\n")
    rewrite(data, lambda rows: [row | {"split": "all"} for row in rows])
    with pytest.raises(
        distcap.UserError, match=r"nothing to learn|no picture is left to learn from"
    ):
        split(data)


def test_a_run_folder_may_be_behind_a_link(data, world, tmp_path):
    """Where `..` leads to another folder than the path's text says."""
    (tmp_path / "far/away/runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far/away/runs")
    examples = distcap.read_examples(str(data))
    again = distcap.write_examples(tmp_path / "runs/x/test", examples)
    assert [each.image.resolve() for each in again] == [each.image.resolve() for each in examples]
    again = distcap.write_examples(tmp_path / "near", examples)
    line = (tmp_path / "near/metadata.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["file_name"].startswith("../data/")


def test_a_split_that_is_missing_is_taken_from_training_alone(data):
    rewrite(data, lambda rows: [row | {"split": ["train", "test"][n % 2]} for n, row in
                                enumerate(rows)])  # fmt: skip
    training, validation, test = split(data)
    assert len(test) == 20 and len(validation) == 2 and len(training) == 18
    assert not {*training, *validation} & {*test} and not {*training} & {*validation}


def test_data_without_splits_are_split_by_a_rule(data):
    """It knows no seed and no order, so that two runs can be compared."""
    training, validation, test = split(data)
    assert (len(training), len(validation), len(test)) == (32, 4, 4)
    assert sorted([*training, *validation, *test]) == [f"{n:05d}.png" for n in range(40)]
    assert split(data, seed=7) == [training, validation, test]
    rewrite(data, lambda rows: random.Random(1).sample(rows, len(rows)))
    assert split(data) == [training, validation, test]
    assert len(split(data, test_size=2)[2]) == 2
    assert split(data, train_size=5)[0] == training[:5]


def test_no_picture_is_both_learned_from_and_tested_on(data, tmp_path, world):
    """Not even if other data name it as test data; it is told."""
    skipped = []
    shutil.copytree(data, tmp_path / "other")
    other = tmp_path / "other" / "metadata.jsonl"
    other.write_text('{"file_name": "../data/00005.png", "caption": "two shapes"}\n')
    training, _, test = split(data, skipped, test=str(tmp_path / "other"))
    assert test == ["00005.png"] and "00005.png" not in training
    assert ["00005.png" in each.name and each.reason for each in skipped] == ["also held out"]


def test_captions_are_normalized_for_training_and_raw_for_the_measures(data):
    rewrite(data, lambda rows: [row | {"caption": ["Two Shapes.", "..."]} for row in rows])
    skipped = []
    training, validation, test = distcap.split(configure(data=str(data)), skipped)
    assert {each.references for each in training} == {("two shapes",)}
    assert {each.references for each in (*validation, *test)} == {("Two Shapes.", "...")}
    assert {each.reason for each in skipped} == {"a caption without words"}
    raw, *_ = distcap.split(configure(data=str(data), normalize=False), [])
    assert {each.references for each in raw} == {("Two Shapes.", "...")}


@pytest.mark.parametrize(
    ("caption", "normalized"),
    [("A dog.", "a dog"), ('He said: "Sit!"', "he said sit"), ("a (red)  #1 hat;", "a red 1 hat"),
     ("it's a well-known dog, isn't it?", "it's a well-known dog, isn't it?"), ("...", "")],
)  # fmt: skip
def test_normalized_captions(caption, normalized):
    assert distcap.normalize_caption(caption) == normalized


@pytest.mark.parametrize("normalize", [True, False])
def test_the_discriminator_cannot_tell_a_full_stop(learn, normalize):
    """Human captions end in one and the captioner's do not: normalized, they are the same row to
    CLIP and to the discriminator, on whichever side. With --no-normalize they are not."""
    learner, batch = learn(normalize=normalize)
    plain = ["a red bar and a blue ring", "two shapes", "a pink star and a bar", "a ring and a bar"]
    human = [f"{caption.capitalize()}." for caption in plain]
    learner.captioner.tokenize = lambda captions, _: torch.tensor([[4, 9, 9, 2]] * len(captions))
    learner.captioner.decode = lambda tokens: plain
    rollout = learner.roll_out(
        learner.captioner.encode(batch.pixels), dataclasses.replace(batch, ground_truth=human)
    )
    sampled, of_people, _ = rollout.caption_embeddings.split(rollout.sizes)
    scores, _, _ = learner.regularizer.score(rollout, batch)
    scores = scores.split(rollout.sizes)
    assert sampled.equal(of_people) == normalize
    assert scores[0].equal(scores[1]) == normalize


def train(data, captioner, out, *flags):
    small = "--steps 2 --batch-size 4 --workers 0 --device cpu".split()
    return ["train", str(data), "--captioner", str(captioner), "--out", str(out), *small, *flags]


def test_a_runs_test_folder_gives_its_tables_numbers(data, run, tmp_path, capsys):
    """Of a user's data too, whose pictures are elsewhere; with the references as they were."""
    rewrite(data, lambda rows: [row | {"caption": f"{row['caption'][0].title()}."} for row in rows])
    shutil.move(data / "metadata.jsonl", tmp_path / "captions.jsonl")
    flags = ["--images", str(data), "--test-size", "4"]
    out = tmp_path / "runs" / "x"
    assert distcap.main(train(tmp_path / "captions.jsonl", run, out, *flags)) == 0
    for part in ("test", "validation"):
        (example, *_) = distcap.read_examples(str(out / part))
        assert example.references[0].endswith(".") and os.path.isfile(example.image)
        assert not list((out / part).glob("*.png"))
    command = ["eval", str(out / "test"), "--captioner", str(out), "--device", "cpu"]
    assert distcap.main([*command, "--out", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    again = again.get("measures", again)
    after = json.loads((out / "results.json").read_text())["after"]
    shared = after.keys() & again.keys()
    assert {"oracle_R@1", "text_to_image_R@1", "cider"} & shared
    assert {name: again[name] for name in shared} == {name: after[name] for name in shared}
    (row, *_) = json.loads((out / "captions.json").read_text())
    assert set(row) == {"image_id", "caption"}
    card = (out / "captioner" / "README.md").read_text()
    assert "library_name: transformers" in card and "--steps 2" in card
    assert "text_to_image_R@1" in card
    assert "<figure>" in (out / "report.html").read_text() and not (out / "state.pt").exists()

    assert "trained on" not in capsys.readouterr().err
    command = ["eval", str(tmp_path / "captions.jsonl"), "--images", str(data)]
    assert distcap.main([*command, "--captioner", str(out), "--metrics", "bleu"]) == 0
    assert "32 of 40 pictures were trained on" in capsys.readouterr().err


def test_what_is_left_out_is_told_in_a_line_and_listed(data, run, tmp_path, capsys):
    (data / "00001.png").unlink()
    (data / "00002.png").write_bytes(b"no picture")
    shutil.copy(data / "00003.png", data / "00004.png")
    rewrite(data, lambda rows: [row | ({"caption": ""} if n == 6 else {})
                                for n, row in enumerate(rows)])  # fmt: skip
    assert distcap.main(train(data, run, tmp_path / "run", "--strict")) == 2
    assert "--strict: 3 faults in the data, the first: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # so that the same command can be given again
    assert distcap.main(train(data, run, tmp_path / "run")) == 0
    err = capsys.readouterr().err
    assert "left out 3 pictures or captions" in err
    assert "1 pictures have the same bytes as another" in err and "00003.png (" in err
    listed = [json.loads(line) for line in open(tmp_path / "run" / "skipped.jsonl")]  # noqa: SIM115
    found = {Path(row["name"]).name: row["reason"] for row in listed}
    assert found.keys() == {"00001.png", "00002.png", "00006.png"}
    assert found["00001.png"] == "no such picture" and "cannot be read" in found["00002.png"]


def test_data_with_no_picture_that_can_be_read_is_one_line(data, run, tmp_path, capsys):
    for picture in data.glob("*.png"):
        picture.write_bytes(picture.name.encode())
    assert distcap.main(train(data, run, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert "none of 32 pictures can be read" in err and "Traceback" not in err


# ---- The cache of embeddings ---------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; its files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache").rglob("*.pt"))


@pytest.fixture
def embedded(monkeypatch):
    """How many pictures CLIP embedded, each time."""
    counts, embed = [], distcap.CLIP.embed_images

    def count(clip, images, *rest):
        counts.append(len(images))
        return embed(clip, images, *rest)

    monkeypatch.setattr(distcap.CLIP, "embed_images", count)
    return counts


def embed(clip, images, failures=None):
    digests = {path: distcap.file_digest(path) for path in images}
    return distcap.embed_cached(clip, images, 0, [] if failures is None else failures, digests)


def test_pictures_are_embedded_once_by_content_and_model(data, clip, cache, embedded, run):
    images = sorted(data.glob("*.png"))[:6]
    images[2].write_bytes(b"no picture")

    def look(pictures=images, model=clip):
        failures = []
        rows = embed(model, pictures, failures)
        return rows, [(number, str(error)) for number, error in failures]

    rows, failures = look()
    assert rows.shape == (5, 96) and [number for number, _ in failures] == [2]
    again, failures_again = look()
    assert again.equal(rows) and failures_again == failures
    assert len(cache()) == len(embedded) == 1  # the second time from the disk

    moved = [shutil.copy(path, path.with_name(f"moved {path.name}")) for path in images]
    assert look([Path(path) for path in moved])[0].equal(rows)
    assert len(embedded) == 1  # the same bytes

    look(model=distcap.CLIP.load(str(run)))  # another CLIP
    shutil.copy(images[4], images[5])  # another picture
    assert not look()[0].equal(rows)
    look(images[::-1])  # another order
    assert len(cache()) == len(embedded) == 4


def test_the_cache_is_for_other_processes_too(data, clip, cache, embedded):
    """Where the functions that prepare pictures are at other addresses."""
    images = sorted(data.glob("*.png"))[:3]
    rows = embed(clip, images)
    func = clip.pixels.func
    again = copy.copy(clip)
    twin = types.FunctionType(func.__code__, func.__globals__, func.__name__)
    again.pixels = functools.partial(twin, *clip.pixels.args)
    del again.digest  # which was copied
    assert repr(again.pixels) != repr(clip.pixels)
    assert embed(again, images).equal(rows) and embedded == [3]


@pytest.mark.parametrize("broken", [b"", b"nonsense"])
def test_a_broken_cache_does_no_harm(data, clip, cache, embedded, broken):
    images = sorted(data.glob("*.png"))[:3]
    rows = embed(clip, images)
    (path,) = cache()
    path.write_bytes(broken)
    assert embed(clip, images).equal(rows) and len(embedded) == 2
    assert embed(clip, images).equal(rows) and len(embedded) == 2


def test_a_cache_that_cannot_be_written_is_done_without(data, clip, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(embed(clip, sorted(data.glob("*.png"))[:3])) == 3


@pytest.mark.parametrize(("recipe", "counts"), [("distinctive", [32, 4, 4]), ("tf", [4, 4]),
                                                ("scst", [4, 4])])  # fmt: skip
def test_training_pictures_are_embedded_only_where_it_counts(
    recipe, counts, data, run, tmp_path, cache, embedded, monkeypatch
):
    """And no file is read twice to tell it from others."""
    read, digest = [], distcap.file_digest
    monkeypatch.setattr(distcap, "file_digest", lambda path: read.append(path) or digest(path))
    flags = ["--recipe", recipe] if recipe != "tf" else ["--recipe", "tf", "--tf-steps", "2"]
    command = train(data, run, tmp_path / "run", *flags)
    if recipe == "tf":
        place = command.index("--steps")
        del command[place : place + 2]
    assert distcap.main(command) == 0
    assert embedded == counts and len(cache()) == len(counts)
    assert sorted(read) == sorted(data.glob("*.png"))
    assert all(line["updated"] for line in read_log(tmp_path / "run") if "loss" in line)


def test_the_toy_world_leaves_nothing_in_the_cache(world, clip, cache, embedded):
    distcap.embed_cached(clip, [example.image for example in world[:3]], 0, [], {})
    assert embedded == [3] and not cache()
