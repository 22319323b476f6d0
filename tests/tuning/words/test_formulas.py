"""Each method on a tiny CLIP against a second formula in float64, written here from its paper.

The text transformer is written out again with a mask and a softmax; images pass the untouched timm tower.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remap.backbones.build import Backbone
from remap.errors import BackboneError, TrainingError
from remap.language.pair import Language
from remap.network import Network, tuned
from remap.tuning.base import Sample
from remap.tuning.prompt.coop import project

Tune = Callable[..., Network]
IDS = {"ant": 4, "red": 5, "bee": 6, "hat": 7, ".": 8, "start": 14, "end": 15, "a": 1, "photo": 2, "of": 3}
CLASSES = (("ant",), ("red", "bee"), ("hat",))
LABELS = torch.tensor([0, 1, 2, 1])


def text_features(
    tower: nn.Module,
    rows: list[list[Tensor]],
    prompts: Mapping[int, Tensor] | None = None,
    *,
    longer: bool = False,
    unit: bool = True,
) -> Tensor:
    """Features (C, E), of length 1 or as they are, of texts of vectors, each to the end token.

    Prompts by block stand behind the first token: in the place of those there, or ``longer``, in front of them.
    """
    tower, found = deepcopy(tower).double(), []
    heads, width = tower.config.heads, tower.config.width // tower.config.heads
    for number, row in enumerate(rows):
        x = torch.stack(row).double() + tower.positions[: len(row)]
        for index, block in enumerate(tower.blocks):
            if prompts is not None and index in prompts:
                p = prompts[index].double()
                p = p[number] if p.ndim == 3 else p
                x = torch.cat([x[:1], p, x[1 + (0 if longer else len(p)) :]])
            mask = torch.full((len(x), len(x)), -math.inf, dtype=torch.float64).triu(1)
            q, k, v = (
                y.unflatten(1, (heads, width)).transpose(0, 1) for y in block.attn.qkv(block.norm1(x)).chunk(3, 1)
            )
            attended = (q @ k.mT / math.sqrt(width) + mask).softmax(-1) @ v
            x = x + block.attn.proj(attended.transpose(0, 1).flatten(1))
            hidden = block.mlp.fc1(block.norm2(x))
            x = x + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
        found.append(tower.proj(tower.norm(x[-1])))
    return F.normalize(torch.stack(found), dim=-1) if unit else torch.stack(found)


def embedded(model: nn.Module, *words: str) -> list[Tensor]:
    table = model.language.tower.token_embedding.weight
    return [table[IDS[word]] for word in words]


def texts_of(model: nn.Module, context: Tensor, *between: str) -> list[list[Tensor]]:
    """start, context (M, D) or (C, M, D), some words, name, full stop, end."""
    sets = context if context.ndim == 3 else context.expand(len(CLASSES), -1, -1)
    start, *fixed, stop, end = embedded(model, "start", *between, ".", "end")
    return [[start, *own, *fixed, *embedded(model, *name), stop, end] for own, name in zip(sets, CLASSES, strict=True)]


def image_features(plain: nn.Module, images: Tensor) -> Tensor:
    """Unit features (B, E) of the untouched image tower, in float64."""
    model = deepcopy(plain).double()
    pooled = model.forward_head(model.forward_features(images.double()), pre_logits=True)
    return F.normalize(model.head.proj(pooled), dim=-1)


def logits(plain: nn.Module, images: Tensor, texts_CE: Tensor) -> Tensor:
    return (plain.language.scale * image_features(plain, images)).detach() @ texts_CE.mT


def both_modes(network: Network, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in training and, of the classifier that was written, afterwards."""
    network.attached.train()
    training = network.model(images)
    network.model.eval()
    return training.detach(), network.model(images).detach()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_class", [False, True])
