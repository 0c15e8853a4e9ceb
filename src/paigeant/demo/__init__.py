"""The demonstration: a document becomes a brief, and the worker is killed in the middle of an agent's work.

`pipeline.py` is the workflow, written as a user would write it; `offline.py` the model that needs no key, with the
summarising in `summary.py` and the reading of texts in `text.py`. `play.py` starts worker processes (`worker.py`),
kills one and counts what ran and which calls were saved, with the help of `journal.py`; `screen.py` is what a person
sees of it.
"""
