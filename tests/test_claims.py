"""The table of the README comes from tests/claims.py."""

import re
from pathlib import Path

import claims

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_table_is_mean_and_standard_deviation_over_seeds():
    one = dict.fromkeys(claims.COLUMNS, 0.2)
    table = claims.markdown({"a row": [one, dict.fromkeys(claims.COLUMNS, 0.4)], "another": [one]})
    header, rule, row, single = table.split("\n")
    assert header.count("|") == rule.count("|") == row.count("|") == len(claims.COLUMNS) + 2
    assert row.startswith("| a row | 0.30 ± 0.14 |") and single.startswith("| another | 0.20 |")


def test_the_readme_holds_a_table_of_todays_rows_and_columns():
    table = re.search(r"<!-- results -->\n(.*?)\n<!-- end of results -->", README, re.DOTALL)[1].split("\n")
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == list(claims.COLUMNS.values())
    assert [line.split("|")[1].strip() for line in table[2:]] == list(claims.ROWS)


def test_the_readme_names_flags_that_exist():
    import distcap

    known = {f"--{each.name.replace('_', '-')}" for cls, _ in distcap.VERBS.values() for each in
             distcap.dataclasses.fields(cls)}  # fmt: skip
    known |= {"--no-recursive", "--help", "--seeds", "--readme", "--check"}
    assert set(re.findall(r"(?<!\S)[`(]?(--[a-z-]+)", README)) <= known
