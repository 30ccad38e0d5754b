#!/usr/bin/env bash
# Builds the real peers that the integration tests and the demo run against, once for all clones on a machine.
#
#   build.sh [kubelet kube-apiserver kube-proxy kube-scheduler kube-controller-manager kubectl kubeadm kubeproxy-tests e2e sample-apiserver dns traefik metrics-server etcd containerd ctr crictl critest registry cni busybox gotestsum golangci-lint ...]
#   default: what the tests need
#
# Standard output: a line "NAME PATH" for each (cni: the directory of the plugins; kubeproxy-tests, e2e and metrics-server: directories, too). Progress goes to standard error.
# Results lie in $BERTH_CACHE (default ${XDG_CACHE_HOME:-$HOME/.cache}/berth), keyed by the modules.
# KUBELET=PATH uses that kubelet and builds none.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${BERTH_CACHE:-${XDG_CACHE_HOME:-${HOME:?set HOME or BERTH_CACHE}/.cache}/berth}
KUBERNETES=1.37.2
mkdir -p "$cache/tools"
unset GOFLAGS GOBIN # a developer's settings (-mod, -race, ...) must not end in a shared cache

say() { printf 'tools: %s\n' "$*" >&2; }

# run TITLE COMMAND... runs it with its output in a file, tells of progress every ten seconds, and shows the output's end
# when it fails. `go build -v` names a package a line: their number is the best measure of progress there is.
run() {
  local title=$1 log pid start now next
  shift
  log=$(mktemp "$cache/log.XXXXXX")
  start=$(date +%s) next=$((start + 2))
  "$@" > "$log" 2>&1 < /dev/null &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    now=$(date +%s)
    if [ "$now" -ge "$next" ]; then
      say "$title: $((now - start)) s, $(wc -l < "$log") ${unit:-packages} so far"
      next=$((now + 10))
    fi
    sleep 0.2
  done
  if ! wait "$pid"; then
    say "$title failed; the end of its output:"
    tail -n 30 "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
  say "$title: done in $(($(date +%s) - start)) s"
}

# slot MODULE prints the directory for what is built from that module: a change of the module is a new one. Raise RECIPE
# when how things are built changes.
RECIPE=1
slot() {
  local sum
  sum=$( (cat "$here/$1/go.mod" "$here/$1/go.sum"; echo "$RECIPE") | sha256sum | cut -c1-16)
  printf '%s/tools/%s-%s' "$cache" "$1" "$sum"
}

# once OUT COMMAND... runs the command, which makes OUT, unless OUT is there. Of two clones that want the same one builds it,
# and the other waits and finds it done.
once() {
  local out=$1
  shift
  [ ! -e "$out" ] || return 0
  (
    if ! flock -n 9; then
      say "waiting for another build of ${out##*/}"
      flock 9
    fi
    [ -e "$out" ] || "$@" 9>&-
  ) 9> "${out%/*}.lock"
}

# gobuild MODULE OUT PACKAGE [LDFLAGS]: static, stripped, from the pinned module; visible under its name only when whole.
gobuild() {
  local dir=$here/$1 out=$2 pkg=$3 ld="-s -w ${4:-}"
  mkdir -p "$(dirname "$out")"
  (cd "$dir" && CGO_ENABLED=0 run "build ${out##*/}" go build -v -mod=readonly -ldflags "$ld" -o "$out.part" "$pkg")
  mv "$out.part" "$out"
}

# kubernetes NAME [MODULE] builds a program of Kubernetes.
kubernetes() {
  local out module=${2:-kubernetes}
  out=$(slot "$module")/$1
  once "$out" gobuild "$module" "$out" "k8s.io/kubernetes/cmd/$1" "-X k8s.io/component-base/version.gitVersion=v$KUBERNETES"
  echo "$1 $out"
}

kubelet() {
  if [ -z "${KUBELET:-}" ]; then
    kubernetes kubelet # about 7 minutes on two cores
    return
  fi
  [ -x "$KUBELET" ] || { say "KUBELET=$KUBELET is not a program"; exit 1; }
  echo "kubelet $KUBELET"
}

kube-apiserver() { kubernetes kube-apiserver; }

kube-proxy() { kubernetes kube-proxy kube-proxy; }

kubectl() { kubernetes kubectl; }

kube-scheduler() { kubernetes kube-scheduler controllers; }

kube-controller-manager() { kubernetes kube-controller-manager controllers; }

