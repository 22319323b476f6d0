"""Words, files and overrides become one recipe, or one error that lists everything."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remap.errors import LINE, RecipeError
from remap.recipe import Recipe, catalogue, resolve, resolve_distill, validate
from remap.recipe.option_listing import surely_valid
from remap.recipe.schema import TeacherSpec
from remap.registry import Registry
from remap.tuning import METHODS


def problems(*args: Any, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        resolve(*args, **kwargs)
    return caught.value.problems


def test_the_package_imports_no_torch() -> None:
    code = "import sys, remap.recipe, remap.recipe.catalogue as c; c.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_wrong_with_a_file_and_its_overrides_comes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "nmae: x\nseed: -1\ndata: {augment: shfit}\nteacher: {model: a, prepare: porbe}\nmethod: vpt_dep\n"
        "losses: [ce, kdd]\ntrain: {epochs: 0, lrr: 1}\n"
    )
    with pytest.raises(RecipeError) as caught:
        resolve(path, settings=["train.precision=[1", "bad", "trian.lr=1"])
    error = caught.value
    assert str(error).startswith(f"{path}: {len(error.problems)} problems\n  - ") and error.exit_code == 2
    expected = [
        ("--set train.precision=[1: line 1, column 3:", ""),
        ("--set bad: write section.field=value", ""),
        ("nmae: unknown key", "did you mean 'name'?"),
        ("seed: should be greater than or equal to 0", "got -1"),
        ("data.augment: 'shfit' is not one of none, light, strong, custom, shift, shift_flip", "did you mean 'shift'?"),
        ("teacher.prepare: unknown word 'porbe'", "did you mean 'probe'?"),
        ("method.name: unknown method 'vpt_dep'", "did you mean 'vpt_deep'?"),
        ("losses[1].name: unknown loss 'kdd'", "did you mean 'kd'?"),
        ("train.epochs: should be greater than or equal to 1", "got 0"),
        ("train.lrr: unknown key", "did you mean 'lr'?"),
        ("trian: unknown key", "did you mean 'train'?"),  # and who wrote it: see below
    ]
    for start, rest in expected:
        assert any(line.startswith(start) and rest in line for line in error.problems), start
    assert len(error.problems) == len(expected)
    assert [line for line in error.problems if line.endswith(" (command line)")] == [
        line for line in error.problems if line.startswith("trian")
    ]


@pytest.mark.parametrize(
    ("words", "settings", "where"),
    [
        ({"method": "foo"}, [], "command line"),
        ({}, ["method.num_prompt=3"], "command line"),
        ({"losses": "ce,kdd"}, [], "command line"),
        ({}, ["losses.kd.temperature=0"], "command line"),
        ({"epochs": 1}, ["train.warmup_epochs=1"], "command line"),
        ({}, ["seed"], "command line"),
    ],
)
def test_a_recipe_is_not_blamed_for_words_beside_it(words: dict, settings: list[str], where: str) -> None:
    for name in ("digits", catalogue.find("digits")):
        with pytest.raises(RecipeError, match=f"^{where}: 1 problem"):
            resolve(name, words, settings)
    with pytest.raises(RecipeError, match=f"^{where}: 1 problem"):
        resolve_distill(None, words, settings)


def test_a_file_is_blamed_for_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: foo\ntrain: {warmup_epochs: 5}\n")
    with pytest.raises(RecipeError) as caught:
        resolve(path, {"epochs": 3, "seed": -1})
    assert caught.value.where == str(path)
    own, given = [], []
    for line in caught.value.problems:
        (given if line.endswith(" (command line)") else own).append(line.partition(":")[0])
    # Without --epochs 3 the file's warm-up would fit.
    assert (own, given) == (["method.name"], ["seed", "train.warmup_epochs"])


@pytest.mark.parametrize(
    ("method", "setting", "hint"),
    [
        ("lora", "rank=4", "did you mean 'method.rank'?"),
        ("lora+ssf", "rank=4", "did you mean 'method.lora.rank'?"),
        ("bitfit", "rank=4", "'method.rank' is an option of lora"),
        ("bitfit", "lr=1", "did you mean 'train.lr' or 'teacher.lr'?"),
        ("bitfit", "augment=shift", "did you mean 'data.augment'?"),
        ("bitfit", "sead=1", "did you mean 'seed'?"),
    ],
)
def test_a_field_without_its_section_is_found(method: str, setting: str, hint: str) -> None:
    (line,) = problems(words={"method": method}, settings=[setting])
    assert line.startswith(f"{setting.partition('=')[0]}: unknown key; {hint}")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("vpt_deep,lora", "'vpt_deep,lora' is a list; did you mean 'vpt_deep+lora'"),
        ("vpt_deep+", "a name is missing after '+'"),
        ("+lora", "a name is missing before '+'"),
        ("lora++ssf", "a name is missing after '+'"),
    ],
)
def test_a_combination_that_is_not_spelled_right(method: str, says: str) -> None:
    assert problems(words={"method": method})[0].startswith(f"method.name: {says}")
    (line,) = problems(words={"teacher": "a"}, settings=[f"teacher.prepare={method}"])
    assert line.startswith(f"teacher.prepare: {says}")


def test_a_teacher_may_be_prepared_by_a_combination() -> None:
    assert resolve(words={"teacher": "a"}, settings=["teacher.prepare=lora+ssf"]).teacher.prepare == "lora+ssf"
    (line,) = problems(words={"teacher": "a"}, settings=["teacher.prepare=lora+linear"])
    assert line == "teacher.prepare: 'linear' cannot be combined with other methods"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[foo]", "method.targets[0]: 'foo' is not one of q, k, v, o, fc1, fc2"),
        ("q", "method.targets: should be a list, got 'q'; write [q]"),
        ("[]", "method.targets: tuple should have at least 1 item"),
    ],
)
def test_a_list_that_is_none_is_one_line(value: str, says: str) -> None:
    (line,) = problems(words={"method": "lora"}, settings=[f"method.targets={value}"])
    assert line.startswith(says)


@pytest.mark.parametrize(
    ("loss", "setting", "says"),
    [
        ("tokens", "layers=5", "losses[1].layers: '5' is not one of last, uniform, and no list"),
        ("tokens", "layers=lst", "losses[1].layers: 'lst' is not one of last, uniform, and no list; did you mean"),
        ("tokens", "layers=[[0]]", "losses[1].layers[0][1]: missing, got [0]"),
        ("tokens", "layers=[[0, a]]", "losses[1].layers[0][1]: should be a whole number"),
        ("torchdistill", "options={dist_factor: [1]}", "losses[1].options.dist_factor: should be true or false or a"),
        ("torchdistill", "loss=ATLoss", "losses[1]: ATLoss cannot read"),
    ],
)
def test_a_value_of_several_kinds_is_one_line(loss: str, setting: str, says: str) -> None:
    (line,) = problems(words={"teacher": "a", "losses": f"ce,{loss}"}, settings=[f"losses.{loss}.{setting}"])
    assert line.startswith(says)


def test_losses_on_maps_that_a_method_enlarges_are_refused() -> None:
    """Places of the student's map and of the teacher's are then others; of the defaults they are left out."""
    (line,) = problems(words={"teacher": "a", "method": "vpt_pad+lora", "losses": "ce,kd,tokens"})
    assert line.startswith("losses: tokens cannot teach vpt_pad+lora, which enlarges the maps that it compares")
    free = resolve(words={"teacher": "a", "method": "vpt_pad", "data": {"source": None, "unlabeled": "photos"}})
    assert [loss.name for loss in free.losses] == ["feature"]


def test_a_section_is_not_shown_as_python_writes_it() -> None:
    """What is wrong with it is named already."""
    (line,) = problems(words={"teacher": "a", "student": "shrink(teacher"})
    assert line.endswith("(write shrink(teacher, depth=6, width=384, heads=6, mlp=1536))")


def test_an_unknown_loss_is_blamed_for_nothing_else() -> None:
    (line,) = problems(words={"teacher": "a", "losses": "tokenz"})
    assert line.startswith("losses[0].name: unknown loss 'tokenz'; did you mean 'tokens'?")


def test_a_loss_that_is_not_there_says_how_it_comes_in() -> None:
    (line,) = problems(words={"teacher": "a"}, settings=["losses.tokens.layers=uniform"])
    assert line.endswith("(the losses are ce,kd,attention; name them all: --losses ce,kd,attention,tokens)")


def test_words_may_be_whole_sections() -> None:
    """In Python; the words of single fields go into them, wherever they stand."""
    data, student = {"source": "photos", "mixup": 0.8}, {"model": "s", "image_size": 32}
    teachers = ["a", {"model": "b", "weight": 0.5}]
    recipe = resolve(words={"unlabeled": "more", "data": data, "student": student, "teacher": teachers})
    assert (recipe.data.source, recipe.data.unlabeled, recipe.data.mixup) == ("photos", "more", 0.8)
    assert (recipe.name, recipe.student.model, recipe.student.image_size) == ("photos", "s", 32)
    assert [(spec.model, spec.weight) for spec in recipe.teachers] == [("a", 1.0), ("b", 0.5)]


@pytest.mark.parametrize("word", ["a,", ",a", "a,,b:0.5"])
def test_a_teacher_without_a_name_is_refused(word: str) -> None:
    (line,) = problems(words={"teacher": word})
    assert line == f"teacher: a name is missing in '{word}'"


def test_a_weight_that_is_no_number_is_said_before_a_model_is_looked_for() -> None:
    (line,) = problems(words={"teacher": "mini_teacher:0.5,mini_conv:x"})
    assert line == "teacher: the weight after the colon must be a number, got 'x'"
    assert resolve(words={"teacher": "local-dir:x"}).teacher.model == "local-dir:x"


def test_a_file_that_is_no_yaml_and_a_broken_setting_come_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: 1\na: 2")
    found = problems(path, settings=["seed=*x"])
    assert found == (
        "line 2, column 1: key 'a' is given twice",
        "--set seed=*x: line 1, column 1: aliases (*name) are not allowed",
    )


def test_options_are_reported_beside_broken_fields() -> None:
    settings = ["train.epochs=0", "method=vpt_deep", "method.num_prompt=3", "losses=[{name: ce, wieght: 1}]"]
    found = problems(settings=settings)
    assert len(found) == 3
    assert any(line.startswith("method.num_prompt: unknown key; did you mean 'num_prompts'?") for line in found)
    assert any(line.startswith("losses[0].wieght: unknown key; did you mean 'weight'?") for line in found)


@pytest.mark.parametrize(
    ("settings", "path", "value"),
    [
        (["train.lr=3e-4"], "train.lr", 3e-4),
        (["train.lr=1"], "train.lr", 1.0),
        (["data.val_source=a=b"], "data.val_source", "a=b"),
        (["train.fused_attention=off"], "train.fused_attention", "off"),
        (["train.clip_norm=null"], "train.clip_norm", None),
        (["seed=1", "seed=2"], "seed", 2),
        (["student.model=vit_tiny"], "student.model", "vit_tiny"),
        (["student.weights=none", "student=vit_tiny"], "student.weights", "none"),
        (["method.name=bitfit"], "method.name", "bitfit"),
    ],
)
def test_a_setting_reaches_its_field(settings: list[str], path: str, value: Any) -> None:
    found: Any = resolve(settings=settings)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
def test_an_option_of_a_method_given_as_a_word(method: str) -> None:
    spec = resolve(words={"method": method}, settings=["method.num_prompts=5"]).method
    assert (spec.name, spec.options) == (method, {"num_prompts": 5})


def test_a_method_takes_its_own_options_of_the_recipe_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: {name: vpt_deep, num_prompts: 3}")
    assert resolve(tmp_path / "a.yaml", {"method": "vpt_deep"}).method.options == {"num_prompts": 3}
    assert resolve(tmp_path / "a.yaml", settings=["method=vpt_deep"]).method.options == {"num_prompts": 3}
    assert resolve(tmp_path / "a.yaml", {"method": "bitfit"}).method.options == {}


@pytest.mark.parametrize(
    "form",
    [
        "teacher: [a, {model: b, weight: 2}]",
        "teachers: [a, {model: b, weight: 2}]",
        "teacher: a\nmore_teachers: [{model: b, weight: 2}]",
        "teacher: [a]\nmore_teachers: {model: b, weight: 2}",
    ],
)
def test_the_teachers_of_a_recipe_can_be_named_anew_and_set(tmp_path: Path, form: str) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(f"name: two\n{form}\n")

    def found(words: dict[str, str], *settings: str) -> list[tuple[str, float, bool]]:
        teachers = resolve(path, words, settings).teachers
        return [(teacher.model, teacher.weight, teacher.allow_weak) for teacher in teachers]

    assert found({}, "teacher.allow_weak=true") == [("a", 1.0, True), ("b", 2.0, False)]
    assert found({"teacher": "c"}) == [("c", 1.0, False)]
    assert found({"teacher": "c:3,ema"}, "teacher.allow_weak=true") == [("c", 3.0, True), ("ema", 1.0, False)]


@pytest.mark.parametrize("form", ["teacher: a", "teacher: {model: a}", "teacher: [a]", "teachers: a", "teachers: [a]"])
def test_one_teacher_is_a_list_of_one(tmp_path: Path, form: str) -> None:
    (tmp_path / "one.yaml").write_text(f"name: one\n{form}\nmore_teachers: []\n")
    recipe = resolve(tmp_path / "one.yaml", settings=["teacher.prepare=full"])
    assert recipe.teachers == (recipe.teacher,) == (TeacherSpec(model="a", prepare="full"),)
    assert resolve(tmp_path / "one.yaml", {"teacher": "c"}, ["teacher.prepare=full"]).teacher.model == "c"


def test_each_of_several_teachers_is_set_by_its_number() -> None:
    settings = ["teacher.prepare=probe", "teacher.2.prepare=full", "teacher.3.epochs=4"]
    teachers = resolve(words={"teacher": "a,b:0.5,c"}, settings=settings).teachers
    assert [(one.prepare, one.epochs) for one in teachers] == [("probe", None), ("full", None), ("probe", 4)]
    listed = resolve(words={"teacher": ["a", "b"]}, settings=["teacher.2.weight=3", "teacher.1.weight=2"]).teachers
    assert [one.weight for one in listed] == [2.0, 3.0]
    for number in (0, 3):
        (line,) = problems(words={"teacher": "a,b"}, settings=[f"teacher.{number}.weight=3"])
        assert line == f"teacher.{number}.weight: there are 2 teachers, counted from 1"


def test_a_problem_of_one_teacher_of_several_has_its_number() -> None:
    (line,) = problems(words={"teacher": ["a", {"model": "b", "prepare": "porbe"}]})
    assert line.startswith("teachers[1].prepare: unknown word 'porbe'; did you mean 'probe'?")
    (line,) = problems(words={"teacher": ["a", {"model": "b", "wieght": 2}]})
    assert line.startswith("teachers[1].wieght: unknown key; did you mean 'weight'?")


@pytest.mark.parametrize("settings", [["teacher=a", "losses.kd.weight=2"], ["losses.kd.weight=2", "teacher=a"]])
def test_a_loss_is_reached_by_name_in_any_order(settings: list[str]) -> None:
    losses = resolve(settings=settings).losses
    assert [(loss.name, loss.weight) for loss in losses] == [("ce", 1.0), ("kd", 2.0), ("attention", 1.0)]
    (ce, kd) = resolve(words={"teacher": "a", "losses": "ce,kd:0.5"}, settings=["losses.kd.temperature=2"]).losses
    assert (kd.weight, kd.options, ce.options) == (0.5, {"temperature": 2}, {})


REFUSED = {
    "noequals": "--set noequals: write section.field=value",
    "=3": "--set =3: write section.field=value",
    "train..lr=1": "--set train..lr=1: write section.field=value",
    "trian.lr=1": "trian: unknown key; did you mean 'train'?",
    "train.lrr=1": "train.lrr: unknown key; did you mean 'lr'?",
    "losses.kd.weight=1": "losses.kd.weight: there is no 'kd' to set a field of",
    "losses.ce=1": "losses.ce: cannot be set",
    "losses.ce.wieght=1": "losses[0].wieght: unknown key; did you mean 'weight'?",
    "method.num_prompt=1": "method.num_prompt: unknown key; did you mean 'num_prompts'?",
    "method.num_prompts=0": "method.num_prompts: should be greater than or equal to 1, got 0",
    "seed.x=1": "seed: should be a whole number",
    "train.epochs=3.0": "train.epochs: should be a whole number",
    "train.epochs=true": "train.epochs: should be a whole number",
    "losses=ce:x": "losses: 'ce:x': the weight after the colon must be a number",
    "losses=[]": "losses: at least one loss is needed",
    "losses=ce:0": "losses: every weight is 0, nothing would be learned",
    "losses=ce,ce": "losses: 'ce' is given twice",
    "losses=kd": "losses: kd needs a teacher (remap distill --teacher MODEL, in a recipe teacher.model; or use ce",
    "train={lr: 1e-4, min_lr: 1e-3}": "train.min_lr: 0.001 is above the peak, train.lr 0.0001: the rate would not fall",
    "train.warmup_epochs=30": "train.warmup_epochs: 30.0 must be less than train.epochs 30",
    "train.accumulation=7": "train.batch_size: 64 is not a multiple of accumulation 7",
    "name=a/b": "name: 'a/b' may hold letters",
    "student.init.which=first": "student.init.name: missing; it says of what these are options: which",
}


@pytest.mark.parametrize(("setting", "expected"), REFUSED.items(), ids=list(REFUSED))
def test_a_setting_that_cannot_be_is_one_line(setting: str, expected: str) -> None:
    (line,) = problems(words={"method": "vpt_deep"}, settings=[setting])
    assert line.startswith(expected)


def test_words_and_settings_have_an_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\ntrain: {epochs: 3, lr: 0.1}\n")
    found = resolve(tmp_path / "a.yaml", {"seed": 2, "epochs": 4, "lr": None}, ["train.epochs=5"])
    assert (found.seed, found.train.epochs, found.train.lr) == (2, 5, 0.1)


def test_weights_go_to_both_models_and_only_to_models_there_are() -> None:
    both = resolve(words={"teacher": "a", "weights": "none"})
    assert (both.teacher.weights, both.student.weights) == ("none", "none")
    assert resolve(words={"weights": "none"}).teacher is None


def test_an_unknown_word_is_refused() -> None:
    (line,) = problems(words={"techer": "vit_large"})
    assert line.startswith("techer: unknown word; did you mean 'teacher'?")


@pytest.mark.parametrize(("word", "expected"), [("digts", "did you mean 'digits'?"), ("no/such.yaml", "no such file")])
def test_a_recipe_that_is_not_there(word: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=f"^{word}: 1 problem") as caught:
        resolve(word)
    assert expected in str(caught.value)


def test_options_are_left_alone_where_torch_must_not_be_imported() -> None:
    assert validate({"method": {"name": "vpt_deep", "nam": 1}}, "x", check_options=False).method.options == {"nam": 1}


@pytest.mark.parametrize(
    ("table", "name", "options", "sure"),
    [
        (METHODS, "lora", {"rank": 4, "dropout": 0.5, "alpha": 2.0}, False),
        (METHODS, "lora", {"rank": 4, "dropout": 0.5}, True),
        (METHODS, "lora", {"rank": 0}, False),
        (METHODS, "lora", {"rank": True}, False),
        (METHODS, "lora", {"dropout": 1.0}, False),
        (METHODS, "lora", {"rnk": 4}, False),
        (METHODS, "adaptformer", {"layernorm": "out"}, True),
        (METHODS, "adaptformer", {"layernorm": "off"}, False),
        (METHODS, "adaptformer", {"layernorm": ["in"]}, False),
        (METHODS, "repadapter", {"groups": 2}, False),
        (METHODS, "full", {}, True),
    ],
)
def test_what_the_table_of_options_knows_to_be_right(
    table: Registry[Any], name: str, options: dict[str, Any], sure: bool
) -> None:
    """In doubt the class decides: of a list, of "or null", and of a class that compares its options."""
    assert surely_valid(table, name, options) is sure
    if sure:
        table.load(name).Config(**options)


def test_defaults_need_nothing() -> None:
    assert resolve() == Recipe() and catalogue.find("digits").is_file()


def test_a_list_of_all_methods_is_several_lines_with_every_name_complete() -> None:
    with pytest.raises(RecipeError, match="unknown method 'zzzzzz'") as caught:
        resolve(words={"method": "zzzzzz"})
    text = str(caught.value)
    assert max(map(len, text.splitlines())) <= LINE and set(METHODS.names) <= set(re.findall(r"\w+", text))


@pytest.mark.parametrize("option", ["lora.rank", "rank"])
def test_an_option_of_another_method_names_the_method_that_is_set(option: str) -> None:
    (line,) = problems(words={"method": "bitfit"}, settings=[f"method.{option}=4"])
    assert line.startswith(f"method.{option.partition('.')[0]}: unknown key") and "(allowed for bitfit: name" in line


def test_an_unknown_method_names_all_only_where_none_is_near() -> None:
    (near,), (far,) = (problems(words={"method": name}) for name in ("vpt_dep", "zzzzzz"))
    assert near.endswith("did you mean 'vpt_deep'? (`remap methods` lists all)")
    assert far.startswith("method.name: unknown method 'zzzzzz' (allowed: ") and "vpt_deep, " in far
