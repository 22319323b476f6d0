"""report.html: what it says, what it leaves out, that names in it are only text, and how a browser shows it."""

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from remap.engine.evaluation_pass import evaluate_as
from remap.errors import RunError
from remap.pipeline.components import build_components
from remap.pipeline.evidence import write_evidence
from remap.pipeline.run import start
from remap.pipeline.shared import SharedResources
from remap.progress import Silent
from remap.report.compare_report import report_comparison
from remap.report.run_report import report_run
from remap.runs.answers import read_evidence
from remap.runs.run_dir import RunDir

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny.recipe("losses.attention.layers=uniform", method="vpt_deep", losses="ce,kd,attention,tokens")
    return start(recipe, tmp_path_factory.mktemp("report") / "run").run_dir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """Its class "red" has a name that a page must not run, as have its model and its command."""
    shutil.copytree(finished, tmp_path / "run")
    edit(tmp_path / "run" / "answers.json", lambda found: found["classes"].__setitem__(2, HOSTILE))
    edit(tmp_path / "run" / "summary.json", lambda found: found["student"].update(model=HOSTILE))
    (tmp_path / "run" / "command.txt").write_text(f"remap distill --data '{HOSTILE}'")
    return RunDir.open(tmp_path / "run")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Four methods by two seeds, in round numbers; what compare.json of `remap compare` holds."""

    def cell(first: float, second: float) -> dict[str, Any]:
        spread = abs(first - second) / 2**0.5
        return {"accuracies": [first, second], "mean": (first + second) / 2, "spread": spread, "seconds": 3.0}

    def row(category: str, method: str, parameters: int, alone: dict, teacher: dict) -> dict[str, Any]:
        gain = teacher["mean"] - alone["mean"]
        sizes = {"trainable_parameters": parameters, "total_parameters": 1_000_000, "task_bytes": 4 * parameters}
        gap = {"mean": gain, "low": gain - 0.01, "high": gain + 0.01, "distinguishable": gain > 0.01}
        known = {"name": method, "pareto": method != "full", "difference": {"to_alone": gap, "to_full": None}}
        means = {"alone": alone, "teacher": teacher, "gain": gain}
        return {"category": category, "method": method, **known, **means, **sizes}

    def pair(other: str, *, clear: bool) -> dict[str, Any]:
        return {"methods": [other, "lora"], "difference": {"distinguishable": clear}}

    table = {
        "recipe": "digits",
        "output": str(tmp_path),
        "data": HOSTILE,
        "epochs": 2,
        "batch_size": 32,
        "seeds": [0, 1],
        "losses": {"ce": 1.0, "kd": 1.0},
        "student": "mini_student",
        "teacher": {"model": "mini_teacher", "head": "full", "accuracy": 0.97},
        "more_teachers": [],
        "rows": [
            row("1 fine-tuning", "full", 1_000_000, cell(0.80, 0.82), cell(0.80, 0.83)),
            row("1 fine-tuning", "linear", 1_000, cell(0.70, 0.71), cell(0.71, 0.72)),
            row("4 parameter tuning", "lora", 20_000, cell(0.85, 0.86), cell(0.86, 0.88)),
            row("4 parameter tuning", "bitfit", 7_000, cell(0.84, 0.86), cell(0.86, 0.87)),
        ],
        "pairs": [pair("full", clear=True), pair("linear", clear=True), pair("bitfit", clear=False)],
    }
    (tmp_path / "compare.json").write_text(json.dumps(table))
    return tmp_path


class Page(HTMLParser):
    """The elements of a page, and its text, as a browser's own rules read them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def require_self_contained(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_a_run_in_one_page(run: RunDir) -> None:
    """9 evaluation images of 3 classes: the figures of the summary, every section, and names that stay text."""
    page, student = Page(report_run(run)), run.summary()["student"]
    require_self_contained(page)
    assert f"is right on {student['correct']} of 9 evaluation images" in page.text
    assert page.text.count(HOSTILE) >= 4  # a class, a model and a command
    for title in ("Accuracy", "Training", "Classes", "Calibration", "Which block taught which", "How it was made"):
        assert title in page.texts
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    evidence = json.loads((run.path / "answers.json").read_text())
    assert len(pictures) == len(evidence["worst"]) + 3 * len(evidence["attention"]["images"])
    drawn = {path.stem for path in (run.path / "report").glob("*.png")}
    assert drawn >= {"confusion", "reliability", "blocks", "curve-accuracy"}


