"""The captioner: how it samples, searches, scores and pads; its checkpoints."""

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
    assert tokens[0, 3] == captioner.end and (tokens[0, 4:] == captioner.pad).all()
    assert tokens[1, 8] == captioner.end
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
    log_probs, mask = captioner.log_probs(features[:2], tokens)
    assert log_probs.shape == mask.shape and torch.equal(mask, captioner.mask(tokens))
    attention = torch.ones(1, features.shape[1])
    for row in range(2):
        for position in range(int(mask[row].sum())):
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
    wanted, _ = captioner.log_probs(features[:1], short)
    found, mask = captioner.log_probs(features[:1], long)
    torch.testing.assert_close(found[:, :width], wanted)
    assert mask[0].tolist() == [1] * width + [0] * 5


def test_log_probs_of_samples_equal_those_of_generate(captioner, features):
    """What is scored is what was sampled: no top-k and no temperature touched the distribution."""
    wanted = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    output = captioner.sample(features, 20, **wanted)
    theirs = torch.stack(output.scores, dim=1).log_softmax(dim=-1)
    theirs = theirs.gather(2, output.sequences[:, 1:, None]).squeeze(2)
    ours, mask = captioner.log_probs(features, output.sequences)
    torch.testing.assert_close(ours.detach() * mask, theirs * mask, atol=2e-5, rtol=1e-5)
    for score, logit in zip(output.scores, output.logits):
        torch.testing.assert_close(score, logit)


def test_a_checkpoint_with_other_generation_settings_writes_the_same(
    captioner, features, monkeypatch
):
    """Most checkpoints bring settings of their own, and generate obeys them unless told not to."""

    def write(writer):
        torch.manual_seed(3)
        return writer.sample(features, 20), writer.greedy(features, 20)

    plain = write(captioner)
    settings = dict(
        top_k=3, temperature=0.1, min_p=0.3, num_beams=4, min_new_tokens=9,
        suppress_tokens=[7, 8, 9], num_return_sequences=2, repetition_penalty=3.0,
        no_repeat_ngram_size=1,
    )  # fmt: skip
    generation_config = captioner.model.text_decoder.generation_config
    for setting, value in settings.items():
        monkeypatch.setattr(generation_config, setting, value)
    again = distcap.Captioner(captioner.model, captioner.image_processor, captioner.tokenizer)
    assert all(torch.equal(old, new) for old, new in zip(plain, write(again)))


def test_samples_vary_and_greedy_captions_do_not(captioner, features):
    assert not torch.equal(captioner.sample(features, 9), captioner.sample(features, 9))
    greedy = captioner.greedy(features, 9)
    assert torch.equal(greedy, captioner.greedy(features, 9))
    with torch.no_grad():
        first = captioner.model.text_decoder(
            input_ids=greedy[:, :1],
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2]),
        ).logits[:, -1]
    assert torch.equal(first.argmax(dim=-1), greedy[:, 1])
    assert greedy.shape[1] <= 10


def test_the_samples_of_an_image_stand_in_a_row(captioner, features):
    """Where only the likeliest token is left, each image has its greedy caption, K times."""
    greedy = captioner.greedy(features, 9)
    drawn = captioner.sample(features, 9, count=3, top_p=0.0)
    assert len(greedy.unique(dim=0)) > 1  # otherwise any order would do
    assert torch.equal(drawn, greedy.repeat_interleave(3, dim=0))
    assert len(captioner.sample(features, 9, count=3).unique(dim=0)) > len(features)


def test_more_beams_find_likelier_captions(captioner, features):
    """A beam may lose what greedy search finds, but not over several images."""

    def likelihood(tokens):
        log_probs, mask = captioner.log_probs(features, tokens)
        return (log_probs * mask).sum().item()

    with torch.no_grad():
        greedy, searched = captioner.greedy(features, 4), captioner.search(features, 4, beams=5)
        assert torch.equal(captioner.search(features, 4), greedy)
        assert likelihood(searched) > likelihood(greedy)


