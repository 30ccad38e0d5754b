#!/usr/bin/env bash
# kubeproxy.sh OUT SRC builds test programs of kube-proxy's packages, with files of ours in them, into the directory OUT. SRC is a directory
# for the time of the build, the same each time, since Go compiles anew what has moved.
#
#   nftables  its proxier, the fake of nf_tables it writes to, and the tracer of its own tests: asked by proxy/model's tests
#   iptables  its proxier of that mode, and the fake of iptables: asked for its rules by proxy/nodetest's tests
#   proxy     its endpoints and slices
#
# Nothing of Kubernetes is kept in this repository: its files are those of the module cache, copied to where Go lets others be put
# beside them (it takes no overlay of its cache), and go with the copy.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 src=$2
proxy=$src/pkg/proxy
list() { (cd "$here/kubernetes" && go list -mod=readonly "$@"); }

rm -rf "$src" "$out"
mkdir -p "$src" "$out"
module=$(cd "$here/kubernetes" && go mod download k8s.io/kubernetes && go list -mod=readonly -m -f '{{.Dir}}' k8s.io/kubernetes)
cp "$module/go.mod" "$src/"
list -test -deps -f '{{with .Module}}{{if eq .Path "k8s.io/kubernetes"}}{{$.Dir}}{{end}}{{end}}' k8s.io/kubernetes/pkg/proxy/{,nftables,iptables} | sort -u |
  while read -r dir; do
    mkdir -p "$src/${dir#"$module"/}"
    find "$dir" -maxdepth 1 -type f -exec cp -t "$src/${dir#"$module"/}" {} +
  done
chmod -R u+w "$src"

# ours FILE PACKAGE: a file of this repository, as one of the package's tests.
ours() { sed -e "s/^package .*/package ${2##*/}/" "$1" > "$src/$2/berth_$(basename "$1" .go)_test.go"; }
# functions FILE PACKAGE NAME...: kube-proxy's own functions for its configuration are in a package that cannot be imported.
functions() {
  local from=$module/$1 to=$2
  shift 2
  for name; do
    awk -v "name=$name" 'index($0, "func " name "(") == 1 { on = 1 } on { print } on && /^}/ { exit }' "$from" >> "$src/$to"
  done
}
# tapped FILE NAME...: functions under another name, so that a file of ours has one that calls them and notes what for.
tapped() {
  local file=$proxy/$1
  shift
  for name; do
    grep -qE "^func (\([a-z]+ \*[A-Za-z]+\) )?$name\(" "$file" || { echo "$file has no func $name any more" >&2; exit 1; }
    sed -Ei "s/^(func (\([a-z]+ \*[A-Za-z]+\) )?)$name\(/\1theirs_$name(/" "$file"
  done
}

cp "$here/kubernetes/go.mod" "$src/berth.mod"
cp "$here/kubernetes/go.sum" "$src/berth.sum"
echo "replace k8s.io/kubernetes => $src" >> "$src/berth.mod"
# built PACKAGE: its test program, with the same flags as what build.sh builds, whose compiled packages then serve.
built() {
  (cd "$here/kubernetes" && CGO_ENABLED=0 go test -c -modfile="$src/berth.mod" -mod=readonly -ldflags '-s -w' -o "$out/${1##*/}" "k8s.io/kubernetes/$1")
}

for mode in nftables iptables; do
  for file in oracle.go $mode.go ../../../kubeproxy/wire.go; do
    ours "$here/kubernetes/kubeproxy/$file" pkg/proxy/$mode
  done
  functions cmd/kube-proxy/app/server.go pkg/proxy/$mode/berth_oracle_test.go expandNodePortAddressKeywords detectNodeIPs
  functions cmd/kube-proxy/app/server_linux.go pkg/proxy/$mode/berth_oracle_test.go getLocalDetectors
done
for file in tables.go write.go; do
  ours "$here/kubernetes/kubeproxy/$file" pkg/proxy/nftables
done
tapped nftables/proxier.go OnServiceUpdate OnEndpointSliceAdd OnEndpointSliceUpdate OnEndpointSliceDelete
tapped nftables/proxier_test.go NewFakeProxier
tapped nftables/helpers_test.go runPacketFlowTests
built pkg/proxy/nftables
built pkg/proxy/iptables

for file in choices.go write.go ../../../kubeproxy/wire.go; do
  ours "$here/kubernetes/kubeproxy/$file" pkg/proxy
done
tapped topology.go CategorizeEndpoints
tapped endpointslicecache.go endpointInfoByServicePort
built pkg/proxy
rm -rf "$src"
