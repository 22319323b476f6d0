"""Python for the card of each format: it classifies a picture with what was exported, without remap where it can."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from remap.data.views import View
from remap.exporting.format import ExportOptions
from remap.exporting.task_source import TaskSource

# A view as ``remap.data.views`` makes it: the largest box of its shape in the centre, resized in one go.
_PICTURE = """\
picture = ImageOps.exif_transpose(Image.open(sys.argv[1]))
assert picture.mode[0] not in "IF", "values of more than 8 bits: remap predict reads them"
"""
_OPAQUE = _PICTURE + 'planes = [picture.convert("RGB")]\n'
_ON_COLOUR = (
    _PICTURE
    + """\
rgba, planes = picture.convert("RGBA"), [Image.new("RGB", picture.size, "{alpha}")]
planes[0].paste(rgba, mask=rgba.getchannel("A"))
"""
)
_ON_SQUARES = (
    _PICTURE
    + """\
assert not picture.has_transparency_data, "transparent pixels on squares: remap predict draws them"
planes = [picture.convert("RGB")]
"""
)
# Pillow gives the upper 8 bits of colours of 16, which a range of values does not fit.
_NOT_WIDE = 'assert ";16" not in str(Image.open(sys.argv[1]).tile), "colours of 16 bits: remap predict reads them"\n'
_BY_ALPHA = {"drop": _OPAQUE, "checker": _ON_SQUARES}
_OF_MANY_CHANNELS = """\
values = np.load(sys.argv[1]) if sys.argv[1].endswith(".npy") else np.asarray(Image.open(sys.argv[1]))
values = values if values.shape[-1] == {channels} else np.moveaxis(values, 0, -1)
top = 1 if values.dtype.kind == "f" and values.max() <= 1 else 255
low, high = view["value_range"] or (0, 65535 if values.dtype.str[1:] == "u2" or values.max() > 255 else top)
scaled = np.rint(((values - float(low)) * (255 / (high - low))).clip(0, 255)).astype(np.uint8)
scaled = values if values.dtype == np.uint8 else scaled
planes = [Image.fromarray(np.ascontiguousarray(scaled[..., channel])) for channel in range({channels})]
"""
_VIEW = """\
(height, width), image = view["size"], planes[0]
across = min(image.width, image.height * width / height) * view["crop_pct"]
down = min(image.height, image.width * height / width) * view["crop_pct"]
left, top = (image.width - across) / 2, (image.height - down) / 2
how = dict(resample=Image.Resampling[view["interpolation"].upper()], box=(left, top, left + across, top + down))
images = np.dstack([np.array(plane.resize((width, height), **how)) for plane in planes])[None]
"""
_ONNX = """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{file}")
metadata = session.get_modelmeta().custom_metadata_map
classes, view = json.loads(metadata["classes"]), json.loads(metadata["preprocessing"])
{images}{say}
"""
_TASKS = """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session, one = onnxruntime.InferenceSession("{file}"), onnxruntime.RunOptions()
one.only_execute_path_to_fetches = True  # what other tasks need is not computed
metadata = session.get_modelmeta().custom_metadata_map
classes, view, activation = (json.loads(metadata[key]) for key in ("classes", "preprocessing", "activation"))
{images}task = sys.argv[2]
names, answer = classes[task], session.run([task], {{"images": images}}, one)[0][0]
several = activation[task] == "sigmoid"  # any number of classes
print([name for name, one in zip(names, answer) if one >= 0] if several else names[answer.argmax()])
"""
_TORCH = """\
import json, sys
import numpy as np, torch
from PIL import Image, ImageOps

extra = {{"metadata.json": ""}}
model = torch.export.load("{file}", extra_files=extra).module()
metadata = json.loads(extra["metadata.json"])
classes, view = metadata["classes"], metadata["preprocessing"]
{images}{say}
"""
_OPENVINO = """\
import json, sys
import numpy as np, openvino
from PIL import Image, ImageOps

network = openvino.Core().compile_model("{file}", "CPU")
facts = json.load(open("export.json"))
classes, view = facts["classes"], facts["preprocessing"]
{images}{say}
"""
_OF_MODEL = """\
import json, sys
import {packages}, numpy as np, torch
from PIL import Image, ImageOps

