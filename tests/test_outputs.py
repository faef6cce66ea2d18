"""What `distcap caption` leaves: tables, sidecars, pages; its scores and samples; its memory."""

import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

import distcap

NAMES = ["a.png", "b <i>&\"'.png", "new\nline.png", "  spaces .png", os.fsdecode(b"caf\xe9.png")]


@pytest.fixture
def pictures(run, tmp_path):
    """A folder of five pictures, whose names are no trouble, and one that cannot be read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, source in zip(NAMES, sorted((run / "test").glob("*.png"))):
        shutil.copy(source, folder / name)
    (folder / "z broken.png").write_text("no picture")
    return folder


def caption(run, *arguments):
    command = ["caption", *map(str, arguments), "--captioner", str(run), "--device", "cpu"]
    return distcap.main([*command, "--workers", "0"])


def read(path):
    """{name: captions} of a table in any form."""
    return {name: row.captions for name, row in distcap.read_table(path).items()}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".html"])
def test_every_form_holds_every_good_picture_once_in_order(run, pictures, tmp_path, suffix, capsys):
    assert caption(run, pictures, "--json", "--samples", "2", "--scores") == 1
    wanted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "cannot identify" in wanted[-1]["error"]
    out = tmp_path / f"x{suffix}"
    assert caption(run, pictures, "--out", out, "--samples", "2", "--scores") == 1
    assert "5 captioned, 1 failed, 0 had a caption" in capsys.readouterr().err
    names = [f"pictures/{name}" for name in sorted(NAMES)]
    rows = distcap.read_table(out)
    assert list(rows) == names
    for row, other in zip(rows.values(), wanted):
        assert row.captions == other["caption"]
        for score in distcap.SCORES:
            assert [float(each) for each in row.more[score]] == other[score]
    whole = out.read_bytes()
    assert caption(run, pictures, "--out", out, "--samples", "2", "--scores") == 1
    assert "0 captioned, 1 failed, 5 had a caption" in capsys.readouterr().err
    assert out.read_bytes() == whole and not list(tmp_path.glob("*.lock"))


def test_what_has_a_caption_still_competes(run, pictures, tmp_path, capsys):
    """Else a picture's rank would be another one after a run that was stopped."""
    out = tmp_path / "x.jsonl"
    caption(run, pictures, "--out", out, "--scores")
    whole = [row.more["rank"] for row in distcap.read_table(out).values()]
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))
    caption(run, pictures, "--out", out, "--scores")
    assert [row.more["rank"] for row in distcap.read_table(out).values()] == whole


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".html"])
def test_a_table_cut_short_anywhere_between_rows_is_completed(run, pictures, tmp_path, suffix):
    """As a kill leaves it: a row is a single write."""
    out = tmp_path / f"x{suffix}"
    caption(run, pictures, "--out", out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if b"a.png" in line)
    out.write_bytes(b"".join(lines[: first + 1]))
    assert len(read(out)) == (2 if suffix == ".jsonl" else len(read(out))) > 0
    caption(run, pictures, "--out", out)
    assert out.read_bytes() == whole


def test_a_table_with_other_columns_is_filled_under_its_own_names(run, pictures, tmp_path):
    table = tmp_path / "x.csv"
    table.write_text("image,licence,text\npictures/a.png,free,\nelsewhere.png,3,mine\n")
    caption(run, pictures / "a.png", pictures / NAMES[1], "--out", table)
    rows = list(csv.DictReader(table.open(newline="")))
    assert [row["image"] for row in rows] == ["pictures/a.png", "elsewhere.png", rows[2]["image"]]
    assert [row["licence"] for row in rows] == ["free", "3", ""] and rows[1]["text"] == "mine"
    assert all(row["text"] for row in rows)


def test_rows_that_one_row_cannot_hold_are_not_merged(run, pictures, tmp_path, capsys):
    table = tmp_path / "x.csv"
    table.write_text("image,by,text\npictures/a.png,Ann,one\npictures/a.png,Bob,two\n")
    assert caption(run, pictures / NAMES[1], "--out", table) == 2
    assert "x.csv: pictures/a.png: its rows differ in by" in capsys.readouterr().err
    assert "Bob" in table.read_text()


