"""Train the shipped vision-language pair `clip:mini` on drawings and their words.

    python tools/train_mini_clip.py SETS FOLDER    # SETS holds emoji.tar and clipart.tar; continues what is in FOLDER

An image tower (the shape and start of the embedded student) and a text transformer in CLIP's layout (Radford et al.
2021, arXiv 2103.00020) learn by the symmetric contrastive loss. A text is a positive of every image that it is true of
(UniCL, Yang et al. 2022, arXiv 2204.03610), and half of the patches are left out until the last steps (FLIP, Li et al.
2023, arXiv 2212.00794). No drawing of the vendor `noto`, and no drawing of a held-out name, is seen.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
from mini_drawings import HELD_OUT_VENDOR, classes_of, pixels, read_rows, splits_of
from torch import nn
from torch.nn import functional as F

import remap.backbones.mini  # noqa: F401  # registers the architectures
from remap.io import atomic_write
from remap.language.names import MINI_FOLDER

TEMPLATES = ["{}"] * 8 + [
    "a drawing of a {}", "a drawing of {}", "a picture of a {}", "a picture of {}", "an emoji of a {}",
    "a photo of a {}.", "clip art of a {}", "an icon of a {}", "a small picture of a {}", "an image of {}",
    "the {}", "a {}",
]  # fmt: skip
VOCABULARY, CONTEXT, TEXT, EMBED, STORED = 2048, 24, {"width": 128, "heads": 2, "layers": 3}, 128, 40
IMAGE = "vit_mini_student_patch4_32"
START, END = "<|startoftext|>", "<|endoftext|>"


class Drawings:
    """Images (uint8, N x 3 x 40 x 40), how often each is drawn, and phrases that are true of it, in weighted groups."""

    def __init__(self, sets: Path) -> None:
        images, self.groups, weights = [], [], []
        rows, content = read_rows(sets / "emoji.tar")
        classes = classes_of([row["caption"] for row in rows])
        _, held = splits_of(classes)
        for row in rows:
            name = row["caption"]
            if row["vendor"] == HELD_OUT_VENDOR or name in held:
                continue
            images.append(pixels(content[row["path"]], STORED))
            kind = [classes[name]] if name in classes else []
            general = [word.strip().lower() for word in row["category"].split("&")]
            self.groups.append([(0.5, [name.lower()]), (0.4 if kind else 0, kind), (0.1, general)])
            weights.append(2.0)
        rows, content = read_rows(sets / "clipart.tar")
        for row in rows:
            images.append(pixels(content[row["path"]], STORED))
            folder = [part.replace("_", " ").replace("-", " ") for part in row["folder"].split("/")]
            tags = [tag.lower() for tag in row["tags"].split(";") if tag]
            self.groups.append([(0.5, [row["title"].lower()]), (0.3, tags), (0.2, folder)])
            weights.append(0.1 if {"cards", "flags"} & set(row["folder"].split("/")) else 0.4)
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        self.weights = np.array(weights) / np.sum(weights)
        self.phrases = sorted({phrase for groups in self.groups for _, group in groups for phrase in group})
        number = {phrase: index for index, phrase in enumerate(self.phrases)}
        self.true = torch.zeros(len(images), len(self.phrases), dtype=torch.bool)
        for index, groups in enumerate(self.groups):
            for _, group in groups:
                self.true[index, [number[phrase] for phrase in group]] = True
        self.number = number

    def batch(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Images (uint8), one text of each, and which text is true of which image (size x size)."""
        chosen = rng.choice(len(self.weights), size, replace=False, p=self.weights)
        texts, phrases = [], []
        for index in chosen:
            groups = [(weight, group) for weight, group in self.groups[index] if group and weight]
            weights = np.array([weight for weight, _ in groups])
            group = groups[rng.choice(len(groups), p=weights / weights.sum())][1]
            phrase = group[rng.integers(len(group))]
            phrases.append(self.number[phrase])
            texts.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(phrase))
        return self.images[chosen], texts, self.true[chosen][:, phrases]


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random scale, shift, turn, flip and colour of uint8 images; float, 32 x 32, in [-1, 1]."""
    count = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.25, 0.25), uniform(0.75, 1.15)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [
        torch.stack([cos * flip, -sin, uniform(-0.12, 0.12)], 1),
        torch.stack([sin * flip, cos, uniform(-0.12, 0.12)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 3, 32, 32], align_corners=False)
    out = F.grid_sample(images.float() / 127.5 - 1, grid, padding_mode="border", align_corners=False)
    grey = out.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1) < 0.05, torch.zeros(count), uniform(0.6, 1.3)).view(-1, 1, 1, 1)
    out = grey + saturation * (out - grey)
    out = out * uniform(0.75, 1.25).view(-1, 1, 1, 1) + uniform(-0.15, 0.15).view(-1, 1, 1, 1)
    return out.clamp(-1, 1)


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Write vocab.json and merges.txt of byte pairs in CLIP's form: bytes, bytes that end a word, merges, two marks."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - 2 * len(alphabet) - 2]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    assert len(set(tokens)) == len(tokens)
    atomic_write.write_text(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    atomic_write.write_text(folder / "merges.txt", "\n".join(lines) + "\n")


def load_tokenizer(folder: Path):
    """The tokenizer as a function of texts to ids (B x longest, at most 24), padded with the end."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=END)
    return lambda texts, length=CONTEXT: torch.tensor(
        tokenizer(texts, padding=True, truncation=True, max_length=length)["input_ids"], dtype=torch.long
    )


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    """CLIP's text transformer: causal, pre-norm; the features are those of the first end token."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, width) * 0.01)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, EMBED) * width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        for block in self.transformer.resblocks:
            x = block(x, mask)
        end = (ids == VOCABULARY - 1).int().argmax(1)
        return self.ln_final(x)[torch.arange(len(x)), end] @ self.text_projection


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk = timm.create_model(IMAGE, pretrained=True, num_classes=0, patch_drop_rate=0.5)
        self.visual.head = nn.Module()
        self.visual.head.proj = nn.Linear(self.visual.trunk.num_features, EMBED, bias=False)
        self.text = TextTower(**TEXT)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.visual.head.proj(self.visual.trunk(images)), dim=1)

    def text_features(self, ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text(ids), dim=1)


def contrastive(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The symmetric cross-entropy, its targets spread evenly over all positives (UniCL, equations 3 to 5)."""
    logits, true = scale * image @ text.T, true.float()
    rows = -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


