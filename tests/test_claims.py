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


@pytest.mark.parametrize("make", [claims.headline, claims.markdown, claims.differences])
def test_the_readme_holds_the_tables_of_the_file_that_the_command_wrote(make):
    rows = json.loads((HERE / "claims.json").read_text())
    assert list(rows) == list(claims.ROWS)
    assert re.search(rf"<!-- {make.__name__} -->\n(.*?)\n<!-- end of {make.__name__} -->", README, re.DOTALL)[
        1
    ] == make(rows)


def test_the_oracle_of_each_picture_has_the_mean_that_distcap_measures(world):
    captions = [world[0].scene, "two shapes", "nonsense", *(example.references[0] for example in world[3:])]
    mean = distcap.toy_measures(captions, [example.scene for example in world])["oracle_R@1"]
    assert sum(claims.oracle(captions, world)) / len(world) == pytest.approx(mean)


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
    seeds = [{"a": {"oracle": [0.9, 0.7] * 50}, "b": {"oracle": [0.5, 0.5] * 50}} for _ in range(3)]
    mean, low, high = claims.difference("a", "b", seeds, rounds=200)
    assert mean == pytest.approx(0.3) and 0.25 < low < 0.3 < high < 0.35


def test_departures_are_patched_and_put_back(monkeypatch):
    original = distcap.Learner.advantages, distcap.ground_truth_loss, distcap.Captioner.generate
    for row in claims.ROWS:
        with claims.departures(row):
            changed = (distcap.Learner.advantages, distcap.ground_truth_loss, distcap.Captioner.generate) != original
            assert changed == row.startswith("the full method, ")
    assert original == (distcap.Learner.advantages, distcap.ground_truth_loss, distcap.Captioner.generate)


def test_rows_name_flags_that_exist_and_rows_that_exist():
    for flags, against in claims.ROWS.values():
        values = dict(zip((flag[2:].replace("-", "_") for flag in flags[::2]), flags[1::2]))
        assert set(values) <= {each.name for each in distcap.dataclasses.fields(distcap.TrainConfig)}
        assert against is None or against in claims.ROWS


def test_the_readme_names_flags_that_exist():
    known = {f"--{each.name.replace('_', '-')}" for cls, _ in distcap.VERBS.values() for each in
             distcap.dataclasses.fields(cls)}  # fmt: skip
    known |= {"--no-recursive", "--help", "--seeds", "--jobs", "--quick", "--readme", "--check"}
    assert set(re.findall(r"(?<!\S)[`(]?(--[a-z-]+)", README)) <= known
