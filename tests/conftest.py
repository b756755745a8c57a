"""What all tests share: one thread a process, `--run-slow`, and no GPU tests without a GPU."""
import os

# Before numpy, torch and numba are imported: small arrays on two cores are slower with more threads, and sums would depend on their number.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "agg")
# Compiled kernels stay beside their sources, where `nbdev_test` and a later run find them; a read-only checkout gets a folder of its own.
if not os.access(os.path.join(os.path.dirname(__file__), "..", "zerolab"), os.W_OK):
    os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(os.path.expanduser("~"), ".cache", "zerolab-numba"))

import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow (minutes)")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if "slow" in item.keywords]
    if not config.getoption("--run-slow"):
        for item in slow: item.add_marker(pytest.mark.skip(reason="slow: --run-slow runs it"))
    gpu = [item for item in items if "gpu" in item.keywords]
    if not gpu: return
    import torch
    if not torch.cuda.is_available():
        for item in gpu: item.add_marker(pytest.mark.skip(reason="no CUDA here"))


@pytest.fixture(autouse=True)
def own_run_folder(tmp_path, monkeypatch):
    """Nothing that a test runs writes into the checkout's runs/, or sees the settings of the person who runs it."""
    monkeypatch.setenv("ZEROLAB_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("ZEROLAB_ROOT", raising=False)
