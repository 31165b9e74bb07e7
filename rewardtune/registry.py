"""From a name in a recipe to a class: built-in tables, installed packages (entry points), files given with --plugin.

The only place that imports by string. Nothing loads before its name is asked for, and a recipe cannot say what to
import: it is data that people copy from strangers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from rewardtune.errors import PluginError
from rewardtune.plugins import RewardCard
from rewardtune.recipe.suggest import closest

C = TypeVar("C", bound=type)
BUILT_IN = "built-in"


@dataclass(frozen=True)
class Registration:
    """One claim on a name. `target`: `module:Class`, or the class itself where the decorator ran."""

    source: str
    """`built-in`, `<distribution> <version>`, or the file that was given with --plugin."""
    target: str | type

    def __str__(self) -> str:
        target = self.target if isinstance(self.target, str) else f"{self.target.__module__}:{self.target.__qualname__}"
        return f"{self.source} ({target})"


class Registry:
    """Names of one kind of plug-in."""

    def __init__(self, kind: str, *, members: tuple[str, ...]) -> None:
        """kind: reward or pipeline. members: what a class of this kind must have."""
        self.kind = kind
        self.package = f"rewardtune.{kind}s"
        self.members = members
        self._decorated: dict[str, list[Registration]] = {}

    def names(self) -> list[str]:
        """Every name there is, built-in ones first, then by name; imports no plug-in."""
        table = self._table()
        names = {*table, *self._decorated, *(point.name for point in self._entry_points())}
        return sorted(names, key=lambda name: (name not in table, name))

    def registrations(self, name: str) -> list[Registration]:
        """All claims on a name. Two different ones are an error only when the class is asked for."""
        table = self._table()
        found = [Registration(BUILT_IN, table[name])] if name in table else []
        for point in self._entry_points():
            if point.name == name:
                source = f"{point.dist.metadata['Name']} {point.dist.version}" if point.dist else "an installed package"
                found.append(Registration(source, point.value))
        return list(dict.fromkeys([*found, *self._decorated.get(name, [])]))

    def register(self, name: str, cls: type) -> None:
        """Claim a name for a class, as the decorator does. Nothing is checked until the name is asked for."""
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        self._decorated.setdefault(name, []).append(Registration(file or cls.__module__, cls))

    def load_class(self, name: str) -> Any:
        """The class behind a name (`type`; its members are those of the contract).

        Raises PluginError: unknown (with the nearest name), an import string, claimed twice, import failed, or not of
        this kind.
        """
        found = self.registrations(name)
        if not found:
            raise PluginError(self.unknown(name))
        strings = [claim for claim in found if isinstance(claim.target, str)]
        if len(strings) > 1:
            raise PluginError(self._clash(name, found))
        cls: Any = self._import(name, strings[0]) if strings else found[0].target
        # A packaged plug-in may use the decorator too: the same class twice is no clash.
        if any(claim.target is not cls for claim in self.registrations(name) if not isinstance(claim.target, str)):
            raise PluginError(self._clash(name, self.registrations(name)))
        self._check(name, cls, found[0])
        return cls

    def source(self, name: str) -> str:
        """Where a name comes from: `built-in`, distributions with versions, files."""
        return ", ".join(dict.fromkeys(claim.source for claim in self.registrations(name)))

    def is_at_hand(self, name: str) -> bool:
        """Whether looking at the class runs no code that has not run or is not ours."""
        return all(claim.source == BUILT_IN or not isinstance(claim.target, str) for claim in self.registrations(name))

    def card(self, name: str) -> RewardCard:
        """The card of a reward. Loads the class, which for built-in rewards imports no torch."""
        card: RewardCard = self.load_class(name).card
        return card

    def trouble(self, name: str) -> str | None:
        """Why a name would not load, as far as it shows without importing a third party's code; None if nothing does.

        A clash, a module that is not there, a syntax error, an import at module level that cannot be found.
        """
        found = self.registrations(name)
        strings = [claim for claim in found if isinstance(claim.target, str)]
        if len(strings) > 1 or (strings and strings[0].source == BUILT_IN and len(found) > 1):
            return self._clash(name, found)
        return _static_trouble(str(strings[0].target)) if strings else None

    def unknown(self, name: str) -> str:
        """What to say of a name that nothing claims."""
        if ":" in name or "." in name or "/" in name:
            return (
                f"{self.kind} {name!r} looks like something to import, and a recipe cannot choose what code runs. "
                f'Install it as a package with an entry point in the group "{self.package}", or give the file on the '
                f"command line (--plugin my_{self.kind}.py), and write its registered name here."
            )
        known = self.names()
        guess = closest(name, known) or "."
        own = " One in a file of your own comes with --plugin FILE.py on the command line."
        return f"{self.kind} {name!r} is unknown (there are {', '.join(known) or 'none'}){guess}{own}"

    def _table(self) -> dict[str, str]:
        try:
            table: dict[str, str] = importlib.import_module(self.package).TABLE
        except ModuleNotFoundError as error:
            if error.name != self.package:
                raise
            raise PluginError(
                f"{self.package} cannot be found: this is a checkout that is not installed. "
                "Run `pip install -e .` in it, or run rewardtune from another folder."
            ) from error
        return table

    def _entry_points(self) -> tuple[Any, ...]:
        return _entry_points(self.package, tuple((folder, _changed(folder)) for folder in sys.path))

    def _clash(self, name: str, found: list[Registration]) -> str:
        claims = " and by ".join(str(claim) for claim in found)
        return f"{self.kind} {name!r} is claimed more than once: by {claims}. Rename or remove all but one of them."

    def _import(self, name: str, claim: Registration) -> Any:
        module, _, attribute = str(claim.target).partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.kind} {name!r} from {claim} does not load: {_reason(error)}") from error
        if not isinstance(found, type):
            # an entry point may name a function, of which its decorator has made a class
            for made in (one.target for one in self._decorated.get(name, [])):
                if getattr(made, "function", None) is found:
                    return made
            raise PluginError(f"{self.kind} {name!r} from {claim} is not a class but {type(found).__name__}.")
        return found

    def _check(self, name: str, cls: type, claim: Registration) -> None:
        """The class-level half of the Protocol; methods of the loaded object are for `rewards test`."""
        lacking = [member for member in self.members if not hasattr(cls, member)]
        config = getattr(cls, "Config", None)
        if not lacking and not (isinstance(config, type) and issubclass(config, BaseModel)):
            lacking = ["a Config that is a subclass of rewardtune.plugins.Options"]
        if not lacking and self.kind == "reward" and not isinstance(cls.card, RewardCard):  # type: ignore[attr-defined]
            lacking = ["a card that is a rewardtune.plugins.RewardCard"]
        if lacking:
            example = " `rewardtune rewards new` writes one that has it all." if self.kind == "reward" else ""
            raise PluginError(
                f"{self.kind} {name!r} from {_place(cls, claim)} does not meet the contract of "
                f"rewardtune/plugins.py: it lacks {', '.join(lacking)}. Add what is lacking to the class.{example}"
            )


rewards = Registry("reward", members=("card", "Config", "load"))
pipelines = Registry("pipeline", members=("family", "Config", "matches", "load"))


def register_reward(name: str) -> Callable[[C], C]:
    """Class decorator: `@rewardtune.register_reward("my_reward")`."""
    return _decorator(rewards, name)


def register_pipeline(name: str) -> Callable[[C], C]:
    """Class decorator: `@rewardtune.register_pipeline("my_family")`."""
    return _decorator(pipelines, name)


def _decorator(registry: Registry, name: str) -> Callable[[C], C]:
    def decorate(cls: C) -> C:
        registry.register(name, cls)
        return cls

    return decorate


@lru_cache(maxsize=8)
def _entry_points(group: str, folders: tuple[tuple[str, int], ...]) -> tuple[Any, ...]:
    """Entry points of a group. Finding them reads every installed package, so `folders` says when to look again."""
    from importlib.metadata import entry_points

    return tuple(entry_points(group=group))


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


@dataclass(frozen=True)
class Plugin:
    """A file or module that was imported because the command line asked for it; a run records both fields.

    source: a file's absolute path, which holds wherever the process goes afterwards, or a module's name.
    """

    source: str
    sha256: str


_loaded: dict[str, Plugin] = {}


def load_plugin(source: str) -> Plugin:
    """Import a file (`my_reward.py`) or a module (`my_package.module`), whose decorators then register its classes.

    A second request for the same one does nothing. Raises PluginError, one paragraph, when it cannot be imported.
    """
    is_file = source.endswith(".py") or "/" in source
    path = Path(source).expanduser().resolve()
    key = str(path) if is_file else source
    if key in _loaded:
        return _loaded[key]
    if is_file and not path.is_file():
        what = "is a folder, not a Python file" if path.is_dir() else f"there is no such file (looked for {path})"
        raise PluginError(f"--plugin {source}: {what}.")
    try:
        module = _import_file(path) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not is_file and source.split(".")[0] == error.name:
            beside = f" Did you mean the file {source}.py?" if Path(f"{source}.py").is_file() else ""
            raise PluginError(
                f"--plugin {source}: no module of this name is installed. Install it, or give a file as a path that "
                f"ends in .py.{beside}"
            ) from error
        raise PluginError(f"--plugin {source} does not load: {_reason(error)}") from error
    file = getattr(module, "__file__", None)
    content = Path(file).read_bytes() if file else b""
    _loaded[key] = Plugin(key, hashlib.sha256(content).hexdigest())
    return _loaded[key]


def loaded_plugins() -> list[Plugin]:
    """What --plugin brought into this process, in order."""
    return list(_loaded.values())


def _import_file(path: Path) -> Any:
    # The digest keeps two files of one name apart.
    name = f"rewardtune_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file: its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _reason(error: BaseException) -> str:
    """What went wrong in a plug-in and in which line of it, on one line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {_syntax(error, error.filename)}."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [frame for frame in frames if frame.filename != __file__]  # where it was imported is not where it failed
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("rewardtune"):
        whose = error.name.partition(".")[0]
        hint = f" Install {whose}, or take the plug-in out." if whose == error.name else ""
    return f"{type(error).__name__}: {text}{place}.{hint}"


