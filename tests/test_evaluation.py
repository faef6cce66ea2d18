"""Section 9: measures against slow twins and hand values."""

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


def test_saying_one_thing_scores_nothing():
    same, images = unit(1, 4).expand(8, 4), unit(8, 4)
    measures = distcap.retrieval(same, images)
    assert measures["text_to_image_R@1"] == 1 / 8  # one image of the eight is the nearest: chance
    assert measures["image_to_text_R@1"] == 0 and measures["image_to_text_median_rank"] == 8  # all tie: all lose


def test_retrieval_by_hand():
    captions, images = torch.eye(3), torch.eye(3)[[0, 2, 1]]  # two captions are swapped
    measures = distcap.retrieval(captions, images)
    assert measures["text_to_image_R@1"] == pytest.approx(1 / 3)
    assert measures["text_to_image_R@5"] == 1 and measures["text_to_image_median_rank"] == 3


def test_ngram_metrics_equal_pycocoevalcap_by_hand():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions = ["A dog runs, fast.", "two cats", "A MAN'S well-known hat!"]
    references = [["a dog is running fast", "a dog runs"], ["two cats sit on a mat"], ["the man's well-known hat"]]
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


def test_toy_measures_by_hand():
    scenes = [
        "a small red ring above a large blue bar on a white background",
        "a small red ring above a small blue bar on a white background",
        "a large pink star above a small blue bar on a black background",
        "a large pink star above a small cyan bar on a black background",
    ]
    captions = [
        "a red ring and a blue bar",  # true of two scenes: 1/2
        scenes[1],  # of its own alone: 1
        "a ring and a bar",  # false of its own
        "a pink star star",  # ill-formed
    ]
    assert distcap.toy_measures(captions, scenes) == {"well_formed": 0.75, "faithful": 0.5, "oracle_R@1": 1.5 / 4}


def test_evaluate_has_every_measure_of_the_toy_world(clip, world):
    images = clip.embed_images(example.image for example in world)
    perfect = distcap.evaluate([example.scene for example in world], world, images, clip)
    assert perfect["oracle_R@1"] == perfect["faithful"] == perfect["well_formed"] == perfect["distinct"] == 1
    assert perfect["mean_length"] == pytest.approx(sum(len(e.scene.split()) for e in world) / len(world))
    one = distcap.evaluate(["two shapes"] * len(world), world, images, clip)
    assert one["oracle_R@1"] == pytest.approx(1 / len(world)) and one["distinct"] == 1 / len(world)
    anywhere = [distcap.dataclasses.replace(example, scene=None) for example in world]
    assert "oracle_R@1" not in distcap.evaluate(["two shapes"] * len(world), anywhere, images, clip)


def test_table_prints_shares_in_percent_and_ranks_whole():
    before = {"oracle_R@1": 0.5, "cider": 1.234, "text_to_image_median_rank": 1234}
    lines = distcap.table({"before": before, "after": before | {"cider": 2.0}})
    assert [line.split() for line in lines.split("\n")] == [
        ["before", "after"], ["oracle_R@1", "50.0%", "50.0%"], ["cider", "1.234", "2.000"],
        ["text_to_image_median_rank", "1,234", "1,234"],
    ]  # fmt: skip
