"""Checkpoints of the Hugging Face Hub, in the layouts that they have there, from a Hub of ours.

Whatever meets the Hub is a process of its own (see fake_hub.py), which costs seconds to start: so
one process runs all the commands that can share it.
"""

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from fake_hub import FakeHub
from PIL import Image
from safetensors.torch import load_file
from test_families import save_blip, save_vision_encoder_decoder

import distcap

SCRIPT = Path(distcap.__file__)

# What the repositories of two much used captioners hold.
BLIP = (
    "config.json preprocessor_config.json pytorch_model.bin tf_model.h5 special_tokens_map.json "
    "tokenizer.json tokenizer_config.json vocab.txt README.md .gitattributes"
).split()
VIT_GPT2 = (
    "config.json merges.txt preprocessor_config.json pytorch_model.bin special_tokens_map.json "
    "tokenizer.json tokenizer_config.json vocab.json README.md .gitattributes"
).split()
WEIGHTS_OF_CLIP = "open_clip_pytorch_model.bin"
UNWANTED = {"tf_model.h5", "README.md", ".gitattributes"}


def as_on_the_hub(saved, folder, files):
    """A copy of what `save_pretrained` wrote, as repositories of 2022 hold it: these files."""
    shutil.copytree(saved, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    merges = [f"{one} {other}\n" for one, other in model.get("merges", [])]
    texts = {
        "special_tokens_map.json": json.dumps(special_tokens(folder)),
        "vocab.txt": "\n".join(words) + "\n",
        "vocab.json": json.dumps(model["vocab"]),
        "merges.txt": "#version: 0.2\n" + "".join(merges),
    }
    for name in files:
        if not (folder / name).exists():
            (folder / name).write_text(texts.get(name, "nothing that we need"), encoding="utf-8")
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    return folder


def special_tokens(folder):
    """The tokenizer's settings that name a token."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return {key: text for key, text in settings.items() if key.endswith("_token")}


def with_old_settings(folder):
    """ViT-GPT2's settings as then: a feature extractor, whose size is a number; GPT2Tokenizer."""
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    names = ("do_normalize", "do_resize", "image_mean", "image_std", "resample")
    old = {name: settings[name] for name in names if name in settings}
    old |= dict(feature_extractor_type="ViTFeatureExtractor", size=settings["size"]["height"])
    path.write_text(json.dumps(old))
    tokenizer = dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=False, model_max_length=1024)
    tokenizer |= special_tokens(folder) | dict(special_tokens_map_file=None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


class Malicious:
    """What makes a file when it is unpickled. It might as well delete one."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, clip):
    """Folders, by the names that they have on the Hub; `saved/...` are what they were made of."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for name, save in (("blip", save_blip), ("vit", save_vision_encoder_decoder)):
        (root / "saved" / name).mkdir(parents=True)
        save(root / "saved" / name)
    clip_folder = shutil.copytree(clip.tokenizer.tokenizer.name_or_path, root / "saved/clip")

    blip = as_on_the_hub(root / "saved/blip", root / "blip", BLIP)
    as_on_the_hub(root / "saved/blip", root / "both", [*BLIP, "model.safetensors"])
    (root / "both/onnx").mkdir()
    for name in ("onnx/model.safetensors", "onnx/config.json"):
        (root / "both" / name).write_text("nothing that we need")
    with_old_settings(as_on_the_hub(root / "saved/vit", root / "vit", VIT_GPT2))
    (shutil.copytree(blip, root / "weightless") / "pytorch_model.bin").unlink()

    shutil.copytree(clip_folder, root / "clip")
    weights = load_file(root / "clip/open_clip_model.safetensors")
    torch.save(weights, root / "clip" / WEIGHTS_OF_CLIP)
    (root / "clip/open_clip_model.safetensors").unlink()

    evil = {"weight": Malicious(root / "executed")}
    torch.save(evil, shutil.copytree(blip, root / "evil") / "pytorch_model.bin")
    torch.save(evil, shutil.copytree(root / "clip", root / "evil-clip") / WEIGHTS_OF_CLIP)
    names = ("blip", "both", "vit", "weightless", "clip", "evil", "evil-clip", "saved")
    return {f"owner/{name}": root / name for name in names}


@pytest.fixture(scope="module")
def hub(repositories):
    with FakeHub(repositories) as hub:
        yield hub


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seeded: of others, which Pillow's noise would be, a random model may write nothing."""
    folder = tmp_path_factory.mktemp("pictures")
    random = numpy.random.default_rng(0)
    for colour in ("red", "green", "blue"):
        noise = random.integers(0, 256, (30, 40, 3), dtype=numpy.uint8)
        Image.fromarray(noise).save(folder / f"{colour}.png")
        Image.new("RGB", (40, 30), colour).save(folder / f"plain {colour}.png")
    return str(folder)


RUN = """
import contextlib, io, json, sys
import distcap

answers = []
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = distcap.main(command)
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def run_all(commands, environment):
    """Run commands, by name, in one process: {name: (status, standard output, standard error)}."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([*commands.values()]), text=True,
        capture_output=True, env=environment, cwd=SCRIPT.parent, timeout=300, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return dict(zip(commands, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.fixture(scope="module")
def commands(pictures):
    """Commands that name repositories of the Hub; each should write what its twin here writes."""
    command = ["caption", pictures, "--device", "cpu", "--captioner"]
    reranked = ["--rerank", "--clip"]
    return {
        "bin": [*command, "owner/blip"],
        "both": [*command, "owner/both", *reranked, "hf-hub:owner/clip"],
        "old": [*command, "owner/vit"],
    }


@pytest.fixture(scope="module")
def wanted(commands, repositories):
    """Standard output of the commands, had they named the folders that were never on the Hub."""
    saved = repositories["owner/saved"]
    local = {"owner/blip": "blip", "owner/both": "blip", "owner/vit": "vit"}
    local["hf-hub:owner/clip"] = "clip"
    commands = {
        name: [str(saved / local[word]) if word in local else word for word in command]
        for name, command in commands.items()
    }
    answers = run_all(commands, {**os.environ, "HF_HUB_OFFLINE": "1"})
    assert {status for status, _, _ in answers.values()} == {0}, answers
    return {name: out for name, (_, out, _) in answers.items()}


@pytest.fixture(scope="module")
def online(hub, commands, pictures, tmp_path_factory):
    """All commands, mistakes among them, in one process that reaches the Hub; and its cache."""
    command = ["caption", pictures, "--device", "cpu", "--captioner"]
    mistakes = {
        "unknown": [*command, "owner/no-such"],
        "weightless": [*command, "owner/weightless"],
        "evil": [*command, "owner/evil"],
        "evil clip": [*command, "owner/blip", "--rerank", "--clip", "hf-hub:owner/evil-clip"],
    }
    cache = tmp_path_factory.mktemp("cache")
    hub.downloads.clear()
    answers = run_all(commands | mistakes, hub.environment(cache))
    fetched = [each.removeprefix("owner/").split("/", 1) for each in hub.downloads]
    return SimpleNamespace(answers=answers, fetched=fetched, cache=cache)


def fetched_from(online, name):
    """The files of a repository that were fetched, none of them twice."""
    files = [file for repository, file in online.fetched if repository == name]
    assert len(files) == len(set(files))
    return set(files)


def mistake(answer):
    """The one line of a command that ended with 2."""
    status, out, err = answer
    assert (status, out, err.count("\n")) == (2, "", 1), answer
    return err


@pytest.mark.parametrize("name", ["bin", "both", "old"])
def test_captions_are_those_of_the_local_folder(name, online, wanted):
    """Nothing but pytorch_model.bin, as our default captioner has, "could not be loaded"."""
    status, out, err = online.answers[name]
    assert (status, err) == (0, "") and out == wanted[name]
    assert out.count("\n") == 6 and len({line.split("\t")[1] for line in out.splitlines()}) > 1


def test_no_more_is_fetched_than_is_needed(online):
    """Of a repository's weights those of one kind, safetensors if it has them."""
    assert fetched_from(online, "blip") == set(BLIP) - UNWANTED
    wanted = set(BLIP) - UNWANTED - {"pytorch_model.bin"} | {"model.safetensors"}
    assert fetched_from(online, "both") == wanted
    assert fetched_from(online, "vit") == set(VIT_GPT2) - UNWANTED
    assert WEIGHTS_OF_CLIP in fetched_from(online, "clip")


def test_no_such_repository_is_one_line(online):
    message = mistake(online.answers["unknown"])
    assert "owner/no-such: not a folder, nor to be had from the Hugging Face Hub" in message


def test_a_repository_without_weights_is_one_line_and_nothing_of_it_is_fetched(online):
    message = mistake(online.answers["weightless"])
    assert "owner/weightless" in message and "no weights of a kind that can be loaded" in message
    assert fetched_from(online, "weightless") == set()


@pytest.mark.parametrize("name", ["evil", "evil clip"])
def test_a_pickle_that_would_execute_code_is_refused(name, online, repositories):
    """PyTorch's message advises to load it with weights_only=False, that is, to execute it."""
    message = mistake(online.answers[name])
    executed = repositories["owner/evil"].parent / "executed"
    assert f"owner/{name.replace(' ', '-')}: cannot load" in message and not executed.exists()
    assert "weights_only" not in message


def test_the_pickle_would_have_executed_code(repositories, tmp_path):
    torch.save(Malicious(tmp_path / "executed"), tmp_path / "weights.bin")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize(
    "changes", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_what_is_in_the_cache_needs_no_hub(changes, online, hub, commands, wanted, pictures):
    """Neither where the libraries are told to stay offline, nor where nobody answers."""
    hub.downloads.clear()
    unknown = ["caption", pictures, "--captioner", "owner/no-such"]
    environment = hub.environment(online.cache, **changes)
    answers = run_all(commands | {"unknown": unknown}, environment)
    assert "owner/no-such" in mistake(answers.pop("unknown"))
    assert answers == {name: (0, out, "") for name, out in wanted.items()}
    assert hub.downloads == []


def on_a_terminal(command, environment):
    """Run a command whose standard error is a terminal: (status, standard output, the terminal)."""
    terminal, end = pty.openpty()
    size = struct.pack("HHHH", 40, 100, 0, 0)  # without a size, tqdm draws nothing
    fcntl.ioctl(end, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, env=environment)
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # on Linux this is how a terminal says that nobody is left to write
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    out = process.stdout.read().decode()
    process.stdout.close()
    return process.wait(timeout=60), out, shown.decode()


@pytest.fixture(scope="module")
def terminal(hub, commands, wanted, tmp_path_factory):
    """What a terminal shows of a first caption: until the captions begin, and from then on."""
    cache = tmp_path_factory.mktemp("empty cache")
    command = [sys.executable, str(SCRIPT), *commands["bin"], "--batch-size", "4"]
    # Bars are drawn at every step, however short.
    status, out, shown = on_a_terminal(command, hub.environment(cache, TQDM_MININTERVAL="0"))
    assert (status, out) == (0, wanted["bin"]) and "Traceback" not in shown
    return shown.partition("caption:")


def test_a_terminal_shows_how_far_the_download_is(terminal):
    """A gigabyte was fetched in silence, since the libraries' own bars are turned off."""
    download, _, _ = terminal
    assert "%|" in download and "kB" in download


def test_a_terminal_shows_how_far_captioning_is_up_to_the_end(terminal):
    """The bar stopped before the last batch: its generator was never asked for what comes after."""
    _, _, captions = terminal
    assert "0/6" in captions and "4/6" in captions and "100%" in captions and "6/6" in captions
