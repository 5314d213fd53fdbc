"""How varied, how human and how right the answers of a model are."""
