"""The list that `make mutants` works through is up to date; running it is left to that command."""

import ast

import pytest

from tests.mutants import ROOT, Mutant, judge, mutate, read

MUTANTS = read()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_patch_applies_and_names_a_test_that_exists(mutant):
    broken = mutate(mutant, (ROOT / mutant.file).read_text(encoding="utf-8"))
    ast.parse(broken)
    file, _, name = mutant.test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name.split("[")[0] in functions


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("old", ["absent", "a"])
def test_a_stale_or_ambiguous_patch_is_refused(old):
    with pytest.raises(ValueError, match="expected `old` once in x.py"):
        mutate(Mutant("m", "x.py", old, "b", "t"), "a = a\n")


@pytest.mark.parametrize(
    "test, verdict",
    [("t.py::test_yes", "killed"), ("t.py::test_no", "survived"), ("u.py", "broken")],
)
def test_verdicts(tmp_path, test, verdict):
    (tmp_path / "x.py").write_text("VALUE = 1\n")
    (tmp_path / "t.py").write_text(
        "import x\ndef test_yes(): assert x.VALUE == 1\ndef test_no(): assert x\n"
    )
    mutant = Mutant("m", "x.py", "VALUE = 1", "VALUE = 2", test)
    assert judge(tmp_path, mutant)[0] == verdict
    assert (tmp_path / "x.py").read_text() == "VALUE = 1\n"
