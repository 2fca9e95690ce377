#!/usr/bin/env bash
# The GPU path, checked and measured: see benchmarks/gpu.py, whose options it takes.
#
# What the machine lacks is taken from wheels in .whl beside this checkout's README, if there are any; nothing is downloaded, and
# nothing stays installed. Fill that folder where there is a network, for the Python of the GPU machine (here 3.12):
#
#   python3 -m pip download --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
#     --platform manylinux2014_x86_64 -d .whl blake3 zstandard structlog pydantic "nvidia-libnvcomp-cu13>=6,<7"
#
# (37 MB; -cu12 for a driver of CUDA 12.) A start needs numpy, blake3 and zstandard; structlog and pydantic are for its log and
# for settings that are wrong. The tests need pytest with pytest-timeout, pytest-xdist and hypothesis; those of a bucket also
# moto and boto3, without which they are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
shopt -s nullglob
wheels=(.whl/*.whl)
if [ "${#wheels[@]}" -gt 0 ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "${wheels[@]}"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  for folder in "$site"/nvidia/libnvcomp/lib*; do  # another package of NVIDIA's may hide it from Python, not from the loader
    export LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  done
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0
"$python" -m benchmarks.gpu "$@" || status=$?
exit "$status"
