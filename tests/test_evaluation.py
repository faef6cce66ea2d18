"""Measures, against slow twins and values by hand."""

import dataclasses
import gc
import os
import random
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch

import distcap

needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs Java")


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_retrieval_ranks_equal_a_sort():
    queries, targets = unit(10, 4), unit(10, 4)
    slow = []
    for n in range(10):
        scores = [(queries[n] @ target).item() for target in targets]
        slow.append(1 + sum(score > scores[n] for score in scores))
    assert distcap.retrieval_ranks(queries, targets).tolist() == slow


def test_ranks_in_chunks_equal_the_ranks_of_the_whole():
    """At 5,000 pictures the whole would be a matrix of 100 MB. Ties are among these."""
    queries, targets = unit(10, 4), unit(10, 4)
    queries[3], targets[5] = queries[2], targets[4]
    whole = distcap.retrieval_ranks(queries, targets, chunk=10)
    assert whole[4] > 1 and whole[5] > 1  # the tie is lost by both
    for chunk in (1, 3, 256):
        assert torch.equal(distcap.retrieval_ranks(queries, targets, chunk), whole)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_embeddings_that_are_not_finite_are_refused(wrong):
    """No comparison with a NaN is true, so it ranked first: R@1 was 100 %."""
    broken = unit(4, 3)
    broken[2, 1] = wrong
    for pair in ((broken, unit(4, 3)), (unit(4, 3), broken)):
        with pytest.raises(distcap.UserError, match="not finite") as caught:
            distcap.retrieval(*pair)
        assert "\n" not in str(caught.value)


def test_saying_one_thing_scores_nothing():
    same, images = unit(1, 4).expand(8, 4), unit(8, 4)
    measures = distcap.retrieval(same, images)
    assert measures["text_to_image_R@1"] == 1 / 8  # one image of the eight is the nearest: chance
    assert measures["image_to_text_R@1"] == 0  # all tie: all lose
    assert measures["image_to_text_median_rank"] == 8


def test_retrieval_by_hand():
    captions, images = torch.eye(3), torch.eye(3)[[0, 2, 1]]  # two captions are swapped
    measures = distcap.retrieval(captions, images)
    for direction in ("text_to_image", "image_to_text"):
        assert measures[f"{direction}_R@1"] == pytest.approx(1 / 3)
        assert measures[f"{direction}_R@5"] == measures[f"{direction}_R@10"] == 1
        assert measures[f"{direction}_median_rank"] == 3


def test_every_retrieval_measure_equals_a_slow_loop():
    captions, images = unit(130, 6), unit(130, 6)
    captions = torch.nn.functional.normalize(images + 0.6 * captions, dim=1)
    captions[7], images[20] = captions[6], images[21]  # ties
    measures = distcap.retrieval(captions, images, bag_size=4, seed=3)

    def rank(query, targets, own):
        return sum((query @ target >= query @ targets[own] - 1e-6).item() for target in targets)

    for way, queries, targets in (
        ("text_to_image", captions, images),
        ("image_to_text", images, captions),
    ):
        ranks = [rank(query, targets, n) for n, query in enumerate(queries)]
        assert measures.each[f"{way}_median_rank"] == ranks
        assert measures[f"{way}_median_rank"] == statistics.median_low(ranks)
        assert measures[f"{way}_mrr"] == pytest.approx(statistics.fmean(1 / r for r in ranks))
        for k in (1, 5, 10):
            assert measures[f"{way}_R@{k}"] == statistics.fmean(r <= k for r in ranks)
    for n in range(130):
        near = sorted((m for m in range(130) if m != n), key=lambda m: -images[n] @ images[m])[:3]
        bag = images[[n, *near]]
        assert measures.each["bag_R@1"][n] == (rank(captions[n], bag, 0) == 1)
    assert measures["pool"] == 130
    assert 0.1 < measures["text_to_image_R@1"] < measures["bag_R@1"] < 0.9