def test_an_accuracy_that_was_measured_once_is_no_curve(run: RunDir) -> None:
    *earlier, last = run.metrics()
    assert earlier and "accuracy, %" in Page(report_run(run, pngs=False)).text
    run.write_metrics([*({"epoch": one["epoch"], "loss": one["loss"], "seconds": 1.0} for one in earlier), last])
    text = Page(report_run(run, pngs=False)).text
    assert "cross-entropy are computed, once, after the last epoch." in text and "accuracy, %" not in text


def test_equal_shares_and_few_classes_say_nothing_empty(run: RunDir) -> None:
    """The top-5 accuracy of three classes is 100 %; a difference of nothing has no side."""
    edit(run.path / "summary.json", lambda found: found.update(baseline={"accuracy": found["student"]["accuracy"]}))
    text = Page(report_run(run, pngs=False)).text
    assert "It is as good as the same student without a teacher" in text
    assert "balanced accuracy" in text and "top-5 accuracy" not in text


def test_blocks_have_the_numbers_of_the_summary(run: RunDir) -> None:
    """As in --dry-run and in recipes, the first block is 0."""
    text = Page(report_run(run, pngs=False)).text
    block = json.loads((run.path / "answers.json").read_text())["attention"]["blocks"]["student"]
    assert "counted from 0" in text and f"student: block {block}" in text


def test_the_worst_images_have_the_largest_losses(run: RunDir) -> None:
    found = json.loads((run.path / "answers.json").read_text())
    losses, answers = found["student"]["losses"], found["student"]["predictions"]
    wrong = [index for index in range(9) if answers[index] != found["labels"][index]]
    assert found["worst"] == sorted(wrong, key=lambda index: -losses[index])


def test_what_is_answered_right_is_not_among_the_worst(run: RunDir) -> None:
    """Of the pictures of an earlier version, the only wrong one is shown; then none is wrong."""
    edit(run.path / "answers.json", lambda found: found.update(worst=found["attention"]["images"][:2]))
    edit(run.path / "answers.json", lambda found: found["student"].update(predictions=[*found["labels"]]))
    text = Page(report_run(run, pngs=False)).text
    assert "None: every evaluation image that could be read is answered right" in text
    edit(run.path / "answers.json", lambda found: _miss(found, found["worst"][1]))
    page = Page(report_run(run, pngs=False))
    assert "evaluation images that are answered wrong (1)" in page.text
    shown = json.loads((run.path / "answers.json").read_text())["names"]
    assert sum(name in page.texts for name in shown) == 1


def _miss(found: dict[str, Any], index: int) -> None:
    found["student"]["predictions"][index] = (found["labels"][index] + 1) % 3


def test_pictures_that_are_gone_are_left_out(run: RunDir) -> None:
    shutil.rmtree(run.path / "report")
    page = Page(report_run(run, pngs=False))
    assert "Their pictures are not in this folder any more" in page.text and "Classes" in page.texts
    assert not [tag for tag, _ in page.elements if tag == "img"]
    (run.path / "answers.json").unlink()
    page = Page(report_run(run, pngs=False))
    assert "answers.json is not in this folder" in page.text and "Classes" not in page.texts


def test_attention_that_is_not_finite_is_left_out(tiny: Any, tmp_path: Path) -> None:
    """It must not cost the run that has just been trained."""
    recipe = tiny.recipe(losses="ce,kd,attention")
    run = RunDir.create(tmp_path / "run", recipe)
    components = build_components(recipe, run, Silent(), SharedResources())
    found = evaluate_as(recipe, components.student, components.views.val, Silent(), "the student")
    with torch.no_grad():
        components.student.model.get_parameter("blocks.1.attn.qkv.bias").fill_(math.nan)
    write_evidence(components, run.path, found, Silent())
    evidence = read_evidence(run.path)
    assert evidence is not None and evidence.attention.blocks.keys() == {"teacher"}
    assert "student: the attention in block 1 is not a finite number" in evidence.attention.missing


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["labels"].pop(),
        lambda found: found["labels"].__setitem__(0, 3),
        lambda found: found["student"]["predictions"].__setitem__(0, -2),
        lambda found: found["worst"].append(9),
        lambda found: found.update(more=1),
    ],
    ids=["length", "label", "answer", "picture", "key"],
)
def test_damaged_answers_are_one_error(run: RunDir, change: Any) -> None:
    edit(run.path / "answers.json", change)
    with pytest.raises(RunError, match=r"cannot read .*answers\.json"):
        report_run(run)


