"""Numbers of the recipe probe (`training.recipes.probe`)."""

from training.config import LabelledImageConfig, ModelConfig, OptimConfig, RunConfig, SideConfig
from training.configs.transfer import VIEWS, TransferConfig


def config() -> TransferConfig:
    """Return the paper's numbers."""
    return TransferConfig(
        data=LabelledImageConfig(batch_size=256),
        views=VIEWS,
        sides=SideConfig(sides=tuple(range(128, 321, 32))),
        student=ModelConfig(model=""),
        optim=OptimConfig(lr=3e-5, final_lr=1e-6, weight_decay=0.0, beta2=0.999, eps=1e-8, warmup=0),
        run=RunConfig(out="runs/probe", epochs=30),
    )
