"""Numbers of the recipe finetune (`training.recipes.finetune`)."""

from training.config import LabelledImageConfig, ModelConfig, OptimConfig, RunConfig, SideConfig
from training.configs.transfer import VIEWS, TransferConfig


def config() -> TransferConfig:
    """Return the paper's numbers."""
    return TransferConfig(
        data=LabelledImageConfig(batch_size=512),
        views=VIEWS,
        sides=SideConfig(sides=tuple(range(128, 321, 32))),
        student=ModelConfig(model=""),
        optim=OptimConfig(
            lr=3e-5,
            final_lr=3e-6,
            weight_decay=0.05,
            beta2=0.999,
            eps=1e-8,
            warmup=500,
            warmup_lr=1e-6,
            clip_norm=1.0,
            ema_decay=1 - 5e-4,
        ),
        run=RunConfig(out="runs/finetune", epochs=10, sync_bn=False),
        freeze=False,
        range_augment=True,
    )
