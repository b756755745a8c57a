#!/usr/bin/env bash
# Every check, in order; a failing one is reported and the rest still run. pytest is last, so that its closing line closes the log.
# Sources are compared in a copy: the checkout is left as it was.
set -u
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=agg PYTHONHASHSEED=0
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1   # two workers on two cores: more threads only fight
unset ZEROLAB_ROOT ZEROLAB_RUN_DIR
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
failed=0

step() {   # step NAME COMMAND...
    local name=$1 start=$SECONDS; shift
    if "$@" >"$copy/log" 2>&1; then printf 'ok    %-16s %4ds\n' "$name" $((SECONDS - start))
    else printf 'FAIL  %-16s %4ds\n' "$name" $((SECONDS - start)); failed=1
        grep -E '^[A-Za-z.]+ in .*\.ipynb:' "$copy/log"   # which notebooks, when several failed
        tail -n 40 "$copy/log"
    fi
}

export_in_sync() {   # the library is what the notebooks export, starting from nothing
    mkdir "$copy/tree" && cp -r nbs settings.ini pyproject.toml "$copy/tree" && (cd "$copy/tree" && nbdev_export) || return 1
    diff -r -x __pycache__ zerolab "$copy/tree/zerolab" && return
    echo "zerolab/ differs from what the notebooks export. Edit the notebook, run nbdev_export, commit both."
    return 1
}

notebooks_clean() {   # no execution counts, no stray metadata
    (cd "$copy/tree" && nbdev_clean) || return 1
    diff -rq -x .ipynb_checkpoints -x __pycache__ nbs "$copy/tree/nbs" && return
    echo "These notebooks carry metadata that nbdev_clean removes. Run nbdev_clean and commit."
    return 1
}

step "ruff"            ruff check --no-cache
step "export in sync"  export_in_sync
step "notebooks clean" notebooks_clean
step "kernels"         timeout 600 python tests/compile_kernels.py
# Not in runs/scratch, where an old run would go on; and not with the kernels that numba kept of cells as they were before.
mkdir "$copy/cache"
step "notebooks run"   timeout 1800 env ZEROLAB_RUN_DIR="$copy/run" XDG_CACHE_HOME="$copy/cache" nbdev_test --n_workers 2
step "documentation"   timeout 600 python -m zerolab.dev.site build
timeout 1800 python -m pytest tests || failed=1
exit $failed
