"""A dataset's promises, validated."""
