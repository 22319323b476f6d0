"""What every method on a vision-language model keeps: what trains, what a task holds, merging and export."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import Backbone, Identity
from remap.backbones.preprocess import PreprocessSpec
from remap.data.views import View
from remap.engine.self_teachers import averaged_copy
from remap.engine.teacher import AverageTeacher
from remap.errors import BackboneError, TrainingError
from remap.network import Network, tuned
from remap.remapping.signals import Needs
from remap.runs.task import network_of, save_task
from remap.runs.task_file import read_meta, read_tensors
from remap.tuning import METHODS
from remap.tuning.attaching import attach_method
from remap.tuning.base import Sample

ROWS = [row for row in METHODS if "words" in row.needs]
OPTIONS = {
    "coop": {"position": "middle", "num_context": 4},
    "prograd": {"num_context": 4},
    "tip_adapter": {"shots": 2},
    "mmrl": {"first": 1},
    "cocoop": {"reduction": 2},
    "tcp": {"layer": 1},
}
# What stays in the network, and one method of which nothing stays.
EXPORTED = ("coop", "cocoop", "maple", "mmrl", "promptkd", "clip_adapter", "tip_adapter")
# What the paper trains, by the end of a parameter's name.
TRAINED = {
    "coop": {"context"},
    "kgcoop": {"context"},
    "prograd": {"context"},
    "cocoop": {"context", "meta.0.weight", "meta.0.bias", "meta.2.weight", "meta.2.bias"},
    "tcp": {"context", "down.weight", "down.bias", "up.weight", "up.bias"},
    "maple": {"context", "deep", *(f"maps.{block}.{kind}" for block in range(3) for kind in ("weight", "bias"))},
    "promptsrc": {"context", "deep", "prompts"},
    "mmrl": {"space", "proj.weight", *(f"maps.{block}.{kind}" for block in range(3) for kind in ("weight", "bias"))},
    "promptkd": {"prompts", *(f"projector.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias"))},
    "clip_adapter": {"down.weight", "up.weight"},
    "tip_adapter": {"keys"},
    "taskres": {"residual"},
    "clip_lora": {"down", "up"},
}


def step(network: Network, images: Tensor, steps: int = 4) -> None:
    """Train on labels as the loop does."""
    attached, labels = network.attached, torch.tensor([0, 1, 2, 1])
    optimizer = torch.optim.AdamW(network.trained.values(), lr=0.01)
    for number in range(steps):
        attached.train()
        attached.set_sample_keys(torch.arange(4) + 4 * number)
        loss = nn.functional.cross_entropy(network.model(images), labels)
        penalty = attached.penalty()
        (loss if penalty is None else loss + penalty).backward()
        attached.before_step(lambda _tensors: None)
        assert all(parameter.grad is not None for parameter in network.trained.values())
        optimizer.step()
        attached.after_step(number, steps)
        optimizer.zero_grad()
    network.model.eval()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_method_on_words(
    plain: nn.Module,
    tune: Callable[..., Network],
    build: Callable[..., Backbone],
    images: Tensor,
    tmp_path: Path,
    row: object,
    subtests: pytest.Subtests,
) -> None:
    options = OPTIONS.get(row.name, {})
    network = tune(row.name, **options)
    if network.attached.wants_sample:
        shots = torch.randn(6, 3, 32, 32)
        network.attached.prepare(Sample(lambda: iter([(shots, torch.tensor([0, 1, 2, 0, 1, 2]))]), 3))
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    step(network, images)
    with subtests.test("only what the paper names trains, and all of it"):
        ends = {name[name.rindex("remap_") :].partition(".")[2] for name in network.trained}
        assert ends == TRAINED[row.name]
        after = network.model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])} - set(network.attached.buffers)
        assert moved - {"head.classifier.weight"} == set(network.trained)
    logits = network.model(images).detach()
    with subtests.test("the network answers otherwise than before"):
        assert not torch.allclose(logits, plain(images), rtol=1e-3, atol=1e-3)
    with subtests.test("a task reloads to the same logits, without the names of its classes"):
        network.classes = ("ant", "red bee", "hat")
        network.identity = replace(network.identity, weights="pretrained", sha256="0" * 64)
        save_task(tmp_path, network, View(32, 1.0, "bicubic"), row.name, options)
        backbone = build(of_task=True)
        backbone.identity = network.identity
        meta = read_meta(tmp_path)
        loaded = network_of(tmp_path, meta, read_tensors(tmp_path, meta), backbone)
        assert torch.equal(loaded.model.eval()(images), logits)
        assert not any(name.startswith("remap_text") and "lora" not in name for name in loaded.tensors)
    if row.name in EXPORTED:
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        with torch.no_grad():
            program = torch.export.export(loaded.model, (images[:3],), dynamic_shapes=sizes).module()
            torch.testing.assert_close(program(images), logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(program(images[:1]), logits[:1], rtol=1e-4, atol=1e-5)
    with subtests.test("it becomes a plain model, or says no"):
        if not row.mergeable:
            with pytest.raises(BackboneError, match="cannot be folded"):
                loaded.attached.merge()
            return
        merged = loaded.attached.merge()
        assert list(merged.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(merged(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["maple", "promptsrc"])
def test_prompts_of_one_block_train(tune: Callable[..., Network], images: Tensor, method: str) -> None:
    network = tune(method, depth=1)
    assert not any(name.endswith("deep") for name in network.trained)
    step(network, images)  # which wants a gradient of each


@pytest.mark.parametrize("method", ["promptsrc", "mmrl"])
def test_the_frozen_model_beside_a_rotary_tower_has_no_room_for_prompts(
    rotary: nn.Module, images: Tensor, method: str
) -> None:
    """Its blocks count the tokens that they rotate. Expected: features of the tower before prompts came."""
    expected = rotary.head.proj(rotary.forward_head(rotary.forward_features(images), pre_logits=True))
    identity = Identity("clip:rotary", "none", "")
    backbone = Backbone(rotary, anatomy_of(rotary), PreprocessSpec.of(rotary), identity, head_is_fresh=True)
    network = tuned(backbone, method, OPTIONS.get(method, {}))
    network.attached.train()
    network.model(images)
    found = network.attached.methods[method].hooks.frozen_BE
    torch.testing.assert_close(found, nn.functional.normalize(expected, dim=-1))
    step(network, images)


def test_linear_starts_from_the_words(plain: nn.Module, tune: Callable[..., Network], images: Tensor) -> None:
    network = tune("linear")
    assert set(network.trained) == {"head.classifier.weight", "head.classifier.bias"}
    assert torch.equal(network.model(images), plain(images))


def test_rows_say_what_attaching_gives(tune: Callable[..., Network]) -> None:
    for row in ROWS:
        attached = tune(row.name, **OPTIONS.get(row.name, {})).attached
        assert attached.mergeable == row.mergeable and not attached.trains_head
        assert (attached.extra_tokens > 0) == row.adds_tokens


def test_a_model_without_words_is_refused(plain: nn.Module) -> None:
    model = deepcopy(plain)
    model.head = nn.Linear(24, 3)
    with pytest.raises(BackboneError, match="it needs a text tower"):
        attach_method(model, anatomy_of(model), "coop", {})


def test_names_longer_than_the_text_tower_are_refused(tune: Callable[..., Network]) -> None:
    with pytest.raises(BackboneError, match="too few for 12 context vectors"):
        tune("coop", num_context=12)


def test_names_are_as_long_where_texts_are_filled_up_with_the_end_token(build: Callable[..., Backbone]) -> None:
    """As in CLIP's files of transformers: the end token takes a place there too."""

    def network(free: int) -> Network:
        backbone = build()
        language = backbone.model.language
        tokenize = language.tokenizer
        language.__dict__["tokenizer"] = lambda texts: tokenize(texts).masked_fill(tokenize(texts) == 0, 15)
        return tuned(backbone, "coop", {"num_context": language.side.config.context - free})

    # The longest name takes five tokens: start, two words, full stop and end.
    assert torch.isfinite(network(5).model.head.classifier.weight).all()
    with pytest.raises(BackboneError, match="too few for 10 context vectors"):
        network(4)