def test_columns_of_the_users_are_not_taken_for_ours(run, pictures, tmp_path, capsys):
    """A rank in a competition, say, or a thumbnail's address."""
    table = tmp_path / "x.csv"
    table.write_text("image,rank,text\npictures/a.png,7,\n")
    assert caption(run, pictures / "a.png", "--out", table, "--scores") == 2
    assert "x.csv: pictures/a.png: its rank is not from --scores" in capsys.readouterr().err
    assert table.read_text() == "image,rank,text\npictures/a.png,7,\n"
    table.write_text("image,thumbnail,text\npictures/a.png,small/a.png,\n")
    assert caption(run, pictures / "a.png", "--out", table) == 0
    assert next(csv.DictReader(table.open(newline="")))["thumbnail"] == "small/a.png"


def test_overwriting_keeps_the_old_rows_until_it_is_done(run, pictures, tmp_path, monkeypatch):
    out = tmp_path / "x.jsonl"
    out.write_text('{"file_name": "pictures/a.png", "caption": ["mine"], "licence": 3}\n')
    old = out.read_bytes()

    def stop(*given, write=distcap.write_paths):
        written = write(*given)
        yield next(written)
        yield next(written)
        assert out.read_bytes() == old
        raise RuntimeError("as if it had been killed")

    monkeypatch.setattr(distcap, "write_paths", stop)
    with pytest.raises(RuntimeError):
        caption(run, pictures, "--out", out, "--overwrite")
    assert out.read_bytes() == old
    monkeypatch.undo()
    assert caption(run, pictures, "--out", out) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["licence"] == 3 and rows[0]["caption"] != ["mine"] and len(rows) == 5
    assert [path.name for path in tmp_path.glob("x*")] == ["x.jsonl"]


def test_shards_together_are_the_whole(run, pictures, tmp_path, capsys):
    out = tmp_path / "x.csv"
    for part in ("1/2", "2/2"):
        caption(run, pictures, "--out", out, "--shard", part)
        assert "the same command without --shard or torchrun joins" in capsys.readouterr().err
    assert not out.exists() and len(list(tmp_path.glob("x.csv.?-of-2.part"))) == 2
    caption(run, pictures, "--out", out)
    caption(run, pictures, "--out", tmp_path / "y.csv")
    assert out.read_bytes() == (tmp_path / "y.csv").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_torchrun_deals_out_a_machines_shard(monkeypatch):
    """Bug: --shard was ignored, and each machine captioned everything. Machines need not have
    equally many processes."""
    dealt = []
    for part, world in ((1, 4), (2, 3)):
        for rank in range(world):
            monkeypatch.setattr(os, "environ", {"RANK": str(rank), "WORLD_SIZE": str(world)})
            config = distcap.CaptionConfig(shard=(part, 2), device="cpu")
            first, count = distcap.join_processes(config).shard
            dealt += range(100)[first - 1 :: count]
    assert sorted(dealt) == list(range(100))


def test_a_model_that_cannot_be_loaded_leaves_no_empty_part(run, pictures, tmp_path, capsys):
    """Bugs: it did; and a run's settings that are cut short gave a traceback."""
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"cl')
    out = ["--rerank", "--out", tmp_path / "x.csv"]
    assert caption(tmp_path / "broken", pictures, *out) == 2
    message = capsys.readouterr().err
    assert "config.json: cannot be read (Unterminated string" in message
    assert message.endswith("; give --clip\n") and message.count("\n") == 1
    assert not list(tmp_path.glob("x.csv*"))


def test_a_part_that_a_kill_cut_short_is_put_into_the_table(run, pictures, tmp_path):
    """Of a picture that is there twice, as with --shard --overwrite, the last row counts."""
    caption(run, pictures, "--out", tmp_path / "whole.csv")
    texts = ["first", "second"]
    rows = [json.dumps({"file_name": "pictures/a.png", "caption": [text]}) for text in texts]
    (tmp_path / "x.csv.1-of-3.part").write_text("\n".join([*rows, rows[0][:-9]]))
    caption(run, pictures, "--out", tmp_path / "x.csv")
    assert read(tmp_path / "x.csv").pop("pictures/a.png") == ["second"]
    caption(run, pictures, "--out", tmp_path / "x.csv", "--overwrite")
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_more_shards_than_pictures(run, pictures, tmp_path, capsys):
    picture = pictures / "a.png"
    assert caption(run, picture, "--sidecar", ".txt", "--shard", "2/2") == 0
    assert caption(run, picture, "--out", tmp_path / "x.csv", "--shard", "2/2") == 0
    assert capsys.readouterr().err.count("0 captioned") == 2


