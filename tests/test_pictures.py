"""A folder with a picture of every kind, and a broken one of every kind, is captioned."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy
import pytest
from PIL import Image, features

import distcap

HEIC = importlib.util.find_spec("pillow_heif") is not None
NOISE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (30, 40), numpy.uint8))
FLIPPED = NOISE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
COLOUR = Image.merge("RGB", (NOISE, NOISE.rotate(180), FLIPPED))
PALETTE = COLOUR.quantize(8)
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation
SUFFIXES = "jpg jpeg png webp bmp gif tiff jfif jpe jp2 ppm pgm tga pcx sgi ico qoi".split()
SUFFIXES = [each for each in SUFFIXES if each != "jp2" or features.check("jpg_2000")]
TRANSPARENT = COLOUR.convert("RGBA")
TRANSPARENT.putalpha(0)
NAMES = ["A.JPG", "日本 é.png", NOT_UTF8, "tab\there.png", "new\nline.png", "  two  spaces .png"]
NAMES += ["several.dots.tar.gz.png"]
NESTED = ["nested.png/a.jpg", "nested.png/deeper/a.png"]  # a folder named as a picture
FRAMES = dict(save_all=True, append_images=[COLOUR.rotate(90)])
GOOD = {  # name: (picture, how to save it)
    **{f"a.{suffix}": (COLOUR, {}) for suffix in SUFFIXES},
    **({"a.avif": (COLOUR, {})} if features.check("avif") else {}),
    **{name: (COLOUR, {}) for name in NAMES + NESTED},
    **{f"animated.{suffix}": (COLOUR, FRAMES) for suffix in ("gif", "webp", "TIF")},
    **{f"{mode}.png": (NOISE.convert(mode), {}) for mode in ("1", "L", "LA", "P", "I;16")},
    **{f"{mode}.tiff": (NOISE.convert(mode), {}) for mode in ("PA", "F", "I;16")},
    "CMYK.jpg": (COLOUR.convert("CMYK"), {}),
    "RGBA.png": (COLOUR.convert("RGBA"), {}),
    "transparent all over.png": (TRANSPARENT, {}),
    "P transparent.png": (PALETTE, {"transparency": bytes(range(0, 256, 32))}),
    "P transparent.gif": (PALETTE, {"transparency": 3}),
    "RGB transparent.png": (COLOUR, {"transparency": COLOUR.getpixel((0, 0))}),
    "lzw.tiff": (COLOUR, {"compression": "tiff_lzw"}),
    "rotated.jpg": (COLOUR, {"exif": ROTATED}),
    "one pixel.png": (COLOUR.resize((1, 1)), {}),
    "thin.png": (COLOUR.resize((900, 1)), {}),
}
LINKED = "linked.png"
# A folder's own come before those of the folders within.
ORDER = sorted((*GOOD, LINKED), key=lambda name: (name.count("/"), name))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


IHDR = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
BOMB = b"\x89PNG\r\n\x1a\n" + IHDR + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
BROKEN = {  # name: (its bytes or, if made below, None; what the reason must say)
    "empty.jpg": (b"", "an empty file"),
    "empty.gif": (b"", "an empty file"),
    "truncated.jpg": (".jpg", "truncated"),
    "truncated.png": (".png", "truncated"),
    "truncated.tiff": (".tiff", ""),  # libtiff and Pillow word it in many ways
    "text.jpg": (b"no picture", "cannot identify"),
    "new\nbroken.png": (b"no picture", "cannot identify"),
    "page.png": (b"<!DOCTYPE html><title>404 Not Found</title>", "cannot identify"),
    "random.webp": (bytes(n * n % 251 for n in range(999)), "cannot identify"),
    "bomb.png": (BOMB, "decompression bomb"),
    "pipe.png": (None, "not a file"),
    "dangling.jpg": (None, "No such file"),
    "denied.png": (".png", "Permission denied"),
    "phone.heic": (b"\0\0\0 ftypheic" + bytes(99), "cannot identify" if HEIC else "pillow-heif"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
    "vanished.png": (".png", "No such file"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Every good and every broken picture, and what is to be passed over."""
    folder, outside = tmp_path / "pictures", tmp_path / "outside"
    for path in (outside, folder / "nested.png/deeper", folder / ".hidden"):
        path.mkdir(parents=True)
    for name, (picture, how) in GOOD.items():
        picture.save(folder / name, **how)
    for path in (outside / "a.png", folder / ".hidden.png", folder / ".hidden/a.png"):
        COLOUR.save(path)
    for name in ("notes.txt", "film.mp4"):
        (folder / name).write_text("no picture, and not called one")
    (folder / LINKED).symlink_to(outside / "a.png")
    (folder / "nested.png/loop").symlink_to(folder, target_is_directory=True)
    for name, (content, _) in BROKEN.items():
        if isinstance(content, str):
            how = {"compression": "tiff_lzw"} if content == ".tiff" else {}
            COLOUR.save(folder / name, **how)
            content = (folder / name).read_bytes()
            if name.startswith("truncated"):
                content = content[: len(content) // 2]
        if content is not None:
            (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")

    def refuse(path, *more, opened=Image.open, **options):  # a mode of 000 would not keep root out
        if Path(path).name == "denied.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **options)

    def lose(*given, find=distcap.find_images):
        COLOUR.save(folder / "vanished.png")
        found = find(*given)
        (folder / "vanished.png").unlink()
        return found

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(distcap, "find_images", lose)
    return folder


def complaints(stderr, folder):
    """The names that standard error gives as broken, in order, each with its reason."""
    lines = os.fsdecode(stderr).split("\n")
    lines = [line for line in lines if line.startswith(f"distcap: {folder}")]
    lines = [line for line in lines if "a link to a folder" not in line]
    form = re.compile(rf"distcap: {re.escape(str(folder))}/(.+?): (.*\S.*)")
    found = [form.fullmatch(line).groups() for line in lines]
    return [(name.replace("\\n", "\n"), why) for name, why in found]


def test_a_folder_that_may_not_be_listed_says_so(tmp_path, monkeypatch):
    """Bug: only "a folder", which is no reason."""

    def refuse(path):  # a mode would not keep root out
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    (found,) = distcap.find_images([str(tmp_path)])
    with pytest.raises(distcap.UserError, match=r"cannot be read \(Permission denied\)"):
        distcap.load_image(found)


def test_every_good_picture_is_captioned_and_every_broken_one_listed(
    run, folder, tmp_path, capsysbinary, monkeypatch
):
    assert len(BROKEN) >= 12 and len(ORDER) + len(BROKEN) >= 40
    command = ["caption", str(folder), "--captioner", str(run), "--device", "cpu"]
    command += ["--batch-size", "7"]
    assert distcap.main(command) == 1
    streams = capsysbinary.readouterr()
    lines = [line.split("\t") for line in os.fsdecode(streams.out).removesuffix("\n").split("\n")]
    paths = [f"{folder}/{name}" for name in ORDER]
    escaped = [path.replace("\t", "\\t").replace("\n", "\\n") for path in paths]
    assert [name for name, _ in lines] == escaped
    assert all(caption.strip() for _, caption in lines)
    listed = complaints(streams.err, folder)
    assert [name for name, _ in listed] == sorted(BROKEN)
    assert [(name, why) for name, why in listed if BROKEN[name][1] not in why] == []
    notes = [b"nested.png/loop: a link to a folder", b"files passed over"]
    assert all(streams.err.count(note) == 1 for note in notes)
    assert streams.err.count(b"distcap:") == len(BROKEN) + len(notes)

    out = tmp_path / "x.jsonl"
    # Started again, only the broken ones are tried again.
    for captioned, kept in ((len(ORDER), 0), (0, len(ORDER))):
        assert distcap.main([*command, "--out", str(out)]) == 1
        streams = capsysbinary.readouterr()
        assert streams.out == b"" and complaints(streams.err, folder) == listed
        counts = (captioned, len(BROKEN), kept)
        total = b"distcap: %d captioned, %d failed, %d had a caption\n" % counts
        assert streams.err.endswith(total)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["file_name"] for row in rows] == [f"pictures/{name}" for name in ORDER]
        assert [row["caption"] for row in rows] == [[caption] for _, caption in lines]

    # One stream, to see that the broken ones come last.
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert distcap.main(command) == 1
    merged = os.fsdecode(capsysbinary.readouterr().out).split("\n")
    assert sum(line.startswith("distcap:") for line in merged[-len(BROKEN) - 1 :]) == len(BROKEN)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_worker_processes_change_nothing(run, folder, capsysbinary):
    """Neither the captions nor what is said of the broken ones: every failure is one line."""
    command = ["caption", str(folder), "--captioner", str(run), "--device", "cpu"]
    said = []
    for workers in ("0", "2"):
        assert distcap.main([*command, "--batch-size", "9", "--workers", workers]) == 1
        said.append(capsysbinary.readouterr())
    assert said[0] == said[1]
    assert said[0].err.count(b"\n") == len(BROKEN) + 2  # and what was passed over


def test_piped_into_head_it_ends_quietly(run, tmp_path):
    for number in range(60):
        COLOUR.rotate(number).save(tmp_path / f"{number:02}.png")
    command = [sys.executable, distcap.__file__, "caption", tmp_path, "--captioner", run]
    command += ["--batch-size", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as process:
        names = [process.stdout.readline().split("\t")[0] for _ in range(5)]
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert names == [str(tmp_path / f"{number:02}.png") for number in range(5)]


def test_what_pillow_warns_of_does_not_reach_standard_error(run, tmp_path):
    """At this size Pillow warns of a bomb."""
    COLOUR.resize((12000, 7600)).save(tmp_path / "large.png")
    command = [sys.executable, distcap.__file__, "caption", tmp_path, "--captioner", run]
    command.append("--quiet")  # no line about progress, however slow the machine
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
