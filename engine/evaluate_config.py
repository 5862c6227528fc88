"""The configuration of `harmony-fast evaluate`: which data, and the settings of each task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from ..harmony.config import Config, Fraction

Several = Annotated[list[PositiveInt], Field(min_length=1)]


class LinearConfig(Config):
    """The linear probe: one linear layer per learning rate, all trained at once on cached features."""

    learning_rates: list[PositiveFloat] = Field([1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0], min_length=1)
    """Per 256 samples of a batch. The best on a held-out tenth of the labelled samples is evaluated."""
    epochs: PositiveInt = 50
    """Passes over the labelled samples."""
    batch_size: PositiveInt = 1024
    """Samples of a step."""
    weight_decay: NonNegativeFloat = 0.0
    """Of SGD."""
    blocks: PositiveInt = 1
    """Class tokens of so many last blocks, side by side, each after the final norm (DINO: 4 for ViT-S, 1 for ViT-B)."""
    average_patches: bool = False
    """Put the mean of the last block's patch tokens beside them (DINO for ViT-B, DINOv2)."""


class FewShotConfig(Config):
    """Logistic regression on a few labelled samples of each class, drawn several times."""

    shots: Several = Field(default=[1, 5, 10])
    """Labelled samples per class."""
    draws: PositiveInt = 5
    """How many times they are drawn, with seeds 0, 1, ...; the mean and the spread are reported."""
    c: PositiveFloat = 10.0
    """Inverse strength of the L2 penalty, as scikit-learn's `C`; features are unit vectors."""


class FinetuneConfig(Config):
    """Training the whole image tower with a classifier on top (recipe of MAE and BEiT, on timm's parts)."""

    epochs: PositiveInt = 100
    """Passes over the labelled samples."""
    warmup_epochs: NonNegativeFloat = 5
    """Epochs of linear warm-up from 0."""
    batch_size: PositiveInt = 256
    """Samples of a step."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate of the classifier per 256 samples of a batch."""
    layer_decay: Fraction = 0.65
    """Each block learns so many times as fast as the one above it."""
    weight_decay: NonNegativeFloat = 0.05
    """Of AdamW."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the last block."""
    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup; 0: none."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of cutmix; 0: none."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Of labels."""
    augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of an augmentation policy; null: crops and flips only."""
    scale: tuple[Fraction, Fraction] = (0.25, 1.0)
    """Share of the image's area that a training crop covers."""


class SegmentationConfig(Config):
    """A linear layer on frozen patch tokens (as DINOv2 evaluates): batch norm, one class score per patch."""

    size: PositiveInt | None = None
    """Shorter side of images and side of crops, pixels, a multiple of the patch size; null: the run's global crops."""
    epochs: PositiveInt = 20
    """Passes over the labelled images."""
    batch_size: PositiveInt = 16
    """Crops of a step."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 1e-4
    """Of AdamW."""
    reduce_zero_label: bool | None = None
    """Mask value 0 is background that does not count, and values from 1 on are the classes (ADE20K); null: only where
    ADE20K's objectInfo150.txt lies in the folder."""
    ignore: int = Field(255, ge=0, le=65535)
    """Mask value that does not count."""


class EvaluateConfig(Config):
    """Labelled sets for `harmony-fast evaluate` and the report, and the settings of the tasks."""

    data: list[str] = Field(default=[])
    """What is evaluated on: tars, a folder with one subfolder per class, a karpathy .json, a .beton, a table; for
    segmentation a folder with images/ and masks/ (or annotations/)."""
    bank: list[str] = Field(default=[])
    """Labelled samples to learn from (knn, linear, few-shot, finetune, segmentation), in the same forms."""
    images: Path | None = None
    """Folder of the images that a karpathy .json names; null: the folder of the .json."""
    split: str = "test"
    """Of a karpathy .json."""
    classes: str | None = None
    """Names of the classes: `imagenet`, a file with one name a line in the order of the sorted labels, or a .json with
    a list, or with names by label; null: labels are names."""
    class_key: str = "name"
    """Label that zero-shot classification predicts, as text."""
    group_key: str = "subcategory"
    """Label predicted by every task that learns from labelled samples. In a folder of classes it is the subfolder."""
    templates: list[str] | str = Field(default=["{}"])
    """Prompts of the zero-shot classifier, {} stands for the class: a list, or one; or `imagenet` (CLIP's 80), `simple`
    (7 of them), or a file with one a line."""
    neighbours: PositiveInt | Several = 10
    """k of the nearest-neighbour classifier, or several."""
    branch: Literal["teacher", "student"] = "teacher"
    """Which weights to evaluate: the EMA teacher's, where there is one, or the student's."""
    batch_size: PositiveInt = 256
    """Images that go through the tower at once."""
    workers: PositiveInt | None = None
    """Threads that decode images; null: one per processor core."""
    linear: LinearConfig = LinearConfig()
    few_shot: FewShotConfig = FewShotConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    segmentation: SegmentationConfig = SegmentationConfig()

    @field_validator("data", "bank", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: object) -> object:
        return [given] if isinstance(given, str) else given

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place(cls, given: list[str] | str) -> list[str] | str:
        if not given:
            raise ValueError("no template given")
        if isinstance(given, str) and given.startswith("["):
            raise ValueError("not a list as YAML has it: put each template in quotes")
        for template in given if isinstance(given, list) else ():
            if "{}" not in template:
                raise ValueError(f"'{template}' has no {{}} for the class name")
        return given
