"""Each feature loss against a second formula, written here in numpy float64 from its paper, or against torchdistill."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torchdistill.losses.mid_level import PKTLoss, RKDLoss

from remap.backbones.anatomy import Anatomy, anatomy_of
from remap.errors import BackboneError
from remap.remapping import LOSSES
from remap.remapping.knowledge.features import batch_relations
from remap.remapping.knowledge.features.generation import exact_mask
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Objective, Pair
from remap.remapping.signals import Signals, Tokens
from remap.remapping.tap import Tap

Array = NDArray[np.float64]
CLASSES = torch.tensor([0, 3, 1, 4, 3, 2])
LABELS = Labels(CLASSES)


def f64(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def make(name: str, pair: Pair, **options: Any) -> Any:
    kind = LOSSES.load(name)
    return kind(pair, kind.Config(**options))


def run(term: LossTerm, student: Signals, teacher: Signals, labels: Labels = LABELS) -> float:
    return term(student, term.target(teacher), labels).item()


@torch.no_grad()
def with_identities(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """Linear maps become identities, so that a copy of the teacher reaches zero."""
    for module in term.modules():
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)
    return teacher, teacher, 0.0


@torch.no_grad()
def generating_constants(term: Any, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """A generator sees masked tokens only: it reaches zero where the teacher's are one constant, its last bias."""
    with_identities(term, teacher, labels)
    last = max(teacher.tokens)
    constant_D = teacher.tokens[last].patches_BND[0, 0]
    term.generator[2].weight.zero_()
    term.generator[2].bias.copy_(constant_D)
    constant = replace(teacher.tokens[last], patches_BND=constant_D.expand_as(teacher.tokens[last].patches_BND))
    teacher = replace(teacher, tokens={**teacher.tokens, last: constant})
    return teacher, teacher, 0.0


def far_apart(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """Contrast is least where the B images are as far apart as can be, at cosines of -1 / (B - 1)."""
    with_identities(term, teacher, labels)
    images, width = teacher.pooled_BD.shape
    simplex_BD = (torch.eye(images) - 1 / images) @ torch.eye(images, width)
    gap = (1 + 1 / (images - 1)) / term.config.temperature
    teacher = replace(teacher, pooled_BD=simplex_BD)
    return teacher, teacher, 2.0 * math.log1p((images - 1) * math.exp(-gap))


def with_normed_tokens(term: LossTerm, teacher: Signals, labels: Labels) -> tuple[Signals, Signals, float]:
    """Zero where the student's tokens equal the teacher's layer-normed ones."""

    def normed(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:])

    tokens = {
        index: replace(one, patches_BND=normed(one.patches_BND), prefix_BPD=normed(one.prefix_BPD))
        for index, one in teacher.tokens.items()
    }
    return teacher, replace(teacher, tokens=tokens), 0.0


# For test_losses_conformance.py, which explains the keys.
CONFORMANCE: dict[str, dict[str, Any]] = {
    "tokens": {
        "variants": [
            {"layers": "uniform", "loss": "cosine", "prefix": "class"},
            {"layers": [[0, 2], [-1, -2]], "projector": "orthogonal", "prefix": "all"},
            {"projector": "mlp"},
        ],
        "alike": {"projector": "none", "layers": "uniform"},
        "at_best": with_normed_tokens,
    },
    "gram": {
        "variants": [{"loss": "mse", "layers": "uniform"}, {"temperature": 0.5, "layers": [[0, 1]]}],
        "alike": {"layers": "uniform"},
    },
    "vitkd": {"variants": [{"shallow": 1, "mask": 0.3, "generation": 1.0}], "at_best": generating_constants},
    "mgd": {"variants": [{"mask": 0.65}, {"masked": "channels"}], "at_best": generating_constants},
    "fitnet": {
        "variants": [{"layers": [[0, 2], [1, 0]]}],
        "alike": {"layers": [[0, 0], [2, 2]]},
        "at_best": with_identities,
    },
    "queue": {
        "variants": [{"projector": "mlp", "size": 2}],
        "alike": {"projector": "none", "temperature": 0.1, "teacher_temperature": 0.1},
    },
    "clip_feature": {"variants": [{"projector": "mlp"}], "alike": {"projector": "none"}},
    "rkd": {"variants": [{"distance": 0.0}, {"angle": 0.0}]},
    "pkt": {"variants": [{"self_similarity": True}]},
    "crd": {"variants": [{"width": 8, "temperature": 0.5}], "at_best": far_apart},
}