def test_names_with_line_ends_are_found_again_in_a_csv(run, pictures, tmp_path, capsys):
    """Bug: a lone carriage return was not quoted, and the table could not be read again."""
    for name in ("carriage\r\nreturn.png", "lone\rreturn.png"):
        shutil.copy(pictures / "a.png", pictures / name)
    for _ in range(2):
        caption(run, pictures, "--out", tmp_path / "x.csv")
    assert "0 captioned, 1 failed, 7 had a caption" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("x.jsonl", "[1]\n", "x.jsonl:1: not a JSON object"),
        ("x.jsonl", '{"file_name": 3}\n', "x.jsonl:1: no file_name"),
        ("x.csv", "file_name,caption\na.png\n", "row 2: not as many columns"),
        ("x.csv", "file_name,,\na.png,mine,mine too\n", "two columns have the same name"),
        ("x.csv", f"file_name,caption\na.png,{'long ' * 40_000}\n", "cannot be read (field larger"),
        ("x.html", f'{distcap.PAGE}<img src="" alt="" data-row="">', "x.html: cannot be read"),
        ("x.html", "<title>My diary</title>\n", "x.html: a page that distcap did not write"),
    ],
)
def test_a_table_that_cannot_be_read_is_left_as_it_is(run, pictures, tmp_path, capsys, name, text,
                                                      wanted):  # fmt: skip
    """Bugs: a page of the user's has no rows, and was replaced; of two columns without a name, one
    was lost."""
    (tmp_path / name).write_text(text)
    assert caption(run, pictures, "--out", tmp_path / name) == 2
    message = capsys.readouterr().err
    assert wanted in message and message.count("\n") == 1
    assert (tmp_path / name).read_text() == text


