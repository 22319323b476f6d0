"""Losses on attention against second formulas in numpy float64, and what they promise: head counts, token orders."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from remap.backbones.anatomy import anatomy_of, tensor_at
from remap.errors import BackboneError
from remap.remapping import LOSSES
from remap.remapping.knowledge.attention import transfer_warning
from remap.remapping.labels import Labels
from remap.remapping.objective import LossTerm, Pair
from remap.remapping.signals import Attention, Needs, Signals

Array = NDArray[np.float64]
FLOOR = 1e-6  # added to resized rows in front of the product of heads; stated by the loss
LABELS = Labels(torch.tensor([0, 1]))


# For test_losses_conformance.py, which explains the keys.
CONFORMANCE: dict[str, dict[str, Any]] = {
    "attention_cls": {
        "variants": [{"heads": "mean", "layers": "uniform"}, {"heads": "mean", "temperature": 2.0}],
        "alike": {"layers": "uniform"},
    },
    "attention_scores": {"variants": [{"layers": "uniform", "resize": "bicubic"}], "alike": {"layers": "uniform"}},
    "relations": {
        "variants": [{"relations": ["v"], "relation_heads": 8}, {"relations": ["q", "k"], "layers": "uniform"}],
        "alike": {"layers": "uniform"},
    },
}


def f64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(x: Array) -> Array:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def kl(teacher: Array, student: Array) -> float:
    """Mean over rows of KL(teacher || student)."""
    return float(np.mean(np.sum(teacher * (np.log(teacher) - np.log(student)), axis=-1)))


def attention(heads: int, grid: tuple[int, int], width: int = 4, has_class: bool = True, batch: int = 2) -> Attention:
    """Random queries, keys, values and a position bias (as BEiT has)."""
    tokens = grid[0] * grid[1] + has_class
    q, k, v = (torch.randn(batch, heads, tokens, width) for _ in range(3))
    return Attention(q, k, has_class, grid, torch.randn(1, heads, tokens, tokens), v)


def numpy_map(one: Attention) -> Array:
    scores = np.einsum("bhsd,bhtd->bhst", f64(one.q_BHSh), f64(one.k_BHSh))
    return softmax(scores + (f64(one.bias_BHSS) if one.bias_BHSS is not None else 0.0))


def numpy_resize(images: Array, target: tuple[int, int], mode: str) -> Array:
    """PyTorch's own resize of (n, h, w) images in float64; our matrices are not used."""
    resized = F.interpolate(torch.from_numpy(images)[None], size=target, mode=mode, antialias=True)
    return resized[0].numpy()


def signals(blocks: dict[int, Attention]) -> Signals:
    return Signals(torch.zeros(2, 5), None, blocks)


def term_of(name: str, pair: Pair, **options: Any) -> LossTerm:
    kind = LOSSES.load(name)
    return kind(pair, kind.Config(**options))


def value(name: str, pair: Pair, student: Attention, teacher: Attention, **options: Any) -> float:
    """One student block (its last) against one teacher block (its last)."""
    term = term_of(name, pair, **options)
    ((s, t),) = term.blocks
    return term(signals({s: student}), term.target(signals({t: teacher})), LABELS).item()


@pytest.fixture
def twins(build_network: Any) -> Pair:
    """Student and teacher of 3 heads, width 24, grid 3 x 3, 2 blocks."""
    network = build_network(num_heads=3)
    return Pair(network.anatomy, network.anatomy, 5)


# attention_cls


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_class_row_as_a_product_of_heads(pair: Pair, temperature: float | None) -> None:
    # Source: p(s) = prod_h p_h(s)^(1/T), normalised by hand; the teacher's 4 x 4 row is first resized a head by
    # PyTorch's bicubic filter and scaled to the mass 1 - p(class) (Wang et al. 2022); T = 10 unless told.
    student, teacher = attention(2, (3, 3)), attention(3, (4, 4))
    power = 1.0 / (temperature or 10.0)
    rows = numpy_map(teacher)[:, :, 0]
    patches = numpy_resize(rows[..., 1:].reshape(6, 4, 4), (3, 3), "bicubic").clip(0).reshape(2, 3, 9)
    patches *= (1 - rows[..., :1]) / patches.sum(axis=-1, keepdims=True)
    resized = np.concatenate([rows[..., :1], patches], axis=-1)

    def product(rows_BHS: Array) -> Array:
        together = np.prod(rows_BHS**power, axis=1)
        return together / together.sum(axis=-1, keepdims=True)

    expected = kl(product(resized + FLOOR), product(numpy_map(student)[:, :, 0]))
    options = {} if temperature is None else {"temperature": temperature}
    assert value("attention_cls", pair, student, teacher, **options) == pytest.approx(expected, rel=1e-4)


