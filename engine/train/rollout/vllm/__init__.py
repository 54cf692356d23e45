"""The rollout engine vLLM: processes of its own, and the backend that talks to them.

`process` is what runs in such a process, in an environment of its own. `checksum` and `group` are
used on both sides, the other modules in the ranks.
"""
