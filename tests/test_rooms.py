"""Who may import whom, section 3 of the design, as tests on the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "zoo": set(),
    "data": set(),
    "parallel": {"zoo"},
    "trainer": {"zoo", "parallel"},
    "planner": {"zoo", "parallel", "trainer"},
    "launch": {"conf"},
    "conf": {"zoo", "data", "parallel", "trainer", "launch", "planner"},  # their config.py only
}
ROOMS = {*MAY_IMPORT, "train", "survey", "benchmarks", "tests"}
FILES = [file for room in MAY_IMPORT for file in sorted((ROOT / room).rglob("*.py"))]
ONE_IMPORTER = {  # optional or slow to load: one file each knows how
    "wandb": "trainer/log.py",
    "deepspeed": "trainer/zero.py",
    "transformer_engine": "parallel/fp8.py",
    "fla": "zoo/delta_fla.py",
}


def imports(file):
    """Full names of all that a file imports, inside functions too; ``from a import b`` is both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(file)}:{node.lineno}: imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(file):
    return {module.split(".")[0] for module in imports(file)}


def name(file):
    return file.relative_to(ROOT).as_posix()


def is_config(file):
    return file.stem == "config" or file.stem.startswith("config_")  # parts of one


def under(module, package):
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_room_imports_only_rooms_below_it(file):
    room = name(file).split("/")[0]
    allowed = set() if is_config(file) else MAY_IMPORT[room]
    assert tops(file) & ROOMS - {room} <= allowed


@pytest.mark.parametrize("file", [file for file in FILES if is_config(file)], ids=name)
def test_a_config_is_a_leaf_without_torch(file):
    own = f"{name(file).split('/')[0]}.config"
    others = {module.split(".")[0] for module in imports(file) if not module.startswith(own)}
    assert not others & {"torch", "numpy", *ROOMS}


@pytest.mark.parametrize("file", [file for file in FILES if name(file).startswith("conf/")], ids=name)
def test_the_schema_takes_nothing_but_configs_from_the_rooms(file):
    taken = {".".join(module.split(".")[:2]) for module in imports(file) if module.split(".")[0] in MAY_IMPORT}
    modules = {module for module in taken if "." in module and not under(module, "conf")}
    assert all(is_config(ROOT / f"{module.replace('.', '/')}.py") for module in modules), modules
    assert "torch" not in tops(file)


@pytest.mark.parametrize("file", [file for file in FILES if name(file).startswith("zoo/")], ids=name)
def test_a_model_does_not_know_that_it_is_spread(file):
    assert not [module for module in imports(file) if under(module, "torch.distributed")]


@pytest.mark.parametrize("file", [file for file in FILES if name(file).startswith("launch/")], ids=name)
def test_launch_runs_on_a_login_node_without_torch(file):
    if name(file) != "launch/preflight_worker.py":  # started as a process of its own
        assert "torch" not in tops(file)


@pytest.mark.parametrize("library", ONE_IMPORTER)
def test_an_optional_library_is_imported_in_one_file(library):
    importers = {name(file) for file in FILES if library in tops(file)}
    assert importers <= {ONE_IMPORTER[library]}


@pytest.mark.parametrize("file", [*FILES, ROOT / "train.py"], ids=name)
def test_the_environment_is_read_in_one_file(file):
    if name(file) == "launch/world.py":
        return
    nodes = list(ast.walk(ast.parse(file.read_text())))
    set_only = [node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)]
    words = ("environ", "getenv", "environb")
    read = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr in words and node not in set_only]
    assert not [node.lineno for node in read]
    assert not [module for module in imports(file) if module.rpartition(".")[2] in words]