def pooled(student: torch.Tensor, teacher: torch.Tensor) -> tuple[Signals, Signals]:
    return Signals(torch.zeros(len(student), 5), student), Signals(torch.zeros(len(teacher), 5), teacher)


def random_tokens(anatomy: Anatomy, blocks: list[int], images: int = 2) -> Signals:
    """Random tokens behind some blocks of a sequence network."""
    shape = anatomy.num_patches, anatomy.num_prefix_tokens
    tokens = {}
    for block in blocks:
        patches, prefix = (3 * torch.randn(images, count, anatomy.width) + 1 for count in shape)
        tokens[block] = Tokens(patches, prefix, anatomy.grid, anatomy.has_class_token)
    return Signals(torch.zeros(images, 5), None, {}, tokens)


def on_grid(anatomy: Anatomy, grid: tuple[int, int]) -> Anatomy:
    return replace(anatomy, grid=grid, blocks=tuple(replace(block, grid=grid) for block in anatomy.blocks))


def resize_1d(source: int, target: int) -> Array:
    """Weights (target, source) of an antialiased linear resize: a triangle as wide as one step of the coarser grid."""
    width = max(1.0, source / target)
    centres = (np.arange(target) + 0.5) * source / target
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(source)[None] + 0.5 - centres[:, None]) / width)
    return weights / weights.sum(axis=1, keepdims=True)


def resize(tokens_BND: Array, source: tuple[int, int], target: tuple[int, int]) -> Array:
    rows, columns = (resize_1d(a, b) for a, b in zip(source, target, strict=True))
    images, _, width = tokens_BND.shape
    resized = np.einsum("ph,qw,bhwd->bpqd", rows, columns, tokens_BND.reshape(images, *source, width))
    return resized.reshape(images, -1, width)


def layer_norm(x: Array) -> Array:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def huber(gap: Array) -> Array:
    gap = np.abs(gap)
    return np.where(gap < 1, 0.5 * gap**2, gap - 0.5)


def one_minus_cosine(x: Array, y: Array) -> Array:
    return 1 - (x * y).sum(axis=-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def softmax(x: Array) -> Array:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def conv(map_BhwD: Array, layer: torch.nn.Conv2d) -> Array:
    """3 x 3 convolution with a border of zeros, one tap at a time."""
    _, rows, columns, _ = map_BhwD.shape
    padded = np.pad(map_BhwD, ((0, 0), (1, 1), (1, 1), (0, 0)))
    weight = f64(layer.weight)
    taps = product(range(3), range(3))
    return f64(layer.bias) + sum(padded[:, i : i + rows, j : j + columns] @ weight[:, :, i, j].T for i, j in taps)


def generate(tokens_BND: Array, generator: torch.nn.Sequential, grid: tuple[int, int]) -> Array:
    images, _, width = tokens_BND.shape
    hidden = np.maximum(0.0, conv(tokens_BND.reshape(images, *grid, width), generator[0]))
    return conv(hidden, generator[2]).reshape(images, -1, width)


def test_clip_feature(pair: Pair) -> None:
    # Source: CLIP-KD's formula in numpy, and its other form, 2 (1 - cosine) / D.
    term = make("clip_feature", pair)
    s, t = pooled(torch.randn(6, pair.student.width), torch.randn(6, pair.teacher.width))
    ours, theirs = f64(s.pooled_BD) @ f64(term.projector.weight).T, f64(t.pooled_BD)
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs)]
    found = run(term, s, t)
    assert found == pytest.approx(((units[0] - units[1]) ** 2).mean(), rel=1e-5)
    assert found == pytest.approx(2 * one_minus_cosine(ours, theirs).mean() / pair.teacher.width, rel=1e-5)