def test_coop(plain: nn.Module, tune: Tune, images: Tensor, per_class: bool) -> None:
    network = tune("coop", num_context=5, per_class=per_class)
    context = network.model.remap_words.context
    assert context.shape == ((3, 5, 16) if per_class else (5, 16))
    expected = logits(plain, images, text_features(plain.language.tower, texts_of(plain, context)))
    for found in both_modes(network, images):
        close(found, expected)


@pytest.mark.parametrize("position", ["middle", "front"])
def test_where_the_class_name_stands(plain: nn.Module, tune: Tune, images: Tensor, position: str) -> None:
    network = tune("coop", num_context=5, position=position)
    before = {"middle": 2, "front": 0}[position]
    learned = list(network.model.remap_words.context)
    start, stop, end = embedded(plain, "start", ".", "end")
    rows = [[start, *learned[:before], *embedded(plain, *n), *learned[before:], stop, end] for n in CLASSES]
    for found in both_modes(network, images):
        close(found, logits(plain, images, text_features(plain.language.tower, rows)))


def test_context_that_starts_from_words_is_the_zero_shot_text(plain: nn.Module, tune: Tune) -> None:
    words = tune("coop", num_context=4, words="a photo of a").model.remap_words
    whole = plain.language.features([f"a photo of a {name}." for name in plain.language.names])
    torch.testing.assert_close(words(), whole, rtol=1e-4, atol=1e-5)
    part = tune("coop", num_context=2, words="a photo of a").model.remap_words  # "of a" stays in front of the name
    assert part.context.shape == (2, 16)
    torch.testing.assert_close(part(), whole, rtol=1e-4, atol=1e-5)
    longer = tune("prograd", num_context=6).model.remap_words.context  # its code starts so, too
    assert not longer[:2].any()
    torch.testing.assert_close(longer[2:], torch.stack(embedded(plain, "a", "photo", "of", "a")))


@pytest.mark.parametrize("position", ["middle", "front"])
def test_words_that_stay_go_with_the_name(plain: nn.Module, tune: Tune, position: str) -> None:
    words = tune("coop", num_context=3, words="a photo of a", position=position).model.remap_words
    before = {"middle": 1, "front": 0}[position]
    learned = list(words.context)
    start, kept, stop, end = embedded(plain, "start", "a", ".", "end")
    rows = [[start, *learned[:before], kept, *embedded(plain, *n), *learned[before:], stop, end] for n in CLASSES]
    close(words(), text_features(plain.language.tower, rows))


def test_a_short_text_tower_has_fewer_context_vectors(tune: Tune) -> None:
    assert tune("coop").model.remap_words.context.shape == (3, 16)  # of 14 positions a quarter


