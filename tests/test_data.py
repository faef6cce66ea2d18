"""Section 2: the toy world, pictures, data sets, the schedule."""

import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy
import pytest
from PIL import Image

import distcap

SCENE = "a small red circle to the left of a large blue star on a white background"


@pytest.mark.parametrize(
    ("caption", "well_formed", "true"),
    [
        (SCENE, True, True),
        ("two shapes", True, True),
        ("two shapes on a white background", True, True),
        ("two shapes on a black background", True, False),
        ("a red circle and a blue star", True, True),
        ("a blue star and a red circle", True, True),  # "and" says nothing of the order
        ("a red star and a blue circle", True, False),  # but whose colour is whose
        ("a circle to the left of a star", True, True),
        ("a star to the left of a circle", True, False),
        ("a circle above a star", True, False),
        ("a large circle and a star", True, False),
        ("a red circle", False, False),
        ("a red circle and a blue star and a blue star", False, False),
        ("a red red circle and a blue star", False, False),
        ("red circle blue star", False, False),
        ("", False, False),
    ],
)
def test_grammar_and_truth(caption, well_formed, true):
    assert (distcap.parse(caption) is not None) == well_formed
    assert distcap.is_true(caption, SCENE) == true


def test_every_human_text_of_the_world_is_true_of_its_scene():
    rng = random.Random(1)
    for example in distcap.toy_world(3, 200, 0)[0]:
        for text in (example.scene, *example.references, *distcap.write_references(example.scene, rng, generic=0.2)):
            assert distcap.is_true(text, example.scene), (text, example.scene)
            assert set(text.split()) <= set(distcap.WORDS)


def test_references_are_mostly_generic():
    texts = [text for example in distcap.toy_world(0, 400, 0)[0] for text in example.references]
    detailed = sum(text.endswith("background") and text.startswith(("a small", "a large")) for text in texts)
    assert 0.25 < detailed / len(texts) < 0.35


def test_toy_world_is_deterministic_and_no_scene_occurs_twice():
    training, test = distcap.toy_world(5, 50, 20)
    again, _ = distcap.toy_world(5, 50, 20)
    assert len(training) == 50 and len(test) == 20
    assert len({example.scene for example in training + test}) == 70
    assert [(e.scene, e.references, e.image.tobytes()) for e in training] == [
        (e.scene, e.references, e.image.tobytes()) for e in again
    ]
    assert {e.scene for e in distcap.toy_world(6, 50, 0)[0]} != {e.scene for e in training}


def test_pictures_show_their_scene():
    rng = random.Random(0)
    picture = distcap.draw("a large green bar above a small pink circle on a black background", rng)
    assert picture.size == (32, 32) and picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((16, 8)) == (0x20, 0xA0, 0x20) and picture.getpixel((16, 24)) == (0xFF, 0x80, 0xC0)
    ring = distcap.draw("a large red ring to the left of a large red circle on a white background", rng)
    assert ring.getpixel((8, 16)) == (255, 255, 255) and ring.getpixel((24, 16)) == (0xE0, 0x20, 0x20)


def test_examples_survive_a_round_trip_through_a_folder(tmp_path):
    examples = distcap.toy_world(0, 3, 0)[0]
    read = distcap.write_examples(tmp_path / "data", examples)
    assert [(e.references, e.scene) for e in read] == [(e.references, e.scene) for e in examples]
    for old, new in zip(examples, read):
        assert distcap.load_image(new.image).tobytes() == old.image.tobytes()  # PNG loses nothing


def write_metadata(folder, *lines):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_metadata_captions_are_a_string_or_a_list(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    rows = [{"file_name": "a.png", "caption": "a dog\u2028runs"}, {"file_name": "b.png", "caption": ["x", "y"]},
            {"file_name": "a.png", "caption": "again", "scene": "kitchen"}]  # fmt: skip
    read = distcap.read_examples(write_metadata(tmp_path, *(json.dumps(row, ensure_ascii=False) for row in rows), ""))
    assert [example.references for example in read] == [("a dog\u2028runs", "again"), ("x", "y")]  # a picture, once
    assert read[0].image == tmp_path / "a.png" and read[0].scene is None  # a scene is one of the toy world or none


def test_toy_world_says_when_it_runs_out_of_scenes():
    with pytest.raises(distcap.UserError, match="51200 scenes"):
        distcap.toy_world(0, 51_000, 1_000)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: not JSON"),
        ('{"file_name": "a.png"}', "caption"),
        ('{"file_name": "a.png", "caption": []}', "caption must be"),
        ('{"file_name": "a.png", "caption": [1]}', "caption must be"),
        ('{"file_name": "a.png", "caption": " "}', "caption must be"),
        ('{"file_name": "b.png", "caption": "x"}', "no such picture"),
    ],
)
def test_a_bad_line_of_metadata_is_named(tmp_path, line, complaint):
    folder = write_metadata(tmp_path, '{"file_name": "a.png", "caption": "fine"}', line)
    with pytest.raises(distcap.UserError, match=complaint) as caught:
        distcap.read_examples(folder)
    assert ("metadata.jsonl:2" in str(caught.value) or "b.png" in line) and "\n" not in str(caught.value)
    assert str(tmp_path / "metadata.jsonl") in str(caught.value)


def test_a_data_set_without_metadata_or_without_lines_is_refused(tmp_path):
    with pytest.raises(distcap.UserError, match="DATA must be"):
        distcap.read_examples(str(tmp_path / "nowhere"))
    with pytest.raises(distcap.UserError, match="no examples"):
        distcap.read_examples(write_metadata(tmp_path))


