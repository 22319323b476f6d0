"""Vision-language models of every layout, against the forward of the library that wrote them."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import canonicalize_text
from tiny_pairs import LAYOUTS, Pair, open_clip_clip, open_clip_siglip, transformers_clip, write_tokenizer
from torch import Tensor, nn

from remap.backbones.build import Backbone, build
from remap.cache.text_features import class_features
from remap.errors import BackboneError, UnknownName, WeightsError
from remap.language import names as pair_names
from remap.language import pair as language_part
from remap.language.configs import of_open_clip
from remap.language.pair import Language, language_of, require_language, write_zero_shot_head
from remap.language.text_tower import text_anatomy
from remap.language.tokenizer import Tokenizer, clean
from remap.tuning import METHODS
from remap.tuning.attaching import attach_method

TEXTS = ("a photo of the big ant", "a bee", "it is a red hat")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    root, made = tmp_path_factory.mktemp("pairs"), dict[str, Pair]()

    def make(name: str) -> Pair:
        if name not in made:
            made[name] = LAYOUTS[name](root / name.replace(" ", "-"))
        return made[name]

    return make


def opened(pair: Pair) -> tuple[Backbone, Language]:
    backbone = build(pair.word, "pretrained", len(TEXTS))
    return backbone, require_language(backbone.model.eval(), "this test")


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_library(name: str, pairs: Callable[[str], Pair]) -> None:
    """open_clip's get_logits, transformers' logits_per_image; the head of one text a class is that text."""
    pair = pairs(name)
    backbone, language = opened(pair)
    write_zero_shot_head(backbone.model, backbone.anatomy, language.class_features([[text] for text in TEXTS]))
    images = torch.randn(4, 3, pair.size, pair.size, generator=torch.Generator().manual_seed(0))
    theirs = pair.logits(images, list(TEXTS))
    assert theirs.std() > 0.01, "a constant would agree with anything"
    torch.testing.assert_close(backbone.model(images), theirs, rtol=1e-5, atol=1e-5)


def test_class_features_are_the_mean_of_unit_vectors(pairs: Callable[[str], Pair]) -> None:
    """Section 3.1.4 of CLIP in float64: normalise, average, normalise; the head multiplies by exp(logit_scale)."""
    _, language = opened(pairs("open_clip SigLIP"))
    tower = copy.deepcopy(language.tower).double()
    with torch.no_grad():
        rows = tower(language.tokenizer(TEXTS))
    rows = rows / rows.square().sum(1, keepdim=True).sqrt()
    mean = rows[:2].mean(0)
    expected = torch.stack([mean / mean.square().sum().sqrt(), rows[2]])
    features = language.class_features([TEXTS[:2], TEXTS[2:]])
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-6)
    weight, bias = language.head(features)
    scale = tower_scalar(language, "logit_scale")
    torch.testing.assert_close(weight.double(), math.exp(scale) * expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(bias, torch.full((2,), tower_scalar(language, "logit_bias")))


def tower_scalar(language: Language, name: str) -> float:
    from safetensors.torch import load_file

    return load_file(language.folder / "open_clip_model.safetensors")[name].item()


def test_features_come_from_the_cache_bit_for_bit(
    pairs: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, language = opened(pairs("transformers CLIP"))
    texts = [["a bee", "a small bee"], ["a hat"]]
    computed = class_features(language, texts, tmp_path / "texts")
    assert torch.equal(computed, language.class_features(texts))
    monkeypatch.setattr(Language, "class_features", lambda *_: pytest.fail("it is on the disk"))
    assert torch.equal(class_features(language, texts, tmp_path / "texts"), computed)
    monkeypatch.undo()
    (file,) = (tmp_path / "texts").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert torch.equal(class_features(language, texts, tmp_path / "texts"), computed), "damaged: computed again"
    class_features(language, [["a bee"], ["a small bee", "a hat"]], tmp_path / "texts")
    assert len(list((tmp_path / "texts").iterdir())) == 2, "the same texts of other classes"


def test_many_texts_are_encoded_in_batches(pairs: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    _, language = opened(pairs("transformers CLIP"))
    complete = language.features(TEXTS)
    monkeypatch.setattr(language_part, "BATCH", 2)
    sizes: list[int] = []
    handle = language.tower.register_forward_pre_hook(lambda _tower, args: sizes.append(len(args[0])))
    torch.testing.assert_close(language.features(TEXTS), complete, rtol=1e-5, atol=1e-6)
    handle.remove()
    assert sizes == [2, 1]


@pytest.mark.parametrize("method", ["lora", "bitfit", "adaptformer", "vpt_deep", "norm", "ssf"])
def test_methods_attach_to_the_text_tower(method: str, pairs: Callable[[str], Pair]) -> None:
    """By the same code as to an image tower: only what they name trains, and detaching gives the tower back."""
    _, language = opened(pairs("open_clip CLIP"))
    tower = copy.deepcopy(language.tower)
    ids = language.ids(TEXTS)
    before = tower(ids)
    attached = attach_method(tower, text_anatomy(tower), method, {})
    assert attached.trainable and {n for n, p in tower.named_parameters() if p.requires_grad} == set(attached.trainable)
    if attached.identity_at_init:
        torch.testing.assert_close(tower.eval()(ids), before, rtol=1e-5, atol=1e-6)
    tower.train()(ids).square().sum().backward()
    grads = {name for name, p in tower.named_parameters() if p.grad is not None}
    assert grads and grads <= set(attached.trainable)
    attached.detach()
    assert torch.equal(tower.eval()(ids), before)


def test_every_method_runs_on_the_text_tower_or_says_why_not(pairs: Callable[[str], Pair]) -> None:
    _, language = opened(pairs("open_clip CLIP"))
    ids = language.ids(TEXTS)
    for row in METHODS:
        tower = copy.deepcopy(language.tower)
        try:
            attach_method(tower, text_anatomy(tower), row.name, {})
        except BackboneError as error:
            assert row.of_images == ("reads images or acts on their classifier" in error.what), row.name
        else:
            assert not row.of_images and tower(ids).shape == (len(TEXTS), 24), row.name


def test_methods_of_images_attach_to_its_image_tower(pairs: Callable[[str], Pair]) -> None:
    backbone, _ = opened(pairs("open_clip CLIP"))
    attached = attach_method(backbone.model, backbone.anatomy, "lora", {})
    assert all(name.startswith("blocks.") for name in attached.trainable)
    assert backbone.anatomy.classifier_heads == ("head.classifier",) and backbone.anatomy.feature_width == 24
    assert language_of(copy.deepcopy(backbone.model)) is language_of(backbone.model), "one language part for all copies"


@pytest.mark.parametrize("text", ["A  photo of_a (Cat)!", "it's, 100% pure.", "ÉTÉ  ü"])
def test_texts_are_cleaned_as_open_clip_does(text: str) -> None:
    assert clean(text, "canonicalize") == canonicalize_text(text)


def _without(*keys: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = next(folder.glob("*.safetensors"))
        save_file({k: t for k, t in load_file(path).items() if not k.startswith(keys)}, path)

    return remove


def _change(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = next(folder.glob("*.safetensors"))
        tensors = load_file(path)
        save_file(tensors | {key: change(tensors[key]).contiguous()}, path)

    return write


def _config(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return write


def _tokenizer(**parts: object) -> Callable[[Path], None]:
    """Among what breaks: rules that make the library panic, which is no ``Exception`` of Python."""
    return _config("tokenizer.json", lambda values: values.update(parts))


def _ends(count: int) -> dict[str, object]:
    """Return a rule that puts many end tokens behind each text."""
    ends = {"id": "</s>", "ids": [1] * count, "tokens": ["</s>"] * count}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"</s>": ends}}


_OPEN_CLIP = "open_clip_config.json"


def test_separators_are_stripped_where_open_clip_does(tmp_path: Path) -> None:
    """Source: open_clip's HFTokenizer with ``strip_sep_token``, as the CLIPA models have it."""
    from open_clip.tokenizer import HFTokenizer

    folder = open_clip_siglip(tmp_path / "pair").folder
    write_tokenizer(folder, tokenizer_class="PreTrainedTokenizerFast", sep_token="</s>")
    text = json.loads((folder / _OPEN_CLIP).read_text())["model_cfg"]["text_cfg"]
    text["tokenizer_kwargs"]["strip_sep_token"] = True
    side = of_open_clip({"model_cfg": {"embed_dim": 96, "vision_cfg": {}, "text_cfg": text}})
    theirs = HFTokenizer(str(folder), context_length=16, clean="canonicalize", strip_sep_token=True)
    texts = ["a photo of a bee", "an ant"]
    ours = Tokenizer(folder, side)(texts)
    assert torch.equal(ours, theirs(texts)) and 1 not in ours


