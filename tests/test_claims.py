"""The tables of the READMEs come from tests/claims/claims.py."""

import dataclasses
import json
import random
import re
from pathlib import Path

import claims
import pytest
import second_world
import torch

import distcap

ROOT = Path(__file__).resolve().parents[1]
TRAINED = [row for row in claims.ROWS if row not in (claims.START, claims.RERANKED)]


@pytest.fixture(scope="module")
def tables():
    """What the command wrote."""
    return json.loads((claims.HERE / "claims.json").read_text())


@pytest.fixture(scope="module")
def tuning():
    return json.loads((claims.HERE / "tuning.json").read_text())


def settings(flags):
    """The settings of `distcap train` with these flags. Fails if the command would refuse them."""
    _, config, given = distcap.parse_arguments(["train", "--device", "cpu", *flags.split()])
    distcap.check(config, given)
    return config


def row_settings(row):
    return settings(f"--captioner start --clip start --tf-steps 0 {claims.ROWS[row][0]}")


def columns(**values):
    """A row of a table."""
    return {name: values.get(name, [0.5, 0.5]) for name in (*claims.KEPT, "seed")}


# ---- Tables ----------------------------------------------------------------------------------
def test_a_cell_is_mean_and_standard_deviation_over_the_seeds():
    assert claims.cell("oracle_R@1", [0.2, 0.4]) == "0.30 ± 0.14"
    assert claims.cell("oracle_R@1", [0.2]) == "0.20"
    assert claims.cell("auc", [None, 0.5, 0.7]) == "0.60 ± 0.14"
    assert claims.cell("auc", [None, None]) == "-"


def test_a_cell_counts_seeds_where_a_share_is_all_or_nothing():
    assert claims.cell("well_formed", [0.0, 1.0, 0.98, 0.01, 0.0]) == "2 of 5"
    assert claims.cell("well_formed", [1.0, 1.0, 0.98]) == "0.99 ± 0.01"
    assert claims.cell("well_formed", [0.0, 1.0, 0.5]) == "0.50 ± 0.50"
    assert claims.cell("end", ["hacked", "", "hacked", "no words"]) == "hacked 2/4, no words 1/4"
    assert claims.cell("cracked", ["", ""]) == "-"


def test_a_table_has_a_line_for_each_row():
    header, rule, *lines = claims.markdown({"a row": columns(), claims.FULL: columns()}).split("\n")
    assert {line.count("|") for line in (header, rule, *lines)} == {len(claims.COLUMNS) + 2}
    assert lines[0].startswith("| a row | 0.50 ± 0.00 |")
    assert lines[1].startswith("| **the full method** |")


def test_a_difference_is_paired_by_seed_and_has_a_t_interval():
    values = claims.gaps([0.1, 0.4, 0.3, 0.8, 0.5], [0.0, 0.2, 0.0, 0.4, 0.0])
    assert values == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    # 2.776 * 0.1581 / sqrt(5): the standard deviation, and t of four degrees of freedom
    assert claims.interval(values) == pytest.approx(0.1963, abs=1e-4)
    assert claims.difference(values) == "+0.30 ± 0.20 (5 : 0)"
    assert claims.difference([-0.004, 0.005, -0.005]) == "+0.00 ± 0.01 (1 : 1)"
    assert claims.difference([-0.5]) == "-0.50 (0 : 1)"


def test_the_interval_covers_as_often_as_it_says():
    """The percentile bootstrap that it replaced covered 84 % with five seeds, not 95 %."""
    samples = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).tolist()
    covered = [abs(sum(values) / 5) <= claims.interval(values) for values in samples]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.012)


def test_differences_are_told_of_rows_and_of_departures():
    found = {row: columns() for row in claims.ROWS}
    lines = claims.differences({"main": found, "departures": {"the full method, x": columns()}})
    lines = lines.split("\n")
    assert len(lines) == 2 + len(claims.ROWS) - 1 + 1  # all but teacher forcing
    assert lines[-1].startswith("| the full method, x | the full method | +0.00 ± 0.00 (0 : 0) |")


