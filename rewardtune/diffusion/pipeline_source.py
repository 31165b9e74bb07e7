"""What the pipeline classes of diffusers take, read from its source. To import one would bring torch along, which a
check of a recipe does without."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

_CLASS = re.compile(r"^class (\w+)\b", re.MULTILINE)


@lru_cache(maxsize=1)
def classes() -> dict[str, Path]:
    """Class -> the file of diffusers' pipelines that defines it. Empty where there is no source to read."""
    folder = _folder()
    files = sorted(folder.rglob("*.py")) if folder is not None else []
    return {name: file for file in files for name in _CLASS.findall(file.read_text(encoding="utf-8"))}


def parameters(name: str, method: str) -> frozenset[str]:
    """The names of a method's parameters, its own or inherited within the pipelines, without self and `**kwargs`."""
    file = classes().get(name)
    if file is None:
        return frozenset()
    definition = _definition(file, name)
    for statement in definition.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == method:
            found = statement.args
            return frozenset(one.arg for one in (*found.posonlyargs, *found.args, *found.kwonlyargs)) - {"self"}
    inherited = (parameters(base.id, method) for base in definition.bases if isinstance(base, ast.Name))
    return next(filter(None, inherited), frozenset())


@lru_cache(maxsize=1)
def text_to_image() -> frozenset[str]:
    """The classes that diffusers' `AutoPipelineForText2Image` chooses from."""
    folder = _folder()
    file = folder / "auto_pipeline.py" if folder is not None else None
    if file is None or not file.is_file():
        return frozenset()
    found: set[str] = set()
    for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Assign) and any(_names_the_table(target) for target in statement.targets):
            found |= {part.id for part in ast.walk(statement.value) if isinstance(part, ast.Name)}
    return frozenset(found & set(classes()))


def _names_the_table(target: ast.expr) -> bool:
    """Whether this is the table itself, or one of its entries."""
    inner = target.value if isinstance(target, ast.Subscript) else target
    return isinstance(inner, ast.Name) and inner.id == "AUTO_TEXT2IMAGE_PIPELINES_MAPPING"


def _folder() -> Path | None:
    spec = importlib.util.find_spec("diffusers")
    return Path(spec.origin).parent / "pipelines" if spec is not None and spec.origin else None


@lru_cache(maxsize=8)
def _definition(file: Path, name: str) -> ast.ClassDef:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return next(one for one in body if isinstance(one, ast.ClassDef) and one.name == name)
