"""Data sets in every form that distcap reads: true to form, imperfect, wrong, damaged at random.
`python tests/test_formats.py 5000` reads so many damaged files of each form."""

import csv
import io
import itertools
import json
import random
import re
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import distcap

# name -> split and captions; commas, quotes and other scripts are what tells the readers apart.
WORLD = {
    "1000268201_693b08cb0e.jpg": ("train", ["A child , in pink , climbs .", "She's up"]),
    "1001773457_577c3a7d70.jpg": ("restval", ['He says " hello " .', '"Quoted"', "Two\u2028dogs"]),
    "1002674143_1b742ab4b8.jpg": ("val", ["a café, 犬", "a café, 犬"]),
    "1003163366_44323f5815.jpg": ("test", ["# 3 | 4 = 7".replace("|", "/"), "a man"]),
}
IDS = {name: 790 + 30_000 * number for number, name in enumerate(WORLD)}


def lines(rows):
    return "".join(row + "\n" for row in rows)


def pairs(world):
    return [(name, text) for name, (_, captions) in world.items() for text in captions]


def table(rows):
    """As pandas writes it: quotes only where they are needed, doubled within."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def metadata_jsonl(world):
    rows = [
        {"file_name": name, "caption": captions, "split": split}
        for name, (split, captions) in world.items()
    ]
    return lines(json.dumps(row, ensure_ascii=False) for row in rows)


def metadata_csv(world):
    splits = [(name, world[name][0], text) for name, text in pairs(world)]
    return table([("file_name", "split", "text"), *splits])


def flickr8k(world):
    return table([("image", "caption"), *pairs(world)])


def flickr30k(world):
    """Its header and its columns have a space after each bar, and nothing is quoted."""
    numbers = [k for _, captions in world.values() for k in range(len(captions))]
    rows = [f"{name}| {k}| {text}" for k, (name, text) in zip(numbers, pairs(world))]
    return lines(["image_name| comment_number| comment", *rows])


def tokens(world):
    numbers = [k for _, captions in world.values() for k in range(len(captions))]
    return lines(f"{name}#{k}\t{text}" for k, (name, text) in zip(numbers, pairs(world)))


def coco(world):
    """The annotations are in no order, and the ids have gaps."""
    images = [
        {"license": 3, "file_name": name, "height": 427, "width": 640, "id": IDS[name]}
        for name in world
    ]
    annotations = [
        {"image_id": IDS[name], "id": 100 + number, "caption": text}
        for number, (name, text) in enumerate(pairs(world))
    ]
    annotations.sort(key=lambda each: (each["id"] % 2, each["id"]))
    info = {"description": "COCO 2017 Dataset", "year": 2017}
    whole = {"info": info, "licenses": [], "images": images, "annotations": annotations}
    return json.dumps(whole)


def karpathy(world):
    images = []
    for number, (name, (split, captions)) in enumerate(world.items()):
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 10 * number + k}
            for k, text in enumerate(captions)
        ]
        image = {"filepath": "val2014", "sentids": [], "filename": name, "imgid": number}
        images.append(image | {"split": split, "sentences": sentences, "cocoid": IDS[name]})
    return json.dumps({"images": images, "dataset": "coco"})


FILES = {
    "metadata.jsonl": metadata_jsonl,
    "metadata.csv": metadata_csv,
    "captions.txt": flickr8k,
    "results.csv": flickr30k,
    "Flickr8k.token.txt": tokens,
    "captions_val2014.json": coco,
    "dataset_coco.json": karpathy,
}


def make(folder, form, world=WORLD):
    """Write a data set of this form. Returns what a user would give to read it."""
    for name in world:
        (folder / name).touch()
    if form == "sidecars":
        for name, (_, captions) in world.items():
            (folder / name).with_suffix(".txt").write_text(lines(captions), encoding="utf-8")
        return folder
    (folder / form).write_text(FILES[form](world), encoding="utf-8")
    return folder if form.startswith("metadata") else folder / form


def read(data, *arguments, **options):
    """{name: captions} of the examples, and what was skipped."""
    skipped = []
    examples = distcap.read_examples(str(data), *arguments, skipped=skipped, **options)
    names = [example.image.name for example in examples]
    assert len(set(names)) == len(names)
    told = [(each.name, each.reason) for each in skipped]
    return {each.image.name: list(each.references) for each in examples}, told


def truth(world=WORLD, *splits):
    return {name: each for name, (split, each) in world.items() if not splits or split in splits}


every_form = pytest.mark.parametrize("form", [*FILES, "sidecars"])


@every_form
def test_the_same_pictures_and_captions_in_each_form_are_the_same_examples(form, tmp_path):
    data = make(tmp_path, form)
    found, skipped = read(data)
    # COCO's annotations are in an order of their own.
    assert {name: sorted(each) for name, each in found.items()} == {
        name: sorted(each) for name, each in truth().items()
    }
    assert list(found) == list(WORLD) and skipped == []
    if form != "captions_val2014.json":
        assert found == truth()
    for example in distcap.read_examples(str(data)):
        name = example.image.name
        assert example.image == tmp_path / name
        has_ids = form.endswith(".json")
        assert example.image_id == (str(IDS[name]) if has_ids else name)
        has_splits = form in ("metadata.jsonl", "metadata.csv", "dataset_coco.json")
        assert example.split == (WORLD[name][0] if has_splits else None)


@every_form
@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_windows_and_a_byte_order_mark_change_nothing(form, end, tmp_path):
    data = make(tmp_path, form)
    expected = read(data)
    for path in [*tmp_path.glob("*.txt"), *tmp_path.glob("*.[jc]s*")]:
        text = "\ufeff" + path.read_text(encoding="utf-8")
        path.write_bytes(text.replace("\n", end).encode())
    assert read(data) == expected
    assert not any("\r" in text for texts in expected[0].values() for text in texts)


@every_form
def test_pictures_may_be_elsewhere_or_not_be_needed(form, tmp_path):
    data = make(tmp_path, form)
    expected = read(data)[0]
    folder = tmp_path / "far" / "pictures"
    folder.mkdir(parents=True)
    for name in WORLD:
        (tmp_path / name).rename(folder / name)
    if form != "sidecars":  # whose pictures are the data
        assert read(data, str(folder))[0] == expected
        assert read(data, str(folder.parent))[0] == expected  # COCO's images are one folder down
        assert read(data, need_pictures=False)[0] == expected
        with pytest.raises(distcap.UserError, match=r"none of its 4 pictures.*--images"):
            read(data)


def test_a_name_that_may_be_two_pictures_is_refused(tmp_path):
    data = tmp_path / "metadata.jsonl"
    data.write_text('{"file_name": "x.png", "caption": "a dog"}')
    for folder in ("cats", "dogs"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "x.png")
    with pytest.raises(distcap.UserError, match=r"x.png: which picture is meant.*--images"):
        distcap.read_examples(str(data))
    assert len(distcap.read_examples(str(data), str(tmp_path / "dogs"))) == 1


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv", "dataset_coco.json"])
def test_splits_that_the_data_names(form, tmp_path):
    data = make(tmp_path, form)
    assert read(data, split="train")[0] == truth(WORLD, "train", "restval")
    for split in ("restval", "val", "test"):
        assert read(data, split=split)[0] == truth(WORLD, split)
    assert read(data, split="validation")[0] == read(data, split="dev")[0] == truth(WORLD, "val")
    with pytest.raises(distcap.UserError) as caught:
        read(data, split="trial")
    assert str(caught.value).startswith("trial: no picture is of this split")
    assert "restval, test, train, val" in str(caught.value)


@every_form
def test_a_split_may_be_a_file_of_names(form, tmp_path):
    """With or without suffix and folder, as the lists of Flickr8k, Flickr30k and COCO are."""
    data = make(tmp_path, form)
    first, second, third, _ = WORLD
    listed = tmp_path / "dev.split"
    listed.write_text(
        f"\ufeff{first}\r\n{Path(third).stem}\r\n\r\nval2014/{second}\r\nabsent.jpg\r\n"
    )
    found, skipped = read(data, split=str(listed))
    assert list(found) == [first, second, third]  # in the order of the data
    assert skipped == [("absent.jpg", f"in {listed}, but not in the data")]
    listed.write_text("nothing\n")
    with pytest.raises(distcap.UserError, match=r"dev\.split: no picture is of this split"):
        read(data, split=str(listed))


def test_a_list_that_could_mean_two_pictures_is_refused(tmp_path):
    """The id of one picture is the file name of another."""
    world = {"2.jpg": ("train", ["one"]), "1.jpg": ("train", ["two"])}
    rows = [{"file_name": f"{3 - k}.jpg", "image_id": k, "caption": "x"} for k in (1, 2)]
    make(tmp_path, "metadata.jsonl", world)
    (tmp_path / "metadata.jsonl").write_text(lines(map(json.dumps, rows)))
    (tmp_path / "list").write_text("2.jpg\n")
    assert list(read(tmp_path, split=str(tmp_path / "list"))[0]) == ["2.jpg"]
    (tmp_path / "list").write_text("\n2\n")
    with pytest.raises(distcap.UserError, match="list:2: '2' is the name of 2 pictures"):
        read(tmp_path, split=str(tmp_path / "list"))


def test_names_that_are_equal_but_for_their_folder(tmp_path):
    """A list may name them with their folder; without it, two pictures fit."""
    for name in ("s/1.jpg", "t/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    rows = [
        {"file_name": name, "caption": name, "image_id": name} for name in ("s/1.jpg", "t/1.jpg")
    ]
    (tmp_path / "metadata.jsonl").write_text(lines(map(json.dumps, rows)))
    listed = tmp_path / "list"
    for name in ("s/1.jpg", "s/1", f"{tmp_path.name}/s/1.jpg"):
        listed.write_text(f"{name}\n")
        (found,) = distcap.read_examples(str(tmp_path), split=str(listed))
        assert found.references == ("s/1.jpg",)
    listed.write_text("1.jpg\n")
    with pytest.raises(distcap.UserError, match="name of 2 pictures"):
        read(tmp_path, split=str(listed))


def test_a_missing_picture_is_not_replaced_by_one_of_another_folder(tmp_path):
    for name in ("test/1.jpg", "train/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    rows = [{"file_name": f"train/{n}.jpg", "caption": "a dog"} for n in (1, 2)]
    (tmp_path / "metadata.jsonl").write_text(lines(map(json.dumps, rows)))
    found, skipped = read(tmp_path)
    assert list(found) == ["2.jpg"]
    assert skipped == [(str(tmp_path / "train/1.jpg"), "no such picture")]


def test_splits_are_known_however_they_are_spelled(tmp_path):
    spelled = ["Train", "valid", "Validation", "TEST", "dev", ""]
    rows = [
        {"file_name": f"{n}.jpg", "caption": "x", "split": part} for n, part in enumerate(spelled)
    ]
    (tmp_path / "metadata.jsonl").write_text(lines(map(json.dumps, rows)))
    found = distcap.read_examples(str(tmp_path), need_pictures=False)
    assert [each.split for each in found] == ["train", "val", "val", "test", "val", None]
    for name, count in (("valid", 3), ("Test", 1)):
        found = distcap.read_examples(str(tmp_path), split=name, need_pictures=False)
        assert len(found) == count


def test_a_picture_is_in_one_split(tmp_path):
    """What one row leaves open another may say, but not something else."""
    text = "file_name,split,caption\na.jpg,{},a dog\na.jpg,test,the dog\n"
    (tmp_path / "metadata.csv").write_text(text.format(""))
    (found,) = distcap.read_examples(str(tmp_path), need_pictures=False)
    assert found.split == "test" and found.references == ("a dog", "the dog")
    (tmp_path / "metadata.csv").write_text(text.format("train"))
    with pytest.raises(distcap.UserError, match=r"a\.jpg: in two splits, test and train; keep one"):
        distcap.read_examples(str(tmp_path), need_pictures=False)


def test_a_split_is_read_without_the_pictures_of_the_others(tmp_path):
    """COCO's test pictures are of val2014: nobody needs train2014 to evaluate on them."""
    data = make(tmp_path, "dataset_coco.json")
    first = next(iter(WORLD))
    (tmp_path / first).unlink()
    assert read(data, split="test") == (truth(WORLD, "test"), [])
    assert read(data)[1] == [(str(tmp_path / "val2014" / first), "no such picture")]


