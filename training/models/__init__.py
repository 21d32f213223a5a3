"""Towers that neither open_clip nor timm ships."""
