"""The promises about distcap.py itself: its length, its functions, its order."""

import ast
from pathlib import Path

import distcap

TEXT = Path(distcap.__file__).read_text()
FUNCTIONS = [node for node in ast.walk(ast.parse(TEXT)) if isinstance(node, ast.FunctionDef)]


def test_the_module_stays_readable():
    assert len(TEXT.splitlines()) <= 1000
    assert [f.name for f in FUNCTIONS if f.end_lineno - f.lineno >= 50] == []


def test_every_public_function_of_the_module_has_a_docstring():
    top = [node for node in ast.parse(TEXT).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in top if ast.get_docstring(node) is None] == []


def test_sections_5_to_7_know_no_model_file_or_device():
    """Tensors in, tensors out: none of their functions names anything of the sections before or after."""
    body = TEXT[TEXT.index("# ---- 5 ") : TEXT.index("# ---- 8 ")]
    names = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    assert not names & {"Captioner", "CLIP", "Path", "Example", "TrainConfig", "Decoding", "open", "random", "os"}


def test_nothing_unsafe():
    assert "trust_remote_code" not in TEXT and "shell=True" not in TEXT and "torch.load" not in TEXT