@every_form
def test_missing_pictures_and_empty_captions_are_skipped_by_name(form, tmp_path):
    whole, bare, partly, missing = WORLD
    world = dict(WORLD)
    world[bare] = ("val", [""])
    world[partly] = ("val", ["a cat", " "])
    data = make(tmp_path, form, world)
    (tmp_path / missing).unlink()
    found, skipped = read(data)
    assert found == {whole: WORLD[whole][1], partly: ["a cat"]}
    reasons = {Path(name).name: reason for name, reason in skipped}
    if form == "sidecars":  # blank lines are no captions, and no picture is known to be missing
        assert reasons == {bare: "an empty caption"}
    else:
        empty = dict.fromkeys([bare, partly], "an empty caption")
        assert reasons == empty | {missing: "no such picture"}
    assert len(skipped) == len(reasons)


def test_the_broken_row_of_flickr30k_is_skipped_and_told(tmp_path):
    """A separator is missing in the file as it is distributed."""
    world = {"2199200615.jpg": ("train", ["Two dogs .", "A dog ."])}
    data = make(tmp_path, "results.csv", world)
    with open(data, "a") as file:
        file.write("2199200615.jpg| 4   A dog runs across the grass .\n")
    found, skipped = read(data)
    assert found == truth(world)
    assert skipped == [(str(tmp_path / "2199200615.jpg"), "an empty caption")]


