"""The rollout engine vLLM: a process of its own, and the backend that talks to it.

`start`, `engine_process`, `worker_extension` and `uniform_sampling` run in the engine's process, in
an environment that needs vLLM, torch, safetensors and msgspec, and none of our other dependencies.
The other modules run in the ranks.
"""