def test_kgcoop_pays_for_the_distance(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    # Source: the authors' code, lambda (1 - mean_c cos(t_c, w_c)); equation 4 has twice that, |t_c - w_c|^2.
    network = tune("kgcoop", strength=3.0, num_context=4, words=None)
    texts = text_features(plain.language.tower, texts_of(plain, network.model.remap_words.context))
    expected = 3.0 / 2 * (texts - plain.language.features_CE.double()).square().sum() / 3
    network.attached.train()
    network.model(images)
    close(network.attached.penalty(), expected)


def test_prograd_takes_the_conflict_out(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    # Source: both gradients by autograd of losses written out, projected by equation 5; in two micro-batches.
    network = tune("prograd", num_context=4, words=None, strength=0.7, temperature=2.0)
    model, context = network.model, network.model.remap_words.context
    zero = logits(plain, images, plain.language.features_CE.double())
    wanted = (-zero).softmax(-1).float()  # a loss that contradicts the zero-shot model
    network.attached.train()
    for rows in (slice(0, 3), slice(3, 4)):
        loss = -(wanted[rows] * model(images[rows]).log_softmax(-1)).sum() / 4
        loss.backward()
    network.attached.before_step(lambda _tensors: None)

    free = context.detach().double().requires_grad_()
    out = logits(plain, images, text_features(plain.language.tower, texts_of(plain, free)))
    task = -(wanted.double() * out.log_softmax(-1)).sum() / 4
    p = (zero / 2.0).softmax(-1)
    general = (p * (p.log() - (out / 2.0).log_softmax(-1))).sum()
    (task_D,) = torch.autograd.grad(task, free, retain_graph=True)
    (general_D,) = torch.autograd.grad(general, free)
    product = (task_D * general_D).sum()
    assert product < 0
    close(context.grad, task_D - 0.7 * product / general_D.square().sum() * general_D)


def test_a_process_without_images_takes_part_in_prograd(tune: Tune) -> None:
    """The others wait for its direction, which is zero: their sum is what all of them project with."""
    network, seen = tune("prograd", num_context=4), []
    context = network.model.remap_words.context
    context.grad = torch.zeros_like(context)

    def add_up(tensors: list[Tensor]) -> None:
        seen.extend(tensor.clone() for tensor in tensors)

    network.attached.before_step(add_up)
    assert [tensor.shape for tensor in seen] == [context.shape] and not seen[0].any()
    assert torch.equal(context.grad, torch.zeros_like(context))


@pytest.mark.parametrize("method", ["promptsrc", "mmrl"])
def test_features_of_the_frozen_model_have_length_1_in_bf16(tune: Tune, images: Tensor, method: str) -> None:
    network = tune(method, **({"depth": 2} if method == "promptsrc" else {"first": 1}))
    network.attached.train()
    hooks = network.attached.methods[method].hooks
    with torch.autocast("cpu", torch.bfloat16):
        network.model(images.float())
    pair = hooks.taken(torch.zeros(1))
    assert pair is not None
    for features in pair:
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(images)), rtol=0, atol=1e-5)


def test_gradients_that_agree_stay() -> None:
    gradient, general = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    project(gradient, general, 1.0)
    assert gradient.tolist() == [1.0, 2.0]


def test_cocoop(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    network = tune("cocoop", reduction=2)
    words, expected = network.model.remap_words, []
    meta = deepcopy(words.meta).double()
    for feature in image_features(plain, images):
        shift = meta[2](meta[0](feature).clamp_min(0.0))
        texts = text_features(plain.language.tower, texts_of(plain, words.context.double() + shift))
        expected.append(plain.language.scale * texts @ feature)
    for found in both_modes(network, images):
        close(found, torch.stack(expected))


def test_tcp(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    network = tune("tcp", layer=1, reduction=3)
    words = network.model.remap_words
    down, up = deepcopy(words.down).double(), deepcopy(words.up).double()
    hidden = down(plain.language.features_CE.double())
    vectors = up(hidden * torch.sigmoid(1.702 * hidden)).unflatten(1, (4, 16))
    texts = text_features(plain.language.tower, texts_of(plain, words.context), {1: vectors})
    training, written = both_modes(network, images)
    close(training, logits(plain, images, texts))
    close(written, logits(plain, images, texts))
    close(network.attached.penalty(), 4.0 * (texts - plain.language.features_CE.double()).square().sum() / 3)


def prompted_images(plain: nn.Module, images: Tensor, prompts: list[Tensor], *, unit: bool = True) -> Tensor:
    """Features (B, E) with prompts of the first blocks, whose outputs the blocks behind go on with."""
    model = deepcopy(plain).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images.double())))
    count = len(prompts[0])
    for index, block in enumerate(model.blocks):
        if index < len(prompts):
            own = prompts[index].double()
            own = (model.norm_pre(own) if index == 0 else own).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 1 + (count if index else 0) :]], dim=1)
        x = block(x)
    features = model.head.proj(model.norm(x)[:, 0])
    return F.normalize(features, dim=-1) if unit else features


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_maple(plain: nn.Module, tune: Tune, images: Tensor, depth: int) -> None:
    network = tune("maple", depth=depth, num_context=2)
    words, maps = network.model.remap_words, deepcopy(network.model.remap_prompts.maps).double()
    depth = min(depth, 3)  # blocks of the text tower
    own = [words.context, *words.deep]
    assert len(own) == len(maps) == depth
    rows = texts_of(plain, words.context, "of", "a")  # the rest of "a photo of a", as in the authors' code
    texts = text_features(plain.language.tower, rows, dict(enumerate(words.deep, start=1)))
    features = prompted_images(plain, images, [layer(one.double()) for layer, one in zip(maps, own, strict=True)])
    for found in both_modes(network, images):
        close(found, plain.language.scale * features @ texts.mT)