@torch.no_grad()
def judge(pair: Pair, tokenize, sets: Path) -> dict[str, float]:
    """Zero-shot accuracy on the drawings of the held-out vendor, with the template "a drawing of a {}"."""
    pair.eval()
    rows, content = read_rows(sets / "emoji.tar")
    classes = classes_of([row["caption"] for row in rows])
    seen, held = splits_of(classes)
    rows = [row for row in rows if row["vendor"] == HELD_OUT_VENDOR]
    images = torch.from_numpy(np.stack([pixels(content[row["path"]], 32) for row in rows])).permute(0, 3, 1, 2)
    features = torch.cat([pair.image_features(part.float() / 127.5 - 1) for part in images.split(256)])

    def accuracy(chosen: list[int], labels: list[str], words: list[str]) -> float:
        texts = pair.text_features(tokenize([f"a drawing of a {word.lower()}" for word in words]))
        best = (features[chosen] @ texts.T).argmax(1).tolist()
        return sum(words[i] == label for i, label in zip(best, labels, strict=True)) / len(labels)

    found = {}
    kinds = sorted(set(classes.values()))
    for title, names in (("16 classes, names seen", seen), ("16 classes, names held out", held)):
        chosen = [i for i, row in enumerate(rows) if row["caption"] in names]
        found[title] = accuracy(chosen, [names[rows[i]["caption"]] for i in chosen], kinds)
    categories = sorted({row["category"] for row in rows})
    everything = list(range(len(rows)))
    found["8 categories, all names"] = accuracy(everything, [row["category"] for row in rows], categories)
    for kind in ("animal", "fruit", "vehicle", "food"):
        chosen = [i for i, row in enumerate(rows) if seen.get(row["caption"]) == kind]
        words = [rows[i]["caption"] for i in chosen]
        found[f"{len(words)} seen names of {kind}"] = accuracy(chosen, words, words)
    pair.train()
    return found


