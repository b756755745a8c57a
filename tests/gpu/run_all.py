"""Every GPU check in one go: python tests/gpu/run_all.py. Writes $OUT/gpu.json (default: here), exits 1 if a check failed and 2 if there is no GPU.

Needs CUDA, torch built for it, gsplat and a compiler for gsplat's first use: pip install -e '.[dev,gpu]'. Meshes through OpenGL need moderngl, the loader
libEGL.so.1 and the driver's EGL; without them that check is skipped."""
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
    import torch
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
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


def lrm_throughput():
    "The SMALL model in the real training loop, one row a setting."
    from test_gpu_lrm import training_throughput
    cases = ((64, 4, "float32"), (64, 4, "bfloat16"), (64, 16, "bfloat16"), (128, 4, "float32"), (128, 4, "bfloat16"), (128, 16, "bfloat16"))
    return [training_throughput(*case) for case in cases]


def lrm_recomputed():
    "The same with blocks recomputed in the backward pass."
    from dataclasses import replace
    from test_gpu_lrm import SMALL, training_throughput
    return [training_throughput(size, objects, "bfloat16", config=replace(SMALL, checkpoint_blocks=True)) for size, objects in ((64, 16), (128, 16))]


def lrm_precision():
    "Half precision against float32, and CUDA against the CPU."
    from test_gpu_lrm import cpu_agreement, precision_agreement
    return {"bfloat16_against_float32": [precision_agreement(size) for size in (64, 128)], "cuda_against_cpu": [cpu_agreement(64)]}


def mesh_gl():
    "Meshes through OpenGL: agreement with the CPU's kernels, and speed. Skipped, with the reason, where EGL offers no graphics card."
    from test_gpu_mesh import mesh_agreement, mesh_throughput, on_a_card
    from zerolab.render.mesh import PASSES
    from zerolab.render.mesh_gl import beyond_limits, gl_device
    if reason := on_a_card(): return {"skipped": reason}
    found = {f"seed {seed}, {samples}x{samples}": mesh_agreement(seed, samples) for seed in (2, 19) for samples in (1, 2, 3)}
    result = {"device": gl_device().name, "agreement": found, "throughput": [mesh_throughput(passes) for passes in ((), tuple(PASSES))]}
    beyond = {name: beyond_limits(numbers) for name, numbers in found.items() if beyond_limits(numbers)}
    if beyond: raise AssertionError(f"beyond the limits of rounding: {beyond}; all: {result}")
    return result


def pytest_gpu():
    "The tests themselves, all files of this folder."
    import pytest
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", str(Path(__file__).parent)])
    if code: raise AssertionError(f"pytest ended with code {int(code)}")
    return {"passed": True}


def why_not():
    "What is missing, in one line, or None."
    try: import torch
    except ImportError: return "torch is not installed: pip install -e '.[dev,gpu]'"
    if torch.version.cuda is None: return f"torch {torch.__version__} is built without CUDA: install a CUDA build of it"
    if not torch.cuda.is_available(): return "no CUDA device here: run this on a machine with an NVIDIA GPU"


def main():
    missing = why_not()
    if missing:
        print(f"run_all: {missing}", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    report, failed = {}, []
    for check in (environment, build, splat_parity, splat_throughput, lrm_throughput, lrm_recomputed, lrm_precision, mesh_gl, pytest_gpu):
        start = time.perf_counter()
        try: result = {"ok": True, "result": check()}
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt): raise
            result = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
            failed.append(check.__name__)
        report[check.__name__] = {**result, "seconds": round(time.perf_counter() - start, 1)}
        # after every check, so that a run cut short still leaves what it found
        (out / "gpu.json").write_text(json.dumps(report, indent=1))
        skipped = result["ok"] and isinstance(result["result"], dict) and result["result"].get("skipped")
        print(check.__name__, f"skipped: {skipped}" if skipped else "ok" if result["ok"] else result["error"], flush=True)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
