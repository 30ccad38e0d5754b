# `make help` lists the targets. Versions and paths may be given: make build VERSION=1.2.3, make install PREFIX=/usr.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --dirty --match 'v[0-9]*' 2>/dev/null | sed 's/^v//' | grep . || echo 0.1.0-dev)
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
PREFIX ?= /usr/local
CNI_BIN ?= /opt/cni/bin
DESTDIR ?=
# What to run of the integration tests: make test-integration RUN='TestKubelet/pods/logs'
RUN ?= .
# The same for the machine of integration/vm: with a shell as process 1, with systemd, and with SELinux instead of AppArmor.
VM_RUN ?= ^(TestCritest|TestUserNamespaces|TestEachLimit|TestOOMKilled|TestPidsLimit|TestResize|TestFields|TestTraps|TestPodView|TestExecIsInItsContainersCgroups|TestKilledExecServerLeavesNothing)$$
VM_PROXY_RUN ?= ^(TestAbilities|TestRestartChangesNothing|TestListingIsReadable)$$
VM_SYSTEMD_RUN ?= ^TestSystemdDriver$$
VM_SELINUX_RUN ?= ^(TestSELinux|TestCritestSELinux)$$

# How many Services `make bench-proxy` measures beside; kube-proxy up to 10,000 of them.
SIZES ?= 1000 5000 10000 30000

# How many Services proxies are measured beside in `make compare`.
COMPARE ?= 1000 10000

# The clusters of `make bench-cluster`, one after the other.
ORDER ?= berth containerd

# What `make test-kubeadm` runs.
KUBEADM_TOOLS := etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl kubeadm registry busybox dns

# What `make test-cluster` runs.
CLUSTER_TOOLS := etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox dns traefik metrics-server

# What `make test-vm-cluster` runs.
VM_CLUSTER_TOOLS := etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox

# Nodes of `make cluster`, and what it has beside CoreDNS: traefik, metrics-server. The node of `make cluster-start`.
N ?= 2
ADDONS ?=
NODE ?= node-1

# What makes clusters, starts nodes and takes clusters down.
CLUSTER_MAKER = integration/progress.sh 'build the maker of clusters' $(GO) build -o bin/cluster ./integration/cluster/run

# Which fuzz targets to run, and for how long each.
FUZZ ?= .
export FUZZTIME ?= 1m

STAMP := -X github.com/berth-run/berth/internal/version.Version=$(VERSION) -X github.com/berth-run/berth/internal/version.Commit=$(COMMIT)
# osusergo and netgo: static programs must not ask glibc's loadable modules; runc_nocriu: nothing here checkpoints.
SHIM_TAGS := seccomp osusergo netgo runc_nocriu
GO ?= go

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the Debian packages that are missing, saying what and why
	@integration/setup.sh

build: setup ## build bin/berth, bin/berth-shim and the reference CNI plugins in bin/cni
	@mkdir -p bin
	@CGO_ENABLED=0 integration/progress.sh 'build berth $(VERSION)' $(GO) build -trimpath -tags nri_no_wasm -ldflags '-s -w $(STAMP)' -o bin/berth ./cmd/berth
	@CGO_ENABLED=1 integration/progress.sh 'build berth-shim' $(GO) build -trimpath -tags '$(SHIM_TAGS)' \
		-ldflags '-s -w $(STAMP) -extldflags -static' -o bin/berth-shim ./cmd/berth-shim
	@read -r _ dir < <(integration/tools/build.sh cni); diff -rq "$$dir" bin/cni > /dev/null 2>&1 || { rm -rf bin/cni; cp -r "$$dir" bin/cni; }

demo: build ## a kubelet runs a pod of three containers on berth, which is killed meanwhile
	@integration/tools/build.sh registry cni crictl kubelet > /dev/null
	@integration/progress.sh 'build demo' $(GO) build -o bin/demo ./integration/demo
	@exec bin/demo

cluster: setup ## a Kubernetes cluster on this machine, of N (2) nodes made of berth; needs root; ADDONS="traefik metrics-server"; K8S_BIN names programs of one's own
	@$(CLUSTER_MAKER)
	@bin/cluster check '$(N)' $(ADDONS) # before all the building
	@$(MAKE) --no-print-directory build
	@[ -n "$${K8S_BIN:-}" ] || integration/tools/build.sh etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox > /dev/null
	@exec bin/cluster up '$(N)' $(ADDONS)

