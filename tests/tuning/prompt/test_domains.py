"""Sets of looks: images get that of the nearest centroid, by a plain model's features, and steps leave earlier ones.

K-means is scikit-learn's; its centroids are checked by Lloyd's condition, that each is the mean of its own images.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from remap.backbones.families.key_values import extend_attention
from remap.tuning.attached import Attached
from remap.tuning.base import Sample

Build = Callable[..., nn.Module]
Attach = Callable[..., Attached]


def query(model: nn.Module, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


def test_centroids_are_means_of_the_images_nearest_to_them(
    build: Build, attach: Attach, tools: SimpleNamespace
) -> None:
    base, images = build("plain"), tools.images(12)
    attached = attach("domains", build("plain"), session=1, centroids=3)
    attached.prepare(Sample(lambda: iter([(images[:8], torch.zeros(8)), (images[8:], torch.zeros(4))]), 5))
    router, features = attached.model.remap_domains, query(base, images)
    near = torch.cdist(features, router.centroids_1).argmin(1)
    means = torch.stack([features[near == k].mean(0) for k in range(3)])
    assert torch.allclose(router.centroids_1, means, atol=1e-5) and not router.centroids_0.any()
    attached.prepare(Sample(lambda: iter([(images[:2], torch.zeros(2))]), 5))  # fewer images than centroids
    assert torch.allclose(router.centroids_1[0], router.centroids_1[2])


def test_centroids_are_the_same_bits_on_any_number_of_threads(build: Build, attach: Attach) -> None:
    """Threads of K-means add up their parts in the order in which they end; there is one part in 256 images."""
    router = attach("domains", build("plain")).model.remap_domains
    features, found = torch.randn(3000, router.centroids_0.shape[1], generator=torch.Generator().manual_seed(0)), []
    for threads in (1, 4, 4):
        with threadpool_limits(threads):
            router.take(features)
        found.append(router.centroids_0.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("variant", ["avg_pool", "eva02_separate"])
def test_norms_inside_attention_and_mlp_have_their_own_width(
    build: Build, attach: Attach, tools: SimpleNamespace, variant: str
) -> None:
    """Of queries and keys that of a head, of hidden units theirs; a scale of 1 and a shift of 0 change nothing."""
    base, attached = build(variant), attach("domains", build(variant), parts="norms")
    assert torch.equal(attached.model(tools.images()), base(tools.images()))
    assert attached.trainable and tools.step(attached)


@pytest.mark.parametrize("parts", ["prompts", "norms", "adapters"])
def test_an_image_gets_the_set_of_the_nearest_centroid(
    build: Build, attach: Attach, tools: SimpleNamespace, parts: str
) -> None:
    base, images = build("plain").double(), tools.images(4).double()
    attached = attach("domains", build("plain"), session=1, centroids=2, length=3, parts=parts)
    model, q = attached.model.double(), query(base, images)
    assert not attached.trains_head and all(".sets.1." in name for name in attached.trainable)
    tools.shake(attached)
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if ".sets.0." in name and buffer.is_floating_point():
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=draws, dtype=buffer.dtype))
        model.remap_domains.centroids_0.copy_(q[:2] + 0.01)
        model.remap_domains.centroids_1.copy_(q[2:] + 0.01)
    answers = {}
    for session in (0, 1):  # each image alone, in a plain model with one set
        one, undo = build("plain").double(), []
        for index, block in enumerate(one.blocks):
            if parts == "prompts":
                pair = model.blocks[index].attn.remap_pool.sets[session].prompts
                k, v = (part.expand(4, -1, -1, -1) for part in pair)
                undo.append(extend_attention(block.attn, lambda _k, pair=(k, v): pair))
            elif parts == "adapters":
                adapter = model.blocks[index].remap_domains.sets[session]
                block.mlp.register_forward_hook(lambda m, a, out, block=block: out + block.seen)
                block.norm2.register_forward_pre_hook(
                    lambda m, a, block=block, adapter=adapter: setattr(
                        block, "seen", 0.1 * adapter.up(adapter.down(a[0]).relu())
                    )
                )
            else:
                for name in ("norm1", "norm2"):
                    own = getattr(model.blocks[index], name).remap_domains.sets[session]
                    getattr(block, name).register_forward_hook(lambda m, a, out, own=own: out * own.scale + own.shift)
        answers[session] = one(images)
    expected = torch.cat([answers[0][:2], answers[1][2:]])
    assert torch.allclose(model.eval()(images), expected, rtol=1e-8, atol=1e-8)
    attached.train()  # steps learn the newest set by all images; adapters drop some of it
    if parts != "adapters":
        assert torch.allclose(model(images), answers[1], rtol=1e-8, atol=1e-8)
