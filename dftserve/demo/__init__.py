"""`make demo`: a real language model at three diversities, before and after a short tuning.

`model` fetches it, `ask` collects answers, `mark` finds shared phrases, AI phrases and errors in
them, `show` renders these on the terminal and on a page, `tune` tunes the model on `prose.jsonl`,
and `run` does all of it. Importing this package imports none of them.
"""
