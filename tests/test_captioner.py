"""Section 3: sampling, scoring and padding of the captioner; checkpoints."""

import json

import pytest
import torch

import distcap


@pytest.fixture(scope="module")
def features(captioner, world):
    with torch.no_grad():
        return captioner.encode(captioner.pixels([example.image for example in world[:6]]))


def test_pixels_are_what_the_processor_makes(captioner, world):
    pixels = captioner.pixels([example.image for example in world[:2]])
    assert pixels.shape == (2, 3, 32, 32)
    one = captioner.image_processor(world[1].image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels[1:], one)


def test_random_pixels_reach_the_features(captioner):
    """BLIP's default initialisation of the vision tower is 1e-10: it would be blind."""
    features = captioner.encode(torch.randn(2, 3, 32, 32))
    assert (features[0] - features[1]).abs().mean() > 0.1


def test_tokenize_starts_ends_and_pads(captioner):
    tokens = captioner.tokenize(["two shapes", "a red ring above a blue bar"], max_length=20)
    assert tokens.shape == (2, 9)
    assert (tokens[:, 0] == captioner.start[0]).all()
    assert tokens[0, 3] == captioner.end and (tokens[0, 4:] == captioner.pad).all() and tokens[1, 8] == captioner.end
    assert captioner.decode(tokens) == ["two shapes", "a red ring above a blue bar"]
    assert captioner.tokenizer.unk_token_id not in tokens


def test_tokenize_cuts_long_captions_and_takes_empty_ones(captioner):
    tokens = captioner.tokenize(["a red ring above a blue bar", ""], max_length=3)
    assert tokens.shape == (2, 4) and captioner.end not in tokens[0]
    assert captioner.mask(tokens).tolist() == [[1, 1, 1], [1, 0, 0]]


def test_mask_ends_with_the_first_end_token(captioner):
    start, end, pad = captioner.start[0], captioner.end, captioner.pad
    tokens = torch.tensor([[start, 9, end, pad], [start, 9, 9, 9], [start, end, end, end]])
    assert captioner.mask(tokens).tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]


def test_log_probs_are_those_of_a_slow_loop(captioner, features):
    tokens = captioner.tokenize(["a red ring above a blue bar", "two shapes"], 20)
    log_probs = captioner.log_probs(features[:2], tokens).detach()
    attention = torch.ones(1, features.shape[1])
    for row in range(2):
        for position in range(int(captioner.mask(tokens)[row].sum())):
            logits = captioner.model.text_decoder(
                input_ids=tokens[row : row + 1, : position + 1],
                encoder_hidden_states=features[row : row + 1],
                encoder_attention_mask=attention,
            ).logits[0, -1]
            by_hand = logits.log_softmax(0)[tokens[row, position + 1]]
            torch.testing.assert_close(log_probs[row, position], by_hand, atol=1e-5, rtol=1e-5)


def test_padding_does_not_change_log_probs(captioner, features):
    short = captioner.tokenize(["two shapes"], 20)
    long = torch.nn.functional.pad(short, (0, 5), value=captioner.pad)
    width = short.shape[1] - 1
    torch.testing.assert_close(
        captioner.log_probs(features[:1], long)[:, :width], captioner.log_probs(features[:1], short)
    )


