"""A second world, to see that a finding is not the toy world's own: three marks on a board.

Other pictures (black strokes on white, nine places) and another grammar (a list with places, in the
order in which one reads, without colours, sizes and relations). Within `installed()` distcap's toy
world is this one: the models, their sizes, the settings and the measures stay as they are.
"""

import contextlib
import functools
import itertools
import random
import re
from typing import NamedTuple
from unittest import mock

from PIL import Image, ImageDraw

import distcap

PLACES = {  # in reading order: where the mark's centre is, in pixels of 32
    f"{row} {column}".strip() or "centre": (x, y)
    for row, y in (("top", 5), ("", 16), ("bottom", 27))
    for column, x in (("left", 5), ("", 16), ("right", 27))
}
MARKS = ("cross", "ring", "dot", "square", "triangle", "line")
GENERIC = 0.85  # share of references that leave places, or marks, open
WORDS = "a marks three and on board mark".split()
WORDS = [*WORDS, *MARKS, *dict.fromkeys(" ".join(PLACES).split())]

_PLACE = rf"(?: ({'|'.join(sorted(PLACES, key=len, reverse=True))}))?"
_ITEM = rf"a ({'|'.join(MARKS)}|mark){_PLACE}"
_GRAMMAR = re.compile(rf"three marks|{_ITEM} {_ITEM} and {_ITEM}")


class Board(NamedTuple):
    """What a picture shows, or what a caption says: then None is what it leaves open. The marks
    are in reading order, in a caption as on the board."""

    mark: str | None
    place: str | None
    second_mark: str | None
    second_place: str | None
    third_mark: str | None
    third_place: str | None

    def __str__(self) -> str:
        return write(self, marks=True, places=True)


def write(board: Board, marks: bool, places: bool) -> str:
    """The board in words, with its marks, their places, or both."""
    items = []
    for mark, place in zip(board[::2], board[1::2]):
        items.append(f"a {mark if marks else 'mark'}" + (f" {place}" if places else ""))
    return f"{items[0]} {items[1]} and {items[2]}"


@functools.lru_cache(maxsize=100_000)
def parse(caption: str) -> Board | None:
    """What the caption says; None if it is not a sentence of this world."""
    match = _GRAMMAR.fullmatch(caption)
    return Board(*(None if word == "mark" else word for word in match.groups())) if match else None


def is_true(said: Board | None, seen: Board) -> bool:
    """Whether a caption is well-formed, and nothing that it says false of the board."""
    return said is not None and all(word in (None, true) for word, true in zip(said, seen))


def write_references(
    board: Board, rng: random.Random, count: int = 5, generic: float = GENERIC
) -> tuple[str, ...]:
    """What people might write of a board: something generic, else all of it."""
    vague = [write(board, marks=True, places=False)] * 2
    vague += [write(board, marks=False, places=True), "three marks"]
    return tuple(rng.choice(vague) if rng.random() < generic else str(board) for _ in range(count))


def draw(board: Board, rng: random.Random, pixels: int = 32) -> Image.Image:
    """The board as a picture. Each mark's place varies by a pixel."""
    scale, radius = 4, 3.5  # drawn four times too large, then shrunk, so that edges are smooth
    picture = Image.new("RGB", (scale * pixels, scale * pixels), "white")
    canvas = ImageDraw.Draw(picture)
    for mark, place in zip(board[::2], board[1::2]):
        x, y = (scale * (centre + rng.uniform(-0.5, 0.5)) for centre in PLACES[place])
        size = scale * radius
        box = (x - size, y - size, x + size, y + size)
        if mark == "cross":
            canvas.line(box, "black", 5)
            canvas.line((x - size, y + size, x + size, y - size), "black", 5)
        elif mark == "ring":
            canvas.ellipse(box, outline="black", width=5)
        elif mark == "dot":
            canvas.ellipse(box, fill="black")
        elif mark == "square":
            canvas.rectangle(box, outline="black", width=5)
        elif mark == "triangle":
            canvas.polygon([(x, y - size), (x + size, y + size), (x - size, y + size)], "black")
        else:
            canvas.line((x - size, y, x + size, y), "black", 6)
    return picture.resize((pixels, pixels), Image.Resampling.BOX)


@functools.cache
def boards() -> list[Board]:
    """Every board there is: 84 choices of three places, with three of six marks, 18,144."""
    found = []
    for places in itertools.combinations(PLACES, 3):
        for marks in itertools.product(MARKS, repeat=3):
            found.append(Board(*itertools.chain.from_iterable(zip(marks, places))))
    return found


def world(seed: int, train_size: int, test_size: int) -> tuple[list, list]:
    """Training and test examples. No board occurs twice."""
    rng = random.Random(seed)
    examples = []
    for number, board in enumerate(rng.sample(boards(), train_size + test_size)):
        picture = draw(board, rng)
        references = write_references(board, rng)
        examples.append(distcap.Example(f"{number:05d}", picture, references, scene=board))
    return examples[:train_size], examples[train_size:]


def installed() -> contextlib.AbstractContextManager:
    """Within it, distcap's toy world is this one."""
    parts = dict(WORDS=WORDS, parse=parse, is_true=is_true)
    parts |= dict(write_references=write_references, toy_world=world)
    return mock.patch.multiple(distcap, **parts)
