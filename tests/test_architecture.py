"""Who may import whom, read from the source: arrows point one way, and quick commands stay free of heavy libraries."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"rewardtune": ROOT / "rewardtune"} | {
    f"rewardtune.{name}": ROOT / name for name in ("rewards", "pipelines", "recipes")
}
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "peft", "torchvision", "scipy"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, as installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


MODULES = modules()
ENGINE = {name for name in MODULES if name.split(".")[1:2] not in (["rewards"], ["pipelines"], ["recipes"])}


def imports(name: str, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; `from a import b` gives a.b where that is a module. TYPE_CHECKING aside."""
    for node in _statements(ast.parse(MODULES[name].read_text()), top_level_only=top_level_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative imports hide where a name comes from"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def _statements(tree: ast.AST, *, top_level_only: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from _statements(node, top_level_only=top_level_only)


def loaded_with(name: str) -> set[str]:
    """Modules of ours that importing `name` imports, itself included; parents' __init__ too."""
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        todo += [".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 1)]
        todo += imports(module, top_level_only=True)
    return seen


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_walk_sees_the_code():
    assert len(ENGINE) > 30
    assert "rewardtune.registry" in set(imports("rewardtune.recipe.validate"))
    assert "torch" in set(imports("rewardtune.scoring.reward_set"))
    assert "rewardtune.scoring.reward_set" in set(imports("rewardtune.build"))


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_the_engine_knows_no_plugin(name):
    # registry.py imports them by string, when a name is asked for.
    wrong = [found for found in imports(name) if inside(found, "rewardtune.rewards", "rewardtune.pipelines")]
    assert not wrong


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_uses_the_bare_folder_names(name):
    assert not [found for found in imports(name) if found.split(".")[0] in ("rewards", "pipelines", "recipes")]


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if inside(name, "rewardtune.rewards")])
def test_rewards_know_neither_pipelines_nor_each_other(name):
    wrong = [f for f in imports(name) if inside(f, "rewardtune.pipelines", "rewardtune.rewards") and f != name]
    assert not wrong


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if inside(name, "rewardtune.pipelines")])
def test_pipelines_know_neither_rewards_nor_each_other(name):
    wrong = [f for f in imports(name) if inside(f, "rewardtune.pipelines", "rewardtune.rewards") and f != name]
    assert not wrong


LIGHT = [
    "rewardtune",
    "rewardtune.__main__",
    "rewardtune.cli.app",
    "rewardtune.cli.calibrate",
    "rewardtune.cli.lists",
    "rewardtune.cli.probe",
    "rewardtune.cli.command",
    "rewardtune.data.importers",
    "rewardtune.data.records",
    "rewardtune.cli.data",
    "rewardtune.cli.environment",
    "rewardtune.errors",
    "rewardtune.data.images",
    "rewardtune.recipe.mistakes",
    "rewardtune.diffusion.families",
    "rewardtune.diffusion.pipeline_source",
    "rewardtune.plugins",
    "rewardtune.recipe.sections",
    "rewardtune.recipe.file",
    "rewardtune.data.references",
    "rewardtune.registry",
    "rewardtune.scoring.score",
    "rewardtune.recipe.shipped",
    "rewardtune.recipe.strict_yaml",
    "rewardtune.recipe.suggest",
    "rewardtune.types",
    "rewardtune.recipe.validate",
    *[name for name in sorted(MODULES) if inside(name, "rewardtune.rewards", "rewardtune.pipelines")],
]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_heavy_library(name):
    for module in loaded_with(name):
        heavy = {found.split(".")[0] for found in imports(module, top_level_only=True)} & HEAVY
        assert not heavy, f"{name} loads {module}, which imports {heavy} at module level"


# Layers of the engine: a module may import those of its own row and of the rows before it.
LAYERS = [
    ("types", "errors", "randomness", "recipe.suggest", "recipe.strict_yaml", "data.references"),
    ("plugins", "recipe", "data.images", "scoring.objective", "diffusion.parameterisation"),
    (
        "diffusion",
        "scoring.reward_set",
        "scorer",
        "serving",
        "data.records",
        "data.importers",
        "registry",
        "gradients",
        "recipe.validate",
        "recipe.file",
    ),
    ("tasks",),
    ("build",),
    ("cli",),
]


def test_arrows_between_layers_point_one_way():
    row_of = {f"rewardtune.{module}": row for row, names in enumerate(LAYERS) for module in names}
    longest_first = sorted(row_of.items(), key=lambda item: -len(item[0]))

    def row(name: str) -> int | None:
        return next((row for module, row in longest_first if inside(name, module)), None)

    wrong = []
    for name in sorted(ENGINE):
        mine = row(name)
        for found in set(imports(name)):
            theirs = row(found)
            if mine is not None and theirs is not None and theirs > mine:
                wrong.append(f"{name} imports {found}")
    assert not wrong


@pytest.mark.parametrize(
    "module", ["loop", "state", "optim", "checkpoint", "track", "runtime", "ema", "shard", "signals"]
)
def test_the_loop_knows_no_task(module):
    name = f"rewardtune.training.{module}"
    wrong = [found for found in imports(name) if inside(found, "rewardtune.tasks") and found != "rewardtune.tasks"]
    wrong += [found for found in imports(name) if inside(found, "rewardtune.build", "rewardtune.cli.app")]
    assert not wrong


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_pickle_and_no_import_by_star(name):
    tree = ast.parse(MODULES[name].read_text())
    assert not [found for found in imports(name) if found.split(".")[0] in ("pickle", "cPickle", "dill", "shelve")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call = ast.unparse(node.func)
            if call == "torch.load" and name == "rewardtune.backbones.weights":
                # published checkpoints of others; without weights_only their pickles could run code
                assert "weights_only=True" in ast.unparse(node)
                continue
            if call == "torch.load" and name == "rewardtune.backbones.convert":
                # `rewards convert`, which says what it does and wants --trust for it
                continue
            assert call not in ("torch.load", "torch.save"), f"{name}:{node.lineno}: safetensors and JSON only"
            assert not call.endswith((".extractall", "yaml.load")), f"{name}:{node.lineno}: {call}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name}:{node.lineno}"


def test_there_is_no_catch_all_module():
    names = {part for name in MODULES for part in name.split(".")}
    assert not names & {"utils", "util", "common", "base", "abc", "helpers", "misc", "core"}


def test_every_package_folder_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert listed == there
