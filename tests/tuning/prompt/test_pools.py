"""Pools of prompts: keys are matched by hand, in float64, by the formulas of the papers, to queries of a plain model.

How a block attends to more keys and values is the subject of the tests of e2vpt.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from remap.backbones.families.key_values import extend_attention
from remap.tuning.attached import Attached
from remap.tuning.prompt.coda_prompt import CODAPrompt
from remap.tuning.prompt.pools import L2P, SessionOptions

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


def with_prefix(model: nn.Module, prefixes: dict[int, tuple[Tensor, Tensor]], images: Tensor) -> Tensor:
    """The plain model whose blocks attend to these keys and values (B, H, n, h) besides."""
    undo = [extend_attention(model.blocks[i].attn, lambda _k, pair=pair: pair) for i, pair in prefixes.items()]
    answer = model(images)
    for one in undo:
        one()
    return answer


def query(model: nn.Module, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


@pytest.mark.parametrize("variant", ["plain", "eva02", "beit"])
def test_l2p_takes_the_prompts_of_the_nearest_keys(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str
) -> None:
    base, images = build(variant).double(), tools.images(3).double()
    attached = attach("l2p", build(variant).double(), pool=5, length=2, top=2, pull=0.25)
    keys = attached.model.remap_pool.keys
    pool = attached.model.blocks[0].attn.remap_pool.prompts
    near = torch.stack([cosine(query(base, images), key) for key in keys], dim=1)
    chosen = near.argsort(dim=1, descending=True)[:, :2]
    prefix = tuple(torch.stack([torch.cat([pool[m, part] for m in row], dim=1) for row in chosen]) for part in range(2))
    assert torch.allclose(attached.model(images), with_prefix(base, {0: prefix}, images), rtol=1e-9, atol=1e-9)
    pulled = 0.25 * (1 - near.gather(1, chosen)).sum(1).mean()
    assert float(attached.penalty().detach()) == pytest.approx(float(pulled.detach()), rel=1e-6)
    attached.penalty().backward()
    moved = keys.grad.abs().sum(1) > 0
    assert moved.tolist() == [int(m) in chosen.unique().tolist() for m in range(5)]


def test_keys_are_matched_in_float32(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    """Also where the network runs in bfloat16, whose steps are wider than what tells near keys apart."""
    pool = attach("l2p", build("plain"), pool=5, length=2, top=2).model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pool(tools.images(3))
        query, keys = pool.remap_pool.query, pool.remap_pool.keys
        near = query.similarity(keys)
    expected = torch.stack([cosine(query.features_BD.double(), key) for key in keys.double()], dim=1)
    assert torch.allclose(near.double(), expected, atol=1e-6)


def test_dualprompt_trains_its_session_and_answers_by_the_nearest_key(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    base, images = build("plain").double(), tools.images(4).double()
    options = {"sessions": 4, "session": 2, "general": 2, "general_blocks": 1, "expert_blocks": 1, "length": 3}
    attached = attach("dualprompt", build("plain").double(), **options)
    model, keys = attached.model, attached.model.remap_pool.keys
    of_all, of_session = (model.blocks[index].attn.remap_pool.prompts for index in range(2))
    q = query(base, images)
    with torch.no_grad():  # two images each are nearest to a session that was, and to one to come
        keys[0], keys[3] = q[0], q[3]
    nearest = torch.stack([cosine(q, key) for key in keys[:3]], dim=1).argmax(1)
    assert nearest[0] == 0 and 3 not in nearest
    for training, rows in ((True, torch.full((4,), 2)), (False, nearest)):
        attached.train() if training else model.eval()
        prefixes = {
            0: tuple(of_all[0, part].expand(4, -1, -1, -1) for part in range(2)),
            1: tuple(of_session[rows, part] for part in range(2)),
        }
        assert torch.allclose(model(images), with_prefix(base, prefixes, images), rtol=1e-9, atol=1e-9)
        assert float(attached.penalty().detach()) == pytest.approx(
            float((1 - cosine(q, keys[2])).mean().detach()), rel=1e-6
        )


def test_coda_prompt_sums_components_up_to_its_session(build: Build, attach: Attach, tools: SimpleNamespace) -> None:
    base, images = build("plain").double(), tools.images(3).double()
    options = {"sessions": 3, "session": 1, "pool": 6, "length": 4, "num_blocks": 1, "orthogonality": 0.5}
    attached = attach("coda_prompt", build("plain").double(), **options)
    part = attached.model.blocks[0].attn.remap_pool
    prompts, keys, attention = (one.detach()[:4] for one in (part.prompts, part.keys, part.attention))
    q, heads = query(base, images), base.blocks[0].attn.num_heads
    share = torch.stack([cosine(q * attention[m], keys[m]) for m in range(4)], dim=1)
    own = sum(share[:, m, None, None, None] * prompts[m] for m in range(4))  # (B, 2, l / 2, E)
    prefix = tuple(own[:, k].reshape(3, 2, heads, -1).transpose(1, 2) for k in range(2))
    out = attached.model(images)
    assert torch.allclose(out, with_prefix(base, {0: prefix}, images), rtol=1e-9, atol=1e-9)
    wanted = sum(((x.flatten(1) @ x.flatten(1).T - torch.eye(4)) ** 2).mean() for x in (prompts, keys, attention))
    assert float(attached.penalty().detach()) == pytest.approx(0.5 * float(wanted), rel=1e-5, abs=1e-9)
    (out.square().sum() + attached.penalty()).backward()
    for parameter in (part.prompts, part.keys, part.attention):  # sessions before and to come do not learn
        assert [bool(row.abs().sum() > 0) for row in parameter.grad] == [False, False, True, True, False, False]


def test_coda_prompt_starts_a_session_by_gram_schmidt(build: Build, attach: Attach) -> None:
    """Orthonormal to each other and orthogonal to components that training has moved, which stay; those to come too."""
    options = {"sessions": 3, "session": 1, "pool": 6, "length": 4, "num_blocks": 1}
    attached = attach("coda_prompt", build("plain").double(), **options)
    part = attached.model.blocks[0].attn.remap_pool
    with torch.no_grad():
        for one in (part.prompts, part.keys, part.attention):
            one[:2] = 0.3 + torch.randn(one[:2].shape, generator=torch.Generator().manual_seed(2), dtype=one.dtype)
    before = {name: tensor.clone() for name, tensor in attached.state().items()}
    attached.start_session()
    for name, tensor in attached.state().items():
        rows, old = tensor.flatten(1), before[name].flatten(1)
        assert torch.equal(rows[:2], old[:2]) and torch.equal(rows[4:], old[4:])
        assert torch.allclose(rows[2:4] @ rows[2:4].T, torch.eye(2).double(), atol=1e-9), name
        assert torch.allclose(rows[2:4] @ rows[:2].T, torch.zeros(2, 2).double(), atol=1e-9), name


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValidationError, match="top 3"):
        L2P.Config(pool=2, top=3)
    with pytest.raises(ValidationError, match="session 4"):
        SessionOptions(sessions=4, session=4)
    with pytest.raises(ValidationError, match="none for each"):
        CODAPrompt.Config(pool=3, sessions=4)
