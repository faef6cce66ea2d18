"""Captioners of every family, on tiny random checkpoints saved in the true formats."""

import json

import pytest
import torch
from PIL import Image

import distcap

WORDS = ["a", "dog", "cat", "with", "red", "hat", "on", "the", "##s", "picture", "of"]


def save_blip(folder):
    """The layout of Salesforce/blip-image-captioning-base: config, preprocessor, BERT WordPiece vocabulary.

    As there, the start token's id lies past the end of the tokenizer's vocabulary.
    """
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

    vocabulary = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    text = dict(size, encoder_hidden_size=32, vocab_size=len(vocabulary) + 2, max_position_embeddings=40,
                bos_token_id=len(vocabulary), eos_token_id=1, sep_token_id=4, pad_token_id=0)  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=dict(size, image_size=24, patch_size=8))
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    BlipImageProcessor(size=dict(height=24, width=24)).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "BlipProcessor"}))


def save_vision_encoder_decoder(folder):
    """The layout of ViT-GPT2: a byte-level vocabulary whose one special token is start, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        PreTrainedTokenizerFast,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*alphabet, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = vocabulary["<|endoftext|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    encoder = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=24,
                        patch_size=8, initializer_range=0.3)  # fmt: skip
    decoder = GPT2Config(vocab_size=len(vocabulary), n_positions=64, n_embd=48, n_layer=2, n_head=2, bos_token_id=end,
                         eos_token_id=end, add_cross_attention=True, initializer_range=0.3)  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = VisionEncoderDecoderModel(config)
    ids = dict(decoder_start_token_id=end, eos_token_id=end, pad_token_id=end, bos_token_id=end)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size=dict(height=24, width=24)).save_pretrained(folder)
    # checkpoints of that age keep the ids in config.json, and have no generation_config.json
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))


def save_git(folder):
    """The layout of microsoft/git-base: a BERT vocabulary, CLIP's preprocessing."""
    from transformers import BertTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    config = GitConfig(**size, vision_config=dict(size, image_size=24, patch_size=8), vocab_size=len(vocabulary),
                       max_position_embeddings=40, bos_token_id=2, eos_token_id=3, pad_token_id=0)  # fmt: skip
    GitForCausalLM(config).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    CLIPImageProcessor(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24)).save_pretrained(folder)


@pytest.fixture(scope="module", params=[save_blip, save_vision_encoder_decoder, save_git])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(folder):
    return distcap.Captioner.load(str(folder), prompt="").eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return [Image.effect_noise((50 + 9 * number, 40), 80).convert("RGB") for number in range(4)]


@pytest.fixture(scope="module")
def features(captioner, images):
    with torch.no_grad():
        return captioner.encode(captioner.pixels(images))


def test_tokens_round_trip(captioner):
    tokens = captioner.tokenize(["a dog with the red hats", "cat"], 40)
    assert captioner.decode(tokens) == ["a dog with the red hats", "cat"]
    assert (tokens[:, 0] == captioner.start[0]).all()
    assert captioner.mask(tokens).sum(dim=1).tolist() == [
        len(captioner.tokenizer(text, add_special_tokens=False).input_ids) + 1
        for text in ("a dog with the red hats", "cat")
    ]