def test_random_distractors_are_99_others_a_fair_draw_that_the_seed_repeats(monkeypatch):
    drawn, ranks = [], distcap.retrieval_ranks

    def spy(queries, targets, chunk=256, pools=None):
        drawn.append(pools)
        return ranks(queries, targets, chunk, pools)

    monkeypatch.setattr(distcap, "retrieval_ranks", spy)
    captions, images = unit(300, 4), unit(300, 4)
    for seed in (0, 0, 1):
        distcap.retrieval(captions, images, seed=seed)
    first, again, other = drawn[3::4]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (300, 100) and torch.equal(first[:, 0], torch.arange(300))
    assert all(len(set(row.tolist())) == 100 for row in first)
    times = first[:, 1:].flatten().bincount(minlength=300)
    assert times.tolist() == [99] * 300  # each is a distractor equally often
    neighbours = ((first[:, 1:] - first[:, :1]).abs() < 50).float().mean()
    assert 0.2 < neighbours < 0.4  # those that stand near in the data as often as chance has it


def test_pools_of_few_pictures_are_all_of_them():
    captions, images = unit(3, 4), unit(3, 4)
    measures = distcap.retrieval(captions, images)
    assert measures["bag_R@1"] == measures["rd100_R@1"] == measures["text_to_image_R@1"]
    assert distcap.retrieval(captions[:1], images[:1])["bag_R@1"] == 1


def test_one_picture_for_all_finds_nothing_in_any_pool():
    """Where all pictures are one, every rank ties, and ties are lost."""
    measures = distcap.retrieval(unit(200, 4), unit(1, 4).expand(200, 4))
    assert measures["bag_R@1"] == measures["rd100_R@1"] == measures["text_to_image_R@10"] == 0


def test_retrieval_tells_the_directions_apart():
    """The second image is nearest to both captions, yet each image finds its caption."""

    def at(*degrees):
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    captions, images = at(0.0, 40.0), at(-50.0, 30.0)
    measures = distcap.retrieval(captions, images)
    assert measures["text_to_image_R@1"] == 0.5 and measures["image_to_text_R@1"] == 1


CAPTIONS = ["A dog runs, fast.", "two cats", "A MAN'S well-known hat!", "a dog a dog a dog"]
REFERENCES = [
    ["a dog is running fast", "a dog runs"],
    ["two cats sit on a mat"],
    ["the man's well-known hat"],
    ["a dog", "one dog on grass", "a small dog"],
]


def test_bleu_rouge_and_cider_equal_pycocoevalcap_by_hand():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    plain = ["a dog runs fast", "two cats", "a man's well-known hat", "a dog a dog a dog"]
    written = {row: [text] for row, text in enumerate(plain)}
    human = dict(enumerate(REFERENCES))
    measures = distcap.reference_measures(CAPTIONS, REFERENCES)
    bleu, each_bleu = Bleu(4).compute_score(human, written, verbose=0)
    for n in range(4):
        assert measures[f"bleu_{n + 1}"] == bleu[n]
        assert measures.each[f"bleu_{n + 1}"] == each_bleu[n]
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        score, each = scorer.compute_score(human, written)
        assert measures[name] == score and measures.each[name] == list(each)
    assert set(distcap.reference_measures(CAPTIONS, REFERENCES, ["rouge"])) == {"rouge_l"}


def test_bleu_by_hand():
    """5 of 6 words; 3 of 5 pairs, ("cat", "on"), ("on", "a") and ("a", "mat"); as long as the
    reference: no penalty."""
    measures = distcap.reference_measures(["the cat cat on a mat"], [["the big cat on a mat"]])
    assert measures["bleu_1"] == pytest.approx(5 / 6)
    assert measures["bleu_2"] == pytest.approx((5 / 6 * 3 / 5) ** 0.5)


def test_rouge_by_hand():
    """Longest common subsequence "two on a mat": 4 of 5 words, 4 of 6; beta is 1.2."""
    measures = distcap.reference_measures(["two dogs on a mat"], [["two cats sit on a mat"]])
    precision, recall = 4 / 5, 4 / 6
    harmonic = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert measures["rouge_l"] == pytest.approx(harmonic)


def test_scorers_keep_stdout_clean_and_take_odd_captions(capfd):
    measures = distcap.reference_measures(["", "a\u2028dog\x0bruns"], [["a dog"], ["a dog runs"]])
    assert capfd.readouterr().out == ""
    assert measures.each["rouge_l"] == [0, pytest.approx(1)]


