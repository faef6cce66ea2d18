"""The toy world: its grammar, what is true in it, its pictures, and what only it can measure."""

import random

import pytest
from conftest import configure

import distcap

SCENE = "a small red circle to the left of a large blue star on a white background"


@pytest.mark.parametrize(
    ("caption", "well_formed", "true"),
    [
        (SCENE, True, True),
        ("two shapes", True, True),
        ("two shapes on a white background", True, True),
        ("two shapes on a black background", True, False),
        ("a red circle and a blue star", True, True),
        ("a blue star and a red circle", True, True),  # "and" says nothing of the order
        ("a red star and a blue circle", True, False),  # but whose colour is whose
        ("a circle to the left of a star", True, True),
        ("a star to the left of a circle", True, False),
        ("a circle above a star", True, False),
        ("a large circle and a star", True, False),
        ("a red circle", False, False),
        ("a red circle and a blue star and a blue star", False, False),
        ("a red red circle and a blue star", False, False),
        ("red circle blue star", False, False),
        ("", False, False),
    ],
)
def test_grammar_and_truth(caption, well_formed, true):
    said = distcap.parse(caption)
    assert (said is not None) == well_formed
    assert distcap.is_true(said, distcap.parse(SCENE)) == true


def test_a_sentence_is_read_word_for_word():
    said = distcap.parse("a red ring above a small bar on a gray background")
    wanted = dict(size=None, colour="red", shape="ring", relation="above", background="gray")
    wanted |= dict(other_size="small", other_colour=None, other_shape="bar")
    assert said == distcap.Scene(**wanted)
    assert distcap.parse("two shapes") == distcap.Scene(*[None] * 8)


def test_a_scene_and_its_sentence_are_the_same():
    for example in distcap.toy_world(2, 300, 0)[0]:
        assert distcap.parse(str(example.scene)) == example.scene
        assert None not in example.scene


def test_the_other_order_of_a_scene():
    scene = distcap.parse(SCENE)
    wanted = "a large blue star to the left of a small red circle on a white background"
    assert str(scene.swapped()) == wanted and scene.swapped().swapped() == scene
    assert not distcap.is_true(scene.swapped(), scene)


def test_every_human_text_of_the_world_is_true_of_its_scene():
    rng = random.Random(1)
    for example in distcap.toy_world(3, 200, 0)[0]:
        more = distcap.write_references(example.scene, rng, generic=0.2)
        for text in (str(example.scene), *example.references, *more):
            assert distcap.is_true(distcap.parse(text), example.scene), (text, example.scene)
            assert set(text.split()) <= set(distcap.WORDS)


def test_references_are_mostly_generic():
    examples = distcap.toy_world(0, 400, 0)[0]
    detailed = sum(example.references.count(str(example.scene)) for example in examples)
    assert 0.11 < detailed / sum(len(example.references) for example in examples) < 0.15


def test_toy_world_is_deterministic_and_no_scene_occurs_twice():
    def content(examples):
        return [(each.scene, each.references, each.image.tobytes()) for each in examples]

    training, test = distcap.toy_world(5, 50, 20)
    again, _ = distcap.toy_world(5, 50, 20)
    assert len(training) == 50 and len(test) == 20
    assert len({example.scene for example in training + test}) == 70
    assert content(training) == content(again)
    other = distcap.toy_world(6, 50, 0)[0]
    assert {example.scene for example in other} != {example.scene for example in training}


def test_toy_world_says_when_it_runs_out_of_scenes():
    with pytest.raises(distcap.UserError, match="--test-size 1000: more than the 51200 scenes"):
        distcap.toy_world(0, 51_000, 1_000)


def test_toy_sets_say_that_no_scene_is_left_to_validate_on(monkeypatch):
    """Bug: a traceback, after CLIP was trained."""
    drawn = distcap.toy_world(0, 0, 4)[1]
    worlds = iter([(drawn[:2], drawn[2:]), ([], [drawn[1], drawn[3]])])
    monkeypatch.setattr(distcap, "toy_world", lambda *_: next(worlds))
    with pytest.raises(distcap.UserError, match=r"^--train-size 2, --test-size 2: leave no scene"):
        distcap.toy_sets(configure(train_size=2, test_size=2))


def test_no_pictures_at_all_are_a_line(clip):
    """Bug: an IndexError."""
    with pytest.raises(distcap.UserError, match="none of 0 pictures can be read: there are none"):
        distcap.examine([], clip, configure(), [], {})


def test_pictures_show_their_scene():
    def draw(sentence):
        return distcap.draw(distcap.parse(sentence), random.Random(0))

    picture = draw("a large green bar above a small pink circle on a black background")
    assert picture.size == (32, 32) and picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (0, 0, 0)
    assert picture.getpixel((16, 8)) == (0x20, 0xA0, 0x20)
    assert picture.getpixel((16, 24)) == (0xFF, 0x80, 0xC0)
    ring = draw("a large red ring to the left of a large red circle on a white background")
    assert ring.getpixel((8, 16)) == (255, 255, 255)
    assert ring.getpixel((24, 16)) == (0xE0, 0x20, 0x20)


def test_toy_measures_by_hand():
    sentences = [
        "a small red ring above a large blue bar on a white background",
        "a small red ring above a small blue bar on a white background",
        "a large pink star above a small blue bar on a black background",
        "a large pink star above a small cyan bar on a black background",
    ]
    captions = [
        "a red ring and a blue bar",  # true of two scenes: 1/2
        sentences[1],  # of its own alone: 1
        "a ring and a bar",  # false of its own
        "a pink star star",  # ill-formed
    ]
    measures = distcap.toy_measures(captions, [distcap.parse(each) for each in sentences])
    assert measures == {"well_formed": 0.75, "faithful": 0.5, "oracle_R@1": 1.5 / 4}


def test_toy_measures_equal_a_slow_loop(world):
    """Captions of one's own scene and of others', equal ones, and no sentences."""
    rng = random.Random(0)
    texts = [rng.choice(rng.choice((example, world[0])).references) for example in world]
    texts[7] = texts[8] = "a red red"
    found = []
    for text, example in zip(texts, world):
        fitting = [other for other in world if distcap.is_true(distcap.parse(text), other.scene)]
        found.append(1 / len(fitting) if example in fitting else 0)
    measures = distcap.toy_measures(texts, [example.scene for example in world])
    assert measures["oracle_R@1"] == pytest.approx(sum(found) / len(world))
    assert measures["faithful"] == pytest.approx(sum(one > 0 for one in found) / len(world))
    assert 0 < measures["faithful"] < measures["well_formed"] == 1 - 2 / len(world)


def test_the_tokenizer_knows_every_word_and_clip_pools_at_the_end():
    """CLIP takes its embedding from where the highest id stands."""
    tokenizer = distcap.toy_tokenizer()
    ids = tokenizer(" ".join(distcap.WORDS)).input_ids
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.sep_token_id == max(tokenizer.get_vocab().values())
