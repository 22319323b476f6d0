"""Many tasks on one backbone in memory: the frozen weights are there once, whatever the number of tasks.

Letters: B images, C classes of a task.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from remap.backbones.anatomy import set_fused_attention
from remap.backbones.build import Backbone, fresh_head
from remap.backbones.kernels import fused_attention
from remap.backbones.preprocess import Preprocess, PreprocessSpec
from remap.backbones.typed import as_timm
from remap.distributed.launch import usable_device
from remap.errors import RunError, UnknownName
from remap.io.paths import expanded
from remap.network import frozen
from remap.pipeline.student_api import Student, several
from remap.runs.task import beside, network_of, open_backbone, require_classifier
from remap.runs.task_file import TaskMeta, folder_of, read_meta, read_tensors, require_sizes
from remap.tasks.routing import Router, why_not_together


class MultiTask:
    """Several tuned students that share one frozen backbone, ready for images of any of them.

    Args:
        backbone: The frozen backbone, or where its weights are: a model as ``--student`` takes it; None for what the
            first task says.
        tasks: Run directories or task folders by name.
        device: Where it computes; None is the accelerator if there is one, else the CPU.

    Attributes:
        students: By name; each is what ``remap.load_student`` gives, on the shared weights.
        current: The name of the task that is used where none is given.
        alone: Why a task needs a forward pass of its own, by name; all others share one.

    Raises:
        RunError: A task's files are damaged, or it was tuned on another backbone.
    """

    def __init__(
        self,
        backbone: Backbone | str | Path | None,
        tasks: Mapping[str, str | Path],
        device: str | torch.device | None = None,
    ) -> None:
        if not tasks or not isinstance(tasks, Mapping):
            raise RunError("no tasks by name are given", do="name some: MultiTask(backbone, {'birds': RUN})")
        self.device = usable_device(device)
        first = folder_of(expanded(next(iter(tasks.values()))))
        self._backbone = backbone if isinstance(backbone, Backbone) else _open(backbone, read_meta(first), first)
        self._backbone.model.requires_grad_(False).eval()
        self._backbone.model.to(self.device)  # before copies share its tensors
        anatomy = self._backbone.anatomy
        fused, _ = fused_attention("auto", self.device.type, bf16=False, trains=True, tokens=anatomy.sequence)
        set_fused_attention(self._backbone.model, anatomy, fused)  # as a Student does
        self.students: dict[str, Student] = {}
        self.alone: dict[str, str] = {}
        self._routers: dict[PreprocessSpec, tuple[Router, Preprocess]] = {}
        for name, path in tasks.items():
            self.add(name, path)
        self.current = next(iter(tasks))

    def add(self, name: str, path: str | Path) -> None:
        """Add a task; those that are there do not change.

        Raises:
            RunError: Its files are damaged, it was tuned on another backbone, or the name is taken.
        """
        if name in self.students:
            raise RunError(f"there is a task {name} already", do="choose another name")
        folder = folder_of(expanded(path))
        meta = read_meta(folder)
        require_shared(folder, meta)
        identity = self._backbone.identity
        if meta.backbone.sha256 != identity.sha256 and meta.backbone.model != identity.model:
            raise RunError(
                f"{folder} was tuned on another backbone than the tasks before it",
                given=f"{meta.backbone.model}, and {identity.model}",
                do="predict by the tasks of each backbone apart",
            )
        tensors = read_tensors(folder, meta)
        require_sizes(folder, meta, tensors)
        copied = _sharing_copy(self._backbone, frozenset(tensors))
        fresh_head(copied.model, copied.anatomy, len(meta.classes))
        network = network_of(folder, meta, tensors, copied)
        require_classifier(network, folder)
        self.students[name] = Student(frozen(network), meta.view, self.device, folder)
        self._routers.clear()
        reason = why_not_together(network.model, self._backbone.model, network.anatomy)
        if reason is not None:
            self.alone[name] = reason

    @property
    def backbone_parameters(self) -> int:
        """The number of the backbone's parameters, classifier apart."""
        named, anatomy = self._backbone.model.named_parameters(), self._backbone.anatomy
        return sum(parameter.numel() for name, parameter in named if not anatomy.is_head(name))

    def switch(self, name: str) -> Student:
        """Make a task the current one and return its student; nothing is loaded or copied.

        Raises:
            UnknownName: There is no such task.
        """
        self.current, student = name, self.student(name)
        return student

    def student(self, name: str) -> Student:
        """Return the student of a task.

        Raises:
            UnknownName: There is no such task.
        """
        if name not in self.students:
            raise UnknownName(f"there is no task '{name}'", given=name, allowed=sorted(self.students))
        return self.students[name]

    def predict(
        self, images: Sequence[Image.Image | bytes | Path | str], tasks: Sequence[str] | str | None = None
    ) -> list[tuple[str, float]]:
        """Return the likeliest class of each image, among the classes of its task, and its probability.

        Args:
            tasks: The task of each image, or one for all; None is the current one.
        """
        images = several(images)
        names = self._names(len(images), tasks)
        answers = zip(names, self.logits(images, names), strict=True)
        best = [self.students[name].network.probabilities(logits).max(dim=-1) for name, logits in answers]
        return [(self.students[n].classes[int(b.indices)], float(b.values)) for n, b in zip(names, best, strict=True)]

    def logits(
        self, images: Sequence[Image.Image | bytes | Path | str], tasks: Sequence[str] | str | None = None
    ) -> list[Tensor]:
        """Return the logits of each image, (C,) of its task, float32, on the CPU.

        Images whose tasks are not in ``alone`` and take the same preprocessing go through one forward pass.

        Args:
            tasks: The task of each image, or one for all; None is the current one.

        Raises:
            UnknownName: There is no such task.
            BadImage: An image cannot be read.
        """
        images = several(images)
        names = self._names(len(images), tasks)
        views = [self.students[name].pixels(image) for name, image in zip(names, images, strict=True)]
        return self.logits_of_views([torch.from_numpy(view) for view in views], names)

    @torch.no_grad()
    def logits_of_views(self, views: Sequence[Tensor], tasks: Sequence[str]) -> list[Tensor]:
        """Return the logits of each view that is made already, (channels, height, width) uint8, as ``logits`` does.

        Raises:
            UnknownName: There is no such task.
            RunError: A view has no task.
            DataError: A view is not one of its task.
        """
        tasks = self._names(len(views), tasks)
        for name, view in zip(tasks, views, strict=True):
            self.students[name].require_views(view[None])
        positions: dict[str, list[int]] = {}
        for index, name in enumerate(tasks):
            positions.setdefault(name, []).append(index)
        together: dict[PreprocessSpec, list[str]] = {}
        for name in positions:
            if name not in self.alone:
                together.setdefault(self.students[name].network.preprocess, []).append(name)
        logits: dict[str, Tensor] = {}
        for spec, group in together.items():
            if len(group) > 1:
                logits |= self._together(spec, {name: [views[i] for i in positions[name]] for name in group})
        result: dict[int, Tensor] = {}
        for name, indices in positions.items():
            if name not in logits:
                logits[name] = self.students[name].logits_of_views(torch.stack([views[i] for i in indices]))
            result |= zip(indices, logits[name], strict=True)
        return [result[index] for index in range(len(views))]

    def _together(self, spec: PreprocessSpec, views: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        router, preprocess = self._router(spec)
        pixels = torch.cat([preprocess(torch.stack(list(group)).to(self.device)) for group in views.values()])
        features = router.features(pixels, [(name, len(group)) for name, group in views.items()])
        heads = (as_timm(self.students[name].model).forward_head for name in views)
        return {name: head(part).float().cpu() for name, head, part in zip(views, heads, features, strict=True)}

    def _router(self, spec: PreprocessSpec) -> tuple[Router, Preprocess]:
        if spec not in self._routers:
            models = {name: s.model for name, s in self.students.items() if name not in self.alone}
            router = Router(_sharing_copy(self._backbone).model, models)
            self._routers[spec] = router, Preprocess(spec).to(self.device)
        return self._routers[spec]

    def _names(self, count: int, tasks: Sequence[str] | str | None) -> list[str]:
        names = [tasks or self.current] * count if tasks is None or isinstance(tasks, str) else list(tasks)
        for name in set(names):
            self.student(name)
        if len(names) != count:
            raise RunError("each image needs a task", given=f"{count} images, {len(names)} tasks")
        return names


def _open(word: str | Path | None, meta: TaskMeta, folder: Path) -> Backbone:
    require_shared(folder, meta)
    own = {"model": beside(folder, meta.backbone.model)}
    instead = own if word is None else {"model": str(word), "weights": "pretrained"}
    return open_backbone(meta.backbone.to_open(**instead), 1)


def require_shared(folder: Path, meta: TaskMeta) -> None:
    """Refuse a task whose backbone is in its own file only.

    Raises:
        RunError: It is one.
    """
    if meta.backbone.weights == "none":
        raise RunError(
            f"{folder} holds a backbone of its own, which no other task can share",
            given="weights: none (it was tuned on random weights)",
            do="tune on pretrained weights",
        )


def _sharing_copy(backbone: Backbone, but: frozenset[str] = frozenset()) -> Backbone:
    """Return a copy of a backbone on the same tensors; copied are those of the head, and those named in ``but``."""
    named = (*backbone.model.named_parameters(), *backbone.model.named_buffers())
    # deepcopy takes what is in its memo as copied already, so these tensors are shared.
    memo = {id(tensor): tensor for name, tensor in named if name not in but and not backbone.anatomy.is_head(name)}
    model = copy.deepcopy(backbone.model, memo)
    return Backbone(model, backbone.anatomy, backbone.preprocess, backbone.identity, head_is_fresh=True)
