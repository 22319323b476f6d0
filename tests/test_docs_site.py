"""What the pages say can be done: commands parse, recipes validate, Python runs, messages and numbers exist."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
import yaml

import remap
from remap.recipe import catalogue, resolve
from remap.recipe.resolution import resolve_distill
from remap.remapping import LOSSES
from remap.tuning import METHODS
from remap_cli.app import app
from remap_cli.training import recipe_words

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = {page.name: page.read_text() for page in [*PAGES, ROOT / "README.md", ROOT / "AGENTS.md"]}


def _blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of remap in a block of bash, also behind a pipe, a launcher or an environment variable."""
    for name, text in TEXTS.items():
        for block in _blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&| \| ", line.partition(" #")[0]):
                    words = [word for word in shlex.split(part) if word != "..."]
                    start = next((i for i, word in enumerate(words) if word in ("remap", "remap_cli")), None)
                    if start is not None and (start == 0 or words[start - 1] == "-m" or "=" in words[start - 1]):
                        yield name, words[start + 1 :]


@pytest.fixture(scope="module")
def group() -> Any:
    return typer.main.get_command(app)


def test_every_command_parses(group: Any) -> None:
    """Source: the command line's own parser, which refuses unknown words and missing arguments."""
    commands = list(_commands())
    assert len(commands) > 60
    for page, words in commands:
        if not words or words[0].startswith("-"):
            continue
        command, rest = group, list(words)
        try:
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(words[0], rest)
        except Exception as error:
            pytest.fail(f"{page}: remap {shlex.join(words)}: {error!r}")


