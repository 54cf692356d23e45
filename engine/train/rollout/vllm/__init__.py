"""The rollout engine vLLM: a process of its own, and the backend that talks to it.

`start`, `engine_process`, `worker_extension`, `uniform_sampling` and `sleep_mode` run in the
engine's process, in an environment that needs vLLM, torch, safetensors and msgspec, and none of our
other dependencies. `checksum` and `group` are used on both sides, the other modules in the ranks.
"""
