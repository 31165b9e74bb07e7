"""docs/recipe.md: every key of every recipe, written from the schema that editors show.

`python -m pytest tests/unit/test_recipe_page.py --write-pages` renews the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewardtune.recipe.file import recipe_schema
from rewardtune.recipe.sections import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
HEAD = """# Every key of a recipe

A recipe is a YAML file; `task` says what it trains, and the tables below say which sections that task has. Start from a
shipped recipe (`rewardtune recipes list`, `rewardtune recipes copy NAME my.yaml`) and change what you need: on the
command line `section.key=value` changes one key ([overrides](cli.md#overrides)). A key without a default must be given.
Keys that are not here are refused. `rewardtune validate my.yaml` tells all mistakes at once.

Your editor shows the same text while you type, if the recipe's first line leads it to the schema, as the copies that
`recipes copy` makes do: `# yaml-language-server: $schema=...` (VS Code with the YAML extension, JetBrains, Neovim).
This page and the schema are written from `rewardtune/recipe/`; the options of one reward are in
`rewardtune rewards show NAME`, those of one pipeline family in [pipelines.md](pipelines.md).
"""

Schema = Mapping[str, Any]


def _target(value: Schema) -> str | None:
    return str(value["$ref"]).rpartition("/")[2] if "$ref" in value else None


def _targets(value: Schema) -> Iterator[str]:
    """Sections that a key may hold, also in a list."""
    name = _target(value)
    if name is not None:
        yield name
    for inner in (*value.get("anyOf", ()), *value.get("oneOf", ()), *([value["items"]] if "items" in value else ())):
        yield from _targets(inner)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_").replace(" ", "-")


class Page:
    """What of the schema goes where."""

    def __init__(self, schema: Schema) -> None:
        self.sections: Mapping[str, Schema] = schema["$defs"]
        self.tasks = {task: recipe.__name__ for task, recipe in TASKS.items()}
        self.owners: dict[str, list[tuple[str, str]]] = {}
        for owner, section in self.sections.items():
            for key, value in section["properties"].items():
                for target in set(_targets(value)):
                    self.owners.setdefault(target, []).append((owner, key))

    def title(self, name: str) -> str:
        """As the section stands in YAML."""
        keys = list(dict.fromkeys(key for _, key in self.owners[name]))
        title = " and ".join(f"`{key}`" for key in keys)
        fixed = self._fixed(name)
        if fixed is not None:
            return f"{title} with `{fixed[0]}: {fixed[1]}`"
        if any({key for _, key in owners} & set(keys) for other, owners in self.owners.items() if other != name):
            title += " of " + ", ".join(f"`{self._short(owner)}`" for owner, _ in self.owners[name])
        return title

    def _fixed(self, name: str) -> tuple[str, str] | None:
        """The key that tells a section from others in its place, and its value."""
        properties = self.sections[name]["properties"].items()
        return next(((key, value["const"]) for key, value in properties if "const" in value), None)

    def _short(self, owner: str) -> str:
        """A task's name, or the key of a section."""
        for task, name in self.tasks.items():
            if name == owner:
                return task
        return self.owners[owner][0][1]

    def link(self, name: str) -> str:
        fixed = self._fixed(name)
        return f"[{'section' if fixed is None else fixed[1]}](#{anchor(self.title(name))})"

    def kind(self, value: Schema) -> str:
        """What may stand there."""
        name = _target(value)
        if name is not None:
            return self.link(name)
        for several in ("anyOf", "oneOf"):
            if several in value:
                return " or ".join(dict.fromkeys(self.kind(one) for one in value[several]))
        if "const" in value:
            return f"`{value['const']}`"
        if "enum" in value:
            return ", ".join(f"`{one}`" for one in value["enum"])
        if value["type"] == "array":
            if "prefixItems" in value:
                return f"list of {len(value['prefixItems'])} numbers"
            return f"list of: {self.kind(value['items'])}"
        if value["type"] == "object":
            inner = value.get("additionalProperties")
            return f"mapping to {self.kind(inner)}" if isinstance(inner, dict) else "mapping"
        said = {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}.get(value["type"], value["type"])
        bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        within = ", ".join(f"{sign} {value[key]:g}" for key, sign in bounds.items() if key in value)
        return f"{said} {within}".strip()

    def table(self, name: str) -> list[str]:
        section = self.sections[name]
        lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for key, value in section["properties"].items():
            if "const" in value:
                continue  # in the heading
            meaning = " ".join(value["description"].split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {self.kind(value)} | {self._default(key, value, section)} | {meaning} |")
        return lines if len(lines) > 2 else ["No other keys."]

    def _default(self, key: str, value: Schema, section: Schema) -> str:
        if key in section.get("required", ()):
            return "*needed*"
        default = value["default"]
        if isinstance(default, dict) and any(_targets(value)):
            kind = default.get("kind")
            return f"`{kind}`" if kind else "its defaults"
        return f"`{json.dumps(default)}`" if not isinstance(default, str) else f"`{default}`" if default else '`""`'

    def text(self) -> str:
        lines = [HEAD, "## Tasks", ""]
        for task, name in self.tasks.items():
            lines += [f"### `task: {task}`", "", self.sections[name]["description"], "", *self.table(name), ""]
        lines += ["## Sections", ""]
        placed = sorted((n for n in self.sections if n not in self.tasks.values()), key=self._order())
        for name in placed:
            lines += [f"### {self.title(name)}", "", self.sections[name]["description"], "", *self.table(name), ""]
        return "\n".join(lines)

    def _order(self) -> Any:
        """As the tasks mention them, breadth first."""
        found: list[str] = []
        waiting = list(self.tasks.values())
        while waiting:
            name = waiting.pop(0)
            for value in self.sections[name]["properties"].values():
                for target in _targets(value):
                    if target not in found:
                        found.append(target)
                        waiting.append(target)
        return found.index


def test_the_page_shows_every_key(request: Any) -> None:
    page = Page(recipe_schema()).text()
    if request.config.getoption("--write-pages"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "run with --write-pages and commit docs/recipe.md"


def test_every_section_has_one_heading_and_every_link_leads_to_one() -> None:
    lines = PAGE.read_text().splitlines()
    headings = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    anchors = [anchor(heading) for heading in headings]
    assert len(set(anchors)) == len(anchors) == len(recipe_schema()["$defs"])
    assert {link for line in lines for link in re.findall(r"\(#([^)]*)\)", line)} <= set(anchors)