# --- token by token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["smooth_l1", "cosine"])
def test_tokens_on_another_grid(pair: Pair, loss: str) -> None:
    # Source: triangle filter, layer norm, projection and both losses in numpy; 4 x 4 patches become 3 x 3.
    term = make("tokens", pair, loss=loss, layers=[[0, 1], [1, 2]])
    s, t = random_tokens(pair.student, [0, 1]), random_tokens(pair.teacher, [1, 2])
    expected = []
    for index, (a, b) in enumerate(((0, 1), (1, 2))):
        wanted = layer_norm(resize(f64(t.tokens[b].patches_BND), (4, 4), (3, 3)))
        projected = f64(s.tokens[a].patches_BND) @ f64(term.projectors[index].weight).T
        gap = huber(projected - wanted) if loss == "smooth_l1" else one_minus_cosine(projected, wanted)
        expected.append(gap.mean())
    assert run(term, s, t) == pytest.approx(np.mean(expected), rel=1e-5)
    assert term.blocks == ((0, 1), (1, 2))


def test_tokens_prefix_is_apart(build_network: Any) -> None:
    # Source: numpy; the same number of registers on both sides, so that all three kinds of tokens count.
    student, teacher = (
        build_network("layerscale_registers", embed_dim=width, num_heads=2).anatomy for width in (16, 24)
    )
    term = make("tokens", Pair(student, teacher, 5), prefix="all", loss="cosine")
    s, t = random_tokens(student, [2]), random_tokens(teacher, [2])
    parts = []
    for part, layers in (("patches_BND", term.projectors), ("prefix_BPD", term.prefix_projectors)):
        ours, theirs = (f64(getattr(one.tokens[2], part)) for one in (s, t))
        parts.append(one_minus_cosine(ours @ f64(layers[0].weight).T, layer_norm(theirs)).mean())
    assert run(term, s, t) == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize(
    ("families", "prefix", "expected"),
    [
        (("plain", "layerscale_registers"), "class", ((0, 0),)),
        (("plain", "layerscale_registers"), "all", ((0, 0),)),  # 0 and 3 registers
        (("layerscale_registers", "layerscale_registers"), "all", ((0, 0), (1, 1), (2, 2), (3, 3))),
        (("distilled", "distilled"), "all", ((0, 0), (1, 1))),
        (("distilled", "layerscale_registers"), "all", ((0, 0),)),  # a distillation token is no register
        (("no_class_registers", "no_class_registers"), "all", ((0, 0), (1, 1))),
    ],
)
def test_shared_prefix_tokens(families: tuple[str, str], prefix: str, expected: tuple, build_network: Any) -> None:
    # Source: the order of the prefix (class, distillation, registers) and the rule of the option, by hand.
    pair = Pair(*(build_network(family).anatomy for family in families), 5)
    assert make("tokens", pair, prefix=prefix).shared == expected


@pytest.mark.parametrize(("student", "prefix"), [("no_class", "class"), ("no_class_registers", "all")])
def test_nothing_shared_in_the_prefix(student: str, prefix: str, build_network: Any) -> None:
    pair = Pair(build_network(student).anatomy, build_network("plain").anatomy, 5)
    with pytest.raises(BackboneError, match="none in common") as error:
        make("tokens", pair, prefix=prefix)
    assert "teacher 1 class" in str(error.value)


