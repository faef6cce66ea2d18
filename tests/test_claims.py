"""The tables of the README come from tests/claims.py."""

import json
import re
from pathlib import Path

import claims
import pytest
import torch

import distcap

HERE = Path(__file__).parent
README = (HERE.parent / "README.md").read_text()


def test_table_is_mean_and_standard_deviation_over_seeds():
    rows = {"a row": {name: [0.2, 0.4] for name in claims.COLUMNS}, "another": {name: [0.2] for name in claims.COLUMNS}}
    header, rule, row, single = claims.markdown(rows, rows).split("\n")
    assert header.count("|") == rule.count("|") == row.count("|") == len(claims.COLUMNS) + 2
    assert row.startswith("| a row | 0.30 ± 0.14 |") and single.startswith("| another | 0.20 |")


@pytest.mark.parametrize("make", [claims.headline, claims.markdown, claims.differences, claims.tuning])
def test_the_readme_holds_the_tables_of_the_file_that_the_command_wrote(make):
    rows = json.loads((HERE / "claims.json").read_text())
    assert list(rows) == list(claims.ROWS)
    assert re.search(rf"<!-- {make.__name__} -->\n(.*?)\n<!-- end of {make.__name__} -->", README, re.DOTALL)[
        1
    ] == make(rows)


def test_the_measures_of_each_picture_have_the_means_that_distcap_measures(world, clip):
    captions = [world[0].scene, "two shapes", "nonsense", *(example.references[0] for example in world[3:])]
    images = clip.embed_images(example.image for example in world)
    each, measured = claims.each_picture(captions, world, images, clip), distcap.evaluate(captions, world, images, clip)
    assert set(each) == set(claims.PAIRED)
    assert {name: sum(each[name]) / len(world) for name in each} == pytest.approx(
        {name: measured[name] for name in each}
    )


