"""Draw what each augmentation makes of one photograph: one row each, eight views of seed 0.

python tools/augmentation_sheet.py            # writes docs/augmentation.png
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from remap.data.augmentation import PRESETS, Augmentation, Crop, Erasing, Jitter, RandAugment
from remap.data.augmented_pixels import augmented, draws

ROOT = Path(__file__).parents[1]
SIDE, VIEWS, LABEL = 64, 8, 110
ROWS = {
    "light": PRESETS["light"],
    "strong": PRESETS["strong"],
    "shift": PRESETS["shift"],
    "flip": Augmentation(flip=0.5),
    "crop": Augmentation(crop=Crop()),
    "rand_augment": Augmentation(rand_augment=RandAugment()),
    "trivial_augment": Augmentation(trivial_augment=True),
    "jitter (0.4, hue 0.1)": Augmentation(jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)),
    "erasing": Augmentation(erasing=Erasing(chance=1.0)),
}


def main() -> None:
    """Write the sheet."""
    photo = Image.fromarray(load_sample_image("flower.jpg")).crop((140, 0, 560, 420)).resize((SIDE, SIDE))
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    sheet = Image.new("RGB", (LABEL + VIEWS * (SIDE + 4), len(ROWS) * (SIDE + 4)), "white")
    for row, (name, augmentation) in enumerate(ROWS.items()):
        ImageDraw.Draw(sheet).text((4, row * (SIDE + 4) + SIDE // 2 - 6), name, fill="black")
        for view in range(VIEWS):
            made = augmented(pixels, augmentation, draws(augmentation, 0, view, np.arange(1)))[0]
            sheet.paste(Image.fromarray(made.permute(1, 2, 0).numpy()), (LABEL + view * (SIDE + 4), row * (SIDE + 4)))
    sheet.quantize(64).save(ROOT / "docs" / "augmentation.png", optimize=True)


if __name__ == "__main__":
    main()
