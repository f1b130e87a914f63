#!/usr/bin/env bash
# Starts a job from a template that templates/build.sh made.
set -euo pipefail

usage() {
  cat >&2 <<'USAGE'
usage: templates/run.sh FOLDER TASK --region=REGION [GCLOUD_FLAG ...] -- NAME=VALUE ...

  FOLDER       of the templates, such as gs://my-bucket/templates
  TASK         generate, embed or classify
  GCLOUD_FLAG  of gcloud dataflow flex-template run, such as --max-workers=4
  NAME=VALUE   a parameter, named as the pipeline's flag is, such as model=gs://my-bucket/model
USAGE
  exit 2
}

[[ $# -ge 3 ]] || usage
folder=${1%/} task=$2
shift 2
settings=()
while [[ $# -gt 0 && $1 != -- ]]; do
  settings+=("$1")
  shift
done
[[ ${1:-} == -- ]] || usage
shift

image=
parameters=()
for parameter in "$@"; do
  [[ $parameter == *=* ]] || usage
  [[ $parameter != sdk_container_image=* ]] || image=${parameter#*=}
  # By default commas part parameters; no value holds this separator of units.
  parameters+=("--parameters=^"$'\x1f'"^$parameter")
done
if [[ -z $image ]]; then
  image=$(gcloud storage cat "$folder/worker-image.txt")
  parameters+=("--parameters=sdk_container_image=$image")
fi

gcloud dataflow flex-template run "beam-gemma-$task-$(date -u +%Y%m%d-%H%M%S)" \
  --template-file-gcs-location="$folder/$task.json" \
  --staging-location="$folder/staging" --temp-location="$folder/temp" \
  "${settings[@]}" "${parameters[@]}"
