#!/usr/bin/env bash
# image.sh DIRECTORY: the image of the version in pyproject.toml for amd64 and arm64, as an OCI archive in DIRECTORY. It
# needs docker buildx and a builder for several platforms. IMAGE_OUTPUT=--push IMAGE=registry.example/name pushes it
# instead; PLATFORMS chooses others.
set -euo pipefail

directory=$1
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
image=${IMAGE:-distributor-node}
docker buildx version >/dev/null 2>&1 || {
    echo "The image needs docker buildx, which is not here (on Debian: the package docker-buildx)." >&2
    exit 1
}
driver=$(docker buildx inspect | sed -n 's/^Driver: *//p')
if [ "$driver" = docker ] && [ "${IMAGE_OUTPUT:-}" != --load ] &&
    [[ $(docker info --format '{{.DriverStatus}}') != *containerd.snapshotter* ]]; then
    echo "The chosen builder makes images for this machine only. Make one that can do more: docker buildx create --use" >&2
    exit 1
fi
mkdir -p "$directory"
docker buildx build --target node \
    --platform "${PLATFORMS:-linux/amd64,linux/arm64}" \
    --build-arg VERSION="$version" \
    --build-arg REVISION="$(git rev-parse HEAD)" \
    --build-arg CREATED="$(git log -1 --format=%cI)" \
    --tag "$image:$version" \
    ${IMAGE_OUTPUT:---output "type=oci,dest=$directory/distributor-node-$version.oci.tar"} .
