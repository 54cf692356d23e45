"""Code of the engine's process, which runs in vLLM's environment.

That environment has vLLM, torch, safetensors and msgspec, but none of our other dependencies.
Processes that vLLM spawns also import these modules.
"""
