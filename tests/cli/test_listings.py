"""Commands that look things up: instant, without torch, and complete."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import Result

from remap.backbones.families import FAMILIES
from remap.remapping import LOSSES
from remap.tuning import CATEGORIES, METHODS
from remap_cli import console
from remap_cli.app import COMMANDS, app

HEAVY = {"torch", "timm", "accelerate", "peft", "sklearn", "torchdistill", "transformers", "matplotlib", "numpy"}
LISTINGS = """--help; --version; distill --help; compare --help; methods; methods --families; methods lora;
methods vpt_deep+lora; losses; losses kd; losses tokens --json; remappings; remappings layers;
remappings shrink; models; recipes ls; recipes show digits;
recipes show digits --resolved; recipes validate digits pretrain_mini_teacher; cache ls"""


def test_listings_import_nothing_heavy() -> None:
    """All in one process: a package stays imported."""
    code = f"""
import sys
from remap_cli.main import main
for words in {LISTINGS!r}.split(";"):
    sys.argv = ["remap", *words.split()]
    try:
        main()
    except SystemExit as leave:
        assert not leave.code, (words, leave.code)
    assert not {HEAVY!r} & sys.modules.keys(), (words, {HEAVY!r} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("Usage:", "294,912", "temperature", "digits: ok"))


def test_help_imports_no_command() -> None:
    """Nor what prints tables, reads recipes and checks options: together as long as Python and Typer take to start."""
    code = """
import sys
from remap_cli.main import main
sys.argv = ["remap", "--help"]
try:
    main()
except SystemExit as leave:
    assert not leave.code
slow = {"rich.console", "rich.table", "rich.markdown", "pydantic", "yaml", "importlib.metadata"} & sys.modules.keys()
commands = {name for name in sys.modules if name.startswith("remap_cli.")} - {"remap_cli.main", "remap_cli.options"}
assert not slow and commands == {"remap_cli.app"}, (slow, commands)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str, remap: Callable[..., Result]) -> None:
    row, command = COMMANDS[name], typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.help.strip().splitlines()[0] == row.about and command.rich_help_panel == row.panel
    listed = " ".join(remap("--help").stdout.split())
    assert f" {name} {row.about} " in f"{listed} "


def test_without_a_command_the_help_is_shown(remap: Callable[..., Result]) -> None:
    result = remap()
    assert result.exit_code == 2 and result.stdout == remap("--help").stdout


def test_methods_are_those_of_the_table(run_json: Callable[..., list]) -> None:
    rows = run_json("methods")
    assert [row["name"] for row in rows] == list(METHODS.names)
    assert {row["category"] for row in rows} == set(CATEGORIES.values())
    assert all(row["paper"] and row["trainable_parameters"] for row in rows)


@pytest.mark.parametrize("name", METHODS.names)
def test_a_method_shows_every_option(run_json: Callable[..., dict], name: str) -> None:
    """Source: the fields of its class of options."""
    found = run_json("methods", name)
    fields = METHODS.load(name).Config.model_fields
    assert [row["name"] for row in found["methods"]] == [name]
    assert [option["name"] for option in found["options"]] == list(fields)
    for option in found["options"]:
        default = fields[option["name"]].default
        assert option["default"] == (list(default) if isinstance(default, tuple) else default)
        assert option["about"] == fields[option["name"]].description


@pytest.mark.parametrize("name", LOSSES.names)
def test_a_loss_shows_every_option(run_json: Callable[..., dict], name: str) -> None:
    """Source: the fields of its class of options."""
    shown = {option["name"]: option["about"] for option in run_json("losses", name)["options"]}
    assert shown == {option: field.description for option, field in LOSSES.load(name).Config.model_fields.items()}


def test_options_say_what_they_take(
    remap: Callable[..., Result], run_json: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.out, "width", 300)
    found = run_json("methods", "vpt_deep+lora")
    options = {option["name"]: option for option in found["options"]}
    assert options["lora.targets"]["allowed"] == ["q", "k", "v", "o", "fc1", "fc2", "linear", "conv"]
    assert options["lora.targets"]["type"] == "list or null" and "null is [q, v]" in options["lora.targets"]["about"]
    assert options["vpt_deep.place"]["allowed"] == ["prepend", "add", "add_all", "pixel"]
    assert options["vpt_deep.shared"]["about"] == "Share one set of prompts among all blocks."
    assert (options["lora.rank"]["limits"], options["lora.dropout"]["limits"]) == (">= 1", ">= 0, < 1")
    shown = remap("methods", "lora").stdout
    for part in (
        "294,912",
        "list of q, k, v, o, fc1, fc2, linear, conv, or null",
        "--set method.rank=8",
        "arXiv 2106.09685",
    ):
        assert part in shown
    assert "no options" in remap("methods", "full").stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lorra", "did you mean 'lora'"),
        ("lora+vpt_dep", "did you mean 'vpt_deep'"),
        ("lora+", "a name is missing after '+'"),
        ("lora,ssf", "did you mean 'lora+ssf'"),
        ("lora+linear", "cannot be combined"),
    ],
)
def test_an_unknown_method_is_named(remap: Callable[..., Result], name: str, says: str) -> None:
    result = remap("methods", name)
    assert result.exit_code == 2 and says in result.message


@pytest.mark.parametrize(("width", "formulas"), [(80, False), (119, False), (120, True), (160, True)])
def test_a_narrow_terminal_gets_no_formulas(
    remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, width: int, formulas: bool
) -> None:
    monkeypatch.setattr(console.out, "width", width)
    lines = remap("methods").stdout.splitlines()
    assert any("L*p*D" in line for line in lines) == formulas
    assert any("L depth" in line for line in lines) == formulas
    assert max(len(line.rstrip()) for line in lines) <= width
    assert any(line.split()[:1] == ["vpt_deep"] and "2203.12119" in line for line in lines)


def test_the_families_of_one_method_or_of_a_combination(remap: Callable[..., Result]) -> None:
    rows = json.loads(remap("methods", "lora+vpt_deep", "--families", "--json").stdout)["methods"]
    assert [row["name"] for row in rows] == ["lora", "vpt_deep"]
    assert "lora" in remap("methods", "lora", "--families").stdout.split()
    assert "bitfit" not in remap("methods", "lora", "--families").stdout.split()
    assert "did you mean 'lora'" in remap("methods", "lore", "--families").message


def test_a_narrow_terminal_names_the_families_of_a_method(
    remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column for each of the eleven families needs more than 80 characters."""
    monkeypatch.setattr(console.out, "width", 80)
    lines = remap("methods", "--families").stdout.splitlines()
    fits = [name for name in FAMILIES.names if METHODS.row("vpt_deep").fits(FAMILIES.row(name).parts)]
    assert ["vpt_deep", *", ".join(fits).split()] in [line.split() for line in lines]


