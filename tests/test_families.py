"""Captioners of every family, on tiny random checkpoints saved in the true formats."""

import copy
import json

import numpy
import pytest
import torch
from conftest import configure
from PIL import Image

import distcap

WORDS = ["a", "dog", "cat", "with", "red", "hat", "on", "the", "##s", "picture", "of"]
SIZE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.3,
)  # fmt: skip


def save_blip(folder):
    """The layout of Salesforce/blip-image-captioning-base, with a BERT WordPiece vocabulary.

    As there, the start token's id lies past the end of the tokenizer's vocabulary.
    """
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
    )

    vocabulary = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    text = dict(
        SIZE, encoder_hidden_size=32, vocab_size=len(vocabulary) + 2, max_position_embeddings=40,
        bos_token_id=len(vocabulary), eos_token_id=1, sep_token_id=4, pad_token_id=0,
    )  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=dict(SIZE, image_size=24, patch_size=8))
    BlipForConditionalGeneration(config).save_pretrained(folder)
    numbers = {word: number for number, word in enumerate(vocabulary)}
    BertTokenizer(vocab=numbers).save_pretrained(folder)
    BlipImageProcessor(size=dict(height=24, width=24)).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "BlipProcessor"}))


def save_vision_encoder_decoder(folder):
    """The layout of ViT-GPT2: a byte-level vocabulary.

    Its one special token is start, end and padding.
    """
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
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = vocabulary["<|endoftext|>"]
    special = dict.fromkeys(["bos_token", "eos_token", "pad_token"], "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    encoder = ViTConfig(**SIZE, image_size=24, patch_size=8)
    decoder = GPT2Config(
        vocab_size=len(vocabulary), n_positions=64, n_embd=48, n_layer=2, n_head=2,
        bos_token_id=end, eos_token_id=end, add_cross_attention=True, initializer_range=0.3,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = VisionEncoderDecoderModel(config)
    ids = dict(decoder_start_token_id=end, eos_token_id=end, pad_token_id=end, bos_token_id=end)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size=dict(height=24, width=24)).save_pretrained(folder)
    # Checkpoints of that age keep the ids in config.json, and have no generation_config.json.
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))


def save_git(folder):
    """The layout of microsoft/git-base: a BERT vocabulary, CLIP's preprocessing."""
    from transformers import BertTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = GitConfig(
        **SIZE, vision_config=dict(SIZE, image_size=24, patch_size=8), vocab_size=len(vocabulary),
        max_position_embeddings=40, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    GitForCausalLM(config).save_pretrained(folder)
    numbers = {word: number for number, word in enumerate(vocabulary)}
    BertTokenizer(vocab=numbers).save_pretrained(folder)
    size = dict(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24))
    CLIPImageProcessor(**size).save_pretrained(folder)


FAMILIES = [save_blip, save_vision_encoder_decoder, save_git]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(folder):
    return distcap.Captioner.load(str(folder), prompt="")


