"""Operations of other projects, found lazily, called as their users call them.

Each runs through the same inputs, gate, timers and counters as ours. What a project leaves to its
caller is done here with as few passes over memory as a user could, and is part of its time: the job
is that of the family, not that of a kernel.
"""
