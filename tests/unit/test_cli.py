"""The command line: exit codes, one-paragraph errors, JSON that stands alone on standard output, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

from rewardtune import __version__
from rewardtune.cli.app import app
from rewardtune.cli.command import printable

RECIPE = """\
task: direct_reward
pipeline: {model: some/hub-id}
lora: {}
data: {prompts: prompts.txt}
gradient: {method: refl}
rewards: [{name: zreward}]
train: {steps: 10}
"""

PLUGIN = '''
import rewardtune
from rewardtune.plugins import Options, RewardCard
from rewardtune.types import Score


@rewardtune.register_reward("brightness")
class Brightness:
    """Mean of the pixels, sharpened by `power`."""

    card = RewardCard(name="brightness", summary="mean of the pixels", differentiable=True, needs_prompt=False,
                      range=(0.0, 1.0))

    class Config(Options):
        power: float = 1.0
        """Exponent of each pixel."""

    def __init__(self, power):
        self.power = power

    @classmethod
    def load(cls, config, *, device):
        return cls(config.power)

    def score(self, images, prompts):
        return Score((images**self.power).mean(dim=(1, 2, 3)))
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    (tmp_path / "plugin.py").write_text(PLUGIN)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app(list(words))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_recipes_list_says_whole_sentences(run):
    _, listed, _ = run("recipes", "list")
    assert all(len(line) <= 160 for line in listed.splitlines())
    rows = {row["name"]: row for row in json.loads(run("recipes", "list", "--json")[1])}
    row = rows["stable_diffusion/sft"]
    assert row["summary"] == "Finetune Stable Diffusion 1.5 on captioned pictures"
    assert row["about"].startswith(row["summary"] + ". Hardware: one 12 GB GPU. 1.1 B weights, 2.1 GB in bf16")
    for name, row in rows.items():  # an editor's line is no description, and a sentence begins somewhere
        assert "yaml-language-server" not in row["about"] and row["summary"][:1].isupper(), name


# ------------------------------------------------------------------------------------------------------- no torch, ever


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["rewards", "list"],
        ["rewards", "show", "zreward"],
        ["pipelines", "list"],
        ["recipes", "list"],
        ["validate", "recipe.yaml", "train.steps=5"],
        ["validate", "prompts.txt"],
        ["schema"],
    ],
)
def test_quick_commands_import_no_torch(words):
    heavy = ("torch", "transformers", "diffusers", "accelerate", "peft", "scipy")
    program = (
        "import sys\nfrom rewardtune.cli.app import app\n"
        f"try:\n    app({words!r})\nexcept SystemExit as left:\n    assert not left.code, left.code\n"
        f"found = [name for name in {heavy!r} if name in sys.modules]\nassert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_module_is_the_console_script():
    done = subprocess.run(
        [sys.executable, "-m", "rewardtune", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"rewardtune {__version__}\n")


def test_python_m_does_not_take_a_users_own_folder_for_ours(folder):
    (folder / "rewards.py").write_text("raise RuntimeError('this is the user\\'s file')\n")
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", "rewardtune", "rewards", "list"], capture_output=True, text=True, timeout=120,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "zreward" in done.stdout
    assert "…" not in done.stdout  # what a pipe reads is whole


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("train", 2, "Missing argument"),
        ("trian recipe.yaml", 2, "No such command"),
        ("train recipe.yaml --nope", 2, "No such option"),
        ("train recipe.yaml --nproc 0", 2, "'--nproc'"),
        ("train nowhere.yaml", 2, "there is no such file"),
        ("train pocket/base-sfd", 2, "did you mean 'pocket/base-sft'?"),
        ("train recipe.yaml train.stepz=3", 2, "did you mean 'steps'?"),
        ("train recipe.yaml train.steps=-5", 2, "train.steps is -5; expected more than 0."),
        ("train recipe.yaml rewards.0.name=zrewrd", 2, "did you mean 'zreward'?"),
        ("train recipe.yaml rewards.0.name=pocket-oracle", 2, "move it to compare.rewards"),
        ("train recipe.yaml data.prompts=empty.txt", 3, "no prompts"),
        ("train recipe.yaml --plugin nowhere.py", 2, "there is no such file"),
        ("train recipe.yaml --plugin broken.py", 2, "broken.py does not load: ZeroDivisionError"),
        ("train recipe.yaml --out prompts.txt/run", 6, "cannot be written"),
        ("validate recipe.yaml data.prompts=nowhere.txt", 2, "no file 'nowhere.txt'"),
        ("validate train.steps=5", 2, "name at least one recipe or data file"),
        ("validate empty.txt", 3, "no prompts"),
        ("train prompts.txt", 2, "this holds none. `rewardtune recipes copy pocket/zreward my.yaml` gives one"),
        ("validate tab.yaml", 2, "tab.yaml:2: this is not valid YAML: while scanning for the next token; found ch"),
        ("validate tab.yaml", 2, "cannot start any token; indent with spaces, for YAML takes no tabs."),
        ("score --reward jpeg-size --images rows.jsonl", 3, "there is no file 'a.png' under /"),
        ("validate control.txt", 3, "control.txt"),
        ("rewards show zrewrd", 2, "did you mean 'zreward'?"),
        ("rewards test os:system", 2, "os"),
        ("recipes show nothing", 2, "no shipped recipe has this name"),
        ("recipes show latin.yaml", 2, "latin.yaml: this is not UTF-8 text (invalid continuation byte at byte 6)"),
        ("recipes copy latin.yaml copy.yaml", 2, "this is not UTF-8 text"),
        ("recipes copy pocket/base-sft prompts.txt", 2, "is there already"),
        ("recipes copy pocket/base-sft nowhere/x.yaml", 6, "cannot be written: nowhere is no folder. Make it first"),
        ("train recipe.yaml data.prompts=folder", 2, "data.prompts: 'folder' is a folder, and a file is wanted."),
        ("validate folder", 2, "recipe 'folder' is a folder"),
        ("rewards test zreward --prompts folder", 3, "folder: this is a folder, and a file is wanted"),
        ("score --reward jpeg-size --images prompts.txt", 3, "prompts.txt: a .txt file holds prompts alone"),
        ("score --reward jpeg-size --images nameless", 3, "and the name has no ending"),
        ("data import pickapic-v2 folder --out out", 3, "folder: this is a folder; name the tables in it"),
        ("rewards new my-reward --out prompts.txt", 6, "the system refused: prompts.txt: File exists. Name another"),
        ("score --reward zrewrd --images .", 2, "did you mean 'zreward'?"),
        ("score --reward zreward --images nowhere --prompts prompts.txt", 3, "no such folder or manifest"),
        ("evaluate --scorer nowhere --data nowhere.jsonl", 3, "nowhere.jsonl"),
        ("compare", 2, "needs sides"),
        ("export nowhere", 2, "nowhere"),
        ("score --reward jpeg-size --images . --device gpu", 2, "--device 'gpu' is no device. Write cpu, cuda, cuda:1"),
        ("rewards test zreward --device cuda:99", 2, "--device 'cuda:99' is not on this machine. It has cpu"),
        ("evaluate --scorer nowhere --data nowhere.jsonl --device gpu", 2, "--device 'gpu' is no device"),
        ("compare --device gpu", 2, "--device 'gpu' is no device"),
    ],
)
def test_bad_input_is_one_paragraph_with_its_code(run, folder, words, code, said):
    (folder / "empty.txt").write_text("\n")
    (folder / "folder").mkdir()
    (folder / "tab.yaml").write_text("train:\n\tsteps: 3\n")
    (folder / "rows.jsonl").write_text('{"image": "a.png"}\n')
    (folder / "nameless").write_text("x\n")
    (folder / "latin.yaml").write_bytes("name: é:a".encode("latin-1"))
    (folder / "control.txt").write_text("a \x1b[2J fox\n")
    (folder / "broken.py").write_text("1 / 0\n")
    before = sorted(folder.rglob("*"))
    got, out, err = run(*words.split())
    assert said in err
    assert got == code
    assert out == ""
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert (
        sorted(path for path in folder.rglob("*") if "__pycache__" not in str(path)) == before
    )  # nothing half-written


def test_traceback_shows_where(run):
    code, _, err = run("rewards", "show", "zrewrd", "--traceback")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert "registry.py" in err
    assert "error: reward 'zrewrd' is unknown" in err


def test_an_unforeseen_error_is_our_fault_and_says_so(run, folder):
    (folder / "plugin.py").write_text(PLUGIN.replace("return cls(config.power)", "raise KeyError('weights')"))
    code, _, err = run("rewards", "test", "brightness", "--plugin", "plugin.py")
    assert code == 70
    assert "unexpected KeyError" in err
    assert "--traceback" in err
    from rewardtune import registry

    del registry.rewards._decorated["brightness"]


@pytest.mark.parametrize(
    ("raises", "said"),
    [
        ("MemoryError", "out of memory (no details). Do less at once"),
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", "(CUDA out of memory. Tried to allocate)"),
        ("RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')", "DefaultCPUAllocator"),
    ],
)
def test_memory_that_runs_out_while_a_reward_loads_has_its_code(run, folder, raises, said):
    (folder / "plugin.py").write_text(
        "import torch\n" + PLUGIN.replace("return cls(config.power)", f"raise {raises}").replace("brightness", "greedy")
    )
    code, _, err = run("rewards", "test", "greedy", "--plugin", "plugin.py")
    from rewardtune import registry

    del registry.rewards._decorated["greedy"]
    assert (code, said in err) == (5, True), err


def test_control_characters_never_reach_the_terminal():
    assert printable("a\x1b[31mb\u202ec\n\td") == "a\\x1b[31mb\\u202ec\n\\td"


# ----------------------------------------------------------------------------------------------------------------- JSON


def test_rewards_list_json_has_the_promised_fields(run):
    code, out, _ = run("rewards", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert list(rows["zreward"]) == [
        "name",
        "source",
        "summary",
        "differentiable",
        "needs_prompt",
        "range",
        "higher_is_better",
        "licence",
        "extra",
        "available",
        "why_not",
        "weights",
        "needs_options",
        "to_fetch",
        "offline",
        "missing",
    ]
    assert rows["zreward"]["differentiable"] is True
    assert rows["zreward"]["range"] == [1.0, 5.0]
    assert rows["pocket-oracle"]["differentiable"] is False
    assert rows["pocket-oracle"]["available"] is True


def test_rewards_list_tells_what_is_here_and_how_to_get_the_rest(run, folder, monkeypatch):
    from huggingface_hub import constants

    from rewardtune import registry

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)

    def rows() -> dict[str, dict]:
        return {row["name"]: row for row in json.loads(run("rewards", "list", "--json")[1])}

    found = rows()
    (model, revision), *_ = registry.rewards.card("clipscore").models.items()
    assert found["clipscore"]["weights"] == [
        {"model": model, "version": revision, "source": "hub", "at_hand": False}
    ] and found["clipscore"]["to_fetch"] == [model]
    assert found["zreward"]["weights"][0]["source"] == "shipped" and found["zreward"]["to_fetch"] == []
    assert found["jpeg-size"]["weights"] == [] and found["jpeg-size"]["missing"] == []
    assert {one["source"] for one in found["ocr"]["weights"]} == {"package"}
    assert found["http-judge"]["missing"] == ["needs options: http-judge:url=...,served_model=..."]
    assert found["rewarddance"]["weights"][0]["source"] == "yours"
    assert [one["source"] for one in found["aesthetic"]["weights"]] == ["hub", "address"]

    kept = folder / "hub" / f"models--{model.replace('/', '--')}"
    (kept / "snapshots" / revision).mkdir(parents=True)
    (kept / "snapshots" / revision / "config.json").write_text("{}")
    assert rows()["clipscore"]["weights"][0]["at_hand"] is True
    (kept / "blobs").mkdir()
    (kept / "blobs" / "1234.incomplete").write_text("")
    assert rows()["clipscore"]["weights"][0]["at_hand"] is False, "broken off"
    (kept / "blobs" / "1234.incomplete").unlink()

    _, out, _ = run("rewards", "list")
    assert "comes from the hub at first use: detection-counts, hpsv2," in " ".join(out.split())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, out, _ = run("rewards", "list")
    told = " ".join(out.split())
    assert "HF_HUB_OFFLINE is set, so it cannot be: detection-counts, hpsv2," in told
    assert rows()["hpsv3"]["offline"] == "HF_HUB_OFFLINE" and rows()["clipscore"]["offline"] is None
    _, out, _ = run("rewards", "show", "pickscore")
    assert "yuvalkirstain/PickScore_v1: hub, not fetched" in out and "HF_HUB_OFFLINE is set" in out


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("clipscore:modle=x", "'clipscore': key 'modle' unknown in options; did you mean 'model'? `rewardtune rewards"),
        ("http-judge", "'http-judge': key 'url' is missing in options; key 'served_model' is missing in options."),
        ("clipscore:w=much", "options.w is the text 'much'; expected a number"),
        ("zreward:dtype=float16", "options.dtype is the text 'float16' (it can be float32, bfloat16)"),
    ],
)
def test_options_are_corrected_as_those_of_recipes_are(run, spec, said):
    code, _, err = run("rewards", "test", spec)
    assert code == 2 and said in err
    assert "does not take" not in err and "Input should" not in err and "Field required" not in err


def test_rewards_show_warns_of_a_licence_that_forbids_commercial_use(run, folder):
    licence = 'licence_code="MIT", licence_weights="CC BY-NC 4.0", commercial_use=False,'
    (folder / "plugin.py").write_text(PLUGIN.replace("needs_prompt=False,", f"needs_prompt=False, {licence}"))
    code, out, _ = run("rewards", "show", "brightness", "--plugin", "plugin.py")
    from rewardtune import registry

    del registry.rewards._decorated["brightness"]
    assert code == 0
    assert "warning: its licence forbids commercial use (code: MIT; weights: CC BY-NC 4.0)" in out
    _, out, _ = run("rewards", "show", "zreward")
    assert "warning" not in out


def test_rewards_test_says_a_cause_once_and_counts(run):
    cut = str(Path(__file__).with_name("fussy.py"))
    code, out, err = run("rewards", "test", "cut", "--plugin", cut)
    assert code == 1 and "'cut' fails 5 of 11 checks" in err
    assert out.count("no gradient can be taken") == 1
    assert out.splitlines()[-2].startswith("FAIL  picture sizes; images in bfloat16; gradient reaches every image;")
    assert out.splitlines()[-1] == "6 of 11 checks passed"


@pytest.mark.parametrize("columns", [100, 64, 240])
def test_rewards_list_fits_the_terminal_and_says_what_each_measures(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run("rewards", "list", "--plugin", "plugin.py")
    lines = out.splitlines()
    from rewardtune import registry

    del registry.rewards._decorated["brightness"]
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= columns
    assert any(line.startswith("    cosine of picture and caption in CLIP's space") for line in table)
    assert any("plugin.py; mean of the" in line or "from " in line for line in table)
    prose = lines[len(table) :]
    assert all(len(line) <= min(columns, 100) or " " not in line.strip() for line in prose)


def test_a_broken_third_party_is_listed_as_unavailable(folder):
    info = folder / "site" / "broken_rewards-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-rewards\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[rewardtune.rewards]\nsad = sad_module:Sad\n")
    (folder / "site" / "sad_module.py").write_text("import not_installed_anywhere\n")
    environment = os.environ | {"PYTHONPATH": str(folder / "site")}
    command = [sys.executable, "-m", "rewardtune", "rewards", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    row = next(row for row in json.loads(done.stdout) if row["name"] == "sad")
    assert row["source"] == "broken-rewards 0.3"
    assert row["available"] is False
    assert row["why_not"] == "needs the module not_installed_anywhere, which is not installed"


def test_validate_json_tells_each_file_apart(run, folder):
    (folder / "bad.yaml").write_text(RECIPE.replace("steps: 10", "steps: x"))
    code, out, err = run("validate", "recipe.yaml", "bad.yaml", "prompts.txt", "--json")
    assert code == 2
    good, bad, data = json.loads(out)
    assert (good["file"], good["ok"], good["error"]) == ("recipe.yaml", True, None)
    assert bad["ok"] is False
    assert "bad.yaml:7: train.steps" in bad["error"]
    assert data["ok"] is True
    assert "bad.yaml:7" in err


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ("{guidance: off}", ""),
        ("{guidance: off, guidance_scale: 1}", ""),
        ("{guidance: full, guidance_scale: 3}", ""),
        ("{guidance: off, guidance_scale: 3}", "rollout.guidance_scale 3 has no effect, since rollout.guidance is off"),
        ("{guidance: off, guidance_scale: 4}", "rollout.guidance_scale 4 has no effect"),  # the default, but given
        ("{guidance: off, guidance_scale: 3, negative_prompt: blurry}", "3 and rollout.negative_prompt have no effect"),
    ],
)
def test_a_scale_that_is_given_and_not_used_is_noticed(run, rollout, said):
    code, out, err = run("validate", "recipe.yaml", f"rollout={rollout}")
    assert (code, err.startswith("note: "), said in err) == (0, bool(said), True)
    code, out, _ = run("validate", "recipe.yaml", f"rollout={rollout}", "--json")
    assert len(json.loads(out)[0]["notices"]) == bool(said)


def test_the_schema_is_json(run):
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out)["discriminator"]["propertyName"] == "task"


# -------------------------------------------------------------------------------------------------- commands that work


def test_plugin_rewards_are_listed_shown_and_tested(run):
    from rewardtune import registry

    code, out, _ = run("rewards", "list", "--plugin", "plugin.py")
    assert code == 0
    assert "brightness" in out
    code, out, _ = run("rewards", "show", "brightness", "--plugin", "plugin.py")
    assert "power (default 1.0): Exponent of each pixel." in out
    code, out, err = run("rewards", "test", "brightness:power=2", "--plugin", "plugin.py")
    assert code == 0, err
    assert "gradient reaches every image" in out and out.count("ok  ") == len(out.splitlines()) - 1
    code, out, _ = run("rewards", "test", "brightness", "--plugin", "plugin.py", "--json")
    assert all(check["passed"] for check in json.loads(out))
    code, _, err = run("rewards", "test", "brightness:pwer=2", "--plugin", "plugin.py")
    assert code == 2
    assert "pwer" in err
    del registry.rewards._decorated["brightness"]


def test_a_reward_that_breaks_the_contract_exits_1(run, folder):
    from rewardtune import registry

    text = PLUGIN.replace("brightness", "centred").replace(
        ".mean(dim=(1, 2, 3)))", ".mean(dim=(1, 2, 3)) - images.mean())"
    )
    (folder / "centred.py").write_text(text)
    code, out, err = run("rewards", "test", "centred", "--plugin", "centred.py")
    assert code == 1
    assert "FAIL  independent of batch mates" in out
    assert "FAIL  no gradient across images" in out
    assert "independent of batch mates" in err
    del registry.rewards._decorated["centred"]


def test_a_shipped_recipe_can_be_copied_and_shown(run, folder):
    code, out, _ = run("recipes", "copy", "pocket/base-sft", "mine.yaml")
    assert (code, out) == (0, "mine.yaml\n")
    _, shown, _ = run("recipes", "show", "pocket/base-sft")
    header, body = (folder / "mine.yaml").read_text().split("\n", 1)
    assert body == shown.split("\n", 1)[1]
    # The copy's header still leads an editor to the schema.
    schema = Path(url2pathname(urlparse(header.partition("$schema=")[2]).path))
    assert json.loads(schema.read_text())["title"] == "rewardtune recipe"
    (folder / "there").mkdir()
    _, out, _ = run("recipes", "copy", "pocket/base-sft", "there")
    assert (folder / "there" / "base-sft.yaml").exists()


def test_env_is_a_block_to_paste(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    plugin = tmp_path / "at_home.py"
    plugin.write_text("import rewardtune as rt\n\nrt.register_reward_function('env-at-home')(len)\n")
    code, out, _ = run("env", "--plugin", str(plugin))
    assert code == 0
    assert all(line.startswith("- ") for line in out.splitlines())
    assert f"- rewardtune: {__version__}" in out
    assert "- torch: " in out
    assert str(tmp_path) not in out and "env-at-home" in out


def test_doctor_finds_this_machine_fit_and_a_broken_plugin_unfit(run, folder, monkeypatch):
    code, out, _ = run("doctor", "--json")
    findings = {finding["check"]: finding for finding in json.loads(out)}
    assert code == (1 if any(finding["status"] == "FAIL" for finding in findings.values()) else 0)
    assert findings["torch device"]["status"] in ("ok", "warn")
    assert findings["reward zreward"]["status"] == "ok"
    info = folder / "site" / "sad_rewards-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sad-rewards\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[rewardtune.rewards]\nsad = sad_module:Sad\n")
    (folder / "site" / "sad_module.py").write_text("raise RuntimeError('no weights')\n")
    monkeypatch.syspath_prepend(str(folder / "site"))
    code, out, err = run("doctor")
    assert code == 1
    assert "FAIL  reward sad: reward 'sad' from sad-rewards 0.3" in out
    assert "reward sad" in err