def test_scoring_reaches_the_pixels_with_a_gradient_and_writing_has_none(captioner):
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    features = captioner.encode(pixels)
    for tokens in (captioner.greedy(features, 5), captioner.sample(features, 5)):
        assert not tokens.is_floating_point() and not tokens.requires_grad
    log_probs, mask = captioner.log_probs(features, captioner.tokenize(["two shapes"], 20))
    (log_probs * mask).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_checkpoint_round_trip_is_an_ordinary_folder(captioner, features, tmp_path, world):
    from transformers import AutoProcessor, BlipForConditionalGeneration

    captioner.save(tmp_path)
    loaded = distcap.Captioner.load(str(tmp_path))
    assert not loaded.model.training
    tokens = captioner.tokenize(["a red ring above a blue bar"], 20)
    assert torch.equal(loaded.tokenize(["a red ring above a blue bar"], 20), tokens)
    wanted, _ = captioner.log_probs(features[:1], tokens)
    found, _ = loaded.log_probs(features[:1], tokens)
    torch.testing.assert_close(found, wanted)
    image = [world[0].image]
    assert torch.equal(loaded.pixels(image), captioner.pixels(image))
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    model = BlipForConditionalGeneration.from_pretrained(tmp_path)  # transformers alone reads it
    inputs = AutoProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")
    theirs = model.generate(pixel_values=inputs.pixel_values, max_new_tokens=20)
    ours = loaded.greedy(loaded.encode(loaded.pixels(image)), 20)
    assert captioner.decode(theirs) == captioner.decode(ours)


def test_a_captioner_is_loaded_in_full_precision(captioner, tmp_path):
    """transformers 5 keeps the precision that the weights were saved in: too little to train in."""
    captioner.save(tmp_path)
    half = distcap.Captioner.load(str(tmp_path))
    half.model.half()
    half.save(tmp_path)
    loaded = distcap.Captioner.load(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_weights_that_are_missing_are_not_made_up(captioner, tmp_path):
    from safetensors.torch import load_file, save_file

    captioner.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "crossattention" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(distcap.UserError, match="lacks the weights"):
        distcap.Captioner.load(str(tmp_path))


def test_more_tokens_than_there_are_positions_are_refused(captioner):
    captioner.check_length(31)
    captioner.greedy(torch.zeros(1, 4, 96), 31)
    with pytest.raises(distcap.UserError, match=r"--max-length 32: .* at most 31 tokens"):
        captioner.check_length(32)


def test_loading_explains_what_is_wrong(tmp_path):
    def complaint(name):
        with pytest.raises(distcap.UserError) as caught:
            distcap.Captioner.load(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "not a checkpoint" in complaint(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "a model of type gpt2; captioners are of type blip, " in complaint(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "cannot load" in complaint(str(tmp_path))
    assert "Hub" in complaint("someone/no-such-captioner")
    assert "Hub" in complaint("not a/valid/name")


def test_bf16_changes_the_arithmetic_and_no_weight(world):
    """Log-probabilities, weights and gradients stay in fp32."""
    captioner = distcap.toy_captioner(0)
    pixels = captioner.pixels([example.image for example in world[:4]])
    tokens = captioner.tokenize([example.references[0] for example in world[:4]], 20)

    def score():
        features = captioner.encode(pixels)
        log_probs, mask = captioner.log_probs(features, tokens)
        return features, (log_probs * mask).detach()

    features, exact = score()
    captioner.bf16 = True
    rounded, found = score()
    assert not rounded.equal(features) and not found.equal(exact)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.15, rtol=0.05)
    sampled, greedy = captioner.sample_and_greedy(rounded, 9, 2)
    assert len(sampled) == 8 and len(greedy) == 4
    captioner.log_probs(rounded, tokens)[0].sum().backward()
    assert all(p.dtype == torch.float32 for p in captioner.model.parameters())
    gradients = [p.grad for p in captioner.model.parameters() if p.grad is not None]
    assert gradients and all(grad.dtype == torch.float32 for grad in gradients)


def test_a_step_in_bf16_judges_in_fp32(learn):
    learner, batch = learn()
    learner.captioner.bf16 = True
    rollout = learner.roll_out(learner.captioner.encode(batch.pixels), batch)
    advantages, _, _ = learner.judge(rollout, batch)
    assert rollout.caption_embeddings.dtype == advantages.dtype == torch.float32
    embeddings = learner.clip.embed_captions(rollout.captions)
    assert rollout.caption_embeddings.equal(embeddings)  # the same without the captioner
    loss, _ = learner.reinforce_step(batch)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
