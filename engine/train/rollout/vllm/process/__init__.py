"""What runs in the engine's process, in vLLM's environment: vLLM, torch, safetensors and msgspec.

None of our other dependencies is there. Processes that vLLM spawns import these modules, too.
"""