@pytest.fixture(scope="module")
def images():
    rng = numpy.random.default_rng(1)  # Pillow's effect_noise cannot be seeded
    sizes = [(40, 50 + 9 * number, 3) for number in range(4)]
    return [Image.fromarray(rng.integers(0, 256, size, dtype=numpy.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def features(captioner, images):
    with torch.no_grad():
        return captioner.encode(captioner.pixels(images))


def draw(captioner, features, max_length):
    """Samples (B, P + T), and what generate says of each: scores and logits (B, T, V)."""
    wanted = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    output = captioner.sample(features, max_length, **wanted)
    return output.sequences, torch.stack(output.scores, dim=1), torch.stack(output.logits, dim=1)


def of_tokens(logits, words):
    """The log-probabilities of these words: (B, T, V), (B, T) -> (B, T)."""
    return logits.log_softmax(dim=-1).gather(2, words[:, :, None]).squeeze(2)


def test_each_family_has_its_class_and_only_a_blip_has_a_prompt_of_its_own(folder):
    captioner = distcap.Captioner.load(str(folder))
    family = json.loads((folder / "config.json").read_text())["model_type"]
    wanted = {
        "blip": (distcap.Captioner, "a picture of"),
        "vision-encoder-decoder": (distcap.EncoderDecoder, ""),
        "git": (distcap.GIT, ""),
    }
    assert (type(captioner), captioner.prompt) == wanted[family]


def test_tokens_round_trip(captioner):
    texts = ["a dog with the red hats", "cat"]
    tokens = captioner.tokenize(texts, 40)
    assert captioner.decode(tokens) == texts
    assert (tokens[:, 0] == captioner.start[0]).all()
    words = captioner.tokenizer(texts, add_special_tokens=False).input_ids
    assert captioner.mask(tokens).sum(dim=1).tolist() == [len(row) + 1 for row in words]


def test_log_probs_of_samples_equal_those_of_generate(captioner, features):
    """Although pad may be end, and logits may carry an image prefix."""
    tokens, scores, logits = draw(captioner, features, 12)
    with torch.no_grad():
        ours, mask = captioner.log_probs(features, tokens)
    assert mask.sum() > 12
    theirs = of_tokens(scores, tokens[:, 1:])
    torch.testing.assert_close(ours * mask, theirs * mask, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores, logits)  # no warper touched the distribution


def test_log_probs_equal_those_of_the_whole_model(captioner, images, features):
    """From pixels, by transformers' own forward, with no feature reused."""
    tokens = captioner.tokenize(["a dog with the red hat", "the cat on a hat", "dogs", ""], 40)
    encoder_decoder = isinstance(captioner, distcap.EncoderDecoder)
    text = "decoder_input_ids" if encoder_decoder else "input_ids"
    given = {"pixel_values": captioner.pixels(images), text: tokens[:, :-1]}
    with torch.no_grad():
        logits = captioner.model(**given).logits[:, -(tokens.shape[1] - 1) :]
        ours, mask = captioner.log_probs(features, tokens)
    theirs = of_tokens(logits, tokens[:, 1:])
    torch.testing.assert_close(ours * mask, theirs * mask, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_those_of_transformers(captioner, images, features, beams):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(captioner.model.name_or_path).eval()
    given = dict(num_beams=beams, do_sample=False, max_new_tokens=9, min_length=0)
    if isinstance(captioner, distcap.EncoderDecoder):
        given |= dict(decoder_start_token_id=captioner.start[0], pad_token_id=captioner.pad)
        given |= dict(eos_token_id=captioner.end)
    if isinstance(captioner, distcap.GIT):
        given |= dict(input_ids=torch.full((4, 1), captioner.start[0]))
    theirs = model.generate(pixel_values=captioner.pixels(images), **given)
    ours = captioner.search(features, 9, beams=beams)
    assert captioner.decode(ours) == captioner.decode(theirs)


def test_samples_come_image_by_image(captioner, features):
    """Where only the likeliest token is left, each image has its greedy caption, K times."""
    greedy = captioner.decode(captioner.greedy(features, 9))
    drawn = captioner.decode(captioner.sample(features, 9, count=2, top_p=0.0))
    assert len(set(greedy)) > 1
    assert drawn == [caption for caption in greedy for _ in range(2)]


def test_a_prompt_comes_before_every_caption_and_is_not_scored(folder, images):
    """Sampled and scored after the prompt: generate's own numbers, and no prompt in the text."""
    captioner = distcap.Captioner.load(str(folder), prompt="a picture of")
    prefix, words = len(captioner.start), "a dog with the red hat"
    assert prefix > 3 and captioner.decode(captioner.tokenize([words], 40)) == [words]
    assert captioner.tokenize([words, ""], 40)[:, :prefix].tolist() == [captioner.start] * 2
    with torch.no_grad():
        features = captioner.encode(captioner.pixels(images))
        tokens, scores, _ = draw(captioner, features, 9)
        ours, mask = captioner.log_probs(features, tokens)
    assert tokens[:, :prefix].tolist() == [captioner.start] * 4 and tokens.shape[1] <= prefix + 9
    theirs = of_tokens(scores, tokens[:, prefix:])
    assert mask.shape == ours.shape == theirs.shape
    torch.testing.assert_close(ours * mask, theirs * mask, atol=2e-5, rtol=1e-5)


def test_the_prompt_is_saved(folder, tmp_path):
    distcap.Captioner.load(str(folder), prompt="a cat").save(tmp_path)
    assert distcap.Captioner.load(str(tmp_path)).prompt == "a cat"
    assert distcap.Captioner.load(str(tmp_path), prompt="").prompt == ""


def test_both_stages_train_every_family(captioner, folder, clip, world, tmp_path):
    learning, run = distcap.Captioner.load(str(folder)), distcap.Run(tmp_path)
    short = dict(tf_steps=3, steps=2, batch_size=4, samples=2, max_length=12)
    config = configure(**short)
    learner = distcap.Learner(learning, clip, config, config.max_length)
    captions = distcap.learn(learner, world, world[:3], config, run, validate=dict)
    assert [len(captions[row]) for row in ("before", "after")] == [3, 3]
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, log) if "loss" in record]
    assert len(losses) == 5 and all(abs(loss) < 100 for loss in losses)
    before, after = (dict(each.model.named_parameters()) for each in (captioner, learning))
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert all("pooler" in name or "post_layernorm" in name for name in unmoved)


def test_a_saved_captioner_of_every_family_loads_the_same(captioner, tmp_path, images, features):
    captioner.save(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = distcap.Captioner.load(str(tmp_path))
    assert type(again) is type(captioner) and not again.model.training
    assert torch.equal(again.pixels(images), captioner.pixels(images))
    assert torch.equal(again.greedy(features, 9), captioner.greedy(features, 9))


def test_caption_takes_every_family(folder, tmp_path, images, capsys):
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    command = ["caption", str(tmp_path), "--captioner", str(folder), "--device", "cpu"]
    assert distcap.main(command) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == [f"{tmp_path}/{number}.png" for number in range(4)]
    assert all(caption for _, caption in lines)


def test_a_checkpoint_cut_short_is_one_line(folder, tmp_path, capsys):
    for path in folder.iterdir():
        data = path.read_bytes()
        half = data[: len(data) // 2]
        (tmp_path / path.name).write_bytes(half if path.suffix == ".safetensors" else data)
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    command = ["caption", str(tmp_path / "x.png"), "--captioner", str(tmp_path)]
    assert distcap.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path}: cannot load this captioner" in error


@pytest.mark.parametrize("count", [1, 3])
def test_samples_and_greedy_captions_come_from_one_pass(captioner, features, count):
    """The greedy rows are `greedy`'s; the sampled ones come image by image, and of equal draws."""
    greedy = captioner.decode(captioner.greedy(features, 12))
    torch.manual_seed(5)
    sampled, together = captioner.sample_and_greedy(features, 12, count)
    assert captioner.decode(together) == greedy
    assert len(sampled) == 4 * count and len(together) == 4
    torch.manual_seed(5)
    again, _ = captioner.sample_and_greedy(features, 12, count)
    assert torch.equal(sampled, again)
    assert captioner.decode(sampled) != captioner.decode(together.repeat_interleave(count, dim=0))


def test_samples_beside_a_greedy_caption_are_distributed_as_p(captioner, features):
    """Chi-square over the first token: 2,000 draws of one image against its exact distribution."""
    torch.manual_seed(0)
    sampled, _ = captioner.sample_and_greedy(features[:1], 1, 2000)
    prefix = len(captioner.start)
    start = torch.tensor([[*captioner.start, captioner.end]])
    with torch.no_grad():
        inputs = captioner.inputs(features[:1], start[:, :-1], torch.tensor([0]))
        p = captioner.writer(**inputs).logits[0, -1].softmax(dim=-1)
    counts = torch.bincount(sampled[:, prefix], minlength=len(p)).float()
    common = p * 2000 >= 5  # the rare ones together
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = 2000 * torch.cat([p[common], p[~common].sum()[None]])
    kept = expected > 1e-6
    statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_what_captions_of_one_image_share_changes_no_number(captioner, images):
    """Cross-attention's keys and values once an image: log-probabilities and gradients as with a
    row of features for each caption."""
    tokens = captioner.tokenize(["a dog", "the cat on a hat", "a red dog", "cats", "a hat"], 40)
    image_index = torch.tensor([2, 0, 2, 1, 2])

    def score(share):
        captioner.model.zero_grad()
        features = captioner.encode(captioner.pixels(images[:3]))
        if share:
            log_probs, mask = captioner.log_probs(features, tokens, image_index)
        else:
            inputs = captioner.inputs(features, tokens[:, :-1], image_index, share=False)
            words = tokens[:, len(captioner.start) :, None]
            logits = captioner.writer(**inputs).logits[:, -words.shape[1] :]
            log_probs, mask = (
                logits.log_softmax(dim=-1).gather(2, words).squeeze(2),
                captioner.mask(tokens),
            )
        (log_probs * mask).sum().backward()
        named = captioner.model.named_parameters()
        return log_probs * mask, {name: p.grad for name, p in named if p.grad is not None}

    (shared, gradients), (single, twin) = score(True), score(False)
    torch.testing.assert_close(shared, single, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == twin.keys()
    for name, gradient in gradients.items():
        gradient, other = gradient.clone(), twin[name]
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-3)


def saved_bytes(captioner, pixels, tokens):
    """The gradient of a loss of the captions, and how many bytes were kept for it."""
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    captioner.model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        log_probs, mask = captioner.log_probs(captioner.encode(pixels), tokens)
        loss = (log_probs * mask).sum()
    loss.backward()
    grads = {name: weight.grad for name, weight in captioner.model.named_parameters()}
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}, sum(kept)


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_keeps_less_for_the_same_gradient(folder, images, training):
    """In evaluation mode too, as in RL: transformers checkpoints only what is in training."""
    plain = distcap.Captioner.load(str(folder), prompt="")
    thrifty = distcap.Captioner.load(str(folder), prompt="")
    thrifty.checkpoint_vision()
    results = []
    for captioner in (plain, thrifty):
        for module in captioner.model.modules():  # no dropout: the gradients are the same
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        captioner.model.train(training)
        torch.manual_seed(3)
        tokens = captioner.tokenize(["a dog with a hat", "a cat", "the dog", "a red hat"], 12)
        results.append(saved_bytes(captioner, captioner.pixels(images), tokens))
    (whole, bytes_kept), (recomputed, fewer) = results
    assert fewer < 0.9 * bytes_kept
    assert whole.keys() == recomputed.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(recomputed[name], grad, atol=1e-5, rtol=1e-4)


def test_checkpointing_draws_the_same_dropout_again(folder, images):
    """What is computed a second time is what was computed the first time."""
    captioner = distcap.Captioner.load(str(folder), prompt="")
    tokens = captioner.tokenize(["a dog with a hat", "a cat", "the dog", "a red hat"], 12)
    pixels = captioner.pixels(images)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            captioner.checkpoint_vision()
        captioner.model.train()
        torch.manual_seed(4)
        grads.append(saved_bytes(captioner, pixels, tokens)[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4)


def test_a_copy_of_a_checkpointed_captioner_sees_with_its_own_weights(folder, images):
    """The KL regularizer keeps a copy of the captioner as it was."""
    captioner = distcap.Captioner.load(str(folder), prompt="")
    captioner.checkpoint_vision()
    again, tokens = copy.deepcopy(captioner), captioner.tokenize(["a dog with a hat"] * 4, 12)
    pixels = captioner.pixels(images)
    before, _ = captioner.log_probs(captioner.encode(pixels), tokens)
    with torch.no_grad():
        for weight in captioner.vision.parameters():
            weight.zero_()
    blind, _ = captioner.log_probs(captioner.encode(pixels), tokens)
    copied, _ = again.log_probs(again.encode(pixels), tokens)
    assert torch.equal(copied, before) and not torch.equal(blind, before)


@pytest.mark.parametrize("thrifty", [False, True])
def test_a_frozen_vision_tower_does_not_move(captioner, folder, clip, world, thrifty):
    learning = distcap.Captioner.load(str(folder))
    short = dict(tf_steps=2, steps=2, batch_size=4, max_length=12, freeze_vision=True)
    config = configure(**short, gradient_checkpointing=thrifty)
    learner = distcap.Learner(learning, clip, config, config.max_length)
    distcap.learn(learner, world, world[:2], config, distcap.Run(), validate=dict)
    still = {name for name, _ in captioner.model.named_parameters()}
    vision = {id(weight) for weight in learning.vision.parameters()}
    before = dict(captioner.model.named_parameters())
    moved = {n: not before[n].equal(w) for n, w in learning.model.named_parameters()}
    seen = {n for n, w in learning.model.named_parameters() if id(w) in vision}
    assert seen and seen < still and not any(moved[name] for name in seen)
    assert sum(moved[name] for name in still - seen) > 0.8 * len(still - seen)
