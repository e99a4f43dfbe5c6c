"""One run of each kind, from its arguments to its record: score, caption, examine, predict, evaluate.

What the commands of the same name call. Trainings, which consist of several runs, are in `experiments`.
"""
