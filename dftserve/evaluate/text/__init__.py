"""Texts as the measures read them: words, sentences, windows, embeddings."""