def test_an_image_of_coco_without_annotations_is_skipped_and_told(tmp_path):
    data = make(tmp_path, "captions_val2014.json")
    content = json.loads(data.read_text())
    first, *others = WORLD
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != IDS[first]]
    data.write_text(json.dumps(content))
    found, skipped = read(data)
    assert list(found) == others
    assert skipped == [(str(tmp_path / first), "an empty caption")]


def test_a_picture_under_two_names_is_one_in_every_split(tmp_path):
    """Else it could be learned from under one name, and tested under the other."""
    (tmp_path / "a.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    names = {"a.png": "train", "./a.png": "", f"../{tmp_path.name}/a.png": "train", "link.png": ""}
    rows = [{"file_name": k, "split": v, "caption": f"x{v}"} for k, v in names.items()]
    (tmp_path / "metadata.jsonl").write_text(lines(map(json.dumps, rows)))
    (example,) = distcap.read_examples(str(tmp_path))
    assert example.references == ("xtrain", "x", "xtrain", "x")
    assert example.image_id == "a.png" and example.split == "train"
    with pytest.raises(distcap.UserError, match="no picture is of this split"):
        distcap.read_examples(str(tmp_path), split="test")


def test_folders_in_names_are_passed_over_only_where_that_is_clear(tmp_path):
    """cats/1.jpg and dogs/1.jpg must not both be found as 1.jpg."""
    (tmp_path / "1.jpg").touch()
    (tmp_path / "2.jpg").touch()
    rows = [("file_name", "caption"), ("cats/1.jpg", "a"), ("dogs/1.jpg", "b"), ("val/2.jpg", "c")]
    (tmp_path / "metadata.csv").write_text(table(rows))
    found, skipped = read(tmp_path)
    assert found == {"2.jpg": ["c"]}
    assert [name for name, _ in skipped] == [
        str(tmp_path / "cats/1.jpg"),
        str(tmp_path / "dogs/1.jpg"),
    ]


def test_the_readmes_table_of_forms_is_true(tmp_path):
    readme = (Path(distcap.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| form |") :].split("\n\n")[0]
    names = []
    for number, row in enumerate(table.split("\n")[2:]):
        form, _, content = row.strip("| ").split(" | ")
        names.append(re.search("`(.+?)`", form)[1])
        text = lines(re.findall("`(.+?)`", content)).replace(r"\|", "|").replace("⇥", "\t")
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.jpg").touch()
        (folder / names[-1]).write_text(text)
        data = folder if form.startswith("folder") else folder / names[-1]
        assert read(data) == ({"a.jpg": ["a dog"]}, [])
    assert len(set(names)) == len(FILES) + 1


def test_an_id_of_zero_is_an_id(tmp_path):
    row = {"file_name": "a.png", "image_id": 0, "caption": "x", "scene": [3]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (example,) = distcap.read_examples(str(tmp_path), need_pictures=False)
    assert example.image_id == "0" and example.scene is None  # a scene of somebody else's


FIRST, SECOND = list(WORLD)[:2]
COCO, KARPATHY, TOKENS = "captions_val2014.json", "dataset_coco.json", "Flickr8k.token.txt"
HAS_ID = '"image_id": 790'
CHANGED = [
    # form, what is exchanged in it, the line that is named, what it says
    ("metadata.jsonl", "}", "", ":1", "not JSON"),
    ("metadata.jsonl", "\n", " ", ":1", "not JSON"),
    ("metadata.jsonl", f'"{SECOND}"', "null", ":2", "no file_name"),
    ("metadata.jsonl", f'"{SECOND}"', '"a\\u0000"', ":2", "no file_name"),
    ("metadata.jsonl", f'"{SECOND}"', '"\\ud800"', ":2", "not text"),
    ("metadata.jsonl", '"restval"', "[1]", ":2", "split must be"),
    ("metadata.jsonl", '"split"', '"image_id": 0.5, "split"', ":1", "image_id must be"),
    ("metadata.jsonl", '"caption": [', '"caption": {"en": "up"}, "x": [', ":1", "caption must be"),
    ("metadata.csv", '"A child', "A child", ":2", "5 columns, but 3"),
    ("metadata.csv", 'climbs ."', "climbs .", ":2", "not a whole line"),
    ("metadata.csv", "file_name", "fil", "", "begins with 'fil.*looked for metadata"),
    ("metadata.csv", FIRST, "", ":2", "no file_name"),
    ("captions.txt", 'climbs ."', "climbs .", ":2", "not a whole line"),
    ("captions.txt", "up\n", "up ", ":3", "not a whole line|3 columns"),
    ("captions.txt", "café", "caf\udce9", ":7", "not UTF-8"),
    ("captions.txt", "up", "u" * 200_000, ":3", "not a whole line"),
    ("results.csv", "up\n", "up ", ":3", "5 columns, but 3"),
    (TOKENS, "#1\t", "#1 ", ":2", "not `name#number`"),
    (TOKENS, "up\n", "up ", ":2", "not `name#number`"),
    (COCO, "}]", "}", ":1", "not JSON"),
    (COCO, HAS_ID, '"image_id": 791', "", r"annotations\[0\].*image_id of one.*791"),
    (COCO, HAS_ID, '"image_id": true', "", r"annotations\[0\].*image_id of one.*True"),
    (COCO, HAS_ID, '"image_id": [790]', "", r"annotations\[0\].*image_id of one.*\[790\]"),
    (COCO, ' "id": 790', ' "id": 1.5', "", r"images\[0\].*id 1.5"),
    (COCO, ' "id": 30790', ' "id": 790', "", r"images\[1\].*an id of its own.*790"),
    (COCO, '"caption"', '"bbox"', "", r"annotations\[0\].*and a caption"),  # instances_*.json
    (COCO, '"She\'s up"', '{"en": "up"}', "", "image 790: caption must be"),
    (COCO, '"annotations"', '"notes"', "", r"images\[0\]: no sentences"),  # image_info_*.json
    (COCO, '"annotations": [', '"annotations": {"image_id": 3}, "x": [', "", "must be a list"),
    (COCO, '"images": [', '"images": 3, "x": [', "", "without a list of images"),
    (KARPATHY, '"raw"', '"txt"', "", r"images\[0\]: no sentences with raw texts"),
    (KARPATHY, '"sentences": [', '"sentences": {"raw": "x"}, "x": [', "", r"images\[0\]: no sent"),
    (KARPATHY, f'"{SECOND}"', "5", "", r"images\[1\]: no sentences"),
    (KARPATHY, '"raw": "She\'s up"', '"raw": {"en": "x"}', "", r"images\[0\]: caption must"),
    (KARPATHY, '"restval"', "2", "", r"images\[1\]: split must"),
]
OTHER = [
    # file name, its content, the line that is named, what it says
    ("metadata.jsonl", "[1]\n", ":1", "not a JSON object"),
    ("metadata.jsonl", "[" * 100_000, ":1", "not JSON that can be read"),
    ("metadata.jsonl", '{"file_name": ' + "7" * 5000 + "}", ":1", "not JSON that can be read"),
    ("captions.json", '{"images": [],\n\n "annotations": }', ":3", "not JSON"),
    (
        "results.json",
        '[{"image_id": 790, "caption": "a dog"}]',
        "",
        "JSON without a list of images",
    ),
    ("captions.txt", "x" * 200_000, "", "begins with 'xxx.*looked for metadata"),
    ("captions.txt", "\n \n", "", "empty; looked for"),
]


@pytest.mark.parametrize(("form", "old", "new", "place", "complaint"), CHANGED)
def test_what_is_wrong_is_one_line_that_names_the_place(form, old, new, place, complaint, tmp_path):
    data = make(tmp_path, form)
    text = (tmp_path / form).read_text(encoding="utf-8")
    assert old in text
    changed = text.replace(old, new, 1).encode("utf-8", "surrogateescape")
    refuse(tmp_path / form, changed, place, complaint, data)


@pytest.mark.parametrize(("name", "content", "place", "complaint"), OTHER)
def test_what_is_no_data_set_is_refused_in_one_line(name, content, place, complaint, tmp_path):
    refuse(tmp_path / name, content.encode(), place, complaint, tmp_path / name)


def refuse(path, content, place, complaint, data):
    """Read the data, one file of which has this content; check what is said of it."""
    path.write_bytes(content)
    with pytest.raises(distcap.UserError) as caught:
        read(data)
    message = str(caught.value)
    assert message.startswith(f"{path}{place}: ") and "\n" not in message
    assert re.search(complaint, message)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_line_that_is_named_is_the_one_an_editor_shows(end, tmp_path):
    make(tmp_path, "sidecars")
    sidecar = (tmp_path / FIRST).with_suffix(".txt")
    sidecar.write_bytes(f"one{end}two{end}".encode() + b"\xe9" + end.encode())
    with pytest.raises(distcap.UserError, match=re.escape(f"{sidecar}:3: not UTF-8")):
        read(tmp_path)
    data = tmp_path / "captions.txt"
    data.write_bytes(end.join(["image,caption", "", "a.jpg,x", "a.jpg,x,y"]).encode())
    with pytest.raises(distcap.UserError, match=re.escape(f"{data}:4: 3 columns")):
        read(data)


def test_quotes_are_words_of_a_caption_between_bars(tmp_path):
    (tmp_path / "a.jpg").touch()
    text = 'image_name|comment\na.jpg|"Hello" it says\na.jpg|"Open\n'
    (tmp_path / "results.csv").write_text(text)
    assert read(tmp_path / "results.csv")[0] == {"a.jpg": ['"Hello" it says', '"Open']}


@every_form
def test_blanks_around_captions_are_no_part_of_them(form, tmp_path):
    """Some of COCO's end in a line break."""
    blanks = " \n" if form.endswith("json") else " "
    world = {
        name: (split, [text + blanks for text in each]) for name, (split, each) in WORLD.items()
    }
    found = read(make(tmp_path, form, world))[0]
    assert {name: sorted(each) for name, each in found.items()} == {
        name: sorted(each) for name, each in truth().items()
    }


def test_a_folder_of_nothing_known_says_what_was_found_and_looked_for(tmp_path):
    for name in WORLD:
        (tmp_path / name).touch()
    (tmp_path / "captions.txt").write_text("image,caption\n")
    with pytest.raises(
        distcap.UserError, match=r"a folder with 4 pictures and no captions.*looked"
    ):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        distcap.UserError, match=r"a folder with 0 pictures and no captions.*looked"
    ):
        read(tmp_path / "empty")


def test_the_quoted_header_of_a_table_is_known(tmp_path):
    """As R and Excel write it."""
    (tmp_path / "a.png").touch()
    (tmp_path / "t.csv").write_text('"Image","Caption"\n"a.png","a ""red"" dog"\n')
    assert read(tmp_path / "t.csv")[0] == {"a.png": ['a "red" dog']}


# ---- Damage at random ----------------------------------------------------------------------------
# Each caption holds a mark that names its picture, with a checksum: a damaged mark counts for none.
MARK = re.compile(r"(p\d\.jpg)/(\d)/\w{8}")
JUNK = b'\0 \r \n \r\n " "" \' , | \t #0\t { } [ ] \\ \xff \xef\xbb\xbf \xe2\x80\xa8 \xed\xa0\x80'
JUNK = [*JUNK.split(b" "), b" ", b"\\ud800", b"null", b"true", b"NaN", b"-1", b"1e999", b"7" * 5000]
JUNK += [b"[" * 3000, b'["a dog"]', b'{"en": "a dog"}', b'"image_id": 222222, ', b"p1.jpg"]
VALUES = [
    None,
    True,
    0,
    -1,
    0.5,
    10**30,
    "",
    "a dog",
    "\0",
    "a\nb",
    "\ud800",
    "p1.jpg",
    "../p1.jpg",
]
VALUES += [
    [],
    ["a dog"],
    [["a dog"]],
    [None],
    {},
    {"en": "a dog"},
    {"raw": "a dog"},
    "p" * 5000,
]


def mark(name, k):
    return f"{name}/{k}/{zlib.crc32(f'{name}{k}'.encode()):08x}"


MARKED = {}
for number in range(5):
    name = f"p{number}.jpg"
    texts = [f'a "{"fine, " * (k == 1)}dog" {mark(name, k)} é' for k in range(3)]
    MARKED[name] = (["train", "val", "test"][number % 3], texts)
    IDS[name] = 111_111 * (number + 1)
RECORDS = {(name, k) for name in MARKED for k in range(3)}


def marks(text):
    """The records whose marks are in a text, whole."""
    found = [(name, int(k)) for name, k in MARK.findall(text)]
    return [each for each in found if mark(*each) in text]


def stretches(form, data, record):
    """The parts of the data that say a record, as pairs of start and end, of which nothing may be
    changed if it is to be read. What happens elsewhere must not change how it is read."""
    name, at = record[0], data.index(mark(*record).encode())
    if form == COCO:
        image = data.index(f'"{name}"'.encode())
        return [(data.rindex(b"{", 0, each), data.index(b"}", each) + 1) for each in (at, image)]
    if form == KARPATHY:
        end = data.find(b'{"filepath"', at)
        return [(data.rindex(b'{"filepath"', 0, at), end if end > 0 else len(data))]
    # A line, and the ends of the one before and of its own. -1 and len(data) stand for the file's.
    return [(data.rfind(b"\n", 0, at), data.index(b"\n", at) + 1)]


def damage_bytes(form, data, rng):
    """The data with some bytes changed, lost, doubled, moved or put in, and the records hit."""
    cells = [(None, -1), *zip(data, range(len(data))), (None, len(data))]  # byte, where it was
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(1, len(cells))
        end = min(at + rng.choice([1, 1, 2, 5, 20, 100]), len(cells) - 1)
        piece = cells[at:end]
        kind = rng.choice(["flip", "lose", "double", "move", "insert", "exchange", "cut"])
        if kind in ("lose", "move", "exchange"):
            del cells[at:end]
        if kind == "flip":
            cells[at:end] = [(byte ^ 1 << rng.randrange(8), None) for byte, _ in piece]
        elif kind == "double":
            cells[at:at] = piece
        elif kind == "move":
            to = rng.randrange(1, len(cells))
            cells[to:to] = piece
        elif kind in ("insert", "exchange"):
            cells[at:at] = [(byte, None) for byte in rng.choice(JUNK)]
        elif kind == "cut" and rng.random() < 0.3:
            del cells[at:-1]

    # A stretch is whole if each of its bytes is there once, and followed by the next.
    places = [place for _, place in cells if place is not None]
    once = {place for place, count in Counter(places).items() if count == 1}
    pairs = itertools.pairwise(place for _, place in cells)
    followed = {one for one, two in pairs if one in once and two == one + 1}
    hit = set()
    for record in RECORDS:
        if mark(*record).encode() in data:  # else another sidecar's
            parts = stretches(form, data, record)
            if not all(followed.issuperset(range(start, end - 1)) for start, end in parts):
                hit.add(record)
    return bytes(byte for byte, _ in cells if byte is not None), hit


def paths(value, path=()):
    """Where everything is within a JSON value."""
    parts = {list: enumerate, dict: dict.items}.get(type(value), lambda _: ())(value)
    return [path] + [each for key, part in parts for each in paths(part, (*path, key))]


def follow(value, path):
    for key in path:
        value = value[key]
    return value


def damage_types(form, data, rng):
    """JSON with a value exchanged for one of another type, and the records hit."""
    rows = [json.loads(line) for line in data.decode().splitlines()]
    path = rng.choice(paths(rows)[1:])
    depth = 1 if form == "metadata.jsonl" else 3  # of the objects that say a record
    said = json.dumps(follow(rows, path[:depth])) if len(path) >= depth else data.decode()
    hit = {each for each in RECORDS if mark(*each) in said or f'"{each[0]}"' in said}
    follow(rows, path[:-1])[path[-1]] = rng.choice(VALUES)
    return lines(map(json.dumps, rows)).encode(), hit


def read_damaged(data, hit, **options):
    """Was it read? Nothing but a UserError may be raised, and nothing be paired wrongly."""
    skipped = []
    try:
        examples = distcap.read_examples(str(data), skipped=skipped, **options)
    except distcap.UserError as error:
        assert "\n" not in str(error)
        return False
    found = dict.fromkeys(MARKED, ())
    for name, texts in [(each.image.name, each.references) for each in examples]:
        found[name] = found.get(name, ()) + texts  # a name may have been given a folder
        for text in texts:
            assert isinstance(text, str) and text not in ("en", "raw")
            assert all(each[0] == name or each in hit for each in marks(text)), (name, text)
    told = {Path(each.name).name for each in skipped}
    for name, k in RECORDS - hit:  # what was not hit is read as it was, or told
        assert MARKED[name][1][k] in found[name] or name in told, (name, k)
    return True


def fuzz(form, folder, seeds):
    """Read the form with each damage. Returns how many of the files were read."""
    data = make(folder, form, MARKED)
    target = folder / ("p2.txt" if form == "sidecars" else form)
    whole = target.read_bytes()
    count = 0
    for seed in seeds:
        rng = random.Random(seed)
        types = "json" in form and rng.random() < 0.5
        content, hit = (damage_types if types else damage_bytes)(form, whole, rng)
        target.write_bytes(content)
        try:
            count += read_damaged(data, hit)
            read_damaged(data, hit, need_pictures=False)
        except BaseException:
            print(f"seed {seed}: {content!r}", file=sys.stderr)
            raise
    return count


@every_form
def test_damaged_files_are_read_rightly_or_refused(form, tmp_path):
    assert 5 < fuzz(form, tmp_path, range(60)) < 60  # else the damage tests nothing


if __name__ == "__main__":
    seeds = range(int(sys.argv[1]))
    for form in [*FILES, "sidecars"]:
        with tempfile.TemporaryDirectory() as folder:
            count = fuzz(form, Path(folder), seeds)
            print(f"{form:24} {count:6} of {len(seeds)} read, the others refused")
