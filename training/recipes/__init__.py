"""The recipes in sight: name to one line; the module is ``training.recipes.NAME``. Importing this needs no torch."""

RECIPES = {
    "clip": "plain contrastive training (CLIP)",
    "affinity": "a student taught by a teacher cache: affinity mimicking and features (TinyCLIP)",
    "coca": "contrastive and captioning loss (CoCa): a captioner of one's own",
}