def test_a_second_process_is_refused_in_one_line(run, pictures, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    with FileLock(f"{out}.1-of-1.lock"):
        assert caption(run, pictures, "--out", out) == 2
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and "another distcap" in streams.err and not out.exists()


def test_sidecars_are_skipped_where_they_hold_a_text(run, pictures, capsys):
    (pictures / "a.txt").write_text("mine\n")
    assert caption(run, pictures, "--sidecar", ".txt", "--prefix", "A photo: ") == 1
    assert "4 captioned, 1 failed, 1 had a caption" in capsys.readouterr().err
    assert (pictures / "a.txt").read_text() == "mine\n"
    assert (pictures / "  spaces .txt").read_text().startswith("A photo: ")
    assert len(list(pictures.glob("*.txt"))) == 5
    Image.new("RGB", (9, 9)).save(pictures / "a.jpg")
    for shard in ([], ["--shard", "1/2"]):  # bug: not if another shard held the other picture
        assert caption(run, pictures, "--sidecar", ".txt", *shard) == 2
        assert "would share" in capsys.readouterr().err


def test_the_lock_of_sidecars_lies_where_they_are_written(run, tmp_path, monkeypatch, capsys):
    """Bug: it lay in the folder that holds their folders, which may be another user's."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        Image.new("RGB", (9, 9)).save(folder / "a.png")
    closed = {tmp_path}

    def access(path, mode, known=os.access):  # a mode would not keep root out
        return Path(path) not in closed and known(path, mode)

    monkeypatch.setattr(os, "access", access)
    with FileLock(folders[0] / ".distcap.1-of-1.lock"):
        assert caption(run, *folders, "--sidecar", ".txt") == 2
    assert "another distcap writes there" in capsys.readouterr().err
    closed.add(folders[0])
    assert caption(run, *folders, "--sidecar", ".txt") == 2
    assert "/one: must not be written to; give --out" in capsys.readouterr().err


def test_a_sidecar_that_cannot_be_written_fails_alone(run, pictures, monkeypatch, capsys):
    """Bugs: a listed picture of a folder that is not there, a long name, and a folder in a
    sidecar's place each ended the run. A full disk does, for it concerns the others, too."""
    long = pictures / f"{'x' * 250}.png"
    shutil.copy(pictures / "a.png", long)
    (pictures / "a.caption").mkdir()
    names = f"{pictures}/nowhere/a.png\n{long}\n{pictures}/a.png\n{pictures}/{NAMES[1]}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(names))
    assert caption(run, "-", "--sidecar", ".caption") == 1
    *failures, summary = capsys.readouterr().err.splitlines()
    assert "1 captioned, 3 failed" in summary
    for failure, reason in zip(failures, ["No such file", "name too long", "Is a directory"]):
        assert reason in failure
    assert not list(pictures.glob("*.partial"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distcap, "write_text", full)
    assert caption(run, pictures, "--sidecar", ".txt") == 2
    assert "No space left" in capsys.readouterr().err


def test_a_link_is_followed_and_a_full_disk_leaves_whole_rows(run, pictures, tmp_path, capsys):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)
    caption(run, pictures, "--out", link)
    assert link.is_symlink() and len(read(real)) == 5
    whole, size = real.read_bytes(), real.stat().st_size
    real.unlink()
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({size - 9}, -1)); "
    limit += "import signal as s; s.signal(s.SIGXFSZ, s.SIG_IGN); import distcap; "
    command = ["caption", str(pictures), "--captioner", str(run), "--workers", "0", "--out"]
    code = limit + f"raise SystemExit(distcap.main({[*command, str(real)]}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not real.exists() and len(read(tmp_path / "real.jsonl.1-of-1.part")) == 4
    caption(run, pictures, "--out", real)
    assert real.read_bytes() == whole and not list(tmp_path.glob("*.part"))


# ---- Samples, scores, memory ---------------------------------------------------------------------
def test_a_picture_gets_its_own_sample_whatever_batch_order_or_name(run, pictures, capsys):
    def drawn(*arguments):
        caption(run, *arguments, "--samples", "2", "--temperature", "1")
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        return {(name, n % 2): text for n, (name, text) in enumerate(lines)}

    paths = [pictures / name for name in NAMES[:4]]
    together = drawn(*paths)
    assert together == drawn(*paths[::-1]) == drawn(*paths, "--batch-size", "2")
    assert drawn(*paths, "--seed", "1") != together
    shutil.copy(paths[0], pictures / "copy.png")
    alone = drawn(pictures / "copy.png")
    assert list(alone.values()) == list(together.values())[:2]


def test_samples_follow_the_captioners_own_distribution(captioner, world):
    """The first token of 6,000 samples against p, by chi-square: 3 deviations above its mean."""
    pixels = captioner.pixels([world[0].image])
    features = captioner.encode(pixels)
    for temperature in (1.0, 0.5):
        draw = dict(max_length=1, count=6000, temperature=temperature)
        tokens = distcap.sample_by_picture(captioner, features, pixels, **draw)[:, -1]
        start = torch.tensor([captioner.start])
        inputs = captioner.inputs(features, start, torch.tensor([0]))
        p = (captioner.writer(**inputs).logits[0, -1] / temperature).softmax(dim=0)
        seen = torch.bincount(tokens, minlength=len(p))
        expected = 6000 * p
        statistic = ((seen - expected) ** 2 / expected)[expected > 5].sum().item()
        freedom = int((expected > 5).sum()) - 1
        assert statistic < freedom + 3 * (2 * freedom) ** 0.5


def test_reranking_does_not_depend_on_who_shares_the_batch(run, capsys):
    """The pictures that compete are those of the call; of the captions' half, a batch's captions
    are a baseline, which does not choose among one picture's."""
    kept = []
    for size in ("3", "40"):
        assert caption(run, run / "test", "--rerank", "--batch-size", size) == 0
        kept.append(capsys.readouterr().out.splitlines())
    assert sum(one != other for one, other in zip(*kept)) <= 2


