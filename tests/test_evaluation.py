"""Measures, against slow twins and values by hand."""

import dataclasses

import pytest
import torch

import distcap


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


def test_retrieval_tells_the_directions_apart():
    """The second image is nearest to both captions, yet each image finds its caption."""

    def at(*degrees):
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    captions, images = at(0.0, 40.0), at(-50.0, 30.0)
    measures = distcap.retrieval(captions, images)
    assert measures["text_to_image_R@1"] == 0.5 and measures["image_to_text_R@1"] == 1


def test_ngram_metrics_equal_pycocoevalcap_by_hand():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions = ["A dog runs, fast.", "two cats", "A MAN'S well-known hat!"]
    references = [
        ["a dog is running fast", "a dog runs"],
        ["two cats sit on a mat"],
        ["the man's well-known hat"],
    ]
    written = {0: ["a dog runs fast"], 1: ["two cats"], 2: ["a man's well-known hat"]}
    human = dict(enumerate(references))
    measures = distcap.ngram_metrics(captions, references)
    assert measures["bleu_4"] == Bleu(4).compute_score(human, written, verbose=0)[0][3]
    assert measures["rouge_l"] == Rouge().compute_score(human, written)[0]
    assert measures["cider"] == Cider().compute_score(human, written)[0]


def test_ngram_metrics_keep_stdout_clean_and_take_odd_captions(capsys):
    measures = distcap.ngram_metrics(["", "a\u2028dog\x0bruns"], [["a dog"], ["a dog runs"]])
    assert capsys.readouterr().out == ""
    assert 0 < measures["rouge_l"] <= 0.5 + 1e-9  # the second caption is perfect, the first empty


def test_references_without_a_word_are_no_traceback():
    """CIDEr took the maximum of no lengths: `eval` broke after all the captions were written."""
    assert distcap.ngram_metrics(["a dog"], [["!!!"]])["cider"] == 0


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
