"""Losses on features and tokens; listing them imports no torch."""

from functools import partial

from remap.remapping.entries import LossEntry

_GRID = "grids by resizing the teacher's tokens; prompts and prefix tokens cut"
_row = partial(LossEntry, category="features", multilabel="itself")
_pooled = partial(_row, needs="pooled features of both", signal="pooled")
_tokens = partial(_row, needs="tokens of both", signal="tokens")

ROWS = [
    _pooled(
        name="feature",
        target="remap.remapping.knowledge.features.pooled:PooledFeature",
        summary="projected pooled feature against the teacher's layer-normed one",
        paper="Miles et al. 2024, arXiv 2403.06213",
        mismatch="widths by a projector that is dropped after training",
    ),
    _pooled(
        name="clip_feature",
        target="remap.remapping.knowledge.features.pooled:UnitFeature",
        summary="squared error of projected pooled features of length 1",
        paper="Yang et al. 2024, arXiv 2307.12732",
        mismatch="widths by a projector that is dropped after training",
        weight=2000.0,
    ),
    _tokens(
        name="tokens",
        target="remap.remapping.knowledge.features.tokens:TokenFeature",
        summary="projected patch tokens against the teacher's layer-normed ones, place by place",
        paper="-",
        mismatch="widths by a projector that is dropped after training; grids by resizing the teacher's tokens; "
        "prompts cut, class tokens and registers apart",
    ),
    _tokens(
        name="gram",
        target="remap.remapping.knowledge.features.gram:TokenGram",
        summary="cosines between all patches of an image: KL of their softmax, or squared difference",
        paper="Hao et al. 2022, arXiv 2107.01378",
        mismatch=f"any widths and heads; {_GRID}",
    ),
    _tokens(
        name="vitkd",
        target="remap.remapping.knowledge.features.generation:ViTKD",
        summary="mimic the tokens of the first two blocks, generate those of the last from masked ones",
        paper="Yang et al. 2022, arXiv 2209.02432",
        mismatch=f"widths by linear maps that are dropped after training; {_GRID}",
        weight=3e-5,
    ),
    _tokens(
        name="mgd",
        target="remap.remapping.knowledge.features.generation:MaskedGeneration",
        summary="generate all of the teacher's last tokens from a random part of the student's",
        paper="Yang et al. 2022, arXiv 2205.01529",
        mismatch=f"widths by a linear map that is dropped after training; {_GRID}",
    ),
    _tokens(
        name="fitnet",
        target="remap.remapping.knowledge.features.tokens:Hint",
        summary="plain squared error of regressed patch tokens in the middle of both networks",
        paper="Romero et al. 2015, arXiv 1412.6550",
        mismatch=f"widths by a regressor that is dropped after training; {_GRID}",
    ),
    _pooled(
        name="rkd",
        target="remap.remapping.knowledge.features.batch_relations:Relational",
        summary="distances between pairs and angles between triples of images",
        paper="Park et al. 2019, arXiv 1904.05068",
        mismatch="any widths",
        weight=25.0,
        over_batch=True,
    ),
    _pooled(
        name="pkt",
        target="remap.remapping.knowledge.features.batch_relations:ProbabilisticTransfer",
        summary="KL of which images are neighbours, by cosine",
        paper="Passalis and Tefas 2018, arXiv 1803.10837",
        mismatch="any widths",
        weight=500.0,
        over_batch=True,
    ),
    _pooled(
        name="spkd",
        target="remap.remapping.knowledge.features.batch_relations:SimilarityPreserving",
        summary="Gram matrices of the batch, rows of length 1",
        paper="Tung and Mori 2019, arXiv 1907.09682",
        mismatch="any widths",
        weight=3000.0,
        over_batch=True,
    ),
    _pooled(
        name="crd",
        target="remap.remapping.knowledge.features.contrast:ContrastiveRepresentation",
        summary="tell an image's teacher feature from those of the other images of the batch, and the reverse",
        paper="Tian et al. 2020, arXiv 1910.10699",
        needs="pooled features of both, labels where there are any",
        multilabel="",
        mismatch="widths by linear maps of both sides that are dropped after training",
        mixed="both networks see the mixed image; its class is that of the larger share",
        over_batch=True,
    ),
    _pooled(
        name="queue",
        target="remap.remapping.knowledge.features.queue:SimilarityToQueue",
        summary="which of the teacher's last few thousand features an image is similar to, as a distribution",
        paper="Fang et al. 2021, arXiv 2101.04731",
        mismatch="widths by a projector that is dropped after training",
        over_batch=True,
    ),
    _pooled(
        name="torchdistill",
        target="remap.remapping.knowledge.torchdistill_bridge:Torchdistill",
        summary="a mid-level loss of torchdistill by its class name, on logits, pooled features or token maps",
        paper="Matsubara 2020, arXiv 2011.12913",
        needs="logits, pooled features or tokens of both (option signal)",
        mismatch="any widths; grids by resizing the teacher's tokens",
        over_batch=True,
    ),
]
