"""The habits of docs/style.md that a machine can see, and that what the repository holds can be used."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from conf import schema

ROOT = Path(__file__).parents[1]
PACKAGES = ("zoo", "data", "parallel", "trainer", "planner", "survey", "launch", "conf", "benchmarks")
CODE = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")) + [ROOT / "train.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINES, FUNCTION = 300, 60
CHOICES = sorted(file for group in (ROOT / "conf").iterdir() if group.is_dir() for file in group.glob("*.yaml"))
NEEDED = {"shards": ["data.folder=shards/mine"]}  # what a choice leaves to the command line


def name(file):
    return file.relative_to(ROOT).as_posix()


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def calls(file, attribute):
    """Calls of a method by its name."""
    nodes = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    return [node for node in nodes if isinstance(node.func, ast.Attribute) and node.func.attr == attribute]


def places(nodes):
    return [node.lineno for node in nodes]


def texts():
    """Every text file that git keeps, or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for file in map(ROOT.joinpath, listed):
        content = file.read_bytes() if file.is_file() else b"\0"
        if b"\0" not in content:
            yield file, content.decode("utf-8")


@pytest.mark.parametrize("file", CODE, ids=name)
def test_a_file_has_one_subject_and_at_most_300_lines(file):
    assert ast.get_docstring(tree(file)), "says its subject in its docstring"
    assert len(file.read_text().splitlines()) <= LINES


@pytest.mark.parametrize("file", [*CODE, *TESTS], ids=name)
def test_a_function_fits_on_a_screen(file):
    functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno + 1 > FUNCTION]


@pytest.mark.parametrize("file", CODE, ids=name)
def test_no_error_is_caught_unseen_and_no_attribute_guessed(file):
    nodes = list(ast.walk(tree(file)))
    broad = [
        node
        for node in nodes
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))  # cleans up and passes it on
    ]
    assert not places(broad)
    guessed = [
        node
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
    ]
    assert not places(guessed)


@pytest.mark.parametrize("file", [file for file in CODE if name(file).startswith("zoo/")], ids=name)
def test_no_model_lowers_float64_by_a_bare_float(file):
    # "fp32" inside a component is torch.promote_types(x.dtype, torch.float32)
    assert not places(node for node in calls(file, "float") if not node.args)


@pytest.mark.parametrize("file", CODE, ids=name)
def test_a_parameter_is_read_whole_through_one_function(file):
    # parallel/reduce.py alone knows that a bare .full_tensor() is only a slice of the tensor axis
    assert name(file) == "parallel/reduce.py" or not places(calls(file, "full_tensor"))


@pytest.mark.parametrize("file", [file for file in CODE if file.name == "__init__.py"], ids=name)
def test_a_package_is_opened_by_a_docstring_alone(file):
    assert [type(node) for node in tree(file).body] == [ast.Expr]


def test_tests_are_no_packages():
    # tests/data/__init__.py would stand in the way of the package data
    assert not [name(file) for file in TESTS if file.name == "__init__.py"]


def test_nothing_is_put_off_by_a_note():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    assert not [name(file) for file, text in texts() if words.search(text)]


def test_no_file_knows_a_machine():
    # a home, a checkout or a package index of one place; PATH=/path/to/… in an example is none
    machine = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt|opt)/\w|" + r"pypi\." + r"org|pythonhosted" + r"\.org")
    assert not [name(file) for file, text in texts() if machine.search(text)]


@pytest.mark.parametrize("file", CHOICES, ids=name)
def test_every_choice_makes_a_run(file):
    schema.register()
    words = [f"{file.parent.name}={file.stem}", "run_dir=runs/test"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        run = schema.resolve(compose("train", overrides=[*words, *NEEDED.get(file.stem, [])]))
    assert run.train.steps > 0
    if file.parent.name == "model":
        assert file.read_text().startswith("#"), "opens with what is unusual about it, and its source"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[\[><=]", requirement)[0] for requirement in listed} - {project["name"]}
    reasons = (ROOT / "docs" / "decisions" / "dependencies.md").read_text()
    assert not [one for one in sorted(names) if f"`{one}`" not in reasons]


def test_constraints_pin_torch_for_every_build():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0"
    assert not [f"{one}=={version}" for one, version in pins.items() if "+" in version]
