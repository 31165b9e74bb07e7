"""Names and classes: built-in tables, packages with entry points, --plugin; clashes, refusals, broken ones."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from rewardtune import registry
from rewardtune.errors import PluginError
from rewardtune.registry import Registry, load_plugin, loaded_plugins

REWARD = '''
from rewardtune.plugins import Options, RewardCard

class Brightness:
    """Mean of the pixels."""

    card = RewardCard(name="{name}", summary="mean", differentiable=True, needs_prompt=False, range=(0.0, 1.0))

    class Config(Options):
        """No options."""

    @classmethod
    def load(cls, config, *, device):
        return cls()
'''


@pytest.fixture
def rewards() -> Registry:
    """A registry of its own, so that what a test registers is gone afterwards."""
    return Registry("reward", members=("card", "Config", "load"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package with an entry point: real metadata on sys.path. Returns a function."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution: str, *, module: str, code: str, entry: str, group: str = "rewardtune.rewards") -> None:
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        importlib.invalidate_caches()

    yield install
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def refusal(rewards: Registry, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        rewards.load_class(name)
    return str(caught.value)


def test_built_in_names_load_without_torch_at_module_level(rewards):
    assert {"zreward", "pocket-oracle"} <= set(rewards.names())
    assert rewards.card("zreward").dimensions == ("alignment", "realism", "aesthetics", "plausibility")
    assert rewards.source("zreward") == "built-in"
    assert registry.pipelines.load_class("z_image").family == "z_image"


def test_a_package_brings_a_reward(rewards, package):
    package("my-rewards", module="bright", code=REWARD.format(name="bright"), entry="bright = bright:Brightness")
    assert rewards.names()[-1] == "bright"  # built-in ones come first
    assert rewards.source("bright") == "my-rewards 1.2"
    assert "bright" not in sys.modules  # listed, and nothing of it has run
    assert rewards.trouble("bright") is None
    assert "bright" not in sys.modules
    assert rewards.card("bright").range == (0.0, 1.0)


def test_an_unknown_name_gets_a_suggestion(rewards):
    said = refusal(rewards, "zrewrd")
    assert "did you mean 'zreward'?" in said
    assert "pocket-oracle" in said
    far = refusal(rewards, "qqqqqq")
    assert "did you mean" not in far and "--plugin" in far


@pytest.mark.parametrize("name", ["os:system", "evil_module:Reward", "evil_module.Reward", "./evil_module.py"])
def test_an_import_string_is_refused_before_anything_is_imported(rewards, tmp_path, monkeypatch, name):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refusal(rewards, name)
    assert "cannot choose what code runs" in said
    assert "entry point" in said
    assert "--plugin" in said
    assert "evil_module" not in sys.modules


def test_two_claims_on_a_name_are_an_error_only_when_it_is_asked_for(rewards, package):
    package("first", module="one", code=REWARD.format(name="same"), entry="same = one:Brightness")
    package("second", module="two", code=REWARD.format(name="same"), entry="same = two:Brightness")
    assert rewards.names().count("same") == 1
    assert rewards.load_class("zreward")
    said = refusal(rewards, "same")
    assert "first 1.2 (one:Brightness)" in said
    assert "second 1.2 (two:Brightness)" in said
    assert rewards.trouble("same") == said


def test_no_package_replaces_a_built_in(rewards, package):
    package("greedy", module="greedy_module", code=REWARD.format(name="zreward"), entry="zreward = greedy_module:X")
    said = refusal(rewards, "zreward")
    assert "built-in (rewardtune.rewards.zreward:ZReward)" in said
    assert "greedy 1.2 (greedy_module:X)" in said
    assert "greedy_module" not in sys.modules


def test_no_decorated_class_replaces_a_built_in(rewards):
    rewards.register("zreward", type("Mine", (), {}))
    assert "claimed more than once" in refusal(rewards, "zreward")
    assert "claimed more than once" in (rewards.trouble("zreward") or "")


def test_a_packaged_class_may_also_carry_the_decorator(package):
    code = "import rewardtune\n" + REWARD.format(name="both").replace(
        "class Brightness", '@rewardtune.register_reward("both")\nclass Brightness'
    )
    package("both-ways", module="both_module", code=code, entry="both = both_module:Brightness")
    assert registry.rewards.load_class("both").__name__ == "Brightness"
    assert registry.rewards.load_class("both").__name__ == "Brightness"
    del registry.rewards._decorated["both"]


def test_two_different_decorated_classes_clash(rewards):
    for title in ("First", "Second"):
        rewards.register("mine", type(title, (), {}))
    said = refusal(rewards, "mine")
    assert "First" in said
    assert "Second" in said


@pytest.mark.parametrize(
    ("code", "seen_unloaded", "said"),
    [
        ("\ndef broken(:\n", "broken_module.py, line 2)", "broken_module.py, line 2)."),
        ("import a_module_that_is_not_there\n", "a_module_that_is_not_there", "Install a_module_that_is_not_there"),
        ("raise RuntimeError('no licence\\nfound')\n", None, "RuntimeError: no licence found"),
        ("import sys\nsys.exit('bye')\n", None, "SystemExit: bye"),
        ("x = 1\n", None, "has no attribute 'Brightness'"),
        ("Brightness = 3\n", None, "is not a class but int"),
        ("class Brightness: pass\n", None, "it lacks card, Config, load"),
        ("\nclass Brightness: pass\n", None, "broken_module.py, line 2) does not meet"),
        ("class Brightness:\n    card = 1\n    Config = dict\n    load = 1\n", None, "Options"),
    ],
)
def test_a_broken_package_is_one_paragraph_and_breaks_nothing_else(rewards, package, code, seen_unloaded, said):
    package("broken-rewards", module="broken_module", code=code, entry="broken = broken_module:Brightness")
    trouble = rewards.trouble("broken")
    assert (seen_unloaded in str(trouble)) if seen_unloaded else trouble is None
    found = refusal(rewards, "broken")
    assert said in found
    assert "broken-rewards 1.2" in found
    assert "\n" not in found
    assert rewards.load_class("zreward")


def test_a_file_given_with_plugin_registers_its_classes(tmp_path):
    file = tmp_path / "my_reward.py"
    code = "import rewardtune\n" + REWARD.format(name="from_file").replace(
        "class Brightness", '@rewardtune.register_reward("from_file")\nclass Brightness'
    )
    file.write_text(code)
    loaded = load_plugin(str(file))
    assert loaded.sha256 == hashlib.sha256(code.encode()).hexdigest()
    assert load_plugin(str(file)) is loaded  # a second time does nothing
    assert loaded in loaded_plugins()
    assert registry.rewards.card("from_file").summary == "mean"
    assert registry.rewards.source("from_file") == str(file)
    del registry.rewards._decorated["from_file"]


def test_a_file_given_by_a_relative_path_is_found_again_from_another_folder(tmp_path, monkeypatch):
    # a run hands the names on to the processes that it starts, and records them
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "relative_plugin.py").write_text("VALUE = 3\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_plugin("relative_plugin.py")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loaded.source == str(tmp_path / "relative_plugin.py")
    assert load_plugin(loaded.source) is loaded


def test_a_module_given_with_plugin_is_imported(tmp_path, monkeypatch):
    (tmp_path / "plain_module_plugin.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_plugin("plain_module_plugin").source == "plain_module_plugin"
    assert sys.modules["plain_module_plugin"].VALUE == 3


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "there is no such file"),
        ("\n1 / 0\n", "ZeroDivisionError: division by zero ({file}, line 2)."),
        ("import nowhere_to_be_found\n", "({file}, line 1). Install nowhere_to_be_found"),
        ("\ndef broken(:\n", "does not load: SyntaxError: invalid syntax ({file}, line 2)."),
        ("a\0b", "does not load: SyntaxError: source code string cannot contain null bytes."),
    ],
)
def test_a_plugin_that_fails_to_import_says_where_and_why(tmp_path, code, said):
    file = tmp_path / f"bad_{abs(hash(said))}.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(PluginError) as caught:
        load_plugin(str(file))
    assert said.format(file=file) in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value) and "registry.py" not in str(caught.value)
    assert not [name for name in sys.modules if name.startswith(f"rewardtune_plugin_{file.stem}")]


def test_a_class_without_a_card_is_named_with_file_and_line(tmp_path):
    file = tmp_path / "cardless.py"
    file.write_text("import rewardtune\n@rewardtune.register_reward('cardless')\nclass Cardless:\n    pass\n")
    load_plugin(str(file))
    said = refusal(registry.rewards, "cardless")
    del registry.rewards._decorated["cardless"]
    assert said.startswith(f"reward 'cardless' from {file} (class Cardless, line 2) does not meet the contract")
    assert "it lacks card, Config, load" in said and "rewards new" in said


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("warm", "no module of this name is installed. Install it, or give a file as a path that ends in .py. Did you"),
        ("nothing_like_this.sub", "a path that ends in .py."),
        ("folder.py", "is a folder, not a Python file."),
        ("./prompts.txt", "prompts.txt is not a Python file: its name does not end in .py."),
    ],
)
def test_what_is_no_plugin_says_what_one_is(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "warm.py").touch()
    (tmp_path / "prompts.txt").touch()
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(PluginError) as caught:
        load_plugin(source)
    assert str(caught.value).startswith(f"--plugin {source}") and said in str(caught.value)
    assert "registry.py" not in str(caught.value)


def test_a_checkout_that_is_not_installed_says_so(rewards):
    rewards.package = "rewardtune.nothing_like_this"
    assert "pip install -e ." in refusal(rewards, "zreward")


def test_the_public_names_are_lazy_and_compare_is_both_package_and_function():
    import rewardtune.compare.statistics

    assert callable(rewardtune.train)
    assert callable(rewardtune.compare)
    assert callable(rewardtune.compare.statistics.net_win_rate)  # still the package
    assert rewardtune.register_reward is registry.register_reward
    assert rewardtune.load_reward.__module__ == "rewardtune.scoring.reward_set"
    assert {"load_reward", "train", "compare", "register_reward"} <= set(dir(rewardtune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rewardtune.nothing
    assert Path(rewardtune.__file__).name == "__init__.py"