def test_scarce_memory_halves_the_batch_and_at_one_names_the_file(
    run, pictures, capsys, monkeypatch
):
    assert caption(run, pictures, "--json") == 1
    wanted = capsys.readouterr().out.splitlines()
    encode, sizes = distcap.Captioner.encode, []

    def scarce(captioner, pixels, most=2):
        sizes.append(len(pixels))
        if len(pixels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return encode(captioner, pixels)

    monkeypatch.setattr(distcap.Captioner, "encode", scarce)
    assert caption(run, pictures, "--json", "--batch-size", "8") == 1
    streams = capsys.readouterr()
    assert streams.out.splitlines() == wanted and sizes == [5, 4, 2, 2, 1]
    assert streams.err.count("going on with --batch-size") == 2
    monkeypatch.setattr(scarce, "__defaults__", (0,))
    assert caption(run, pictures / "a.png", "--batch-size", "1") == 1
    assert "a.png: not enough memory" in capsys.readouterr().err


def test_too_little_memory_is_told_from_a_bug():
    """Also by `main`, which says of every verb that memory does not suffice."""
    said = ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"]
    scarce = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(*said)]
    assert all(distcap.SCARCE.search(repr(error)) for error in scarce)
    bug = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert not distcap.SCARCE.search(repr(bug))


def test_an_empty_caption_is_a_failure(run, pictures, tmp_path, capsys, monkeypatch):
    decode = distcap.Captioner.decode
    monkeypatch.setattr(
        distcap.Captioner, "decode", lambda *given: ["", *decode(*given)[1:]], raising=True
    )
    out = tmp_path / "x.jsonl"
    assert caption(run, pictures, "--out", out) == 1
    assert "wrote an empty caption" in capsys.readouterr().err and len(read(out)) == 4


# ---- A page ------------------------------------------------------------------------------------
class Page(HTMLParser):
    """The links, the addresses of pictures and the texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name == "href"]
        self.sources += [value for name, value in attributes if name == "src"]

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_links_every_picture_and_escapes_every_name(run, pictures, tmp_path):
    caption(run, pictures, "--out", tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    page = Page(text)
    assert len(page.links) == len(page.sources) == 5
    for link in page.links:
        assert os.path.exists(tmp_path / os.fsdecode(distcap.urllib.parse.unquote_to_bytes(link)))
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "pictures/b <i>&\"'.png" in page.texts and "<i>" not in text
    assert "Failures: 1" in page.texts and "z broken.png" in page.texts[-2]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed to look at the page")
def test_a_browser_shows_the_page_without_a_complaint(run, pictures, tmp_path):
    caption(run, pictures, "--out", tmp_path / "x.html")
    probe = "<script>onload = () => document.title = 'loaded ' + "
    probe += "[...document.images].filter(each => each.naturalWidth > 0).length</script>"
    page = tmp_path / "probe.html"
    page.write_text((tmp_path / "x.html").read_text() + probe)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=60)
    assert "<title>loaded 5</title>" in done.stdout
    assert not re.search("CONSOLE", done.stderr)


def test_a_run_leaves_a_report_with_curves_and_pictures(run, tmp_path):
    shutil.copy(run / "log.jsonl", tmp_path)
    results = json.loads((run / "results.json").read_text())
    results = {row: results[row] for row in ("before", "after")}
    test = distcap.read_examples(str(run / "test"))
    captions = {row: [f"{row} <b> {n}" for n in range(len(test))] for row in results}
    distcap.write_report(tmp_path, results, captions, test)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert len(page.sources) == 24 and text.count("<polyline") == 2
    assert "after <b> 23 " in page.texts and "oracle_R@1" in text
    assert distcap.curve("flat", [1.0, 1.0, None]).count("120.0") == 2  # all at the bottom
    assert distcap.curve("nothing", [None]) == ""


def test_version_and_a_bar_that_is_not_asked_for(run, capsys):
    with pytest.raises(SystemExit):
        distcap.main(["--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)
    script = [sys.executable, Path(distcap.__file__), "caption", run / "test", "--captioner", run]
    done = subprocess.run([*script, "--quiet"], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 40
