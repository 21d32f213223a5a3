"""`clipmill search`: the images that a model finds for a text or for another image."""