def test_models_are_listed_with_what_they_can_do(remap: Callable[..., Result], run_json: Callable[..., dict]) -> None:
    found = {row["name"]: row for row in run_json("models", "swin")["timm"]}
    assert found["swin_tiny_patch4_window7_224.ms_in22k"]["family"] == "swin"
    assert found["swinv2_cr_tiny_224"] == {
        "name": "swinv2_cr_tiny_224",
        "weights": False,
        "family": "generic",
        "teaches": ["logits", "features", "tokens"],
        "methods": sum(row.fits(FAMILIES.row("generic").parts) for row in METHODS),
    }
    shown = remap("models", "vit_pe_core").stdout
    assert "vit_pe_core_tiny_patch16_384.fb" in shown and "short name" not in shown
    assert "did you mean 'vit_tiny'?" in remap("models", "vit_tny").message, "a short name"
    missing = remap("models", "zzz")
    assert missing.exit_code == 2 and "no model of timm has 'zzz' in its name" in missing.message


def test_support_is_what_attaching_says(run_json: Callable[..., dict]) -> None:
    found = run_json("models", "--support", "test_nfnet")
    assert found["family"] == "generic" and found["teaches"] == ["logits", "features", "tokens"]
    assert {"full", "lora", "vpt_pad", "vp"} <= set(found["tuned_by"])
    assert "no norms" in found["refused"]["norm"] and "one sequence" in found["refused"]["vqt"]
    assert set(found["tuned_by"]) | set(found["refused"]) == set(METHODS.names)