def picture(mode):
    """A left half of full and a right half of no intensity, in any mode."""
    grey = Image.fromarray(numpy.repeat(numpy.array([[255, 0]], dtype=numpy.uint8), 8, axis=1).repeat(8, axis=0))
    return grey.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    if mode in ("I", "I;16"):
        image = Image.fromarray((numpy.asarray(picture("L")).astype(numpy.uint16) * 257).astype(numpy.uint16))
        image = image.convert(mode) if mode == "I" else image
    else:
        image = picture(mode)
    converted = distcap.load_image(image)
    assert converted.mode == "RGB"
    assert min(converted.getpixel((2, 4))) > 200 and max(converted.getpixel((13, 4))) < 55


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = numpy.linspace(0, 65535, 256).astype(numpy.uint16)[None, :].repeat(4, axis=0)
    Image.fromarray(values).save(tmp_path / "deep.png")
    grey = numpy.asarray(distcap.load_image(tmp_path / "deep.png"))[0, :, 0].astype(int)
    assert abs(grey - numpy.arange(256)).max() <= 1


def test_small_values_in_deep_pictures_are_not_black():
    for mode, value in (("I", 200), ("F", 200.0), ("F", 0.8), ("I", 1)):
        picture = Image.new(mode, (4, 4), value)
        assert distcap.load_image(picture).getpixel((0, 0))[0] >= 200
    assert distcap.load_image(Image.new("I;16", (4, 4), 200)).getpixel((0, 0))[0] <= 1  # 16 bits say what white is


def test_transparency_is_white_and_exif_rotation_is_applied(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert distcap.load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.save(tmp_path / "clear.gif", transparency=0)
    assert distcap.load_image(tmp_path / "clear.gif").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (10, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert distcap.load_image(tmp_path / "turned.jpg").size == (20, 10)


def test_broken_pictures_raise(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("truncated.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(distcap.UserError, match=f"{name}: cannot be read"):
            distcap.load_image(tmp_path / name)


def test_find_images_takes_files_and_folders_in_order_each_once(tmp_path):
    for name in ("b.JPG", "a.png", "deep/c.webp", "notes.txt", ".hidden.png", ".cache/d.png", "deep/e.TIFF"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "round").symlink_to(tmp_path)  # a folder that holds itself
    found = distcap.find_images([str(tmp_path / "b.JPG"), str(tmp_path)])
    assert [path.name for path in found] == ["b.JPG", "a.png", "c.webp", "e.TIFF"]
    assert [path.name for path in distcap.find_images([str(tmp_path)], recursive=False)] == ["a.png", "b.JPG"]
    named = distcap.find_images([str(tmp_path / ".hidden.png"), str(tmp_path / "notes.txt")])
    assert [path.name for path in named] == [".hidden.png", "notes.txt"]  # what is named is meant


def test_schedule_covers_every_example_and_never_repeats_one_in_a_batch():
    examples = distcap.toy_world(0, 10, 0)[0]
    batches = list(distcap.schedule(examples, batch_size=4, steps=50, seed=1))
    assert len(batches) == 50 and all(len({index for index, _ in batch}) == 4 for batch in batches)
    seen = Counter(index for batch in batches for index, _ in batch)
    assert set(seen) == set(range(10)) and {reference for batch in batches for _, reference in batch} == set(range(5))
    assert batches == list(distcap.schedule(examples, 4, 50, 1)) != list(distcap.schedule(examples, 4, 50, 2))
    assert batches[:20] == list(distcap.schedule(examples, 4, 20, 1))  # a longer run begins like a shorter one


def test_rows_are_written_as_they_were_read(tmp_path):
    """One caption is a text, several are a list, and what else a row holds stays."""
    lines = [
        {"file_name": "a.png", "caption": "a dog", "licence": 3},
        {"file_name": "b \udcff.png", "caption": ["x", "y"]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "t.jsonl").write_text(text)
    distcap.write_rows(tmp_path / "t.jsonl", distcap.read_rows(tmp_path / "t.jsonl"))
    assert (tmp_path / "t.jsonl").read_text() == text


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(distcap.UserError, match=r"pipe\.png: cannot be read"):
        distcap.load_image(tmp_path / "pipe.png")


def test_a_folder_that_cannot_be_read_is_no_silence(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [path.name for path in distcap.find_images([str(tmp_path)])] == ["a.png", "closed"]
    with pytest.raises(distcap.UserError, match="closed: cannot be read"):
        distcap.load_image(tmp_path / "closed")


def test_write_text_replaces_the_file_or_leaves_it(tmp_path):
    target = tmp_path / "x.json"
    distcap.write_text(target, "old")
    with pytest.raises(UnicodeEncodeError):
        distcap.write_text(target, "\udcff")
    assert target.read_text() == "old"


def test_the_readmes_lines_turn_karpathys_splits_into_data_sets(tmp_path, monkeypatch):
    readme = (Path(distcap.__file__).parent / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    splits, images = ("train", "restval", "val", "test", "restval"), []
    for number, split in enumerate(splits):
        (tmp_path / "val2014").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val2014" / f"{number}.jpg")
        sentences = [{"raw": f"caption {k} of {number}", "tokens": []} for k in range(2)]
        images.append({"filepath": "val2014", "filename": f"{number}.jpg", "split": split, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = {split: distcap.read_examples(split) for split in ("train", "val", "test")}
    numbers = {split: [Path(example.image_id).stem for example in found[split]] for split in found}
    assert numbers == {"train": ["0", "1", "4"], "val": ["2"], "test": ["3"]}
    assert found["test"][0].references == ("caption 0 of 3", "caption 1 of 3")
    assert distcap.load_image(found["train"][1].image).size == (8, 8)