def test_promptsrc(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    # Source: equations 3 and 4 with means written out.
    network = tune("promptsrc", num_context=3, depth=2, image=2.0, text=3.0, logits=0.5)
    words, own = network.model.remap_words, list(network.model.remap_prompts.prompts)
    texts = text_features(plain.language.tower, texts_of(plain, words.context, "a"), {1: words.deep[0]})
    features, frozen = prompted_images(plain, images, own), image_features(plain, images)
    scale, zero = plain.language.scale, plain.language.features_CE.double()
    network.attached.train()
    close(network.model(images), scale * features @ texts.mT)
    p, q = ((scale * x @ y.mT).softmax(-1) for x, y in ((features, texts), (frozen, zero)))
    divergence = (q * (q.log() - p.log())).sum() / q.numel()
    expected = 2.0 * (features - frozen).abs().mean() + 3.0 * (texts - zero).abs().mean() + 0.5 * divergence
    close(network.attached.penalty(), expected)


@pytest.mark.parametrize("total", [20, 7])
def test_prompts_of_promptsrc_are_averaged(tune: Tune, total: int) -> None:
    # Source: equation 7: weights exp(-(i - mean)^2 / 2 std^2), i from 1 to 20, which sum to 1.
    network = tune("promptsrc", num_context=3, depth=2, mean=12.0, std=3.0)
    context, expected, divisor = network.model.remap_words.context, 0.0, 0.0
    for step in range(total):
        with torch.no_grad():
            context.fill_(float(step))
        network.attached.after_step(step, total)
        for part in range(1, 21):
            if -(-part * total // 20) - 1 == step:  # the step in which this part of the run ends
                weight = math.exp(-((part - 12.0) ** 2) / (2 * 3.0**2))
                expected, divisor = expected + weight * step, divisor + weight
    assert context.mean().item() == pytest.approx(expected / divisor, rel=1e-5)


def test_an_average_of_promptsrc_far_from_its_mean_is_that_of_the_nearest_part(tune: Tune) -> None:
    # exp(-0.5 ((i - 15) / 0.25)^2) is 0 in float64 for i from 1 to 5; of all weights the fifth is by far the largest.
    network = tune("promptsrc", num_context=3, depth=2, mean=15.0, std=0.25, epochs=5)
    context = network.model.remap_words.context
    for step in range(10):
        with torch.no_grad():
            context.fill_(float(step))
        network.attached.after_step(step, 10)
    assert context.mean().item() == 9.0


def test_mmrl(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    # Source: both classifiers' cross-entropies and 1 - cosines of equations 11 to 14, towers written out.
    network = tune("mmrl", first=2, num_tokens=3, width=8, strength=0.4, share=0.6)
    words, tokens = network.model.remap_words, network.model.remap_prompts
    space = words.space.double()
    rows = [[*embedded(plain, "start", "a", "photo", "of", "a", *name, ".", "end")] for name in CLASSES]
    inserted = deepcopy(words.maps).double()[0](space)
    texts = text_features(plain.language.tower, rows, {2: inserted}, longer=True)

    model, maps = deepcopy(plain).double(), deepcopy(tokens.maps).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images.double())))
    for index, block in enumerate(model.blocks):
        if index >= 2:
            own = maps[index - 2](space).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 1 + (3 if index > 2 else 0) :]], dim=1)
        x = block(x)
    x = model.norm(x)
    f = F.normalize(model.head.proj(x[:, 0]), dim=-1)
    r = F.normalize(x[:, 1:4].mean(1) @ tokens.proj.weight.double().mT, dim=-1)
    z, other = (plain.language.scale * one @ texts.mT for one in (f, r))
    frozen, zero = image_features(plain, images), plain.language.features_CE.double()
    expected = 0.6 * F.cross_entropy(z, LABELS) + 0.4 * F.cross_entropy(other, LABELS)
    expected = expected + 0.4 * (2 - (f * frozen).sum(1).mean() - (texts * zero).sum(1).mean())

    network.attached.train()
    answer = network.model(images)
    close(answer, 0.6 * z + 0.4 * other)
    close(F.cross_entropy(answer, LABELS) + network.attached.penalty(), expected)
    network.model.eval()
    close(network.model(images), 0.6 * z + 0.4 * other)
    early = tune("mmrl", first=0).model
    torch.testing.assert_close(early.remap_prompts.tokens(0), early.remap_prompts.maps[0](early.remap_words.space))


