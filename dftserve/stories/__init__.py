"""A text source with decidable validity, for tests and benchmarks: stories, and a model of them.

`words` and `narrators` define the language, `grammar` generates and parses it, `model` trains a
language model on it, `tune` fine-tunes that model in two ways. Importing this package loads none of
them, and it is not part of the wheel.
"""
