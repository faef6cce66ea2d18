"""Section 4: unit embeddings, ties, loading."""

import pytest
import torch

import distcap


def test_embeddings_are_unit_rows_without_gradient(clip, world):
    captions = clip.embed_captions([example.scene for example in world[:5]])
    images = clip.embed_images([example.image for example in world[:5]], batch_size=2)
    for rows in (captions, images):
        assert rows.shape == (5, 96) and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert not clip.model.training


def test_embeddings_do_not_depend_on_the_batch(clip, world):
    images = [example.image for example in world[:5]]
    torch.testing.assert_close(clip.embed_images(images, batch_size=2), clip.embed_images(images, batch_size=5))
    captions = [example.scene for example in world[:5]]
    torch.testing.assert_close(clip.embed_captions(captions, batch_size=2), clip.embed_captions(captions))


def test_equal_captions_have_exactly_equal_embeddings(clip):
    rows = clip.embed_captions(["two shapes", "a red ring above a bar", "two shapes"], batch_size=1)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_embeddings_see_the_words_and_long_captions_pass(clip):
    rows = clip.embed_captions(["a red ring above a bar", "a bar above a red ring", "a " * 50, ""])
    assert (rows[0] - rows[1]).abs().max() > 1e-3 and rows.isfinite().all()


def test_a_saved_clip_loads_the_same(clip, tmp_path, world):
    from safetensors.torch import load_file

    folder = clip.tokenizer.tokenizer.name_or_path  # where toy_clip has put it
    again = distcap.CLIP.load(folder)
    captions = [example.scene for example in world[:3]]
    assert torch.equal(again.embed_captions(captions), clip.embed_captions(captions))
    assert again.logit_scale == clip.logit_scale == pytest.approx(load_file(f"{folder}/open_clip_model.safetensors")[
        "logit_scale"].exp().item())  # fmt: skip


def test_openai_weights_get_their_activation_and_preprocessing(monkeypatch, tmp_path):
    """QuickGELU weights in a GELU model embed wrongly; open_clip only warns."""
    import huggingface_hub
    import open_clip

    asked = {}

    def pretend(name, weights, **options):
        asked[name] = weights, options
        raise RuntimeError("no such weights\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", pretend)
    for name in ("ViT-B-32/openai", "ViT-B-16/laion2b_s34b_b88k"):
        with pytest.raises(distcap.UserError, match="no such weights") as caught:
            distcap.CLIP.load(name)
        assert "\n" not in str(caught.value)
    for architecture, quick in (("ViT-B-32", True), ("ViT-B-16", False)):
        weights, options = asked[architecture]
        assert weights == f"{tmp_path}/open_clip_model.safetensors" and options["force_quick_gelu"] == quick
        assert len(options["image_mean"]) == len(options["image_std"]) == 3


def test_a_clip_of_the_hub_loads_from_its_snapshot(monkeypatch, clip, world):
    import huggingface_hub

    folder, asked = clip.tokenizer.tokenizer.name_or_path, []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or folder)
    again = distcap.CLIP.load("hf-hub:someone/toy")
    assert asked == ["someone/toy"]
    assert torch.equal(again.embed_captions([world[0].scene]), clip.embed_captions([world[0].scene]))


@pytest.mark.parametrize(
    "name", ["ViT-B-32/no-such-tag", "no-such-model/openai", "neither", "hf-hub:some/model", "ViT-B-32/openai"]
)
def test_an_unknown_clip_is_one_line(name):
    with pytest.raises(distcap.UserError) as caught:
        distcap.CLIP.load(name)
    assert name.removeprefix("hf-hub:") in str(caught.value) or "timm/" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400  # open_clip lists every model it knows


def test_a_clip_cut_short_is_one_line(clip, tmp_path):
    import shutil

    shutil.copytree(clip.tokenizer.tokenizer.name_or_path, tmp_path / "clip")
    weights = tmp_path / "clip/open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(distcap.UserError, match="cannot load this CLIP"):
        distcap.CLIP.load(str(tmp_path))


def test_a_folder_that_is_no_clip_is_refused(tmp_path):
    with pytest.raises(distcap.UserError, match="not a checkpoint"):
        distcap.CLIP.load(str(tmp_path))
