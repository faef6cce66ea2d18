"""The picture at the top of the project's README: a toy scene, and what three captioners say of it.

    distcap train --recipe tf --out runs/before
    distcap train --recipe clip-scst --out runs/hacked
    distcap train --out runs/regularized
    python tests/claims/strip.py runs/before runs/hacked runs/regularized

Runs of one seed have the same start and the same test pictures. The picture shown is the first of
these that makes the point: the caption before is true of several, the hacked one is no sentence,
the regularized one is true of this picture alone. How often each is the case is printed.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import distcap

NAMES = ("before", "hacked", "regularized")
TRUE, FALSE, BROKEN = "true", "false", "not a sentence"
BLUE, ORANGE, GREY = "#0072b2", "#c04a00", "#555555"  # told apart by all eyes
WIDTH, EDGE, SIDE = 1200, 28, 320  # in pixels; shown at half of that, and readable at a quarter
LABEL, TEXT = ImageFont.load_default(28), ImageFont.load_default(38)


def judge(caption: str, scene: distcap.Scene) -> list[tuple[str, str]]:
    """Each word of a caption with TRUE, FALSE or BROKEN. BROKEN is what follows the longest
    beginning that is a sentence of the toy world."""
    words = re.findall(r"\S+", caption)
    beginnings = [" ".join(words[:end]) for end in range(len(words), 0, -1)]
    sentence = next(filter(distcap.parse, beginnings), "")
    match = distcap._GRAMMAR.fullmatch(sentence)
    wrong = []  # the fields of the scene that the sentence has wrong
    if match:
        said = distcap.Scene(*match.groups())
        orders = [scene, scene.swapped()] if said.relation == "and" else [scene]
        each = [[n for n in range(8) if said[n] not in (None, "and", one[n])] for one in orders]
        wrong = min(each, key=len)
    verdicts = []
    for word in re.finditer(r"\S+", sentence):
        spans = [match.span(field + 1) for field in wrong]
        false = any(start <= word.start() < end for start, end in spans)
        verdicts.append(FALSE if false else TRUE)
    return list(zip(words, verdicts + [BROKEN] * (len(words) - len(verdicts))))


def choose(captions: Sequence[list[str]], scenes: Sequence[distcap.Scene]) -> list[int]:
    """The pictures that make the point, by number."""
    chosen = []
    for number, (before, hacked, after) in enumerate(zip(*captions)):
        said = [distcap.parse(text) for text in (before, after)]
        true = [distcap.is_true(each, scenes[number]) for each in said]
        matches = [sum(distcap.is_true(each, scene) for scene in scenes) for each in said]
        if all(true) and matches[0] > 1 == matches[1] and not distcap.parse(hacked):
            chosen.append(number)
    return chosen


def draw_words(canvas: ImageDraw.ImageDraw, judged: list[tuple[str, str]], x: int, y: int) -> int:
    """Write words from (x, y), in lines that end at the picture's edge. What is false is orange and
    underlined, what is not a sentence orange with a wavy line. Returns where the next line is."""
    place = x
    for word, verdict in judged:
        width = round(TEXT.getlength(word))
        if place + width > WIDTH - EDGE:
            place, y = x, y + 50
        canvas.text((place, y), word, BLUE if verdict == TRUE else ORANGE, TEXT)
        steps = range(place, place + width, 4)
        if verdict == FALSE:
            canvas.line([(place, y + 44), (place + width, y + 44)], ORANGE, 4)
        elif verdict == BROKEN:
            canvas.line([(step, y + 42 + (step - place) % 8) for step in steps], ORANGE, 3)
        place += width + round(TEXT.getlength(" "))
    return y + 50


def draw_strip(picture: Image.Image, captions: Sequence[str], scene: distcap.Scene) -> Image.Image:
    """The picture, and beside it the captions under their names."""
    strip = Image.new("RGB", (WIDTH, 900), "white")
    canvas = ImageDraw.Draw(strip)
    strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (EDGE, EDGE + 8))
    corner = EDGE + SIDE, EDGE + 8 + SIDE
    canvas.rectangle([(EDGE - 1, EDGE + 7), corner], outline=GREY)
    left, y = 2 * EDGE + SIDE, EDGE
    for name, caption in zip(NAMES, captions):
        canvas.text((left, y), name, GREY, LABEL)
        y = draw_words(canvas, judge(caption, scene), left, y + 34) + 14
    y = max(y, EDGE + SIDE + 22)
    for place, verdict in enumerate((TRUE, FALSE, BROKEN)):
        legend = [(word, verdict) for word in verdict.split()]
        end = draw_words(canvas, legend, EDGE + 130 * place, y)
    y = end
    return strip.crop((0, 0, WIDTH, y + EDGE // 2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the strip of three runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "runs", nargs=3, type=Path, metavar="RUN", help="before, hacked, regularized"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("strip.png"))
    flags = parser.parse_args(arguments)
    examples = distcap.read_examples(str(flags.runs[0] / "test"))
    scenes = [example.scene for example in examples]
    captions = []
    for run in flags.runs:
        others = distcap.read_examples(str(run / "test"))
        if [example.scene for example in others] != scenes:
            parser.error(f"{run}: not the test pictures of {flags.runs[0]}")
        captions.append(distcap.read_captions(run / "captions.json", examples))
    chosen = choose(captions, scenes)
    if not chosen:
        parser.error("no picture shows the point: hacked captions must not be sentences")

    number = chosen[0]
    picture = distcap.load_image(examples[number].image)
    draw_strip(picture, [texts[number] for texts in captions], scenes[number]).save(flags.out)
    print(f"{flags.out}: {examples[number].image}, of {len(chosen)} that make the point")
    for name, texts in zip(NAMES, captions):
        good = sum(distcap.parse(text) is not None for text in texts)
        print(f"{name:12} {good:5} of {len(texts)} well-formed; here: {texts[number]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
