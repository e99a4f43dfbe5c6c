"""Confined child processes that parse untrusted files. If one crashes, hangs or is compromised, the job continues.

`guard` is the parent's side, `zygote` forks the children, `sandbox` confines them, `frames` is the protocol on their
pipes. What the children do is elsewhere: decoding in `pipeline`, containers in `dataset`.
"""
