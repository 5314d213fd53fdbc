"""`make demo`: a real language model at three diversities, before and after a short tuning.

`model` fetches it, `ask` asks it, `mark` finds what is shared, worn or wrong in what it wrote,
`show` puts that on the terminal and on one page, `tune` tunes it on `prose.jsonl`, and `run` does
one after the other. Importing this package loads none of them.
"""