def test_log_probs_of_samples_equal_those_of_generate(captioner, features, monkeypatch):
    """What is scored is what was sampled: generate's own log-probabilities, untouched by top-k or a temperature."""
    seen = {}
    generate = captioner.model.text_decoder.generate

    def spy(**options):
        output = generate(**options, return_dict_in_generate=True, output_scores=True, output_logits=True)
        seen.update(output)
        return output.sequences

    monkeypatch.setattr(captioner.model.text_decoder, "generate", spy)
    tokens = captioner.generate(features, 20, do_sample=True)
    mask = captioner.mask(tokens)
    theirs = torch.stack(seen["scores"], dim=1).log_softmax(dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    ours = captioner.log_probs(features, tokens).detach()
    torch.testing.assert_close(ours * mask, theirs * mask, atol=2e-5, rtol=1e-5)
    for score, logit in zip(seen["scores"], seen["logits"]):
        torch.testing.assert_close(score, logit)  # no warper touched the distribution


def test_a_checkpoint_with_other_generation_settings_samples_the_same(captioner, features, monkeypatch):
    torch.manual_seed(3)
    plain = captioner.generate(features, 20, do_sample=True)
    settings = dict(top_k=3, temperature=0.1, min_p=0.3, num_beams=4, min_new_tokens=9, suppress_tokens=[7, 8, 9],
                    num_return_sequences=2, repetition_penalty=3.0, no_repeat_ngram_size=1)  # fmt: skip
    for setting, value in settings.items():
        monkeypatch.setattr(captioner.model.text_decoder.generation_config, setting, value)
    again = distcap.Captioner(captioner.model, captioner.image_processor, captioner.tokenizer)
    torch.manual_seed(3)
    assert torch.equal(again.generate(features, 20, do_sample=True), plain)


def test_samples_vary_and_greedy_captions_do_not(captioner, features):
    assert not torch.equal(
        captioner.generate(features, 9, do_sample=True), captioner.generate(features, 9, do_sample=True)
    )
    greedy = captioner.generate(features, 9)
    assert torch.equal(greedy, captioner.generate(features, 9))
    with torch.no_grad():
        first = captioner.model.text_decoder(
            input_ids=greedy[:, :1],
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2]),
        ).logits[:, -1]
    assert torch.equal(first.argmax(dim=-1), greedy[:, 1])
    assert greedy.shape[1] <= 10


def test_scoring_is_differentiable_down_to_the_pixels_and_generating_is_not(captioner):
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    features = captioner.encode(pixels)
    assert not captioner.generate(features, 5).is_floating_point()
    captioner.log_probs(features, captioner.tokenize(["two shapes"], 20)).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_checkpoint_round_trip_is_an_ordinary_folder(captioner, features, tmp_path, world):
    from transformers import AutoProcessor, BlipForConditionalGeneration

    captioner.save(tmp_path)
    loaded = distcap.Captioner.load(str(tmp_path)).eval()
    tokens = captioner.tokenize(["a red ring above a blue bar"], 20)
    assert torch.equal(loaded.tokenize(["a red ring above a blue bar"], 20), tokens)
    torch.testing.assert_close(loaded.log_probs(features[:1], tokens), captioner.log_probs(features[:1], tokens))
    image = [world[0].image]
    assert torch.equal(loaded.pixels(image), captioner.pixels(image))
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    model = BlipForConditionalGeneration.from_pretrained(tmp_path)  # and transformers alone reads it
    inputs = AutoProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")
    theirs = model.generate(pixel_values=inputs.pixel_values, max_new_tokens=20)
    ours = loaded.generate(loaded.encode(loaded.pixels(image)), 20)
    assert captioner.decode(theirs) == captioner.decode(ours)


def test_weights_that_are_missing_are_not_made_up(captioner, tmp_path):
    from safetensors.torch import load_file, save_file

    captioner.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "crossattention" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(distcap.UserError, match="lacks the weights"):
        distcap.Captioner.load(str(tmp_path))


def test_loading_explains_what_is_wrong(tmp_path):
    with pytest.raises(distcap.UserError, match="not a checkpoint"):
        distcap.Captioner.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(distcap.UserError, match="gpt2"):
        distcap.Captioner.load(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(distcap.UserError, match="cannot load"):
        distcap.Captioner.load(str(tmp_path))
    with pytest.raises(distcap.UserError, match="Hub"):
        distcap.Captioner.load("someone/no-such-captioner")
    with pytest.raises(distcap.UserError, match="Hub"):
        distcap.Captioner.load("not a/valid/name")