def test_token_ids_of_a_stranger_are_checked(tune: Callable[..., Network], images: Tensor) -> None:
    network = tune("cocoop", reduction=2, of_task=True)
    network.model.remap_words.name_ids[0, 0] = 1000
    with pytest.raises(BackboneError, match="token ids"):
        network.model(images)


def test_texts_of_a_stranger_fit_the_text_tower(tune: Callable[..., Network], images: Tensor) -> None:
    network = tune("cocoop", reduction=2, of_task=True)
    network.model.remap_words.name_ids[0, -1] = 15  # the end token, in the last place
    with pytest.raises(BackboneError, match="is too long for its text tower"):
        network.model(images)


def test_keys_need_labels(tune: Callable[..., Network], images: Tensor) -> None:
    network = tune("tip_adapter", shots=2)
    with pytest.raises(TrainingError, match="tip_adapter reads training images with labels"):
        network.attached.prepare(Sample(lambda: iter([(images, torch.full((4,), -1))]), 3))


def test_what_is_inserted_has_the_type_of_the_model(build: Callable[..., Backbone]) -> None:
    """And so lies on its device, too."""
    for row in ROWS:
        backbone = build(of_task=True)
        backbone.model.double()
        network = tuned(backbone, row.name, OPTIONS.get(row.name, {}))
        assert {parameter.dtype for parameter in network.model.parameters()} == {torch.float64}, row.name


