#!/usr/bin/env bash
# Builds the images by Cloud Build, and from them one Flex Template for each pipeline.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 || ! ${3:-gpu} =~ ^(gpu|cpu)$ ]]; then
  cat >&2 <<'USAGE'
usage: templates/build.sh REPOSITORY FOLDER [gpu|cpu]

  REPOSITORY  of Artifact Registry, such as europe-west4-docker.pkg.dev/my-project/beam-gemma
  FOLDER      for the templates, such as gs://my-bucket/templates
  gpu|cpu     what workers run on (default: gpu)

The project is that of gcloud: gcloud config set project my-project.
USAGE
  exit 2
fi
repository=$1 folder=${2%/} device=${3:-gpu}
cd "$(dirname "$0")/.."

tag=$(git describe --always --dirty)
gcloud builds submit . --config=templates/cloudbuild.yaml \
  --substitutions="_REPOSITORY=$repository,_TAG=$tag,_DEVICE=$device"

# A tag can be moved, so jobs name images by their digests.
digest_of() {
  gcloud artifacts docker images describe "$repository/$1:$tag" \
    --format='value(image_summary.fully_qualified_digest)'
}

worker=$(digest_of "worker-$device")
for task in generate embed classify; do
  launcher=$(digest_of "launcher-$task")
  gcloud dataflow flex-template build "$folder/$task.json" --image="$launcher" \
    --sdk-language=PYTHON --metadata-file="templates/$task.json"
done
# What templates/run.sh takes where no other sdk_container_image is given.
printf '%s' "$worker" | gcloud storage cp - "$folder/worker-image.txt"
