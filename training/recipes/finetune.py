"""Full fine-tuning of an image tower on labelled images, as CatLIP (arXiv 2404.15653) does it.

Target (section 5): ImageNet-1k at 224 pixels 67.3 for CatLIP ViT-B/16 from CC3M; 84.3, 86.5 and 86.7 for B, L and H/16
from DataComp-1.3B. Cost: 10 epochs. From the paper and its configs: learning rate 3e-5 to 3e-6 by a cosine after 500
steps of warm-up, weight decay 0.05, batch 512 (a table says 128), smoothing 0.1, the average of the weights (0.9995),
sides of 128 to 320 by 32, measured at 224 cut from 232, RangeAugment. AdamW is pre-training's.

    clipmill train finetune --model RUN --data IMAGES [--class-map classes.tsv]
"""

from training.recipes.transfer import prepare as prepare
