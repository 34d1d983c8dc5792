"""A directory of weights -> the local shards of a model: the layout run backwards, each rank for itself."""
