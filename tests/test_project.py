"""The reading rule, measured on distcap.py. `python tests/test_project.py` prints the measures."""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "distcap.py").read_text(encoding="utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
FILE = range(1, len(LINES) + 1)
CORE = ["Method", "Objective", "Rewards and baselines", "Regularizers", "One step"]
REST = ["Captioner", "CLIP", "Data", "Training", "Evaluation", "Toy world", "Command line"]
# What the core may ask of the two models, and what it may not name: tensors in, tensors out.
CAPTIONER_METHODS = {"encode", "sample_and_greedy", "tokenize", "decode", "log_probs"}
CAPTIONER_METHODS |= {"pad"}
CLIP_METHODS = {"embed_captions", "logit_scale"}
OUTSIDE = set("transformers open_clip PIL Image Path open os json argparse random".split())

HEADERS = {n: line for n, line in enumerate(LINES, 1) if line.startswith("# ----")}
NAMES = [re.sub(r"# ---- \d+ +|:.*| -+$", "", header) for header in HEADERS.values()]
STARTS = {"head": 1} | dict(zip(NAMES, HEADERS))


def section(first, last=None):
    """The line numbers of a section, or from one to another; "head" is all before the first."""
    if missing := {first, last or first} - set(STARTS):
        pytest.fail(f"distcap.py has no section {missing}, only {list(STARTS)}", pytrace=False)
    later = [n for n in STARTS.values() if n > STARTS[last or first]]
    return range(STARTS[first], min(later, default=len(LINES) + 1))


def core():
    return section(CORE[0], CORE[-1])


def nodes_on(lines):
    return [n for n in ast.walk(TREE) if getattr(n, "lineno", 0) in lines]


def prose_and_code(text):
    """Line number → comment or docstring; line number → number of tokens, imports left out."""
    prose, code, imports = {}, Counter(), set()
    for n in ast.walk(ast.parse(text)):
        match n:
            case ast.Expr(value=ast.Constant(value=str())):
                prose |= {i: text.splitlines()[i - 1] for i in range(n.lineno, n.end_lineno + 1)}
            case ast.Import() | ast.ImportFrom():
                imports.update(range(n.lineno, n.end_lineno + 1))
    left_out = imports | set(prose)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            prose[line] = token.string
        elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code[line] += line not in left_out
    return {n: line for n, line in prose.items() if line.strip()}, +code


PROSE, CODE = prose_and_code(TEXT)


def density(lines):
    """Tokens a line of code."""
    counts = [CODE[n] for n in lines if n in CODE]
    return sum(counts) / max(len(counts), 1)


def comment_share(lines):
    return sum(n in PROSE for n in lines) / sum(LINES[n - 1].strip() != "" for n in lines)


def lengths(lines):
    """(length, line, name) of every function, longest first."""
    found = [n for n in nodes_on(lines) if isinstance(n, ast.FunctionDef)]
    return sorted([(n.end_lineno - n.lineno + 1, n.lineno, n.name) for n in found], reverse=True)


def bans(nodes):
    """(line, what) of everything that the core does without."""
    plain = [n.value for n in nodes if isinstance(n, ast.Assign | ast.AnnAssign | ast.Return)]
    for n in nodes:
        match n:
            case ast.NamedExpr():
                yield n.lineno, "walrus"
            case ast.Assign(targets=[ast.Tuple()], value=ast.Tuple()):
                yield n.lineno, "tuple assignment"
            case ast.Subscript(value=ast.Dict()) | ast.Attribute(value=ast.Dict(), attr="get"):
                yield n.lineno, "dict as a switch"
            case ast.IfExp() if n not in plain:
                yield n.lineno, "conditional within an expression"
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                if sum(isinstance(each, ast.comprehension) for each in ast.walk(n)) > 1:
                    yield n.lineno, "nested comprehension"


def shape_letters(line):
    shapes = re.findall(r"\([A-Z\d+*·, -]*,[A-Z\d+*·, -]*\)", line)
    return {c for each in shapes if not re.search("[A-Z]{2}", each) for c in each if c.isalpha()}


def declared_letters(docstring):
    """Those of its paragraph "Shape letters: B images of a batch, H, W height and width, …"."""
    paragraphs = re.findall(r"^Shape letters.*?(?=\n\s*\n|\Z)", docstring, re.M | re.S)
    without_asides = re.sub(r"\([^()]*\)", "", " ".join(paragraphs))
    entries = re.findall(r"[:,;\n]\s*(?:and )?((?:[A-Z], )*[A-Z])\s+[a-z]", without_asides)
    return [letter for entry in entries for letter in entry.split(", ")]


def names_taken(statement):
    """(line, name) of what it imports, or uses without binding it; not `x: random.Random`."""
    nodes = list(ast.walk(statement))
    names = [n for n in nodes if isinstance(n, ast.Name)]
    bound = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    types = [
        n for arg in nodes if getattr(arg, "annotation", None) for n in ast.walk(arg.annotation)
    ]
    free = [n for n in names if n.id not in bound and not (n.id == "random" and n in types)]
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    words = [(n.lineno, word) for n in imports for word in re.findall(r"\w+", ast.unparse(n))]
    return [(n.lineno, n.id) for n in free] + words


def refuse(rule, faults):
    """Fail, with the rule and a line per (line number, what), if there are faults."""
    if lines := [f"  line {line}: {what}" for line, what in sorted(set(faults))]:
        pytest.fail("\n".join([rule, *lines]), pytrace=False)


def test_twelve_sections_in_order():
    assert " | ".join(NAMES) == " | ".join(CORE + REST)
    forms = [rf"# ---- {n}  {name}(: .+)? -+" for n, name in enumerate(NAMES, 1)]
    pairs = [(form, n, line) for form, (n, line) in zip(forms, HEADERS.items())]
    wrong = [(n, line) for form, n, line in pairs if not re.fullmatch(form, line)]
    wrong += [(n, line) for n, line in HEADERS.items() if len(line) != 100]
    refuse("headers are like `# ---- 2  Objective: ... ----`, 100 columns wide:", wrong)


def test_no_line_over_100_columns():
    wide = []
    for path in [ROOT / "distcap.py", *(ROOT / "tests").rglob("*.py")]:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        wide += [f"{path.relative_to(ROOT)}:{n}" for n, line in lines if len(line) > 100]
    if wide:
        pytest.fail(f"{len(wide)} lines over 100 columns: {' '.join(wide)}", pytrace=False)


def test_no_more_than_720_lines_of_method_4500_in_all_and_50_a_function():
    """The method is what is read in an evening. The program grew with what people need of it; when
    this binds, take program out, not air."""
    assert len(core()) <= 720 and len(LINES) <= 4500
    long = [(n, f"{name}, {length} lines") for length, n, name in lengths(FILE) if length > 50]
    refuse("functions of over 50 lines:", long)


@pytest.mark.parametrize("lines, limit", [(lambda: FILE, 13), (core, 12)], ids=["file", "core"])
def test_a_line_holds_about_one_idea(lines, limit):
    densest = Counter({n: CODE[n] for n in lines()}).most_common(20)
    rule = f"{density(lines()):.2f} tokens a line, {limit} allowed; the densest lines:"
    refuse(rule, densest if density(lines()) > limit else [])


def test_20_to_30_percent_of_the_lines_explain():
    shares = {name: f"{comment_share(section(name)):.0%}" for name in STARTS}
    assert 0.20 <= comment_share(FILE) <= 0.30, f"{comment_share(FILE):.1%}; by section {shares}"


def test_everything_public_has_a_docstring():
    classes = [n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    members = [n for parent in (TREE, *classes) for n in parent.body if hasattr(n, "name")]
    bare = [n for n in members if n.name[0] != "_" and not ast.get_docstring(n)]
    refuse("no docstring:", [(n.lineno, n.name) for n in bare])


def test_shape_letters_are_declared_once_in_the_head():
    declared = declared_letters(ast.get_docstring(TREE))
    assert declared and len(declared) == len(set(declared)), f"the head declares {declared}"
    used = [(n, letter) for n, line in PROSE.items() for letter in shape_letters(line)]
    refuse("not declared in the head:", [each for each in used if each[1] not in declared])
    places = [(n, line) for n, line in PROSE.items() if "shape letters" in line.lower()]
    refuse("declared in the head, so not here:", sorted(places)[1:])


def test_the_core_is_plain():
    refuse("not in the core:", bans(nodes_on(core())))


def test_the_core_names_nothing_below_it():
    below = "\n".join(LINES[core().stop - 1 :])
    names = OUTSIDE | set(re.findall(r"^(?:class |def )?(\w+)(?=[(:,]| = )", below, re.M))
    taken = []
    for n in [n for n in TREE.body if n.lineno in core()]:
        is_class = isinstance(n, ast.ClassDef)  # each method binds names of its own
        for each in [*n.decorator_list, *n.bases, *n.body] if is_class else [n]:
            taken += names_taken(each)
    refuse("the core may not know:", [each for each in taken if each[1] in names])


def test_the_core_asks_a_handful_of_the_models():
    allowed = {"captioner": CAPTIONER_METHODS, "initial": CAPTIONER_METHODS, "clip": CLIP_METHODS}
    asked = [n for n in nodes_on(core()) if isinstance(n, ast.Attribute)]
    pairs = [(n, getattr(n.value, "attr", getattr(n.value, "id", ""))) for n in asked]
    beyond = [n for n, owner in pairs if n.attr not in allowed.get(owner, {n.attr})]
    refuse(f"beyond {allowed}:", [(n.lineno, ast.unparse(n)) for n in beyond])


def test_nothing_unsafe():
    assert "trust_remote_code" not in TEXT and "shell=True" not in TEXT
    calls = [(n.lineno, ast.unparse(n)) for n in ast.walk(TREE) if isinstance(n, ast.Call)]
    loads = [each for each in calls if each[1].startswith("torch.load(")]
    refuse(
        "without weights_only=True:", [each for each in loads if "weights_only=True" not in each[1]]
    )


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_top_level_holds_five_things():
    command = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {path.split("/")[0] for path in listed if path and path[0] != "."}
    assert top == {"pyproject.toml", "README.md", "distcap.py", "tests", "tutorial.ipynb"}


GUILTY_AND_HARMLESS = """
walrus                            if (n := f()): pass        n = f()
tuple assignment                  a, b = 1, 2                a, b = f()
dict as a switch                  {1: f}[x]                  table[x]
dict as a switch                  {1: f}.get(x)              table.get(x)
conditional within an expression  f(a if c else b)           x = a if c else b
nested comprehension              [[a for a in b] for b in c]  [list(b) for b in c]
nested comprehension              {a for b in c for a in b}  {a for a, b in zip(c, d)}
"""


@pytest.mark.parametrize("row", GUILTY_AND_HARMLESS.strip().split("\n"))
def test_each_ban_finds_the_guilty_and_spares_the_harmless(row):
    ban, guilty, harmless = re.split("  +", row)
    assert list(bans(list(ast.walk(ast.parse(guilty))))) == [(1, ban)]
    assert list(bans(list(ast.walk(ast.parse(harmless))))) == []


def test_the_measures_measure():
    text = '"""Two\n\nlines."""\nimport os\nx = 1  # one\n\ny = f(x)\n'
    assert prose_and_code(text) == ({1: '"""Two', 3: 'lines."""', 5: "# one"}, {5: 3, 7: 6})
    assert shape_letters("(K*B,), (3, H, N - P), not f(X), (GPU, Y), (Eq. 4, Z)") == set("KBHNP")
    text = (
        "Map.\n\nShape letters: B images (C, D),\nand H, W height and width; K samples.\n\nA, X is"
    )
    assert declared_letters(text) == ["B", "H", "W", "K"]
    text = "def f(rng: random.Random, y):\n    y, x = g(y)\n    return random.choice(x)"
    assert names_taken(ast.parse(text)) == [(2, "g"), (3, "random")]


if __name__ == "__main__":
    print("                 lines  code lines  tokens a line  comments  longest function")
    whole = {"file": FILE} | ({"core": core()} if set(CORE) <= set(STARTS) else {})
    for name, lines in (whole | {name: section(name) for name in STARTS}).items():
        length, _, function = max(lengths(lines), default=(0, 0, ""))
        row = f"{name:16} {len(lines):5} {sum(n in CODE for n in lines):11} {density(lines):14.1f}"
        print(f"{row} {comment_share(lines):9.0%}  {function} {length}")
