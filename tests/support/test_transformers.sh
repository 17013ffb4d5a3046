#!/usr/bin/env bash
# Run what depends on transformers at both ends of the range that setup.cfg allows. Each release is put into a folder of
# its own, which comes first on Python's path; everything else is that of the environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="$1"
range=$(sed -n 's/^ *transformers\(>=.*\)$/\1/p' setup.cfg)
lowest=$(sed 's/^>=\([0-9.]*\),.*/\1/' <<<"$range")

for wanted in "==$lowest.*" "$range"; do
    folder=".transformers/$([[ "$wanted" == "$range" ]] && echo highest || echo lowest)"
    rm -rf "$folder"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "transformers$wanted"
    PYTHONPATH="$PWD/$folder" "$python" -c "import transformers; print('transformers', transformers.__version__)"
    PYTHONPATH="$PWD/$folder" "$python" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
        tests/test_internals.py tests/test_arguments.py tests/models tests/training
done
