"""The programs of the engine that the command line starts: their environment is that of ranks."""

from engine.config.sections.launch import LaunchConfig
from rlhf_tui.engine_program import run_engine_program

SHOWS = """
import json, os, sys
sys.stdin.read()
print(json.dumps(dict(os.environ)))
"""


def test_check_rounds_products_as_a_run_does(tmp_path, monkeypatch):
    (tmp_path / "shows_environment.py").write_text(SHOWS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    launch = LaunchConfig(device="cuda", gpus=[1])
    found = run_engine_program(
        dict[str, str], "shows_environment", given=launch, launch=launch, failed=""
    )
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert not {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "WORLD_SIZE"} & set(found)
