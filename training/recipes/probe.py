"""Linear probe as CatLIP (arXiv 2404.15653) measures it: a linear head on a frozen image tower.

Target (section 5): ImageNet-1k 58.0 for CatLIP ViT-B/16 from CC3M; 80.1 from DataComp-1.3B. Cost: 30 epochs forward.
From the paper: 30 epochs, batch 256, learning rate 3e-5 to 1e-6 by a cosine, no weight decay, smoothed cross-entropy,
several sides around 224. Readings: smoothing 0.1 and the sides 128 to 320 by 32 as for fine-tuning, AdamW (0.9, 0.999).
The rate is low: with few labels the head is far from its optimum after 30 epochs, so give each start its own --lr.

    clipmill train probe --model RUN --data IMAGES                       IMAGES/train/CLASS/*.jpg, IMAGES/test/...
      --class-map classes.tsv                                              Transfer Init, see `clipmill classes`
      --no-augment --lr 1e-3 --fraction 0.01                               features computed once; 1 % of the labels
"""

from training.recipes.transfer import prepare as prepare