{model}
facts = json.load(open("export.json"))
view = facts["preprocessing"] | {{"size": {size}}}
{images}classes = facts["classes"]
{say}
"""
_TIMM = 'model = timm.create_model("local-dir:.", pretrained=True).eval()'
_PEFT = """\
{above}model = timm.create_model("{base}", {arguments})
model = peft.PeftModel.from_pretrained(model, ".").eval()"""
# The answer to the one picture in ``images``.
_PYTORCH = "model(torch.from_numpy(images))[0]"
_TASK = """\
import sys
import remap

print(remap.load_student(".").{predict}([sys.argv[1]]))
"""


def onnx(source: TaskSource, options: ExportOptions, file: str) -> str:
    """Return Python for an ONNX file: onnxruntime, numpy and Pillow."""
    say = _say(source, options, 'session.run(None, {"images": images})[0][0]')
    return _ONNX.format(file=file, images=_images(source.view, options), say=say)


def many_tasks(view: View, options: ExportOptions, file: str) -> str:
    """Return Python for an ONNX file of many tasks."""
    return _TASKS.format(file=file, images=_images(view, options))


def torch_program(source: TaskSource, options: ExportOptions, file: str) -> str:
    """Return Python for a program of torch.export."""
    return _TORCH.format(file=file, images=_images(source.view, options), say=_say(source, options, _PYTORCH))


def openvino(source: TaskSource, file: str) -> str:
    """Return Python for an OpenVINO file: openvino, numpy and Pillow."""
    say = _say(source, ExportOptions(), "network(images)[0][0]")
    return _OPENVINO.format(file=file, images=_images(source.view, ExportOptions()), say=say)


def timm_model(source: TaskSource) -> str:
    """Return Python for a model folder of timm."""
    return _of_model(source, "timm", _TIMM)


def peft_adapter(source: TaskSource, arguments: Mapping[str, Any], above: str) -> str:
    """Return Python for an adapter folder of PEFT.

    Args:
        arguments: Of ``timm.create_model``, for the base model.
        above: Complete lines above it; empty for none.
    """
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    model = _PEFT.format(base=source.meta.backbone.model, arguments=given, above=above)
    return _of_model(source, "peft, timm", model)


def task(source: TaskSource) -> str:
    """Return Python for a task folder."""
    return _TASK.format(predict="predict" if source.cut(False) is None else "predict_all")


def _of_model(source: TaskSource, packages: str, model: str) -> str:
    (channels, *size), view = source.meta.preprocess.shape, source.view
    if channels == 1:  # of a view in colours, remap's networks make greys themselves
        view = replace(view, pixels=replace(view.pixels, channels=1))
    images, say = _images(view, ExportOptions()), _say(source, ExportOptions(), _PYTORCH)
    return _OF_MODEL.format(packages=packages, model=model, size=size, images=images, say=say)


def _say(source: TaskSource, options: ExportOptions, answer: str) -> str:
    """Return the line that prints the likeliest class, or all that are named, of what the code ``answer`` gives."""
    cut = source.cut(options.softmax)
    if cut is None:
        return f"print(classes[{answer}.argmax()])"
    return f"print([name for name, one in zip(classes, {answer}) if one >= {cut:g}])"


def _images(view: View, options: ExportOptions) -> str:
    """Return lines that read a picture and make the network's input, ``images``, of the description ``view``."""
    channels, alpha = view.pixels.channels, view.pixels.alpha
    if channels in (1, 3):
        lines = _NOT_WIDE if view.pixels.value_range else ""
        lines += _BY_ALPHA.get(alpha, _ON_COLOUR).replace("{alpha}", alpha)
        lines += 'planes = [planes[0].convert("L")]\n' if channels == 1 else ""
    else:
        lines = _OF_MANY_CHANNELS.format(channels=channels)
    lines += _VIEW
    if options.input == "float":
        lines += 'images = ((images / 255 - view["mean"]) / view["std"]).astype(np.float32)\n'
    if options.layout == "nchw":
        lines += "images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))\n"
    return lines