def test_commands_within_a_sentence_have_these_options(group: Any) -> None:
    """`remap tune --student X`: its flags are those of the command; arguments may be left out there."""
    named = [
        (page, " ".join(words.split()))
        for page, text in TEXTS.items()
        for words in re.findall(r"`(remap [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    ]
    assert len(named) > 100
    for page, words in named:
        command, rest = group, words.split()[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        unknown = {flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", words)} - known
        assert command is not group or words.startswith("remap --"), f"{page}: {words} is not a command"
        assert not unknown, f"{page}: {words} has no {', '.join(sorted(unknown))}"


def test_links_lead_to_headings() -> None:
    """The anchor of a heading as GitHub makes it: small letters, hyphens for spaces, no punctuation."""
    checked = 0
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md"]:
        for address, anchor in re.findall(r"\]\((?!http)([\w./-]*)#([^)]+)\)", page.read_text()):
            target = (page.parent / address) if address else page
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page.name}: {address}#{anchor}"
            checked += 1
    assert checked > 50


def test_every_training_command_makes_a_recipe(group: Any) -> None:
    """Resolved as the command does it: methods, losses, fields and their values exist. Images are not opened."""
    checked = 0
    for page, words in _commands():
        if words[:1] not in (["distill"], ["tune"]) or "--resume" in words:
            continue
        values = group.commands[words[0]].make_context(words[0], list(words[1:])).params
        if values["recipe"] is None or values["recipe"] in catalogue.names():
            read = resolve_distill if words[0] == "distill" else resolve
            try:
                read(values["recipe"], recipe_words(values), values["settings"] or [])
            except Exception as error:
                pytest.fail(f"{page}: remap {shlex.join(words)}: {error}")
            checked += 1
    assert checked > 15


def test_every_recipe_in_the_pages_is_valid(tmp_path: Path) -> None:
    """Also a part of one, which gets a teacher; other YAML (Accelerate's configuration) is left out."""
    checked = 0
    for name, text in TEXTS.items():
        for block in _blocks(text, "yaml"):
            values = yaml.safe_load(block)
            if {"data", "losses", "teacher", "student"} & set(values):
                (tmp_path / "recipe.yaml").write_text(block)
                try:
                    resolve(str(tmp_path / "recipe.yaml"), {"teacher": values.get("teacher", "mini_teacher")})
                except Exception as error:
                    pytest.fail(f"{name}: {error}\n{block}")
                checked += 1
    assert checked >= 3


def test_the_shipped_recipes_are_listed() -> None:
    rows = re.findall(r"^\| (`.+`) \|", TEXTS["recipes.md"], flags=re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(catalogue.names())


def test_every_block_of_python_compiles() -> None:
    blocks = [(name, block) for name, text in TEXTS.items() for block in _blocks(text, "python")]
    assert len(blocks) >= 4
    for name, block in blocks:
        compile(block, name, "exec")


def test_names_of_remap_in_python_blocks_exist() -> None:
    for name, text in TEXTS.items():
        for block in _blocks(text, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "remap":
                    assert node.attr in (*remap.__all__, "tuning"), f"{name}: remap.{node.attr}"


def test_the_method_of_the_page_on_adding_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a start of 2 the output is that of a network whose MLPs are twice as strong, and detaching gives it back."""
    monkeypatch.setattr(METHODS, "_rows", {**METHODS._rows})  # the name is forgotten afterwards
    (block,) = _blocks(TEXTS["adding.md"], "python")
    exec(compile(block, "adding.md", "exec"), {"__name__": "adding"})
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    image = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        before = model(image)
        attached = remap.attach(model, "mlp_scale", start=2.0)
        tuned = model(image)
        attached.detach()
        assert torch.equal(model(image), before)
        for path, module in model.named_modules():
            if path.endswith("mlp.fc2"):
                module.weight.mul_(2)
                module.bias.mul_(2)
        torch.testing.assert_close(tuned, model(image))


def _messages() -> str:
    """The code, with texts that go over several lines in one piece."""
    files = [file.read_text() for folder in ("remap", "cli") for file in (ROOT / folder).rglob("*.py")]
    return re.sub(r'"\n *f?"', "", "\n".join(files))


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """Source: the texts in the code."""
    named = re.findall(r"^### `(.+)`$", TEXTS["troubleshooting.md"], flags=re.MULTILINE)
    code = _messages()
    assert len(named) >= 20
    assert [words for words in named if words not in code] == []


def _table(text: str, heading: str) -> dict[str, list[str]]:
    part = text.split(heading, 1)[1]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", part.split("\n## ")[0], flags=re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_numbers_for_choosing_are_those_of_the_measurements() -> None:
    """Source: the tables of digits.md and objectives.md, from which the page quotes."""
    measured = _table(TEXTS["digits.md"], "# Every method")
    quoted = _table(TEXTS["choosing.md"], "## How much each method reaches")
    assert len(quoted) == 7
    for name, (trained, accuracy) in quoted.items():
        share = re.search(r"\(([\d.]+)%\)", measured[name][1])
        assert accuracy == measured[name][2] and float(trained.split()[0]) == float(share[1]), name
    gained = TEXTS["choosing.md"].split("## Does the teacher pay?")[1]
    rows = re.findall(r"^\| (.+) \| [\d.]+ % \| (.+) \|$", gained, flags=re.MULTILINE)
    headings = ["## Digits, 1,000 labels", "## Digits, 100 labels", "## Ants and bees, 244 labels"]
    for heading, (_, gains) in zip(headings, rows, strict=True):
        table = _table(TEXTS["objectives.md"], heading)
        for name, gain in zip(("linear", "vpt_deep", "bitfit", "lora", "full"), gains.split(" | "), strict=True):
            alone, taught = (float(cell.split()[0]) for cell in table[name][:2])
            assert float(gain) == pytest.approx(taught - alone, abs=0.051), (heading, name)


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(nav)))
    missing = {page.name for page in PAGES} - listed
    assert not missing, f"add to nav in mkdocs.yml, then run `python tools/llms.py`: {', '.join(sorted(missing))}"
    gone = {name for name in listed if not (DOCS / name).exists() and not (ROOT / name).exists()} - {"first_steps.md"}
    assert not gone, f"mkdocs.yml names pages that do not exist: {', '.join(sorted(gone))}"


def test_links_between_pages_lead_somewhere() -> None:
    for name, text in TEXTS.items():
        folder = DOCS if (DOCS / name).exists() else ROOT
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)):
            assert (folder / target).exists(), f"{name}: {target}"


def test_every_method_and_loss_is_explained_once() -> None:
    pages = [*(name for name in TEXTS if name.endswith("-tuning.md")), "losses.md", "remapping.md"]
    names = re.findall(r"^### `(\w+)`$", "\n".join(map(TEXTS.get, pages)), flags=re.MULTILINE)
    assert sorted(names) == sorted([*METHODS.names, *LOSSES.names])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and "WARNING" not in process.stderr, process.stderr
    assert (tmp_path / "site" / "first_steps" / "index.html").is_file()