@pytest.mark.parametrize("method", ["linear", "lora+dual_head", *(row.name for row in ROWS)])
def test_logits_are_not_rounded_to_bfloat16(tune: Callable[..., Network], images: Tensor, method: str) -> None:
    """Under autocast too: with CLIP's scale of 100 a rounded cosine is a wrong answer."""
    network = tune(method, **OPTIONS.get(method, {}))
    network.attached.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.model(images)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    for other in getattr(logits, "remap_head_logits", ()):
        assert other.dtype == torch.float32


def test_dropout_in_the_text_tower_is_keyed_by_step_and_class(tune: Callable[..., Network]) -> None:
    """It is one tower for all images: processes and micro-batches draw alike, a resumed run as one that went on."""
    network, other = tune("clip_lora", towers="text", dropout=0.5), tune("clip_lora", towers="text", dropout=0.5)
    for one in (network, other):
        one.attached.train()
        with torch.no_grad():
            for name in one.attached.trainable:
                one.model.get_parameter(name).fill_(0.1)
    network.attached.set_sample_keys(torch.arange(4))
    other.attached.set_sample_keys(torch.arange(7))
    torch.manual_seed(9)
    first = network.model.remap_words()
    assert torch.equal(first, other.model.remap_words())
    network.attached.before_step(lambda _tensors: None)
    second = network.model.remap_words()
    assert not torch.equal(first, second)
    other.attached.recall(network.attached.memory())
    assert torch.equal(second, other.model.remap_words())


def test_a_bottleneck_is_never_empty(tune: Callable[..., Network]) -> None:
    for method in ("cocoop", "tcp", "clip_adapter"):
        assert all(parameter.numel() for parameter in tune(method, reduction=1000).trained.values())


def test_an_average_answers_in_its_own_words(tune: Callable[..., Network], images: Tensor) -> None:
    """The student's classifier is written where an epoch ends; that of its average follows in each step."""
    network, other = tune("coop", num_context=4), tune("coop", num_context=4)
    start, average = network.model.remap_words.context.detach().clone(), averaged_copy(network)
    objective = SimpleNamespace(teacher_needs=lambda _number: Needs())
    teacher = AverageTeacher(average, objective, 0, SimpleNamespace(device="cpu"), bf16=False, decay=0.9)
    network.attached.train()
    with torch.no_grad():
        network.model.remap_words.context.add_(1.0)
        teacher.after_step(network, 0)
        other.attached.train()
        other.model.remap_words.context.copy_(start + 0.9)  # of the first step a tenth stays
        torch.testing.assert_close(average.model(images), other.model.eval()(images))


def test_other_methods_read_the_features_behind_the_projection(tune: Callable[..., Network], images: Tensor) -> None:
    """12 dimensions that images and texts share, of an image tower 24 wide."""
    for row in METHODS:
        if row.of_images:
            model = tune(row.name).model
            assert model(images).shape == (4, 3) and model.head.classifier.in_features == 12, row.name
