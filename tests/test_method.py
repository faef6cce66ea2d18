"""Method: recipes by name, and what each method ignores."""

import dataclasses

import pytest
import torch

import distcap

FIELDS = {field.name: field for field in dataclasses.fields(distcap.Method)}


def allowed(name):
    """Whether a value is one that the flag of this setting takes."""
    field = FIELDS[name]
    if "choices" in field.metadata:
        return lambda value: value in field.metadata["choices"]
    return lambda value: field.metadata["type"](str(value)) == value


@pytest.mark.parametrize("recipe", distcap.RECIPES)
def test_a_recipe_is_a_method_and_sets_nothing_in_vain(recipe):
    changes = distcap.RECIPES[recipe]
    assert all(allowed(name)(value) for name, value in changes.items())
    method = distcap.Method(**changes)
    assert not set(changes) & set(distcap.ignored_settings(method))
    assert changes == {} or method != distcap.Method()


def test_recipes_are_all_different():
    methods = [distcap.Method(**changes) for changes in distcap.RECIPES.values()]
    assert len(set(methods)) == len(methods)


def test_alpha_is_one_without_a_regularizer():
    assert distcap.Method(regularizer="none", similarity_weight=0.3).alpha == 1
    assert distcap.Method(regularizer="kl", similarity_weight=0.3).alpha == 0.3


OTHER_VALUES = {
    "baseline": "none", "direction": "text-to-image", "regularizer": "grammar", "samples": 3,
    "neighbours": 5, "similarity_weight": 0.5, "sampled_weight": 0.5, "ground_truth_weight": 0.5,
    "length_normalizer": "caption",
}  # fmt: skip
METHODS = [
    {}, dict(direction="image-to-text"), dict(baseline="greedy"), dict(baseline="none"),
    dict(baseline="group", samples=2), dict(baseline="neighbours", neighbours=2),
    dict(regularizer="none"), dict(baseline="greedy", sampled_weight=0.0),
    dict(baseline="greedy", sampled_weight=0.0, regularizer="none"),
    dict(baseline="group", samples=2, sampled_weight=0.0), dict(sampled_weight=0.0),
]  # fmt: skip


@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_what_is_called_ignored_changes_nothing_and_the_rest_changes_something(changes, learn):
    """Each setting in turn: is the captioner's gradient another one? (--direction image-to-text
    takes no hard negatives: they are images.)"""

    def gradient(**values):
        torch.manual_seed(1)
        learner, batch = learn(**{**changes, **values})
        loss, _ = learner.reinforce_step(batch)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in learner.captioner.model.parameters()])

    usual, ignored = gradient(), distcap.ignored_settings(distcap.Method(**changes))
    for name in set(OTHER_VALUES) - set(changes):
        if name == "samples" and changes.get("sampled_weight") == 0:
            continue  # no gradient of theirs: see the next test
        if name in ("ground_truth_weight", "length_normalizer") and "direction" in changes:
            continue  # human rewards are all negative here, and samples all of one length
        found = gradient(**{name: OTHER_VALUES[name]})
        assert found.allclose(usual, atol=1e-7, rtol=1e-5) == (name in ignored), name


def test_samples_that_are_not_learned_from_are_ignored_unless_something_else_hears_them():
    def ignored(**changes):
        return "samples" in distcap.ignored_settings(distcap.Method(sampled_weight=0.0, **changes))

    assert ignored(baseline="greedy", regularizer="kl") and ignored(
        baseline="none", regularizer="none"
    )
    assert not ignored()  # they compete
    assert not ignored(baseline="group", samples=2, regularizer="none")  # they are the baseline
    assert not ignored(baseline="greedy")  # they are the zeros of the discriminator


def test_teacher_forcing_ignores_all_but_the_length_and_normalization():
    ignored = distcap.ignored_settings(distcap.Method(objective="tf"))
    assert set(FIELDS) - set(ignored) == {"objective", "normalize", "length_normalizer"}