def test_terms_share_the_teachers_tokens(pair: Pair, teacher: Any, build_network: Any) -> None:
    # Source: the rule of names. Equal places and grids are one item; a resized one says its grid.
    kinds = ("tokens", "mgd")
    objective = Objective({name: make(name, pair) for name in kinds}, dict.fromkeys(kinds, 1.0))
    items = objective.targets(teacher.signals(objective.teacher_needs()))
    assert {name: value.shape for name, value in items.items()} == {"patches3 3x3": (4, 9, 24)}
    twin = build_network(depth=3)
    term = make("tokens", Pair(twin.anatomy, twin.anatomy, 5), prefix="class")
    assert set(term.target(twin.signals(term.teacher_needs()))) == {"patches3", "prefix3"}


def test_tokens_behind_the_final_norm_are_those_of_the_model(pair: Pair, teacher: Any) -> None:
    # Source: timm's forward_features, resized by the triangle filter.
    term = make("tokens", pair)
    (found,) = term.target(teacher.signals(term.teacher_needs())).values()
    features = f64(teacher.model.forward_features(teacher.images))[:, 4:]
    np.testing.assert_allclose(f64(found), resize(features, (4, 4), (3, 3)), rtol=1e-4, atol=1e-5)


def test_fitnet(pair: Pair) -> None:
    # Source: linear regression and squared error in numpy; the middle of 2 and of 3 blocks is block 0 and block 1.
    term = make("fitnet", pair)
    s, t = random_tokens(pair.student, [0]), random_tokens(pair.teacher, [1])
    wanted = resize(f64(t.tokens[1].patches_BND), (4, 4), (3, 3))
    regressed = f64(s.tokens[0].patches_BND) @ f64(term.regressors[0].weight).T + f64(term.regressors[0].bias)
    assert term.blocks == ((0, 1),)
    assert run(term, s, t) == pytest.approx(((regressed - wanted) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["tokens", "gram", "vitkd", "mgd", "fitnet"])
def test_a_hierarchical_teacher(name: str, student: Any) -> None:
    # Source: shapes. Swin's tokens are maps of its last stage; every loss brings them to the student's grid.
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes).eval()
    pair = Pair(student.anatomy, anatomy_of(swin), 5)
    term = make(name, pair)
    with Tap(swin, pair.teacher, term.teacher_needs()) as tap, torch.no_grad():
        target = term.target(tap(torch.randn(4, 3, 32, 32)))
    assert all(value.shape[:2] == (4, 9) for value in target.values())
    loss = term(student.signals(term.student_needs()), target, Labels(CLASSES[:4]))
    assert torch.isfinite(loss) and loss > 0


# --- relations of tokens ----------------------------------------------------------------------------------------------


def numpy_gram(tokens_BND: Array) -> Array:
    unit = tokens_BND / np.linalg.norm(tokens_BND, axis=-1, keepdims=True)
    return np.einsum("bnd,bmd->bnm", unit, unit)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_gram_kl(pair: Pair, temperature: float) -> None:
    # Source: cosines, softmax and KL row by row in numpy, after the triangle filter.
    s, t = random_tokens(pair.student, [2]), random_tokens(pair.teacher, [3])
    ours = softmax(numpy_gram(f64(s.tokens[2].patches_BND)) / temperature)
    theirs = softmax(numpy_gram(resize(f64(t.tokens[3].patches_BND), (4, 4), (3, 3))) / temperature)
    expected = (theirs * np.log(theirs / ours)).sum(axis=-1).mean()
    assert run(make("gram", pair, temperature=temperature), s, t) == pytest.approx(expected, rel=1e-4)


