"""WordNet synsets of captions, vocabularies, class names."""
