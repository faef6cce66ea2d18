"""The tutorial: it runs, its outputs are today's, its exercises can be solved, and it copies
nothing of distcap.py."""

import ast
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
TEXT = Path(distcap.__file__).read_text()
DEFINITIONS = ast.FunctionDef | ast.ClassDef


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
    """What a cell printed, showed as Markdown or as a plain value."""
    plain = [output.get("text", "") for output in cell.outputs]
    data = [output.get("data", {}) for output in cell.outputs]
    return plain + [
        value for each in data for kind, value in each.items() if kind.startswith("text/")
    ]


def solutions(markdown: str) -> list[str]:
    """The code of the folded solutions in a Markdown cell."""
    folded = re.findall(r"<details>.*?</details>", markdown, flags=re.S)
    return [re.search(r"```python\n(.*?)```", each, flags=re.S)[1] for each in folded]


def test_the_committed_file_is_a_whole_run_from_top_to_bottom():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert PATH.stat().st_size < 1_500_000


def test_the_committed_file_names_no_folder_of_the_machine_and_carries_no_needless_metadata():
    text = "\n".join(each for cell in CODE for each in texts(cell))
    assert re.findall(r"(?<![\w.])/(?:tmp|work|home|root|usr|var|Users|private)\b", text) == []
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    assert set(NOTEBOOK.metadata) == {"kernelspec", "language_info"}
    assert {key for cell in NOTEBOOK.cells for key in cell.metadata} <= {
        "jupyter"
    }  # the folded checks


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
    assert chapters[0] == "0  The story"
    assert len(chapters) == len(sections()) + 1
    for chapter, header in zip(chapters[1:], sections()):
        assert re.match(rf"{re.escape(header)}\b", chapter), f"{chapter} is not {header}"


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
    """Equation, source, check by hand, figure in words, exercise and solution."""
    cells = {cell.id: cell for cell in NOTEBOOK.cells}
    for number in range(1, 10):
        assert rf"\tag{{{number}}}" in "".join(cell.source for cell in NOTEBOOK.cells)
        assert shown(cells[f"eq-{number}-code"]) and "assert " in cells[f"eq-{number}-code"].source
        outputs = cells[f"eq-{number}-plot"].outputs
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert "*Figure:" in cells[f"eq-{number}-figure"].source
        assert "What breaks if" in cells[f"eq-{number}-exercise"].source
        assert len(solutions(cells[f"eq-{number}-solution"].source)) == 1


def test_equation_10_has_each_regularizer_with_its_source_and_a_value_by_hand():
    cells = {cell.id: cell for cell in NOTEBOOK.cells}
    assert r"\tag{10}" in cells["eq-10"].source
    for name, sources in (
        ("eq-10-kl", ["KL"]),
        ("eq-10-cider-code", ["plain_words", "Cider"]),
        ("eq-10-grammar-code", ["corrupt", "Grammar"]),
    ):
        assert shown(cells[name]) == sources
        assert "by_hand" in cells[name].source and "assert " in cells[name].source


@pytest.mark.parametrize("name", ["baseline-exact", "baseline-three-code"])
def test_the_theorems_of_length_are_asserted_both_ways(name):
    """A constant reward and a baseline are neutral with the sum, and not with the mean of each
    caption, which an older notebook used while it said that they were."""
    (cell,) = [cell for cell in CODE if cell.id == name]
    asserted = [line for line in cell.source.split("\n") if line.lstrip().startswith("assert ")]
    assert any("[2.0, " in line and "allclose" in line for line in asserted)
    assert any("[None, " in line and ">" in line for line in asserted)


def test_every_figure_has_words_for_those_who_do_not_see_it():
    for before, cell in zip(NOTEBOOK.cells, NOTEBOOK.cells[1:]):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert before.cell_type == "markdown" and "*Figure:" in before.source, cell.id


def test_lines_of_code_are_short():
    assert [line for cell in CODE for line in cell.source.split("\n") if len(line) > 100] == []


@pytest.fixture(scope="module")
def executed():
    """The notebook run anew, once: as it is, and after each exercise its solution."""
    notebook = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        cells += [
            new_code_cell(code, id="solved")
            for code in solutions(cell.source)
            if cell.cell_type == "markdown"
        ]
    for number, cell in enumerate(cells):
        cell.id = f"{cell.id}-{number}"  # ids must differ
    notebook.cells = cells
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "OMP_NUM_THREADS", "1"
        )  # with models this small two gain little, and lose much on a busy machine
        client.execute()
    return [cell for cell in cells if cell.cell_type == "code"]


def test_it_runs_without_an_error_or_a_word_on_stderr(executed):
    outputs = [output for cell in executed for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_every_solution_is_right_and_no_answer_is_given_beforehand(executed):
    solved = ["".join(texts(cell)) for cell in executed if cell.id.startswith("solved")]
    assert len(solved) == 9 and all(text.endswith("right.\n") for text in solved)
    asked = ["".join(texts(cell)) for cell in executed if "-answer-" in cell.id]
    assert len(asked) == 9 and all(text.endswith("no answer yet.\n") for text in asked)


def test_without_the_hub_the_last_chapter_says_so(executed):
    (cell,) = [cell for cell in executed if cell.id.startswith("hub-try")]
    said = "".join(texts(cell))
    assert (
        said.startswith("The Hub cannot be reached") or said.count("\n") == 6
    )  # or it is in the cache
