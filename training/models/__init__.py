"""Models that neither open_clip nor timm has, and what is added to models: heads, inheritance, augmentation, taps."""