def _syntax(error: SyntaxError, file: str) -> str:
    """What cannot be read as Python, and where; the error's own text names the file without its folder."""
    return f"{error.msg} ({file}" + (f", line {error.lineno})" if error.lineno else ")")


def _place(cls: type, claim: Registration) -> str:
    """Where a class comes from, with file and line where its source can be found."""
    try:
        file, line = inspect.getsourcefile(cls), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return str(claim)
    inside = "" if file == claim.source else f" in {file}"
    return f"{claim.source} (class {cls.__qualname__}{inside}, line {line})"


def _static_trouble(target: str) -> str | None:
    """What reading the file of `module:Class` shows: nothing of it runs."""
    module, _, attribute = target.partition(":")
    file = _file_of(module)
    if file is None:
        return f"module {module} is not there"
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except SyntaxError as error:
        return f"not valid Python: {_syntax(error, str(file))}"
    except (ValueError, OSError) as error:
        return f"{file}: {error}"
    for imported in _imports(body):
        if imported not in sys.modules and importlib.util.find_spec(imported) is None:
            return f"needs the module {imported}, which is not installed"
    return None if attribute else f"{target} names no class"


def _file_of(module: str) -> Path | None:
    """The file of a module, found without importing it or its parents' code."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    if spec is None or spec.origin is None:
        return None
    if not rest:
        return Path(spec.origin)
    folders = spec.submodule_search_locations or ()
    for candidate in (Path(folder).joinpath(*rest) for folder in folders):
        for file in (candidate.with_suffix(".py"), candidate / "__init__.py"):
            if file.is_file():
                return file
    # The editable install maps rewardtune.rewards elsewhere; its parent package holds no code of strangers.
    mapped = importlib.util.find_spec(module) if first == "rewardtune" else None
    return Path(mapped.origin) if mapped and mapped.origin else None


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    """Top names of the unconditional absolute imports of a module."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            yield statement.module.partition(".")[0]
