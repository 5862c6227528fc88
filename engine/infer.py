"""The configuration that a set of weights implies: sizes from shapes, settings from the authors' command line.

Weights go by the names of our model's state; see `authors.py` for those of the authors' code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]
Raw = dict[str, Any]

# Where the authors' arguments go. One that is not there, or belongs to an objective that is off, changes nothing.
ARGUMENTS = {
    "seed": "seed",
    "epochs": "epochs",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "warmup_epochs": "optimizer.warmup_epochs",
    "weight_decay": "optimizer.weight_decay",
    "weight_decay_end": "optimizer.weight_decay_end",
    "clip_grad": "optimizer.clip_grad",
    "momentum_teacher": "optimizer.ema_momentum",
    "drop_path_rate": "model.image.drop_path",
    "global_crops_number": "views.global_crops",
    "global_crops_scale": "views.global_scale",
    "local_crops_number": "views.local_crops",
    "local_crops_scale": "views.local_scale",
    "pred_ratio": "views.block_ratios",
    "pred_ratio_var": "views.block_ratio_spreads",
    "mask_ratio": "views.pixel_mask_ratio",
    "mask_ratio_end": "views.pixel_mask_ratio_end",
    "mask_ratio_epochs": "views.pixel_mask_ratio_epochs",
    "hard_labels_weight": "objectives.contrastive.hard_weight",
    "hard_labels_weight_end": "objectives.contrastive.hard_weight_end",
    "hard_labels_weight_epochs": "objectives.contrastive.hard_weight_epochs",
    "disc_weight": "objectives.self_distillation.weight",
    "lambda1": "objectives.self_distillation.class_weight",
    "lambda2": "objectives.self_distillation.patch_weight",
    "warmup_teacher_temp": "objectives.self_distillation.teacher_temperature_start",
    "teacher_temp": "objectives.self_distillation.teacher_temperature",
    "warmup_teacher_patch_temp": "objectives.self_distillation.patch_temperature_start",
    "teacher_patch_temp": "objectives.self_distillation.patch_temperature",
    "warmup_teacher_temp_epochs": "objectives.self_distillation.temperature_epochs",
    "freeze_last_layer": "objectives.self_distillation.freeze_last_layer",
    "gen_weight": "objectives.reconstruction.weight",
    "mlm_weight": "objectives.masked_language.weight",
    "text_dist_weight": "objectives.text_distillation.weight",
}
# The text self-distillation follows the patches' temperatures.
TEXT_ARGUMENTS = {
    "warmup_teacher_patch_temp": "objectives.text_distillation.teacher_temperature_start",
    "teacher_patch_temp": "objectives.text_distillation.teacher_temperature",
    "warmup_teacher_temp_epochs": "objectives.text_distillation.temperature_epochs",
}
# What our model does, whatever the arguments say; other values are told.
FIXED = {
    "norm_pix_loss": True, "attentive_masking": False, "random_masking": False, "contrastive_global_crops": True,
    "reconstruct_global_crops": True, "optimizer": "adamw",
}  # fmt: skip
LISTS = ("views.block_ratios", "views.block_ratio_spreads")


def infer_config(weights: Weights, args: Raw) -> Raw:
    """A configuration, as plain data, in which every given weight has a place where our model has such a weight.

    Numbers of attention heads are not in it: see `missing_heads`.
    """
    raw: Raw = {"data": {"train": "data/cc3m.beton"}, "model": {}, "views": {}, "objectives": _objectives(weights)}
    if "student.image.pos_embed" in weights:
        raw["model"]["image"], raw["views"] = _image(weights)
    if "student.text.positional_embedding" in weights:
        raw["model"]["text"] = _text(weights)
    for table in (ARGUMENTS, TEXT_ARGUMENTS):
        for name, key in table.items():
            if args.get(name) is not None:
                _set_if_on(raw, key, args[name])
    distils = raw["objectives"].get("self_distillation")
    if distils and distils.get("patch_weight", 1.0) is None:
        distils["class_weight"] = 1.0  # with DINO the authors' code has no weights of terms
    if not distils:
        raw["views"]["local_crops"] = 0  # nothing else looks at them
    return raw


def missing_heads(raw: Raw) -> list[str]:
    """Fill in the numbers of heads that a width implies; the keys of those that it does not.

    64 channels a head in the towers, as all models of the authors' code have it, and 16 heads in its pixel decoder,
    which is 512 wide.
    """
    missing = []
    for tower, part in raw["model"].items():
        width = part.get("width", 0)
        if "heads" not in part and width % 64:
            missing.append(f"model.{tower}.heads=N (width {width})")
        elif "heads" not in part and width:
            part["heads"] = width // 64
    decoder = raw["objectives"].get("reconstruction")
    if decoder and "heads" not in decoder and decoder.get("width", 512) != 512:
        missing.append(f"objectives.reconstruction.heads=N (width {decoder['width']})")
    return missing


def _image(weights: Weights) -> tuple[Raw, Raw]:
    """Sizes of the image tower and of the crops."""
    positions, patch = weights["student.image.pos_embed"].shape[1] - 1, "student.image.patch_embed.proj.weight"
    width, side = weights[patch].shape[0], weights[patch].shape[-1]
    grid = round(positions**0.5)
    hidden = weights["student.image.blocks.0.mlp.fc1.weight"].shape[0]
    tower = {
        "width": width, "depth": _count(weights, "student.image.blocks."), "mlp_ratio": hidden / width,
        "patch_size": side,
    }  # fmt: skip
    # Local crops of 96 pixels beside global ones of 224, and the same proportion at other sizes.
    return tower, {"global_size": grid * side, "local_size": max(round(grid * 96 / 224), 1) * side}


def _text(weights: Weights) -> Raw:
    """Sizes of the text tower."""
    context, width = weights["student.text.positional_embedding"].shape
    return {
        "width": width, "depth": _count(weights, "student.text.transformer.resblocks."), "context": context,
        "vocabulary": weights["student.text.token_embedding.weight"].shape[0] - 1,
    }  # fmt: skip


def _objectives(weights: Weights) -> Raw:
    """Those whose own weights are there. Towers alone: contrastive for both, otherwise the one that needs no more of
    the model than the tower, with a decoder yet to be trained.
    """
    found = {
        "contrastive": _contrastive(weights), "self_distillation": _self_distillation(weights),
        "reconstruction": _reconstruction(weights), "masked_language": _masked_language(weights),
        "text_distillation": _head(weights, "text_distillation"),
    }  # fmt: skip
    found = {name: part for name, part in found.items() if part is not None}
    alone = "reconstruction" if "student.image.cls_token" in weights else "masked_language"
    return found or {alone: {}}


def _contrastive(weights: Weights) -> Raw | None:
    """Hard labels alone unless there is a teacher that can give soft ones."""
    projections = ("student.image.contrastive_projection", "student.text.text_projection")
    if not all(name in weights for name in projections):
        return None
    soft = all(name.replace("student", "teacher") in weights for name in projections)
    part: Raw = {"embed_dim": weights[projections[0]].shape[1], "hard_weight_end": 0.2 if soft else 1.0}
    return {**part, "kind": "sigmoid"} if "objectives.contrastive.logit_bias" in weights else part


def _self_distillation(weights: Weights) -> Raw | None:
    part = _head(weights, "self_distillation")
    if part is None:
        return None
    separate = weights.get("student.heads.self_distillation.last_layer2.weight_v")
    if separate is not None:
        part["patch_prototypes"] = separate.shape[0]
    if "objectives.self_distillation.patch_center.value" not in weights and "student.image.masked_embed" not in weights:
        part["patch_weight"] = None  # DINO
    return part


def _head(weights: Weights, name: str) -> Raw | None:
    """Sizes of a projection head."""
    prefix = f"student.heads.{name}."
    prototypes = weights.get(f"{prefix}last_layer.weight_v")
    if prototypes is None:
        return None
    layers = [n for n in weights if n.startswith(f"{prefix}mlp.") and n.endswith("weight") and weights[n].dim() == 2]
    return {
        "prototypes": prototypes.shape[0], "bottleneck": prototypes.shape[1], "layers": len(layers),
        "hidden": weights[f"{prefix}mlp.0.weight"].shape[0],
    }  # fmt: skip


def _reconstruction(weights: Weights) -> Raw | None:
    prefix = "objectives.reconstruction.decoder."
    if f"{prefix}embed.weight" not in weights:
        return None
    part = {"width": weights[f"{prefix}embed.weight"].shape[0], "depth": _count(weights, f"{prefix}blocks.")}
    table = weights.get(f"{prefix}pos_embed")
    return {**part, "position_embedding": "zeros"} if table is not None and not table.any() else part


def _masked_language(weights: Weights) -> Raw | None:
    depth = _count(weights, "objectives.masked_language.decoder.transformer.resblocks.")
    return {"depth": depth} if depth else None


def _count(weights: Weights, prefix: str) -> int:
    """How many blocks there are."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def _set_if_on(raw: Raw, key: str, value: Any) -> None:
    """Set a dotted key, unless it belongs to a tower, an objective or a term of one that is not there."""
    *path, last = key.split(".")
    node = raw
    for part in path:
        if part not in node and (node is raw["objectives"] or node is raw["model"]):
            return
        node = node.setdefault(part, {})
    if last in node and node[last] is None:
        return
    node[last] = [value] if key in LISTS and not isinstance(value, (list, tuple)) else value
