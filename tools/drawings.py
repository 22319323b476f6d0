"""Write docs/drawings/*.svg: one block of a transformer for each kind of method, two networks for each kind of loss.

A drawing is data (``KINDS``): which boxes are trained, what stands under, in, beside or around them. Every word is in a
filled box and every line has a middle grey, so one file reads well on light and on dark pages. Run
``python tools/drawings.py``; ``tests/test_docs.py`` compares coloured boxes with the parameters that methods train.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "docs" / "drawings"
WIDTH = 360
FROZEN, TRAINED, TEACHER = ("#dfe4ec", "#2b3442"), ("#f0a33f", "#2a1900"), ("#9cc3ec", "#12283d")
LINE = "#8a94a6"
STREAM = 40  # where tokens run down, x


@dataclass(frozen=True)
class Drawing:
    """One kind of method.

    Attributes:
        says: What the drawing shows, for those who do not see it.
        trained: Boxes of the network that train: embed, norm1, q, k, v, o, norm2, fc1, fc2, norm.
        tags: What is learned on a box: box -> a few letters.
        series: Inserted boxes: "before attention", "after attention", "before mlp", "after mlp", "after block".
        beside: Inserted boxes beside a branch ("attention", "mlp").
        prompts: Words on learned tokens in front of the block; each: learned anew for every block.
        image: Words on what is learned around the image.
        side: A network beside the blocks, which the classifier reads, and whether it is trained.
        side_of: What it reads: "blocks", "image", or "blocks only" where the classifier reads nothing else.
        head: An inserted box in front of the classifier.
        gate: Words on a gate of the whole block.
        borrowed: A box whose answer is the teacher's.
        conv: The block is one of convolutions.
        repeat: Words on how many blocks.
    """

    says: str
    trained: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    series: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    prompts: str = ""
    image: str = ""
    side: tuple[str, bool] = ("", False)
    side_of: str = "blocks"
    head: str = ""
    gate: str = ""
    borrowed: str = ""
    conv: bool = False
    repeat: str = "each block"


def _tags(boxes: str, letters: str) -> dict[str, str]:
    return dict.fromkeys(boxes.split(), letters)


_BOXES = ("embed", "norm1", "q", "k", "v", "o", "norm2", "fc1", "fc2", "norm")
_BLOCK = _BOXES[1:-1]
_BOTTLENECK = "adapter"
KINDS = {
    "full": Drawing("every weight is trained", trained=_BOXES),
    "linear": Drawing("the classifier alone is trained"),
    "mlp": Drawing("hidden layers in front of the classifier are trained", head="hidden layers"),
    "partial": Drawing("the last blocks and the final norm are trained", (*_BLOCK, "norm"), repeat="last blocks"),
    "sidetune": Drawing(
        "a small network beside the frozen one is trained", side=("side network", True), side_of="image"
    ),
    "vpt_shallow": Drawing("prompts in front of the first block are trained", prompts="prompts, first block"),
    "vpt_deep": Drawing("prompts in front of every block are trained", prompts="prompts, each block"),
    "vpt_pad": Drawing("a border that enlarges the image is trained", image="wider border", conv=True),
    "vp": Drawing("a border that is added to the image is trained", image="+ border"),
    "e2vpt": Drawing(
        "prompts in front of every block, and prompts of keys and values, are trained",
        prompts="prompts, each block",
        tags=_tags("k v", "+p"),
    ),
    "vqt": Drawing(
        "queries are trained, whose answers the classifier reads", tags={"q": "+p"}, side=("their answers", False)
    ),
    "houlsby": Drawing(
        "an adapter behind attention and one behind the MLP are trained",
        series={"after attention": _BOTTLENECK, "after mlp": _BOTTLENECK},
    ),
    "pfeiffer": Drawing("an adapter behind the MLP is trained", series={"after mlp": _BOTTLENECK}),
    "adapter_plus": Drawing("an adapter behind the block is trained", series={"after block": "adapter × scale"}),
    "adaptformer": Drawing("an adapter beside the MLP is trained", beside={"mlp": "adapter × 0.1"}),
    "convpass": Drawing(
        "convolutional adapters beside attention and MLP are trained",
        beside={"attention": "conv adapter", "mlp": "conv adapter"},
    ),
    "repadapter": Drawing(
        "linear adapters in front of attention and MLP are trained",
        series={"before attention": "BA", "before mlp": "BA"},
    ),
    "residual_adapter": Drawing(
        "a 1 x 1 convolution beside every spatial one, and its norm, are trained",
        trained=("norm1",),
        beside={"conv": "1 × 1 conv"},
        conv=True,
    ),
    "conv_adapter": Drawing(
        "an adapter of convolutions beside every spatial one is trained", beside={"conv": "adapter"}, conv=True
    ),
    "lst": Drawing(
        "a narrow network that reads every block is trained", side=("narrow block", True), side_of="blocks only"
    ),
    "bitfit": Drawing("biases are trained", tags=_tags("embed norm1 q k v o norm2 fc1 fc2 norm", "b")),
    "norm": Drawing("norms are trained", trained=("norm1", "norm2", "norm")),
    "diffit": Drawing(
        "biases, norms and scales of the branches are trained",
        trained=("norm1", "norm2", "norm"),
        tags={**_tags("embed q k v fc1", "b"), "o": "b γ", "fc2": "b γ"},
    ),
    "delta_qv": Drawing("changes of the query and value weights are trained", tags=_tags("q v", "ΔW")),
    "delta_qkv": Drawing("changes of the query, key and value weights are trained", tags=_tags("q k v", "ΔW")),
    "delta_all": Drawing(
        "changes of all linear layers, from factors that all blocks share, are trained",
        tags=_tags("q k v o fc1 fc2", "ΔW"),
    ),
    "ssf": Drawing(
        "scales and shifts behind every layer are trained",
        tags=_tags("embed norm1 q k v o norm2 fc1 fc2 norm", "γ β"),
    ),
    "ia3": Drawing("scales of queries, keys, values and hidden units are trained", tags=_tags("q k v fc2", "× l")),
    "gps": Drawing("few weights of every neuron, and biases, are trained", tags=_tags("embed q k v o fc1 fc2", "w b")),
    "skip": Drawing("a gate on every block is trained", gate="gate"),
    "attention_copy": Drawing("the classifier is trained; attention is the teacher's", borrowed="attention"),
}
# Methods whose kind has another name; all others of peft change the fused q, k, v layer.
OF = {
    **dict.fromkeys(("lora", "krona", "slad"), "delta_qv"),
    **dict.fromkeys(("fact_tt", "fact_tk"), "delta_all"),
    **dict.fromkeys(("mlae", "hira", "pissa", "olora", "boft"), "delta_qkv"),
    "compacter": "houlsby",
}
# Boxes of a lane: name, left edge, width, words.
ATTENTION = [
    ("norm1", 62, 38, "norm"), ("q", 130, 22, "q"), ("k", 154, 22, "k"), ("v", 178, 22, "v"),
    ("attention", 206, 54, "attention"), ("o", 266, 22, "o"),
]  # fmt: skip
MLP = [("norm2", 62, 38, "norm"), ("fc1", 130, 46, "fc1"), ("fc2", 182, 46, "fc2")]
CONV = [("conv", 62, 72, "k × k conv"), ("norm1", 150, 46, "norm"), ("act", 208, 46, "relu")]


class Svg:
    """The picture as it grows: elements, and how far down it reaches."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def box(
        self, x: float, y: float, width: float, words: str, look: tuple[str, str] = FROZEN, height: int = 22
    ) -> None:
        """Draw a filled box with words in its middle."""
        fill, ink = look
        self.elements.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}"/>')
        middle = f'x="{x + width / 2:g}" y="{y + height / 2 + 3.7:g}"'
        self.elements.append(f'<text {middle} fill="{ink}">{escape(words)}</text>')

    def line(self, *points: tuple[float, float], arrow: bool = False, ink: str = LINE) -> None:
        """Draw a line through points, maybe with an arrow at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = f' marker-end="url(#{"a" if ink == LINE else "c"})"' if arrow else ""
        self.elements.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="1.5"{end}/>')

    def plus(self, x: float, y: float) -> None:
        """Draw the sum of two lines."""
        self.elements.append(f'<circle cx="{x}" cy="{y}" r="7" fill="{FROZEN[0]}" stroke="{LINE}"/>')
        self.elements.append(f'<text x="{x}" y="{y + 3.7:g}" fill="{FROZEN[1]}">+</text>')

    def text(self, height: float, says: str, top: int = 0) -> str:
        """Return the file."""
        arrows = "".join(
            f'<marker id="{name}" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5"'
            f' orient="auto-start-reverse"><path d="M0 0L6 3L0 6z" fill="{ink}"/></marker>'
            for name, ink in (("a", LINE), ("c", TRAINED[0]))
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {WIDTH} {height - top:g}" role="img"'
        look = 'font-family="system-ui,sans-serif" font-size="10.5" text-anchor="middle"'
        body = "\n".join(self.elements)
        return f"{head} {look}>\n<title>{escape(says)}</title>\n<defs>{arrows}</defs>\n{body}\n</svg>\n"


def method(kind: str) -> str:
    """Return the drawing of a kind of method."""
    drawing, svg = KINDS[kind], Svg()
    look = {name: TRAINED if name in drawing.trained else FROZEN for name in _BOXES}
    if drawing.image:
        svg.elements.append(f'<rect x="2" y="2" width="76" height="30" rx="5" fill="{TRAINED[0]}"/>')
        svg.box(92, 6, 78, drawing.image, TRAINED)
    svg.box(6, 6, 68, "image")
    svg.line((STREAM, 32 if drawing.image else 28), (STREAM, 39), arrow=True)
    svg.box(6, 40, 68, "stem" if drawing.conv else "embedding", look["embed"])
    _tag(svg, drawing, "embed", 6, 40, 68)
    top = 82
    svg.line((STREAM, 62), (STREAM, top))
    if drawing.prompts:
        svg.box(92, 52, 124, drawing.prompts, TRAINED)
        svg.line((92, 63), (STREAM + 3, 70), arrow=True)
    if drawing.conv:
        y = _lane(svg, drawing, CONV, "conv", top + 8, look)
    else:
        y = _lane(svg, drawing, ATTENTION, "attention", top + 8, look)
        y = _lane(svg, drawing, MLP, "mlp", y, look)
    if words := drawing.series.get("after block"):
        svg.line((STREAM, y), (STREAM, y + 12), (92, y + 12))
        svg.box(92, y + 1, 104, words, TRAINED)
        svg.line((196, y + 12), (218, y + 12), (218, y + 34), (STREAM + 8, y + 34), arrow=True)
        svg.line((STREAM, y + 12), (STREAM, y + 27))
        svg.plus(STREAM, y + 34)
        y += 44
    side, trained = drawing.side
    if side and drawing.side_of != "image":
        svg.line((STREAM, y + 8), (138, y + 8), arrow=True)
        svg.box(138, y - 3, 110, side, TRAINED if trained else FROZEN)
        svg.line((STREAM, y), (STREAM, y + 24))
        y += 24
    svg.elements.insert(
        0,
        f'<rect x="1" y="{top - 6}" width="346" height="{y - top + 10:g}" rx="8" fill="none" stroke="{LINE}"'
        ' stroke-dasharray="3 4"/>',
    )
    svg.box(256, top - 17, 84, drawing.repeat)
    if drawing.gate:
        svg.box(92, top - 17, 60, f"× {drawing.gate}", TRAINED)
    bottom = y + 16
    if drawing.side_of != "blocks only":
        svg.line((STREAM, y), (STREAM, bottom), arrow=True)
        svg.box(6, bottom, 68, "norm", look["norm"])
        _tag(svg, drawing, "norm", 6, bottom, 68)
        svg.line((74, bottom + 11), (213, bottom + 11), arrow=True)
    if drawing.head:
        svg.box(90, bottom, 92, drawing.head, TRAINED)
    if side and drawing.side_of == "image":
        svg.line((74, 17), (213, 17), arrow=True)
        svg.box(214, 6, 110, side, TRAINED)
        svg.line((324, 17), (354, 17), (354, bottom + 32), (193, bottom + 32), (193, bottom + 19), arrow=True)
        svg.plus(193, bottom + 11)
    elif side:
        svg.line((193, y - 5), (193, bottom + 11), (213, bottom + 11), arrow=True)
    svg.box(214, bottom, 82, "classifier", TRAINED)
    return svg.text(bottom + 40, drawing.says)


def _lane(svg: Svg, drawing: Drawing, boxes: list, branch: str, y: float, look: dict) -> float:
    """Draw a branch that leaves the stream and comes back to it; return where the stream goes on."""
    series = {place.partition(" ")[0]: words for place, words in drawing.series.items() if place.endswith(branch)}
    end = 342 if "after" in series else boxes[-1][1] + boxes[-1][2] + 10
    beside, residual = drawing.beside.get(branch), branch != "conv"
    middle, back = y + 11, y + 46 + (30 if drawing.beside.get(branch) else 0)
    svg.line((STREAM, y - 8), (STREAM, back - 8 if residual else middle))
    svg.line((STREAM, middle), (end, middle), (end, back), (STREAM + (8 if residual else 0), back), arrow=True)
    if residual:
        svg.plus(STREAM, back)
    for name, x, width, words in boxes:
        svg.box(x, y, width, words, TEACHER if name == drawing.borrowed else look.get(name, FROZEN))
        _tag(svg, drawing, name, x, y, width)
    if "before" in series:
        svg.box(103, y, 22, series["before"], TRAINED)
    if "after" in series:
        svg.box(291, y, 46, series["after"], TRAINED)
    if beside:
        # Beside a convolution the sum is in front of the norm; AdaptFormer reads in front of norm2, Convpass behind.
        start, stop = {"conv": (52, 142), "mlp": (52, end), "attention": (52, end)}[branch]
        if beside.startswith("conv"):
            start = 106
        svg.line((start, middle), (start, y + 45), (stop, y + 45), (stop, middle + 2), arrow=branch == "conv")
        width = 70 if branch == "conv" else 124
        svg.box(63 if branch == "conv" else 112, y + 34, width, beside, TRAINED)
    return back + (16 if residual else 4)


def _tag(svg: Svg, drawing: Drawing, name: str, x: float, y: float, width: float) -> None:
    """Draw what is learned on a box under it."""
    if letters := drawing.tags.get(name):
        svg.box(x, y + 19, width, letters, TRAINED, height=15)


# What a loss reads, in the order of a network, and the words on the box.
SIGNALS = {"attention": "attention", "tokens": "tokens", "pooled": "feature", "logits": "logits"}


def loss(signal: str, labels: bool, teacher: bool, batch: bool) -> str:
    """Return the drawing of a loss: the signals of both networks that it compares, and the label if it reads that."""
    svg = Svg()
    rows = [("teacher", 8, TEACHER), ("student", 70, FROZEN)] if teacher else [("student", 70, FROZEN)]
    for name, y, usual in rows:
        copies = (8, 4, 0) if batch else (0,)
        svg.box(4, y, 52, name, usual)
        left = 68
        for one, words in SIGNALS.items():
            svg.line((left - 12, y + 11), (left - 1, y + 11), arrow=True)
            read = one == signal
            for shift in copies if read else (0,):
                if shift:
                    svg.elements.append(
                        f'<rect x="{left + shift}" y="{y - shift}" width="56" height="22" rx="4" fill="{TRAINED[0]}"'
                        f' stroke="{LINE}"/>'
                    )
                else:
                    svg.box(left, y, 56, words, TRAINED if read else usual)
            if read and teacher and name == "teacher":
                svg.line((left + 28, 31), (left + 28, 69 - max(copies)), arrow=True, ink=TRAINED[0])
            if read and labels and name == "student":
                svg.line((WIDTH - 46, 50), (left + 44, 69 - max(copies)), arrow=True, ink=TRAINED[0])
            left += 68
    if labels:
        svg.box(WIDTH - 46, 39, 42, "label", TRAINED)
    told = f"the student's {SIGNALS[signal]} follow" + (" those of the teacher" if teacher else " the label")
    also = " and the label" if labels and teacher else ""
    return svg.text(100, told + also + (", over all images of a batch" if batch else ""), 0 if teacher else 32)


def loss_kind(row: object) -> str:
    """Return the name of the drawing of a row of the table of losses."""
    labels, teacher, batch = _reads(row)
    return "-".join(["loss", row.signal, *["label"] * labels, *["alone"] * (not teacher), *["batch"] * batch])


def _reads(row: object) -> tuple[bool, bool, bool]:
    return "label" in row.needs, row.category != "labels", row.over_batch


def of_method(row: object) -> str:
    """Return the name of the drawing of a row of the table of methods, "" where there is none yet."""
    kind = OF.get(row.name, row.name)
    return kind if kind in KINDS else "delta_qkv" if hasattr(row, "formula") else ""


def drawings() -> dict[str, str]:
    """Return every file by its name."""
    from remap.registry import BUILT_IN
    from remap.remapping import LOSSES
    from remap.tuning import METHODS

    kinds = sorted({of_method(row) for row in METHODS if row.origin == BUILT_IN} - {""})
    files = {kind: method(kind) for kind in kinds}
    drawn = [row for row in LOSSES if row.origin == BUILT_IN and row.category != "domains"]
    files |= {loss_kind(row): loss(row.signal, *_reads(row)) for row in drawn}
    return {f"{name}.svg": text for name, text in files.items()}


def write() -> None:
    """Write all files, and remove those of kinds that are gone."""
    FOLDER.mkdir(exist_ok=True)
    files = drawings()
    for old in set(FOLDER.glob("*.svg")) - {FOLDER / name for name in files}:
        old.unlink()
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(files)} drawings to {FOLDER}")


if __name__ == "__main__":
    write()
