"""Finetuning: the whole image tower and a classifier, with layer-wise decay, mixup and cutmix (timm's parts)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...harmony.image_encoder import ImageEncoder
from ..config import RunConfig
from ..data.pictures import Picture, decoded
from ..errors import UserError
from ..export.timm_format import timm_model
from .features import in_batches, pixels
from .share import Share

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SEED = 0
"""Of the classifier, mixup and stochastic depth, and with the epoch's number of its order."""


def finetune(
    encoder: ImageEncoder, config: RunConfig, train: list[Picture], labels: list[str], test: list[Picture],
    test_labels: list[str], share: Share,
) -> dict[str, float]:  # fmt: skip
    """Top-1 and top-5 accuracy after the last epoch. labels: of the pictures in `train`; test_labels: of `test`.

    Raises UserError where there are too few pictures, or training diverges; DataError, naming the file, where one
    cannot be decoded.
    """
    from timm.utils import random_seed

    classes = sorted(set(labels))
    index = {label: i for i, label in enumerate(classes)}
    settings, device = config.evaluate.finetune, encoder.cls_token.device
    least = 2 * share.world_size
    if len(train) < least:
        raise UserError(f"finetune needs at least {least} labelled samples in evaluate.bank, there are {len(train)}")
    random_seed(SEED)  # the same classifier on every rank
    model = timm_model(encoder, config, num_classes=len(classes), drop_path_rate=settings.drop_path).to(device)
    train_model(model, config, train, [index[label] for label in labels], len(classes), share)
    return evaluate_classifier(model, config, test, [index.get(label, -1) for label in test_labels], share)


def train_model(
    model: nn.Module, config: RunConfig, train: list[Picture], truth: list[int], classes: int, share: Share
) -> None:
    """AdamW with layer-wise decay along a cosine with warm-up; each rank takes its part of every batch.

    truth: class numbers of the pictures in `train`. Raises UserError where the weights do not stay finite.
    """
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import random_seed

    settings, device = config.evaluate.finetune, next(model.parameters()).device
    pairs = min(settings.batch_size, len(train)) // (2 * share.world_size)
    batch = 2 * max(pairs, 1)  # on this rank; mixup takes pairs
    optimizer = create_optimizer_v2(
        model, "adamw", lr=settings.lr * batch * share.world_size / 256, weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )  # fmt: skip
    per_epoch = len(train) // (batch * share.world_size)
    steps, warmup = settings.epochs * per_epoch, int(settings.warmup_epochs * per_epoch)
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=min(warmup, steps - 1), warmup_prefix=False, lr_min=1e-6)
    mixed = float(bool(settings.mixup or settings.cutmix))
    mix = Mixup(settings.mixup, settings.cutmix, prob=mixed, label_smoothing=settings.smoothing, num_classes=classes)
    criterion = SoftTargetCrossEntropy()
    random_seed(SEED, share.rank)
    batches = _batches(train, truth, config, batch, per_epoch, share)
    model.train()
    for step, (images, labels) in enumerate(share.shown(batches, "finetuning", steps), 1):
        images, targets = mix(images.to(device), labels.to(device))
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        share.average([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        schedule.step(step)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):  # the same on all ranks
        raise UserError("finetuning diverged: lower evaluate.finetune.lr")


def _batches(
    train: list[Picture], truth: list[int], config: RunConfig, batch: int, per_epoch: int, share: Share
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches of all epochs: augmented images [batch, 3, H, W] and classes int64 [batch]."""
    from timm.data import create_transform

    settings, augment, size = config.evaluate.finetune, config.data.augment, config.views.global_size
    transform = create_transform(
        size, is_training=True, scale=settings.scale, auto_augment=settings.augment, interpolation="bicubic",
        color_jitter=0.0, mean=augment.mean, std=augment.std,
    )  # fmt: skip
    for epoch in range(settings.epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        own = list(share.of(order))[: per_epoch * batch]
        stream = decoded((train[i] for i in own), transform, config.evaluate.workers)
        images: list[Tensor] = []
        for place, (_, image) in enumerate(stream, 1):
            images.append(image)
            if place % batch == 0:
                yield torch.stack(images), torch.tensor([truth[i] for i in own[place - batch : place]])
                images = []


@torch.inference_mode()
def evaluate_classifier(
    model: VisionTransformer, config: RunConfig, test: list[Picture], truth: list[int], share: Share
) -> dict[str, float]:
    """Top-1 and top-5 accuracy on whole images; truth: class numbers, -1 for a class that was not learned."""
    model.eval()
    device = next(model.parameters()).device
    own = list(share.of(range(len(test))))
    stream = decoded((test[i] for i in own), lambda image: pixels(image, config), config.evaluate.workers)
    right = [torch.zeros(0, min(5, model.num_classes))]
    for chunk in in_batches(zip(own, stream, strict=True), config.evaluate.batch_size):
        logits = model(torch.stack([image for _, (_, image) in chunk]).to(device))
        best = logits.topk(right[0].shape[1]).indices.cpu()
        right.append((best == torch.tensor([truth[i] for i, _ in chunk])[:, None]).float())
    found = share.gathered(torch.cat(right))
    return {"top1": found[:, 0].mean().item(), "top5": found.sum(1).mean().item()}
