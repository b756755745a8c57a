"""Every GPU check in one go: python tests/gpu/run_all.py. Writes $OUT/gpu.json (default: the current folder), and exits 1 if a check failed."""
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]


def environment():
    "The machine and the versions that the numbers belong to."
    from importlib.metadata import version
    import torch
    names = ("torch", "gsplat", "numba", "numpy")
    found = {name: version(name) for name in names}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability())}
    return found


def build():
    "gsplat compiles itself on first use; do that once, before anything is timed."
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    start = time.perf_counter()
    from gsplat.cuda._backend import _C
    return {"built": _C is not None, "seconds": time.perf_counter() - start}


def splat_parity():
    from test_gpu_splats import parity
    cases = [dict(batch=batch, degree=degree, antialiased=antialiased) for batch in ((), (2,)) for degree in (0, 2) for antialiased in (False, True)]
    return [{**case, **parity(**case)} for case in cases]


def splat_throughput():
    from test_gpu_splats import throughput
    return [throughput(*case) for case in ((1, 2, 8192, 64), (1, 4, 65536, 128), (1, 1, 200_000, 512), (8, 8, 65536, 128), (8, 8, 262_144, 256))]


def pytest_gpu():
    "The tests themselves, all files of this folder."
    import pytest
    import torch
    if not torch.cuda.is_available(): raise RuntimeError("no CUDA here: every test would be skipped")
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", str(Path(__file__).parent)])
    if code: raise AssertionError(f"pytest ended with code {int(code)}")
    return {"passed": True}


def main():
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    report, failed = {}, []
    for check in (environment, build, splat_parity, splat_throughput, pytest_gpu):
        start = time.perf_counter()
        try: result = {"ok": True, "result": check()}
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt): raise
            result = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
            failed.append(check.__name__)
        report[check.__name__] = {**result, "seconds": round(time.perf_counter() - start, 1)}
        # after every check, so that a run cut short still leaves what it found
        (out / "gpu.json").write_text(json.dumps(report, indent=1))
        print(check.__name__, "ok" if result["ok"] else result["error"], flush=True)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
