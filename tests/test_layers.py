"""The plan of the house, read from the imports: dependencies point down, and some packages have one home."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"remap": "remap", "cli": "remap_cli"}
FILES = {
    ".".join((NAMES[folder], *path.relative_to(ROOT / folder).with_suffix("").parts)): path
    for folder in NAMES
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# From the ground up: one layer a folder. A module belongs to the longest name that it starts with, and may import from
# its own layer and from those below. Plain tables (a package's __init__ and its rows) import no torch.
LAYERS = [
    {"remap.errors", "remap.progress", "remap.registry"},
    {"remap.io"},
    {"remap.data"},
    {"remap.backbones", "remap.language"},
    {"remap.tuning"},
    {"remap.remapping"},
    {"remap.recipe"},
    {"remap.network"},
    {"remap.distributed"},
    {"remap.cache"},
    {"remap.engine"},
    {"remap.runs"},
    {"remap.exporting"},
    {"remap.report"},
    {"remap.pipeline"},
    {"remap.tasks"},
    {"remap.prediction", "remap.inspection"},
    {"remap"},
    {"remap_cli"},
]
HOMES = {
    "yaml": ("remap.recipe.strict_yaml",),
    "torch_pruning": ("remap.remapping.architecture.pruning",),
    "torchdistill": ("remap.remapping.knowledge.torchdistill_bridge",),
    "peft": ("remap.tuning.parameter.peft_bridge", "remap.exporting.peft_folder"),
    # Text towers are made of its blocks, the listing of models asks it for names, and the optimisers are its own.
    "timm": ("remap.backbones", "remap.language.text_tower", "remap.engine.optim", "remap_cli.models"),
    "open_clip": ("remap.language",),
    "tokenizers": ("remap.language.tokenizer",),
    "accelerate": (
        "remap.distributed",
        "remap.cache",
        "remap.engine",
        "remap.pipeline.trackers",
    ),
    "matplotlib": ("remap.report",),
    "jinja2": ("remap.report.page",),
    "optuna": ("remap.pipeline.comparison_search",),
    "submitit": ("remap.pipeline.comparison_slurm",),
    "typer": ("remap_cli",),
    "rich": ("remap_cli",),
}
# What would run what a file says, write where a file says, or fetch what it names.
BANNED = {
    *("eval", "exec", "compile", "__import__", "builtins", "runpy", "os.system", "os.popen", "importlib.import_module"),
    *("pickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "pandas.read_pickle"),
    *("torch.load", "torch.serialization", "torch.jit", "torch.hub", "torch.package", "torch.utils.model_zoo"),
    *("numpy.load", "numpy.lib.npyio", "numpy.lib.format.read_array", "numpy.lib.format.open_memmap"),
    *("yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader"),
    *("urllib.request", "shutil.unpack_archive"),
}
# Attributes of whatever object; the last are collectives that unpickle what other processes send.
BANNED_ATTRIBUTES = re.compile(r"extract|extractall|unpack_archive|\w+_(object|object_list)")
OWN_OBJECTS = {"construct_object"}  # of PyYAML's loaders
# The one place that reads a pickle, which the user has named, as tensors alone.
UNPICKLER = "remap.backbones.checkpoints.read"
# Where a name becomes code: the tables, whose targets stand in the source.
IMPORTERS = {"remap.registry", "remap.__init__", "remap_cli.app"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules a file imports, wherever the statement stands; ``from remap import x`` counts as remap.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES or f"{name}.__init__" in FILES else node.module for name in inner)


def layer_of(module: str) -> int:
    module = f"{module}.__init__" if f"{module}.__init__" in FILES and module.count(".") else module
    fitting = [(len(name), level) for level, names in enumerate(LAYERS) for name in names if starts(module, name)]
    return max(fitting)[1]


def starts(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


@cache
def tree_of(module: str) -> ast.AST:
    return ast.parse(FILES[module].read_text())


@cache
def imports_of(module: str) -> frozenset[str]:
    return frozenset(imports(tree_of(module)))


def test_imports_point_down() -> None:
    def is_upward(name: str, module: str) -> bool:
        ours = starts(name, "remap") or starts(name, "remap_cli")
        return ours and name not in ("remap", "remap_cli") and layer_of(name) > layer_of(module)

    assert [(module, name) for module in FILES for name in imports_of(module) if is_upward(name, module)] == []


def test_packages_stay_in_their_homes() -> None:
    def is_away(name: str, module: str) -> bool:
        homes = HOMES.get(name.split(".")[0])
        return homes is not None and not any(starts(module, home) for home in homes)

    assert [(module, name) for module in FILES for name in imports_of(module) if is_away(name, module)] == []


def test_the_library_never_asks_the_command_line() -> None:
    words = {"remap_cli", "typer", "rich", "click"}
    library = [name for name in FILES if starts(name, "remap")]
    assert [module for module in library if {name.split(".")[0] for name in imports_of(module)} & words] == []


def meanings(tree: ast.AST) -> dict[str, str]:
    """Names of a file that stand for something imported, with its full name; whatever it is called here."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):  # load = torch.load, and t = torch
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            full = full_name(node.value, found)
            if full.split(".")[0] in {name.split(".")[0] for name in BANNED}:
                found |= {target.id: full for target in node.targets if isinstance(target, ast.Name)}
    return found


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """What an expression names, as in torch.jit.load; of other expressions only their attributes."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    if isinstance(node, ast.Call) and full_name(node.func, names) == "getattr" and len(node.args) > 1:
        attribute = node.args[1]
        return f"{full_name(node.args[0], names)}.{attribute.value if isinstance(attribute, ast.Constant) else '?'}"
    return "?"


def unsafe(tree: ast.AST, module: str = "") -> list[str]:
    """What a file names that is banned, whether it is called or passed on."""
    names, found = meanings(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            inside = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found += [f"{inside}{alias.name}" for alias in node.names]
        elif not isinstance(getattr(node, "ctx", None), ast.Store):  # a field may be called compile
            found.append(full_name(node, names))
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if (
                    keyword.arg == "weights_only"
                    if false
                    else keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
                ):
                    found.append(f"eval: {keyword.arg}")
    allowed = {"importlib.import_module"} if module in IMPORTERS else set()
    if module == UNPICKLER and all(_reads_weights_only(node) for node in ast.walk(tree) if isinstance(node, ast.Call)):
        allowed = {"torch.load", "torch.serialization", "torch.serialization.safe_globals"}
    return [name for name in found if is_banned(name) and name not in allowed]


def _reads_weights_only(call: ast.Call) -> bool:
    weights_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
    return weights_only or not ast.unparse(call.func).endswith("torch.load")


def is_banned(name: str) -> bool:
    last = name.rpartition(".")[2]
    attribute = last != name and BANNED_ATTRIBUTES.fullmatch(last) and last not in OWN_OBJECTS
    return bool(attribute) or last == "*" or any(starts(name.replace(":", "."), one) for one in BANNED)


@pytest.mark.guarantee(14)
def test_nothing_runs_or_unpacks_what_a_file_says() -> None:
    assert {module: found for module in FILES if (found := unsafe(tree_of(module), module))} == {}


@pytest.mark.parametrize(
    "text",
    [
        *("torch.load(p)", "from torch import load as read", "import torch as t; t.load(p)", "from torch import jit"),
        *("read = torch.load", "import torch\nt = torch\nt.load(p)", "getattr(torch, 'load')(p)"),
        "map(torch.load, ps)",
        *("torch.jit.load(p)", "import torch.hub", "from torch.hub import load_state_dict_from_url"),
        *("import numpy as np; np.load(p)", "from numpy import load", "f(allow_pickle=True)"),
        *("import pickle", "from pickle import loads", "import _pickle as p", "from torch import *"),
        *("import torch.distributed as d; d.all_gather_object(a, b)", "from accelerate.utils import gather_object"),
        *("torch.distributed.broadcast_object_list(x)", "from torch.distributed import scatter_object_list as s"),
        *("eval(x)", "run = exec", "import builtins; builtins.eval(x)", "import os; os.system(x)"),
        *("from os import popen", "tar.extractall(p)", "run(x, shell=True)", "f(p, weights_only=False)"),
        "import importlib as i; i.import_module(x)",
    ],
)  # fmt: skip
def test_unsafe_calls_are_seen_whatever_they_are_called(text: str) -> None:
    assert unsafe(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "re.compile(x)",
        "json.load(f)",
        "run(x, shell=False)",
        "f(weights_only=True)",
        "import numpy as np",
    ],
)
def test_safe_calls_are_not_refused(text: str) -> None:
    assert unsafe(ast.parse(text)) == []


def test_yaml_is_read_by_a_safe_loader_only() -> None:
    tree = tree_of("remap.recipe.strict_yaml")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load"]
    loaders = [ast.unparse(keyword.value) for call in calls for keyword in call.keywords if keyword.arg == "Loader"]
    bases = {
        node.name: [ast.unparse(b) for b in node.bases] for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    }
    assert loaders == ["_Loader"] and bases["_Loader"] == ["yaml.SafeLoader"]


def test_the_reading_of_imports_sees_what_it_should() -> None:
    """The tests above would pass on an empty list; these facts are visible in the files."""
    assert "remap.recipe.schema" in imports_of("remap.recipe.resolution")
    assert "remap.data.keyed_random" in imports_of("remap.data.batches")
    assert layer_of("remap.tuning") < layer_of("remap.recipe.schema") < layer_of("remap.engine.loop")
    assert layer_of("remap.errors") == 0 and layer_of("remap_cli.main") == len(LAYERS) - 1


def test_no_circle_of_files() -> None:
    """Imports inside functions count too: they hide a circle, and do not end it."""
    edges = {module: {name for name in imports_of(module) if name in FILES} - {module} for module in FILES}
    circles = [sorted(circle) for circle in circles_of(edges)]
    assert circles == []
    assert circles_of({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


def circles_of(edges: dict[str, set[str]]) -> list[set[str]]:
    """Modules that reach each other, by repeatedly taking away what imports nothing, or is imported by nothing."""
    left = {module: set(targets) for module, targets in edges.items()}
    while True:
        targets = set().union(*left.values()) if left else set()
        ends = {module for module in left if not left[module] & left.keys() or module not in targets}
        if not ends:
            break
        left = {module: reached - ends for module, reached in left.items() if module not in ends}
    return [set(left)] if left else []


def test_the_root_is_small() -> None:
    at_the_root = [name for name in FILES if name.startswith("remap.") and name.count(".") == 1]
    assert len(at_the_root) <= 7, sorted(at_the_root)