# ---- Measures --------------------------------------------------------------------------------
def write_run(folder, rewards, before=1.0, after=1.0, captions=("a b",) * 4, oracle=0.5, **more):
    """A folder with what a run leaves. `oracle`: R@1 before; afterwards it is 0.25."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"sampled_weight": more.get("weight", 1.0)}))
    steps = [{"stage": "rl", "reward": reward, **more} for reward in rewards]
    text = "".join(json.dumps(step) + "\n" for step in [{"stage": "tf"}, *steps])
    (folder / "log.jsonl").write_text(text)
    written = [{"caption": caption} for caption in captions]
    (folder / "captions.json").write_text(json.dumps(written))
    results = {"before": {"faithful": before, "oracle_R@1": oracle}}
    results |= {"after": {"faithful": after, "oracle_R@1": 0.25}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(json.dumps({"flags": "", "seconds": 2.0, "judge_R@1": 0.75}))
    return folder, results


def test_hacked_is_said_only_where_the_reward_rose_and_the_truth_fell(tmp_path):
    rising, falling = [0.0] * 30 + [1.0] * 30, [1.0] * 30 + [0.0] * 30
    assert claims.end(*write_run(tmp_path / "1", rising, after=0.5)) == "hacked"
    assert claims.end(*write_run(tmp_path / "2", falling, after=0.5)) == "spoilt"
    assert claims.end(*write_run(tmp_path / "3", rising, after=0.95)) == ""
    assert claims.end(*write_run(tmp_path / "5", rising, after=0.5, oracle=0.2)) == "errs"
    assert claims.end(*write_run(tmp_path / "6", rising, after=0.5, weight=0.0)) == "errs"
    empty = ("", " ", "", "a")
    assert claims.end(*write_run(tmp_path / "4", rising, after=0.0, captions=empty)) == "no words"
    assert claims.rewards([{"reward": n} for n in range(100)]) == (12.0, 87.0)


def test_what_cracks_first_is_told_by_validation(tmp_path):
    folder, _ = write_run(tmp_path / "run", [0.0])
    found = [(1.0, 0.95), (0.95, 0.7), (0.2, 0.2)]  # well-formed, faithful
    with open(folder / "log.jsonl", "a") as log:
        for well_formed, faithful in found:
            measures = dict(well_formed=well_formed, faithful=faithful)
            log.write(json.dumps({"stage": "rl", "validation": measures}) + "\n")
    assert claims.cracked(folder) == "truth"
    text = (folder / "log.jsonl").read_text().splitlines()
    (folder / "log.jsonl").write_text("\n".join([*text[:3], text[-1]]))
    assert claims.cracked(folder) == "grammar"
    (folder / "log.jsonl").write_text("\n".join(text[:3]))
    assert claims.cracked(folder) == ""


def test_accuracy_is_that_of_the_last_steps(run, tmp_path):
    folder, _ = write_run(tmp_path / "1", [0.0])
    assert claims.accuracy(folder) is None
    with open(folder / "log.jsonl", "a") as log:
        for value in (0.0, 0.5, None, 1.0):  # null stands for what was not finite
            log.write(json.dumps({"stage": "rl", "grammar_accuracy": value}) + "\n")
    assert claims.accuracy(folder, last=2) == 0.75
    assert 0 < claims.accuracy(run) < 1


def test_a_ranking_counts_pairs_of_well_formed_and_ill_formed():
    captions = ["two shapes", "a a a", "a red circle and a blue star", "a"]
    scores = torch.tensor([0.5, 0.5, 0.9, 0.7])
    # (0.5, 0.5) is a tie, (0.5, 0.7) is lost, both of 0.9 are won
    assert claims.ranking(scores, captions) == dict(count=4, ill=2, pairs=4, won=2.5)


def test_auc_counts_what_was_before_the_collapse():
    early = [dict(count=10, ill=2, pairs=16, won=12)] * 60
    late = [dict(count=10, ill=9, pairs=9, won=0)] * 60
    assert claims.auc(early) == 0.75
    # The last ten steps are half ill-formed with the fifth late one: 5 * 2 + 5 * 9 >= 50
    assert claims.auc(early + late) == pytest.approx((60 * 12) / (60 * 16 + 4 * 9))
    assert claims.auc(early[:49]) is None  # 98 ill-formed samples are too few
    assert claims.auc([]) is None


def test_a_run_is_watched_while_it_learns(learn, tmp_path):
    with claims.watched(tmp_path):
        learner, batch = learn(regularizer="paced", discriminator_steps=5)
        for _ in range(2):
            learner.reinforce_step(batch)
            learner.regularizer.score(*learner.judged)  # an update more is no step more
    steps = json.loads((tmp_path / "discriminator.json").read_text())
    assert [step["count"] for step in steps] == [4, 4]
    with claims.watched(tmp_path / "none"):
        learn(regularizer="kl")[0].reinforce_step(batch)
    assert not (tmp_path / "none").exists()
    assert "score" not in vars(learn()[0].regularizer)  # taken off


def test_all_that_is_known_of_a_run(tmp_path):
    task = claims.Task("main", "a row", 0, tmp_path)
    write_run(task.folder, [0.0] * 60, network_accuracy=0.5)
    found = claims.values(task)
    assert set(found) == set(claims.KEPT)
    assert (found["oracle_R@1"], found["judge_R@1"], found["seconds"]) == (0.25, 0.75, 2.0)
    assert (found["end"], found["accuracy"], found["auc"]) == ("", 0.5, None)


# ---- Tuning ----------------------------------------------------------------------------------
def test_the_shares_of_the_reward_spread_as_they_should():
    alpha = claims.equal_spread(0.02, 0.5, 1.0)
    assert alpha == 0.962  # 1 - alpha = 0.02 / 0.52 = 0.0385, to two digits
    assert (1 - alpha) * 0.5 == pytest.approx(alpha * 0.02, rel=0.02)
    assert claims.equal_spread(0.1, 0.1, 3.0) == 0.25
    assert claims.equal_spread(0.2, 0.0, 1.0) == 0.0


def test_spreads_are_medians_of_the_first_fifty_steps(tmp_path):
    task = claims.Task("spread", "a row", 100, tmp_path)
    folder, _ = write_run(task.folder, [])
    steps = [dict(similarity_spread=n / 10, regularizer_spread=n) for n in range(60)]
    text = "".join(json.dumps({"stage": "rl", **step}) + "\n" for step in steps)
    (folder / "log.jsonl").write_text(text)
    assert claims.spreads(task) == pytest.approx((2.45, 24.5))


def test_equal_spread_is_kept_unless_another_is_better_by_a_picture_in_a_hundred():
    assert claims.best_rho({"1/3": [0.5, 0.6], "1": [0.5, 0.585], "3": [0.0, 0.0]}) == "1"
    assert claims.best_rho({"1/3": [0.5, 0.6], "1": [0.5, 0.57], "3": [0.0, 0.0]}) == "1/3"


def test_what_was_tuned_gets_its_weight(tmp_path):
    row = claims.TUNED[0]
    plan = claims.Plan(tmp_path, 2, quick=False)
    found = {row: {"alpha": {"1": 0.9, "3": 0.75}, "best": "3"}}
    tasks = plan.rows(claims.alphas({"tuning": found}))
    assert {task.flags for task in tasks[row]} == {
        f"{claims.ROWS[row][0]} --similarity-weight 0.75"
    }
    assert tasks[claims.FULL][0].flags == ""


def test_tuning_json_holds_what_was_tried(tables, tuning):
    assert list(tuning["tuning"]) == claims.TUNED
    for row, found in tuning["tuning"].items():
        assert list(found["oracle_R@1"]) == list(found["alpha"]) == list(claims.RHO)
        assert {len(each) for each in found["oracle_R@1"].values()} == {len(claims.TUNING_SEEDS)}
        assert found["best"] == claims.best_rho(found["oracle_R@1"])
        spreads = found["similarity_spread"], found["regularizer_spread"]
        for name, alpha in found["alpha"].items():
            assert claims.equal_spread(*spreads, claims.RHO[name]) == pytest.approx(alpha, rel=0.02)
        flags = f"{claims.ROWS[row][0]} --similarity-weight {found['alpha'][found['best']]}"
        assert tables["main"][row]["flags"] == flags


def test_the_full_method_has_the_discriminator_that_did_best(tuning):
    """By mean oracle R@1, on seeds that no table uses."""
    found = tuning["choice"]
    assert {name: row["flags"] for name, row in found.items()} == claims.CHOICE
    assert all(row["seed"] == list(claims.CHOICE_SEEDS) for row in found.values())
    best = max(found, key=lambda name: sum(found[name]["oracle_R@1"]))
    assert settings(claims.CHOICE[best]) == settings("")


# ---- Runs ------------------------------------------------------------------------------------
def test_seeds_come_one_after_the_other(tmp_path):
    """Half-way, the tables of the first seeds are complete."""
    plan = claims.Plan(tmp_path, 5, quick=False)
    tasks = claims.flat(plan.rows({}))
    assert [task.seed for task in tasks] == sorted(task.seed for task in tasks)
    assert len(tasks) == len({task.folder for task in tasks}) == 5 * len(claims.ROWS)


def test_a_row_is_finished_with_its_flags(tmp_path):
    task = claims.Task("main", "a row", 0, tmp_path, "--steps 3")
    assert not task.finished
    write_run(task.folder, [])
    assert not task.finished  # it was made with others
    (task.folder / "run.json").write_text(json.dumps({"flags": "--steps 3"}))
    assert task.finished


def test_only_complete_seeds_are_told(tmp_path):
    plan = claims.Plan(tmp_path, 2, quick=False)
    tasks = claims.flat(plan.departures())
    for task in tasks[:-1]:
        write_run(task.folder, [0.0] * 60)
    found = claims.summary(plan, {}, {})
    assert [row["seed"] for row in found["departures"].values()] == [[0]] * len(claims.UNDONE)
    assert found["main"] == found["world"] == {}
    lines = claims.line_by_line(found).split("\n")
    assert json.loads("\n".join(lines)) == found
    assert sum(line.startswith('"the full method, ') for line in lines) == len(claims.UNDONE)


def test_seeds_of_the_file_are_kept_and_others_come_to_them(tmp_path, monkeypatch):
    """--keep: what claims.json holds is not made again, nor what it was made from."""
    monkeypatch.setattr(claims, "HELD", {})
    made = []

    def pretend(pool, tasks):
        for task in tasks:
            made.append((task.part, task.row, task.seed))
            if task.row != claims.JUDGE:
                write_run(task.folder, [0.0] * 60)
            found = {"flags": task.flags, "judge_R@1": 0.25}
            (task.folder / "run.json").parent.mkdir(parents=True, exist_ok=True)
            (task.folder / "run.json").write_text(json.dumps(found))
        return []

    monkeypatch.setattr(claims, "make_all", pretend)
    rows = [f"{claims.FULL}, {name}" for name in claims.UNDONE]
    kept = {"departures": {row: {"flags": ""} | columns(seed=[0, 1]) for row in rows}}
    kept["departures"][rows[0]]["oracle_R@1"] = [0.125, 0.75]
    plan = claims.Plan(tmp_path, 3, quick=False)
    assert claims.train_all(plan, ("departures",), 1, kept) == []
    start, judge = ("starts", claims.START, 2), ("starts", claims.JUDGE, 2)
    assert made == [start, judge, *(("departures", row, 2) for row in rows)]
    found = claims.summary(plan, {}, kept)["departures"]
    assert found[rows[0]]["seed"] == [0, 1, 2]
    assert found[rows[0]]["oracle_R@1"][:2] == [0.125, 0.75]
    assert found[rows[0]]["judge_R@1"] == [0.5, 0.5, 0.25]


def test_a_kept_row_has_the_same_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HELD", {})
    task = claims.Task("main", "a row", 0, tmp_path, "--steps 3")
    table = {"a row": {"flags": "--steps 4"} | columns(seed=[0, 1])}
    claims.hold({"a row": [task]}, table)
    assert not task.finished
    table["a row"]["flags"] = "--steps 3"
    claims.hold({"a row": [task]}, table)
    assert task.finished and not task.made
    assert claims.values(task)["oracle_R@1"] == 0.5


def test_the_best_rival_has_no_human_trajectories(tmp_path):
    plan = claims.Plan(tmp_path, 1, quick=False)
    oracle = {claims.FULL: 1.0, claims.RERANKED: 0.9, claims.COSINE: 0.8, "cosine, group of 4": 0.7}
    for row, tasks in plan.rows({}).items():
        folder, results = write_run(tasks[0].folder, [0.0] * 60)
        results["after"]["oracle_R@1"] = oracle.get(row, 0.1)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "run.json").write_text(json.dumps({"flags": tasks[0].flags}))
    assert plan.best_rival(plan.rows({})) == "cosine, group of 4"
    rows = {row.partition(";")[0] for row in plan.robustness({})}
    assert rows == {claims.FULL, claims.HUMAN, "cosine, group of 4", claims.COSINE}


def test_captions_are_the_best_of_eight_among_all_pictures(run, tmp_path, monkeypatch):
    task = claims.Task("main", claims.RERANKED, 0, tmp_path)
    monkeypatch.setattr(claims.Task, "start", run)
    claims.rerank(task)
    examples = distcap.read_examples(str(run / "test"))
    found = json.loads((task.folder / "captions.json").read_text())
    greedy = json.loads((run / "captions.json").read_text())
    assert [each["image_id"] for each in found] == [f"{each['image_id']}.png" for each in greedy]
    assert found != greedy
    assert len(found) == len(examples)
    results = json.loads((task.folder / "results.json").read_text())
    assert results["after"]["well_formed"] >= 0


def test_a_failure_does_not_stop_the_rest(tmp_path, capsys):
    tasks = [claims.Task("main", "a row", seed, tmp_path, "--no-such-flag") for seed in (0, 1)]
    with claims.ProcessPoolExecutor(1, initializer=claims.begin) as pool:
        failures = claims.make_all(pool, tasks)
    assert len(failures) == 2 and "failed" in capsys.readouterr().out


# ---- Rows that undo a departure --------------------------------------------------------------
@pytest.fixture
def step(learn):
    """A learner of the full method, a batch, its features and its rollout."""
    learner, batch = learn(similarity_weight=0.99)
    features = learner.captioner.encode(batch.pixels)
    return learner, batch, features, learner.roll_out(features, batch)


def advantages_of(learner, batch, features, rollout):
    return learner.judge(rollout, batch)[0]


def loss_of_unwanted_human_captions(learner, batch, features, rollout):
    sampled_count, human_count, _ = rollout.sizes
    advantages = torch.cat([torch.zeros(sampled_count), -torch.ones(human_count)])
    return learner.loss(features, rollout, advantages).detach()


def sampled_tokens(learner, batch, features, rollout):
    torch.manual_seed(1)
    pool = learner.roll_out(features, batch)
    return pool.tokens[: pool.sizes[0]]


def scored_rewards(learner, batch, features, rollout):
    sampled_count, human_count, _ = rollout.sizes
    return learner.similarity_rewards(rollout, batch)[: sampled_count + human_count]


EFFECTS = {
    "not centred": advantages_of,
    "negative ground truth not clamped": loss_of_unwanted_human_captions,
    "beam search for a sample": sampled_tokens,
    "greedy captions out of the pool": scored_rewards,
}


def test_every_departure_that_is_undone_has_a_row(tmp_path):
    rows = claims.Plan(tmp_path, 1, quick=False).departures()
    assert list(rows) == [f"the full method, {name}" for name in EFFECTS]
    assert [tasks[0].departure for tasks in rows.values()] == list(EFFECTS)


@pytest.mark.parametrize("name", EFFECTS)
def test_a_patch_has_an_effect_and_is_taken_off(name, step):
    effect = EFFECTS[name]
    before = effect(*step)
    with claims.undone(name):
        within = effect(*step)
    assert not torch.equal(within, before)
    with claims.undone(""):
        assert effect(*step).equal(before)


def test_not_centred_keeps_the_rewards(step):
    learner, batch, _, rollout = step
    count = rollout.sizes[0]
    centred = advantages_of(*step)
    with claims.undone("not centred"):
        kept = advantages_of(*step)
    scores, _, _ = learner.regularizer.score(rollout, batch)
    rewards = distcap.mixed_reward(learner.similarity_rewards(rollout, batch), scores, 0.99)
    torch.testing.assert_close(kept, rewards[: len(kept)])
    torch.testing.assert_close(centred[:count], kept[:count] - kept[:count].mean())
    assert centred[count:].equal(kept[count:])


def test_not_clamped_unlearns_human_captions(step):
    assert loss_of_unwanted_human_captions(*step) == 0
    with claims.undone("negative ground truth not clamped"):
        assert loss_of_unwanted_human_captions(*step) < 0


def test_the_sample_of_a_beam_search_is_no_draw(step):
    learner, batch, features, _ = step
    with claims.undone("beam search for a sample"):
        pool = learner.roll_out(features, batch)
    searched = learner.captioner.search(features, learner.max_length, beams=5)
    assert pool.captions[: pool.sizes[0]] == learner.captioner.decode(searched)


def test_without_greedy_captions_the_others_compete_alone(step):
    learner, batch, _, rollout = step
    kept = rollout.sizes[0] + rollout.sizes[1]
    expected = distcap.contrastive_reward(
        rollout.caption_embeddings[:kept],
        rollout.image_embeddings,
        rollout.image_index[:kept],
        learner.clip.logit_scale,
    )
    with claims.undone("greedy captions out of the pool"):
        rewards = learner.similarity_rewards(rollout, batch)
        advantages = advantages_of(*step)
    assert rewards[:kept].equal(expected)
    assert len(rewards) == len(rollout.captions) and len(advantages) == kept


# ---- Flags of the rows -------------------------------------------------------------------------
def test_each_row_stands_against_a_row():
    assert all(against in (None, *claims.ROWS) for _, against in claims.ROWS.values())
    assert len(claims.ROWS) <= 30
    assert set(claims.HEADLINE) | set(claims.WORLD_ROWS) | set(claims.TUNED) <= set(claims.ROWS)


def test_all_recipes_have_a_row():
    """clip-scst-grammar has another alpha there, as the other regularizers have."""
    flags = [flags for flags, _ in claims.ROWS.values()]
    named = {found[1] for each in flags if (found := re.search(r"--recipe (\S+)", each))}
    assert named | {"distinctive", "tf"} == set(distcap.RECIPES)


@pytest.mark.parametrize("row", TRAINED)
def test_a_row_does_what_its_name_says(row):
    config = row_settings(row)
    whole = row.startswith(claims.FULL)
    assert config.objective == "rl"
    assert (config.length_normalizer == "caption") == ("by caption length" in row)
    assert config.learning_rate == distcap.TOY["learning_rate"]
    assert config.steps == distcap.TOY["steps"]

    words = {
        "self-critical": "greedy", "similar images": "neighbours", "group": "group",
        "no baseline": "none",
    }  # fmt: skip
    baselines = [words[word] for word in words if word in row]
    assert [config.baseline] == (baselines or ["contrastive"])
    assert config.samples == (4 if "group of 4" in row else 1)
    assert config.neighbours == (10 if row.endswith(("hard negatives", "similar images")) else 0)

    named = [kind for name, kind in claims.REGULARIZERS.items() if re.search(rf"\+ {name}$", row)]
    if whole:
        named = [claims.DEFAULT.regularizer]
        others = {"plain disc": "discriminator", "paced disc": "paced", "no disc": "none"}
        named = [kind for word, kind in others.items() if word in row] or named
    if row == "CIDEr, self-critical":
        named = ["cider"]
        assert config.similarity_weight == 0  # no CLIP in it
    assert [config.regularizer] == (named or ["none"])
    if config.regularizer in ("paced", "discriminator", "grammar"):
        assert config.discriminator_steps == (5 if config.regularizer == "paced" else 1)

    halves = [half for half in ("image-to-text", "text-to-image") if half in row]
    assert [config.direction] == (halves or ["both"])
    human = distcap.TOY["ground_truth_weight"] if whole or "ground truth" in row else 0
    assert config.ground_truth_weight == human
    assert config.sampled_weight == (0 if row == "ground truth only" else 1)


def test_the_full_method_is_what_distcap_does_by_default():
    assert row_settings(claims.FULL) == settings("--captioner start --clip start --tf-steps 0")


def test_no_two_rows_do_the_same():
    found = [dataclasses.replace(row_settings(row), recipe="distinctive") for row in TRAINED]
    same = [(TRAINED[n], TRAINED[m]) for n in range(len(found)) for m in range(n)
            if found[n] == found[m]]  # fmt: skip
    assert same == []


# ---- The second world ------------------------------------------------------------------------
def test_every_reference_of_the_second_world_is_true_of_its_board():
    for example in second_world.world(0, 40, 0)[0]:
        board = example.scene
        assert second_world.parse(str(board)) == board
        for text in example.references:
            assert second_world.is_true(second_world.parse(text), board)
        assert len(set(board[1::2])) == 3  # places
        assert set(str(board).split()) <= set(second_world.WORDS)
    assert len(set(second_world.boards())) == 18_144


@pytest.mark.parametrize(
    ("caption", "well_formed", "faithful"),
    [
        ("three marks", True, True),
        ("a cross a ring and a dot", True, True),
        ("a mark top left a mark centre and a mark bottom", True, True),
        ("a cross top left a ring centre and a dot bottom", True, True),
        ("a cross a ring centre and a mark", True, True),
        ("a ring a cross and a dot", True, False),  # not in reading order
        ("a cross top a ring centre and a dot bottom", True, False),
        ("a cross top left a ring centre and a dot bottom a dot", False, False),
        ("a cross and a dot", False, False),
        ("", False, False),
    ],
)
def test_what_is_well_formed_and_true_in_the_second_world(caption, well_formed, faithful):
    board = second_world.Board("cross", "top left", "ring", "centre", "dot", "bottom")
    said = second_world.parse(caption)
    assert (said is not None) == well_formed
    assert second_world.is_true(said, board) == faithful


def test_the_second_world_takes_the_place_of_the_first_and_leaves_it():
    with second_world.installed():
        (example,), _ = distcap.toy_world(0, 1, 0)
        measures = distcap.toy_measures([str(example.scene), "two shapes"], [example.scene] * 2)
        assert measures == {"well_formed": 0.5, "faithful": 0.5, "oracle_R@1": 0.25}
        words = distcap.toy_tokenizer().get_vocab()
        assert "triangle" in words and "beige" not in words
        assert example.image.size == (32, 32)
    assert "beige" in distcap.toy_tokenizer().get_vocab()
    assert distcap.parse("three marks") is None


def test_marks_look_different():
    rng = random.Random(0)
    boards = [second_world.Board(mark, "top", "dot", "left", "dot", "right")
              for mark in second_world.MARKS]  # fmt: skip
    pictures = {second_world.draw(board, rng).tobytes() for board in boards}
    assert len(pictures) == len(second_world.MARKS)


# ---- What is read ----------------------------------------------------------------------------
TEMPLATES = ("README.template.md", "headline.template.md")


@pytest.fixture
def made_up(tmp_path):
    """Tables with every row, of numbers that mean nothing."""
    rng = random.Random(0)
    plan = claims.Plan(tmp_path, 2, quick=False)
    parts = {"main": plan.rows({}), "departures": plan.departures(), "world": plan.world()}
    rows = (claims.FULL, claims.HUMAN, f"{claims.BOTH} + KL", claims.COSINE)
    changes = (claims.FASTER, claims.LONGER, claims.SLOWER)
    parts["robustness"] = [f"{row}; {change}" for row in rows for change in changes]
    words = {"end": ["hacked", ""], "cracked": ["truth", "grammar"], "seed": [0, 1]}
    found = {}
    for part, rows in parts.items():
        found[part] = {}
        for row in rows:
            numbers = {name: [rng.random(), rng.random()] for name in claims.KEPT}
            found[part][row] = {"flags": ""} | numbers | words
    tried = dict(similarity_spread=0.1, regularizer_spread=0.2, best="1")
    tried |= {"alpha": {"1": 0.9}, "oracle_R@1": {name: [0.5, 0.5] for name in claims.RHO}}
    chosen = {"oracle_R@1": [0.5, 0.25], "faithful": [0.5, 0.25]}
    tuning = {"tuning": dict.fromkeys(claims.TUNED, tried)}
    return found, tuning | {"choice": dict.fromkeys(claims.CHOICE, chosen)}


def test_prose_is_filled_from_the_tables(made_up):
    found, tuning = made_up
    row = found["main"]["cosine, group of 4"]
    row |= {"oracle_R@1": [0.25, 0.75], "auc": [None, 0.7], "end": ["hacked", "hacked"]}
    found["main"][claims.COSINE]["oracle_R@1"] = [0.15, 0.75]
    prose = claims.Prose(found, tuning)
    name = "'cosine, group of 4'"
    filled = {
        f"a {{mean({name}, 'oracle_R@1')}} b": "a 0.50 b",
        f"{{each({name}, 'oracle_R@1')}}": "0.25, 0.75",
        "{choice('paced', 'faithful')}": "0.50, 0.25",
        f"{{diff({name}, 'oracle_R@1')}}": "+0.05 ± 0.64",  # 12.706 * 0.0707 / sqrt(2)
        f"{{more({name}, 'oracle_R@1')}}": "1 of 2",
        f"{{less({name}, 'oracle_R@1', 'cosine, self-critical')}}": "0 of 2",
        f"{{below({name}, 'oracle_R@1', 0.5)}}": "1 of 2",
        f"{{ends({name}, 'hacked')}}": "2 of 2",
        f"{{auc({name})}}": "0.70 on 1 of 2 seeds",
        "{rival()}": f"{claims.BOTH} + KL",
        f"{{cracks('the full method; {claims.LONGER}', 'truth')}}": "1 of 2",
        "{alpha('Eq. 6, both + KL')} {spread('Eq. 6, both + KL')}": "0.9 0.5",
        "{toy('steps')}": str(distcap.TOY["steps"]),
        "{braces} {}": "{braces} {}",
    }
    for template, text in filled.items():
        assert prose.render(template) == text
    for wrong in ("{mean('no such row', 'oracle_R@1')}", "{nothing()}", "{toy(1 + 1)}"):
        with pytest.raises((KeyError, AttributeError, ValueError)):
            prose.render(wrong)


def test_filled_text_is_wrapped_anew(made_up):
    """Numbers are shorter than the calls that they come from."""
    prose = claims.Prose(*made_up)
    words = "a word and another " * 9
    call = "{mean('ground truth only', 'oracle_R@1')}"
    found = prose.render(f"1. {words}\n   {call} x\n2. b {call}\n\n{words}\n\n| {call} | {words} |")
    first, second, third, fourth, fifth = found.replace("\n\n", "\n").split("\n")[:5]
    assert len(first) <= 100 < len(first + second) and first.startswith("1. a word")
    assert second.startswith("   ") and second.endswith(" x")
    assert third.startswith("2. b 0.")
    assert fourth == words  # nothing was filled in
    assert fifth.startswith("| 0.") and fifth.endswith(f" | {words} |")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_call_what_there_is(name, made_up):
    text = claims.Prose(*made_up).render((claims.HERE / name).read_text())
    assert "{" not in text and "None" not in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_result_is_written_by_hand(name):
    """Numbers of the prose come from the file, but for settings, seeds and equations."""
    text = (claims.HERE / name).read_text()
    text = re.sub(r"```.*?```|`[^`]*`|\{[a-z_]+\(.*?\)\}", "", text, flags=re.DOTALL)
    text = re.sub(r"temperature 0\.7|by 0\.005|95 % t|Eq\. \d+|group of 4|best of 8", "", text)
    assert re.findall(r"\d+\.\d+|\d+ %|\d+ of \d+|[-+±]\s?\d+", text) == []


def test_the_readmes_are_what_the_files_make_them(tables, tuning):
    for path, text in claims.texts(tables, tuning).items():
        assert path.read_text() == text


def test_a_file_has_a_line_for_each_row_and_no_digits_that_mean_nothing(tables, tuning):
    for name, found in {"claims.json": tables, "tuning.json": tuning}.items():
        text = (claims.HERE / name).read_text()
        assert text == claims.line_by_line(found)
        assert not re.search(r"\.\d{7}", text)


def test_the_file_holds_every_row(tables, tuning, tmp_path):
    plan = claims.Plan(tmp_path, 5, quick=False)
    weights = claims.alphas(tuning)
    expected = {"main": plan.rows(weights), "departures": plan.departures(), "world": plan.world()}
    for part, rows in expected.items():
        flags = {row: tasks[0].flags for row, tasks in rows.items()}
        assert {row: found["flags"] for row, found in tables[part].items()} == flags
        count = len(next(iter(tables[part].values()))["seed"])
        assert count >= 3  # of five, as many as were finished
        assert all(found["seed"] == list(range(count)) for found in tables[part].values())


def test_the_figure_is_drawn(made_up, tmp_path):
    pytest.importorskip("matplotlib")
    claims.figure(made_up[0]["main"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", [ROOT / "README.md", claims.HERE / "README.md"], ids=str)
def test_the_readmes_name_flags_that_exist(path):
    classes = [cls for cls, _ in distcap.VERBS.values()]
    fields = [field.name for cls in classes for field in dataclasses.fields(cls)]
    known = {f"--{name.replace('_', '-')}" for name in fields}
    known |= {"--no-recursive", "--help", "--check", "--nproc-per-node"}
    known |= {"--seeds", "--jobs", "--quick", "--readme", "--only", "--keep"}
    known |= {"--index-url", "--remote-name-all"}  # pip's and curl's
    assert set(re.findall(r"(?<!\S)[`(]?(--[a-z-]+)", path.read_text())) <= known
