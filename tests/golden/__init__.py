"""Numbers that a change of structure must not move: losses of a training, and verdicts of a fixed bundle.

`make golden` computes them and writes `losses.json` and `verdicts.json`; `test_golden.py` compares. What the release of
2026-11-28 left on storage (`left/`) was made once, by `left.py`, and is read by every release after it.
"""
