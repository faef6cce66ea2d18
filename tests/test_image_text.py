"""Captioners of today, on tiny random checkpoints saved in the true formats of their families."""

import json

import numpy
import pytest
import torch
from conftest import configure
from PIL import Image
from tokenizers import pre_tokenizers

import distcap

TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.3,
)  # fmt: skip
WORDS = ["a", "dog", "cat", "with", "red", "hat", "on", "the"]


def vocabulary(special, marker, letters=()):
    """{token: id} with merges that make WORDS, alone and after a space, single tokens."""
    letters = letters or [marker, *map(chr, range(33, 127)), "\n"]
    merges = []
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    merges = list(dict.fromkeys([*merges, *((marker, word) for word in WORDS)]))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if marker == "▁" else []
    tokens = dict.fromkeys([*special, *bytes_, *letters, *("".join(pair) for pair in merges)])
    return {token: number for number, token in enumerate(tokens)}, merges


def byte_level(special):
    return vocabulary(special, "Ġ", sorted(pre_tokenizers.ByteLevel.alphabet()))


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


IDEFICS3 = (  # as in HuggingFaceM4/Idefics3-8B-Llama3; SmolVLM's differs in its first token
    "<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def save_idefics3(folder):
    """Pictures are cut into tiles, more of a wide one; the answer follows "Assistant:"."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<fake_token_around_image>"]
    special += ["<image>", "<end_of_utterance>", "<global-img>", *tiles]
    vocab, merges = byte_level(special)
    backend = Qwen2Tokenizer(vocab=vocab, merges=merges)._tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
        pad_token="<pad>", additional_special_tokens=special[3:],
    )  # fmt: skip
    tokenizer.padding_side = "right"  # as of the real one, and not what generation needs
    images = Idefics3ImageProcessor(
        size=dict(longest_edge=64), max_image_size=dict(longest_edge=32)
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS3)
    config = Idefics3Config(
        text_config=dict(TEXT, model_type="llama", vocab_size=len(tokenizer)), scale_factor=2,
        vision_config=dict(VISION, image_size=32, patch_size=8), image_token_id=4, pad_token_id=0,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=[5, 2], bos_token_id=1, pad_token_id=0)
    save(folder, model, processor)


QWEN = (  # as in Qwen/Qwen2.5-VL-3B-Instruct, without its films
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


def save_qwen(folder):
    """Pictures at their own size: patches of all pictures in one tensor, and 3D positions."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    vocab, merges = byte_level(special)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", additional_special_tokens=special[1:]
    )
    options = dict(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    images, videos = Qwen2VLImageProcessor(**options), Qwen2VLVideoProcessor(patch_size=8)
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=QWEN)
    vision = dict(VISION, out_hidden_size=32, depth=2, num_heads=2, patch_size=8, window_size=32)
    vision |= dict(fullatt_block_indexes=[1])
    text = dict(TEXT, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2)
    text["rope_parameters"] = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6,
        vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    settings = dict(eos_token_id=[2, 0], pad_token_id=0, do_sample=True, temperature=1e-6)
    model.generation_config.update(**settings, repetition_penalty=1.05)
    save(folder, model, processor)


def gemma(special, **options):
    from transformers import GemmaTokenizer

    vocab, merges = vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *special], "▁")
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, **options)
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def save_paligemma(folder):
    """No chat: `<image>`s, <bos>, "caption en" and a line break, all of which see each other."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    images = SiglipImageProcessor(size=dict(height=32, width=32))
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, gemma(["<image>"]))
    text = dict(TEXT, bos_token_id=2, eos_token_id=1, head_dim=8, model_type="gemma")
    config = PaliGemmaConfig(
        text_config=dict(text, vocab_size=len(processor.tokenizer)), projection_dim=32,
        vision_config=dict(VISION, image_size=32, patch_size=8, model_type="siglip_vision_model"),
        image_token_id=5, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    save(folder, PaliGemmaForConditionalGeneration(config), processor)


GEMMA3 = (  # as in google/gemma-3-4b-it, without its system messages
    "{{ bos_token }}{%- for message in messages -%}{%- if (message['role'] == 'assistant') -%}"
    "{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' }}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}"
    "{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def save_gemma3(folder):
    """Its turns end with a token of their own; image tokens see each other; sliding windows."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    special = ["<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>"]
    names = dict(boi_token=special[0], eoi_token=special[1], image_token=special[2])
    tokenizer = gemma([*special, "<end_of_turn>"], extra_special_tokens=names)
    images = Gemma3ImageProcessor(size=dict(height=32, width=32))
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=GEMMA3)
    text = dict(TEXT, bos_token_id=2, eos_token_id=1, head_dim=8, sliding_window=6)
    text["layer_types"] = ["sliding_attention", "full_attention"]
    config = Gemma3Config(
        text_config=dict(text, vocab_size=len(tokenizer), query_pre_attn_scalar=8),
        vision_config=dict(VISION, image_size=32, patch_size=8), mm_tokens_per_image=4,
        boi_token_index=5, eoi_token_index=6, image_token_index=7, tie_word_embeddings=False,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=[1, 9], top_k=64, top_p=0.95, do_sample=True)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # from 0
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)  # or words outdo pictures
    save(folder, model, processor)