@pytest.mark.parametrize(
    ("make", "break_", "message"),
    [
        (transformers_clip, lambda folder: (folder / "config.json").unlink(), "is not a folder of a vision-language"),
        (transformers_clip, lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (transformers_clip, lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot read .*tokenizer"),
        (
            transformers_clip,
            _tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "cannot read .*",
        ),
        (
            transformers_clip,
            _tokenizer(model={"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "?"}),
            "cannot read .*",
        ),
        (transformers_clip, _tokenizer(post_processor=_ends(30)), "that of another text tower"),
        (transformers_clip, _without("logit_scale"), "has no logit_scale"),
        (transformers_clip, _without("text_model.encoder"), "no text tower"),
        (transformers_clip, _without("text_model.final"), "does not fit its config"),
        (transformers_clip, _config("config.json", lambda c: c["text_config"].update(vocab_size=4)), "does not fit"),
        (transformers_clip, _config("config.json", lambda c: c.update(model_type="clap")), "model_type 'clap'"),
        (transformers_clip, _config("config.json", lambda c: c.update(projection_dim=7)), "do not share a space"),
        (open_clip_clip, _config(_OPEN_CLIP, lambda c: c["model_cfg"]["text_cfg"].update(embed_cls=True)), "embed_cls"),
        (
            open_clip_clip,
            _config(_OPEN_CLIP, lambda c: c["model_cfg"]["text_cfg"].update(layers=10**6)),
            "does not fit its config",
        ),
        (
            open_clip_clip,
            _config(_OPEN_CLIP, lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"clean": "none"})),
            "clean 'none'",
        ),
        (
            open_clip_clip,
            _config(_OPEN_CLIP, lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"language": "en"})),
            "tokenizer_kwargs language",
        ),
        (
            open_clip_clip,
            _config(_OPEN_CLIP, lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_mode="clips")),
            "tokenizer_mode",
        ),
        (open_clip_clip, _config(_OPEN_CLIP, lambda c: c["model_cfg"]["text_cfg"].update(heads=0)), "does not fit"),
        (open_clip_clip, _change("visual.proj", lambda tensor: tensor[0]), "projection .* does not fit"),
        (open_clip_clip, _change("visual.proj", lambda tensor: tensor.mT), "projection .* does not fit"),
    ],
)
def test_a_folder_that_is_not_one_is_refused_in_a_sentence(
    make: Callable[[Path], Pair], break_: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    pair = make(tmp_path / "pair")
    break_(pair.folder)
    with pytest.raises(WeightsError, match=message):
        opened(pair)[1].features(["a bee"])


def test_names_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnknownName, match="unknown vision-language model 'clip:ViT-B-33'; did you mean"):
        pair_names.pair_folder("clip:ViT-B-33")
    with pytest.raises(UnknownName, match="has no weights on the hub"):
        pair_names.pair_folder("clip:ViT-B-16.nothing")
    for word in ("clip:ViT-B-16.openai", "clip:google/siglip-base-patch16-224"):
        with pytest.raises(WeightsError, match="not in the cache, and the hub is out of reach"):
            pair_names.pair_folder(word)
    with pytest.raises(WeightsError, match="has weights of its own"):
        build("clip:local-dir:/nowhere", "x.safetensors", 2)
    with pytest.raises(BackboneError, match="coop needs a vision-language model"):
        require_language(nn.Linear(1, 1), "coop")
