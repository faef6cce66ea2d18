"""Small worlds, models and runs that several tests share. All of it offline, on the CPU, seeded."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # no test may write into the user's home
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share two cores
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import: no test may reach for the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # `main` does it too, but after these imports

from types import SimpleNamespace

import pytest
import torch

import distcap

# A shell that runs the tests in the background lets them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

SHORT = (
    "--train-size 300 --test-size 40 --clip-steps 40 --tf-steps 60 --steps 4 --batch-size 32 "
    "--device cpu"
).split()


def configure(**values) -> distcap.TrainConfig:
    """The settings of `distcap train` on the toy world and the CPU, but for these."""
    return distcap.TrainConfig(**{**distcap.TOY, "device": "cpu", **values})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world():
    """60 training examples of the toy world."""
    return distcap.toy_world(0, 60, 1)[0]


@pytest.fixture(scope="session")
def captioner():
    """The toy captioner with random weights, in eval mode."""
    return distcap.toy_captioner(0)


@pytest.fixture(scope="session")
def clip(tmp_path_factory, world):
    """A toy CLIP after a handful of steps."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    return distcap.toy_clip(folder, world, configure(clip_steps=5), distcap.Run())


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder of `train`, too short to be any good."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert distcap.main(["train", "--out", str(folder), *SHORT]) == 0
    return folder


@pytest.fixture
def pool():
    """Random unit embeddings of 2 images and a pool of 6 captions: sampled, human, greedy."""
    captions = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    images = torch.nn.functional.normalize(torch.randn(2, 5), dim=1)
    image_index = torch.tensor([0, 1, 0, 1, 0, 1])
    return SimpleNamespace(captions=captions, images=images, image_index=image_index, scale=10.0)


@pytest.fixture
def learn(world, clip):
    """`learn(**values)`: a Learner about to begin RL, its captioner untrained, and a Batch of 4."""

    def make(**values):
        config = configure(**{"similarity_weight": 0.94, "ground_truth_weight": 1.0, **values})
        captioner = distcap.toy_captioner(0)
        learner = distcap.Learner(captioner, clip, config, config.max_length)
        distcap.prepare_reinforcement(learner, world, config)
        dataset = distcap.CaptionDataset(world, captioner.pixels)
        return learner, dataset[[(3, 0), (7, 4), (11, 2), (19, 1)]]

    return make
