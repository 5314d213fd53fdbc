"""A source whose truth is known, for tests and benches: decidable stories, and a model of them.

`words` and `narrators` hold the language, `grammar` writes and reads it, `model` trains a language
model on it, `tune` tunes that model twice. Importing this package loads none of them, and it is
not part of the wheel.
"""
