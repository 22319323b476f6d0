"""Properties of every input that people or strangers write: whatever it is, the answer is a result or a RemapError.

Hypothesis draws the inputs from a fixed seed, so that a run of the tests is the same everywhere and every time.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remap.data.images import BadImage, decode
from remap.data.sources import open_data, open_unlabeled
from remap.errors import RecipeError, RemapError
from remap.io.checked_json import parse_json
from remap.io.names import plain
from remap.io.sealed_json import sealed_text
from remap.pipeline.run import start
from remap.recipe import Recipe, dump, resolve, strict_yaml
from remap.recipe.paths import absolute, absolute_data, absolute_model, absolute_weights, is_run
from remap.recipe.resolution import WORDS
from remap.recipe.schema import DataSpec, StudentSpec, TeacherSpec, TrainSpec
from remap.remapping import LOSSES
from remap.runs.run_dir import RunDir
from remap.runs.task import load_task
from remap.tuning import METHODS

EXAMPLES = 300
REPEATABLE = settings(
    derandomize=True,
    deadline=None,
    max_examples=EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.guarantee(15)

SECTIONS = {"data": DataSpec, "teacher": TeacherSpec, "student": StudentSpec, "train": TrainSpec}
KEYS = sorted({*Recipe.model_fields, *(name for spec in SECTIONS.values() for name in spec.model_fields), "name"})
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [*METHODS.names, *LOSSES.names, "digits", "none", "self", "ema", "pretrained", "auto", "~", "..", ""]
    ),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**63, 2**70, 1e308]), words
)
keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=8,
)
recipes = st.dictionaries(keys, values, max_size=5)
places = st.one_of(
    st.sampled_from([f"{section}.{name}" for section, spec in SECTIONS.items() for name in spec.model_fields]),
    st.sampled_from(["losses.kd.weight", "method.rank", "losses", "method", "teacher", "student.init.which", "name"]),
    st.lists(keys, min_size=1, max_size=4).map(".".join),
)
yaml_text = st.one_of(
    st.text(alphabet="{}[]:,-?&*!|>'\"%@`#\n\t ab01.eE~<=\0\x85\u2028", max_size=60),
    st.text(max_size=60),
    values.map(lambda value: json.dumps(value)),
)


def answered(call: Callable[[], Any], kind: type[RemapError] = RemapError) -> bool:
    """Whether it gave a result; if not, its error is one of ours, in plain letters."""
    try:
        call()
    except kind as error:
        text = str(error)
        assert text and error.exit_code == 2 and len(text) < 50_000
        assert "Traceback" not in text and "pydantic" not in text
        return False
    return True


@pytest.mark.slow
def test_recipes_of_any_values(figure: Callable[..., None]) -> None:
    """Values of any shape under known and unknown keys; what is accepted survives its own writing and reading."""
    seen: Counter[bool] = Counter()

    @REPEATABLE
    @given(recipes)
    def check(value: dict[str, Any]) -> None:
        def call() -> None:
            text = json.dumps(value)  # JSON but for NaN is YAML
            recipe = resolve_text(text)
            assert Recipe.model_validate(strict_yaml.parse(dump(recipe), "again")) == recipe

        seen[answered(call, RecipeError)] += 1

    check()
    assert seen[False] > 0
    figure("recipes fuzzed, tracebacks", 0, seen.total())


def resolve_text(text: str) -> Recipe:
    from remap.recipe import validate

    value = strict_yaml.parse(text, "fuzz")
    return validate(value if isinstance(value, dict) else {}, "fuzz")


@pytest.mark.slow
def test_recipe_files_of_any_text_and_bytes(tmp_path: Path, figure: Callable[..., None]) -> None:
    seen: Counter[bool] = Counter()
    path = tmp_path / "x.yaml"

    @REPEATABLE
    @given(st.one_of(yaml_text.map(lambda text: text.encode(errors="surrogatepass")), st.binary(max_size=80)))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        seen[answered(lambda: resolve(path), RecipeError)] += 1

    check()
    assert seen[False] > 0
    figure("recipes fuzzed, tracebacks", 0, seen.total())


@pytest.mark.slow
def test_overrides_of_any_look(figure: Callable[..., None]) -> None:
    seen: Counter[bool] = Counter()

    @REPEATABLE
    @given(st.lists(st.tuples(places, yaml_text).map("=".join), min_size=1, max_size=3))
    def check(settings: list[str]) -> None:
        seen[answered(lambda: resolve(settings=settings), RecipeError)] += 1

    check()
    assert seen[False] > 0
    figure("overrides fuzzed, tracebacks", 0, seen.total())


def test_words_of_the_command_line_of_any_look(figure: Callable[..., None]) -> None:
    seen: Counter[bool] = Counter()
    named = st.sampled_from([name for name in WORDS if name not in ("force_init", "skip_bad")])

    @REPEATABLE
    @given(st.dictionaries(named, st.one_of(words, st.integers(), st.floats()), min_size=1, max_size=3))
    def check(given_words: dict[str, Any]) -> None:
        seen[answered(lambda: resolve(words=given_words).written_out().digest(), RecipeError)] += 1

    check()
    assert seen[False] > 0
    figure("overrides fuzzed, tracebacks", 0, seen.total())


anything = st.one_of(
    st.text(st.characters(), max_size=40),
    st.binary(max_size=40).map(lambda data: data.decode(errors="surrogateescape")),
    st.lists(st.sampled_from(["..", "~", "~x", "/", "a", "", ".", "local-dir:", "\0", "x" * 300]), max_size=9).map(
        "/".join
    ),
)


def test_paths_of_any_look(figure: Callable[..., None]) -> None:
    seen: Counter[bool] = Counter()

    @REPEATABLE
    @given(anything)
    def check(word: str) -> None:
        assert is_run(word) is False
        for call in (absolute, absolute_data, absolute_model, absolute_weights):
            assert call(call(word)) == call(word)
        if Path(word).name != "" and not word.startswith(("/", "~", ".")):
            seen[answered(lambda: open_data(f"nowhere-{word}", None, 0.5))] += 1
            seen[answered(lambda: RunDir.open(Path(f"nowhere-{word}")))] += 1
            seen[answered(lambda: load_task(Path(f"nowhere-{word}")))] += 1
            seen[answered(lambda: resolve(f"nowhere-{word}.yaml"))] += 1

    check()
    assert seen[True] == 0 < seen[False]
    figure("paths fuzzed, tracebacks", 0, EXAMPLES)


@pytest.fixture(scope="module")
def task(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny.recipe("train.epochs=1", method="bitfit", losses="ce")
    return RunDir(start(recipe, tmp_path_factory.mktemp("fuzz") / "run").run_dir).task


def leaves(value: Any, place: tuple = ()) -> list[tuple]:
    """Places of all values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, one in inner for found in leaves(one, (*place, key)))]


