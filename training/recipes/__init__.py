"""The list of recipes: name to one line; the module is ``training.recipes.NAME``. Importing this needs no torch."""

RECIPES = {
    "clip": "plain contrastive training (CLIP)",
    "tinyclip": "affinity mimicking, with weights inherited by hand or by learned masks (TinyCLIP)",
    "catlip": "an image tower that names the synsets of captions, without a text tower (CatLIP)",
    "probe": "a linear head on a frozen image tower, of labelled images",
    "finetune": "a whole image tower on labelled images",
    "siclip": "a MobileCLIP-S0 with simpler, shared attention: inherited, distilled, pairs matched (SiCLIP)",
    "tinymim": "a small ViT that learns token relations of a large one, on unlabelled images (TinyMIM)",
    "minivit": "blocks that share weights, taught by a large classifier on labelled images (MiniViT)",
    "coca": "contrastive and captioning loss (CoCa): a captioner of one's own",
}
STAGED = (
    "tinyclip",
    "tinymim",
)  # whose module has ``stages(config)``: the configs of the runs that one config stands for
