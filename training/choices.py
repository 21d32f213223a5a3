"""What some options let one choose from, by the names that the command line has for it.

Recipes' configs, models and losses have these in common; importing this needs no torch.
"""

from typing import Literal

# TinyCLIP's inheritance by hand: which layers of the teacher are kept, and which heads, neurons and dimensions
Layers = Literal["interval", "spread", "first"]
Rank = Literal["leading", "magnitude", "taylor"]
# MiniViT: what the maps across heads begin as, where Swin's convolution is, and the relations of hidden states
HeadMaps = Literal["random", "identity", "none"]
Local = Literal["stream", "residual", "none"]
HiddenMode = Literal["release", "paper"]
# TinyMIM: what is read of a block
Target = Literal[
    "relations",
    "qkv",
    "class-token",
    "output",
    "attention-before",
    "attention-after",
    "ffn-before",
    "ffn-after",
]
