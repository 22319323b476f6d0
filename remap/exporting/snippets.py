"""Python for the card of each format: it classifies a picture with what was exported, without remap where it can."""

from remap.exporting.format import ExportOptions
from remap.exporting.task_source import TaskSource

# A view as ``remap.data.views`` makes it: the largest box of its shape in the centre, resized in one go.
_VIEW = """\
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("{mode}")
height, width = view["size"]
across = min(image.width, image.height * width / height) * view["crop_pct"]
down = min(image.height, image.width * height / width) * view["crop_pct"]
left, top = (image.width - across) / 2, (image.height - down) / 2
filter = Image.Resampling[view["interpolation"].upper()]
pixels = np.array(image.resize((width, height), filter, box=(left, top, left + across, top + down)))
images = pixels.reshape(1, height, width, -1)
"""
_ONNX = """\
import json, sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{file}")
metadata = session.get_modelmeta().custom_metadata_map
classes, view = json.loads(metadata["classes"]), json.loads(metadata["preprocessing"])
{view}{change}answers = session.run(None, {{"images": images}})[0]
print(classes[answers[0].argmax()])
"""
_TORCH = """\
import json, sys
import numpy as np, torch
from PIL import Image, ImageOps

extra = {{"metadata.json": ""}}
model = torch.export.load("{file}", extra_files=extra).module()
metadata = json.loads(extra["metadata.json"])
classes, view = metadata["classes"], metadata["preprocessing"]
{view}{change}answers = model(torch.from_numpy(images))
print(classes[answers[0].argmax()])
"""
_TIMM = """\
import sys
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(Image.open(sys.argv[1]).convert("RGB")).unsqueeze(0))
print(model.pretrained_cfg["label_names"][logits.argmax()])
"""
_PEFT = """\
import sys
import peft, timm
from PIL import Image

model = timm.create_model("{base}", pretrained=True, num_classes={count})
model = peft.PeftModel.from_pretrained(model, ".").eval()
transform = timm.data.create_transform(**{view}, is_training=False)
logits = model(transform(Image.open(sys.argv[1]).convert("RGB")).unsqueeze(0))
print({classes}[logits.argmax()])
"""
_TASK = """\
import sys
import remap

print(remap.load_student(".").predict([sys.argv[1]]))
"""


def onnx(source: TaskSource, options: ExportOptions, file: str) -> str:
    """Return Python for an ONNX file: onnxruntime, numpy and Pillow."""
    return _of_graph(_ONNX, source, options, file)


def torch_program(source: TaskSource, options: ExportOptions, file: str) -> str:
    """Return Python for a program of torch.export."""
    return _of_graph(_TORCH, source, options, file)


def timm_model() -> str:
    """Return Python for a model folder of timm."""
    return _TIMM


def peft_adapter(source: TaskSource, view: dict[str, object]) -> str:
    """Return Python for an adapter folder of PEFT."""
    classes = source.meta.classes
    return _PEFT.format(base=source.meta.backbone.model, count=len(classes), view=view, classes=list(classes))


def task() -> str:
    """Return Python for a task folder."""
    return _TASK


def _of_graph(template: str, source: TaskSource, options: ExportOptions, file: str) -> str:
    """Return the template with what makes the input of a view (1, H, W, C)."""
    lines = []
    if options.input == "float":
        lines.append('images = ((images / 255 - view["mean"]) / view["std"]).astype(np.float32)')
    if options.layout == "nchw":
        lines.append("images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))")
    view = _VIEW.format(mode="L" if source.view.pixels.channels == 1 else "RGB")
    return template.format(file=file, view=view, change="".join(f"{line}\n" for line in lines))
