"""Named settings: best practice for small images, two earlier studies (A and B), and ways to fine-tune."""

from typing import Any

# The studies' settings; where a study is silent, see the preset's comment.
_STUDY_A_SIMCLR: dict[str, Any] = {
    "encoder": "resnet18",
    "image_size": 60,
    "stem": "7x7",
    "epochs": 35,
    "batch_size": 1024,
    "optimizer": "lars",
    "base_lr": 0.3,  # 1.2 at batch 1024
    "weight_decay": 1e-6,
    "warmup_epochs": 0,
    "crop_scale": (0.08, 1.0),  # torchvision's default
    "temperature": 0.5,
    "projector_norm": False,
    "jitter_probability": 1.0,
    "grayscale": 0.0,
    "blur": 1.0,
    "blur_kernel": 5,
}
_STUDY_B_SIMCLR: dict[str, Any] = {
    "encoder": "resnet50",
    "image_size": 224,
    "epochs": 100,
    "batch_size": 256,
    "optimizer": "adam",
    "base_lr": 3e-4,
    "weight_decay": 1e-4,
    "warmup_epochs": 10,
    "warmup": "constant",
    "crop_scale": (0.08, 1.0),
    "temperature": 0.07,
    "projector_norm": False,
    "jitter": (0.8, 0.8, 0.8, 0.2),
    "grayscale": 0.2,
    "blur": 1.0,
    "blur_kernel": 5,
}
_STUDY_A_MAE: dict[str, Any] = {
    "encoder": "resnet18",
    "image_size": 60,
    "stem": "7x7",
    "epochs": 4,
    "batch_size": 786,
    "optimizer": "adam",
    "base_lr": 7e-3 * 256 / 786,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "warmup_epochs": 0,
    "schedule": "constant",
    "crop_scale": (1.0, 1.0),  # the study resizes; it names no augmentation
    "flip": 0.0,
    "mask_unit": "pixel",
    "shared_mask": True,
    "loss_on": "all",
    "norm_pix": False,
}
_STUDY_B_MAE: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "epochs": 100,
    "batch_size": 512,
    "base_lr": 5e-4,  # 1e-3 at batch 512
    "norm_pix": False,
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
}

# Each preset lists what differs from the recipe's defaults, which are the best practice at 64 px.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "simclr": {
        "small-64": {},
        "small-32": {"image_size": 32, "batch_size": 512, "epochs": 500, "stem": "3x3-nopool"},
        "study-a": _STUDY_A_SIMCLR,
        "study-b": _STUDY_B_SIMCLR,
    },
    "mae": {
        "small-64": {},
        "small-32": {"encoder": "vit_tiny", "image_size": 32, "patch_size": 4, "epochs": 500},
        "study-a": _STUDY_A_MAE,
        "study-b-small": _STUDY_B_MAE | {"encoder": "vit_small"},
        "study-b-base": _STUDY_B_MAE | {"encoder": "vit_base"},
    },
}

# Likewise of fine-tuning.
FINE_TUNING: dict[str, dict[str, Any]] = {
    "mae": {},
    # Of a thousand images, batches of 256 make three steps an epoch.
    "small-data": {"batch_size": 32, "base_lr": 4e-3, "ema": 0.99},
}
