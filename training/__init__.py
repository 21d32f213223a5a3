"""From shards to students: reader, losses, recipes, the one loop, evaluation, export."""
