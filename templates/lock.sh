#!/usr/bin/env bash
# Write what images install: every package with its hashes, and the same as an SBOM with licences.
#     templates/lock.sh cpu|gpu
# Run it as `make requirements`, after a change of setup.py or constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
device=$1
lock=templates/requirements-$device.txt
packages=build/packages-$device

# Versions are those of constraints.txt, so images run what the tests run. Debian 12, the images'
# system, has glibc 2.36.
uv pip compile --quiet setup.py --extra "$device" --constraint constraints.txt \
    --python-version 3.11 --python-platform x86_64-manylinux_2_36 \
    --generate-hashes --no-annotate --custom-compile-command "make requirements" \
    --output-file "$lock"

# Licences stand in the packages themselves, so they are installed for a moment.
uv venv --quiet --clear --python 3.11 "$packages"
VIRTUAL_ENV=$packages uv pip install --quiet --require-hashes --requirements "$lock"
uv tool run --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py environment \
    --output-reproducible --output-file "templates/sbom-$device.json" "$packages"
rm -r "$packages"

# Addresses of pages say nothing of what is installed.
python - "templates/sbom-$device.json" <<'PYTHON'
import json, pathlib, sys


def without_pages(fields):
    fields.pop("externalReferences", None)
    return fields


file = pathlib.Path(sys.argv[1])
sbom = json.loads(file.read_text(), object_hook=without_pages)
file.write_text(json.dumps(sbom, indent=2) + "\n")
PYTHON