def test_class_row_mean_and_head_by_head(twins: Pair) -> None:
    # Source: row 0 of the whole map in numpy, averaged over heads or not.
    student, teacher = attention(3, (3, 3)), attention(3, (3, 3))
    s, t = numpy_map(student)[:, :, 0], numpy_map(teacher)[:, :, 0]
    each, mean = kl(t, s), kl(t.mean(axis=1), s.mean(axis=1))
    assert value("attention_cls", twins, student, teacher, heads="each") == pytest.approx(each, rel=1e-5)
    assert value("attention_cls", twins, student, teacher, heads="mean") == pytest.approx(mean, rel=1e-5)


def test_class_row_of_a_network_is_the_row_of_timms_map(pair: Pair, teacher: Any, maps_of_timm: Any) -> None:
    # Source: timm's own full map; row of the class token cut to {class, patches}, divided by its sum, resized.
    term = term_of("attention_cls", pair, heads="mean", resize="bilinear")
    (item,) = term.target(teacher.signals(term.teacher_needs())).values()
    anatomy = teacher.anatomy
    row = f64(maps_of_timm(teacher.model, anatomy, teacher.images)[-1])[:, :, 0]
    row = np.concatenate([row[..., :1], row[..., anatomy.num_prefix_tokens :]], axis=-1)
    row = (row / row.sum(axis=-1, keepdims=True)).mean(axis=1)
    patches = numpy_resize(row[:, 1:].reshape(4, 4, 4), (3, 3), "bilinear").reshape(4, 9)
    patches *= (1 - row[:, :1]) / patches.sum(axis=-1, keepdims=True)
    assert item.shape == (4, 10)
    np.testing.assert_allclose(f64(item), np.concatenate([row[:, :1], patches], axis=-1), rtol=0, atol=1e-5)


def test_class_row_is_row_0_of_what_attention_keeps(pair: Pair, teacher: Any) -> None:
    # Source: the loss ``attention``, whose maps have their own tests; here with the teacher on another grid.
    rows = []
    for name in ("attention", "attention_cls"):
        term = term_of(name, pair, heads="mean", resize="bilinear")
        rows += term.target(teacher.signals(term.teacher_needs())).values()
    torch.testing.assert_close(rows[0][:, 0], rows[1], rtol=0.0, atol=1e-6)


