"""What a classifier needs of the images of each class: sums over images, so that those of later sessions are added.

Letters: N images, F features, C classes. All in float64. Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from remap.errors import RunError, TrainingError
from remap.io import atomic_write
from remap.io.checked_read import open_regular

FILE = "statistics.safetensors"
_AGAIN = "remove it: it is computed again from the images"


@dataclass(frozen=True)
class ClassStatistics:
    """Sums over images.

    Attributes:
        gram_FF: Sum of x x^T (the matrix G of McDonnell et al. 2023, arXiv 2307.02251, equation 6).
        sums_CF: Sum of the x of each class (their matrix C, transposed).
        counts_C: Images of each class.
    """

    gram_FF: np.ndarray
    sums_CF: np.ndarray
    counts_C: np.ndarray

    @classmethod
    def of(cls, features_NF: np.ndarray, labels_N: np.ndarray, classes: int) -> Self:
        """Return the statistics of some images."""
        x_NF = features_NF.astype(np.float64)
        one_hot_CN = np.equal(np.arange(classes)[:, None], labels_N).astype(np.float64)
        return cls(x_NF.T @ x_NF, one_hot_CN @ x_NF, one_hot_CN.sum(1))

    def __add__(self, other: "ClassStatistics") -> "ClassStatistics":
        """Return the statistics of the images of both; the one with more classes has new ones behind."""
        few, many = sorted((self, other), key=lambda one: len(one.counts_C))
        more = len(many.counts_C) - len(few.counts_C)
        sums_CF = np.pad(few.sums_CF, ((0, more), (0, 0))) + many.sums_CF
        return ClassStatistics(self.gram_FF + other.gram_FF, sums_CF, np.pad(few.counts_C, (0, more)) + many.counts_C)

    @property
    def scale(self) -> float:
        """The sum of squares of a feature over all images, mean over features."""
        return float(np.trace(self.gram_FF)) / len(self.gram_FF)

    def prototypes(self) -> np.ndarray:
        """Return the mean feature of each class, of length 1 (C, F); 0 for a class without images.

        A product with them ranks classes as the cosine does (SimpleCIL, Zhou et al. 2023, arXiv 2303.07338).
        """
        return self.sums_CF / np.maximum(np.linalg.norm(self.sums_CF, axis=1, keepdims=True), 1e-300)

    def ridge(self, penalty: float) -> np.ndarray:
        """Return the weights (C, F) of least squares on one-hot labels with a penalty, without intercept.

        Raises:
            TrainingError: The penalty is so small that there is no one solution.
        """
        from scipy.linalg import solve

        try:
            return solve(self.gram_FF + penalty * np.eye(len(self.gram_FF)), self.sums_CF.T, assume_a="pos").T
        except np.linalg.LinAlgError as error:
            what = "the penalty is too small for these features"
            raise TrainingError(what, given=penalty, do="raise train.ridge") from error

    def save(self, folder: Path, features: str) -> None:
        """Write them into a run directory, with the digest of what makes the features."""
        arrays = {"gram": self.gram_FF, "sums": self.sums_CF, "counts": self.counts_C}
        atomic_write.write_bytes(folder / FILE, save(arrays, metadata={"features": features}))

    @classmethod
    def load(cls, folder: Path, features: str, classes: int) -> "ClassStatistics | None":
        """Return those of a run directory; None where there are none, or they are of other features.

        Raises:
            RunError: The file is damaged.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            open_regular(path).close()
            with safe_open(path, framework="np") as file:
                if (file.metadata() or {}).get("features") != features:
                    return None
                found = cls(*(file.get_tensor(name) for name in ("gram", "sums", "counts")))
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot read {path}: {error}", do=_AGAIN) from error
        width = found.sums_CF.shape[-1] if found.sums_CF.ndim else 0
        shapes = found.gram_FF.shape, found.sums_CF.shape, found.counts_C.shape
        finite = all(np.isfinite(array).all() for array in vars(found).values())
        if not finite or shapes != ((width, width), (classes, width), (classes,)):
            raise RunError(f"{path} does not fit its run", do=_AGAIN)
        return found
