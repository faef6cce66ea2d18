"""CLIP: unit embeddings, ties, loading."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distcap


@pytest.fixture
def texts(world):
    return [str(example.scene) for example in world[:5]]


@pytest.fixture(scope="module")
def folder(clip):
    """Where toy_clip has put it."""
    return clip.tokenizer.tokenizer.name_or_path


def test_embeddings_are_unit_rows_without_gradient(clip, world, texts):
    captions = clip.embed_captions(texts)
    images = clip.embed_images([example.image for example in world[:5]])
    for rows in (captions, images):
        assert rows.shape == (5, 96) and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert not clip.model.training


def test_embeddings_do_not_depend_on_the_batch(clip, world, texts):
    """67 pictures are embedded as 64 and 3."""
    images = [example.image for example in world] + [example.image for example in world[:7]]
    whole = clip.embed_images(images)
    assert whole.shape == (67, 96)
    torch.testing.assert_close(whole[60:], whole[:7])
    torch.testing.assert_close(clip.encode_pixels(clip.pixels(images[:2])), whole[:2])
    few = clip.embed_captions(texts, batch_size=2)
    torch.testing.assert_close(few, clip.embed_captions(texts))


def test_worker_processes_embed_the_same(clip, world, tmp_path):
    pictures = [example.image for example in distcap.write_examples(tmp_path, world + world[:10])]
    assert torch.equal(clip.embed_images(pictures, workers=2), clip.embed_images(pictures))


def test_equal_captions_have_exactly_equal_embeddings(clip):
    texts = ["two shapes", "a red ring above a bar", "two shapes"]
    rows = clip.embed_captions(texts, batch_size=1)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_embeddings_see_the_words_and_long_captions_pass(clip):
    texts = ["a red ring above a bar", "a bar above a red ring", "a " * 50, ""]
    rows = clip.embed_captions(texts)
    assert (rows[0] - rows[1]).abs().max() > 1e-3 and rows.isfinite().all()


def test_a_saved_clip_loads_the_same(clip, folder, texts):
    from safetensors.torch import load_file

    again = distcap.CLIP.load(folder)
    assert torch.equal(again.embed_captions(texts), clip.embed_captions(texts))
    saved = load_file(f"{folder}/open_clip_model.safetensors")["logit_scale"].exp().item()
    assert again.logit_scale == clip.logit_scale == pytest.approx(saved)


def pretend_download(monkeypatch, folder):
    """Every repository of the Hub is this folder. Returns a list of those asked for."""
    asked = []
    monkeypatch.setattr(distcap, "download", lambda name, kinds: asked.append(name) or folder)
    return asked


def test_openai_weights_get_their_activation_and_preprocessing(monkeypatch, tmp_path):
    """QuickGELU weights in a GELU model embed wrongly; open_clip only warns."""
    import open_clip

    asked = {}

    def pretend(name, weights, **options):
        asked[name] = weights, options
        raise RuntimeError("no such weights\nand more lines")

    (tmp_path / "open_clip_model.safetensors").touch()
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    pretend_download(monkeypatch, tmp_path)
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", pretend)
    for name in ("ViT-B-32/openai", "ViT-B-16/laion2b_s34b_b88k"):
        with pytest.raises(distcap.UserError, match="no such weights") as caught:
            distcap.CLIP.load(name)
        assert "\n" not in str(caught.value)
    for architecture, quick in (("ViT-B-32", True), ("ViT-B-16", False)):
        weights, options = asked[architecture]
        assert weights == f"{tmp_path}/open_clip_model.safetensors"
        assert options["force_quick_gelu"] == quick
        assert len(options["image_mean"]) == len(options["image_std"]) == 3


def test_a_clip_of_the_hub_loads_from_its_snapshot(monkeypatch, clip, folder, texts):
    asked = pretend_download(monkeypatch, Path(folder))
    again = distcap.CLIP.load("hf-hub:someone/toy")
    assert asked == ["someone/toy"]
    assert torch.equal(again.embed_captions(texts), clip.embed_captions(texts))


@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32/no-such-tag",
        "no-such-model/openai",
        "neither",
        "hf-hub:some/model",
        "ViT-B-32/openai",
    ],
)
def test_an_unknown_clip_is_one_line(name):
    """open_clip's own message lists every model that it knows."""
    with pytest.raises(distcap.UserError) as caught:
        distcap.CLIP.load(name)
    message = str(caught.value)
    assert name.removeprefix("hf-hub:") in message or "timm/" in message
    assert "\n" not in message and len(message) < 400


def test_a_clip_cut_short_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    weights = tmp_path / "clip/open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(distcap.UserError, match="cannot load this CLIP") as caught:
        distcap.CLIP.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_clip_is_refused(tmp_path):
    with pytest.raises(distcap.UserError, match="not a checkpoint"):
        distcap.CLIP.load(str(tmp_path))


@pytest.mark.parametrize("length", [22, 77])
def test_padding_that_is_not_read_changes_no_embedding(length):
    """A tower like OpenAI's, for 22 or 77 tokens: as open_clip's own encode_text, to rounding."""
    import open_clip

    torch.manual_seed(0)
    tower = dict(width=32, layers=2)
    text = dict(tower, heads=2, context_length=length, vocab_size=50)
    vision = dict(tower, head_width=16, image_size=16, patch_size=8)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    torch.nn.init.normal_(model.positional_embedding)
    clip = distcap.CLIP(model, preprocess=None, tokenizer=None)
    tokens = torch.zeros(5, length, dtype=torch.long)
    for row, words in enumerate((1, 4, 9, 12, 3)):
        tokens[row, : words + 1] = torch.randint(1, 48, (words + 1,))
        tokens[row, words + 1] = 49  # the end has the highest id
    with torch.no_grad():
        whole = model.encode_text(tokens, normalize=True)
        found = clip.encode_tokens(tokens)
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            clip.encode_tokens(tokens[1:2]), whole[1:2], atol=1e-6, rtol=1e-5
        )


def test_another_kind_of_text_tower_is_read_whole():
    """CoCa and the towers of Hugging Face pool elsewhere: they go open_clip's own way."""

    class Other(torch.nn.Module):
        logit_scale = torch.tensor(1.0)
        visual = SimpleNamespace(image_size=(8, 16))

        def encode_text(self, tokens, normalize):
            assert normalize
            return tokens.float()

    tokens = torch.tensor([[3, 9, 0, 0]])
    clip = distcap.CLIP(Other(), preprocess=None, tokenizer=None)
    assert clip.side == 16
    assert clip.encode_tokens(tokens).equal(tokens.float())
