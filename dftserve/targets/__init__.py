"""Target distributions for the tokens of a corpus: recipes, sources, and the store of targets."""
