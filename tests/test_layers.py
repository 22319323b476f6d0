"""The plan of the house, read from the imports: dependencies point down, and some packages have one home."""

import ast
from collections.abc import Iterator
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
    {"remap.backbones"},
    {"remap.tuning"},
    {"remap.remapping"},
    {"remap.recipe"},
    {"remap.network"},
    {"remap.distributed"},
    {"remap.cache"},
    {"remap.engine"},
    {"remap.runs"},
    {"remap.pipeline"},
    {"remap"},
    {"remap_cli"},
]
HOMES = {
    "yaml": ("remap.recipe.strict_yaml",),
    "torch_pruning": ("remap.remapping.architecture.pruning",),
    "torchdistill": ("remap.remapping.knowledge.torchdistill_bridge",),
    "peft": ("remap.tuning.parameter.peft_bridge",),
    "timm": ("remap.backbones", "remap_cli.models"),  # the listing of models asks timm for names
    "accelerate": ("remap.distributed", "remap.cache", "remap.engine", "remap.pipeline.probe"),
    "typer": ("remap_cli",),
    "rich": ("remap_cli",),
}
# Names whose use would run what a file says, or write where a file says.
BANNED_NAMES = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
BANNED_ATTRIBUTES = {"extract", "extractall", "unpack_archive", "unsafe_load", "full_load"}
BANNED_CALLS = {"os.system", "os.popen", "torch.load", "np.load", "yaml.load_all", "urllib.request.urlopen"}
# Where a name becomes code: the tables, whose targets stand in the source.
IMPORTERS = {"remap.registry", "remap.__init__"}


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


def tree_of(module: str) -> ast.AST:
    return ast.parse(FILES[module].read_text())


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    own = {name for name in imports(tree_of(module)) if starts(name, "remap") or starts(name, "remap_cli")}
    upward = [name for name in own - {"remap", "remap_cli"} if layer_of(name) > layer_of(module)]
    assert upward == []


@pytest.mark.parametrize("module", FILES)
def test_packages_stay_in_their_homes(module: str) -> None:
    for name in imports(tree_of(module)):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or any(starts(module, home) for home in homes), f"{name} has its home in {homes}"


@pytest.mark.parametrize("module", [name for name in FILES if starts(name, "remap")])
def test_the_library_never_asks_the_command_line(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(tree_of(module))} & {"remap_cli", "typer", "rich", "click"}


@pytest.mark.guarantee(14)
@pytest.mark.parametrize("module", FILES)
def test_nothing_runs_or_unpacks_what_a_file_says(module: str) -> None:
    tree = tree_of(module)
    assert not {name.split(".")[0] for name in imports(tree)} & BANNED_MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        assert not (isinstance(function, ast.Name) and function.id in BANNED_NAMES), ast.unparse(node)
        assert not (isinstance(function, ast.Attribute) and function.attr in BANNED_ATTRIBUTES), ast.unparse(node)
        assert ast.unparse(function) not in BANNED_CALLS, ast.unparse(node)
        assert "import_module" not in ast.unparse(function) or module in IMPORTERS, ast.unparse(node)
        for keyword in node.keywords:
            false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            assert keyword.arg not in ("shell", "trust_remote_code", "allow_pickle") or false, ast.unparse(node)
            assert not (keyword.arg == "weights_only" and false), ast.unparse(node)


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
    assert "remap.recipe.schema" in set(imports(tree_of("remap.recipe.resolve")))
    assert "remap.data.keyed_random" in set(imports(tree_of("remap.data.batches")))
    assert layer_of("remap.tuning") < layer_of("remap.recipe.schema") < layer_of("remap.engine.loop")
    assert layer_of("remap.errors") == 0 and layer_of("remap_cli.main") == len(LAYERS) - 1


def test_no_circle_of_files() -> None:
    """Imports inside functions count too: they hide a circle, and do not end it."""
    edges = {module: {name for name in imports(tree_of(module)) if name in FILES} - {module} for module in FILES}
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