def test_references_without_a_word_are_no_traceback_and_no_match():
    """CIDEr took the maximum of no lengths: `eval` broke after all the captions were written. And
    an empty caption equals such a reference, so that its ROUGE-L was 1."""
    alone = distcap.reference_measures(["a dog"], [["!!!"]])
    assert list(alone.values()) == pytest.approx([0] * 6, abs=1e-6)
    measures = distcap.reference_measures(
        ["", "...", "a dog"], [["!!!"], ["?", "a"], ["", "a dog"]]
    )
    assert measures.each["rouge_l"] == [0, 0, pytest.approx(1)]


@needs_java
def test_ptb_equals_pycocoevalcaps_tokenizer():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [
        *CAPTIONS,
        "",
        "!!!",
        "It's 3.5 o'clock (in Zürich) -- \u201cnow\u201d; don't|||stop",
        "日本 é",
    ]
    theirs = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    assert distcap.ptb_words(texts) == [theirs[n][0] for n in range(len(texts))]
    assert distcap.ptb_words(["A DOG, runs."]) == ["a dog runs"]


@needs_java
def test_line_separators_do_not_shift_captions_to_other_pictures():
    """Each ends a line for Java: later captions were scored against other pictures."""
    odd = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\ud800"]
    texts = [f"a{separator}dog number {n}" for n, separator in enumerate(odd)]
    assert [words.split()[-1] for words in distcap.ptb_words(texts)] == list("0123456789")
    assert distcap.ptb_words(["", "\n", "a\n"]) == ["", "", "a"]  # empty ones at the end, too