LLAVA = (  # as in llava-hf/llava-1.5-7b-hf, which has no token for the end of a turn
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr("
    "'type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in"
    " message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def save_llava(folder):
    """A CLIP's tokens in a Llama's context."""
    from transformers import (
        CLIPImageProcessor,
        LlamaTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vocab, merges = vocabulary(["<unk>", "<s>", "</s>", "<image>", "<pad>"], "▁")
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, pad_token="<pad>", additional_special_tokens=["<image>"],
        add_bos_token=True,
    )  # fmt: skip
    images = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=LLAVA, num_additional_image_tokens=1,
    )  # fmt: skip
    vision = dict(VISION, image_size=32, patch_size=8, model_type="clip_vision_model")
    config = LlavaConfig(
        text_config=dict(TEXT, model_type="llama", vocab_size=len(tokenizer)),
        vision_config=dict(vision, num_hidden_layers=3), image_token_index=3, pad_token_id=4,
    )  # fmt: skip
    save(folder, LlavaForConditionalGeneration(config), processor)


def save_blip2(folder):
    """No chat, no prompt; image tokens before OPT's <s>; captions end with a line break."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        GPT2Tokenizer,
    )

    vocab, merges = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<image>"])
    special = dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>")
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, **special, add_bos_token=True)
    images = BlipImageProcessor(size=dict(height=32, width=32))
    processor = Blip2Processor(images, tokenizer, num_query_tokens=4)
    text = dict(
        model_type="opt", hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=128, word_embed_proj_dim=32,
        init_std=0.3, bos_token_id=2, eos_token_id=vocab["Ċ"], pad_token_id=1,
    )  # fmt: skip
    qformer = dict(VISION, encoder_hidden_size=32, vocab_size=20, cross_attention_frequency=1)
    config = Blip2Config(
        text_config=text, qformer_config=qformer, num_query_tokens=4, image_token_index=4,
        vision_config=dict(VISION, image_size=32, patch_size=8),
    )  # fmt: skip
    save(folder, Blip2ForConditionalGeneration(config), processor)


FAMILIES = [save_idefics3, save_qwen, save_paligemma, save_gemma3, save_llava, save_blip2]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    """Four pictures of four shapes, which Idefics3 and Qwen give different numbers of tokens."""
    noise = numpy.random.default_rng(2)  # Pillow's own cannot be seeded
    sizes = [(60, 60), (90, 40), (30, 96), (64, 33)]
    pixels = [noise.normal(128, 80, (height, width)).clip(0, 255) for width, height in sizes]
    return [Image.fromarray(each.astype(numpy.uint8)).convert("RGB") for each in pixels]


@pytest.fixture(scope="module")
def captioner(folder):
    return distcap.Captioner.load(str(folder))


@pytest.fixture(scope="module")
def features(captioner, images):
    return captioner.encode(captioner.pixels(images))


def draw(captioner, features, count, max_length, **options):
    """Samples (K*B, T), and the scores that generate gives of each token (K*B, T, V)."""
    own = torch.arange(len(features)).repeat_interleave(count)
    given = captioner.inputs(features, torch.zeros(len(own), 0), own)
    options |= dict(do_sample=True, top_k=0, return_dict_in_generate=True, output_scores=True)
    output = captioner.writer.generate(**given, **options, max_new_tokens=max_length)
    return output.sequences[:, given["input_ids"].shape[1] :], torch.stack(output.scores, dim=1)


def close(ours, theirs, mask):
    ours, theirs = (each.masked_fill(mask == 0, 0.0) for each in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


def test_log_probs_of_samples_equal_those_of_generate(captioner, features):
    tokens, scores = draw(captioner, features, 2, 12)
    row = torch.arange(4).repeat_interleave(2)
    with torch.no_grad():
        ours, mask = captioner.log_probs(features, tokens, row)
    theirs = scores.log_softmax(dim=-1).gather(2, tokens[:, :, None]).squeeze(2)
    assert mask.sum() > 12 and mask.shape == ours.shape == theirs.shape
    close(ours, theirs, mask)


def test_a_batch_of_mixed_sizes_equals_picture_by_picture(captioner, images, features):
    tokens, _ = draw(captioner, features, 1, 12)
    greedy = captioner.decode(captioner.greedy(features, 12))
    with torch.no_grad():
        together, mask = captioner.log_probs(features, tokens)
        for row, image in enumerate(images):
            alone = captioner.encode(captioner.pixels([image]))
            close(captioner.log_probs(alone, tokens[row : row + 1])[0][0], together[row], mask[row])
            assert captioner.decode(captioner.greedy(alone, 12)) == [greedy[row]]


def chat(processor, image, prompt):
    """What transformers makes of a picture and a prompt."""
    if not processor.chat_template:
        text = "" if "Blip2" in type(processor).__name__ else f"<image>{prompt}"
        return processor(images=image, text=text, return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_those_of_transformers(folder, captioner, images, features, beams):
    """Picture by picture, and in a batch, whatever generation settings the checkpoint brings."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    options = dict(num_beams=beams, do_sample=False, max_new_tokens=9, eos_token_id=captioner.end)
    options |= dict(suppress_tokens=[model.config.image_token_id], repetition_penalty=1.0)
    theirs = []
    for image in images:
        given = chat(processor, image, captioner.prompt)
        given.pop("labels", None)
        theirs.append(model.generate(**given, **options)[0, given["input_ids"].shape[1] :])
    ours = captioner.search(features, 9, beams=beams)
    for tokens, wanted in zip(ours, theirs):
        assert tokens[: len(wanted)].equal(wanted)
        assert (tokens[len(wanted) :] == captioner.pad).all()
    assert len({tuple(row) for row in ours.tolist()}) > 1


def test_pictures_are_seen(captioner, features):
    tokens = captioner.tokenize(["a dog with the red hat"] * 4, 20)
    with torch.no_grad():
        log_probs, mask = captioner.log_probs(features, tokens)
    spread = log_probs.masked_fill(mask == 0, 0.0).std(dim=0)
    assert spread.max() > 0.01


def test_samples_and_greedy_captions_come_from_one_pass(captioner, features):
    greedy = captioner.greedy(features, 9)
    sampled, together = captioner.sample_and_greedy(features, 9, 3)
    assert captioner.decode(together) == captioner.decode(greedy)
    row = torch.arange(4).repeat_interleave(3)
    drawn = captioner.sample(features, 9, count=3, top_p=0.0)  # the likeliest token alone is left
    assert captioner.decode(drawn) == [captioner.decode(greedy)[image] for image in row]
    assert len(sampled) == 12 and captioner.decode(sampled) != captioner.decode(drawn)


def test_tokens_are_those_of_the_chat_with_the_caption_in_it(folder, captioner):
    """After "Assistant:" a caption begins with a space, after a line break it does not; its end is
    what the template has there, not the end of the text."""
    texts = ["a dog with the red hat", "the cat"]
    tokens = captioner.tokenize(texts, 20)
    assert captioner.decode(tokens) == texts and captioner.start == []
    first, end = {
        "save_idefics3": ("Ġ", "<end_of_utterance>"), "save_qwen": ("a", "<|im_end|>"),
        "save_paligemma": ("a", "<eos>"), "save_gemma3": ("a", "<end_of_turn>"),
        "save_llava": ("▁", "</s>"), "save_blip2": ("a", "Ċ"),
    }[folder.name[:-1]]  # fmt: skip
    words = captioner.tokenizer.convert_ids_to_tokens(tokens[0])
    assert words[0].startswith(first) and words[-1] == end and words.count(end) == 1
    assert captioner.mask(tokens)[0].all() and captioner.mask(tokens)[1].sum() == len(words) - 4
    assert captioner.tokenize(texts, 3).shape == (2, 3)


def test_a_placeholder_is_never_sampled_nor_likely(captioner, features):
    """Its embedding would take the place of a part of the picture, or end the run."""
    place = captioner.model.config.image_token_id
    with torch.no_grad():
        inputs = captioner.inputs(features, torch.zeros(4, 0), torch.arange(4))
        logits = captioner.model(**inputs).logits[:, -1]
    if place < logits.shape[1]:
        assert (logits[:, place] == -torch.inf).all()
        assert logits.isfinite().sum() == 4 * (logits.shape[1] - 1)


def test_a_saved_captioner_loads_the_same(captioner, features, images, tmp_path):
    captioner.save(tmp_path)
    again = distcap.Captioner.load(str(tmp_path))
    assert type(again) is distcap.ImageText and again.prompt == captioner.prompt
    assert (again.end, again.pad, again.before) == (captioner.end, captioner.pad, captioner.before)
    assert again.greedy(again.encode(again.pixels(images)), 9).equal(captioner.greedy(features, 9))


def test_a_prompt_of_the_users_takes_the_place_of_the_usual_one(folder, captioner, tmp_path):
    usual = {"save_paligemma0": "caption en", "save_blip20": ""}
    assert captioner.prompt == usual.get(folder.name, "Describe this picture in one sentence.")
    asked = distcap.Captioner.load(str(folder), prompt="the red hat")
    assert "the red hat" in asked.before
    tokens = asked.pixels([Image.new("RGB", (40, 40))])[0]["input_ids"][0]
    assert "the red hat" in asked.tokenizer.decode(tokens)
    asked.save(tmp_path)
    assert distcap.Captioner.load(str(tmp_path)).prompt == "the red hat"
    texts = ["a dog with the red hat", "the cat"]
    assert asked.decode(asked.tokenize(texts, 20)) == texts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_five_steps_change_only_what_is_trainable(folder, clip, world, tmp_path, precision):
    learning = distcap.Captioner.load(str(folder))
    learning.bf16 = precision == "bf16"
    learning.train_only(r"layers\.1\..*(mlp|fc2)")
    before = {name: each.clone() for name, each in learning.model.named_parameters()}
    short = dict(tf_steps=2, steps=5, batch_size=4, samples=2, max_length=9, regularizer="kl")
    config, run = configure(**short, precision=precision, learning_rate=1e-2), distcap.Run(tmp_path)
    learner = distcap.Learner(learning, clip, config, config.max_length)
    captions = distcap.learn(learner, world, world[:3], config, run, validate=dict)
    assert [len(captions[row]) for row in ("before", "after")] == [3, 3]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(records) == 7 and all(record["loss"] is not None for record in records)

    for name, each in learning.model.named_parameters():
        chosen = "layers.1." in name and ("mlp" in name or "fc2" in name)
        assert each.requires_grad == chosen and each.equal(before[name]) != chosen, name
        frozen = torch.bfloat16 if precision == "bf16" else torch.float32
        assert each.dtype == (torch.float32 if chosen else frozen)
    learning.save(tmp_path / "captioner")
    again = distcap.Captioner.load(str(tmp_path))
    for name, each in again.model.named_parameters():
        assert each.dtype == torch.float32
        assert each.equal(dict(learning.model.named_parameters())[name].float())


def test_gradients_reach_all_of_the_model(captioner, images):
    tokens = captioner.tokenize(["a dog with the red hat"] * 4, 20)
    captioner.model.zero_grad()
    log_probs, mask = captioner.log_probs(captioner.encode(captioner.pixels(images)), tokens)
    log_probs.masked_fill(mask == 0, 0.0).sum().backward()
    still = [name for name, each in captioner.model.named_parameters() if each.grad is None]
    unused = ("pooler", "head.", "post_layernorm", "vision_tower.encoder.layers.2")
    unused += ("vision_model.encoder.layers.2", "post_layer_norm")
    assert [name for name in still if not any(part in name for part in unused)] == []


def test_caption_takes_every_family_with_workers(folder, tmp_path, images, capsys):
    """A batch of many pictures comes from a worker as many tensors; few files may be open."""
    import resource
    import signal

    def stop(*_):
        raise TimeoutError("workers wait for files that they may not open")

    for number, image in enumerate(images * 15):
        image.save(tmp_path / f"{number:02}.png")
    (tmp_path / "05.png").write_bytes(b"no picture")
    command = ["caption", str(tmp_path), "--captioner", str(folder), "--device", "cpu"]
    command += ["--batch-size", "30", "--beams", "1", "--max-length", "7"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        assert distcap.main(command) == 1
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        f"{tmp_path}/{number:02}.png" for number in range(60) if number != 5
    ]


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, capsys):
    from transformers import Blip2Config, Florence2Config, LlamaConfig

    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    t5 = Blip2Config(text_config=dict(model_type="t5"), use_decoder_only_language_model=False)
    for config in (Florence2Config(), t5, LlamaConfig()):
        folder = tmp_path / config.model_type
        config.save_pretrained(folder)
        (folder / "model.safetensors").touch()
        command = ["caption", str(tmp_path / "x.png"), "--captioner", str(folder)]
        assert distcap.main([*command, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"a model of type {config.model_type}; capt" in error
        assert "blip, vision-encoder-decoder, git, or image-text-to-text with a decoder" in error


def test_memory_that_is_too_small_is_one_line(monkeypatch, tmp_path, capsys):
    save_llava(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(distcap.UserError, match=r"its weights take .* GiB, more than is free"):
        distcap.Captioner.load(str(tmp_path), "cuda")

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    monkeypatch.setattr(distcap.Captioner, "encode", fail)
    monkeypatch.setattr(distcap.ImageText, "encode", fail)
    command = ["caption", str(tmp_path / "x.png"), "--captioner", str(tmp_path)]
    assert distcap.main([*command, "--device", "cpu"]) == 1  # the batch was halved down to one
    error = capsys.readouterr().err.splitlines()[-1]
    assert "x.png: not enough memory for it" in error


def test_train_only_names_what_it_does_not_find(captioner):
    with pytest.raises(distcap.UserError, match=r"--train-only no_such: finds no parameter; one"):
        captioner.train_only("no_such")
    with pytest.raises(distcap.UserError, match=r"--train-only \(: not a regular expression"):
        captioner.train_only("(")
    assert all(each.requires_grad for each in captioner.model.parameters())


def test_train_only_on_the_command_line(tmp_path, clip, run, world, capsys):
    """A captioner of today, trained in part, saved, and used by the other verbs."""
    save_qwen(tmp_path / "qwen")
    data = tmp_path / "data"
    distcap.write_examples(data, world[:24])
    command = ["train", str(data), "--captioner", str(tmp_path / "qwen"), "--clip", str(run)]
    command += ["--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4"]
    command += ["--learning-rate", "0.01", "--max-length", "7", "--accumulate", "2"]
    command += ["--device", "cpu", "--precision", "bf16", "--freeze-vision"]
    assert distcap.main([*command, "--train-only", "no_such"]) == 2
    assert not (tmp_path / "run").exists()
    assert distcap.main([*command, "--train-only", r"layers\.1\.mlp"]) == 0
    capsys.readouterr()
    before, after = (
        dict(distcap.Captioner.load(str(tmp_path / name)).model.named_parameters())
        for name in ("qwen", "run")
    )
    still = {name for name in before if after[name].equal(before[name].bfloat16().float())}
    assert {name for name in before if "layers.1.mlp" not in name} == still
    assert distcap.main(["eval", str(data), "--captioner", str(tmp_path / "run")]) == 0
    assert distcap.main(["train", "toy", "--train-only", "x", "--out", str(tmp_path / "y")]) == 2
    assert "--train-only: changes nothing without --captioner" in capsys.readouterr().err


def test_captions_are_cleaned_up():
    """Only the first line, no quotation marks around it; those within it, and apostrophes, stay."""
    captioner = distcap.toy_captioner(0)
    texts = ['"A dog."', "“a dog”", " a  dog\nIt is red.", "\n\n'a dog'\nYes", "a dog's ball"]
    texts += ['"a" and "b"', '"a dog', '"', ""]
    wanted = ["A dog.", "a dog", "a dog", "a dog", "a dog's ball", '"a" and "b"', '"a dog', '"', ""]
    captioner.tokenizer = type("", (), {"batch_decode": lambda *_, **options: texts})()
    assert captioner.decode(torch.zeros(9, 3)) == wanted
