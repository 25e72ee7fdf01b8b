#!/usr/bin/env bash
# Compile the CUDA kernels as C++ against cuda_runtime.h beside this file, and run the ops' tests on them, on the CPU.
#
#   tests/cuda_emulation/run.sh [arguments of pytest]     e.g. tests/ops/test_similarity_logsumexp.py
#
# PYTHON names the interpreter (.venv/bin/python by default); CUDA_EMULATION_ORDER the order in which threads take turns.
# It is slow: the tests that draw millions of samples do not finish in reasonable time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$PWD/.venv/bin/python}
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
build=build/cuda_emulation
mkdir -p "$build"
for op in sir_resample langevin_step similarity_logsumexp gaussian_logsumexp; do
  g++ -std=c++17 -O1 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -DTORCH_TARGET_VERSION=0x020b000000000000 \
    -Itests/cuda_emulation -Icsrc -isystem "$torch/include" -x c++ -c "csrc/cuda/$op.cu" -o "$build/$op.o"
done
g++ -shared "$build"/*.o -o "$build/libemulated.so" -L"$torch/lib" -ltorch -ltorch_cpu -lc10 -Wl,-rpath,"$torch/lib"
cat > "$build/emulated_kernels.py" <<END
import os
os.environ["NCPVAE_DISABLE_NATIVE"] = "1"
import torch, ncpvae.ops
torch.ops.load_library("$PWD/$build/libemulated.so")
END
PYTHONPATH="$build:python" "$python" -m pytest -p emulated_kernels -q "${@:-tests/ops/test_similarity_logsumexp.py}"