@needs_java
def test_ptb_writes_nothing_into_the_installed_package():
    """pycocoevalcap writes its input beside its jar, and fails where that cannot be written."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    before = folder.stat().st_mtime_ns
    distcap.ptb_words(["a dog"])
    assert folder.stat().st_mtime_ns == before


@needs_java
def test_meteor_equals_pycocoevalcap_and_knows_no_decimal_comma(monkeypatch):
    from pycocoevalcap.meteor.meteor import Meteor

    written = {row: [text] for row, text in enumerate([*CAPTIONS, ""])}
    human = dict(enumerate([*REFERENCES, ["a dog"]]))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    ours = distcap.meteor(human, written)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", distcap.JAVA_OPTIONS)
    assert ours == Meteor().compute_score(human, written)
    assert ours[1][0] > 0.3 and ours[1][4] == 0


def test_a_failure_of_meteor_is_one_line_and_does_not_hang(monkeypatch, tmp_path):
    """pycocoevalcap leaves its lock locked, and then waits for it when the object is deleted."""
    (tmp_path / "java").write_text("#!/bin/sh\nexec 0<&-\necho none\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    seen = []  # what is raised in deleting it would be a traceback on the terminal
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: seen.append(raised.exc_type))
    try:
        distcap.meteor({0: ["a dog"]}, {0: ["a dog"]})
    except distcap.UserError as error:
        assert str(error).startswith("--metrics meteor: its Java program failed")
    else:
        pytest.fail("no error")
    gc.collect()
    assert not [each for each in seen if not issubclass(each, Warning)]


def test_a_failure_of_ptb_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\necho a line too many\n cat\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(distcap.UserError, match="2 texts became 3"):
        distcap.ptb_words(["a", "b"])


def test_self_bleu_equals_bleu_against_all_the_others():
    from pycocoevalcap.bleu.bleu import Bleu

    rng = random.Random(0)
    captions = [" ".join(rng.choices("a dog cat on the mat".split(), k=rng.randint(0, 9)))
                for _ in range(30)]  # fmt: skip
    captions += captions[:3]
    for n, value in enumerate(distcap.self_bleu(captions)):
        others = {0: captions[:n] + captions[n + 1 :]}
        assert value == Bleu(4).compute_score(others, {0: [captions[n]]}, verbose=0)[0][3]
    assert distcap.self_bleu(["a dog runs on grass"]) == pytest.approx([0], abs=1e-6)
    assert distcap.self_bleu(["a dog runs on grass"] * 2) == pytest.approx([1, 1])


def test_diversity_by_hand():
    captions = ["a dog a dog a dog", "a cat", "a cat", "A cat!", ""]
    measures = distcap.diversity(captions)
    assert measures["mean_length"] == 12 / 5 and measures["vocabulary"] == 3
    assert measures["distinct"] == 4 / 5
    assert measures.each["identical"] == [0, 1, 1, 0, 0] and measures["identical"] == 2 / 5
    assert measures.each["repetition"] == [1, 0, 0, 0, 0]  # "a dog a" twice
    assert distcap.diversity(["a b c a b", "a b c a b c"]).each["repetition"] == [0, 1]


def test_all_measures_are_means_of_each_unless_defined_for_all_together(clip, world):
    images = clip.embed_images(example.image for example in world)
    captions = [example.references[0] for example in world]
    config = distcap.EvalConfig(metrics=[*distcap.EvalConfig().metrics, "clipscore"])
    measures = distcap.measure(captions, world, {"": (clip, images)}, config)
    for name, values in measures.each.items():
        assert len(values) == len(world)
        if not name.startswith("bleu") and "median" not in name:
            assert measures[name] == pytest.approx(statistics.fmean(values))
    alone = {"pool", "distinct", "vocabulary"}
    assert set(measures) - set(measures.each) == alone


def test_clip_scores_equal_a_slow_loop(clip, world):
    """Hessel et al. 2021: 2.5 max(cos, 0), and its harmonic mean with the best reference's cosine,
    all texts after "A photo depicts"."""
    world, captions = world[:12], [example.references[-1] for example in world[1:13]]
    images = clip.embed_images(example.image for example in world)
    images[3] *= -1
    references = [example.references[: 1 + n % 5] for n, example in enumerate(world)]
    measures = distcap.clip_scores(captions, references, images, clip)

    def embed(text):
        return clip.embed_captions([f"A photo depicts {text}"])[0]

    for n, caption in enumerate(captions):
        score = 2.5 * max(float(embed(caption) @ images[n]), 0)
        assert measures.each["clip_score"][n] == pytest.approx(score, abs=1e-5)
        nearest = max(max(float(embed(caption) @ embed(text)), 0) for text in references[n])
        harmonic = 2 / (1 / score + 1 / nearest) if score and nearest else 0
        assert measures.each["ref_clip_score"][n] == pytest.approx(harmonic, abs=1e-5)
    assert 0 in measures.each["clip_score"] and max(measures.each["clip_score"]) > 0
    assert images.dtype == torch.float32


def test_several_clips_are_measured_apart(clip, world):
    images = clip.embed_images(example.image for example in world)
    captions = [example.references[0] for example in world]
    clips = {"one": (clip, images), "two": (clip, images.flip(0))}
    measures = distcap.measure(captions, world, clips, distcap.EvalConfig())
    alone = distcap.retrieval(clip.embed_captions(captions), images)
    assert measures["one"] == alone and measures["two"] != alone and "pool" not in measures
    flat = distcap.flat(measures)
    assert flat["one bag_R@1"] == alone["bag_R@1"] and flat["cider"] == measures["cider"]


def test_evaluate_has_every_measure_of_the_toy_world(clip, world):
    images = clip.embed_images(example.image for example in world)
    sentences = [str(example.scene) for example in world]
    perfect = distcap.evaluate(sentences, world, images, clip)
    assert perfect["oracle_R@1"] == perfect["faithful"] == perfect["well_formed"] == 1
    assert perfect["distinct"] == 1
    words = sum(len(sentence.split()) for sentence in sentences)
    assert perfect["mean_length"] == pytest.approx(words / len(world))
    same = ["two shapes"] * len(world)
    one = distcap.evaluate(same, world, images, clip)
    assert one["oracle_R@1"] == pytest.approx(1 / len(world)) and one["distinct"] == 1 / len(world)
    anywhere = [dataclasses.replace(example, scene=None) for example in world]
    assert set(one) - set(distcap.evaluate(same, anywhere, images, clip)) == {
        "well_formed", "faithful", "oracle_R@1",
    }  # fmt: skip


def test_table_prints_shares_in_percent_and_ranks_whole():
    before = {"oracle_R@1": 0.5, "cider": 1.234, "text_to_image_median_rank": 1234}
    lines = distcap.table({"before": before, "after": before | {"cider": 2.0}})
    assert [line.split() for line in lines.split("\n")] == [
        ["before", "after"],
        ["oracle_R@1", "50.0%", "50.0%"],
        ["cider", "1.234", "2.000"],
        ["text_to_image_median_rank", "1,234", "1,234"],
    ]
