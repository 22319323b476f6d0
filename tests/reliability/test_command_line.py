"""The command line at first sight: help, doctor, completion, and a list of flags that changes knowingly only."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from remap_cli.app import app

pytestmark = pytest.mark.slow

FLAGS = Path(__file__).parents[1] / "cli" / "flags.txt"
HEAVY = {"torch", "torchvision", "timm", "accelerate", "peft", "transformers", "sklearn", "torchdistill"}
# What `remap WORDS` does in a process of its own; then on stderr: processor seconds, and what was imported.
OWN_PROCESS = f"""
import sys, time
sys.argv = ["remap", *sys.argv[1:]]
from remap_cli.main import main
try:
    main()
except SystemExit as leave:
    code = leave.code or 0
print("MEASURED", time.process_time(), code, *sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""


def _commands(group: object = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every command with its words, groups too."""
    group = group or typer.main.get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from _commands(command, (*path, name))


COMMANDS = dict(_commands())


@pytest.mark.guarantee(20)
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "remap")
def test_help_imports_nothing_heavy(words: tuple[str, ...], figure: Callable[..., None]) -> None:
    """The time is measured, not judged: it depends on the machine. benchmarks/startup.py measures it on a quiet one."""
    command = [sys.executable, "-c", OWN_PROCESS, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, code, *heavy = done.stderr.partition("MEASURED")[2].split()
    assert (code, heavy) == ("0", []) and "Usage:" in done.stdout
    figure("commands whose help needs no torch", 1, 1)
    figure("slowest help, seconds of processor time", round(float(seconds), 2))


# Every attempt to reach another machine fails, as without a network; tokens and caches are nowhere.
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["remap", "doctor", "--json"]
from remap_cli.main import main
main()
"""


@pytest.mark.guarantee(20)
def test_doctor_needs_neither_gpu_nor_network_nor_token(tmp_path: Path, figure: Callable[..., None]) -> None:
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    alone = hidden | {"CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-c", NO_NETWORK]
    done = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = {row["what"]: (row["state"], row["found"]) for row in json.loads(done.stdout)["checks"]}
    assert found["GPU"][0] == "note" and found["hub token"][1].startswith("none")
    assert "bad" not in {state for state, _ in found.values()}
    figure("doctor without GPU, network and token, exit code", done.returncode)


@pytest.mark.guarantee(20)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_shells_get_their_completion(shell: str, figure: Callable[..., None]) -> None:
    """The script a shell sources, and what it then asks for."""
    script = _completion(f"source_{shell}")
    assert "remap" in script and f"complete_{shell}" in script
    offered = _completion(f"complete_{shell}", COMP_WORDS="remap rec", COMP_CWORD="1", **_asked("remap rec"))
    assert "recipes" in offered and "distill" not in offered
    inner = "remap distill --meth"
    assert "--method" in _completion(f"complete_{shell}", COMP_WORDS=inner, COMP_CWORD="2", **_asked(inner))
    figure("shells with completion", 1, 1)


def _asked(line: str) -> dict[str, str]:
    """How zsh, fish and PowerShell say what is on the line."""
    return {
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": line.split()[-1],
    }


def _completion(instruction: str, **words: str) -> str:
    environment = {**os.environ, "_REMAP_COMPLETE": instruction, **words}
    command = [sys.executable, "-c", OWN_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.partition("MEASURED")[2].split()[2:] == [], "imported for a completion"
    return done.stdout


@pytest.mark.guarantee(20)
def test_flags_are_those_of_the_list(figure: Callable[..., None]) -> None:
    """Scripts are written against flags: one that goes or changes its name breaks them. Each is a line of flags.txt."""
    wanted = FLAGS.read_text().splitlines()
    found = sorted(_flags())
    new, gone = set(found) - set(wanted), set(wanted) - set(found)
    assert found == wanted, f"edit {FLAGS.name} on purpose: new {new}, gone {gone}"
    figure("commands and flags as listed", len(found), len(wanted))


def _flags() -> Iterator[str]:
    for words, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                names = [parameter.name.upper()]
            else:
                names = [*parameter.opts, *parameter.secondary_opts]
            yield " ".join(["remap", *words, "/".join(names)])
