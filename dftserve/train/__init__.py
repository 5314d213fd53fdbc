"""Training a model toward the targets of a store, from a configuration to a checkpoint."""
