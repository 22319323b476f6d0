"""The images of a recipe: which there are, and those by which a finished run is judged."""

from remap.data.sources import open_data
from remap.data.splits import ImageData
from remap.language.words import class_words
from remap.recipe.schema import DataSpec


def images_of_run(spec: DataSpec) -> ImageData:
    """List the images of a finished run, to judge or look at its student: without those that were only learned from.

    Images without labels, another domain and the memory of old classes need not be at hand any more.

    Raises:
        DataError: They are not at hand.
    """
    data = open_data(*source_arguments(spec if spec.source is None else spec.labeled_part()))
    return data if spec.fold is None else data.without_fold(*spec.fold.left_out)


def source_arguments(spec: DataSpec) -> tuple:
    """Return what decides which images there are: the arguments of ``open_data``."""
    images = (spec.source, spec.val_source, spec.val_fraction, spec.unlabeled or spec.target)
    some = (spec.labels, spec.depth, spec.held_out, spec.per_class, spec.selection)
    # Words name the classes only where no labelled image does.
    alone = spec.source is None and spec.classes is not None
    classes = tuple(class_words(spec.classes or ())) if alone else ()
    return (*images, *some, spec.only, spec.known_classes, classes, spec.per_class_seed, spec.subset, spec.task)