def test_promptkd(build: Callable[..., Backbone], plain: nn.Module, images: Tensor) -> None:
    # Source: equation 3 with the projector's four steps written out, as the authors order them: features are not
    # normalised in front of it. Batch statistics are those of the batch.
    backbone = build()
    theirs = F.normalize(torch.randn(3, 20), dim=-1)
    backbone.model.language.teacher = Language(
        Path("teacher"), plain.language.side, 5.0, 0.3, ("a", "b", "c"), (), theirs
    )
    with pytest.raises(BackboneError, match="method.width=20"):
        tuned(build_with(backbone), "promptkd", {})
    network = tuned(backbone, "promptkd", {"width": 20, "depth": 2, "num_prompts": 3})
    first, norm, _, last = deepcopy(network.model.remap_promptkd.projector).double()
    features = prompted_images(plain, images, list(network.model.remap_prompts.prompts), unit=False)
    hidden = features @ first.weight.mT + first.bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
    projected = F.normalize(hidden.clamp_min(0.0) @ last.weight.mT + last.bias, dim=-1)
    network.attached.train()
    close(network.model(images), 5.0 * projected @ theirs.double().mT + 0.3)


def build_with(backbone: Backbone) -> Backbone:
    return replace(backbone, model=deepcopy(backbone.model))