def test_an_adapted_run_is_not_told_as_its_recipe(run: RunDir) -> None:
    """Its losses and batches are not those of the recipe, `remap repeat` refuses it, and it stores no answers."""
    before = Page(report_run(run)).text
    assert "remap repeat" in before and "batch size" in before and "kd × " in before
    adapted = {"run": "runs/old", "by": "shot", "target": "camera"}
    edit(run.path / "summary.json", lambda found: found.update(adapted=adapted))
    (run.path / "answers.json").unlink()
    page = Page(report_run(run)).text
    assert "runs/old, adapted by shot" in page and "`remap adapt` stores no answers" in page
    assert not any(words in page for words in ("remap repeat", "batch size", "kd × ", "earlier versions"))


def test_a_classifier_that_is_fitted_at_once_has_no_steps_to_tell(run: RunDir) -> None:
    recipe = run.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("fit: gradient", "fit: prototypes"))
    page = Page(report_run(RunDir.open(run.path))).text
    assert "classifier by class means" in page
    assert not any(words in page for words in ("batch size", "learning rate", "kd × "))


def test_a_run_without_a_result_has_no_report(run: RunDir) -> None:
    (run.path / "summary.json").unlink()
    with pytest.raises(RunError, match="has no result yet"):
        report_run(run)


def test_more_than_twenty_classes_are_pairs(run: RunDir) -> None:
    edit(run.path / "answers.json", lambda found: found["classes"].extend(f"class {n}" for n in range(30)))
    edit(run.path / "answers.json", lambda found: found["student"].update(predictions=[1, 1, 2, 0, 0, 0, 2, 2, 2]))
    edit(run.path / "answers.json", lambda found: found.update(labels=[0, 0, 0, 1, 1, 1, 2, 2, 2]))
    page = Page(report_run(run, pngs=False))
    assert "Most confused pairs" in page.texts and "the student's answer" in page.texts
    row = page.texts.index("green", page.texts.index("Most confused pairs"))
    assert [text for text in page.texts[row : row + 12] if text.strip()][:4] == ["green", "blue", "3", "100%"]


def test_a_comparison_in_one_page(comparison: Path) -> None:
    """By hand: lora 87.0 is best, and of the others only bitfit is not distinguishable from it on the same images."""
    page = Page(report_comparison(comparison))
    require_self_contained(page)
    assert "lora has the best accuracy of 4 methods: 87.0 ± 1.4" in page.text
    assert "bitfit cannot be told from it; of these, bitfit trains the fewest parameters" in page.text
    assert "Full tuning on labels alone reaches 81.0 ± 1.4%, 6.0 points less" in page.text
    assert "+1.5 [+0.5, +2.5]" in page.text and "(+0.5 [-0.5, +1.5])" in page.text and page.text.count("★") == 1 + 3
    assert HOSTILE in page.text and (comparison / "report" / "tradeoff.png").stat().st_size > 5000
    for name in ("full", "linear", "lora", "bitfit", "full, labels only 81.0", "teacher 97.0", "10 k"):
        assert name in page.texts


def test_losses_are_told_with_what_is_not_their_default(run: RunDir, comparison: Path) -> None:
    recipe = run.path / "recipe.yaml"
    assert "kd × 1," in Page(report_run(run, pngs=False)).text
    recipe.write_text(recipe.read_text().replace("temperature: 4.0", "temperature: 2.0", 1))
    assert "kd × 1 (temperature 2)" in Page(report_run(RunDir.open(run.path), pngs=False)).text
    assert "kd × 1" in Page(report_comparison(comparison, pngs=False)).text, "one of an earlier version"
    objective = [{"name": "kd", "weight": 0.5, "temperature": 2.0}]
    edit(comparison / "compare.json", lambda found: found.update(objective=objective))
    assert "kd × 0.5 (temperature 2)" in Page(report_comparison(comparison, pngs=False)).text


def test_a_damaged_comparison_is_one_error(comparison: Path) -> None:
    edit(comparison / "compare.json", lambda found: found["rows"][0].pop("teacher"))
    with pytest.raises(RunError, match="lacks what a comparison has"):
        report_comparison(comparison)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Shows a page at a width, and writes what is wrong into a document that is dumped: what runs over the page, lines