cluster-start: ## start what does not run on a NODE (node-1) of make cluster: kubelet, berth serve, berth proxy
	@[ -x bin/cluster ] || $(CLUSTER_MAKER)
	@exec bin/cluster start '$(NODE)'

cluster-down: ## the end of make cluster: nothing of it is left
	@[ -x bin/cluster ] || $(CLUSTER_MAKER)
	@exec bin/cluster down

test: vet test-unit test-integration ## everything that CI runs
	@echo 'test: all passed. Next: make demo; make bench; make test-integration RUN=TestKubelet/pods/logs'

vet: setup ## static checks that need no tool: gofmt, go vet, import rules
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo 'run make fmt, for:'; gofmt -l $$(git ls-files '*.go'); exit 1; }
	@integration/progress.sh vet $(GO) vet -tags 'integration seccomp' ./...
	@integration/progress.sh 'import rules' $(GO) test ./internal/archtest

test-unit: setup ## unit tests of all packages, with the race detector
	@read -r _ BERTH_CNI_BIN < <(integration/tools/build.sh cni); export BERTH_CNI_BIN; \
		CGO_ENABLED=1 integration/progress.sh test-unit integration/test.sh test-unit ./... -race -tags seccomp

test-integration: build ## kubelet, crictl, critest, kill matrix, attacks: real peers; needs root
	@integration/tools/build.sh > /dev/null
	@integration/progress.sh test-integration integration/test.sh test-integration ./integration \
		-tags integration -count=1 -timeout 80m -run '$(RUN)'

