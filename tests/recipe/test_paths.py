"""Saved recipes work from any folder, and a folder that happens to be named like a model changes nothing."""

from pathlib import Path

import pytest

from remap.recipe import resolve


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("vit_small", "none", "pretrained", "photos", "run/task"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "task" / "task.json").write_text("{}")
    words = {"teacher": "run", "student": "vit_small", "data": "photos", "unlabeled": "digits"}
    recipe = resolve(words=words, settings=["student.weights=~/w.safetensors"]).written_out()
    assert recipe.teacher.model == str(tmp_path / "run")
    assert (recipe.student.model, recipe.teacher.weights) == ("vit_small", "pretrained")
    assert recipe.student.weights == str(tmp_path / "home" / "w.safetensors")
    assert recipe.data.source == str(tmp_path / "photos")
    assert recipe.data.unlabeled == str(tmp_path / "digits"), "no embedded images here, but a folder of that name"
    local = resolve(words={"student": "local-dir:m"}).written_out()
    assert local.student.model == f"local-dir:{tmp_path / 'm'}" and local.data.source == "digits"
    assert recipe.written_out() == recipe


def test_paths_in_options_of_methods_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a task could be opened from one folder alone."""
    monkeypatch.chdir(tmp_path)
    one = resolve(words={"method": "sidetune"}, settings=["method.side_weights=w.safetensors"]).written_out()
    assert one.method.options == {"side": "lcnet_075", "side_weights": str(tmp_path / "w.safetensors")}
    settings = [f"method.attention_copy.{option}" for option in ("teacher=local-dir:m", "weights=w.safetensors")]
    several = resolve(words={"method": "lora+attention_copy"}, settings=settings).written_out()
    options = several.method.options["attention_copy"]
    assert (options["teacher"], options["weights"]) == (f"local-dir:{tmp_path / 'm'}", str(tmp_path / "w.safetensors"))
    assert options["layers"] == "uniform" and several.written_out() == several


def test_the_digest_does_not_depend_on_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vit_small").mkdir()
    before = resolve(words={"student": "vit_small"}).digest()
    monkeypatch.chdir(tmp_path)
    assert resolve(words={"student": "vit_small"}).digest() == before
