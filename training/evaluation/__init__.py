"""Zero-shot classification and retrieval, accuracy of classifiers, divergence of attention."""