def test_gram_mse(pair: Pair) -> None:
    # Source: Hao et al. 2022: squared difference of the cosines within each image, mean.
    s, t = random_tokens(pair.student, [2]), random_tokens(pair.teacher, [3])
    ours = numpy_gram(f64(s.tokens[2].patches_BND))
    theirs = numpy_gram(resize(f64(t.tokens[3].patches_BND), (4, 4), (3, 3)))
    assert run(make("gram", pair, loss="mse"), s, t) == pytest.approx(((ours - theirs) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_gram_invariances(build_network: Any, loss: str) -> None:
    # Source: cosines do not change under rotations and scales of the features; means not under one order of tokens.
    student, teacher = (build_network(embed_dim=width, num_heads=2).anatomy for width in (16, 24))
    term = make("gram", Pair(student, teacher, 5), loss=loss)
    s, t = random_tokens(student, [2]), random_tokens(teacher, [2])
    before = run(term, s, t)

    def changed(signals: Signals, change: Any) -> Signals:
        tokens = replace(signals.tokens[2], patches_BND=change(signals.tokens[2].patches_BND))
        return replace(signals, tokens={2: tokens})

    order = torch.randperm(9)
    assert run(term, *(changed(one, lambda x: x[:, order]) for one in (s, t))) == pytest.approx(before, rel=1e-5)
    turn, _ = torch.linalg.qr(torch.randn(16, 16))
    assert run(term, changed(s, lambda x: 7.0 * x @ turn), t) == pytest.approx(before, rel=1e-4)
    assert run(term, changed(s, lambda x: x[:, order]), t) != pytest.approx(before, rel=1e-2)


# --- masked generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_vitkd(pair: Pair, grid: tuple[int, int]) -> None:
    # Source: Yang et al. 2022: linear maps, masking, two convolutions and sums in numpy. The mask: the same draw.
    student = on_grid(pair.student, grid)
    pair = Pair(student, pair.teacher, 5)
    term = make("vitkd", pair, mask=0.5, generation=0.2)
    torch.nn.init.normal_(term.mask_token_D)
    count = grid[0] * grid[1]
    s, t = random_tokens(student, [0, 1, 2]), random_tokens(pair.teacher, [0, 1, 3])

    def wanted(block: int) -> Array:
        return resize(f64(t.tokens[block].patches_BND), (4, 4), grid)

    def mapped(layer: torch.nn.Linear, block: int) -> Array:
        return f64(s.tokens[block].patches_BND) @ f64(layer.weight).T + f64(layer.bias)

    mimic = sum(((mapped(term.mimics[block], block) - wanted(block)) ** 2).sum() for block in (0, 1))
    torch.manual_seed(9)
    masked = (torch.rand(2, count).argsort(dim=1) >= count // 2).numpy()[..., None]
    # The tokens behind the final norm have the number of blocks: 2 and 3.
    given = np.where(masked, f64(term.mask_token_D), mapped(term.align, 2))
    gap = (generate(given, term.generator, grid) - wanted(3)) * masked
    torch.manual_seed(9)
    found = run(term, s, t)
    assert found == pytest.approx((mimic + 0.2 * (gap**2).sum() / 0.5) / 2, rel=1e-5)
    assert term.blocks == ((0, 0), (1, 1), (2, 3))


@pytest.mark.parametrize("options", [{"mask": 0.4}, {}, {"masked": "channels"}, {"masked": "channels", "mask": 0.3}])
@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_mgd(pair: Pair, grid: tuple[int, int], options: dict[str, Any]) -> None:
    # Source: Yang et al. 2022: linear map, zeros at masked tokens or channels, two convolutions, squared error, in
    # numpy. The shares 0.5 and 0.15 are those of the paper and of the authors' code for classification.
    student = on_grid(pair.student, grid)
    pair = Pair(student, pair.teacher, 5)
    term = make("mgd", pair, **options)
    s, t = random_tokens(student, [2]), random_tokens(pair.teacher, [3])
    channels = options.get("masked") == "channels"
    torch.manual_seed(9)
    drawn = torch.rand(2, 1, 24) if channels else torch.rand(2, grid[0] * grid[1], 1)
    kept = drawn.numpy() >= options.get("mask", 0.15 if channels else 0.5)
    aligned = f64(s.tokens[2].patches_BND) @ f64(term.align.weight).T + f64(term.align.bias)
    gap = generate(aligned * kept, term.generator, grid) - resize(f64(t.tokens[3].patches_BND), (4, 4), grid)
    torch.manual_seed(9)
    assert run(term, s, t) == pytest.approx((gap**2).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["vitkd", "mgd"])
def test_masks_follow_the_seed(name: str, pair: Pair, student: Any, teacher: Any) -> None:
    # Source: the definition of a seed; another one gives another mask.
    term = make(name, pair)
    signals, target = student.signals(term.student_needs()), term.target(teacher.signals(term.teacher_needs()))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(term(signals, target, LABELS).item())
    assert found[0] == found[1] != found[2]


def test_vitkd_masks_an_exact_share() -> None:
    # Source: counting: of 9 tokens floor(9 * 0.7) = 6 stay.
    masked = exact_mask(torch.zeros(50, 9, 4), 0.3)[..., 0]
    assert (masked.sum(dim=1) == 3).all() and masked.any(dim=0).all()


def test_vitkd_needs_so_many_blocks(pair: Pair) -> None:
    with pytest.raises(BackboneError, match="the student has 2 blocks, the teacher 3"):
        make("vitkd", pair, shallow=3)


# --- relations of images ----------------------------------------------------------------------------------------------


@pytest.fixture
def features() -> tuple[Signals, Signals]:
    return pooled(2 * torch.randn(6, 16) + 1, 3 * torch.randn(6, 24) - 1)


def rkd_by_hand(signals: Signals) -> tuple[Array, Array]:
    """Distances over their mean, and cosines of all angles, one pair and one triple at a time."""
    x = f64(signals.pooled_BD)
    count = len(x)
    distances = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
    angles = np.zeros((count, count, count))
    for j, i, k in product(range(count), repeat=3):
        if j not in (i, k):
            a, b = x[i] - x[j], x[k] - x[j]
            angles[j, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return distances / distances[distances > 0].mean(), angles


def test_rkd(pair: Pair, features: tuple[Signals, Signals]) -> None:
    # Sources: Park et al. 2019, Eq. 5 to 10, in numpy loops; and torchdistill's class.
    (d_s, a_s), (d_t, a_t) = (rkd_by_hand(one) for one in features)
    distance, angle = huber(d_s - d_t).mean(), huber(a_s - a_t).mean()
    found = run(make("rkd", pair), *features)
    assert found == pytest.approx(distance + 2 * angle, rel=1e-5)
    assert run(make("rkd", pair, angle=0.0), *features) == pytest.approx(distance, rel=1e-5)
    assert run(make("rkd", pair, distance=0.0, angle=1.0), *features) == pytest.approx(angle, rel=1e-5)
    theirs = RKDLoss("s", "t", dist_factor=1.0, angle_factor=2.0, reduction="mean")
    io = {"s": {"output": features[0].pooled_BD}}, {"t": {"output": features[1].pooled_BD}}
    assert found == pytest.approx(theirs(*io).item(), abs=1e-6)


def test_rkd_in_groups_of_anchors(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # Source: all anchors at once.
    x, (_, t) = torch.randn(7, 16), pooled(torch.zeros(7, 16), torch.randn(7, 24))
    term = make("rkd", pair)
    results = []
    for limit in (2**22, 2 * 7 * 7, 1):  # one group; 2 + 2 + 2 + 1 anchors; one at a time
        monkeypatch.setattr(batch_relations, "ANCHOR_NUMBERS", limit)
        leaf = x.clone().requires_grad_()
        loss = term(Signals(torch.zeros(7, 5), leaf), term.target(t), LABELS)
        loss.backward()
        results.append((loss.item(), leaf.grad))
    for value, grad in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-7)


def test_rkd_does_not_change_under_moves(pair: Pair, features: tuple[Signals, Signals]) -> None:
    # Source: relative distances and angles are those of a figure moved, turned and scaled.
    term = make("rkd", pair)
    turn, _ = torch.linalg.qr(torch.randn(16, 16))
    moved = replace(features[0], pooled_BD=0.3 * features[0].pooled_BD @ turn + 50.0)
    assert run(term, moved, features[1]) == pytest.approx(run(term, *features), rel=1e-4)


def test_rkd_of_classes_far_apart(pair: Pair) -> None:
    # Source: numpy loops. Late in training images of a class lie close together, and classes far from each other.
    centres = torch.tensor([-5.0, 5.0, 5.0, -5.0, 5.0, 5.0])[:, None]
    s, t = pooled(centres + 0.1 * torch.randn(6, 16), 2 * centres + 0.1 * torch.randn(6, 24))
    (d_s, a_s), (d_t, a_t) = (rkd_by_hand(one) for one in (s, t))
    expected = huber(d_s - d_t).mean() + 2 * huber(a_s - a_t).mean()
    assert run(make("rkd", pair), s, t) == pytest.approx(expected, rel=1e-3)


def test_rkd_of_images_at_one_place(pair: Pair) -> None:
    # Source: without a direction there is no gradient; it must not be that of a division by nearly nothing.
    leaf = torch.randn(5, 16)
    leaf[1] = leaf[0]
    leaf.requires_grad_()
    term = make("rkd", pair)
    loss = term(Signals(torch.zeros(5, 5), leaf), {"pooled": torch.randn(5, 24)}, LABELS)
    loss.backward()
    assert torch.isfinite(loss) and leaf.grad.abs().max() < 10.0


@pytest.mark.parametrize("self_similarity", [False, True])
def test_pkt(pair: Pair, features: tuple[Signals, Signals], self_similarity: bool) -> None:
    # Sources: Passalis and Tefas 2018, one image at a time; torchdistill's class, a mean over B^2 instead of B.
    s, t = ((numpy_gram(f64(one.pooled_BD)[None])[0] + 1) / 2 for one in features)
    expected = []
    for i in range(6):
        others = [j for j in range(6) if self_similarity or j != i]
        p, q = (one[i, others] / one[i, others].sum() for one in (t, s))
        expected.append((p * np.log(p / q)).sum())
    found = run(make("pkt", pair, self_similarity=self_similarity), *features)
    assert found == pytest.approx(np.mean(expected), rel=1e-4)
    if self_similarity:
        io = {"s": {"input": features[0].pooled_BD}}, {"t": {"input": features[1].pooled_BD}}
        theirs = PKTLoss("s", "input", "t", "input")(*io).item()
        assert found / 6 == pytest.approx(theirs, abs=1e-6)


def test_pkt_with_opposite_features_is_finite(pair: Pair) -> None:
    # Source: opposite images are neighbours with probability 0, whose logarithm must not be taken.
    leaf = torch.tensor([[1.0] * 16, [-1.0] * 16, [1.0, -1.0] * 8]).requires_grad_()
    loss = make("pkt", pair)(Signals(torch.zeros(3, 5), leaf), {"pooled": torch.randn(3, 24)}, LABELS)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all()


def test_spkd(pair: Pair, features: tuple[Signals, Signals]) -> None:
    # Source: Tung and Mori 2019, Eq. 2 to 4, in numpy: rows of the Gram matrix over their lengths.
    grams = [f64(one.pooled_BD) @ f64(one.pooled_BD).T for one in features]
    s, t = (gram / np.linalg.norm(gram, axis=1, keepdims=True) for gram in grams)
    assert run(make("spkd", pair), *features) == pytest.approx(((s - t) ** 2).sum() / 36, rel=1e-5)


@pytest.mark.parametrize("name", ["rkd", "pkt", "spkd"])
def test_a_batch_of_one_image_says_nothing(name: str, pair: Pair) -> None:
    leaf = torch.randn(1, 16, requires_grad=True)
    loss = make(name, pair)(Signals(torch.zeros(1, 5), leaf), {"pooled": torch.randn(1, 24)}, Labels(CLASSES[:1]))
    loss.backward()
    assert loss.item() == 0.0 and leaf.grad.abs().sum() == 0.0


# --- contrast ---------------------------------------------------------------------------------------------------------


def crd_by_hand(term: Any, student: Signals, teacher: Signals, classes: list[int | None]) -> float:
    """InfoNCE in both directions; images of one known class are no negatives."""
    embedded = []
    for signals, layer in ((student, term.student_map), (teacher, term.teacher_map)):
        x = f64(signals.pooled_BD) @ f64(layer.weight).T + f64(layer.bias)
        embedded.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    total = 0.0
    for anchors, others in (embedded, embedded[::-1]):
        for i, anchor in enumerate(anchors):
            kept = [j for j in range(len(others)) if j == i or classes[j] is None or classes[j] != classes[i]]
            total += np.log(sum(np.exp(anchor @ others[j] / 0.1) for j in kept)) - anchor @ others[i] / 0.1
    return total / len(classes)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS, [0, 3, 1, 4, 3, 2]),
        (Labels(torch.tensor([0, -1, 1, -1, 1, 0]), labeled=0.6), [0, None, 1, None, 1, 0]),
        (
            Labels(CLASSES, torch.tensor([3, 0, 1, 1, 3, 3]), torch.tensor([0.9, 0.2, 0.5, 0.1, 0.7, 0.3])),
            [0, 0, 1, 1, 3, 3],  # the class with the larger share
        ),
    ],
    ids=["labels", "some labels", "mixed"],
)
def test_crd(pair: Pair, features: tuple[Signals, Signals], labels: Labels, classes: list[int | None]) -> None:
    # Source: the sum over pairs, one at a time, in numpy.
    term = make("crd", pair, temperature=0.1, width=12)
    assert run(term, *features, labels) == pytest.approx(crd_by_hand(term, *features, classes), rel=1e-5)


def test_crd_without_negatives_is_zero(pair: Pair, features: tuple[Signals, Signals]) -> None:
    # Source: the only candidate is the right one. All images are of one class.
    assert run(make("crd", pair), *features, Labels(torch.full((6,), 2))) == 0.0


def test_queue_is_seeds_divergence_over_the_last_features(pair: Pair) -> None:
    """Equations 2 to 5 of arXiv 2101.04731 in numpy float64, minus the teacher's entropy; until it overflows."""
    draws = np.random.default_rng(0)
    term = make("queue", pair, size=8)
    weight = f64(term.projector.weight)

    def unit(x: Array) -> Array:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def log_softmax(x: Array) -> Array:
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    entries = np.zeros((0, pair.teacher.width))
    for _ in range(3):
        ours, theirs = (draws.normal(size=(3, one.width)) for one in (pair.student, pair.teacher))
        signals = pooled(torch.from_numpy(ours).float(), torch.from_numpy(theirs).float())
        entries = np.concatenate([entries, unit(theirs)])[-8:]
        student = log_softmax(unit(ours @ weight.T) @ entries.T / 0.2)
        teacher = log_softmax(unit(theirs) @ entries.T / 0.01)
        wanted = (np.exp(teacher) * (teacher - student)).sum(axis=1).mean()
        assert run(term, *signals) == pytest.approx(wanted, rel=1e-4)
        assert run(term, *signals) == pytest.approx(wanted, rel=1e-4), "a pass changes nothing"
        term.after_step()
    assert np.abs(f64(term.queue_KD) - entries).max() < 1e-6 and int(term.filled) == 8
    # A schedule scales both temperatures.
    scaled, half = (make("queue", pair, size=8, temperature=t, teacher_temperature=2 * t) for t in (0.2, 0.1))
    for one in (scaled, half):
        one.load_state_dict(term.state_dict())
    scaled.scale_temperature(0.5)
    assert run(scaled, *signals) == run(half, *signals)
