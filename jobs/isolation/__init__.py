"""Child processes that parse what strangers wrote: they can be killed, crash or be taken over without harm.

Here: the parent's guard, the zygote that forks, what a child gives up, and the frames on its pipes. What the
children do is elsewhere: decoding in `pipeline`, containers in `dataset`.
"""