def test_log_probs_of_samples_equal_those_of_generate(captioner, features, monkeypatch):
    """Although pad may be end, logits may carry an image prefix, and the checkpoint may ask for top-k."""
    module, _ = captioner.writer(features, torch.full((4, 1), captioner.start[0]))
    generate, seen = module.generate, {}

    def spy(**options):
        seen.update(generate(**options, return_dict_in_generate=True, output_logits=True, output_scores=True))
        return seen["sequences"]

    monkeypatch.setattr(module, "generate", spy)
    tokens = captioner.generate(features, 12, do_sample=True)
    mask = captioner.mask(tokens)
    assert mask.sum() > 12
    theirs = torch.stack(seen["scores"], dim=1).log_softmax(dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    with torch.no_grad():
        ours = captioner.log_probs(features, tokens)
    torch.testing.assert_close(ours * mask, theirs * mask, atol=2e-5, rtol=1e-5)
    for score, logit in zip(seen["scores"], seen["logits"]):
        torch.testing.assert_close(score, logit)


def test_log_probs_equal_those_of_the_whole_model(captioner, images, features):
    """From pixels, by transformers' own forward, with no feature reused."""
    tokens = captioner.tokenize(["a dog with the red hat", "the cat on a hat", "dogs", ""], 40)
    pixels = captioner.pixels(images)
    text = "decoder_input_ids" if captioner.family == "vision-encoder-decoder" else "input_ids"
    with torch.no_grad():
        logits = captioner.model(pixel_values=pixels, **{text: tokens[:, :-1]}).logits[:, -(tokens.shape[1] - 1) :]
        ours = captioner.log_probs(features, tokens)
    theirs = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    mask = captioner.mask(tokens)
    torch.testing.assert_close(ours * mask, theirs * mask, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_those_of_transformers(captioner, images, features, beams):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(captioner.model.name_or_path).eval()
    given = dict(num_beams=beams, do_sample=False, max_new_tokens=9, min_length=0)
    if captioner.family == "vision-encoder-decoder":
        given |= dict(decoder_start_token_id=captioner.start[0], eos_token_id=captioner.end, pad_token_id=captioner.pad)
    if captioner.family == "git":
        given |= dict(input_ids=torch.full((4, 1), captioner.start[0]))
    theirs = model.generate(pixel_values=captioner.pixels(images), **given)
    ours = captioner.generate(features, 9, num_beams=beams)
    assert captioner.decode(ours) == captioner.decode(theirs)


def test_a_prompt_comes_before_every_caption_and_is_not_scored(folder, images, monkeypatch):
    """Sampled and scored after the prompt: generate's own log-probabilities, and no prompt in the text."""
    captioner = distcap.Captioner.load(str(folder), prompt="a picture of")
    prefix, words = len(captioner.start), "a dog with the red hat"
    assert prefix > 3 and captioner.decode(captioner.tokenize([words], 40)) == [words]
    assert captioner.tokenize([words, ""], 40)[:, :prefix].tolist() == [captioner.start] * 2
    with torch.no_grad():
        features = captioner.encode(captioner.pixels(images))
    module, _ = captioner.writer(features, torch.tensor([captioner.start] * 4))
    generate, seen = module.generate, {}

    def spy(**options):
        seen.update(generate(**options, return_dict_in_generate=True, output_scores=True))
        return seen["sequences"]

    monkeypatch.setattr(module, "generate", spy)
    tokens = captioner.generate(features, 9, do_sample=True)
    assert tokens[:, :prefix].tolist() == [captioner.start] * 4 and tokens.shape[1] <= prefix + 9
    theirs = torch.stack(seen["scores"], dim=1).log_softmax(dim=-1).gather(2, tokens[:, prefix:, None]).squeeze(2)
    with torch.no_grad():
        ours = captioner.log_probs(features, tokens)
    mask = captioner.mask(tokens)
    assert mask.shape == ours.shape == theirs.shape
    torch.testing.assert_close(ours * mask, theirs * mask, atol=2e-5, rtol=1e-5)


def test_the_prompt_is_saved_and_only_a_foreign_blip_has_one(folder, tmp_path):
    captioner = distcap.Captioner.load(str(folder))
    assert captioner.prompt == ("a picture of" if captioner.family == "blip" else "")
    distcap.Captioner.load(str(folder), prompt="a cat").save(tmp_path)
    assert distcap.Captioner.load(str(tmp_path)).prompt == "a cat"
    assert distcap.Captioner.load(str(tmp_path), prompt="").prompt == ""


def test_both_stages_train_every_family(captioner, folder, clip, world):
    import io

    learning, log = distcap.Captioner.load(str(folder)), io.StringIO()
    values = {"tf_steps": 3, "steps": 2, "batch_size": 4, "samples": 2, "max_length": 12, "device": "cpu"}
    learner = distcap.Learner(learning, clip, world, distcap.configuration(distcap.TrainConfig, values))
    for objective in ("tf", "rl"):
        learner.fit(objective, log)
    losses = [json.loads(line)["loss"] for line in log.getvalue().splitlines()]
    assert len(losses) == 5 and all(abs(loss) < 100 for loss in losses)
    before, after = (dict(each.model.named_parameters()) for each in (captioner, learning))
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert all("pooler" in name or "post_layernorm" in name for name in unmoved)


def test_a_saved_captioner_of_every_family_loads_the_same(captioner, tmp_path, images, features):
    captioner.save(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = distcap.Captioner.load(str(tmp_path)).eval()
    assert torch.equal(again.pixels(images), captioner.pixels(images))
    assert torch.equal(again.generate(features, 9), captioner.generate(features, 9))


def test_caption_takes_every_family(folder, tmp_path, images, capsys):
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    assert distcap.main(["caption", str(tmp_path), "--captioner", str(folder), "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_checkpoint_cut_short_is_one_line(folder, tmp_path, capsys):
    for path in folder.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    assert distcap.main(["caption", str(tmp_path / "x.png"), "--captioner", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
