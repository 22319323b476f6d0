"""Pairing of blocks by hand-written tables; resizing of maps by what it must conserve."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from remap.errors import BackboneError, RemapError
from remap.remapping.alignment import Resize, class_row, pair_blocks, to_shared_tokens
from remap.remapping.signals import Attention

GRIDS = [((4, 4), (3, 3)), ((3, 3), (4, 4)), ((2, 5), (4, 3)), ((8, 8), (2, 2))]
each_resize = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
each_grid = pytest.mark.parametrize(("source", "target"), GRIDS)
each_class = pytest.mark.parametrize("has_class", [True, False])


def random_map(grid: tuple[int, int], has_class: bool, batch: tuple[int, ...] = (2,)) -> torch.Tensor:
    tokens = grid[0] * grid[1] + has_class
    return (2.0 * torch.randn(*batch, tokens, tokens)).softmax(dim=-1)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # Counted from 1 the uniform map is m -> ceil(m T / S); the tables are written out by hand, counted from 0.
        (4, 12, ((0, 2), (1, 5), (2, 8), (3, 11))),  # TinyBERT's own case, g(m) = 3 m
        (12, 12, tuple((m, m) for m in range(12))),
        (2, 3, ((0, 1), (1, 2))),
        (3, 2, ((0, 0), (1, 1), (2, 1))),
        (5, 7, ((0, 1), (1, 2), (2, 4), (3, 5), (4, 6))),
        (1, 24, ((0, 23),)),
    ],
)
def test_uniform_pairs(student: int, teacher: int, expected: Any) -> None:
    assert pair_blocks("uniform", student, teacher) == expected


def test_last_and_explicit_pairs() -> None:
    assert pair_blocks("last", 12, 24) == ((11, 23),)
    assert pair_blocks([(0, 0), (-1, -2), (3, 5)], 12, 24) == ((0, 0), (11, 22), (3, 5))


@pytest.mark.parametrize("layers", [[(12, 0)], [(0, 24)], [(-13, 0)], [(0, 1), (0, -25)], []])
def test_pairs_out_of_range_name_the_depths(layers: list[tuple[int, int]]) -> None:
    with pytest.raises(BackboneError, match="the student has 12 blocks .* the teacher 24") as caught:
        pair_blocks(layers, 12, 24)
    assert isinstance(caught.value, RemapError)


@each_resize
@each_grid
@each_class
def test_rows_stay_distributions(source: Any, target: Any, has_class: bool, interpolation: Any) -> None:
    found = Resize(source, target, has_class, interpolation).attention(random_map(source, has_class, (2, 3)))
    tokens = target[0] * target[1] + has_class
    assert found.shape == (2, 3, tokens, tokens) and found.min() >= 0.0
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3, tokens), rtol=0.0, atol=1e-5)


@each_resize
@each_grid
def test_class_row_keeps_its_weights(source: Any, target: Any, interpolation: Any) -> None:
    # Source: conservation. The class query's weight on the class key, and so its patch mass, is not touched.
    given = random_map(source, True)
    found = Resize(source, target, True, interpolation).attention(given)
    torch.testing.assert_close(found[:, 0, 0], given[:, 0, 0])
    torch.testing.assert_close(found[:, 0, 1:].sum(dim=-1), given[:, 0, 1:].sum(dim=-1))


def test_class_key_of_patch_rows_is_interpolated_like_an_image() -> None:
    # Source: torch's own image resize of the class column; a row's class weight survives the resize of its keys.
    given = random_map((3, 3), True)
    found = Resize((3, 3), (5, 4), True).attention(given)
    column = given[:, 1:, 0].reshape(2, 1, 3, 3)
    expected = F.interpolate(column, size=(5, 4), mode="bilinear", antialias=True).reshape(2, 20)
    torch.testing.assert_close(found[:, 1:, 0], expected, rtol=0.0, atol=1e-6)


@each_class
def test_equal_grids_give_the_same_tensor(has_class: bool) -> None:
    given = random_map((3, 4), has_class)
    assert Resize((3, 4), (3, 4), has_class).attention(given) is given


@each_resize
@each_grid
def test_uniform_maps_stay_uniform(source: Any, target: Any, interpolation: Any) -> None:
    # Source: closed form. Equal weight on every patch, a quarter on the class token, before and after.
    before, after = source[0] * source[1], target[0] * target[1]
    given = torch.full((1, before + 1, before + 1), 0.75 / before)
    given[..., 0] = 0.25
    found = Resize(source, target, True, interpolation).attention(given)
    expected = torch.full((1, after + 1, after + 1), 0.75 / after)
    expected[..., 0] = 0.25
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)


def test_a_row_without_patch_mass_stays_on_the_class_token() -> None:
    given = torch.zeros(1, 10, 10)
    given[..., 0] = 1.0
    found = Resize((3, 3), (4, 4), True).attention(given)
    expected = torch.zeros(1, 17, 17)
    expected[..., 0] = 1.0
    torch.testing.assert_close(found, expected)


def test_doubling_a_grid_by_hand() -> None:
    # Source: bilinear weights by hand. From 2 to 4 columns the centres lie at -1/4, 1/4, 3/4, 5/4 of the old ones.
    weights = np.array([[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]])
    given = torch.tensor([[[0.9, 0.1], [0.4, 0.6]]])
    keys = given[0].double().numpy() @ weights.T
    keys = keys / keys.sum(axis=1, keepdims=True)
    expected = torch.from_numpy(weights @ keys).float()[None]
    torch.testing.assert_close(Resize((1, 2), (1, 4), False).attention(given), expected, rtol=0.0, atol=1e-6)


@each_resize
def test_resize_equals_torchs_image_resize(interpolation: Any) -> None:
    # Source: F.interpolate on every row as an image, then on every column; float64; our matrices are not used.
    given = torch.randn(1, 12, 12, dtype=torch.float64).softmax(dim=-1)
    rows = F.interpolate(given.reshape(12, 1, 4, 3), size=(3, 5), mode=interpolation, antialias=True).clamp_min(0)
    rows = rows.reshape(12, 15)
    rows = rows / rows.sum(dim=1, keepdim=True)
    columns = F.interpolate(rows.T.reshape(15, 1, 4, 3), size=(3, 5), mode=interpolation, antialias=True)
    expected = columns.clamp_min(0).reshape(15, 15).T
    expected = expected / expected.sum(dim=1, keepdim=True)
    found = Resize((4, 3), (3, 5), False, interpolation).attention(given)
    torch.testing.assert_close(found[0], expected, rtol=0.0, atol=1e-9)


def test_a_missing_class_token_is_cut_and_rows_renormalised() -> None:
    # Source: the cut rows of the full map divided by their sums, in numpy.
    q, k = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    full = Attention(q, k, has_class_token=True, grid=(3, 3))
    cut = full.map_BHSS().double().numpy()[:, :, 1:, 1:]
    found = to_shared_tokens(full, keep_class_token=False)
    assert not found.has_class_token and found.grid == (3, 3)
    np.testing.assert_allclose(found.map_BHSS().numpy(), cut / cut.sum(axis=-1, keepdims=True), rtol=0, atol=1e-6)
    assert to_shared_tokens(full, keep_class_token=True) is full and found.v_BHSh is None
    assert to_shared_tokens(found, keep_class_token=False) is found


def test_a_missing_class_token_is_cut_of_values_and_bias_too() -> None:
    # Source: token 0 is the class token; numpy deletes it.
    q, k, v = (torch.randn(2, 3, 10, 4) for _ in range(3))
    bias = torch.randn(1, 3, 10, 10)
    found = to_shared_tokens(Attention(q, k, True, (3, 3), bias, v), keep_class_token=False)
    assert found.v_BHSh is not None and found.bias_BHSS is not None
    np.testing.assert_array_equal(found.v_BHSh.numpy(), np.delete(v.numpy(), 0, axis=2))
    np.testing.assert_array_equal(found.bias_BHSS.numpy(), np.delete(np.delete(bias.numpy(), 0, axis=3), 0, axis=2))


@pytest.mark.parametrize("with_bias", [True, False])
def test_class_row_is_row_0_of_the_map(with_bias: bool) -> None:
    # Source: the whole map.
    q, k = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    full = Attention(q, k, True, (3, 3), torch.randn(1, 3, 10, 10) if with_bias else None)
    row = class_row(full).map_BHSS()
    assert row.shape == (2, 3, 1, 10)
    torch.testing.assert_close(row, full.map_BHSS()[:, :, :1], rtol=0.0, atol=1e-7)


@each_resize
@each_grid
def test_resized_rows_are_the_class_row_of_the_resized_map(source: Any, target: Any, interpolation: Any) -> None:
    # Source: the resize of the whole map, which keeps the class row apart.
    given = random_map(source, True, (2, 3))
    resize = Resize(source, target, True, interpolation)
    found, whole = resize.rows(given[..., :1, :]), resize.attention(given)
    torch.testing.assert_close(found, whole[..., :1, :], rtol=0.0, atol=1e-7)


@each_resize
@each_grid
@each_class
def test_tokens_are_resized_like_images(source: Any, target: Any, has_class: bool, interpolation: Any) -> None:
    # Source: torch's own image resize of each channel in float64; the class token's vector is not touched.
    given = torch.randn(2, source[0] * source[1] + has_class, 5, dtype=torch.float64)
    found = Resize(source, target, has_class, interpolation).tokens(given)
    images = given[:, int(has_class) :].mT.reshape(2, 5, *source)
    expected = F.interpolate(images, size=target, mode=interpolation, antialias=True).flatten(2).mT
    torch.testing.assert_close(found[:, int(has_class) :], expected, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(found[:, : int(has_class)], given[:, : int(has_class)], rtol=0.0, atol=0.0)


def test_scores_are_resized_on_rows_and_then_on_columns() -> None:
    # Source: closed form. Scores q k^T of resized queries and keys, because both are linear.
    q, k = torch.randn(2, 13, 4, dtype=torch.float64), torch.randn(2, 13, 4, dtype=torch.float64)
    resize = Resize((4, 3), (3, 5), True)
    found = resize.scores(q @ k.mT)
    q, k = resize.tokens(q), resize.tokens(k)
    torch.testing.assert_close(found, q @ k.mT, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("resize", [Resize.rows, Resize.scores, Resize.tokens])
def test_nothing_is_done_on_equal_grids(resize: Any) -> None:
    given = random_map((3, 4), True)
    assert resize(Resize((3, 4), (3, 4), True), given).data_ptr() == given.data_ptr()