def ship(pair: Pair, run: Path) -> None:
    """Write the pair as a folder of open_clip, in float16, where `clip:mini` is read from."""
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    MINI_FOLDER.mkdir(exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in pair.state_dict().items()}
    save_file(tensors, MINI_FOLDER / "open_clip_model.safetensors")
    CLIPTokenizer(str(run / "vocab.json"), str(run / "merges.txt")).backend_tokenizer.save(
        str(MINI_FOLDER / "tokenizer.json")
    )
    vision = {
        "image_size": 32,
        "timm_model_name": IMAGE,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
    }
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, **TEXT}
    model = {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}, indent=2)
    (MINI_FOLDER / "open_clip_config.json").write_text(config + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--unmasked", type=int, default=60, help="last steps, with all patches")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--ship", action="store_true", help="write the pair into the package at the end")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(chosen.seed)
    data, pair = Drawings(chosen.sets), Pair()
    if not (chosen.folder / "vocab.json").exists():
        train_tokenizer([text.format(phrase) for phrase in data.phrases for text in TEMPLATES[7:]], chosen.folder)
    tokenize = load_tokenizer(chosen.folder)
    decayed = [p for p in pair.parameters() if p.ndim > 1]
    rest = [p for p in pair.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True
    )
    state, first = chosen.folder / "checkpoint.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        pair.load_state_dict(saved["pair"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    count = sum(p.numel() for p in pair.parameters())
    print(f"{len(data.images)} images, {len(data.phrases)} phrases, {count:,} parameters", flush=True)
    pair.train()
    start, total = time.time(), 0.0
    for step in range(first, chosen.steps):
        rng = np.random.default_rng((chosen.seed, step))
        torch.manual_seed(int(rng.integers(2**62)))
        pair.visual.trunk.patch_drop.prob = 0.5 if step < chosen.steps - chosen.unmasked else 0.0
        warm = min(1.0, (step + 1) / (0.05 * chosen.steps))
        for group in optimizer.param_groups:
            group["lr"] = chosen.lr * warm * 0.5 * (1 + math.cos(math.pi * step / chosen.steps))
        images, texts, true = data.batch(rng, chosen.batch_size)
        image = pair.image_features(augment(images, torch.Generator().manual_seed(int(rng.integers(2**62)))))
        loss = contrastive(image, pair.text_features(tokenize(texts, 12)), pair.logit_scale.exp(), true)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            pair.logit_scale.clamp_(0, np.log(100))
        total += loss.item()
        done = step + 1
        if done % chosen.every == 0 or done == chosen.steps:
            torch.save({"pair": pair.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, f"{state}.part")
            Path(f"{state}.part").replace(state)
            found = judge(pair, tokenize, chosen.sets) if done % (8 * chosen.every) == 0 or done == chosen.steps else {}
            figures = ", ".join(f"{key}: {100 * value:.1f}" for key, value in found.items())
            spent = f"{time.time() - start:.0f} s, {time.process_time():.0f} s of a core"
            print(f"{done} loss {total / chosen.every:.3f}, {spent}, {figures}", flush=True)
            total = 0.0
    if chosen.ship:
        ship(pair, chosen.folder)


if __name__ == "__main__":
    main()
