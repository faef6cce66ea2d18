"""The tutorial: it runs, its outputs are today's, its exercises can be solved, and it copies
nothing of distcap.py."""

import ast
import html
import inspect
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

import distcap

ROOT = Path(distcap.__file__).parent
PATH = ROOT / "tutorial.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
MARKDOWN = [cell for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
CELLS = {cell.id: cell for cell in NOTEBOOK.cells}
TEXT = Path(distcap.__file__).read_text()
DEFINITIONS = ast.FunctionDef | ast.ClassDef

# Of each exercise, by the id of its cell: a right answer and a wrong one. These are the teacher's.
ANSWERS = {
    "eq-1-answer": (
        "every = distcap.caption_log_probs(log_probs, torch.ones(3, 3), longest)\n"
        "answer = distcap.teacher_forcing_loss(every).item()",
        "answer = loss1.item()",
    ),
    # Its logit moves by A (1 - p) = -2/3, the others by 1/3, so p = 1 / (1 + 2e).
    "eq-2-answer": ("answer = one_step(-1.0)[0].item()", "answer = one_step(1.0)[0].item()"),
    # -A, divided by the constant of Eq. 1, three, and by three captions
    "eq-5-answer": ("answer = 0.2 / 9", "answer = -0.2 / 9"),
    "eq-6-answer": (
        "answer = ((s * captions @ pictures.T).log_softmax(dim=0).diagonal() / s).tolist()",
        "answer = rewards6.tolist()",
    ),
    "eq-8-answer": (
        "hardest = pictures[torch.tensor([[1], [0], [1]])]\n"
        "answer = distcap.neighbours_reward(captions, pictures, hardest).tolist()",
        "answer = [0.8, 0.44, 0.8]",
    ),
    # 0.9 a + 0.05 (1 - a) = 0.6 a + 0.95 (1 - a)
    "eq-3-answer": ("answer = 0.9 / (0.9 + 0.3)", "answer = 0.94"),
    "eq-7-answer": ("answer = 0.05 * (0 - 1) + 0.05 * (0.5 - 1)", "answer = 0.0"),
    "eq-9-answer": ("answer = 2 / 3", "answer = [2 / 3, 2 / 3]"),
    "eq-4-answer": ("answer = math.log(2)", "answer = 0"),
    "write-1-answer": (
        "def my_log_p(log_probs, mask, divisor):\n"
        "    total = (log_probs * mask).sum(dim=1)\n"
        "    return total / (mask.sum(dim=1) if divisor is None else divisor)",
        "def my_log_p(log_probs, mask, divisor):\n"
        "    return (log_probs * mask).sum(dim=1) / (divisor or len(mask[0]))",
    ),
    "write-2-answer": (
        "def my_text_to_image(rows, images, image_index, s):\n"
        "    logits = s * rows @ images.T\n"
        "    others = logits.scatter(1, image_index[:, None], -torch.inf)\n"
        "    mine = logits.gather(1, image_index[:, None]).squeeze(1)\n"
        "    return (mine - others.logsumexp(dim=1)) / s",
        "def my_text_to_image(rows, images, image_index, s):\n"
        "    logits = s * rows @ images.T\n"
        "    mine = logits.gather(1, image_index[:, None]).squeeze(1)\n"
        "    return (mine - logits.logsumexp(dim=1)) / s",
    ),
    "write-3-answer": (
        "def my_group_advantages(rewards):\n"
        "    count = rewards.shape[1]\n"
        "    return (rewards - rewards.mean(dim=1, keepdim=True)) * count / (count - 1)",
        "def my_group_advantages(rewards):\n"
        "    return rewards - rewards.mean(dim=1)",  # which stops: the shapes do not match
    ),
    "predict-1-answer": ('guess = "longer"', 'guess = "shorter"'),
    "predict-2-answer": ('guess = "lower"', 'guess = "higher"'),
    "predict-3-answer": ('guess = "nearly always"', 'guess = "about half"'),
    "bug-padding": ("example = [[-1, -2], [-1, 0]], [[1, 1], [1, 0]]",
                    "example = [[-1, -2], [-1, -3]], [[1, 1], [1, 1]]"),
    "bug-beam": ("example = [2, 0, 0], [0.1, 0.9, 0.1]", "example = [2, 0, 0], [0.9, 0.1, 0.1]"),
    "bug-exp": ("example = 100", "example = 10"),
    "bug-human": ("example = [-1], [-2], [0.1], [0.5]", "example = [-1], [-2], [0.1], [-0.5]"),
    "bug-dropout": ('example = 0.1, "a red ring and a blue bar"',
                    'example = 0.0, "a red ring and a blue bar"'),
    "bug-top-k": ("example = [0.5, 0.3, 0.2]", "example = [1 / 3, 1 / 3, 1 / 3]"),
}  # fmt: skip


def sections() -> dict[str, str]:
    """{"3  Rewards and baselines": its text, ...} of distcap.py, by the headers, in order."""
    parts = re.split(r"^# ---- (\d+  [^:\n]*?)(?::.*| -+)$", TEXT, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def section(name: str) -> list[ast.stmt]:
    """What a section of distcap.py defines, found by the name in its header."""
    (text,) = [text for header, text in sections().items() if header.split("  ")[1] == name]
    return [node for node in ast.parse(text).body if isinstance(node, DEFINITIONS)]


def shown(cell) -> list[str]:
    """The names N of the calls show(distcap.N) of a cell, in order."""
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "show"]
    names = [ast.unparse(call.args[0]) for call in sorted(calls, key=lambda call: call.lineno)]
    assert all(name.startswith("distcap.") for name in names)
    return [name.removeprefix("distcap.") for name in names]


def source(name: str) -> str:
    """Today's source of something in distcap, as the notebook shows it."""
    found = distcap
    for part in name.split("."):
        found = getattr(found, part)
    return f"```python\n{inspect.getsource(found)}```"


def texts(cell) -> list[str]:
    """What a cell printed, showed as Markdown or HTML, or as a plain value; without figures."""
    plain = [output.get("text", "") for output in cell.outputs]
    data = [output.get("data", {}) for output in cell.outputs]
    found = [value for each in data for kind, value in each.items() if kind.startswith("text/")]
    return plain + [re.sub(r"base64,[^\"]*", "", text) for text in found]


def figures(cell) -> list[tuple]:
    """Of each figure of a cell: its `alt`, its caption, and the output's metadata."""
    found = []
    for output in cell.outputs:
        text = output.get("data", {}).get("text/html", "")
        if "<img" not in text:
            continue
        alt, caption = (
            html.unescape(re.search(pattern, text, flags=re.S)[1])
            for pattern in (r'<img alt="(.*?)"', r"<figcaption.*?>(.*?)</figcaption>")
        )
        found.append((alt, caption, output.metadata))
    return found


def call(cell) -> str:
    """The last statement of an exercise's cell: the call that checks the answer."""
    return ast.unparse(ast.parse(cell.source).body[-1])


def test_the_committed_file_is_a_whole_run_from_top_to_bottom():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert_clean(CODE)
    assert PATH.stat().st_size < 1_500_000


def assert_clean(cells) -> None:
    """No output is an error, a word on stderr, or a message that something failed."""
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.id
        for text in texts(cell):
            said = "" if text.startswith("```") else text  # sources speak of errors
            assert not re.search(r"Traceback|Error\b|cannot be|Warning", said), (cell.id, said)


def test_the_committed_file_names_no_folder_of_the_machine_and_carries_no_needless_metadata():
    text = "\n".join(each for cell in CODE for each in texts(cell))
    assert re.findall(r"(?<![\w.<])/(?:tmp|work|home|root|usr|var|Users|private)\b", text) == []
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    assert set(NOTEBOOK.metadata) == {"kernelspec", "language_info"}
    # Folded cells: `jupyter` for JupyterLab, `transient` for nbconvert.
    assert {key for cell in NOTEBOOK.cells for key in cell.metadata} <= {"jupyter", "transient"}


def test_every_source_shown_is_todays():
    for cell in CODE:
        data = [output.data for output in cell.outputs if "data" in output]
        markdown = [each["text/markdown"] for each in data if "text/markdown" in each]
        assert markdown == [source(name) for name in shown(cell)], (
            f"cell {cell.id}: run the notebook again"
        )


def test_the_chapters_are_the_sections_of_the_file_in_their_order():
    first_lines = [cell.source.split("\n")[0] for cell in NOTEBOOK.cells]
    chapters = [line.removeprefix("## ") for line in first_lines if line.startswith("## ")]
    assert chapters == ["0 The story", *(header.replace("  ", " ") for header in sections())]


def test_every_link_within_the_notebook_leads_to_a_heading():
    """An anchor is the heading with hyphens for spaces: so in JupyterLab, nbconvert and GitHub."""
    text = "\n".join(cell.source for cell in MARKDOWN)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    links = re.findall(r"\]\(#(.*?)\)", text)
    assert set(links) <= {heading.replace(" ", "-") for heading in headings}
    chapters = {line.replace(" ", "-") for line in headings if line[0].isdigit()}
    assert len(chapters) == 13 and chapters <= set(links)


@pytest.mark.parametrize("name", ["Objective", "Rewards and baselines", "Regularizers", "One step"])
def test_all_of_the_method_is_shown(name):
    """Each function and class, in one piece or, if it is a class, method by method."""
    there = {name for cell in CODE for name in shown(cell)}
    assert section(name)
    for node in section(name):
        methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
        by_methods = {f"{node.name}.{method}" for method in methods}
        assert node.name in there or (by_methods and by_methods <= there), node.name


def test_the_notebook_defines_nothing_that_distcap_defines():
    """No function or class of the same name, and no constant. (Loop variables may be alike.)"""
    body = ast.parse(TEXT).body
    theirs = {node.name for node in body if isinstance(node, DEFINITIONS)}
    assigned = [node for node in body if isinstance(node, ast.Assign | ast.AnnAssign)]
    constants = {name.id for node in assigned for name in ast.walk(node) if is_stored(name)}
    nodes = [node for cell in CODE for node in ast.walk(ast.parse(cell.source))]
    ours = {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    values = {node.id for node in nodes if is_stored(node)}
    assert ours & (theirs | constants) == set()
    assert values & constants == set()


def is_stored(node: ast.AST) -> bool:
    """Whether the node is a name that is assigned to."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_equations_1_to_9_each_have_a_chapter():
    """Equation, source, check by hand, figure, and an exercise."""
    for number in range(1, 10):
        assert rf"\tag{{{number}}}" in "".join(cell.source for cell in MARKDOWN)
        assert shown(CELLS[f"eq-{number}-code"]) and "assert " in CELLS[f"eq-{number}-code"].source
        assert figures(CELLS[f"eq-{number}-plot"])
        assert f"**Exercise Eq. {number} (compute).**" in CELLS[f"eq-{number}-exercise"].source


def test_equation_10_has_each_regularizer_with_its_source_and_a_value_by_hand():
    assert r"\tag{10}" in CELLS["eq-10"].source
    for name, sources in (
        ("eq-10-kl", ["KL"]),
        ("eq-10-cider-code", ["plain_words", "Cider"]),
        ("eq-10-grammar-code", ["corrupt", "Grammar"]),
    ):
        assert shown(CELLS[name]) == sources
        assert "by_hand" in CELLS[name].source and "assert " in CELLS[name].source


@pytest.mark.parametrize("name", ["baseline-exact", "baseline-three-code"])
def test_the_theorems_of_length_are_asserted_both_ways(name):
    """A constant reward and a baseline are neutral with the sum, and not with the mean of each
    caption, which an older notebook used while it said that they were."""
    lines = CELLS[name].source.split("\n")
    asserted = [line for line in lines if line.lstrip().startswith("assert ")]
    assert any("[2.0, " in line and "allclose" in line for line in asserted)
    assert any("[None, " in line and ">" in line for line in asserted)


def test_every_figure_has_words_for_those_who_do_not_see_it_and_a_caption():
    """In the HTML, where nbconvert, JupyterLab and GitHub use them, and in the metadata."""
    found = [figure for cell in CODE for figure in figures(cell)]
    assert len(found) >= 25
    for alt, caption, metadata in found:
        assert len(alt) > 60 and metadata["alt"] == alt
        assert len(caption) > 60 and caption != alt


def test_the_end_of_the_committed_story_is_a_happy_one():
    """The whole method's captions are true of their pictures; those of the cosine are hacked."""
    rows = re.findall(r"^(\w+) (\d+) +([\d.]+) +([\d.]+)", texts(CELLS["verdict"])[0], flags=re.M)
    last = {name: (float(well_formed), float(faithful)) for name, _, well_formed, faithful in rows}
    assert last["full"][1] >= 0.97 and last["full"][0] >= 0.99
    assert last["cosine"][0] < 0.5 and last["competing"][0] < 0.5


def test_no_figure_is_shown_but_by_that_one_function():
    for cell in CODE:
        assert "plt.show" not in cell.source
        kinds = [set(output.get("data", {})) for output in cell.outputs]
        assert all("text/html" in each for each in kinds if "image/png" in each)


def test_the_answers_cannot_be_read_off_the_notebook():
    (cell,) = [cell for cell in CODE if cell.id == "hidden-checks"]
    (scrambled,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "SCRAMBLED"
    ]
    assert len(scrambled) == 9
    assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in scrambled.values())
    for name in ANSWERS:
        blank = CELLS[name].source
        assert re.search(r"^(answer|guess|example) = None|^    \.\.\.", blank, flags=re.M), name


def test_lines_of_code_are_short():
    assert [line for cell in CODE for line in cell.source.split("\n") if len(line) > 100] == []


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook run anew, once: as it is, after each exercise a right and a wrong answer, and
    after the chapter on photographs a folder of larger ones."""
    notebook = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        for kind, code in zip(("right", "wrong"), ANSWERS.get(cell.id, ())):
            cells.append(new_code_cell(f"{code}\n{call(cell)}", id=f"{kind}-{cell.id}"))
        if cell.id == "photographs":
            folder = tmp_path_factory.mktemp("photographs")
            for name, colour in (("a b.jpg", "red"), ("c.png", "blue")):
                distcap.Image.new("RGB", (300, 200), colour).save(folder / name)
            code = cell.source.replace("PHOTOGRAPHS = None", f"PHOTOGRAPHS = {str(folder)!r}", 1)
            cells.append(new_code_cell(code, id="others"))
    notebook.cells = cells
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        # With models this small two threads gain little, and lose much on a busy machine.
        patch.setenv("OMP_NUM_THREADS", "1")
        client.execute()
    return {cell.id: cell for cell in cells if cell.cell_type == "code"}


def test_it_runs_without_an_error_or_a_word_on_stderr(executed):
    assert_clean([executed[cell.id] for cell in CODE])


@pytest.mark.parametrize("name", ANSWERS)
def test_an_exercise_tells_right_from_wrong_and_waits_for_an_answer(executed, name):
    blank, right, wrong = (
        "".join(texts(executed[each])) for each in (name, f"right-{name}", f"wrong-{name}")
    )
    assert re.search(r"no (answer|guess) yet", blank)
    assert right.endswith("right.\n") and "not yet" not in right
    assert re.search(r"not yet|not what you expected", wrong) and not wrong.endswith("right.\n")


def test_the_photographs_may_be_any(executed):
    said = "".join(texts(executed["others"])).splitlines()
    assert [line.split("  ")[0] for line in said] == ["a b.jpg", "c.png"]
    assert len("".join(texts(executed["photographs"])).splitlines()) == 6
