"""The rollout engine vLLM: its separate processes, and the backend that talks to them.

`process` contains the code of such a process, which has its own environment. `checksum` and `group`
are used on both sides; the other modules run in the ranks.
"""