def test_clip_adapter(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    network = tune("clip_adapter", alpha=0.4, reduction=3)
    adapter, features = deepcopy(network.model.remap_clip_adapter).double(), image_features(plain, images)
    hidden = (features @ adapter.down.weight.mT).clamp_min(0.0)
    adapted = 0.4 * (hidden @ adapter.up.weight.mT).clamp_min(0.0) + 0.6 * features
    expected = plain.language.scale * F.normalize(adapted, dim=-1) @ plain.language.features_CE.double().mT
    close(network.model(images), expected)


def test_tip_adapter(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    # Source: equations 5 to 7, one key after the other; class 2 has one image only, and the third of class 1 is over.
    network = tune("tip_adapter", shots=2, alpha=1.3, beta=2.0)
    assert torch.equal(network.model(images), plain(images))
    shots = torch.randn(6, 3, 32, 32)
    labels = torch.tensor([0, 1, 1, 2, 1, 0])
    network.attached.prepare(Sample(lambda: iter([(shots[:4], labels[:4]), (shots[4:], labels[4:])]), 3))
    features, keys = image_features(plain, images), image_features(plain, shots)
    expected = plain.language.scale * features @ plain.language.features_CE.double().mT
    for index in (0, 1, 2, 3, 5):
        expected[:, labels[index]] += 1.3 * torch.exp(-2.0 * (1 - features @ keys[index]))
    close(network.model(images), expected)


def test_tip_adapter_searches_alpha_and_beta(plain: nn.Module, tune: Tune) -> None:
    # Source: equation 7 of each pair of the grid, one key answered by the others after the other.
    network, shots = tune("tip_adapter", shots=4, search=True), torch.randn(12, 3, 32, 32)
    labels = torch.arange(3).repeat(4)
    network.attached.prepare(Sample(lambda: iter([(shots, labels)]), 3))
    keys, best = image_features(plain, shots), (-1, 0.0, 0.0)
    answers = plain.language.scale * keys @ plain.language.features_CE.double().mT
    for beta in torch.linspace(0.1, 7.0, 24).tolist():
        votes = torch.zeros(12, 3, dtype=torch.float64)
        for own, other in permutations(range(12), 2):
            votes[own, labels[other]] += math.exp(-beta * (1 - float(keys[own].detach() @ keys[other].detach())))
        for alpha in torch.linspace(0.1, 3.0, 30).tolist():
            right = int(((answers + alpha * votes).argmax(1) == labels).sum())
            best = max(best, (right, -beta, -alpha))
    assert network.model.remap_tip_adapter.factors.tolist() == pytest.approx([-best[2], -best[1]])
    with pytest.raises(TrainingError, match="two training images of each class"):
        network.attached.prepare(Sample(lambda: iter([(shots[:4], labels[:4])]), 3))


def test_taskres(plain: nn.Module, tune: Tune, images: Tensor) -> None:
    network = tune("taskres", alpha=0.3)
    torch.testing.assert_close(network.model(images), plain(images), rtol=1e-5, atol=1e-6)
    residual = network.model.remap_words.residual
    with torch.no_grad():
        residual.normal_()
    context = torch.stack(embedded(plain, "a", "photo", "of", "a"))
    first = text_features(plain.language.tower, texts_of(plain, context), unit=False)  # not normalised: authors' code
    zero_shot = first.norm(dim=-1, keepdim=True) * plain.language.features_CE.double()
    texts = F.normalize(zero_shot + 0.3 * residual.double(), dim=-1)
    for found in both_modes(network, images):
        close(found, logits(plain, images, texts))


def test_clip_lora(plain: nn.Module, tune: Tune, images: Tensor, build: Callable[..., Backbone]) -> None:
    # Source: W + alpha / sqrt(rank) * B A in the rows of q, k and v of both towers, written into their weights.
    network = tune("clip_lora", dropout=0.0)
    first = plain.language.features([f"a photo of a {name}." for name in plain.language.names])
    close(network.model(images), logits(plain, images, first.double()))  # nothing is changed at first
    network.attached.train()
    with torch.no_grad():
        for name in network.attached.trainable:
            network.model.get_parameter(name).normal_(std=0.2)
    reference = deepcopy(plain).double()
    tower = deepcopy(plain.language.tower).double()
    for model, ours, count in ((reference, network.model, 4), (tower, network.model.remap_text, 3)):
        for index in range(count):
            lora = ours.blocks[index].attn.qkv.remap_lora
            changes = [
                math.sqrt(0.5) * up.double() @ down.double()
                for up, down in zip(lora.up, lora.down.chunk(3), strict=True)
            ]
            model.blocks[index].attn.qkv.weight.data += torch.cat(changes)
    rows = [[*embedded(plain, "start", "a", "photo", "of", "a", *name, ".", "end")] for name in CLASSES]
    expected = logits(reference, images, text_features(tower, rows))
    for found in both_modes(network, images):
        close(found, expected)
    close(network.attached.merge()(images), expected)


def test_clip_lora_in_one_tower(plain: nn.Module, tune: Tune) -> None:
    image, text = (tune("clip_lora", towers=tower) for tower in ("image", "text"))
    assert not any(name.startswith("remap_text") for name in image.trained) and image.trained
    assert all(name.startswith("remap_text") for name in text.trained) and text.trained