def with_value(value: Any, place: tuple, new: Any) -> Any:
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = with_value(value[place[0]], place[1:], new)
    return copy


@pytest.mark.slow
def test_task_files_of_any_json(task: Path, tmp_path: Path, figure: Callable[..., None]) -> None:
    """One value of a valid task.json is replaced, or all of it."""
    seen: Counter[bool] = Counter()
    good = json.loads((task / "task.json").read_text())
    del good["seal"]
    (tmp_path / "task.safetensors").write_bytes((task / "task.safetensors").read_bytes())

    @REPEATABLE
    @given(st.sampled_from(leaves(good)), values)
    def check(place: tuple, new: Any) -> None:
        changed = with_value(good, place, new)
        with suppress(ValueError):  # of a number that is not finite, or half a character
            text = sealed_text(changed) if isinstance(changed, dict) else json.dumps(changed)
            (tmp_path / "task.json").write_text(text)
        seen[answered(lambda: load_task(tmp_path))] += 1

    check()
    assert seen[False] > 0
    figure("task files fuzzed, tracebacks", 0, seen.total())


@pytest.mark.slow
def test_task_files_of_any_bytes(task: Path, tmp_path: Path, figure: Callable[..., None]) -> None:
    """Bytes of task.json and task.safetensors are changed, cut or replaced; with a checksum that fits, and without."""
    seen: Counter[bool] = Counter()
    text, data = (task / "task.json").read_bytes(), (task / "task.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")

    @REPEATABLE
    @given(st.booleans(), st.booleans(), st.integers(0, header), st.binary(max_size=12), st.integers(0, 12))
    def check(in_text: bool, fitting: bool, place: int, new: bytes, gone: int) -> None:
        old = text if in_text else data
        changed = old[:place] + new + old[place + gone :]
        (tmp_path / "task.safetensors").write_bytes(data if in_text else changed)
        meta = changed if in_text else text
        if fitting and not in_text:
            body = {name: value for name, value in json.loads(text).items() if name != "seal"}
            meta = sealed_text(body | {"sha256": hashlib.sha256(changed).hexdigest()}).encode()
        (tmp_path / "task.json").write_bytes(meta)
        same = changed == old
        loads = answered(lambda: load_task(tmp_path))
        assert loads or not same
        assert same or not loads or (fitting and not in_text)
        seen[same] += 1

    check()
    figure("task files fuzzed, tracebacks", 0, seen.total())


def test_archives_and_images_of_any_bytes(tmp_path: Path, figure: Callable[..., None]) -> None:
    seen: Counter[bool] = Counter()
    buffer = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (5, 4), 7).save(buffer, format="PNG")
    picture = buffer.getvalue()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            file.addfile(info, io.BytesIO(picture))
    packed, path = archive.getvalue()[:6144], tmp_path / "x.tar"

    @REPEATABLE
    @given(st.integers(0, 6000), st.binary(max_size=20), st.booleans())
    def check(place: int, new: bytes, cut: bool) -> None:
        path.write_bytes(packed[:place] + new + (b"" if cut else packed[place + len(new) :]))
        seen[answered(lambda: open_unlabeled(str(path)))] += 1
        small = place % len(picture)
        changed = picture[:small] + new + (b"" if cut else picture[small + len(new) :])
        seen[answered(lambda: decode(changed), BadImage)] += 1

    check()
    assert seen[False] > 0
    figure("archives and images fuzzed, tracebacks", 0, seen.total())


@REPEATABLE
@given(st.text(st.characters(), max_size=60))
def test_plain_text_is_harmless_and_says_all(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable() and (shown == text) == text.isprintable()
    assert plain(shown) == shown


@REPEATABLE
@given(values)
def test_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    text = json.dumps(value)
    try:
        found = parse_json(text)
    except ValueError:
        assert "NaN" in text or "Infinity" in text
        return
    assert found == json.loads(text)