test-vm: build ## critest and others in a virtual machine: cgroup v2, AppArmor, SELinux, ext4, systemd (no KVM needed; an hour)
	@integration/tools/build.sh > /dev/null
	@$(GO) test -c -tags integration -o bin/integration.test ./integration
	@integration/progress.sh 'test-vm' integration/count.sh bin/test-vm.log \
		integration/vm/run.sh -t 7200 integration/vm/tests.sh '$(VM_RUN)'
	@for p in proxy/nft proxy/ipvs proxy/iptables network; do CGO_ENABLED=0 $(GO) test -c -o bin/$${p##*/}.test ./$$p; done
	@integration/progress.sh 'test-vm of the proxy' integration/count.sh bin/test-vm-proxy.log \
		integration/vm/run.sh -t 3600 integration/vm/proxy.sh '$(VM_PROXY_RUN)'
	@integration/progress.sh 'test-vm with systemd' integration/count.sh bin/test-vm-systemd.log \
		integration/vm/run.sh -s -t 3600 integration/vm/tests.sh '$(VM_SYSTEMD_RUN)'
	@integration/progress.sh 'test-vm with SELinux' integration/count.sh bin/test-vm-selinux.log \
		integration/vm/run.sh -e -t 3600 integration/vm/tests.sh '$(VM_SELINUX_RUN)'

test-storm: build ## a minute of a hundred exec probes a second, half of which time out and leave daemons behind; then 3,000 of these
	@for storm in '1m 100' '150s 40'; do read -r lasts rate <<< "$$storm"; \
		BERTH_TOOLS="registry cni crictl busybox" BERTH_STORM=$$lasts BERTH_STORM_RATE=$$rate integration/progress.sh "test-storm, $$rate a second" \
		$(GO) test -tags integration -count=1 -timeout 15m -v -run '^TestProbeStorm$$' ./integration; done

test-cluster: build ## clusters of two nodes: Services across nodes, containers and a node killed; the story of an application; evictions; all down, nothing left (30 minutes, of which the API server is gone for ten: BERTH_OUTAGE; and ten to build Traefik, once)
	@integration/setup.sh browser
	@integration/tools/build.sh $(CLUSTER_TOOLS) > /dev/null
	@BERTH_CLUSTER=1 BERTH_OUTAGE=$${BERTH_OUTAGE:-10m} BERTH_TOOLS="$(CLUSTER_TOOLS)" integration/progress.sh test-cluster \
		$(GO) test -tags integration -count=1 -timeout 60m -v -run '^TestCluster(OfOne|Story|Eviction)?$$' ./integration

test-vm-cluster: build ## a node in a virtual machine, with cgroup v2 and a clock of its own, in a cluster: its clock is set wrong (10 minutes)
	@integration/tools/build.sh $(VM_CLUSTER_TOOLS) > /dev/null
	@BERTH_CLUSTER_VM=1 BERTH_TOOLS="$(VM_CLUSTER_TOOLS)" integration/progress.sh test-vm-cluster \
		$(GO) test -tags integration -count=1 -timeout 60m -v -run '^TestClusterNodeInVM$$' ./integration

test-kubeadm: build ## kubeadm makes a cluster of two nodes on berth, its control plane in pods, and takes it down (2 minutes)
	@integration/tools/build.sh $(KUBEADM_TOOLS) > /dev/null
	@BERTH_KUBEADM=1 BERTH_TOOLS="$(KUBEADM_TOOLS)" integration/progress.sh test-kubeadm \
		$(GO) test -tags integration -count=1 -timeout 40m -v -run '^TestKubeadm$$' ./integration

test-e2e-proxy: build ## Kubernetes' own end-to-end tests of Services, on a cluster of three nodes (20 minutes)
	@integration/tools/build.sh etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox e2e dns > /dev/null
	@BERTH_E2E=1 BERTH_TOOLS="etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox e2e dns" integration/progress.sh test-e2e-proxy \
		$(GO) test -tags integration -count=1 -timeout 120m -v -run '^TestUpstreamServices$$' ./integration

test-conformance: build ## Kubernetes' own tests of conformance, on a cluster of three nodes (an hour)
	@integration/tools/build.sh etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox e2e sample-apiserver dns > /dev/null
	@BERTH_E2E=1 BERTH_TOOLS="etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox e2e sample-apiserver dns" integration/progress.sh test-conformance \
		$(GO) test -tags integration -count=1 -timeout 240m -v -run '^TestConformance$$' ./integration

test-churn: build ## 110 pods at once, then 200 short ones a minute for ten minutes: nothing is left, memory as before (20 s of it in CI)
	@BERTH_TOOLS="registry cni crictl busybox" BERTH_CHURN=10m integration/progress.sh test-churn \
		$(GO) test -tags integration -count=1 -timeout 30m -v -run '^(TestPodsAtOnce|TestPodChurn)$$' ./integration

test-oom: build ## 500 containers run out of memory: each is told so, in its first status that says Exited
	@BERTH_TOOLS="registry cni crictl busybox" BERTH_OOM_RUNS=500 integration/progress.sh test-oom $(GO) test -tags integration -count=1 -timeout 60m -v -run 'TestOOMKilled$$' ./integration

test-powercut: setup ## the power of a disk with images is cut at 150 moments of pulls and removals (15 in the unit tests)
	@BERTH_POWERCUTS=150 integration/progress.sh test-powercut $(GO) test -count=1 -timeout 30m -v -run '^TestContainerd5854_PowerCut$$' ./images

test-faults: setup ## 500 pulls from a registry of which a third of the answers goes wrong (BERTH_FAULTS_SEED=1: which)
	@BERTH_FAULTS=500 integration/progress.sh test-faults $(GO) test -count=1 -timeout 60m -v -run '^TestPullsThroughFaults$$' ./images

test-conntrack: setup ## a million tracked connections: changes of Services do not wait for those that are removed (32,768 in CI)
	@BERTH_CONNTRACK_ENTRIES=1000000 integration/progress.sh test-conntrack $(GO) test -count=1 -timeout 30m -v -run '^TestK8s135323_AMillionEntries$$' ./proxy/conntrack

test-proxy-differential: setup ## 2,500 random clusters: the proxy's model does with packets what kube-proxy's own rules do (150 in CI); its tables; its rules in the kernel
	@read -r _ BERTH_KUBEPROXY < <(integration/tools/build.sh kubeproxy-tests); export BERTH_KUBEPROXY; \
		export BERTH_CLUSTERS=$${BERTH_CLUSTERS:-2500} BERTH_WORLDS=$${BERTH_WORLDS:-50}; \
		integration/progress.sh test-proxy-differential $(GO) test -tags integration -count=1 -timeout 60m -v -run '^TestKubeProxy' ./proxy/model ./proxy/nodetest

fuzz: setup ## each fuzz target for FUZZTIME (1m); FUZZ=Layer: those whose names match; a table of inputs and findings
	@integration/progress.sh fuzz integration/fuzz.sh '$(FUZZ)'

bench: build ## measure berth: pod start, exec, removal, density, log; pulls beside containerd
	@integration/tools/build.sh registry cni crictl busybox containerd > /dev/null
	@integration/progress.sh bench $(GO) test -tags integration -count=1 -timeout 30m -run '^$$' -bench '$(RUN)' -benchtime 1x ./integration

bench-proxy: build ## berth proxy beside kube-proxy 1.37 with a real API server, 1,000 to 30,000 Services (SIZES="1000"; half an hour)
	@integration/tools/build.sh kube-apiserver kubectl etcd kube-proxy > /dev/null
	@BERTH_TOOLS="kube-apiserver kubectl etcd kube-proxy" BERTH_BENCH_PROXY="$(SIZES)" integration/progress.sh bench-proxy \
		$(GO) test -tags integration -count=1 -timeout 60m -run '^$$' -bench '^BenchmarkServiceProxy$$' -benchtime 1x ./integration

compare: build ## berth beside containerd and kube-proxy in one run: pods, exec, logs, lists, pulls, Services; a table (12 minutes)
	@integration/tools/build.sh registry cni crictl busybox containerd kube-apiserver kubectl etcd kube-proxy > /dev/null
	@BERTH_TOOLS="registry cni crictl busybox containerd kube-apiserver kubectl etcd kube-proxy" BERTH_COMPARE="$(COMPARE)" integration/progress.sh compare \
		$(GO) test -tags integration -count=1 -timeout 60m -run '^$$' -bench '^BenchmarkCompare$$' -benchtime 1x ./integration

bench-cluster: build ## fifty pods made and deleted ten times on two nodes of berth, then of containerd and kube-proxy (ORDER="containerd berth"; 15 minutes)
	@integration/tools/build.sh etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox containerd cni kube-proxy > /dev/null
	@BERTH_TOOLS="etcd kube-apiserver kube-scheduler kube-controller-manager kubelet kubectl registry busybox containerd cni kube-proxy" BERTH_BENCH_CLUSTER="$(ORDER)" \
		integration/progress.sh bench-cluster $(GO) test -tags integration -count=1 -timeout 90m -v -run '^TestFiftyPods$$' ./integration

test-proxy-scale: build ## a node's proxy starts in a cluster of 250,000 endpoints in 5,000 Services, beside forwarded traffic (3 minutes)
	@integration/tools/build.sh kube-apiserver kubectl etcd > /dev/null
	@BERTH_TOOLS="kube-apiserver kubectl etcd" BERTH_PROXY_SCALE=1 integration/progress.sh test-proxy-scale \
		$(GO) test -tags integration -count=1 -timeout 30m -v -run '^TestK8s135639_ProxyScale$$' ./integration

lint: setup ## golangci-lint with the configuration of this repository
	@read -r _ linter < <(integration/tools/build.sh golangci-lint); integration/progress.sh lint "$$linter" run

fmt: ## format all code as the linter wants it
	@read -r _ linter < <(integration/tools/build.sh golangci-lint); "$$linter" fmt

install: build ## install to PREFIX (default /usr/local), plugins that are not there yet to CNI_BIN
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin bin/berth bin/berth-shim
	install -d -m 755 $(DESTDIR)$(CNI_BIN)
	cp --update=none bin/cni/* $(DESTDIR)$(CNI_BIN)/ 2>/dev/null || cp -n bin/cni/* $(DESTDIR)$(CNI_BIN)/

clean: ## remove what was built here; tools in the cache stay (rm -rf ~/.cache/berth)
	rm -rf bin

.PHONY: help setup build demo cluster cluster-start cluster-down test test-cluster test-vm-cluster test-kubeadm test-e2e-proxy test-conformance vet test-unit test-integration test-vm test-storm test-churn test-oom test-faults test-powercut test-conntrack test-proxy-differential test-proxy-scale fuzz bench bench-proxy bench-cluster compare lint fmt install clean
