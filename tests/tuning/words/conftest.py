"""A tiny CLIP of three classes, in memory: random towers, words of one token, and a start and an end token."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from remap.backbones.anatomy import anatomy_of
from remap.backbones.build import Backbone, Identity
from remap.backbones.preprocess import PreprocessSpec
from remap.backbones.projected_head import ProjectedHead
from remap.language.configs import TextSide
from remap.language.pair import Language, write_zero_shot_head
from remap.language.text_tower import TextConfig, TextTower
from remap.network import Network, tuned

NAMES = ("ant", "red bee", "hat")
WORDS = ("a", "photo", "of", "ant", "red", "bee", "hat", ".")
START, END = 14, 15
CONTEXT, SHARED = 14, 12
SIDE = TextSide(
    TextConfig(vocab=16, context=CONTEXT, width=16, depth=3, heads=2, hidden=32, out=SHARED, act="quick_gelu"),
    "lower",
    True,
)


def tokenize(texts: Sequence[str]) -> Tensor:
    """Return ids (N, L): start, one for each word and full stop, end, zeros."""
    rows = []
    for text in texts:
        ids = [START, *(1 + WORDS.index(word) for word in text.replace(".", " .").split()), END]
        rows.append(ids + [0] * (CONTEXT - len(ids)))
    return torch.tensor(rows)


def _paired(kind: type[nn.Module], **options: object) -> nn.Module:
    """Return an image tower with its projection, the language part and the zero-shot classifier."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0}
    model = kind(**sizes, num_classes=0, **options)
    model.head = ProjectedHead(nn.Linear(24, SHARED, bias=False), SHARED, len(NAMES))
    model.num_classes, model.pretrained_cfg = len(NAMES), {"input_size": (3, 32, 32)}
    tower = TextTower(SIDE.config)
    with torch.no_grad():
        for parameter in (*model.parameters(), *tower.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    language = Language(Path("nowhere"), SIDE, math.exp(2.0), 0.0)
    language.__dict__.update(tower=tower.requires_grad_(False).eval(), tokenizer=tokenize)
    texts = tuple((f"a photo of a {name}.", f"a {name}.") for name in NAMES)
    language.names, language.texts, language.features_CE = NAMES, texts, language.class_features(texts)
    model.language = language
    write_zero_shot_head(model, anatomy_of(model), language.features_CE)
    return model.eval()


@pytest.fixture(scope="session")
def plain() -> nn.Module:
    """The image tower with its projection and zero-shot classifier."""
    return _paired(VisionTransformer, pre_norm=True)


@pytest.fixture
def rotary() -> nn.Module:
    """The same with a tower like EVA-02's and Perception Encoder's."""
    return _paired(Eva, use_rot_pos_emb=True, ref_feat_shape=(4, 4), global_pool="token")


@pytest.fixture
def build(plain: nn.Module) -> Callable[..., Backbone]:
    """A function to a backbone; as a task opens it, without the words of its classes."""

    def make(*, of_task: bool = False) -> Backbone:
        model = deepcopy(plain)
        model.language = Language(**{k: v for k, v in vars(plain.language).items() if k not in ("tower", "tokenizer")})
        model.language.__dict__.update(tower=plain.language.tower, tokenizer=tokenize)
        if of_task:
            model.language.names, model.language.texts, model.language.features_CE = (), (), torch.zeros(0, 0)
            nn.init.zeros_(model.head.classifier.weight)
        identity = Identity("clip:tiny", "none", "")
        return Backbone(model, anatomy_of(model), PreprocessSpec.of(model), identity, head_is_fresh=True)

    return make


@pytest.fixture
def tune(build: Callable[..., Backbone]) -> Callable[..., Network]:
    """A function from a method and its options to a network."""

    def make(method: str, *, of_task: bool = False, **options: object) -> Network:
        torch.manual_seed(1)
        return tuned(build(of_task=of_task), method, options)

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))
