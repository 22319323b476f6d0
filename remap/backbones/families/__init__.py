"""The table of backbone families: one row a family. Listing it imports no torch."""

from dataclasses import dataclass

from remap.registry import Entry, Registry

# What a tuning method may ask of a family.
PARTS = {
    "blocks": "residual blocks that can be told apart",
    "sequence": "one sequence of tokens of one width through all blocks",
    "attention": "blocks of attention and MLP with a residual stream, each behind a norm",
    "linears": "blocks with linear layers, or convolutions that count as such",
    "convolutions": "blocks with spatial convolutions",
    "words": "a text tower beside it (a model named clip:NAME)",
    "late_attention": "blocks behind which every patch has attended to all others, in some stages",
}


@dataclass(frozen=True, kw_only=True)
class FamilyEntry(Entry):
    """One family.

    Attributes:
        parts: Keys of ``PARTS``.
        examples: Names or patterns of timm, for people.
        modules: Modules of timm (last name) whose models the family reads. A few unusual variants in them, and all
            models of other modules, are read by the last family.
        presets: Ways to read self-supervised weights that the family has.
        rotary: Whether queries and keys are rotated by the position of their token.
    """

    parts: frozenset[str]
    examples: str
    modules: tuple[str, ...]
    presets: tuple[str, ...] = ()
    rotary: bool = False


_SEQUENCE = frozenset({"blocks", "sequence", "attention", "linears"})
_BY_STAGES = frozenset({"linears", "convolutions"})

FAMILIES: Registry[FamilyEntry] = Registry(
    "family",
    "families",
    [
        FamilyEntry(
            name="vit",
            target="remap.backbones.families.vit:PlainViT",
            category="transformer",
            summary="plain vision transformers",
            paper="Dosovitskiy et al. 2020, arXiv 2010.11929",
            parts=_SEQUENCE,
            examples="vit_*, deit*, *_dinov2, CLIP and SigLIP towers",
            modules=("vision_transformer", "vision_transformer_hybrid", "deit", "mini"),
            presets=("mae", "moco_v3"),
        ),
        FamilyEntry(
            name="naflexvit",
            target="remap.backbones.families.naflexvit:NaFlexViT",
            category="transformer",
            summary="plain vision transformers with an embedding of flexible sizes",
            paper="Dehghani et al. 2023, arXiv 2307.06304; C-RADIO, arXiv 2412.07679",
            parts=_SEQUENCE,
            examples="naflexvit_* without rotary positions: C-RADIO v3 and v4, SigLIP 2",
            modules=("naflexvit",),
        ),
        FamilyEntry(
            name="eva",
            target="remap.backbones.families.eva:Eva",
            category="transformer",
            summary="rotary vision transformers",
            paper="Fang et al. 2023, arXiv 2303.11331; DINOv3, arXiv 2508.10104",
            parts=_SEQUENCE,
            examples="eva02_*, vit_*_dinov3*, vit_pe_core_*",
            modules=("eva",),
            rotary=True,
        ),
        FamilyEntry(
            name="beit",
            target="remap.backbones.families.beit:Beit",
            category="transformer",
            summary="vision transformers with relative position bias",
            paper="Bao et al. 2021, arXiv 2106.08254",
            parts=_SEQUENCE,
            examples="beit_*, beitv2_*",
            modules=("beit",),
        ),
        FamilyEntry(
            name="swin",
            target="remap.backbones.families.swin:Swin",
            category="transformer",
            summary="window transformers with stages",
            paper="Liu et al. 2021, arXiv 2103.14030",
            parts=frozenset({"blocks", "attention", "linears"}),
            examples="swin_*",
            modules=("swin_transformer",),
        ),
        FamilyEntry(
            name="swinv2",
            target="remap.backbones.families.swin:SwinV2",
            category="transformer",
            summary="window transformers with cosine attention and norms behind it",
            paper="Liu et al. 2021, arXiv 2111.09883",
            parts=frozenset({"blocks", "linears"}),
            examples="swinv2_* without cr",
            modules=("swin_transformer_v2",),
        ),
        FamilyEntry(
            name="convnext",
            target="remap.backbones.families.convnext:ConvNeXt",
            category="convolutional",
            summary="modern convolutional networks",
            paper="Liu et al. 2022, arXiv 2201.03545",
            parts=frozenset({"blocks", "linears", "convolutions"}),
            examples="convnext_*",
            modules=("convnext",),
        ),
        FamilyEntry(
            name="resnet",
            target="remap.backbones.families.resnet:ResNet",
            category="convolutional",
            summary="residual convolutional networks",
            paper="He et al. 2015, arXiv 1512.03385",
            parts=frozenset({"blocks", "linears", "convolutions"}),
            examples="resnet*, resnext*, wide_resnet*",
            modules=("resnet",),
        ),
        FamilyEntry(
            name="hiera",
            target="remap.backbones.families.late_attention:Hiera",
            category="transformer",
            summary="transformers of stages, the first ones with attention in mask units",
            paper="Ryali et al. 2023, arXiv 2306.00989",
            parts=frozenset({"linears", "late_attention"}),
            examples="hiera_*",
            modules=("hiera",),
        ),
        FamilyEntry(
            name="tiny_vit",
            target="remap.backbones.families.late_attention:TinyViT",
            category="transformer",
            summary="stages of convolutions, then of attention in windows that grow to the whole image",
            paper="Wu et al. 2022, arXiv 2207.10666",
            parts=_BY_STAGES | {"late_attention"},
            examples="tiny_vit_*",
            modules=("tiny_vit",),
        ),
        # Tried last: it reads what no other family does.
        FamilyEntry(
            name="generic",
            target="remap.backbones.families.generic:Generic",
            category="any",
            summary="other networks of timm, by their stages",
            paper="Wightman 2019, timm",
            parts=_BY_STAGES,
            examples="efficientnet*, mobilenet*, regnet*, maxvit*, and unusual variants of the above",
            modules=(),
        ),
    ],
)


def signals_of(parts: frozenset[str]) -> tuple[str, ...]:
    """Return what losses can read of backbones: attention only where all patches attend to all patches."""
    return ("logits", "features", "tokens", *(["attention"] if parts & {"sequence", "late_attention"} else []))