def test_class_row_never_makes_the_whole_map(twins: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # Source: counting. One query a head and image, whatever the number of tokens.
    shapes = []
    scores = Attention.scores_BHSS
    monkeypatch.setattr(
        Attention, "scores_BHSS", lambda one: shapes.append(tuple((found := scores(one)).shape)) or found
    )
    value("attention_cls", twins, attention(3, (3, 3)), attention(3, (3, 3)))
    assert shapes == [(2, 3, 1, 10)] * 2


@pytest.mark.parametrize("without", ["student", "teacher"])
def test_class_row_needs_class_tokens(without: str, build_network: Any) -> None:
    plain, bare = build_network().anatomy, build_network("no_class").anatomy
    pair = Pair(bare, plain, 5) if without == "student" else Pair(plain, bare, 5)
    with pytest.raises(BackboneError, match=f"no class token: {without}"):
        term_of("attention_cls", pair)


@pytest.mark.parametrize("name", ["attention_cls", "attention_scores"])
def test_head_by_head_needs_equal_heads(name: str, pair: Pair) -> None:
    with pytest.raises(BackboneError, match="student 2, teacher 3"):
        term_of(name, pair, heads="each")


@pytest.mark.parametrize("spread", [1.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize(
    ("name", "heads"),
    [("attention", "mean"), ("attention", "each"), *(("attention_cls", one) for one in ("product", "mean", "each"))],
)
def test_gradient_is_exact_however_sharp_the_maps(name: str, heads: str, spread: float, twins: Pair) -> None:
    # Source: PyTorch's derivative of the formula in float64, on probabilities: at a spread of 10 the student's go
    # down to 1e-30, and a floor or a clamp in front of the logarithm would take the gradient of most entries away.
    student, teacher = (
        replace(one, q_BHSh=one.q_BHSh * (spread / one.scores_BHSS().std()), bias_BHSS=None)
        for one in (replace(attention(3, (3, 3)), bias_BHSS=None) for _ in range(2))
    )
    q = student.q_BHSh.requires_grad_()
    term = term_of(name, twins, heads=heads)
    ((s, t),) = term.blocks
    term(signals({s: student}), term.target(signals({t: teacher})), LABELS).backward()

    def combined(one: Attention, q_BHSh: Tensor) -> Tensor:
        p = (q_BHSh @ one.k_BHSh.double().mT).softmax(-1)[:, :, : None if name == "attention" else 1]
        if heads == "product":
            power = (p**0.1).prod(dim=1)
            return power / power.sum(-1, keepdim=True)
        return p.mean(dim=1) if heads == "mean" else p

    exact = student.q_BHSh.detach().double().requires_grad_()
    wanted, found = combined(teacher, teacher.q_BHSh.double()), combined(student, exact)
    (wanted * (wanted.log() - found.log())).sum(-1).mean().backward()
    assert exact.grad is not None and q.grad is not None
    assert (q.grad - exact.grad).norm() <= 1e-5 * exact.grad.norm()


# attention_scores


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_scores(twins: Pair, heads: str) -> None:
    # Source: squared difference of q k^T + bias in numpy, mean over everything.
    student, teacher = attention(3, (3, 3)), attention(3, (3, 3))
    s, t = (np.einsum("bhsd,bhtd->bhst", f64(x.q_BHSh), f64(x.k_BHSh)) + f64(x.bias_BHSS) for x in (student, teacher))
    if heads == "mean":
        s, t = s.mean(axis=1), t.mean(axis=1)
    found = value("attention_scores", twins, student, teacher, heads=heads)
    assert found == pytest.approx(np.mean((s - t) ** 2), rel=1e-5)


# relations


def numpy_relations(x: Tensor, heads: int, scale: float = 1.0) -> Array:
    """softmax(X X^T / sqrt(d)) of each of ``heads`` equal parts of the channels, one image and part at a time."""
    wide = np.concatenate([f64(x)[:, h] for h in range(x.shape[1])], axis=-1) * scale
    parts = np.split(wide, heads, axis=-1)
    return np.stack([[softmax(p[b] @ p[b].T / np.sqrt(p.shape[-1])) for p in parts] for b in range(len(wide))])


@pytest.mark.parametrize("relations", [("q", "k", "v"), ("v",), ("k", "q")])
def test_relations(pair: Pair, relations: tuple[str, ...]) -> None:
    # Source: MiniLMv2's formula a part at a time; heads 2 of 8 against 3 of 8 channels, re-split into 4. The signal's
    # queries are divided by sqrt(8) already; the paper's are not.
    student, teacher = attention(2, (3, 3), width=8), attention(3, (3, 3), width=8)
    expected = []
    for which in relations:
        scale = np.sqrt(8.0) if which == "q" else 1.0
        s, t = (numpy_relations(getattr(one, f"{which}_BHSh"), 4, scale) for one in (student, teacher))
        expected.append(kl(t, s))
    found = value("relations", pair, student, teacher, relations=relations, relation_heads=4)
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
@pytest.mark.parametrize("both_class", [True, False])
def test_relations_of_resized_vectors(pair: Pair, build_network: Any, resize: str, both_class: bool) -> None:
    # Source: PyTorch's resize of each channel as an image, the class token's vector put back in front or left out.
    if not both_class:
        pair = replace(pair, student=build_network("no_class", num_heads=2, embed_dim=16).anatomy)
    student, teacher = attention(2, (3, 3), width=8, has_class=both_class), attention(3, (4, 4), width=8)
    wide = f64(teacher.v_BHSh).transpose(0, 1, 3, 2).reshape(2, 24, 17)
    patches = numpy_resize(wide[..., 1:].reshape(48, 4, 4), (3, 3), resize).reshape(2, 24, 9)
    carried = np.concatenate([wide[..., :1], patches], axis=-1) if both_class else patches
    t = numpy_relations(torch.from_numpy(carried.transpose(0, 2, 1))[:, None], 2)
    expected = kl(t, numpy_relations(student.v_BHSh, 2))
    found = value("relations", pair, student, teacher, relations=["v"], relation_heads=2, resize=resize)
    assert found == pytest.approx(expected, rel=1e-5)


def resplit(one: Attention, heads: int) -> Attention:
    """The same channels as another number of heads, and so another scale of the queries."""

    def split(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)

    old, new = one.q_BHSh.shape[-1], one.q_BHSh.shape[1] * one.q_BHSh.shape[-1] / heads
    return replace(
        one,
        q_BHSh=split(one.q_BHSh) * (old / new) ** 0.5,
        k_BHSh=split(one.k_BHSh),
        v_BHSh=split(one.v_BHSh),
        bias_BHSS=None,
    )


def test_relations_do_not_depend_on_the_numbers_of_heads(build_network: Any) -> None:
    # Source: invariance. The channels stay, only how attention splits them into heads changes.
    teacher_heads = build_network(num_heads=3).anatomy
    student, teacher = attention(3, (3, 3), width=8), attention(3, (3, 3), width=8)
    found = []
    for heads in (3, 2, 6, 1):
        anatomy = build_network(num_heads=heads).anatomy
        found.append(value("relations", Pair(anatomy, teacher_heads, 5), resplit(student, heads), teacher))
    assert found[0] > 0.01
    assert found[1:] == pytest.approx([found[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("name", ["attention", "attention_cls", "attention_scores", "relations"])
def test_order_of_patches_does_not_matter(name: str, twins: Pair) -> None:
    # Source: invariance. Patches of both networks in another order, the class token in front as before.
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(9)])

    def shuffled(one: Attention) -> Attention:
        q, k, v = (x[:, :, order] for x in (one.q_BHSh, one.k_BHSh, one.v_BHSh))
        return replace(one, q_BHSh=q, k_BHSh=k, v_BHSh=v, bias_BHSS=one.bias_BHSS[..., order, :][..., order])

    student, teacher = attention(3, (3, 3), width=8), attention(3, (3, 3), width=8)
    before = value(name, twins, student, teacher)
    assert before > 1e-3
    assert value(name, twins, shuffled(student), shuffled(teacher)) == pytest.approx(before, rel=1e-5)
    assert value(name, twins, shuffled(student), teacher) != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # (width, heads) of both sides; the largest common divisor of the widths that is not above the teacher's heads.
        ((24, 3), (24, 3), 3),
        ((16, 2), (24, 3), 2),
        ((16, 2), (24, 6), 4),
        ((48, 3), (32, 4), 4),
        ((20, 2), (24, 1), 1),
    ],
)
def test_default_relation_heads(student: Any, teacher: Any, expected: int, build_network: Any) -> None:
    anatomies = [build_network(embed_dim=width, num_heads=heads).anatomy for width, heads in (student, teacher)]
    assert term_of("relations", Pair(*anatomies, 5)).heads == expected


def test_relation_heads_must_divide_both_widths(pair: Pair) -> None:
    with pytest.raises(BackboneError, match="(?s)3; widths: student 16, teacher 24.*divisors of 8"):
        term_of("relations", pair, relation_heads=3)
    with pytest.raises(BackboneError, match="once at most"):
        term_of("relations", pair, relations=["q", "q"])


@pytest.mark.parametrize("relations", [["q", "k"], ["v"]])
def test_values_are_asked_for_where_they_are_related(pair: Pair, relations: list[str]) -> None:
    term = term_of("relations", pair, relations=relations, layers=[[0, 1], [1, 2]])
    values = frozenset({1, 2}) if "v" in relations else frozenset()
    assert term.teacher_needs() == Needs(attention=frozenset({1, 2}), values=values)


@pytest.mark.parametrize("name", ["attention_cls", "attention_scores", "relations"])
def test_names_of_items_hold_all_they_depend_on(name: str, pair: Pair, build_network: Any) -> None:
    # Another grid, block, resize or set of shared tokens gives another value, and must give another name.
    other_grid = build_network(img_size=40, num_heads=2, embed_dim=16).anatomy
    terms = [
        term_of(name, pair),
        term_of(name, pair, resize="bilinear" if name == "attention_cls" else "bicubic"),
        term_of(name, pair, layers=[[0, 0]]),
        term_of(name, replace(pair, student=other_grid)),
    ]
    if name == "attention_cls":
        terms += [term_of(name, pair, heads="mean"), term_of(name, pair, temperature=2.0)]
    else:
        bare = build_network("no_class", num_heads=2, embed_dim=16).anatomy
        terms.append(term_of(name, replace(pair, student=bare)))
    names = {term.item("x", term.blocks[0][1]) for term in terms}
    assert len(names) == len(terms)


@pytest.mark.parametrize("family", ["plain", "qk_norm", "dinov3", "eva02_split", "beit", "distilled"])
@pytest.mark.parametrize("name", ["attention_cls", "attention_scores", "relations"])
def test_a_network_that_teaches_itself_has_nothing_to_learn(name: str, family: str, build_network: Any) -> None:
    # Source: closed form. Every divergence of a thing from itself is 0, whichever attention the family has.
    network = build_network(family)
    term = term_of(name, Pair(network.anatomy, network.anatomy, 5), layers="uniform")
    seen = network.signals(term.student_needs())
    assert term(seen, term.target(seen), LABELS).item() == pytest.approx(0.0, abs=1e-6)


# transfer_warning

PLAIN = "vit_small_patch16_224.augreg_in21k"


@pytest.mark.parametrize(
    ("teacher", "parts"),
    [
        ("vit_large_patch14_dinov2.lvd142m", "LayerScale"),
        ("vit_base_patch14_reg4_dinov2.lvd142m", "LayerScale and registers"),
        ("vit_base_patch16_clip_224.openai", "a norm in front of the blocks"),
        ("beitv2_base_patch16_224.in1k_ft_in22k", "LayerScale and relative position biases"),
    ],
)
def test_warning_names_what_the_family_has(teacher: str, parts: str) -> None:
    # Source of the parts: timm's own models, looked into here.
    with torch.device("meta"):
        model = timm.create_model(teacher)
    anatomy = anatomy_of(model)
    scale = anatomy.blocks[0].attn_scale
    if scale is not None:
        assert tensor_at(model, scale).ndim == 1
    found = {
        "LayerScale": scale is not None,
        "registers": getattr(model, "num_reg_tokens", 0) > 0,
        "a norm in front of the blocks": "norm_pre" in anatomy.embedding_norms,
        "relative position biases": getattr(model.blocks[0].attn, "relative_position_bias_table", None) is not None,
    }
    assert " and ".join(part for part, there in found.items() if there) == parts
    warning = transfer_warning(teacher, PLAIN, ["kd", "attention"])
    assert warning is not None and f"here {parts}." in warning and teacher in warning and "2605.07191" in warning


@pytest.mark.parametrize("used", ["attention", "attention_cls", "attention_scores", "relations", "attention_copy"])
def test_warning_only_where_attention_is_carried_over(used: str) -> None:
    teacher = "vit_base_patch14_dinov2.lvd142m"
    assert transfer_warning(teacher, PLAIN, ["ce", "kd", "feature"]) is None
    warning = transfer_warning(teacher, PLAIN, ["ce", used])
    assert warning is not None and warning.startswith(f"{used}: ")


@pytest.mark.parametrize(
    ("teacher", "student", "warns"),
    [
        ("vit_base_patch16_224.dino", PLAIN, False),
        ("deit_base_patch16_224.fb_in1k", PLAIN, False),
        ("vit_base_patch16_224.mae", PLAIN, False),
        ("vit_base_patch16_siglip_224.webli", PLAIN, False),
        ("vit_base_patch16_dinov3.lvd1689m", PLAIN, False),
        ("beit_base_patch16_224.in22k_ft_in22k", PLAIN, False),
        ("vit_base_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m", False),
        ("vit_base_patch14_reg4_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m", True),
        ("vit_large_patch14_clip_224.openai", "vit_base_patch16_clip_224.laion2b", False),
        ("eva02_large_patch14_clip_224.merged2b", PLAIN, True),
        ("vit_large_patch14_clip_224.openai", "beitv2_base_patch16_224.in1k_ft_in22k", True),
    ],
)
def test_warning_by_family(teacher: str, student: str, warns: bool) -> None:
    assert {teacher, student} <= set(timm.list_pretrained())
    assert (transfer_warning(teacher, student, ["relations"]) is not None) == warns