def test_support_takes_every_word_that_names_a_student(
    run_json: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from timm.models import save_for_hf

    from remap.backbones.build import build
    from remap.data.views import View
    from remap.network import tuned
    from remap.runs.task import save_task

    made = timm.create_model("test_resnet", in_chans=2)
    made.pretrained_cfg |= {"input_size": (2, 160, 160), "mean": (0.5,), "std": (0.5,)}
    save_for_hf(made, str(tmp_path / "net"), model_args={"in_chans": 2}, safe_serialization=True)
    folder = f"local-dir:{tmp_path / 'net'}"
    network = tuned(build(folder, "pretrained", 2), "lora", {})
    network.classes = ("a", "b")
    save_task(tmp_path / "run" / "task", network, View(160, 1.0, "bicubic"), "lora", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("local-dir:~/net", "~/net/model.safetensors", "~/run")
    found = [run_json("models", "--support", word) for word in words]
    assert [one.pop("name") for one in found] == [*words[:2], folder]
    assert found[0]["family"] == "resnet" and found[0] == found[1] == found[2]


def test_losses_are_those_of_the_table(run_json: Callable[..., list]) -> None:
    assert [row["name"] for row in run_json("losses")] == list(LOSSES.names)


def test_recipes_are_the_files_of_the_folder(run_json: Callable[..., list]) -> None:
    """Source: the checkout's recipes folder, apart from suites, which lie below it."""
    on_disk = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert [row["name"] for row in run_json("recipes", "ls")] == on_disk


def test_copy_then_validate(remap: Callable[..., Result], tmp_path: Path) -> None:
    assert remap("recipes", "copy", "digits").exit_code == 0
    assert remap("recipes", "validate", "digits.yaml").exit_code == 0
    again = remap("recipes", "copy", "digits")
    assert again.exit_code == 2 and "exists already" in again.message
    (tmp_path / "digits.yaml").write_text("method: vpt_dep\ntrain: {epochs: 0}\n")
    broken = remap("recipes", "validate", "digits.yaml")
    assert broken.exit_code == 2
    for part in ("digits.yaml: 2 problems", "did you mean 'vpt_deep'", "train.epochs"):
        assert part in broken.message


def test_a_copy_is_run_by_the_command_that_is_advised(remap: Callable[..., Result]) -> None:
    """By the comments in the recipes; the words are those that a shell makes of the line."""
    for name, command in (("digits", "distill"), ("pretrain_mini_student", "tune")):
        result = remap("recipes", "copy", name, f"my {name}.yaml")
        advice = shlex.split(" ".join(result.stderr.split()).partition("run it with: ")[2])
        assert result.exit_code == 0 and advice == ["remap", command, "--recipe", f"my {name}.yaml"]
    result = remap("recipes", "copy", "digits", "mine")
    assert result.exit_code == 2 and "ends in .yaml" in result.message and not Path("mine").exists()


def test_copy_to_a_place_that_cannot_be_written_advises_what_copy_has(remap: Callable[..., Result]) -> None:
    assert remap("recipes", "copy", "digits", "new/folder/mine.yaml").exit_code == 0
    result = remap("recipes", "copy", "digits", "/proc/version.yaml")
    assert result.exit_code == 2 and "recipes copy NAME FILE" in result.message and "--output" not in result.message


def test_show_says_what_validate_would(remap: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("train:\n  epoch: 3\n")
    result = remap("recipes", "show", "wrong.yaml")
    assert result.exit_code == 0 and result.stdout == "train:\n  epoch: 3\n"
    assert "cannot be used" in result.stderr and "did you mean 'epochs'" in result.stderr


def test_validate_reports_every_broken_file(remap: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: vpt_dep\n")
    (tmp_path / "c.yaml").write_text("train: {epochs: 0}\n")
    result = remap("recipes", "validate", "a.yaml", "digits", "c.yaml", "absent.yaml")
    assert result.exit_code == 2 and "digits: ok" in result.stdout
    for part in ("a.yaml: 1 problem", "did you mean 'vpt_deep'", "c.yaml: 1 problem", "train.epochs", "absent.yaml"):
        assert part in result.message


def test_doctor_runs_without_network(remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = remap("doctor", "--json")
    checks = {row["what"]: row for row in json.loads(result.stdout)["checks"]}
    assert checks["torch"]["state"] == "ok" and checks["embedded weights"]["state"] == "ok"
    assert result.exit_code == 0


def test_doctor_ends_as_mistakes_do_where_something_is_missing(
    remap: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 is what a user can mend, 1 a bug: the table of docs/many-processes.md."""
    monkeypatch.setattr("remap.pipeline.doctor.version_of", lambda name: "missing")
    assert remap("doctor").exit_code == 2


def test_module_entry_point_equals_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "remap_cli", "--version"], capture_output=True, text=True, check=True)
    from remap import __version__

    assert done.stdout.strip() == f"remap {__version__}"


@pytest.mark.parametrize(
    ("name", "option", "sets"),
    [
        ("layers", "which", "--set student.init.which=uniform"),
        ("shrink", "depth", "--set student.shrink.depth=null"),
        ("skip", "cost", "--set method.cost=1.0"),
        ("weight_selection", None, "no options"),
    ],
)
def test_one_remapping_has_its_options(
    remap: Callable[..., Result], run_json: Callable[..., dict], name: str, option: str | None, sets: str
) -> None:
    found = run_json("remappings", name)
    assert found["name"] == name and (option is None) == (not found["options"])
    assert option is None or option in [one["name"] for one in found["options"]]
    assert sets in remap("remappings", name).stdout
    unknown = remap("remappings", "shrnk")
    assert unknown.exit_code == 2 and "unknown remapping 'shrnk'; did you mean 'shrink'?" in unknown.message


def test_sizes_of_models_are_numbers(run_json: Callable[..., dict]) -> None:
    assert {row["name"]: row["parameters_m"] for row in run_json("models")["short_names"]}["vit_base"] == 85.8
