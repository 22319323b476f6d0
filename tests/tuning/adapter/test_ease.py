"""EASE's class means, by the formulas of Zhou et al. 2024 (arXiv 2403.12030) in float64, from features of each space.

How features are made, and a whole run of two sessions, are the subject of tests/pipeline/test_extend.py.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from remap.tuning.attached import Attached
from remap.tuning.base import Sample

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def third(build: Build, attach: Attach, tools: SimpleNamespace) -> SimpleNamespace:
    """The third session of a model that knew 0 and 1 after the first and 2 after the second; class 0 comes again."""
    attached = attach("ease", build("plain"), bottleneck=3, session=2, alpha=0.3)
    model, draws = attached.model, torch.Generator().manual_seed(3)
    means = model.head.remap_ease
    before = [torch.randn(5, model.num_features, generator=draws) for _ in range(2)]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".remap_ease.sets." in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=draws))
        means.session_C.copy_(torch.tensor([0, 0, 1, -1, -1]))
        for session, counts in enumerate(([2, 4, 3, 0, 0], [0, 0, 3, 0, 0])):
            means.of(session).copy_(before[session])
            means.images(session).copy_(torch.tensor(counts))
    images, labels = tools.images(6), torch.tensor([3, 3, 4, 0, 4, 3])
    attached.finishing[0].finish(Sample(lambda: iter([(images[:4], labels[:4]), (images[4:], labels[4:])]), 5))
    with torch.no_grad():
        model.eval()(images)  # which leaves what the classifier was given in each space
    return SimpleNamespace(model=model, means=means, before=before, images=images)


def test_known_classes_enter_and_old_means_are_made_again(third: SimpleNamespace) -> None:
    space = [x.double().numpy() for x in third.means._spaces.seen[0]]
    first, second = (one.double().numpy() for one in third.before)
    of_3, of_4 = ([x[rows].mean(0) for x in space] for rows in ([0, 1, 5], [2, 4]))
    own = np.stack([(2 * first[0] + space[0][3]) / 3, first[1], first[2], of_3[0], of_4[0]])
    # In the second space image 3 is all there is of class 0, and class 1 has none: of those that have, by the first.
    have = np.stack([space[1][3], second[2], of_3[1], of_4[1]])
    share = np.exp(unit(own[1]) @ unit(own[[0, 2, 3, 4]]).T)
    middle = np.stack([have[0], share / share.sum() @ have, *have[1:]])
    # In the third, classes 1 and 2 have none; the space of class 2 is the second.
    have = np.stack([space[2][3], of_3[2], of_4[2]])
    share = np.exp(np.stack([unit(own[1]) @ unit(own[[0, 3, 4]]).T, unit(middle[2]) @ unit(middle[[0, 3, 4]]).T]))
    made = share / share.sum(1, keepdims=True) @ have
    expected = [own, middle, np.stack([have[0], *made, *have[1:]])]
    for session, wanted in enumerate(expected):
        assert np.allclose(third.means.of(session).double().numpy(), wanted, atol=1e-5), session
    assert third.means.session_C.tolist() == [0, 0, 1, 2, 2]
    assert [third.means.images(s).tolist() for s in range(3)] == [[3, 4, 3, 3, 2], [1, 0, 3, 3, 2], [1, 0, 0, 3, 2]]


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_cosines_in_float32(third: SimpleNamespace, autocast: bool) -> None:
    """Weight 1 in the space of a class's session, and alpha over two in the others, whatever runs in bfloat16."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = third.model(third.images)
    seen: list[Tensor] = third.means._spaces.seen[0]
    expected = 0.0
    for session, x in enumerate(seen):
        weight = np.where(third.means.session_C.numpy() == session, 1.0, 0.15)
        means = third.means.of(session).double().numpy()
        expected = expected + weight * (unit(x.detach().double().numpy()) @ unit(means).T)
    assert logits.dtype == torch.float32
    assert np.allclose(logits.double().numpy(), float(third.means.scale) * expected, atol=1e-4)