# of text on each other, text that is hard to read on its ground (below 4.5 : 1, WCAG 2.2), and missing pictures.
FRAME = """<body><iframe src="{page}" style="border:0;width:{width}px;height:9000px"></iframe><p id="found"></p>
<script>
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => channels(colour).slice(0, 3).map((value) => value / 255).map(
  (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4).reduce(
  (sum, value, index) => sum + [0.2126, 0.7152, 0.0722][index] * value, 0);
onload = () => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const styleOf = (one) => inside.defaultView.getComputedStyle(one);
  const clipped = [...inside.querySelectorAll("h1, h2, p, figure, dl, .bar, .tile, pre")].filter(
    (one) => one.scrollWidth > one.clientWidth + 1 || one.getBoundingClientRect().right > {width} + 1);
  const words = (one) => [...one.childNodes].filter((node) => node.nodeType === 3 && node.textContent.trim());
  const texts = [...inside.body.querySelectorAll("*")].filter(
    (one) => words(one).length && one.getClientRects().length && !one.closest("pre, .scroll"));
  const lines = texts.flatMap((one) => words(one).flatMap((node) => {{
    const range = inside.createRange();
    range.selectNodeContents(node);
    return [...range.getClientRects()].map((box) => [one, box]);
  }}));
  const over = lines.flatMap(([one, a], index) => lines.slice(index + 1).filter(([other, b]) => one !== other &&
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2 + Math.min(a.height, b.height) / 4
  ).map(([other]) => [one.textContent.slice(0, 40), other.textContent.slice(0, 40)]));
  const ground = (one) => channels(styleOf(one).backgroundColor)[3] === 0 && one.parentElement
    ? ground(one.parentElement) : styleOf(one).backgroundColor;
  const faint = texts.filter((one) => !one.closest("svg")).filter((one) => {{
    const [low, high] = [styleOf(one).color, ground(one)].map(luminance).sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }});
  const missing = [...inside.images].filter((one) => !one.naturalWidth);
  document.querySelector("#found").textContent = JSON.stringify({{
    width: root.scrollWidth, clipped: clipped.map((one) => one.outerHTML.slice(0, 80)), over: over,
    faint: faint.map((one) => one.outerHTML.slice(0, 80)), missing: missing.length, pictures: inside.images.length,
    lines: lines.length, dark: luminance(styleOf(inside.body).backgroundColor) < 0.1}});
}};
</script>"""
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr")


def _browse(*options: str, profile: Path) -> str:
    """Open a page in Chromium, which says nothing on its console; return what it prints."""
    command = [str(CHROMIUM), *OPTIONS, "--virtual-time-budget=3000", f"--user-data-dir={profile}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize(
    ("width", "medium"),
    [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark"), (718, "paper")],  # A4 less margins of 1 cm
)
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_browser_shows_it_complete(
    kind: str, width: int, medium: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Nothing is wider than the page or on other text, all text can be read, and no picture is missing.

    The page's own policy forbids every request, so one would be a message on the console.
    """
    folder = request.getfixturevalue(kind)
    page = report_run(folder, pngs=False) if kind == "run" else report_comparison(folder, pngs=False)
    if medium == "paper":
        rules = page.read_text()
        assert rules.count("@media print") == 1
        page = tmp_path / "paper.html"
        page.write_text(rules.replace("@media print", "@media all"))
    (tmp_path / "frame.html").write_text(FRAME.format(page=page.as_uri(), width=width))
    scheme = ["--blink-settings=preferredColorScheme=0"] if medium == "dark" else []
    shown = _browse(
        *scheme,
        "--window-size=1500,9100",
        *("--dump-dom", (tmp_path / "frame.html").as_uri()),
        profile=tmp_path / "profile",
    )
    found = json.loads(html.unescape(shown.partition('<p id="found">')[2].partition("</p>")[0]))
    assert (found.pop("pictures") > 0) == (kind == "run")
    assert found.pop("lines") > 50
    dark = medium == "dark"
    assert found == {"width": width, "dark": dark, "clipped": [], "over": [], "faint": [], "missing": 0}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_browser_prints_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder, paper = request.getfixturevalue(kind), tmp_path / "report.pdf"
    page = report_run(folder, pngs=False) if kind == "run" else report_comparison(folder, pngs=False)
    _browse(f"--print-to-pdf={paper}", page.as_uri(), profile=tmp_path / "profile")
    content = paper.read_bytes()
    assert content.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12