kubeadm() { kubernetes kubeadm kubeadm; }

# kube-proxy's tests with files of this repository in them, of which a change is a new build, too.
kubeproxy-tests() {
  local out
  out=$(slot kubernetes)/kubeproxy-tests/$(cat "$here/kubeproxy.sh" "$here"/kubernetes/kubeproxy/*.go "$here/../kubeproxy/wire.go" | sha256sum | cut -c1-16)
  mkdir -p "${out%/*}"
  once "$out" build_kubeproxy_tests "$out"
  echo "kubeproxy-tests $out"
}

build_kubeproxy_tests() {
  unit="lines of output" run "build kube-proxy's tests" "$here/kubeproxy.sh" "$1.part" "${1%/*}/src"
  mv "$1.part" "$1"
}

# CoreDNS with those of its plugins that a cluster's DNS has.
dns() {
  local out
  out=$(slot dns)/coredns-$(sha256sum < "$here/dns/main.go" | cut -c1-16) # its plugins
  once "$out" gobuild dns "$out" .
  echo "dns $out"
}

# An ingress controller, with all that it knows: 2,300 packages.
traefik() {
  local out
  out=$(slot traefik)/traefik
  once "$out" gobuild traefik "$out" github.com/traefik/traefik/v3/cmd/traefik
  echo "traefik $out"
}

# The program, and the manifests that it comes with.
metrics-server() {
  local out
  out=$(slot metrics-server)/bin
  once "$out" build_metrics_server "$out"
  echo "metrics-server $out"
}

build_metrics_server() {
  local out=$1 module
  rm -rf "$out.part"
  mkdir -p "$out.part"
  (cd "$here/metrics-server" && CGO_ENABLED=0 run "build metrics-server" go build -v -mod=readonly -ldflags '-s -w' -o "$out.part/" \
    sigs.k8s.io/metrics-server/cmd/metrics-server)
  module=$(cd "$here/metrics-server" && go list -mod=readonly -m -f '{{.Dir}}' sigs.k8s.io/metrics-server)
  cp -r --no-preserve=mode "$module/manifests/base" "$out.part/manifests"
  mv "$out.part" "$out"
}

# Kubernetes' own end-to-end tests: e2e.test, ginkgo, which runs it several times at once, and what is in their images.
e2e() {
  local out
  out=$(slot e2e)/bin-2
  once "$out" build_e2e "$out"
  once "$out/regression-issue-74839" gobuild e2e "$out/regression-issue-74839" k8s.io/kubernetes/test/images/regression-issue-74839
  once "$out/images" copy_e2e_images "$out/images"
  echo "e2e $out"
}

# What images of the tests have beside agnhost.
copy_e2e_images() {
  local out=$1 kubernetes image
  kubernetes=$(cd "$here/e2e" && go list -mod=readonly -m -f '{{.Dir}}' k8s.io/kubernetes)
  rm -rf "$out.part"
  for image in kitten nautilus; do
    install -D -m 644 -t "$out.part/$image" "$kubernetes/test/images/$image"/html/*
  done
  mv "$out.part" "$out"
}

build_e2e() {
  local out=$1 kubernetes version=k8s.io/component-base/version
  rm -rf "$out.part"
  mkdir -p "$out.part"
  kubernetes=$(cd "$here/e2e" && go list -mod=readonly -m -f '{{.Dir}}' k8s.io/kubernetes)
  cp "$kubernetes"/test/images/agnhost/porter/localhost.* "$kubernetes/test/images/agnhost/VERSION" "$out.part/"
  (cd "$here/e2e" && CGO_ENABLED=0 run "build ginkgo and agnhost" go build -v -mod=readonly -ldflags '-s -w' -o "$out.part/" \
    github.com/onsi/ginkgo/v2/ginkgo k8s.io/kubernetes/test/images/agnhost)
  # Some of the tests ask for what the version is by number.
  (cd "$here/e2e" && CGO_ENABLED=0 run "build e2e.test" go test -c -v -mod=readonly -ldflags "-s -w -X $version.gitVersion=v$KUBERNETES \
    -X $version.gitMajor=${KUBERNETES%%.*} -X $version.gitMinor=$(cut -d. -f2 <<< "$KUBERNETES")" -o "$out.part/e2e.test" k8s.io/kubernetes/test/e2e)
  mv "$out.part" "$out"
}

# The API server that the tests of aggregation run as a pod.
sample-apiserver() {
  local out
  out=$(slot sampleapiserver)/sample-apiserver
  once "$out" gobuild sampleapiserver "$out" k8s.io/sample-apiserver
  echo "sample-apiserver $out"
}

etcd() {
  local out
  out=$(slot etcd)/etcd
  once "$out" gobuild etcd "$out" go.etcd.io/etcd/server/v3
  echo "etcd $out"
}

containerd() {
  local out
  out=$(slot containerd)/bin
  once "$out" build_containerd "$out"
  echo "containerd $out"
}

ctr() {
  local out
  out=$(slot containerd)/ctr
  once "$out" gobuild containerd "$out" github.com/containerd/containerd/v2/cmd/ctr
  echo "ctr $out"
}

# The runtime that berth is compared with. runc alone needs cgo (libcontainer's nsenter).
build_containerd() {
  local out=$1
  rm -rf "$out.part"
  mkdir -p "$out.part"
  (cd "$here/containerd" && CGO_ENABLED=0 run "build containerd" go build -v -mod=readonly -ldflags '-s -w' -o "$out.part/" \
    github.com/containerd/containerd/v2/cmd/containerd github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2)
  (cd "$here/containerd" && CGO_ENABLED=1 run "build runc" go build -v -mod=readonly -tags 'seccomp osusergo netgo' \
    -ldflags '-s -w -extldflags -static' -o "$out.part/" github.com/opencontainers/runc)
  mv "$out.part" "$out"
}

crictl() {
  local out
  out=$(slot cri)/crictl
  once "$out" gobuild cri "$out" sigs.k8s.io/cri-tools/cmd/crictl
  echo "crictl $out"
}

critest() {
  local out
  out=$(slot cri)/critest
  once "$out" build_critest "$out"
  echo "critest $out"
}

build_critest() {
  local out=$1
  mkdir -p "${out%/*}"
  (cd "$here/cri" && CGO_ENABLED=0 run "build critest" go test -c -v -mod=readonly -ldflags '-s -w' -o "$out.part" sigs.k8s.io/cri-tools/cmd/critest)
  mv "$out.part" "$out"
}

registry() {
  local out
  out=$(slot registry)/registry
  once "$out" gobuild registry "$out" github.com/distribution/distribution/v3/cmd/registry
  echo "registry $out"
}

cni() {
  local out
  out=$(slot cni)/bin
  once "$out" build_cni "$out"
  echo "cni $out"
}

build_cni() {
  local out=$1 pkgs
  rm -rf "$out.part"
  mkdir -p "$out.part"
  # tools.go names the plugins; one build for all shares what they have in common.
  pkgs=$(sed -n 's/^\t_ "\(.*\)"$/\1/p' "$here/cni/tools.go")
  # shellcheck disable=SC2086 # a list of words
  (cd "$here/cni" && CGO_ENABLED=0 run "build the CNI plugins" go build -v -mod=readonly -ldflags '-s -w' -o "$out.part/" $pkgs)
  mv "$out.part" "$out"
}

busybox() {
  local out=$cache/tools/busybox-2
  once "$out" build_busybox "$out"
  echo "busybox $out"
}

# Debian's busybox-static lacks applets that critest needs (pgrep, ipcs) and runs applets without exec.
build_busybox() {
  unit="lines of output" run "build a static busybox from Debian's source package" "$here/busybox.sh" "$1.part"
  mv "$1.part" "$1"
}

gotestsum() {
  local out
  out=$(slot gotestsum)/gotestsum
  once "$out" gobuild gotestsum "$out" gotest.tools/gotestsum
  echo "gotestsum $out"
}

golangci-lint() {
  local out
  out=$(slot lint)/golangci-lint
  once "$out" gobuild lint "$out" github.com/golangci/golangci-lint/v2/cmd/golangci-lint
  echo "golangci-lint $out"
}

[ $# -gt 0 ] || set -- registry cni crictl busybox critest kubelet kube-apiserver kubectl kubeproxy-tests etcd containerd ctr
for tool; do
  case $tool in
  kubelet | kube-apiserver | kube-proxy | kube-scheduler | kube-controller-manager | kubectl | kubeadm | kubeproxy-tests | e2e | sample-apiserver | dns | traefik | metrics-server | etcd | containerd | ctr | crictl | critest | registry | cni | busybox | gotestsum | golangci-lint) "$tool" ;;
  *) say "no tool is called $tool"; sed -n 4p "$0" >&2; exit 2 ;;
  esac
done
