"""Processor time of a training step of coop and maple, against a lean version written by hand on the same towers.

Run: python benchmarks/word_steps.py [--classes 20] [--batch 16] [--steps 12]

The towers are random and small (6 blocks, 192 and 128 wide), with CLIP's 77 positions. Steps of both versions take
turns; the figures are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import remap
from remap.backbones.anatomy import anatomy_of
from remap.backbones.projected_head import ProjectedHead
from remap.language.configs import TextSide
from remap.language.pair import Language, write_zero_shot_head
from remap.language.text_tower import TextConfig, TextTower

CONFIG = TextConfig(vocab=256, context=77, width=128, depth=6, heads=2, hidden=512, out=96, act="quick_gelu")


def ids(texts: Sequence[str]) -> Tensor:
    """Letters as tokens between a start and an end token."""
    found = torch.zeros(len(texts), CONFIG.context, dtype=torch.long)
    for row, text in zip(found, texts, strict=True):
        row[: len(text) + 2] = torch.tensor([254, *text.encode(), 255])
    return found


def clip(classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=96, patch_size=16, embed_dim=192, depth=6, num_heads=3, num_classes=0, pre_norm=True
    )
    model.head = ProjectedHead(nn.Linear(192, 96, bias=False), 96, classes)
    model.num_classes, model.pretrained_cfg = classes, {"input_size": (3, 96, 96)}
    model.language = Language(Path("random"), TextSide(CONFIG, "lower", True), 100.0, 0.0)
    tower = TextTower(CONFIG).requires_grad_(False).eval()
    model.language.__dict__.update(tower=tower, tokenizer=ids)
    model.language.names = tuple(f"thing {number}" for number in range(classes))
    model.language.features_CE = model.language.features([f"{name}." for name in model.language.names])
    write_zero_shot_head(model, anatomy_of(model), model.language.features_CE)
    return model.requires_grad_(False).eval()


class Lean(nn.Module):
    """CoOp, and with ``depth`` MaPLe: nothing but the prompts, and loops over the blocks."""

    def __init__(self, model: nn.Module, count: int, depth: int) -> None:
        super().__init__()
        self.model, self.tower, self.depth, self.count = (model,), (model.language.tower,), depth, count
        own = ids([f"{name}." for name in model.language.names])
        self.last, length = own.argmax(1) + count, int(own.argmax(1).max()) + count + 1
        self.own = self.tower[0].token_embedding(own)[:, : length - count]
        self.words = nn.Parameter(torch.randn(max(depth, 1), count, 128) * 0.02)
        self.maps = nn.ModuleList(nn.Linear(128, 192) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        (model,), (tower,), count = self.model, self.tower, self.count
        words = self.words[0].expand(len(self.own), -1, -1)
        x = torch.cat([self.own[:, :1], words, self.own[:, 1:]], 1)
        x = x + tower.positions[: x.shape[1]]
        for index, block in enumerate(tower.blocks):
            if 0 < index < self.depth:
                words = self.words[index].expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], words, x[:, 1 + count :]], 1)
            x = block(x, is_causal=True)
        texts = F.normalize(tower.proj(tower.norm(x)[torch.arange(len(x)), self.last]), dim=-1)
        y = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for index, block in enumerate(model.blocks):
            if index < self.depth:
                prompts = self.maps[index](self.words[index])
                prompts = (model.norm_pre(prompts) if index == 0 else prompts).expand(len(y), -1, -1)
                y = torch.cat([y[:, :1], prompts, y[:, 1 + (count if index else 0) :]], 1)
            y = block(y)
        unit = F.normalize(model.head.proj(model.norm(y)[:, 0]), dim=-1)
        return 100.0 * unit @ texts.mT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    images, labels = torch.randn(options.batch, 3, 96, 96), torch.arange(options.batch) % options.classes
    for method, count, depth in (("coop", 16, 0), ("maple", 2, 6)):
        attached = remap.attach(clip(options.classes), method, num_context=count, words=None)
        attached.train()
        lean = Lean(clip(options.classes), count, depth)
        versions: dict[str, tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]] = {
            "remap": (attached.model, [p for p in attached.model.parameters() if p.requires_grad]),
            "lean": (lean, list(lean.parameters())),
        }
        optimizers = {name: torch.optim.AdamW(p, lr=1e-3, fused=True) for name, (_, p) in versions.items()}
        seconds: dict[str, list[float]] = {name: [] for name in versions}
        for _ in range(options.steps + 2):
            for name, (model, _) in versions.items():
                begin = time.process_time()
                F.cross_entropy(model(images), labels).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                seconds[name].append(time.process_time() - begin)
        ours, theirs = (statistics.median(seconds[name][2:]) for name in ("remap", "lean"))
        print(f"{method}: {1000 * ours:.1f} ms, by hand {1000 * theirs:.1f} ms, ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    main()
