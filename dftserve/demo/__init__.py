"""The embedded default of `make demo`: decidable stories and a small model of them.

`words` and `narrators` hold the language, `grammar` writes and reads it, `model` trains a language
model on it, `run` shows that model at work. Importing this package loads none of them.
"""
