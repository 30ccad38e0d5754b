#!/bin/sh
# Makes an image of the program berth and nothing else, for berth-proxy.yaml, with no more than tar, gzip and sha256sum:
#     sh image.sh /usr/local/bin/berth registry.example/berth:0.1.0 berth.tar
# berth.tar is an OCI layout. `berth images import berth.tar` gives it to a node, for which no registry is needed.
set -eu
if [ $# -ne 3 ]; then
	echo "usage: image.sh PROGRAM NAME:TAG ARCHIVE" >&2
	exit 2
fi
program=$1 name=$2 archive=$3
case $(uname -m) in
x86_64) architecture=amd64 ;;
aarch64) architecture=arm64 ;;
*) architecture=$(uname -m) ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
blobs=$work/layout/blobs/sha256
mkdir -p "$blobs" "$work/root/usr/local/bin"
install -m 755 "$program" "$work/root/usr/local/bin/berth"

digest() { sha256sum "$1" | cut -d ' ' -f 1; }
# keep TYPE FILE moves a file to the blobs, and is its descriptor.
keep() {
	hash=$(digest "$2")
	printf '"mediaType":"%s","digest":"sha256:%s","size":%s' "$1" "$hash" "$(stat -c %s "$2")"
	mv "$2" "$blobs/$hash"
}

# The same program makes the same image.
tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=a+rX,go-w --file "$work/layer" --directory "$work/root" usr
unpacked=$(digest "$work/layer")
gzip -n "$work/layer"
oci=application/vnd.oci.image
layer=$(keep $oci.layer.v1.tar+gzip "$work/layer.gz")
printf '{"architecture":"%s","os":"linux","config":{"Entrypoint":["/usr/local/bin/berth"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
	"$architecture" "$unpacked" > "$work/config"
config=$(keep $oci.config.v1+json "$work/config")
printf '{"schemaVersion":2,"mediaType":"%s","config":{%s},"layers":[{%s}]}' $oci.manifest.v1+json "$config" "$layer" > "$work/manifest"
manifest=$(keep $oci.manifest.v1+json "$work/manifest")
printf '{"schemaVersion":2,"manifests":[{%s,"annotations":{"io.containerd.image.name":"%s"}}]}' "$manifest" "$name" > "$work/layout/index.json"
printf '{"imageLayoutVersion":"1.0.0"}' > "$work/layout/oci-layout"
tar --create --file "$archive" --directory "$work/layout" oci-layout index.json blobs
