"""Pictures, data sets, the schedule, and reading ahead."""

import json
import os
import pickle
import shutil
import signal

import numpy
import pytest
import torch
from PIL import Image

import distcap


def test_examples_survive_a_round_trip_through_a_folder(tmp_path):
    examples = distcap.toy_world(0, 3, 0)[0]
    read = distcap.write_examples(tmp_path / "data", examples)
    assert [(e.references, e.scene) for e in read] == [(e.references, e.scene) for e in examples]
    for old, new in zip(examples, read):
        assert distcap.load_image(new.image).tobytes() == old.image.tobytes()  # PNG loses nothing


def write_metadata(folder, *lines):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    text = "\n".join(lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    return str(folder)


def test_metadata_captions_are_a_string_or_a_list(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    rows = [
        {"file_name": "a.png", "caption": "a dog\u2028runs"},
        {"file_name": "b.png", "caption": ["x", "y"]},
        {"file_name": "a.png", "caption": "again", "scene": "kitchen"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    read = distcap.read_examples(write_metadata(tmp_path, *lines, ""))
    references = [example.references for example in read]
    assert references == [("a dog\u2028runs", "again"), ("x", "y")]  # each picture once
    assert read[0].image == tmp_path / "a.png"
    assert read[0].scene is None  # a scene is one of the toy world, or none


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: not a JSON object"),
        ('{"caption": "a dog"}', "no file_name"),
        ('{"file_name": 7, "caption": "a dog"}', "no file_name"),
        ('{"file_name": "a.png", "caption": [1]}', "caption must be"),
        ('{"file_name": "a.png", "caption": {"en": "a dog"}}', "caption must be"),
        ('{"file_name": "a.png", "caption": "caf\udce9"}', "UTF-8"),
        ('{"file_name": "a.png", "caption": "caf\\udce9"}', "not text"),
    ],
)
def test_a_bad_line_of_metadata_is_named(tmp_path, line, complaint):
    folder = write_metadata(tmp_path, '{"file_name": "a.png", "caption": "fine"}', line)
    with pytest.raises(distcap.UserError, match=complaint) as caught:
        distcap.read_examples(folder)
    message = str(caught.value)
    assert "metadata.jsonl:2" in message
    assert str(tmp_path / "metadata.jsonl") in message and "\n" not in message


def test_a_byte_order_mark_is_passed_over(tmp_path):
    """Windows' editors put one before a text."""
    folder = write_metadata(tmp_path, "\ufeff" + '{"file_name": "a.png", "caption": "a dog"}')
    assert distcap.read_examples(folder)[0].references == ("a dog",)


def test_a_picture_under_two_names_is_one_picture(tmp_path):
    """Else it could be learned from under one name, and tested under the other."""
    rows = [{"file_name": name, "caption": "x"} for name in ("a.png", "./a.png")]
    (example,) = distcap.read_examples(write_metadata(tmp_path, *map(json.dumps, rows)))
    assert example.references == ("x", "x")


def test_a_data_set_without_metadata_or_without_lines_is_refused(tmp_path):
    with pytest.raises(distcap.UserError, match="nowhere: no such file or folder"):
        distcap.read_examples(str(tmp_path / "nowhere"))
    with pytest.raises(distcap.UserError, match="no pictures with captions"):
        distcap.read_examples(write_metadata(tmp_path))


def picture(mode):
    """A left half of full and a right half of no intensity, in any mode."""
    values = numpy.array([[255, 0]], dtype=numpy.uint8)
    grey = Image.fromarray(values.repeat(8, axis=1).repeat(8, axis=0))
    return grey.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", "1 L P RGB RGBA LA CMYK YCbCr HSV I I;16 F".split())
def test_pictures_of_every_mode_become_rgb(mode):
    if mode in ("I", "I;16"):
        image = Image.fromarray(numpy.asarray(picture("L")).astype(numpy.uint16) * 257)
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


def test_a_deep_picture_that_uses_a_part_of_its_range_is_stretched_to_all_of_it():
    """A camera's 12 bits, a scanner's window, a mask of zeros and ones; and a pixel that is stuck,
    or no number at all, decides nothing."""

    def shown(values, dtype):
        grey = distcap.load_image(Image.fromarray(numpy.asarray(values, dtype)))
        return numpy.asarray(grey)[..., 0].astype(int)

    ramp = numpy.linspace(0, 1, 4096).reshape(64, 64)
    wanted = shown(ramp * 255, numpy.float32)
    assert (wanted.min(), wanted.max()) == (0, 255) and wanted[1, 0] == 4
    for values in (ramp * 4095, 30000 + ramp * 1000):
        stuck = values.copy()
        stuck[0, 0] = 65535
        assert abs(shown(values, numpy.uint16) - wanted).max() <= 2
        assert abs(shown(stuck, numpy.uint16) - wanted)[1:].max() <= 2
    board = numpy.indices((8, 8)).sum(axis=0) % 2
    assert (shown(board, numpy.uint16) == 255 * board).all()
    floats = 2 * ramp - 1
    floats[0, :2] = 1e9, numpy.nan
    assert abs(shown(floats, numpy.float32) - wanted)[1:].max() <= 2
    stars = numpy.zeros((64, 64))
    stars[5, 5] = 60000
    assert shown(stars, numpy.uint16).max() > 200
    assert (shown(100 + 0 * ramp, numpy.uint16) == 100).all()  # nothing to stretch


def test_transparency_is_white_and_exif_rotation_is_applied(tmp_path):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.putpixel((3, 3), (255, 0, 0, 255))
    half.save(tmp_path / "half.png")
    assert distcap.load_image(tmp_path / "half.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpixel((3, 3), 1)
    palette.save(tmp_path / "half.gif", transparency=0)
    assert distcap.load_image(tmp_path / "half.gif").getpixel((0, 0)) == (255, 255, 255)
    # Transparent all over, it would be a white sheet: what it hides is shown.
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert distcap.load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 0, 0)
    grey = Image.fromarray(numpy.array([[0, 300], [40000, 65535]], numpy.uint16))
    grey.save(tmp_path / "deep.png", transparency=300)
    assert distcap.load_image(tmp_path / "deep.png").getpixel((1, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (10, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert distcap.load_image(tmp_path / "turned.jpg").size == (20, 10)


def test_broken_pictures_raise(tmp_path):
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64), numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("truncated.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(distcap.UserError, match=f"{name}: cannot be read"):
            distcap.load_image(tmp_path / name)


def test_find_images_takes_files_and_folders_in_order_each_once(tmp_path):
    hidden = (".hidden.png", ".cache/d.png", "film.mp4")
    for name in ("b.JPG", "a.png", "deep/c.webp", "notes.txt", *hidden, "deep/e.TIFF"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "round").symlink_to(tmp_path)  # a folder that holds itself
    found = distcap.find_images([str(tmp_path / "b.JPG"), str(tmp_path)])
    assert [path.name for path in found] == ["b.JPG", "a.png", "c.webp", "e.TIFF"]
    shallow = distcap.find_images([str(tmp_path)], recursive=False)
    assert [path.name for path in shallow] == ["a.png", "b.JPG"]
    notes = []
    distcap.find_images([str(tmp_path)], notes=notes)
    assert notes == [
        f"{tmp_path}/deep/round: a link to a folder, not followed",
        "files passed over, not pictures by their suffix: 1 .mp4",
    ]
    named = distcap.find_images([str(tmp_path / ".hidden.png"), str(tmp_path / "notes.txt")])
    assert [path.name for path in named] == [".hidden.png", "notes.txt"]  # what is named is meant


def test_schedule_covers_every_example_and_never_repeats_one_in_a_batch():
    """Twice in a batch, an example would be its own rival in Eq. 6."""
    examples = distcap.toy_world(0, 10, 0)[0]
    batches = distcap.schedule(examples, size=4, steps=50, seed=1)
    assert len(batches) == 50
    assert all(len({row for row, _ in batch}) == len(batch) == 4 for batch in batches)
    assert {row for batch in batches for row, _ in batch} == set(range(10))
    assert {which for batch in batches for _, which in batch} == set(range(5))
    assert batches == distcap.schedule(examples, 4, 50, 1) != distcap.schedule(examples, 4, 50, 2)
    assert batches[:20] == distcap.schedule(examples, 4, 20, 1)  # a longer run begins alike


def test_rows_are_written_whole(tmp_path):
    """Whatever a name holds, and what else a row has."""
    table = tmp_path / "t.jsonl"
    lines = [
        {"file_name": "a.png", "caption": ["a dog"], "licence": 3},
        {"file_name": "b \udcff.png", "caption": ["x", "y"]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    distcap.write_rows(table, {line.pop("file_name"): line for line in lines})
    assert table.read_text() == text


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


@pytest.fixture(scope="module")
def on_disk(world, tmp_path_factory):
    """Examples whose pictures are files."""
    return distcap.write_examples(tmp_path_factory.mktemp("data"), world[:20])


def broken_copy(examples, row, folder):
    """The same examples, but that one of the pictures is none."""
    read = distcap.write_examples(folder, examples)
    read[row].image.write_text("no picture")
    return read


def read(dataset, order, workers):
    return list(distcap.read_ahead(dataset, order, workers))


def test_worker_processes_give_the_same_batches_in_the_same_order(on_disk, captioner):
    dataset = distcap.CaptionDataset(on_disk, captioner.pixels)
    order = distcap.schedule(on_disk, 6, 9, seed=3)
    alone, helped = read(dataset, order, 0), read(dataset, order, 2)
    assert len(alone) == len(helped) == 9
    for one, two, pairs in zip(alone, helped, order):
        rows = [row for row, _ in pairs]
        texts = [on_disk[row].references[which] for row, which in pairs]
        assert one.index.tolist() == two.index.tolist() == rows
        assert one.ground_truth == two.ground_truth == texts
        assert torch.equal(one.pixels, two.pixels)
        assert torch.equal(
            one.pixels, captioner.pixels(map(distcap.load_image, images(on_disk, rows)))
        )


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shares memory in another way")
@pytest.mark.parametrize("megabytes", [64, 4096])
def test_where_little_memory_can_be_shared_batches_are_sent(
    megabytes, on_disk, captioner, monkeypatch
):
    """In a container /dev/shm may hold less than two batches, and waiting would never end."""
    usage = shutil.disk_usage("/")._replace(total=megabytes * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    dataset = distcap.CaptionDataset(on_disk, captioner.pixels)
    order = distcap.schedule(on_disk, 6, 3, seed=3)
    for one, two in zip(read(dataset, order, 0), read(dataset, order, 2)):
        assert two.pixels.is_shared() == (megabytes > 64)
        assert torch.equal(one.pixels, two.pixels)


def images(examples, rows):
    return [examples[row].image for row in rows]


def test_pictures_in_memory_and_on_disk_make_the_same_batches(world, on_disk, captioner):
    order = distcap.schedule(on_disk, 6, 3, seed=3)
    memory = read(distcap.CaptionDataset(world[:20], captioner.pixels), order, 0)
    disk = read(distcap.CaptionDataset(on_disk, captioner.pixels), order, 0)
    for one, two in zip(memory, disk, strict=True):
        assert torch.equal(one.pixels, two.pixels) and one.ground_truth == two.ground_truth


def test_worker_processes_prepare_the_same_pictures(world, on_disk, captioner, clip, tmp_path):
    """For the captioner and for CLIP, the last batch being smaller, and one picture broken."""
    pictures = images(broken_copy(world[:20], 7, tmp_path), range(20))
    batches = distcap.PictureBatches(pictures, [captioner.pixels, clip.pixels], 6)
    alone, helped = (read(batches, range(len(batches)), workers) for workers in (0, 2))
    assert [len(each.failures) for each in alone] == [6, 6, 6, 2]
    assert [len(each.pixels[0]) for each in alone] == [6, 5, 6, 2]
    for one, two in zip(alone, helped, strict=True):
        assert list(map(str, one.failures)) == list(map(str, two.failures))
        assert all(torch.equal(*pair) for pair in zip(one.pixels, two.pixels, strict=True))
    failure = alone[1].failures[1]
    assert isinstance(failure, distcap.UserError) and str(pictures[7]) in str(failure)
    with pytest.raises(distcap.UserError, match=r"cannot be read"):
        clip.embed_images(pictures)  # without a list for failures


def test_a_batch_of_nothing_but_broken_pictures_is_all_failures(tmp_path, captioner):
    missing = [tmp_path / "1.png", tmp_path / "2.png"]
    batch = distcap.PictureBatches(missing, [captioner.pixels], 2)[0]
    assert (
        batch.pixels == [] and [str(tmp_path) in str(each) for each in batch.failures] == [True] * 2
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_training_picture_is_the_same_error_from_a_worker(
    workers, world, captioner, tmp_path
):
    """What a worker process raises is wrapped in its traceback, as a text of twenty lines."""
    examples = broken_copy(world[:8], 5, tmp_path)
    dataset = distcap.CaptionDataset(examples, captioner.pixels)
    order = [[(0, 0), (1, 0)], [(2, 0), (3, 0)], [(4, 0), (5, 0)], [(6, 0), (7, 0)]]
    batches = distcap.read_ahead(dataset, order, workers)
    assert [next(batches).index.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(distcap.UserError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"{examples[5].image}: cannot be read (cannot identify")
    assert "\n" not in str(caught.value)


def test_pictures_in_memory_are_prepared_once(world, captioner):
    """The toy world's 8,000 pictures were prepared anew in every batch: half of a step's time."""
    counts = []

    def prepare(pictures):
        counts.append(len(pictures))
        return captioner.pixels(pictures)

    examples = (world * 10)[:300]
    dataset = distcap.CaptionDataset(examples, prepare)
    assert counts == [256, 44]
    for batch in read(dataset, distcap.schedule(examples, 6, 5, seed=0), 0):
        wanted = captioner.pixels(images(examples, batch.index))
        assert torch.equal(batch.pixels, wanted)
    assert counts == [256, 44]


def test_a_worker_can_be_given_what_it_needs_without_the_models(on_disk, captioner, clip):
    """Where processes are spawned, not forked, they get all by pickle: it should be small."""
    batches = distcap.PictureBatches(images(on_disk, range(4)), [captioner.pixels, clip.pixels], 4)
    for dataset, key in (
        (batches, 0),
        (distcap.CaptionDataset(on_disk, captioner.pixels), [(1, 0)]),
    ):
        packed = pickle.dumps(dataset)
        assert len(packed) < 50_000
        again, wanted = pickle.loads(packed)[key].pixels, dataset[key].pixels
        assert all(torch.equal(one, two) for one, two in zip(again, wanted, strict=True))


def photograph(path, size, **how):
    """A JPEG with detail at every scale: noise that was smoothed little and much, added up."""
    rng, height, width = numpy.random.default_rng(0), size[1], size[0]
    picture = numpy.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=numpy.uint8))
        picture += numpy.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / 4
    Image.fromarray(picture.astype(numpy.uint8)).save(path, quality=90, **how)
    return path


def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    """At twice the model's size or more; once resized to it, pixels differ by a grey level or two,
    which is what two kinds of resizing differ by."""
    path, side = photograph(tmp_path / "large.jpg", (2400, 1600)), 384
    small, whole = distcap.load_image(path, side), distcap.load_image(path)
    assert whole.size == (2400, 1600) and small.size == (1200, 800)
    assert min(small.size) >= 2 * side
    bicubic = Image.Resampling.BICUBIC
    pair = [each.resize((side, side), bicubic) for each in (small, whole)]
    small, whole = (numpy.asarray(each).astype(int) for each in pair)
    assert abs(small - whole).mean() < 1 and abs(small - whole).max() <= 8


def test_other_pictures_are_read_in_full_and_turned_as_before(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photograph(tmp_path / "turned.jpg", (1600, 1000), exif=exif)
    assert distcap.load_image(path, 100).size == (250, 400)
    Image.new("RGB", (900, 600)).save(tmp_path / "a.png")
    assert distcap.load_image(tmp_path / "a.png").size == (900, 600)
    assert distcap.load_image(tmp_path / "a.png", 32).size == (100, 67)  # a ninth: at least 64
    Image.new("RGB", (90, 60)).save(tmp_path / "small.jpg")
    assert distcap.load_image(tmp_path / "small.jpg", 384).size == (90, 60)
    assert distcap.load_image(Image.new("L", (90, 60)), 32).size == (90, 60)  # in memory


def test_ctrl_c_waits_until_the_loader_has_made_an_item():
    """Bug: in the middle of the loader's work it could leave a lock locked, and caption hung."""
    made = []

    class Interrupted:
        def __getitem__(self, number):
            signal.raise_signal(signal.SIGINT)
            made.append(number)
            return number

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(distcap.read_ahead(Interrupted(), range(3), 0))
    assert made == [0] and signal.getsignal(signal.SIGINT) is handler