def test_the_discriminators_accuracy_is_that_of_the_last_steps(run, tmp_path):
    steps = [{"stage": "tf"}, *({"stage": "rl", "discriminator_accuracy": value} for value in (0.0, 0.5, 1.0))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert claims.told_apart(tmp_path, last=2) == 0.75 and 0 < claims.told_apart(run) < 1
    (tmp_path / "log.jsonl").write_text(json.dumps(steps[0]) + "\n")
    assert claims.told_apart(tmp_path) is None  # which the table shows as a dash
    rows = {"a row": {name: [None, None] for name in claims.COLUMNS}}
    assert claims.markdown(rows, rows).split("\n")[2].count("| - ") == len(claims.COLUMNS)


def test_look_alikes_equals_a_slow_loop():
    images, captions = (torch.nn.functional.normalize(torch.randn(20, 4), dim=1) for _ in range(2))
    captions[:10] = images[:10]
    right = 0
    for row in range(20):
        near = sorted((n for n in range(20) if n != row), key=lambda n: -float(images[row] @ images[n]))[:5]
        right += all(captions[row] @ images[row] > captions[row] @ images[n] for n in near)
    assert claims.look_alikes(captions, images, 5) == pytest.approx(right / 20)
    assert claims.look_alikes(captions[:1].expand(20, 4), images[:1].expand(20, 4)) == 0  # ties are lost


def test_a_difference_comes_with_an_interval_around_it():
    mean, low, high = claims.difference([[0.9, 0.7] * 50] * 3, [[0.5, 0.5] * 50] * 3, rounds=200)
    assert mean == pytest.approx(0.3) and 0.25 < low < 0.3 < high < 0.35
    # pictures that agree leave only the seeds to differ: 27 draws, of which one is all of the least
    assert claims.difference([[0.0] * 9, [0.5] * 9, [1.0] * 9], [[0.0] * 9] * 3) == pytest.approx((0.5, 0.0, 1.0))


def test_patches_are_put_on_and_taken_off():
    learner, marks = distcap.Learner, ("the full method, ", "+ CIDEr", "+ KL", "+ grammar", "CIDEr, ")

    def attributes():
        inner = learner.advantages, learner.similarity_rewards, distcap.Captioner.generate
        return distcap.Learner, distcap.ground_truth_loss, inner

    original = attributes()
    for row in claims.ROWS:
        with claims.patched(row):
            assert (attributes() != original) == any(mark in row for mark in marks), row
    assert original == attributes()


def test_without_greedy_captions_the_others_compete_alone(world, captioner, clip):
    config = distcap.configuration(distcap.TrainConfig, {"batch_size": 4})
    learner = distcap.Learner(captioner, clip, world, config)
    texts = [world[n].scene for n in range(4)] + [world[n].references[0] for n in range(4)] + ["two shapes"] * 4
    captions, indices, own = clip.embed_captions(texts), torch.arange(4), torch.arange(4).repeat(3)
    expected = distcap.contrastive_reward(captions[:8], learner.images[:4], own[:8], clip.logit_scale)
    with claims.patched("the full method, greedy captions out of the pool"):
        rewards = learner.similarity_rewards(captions, indices, own)
    assert rewards[:8].equal(expected) and rewards.shape == (12,)
    assert not learner.similarity_rewards(captions, indices, own)[:8].allclose(expected)


def test_what_did_best_where_it_was_tuned_gets_a_row(monkeypatch):
    monkeypatch.setattr(claims, "ROWS", dict(claims.ROWS))
    for name in [row for row in claims.ROWS if row.endswith(", tuned")]:
        del claims.ROWS[name]
    rows, (own, other, third) = len(claims.ROWS), claims.RATES
    found = {
        "cosine, self-critical": {own: [0.2, 0.2], other: [0.0, 0.5], third: [0.1, 0.1]},
        "Eq. 6, both": {own: [0.0, 0.0], other: [0.0, 0.0], third: [0.3, 0.4]},
        # better than its own settings, but not by a picture in a hundred
        "cosine, group of 4": {own: [0.5, 0.5], other: [0.51, 0.508]},
    }
    claims.add_tuned_rows(found)
    flags = [*claims.GREEDY, *claims.ALONE, "--learning-rate", "2e-4"]
    assert claims.ROWS["cosine, self-critical, tuned"] == (flags, claims.START)
    assert claims.ROWS["Eq. 6, both, tuned"][1] == "cosine, self-critical, tuned"  # as tuned as itself
    assert len(claims.ROWS) == rows + 2


def test_what_is_tried_begins_with_the_settings_of_the_row():
    defaults = distcap.configuration(distcap.TrainConfig, {})
    for row, tried in claims.TRIED.items():
        flags, values = claims.ROWS[row][0], tried[0].split()
        for flag, value in zip(values[::2], values[1::2]):
            set_to = flags[flags.index(flag) + 1] if flag in flags else getattr(defaults, flag[2:].replace("-", "_"))
            assert float(value) == float(set_to), (row, flag)


def test_tuning_json_holds_what_is_tried():
    found = json.loads(claims.TUNING.read_text())
    assert {row: list(found[row]) for row in found} == claims.TRIED
    assert all(len(values) == len(claims.TUNING_SEEDS) for tried in found.values() for values in tried.values())


def test_rows_name_flags_that_exist_and_rows_that_exist():
    for flags, against in claims.ROWS.values():
        values = dict(zip((flag[2:].replace("-", "_") for flag in flags[::2]), flags[1::2]))
        assert set(values) <= {each.name for each in distcap.dataclasses.fields(distcap.TrainConfig)}
        assert against is None or against in claims.ROWS


def test_the_readme_names_flags_that_exist():
    known = {f"--{each.name.replace('_', '-')}" for cls, _ in distcap.VERBS.values() for each in
             distcap.dataclasses.fields(cls)}  # fmt: skip
    known |= {"--no-recursive", "--help", "--seeds", "--jobs", "--quick", "--readme", "--tune", "--check"}
    assert set(re.findall(r"(?<!\S)[`(]?(--[a-z-]+)", README)) <= known
