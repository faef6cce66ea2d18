"""Small worlds, models and runs that several tests share. Everything is offline, on the CPU, and seeded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import: no test may reach for the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as `main` does, but tests import the libraries before it

import io
from types import SimpleNamespace

import pytest
import torch

import distcap

SMALL = ["--train-size", "300", "--test-size", "40", "--clip-steps", "40", "--tf-steps", "60", "--batch-size", "32"]


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
    return distcap.toy_captioner(0).eval()


@pytest.fixture(scope="session")
def clip(tmp_path_factory, world):
    """A toy CLIP after a handful of steps."""
    config = distcap.configuration(distcap.TrainConfig, {"clip_steps": 5, "device": "cpu"})
    return distcap.toy_clip(tmp_path_factory.mktemp("clip") / "clip", world, config, io.StringIO())


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder of `train`, too short to be any good."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert distcap.main(["train", "--steps", "4", "--out", str(folder), "--device", "cpu", *SMALL]) == 0
    return folder


@pytest.fixture
def pool():
    """Random unit embeddings of 2 images and a pool of 6 captions: sampled, ground truth, greedy."""
    captions = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    images = torch.nn.functional.normalize(torch.randn(2, 5), dim=1)
    return SimpleNamespace(captions=captions, images=images, image_index=torch.tensor([0, 1, 0, 1, 0, 1]), scale=10.0)
